"""What a run's history and figures say in words: arrays of numbers in, four answered questions out.

Every answer follows from written thresholds that take the noise into account; where the numbers cannot tell, the
answer is `unclear`. Train and validation figures of a history are both scored in evaluation mode on plain pictures,
so a difference between them is not an effect of dropout or augmentation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .metrics import Z95, paired_difference
from .trends import LEARNING_STATES, clear_fall, fell_until, is_much, is_rise, turn_of

# Not generalising: no more right than always answering the most frequent class gives, picture by picture, with a 95 %
# interval that ends below 5 points, and the mean recall of the classes at most 5 points above that of guessing.
GUESS_MARGIN = 0.05
# Overfitting in the state that was kept: training accuracy above validation accuracy by 5 points and by more than
# the 95 % interval of their difference.
OVERFIT_GAP = 0.05
OVERFIT_BLIND = 0.2  # where chance explains gaps this wide, no gap says that all is well
# Uneven: the recalls of the classes differ by more than a random spread of the same mistakes gives in 1 % of draws,
# and the worst class lies 5 points below the whole. Below 10 pictures per class a `yes` is not claimed.
UNEVEN_P = 0.01
UNEVEN_GAP = 0.05
UNEVEN_DRAWS = 4000
EVEN_PICTURES = 10

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Verdict:
    """One question a reader has, with its answer.

    answer: `yes`, `no`, `partly` or `unclear`. good: True where the answer is what one hopes for, False where it is
    not, None where it is neither.
    """

    question: str
    answer: str
    sentence: str
    good: bool | None = None


# ---- reading a history -----------------------------------------------------------------------------------------


def stage_attempts(history: Sequence[Record]) -> list[list[list[Record]]]:
    """Records by stage, and in each stage by attempt: a stage that was rolled back and tried again has several.

    A new attempt starts where the epoch number does not grow. The last attempt of a stage is the one that counts.
    Records of single `fit` calls, joined, have no stage's number: there the names tell stages apart.
    """

    def stage(record: Record) -> tuple[Any, Any]:
        return record.get("stage_index"), record.get("stage")

    stages: list[list[list[Record]]] = []
    previous: Record | None = None
    for record in history:
        if previous is None or stage(record) != stage(previous):
            stages.append([[record]])
        elif record.get("epoch", 0) <= previous.get("epoch", 0):
            stages[-1].append([record])
        else:
            stages[-1][-1].append(record)
        previous = record
    return stages


def figure(record: Record, split: str, quantity: str) -> float:
    """`record[split][quantity]`, NaN where it is absent or was not finite."""
    value = (record.get(split) or {}).get(quantity)
    return float(value) if value is not None else math.nan


def kept_record(history: Sequence[Record]) -> Record | None:
    """The state the run kept: the last one marked best or rolled back to, else the lowest validation loss."""
    scored = [record for record in history if math.isfinite(figure(record, "val", "loss"))]
    marked = [r for r in scored if r.get("best") or (r.get("event") or {}).get("kind") == "rollback"]
    if marked:
        return marked[-1]
    return min(scored, key=lambda record: figure(record, "val", "loss"), default=None)


def axis_range(stages: Sequence[Sequence[Sequence[Record]]], quantity: str) -> tuple[float, float]:
    """The range of a curve in which its trained states can be told apart; where it starts or collapses may lie outside.

    Four times the worst of each stage's second half: from 0 upwards for a loss, from 1 downwards for a share.

    Args:
        stages: what `stage_attempts` returns; of each stage the last attempt counts.
    """

    def values(records: Sequence[Record]) -> NDArray[np.float64]:
        found = np.array([figure(r, split, quantity) for r in records for split in ("train", "val")])
        return np.asarray(found[np.isfinite(found)], dtype=np.float64)

    counted = values([r for attempts in stages for r in attempts[-1]])
    settled = values([r for attempts in stages for r in attempts[-1][len(attempts[-1]) // 2 :]])
    if not len(settled):
        return 0.0, 1.0
    if quantity == "loss":
        return 0.0, max(1.05 * min(float(counted.max()), 4 * float(settled.max())), 1e-3)
    low = max(float(counted.min()), 1 - 4 * (1 - float(settled.min())))
    return min(0.9, max(0.0, math.floor((low - 0.02) * 10) / 10)), 1.0


def epoch_records(attempt: Sequence[Record]) -> list[Record]:
    """The states that training itself came to, without a mixture of them."""
    return [record for record in attempt if not is_mixture(record)]


def drawn_epoch(record: Record) -> int:
    """The epoch at which a record is drawn: a mixture, numbered one more than the last, at the last one trained."""
    return int(record.get("epoch", 0)) - is_mixture(record)


def is_mixture(record: Record) -> bool:
    """Whether a record is that of a mixture made at the stage's end (WiSE), which is no step of training."""
    return (record.get("event") or {}).get("kind") == "wise"


