"""A table of a model, layer by layer: output shapes, what is trained, frozen and counted, and the freeze line in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from .backbones import backbone_features, create_backbone
from .classifier import Classifier
from .errors import ModelError
from .freezing import count_statistics, set_freeze_line
from .heads import create_head
from .recipe import HeadSpec
from .tracing import Trace, trace

_COLUMNS = ("layer", "type", "output", "parameters", "trained", "frozen", "statistics")


@dataclass(frozen=True)
class Row:
    """One layer. output_shape is without the batch; statistics are numbers in running means and variances."""

    name: str
    type: str
    output_shape: tuple[int, ...] | None
    parameters: int
    trainable: int
    frozen: int
    statistics: int


@dataclass(frozen=True)
class Summary:
    """The rows in order of execution, and what they add up to.

    line: the number of rows in front of the freeze line; None where it was never set.
    """

    title: str
    rows: tuple[Row, ...]
    line: int | None
    line_label: str

    @property
    def parameters(self) -> int:
        """All parameters, trained or not."""
        return sum(row.parameters for row in self.rows)

    @property
    def trainable(self) -> int:
        """Parameters behind the freeze line that get gradients."""
        return sum(row.trainable for row in self.rows)

    @property
    def frozen(self) -> int:
        """Parameters that get none."""
        return sum(row.frozen for row in self.rows)

    @property
    def statistics(self) -> int:
        """Numbers in running means and variances: no parameters, and counted apart."""
        return sum(row.statistics for row in self.rows)

    def text(self) -> str:
        """The table for a terminal, the freeze line drawn in."""
        cells = [_cells(row) for row in self.rows]
        total = ("total", "", "", *(f"{n:,}" for n in (self.parameters, self.trainable, self.frozen, self.statistics)))
        widths = [max(len(line[i]) for line in (_COLUMNS, *cells, total)) for i in range(len(_COLUMNS))]
        lines = [_line(line, widths) for line in cells]
        rule = "-" * len(_line(_COLUMNS, widths))
        if self.line is not None:
            mark = f"==== freeze line: {self.line_label} "
            lines.insert(self.line, mark + "=" * max(4, len(rule) - len(mark)))
        return "\n".join([self.title, rule, _line(_COLUMNS, widths), rule, *lines, rule, _line(total, widths)])


def summary(
    what: Classifier | str | Path,
    *,
    head: HeadSpec | None = None,
    num_classes: int | None = None,
    freeze_line: str | None = None,
    batchnorm: str = "fixed",
    image_size: int | None = None,
) -> Summary:
    """Tabulate a classifier, a run folder, or a backbone by its timm name. No weights are fetched.

    Args:
        what: a model as it is; a run folder; or a timm name, which is built without weights.
        head: for a name: its pooling decides what of the network there is (`avg` leaves out VGG's fully connected
            layers), and with `num_classes` the head is put on; without, the table is of the backbone alone.
        freeze_line, batchnorm: as `set_freeze_line` takes them; None draws the line where it is.
        image_size: for a name: the side of the input in pixels.
    Raises:
        ModelError: an unknown name, line or block.
        CheckpointError: the run folder holds no model that can be read.
    """
    if isinstance(what, Classifier):
        model = what
    elif Path(what).is_dir():
        from .checkpoint import load

        model = load(what)
    else:
        model = _from_name(str(what), head or HeadSpec(), num_classes, image_size)
    if freeze_line is not None:
        if num_classes is None and model.backbone_is_whole:
            pass
        set_freeze_line(model, freeze_line, batchnorm=batchnorm)
    return make_summary(model)


def _from_name(name: str, head: HeadSpec, num_classes: int | None, image_size: int | None) -> Classifier:
    def build() -> Classifier:
        net, spec = create_backbone(
            name, weights="none", pool=head.pool, features_from=head.features_from, image_size=image_size
        )
        pool = "avg" if head.features_from and head.pool == "backbone" else head.pool
        model = Classifier(net, nn.Identity(), spec, (), pool=pool, backbone_name=name)
        if num_classes is not None:
            model.head = create_head(head, model.num_features, num_classes)
        return model

    try:
        with torch.device("meta"):  # shapes are all that is needed, so no weights are drawn
            return build()
    except (RuntimeError, NotImplementedError):
        return build()


def make_summary(model: Classifier) -> Summary:
    """Tabulate a classifier as it is."""
    spec, line = model.spec, model.freeze_line
    shape = (1, 3, spec.image_size, spec.image_size)
    seen = trace(model.backbone, lambda net, x: backbone_features(net, x, model.pool), shape)
    rows = _rows(model.backbone, seen)
    front = sum(row.trainable == 0 for row in rows) if line else None
    raise NotImplementedError
