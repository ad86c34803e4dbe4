"""What the terminal shows: progress bars with rate and time left, plain tables, predictions in their three forms.

Bars and spoken lines go to stderr, so that stdout holds nothing but results. Where they cannot be shown the work goes
on without them. Needs neither torch nor numpy.
"""

from __future__ import annotations

import json
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TextIO


class _Screen:
    """Stderr, as bars and spoken lines are written to it: after the first failure nothing more is, and no work ends.

    Its reader may go away, its disk be full; it may be closed, or None.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self.stream, self._lost = stream, stream is None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def __eq__(self, other: object) -> bool:
        """Of the same stream: tqdm clears the bars on it before it writes a line, those of other libraries too."""
        other = getattr(other, "_wrapped", other)  # as tqdm keeps a bar's file
        return self.stream is (other.stream if isinstance(other, _Screen) else other)

    def __hash__(self) -> int:
        return id(self.stream)

    def try_again(self) -> None:
        """What failed before may go now."""
        self._lost = self.stream is None

    def write(self, text: str) -> None:
        if self.stream is None or self._lost:
            return
        try:
            self.stream.write(text)
        except UnicodeEncodeError:  # of one word, not of the stream
            self.write(text.encode("ascii", "backslashreplace").decode())
        except BlockingIOError:
            pass  # full for the moment
        except (OSError, ValueError):
            self._lost = True

    def flush(self) -> None:
        if self.stream is None or self._lost:
            return
        try:
            self.stream.flush()
        except BlockingIOError:
            pass
        except (OSError, ValueError):
            self._lost = True

    def isatty(self) -> bool:
        try:
            return self.stream is not None and self.stream.isatty()
        except (OSError, ValueError):
            return False


_screen = _Screen(None)


def _stderr() -> _Screen:
    """The screen of what is stderr now; the same one as long as that is the same, by which tqdm knows its bars."""
    global _screen
    if _screen.stream is not sys.stderr:
        _screen = _Screen(sys.stderr)
    return _screen


class ProgressBar:
    """One bar on stderr with rate and time left; says nothing when stderr is not a terminal or `enabled` is False.

    Use it as a context manager: `with ProgressBar(len(table), "Reading", unit="img") as bar: bar.advance(8)`.
    """

    def __init__(self, total: int, label: str, *, unit: str = "img", enabled: bool = True, keep: bool = False) -> None:
        """Draw the bar.

        Args:
            total: how many units make the bar full.
            label: what is being done, in front of the bar.
            keep: leave the full bar on the screen; otherwise it makes room for what follows.
        """
        from tqdm import tqdm

        self._bar = tqdm(
            total=total,
            desc=label,
            unit=unit,
            unit_scale=total >= 100_000,
            disable=None if enabled else True,  # None: tqdm looks whether the file is a terminal
            leave=keep,
            dynamic_ncols=True,
            file=_stderr(),
        )

    def advance(self, n: int = 1) -> None:
        """`n` more units are done."""
        self._bar.update(n)

    def move_to(self, done: int) -> None:
        """`done` units are done in all."""
        self._bar.update(done - self._bar.n)

    def note(self, **figures: float | str) -> None:
        """Figures shown behind the bar, such as the running loss."""
        self._bar.set_postfix(figures, refresh=False)

    def close(self) -> None:
        """End the bar; a second call does nothing."""
        self._bar.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
# Marks that set the direction of all that follows, where a name forgets to close them.
_CONTROLS |= {code: f"\\u{code:04x}" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}


def printable(text: str) -> str:
    """Text with control characters written out, tab and line's end left: a file's name may move the cursor by them.

    Marks of direction are written out, too: they would turn round what stands beside the name.
    """
    return text.translate(_CONTROLS)


def say(text: str, *, enabled: bool = True, last: bool = False) -> None:
    """Print a line on stderr, above a bar that may be running there; nothing where stderr cannot be written to.

    `last` words, such as an error, are tried even where earlier ones could not be written.
    """
    if enabled:
        from tqdm import tqdm

        if last:
            _stderr().try_again()
        tqdm.write(printable(text), file=_stderr())


def as_json(value: Any) -> str:
    """Indented JSON for stdout: letters as they are in UTF-8, else as JSON's own escapes, which any encoding holds."""
    encoding = getattr(sys.stdout, "encoding", None) or "ascii"
    return json.dumps(value, indent=1, ensure_ascii=encoding.lower().replace("-", "").replace("_", "") != "utf8")


def duration(seconds: float) -> str:
    """`0:07`, `12:40` or `1:02:03`; under ten seconds with a decimal: `3.2 s`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def file_size(nbytes: int) -> str:
    """`0 kB`, `840 kB`, `12.5 MB` or `3.2 GB`: powers of a thousand."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if nbytes >= size:
            return f"{nbytes / size:.1f} {unit}"
    return f"{nbytes / 1e3:.0f} kB"