def _losses(records: Sequence[Record], split: str) -> NDArray[np.float64]:
    return np.array([figure(record, split, "loss") for record in records])


def _points(share: float) -> str:
    return f"{100 * share:.1f}"


# ---- the four questions ----------------------------------------------------------------------------------------


def verdicts(history: Sequence[Record], metrics: Mapping[str, Any]) -> list[Verdict]:
    """Still learning? Generalising? Overfitting? Evenly good over the classes? Always these four, in this order.

    Args:
        history: records of history.jsonl.
        metrics: what metrics.json holds; `val` and `test` as `evaluate_probs` returns them, either may be absent.
    """
    test = metrics.get("test") or {}
    return [
        still_learning(history),
        generalising(metrics.get("val") or {}, test),
        overfitting(history),
        evenly_good(test or metrics.get("val") or {}, "test" if test else "validation"),
    ]


def still_learning(history: Sequence[Record]) -> Verdict:
    """Whether the validation loss was still falling when the last stage ended."""
    question = "Was it still learning at the end?"
    stages = stage_attempts(history)
    attempt = epoch_records(stages[-1][-1]) if stages else []
    losses = _losses(attempt, "val")
    states = max(LEARNING_STATES, math.ceil(len(losses) / 3))
    tail = losses[-states:]
    if len(tail) < LEARNING_STATES:
        few = f"The last stage has {len(losses)} scores of the validation split; a trend needs {LEARNING_STATES}."
        return Verdict(question, "unclear", few)
    if not np.isfinite(tail).all():
        gap = f"Of the last stage's last {len(tail)} scores of the validation split some are missing or not finite:"
        return Verdict(question, "unclear", f"{gap} a trend needs them all.")
    name, epochs = attempt[-1].get("stage", ""), states - 1
    drop = clear_fall(losses)
    if drop is not None:
        return Verdict(
            question,
            "yes",
            f"Over the last {epochs} epochs of stage {name!r} the validation loss fell by {drop:.3f} to "
            f"{tail[-1]:.3f}, steadily enough not to be jitter: more epochs would probably help.",
        )
    best = int(np.nanargmin(losses))
    last = fell_until(losses, np.array([record.get("lr", math.nan) for record in attempt], dtype=np.float64))
    if last is not None:
        return Verdict(
            question,
            "unclear",
            f"Up to epoch {attempt[last].get('epoch', last)} of stage {name!r} the validation loss fell, to "
            f"{losses[last]:.3f}; then the rate ran down, which flattens any curve (it ended at {losses[-1]:.3f}). "
            "A longer schedule may help: compare with twice the epochs.",
        )
    if best == len(losses) - 1 and is_much(tail[0] - tail[-1], tail):
        return Verdict(
            question,
            "unclear",
            f"Over the last {epochs} epochs of stage {name!r} the validation loss went from {tail[0]:.3f} to "
            f"{tail[-1]:.3f}, its lowest, but by no more than it jitters: more epochs may help.",
        )
    return Verdict(
        question,
        "no",
        f"Over the last {epochs} epochs of stage {name!r} the validation loss shows no clear fall below what it was "
        f"before (from {tail[0]:.3f} to {tail[-1]:.3f}, the best at epoch {attempt[best].get('epoch', best)}): "
        "more epochs of this kind would probably not help.",
        good=True,
    )


def generalising(val: Mapping[str, Any], test: Mapping[str, Any]) -> Verdict:
    """Whether the test split, scored once, beats guessing and agrees with the validation split."""
    question = "Does it generalise to new pictures?"
    if not test:
        return Verdict(question, "unclear", "The test split has not been scored in this run.")
    accuracy, baseline, n = test["accuracy"], test["majority_baseline"], test["n"]
    low, high = test["accuracy_ci95"]
    present = [row["name"] for row in test["per_class"] if row["n"]]
    if len(present) == 1:
        one = f"The test split holds one class alone ({present[0]}): there is nothing to tell apart in it."
        return Verdict(question, "unclear", f"{one} Of its {n:,} pictures {_points(accuracy)} % are right.")
    scored = f"On {n:,} test pictures it had never seen, {_points(accuracy)} % are right"
    scored += f" ({_points(low)} to {_points(high)} %)"
    if low <= baseline:
        guesses = _guesses(test, len(present))
        return Verdict(
            question,
            "no" if guesses else "unclear",
            f"{scored}; always answering the most frequent class would give {_points(baseline)} %, "
            "so it is not shown to be better than that.",
            good=False if guesses else None,
        )
    if val:
        gap = val["accuracy"] - accuracy
        chance = difference_interval(val["accuracy"], val["n"], accuracy, n)
        if gap > chance:
            return Verdict(
                question,
                "partly",
                f"{scored}, clearly more than the {_points(baseline)} % of guessing, but {_points(gap)} points below "
                f"the validation split, where chance explains {_points(chance)}: the two splits differ, or the choices "
                "have been fitted to the validation split.",
                good=False,
            )
        agrees = f", and agrees with the validation split ({_points(val['accuracy'])} % of {val['n']:,})"
    else:
        agrees = ""
    return Verdict(
        question,
        "yes",
        f"{scored}: clearly more than the {_points(baseline)} % of always answering the most frequent class{agrees}.",
        good=True,
    )


