"""A network small enough to train in a test, that counts the pictures it sees."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from headstart import DataSpec

SPEC = DataSpec(
    image_size=16, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), interpolation="bilinear", crop_pct=1.0, fit="squash"
)


class TinyNet(nn.Module):
    """conv - BatchNorm - conv - mean - dropout: normalised pictures [N, 3, S, S] -> features [N, 8]."""

    def __init__(self, seed: int = 0, dropout: float = 0.0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
            self.norm = nn.BatchNorm2d(8)
            self.block = nn.Conv2d(8, 8, 3, stride=2, padding=1)
            self.dropout = nn.Dropout(dropout)
        self.pictures = 0

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "meta":  # shapes are looked up on the meta device, without computing anything
            self.pictures += len(x)
        return self.dropout(self.block(torch.relu(self.norm(self.stem(x)))).mean((2, 3)))
