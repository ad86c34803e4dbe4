"""A study of Optuna's: where its trials are kept, and which of them are done, in hand or given up.

It lies in a journal file or a database that several processes, and machines, may share.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from .errors import CheckpointError, RecipeError, SetupError, in_words
from .owners import is_gone
from .run_record import mend_last_line
from .space import WORDS, point_key

GIVEN_UP = timedelta(hours=1)
_BEGINNING = b'{"op_code":'  # of each line of a journal


def taken_points(optuna: Any, study: Any) -> list[str]:
    """The trials that are done or that a living process has in hand."""
    states = optuna.trial.TrialState
    return [
        point_key(trial.user_attrs["asked"])
        for trial in study.get_trials(deepcopy=False)
        if "asked" in trial.user_attrs
        and trial.state != states.FAIL
        and not (trial.state == states.RUNNING and _is_given_up(trial))
    ]


def _is_given_up(trial: Any) -> bool:
    """Its process was killed; on another machine, where nobody can tell, it was begun an hour ago."""
    if is_gone(trial.user_attrs.get("process", {})):
        return True
    return bool(datetime.now() - trial.datetime_start > GIVEN_UP)


def load_optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise SetupError("A sweep needs Optuna. Install it: pip install 'headstart[sweep]'.") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def open_study(optuna: Any, storage: str, *, name: str, prune: bool, fresh: bool) -> Any:
    try:
        kept = storage if "://" in storage else _journal(Path(storage))
        names = optuna.get_all_study_names(kept)
    except Exception as error:  # of SQLAlchemy, of a driver that is not installed, of a file that is none of these
        raise RecipeError(
            f"The study's storage {storage} cannot be opened ({in_words(error)}). It takes a journal file's path, or a"
            " database URL such as sqlite:///study.db."
        ) from None
    if fresh and name in names:
        optuna.delete_study(study_name=name, storage=kept)
    pruner = optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=3) if prune else optuna.pruners.NopPruner()
    return optuna.create_study(storage=kept, study_name=name, load_if_exists=True, direction="minimize", pruner=pruner)


def _journal(path: Path) -> Any:
    """A journal file as a storage.

    Raises:
        ValueError, OSError: it is there and is something else, which Optuna would add its lines to.
    """
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    class Lock(JournalFileOpenLock):
        """Who has it adds to whole lines: behind half a one, of a full disk or a kill, Optuna reads nothing again."""

        def acquire(self) -> bool:
            super().acquire()
            try:
                _mend(path)
            except BaseException:
                self.release()
                raise
            return True

    class Backend(JournalFileBackend):
        def append_logs(self, logs: list[dict[str, Any]]) -> None:
            try:
                super().append_logs(logs)
            except OSError as error:
                why = error.strerror or error
                raise CheckpointError(f"Cannot write {path}: {why}. Make room; the same command goes on.") from error

    if path.exists():
        with path.open("rb") as file:
            first = file.readline(1 << 20)
        is_torn = not first.endswith(b"\n") and first[: len(_BEGINNING)] == _BEGINNING[: len(first)]
        if not is_torn and "op_code" not in json.loads(first):
            raise ValueError("it is no journal")
    path.parent.mkdir(parents=True, exist_ok=True)
    return JournalStorage(Backend(str(path), lock_obj=Lock(str(path))))


def _mend(journal: Path) -> None:
    """See `mend_last_line`; a journal that is whole is not read."""
    with journal.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
        is_torn = file.read(1) not in (b"", b"\n")
    if is_torn:
        mend_last_line(journal)


def ask(optuna: Any, study: Any, *, seed: int) -> Any:
    """A new trial, whose draw is a function of the seed, its number and what is done.

    So neither two processes nor a sweep that goes on draw the same numbers again.
    """
    while True:
        number = len(study.get_trials(deepcopy=False))
        study.sampler = optuna.samplers.TPESampler(seed=(seed + number) % 2**32)
        trial = study.ask()
        if trial.number == number:
            return trial
        study.tell(trial, state=optuna.trial.TrialState.FAIL)  # another process asked at the same moment


def draw(optuna: Any, study: Any, trial: Any, values: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    """One trial's values: numbers from a range (rates and decays on a logarithmic scale), others from the choices."""
    point = {}
    for name, choices in values.items():
        try:
            if name not in WORDS and len(choices) == 2 and min(choices) < max(choices):
                log = name in ("lr", "weight_decay") and min(choices) > 0
                point[name] = trial.suggest_float(name, min(choices), max(choices), log=log)
            else:
                point[name] = trial.suggest_categorical(name, list(choices))
        except ValueError:  # Optuna's: choices stay as they are, and a range is no list
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            raise RecipeError(
                f"Earlier trials of this study chose {name} in another way than from {', '.join(map(str, choices))},"
                " and tpe cannot learn from both. Take the same choices, another --out, or --overwrite."
            ) from None
    return point


def is_scored(optuna: Any, trial: Any) -> bool:
    states = optuna.trial.TrialState
    return trial.state in (states.COMPLETE, states.PRUNED) and "asked" in trial.user_attrs
