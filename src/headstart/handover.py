"""What a classifier takes over from an earlier one: its backbone alone, or its head too, class by class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .classifier import Classifier, checked_names, create_classifier
from .errors import ModelError, near_matches
from .recipe import HeadSpec


@dataclass(frozen=True)
class Handover:
    """Which classes an earlier model brought with it: kept in the new one, new there, or left out of it."""

    kept: tuple[str, ...]
    new: tuple[str, ...]
    left_out: tuple[str, ...]

    def describe(self) -> str:
        """One line for the terminal."""
        if not self.new and not self.left_out:
            return f"the head goes on with its {len(self.kept)} classes"
        parts = [f"the head keeps {len(self.kept)} classes"]
        if self.new:
            parts.append(f"new: {_listed(self.new)}")
        if self.left_out:
            parts.append(f"left out, since no picture is of them: {_listed(self.left_out)}")
        return "; ".join(parts)


def new_head(
    model: Classifier, class_names: Sequence[str], *, head: HeadSpec | nn.Module | None = None, seed: int = 0
) -> Classifier:
    """A classifier with a fresh head on the same backbone and preprocessing; nothing is frozen in it.

    The backbone is shared, not copied: use the old classifier no longer. Done twice it gives what it gives once.

    Args:
        head: as in `create_classifier`; None is one Linear on what the backbone was pooled to before.
        seed: of the head's first weights.
    Raises:
        ModelError: the head is pooled otherwise, or from another block, than the backbone was built for.
    """
    pool, block = _built_for(model)
    spec = HeadSpec(pool=pool, features_from=block) if head is None else head
    if isinstance(spec, HeadSpec):
        if (spec.pool, spec.features_from) != (pool, block):
            raise ModelError(
                f"The head takes pool {spec.pool!r} and features_from {spec.features_from!r}, but this backbone was"
                f" built for pool {pool!r} and features_from {block!r}. Give the head those, or create the backbone"
                " anew."
            )
        fitted: HeadSpec | nn.Module = replace(spec, pool=model.pool, features_from=None)
        made = create_classifier(model.backbone, class_names, head=fitted, data_spec=model.spec, seed=seed)
        made.head_spec = spec
    else:
        made = create_classifier(model.backbone, class_names, head=spec, data_spec=model.spec, pool=model.pool)
    made.backbone_name, made.backbone_args = model.backbone_name, dict(model.backbone_args)
    own = {id(p) for p in made.backbone.parameters()}
    in_head = (p for p in made.fixed if id(p) not in own)
    made.fixed = (*(p for p in model.fixed if id(p) in own), *in_head)  # the flags of now are those of the old line
    fixed = {id(p) for p in made.fixed}
    for parameter in made.backbone.parameters():
        parameter.requires_grad_(id(parameter) not in fixed and parameter.is_floating_point())
    made.train(made.training)  # what the old line kept in evaluation mode is so no more
    return made.to(next(model.parameters()).device)


def change_classes(model: Classifier, class_names: Sequence[str], *, seed: int = 0) -> tuple[Classifier, Handover]:
    """The same model for other classes: what it knows of a class goes with the class's name.

    Everything in front of the head's last layer stays. Of that layer a class that the model knows keeps its row, so
    that logits of known classes stay what they were; a new class gets a fresh row. Order does not matter. One sigmoid
    output becomes a softmax where there are more than two classes.

    Args:
        class_names: the classes of the model that is returned; it shares the backbone with `model`, and is `model`
            itself where they are the same.
        seed: of the new rows.
    Raises:
        ModelError: no class is known, or the head is a module of the user's own.
    """
    names = checked_names(class_names)
    kept = tuple(name for name in names if name in model.class_names)
    handover = Handover(
        kept, tuple(n for n in names if n not in kept), tuple(n for n in model.class_names if n not in names)
    )
    if not kept:
        close = "".join(near_matches(name, model.class_names, n=1) for name in names[:1])
        raise ModelError(
            f"None of these classes ({_listed(names)}) is one of the model's ({_listed(model.class_names)}).{close}"
            " There is no head to go on with: put a new one on the backbone (new_head, or --weights RUN)."
        )
    if names == model.class_names:
        return model, handover
    if model.head_spec is None:
        raise ModelError(
            "The head is a module of your own, whose last layer is not known. Change it yourself, and put it on with"
            " new_head(model, class_names, head=module)."
        )
    spec = model.head_spec
    spec = replace(spec, output="softmax") if len(names) != 2 else spec
    made = new_head(model, names, head=spec, seed=seed)
    state, fresh = model.head.state_dict(), made.head.state_dict()
    old, rows = _rows(state), _rows(fresh)
    for place, name in enumerate(names):
        if name in model.class_names:
            rows[place] = old[model.class_names.index(name)]
    # One sigmoid output is the second class's logit over the first's.
    rows = rows[1:] - rows[:1] if spec.output == "sigmoid" else rows
    last = {"classifier.weight": rows[:, :-1], "classifier.bias": rows[:, -1]}
    made.head.load_state_dict({name: last.get(name, state.get(name)) for name in fresh})
    return made, handover


def _built_for(model: Classifier) -> tuple[str, str | None]:
    """Pooling and earlier block that the backbone was created with."""
    if model.backbone_args:
        return model.backbone_args["pool"], model.backbone_args["features_from"]
    return model.pool, None


def _rows(head: dict[str, Tensor]) -> Tensor:
    """Weights and bias of the last layer, a row for each class; one sigmoid output is two rows, the first all zero."""
    rows = torch.cat([head["classifier.weight"], head["classifier.bias"][:, None]], dim=1)
    return torch.cat([torch.zeros_like(rows), rows]) if len(rows) == 1 else rows


def _listed(names: Sequence[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
