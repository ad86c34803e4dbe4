"""A table of a model, layer by layer: output shapes, what is trained, frozen and counted, and the freeze line in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from .backbones import create_backbone, within
from .classifier import Classifier, as_classifier
from .fields import check_number
from .freezing import count_statistics, layers_in_order, place_line
from .heads import create_head
from .recipe import HeadSpec, load_recipe
from .tracing import Call, Trace, trace

_COLUMNS = ("layer", "type", "output", "parameters", "trained", "frozen", "statistics")


@dataclass(frozen=True)
class Row:
    """One layer. output_shape is without the batch; statistics are numbers in running means and variances."""

    name: str
    type: str
    output_shape: tuple[int, ...] | None
    parameters: int = 0
    trainable: int = 0
    frozen: int = 0
    statistics: int = 0
    part: str = "backbone"


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
    Returns:
        The table: `text()` is how it is printed, `rows` are its layers.
    Raises:
        ModelError: an unknown name, line or block.
        CheckpointError: the run folder holds no model that can be read.
    """
    if isinstance(what, nn.Module):
        model = as_classifier(what)
    elif Path(what).is_dir():
        from .checkpoint import load

        model = load(what)
        if freeze_line is None:
            freeze_line, batchnorm = _last_line(Path(what))
    else:
        model = _from_name(str(what), head or HeadSpec(), num_classes, image_size)
        freeze_line = freeze_line or "all"
    if freeze_line is None:
        return make_summary(model)
    line, kept, flags = model.freeze_line, model.kept_in_eval, [p.requires_grad for p in model.parameters()]
    try:
        place_line(model, freeze_line, batchnorm=batchnorm)
        return make_summary(model)
    finally:  # a table moves nothing
        model.freeze_line = line
        model.plan_modes(kept)
        for parameter, flag in zip(model.parameters(), flags, strict=True):
            parameter.requires_grad_(flag)


def _last_line(run: Path) -> tuple[str, str]:
    """Where the run's last stage had its freeze line, and its BatchNorm mode; everything is trainable without one."""
    if not (run / "recipe.json").is_file():
        return "all", "fixed"
    stage = load_recipe(run / "recipe.json").stages[-1]
    return stage.freeze_line, stage.batchnorm


def _from_name(name: str, head: HeadSpec, num_classes: int | None, image_size: int | None) -> Classifier:
    def build() -> Classifier:
        net, spec = create_backbone(
            name, weights="none", pool=head.pool, features_from=head.features_from, image_size=image_size
        )
        pool = "avg" if head.features_from and head.pool == "backbone" else head.pool
        model = Classifier(net, nn.Identity(), spec, (), pool=pool, backbone_name=name)
        if num_classes is not None:
            check_number("summary", "num_classes", num_classes, 2, 10**7, whole=True)
            model.head = create_head(head, model.num_features, num_classes)
        return model

    try:
        with torch.device("meta"):  # shapes are all that is needed, so no weights are drawn
            return build()
    except (RuntimeError, NotImplementedError):
        return build()


def make_summary(model: Classifier) -> Summary:
    """Tabulate a classifier as it is."""
    size = model.spec.image_size
    through_head = trace(model.head, lambda head, x: head(x), (1, model.num_features))
    backbone = [Row("input", "pixels", (3, size, size)), *_rows(model.backbone, model.backbone_trace())]
    if model.pool != "backbone":
        backbone.append(Row("pool", model.pool, (model.num_features,)))
    head = [replace(row, part="head") for row in _rows(model.head, through_head)]
    used = sum(row.parameters for row in (*backbone, *head))
    unused = sum(p.numel() for p in model.parameters()) - used
    if unused:
        backbone.append(Row("(never used)", "", None, unused, 0, unused))
    line = model.freeze_line
    front = None
    if line is not None:
        names = [row.name for row in backbone]
        front = names.index(line.trained[0]) if line.trained else len(backbone)
    return Summary(
        title=f"{model.backbone_name or type(model.backbone).__name__} at {size} x {size}",
        rows=(*backbone, *head),
        line=front,
        line_label="" if line is None else f"{line.where} (BatchNorm {line.batchnorm})",
    )


def _rows(net: nn.Module, seen: Trace) -> list[Row]:
    """Layers with parameters or statistics, and what else changes the shape (pooling), in order of execution."""
    calls, modules = seen.first_calls(), dict(net.named_modules())
    parameters = dict(net.named_parameters(remove_duplicate=False))
    counted: set[int] = set()  # one under two names counts where it is used first
    found: list[tuple[int, Row]] = []
    layers = layers_in_order(net, seen)
    for layer in layers:
        own = [p for p in (parameters[n] for n in layer.parameters) if id(p) not in counted]
        counted |= {id(p) for p in own}
        count, trained = sum(p.numel() for p in own), sum(p.numel() for p in own if p.requires_grad)
        module = modules.get(layer.name)
        kind = "parameter" if module is None else type(module).__name__
        shape = _shape(calls[layer.name]) if layer.name in calls else None
        statistics = 0 if module is None else count_statistics(module)
        found.append((layer.start, Row(layer.name, kind, shape, count, trained, count - trained, statistics)))
    shown = {layer.name for layer in layers if layer.name in modules}
    for name, call in sorted(calls.items(), key=lambda item: item[0].count(".")):
        module = modules[name]
        if next(module.parameters(), None) is not None or within(name, shown):
            continue
        statistics = count_statistics(module)
        if statistics or call.input_shape != call.output_shape:
            shown.add(name)
            found.append((call.start, Row(name, type(module).__name__, _shape(call), statistics=statistics)))
    return [row for _, row in sorted(found, key=lambda item: item[0])]


def _shape(call: Call) -> tuple[int, ...] | None:
    return None if call.output_shape is None else call.output_shape[1:]


def _cells(row: Row) -> tuple[str, ...]:
    shape = "" if row.output_shape is None else " x ".join(map(str, row.output_shape))
    name = f"[head] {row.name}" if row.part == "head" else row.name
    numbers = (row.parameters, row.trainable, row.frozen, row.statistics)
    return (name, row.type, shape, *(f"{n:,}" if n else "" for n in numbers))


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    parts = [c.ljust(w) if i < 3 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
    return "  ".join(parts).rstrip()
