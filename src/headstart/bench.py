"""The bench a run stands on: the splits and the machine; several runs on one bench share what is equal between them.

Shared are the decoded pictures, what a frozen backbone makes of them, and a first stage that is the same to the last
bit: the head stage of `head`, `fine-tune` and any later line is computed once per seed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .augment import as_augment
from .averaging import restore, snapshot
from .classifier import Classifier
from .contract import tensors_digest
from .dataset import ImageTable, Splits
from .dataspec import DataSpec
from .errors import CheckpointError
from .evaluation import Evaluation, evaluate, predict_logits
from .features import Placement, StageData, make_source
from .files import to_json, write_atomic
from .findings import AuditResult
from .hashes import FileHashes
from .once import Advance, Aside
from .pixels import Augment, Pixels, is_augmented
from .pixelstore import PixelStore
from .recipe import AugmentSpec, Recipe, Stage
from .rowstore import built
from .run import check_run_path
from .run_record import is_run, is_torn
from .runtime import Runtime
from .stage_result import StageResult
from .store import Cache
from .terminal import ProgressBar, say
from .threads import map_threads

KEEP_BYTES = 2 << 30  # stored features kept for later runs; the oldest go first


@dataclass
class _KeptStage:
    """A finished stage: how it went, and the trained tensors' best state."""

    result: StageResult
    state: dict[str, Tensor]
    seconds: float


@dataclass
class Bench:
    """Splits and machine, and with `share` what one run leaves for the next.

    Nothing is shared that a difference in backbone, weights, preprocessing, line, views, seed or number format could
    change: everything kept is found again by a digest of all of them.
    """

    splits: Splits
    runtime: Runtime
    share: bool = False
    cache: bool = True
    progress: bool = False
    audit: AuditResult | None = None
    _stores: dict[DataSpec | None, PixelStore] = field(default_factory=dict)
    _pixels: dict[str, Pixels] = field(default_factory=dict)
    _sources: dict[str, tuple[StageData, float]] = field(default_factory=dict)
    _stages: dict[str, _KeptStage] = field(default_factory=dict)

    def without_test(self) -> Bench:
        """The same bench with an empty test split: nothing that runs on it can look at a test picture."""
        return replace(self, splits=replace(self.splits, test=self.splits.test.select([])))

    def pixels(self, name: str, spec: DataSpec, *, augment: str | Augment | None = None, seed: int = 0) -> Pixels:
        """The pictures of split `name` in this preprocessing; decoded ones are shared, views are the caller's own.

        Raises:
            RecipeError: `augment` is no augmentation; see `as_augment`.
        """
        augment = None if augment is None else as_augment(augment)
        table, store = getattr(self.splits, name), self._store(spec)
        if store:
            fill_store(
                store,
                table,
                working=is_augmented(augment),
                look=False,
                check=False,
                workers=self.runtime.workers,
                show=self.progress,
            )
        kept = self._pixels.get(name)
        if kept is None or kept.spec != spec:  # one preprocessing at a time, so that memory stays bounded
            kept = Pixels(table, spec, workers=self.runtime.workers, store=store, device=self.runtime.gpu)
        if self.share:
            self._pixels[name] = kept
        return kept.with_views(augment, seed=seed)

    def contents(self, table: ImageTable) -> list[str]:
        """The hash of each picture's file, as a store has read it where one has; empty where it cannot be read."""
        for store in self._stores.values():
            found = store.contents(table.paths)
            if found is not None:
                return found
        hashes = FileHashes(Cache(limit_bytes=0), table.root)  # which keeps nothing here

        def of(path: Path) -> str:
            try:
                return hashes.of(path)
            except OSError:
                return ""

        return map_threads(of, table.paths)

    def evaluate(self, model: Classifier, name: str, *, advance: Advance | None = None) -> Evaluation:
        """Score split `name` in float32."""
        exact = replace(self.runtime, dtype=torch.float32)
        if not self.share and not self.cache:  # nobody needs these decoded pictures again
            return evaluate(model, getattr(self.splits, name), runtime=exact, advance=advance)
        pixels = self.pixels(name, model.spec)
        return Evaluation.from_logits(predict_logits(model, pixels, runtime=exact, advance=advance), pixels.table)

    def _store(self, spec: DataSpec) -> PixelStore | None:
        if self.cache and spec not in self._stores:
            self._stores[spec] = open_store(spec, show=self.progress)
        return self._stores.get(spec)

    def source(
        self,
        train: Pixels,
        val: Pixels,
        model: Classifier,
        place: Placement,
        *,
        advance: Advance | None = None,
        aside: Aside | None = None,
    ) -> tuple[StageData, float]:
        """What `make_source` gives, and the seconds that an earlier run spent on it (0.0 where it is made now)."""
        key = self._source_key(model, train, val, place)
        if key in self._sources:
            source, seconds = self._sources[key] = self._sources.pop(key)  # the last used goes last
            return source.behind(place.cut), seconds
        started = time.perf_counter()
        source = make_source(
            train, val, model, views=place.views, runtime=self.runtime, advance=advance, placement=place, aside=aside
        )
        if key is not None and source.nbytes:
            self._sources[key] = source, time.perf_counter() - started
            while sum(kept.nbytes for kept, _ in self._sources.values()) > KEEP_BYTES:
                self._sources.pop(next(iter(self._sources)))
        return source, 0.0

    def stage_key(self, model: Classifier, stage: Stage, plan: Recipe, train: Pixels) -> str | None:
        """What a frozen-backbone stage is known by; None where it is not shared."""
        if model.head_spec is None or not model.backbone_is_frozen:
            return None
        rest = {name: value for name, value in plan.to_dict().items() if name not in ("name", "stages")}
        return self._key(model, train, [rest, stage.to_dict(), tensors_digest(model.state_dict().items())])

    def recall(self, key: str | None, model: Classifier) -> tuple[StageResult, float] | None:
        """Put the model into the state such a stage ended in: its result and the seconds it took, None if unknown."""
        kept = self._stages.get(key) if key is not None else None
        if kept is None:
            return None
        restore(model, kept.state)
        return kept.result, kept.seconds

    def keep(self, key: str | None, model: Classifier, result: StageResult, *, seconds: float) -> None:
        """Remember a finished stage for runs that start the same way."""
        if key is not None:
            self._stages[key] = _KeptStage(result, snapshot(model), seconds)

    def forget(self) -> None:
        """Drop stored features and finished stages, which runs of another seed would not use."""
        self._sources.clear()
        self._stages.clear()

    def _source_key(self, model: Classifier, train: Pixels, val: Pixels, place: Placement) -> str | None:
        line, at = model.freeze_line, place.cut.at if place.cut else None
        weights = tensors_digest(model.backbone.state_dict().items()) if self.share else ""
        return self._key(model, train, [line.where, line.batchnorm, at, place.views, len(train), len(val), weights])

    def _key(self, model: Classifier, train: Pixels, parts: list[Any]) -> str | None:
        """None where something cannot be described: a module or a transform of the user's own."""
        if not self.share or model.backbone_name is None or not isinstance(train.augment, AugmentSpec):
            return None
        form = built(model.backbone)
        if form is None:
            return None
        parts += [form, model.backbone_name, model.backbone_args, model.pool, repr(train.spec), train.augment.to_dict()]
        parts += [train.seed if train.is_augmented else 0, str(self.runtime.dtype), str(self.runtime.device)]
        return json.dumps(parts, sort_keys=True, default=str)