def _guesses(test: Mapping[str, Any], present: int) -> bool:
    """Whether it is shown that a model does no better than guessing, by accuracy and by the mean recall of the classes.

    Picture by picture against the answer that is always the most frequent class: of few pictures a tie shows nothing.
    """
    confusion = np.array(test["confusion"], dtype=np.int64)
    hits, n = confusion.diagonal(), confusion.sum(axis=1)
    big = int(n.argmax())
    counts = [hits[big], n[big] - hits[big], hits.sum() - hits[big], n.sum() - n[big] - hits.sum() + hits[big]]
    found = paired_difference(np.repeat([1, 0, 1, 0], counts), np.repeat([1, 1, 0, 0], counts))
    alike = test["balanced_accuracy"] <= 1 / present + GUESS_MARGIN
    return bool(found["difference"] <= 0 and found["high"] < GUESS_MARGIN and alike)


def difference_interval(p: float, n: int, q: float, m: int) -> float:
    """Half width of the 95 % interval of the difference of two shares, each eased by one success and one failure.

    Easing (Agresti and Caffo 2000) keeps the width above 0 where a share is 0 or 1.
    """
    p, q = (p * n + 1) / (n + 2), (q * m + 1) / (m + 2)
    return Z95 * math.sqrt(p * (1 - p) / (n + 2) + q * (1 - q) / (m + 2))


def overfitting(history: Sequence[Record]) -> Verdict:
    """Whether validation worsened while training improved, or the kept state knows its training pictures better."""
    question = "Does it overfit?"
    kept = kept_record(history)
    if kept is None or not math.isfinite(figure(kept, "train", "accuracy")):
        return Verdict(
            question, "unclear", "The history holds no state scored on both the training and the validation split."
        )
    train, val = figure(kept, "train", "accuracy"), figure(kept, "val", "accuracy")
    chance = difference_interval(train, int(kept["train"]["n"]), val, int(kept["val"]["n"]))
    gap = train - val
    both = f"{_points(train)} % of the training and {_points(val)} % of the validation pictures"
    turns = _turns(history)
    last, earlier = turns[-1:], [turn for turn in turns[:-1] if turn.kind == "overfit"][-1:]
    rose = [turn for turn in last if turn.kind == "overfit"]
    if gap > max(chance, OVERFIT_GAP):
        return Verdict(
            question,
            "yes",
            " ".join([
                f"The state kept gets {both} right: {_points(gap)} points apart, where chance explains "
                f"{_points(chance)}. It knows its training pictures better than new ones; more pictures or stronger "
                "augmentation would help.",
                *(turn.words for turn in rose or earlier),
            ]),
            good=False,
        )  # fmt: skip
    within = "no more than chance explains" if gap <= chance else "a small difference"
    apart = f"The state kept gets {both} right: {within}."
    if rose:
        kept_risen = rose[0].keeps_rise
        answer = "yes" if kept_risen else "partly"
        return Verdict(question, answer, f"{rose[0].words} {apart}", good=False if kept_risen else None)
    if chance > OVERFIT_BLIND:
        few = f"with so few, chance alone can set them {_points(chance)} points apart, so this tells little"
        return Verdict(question, "unclear", f"The state kept gets {both} right; {few}.")
    # An earlier stage that overfitted has cost its time alone: the next one started from what that stage kept. The
    # answer is about the model that came of it, so that stage is told and does not change the answer.
    words = " ".join([apart, *(turn.words for turn in (*last, *earlier))])
    few_states = any(turn.kind == "few" for turn in last)
    return Verdict(question, "unclear" if few_states else "no", words, good=None if few_states else True)


@dataclass(frozen=True)
class _StageTurn:
    """How a stage's validation loss turned (see `trends.Turn`), in words, and whether the state kept has risen, too."""

    kind: str
    words: str
    keeps_rise: bool


def _turns(history: Sequence[Record]) -> list[_StageTurn]:
    """Of each stage that was trained."""
    attempts = [_scored(attempts[-1]) for attempts in stage_attempts(history)]
    trained = [attempt for attempt in attempts if len(epoch_records(attempt)) > 1]
    return [
        _stage_turn(attempt, after=len(trained) - 1 - i, alone=len(trained) == 1) for i, attempt in enumerate(trained)
    ]


