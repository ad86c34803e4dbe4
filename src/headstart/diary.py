"""What a run writes down as it goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .classifier import Classifier
from .handover import Handover
from .run import Run
from .stage_result import Log
from .terminal import say


@dataclass
class Diary:
    """What a run writes down as it goes: history records, stages, and the seconds of each phase."""

    run: Run | None
    show: bool
    history: list[dict[str, Any]] = field(default_factory=list)
    listener: Log | None = None
    stages: list[dict[str, Any]] = field(default_factory=list)
    phases: list[dict[str, Any]] = field(default_factory=list)
    earlier: str | Path | Classifier | None = None
    """What the weights come from; a run folder tells which pictures they have been trained on."""
    right: NDArray[np.bool_] | None = None
    """Which validation pictures the state is right about that the last stage kept, [n_val]."""
    handover: Handover | None = None
    """What the head took over from an earlier run; None where it is a new one."""
    leaked: NDArray[np.bool_] | None = None
    """Which test pictures have been met in other splits, here or in the earlier run; None until that is asked."""
    doubtful: list[str] | None = None
    """Files whose label may be wrong; None where labels were not looked at."""

    @contextmanager
    def phase(self, name: str, *, before: float = 0.0) -> Iterator[None]:
        """What is done inside, by the clock; `before`: seconds that an earlier process has spent on it."""
        started = time.perf_counter() - before
        try:
            yield
        finally:
            self.phases.append({"name": name, "seconds": time.perf_counter() - started})

    def log(self, record: dict[str, Any]) -> None:
        record = {**record, "stage_index": len(self.stages)}
        self.history.append(record)
        if self.run:
            self.run.append_history(record)
        if record["event"]:
            say(record["event"]["message"], enabled=self.show)
        if self.listener:
            self.listener(record)
