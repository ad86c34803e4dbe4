"""What each change of an augmentation costs a trained model: accuracy on pictures changed by it, against plain ones.

A change that the labels do not survive (a mirrored digit, a dog upside down) teaches the network wrong things. A model
that never saw it does badly on it for another reason, too: it is a sign to look at, not a proof.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .classifier import Classifier
from .dataset import ImageTable
from .errors import DataError
from .evaluation import predict_logits
from .metrics import paired_difference
from .once import Advance
from .pixels import Pixels
from .recipe import AugmentSpec
from .runtime import Runtime, make_runtime

HARM_P = 0.01  # several changes are looked at, so each needs more than one chance in twenty
_OF_OTHERS = ("crop_ratio", "auto_ops", "auto_magnitude")  # settings of another change, none by themselves
_CHANCES = ("hflip", "vflip", "erasing")


def single_changes(augment: AugmentSpec) -> dict[str, AugmentSpec]:
    """Each change that is switched on, alone; those that happen by chance happen always."""
    idle = AugmentSpec()
    found = {}
    for name in augment.to_dict():
        value = getattr(augment, name)
        if name not in _OF_OTHERS and value != getattr(idle, name):
            settings: dict[str, Any] = {other: getattr(augment, other) for other in _OF_OTHERS}
            settings[name] = 1.0 if name in _CHANCES else value
            found[name] = replace(idle, **settings)
    return found


def transform_costs(
    model: Classifier,
    table: ImageTable,
    augment: AugmentSpec,
    *,
    seed: int = 0,
    runtime: Runtime | None = None,
    advance: Advance | None = None,
) -> list[dict[str, Any]]:
    """How the model scores on the pictures changed in one way at a time.

    Args:
        augment: the changes to try, each alone and drawn once per picture.
    Returns:
        One row per change: `change`, `setting`, `accuracy`, `plain` (accuracy on the plain pictures), `lost` and
        `won` (pictures that the change alone gets wrong, or right), and `harms`: fewer are right than chance explains.
    Raises:
        DataError: no picture, or an augmentation that changes nothing.
    """
    changes = single_changes(augment)
    if not changes or not len(table):
        raise DataError("There is nothing to compare: the augmentation changes nothing, or there is no picture.")
    runtime = runtime or make_runtime(precision="fp32")

    def right(spec: AugmentSpec, view: int) -> Any:
        pixels = Pixels(table, model.spec, augment=spec, seed=seed, workers=runtime.workers, cache_bytes=0)
        logits = predict_logits(model, pixels, runtime=runtime, advance=advance, view=view)
        return logits.argmax(1).numpy() == table.labels

    plain = right(AugmentSpec(), 0)
    return [_row(name, augment, plain, right(spec, 1)) for name, spec in changes.items()]


def _row(name: str, augment: AugmentSpec, plain: Any, changed: Any) -> dict[str, Any]:
    test: Mapping[str, float] = paired_difference(changed, plain)
    return {
        "change": name,
        "setting": "always" if name in _CHANCES else augment.to_dict()[name],
        "accuracy": float(changed.mean()),
        "plain": float(plain.mean()),
        "lost": int(test["b_only"]),
        "won": int(test["a_only"]),
        "harms": test["difference"] < 0 and test["p"] < HARM_P,
    }
