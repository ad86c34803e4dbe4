"""How far do stored features lie from recomputed ones, and which predictions does that change?

    python benchmarks/stored_features.py run [--sets flowers5,dogs10,hotdog,cats_dogs] [--seeds 0]
    python benchmarks/stored_features.py table [--write]      # the table in docs/benchmarks.md, from the records

Needs the folder of real pictures and weights (HEADSTART_SHARED, else ../shared). Backbone mobilenetv2_100 with ImageNet
weights at 224 px. For each format in which a frozen pass computes (bfloat16 where the machine has it, float32): the
head of the default recipe is trained on that pass's stored features, and then gives its predictions of every picture of
the set (all splits, plain views) twice: from features that such a pass stores, and from pixels in float32, as `predict`
computes. `changed` lists the pictures whose most probable class is another one, with the probability that `predict`
gives the class it names. The baseline is `predict`. Records are appended to
benchmarks/results/stored_features-DATE.jsonl.
"""

from __future__ import annotations

from typing import Any

import torch
from records import SHARED, WEIGHTS, append, newest, parser, show

import headstart
from headstart.dataset import ImageTable
from headstart.evaluation import predict_logits
from headstart.numerics import bf16_works
from headstart.once import store_features
from headstart.pixels import Pixels
from headstart.runtime import make_runtime

SETS = ("flowers5", "dogs10", "hotdog", "cats_dogs")


def compared(name: str, seed: int, precision: str) -> dict[str, Any]:
    """One set in one format of the frozen pass."""
    splits = headstart.split(headstart.load_images(SHARED / "data" / name), seed=seed)
    model = headstart.create_classifier(
        "mobilenetv2_100", splits.class_names, weights=str(WEIGHTS), interpolation="bilinear", seed=seed
    )
    headstart.set_freeze_line(model, "head")
    runtime = make_runtime(device="cpu", precision=precision)
    headstart.fit(model, splits, seed=seed, runtime=runtime)
    model.eval()
    apart, largest, changed, pictures = [], 0.0, [], 0
    for table in (splits.train, splits.val, splits.test):
        stored, again, probs = outputs(model, table, runtime)
        apart.append(stored - again)
        largest = max(largest, float((stored - again).abs().max()))
        pictures += len(table)
        for i in (stored.argmax(1) != again.argmax(1)).nonzero().flatten().tolist():
            one, other = (model.class_names[int(logits[i].argmax())] for logits in (again, stored))
            path = table.paths[i].relative_to(SHARED / "data" / name).as_posix()
            changed.append([path, one, other, round(float(probs[i].max()), 4)])
    features = Pixels(splits.test, model.spec)
    rows = [
        store_features(model, features, runtime=r)[:, 0]
        for r in (runtime, make_runtime(device="cpu", precision="fp32"))
    ]
    return {
        "set": name, "seed": seed, "format": precision, "pictures": pictures,
        "features_apart": float((rows[0] - rows[1]).norm() / rows[1].norm()),
        "logits_apart": largest, "changed": changed,
    }  # fmt: skip


def outputs(
    model: headstart.Classifier, table: ImageTable, runtime: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [N, C] of the pictures from stored features, from pixels as `predict` does, and its probabilities."""
    pixels = Pixels(table, model.spec)
    with torch.inference_mode():
        stored = model.head(store_features(model, pixels, runtime=runtime)[:, 0]).float()
    again = predict_logits(model, pixels, runtime=make_runtime(device="cpu", precision="fp32"))
    return stored, again, again.softmax(1)


def table() -> str:
    """Markdown: a row for each set and format, the changed pictures named."""
    out = [
        "| set | format | pictures | features apart, relative | logits apart, at most | predictions changed |",
        "|---" * 6 + "|",
    ]
    for record in sorted(newest("stored_features", "set", "seed", "format"), key=lambda r: (r["format"], r["set"])):
        named = "; ".join(f"{path}: {one} ({p:.3f}) to {other}" for path, one, other, p in record["changed"])
        out.append(
            f"| {record['set']} | {'bfloat16' if record['format'] == 'bf16' else 'float32'} | {record['pictures']:,}"
            f" | {record['features_apart']:.1e} | {record['logits_apart']:.1e}"
            f" | {len(record['changed'])}{f' ({named})' if named else ''} |"
        )
    return "\n".join(out)


def main() -> None:
    line = parser(__doc__, "run")
    line.add_argument("--sets", default=",".join(SETS))
    line.add_argument("--seeds", default="0")
    options = line.parse_args()
    if options.what == "table":
        show(table(), "stored features", write=options.write)
        return
    formats = (["bf16"] if bf16_works(torch.device("cpu")) else []) + ["fp32"]
    for seed in map(int, options.seeds.split(",")):
        for name in options.sets.split(","):
            for precision in formats:
                append("stored_features", compared(name, seed, precision))


if __name__ == "__main__":
    main()
