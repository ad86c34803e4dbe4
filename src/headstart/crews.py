"""Several decoding processes at once: for many files that are known, or for questions that come one by one."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import decode
from .isolate import PLAIN, Answer, Limits, Struck, Worker, WorkerDied

ATTEMPTS = 2  # a worker may also die of what others do to the machine; a file is blamed for two deaths
_WATCH_SECONDS = 0.1
_NOTHING = -1  # in place of a position: wakes a thread that waits for work


def bad_reasons(
    paths: Sequence[str | Path],
    *,
    workers: int,
    limits: Limits | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[str | None]:
    """`decode.bad_reason` of each file, decoded in worker processes; see `ask_all`."""
    return ask_all(paths, workers=workers, limits=limits, progress=progress)


def ask_all(
    paths: Sequence[str | Path],
    *,
    workers: int,
    limits: Limits | None = None,
    progress: Callable[[int, int], None] | None = None,
    room: str = PLAIN,
    settings: dict[str, Any] | None = None,
    take: Callable[[int, Answer], None] | None = None,
    files_each: int = 16,
) -> list[str | None]:
    """Ask worker processes about each file; a worker's death or a time-out is a reason not to decode, too.

    Args:
        workers: processes at the most; there are fewer where there are few files.
        limits: what one file may cost; None is `Limits()`.
        progress: called from this thread with (files done, files in all).
        room: whose `serve` is a worker's work.
        settings: what it is told first, beside the limits.
        take: is given (position, answer) of each file that a worker has answered for, from several threads.
        files_each: with fewer files for each worker there are fewer workers, since to start one takes time, too.
    Returns:
        One entry per path: None for a file that decodes to its last row, `Struck` where a limit or a death decided.
    Raises:
        SetupError: no worker process can be started, or the decoder that was chosen is not there.
    """
    limits = limits or Limits()
    reasons: list[str | None] = [None] * len(paths)
    if not paths:
        return reasons
    decode.import_decoder()  # what is missing is said here, and not by a worker's end
    number = max(1, min(workers, -(-len(paths) // files_each)))
    waiting: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()  # (position, attempts so far)
    for position in range(len(paths)):
        waiting.put((position, 0))
    done: queue.SimpleQueue[tuple[int, str | None] | BaseException] = queue.SimpleQueue()
    job = _Job(paths, limits, room, settings or {}, take)
    crew = [_Driver(job, waiting, done) for _ in range(number)]
    watch = _Watch(crew)
    try:
        for thread in (*crew, watch):
            thread.start()
        for count in range(1, len(paths) + 1):
            outcome = done.get()
            if isinstance(outcome, BaseException):
                raise outcome
            reasons[outcome[0]] = outcome[1]
            if progress is not None and (count % 16 == 0 or count == len(paths)):
                progress(count, len(paths))
    finally:
        for driver in crew:
            driver.stop()
        for _ in crew:  # only now: one that is not yet stopped would take another's word
            waiting.put((_NOTHING, 0))
        watch.stopped.set()
        for thread in (*crew, watch):
            if thread.ident is not None:
                thread.join()
    return reasons


@dataclass(frozen=True)
class _Job:
    """What is asked, and who takes the answers; see `ask_all`."""

    paths: Sequence[str | Path]
    limits: Limits
    room: str
    settings: dict[str, Any]
    take: Callable[[int, Answer], None] | None


class _Driver(threading.Thread):
    """Feeds one worker with files until it is stopped, and puts another worker in its place when it dies."""

    def __init__(
        self,
        job: _Job,
        waiting: queue.SimpleQueue[tuple[int, int]],
        done: queue.SimpleQueue[tuple[int, str | None] | BaseException],
    ) -> None:
        super().__init__(name="headstart-isolate", daemon=True)
        self._job, self._waiting, self._done = job, waiting, done
        self.worker: Worker | None = None
        self._stopped = False
        self._lock = threading.Lock()

    def run(self) -> None:
        try:
            while not self._stopped:
                position, attempts = self._waiting.get()
                if position != _NOTHING:
                    self._one(position, attempts + 1)
        except BaseException as error:  # handed over to the thread that waits
            self._done.put(error)
        finally:
            if self.worker is not None:
                self.worker.close()

    def _one(self, position: int, attempt: int) -> None:
        try:
            answer = self._current().ask(self._job.paths[position])
        except WorkerDied as death:
            with self._lock:
                self.worker = None
            if attempt < ATTEMPTS and not death.is_certain:
                self._waiting.put((position, attempt))  # behind all others, in a worker that has seen less
            else:
                self._done.put((position, Struck(death)))
            return
        if self._job.take is not None:
            self._job.take(position, answer)
        self._done.put((position, answer.reason))

    def _current(self) -> Worker:
        if self.worker is not None:
            return self.worker
        worker = Worker(self._job.limits, self._job.room, self._job.settings)
        with self._lock:
            self.worker = worker  # from here on it is watched, and killed when the work is stopped
            if self._stopped:
                worker.kill()
        worker.greet()
        return worker

    def stop(self) -> None:
        """Let the thread end after the file it is at, which fails now."""
        self._stopped = True
        with self._lock:
            if self.worker is not None:
                self.worker.kill()


@dataclass
class _Seat:
    """A place for one of a crew's workers."""

    worker: Worker | None = None