def _scored(attempt: Sequence[Record]) -> list[Record]:
    return [r for r in attempt if all(math.isfinite(figure(r, split, "loss")) for split in ("train", "val"))]


def _stage_turn(attempt: Sequence[Record], *, after: int, alone: bool) -> _StageTurn:
    """after: how many stages follow."""
    states = epoch_records(attempt)
    turn = turn_of(_losses(states, "val"), _losses(states, "train"))
    lowest, kept = states[turn.best], kept_record(attempt)
    assert kept is not None
    name, loss = lowest.get("stage", ""), figure(kept, "val", "loss")
    epoch, kept_epoch = (int(r.get("epoch", 0)) for r in (lowest, kept))
    mixed = is_mixture(kept) and kept["event"].get("alpha", 0.5) < 1
    if is_mixture(kept):
        kept_epoch = int(kept["event"].get("epoch", kept_epoch))
    if turn.kind == "none":
        where = "The" if alone else f"In stage {name!r} the"
        return _StageTurn(turn.kind, f"{where} validation loss did not turn upwards.", False)
    if turn.kind == "overfit":
        of = "the next stage started from" if after else "the state kept is"
        then = f"{of} {'a mixture with a later one' if mixed else 'a later one'}, with a validation loss of"
        then = f"{then} {loss:.3f}"
        if kept_epoch <= epoch:
            then = f"{of} {'the state before that' if after else 'from before that'}"
        words = f"In stage {name!r} the validation loss rose by {turn.rise:.3f} after epoch {epoch} while the training "
        risen = kept_epoch > epoch and is_rise(loss - figure(lowest, "val", "loss"), figure(lowest, "val", "loss"))
        return _StageTurn(turn.kind, f"{words}loss went on falling; {then}.", risen)
    ends = {
        "both": "and the training loss rose with it",
        "jitter": "by no more than it jitters",
        "few": "while the training loss went on falling: too few to judge",
    }
    span = f"the last {turn.states} epochs" if turn.states > 1 else "the last epoch"
    words = f"In {span} of stage {name!r} the validation loss rose by {turn.rise:.3f} above its lowest"
    return _StageTurn(turn.kind, f"{words}, {ends[turn.kind]}.", False)


def evenly_good(scored: Mapping[str, Any], split: str = "test") -> Verdict:
    """Whether the recalls of the classes differ by more than chance would make them."""
    question = "Is it evenly good over the classes?"
    rows = [row for row in scored.get("per_class", []) if row["n"] > 0]
    if len(rows) < 2:
        return Verdict(question, "unclear", "Fewer than two classes have been scored.")
    n = np.array([row["n"] for row in rows])
    wrong = n - np.rint([row["recall"] * row["n"] for row in rows]).astype(np.int64)
    worst, best = min(rows, key=lambda r: r["recall"]), max(rows, key=lambda r: r["recall"])
    spread = (
        f"recall runs from {_points(worst['recall'])} % ({worst['name']}, {worst['n']} pictures) "
        f"to {_points(best['recall'])} % ({best['name']})"
    )
    chance = _chance_of_spread(wrong, n)
    overall = float(1 - wrong.sum() / n.sum())
    if chance < UNEVEN_P and overall - worst["recall"] >= UNEVEN_GAP:
        weak = sorted(rows, key=lambda r: r["recall"])[: 3 if len(rows) > 5 else 1]
        names = ", ".join(
            f"{r['name']} ({_points(r['recall_ci95'][0])} to {_points(r['recall_ci95'][1])} %)" for r in weak
        )
        return Verdict(
            question,
            "no",
            f"On the {split} split {spread}, a spread that chance gives less than once in 100 cases. Weakest: {names}.",
            good=False,
        )
    few = float(n.mean()) < EVEN_PICTURES
    return Verdict(
        question,
        "unclear" if few else "yes",
        f"On the {split} split {spread}; with {n.mean():.0f} pictures per class "
        + ("that says little either way." if few else "no more than chance or a small difference explains."),
        good=None if few else True,
    )


def _chance_of_spread(wrong: NDArray[np.int64], n: NDArray[np.int64]) -> float:
    """How often the same number of mistakes, dealt to the pictures at random, spreads as unevenly over the classes.

    A permutation test of equal recalls: right also where a class has few pictures or few mistakes, where the
    chi-square table is not. Same numbers, same answer: the draws are seeded.
    """
    total = int(wrong.sum())
    if total == 0 or total == n.sum():
        return 1.0
    expected = n * (total / n.sum())
    draws = np.random.default_rng(0).multivariate_hypergeometric(n, total, size=UNEVEN_DRAWS, method="marginals")
    seen = float(np.sum((wrong - expected) ** 2 / expected))
    spread = np.sum((draws - expected) ** 2 / expected, axis=1)
    return float((np.sum(spread >= seen - 1e-9) + 1) / (UNEVEN_DRAWS + 1))
