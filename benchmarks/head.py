"""How many seconds does a linear head take on stored features, and how good is it beside other ways to fit one?

    python benchmarks/head.py run [--sets cats_dogs_128,dogs10] [--rounds 5]
    python benchmarks/head.py table [--write]          # the table in docs/benchmarks.md, from the records

Needs the folder of real pictures and weights (HEADSTART_SHARED, else ../shared). Features [N, 1280] of the plain
training pictures by mobilenetv2_100 with ImageNet weights (cats_dogs_128: 2,000 of 128 px, at 224 px), computed once
and left out of the seconds. headstart's ways: ridge in closed form (one eigendecomposition for all penalties, the one
with the least validation loss), that as the start of L-BFGS, and the head stage of the default recipe (AdamW, 30
epochs) from zero and from ridge. The baselines, on the same features in the same process: scikit-learn's
RidgeClassifierCV over the same penalties and LogisticRegression, both with a StandardScaler, and a plain AdamW loop as
in any tutorial (30 epochs, batch 64, rate 5e-3, the last state). One thread; each way once to warm up, then in turn,
round by round; medians. Accuracy is on the set's test pictures. Records are appended to
benchmarks/results/head-DATE.jsonl.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from records import SHARED, WEIGHTS, Record, append, newest, parser, show
from sklearn.linear_model import LogisticRegression, RidgeClassifierCV
from sklearn.metrics import log_loss
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

import headstart
from headstart import train
from headstart.averaging import restore, snapshot
from headstart.features import FeatureSource, StageData
from headstart.linear import PENALTIES, fit_ridge
from headstart.once import store_features
from headstart.pixels import Pixels
from headstart.recipe import RECIPES
from headstart.runtime import make_runtime

RECIPE = RECIPES["head"]
STAGE = replace(RECIPE.stages[0], views=1)

Rows = tuple[Tensor, Tensor]
"""Features [N, D] and class ids [N]."""
Probs = np.ndarray
"""[N, C] of the test rows."""


def features_of(name: str) -> tuple[headstart.Classifier, dict[str, Rows]]:
    """A classifier with an untrained head, and the rows of train, val and test."""
    splits = headstart.split(headstart.load_images(SHARED / "data" / name), seed=0)
    model = headstart.create_classifier(
        "mobilenetv2_100", splits.class_names, weights=str(WEIGHTS), interpolation="bilinear"
    )
    headstart.set_freeze_line(model, "head")
    rows = {}
    for split in ("train", "val", "test"):
        table = getattr(splits, split)
        features = store_features(model, Pixels(table, model.spec), runtime=make_runtime(precision="fp32"))
        rows[split] = features[:, 0].contiguous(), torch.tensor(table.labels)
    return model, rows


def of_logits(logits: Tensor) -> Probs:
    return logits.double().softmax(1).numpy()


def ridge(rows: dict[str, Rows], classes: int) -> Probs:
    found = fit_ridge(*rows["train"], *rows["val"], classes)
    return of_logits(rows["test"][0] @ found.weight.T + found.bias)


def stage_of_ours(model: headstart.Classifier, rows: dict[str, Rows], **options: object) -> Probs:
    """The loop of `fit` on the stored features, with these options of the head stage."""
    data = StageData(*(FeatureSource(rows[split][0][:, None], rows[split][1]) for split in ("train", "val")))
    stage = replace(STAGE, **options)
    train.fit(model, data, stage, lr=RECIPE.lr, runtime=make_runtime(device="cpu"))
    with torch.inference_mode():
        return of_logits(model.eval().head(rows["test"][0]))


def plain_loop(rows: dict[str, Rows], classes: int) -> Probs:
    torch.manual_seed(0)
    x, labels = rows["train"]
    layer = nn.Linear(x.shape[1], classes)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=5e-3)
    for _ in range(STAGE.epochs):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(layer(x[batch]), labels[batch]).backward()
            optimizer.step()
    with torch.inference_mode():
        return of_logits(layer(rows["test"][0]))


def of_sklearn(estimator: object, rows: dict[str, Rows], classes: int) -> Probs:
    (x, labels), (test, _) = ((features.numpy(), ids.numpy()) for features, ids in (rows["train"], rows["test"]))
    fitted = make_pipeline(StandardScaler(), estimator).fit(x, labels)
    if hasattr(fitted, "predict_proba"):
        return fitted.predict_proba(test)
    return np.eye(classes)[fitted.predict(test)]


def ways(model: headstart.Classifier, rows: dict[str, Rows]) -> dict[str, Callable[[], Probs]]:
    """Each fits a head from the same start and gives the test rows' probabilities."""
    classes, untrained = len(model.class_names), snapshot(model)
    alphas = [penalty * len(rows["train"][0]) for penalty in PENALTIES]  # ours are of means, scikit-learn's of sums

    def ours(**options: object) -> Callable[[], Probs]:
        def run() -> Probs:
            restore(model, untrained)
            return stage_of_ours(model, rows, **options)

        return run

    return {
        "headstart, ridge": lambda: ridge(rows, classes),
        "headstart, ridge then L-BFGS": ours(warm_start="ridge", optimizer="lbfgs"),
        "headstart, AdamW (the default head stage)": ours(),
        "headstart, ridge then AdamW": ours(warm_start="ridge"),
        "plain AdamW loop": lambda: plain_loop(rows, classes),
        "scikit-learn RidgeClassifierCV": lambda: of_sklearn(RidgeClassifierCV(alphas=alphas), rows, classes),
        "scikit-learn LogisticRegression": lambda: of_sklearn(LogisticRegression(max_iter=1000), rows, classes),
    }


