"""The report: one file that loads nothing, says what the run folder holds, and survives any name and any gap."""

from __future__ import annotations

import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from browser import start_browser
from headstart.errors import CheckpointError
from headstart.metrics import evaluate_probs, softmax
from headstart.recipe import Recipe
from headstart.report import write_report
from headstart.report_charts import curves, freeze_strip, interval_scale, log_shades, nice_ticks
from headstart.report_page import duration, sentence
from headstart.report_results import confusion_section
from headstart.run import Run, open_run
from headstart.run_record import environment
from headstart.verdicts import verdicts

ROLLED_BACK = "A learning rate of 0.01 wrecked the trained head. Rolled back; retrying at 0.001."
FLOWERS = ("blue", "green", "red")
SIX = ("a", "b", "c", "d", "e", "f")


def record(stage: str, index: int, epoch: int, loss: float | None, *, top5: float | None = None, **more: Any) -> Any:
    score = {"loss": loss, "accuracy": 0.8, "top5": top5, "n": 40}
    return {"stage": stage, "stage_index": index, "epoch": epoch, "lr": 0.01, "train_loss": None, "train": score,
            "val": score, "best": False, "seconds": 1.0, "event": None, **more}  # fmt: skip


def make_history(run: Run, top5: float | None = None) -> None:
    for epoch, loss in enumerate((1.6, 0.9, 0.6, 0.5)):
        run.append_history(record("head", 0, epoch, loss, top5=top5, best=True))
    run.append_history(record("fine-tune", 1, 0, 0.5, top5=top5, best=True))
    run.append_history(record("fine-tune", 1, 1, None, top5=top5))
    event = {"kind": "rollback", "message": ROLLED_BACK}
    run.append_history(record("fine-tune", 1, 0, 0.5, top5=top5, event=event))
    for epoch, loss in enumerate((0.5, 0.45, 0.44)):
        run.append_history(record("fine-tune", 1, epoch, loss, top5=top5, best=True))


def make_run(
    path: Path,
    names: tuple[str, ...] = FLOWERS,
    root: Path | str = "/nowhere/photos",
    files: dict[str, Any] | None = None,
) -> Path:
    """A run folder as a fit leaves it, with made figures; `files`: picture paths by class, relative to `root`."""
    run, classes = open_run(path), len(names)
    run.write_json("recipe.json", Recipe().to_dict())
    run.write_json("environment.json", environment())
    make_history(run, top5=0.9 if classes > 5 else None)
    rng, scores, rows = np.random.default_rng(0), {}, []
    for split in ("val", "test"):
        labels = np.repeat(np.arange(classes), 12)
        probs = softmax(rng.normal(size=(len(labels), classes)) + 2 * np.eye(classes)[labels])
        scores[split] = evaluate_probs(probs, labels, names)
        for i, (label, row) in enumerate(zip(labels, probs, strict=True)):
            file = (files or {}).get(names[label], [f"{split}/{label}/{k}.jpg" for k in range(12)])[i % 12]
            pred = int(row.argmax())
            rows.append([file, split, names[label], names[pred], repr(float(row[pred])), *map(repr, map(float, row))])
    run.write_csv("predictions.csv", ["path", "split", "label", "pred", "prob", *(f"p:{n}" for n in names)], rows)
    stage = {
        "name": "head", "seconds": 12.0, "epochs": 3, "best_epoch": 3, "best_val_loss": 0.5, "best_val_accuracy": 0.8,
        "freeze_line": "head", "batchnorm": "fixed", "trainable_parameters": 3843, "frozen_parameters": 2_223_872,
        "lr": 0.01, "trained": ["head.fc"], "views": 4, "events": [],
    }  # fmt: skip
    counts = {split: dict.fromkeys(names, 12) for split in ("train", "val", "test")}
    run.write_json(
        "metrics.json",
        {
            **scores,
            "stages": [stage, {**stage, "name": "fine-tune", "freeze_line": "all", "views": None, "lr": 0.001}],
            "phases": [{"name": "read pictures", "seconds": 2.0}, {"name": "stage head", "seconds": 64.0}],
            "data": {
                "root": str(root),
                "n_train": 36,
                "n_val": 36,
                "n_test": 36,
                "class_counts": counts,
                "bad_files": [],
            },
            "backbone": "mobilenetv2_100",
            "interrupted": False,
        },
    )
    return run.path


class Reader(HTMLParser):
    """Collects a page's text, tags and attributes, and checks that every element is closed in its place."""

    VOID = ("meta", "br", "img")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def read(path: Path) -> tuple[Reader, str]:
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    assert reader.open == []
    return reader, re.sub(r"\s+", " ", " ".join(reader.words))


