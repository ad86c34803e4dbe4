"""Hugging Face's image-classification example with the settings of its README, on the Trainer.

https://github.com/huggingface/transformers/tree/main/examples/pytorch/image-classification: AdamW at 2e-5 with linear
decay, 5 epochs, batches of 8, random resized crop and flip, every layer trained, scored and saved each epoch, the best
epoch by validation loss is loaded at the end. Other than there: the backbone, by transformers' own wrapper of timm
networks, and the number of loader processes.
"""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np
import torch
from runner_common import BACKBONE, LOADERS, Clock, Pictures, arguments, finish, read_splits
from runner_torch import TRAIN_VIEW, Files, create_network, evaluation_view, prepare
from transformers import (
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

EPOCHS = 5
VAL_VIEW = evaluation_view(224)


def collate(examples: list[tuple[torch.Tensor, int]]) -> dict[str, torch.Tensor]:
    images, labels = zip(*examples, strict=True)
    return {"pixel_values": torch.stack(images), "labels": torch.tensor(labels)}


def compute_metrics(scored: Any) -> dict[str, float]:
    return {"accuracy": float((np.argmax(scored.predictions, axis=1) == scored.label_ids).mean())}


def predict(trainer: Trainer, pictures: Pictures) -> list[int]:
    return np.argmax(trainer.predict(Files(pictures, VAL_VIEW)).predictions, axis=1).tolist()


class Watch(TrainerCallback):
    """Tells the clock of each evaluation."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:
        self.clock.epoch("all", metrics["eval_accuracy"])


def main() -> None:
    args = arguments()
    prepare(args)
    clock = Clock()
    class_names, splits = read_splits(args.splits, args.root)
    model = TimmWrapperForImageClassification(TimmWrapperConfig(architecture=BACKBONE, num_labels=len(class_names)))
    model.timm_model.load_state_dict(create_network(args, len(class_names)).state_dict())
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder, remove_unused_columns=False, learning_rate=2e-5,
                num_train_epochs=args.epochs or EPOCHS,
                per_device_train_batch_size=8, per_device_eval_batch_size=8, logging_strategy="steps",
                logging_steps=10, eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True,
                save_total_limit=3, seed=args.seed, use_cpu=True, dataloader_num_workers=LOADERS, report_to=[],
                disable_tqdm=True,
            ),
            train_dataset=Files(splits["train"], TRAIN_VIEW),
            eval_dataset=Files(splits["val"], VAL_VIEW),
            compute_metrics=compute_metrics,
            data_collator=collate,
            callbacks=[Watch(clock)],
        )  # fmt: skip
        clock.begins()
        trainer.train()
        by_loss = min(
            (log for log in trainer.state.log_history if "eval_loss" in log), key=lambda log: log["eval_loss"]
        )
        preds = [] if args.epochs else predict(trainer, splits["test"])
    finish(
        clock, planned={"all": EPOCHS},
        val_accuracy=by_loss["eval_accuracy"], preds=preds, test=splits["test"],
        packages=("transformers", "accelerate", "timm", "torch", "torchvision", "pillow"),
        settings={"epochs": EPOCHS, "batch": 8, "lr": 2e-5},
    )  # fmt: skip


if __name__ == "__main__":
    main()