def measure(name: str, rounds: int) -> Record:
    torch.set_num_threads(1)
    model, rows = features_of(name)
    kinds, labels = ways(model, rows), rows["test"][1].numpy()
    scores = {}
    for way, fit in kinds.items():
        probs = fit()
        is_sure = set(np.unique(probs)) <= {0.0, 1.0}  # class names alone, no probabilities
        scores[way] = {
            "accuracy": float((probs.argmax(1) == labels).mean()),
            "log_loss": None if is_sure else float(log_loss(labels, probs)),
        }
    seconds: dict[str, list[tuple[float, float]]] = {way: [] for way in kinds}
    for _ in range(rounds):
        for way, fit in kinds.items():
            started, busy = time.perf_counter(), time.process_time()
            fit()
            seconds[way].append((time.process_time() - busy, time.perf_counter() - started))
    for way, found in seconds.items():
        processor, wall = (statistics.median(each) for each in zip(*found, strict=True))
        scores[way] |= {"processor_seconds": processor, "seconds": wall}
    n, width = rows["train"][0].shape
    return {
        "set": name, "n": n, "features": width, "classes": len(model.class_names), "test_n": len(labels),
        "rounds": rounds, "threads": 1, "ways": scores,
    }  # fmt: skip


def table() -> str:
    """Markdown: of every set the newest record, a row for each way."""
    rows = [
        "| features | way | processor seconds | against the plain loop | test accuracy | test log loss |",
        "|---|---|---|---|---|---|",
    ]
    for record in newest("head", "set"):
        shape = f"{record['set']}, {record['n']:,} x {record['features']:,}, {record['classes']} classes"
        loop = record["ways"]["plain AdamW loop"]["processor_seconds"]
        for way, found in record["ways"].items():
            busy, loss = found["processor_seconds"], found["log_loss"]
            cells = (
                shape, way, f"{busy:.2f}", f"{loop / busy:.1f}x", f"{found['accuracy']:.3f}",
                "-" if loss is None else f"{loss:.3f}",
            )  # fmt: skip
            rows.append(f"| {' | '.join(cells)} |")
            shape = ""
    return "\n".join(rows)


def main() -> None:
    options = parser(__doc__, "run")
    options.add_argument("--sets", default="cats_dogs_128,dogs10")
    options.add_argument("--rounds", type=int, default=5)
    args = options.parse_args()
    if args.what == "table":
        show(table(), "head", write=args.write)
        return
    for name in args.sets.split(","):
        record = measure(name, args.rounds)
        append("head", record)
        for way, found in record["ways"].items():
            print(name, way, {key: value and round(value, 3) for key, value in found.items()}, flush=True)


if __name__ == "__main__":
    main()
