"""Pictures as matplotlib axes: what is drawn where, no pyplot behind the back, and the preview sheet."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from headstart.dataset import ImageTable, load_images
from headstart.dataspec import DataSpec
from headstart.errors import DataError, RecipeError
from headstart.metrics import evaluate_probs
from headstart.plots import _column, plot_confusion, plot_history
from headstart.recipe import AugmentSpec, Recipe
from headstart.run import open_run
from headstart.run_record import read_run
from headstart.sheets import preview_sheet, show_batch, spread_indices

SPEC = DataSpec(
    image_size=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), interpolation="bilinear", crop_pct=1.0, fit="crop"
)


@pytest.fixture
def table(photos: Path) -> ImageTable:
    return load_images(photos)


def record(index: int, epoch: int, train: float, val: float | None, *, best: bool = True) -> dict[str, Any]:
    return {
        "stage": ("head", "fine-tune")[index], "stage_index": index, "epoch": epoch, "best": best, "event": None,
        "train": {"loss": train, "accuracy": 0.9, "top5": None, "n": 10},
        "val": {"loss": val, "accuracy": 0.8, "top5": None, "n": 10},
    }  # fmt: skip


HISTORY = [
    record(0, 0, 1.5, 1.6), record(0, 1, 0.8, 0.9), record(0, 2, 0.6, 0.7),
    record(1, 0, 0.6, 0.7), record(1, 1, 3.0, None, best=False),
    record(1, 0, 0.6, 0.7), record(1, 1, 0.5, 0.6), record(1, 2, 0.4, 0.65, best=False),
]  # fmt: skip


def lines(ax: Any) -> dict[str, Any]:
    return {line.get_label(): line for line in ax.lines}


# ---- history ---------------------------------------------------------------------------------------------------


def test_history_curves_hold_the_figures() -> None:
    ax = plot_history(HISTORY)
    drawn = lines(ax)
    assert drawn["training"].get_xydata().tolist() == [[0, 1.5], [1, 0.8], [2, 0.6]]
    assert drawn["validation"].get_xydata().tolist() == [[0, 1.6], [1, 0.9], [2, 0.7]]
    assert drawn["kept"].get_xydata().tolist() == [[3, 0.6]]  # epoch 1 of the second stage
    assert ax.get_ylabel() == "loss (nats)"


def test_history_draws_what_was_rolled_back_pale() -> None:
    pale = [line for line in plot_history(HISTORY).lines if (line.get_alpha() or 1) < 0.5]
    assert pale[0].get_ydata().tolist() == [0.6, 3.0]
    assert len(pale) == 2


def test_a_mixture_is_no_epoch_of_the_history() -> None:
    mixed = record(0, 3, 0.5, 0.65) | {"event": {"kind": "wise", "message": "", "alpha": 0.5, "epoch": 2}}
    drawn = lines(plot_history([*HISTORY[:3], mixed]))
    assert drawn["validation"].get_xdata().tolist() == [0, 1, 2]
    assert drawn["kept"].get_xydata().tolist() == [[2, 0.65]]
    start = [line for line in plot_history([*HISTORY[:3], mixed, *HISTORY[3:]]).lines if line.get_linestyle() == ":"]
    assert start[0].get_xdata()[0] == 2  # the next stage begins where the epochs end


def test_history_of_run_folder_record_and_result(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run")
    run.write_json("recipe.json", Recipe().to_dict())
    for row in HISTORY:
        run.append_history(row)
    result = SimpleNamespace(history=HISTORY, recipe=Recipe())
    for source in (run.path, str(run.path), read_run(run.path), result):
        ax = plot_history(source, "accuracy")
        assert lines(ax)["validation"].get_ydata().tolist() == [0.8] * 3
        assert " fine-tune, line at last:80%" in [text.get_text() for text in ax.texts]


def test_history_refuses_what_it_cannot_draw() -> None:
    with pytest.raises(DataError, match=r"acuracy.*Did you mean: accuracy"):
        plot_history(HISTORY, "acuracy")
    with pytest.raises(DataError, match="top5"):
        plot_history(HISTORY, "top5")
    with pytest.raises(DataError, match="0 records"):
        plot_history([])


# ---- confusion -------------------------------------------------------------------------------------------------

COUNTS = np.array([[30, 1, 0], [0, 20, 2], [0, 0, 9]])


def test_confusion_shows_counts_where_they_are() -> None:
    ax = plot_confusion(COUNTS, ("a", "b", "c"))
    cells = {(t.get_position()[1], t.get_position()[0]): t.get_text() for t in ax.texts}
    assert cells == {(r, c): str(COUNTS[r, c]) for r, c in zip(*np.nonzero(COUNTS), strict=True)}
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a", "b", "c"]
    right, wrong = (image.get_array() for image in ax.images)
    assert np.ma.filled(right, 0).tolist() == np.diag([30, 20, 9]).tolist()
    assert np.ma.filled(wrong, 0).tolist() == (COUNTS - np.diag([30, 20, 9])).tolist()
    from matplotlib.colors import LogNorm

    assert isinstance(ax.images[0].norm, LogNorm)


def test_a_normalised_confusion_shows_its_shares() -> None:
    ax = plot_confusion(np.array([[0.9, 0.1], [0.25, 0.75]]))
    assert [t.get_text() for t in ax.texts] == ["0.90", "0.10", "0.25", "0.75"]
    assert np.ma.filled(ax.images[0].get_array(), 0).tolist() == [[0.9, 0], [0, 0.75]]
    assert [t.get_text() for t in plot_confusion(np.eye(2)).texts] == ["1", "1"]


def test_confusion_from_whatever_holds_it(tmp_path: Path) -> None:
    labels = np.repeat([0, 1], 5)
    scored = evaluate_probs(np.eye(2)[[0, 0, 0, 0, 1, 1, 1, 1, 1, 0]], labels, ("cat", "dog"))
    run = open_run(tmp_path / "run")
    run.write_json("recipe.json", Recipe().to_dict())
    run.write_json("metrics.json", {"test": scored})
    for source in (scored, {"test": scored}, SimpleNamespace(metrics=scored), run.path):
        ax = plot_confusion(source)
        assert [t.get_text() for t in ax.get_xticklabels()] == ["cat", "dog"]
        assert sorted(t.get_text() for t in ax.texts) == ["1", "1", "4", "4"]


def test_many_classes_are_drawn_without_counts() -> None:
    counts = np.eye(120, dtype=int) * 30
    counts[3, 5] = 1
    ax = plot_confusion(counts)
    assert len(ax.texts) == 0
    assert len(ax.get_xticks()) == 120
    assert min(t.get_fontsize() for t in ax.get_xticklabels()) >= 5
    ax.figure.canvas.draw()


def test_confusion_refuses_what_does_not_fit() -> None:
    with pytest.raises(DataError, match="square"):
        plot_confusion(np.zeros((2, 3), dtype=int))
    for wrong in (COUNTS - 10, COUNTS / 2, np.full((2, 2), np.nan)):
        with pytest.raises(DataError, match="a value is no count"):
            plot_confusion(wrong)
    with pytest.raises(DataError, match="2 class names for 3"):
        plot_confusion(COUNTS, ("a", "b"))
    with pytest.raises(DataError, match="Evaluate"):
        plot_confusion({"stages": []})


# ---- pictures --------------------------------------------------------------------------------------------------


def test_batch_of_a_table_covers_the_classes(table: ImageTable) -> None:
    ax = show_batch(table, n=6)
    names = [t.get_text() for t in ax.texts]
    assert sorted(names) == ["blue", "blue", "green", "green", "red", "red"]
    assert len(ax.images) == 6
    for image, name in zip(ax.images, names, strict=True):  # each class is brightest in its own channel
        strongest = int(np.asarray(image.get_array()).mean(axis=(0, 1)).argmax())
        assert strongest == ("red", "green", "blue").index(name)
    again = [t.get_text() for t in show_batch(table, n=6).texts]
    assert again == names
    assert len(show_batch(table, spec=SPEC).images) == 9


def test_a_rare_class_is_seen(table: ImageTable) -> None:
    rare = table.select(np.r_[0, np.flatnonzero(table.labels > 0)])
    for seed in range(5):
        chosen = spread_indices(rare, 9, seed=seed)
        assert len(set(chosen)) == 9
        assert np.bincount(rare.labels[chosen], minlength=3).min() == 1
    assert sorted(spread_indices(rare, 1000)) == list(range(len(rare)))


def test_batch_of_pictures_in_any_layout() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 20, 30, 3), dtype=np.uint8)
    channels_first = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    for images in (pixels, channels_first, list(pixels), [Image.fromarray(p) for p in pixels]):
        ax = show_batch(images, [1, 0], class_names=("cat", "dog"))
        assert [t.get_text() for t in ax.texts] == ["dog", "cat"]
        assert np.array_equal(np.asarray(ax.images[1].get_array()), pixels[1])
        left, right, bottom, top = ax.images[0].get_extent()
        assert (right - left) / (bottom - top) == pytest.approx(1.5)  # aspect kept


def test_batch_shows_deep_and_transparent_pictures_as_files_are_read() -> None:
    deep = Image.fromarray(np.full((8, 8), 257 * 90, dtype=np.int32))  # mode I, 16 bit
    clear = Image.new("RGBA", (8, 8), (10, 20, 30, 0))
    shown = [np.asarray(image.get_array()) for image in show_batch([deep, clear]).images]
    assert (shown[0] == 90).all()
    assert (shown[1] == 255).all()


@pytest.mark.parametrize("shape", [(4, 9, 7), (4, 1, 9, 7), (4, 9, 7, 1)])
def test_a_grey_batch_is_drawn_grey(shape: tuple[int, ...]) -> None:
    grey = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    ax = show_batch(torch.from_numpy(grey), labels=range(4))
    drawn = [np.asarray(image.get_array()) for image in ax.images]
    height, width = [side for side in shape[1:] if side != 1]
    assert all(
        np.array_equal(one, of.reshape(height, width, 1).repeat(3, 2)) for one, of in zip(drawn, grey, strict=True)
    )


def test_what_could_be_one_picture_or_many_and_too_few_labels_are_told() -> None:
    with pytest.raises(DataError, match="1 labels for 3 pictures"):
        show_batch(np.zeros((3, 3, 8, 8), dtype=np.uint8), ["cat"])
    for wrong in ([0, 2, 1], [0, -1, 1], [0, "cat", 1]):
        with pytest.raises(
            DataError, match=rf"label {wrong[1]!r} beside 2 class names. Give class numbers from 0 to 1"
        ):
            show_batch(np.zeros((3, 3, 8, 8), dtype=np.uint8), wrong, class_names=("cat", "dog"))
    for shape in ((8, 8, 1), (8, 8, 4), (8, 8, 3)):
        with pytest.raises(DataError, match="one picture in a list"):
            show_batch(np.zeros(shape, dtype=np.uint8), labels=range(8))
    for shape in ((3, 8, 8), (8, 8, 3)):
        with pytest.raises(DataError, match="one picture in a list"):
            show_batch(np.zeros(shape, dtype=np.uint8))
        assert len(show_batch([np.zeros(shape, dtype=np.uint8)]).images) == 1


def test_batch_refuses_what_is_no_picture() -> None:
    with pytest.raises(DataError, match="before any normalisation"):
        show_batch(np.zeros((1, 3, 8, 8), dtype=np.float32))
    with pytest.raises(DataError, match="no picture"):
        show_batch([])


def test_odd_names_are_drawn_as_they_are(table: ImageTable, tmp_path: Path) -> None:
    odd = ImageTable(
        root=table.root, paths=table.paths, labels=table.labels, split_names=table.split_names,
        class_names=("$\\frac{$", "bytes\udcff 花", "x" * 80),
    )  # fmt: skip
    preview_sheet(odd, SPEC, "none", tmp_path / "sheet.png")
    ax = plot_confusion(COUNTS, ("$\\frac{$", "b\udcff", "c"))
    ax.figure.canvas.draw()
    assert ax.get_xticklabels()[0].get_text() == "$\\frac{$"


# ---- preview ---------------------------------------------------------------------------------------------------


def test_preview_sheet_is_one_picture(table: ImageTable, tmp_path: Path) -> None:
    path = preview_sheet(table, SPEC, "photo", tmp_path / "sheet.png", seed=3)
    first = path.read_bytes()
    with Image.open(path) as sheet:
        assert sheet.format == "PNG"
        assert sheet.width > 1000
    assert preview_sheet(table, SPEC, "photo", path, seed=3).read_bytes() == first
    assert preview_sheet(table, SPEC, "photo", path, seed=4).read_bytes() != first
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["sheet.png"]


def test_preview_shows_nine_pictures_and_nine_augmentations(
    table: ImageTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from headstart import augment
    from headstart import sheets as room

    sheets, views = [], []
    render, view_of = room.rendered, augment.augmented_view
    monkeypatch.setattr(room, "rendered", lambda sheet, ending: (sheets.append(sheet), render(sheet, ending))[1])

    def watched(*args: Any, **words: Any) -> torch.Tensor:
        views.append(words)
        return view_of(*args, **words)

    monkeypatch.setattr(augment, "augmented_view", watched)
    preview_sheet(table, SPEC, AugmentSpec(hflip=0.5, rotation=20), tmp_path / "sheet.png", seed=5)
    left, right = sheets[0].axes
    assert (len(left.images), len(right.images)) == (9, 9)
    assert {t.get_text() for t in left.texts} == {"blue", "green", "red"}
    assert [w["view"] for w in views] == list(range(1, 10))
    assert {(w["seed"], w["index"]) for w in views} == {(5, spread_indices(table, 9, seed=5)[0])}
    shown = [np.asarray(image.get_array()) for image in right.images]
    assert len({picture.tobytes() for picture in shown}) == 9


def test_preview_takes_a_transform_of_the_users_own(table: ImageTable, tmp_path: Path) -> None:
    from torchvision.transforms import v2

    assert preview_sheet(table, SPEC, v2.RandomInvert(p=1.0), tmp_path / "sheet.jpg").stat().st_size > 1000


def test_preview_refuses_unknown_endings_and_empty_tables(table: ImageTable, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'\.pgn'.*Did you mean: png"):
        preview_sheet(table, SPEC, "none", tmp_path / "sheet.pgn")
    with pytest.raises(RecipeError, match=r"augment is 'foto'.*Did you mean: photo"):
        preview_sheet(table, SPEC, "foto", tmp_path / "sheet.png")
    with pytest.raises(DataError, match="no picture"):
        preview_sheet(table.select([]), SPEC, "none", tmp_path / "sheet.png")
    assert not list(tmp_path.glob("sheet*"))


# ---- matplotlib's state ----------------------------------------------------------------------------------------


def test_given_axes_are_drawn_into(table: ImageTable) -> None:
    from matplotlib.figure import Figure

    axes = Figure().subplots(1, 3)
    assert show_batch(table, ax=axes[0]) is axes[0]
    assert plot_history(HISTORY, ax=axes[1]) is axes[1]
    assert plot_confusion(COUNTS, ax=axes[2]) is axes[2]


def test_neither_pyplot_nor_matplotlib_before_it_is_needed() -> None:
    code = (
        "import sys, headstart.plots, headstart.report\n"
        "assert 'matplotlib' not in sys.modules and 'torch' not in sys.modules\n"
        "headstart.plots.plot_confusion([[1, 0], [0, 1]])\n"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_close_numbers_of_a_parallel_axis_are_told_once() -> None:
    heights, ticks = _column([0.6029, 0.6038, 0.812, 1.648])
    assert [words for _, words in ticks] == ["0.603", "0.812", "1.65"]
    assert heights.tolist() == sorted(heights.tolist())