def figure(value: float | int | str | None, digits: int = 3) -> str:
    """A number as the tables print it: whole ones with thousands separators, `-` for None."""
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:.{digits}f}"


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Columns padded with blanks, a rule under the header; the first `left` columns flush left, the others right."""
    header, *rows = [[printable(cell).replace("\n", "\\n") for cell in row] for row in (header, *rows)]
    widths = [max(_columns(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = []
        for column, (cell, width) in enumerate(zip(cells, widths, strict=True)):
            blanks = " " * (width - _columns(cell))
            padded.append(cell + blanks if column < left else blanks + cell)
        return "  ".join(padded).rstrip()

    return "\n".join([line(header), "-" * (sum(widths) + 2 * (len(widths) - 1)), *map(line, rows)])


def _columns(text: str) -> int:
    """How many columns of a terminal the text takes: Chinese, Japanese and Korean letters two each, accents none."""
    letters = [letter for letter in text if not unicodedata.combining(letter)]
    return len(letters) + sum(unicodedata.east_asian_width(letter) in "WF" for letter in letters)


def scores_table(scores: Mapping[str, Mapping[str, Any]]) -> str:
    """One row per split or model: accuracy with its 95 % interval, top-5, log loss, balanced accuracy, majority.

    Args:
        scores: name of the row -> what `evaluate` measured, as in `metrics.json`.
    """
    top5 = any(score.get("top5") is not None for score in scores.values())
    header = ["", "pictures", "accuracy", "95 % interval", *["top-5"] * top5, "log loss", "balanced", "majority"]
    rows = []
    for name, score in scores.items():
        low, high = score["accuracy_ci95"]
        cells = [figure(score["accuracy"]), f"{low:.3f} - {high:.3f}", *[figure(score.get("top5"))] * top5]
        cells += [figure(score[key]) for key in ("log_loss", "balanced_accuracy", "majority_baseline")]
        rows.append([name, figure(int(score["n"])), *cells])
    return format_table(header, rows)


def notes(sentences: Sequence[str]) -> str:
    """A line for each sentence, behind an empty one; nothing where there is none."""
    return "".join(f"{'' if i else chr(10)}note    {printable(said)}\n" for i, said in enumerate(sentences))


def per_class_table(metrics: Mapping[str, Any]) -> str:
    """One row per class: pictures, precision, recall, F1; the weighted means below."""
    rows = [
        [row["name"], figure(int(row["n"])), *(figure(row[key]) for key in ("precision", "recall", "f1"))]
        for row in metrics["per_class"]
    ]
    weighted = (figure(metrics[f"weighted_{key}"]) for key in ("precision", "recall", "f1"))
    rows.append(["weighted mean", figure(int(metrics["n"])), *weighted])
    return format_table(["class", "pictures", "precision", "recall", "F1"], rows)


def stages_table(stages: Sequence[Mapping[str, Any]]) -> str:
    """One row per stage: where the freeze line stood, how much was trained, the best epoch and its score, the time."""
    header = ["stage", "freeze line", "trained", "best epoch", "val loss", "val accuracy", "time"]
    rows = [
        [
            stage["name"],
            stage["freeze_line"],
            figure(stage["trainable_parameters"]),
            f"{stage['best_epoch']} of {stage['epochs']}",
            figure(stage["best_val_loss"]),
            figure(stage["best_val_accuracy"]),
            duration(stage["seconds"]),
        ]
        for stage in stages
    ]
    return format_table(header, rows, left=2)


def closing_table(metrics: Mapping[str, Any]) -> str:
    """What a run ends with, from the content of its `metrics.json`: the stages, then what each split scored."""
    parts = [stages_table(metrics["stages"])] if metrics.get("stages") else []
    rows = {"val": "val", "test": "test", "test_without_leaks": "test without leaked pictures"}
    scores = {title: metrics[name] for name, title in rows.items() if metrics.get(name)}
    if scores:
        parts.append(scores_table(scores))
    return "\n\n".join(parts)


def predictions_table(rows: Iterable[Mapping[str, Any]], *, top: int = 1) -> str:
    """One row per picture with its `top` most probable classes and their probabilities.

    Args:
        rows: what `predict_files` returns.
    """
    ranked = [(str(row["path"]), ranking(row, top), row) for row in rows]
    places = max((len(place) for _, place, _ in ranked), default=1)
    header = ["picture", *(name for n in range(1, places + 1) for name in (f"{n}.", "prob"))]
    cells = [[path, *(cell for name, prob in place for cell in (name, figure(prob)))] for path, place, _ in ranked]
    if any("unknown" in row for *_, row in ranked):
        header += ["familiar", ""]
        for line, (*_, row) in zip(cells, ranked, strict=True):
            line += [figure(row["familiar"]), "unknown" if row["unknown"] else ""]
    return format_table(header, cells, left=1 + 2 * places)


def ranking(row: Mapping[str, Any], top: int) -> list[tuple[str, float]]:
    """The `top` most probable classes of one prediction, all where there are fewer: (class name, probability)."""
    return sorted(row["probs"].items(), key=lambda item: -item[1])[:top]


def predictions_json(rows: Iterable[Mapping[str, Any]], *, top: int | None = None) -> list[dict[str, Any]]:
    """One object per picture: all classes' probabilities, or with `top` the most probable ones in order."""
    if top is None:
        return [dict(row) for row in rows]
    return [
        {key: row[key] for key in ("path", "pred", "prob", "familiar", "unknown") if key in row}
        | {"top": [{"class": name, "prob": prob} for name, prob in ranking(row, top)]}
        for row in rows
    ]


