"""fastai's `vision_learner(...).fine_tune(4)` with the transforms of its vision tutorial.

https://docs.fast.ai/tutorial.vision.html: item_tfms=Resize(460), batch_tfms=aug_transforms(size=224), batches of 64;
`fine_tune` trains one epoch with the body frozen (its BatchNorm still learns, as is fastai's default), then four
with everything at lower rates for the body. The last state is kept. Other than there: the backbone.
"""

from __future__ import annotations

import pandas as pd
import torch
from fastai.callback.core import Callback
from fastai.metrics import accuracy
from fastai.vision.all import ImageDataLoaders, Learner, Resize, aug_transforms, vision_learner
from runner_common import BACKBONE, LOADERS, Clock, Pictures, arguments, finish, read_splits
from runner_torch import overlay, prepare

EPOCHS = 4


class Watch(Callback):
    """Tells the clock of each epoch; the first one is the head's."""

    order = 60  # behind the recorder, whose figures it reads

    def __init__(self, clock: Clock) -> None:
        self.clock, self.seen = clock, 0

    def after_epoch(self) -> None:
        self.clock.epoch("all" if self.seen else "head", self.learn.recorder.values[-1][-1])
        if not self.seen:
            self.clock.head_ends()
        self.seen += 1


def predict(learner: Learner, pictures: Pictures) -> list[int]:
    probs, _ = learner.get_preds(dl=learner.dls.test_dl([path for path, _ in pictures]))
    return probs.argmax(1).tolist()


def main() -> None:
    args = arguments()
    prepare(args)
    clock = Clock()
    class_names, splits = read_splits(args.splits, args.root)
    rows = [
        {"path": path, "label": class_names[label], "is_valid": name == "val"}
        for name in ("train", "val")
        for path, label in splits[name]
    ]
    loaders = ImageDataLoaders.from_df(
        pd.DataFrame(rows), path="/", fn_col="path", label_col="label", valid_col="is_valid", item_tfms=Resize(460),
        batch_tfms=aug_transforms(size=224), num_workers=LOADERS, seed=args.seed, device=torch.device("cpu"),
    )  # fmt: skip
    assert list(loaders.vocab) == class_names
    learner = vision_learner(loaders, BACKBONE, metrics=accuracy, pretrained_cfg_overlay=overlay(args))
    with learner.no_bar(), learner.no_logging():
        clock.begins()
        learner.fine_tune(args.epochs or EPOCHS, cbs=[Watch(clock)])
        preds = [] if args.epochs else predict(learner, splits["test"])
    finish(
        clock, planned={"head": 1, "all": EPOCHS},
        val_accuracy=clock.curve[-1]["val_accuracy"], preds=preds, test=splits["test"],
        packages=("fastai", "fastcore", "torch", "torchvision", "timm", "pillow"),
        settings={"fine_tune": EPOCHS, "freeze_epochs": 1, "batch": loaders.bs},
    )  # fmt: skip


if __name__ == "__main__":
    main()
