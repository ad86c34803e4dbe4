"""Pictures that are like none of those a model was trained on are called unknown, and of its own kind few are."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load as from_safetensors
from safetensors.torch import save_file

from conftest import make_photos, make_picture
from headstart import Recipe, Stage, create_classifier, fine_tune, learn_familiar, load, predict_files, read_run, save
from headstart.cli import main
from headstart.errors import CheckpointError, DataError, HeadstartError, RecipeError
from headstart.evaluation import predict_features, predict_logits, unlabelled
from headstart.familiar import FILE, Familiar, read_familiar, spread
from headstart.pixels import Pixels

SIZE, SHARE = 32, 0.1
PLAN = Recipe(stages=(Stage(epochs=2, views=1),))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_photos(tmp_path_factory.mktemp("pictures") / "photos", 24)


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures without colour, which none of the three classes has."""
    folder = tmp_path_factory.mktemp("odd")
    rng = np.random.default_rng(1)
    for i in range(6):
        Image.fromarray(rng.integers(0, 40, (40, 48), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def trained(photos: Path) -> Path:
    out = photos.parent / "run"
    size = {"image_size": SIZE}
    fine_tune(photos, out=out, recipe=PLAN, backbone="test_resnet", weights="none", spec_overrides=size, val=0.3)
    return out


@pytest.fixture(scope="module")
def run(trained: Path) -> Path:
    learn_familiar(trained)
    return trained


def copied(run: Path, where: Path) -> Path:
    return Path(shutil.copytree(run, where / "run"))


def own(run: Path, split: str) -> list[Path]:
    record = read_run(run)
    return [Path(record.metrics["data"]["root"]) / row["path"] for row in record.splits if row["split"] == split]


# ---- the shares ------------------------------------------------------------------------------------------------


def test_a_share_counts_the_held_out_pictures_that_are_no_nearer() -> None:
    model = create_classifier("test_resnet", ("a", "b"), weights="none")
    rng = np.random.default_rng(0)
    trained, held_out, asked = (rng.normal(1, 1, (n, 7)).astype(np.float32) for n in (30, 9, 2000))
    familiar = Familiar.of(model, torch.from_numpy(trained), torch.from_numpy(held_out))

    def near(rows: Any) -> Any:
        unit = [row / np.linalg.norm(row) for row in rows]
        met = (trained / np.linalg.norm(trained, axis=1, keepdims=True)).astype(np.float16).astype(np.float64)
        return np.array([np.sort(met @ row)[-5:].mean() for row in unit])

    expected = [(1 + (near(held_out) <= one).sum()) / 10 for one in near(asked)]
    told = familiar.shares(torch.from_numpy(asked))
    assert np.mean(np.abs(told - expected) < 1e-9) > 0.998  # but where two are as near within rounding
    assert (told.min(), told.max(), familiar.least) == (0.1, 1.0, 0.1)
    assert familiar.shares(torch.from_numpy(held_out)).min() == 0.2  # of itself and none nearer
    odd = torch.stack([torch.zeros(7), torch.full((7,), float("nan")), torch.full((7,), float("inf"))])
    assert familiar.shares(odd).tolist() == [0.1, 0.1, 0.1]  # a picture without features is like none
    last_bits = torch.from_numpy(held_out) * (1 + 3e-7 * torch.from_numpy(rng.normal(size=held_out.shape)).float())
    assert (familiar.shares(last_bits) >= familiar.shares(torch.from_numpy(held_out))).all()


@pytest.mark.parametrize("share", [0.05, 0.2])
def test_of_pictures_of_the_same_kind_no_more_than_the_share_are_unknown(share: float) -> None:
    model = create_classifier("test_resnet", ("a", "b"), weights="none")
    rng = torch.Generator().manual_seed(0)
    centres = torch.randn(3, 16, generator=rng)

    def draw(n: int) -> torch.Tensor:
        return centres[torch.randint(3, (n,), generator=rng)] + torch.randn(n, 16, generator=rng)

    rates = [(Familiar.of(model, draw(60), draw(39)).shares(draw(200)) <= share).mean() for _ in range(60)]
    assert abs(float(np.mean(rates)) - share) < 0.02
    assert (Familiar.of(model, draw(60), draw(39)).shares(torch.randn(200, 16, generator=rng) - 9) <= 0.05).all()


def test_places_are_spread_over_all() -> None:
    assert spread(3, 5) == [0, 1, 2]
    assert spread(101, 3) == [0, 50, 100]
    assert spread(0, 3) == []


# ---- learning and asking ---------------------------------------------------------------------------------------


def test_odd_pictures_are_unknown_and_the_runs_own_are_not(run: Path, odd: Path) -> None:
    told = predict_files(run, [*own(run, "test"), *sorted(odd.iterdir())], unknown=SHARE)
    unknown = [one["unknown"] for one in told]
    assert sum(unknown[:-6]) <= 3
    assert all(unknown[-6:])
    assert all(one["unknown"] == (one["familiar"] <= SHARE) for one in told)
    least = read_familiar(run, load(run)).least  # that of a picture which is farther than all that were held out
    assert all(one["unknown"] for one in predict_files(run, sorted(odd.iterdir()), unknown=least))
    assert predict_files(run, odd / "0.png", unknown=np.float32(0.0455))[0]["unknown"]  # as the message has it


def test_the_answers_are_the_same_bits_beside_what_is_familiar(run: Path, odd: Path) -> None:
    files = [*own(run, "test"), *sorted(odd.iterdir())]
    for tta in ("none", "flip", 3):
        plain, told = predict_files(run, files, tta=tta), predict_files(run, files, tta=tta, unknown=SHARE)
        assert [{k: one[k] for k in ("path", "pred", "prob", "probs")} for one in told] == plain
        assert all("unknown" not in one for one in plain)
        assert [one["familiar"] for one in told] == [one["familiar"] for one in predict_files(run, files, unknown=0.5)]


def test_features_are_those_that_the_head_takes(run: Path) -> None:
    model = load(run)
    pixels = Pixels(unlabelled(own(run, "test"), model), model.spec)
    logits, features = predict_features(model, pixels)
    assert torch.equal(logits, predict_logits(model, pixels))
    assert features.shape == (len(pixels), model.num_features)
    with torch.inference_mode():
        torch.testing.assert_close(model.head(features), logits)


def test_what_is_learnt_is_counted_on_the_test_pictures_and_on_others(trained: Path, odd: Path) -> None:
    found = learn_familiar(trained, against=odd)
    splits = [row["split"] for row in read_run(trained).splits]
    assert (found["n_met"], found["n_held_out"]) == (splits.count("train"), splits.count("val"))
    assert (found["path"], found["missing"]) == (trained / FILE, 0)
    told = predict_files(trained, own(trained, "test"), unknown=found["test"]["share"])
    assert found["test"]["n"] == len(told)
    assert found["test"]["unknown"] == sum(one["unknown"] for one in told)
    assert found["test"]["share"] == pytest.approx(max(0.05, 1 / (splits.count("val") + 1)))
    low, high = found["against"][str(odd)].pop("unknown_ci95")
    assert found["against"] == {str(odd): {"n": 6, "unknown": 6, "share": found["test"]["share"]}}
    assert 0.5 < low < high == 1


def test_of_many_pictures_some_of_each_class_are_taken(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headstart.asking.MOST_MET", 15)
    monkeypatch.setattr("headstart.asking.FEWEST_MET", 2)
    run = copied(trained, tmp_path)
    found = learn_familiar(run)
    assert (found["n_met"], found["n_held_out"]) == (15, 15)
    assert from_safetensors((run / FILE).read_bytes())["met"].shape == (15, load(run).num_features)
    monkeypatch.setattr("headstart.asking.FEWEST_MET", 6)
    assert learn_familiar(run)["n_met"] == 18


def test_pictures_that_have_changed_or_gone_are_left_out_and_told(
    trained: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, moved = copied(trained, tmp_path), Path(shutil.copytree(photos, tmp_path / "moved"))
    before = learn_familiar(run, root=moved)
    first, second = [moved / path.relative_to(photos) for path in own(run, "train")[:2]]
    first.unlink()
    make_picture(np.random.default_rng(9), 1).save(second)
    found = learn_familiar(run, root=moved)
    assert (found["n_met"], found["missing"]) == (before["n_met"] - 2, 2)
    assert capsys.readouterr().err == "2 pictures of the run are gone or have changed, and are left out.\n"
    before = (run / FILE).read_bytes()
    with pytest.raises(DataError, match=r"Most train pictures of .* are not in .*nowhere as they were.* --root FOLDER"):
        learn_familiar(run, root=tmp_path / "nowhere")
    shutil.rmtree(moved / "red")
    with pytest.raises(DataError, match=r"No train picture of 'red' is in .*moved any more"):
        learn_familiar(run, root=moved)
    assert (run / FILE).read_bytes() == before


def test_of_what_is_there_enough_is_taken(trained: Path, photos: Path, tmp_path: Path) -> None:
    """Pictures that are gone are replaced by others of their class, where only some are taken."""
    run, moved = copied(trained, tmp_path), Path(shutil.copytree(photos, tmp_path / "moved"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("headstart.asking.MOST_MET", 9)
        patch.setattr("headstart.asking.FEWEST_MET", 1)
        for path in own(run, "train")[:3]:
            (moved / path.relative_to(photos)).unlink()
        found = learn_familiar(run, root=moved)
    assert (found["n_met"], found["missing"], found["n_held_out"]) == (9, 3, 9)


def test_pictures_of_other_things_are_never_those_of_the_run(
    trained: Path, odd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copied(trained, tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in ("train", "val", "test"):
        shutil.copytree(odd, tmp_path / name)
    (tmp_path / "val" / "broken.jpg").write_text("no picture")
    found = learn_familiar("run", against=["train", "val", "test"])
    assert (found["n_met"], found["n_held_out"], found["test"]["n"]) == (39, 21, 12)
    assert {name: of["n"] for name, of in found["against"].items()} == {"train": 6, "val": 6, "test": 6}
    whole = learn_familiar(run)
    assert (whole["n_met"], whole["test"]) == (39, found["test"])


def test_copies_say_nothing_of_what_is_near(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Copies in another split would make the pictures of the run's own kind look nearer than new ones are."""
    table = [(path, ("train", "val", "test")[i % 3]) for i, path in enumerate(sorted(photos.rglob("*.jpg")))]
    folder = tmp_path / "split"
    for path, split in table:
        (folder / split / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / split / path.parent.name)
    one = next((folder / "train" / "red").iterdir())
    for split in ("val", "test"):
        shutil.copy(one, folder / split / "red" / "copy.jpg")
    fine_tune(
        folder, out=tmp_path / "run", recipe=PLAN, backbone="test_resnet", weights="none",
        spec_overrides={"image_size": SIZE},
    )  # fmt: skip
    found = learn_familiar(tmp_path / "run")
    assert (found["copies"], found["n_met"], found["n_held_out"], found["test"]["n"]) == (2, 24, 24, 24)
    assert "2 validation and test pictures are copies, and are left out.\n" in capsys.readouterr().err


def test_a_run_that_knows_what_is_familiar_is_replaced_like_any(run: Path, photos: Path, tmp_path: Path) -> None:
    there = copied(run, tmp_path)
    size = {"image_size": SIZE}
    fine_tune(
        photos, out=there, overwrite=True, recipe=PLAN, backbone="test_resnet", weights="none", spec_overrides=size
    )
    assert not (there / FILE).exists()


# ---- on the command line ---------------------------------------------------------------------------------------


def test_the_commands_tell_what_is_unknown(
    trained: Path, odd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copied(trained, tmp_path)
    assert main(["familiar", str(run), "--against", str(odd), "--quiet"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("met      39 training pictures; 21 held out")
    assert lines[1].endswith(f"{FILE}")
    assert lines[3].split() == ["pictures", "n", "unknown", "at", "0.05", "share", "95", "%", "interval"]
    assert lines[6].split()[:4] == [str(odd), "6", "6", "1.000"]
    assert main(["familiar", str(run), "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["n_met"] == 39

    asked = ["predict", str(run), str(odd / "0.png"), str(own(run, "test")[0]), "--unknown", "0.1", "--quiet"]
    told = predict_files(run, [odd / "0.png", own(run, "test")[0]], unknown=0.1)
    assert [one["unknown"] for one in told] == [True, False]
    assert main(asked) == 0
    header, _, first, second = capsys.readouterr().out.splitlines()
    assert header.split() == ["picture", "1.", "prob", "familiar"]
    assert first.split()[-2:] == [f"{told[0]['familiar']:.3f}", "unknown"]
    assert second.split()[-1] == f"{told[1]['familiar']:.3f}"

    for top in ([], ["--top", "2"]):
        assert main([*asked, *top, "--csv", "-"]) == 0
        rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
        assert [row["unknown"] for row in rows] == ["1", "0"]
        assert [float(row["familiar"]) for row in rows] == [one["familiar"] for one in told]
        assert [row["pred"] for row in rows] == [one["pred"] for one in told]
        assert ("p:red" in rows[0], "prob_2" in rows[0]) == (not top, bool(top))
        assert main([*asked, *top, "--json"]) == 0
        assert [one["unknown"] for one in json.loads(capsys.readouterr().out)] == [True, False]


@pytest.mark.parametrize(("share", "words"), [("0.01", "21 validation pictures can tell no less than 0.0455"),
                                              ("5", "it takes a share between 0 and 1"),
                                              ("nan", "it takes a share between 0 and 1")])  # fmt: skip
def test_a_share_that_cannot_be_is_told_in_a_line(
    run: Path, odd: Path, share: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", str(run), str(odd), "--unknown", share, "--quiet"]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert words in told.err
    assert told.err.count("\n") == 1


# ---- what is wrong ---------------------------------------------------------------------------------------------


def test_a_run_that_has_not_learnt_it_says_how(trained: Path, odd: Path, tmp_path: Path) -> None:
    run = copied(trained, tmp_path)
    (run / FILE).unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match=r"does not hold what its model has met .*headstart familiar "):
        predict_files(run, odd / "0.png", unknown=SHARE)
    with pytest.raises(CheckpointError, match="learn_familiar takes a run folder; this is Classifier"):
        learn_familiar(load(run))
    with pytest.raises(RecipeError, match="without effect on a model in memory"):
        predict_files(load(run), odd / "0.png", unknown=SHARE)


def broken(run: Path, how: str) -> None:
    path = run / FILE
    tensors = from_safetensors(path.read_bytes())  # not mapped, since the file is replaced
    if how == "cut":
        path.write_bytes(path.read_bytes()[:-5])
    elif how == "more":
        save_file({**tensors, "code": torch.zeros(3)}, path)
    elif how == "narrow":
        save_file({**tensors, "met": tensors["met"][:, :3].contiguous()}, path)
    elif how == "few":
        save_file({**tensors, "met": tensors["met"][:4].contiguous()}, path)
    elif how == "nan":
        tensors["held_out"][0] = float("nan")
        save_file(tensors, path)
    elif how == "pickle":
        torch.save(tensors, path)
    else:  # another model
        model = load(run)
        with torch.no_grad():
            next(model.backbone.parameters())[0] += 1e-3
        save(model, run)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("cut", "cannot be used"), ("more", "its tensors are others"), ("narrow", "its tensors are others"),
        ("few", "its tensors are others"), ("nan", "a number that is none"), ("pickle", "pickle"),
        ("other", "made with another model"),
    ],
)  # fmt: skip
def test_a_file_of_another_kind_or_model_is_refused(run: Path, tmp_path: Path, how: str, words: str) -> None:
    there = copied(run, tmp_path)
    broken(there, how)
    with pytest.raises(HeadstartError, match=f"{words}.*headstart familiar"):
        read_familiar(there, load(there))


def test_pictures_that_came_in_memory_are_found_where_they_are_kept(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pictures = [make_picture(rng, i % 2) for i in range(24)]
    fine_tune(
        (pictures, ["a", "b"] * 12), out=tmp_path / "run", recipe=PLAN, backbone="test_resnet", weights="none",
        spec_overrides={"image_size": SIZE},
    )  # fmt: skip
    found = learn_familiar(tmp_path / "run")
    splits = [row["split"] for row in read_run(tmp_path / "run").splits]
    assert (found["n_met"], found["missing"]) == (splits.count("train"), 0)
