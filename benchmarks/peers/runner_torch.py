"""What the PyTorch runners share: pictures from the list, the network with its weights, plain scoring."""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from runner_common import BACKBONE, IMAGE_SIZE, MEAN, STD, Pictures
from torch import Tensor, nn
from torchvision import transforms

TRAIN_VIEW = transforms.Compose(
    [
        transforms.RandomResizedCrop(IMAGE_SIZE),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ]
)
"""As in the PyTorch tutorial and in Hugging Face's example."""


def evaluation_view(resize: int) -> Callable[[Image.Image], Tensor]:
    return transforms.Compose(
        [
            transforms.Resize(resize),
            transforms.CenterCrop(IMAGE_SIZE),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )


class Files(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Pictures read and transformed each time they are asked for, as torchvision's ImageFolder does."""

    def __init__(self, pictures: Pictures, transform: Callable[[Image.Image], Tensor]) -> None:
        self.pictures, self.transform = pictures, transform

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.pictures[index]
        with Image.open(path) as image:
            return self.transform(image.convert("RGB")), label


def prepare(args: argparse.Namespace) -> None:
    """One thread count and one seed for all."""
    torch.set_num_threads(args.threads)
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)


def overlay(args: argparse.Namespace) -> dict[str, Any]:
    """What makes timm read the given weights; they were made for bilinear resizing."""
    return {"file": str(args.weights), "interpolation": "bilinear"}


def create_network(args: argparse.Namespace, num_classes: int) -> nn.Module:
    return timm.create_model(
        BACKBONE, pretrained=True, num_classes=num_classes, pretrained_cfg_overlay=overlay(args)
    )  # fmt: skip


def predict(model: nn.Module, pictures: Pictures, transform: Callable[[Image.Image], Tensor], *, batch: int) -> Tensor:
    """Class ids [N] in evaluation mode, read in the main process."""
    loader = torch.utils.data.DataLoader(Files(pictures, transform), batch_size=batch)
    model.eval()
    with torch.inference_mode():
        return torch.cat([model(images).argmax(1) for images, _ in loader])
