"""What a report says in words: each sentence on made histories where it is true, where it is false, and on noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from headstart.metrics import evaluate_probs
from headstart.schedule import learning_rate
from headstart.trends import fell_until
from headstart.verdicts import (
    Verdict,
    evenly_good,
    generalising,
    kept_record,
    overfitting,
    stage_attempts,
    still_learning,
    verdicts,
)


def made_history(
    val: Sequence[float],
    train: Sequence[float] | None = None,
    *,
    val_accuracy: float = 0.9,
    train_accuracy: float = 0.92,
    n: tuple[int, int] = (400, 100),
    stage: str = "fine-tune",
    index: int = 0,
) -> list[dict[str, Any]]:
    """One stage with these losses; the state with the lowest validation loss is marked as the best."""
    train = [0.9 * v for v in val] if train is None else train
    best, records = float("inf"), []
    for epoch, (v, t) in enumerate(zip(val, train, strict=True)):
        records.append(
            {
                "stage": stage, "stage_index": index, "epoch": epoch, "best": v < best,
                "train": {"loss": t, "accuracy": train_accuracy, "top5": None, "n": n[0]},
                "val": {"loss": v, "accuracy": val_accuracy, "top5": None, "n": n[1]},
                "event": None,
            }
        )  # fmt: skip
        best = min(best, v)
    return records


def scored(recalls: Sequence[float], n: int | Sequence[int] = 40) -> dict[str, Any]:
    """Figures of a split with these recalls; mistakes go to the next class."""
    sizes = [n] * len(recalls) if isinstance(n, int) else list(n)
    labels, preds = [], []
    for c, (recall, size) in enumerate(zip(recalls, sizes, strict=True)):
        hits = round(recall * size)
        labels += [c] * size
        preds += [c] * hits + [(c + 1) % len(recalls)] * (size - hits)
    probs = np.eye(len(recalls))[preds]
    return evaluate_probs(probs, np.array(labels), [f"class {c}" for c in range(len(recalls))])


FALLING = np.exp(-np.arange(13) / 8)
FLAT = np.full(13, 0.5)


# ---- still learning --------------------------------------------------------------------------------------------


def test_still_learning_while_the_loss_falls() -> None:
    verdict = still_learning(made_history(FALLING))
    assert verdict.answer == "yes"
    assert "more epochs would probably help" in verdict.sentence
    assert "last 4 epochs of stage 'fine-tune'" in verdict.sentence


@pytest.mark.parametrize(
    "losses",
    [
        FLAT,
        0.5 + np.exp(-np.arange(13)),  # has levelled off
        0.5 + 0.03 * (np.arange(13) - 4) ** 2 / 16,  # past its best
        0.5 - 0.0005 * np.arange(13),  # falls, by next to nothing
        0.01 - 0.0006 * np.arange(13),  # falls by much of nothing
        [0.5, 0.44, 0.52, 0.46, 0.55, 0.43, 0.5, 0.41, 0.52, 0.44, 0.5, 0.49, 0.43],  # jitters
    ],
)
def test_not_still_learning(losses: Sequence[float]) -> None:
    verdict = still_learning(made_history(losses))
    assert verdict.answer == "no"
    assert "no clear fall" in verdict.sentence


def test_a_fall_that_jitters_and_ends_at_its_lowest_is_neither_yes_nor_no() -> None:
    losses = [*(FLAT[:8] + 0.4), 0.77, 0.85, 0.70, 0.80, 0.69]
    verdict = still_learning(made_history(losses))
    assert verdict.answer == "unclear"
    assert "0.770 to 0.690" in verdict.sentence
    assert still_learning(made_history([*losses[:-1], 0.71])).answer == "no"  # the lowest was before


def test_a_way_back_from_overfitting_is_not_learning() -> None:
    losses = [0.7, 0.3, 0.15, 0.16, 0.2, 0.22, 0.21, 0.205, 0.195, 0.19, 0.185, 0.18]
    verdict = still_learning(made_history(losses))
    assert verdict.answer == "no"
    assert "no clear fall below what it was before" in verdict.sentence
    assert still_learning(made_history([*losses[:-4], 0.16, 0.15, 0.14, 0.13])).answer == "yes"


def test_still_learning_needs_enough_scores() -> None:
    assert still_learning([]).answer == "unclear"
    assert still_learning(made_history([0.9, 0.6, 0.4])).answer == "unclear"
    broken = made_history(FALLING)
    broken[-1]["val"]["loss"] = None  # was not finite
    assert still_learning(broken).answer == "unclear"


def test_a_gap_in_the_scores_is_not_called_too_few() -> None:
    broken = made_history(FALLING)
    broken[-2]["val"]["loss"] = None
    sentence = still_learning(broken).sentence
    assert "last 5 scores of the validation split some are missing or not finite" in sentence
    assert "3 scores of the validation split; a trend needs 4" in still_learning(made_history([0.9, 0.6, 0.4])).sentence


def cosine(epochs: int, warmup: float = 0.0, schedule: str = "cosine", steps: int = 10) -> np.ndarray:
    """The rates that a history of so many epochs holds, of a highest rate of 0.01."""
    of = [max(0, steps * epoch - 1) for epoch in range(epochs + 1)]
    how: Any = {"steps": steps * epochs, "lr": 0.01, "schedule": schedule, "warmup": warmup}
    return np.array([learning_rate(step, **how) for step in of])


def way(rates: np.ndarray) -> np.ndarray:
    """Epochs at the highest rate gone until each state: what a smooth curve goes by."""
    return np.concatenate([[0.0], np.cumsum((rates[1:] + rates[:-1]) / 2)]) / rates.max()


def history_at(rates: np.ndarray, losses: Sequence[float]) -> list[dict[str, Any]]:
    return [{**r, "lr": float(lr)} for r, lr in zip(made_history(losses), rates, strict=True)]


@pytest.mark.parametrize(
    "rates", [cosine(8), cosine(40), cosine(150), cosine(30, 0.1), cosine(10, schedule="one-cycle")]
)
def test_a_curve_that_only_the_schedule_has_flattened_is_not_called_done(rates: np.ndarray) -> None:
    epochs = len(rates) - 1
    falling = still_learning(history_at(rates, 0.4 + 0.7 * np.exp(-2 * way(rates) / epochs)))
    assert (falling.answer, falling.good) == ("unclear", None)
    assert "then the rate ran down" in falling.sentence
    assert "compare with twice the epochs" in falling.sentence
    # Flat already, or past its best, while the rate was high.
    assert still_learning(history_at(rates, 0.5 - 0.001 * way(rates) / epochs)).answer == "no"
    turned = 0.4 + 0.7 * np.exp(-5 * way(rates) / epochs)
    turned[: epochs // 2] -= 0.6
    assert still_learning(history_at(rates, turned)).answer == "no"


@pytest.mark.parametrize(
    ("falling", "flat"),
    [
        ([0.40, 0.35, 0.32, 0.30, 0.295, 0.294], [0.40, 0.399, 0.398, 0.3975, 0.397, 0.3969]),  # the default's length
        ([0.50, 0.44, 0.428, 0.4275], [0.50, 0.495, 0.492, 0.491]),  # that of `quick`: three states at a high rate
    ],
)
def test_short_stages_are_judged_by_what_they_did_at_a_high_rate(falling: list[float], flat: list[float]) -> None:
    rates = cosine(len(flat) - 1, 0.2)
    verdict = still_learning(history_at(rates, falling))
    assert verdict.answer == "unclear"
    assert "then the rate ran down" in verdict.sentence
    assert still_learning(history_at(rates, flat)).answer == "no"
    assert still_learning(history_at(rates, [0.2, *falling[1:]])).answer == "no"  # nothing below what it began with


def test_a_plateau_at_a_high_rate_is_done_whatever_came_before() -> None:
    rates = cosine(30)
    verdict = still_learning(history_at(rates, 0.4 + 0.7 * np.exp(-way(rates))))
    assert (verdict.answer, verdict.good) == ("no", True)


def test_a_flat_curve_whose_rate_stayed_or_is_not_known_is_done() -> None:
    losses = 0.4 + 0.7 * np.exp(-2 * way(cosine(30)) / 30)
    assert still_learning(made_history(losses)).answer == "no"
    assert still_learning(history_at(np.full(31, 0.01), losses)).answer == "no"
    assert still_learning(history_at(cosine(30), losses)).answer == "unclear"


def test_flat_but_noisy_losses_are_rarely_laid_on_the_schedule() -> None:
    rng = np.random.default_rng(0)
    told = [still_learning(history_at(cosine(30), rng.normal(0.5, 0.03, 31))).sentence for _ in range(300)]
    assert sum("ran down" in sentence for sentence in told) / 300 < 0.03


def test_only_the_last_attempt_of_the_last_stage_counts() -> None:
    history = made_history(FALLING, stage="head") + made_history(FLAT, index=1)
    assert still_learning(history).answer == "no"
    collapsed = made_history([0.3, 2.0], index=1)
    history = made_history(FLAT, stage="head") + collapsed + made_history(FALLING, index=1)
    assert [len(attempts) for attempts in stage_attempts(history)] == [1, 2]
    assert still_learning(history).answer == "yes"


def test_joined_histories_of_single_fits_are_told_apart_by_their_stages_names() -> None:
    history = made_history(FALLING, stage="head") + made_history(FLAT)
    history = [{k: v for k, v in record.items() if k != "stage_index"} for record in history]
    assert [len(attempts) for attempts in stage_attempts(history)] == [1, 1]


def test_flat_but_noisy_losses_rarely_pass_for_learning() -> None:
    rng = np.random.default_rng(0)
    answers = [still_learning(made_history(rng.normal(0.5, 0.03, 13))).answer for _ in range(500)]
    assert answers.count("yes") / 500 < 0.07  # a test at 5 %


def test_a_mixture_made_at_the_end_is_no_epoch_of_the_trend() -> None:
    history = made_history(FALLING)
    mixed = {**history[-1], "epoch": 13, "best": True, "event": {"kind": "wise", "message": "", "alpha": 0.5}}
    mixed["val"] = {**mixed["val"], "loss": 5.0}
    assert still_learning([*history, mixed]) == still_learning(history)
    assert still_learning([*history, {**mixed, "event": None}]) != still_learning(history)


# ---- overfitting -----------------------------------------------------------------------------------------------

RISING = np.concatenate([np.linspace(1.0, 0.5, 6), np.linspace(0.55, 0.9, 7)])


def test_overfitting_when_validation_turns_while_training_goes_on() -> None:
    verdict = overfitting(made_history(RISING, train=FALLING))
    assert verdict.answer == "partly"
    assert "after epoch 5" in verdict.sentence
    assert "the state kept is from before that" in verdict.sentence


def test_level_noise_in_a_short_stage_is_no_fall() -> None:
    rng = np.random.default_rng(0)
    said = [
        fell_until(0.5 * (1 + 0.1 * rng.standard_normal(4)), np.array([1e-4, 1e-4, 5e-5, 1e-6])) for _ in range(400)
    ]
    assert sum(one is not None for one in said) < 0.2 * len(said)  # both falls by chance, one time in six
    assert fell_until(np.array([0.5, 0.4, 0.35, 0.34]), np.array([1e-4, 1e-4, 5e-5, 1e-6])) == 2


def test_an_earlier_stage_that_overfitted_is_told_and_does_not_change_the_answer() -> None:
    history = made_history(RISING, train=FALLING, stage="head")
    history += made_history(0.5 * FALLING, train=0.4 * FALLING, index=1)
    verdict = overfitting(history)
    assert (verdict.answer, verdict.good) == ("no", True)
    assert "In stage 'fine-tune' the validation loss did not turn upwards." in verdict.sentence
    assert "In stage 'head' the validation loss rose" in verdict.sentence
    assert "the next stage started from the state before that." in verdict.sentence
    history[len(RISING) - 1]["best"] = True  # as with `--select last`
    assert "the next stage started from a later one, with a validation loss of 0.900." in overfitting(history).sentence


def test_a_state_kept_from_after_the_rise_is_overfitted() -> None:
    history = made_history(RISING, train=FALLING)
    history[-1]["best"] = True  # as with `--select last`
    verdict = overfitting(history)
    assert (verdict.answer, verdict.good) == ("yes", False)
    assert "the state kept is a later one, with a validation loss of 0.900." in verdict.sentence
    event = {"kind": "wise", "message": "", "alpha": 0.5, "epoch": 12}
    mixed = {**made_history([0.45])[0], "epoch": 13, "event": event}
    verdict = overfitting([*history, mixed])
    assert verdict.answer == "partly"  # what was mixed has not risen
    assert "the state kept is a mixture with a later one, with a validation loss of 0.450." in verdict.sentence


@pytest.mark.parametrize(
    ("val", "words"),
    [
        (
            [0.50, 0.42, 0.35, 0.30, 0.55, 0.80],
            "In the last 2 epochs of stage 'fine-tune' the validation loss rose by 0.5",
        ),
        (
            [0.50, 0.30, 0.60],
            "In the last epoch of stage 'fine-tune' the validation loss rose by 0.300 above its lowest",
        ),
        ([*(0.5 - 0.02 * np.arange(10)), 0.31, *[0.312] * 9, 0.40], "In the last epoch"),
    ],
)
def test_a_rise_of_too_few_epochs_is_told_and_leaves_the_answer_open(val: list[float], words: str) -> None:
    verdict = overfitting(made_history(val, train=np.linspace(0.5, 0.1, len(val))))
    assert (verdict.answer, verdict.good) == ("unclear", None)
    assert words in verdict.sentence
    assert "too few to judge" in verdict.sentence
    assert "did not turn upwards" not in verdict.sentence


def test_a_rise_that_is_no_overfitting_is_told() -> None:
    told = overfitting(made_history(RISING, train=RISING)).sentence
    assert "the validation loss rose by 0.312 above its lowest, and the training loss rose with it." in told
    jittering = [0.5, 0.44, 0.52, 0.4, 0.55, 0.43, 0.5, 0.41, 0.52, 0.44, 0.5, 0.49, 0.46]
    told = overfitting(made_history(jittering, train=FALLING)).sentence
    assert "by no more than it jitters." in told
    level = overfitting(made_history(FALLING)).sentence
    assert level.endswith("The validation loss did not turn upwards.")
    gap = made_history(FALLING)
    gap[3]["val"]["loss"] = None  # was not finite: the others are judged
    assert overfitting(gap).sentence == level


def test_overfitting_within_a_short_stage() -> None:
    history = made_history([0.30, 0.27, 0.26, 0.28, 0.31, 0.35, 0.38], train=np.linspace(0.25, 0.01, 7))
    assert overfitting(history).answer == "partly"


def test_both_losses_rising_is_not_called_overfitting() -> None:
    assert overfitting(made_history(RISING, train=RISING)).answer == "no"


def test_a_small_rise_is_not_called_overfitting() -> None:
    small = np.concatenate([np.linspace(1.0, 0.5, 6), np.linspace(0.5, 0.53, 7)])
    assert overfitting(made_history(small, train=FALLING)).answer == "no"


def test_noise_around_a_level_rarely_passes_for_overfitting() -> None:
    rng = np.random.default_rng(0)
    for states in (7, 13, 40):
        train = 0.5 * np.exp(-np.arange(states) / 8)
        answers = [overfitting(made_history(rng.normal(0.3, 0.03, states), train)).answer for _ in range(300)]
        assert answers.count("partly") / 300 < 0.1
        assert answers.count("unclear") / 300 < 0.04
        assert answers.count("yes") == 0


def test_training_pictures_known_better_is_overfitting() -> None:
    verdict = overfitting(made_history(FALLING, train_accuracy=1.0, val_accuracy=0.8))
    assert (verdict.answer, verdict.good) == ("yes", False)
    assert "20.0 points apart" in verdict.sentence


@pytest.mark.parametrize(
    ("train_accuracy", "val_accuracy", "n"),
    [
        (0.96, 0.92, (4000, 2000)),  # certain, but small
        (1.0, 0.9, (20, 20)),  # large, but 2 of 20 pictures
        (0.85, 0.9, (400, 100)),  # training below validation: both are scored on plain pictures, it is chance
    ],
)
def test_a_gap_within_the_thresholds_is_no_overfitting(train_accuracy: float, val_accuracy: float, n: Any) -> None:
    history = made_history(FALLING, train_accuracy=train_accuracy, val_accuracy=val_accuracy, n=n)
    assert overfitting(history).answer == "no"


def test_overfitting_is_judged_on_the_state_that_was_kept() -> None:
    history = made_history(RISING, train=FALLING)
    for record in history[6:]:
        record["train"]["accuracy"], record["val"]["accuracy"] = 1.0, 0.5
    verdict = overfitting(history)
    assert verdict.answer == "partly"
    assert "92.0 % of the training and 90.0 %" in verdict.sentence


def test_overfitting_without_scores_is_unclear() -> None:
    assert overfitting([]).answer == "unclear"
    history = made_history([0.5, 0.4])
    for record in history:
        record["train"] = None
    assert overfitting(history).answer == "unclear"


def test_the_kept_state_is_the_last_best_or_what_was_rolled_back_to() -> None:
    history = made_history([0.9, 0.5, 0.7])
    assert kept_record(history) is history[1]
    restored = {**made_history([0.5], index=1)[0], "best": False, "event": {"kind": "rollback", "message": "x"}}
    second = made_history([0.5, 0.4], index=1)
    assert kept_record([*history, *second, restored]) is restored
    unmarked = [{**record, "best": False} for record in history]
    assert kept_record(unmarked) is unmarked[1]
    assert kept_record([]) is None


# ---- generalising ----------------------------------------------------------------------------------------------


def test_generalising_when_test_beats_guessing_and_agrees_with_validation() -> None:
    verdict = generalising(scored([0.9, 0.9, 0.9]), scored([0.85, 0.9, 0.9]))
    assert (verdict.answer, verdict.good) == ("yes", True)
    assert "agrees with the validation split" in verdict.sentence


def test_no_better_than_the_largest_class_is_not_generalising() -> None:
    always_first = scored([1.0, 0.0], [90, 10])
    verdict = generalising(always_first, always_first)
    assert (verdict.answer, verdict.good) == ("no", False)
    assert "90.0 %" in verdict.sentence


def test_of_one_class_there_is_nothing_to_tell() -> None:
    verdict = generalising(scored([0.9, 0.9]), scored([1.0, 0.0], [30, 0]))
    assert (verdict.answer, verdict.good) == ("unclear", None)
    assert "one class alone (class 0): there is nothing to tell apart" in verdict.sentence
    assert "Of its 30 pictures 100.0 % are right" in verdict.sentence


@pytest.mark.parametrize(
    ("recalls", "sizes"),
    [
        ([1.0, 0.0], [6, 4]),  # a tie of ten pictures
        ([0.5, 0.5], [10, 10]),
        ([0.33, 0.33, 0.4], [3, 3, 5]),  # below it, of eleven
        ([0.96, 1.0], [970, 30]),  # of a rare class all are found
    ],
)
def test_what_does_not_show_guessing_is_unclear(recalls: list[float], sizes: list[int]) -> None:
    verdict = generalising({}, scored(recalls, sizes))
    assert (verdict.answer, verdict.good) == ("unclear", None)
    assert "not shown to be better than that" in verdict.sentence


@pytest.mark.parametrize(("recalls", "sizes"), [([0.5, 0.5], 1000), ([0.1, 0.1, 0.1], 30), ([1.0, 0.0], [30, 30])])
def test_as_good_as_guessing_by_many_pictures_is_a_no(recalls: list[float], sizes: Any) -> None:
    verdict = generalising({}, scored(recalls, sizes))
    assert (verdict.answer, verdict.good) == ("no", False)


def test_better_than_guessing_by_less_than_chance_is_unclear() -> None:
    small = scored([0.7, 0.6], [10, 10])
    assert generalising(small, small).answer == "unclear"
    large = scored([0.7, 0.6], [1000, 1000])
    assert generalising(large, large).answer == "yes"


def test_test_far_below_validation_is_said() -> None:
    verdict = generalising(scored([0.98, 0.98], 200), scored([0.75, 0.75], 200))
    assert (verdict.answer, verdict.good) == ("partly", False)
    assert "23.0 points below the validation split" in verdict.sentence
    few = generalising(scored([1.0, 0.9], 10), scored([0.8, 0.8], 15))  # the same gap, of few pictures
    assert few.answer == "yes"


def test_generalising_without_a_test_split_is_unclear() -> None:
    assert generalising(scored([0.9, 0.9]), {}).answer == "unclear"
    assert generalising({}, scored([0.9, 0.9])).answer == "yes"


# ---- evenly good -----------------------------------------------------------------------------------------------


def test_uneven_classes_are_named() -> None:
    verdict = evenly_good(scored([0.98, 0.95, 0.96, 0.55, 0.97]))
    assert (verdict.answer, verdict.good) == ("no", False)
    assert "Weakest: class 3 (39.8 to 69.3 %)" in verdict.sentence


def test_differences_of_chance_are_not_called_uneven() -> None:
    verdict = evenly_good(scored([0.9, 0.95, 0.875, 0.85, 0.925]))
    assert verdict.answer == "yes"
    assert "no more than chance" in verdict.sentence


def test_a_certain_but_small_difference_is_not_called_uneven() -> None:
    assert evenly_good(scored([0.96, 0.99, 0.99], 5000)).answer == "yes"


def test_few_pictures_cannot_show_evenness() -> None:
    assert evenly_good(scored([1.0, 0.75, 1.0], 4)).answer == "unclear"
    assert evenly_good({}).answer == "unclear"
    assert evenly_good(scored([1.0, 0.0], [30, 0])).answer == "unclear"


def test_all_right_is_even() -> None:
    assert evenly_good(scored([1.0, 1.0, 1.0])).answer == "yes"
    assert evenly_good(scored([0.0, 0.0, 0.0])).answer == "yes"


@pytest.mark.parametrize("classes", [3, 60])
def test_equally_good_classes_are_rarely_called_uneven(classes: int) -> None:
    rng = np.random.default_rng(0)
    answers = [evenly_good(scored(rng.binomial(20, 0.85, classes) / 20, 20)).answer for _ in range(60)]
    assert answers.count("no") / 60 < 0.06  # a test at 1 %


def test_always_the_same_four_questions() -> None:
    empty = verdicts([], {})
    assert [v.answer for v in empty] == ["unclear"] * 4
    full = verdicts(made_history(FALLING), {"val": scored([0.9, 0.9]), "test": scored([0.9, 0.9])})
    assert [v.question for v in full] == [v.question for v in empty]
    assert all(isinstance(v, Verdict) and v.sentence.endswith(".") for v in [*empty, *full])


def test_from_a_handful_of_pictures_overfitting_is_not_denied() -> None:
    verdict = overfitting(made_history([1.0, 0.9], train_accuracy=1.0, val_accuracy=0.75, n=(8, 4)))
    assert (verdict.answer, verdict.good) == ("unclear", None)
    assert "tells little" in verdict.sentence
