"""timm's train.py as a short loop of timm's own parts, fine-tuning at a tenth of its rate.

https://github.com/huggingface/pytorch-image-models/blob/main/train.py, its defaults: SGD with Nesterov momentum 0.9,
weight decay 2e-5, rate 0.1 * batch / 256, cosine schedule with 5 epochs of warm-up from 1e-5, label smoothing 0.1,
random resized crop from 8 %, flip, colour jitter 0.4, random interpolation, last short batch dropped, best epoch by
validation accuracy. A tenth of the rate is what timm's author advises for another data set (issue 25 of that
repository). Fewer epochs than its default of 300, and batches of 32 instead of 128: 25 epochs as in PyTorch's
tutorial.
"""

from __future__ import annotations

import copy

import torch
from runner_common import LOADERS, Clock, arguments, finish, read_splits
from runner_torch import Files, create_network, predict, prepare
from timm.data import create_transform, resolve_model_data_config
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2

EPOCHS, WARMUP, BATCH = 25, 5, 32
RATE = 0.1 * 0.1 * BATCH / 256


def main() -> None:
    args = arguments()
    prepare(args)
    clock = Clock()
    class_names, splits = read_splits(args.splits, args.root)
    model = create_network(args, len(class_names))
    config = resolve_model_data_config(model)
    normal = {"input_size": config["input_size"], "mean": config["mean"], "std": config["std"]}
    train_view = create_transform(
        **normal, is_training=True, scale=(0.08, 1.0), hflip=0.5, color_jitter=0.4, interpolation="random"
    )
    val_view = create_transform(**normal, interpolation=config["interpolation"], crop_pct=config["crop_pct"])
    train = torch.utils.data.DataLoader(
        Files(splits["train"], train_view), batch_size=BATCH, shuffle=True, drop_last=True, num_workers=LOADERS
    )
    val = torch.utils.data.DataLoader(Files(splits["val"], val_view), batch_size=BATCH, num_workers=LOADERS)
    optimizer = create_optimizer_v2(model, opt="sgd", lr=RATE, weight_decay=2e-5, momentum=0.9)
    scheduler, epochs = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=EPOCHS, warmup_epochs=WARMUP, warmup_lr=1e-5
    )
    criterion = LabelSmoothingCrossEntropy(0.1)
    best, best_state = -1.0, model.state_dict()
    clock.begins()
    for epoch in range(args.epochs or epochs):
        model.train()
        for inputs, labels in train:
            optimizer.zero_grad()
            criterion(model(inputs), labels).backward()
            optimizer.step()
        scheduler.step(epoch + 1)
        model.eval()
        with torch.inference_mode():
            right = sum(int((model(inputs).argmax(1) == labels).sum()) for inputs, labels in val)
        accuracy = right / len(splits["val"])
        clock.epoch("all", accuracy)
        if accuracy > best:
            best, best_state = accuracy, copy.deepcopy(model.state_dict())
    model.load_state_dict(best_state)
    preds = [] if args.epochs else predict(model, splits["test"], val_view, batch=BATCH).tolist()
    finish(
        clock, planned={"all": epochs},
        val_accuracy=best, preds=preds, test=splits["test"],
        packages=("timm", "torch", "torchvision", "pillow"),
        settings={"epochs": epochs, "warmup_epochs": WARMUP, "batch": BATCH, "lr": RATE},
    )  # fmt: skip


if __name__ == "__main__":
    main()
