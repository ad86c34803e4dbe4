"""headstart itself as a user calls it: `fine_tune` with its defaults, run folder and report. Variant: the recipe.

The cache folder is HEADSTART_CACHE, which `benchmarks/peers.py` sets: empty for a first run, kept for a second one.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
from dataclasses import replace
from typing import Any

import torch
from runner_common import BACKBONE, Clock, arguments, finish, read_splits

from headstart import fine_tune
from headstart.files import read_csv
from headstart.recipe import RECIPES


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    if importlib.util.find_spec("cleanlab"):  # headstart's extra `audit`
        for name in ("sklearn.linear_model", "sklearn.model_selection", "cleanlab.filter", "cleanlab.rank"):
            importlib.import_module(name)  # headstart does so when it first needs them: here before the clock starts
    recipe = replace(RECIPES[args.variant], seed=args.seed)
    clock = Clock()

    def watch(record: dict[str, Any]) -> None:
        phase = "head" if record["stage_index"] == 0 else "all"
        if record["epoch"]:
            clock.epoch(phase, record["val"]["accuracy"])
            if phase == "head":
                clock.head_ends()  # as often as it has an epoch: the last one stays

    with tempfile.TemporaryDirectory() as folder:
        result = fine_tune(
            args.splits, root=args.root, backbone=BACKBONE, weights=args.weights, recipe=recipe,
            spec_overrides={"interpolation": "bilinear"}, out=f"{folder}/run", log=watch, progress=True,
        )  # fmt: skip
        _, splits = read_splits(args.splits, args.root)
        names = list(result.model.class_names)
        rows = {row["path"]: row["pred"] for row in read_csv(result.run_path / "predictions.csv")}
        decisions = json.dumps([stage["events"] for stage in result.metrics["stages"]])
    test = splits["test"]
    finish(
        clock, planned={stage.name: stage.epochs for stage in recipe.stages},
        val_accuracy=result.metrics["val"]["accuracy"],
        preds=[names.index(rows[path.removeprefix(f"{args.root}/")]) for path, _ in test], test=test,
        packages=("torch", "torchvision", "timm", "pillow"),
        settings={"recipe": recipe.to_dict(), "events": decisions, "phases": result.metrics["phases"]},
    )  # fmt: skip


if __name__ == "__main__":
    main()