def open_store(spec: DataSpec | None, *, show: bool) -> PixelStore:
    return PixelStore(Cache(), spec, say=lambda text: say(text, enabled=show))


def fill_store(
    store: PixelStore, table: ImageTable, *, working: bool, look: bool, check: bool, workers: int, show: bool
) -> list[str | None]:
    """Decode what the store lacks of these pictures; why each does not decode, or None."""
    with ProgressBar(len(table), "Reading pictures", enabled=show) as bar:
        return store.fill(
            table.paths, root=table.root, working=working, look=look, check=check, workers=workers,
            progress=lambda done, _: bar.move_to(done),
        )  # fmt: skip


# ---- folders of several runs -----------------------------------------------------------------------------------


def data_digest(splits: Splits) -> str:
    """Twelve letters that tell which pictures are in which split under which label."""
    digest = hashlib.sha256()
    for name in ("train", "val", "test"):
        table: ImageTable = getattr(splits, name)
        for path, label in zip(table.relative_paths, table.labels, strict=True):
            digest.update(f"{name}\0{path}\0{splits.class_names[label]}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:12]


def contents_digest(bench: Bench) -> str:
    """Twelve letters that tell what stands in the pictures' files."""
    tables = bench.splits.named().values()
    digest = hashlib.sha256("".join(content for table in tables for content in bench.contents(table)).encode())
    return digest.hexdigest()[:12]


def settle(out: str | Path, file: str, settings: dict[str, Any], *, overwrite: bool = False) -> Path:
    """The folder of several runs: made anew with `settings` in its `file`, or found with the same ones to go on in.

    Raises:
        CheckpointError: the folder was made with other settings (and `overwrite` is not set), or is something else.
    """
    folder = Path(out).expanduser().absolute()
    # What is only being written there, or was as its process was killed, is nothing yet.
    if folder.exists() and not (folder.is_dir() and all(map(is_torn, folder.iterdir()))):
        try:
            earlier = json.loads((folder / file).read_bytes())["settings"]
        except (OSError, ValueError, KeyError, TypeError):
            raise CheckpointError(
                f"{folder} is there and holds no {file} of an earlier call. Choose another folder with --out."
            ) from None
        # What an earlier version did not write down cannot be told apart.
        other = [name for name in earlier if earlier[name] != settings.get(name)]
        if other and not overwrite:
            raise CheckpointError(
                f"{folder}: {file} was made with another {', '.join(other)} ({earlier.get(other[0])!r}, now"
                f" {settings.get(other[0])!r}). Choose another folder with --out, or pass --overwrite."
            )
        if not other:
            return folder
        for run in [entry for entry in folder.iterdir() if is_run(entry)]:
            check_run_path(run, overwrite=True)  # nothing but runs of ours is ever removed
            shutil.rmtree(run)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / file, to_json({"settings": settings}, indent=1) + b"\n")
    return folder