class Crew:
    """Workers that stay for questions that come one by one, from several threads; each is started when first needed.

    Args:
        number: how many there are.
        room, settings: as in `ask_all`. limits: None is `Limits()`.
    Raises:
        SetupError: the decoder that was chosen is not there.
    """

    def __init__(
        self, number: int, *, room: str = PLAIN, settings: dict[str, Any] | None = None, limits: Limits | None = None
    ) -> None:
        decode.import_decoder()
        self._limits, self._room, self._settings = limits or Limits(), room, settings
        self._seats = [_Seat() for _ in range(number)]
        self._free: queue.SimpleQueue[_Seat] = queue.SimpleQueue()
        for seat in self._seats:
            self._free.put(seat)
        self._closed = False
        self._watch = _Watch(self._seats)
        self._watch.start()

    def ask(self, source: str | Path | bytes) -> Answer:
        """What a worker makes of a file or of a file's bytes; waits until one is free.

        Raises:
            SetupError: no worker can be started.
        """
        seat = self._free.get()
        reason = Struck("the work was stopped")
        try:
            for _ in range(ATTEMPTS):
                if self._closed:
                    break
                try:
                    return self._seated(seat).ask(source)
                except WorkerDied as death:
                    seat.worker, reason = None, Struck(death)
                    if death.is_certain:
                        break
            return Answer(reason)
        finally:
            self._free.put(seat)

    def _seated(self, seat: _Seat) -> Worker:
        if seat.worker is None:
            worker = Worker(self._limits, self._room, self._settings)
            seat.worker = worker  # from here on it is watched, and `close` finds it
            if self._closed:
                worker.kill()
            worker.greet()
        return seat.worker

    def close(self) -> None:
        """End the workers; a question that one of them is at is answered by its death. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        for seat in self._seats:
            if (worker := seat.worker) is not None:
                worker.kill()
        seats = [self._free.get() for _ in self._seats]  # each is free at once
        for seat in seats:
            if seat.worker is not None:
                seat.worker.close()
            self._free.put(seat)  # for who asks too late
        self._watch.stopped.set()
        self._watch.join()


class _Watch(threading.Thread):
    """Kills workers whose time for a file is over."""

    def __init__(self, crew: Sequence[_Driver] | Sequence[_Seat]) -> None:
        super().__init__(name="headstart-watch", daemon=True)
        self._crew = crew
        self.stopped = threading.Event()

    def run(self) -> None:
        while not self.stopped.wait(_WATCH_SECONDS):
            for worker in [driver.worker for driver in self._crew]:
                if worker is not None:
                    worker.check_time()