def test_the_report_holds_the_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    page, words = read(write_report(run))
    metrics = json.loads((run / "metrics.json").read_text())
    test = metrics["test"]
    assert f"{100 * test['accuracy']:.1f}" in words
    low, high = test["accuracy_ci95"]
    assert f"{100 * low:.1f} to {100 * high:.1f} %" in words
    assert "Always answering the most frequent class: 33.3 %" in words
    assert "mobilenetv2_100" in words
    assert ROLLED_BACK in words
    assert "3,843 of 2,227,715" in words
    assert "read pictures" in words
    assert "1 min 4 s" in words
    for row in test["per_class"]:
        assert f"{100 * row['precision']:.1f} %" in words
    history = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    for verdict in verdicts(history, metrics):
        assert verdict.question in words
        assert verdict.sentence in words
    assert "Top-5" not in words
    assert [t for t, _ in page.tags].count("h2") == 9


def test_the_accuracy_of_the_pictures_that_chose_is_no_forecast(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    assert "On more pictures of the same kind expect" in read(write_report(path))[1]
    metrics = json.loads((path / "metrics.json").read_text())
    del metrics["test"]
    Run(path, path).write_json("metrics.json", metrics)
    _, words = read(write_report(path))
    low, high = metrics["val"]["accuracy_ci95"]
    assert (
        f"95 % interval: {100 * low:.1f} to {100 * high:.1f} %. These pictures chose the state that was kept" in words
    )
    assert "expect somewhat less on new ones" in words
    assert "of the same kind expect" not in words


def test_top5_is_shown_with_more_than_five_classes(tmp_path: Path) -> None:
    _, words = read(write_report(make_run(tmp_path / "run", SIX)))
    assert words.count("Top-5 accuracy") >= 2  # among the figures, and as a curve


def test_the_report_loads_nothing_and_runs_nothing(tmp_path: Path, photos: Path) -> None:
    files = {name: [p.relative_to(photos).as_posix() for p in (photos / name).iterdir()] for name in FLOWERS}
    path = write_report(make_run(tmp_path / "run", root=photos, files=files))
    page, text = read(path)[0], path.read_text()
    assert not {t for t, _ in page.tags} & {"script", "link", "iframe", "object", "base", "form", "image", "use"}
    loads = [a[k] or "" for _, a in page.tags for k in ("src", "href", "xlink:href", "srcset", "action") if k in a]
    assert loads
    assert all(address.startswith("data:image/jpeg;base64,") for address in loads)
    assert not [a for _, a in page.tags if any(name.startswith("on") for name in a)]
    assert "@import" not in text
    assert set(re.findall(r"url\(([^)]*)\)", text)) <= {"#clip-loss", "#clip-accuracy"}
    policy = next(a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a)
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_the_report_can_be_read_without_seeing_it(tmp_path: Path, photos: Path) -> None:
    files = {name: [p.relative_to(photos).as_posix() for p in (photos / name).iterdir()] for name in FLOWERS}
    page, _ = read(write_report(make_run(tmp_path / "run", root=photos, files=files)))
    images = [a for t, a in page.tags if t == "img"]
    assert images
    assert all(a["alt"] for a in images)
    assert all(a.get("aria-label") or a.get("aria-hidden") for t, a in page.tags if t == "svg")
    headers = [a for t, a in page.tags if t == "th"]
    assert headers
    assert all(a.get("scope") in ("col", "row") for a in headers)
    assert ("html", {"lang": "en"}) in page.tags


NASTY = (
    '<script>alert("1")</script>',
    "a & b's",
    "$x_1$ {braces} %s",
    "two\nlines",
    "Blüte 花",
    "bytes\udcff",
    "x" * 90,
)


def test_any_class_name_and_file_name_is_shown_as_it_is(tmp_path: Path) -> None:
    files = {name: [f"<img src=x onerror=alert(1)>{k}\udcfe'\".jpg" for k in range(12)] for name in NASTY}
    path = make_run(tmp_path / "run", NASTY, root='/no"where/<b>photos</b>', files=files)
    page, words = read(write_report(path))
    assert not [t for t, _ in page.tags if t in ("script", "b", "img")]
    for name in NASTY:
        assert re.sub(r"\s+", " ", name.encode("utf-8", "replace").decode()) in words
    assert "<img src=x onerror=alert(1)>" in words


def test_long_names_stay_in_the_window(tmp_path: Path) -> None:
    names = tuple(letter * 200 for letter in "abc")
    path = write_report(make_run(tmp_path / "run", names, root="/nowhere/" + "r" * 200))
    browser = start_browser(tmp_path / "profile")
    try:
        for width in (1280, 390):
            browser.open(path, width=width)
            assert browser.run("document.documentElement.scrollWidth") <= width
    finally:
        browser.close()


def test_names_from_right_to_left_are_set_apart_in_sentences() -> None:
    cat, dog = "\u05d7\u05ea\u05d5\u05dc", "\u05db\u05dc\u05d1"
    assert sentence(f"{cat} (12 %), {dog} 3 pictures") == f"<bdi>{cat}</bdi> (12 %), <bdi>{dog}</bdi> 3 pictures"
    assert sentence(f"{cat}, {dog}") == f"<bdi>{cat}</bdi>, <bdi>{dog}</bdi>"
    giraffe, army, go, dog = (
        "\u05d2'\u05d9\u05e8\u05e4\u05d4",
        '\u05e6\u05d4"\u05dc',
        "\u0645\u06cc\u200c\u0631\u0648\u0645",
        "\u0633\u06af (\u0628\u0632\u0631\u06af)",
    )
    for name in (giraffe, army, go, dog):
        assert sentence(f"{name} (12 %)") == f"<bdi>{html.escape(name)}</bdi> (12 %)"
    assert sentence("cat\u202eabc: 50 % (dog)") == "cat\\u202eabc: 50 % (dog)"
    assert sentence("go on with `headstart fit A`.") == "go on with <code>headstart fit A</code>."
    assert sentence(f"of {cat} {dog}_2: <b>") == f"of <bdi>{cat} {dog}_2</bdi>: &lt;b&gt;"
    assert sentence("ash, 12 % of elm") == "ash, 12 % of elm"


def test_drawings_are_well_formed(tmp_path: Path) -> None:
    text = write_report(make_run(tmp_path / "run", NASTY)).read_text(encoding="utf-8")
    drawings = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    assert len(drawings) > 10
    for drawing in drawings:
        for number in ElementTree.fromstring(drawing).iter():
            assert not {"nan", "inf"} & set(number.attrib.values())


def test_worst_mistakes_come_with_their_pictures(tmp_path: Path, photos: Path) -> None:
    files = {name: [p.relative_to(photos).as_posix() for p in (photos / name).iterdir()] for name in FLOWERS}
    path = make_run(tmp_path / "run", root=photos, files=files)
    page, words = read(write_report(path))
    rows = [r for r in _predictions(path) if r["split"] == "test" and r["label"] != r["pred"]]
    worst = sorted(rows, key=lambda r: float(r[f"p:{r['label']}"]))
    alts = [a["alt"] for t, a in page.tags if t == "img"]
    assert alts[:3] == [f"{r['label']}, taken for {r['pred']}" for r in worst[:3]]
    assert len(alts) == len(worst)
    assert "picture not found" not in words
    (photos / worst[0]["path"]).write_bytes(b"no picture any more")
    page, words = read(write_report(path))
    assert len([t for t, _ in page.tags if t == "img"]) < len(worst)
    assert "picture not found" in words


def _predictions(path: Path) -> list[dict[str, str]]:
    from headstart.files import read_csv

    return read_csv(path / "predictions.csv")


def test_pictures_that_are_gone_are_named(tmp_path: Path) -> None:
    page, words = read(write_report(make_run(tmp_path / "run")))
    assert "no longer at /nowhere/photos" in words
    assert "picture not found" in words
    assert not [t for t, _ in page.tags if t == "img"]


def test_no_picture_from_outside_the_data_folder(tmp_path: Path, photos: Path) -> None:
    """A run folder from someone else must not pull the reader's own pictures into a report that is passed on."""
    inside = photos / "blue"
    files = {name: [f"../green/green{k}.jpg" for k in range(12)] for name in FLOWERS}
    page, words = read(write_report(make_run(tmp_path / "run", root=inside, files=files)))
    assert not [t for t, _ in page.tags if t == "img"]
    assert "picture not found" in words


def test_of_very_many_classes_those_with_the_most_mistakes_are_drawn() -> None:
    classes = 130
    names = tuple(f"class {i}" for i in range(classes))
    labels = np.repeat(np.arange(classes), 3)
    first = np.arange(len(labels)) % 3 == 0  # of many classes one picture is taken for the next, of ten late ones all
    answers = np.where((labels % 3 == 1) & (first | (labels > 99)), labels + 1, labels)
    scored = evaluate_probs(np.eye(classes)[answers] * 0.9 + 0.1 / classes, labels, names)
    page = confusion_section(scored, "test")
    drawn = set(re.findall(r">(class \d+)</text>", page))
    assert len(drawn) == 60
    assert {name for i in range(100, 130, 3) for name in names[i : i + 2]} <= drawn
    assert "Of 130 classes the 60 of the most frequent mistakes" in page


def test_no_mistakes_is_said(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    rows = [r for r in _predictions(path) if r["label"] == r["pred"]]
    Run(path, path).write_csv("predictions.csv", list(rows[0]), [list(r.values()) for r in rows])
    assert "None: all" in read(write_report(path))[1]


def test_predictions_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    rows = [{**r, "prob": "high"} for r in _predictions(path)]
    Run(path, path).write_csv("predictions.csv", list(rows[0]), [list(r.values()) for r in rows])
    with pytest.raises(CheckpointError, match=r"predictions\.csv"):
        write_report(path)


def test_bad_files_are_listed(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    metrics = json.loads((path / "metrics.json").read_text())
    metrics["data"]["bad_files"] = [["red/<b>.jpg", "image file is truncated"]]
    Run(path, path).write_json("metrics.json", metrics)
    _, words = read(write_report(path))
    assert "1 unreadable file was left out" in words
    assert "red/<b>.jpg : image file is truncated" in words


def test_the_path_of_the_weights_breaks_between_folders(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    metrics = json.loads((path / "metrics.json").read_text()) | {"weights": "/a/<b>/net.safetensors"}
    Run(path, path).write_json("metrics.json", metrics)
    assert "/<wbr>a/<wbr>&lt;b&gt;/<wbr>net<wbr>.safetensors" in write_report(path).read_text()


@pytest.mark.parametrize("keep", [(), ("history",), ("history", "metrics")])
def test_an_interrupted_run_gets_a_report_of_what_there_is(tmp_path: Path, keep: tuple[str, ...]) -> None:
    run = open_run(tmp_path / "run")
    run.write_json("recipe.json", Recipe().to_dict())
    if "history" in keep:
        make_history(run)
    if "metrics" in keep:
        facts = {"stages": [], "phases": [], "data": {"root": "/x"}, "backbone": "resnet18", "interrupted": True}
        run.write_json("metrics.json", facts)
    _, words = read(write_report(run.path))
    assert "stopped before its end" in words
    assert "The test split has not been scored" in words
    assert ("How it learned" in words) == ("history" in keep)
    assert ("resnet18" in words) == ("metrics" in keep)


def test_losses_that_are_not_finite_do_not_stop_the_report(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run")
    run.write_json("recipe.json", Recipe().to_dict())
    for epoch in range(4):
        run.append_history(record("head", 0, epoch, None))
    assert "In words" in read(write_report(run.path))[1]


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        write_report(tmp_path)


def test_120_classes_stay_readable(tmp_path: Path) -> None:
    names = tuple(f"class number {i}" for i in range(120))
    path = write_report(make_run(tmp_path / "run", names))
    page, words = read(path)
    assert path.stat().st_size < 2_000_000
    assert "All 120 classes" in words
    assert "Most frequent mistakes" in words
    sizes = [float(s) for s in re.findall(r"font-size:([\d.]+)px", path.read_text())]
    assert min(sizes) >= 8
    assert [t for t, _ in page.tags].count("details") >= 3


def test_the_log_scale_keeps_a_single_mistake_visible() -> None:
    shades = log_shades(np.array([[1000, 1], [0, 500]]))
    assert (shades[0, 0], shades[1, 0]) == (1.0, 0.0)
    assert shades[0, 1] == pytest.approx(0.1, abs=0.01)  # a linear scale gives 0.001
    assert log_shades(np.zeros((2, 2), dtype=int)).max() == 0


def test_curves_mark_the_move_of_the_freeze_line_and_the_kept_state(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run")
    make_history(run)
    history = [json.loads(line) for line in (run.path / "history.jsonl").read_text().splitlines()]
    svg = curves(history, "loss", freeze_lines=("head", "all"))
    assert "The freeze line moves from head to all" in svg
    assert svg.count('class="kept"') == 1
    assert svg.count("rolled back") == 1
    assert "moves" not in curves(history, "loss", freeze_lines=("all", "all"))
    assert curves(history, "top5") == ""
    assert curves([], "loss") == ""


def test_a_mixture_is_no_epoch_of_the_curves() -> None:
    """`--wise` writes a record numbered one more than the last epoch: nothing was trained there."""
    stop = {"kind": "early-stop", "message": "No better score."}
    history = [record("head", 0, e, 1.0 - 0.25 * e, best=True) for e in range(4)]
    history[-1]["event"] = stop
    plain = ElementTree.fromstring(curves(history, "loss"))
    wise = {"kind": "wise", "message": "Kept by validation: half of the way.", "alpha": 0.5, "epoch": 3}
    mixed = ElementTree.fromstring(curves([*history, record("head", 0, 4, 0.2, best=True, event=wise)], "loss"))

    def drawn(svg: ElementTree.Element, tag: str, class_: str) -> list[ElementTree.Element]:
        return [e for e in svg.iter(tag) if e.get("class") == class_]

    for class_ in ("val", "train"):
        assert drawn(mixed, "polyline", class_)[0].get("points") == drawn(plain, "polyline", class_)[0].get("points")
    last = float(drawn(plain, "polyline", "val")[0].attrib["points"].split()[-1].split(",")[0])
    assert [float(e.attrib["x1"]) for e in drawn(mixed, "line", "event")] == [last, last]
    assert float(drawn(mixed, "circle", "kept")[0].attrib["cx"]) == last
    assert "4" not in [e.text for e in mixed.iter("text")]
    names = drawn(mixed, "text", "small eventname")
    assert [e.text for e in names] == ["early stop", "mixed"]
    assert len({e.get("y") for e in names}) == 2  # one does not lie on the other


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_mixtures_that_were_tried_and_not_kept_are_no_event_of_the_curves(alpha: float) -> None:
    kept = {"kind": "wise", "message": "Kept by validation.", "alpha": alpha, "epoch": 3 * int(alpha)}
    history = [record("head", 0, e, 1.0 - 0.25 * e, best=True) for e in range(4)]
    svg = curves([*history, record("head", 0, 4, 0.25, event=kept)], "loss")
    assert "mixed" not in svg
    assert svg == curves(history, "loss")


@pytest.mark.parametrize(("alpha", "told"), [(0.0, False), (0.5, True)])
def test_the_lines_over_the_curves_are_explained(tmp_path: Path, alpha: float, told: bool) -> None:
    run = open_run(tmp_path / "run")
    run.write_json("recipe.json", Recipe().to_dict())
    wise = {"kind": "wise", "message": "Kept by validation: some of the way.", "alpha": alpha, "epoch": 1}
    for row in (record("head", 0, 0, 1.0), record("head", 0, 1, 0.5, best=True), record("head", 0, 2, 0.4, event=wise)):
        run.append_history(row)
    text = write_report(run.path).read_text(encoding="utf-8")
    assert ("An upright red line marks an event" in text) == told
    assert ("Mixed: the weights that were kept lie between" in text) == told


def test_curves_map_epochs_and_values_to_the_frame() -> None:
    history = [record("head", 0, e, 1.0 - 0.25 * e, best=True) for e in range(4)]
    root = ElementTree.fromstring(curves(history, "loss"))
    points = next(e for e in root.iter("polyline") if e.get("class") == "val").attrib["points"].split()
    xs, ys = zip(*(map(float, p.split(",")) for p in points), strict=True)
    assert np.diff(xs) == pytest.approx(np.diff(xs)[0], abs=0.2)
    assert np.diff(ys) == pytest.approx(np.diff(ys)[0], abs=0.2)
    assert np.diff(ys)[0] > 0  # a falling loss goes down the page


def test_interval_and_strip_say_their_numbers() -> None:
    assert "93.5 %, 95 % interval 89.2 to 96.2 %, largest class 20.0 %" in interval_scale(0.935, (0.892, 0.962), 0.2)
    strip = freeze_strip(2_223_872, 6_405)
    assert "2,223,872 parameters frozen, 6,405 trained" in strip
    widths = [float(w) for w in re.findall(r'width="([\d.]+)"', strip)]
    assert widths[1] >= 7  # a small head stays visible
    assert 'class="frozen"' not in freeze_strip(0, 10)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 0.037), (0.6, 1), (0, 4.79), (0, 2300)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert 2 <= len(ticks) <= 7
    assert low <= ticks[0] < ticks[-1] <= high
    assert np.diff(ticks) == pytest.approx(ticks[1] - ticks[0])


def test_epoch_ticks_are_whole() -> None:
    for last in (1, 2, 3, 7, 30, 1000):
        assert all(tick == int(tick) for tick in nice_ticks(0, last, 6, whole=True))


def test_durations() -> None:
    assert [duration(s) for s in (0.04, 59.94, 59.96, 125, 7265)] == [
        "0.0 s",
        "59.9 s",
        "1 min 0 s",
        "2 min 5 s",
        "2 h 1 min",
    ]
