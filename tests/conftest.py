"""Fixtures shared by all tests: small made picture folders, and the shared real sets where they are present."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long is marked slow by a list, which `tools/slow_tests.py` writes from measured times."""
    slow = set((Path(__file__).parent / "slow.txt").read_text(encoding="utf-8").split())
    for item in items:
        if item.nodeid.partition("[")[0] in slow:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """One thread: bit-equality is promised for a fixed thread count, and small nets are quicker so."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests and the processes they start never touch the user's cache folder."""
    os.environ["HEADSTART_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real pictures and weights; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("HEADSTART_SHARED", Path(__file__).parents[2] / "shared"))
    if not (folder / "data").is_dir() or not (folder / "weights").is_dir():
        pytest.skip(f"no real pictures and weights at {folder}; set HEADSTART_SHARED to point to them")
    return folder


def make_picture(rng: np.random.Generator, hue: int, size: tuple[int, int] = (48, 40)) -> Image.Image:
    """A noisy picture whose strongest channel is `hue` (0, 1 or 2): classes that a small network can tell apart."""
    width, height = size
    pixels = rng.integers(0, 120, (height, width, 3))
    pixels[..., hue] += 110
    return Image.fromarray(pixels.astype(np.uint8))


def make_photos(root: Path, each: int, names: Sequence[str] = ("blue", "green", "red")) -> Path:
    """Three classes of small JPEG pictures, `each` in a folder of its own, without split folders."""
    rng = np.random.default_rng(0)
    for hue, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for i in range(each):
            make_picture(rng, hue).save(root / name / f"{name}{i}.jpg", quality=95)
    return root


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three classes of twelve small JPEG pictures, without split folders."""
    return make_photos(tmp_path / "photos", 12, ("red", "green", "blue"))
