"""Small stages that one process trains, or several together: what `test_processes` compares.

    RANK=0 WORLD_SIZE=2 MASTER_ADDR=... MASTER_PORT=... python several.py FOLDER

writes what each stage ended in, in this process, to FOLDER/RANK.pt.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import nn

from headstart import HeadSpec, HiddenLayer, Runtime, Stage, create_classifier, gradients, make_runtime, set_freeze_line
from headstart.backbones import seeded
from headstart.classifier import Classifier
from headstart.cut import cut
from headstart.features import ActivationSource, FeatureSource, PixelSource, Source, StageData
from headstart.filling import Stored
from headstart.pixels import Pixels
from headstart.train import fit
from tiny import SPEC

PICTURES = 51  # the last batch of 16 has three, of which the second of two processes has one
AUTO = 49  # the last batch of 32 has 17, of which one process would make three parts of up to four, the other two
HEAD = HeadSpec(batchnorm=True, pool="avg", hidden=(HiddenLayer(6, batchnorm="before"),))
DROPS = HeadSpec(batchnorm=True, pool="avg", dropout=0.2)
# Plain gradient descent: Adam turns the rounding of a gradient that is zero, a bias before a BatchNorm, into steps.
SGD: dict[str, Any] = {"optimizer": "sgd", "batch_size": 16, "epochs": 3, "select": "last"}
LEARNS = SGD | {"freeze_line": "all", "batchnorm": "train"}
STAGES = {
    "head": Stage(**SGD | {"optimizer": "adamw", "mixup": 0.4}),
    "all": Stage(**LEARNS),
    "mixed": Stage(**LEARNS, mixup=0.4, cutmix=1.0, accumulate=2),
    "checkpointed": Stage(**LEARNS, checkpointing=True),
    "stored": Stage(**SGD | {"freeze_line": "norm", "batchnorm": "train", "mixup": 0.4}),
    "auto": Stage(**LEARNS | {"batch_size": "auto"}),
}


def backbone() -> nn.Module:
    with seeded(0):
        stem, block = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 3, stride=2, padding=1)
    return nn.Sequential(OrderedDict(stem=stem, norm=nn.BatchNorm2d(8), act=nn.ReLU(), block=block))


def pictures(n: int, seed: int) -> PixelSource:
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    shown = torch.randint(0, 90, (n, 3, 16, 16), generator=g)
    shown += 80 * torch.eye(3, dtype=torch.int64)[labels][..., None, None]
    held = SimpleNamespace(
        table=SimpleNamespace(labels=labels.tolist()), is_augmented=False, in_background=True,
        batch=lambda indices, views: shown[list(indices)].to(torch.uint8),
    )  # fmt: skip
    return PixelSource(cast(Pixels, held))


def source(name: str, model: Classifier, shown: PixelSource) -> Source:
    """The pictures as they are, or as a frozen part has made them."""
    n, model = len(shown.labels), model.eval()
    with torch.no_grad():
        if name == "head":
            return FeatureSource(model.features(shown.batch(range(n), [])).unsqueeze(1), shown.labels)
        if name != "stored":
            return shown
        found = cut(
            model.backbone, ("norm", "block"), example_shape=(3, 16, 16), forward=nn.Module.__call__,
            kept_in_eval=model.kept_in_eval,
        )  # fmt: skip
        assert found is not None
        rows = found.prefix(model.enter(shown.batch(range(n), []))).contiguous()
        return ActivationSource(Stored(rows, False, torch.float32), shown.labels, found)


def trained(name: str, runtime: Runtime) -> dict[str, Any]:
    """What the stage ended in: the model's state, its logits for new pictures, the loss of each epoch."""
    stage = STAGES[name]
    model = create_classifier(backbone(), ["a", "b", "c"], head=DROPS if name == "head" else HEAD, data_spec=SPEC)
    set_freeze_line(model, stage.freeze_line, batchnorm=stage.batchnorm)
    parts = [
        source(name, model, pictures(n, seed)) for seed, n in enumerate((AUTO if name == "auto" else PICTURES, 30))
    ]
    result = fit(model, StageData(*parts), stage, lr=0.1, runtime=runtime)
    with torch.no_grad():
        logits = model.eval()(pictures(30, 2).batch(range(30), []))
    return {
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "logits": logits,
        "losses": [record["train_loss"] for record in result.history[1:]],
        "events": [event["message"] for event in result.events],
    }


if __name__ == "__main__":
    here = make_runtime(device="cpu", precision="fp32", workers=1)
    gradients.free_bytes = lambda device: 200_000 * (1 + 3 * here.rank)  # type: ignore[assignment]
    torch.save({name: trained(name, here) for name in STAGES}, Path(sys.argv[1]) / f"{here.rank}.pt")
