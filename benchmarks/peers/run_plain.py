"""The loop of PyTorch's transfer learning tutorial and its settings. Variants: `all`, `head`, `all fast`, `head fast`.

https://docs.pytorch.org/tutorials/beginner/transfer_learning_tutorial.html trains twice, each time from the pretrained
weights: `all` ("Finetuning the ConvNet") trains everything; `head` ("ConvNet as fixed feature extractor") sets
requires_grad=False on the backbone. Both: batches of 4, random resized crop and flip, SGD 0.001 with momentum 0.9,
StepLR(7, 0.1), 25 epochs, the best epoch by validation accuracy is kept. Other than there: this backbone, and the
number of loader processes. `fast` adds channels-last, and bfloat16 autocast where the CPU has bfloat16.
"""

from __future__ import annotations

import copy

import torch
from runner_common import LOADERS, Clock, arguments, finish, has_bfloat16, read_splits
from runner_torch import TRAIN_VIEW, Files, create_network, evaluation_view, predict, prepare
from torch import nn, optim
from torch.optim import lr_scheduler

EPOCHS = 25


def main() -> None:
    args = arguments()
    part, _, fast = args.variant.partition(" ")
    bfloat16 = bool(fast) and has_bfloat16()
    prepare(args)
    clock = Clock()
    class_names, splits = read_splits(args.splits, args.root)
    val_view = evaluation_view(256)
    loaders = {
        name: torch.utils.data.DataLoader(
            Files(splits[name], view), batch_size=4, shuffle=True, num_workers=LOADERS, persistent_workers=False
        )
        for name, view in (("train", TRAIN_VIEW), ("val", val_view))
    }
    model = create_network(args, len(class_names))
    if part == "head":
        for param in model.parameters():
            param.requires_grad = False
    model.classifier = nn.Linear(model.num_features, len(class_names))
    if fast:
        model = model.to(memory_format=torch.channels_last)
    optimizer = optim.SGD((model.classifier if part == "head" else model).parameters(), lr=0.001, momentum=0.9)
    scheduler = lr_scheduler.StepLR(optimizer, step_size=7, gamma=0.1)
    criterion = nn.CrossEntropyLoss()

    def run(phase: str) -> float:
        model.train(phase == "train")
        right = 0
        for inputs, labels in loaders[phase]:
            if fast:
                inputs = inputs.to(memory_format=torch.channels_last)
            optimizer.zero_grad()
            with torch.set_grad_enabled(phase == "train"), torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                outputs = model(inputs)
                loss = criterion(outputs, labels)
            if phase == "train":
                loss.backward()
                optimizer.step()
            right += int((outputs.argmax(1) == labels).sum())
        return right / len(splits[phase])

    best, best_state = -1.0, model.state_dict()
    clock.begins()
    for _ in range(args.epochs or EPOCHS):
        run("train")
        scheduler.step()
        accuracy = run("val")
        clock.epoch(part, accuracy)
        if accuracy > best:
            best, best_state = accuracy, copy.deepcopy(model.state_dict())
    if part == "head":
        clock.head_ends()
    model.load_state_dict(best_state)
    preds = [] if args.epochs else predict(model, splits["test"], val_view, batch=32).tolist()
    finish(
        clock, planned={part: EPOCHS},
        val_accuracy=best, preds=preds, test=splits["test"],
        packages=("torch", "torchvision", "timm", "pillow"),
        settings={"epochs": EPOCHS, "batch": 4, "channels_last": bool(fast), "bfloat16": bfloat16},
    )  # fmt: skip


if __name__ == "__main__":
    main()