def predictions_csv(
    rows: Iterable[Mapping[str, Any]], class_names: Sequence[str], *, top: int | None = None, unknown: bool = False
) -> tuple[list[str], Iterator[list[str]]]:
    """Header and rows: a column per class as in a run's predictions.csv, or with `top` the 2nd, 3rd, ... class.

    Args:
        class_names: of the model, in its order; the header is the same whether or not there are rows.
        unknown: the rows say what is unknown; it is 1 or 0 here.
    """
    header = ["path", "pred", "prob", *(("familiar", "unknown") if unknown else ())]
    if top is None:
        header += [f"p:{name}" for name in class_names]
    else:
        header += [f"{word}_{n}" for n in range(2, min(top, len(class_names)) + 1) for word in ("pred", "prob")]

    def cells(row: Mapping[str, Any]) -> list[str]:
        first = [row["path"], row["pred"], repr(row["prob"])]
        if unknown:
            first += [repr(row["familiar"]), str(int(row["unknown"]))]
        if top is None:
            return [*first, *map(repr, row["probs"].values())]
        return [*first, *(cell for name, prob in ranking(row, top)[1:] for cell in (name, repr(prob)))]

    return header, map(cells, rows)


def comparison_tables(results: Mapping[str, Any]) -> str:
    """What each recipe of a comparison cost, what it scored, and which differences the test pictures show.

    Args:
        results: the content of compare.json.
    """
    entries = results["recipes"]
    cost = [
        [
            e["name"],
            f"{' + '.join(map(str, e['budget']['epochs']))} epochs at {e['budget']['image_size']} px",
            figure(e["trained_parameters"]),
            duration(sum(e["seconds"]) / len(e["seconds"])),
            *(v["answer"] for v in e["verdicts"]),
        ]
        for e in entries
    ]
    cost_header = ["recipe", "budget", "trained", "time alone", "still learning", "generalises", "overfits"]
    top5 = any(e["test"]["top5"] is not None for e in entries)
    score_header = ["recipe", "val loss", "val acc.", "test loss", "test acc.", "95 % interval", *["top-5"] * top5]
    scores = []
    for e in entries:
        low, high = e["test"]["accuracy_ci95"]
        row = [e["name"], *(figure(e[split][key]) for split in ("val", "test") for key in ("log_loss", "accuracy"))]
        row += [f"{low:.3f} - {high:.3f}", *[figure(e["test"]["top5"])] * top5]
        scores.append([*row, figure(e["test"]["weighted_precision"]), figure(e["test"]["weighted_recall"])])
    parts = [format_table(cost_header, cost, left=2), format_table([*score_header, "w. prec.", "w. recall"], scores)]
    return "\n\n".join([*parts, "\n".join(printable(pair["sentence"]) for pair in results["pairs"])]).rstrip()


def sweep_table(results: Mapping[str, Any]) -> str:
    """One row per trial, the best first: its values, validation loss and accuracy, and a published figure beside.

    Args:
        results: the content of sweep.json.
    """
    trials = sorted(results["trials"], key=lambda t: (t.get("val") or {}).get("log_loss", float("inf")))
    names = list(dict.fromkeys(name for trial in trials for name in trial["values"]))
    published = any("published" in trial for trial in trials)
    header = [*names, "val loss", "val accuracy", "95 % interval", "best epoch", "time", *["published"] * published]
    rows = []
    for trial in trials:
        val = trial.get("val") or {}
        values = [trial["values"].get(name) for name in names]
        row = [f"{v:g}" if isinstance(v, (int, float)) else str(v) for v in values]
        low, high = val.get("accuracy_ci95") or (None, None)
        row += [figure(val.get("log_loss")), figure(val.get("accuracy"))]
        row += [f"{figure(low)} - {figure(high)}" if val else "ended early", figure(trial.get("best_epoch"))]
        rows.append([*row, duration(trial["seconds"]), *[figure(trial.get("published"), 4)] * published])
    total = sum(trial["seconds"] for trial in trials)
    return f"{format_table(header, rows, left=0)}\n\n{len(trials)} trial{'s' * (len(trials) != 1)} in {duration(total)}"
