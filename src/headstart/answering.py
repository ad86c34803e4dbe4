"""A model that is asked from an event loop, by many at once, without one getting in another's way.

Pictures are decoded in limited processes (see `isolate`), several at once: one that crashes, hangs or bloats a decoder
costs that picture alone. What the model computes, it computes in one thread, a request after the other, each as
`predict_files` would compute it: an answer depends on the pictures of its own request, never on who asks meanwhile.
"""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from PIL import Image

from .classifier import Classifier
from .dataspec import PixelArray
from .evaluation import named_probs, view_probs
from .fields import check_number
from .intake import Viewers
from .runtime import Runtime


@dataclass(frozen=True)
class Caps:
    """What a stranger's request may take.

    max_megabytes: of one request's body (a megabyte is a million bytes). max_pictures: in one request. max_waiting:
    requests that are answered or wait for it at once; the next one is sent away with status 503.
    """

    max_megabytes: int = 32
    max_pictures: int = 64
    max_waiting: int = 32

    def __post_init__(self) -> None:
        check_number("serve", "max_megabytes", self.max_megabytes, 1, 1000, whole=True)
        check_number("serve", "max_pictures", self.max_pictures, 1, 10_000, whole=True)
        check_number("serve", "max_waiting", self.max_waiting, 1, 10_000, whole=True)

    @property
    def max_bytes(self) -> int:
        """Of one request's body."""
        return self.max_megabytes * 1_000_000


class Answers:
    """The model's answers, and how many were given: `requests`, `pictures`."""

    def __init__(self, model: Classifier, runtime: Runtime) -> None:
        self.model, self.runtime = model, runtime
        self.requests = self.pictures = 0
        self._viewers = Viewers(model.spec, runtime.workers)
        self._readers = ThreadPoolExecutor(runtime.workers, thread_name_prefix="headstart-read")
        self._turns = _Turns()

    async def of(self, pictures: Sequence[bytes]) -> list[dict[str, Any]]:
        """For each file's bytes `pred`, `prob` and `probs`, or why it cannot be read, in bare words, as `error`.

        Raises:
            SetupError: no process for decoding can be started; memory runs out with a single picture.
        """
        reading = [asyncio.wrap_future(self._readers.submit(self._viewers.view, data)) for data in pictures]
        read = await asyncio.gather(*reading)
        told: list[dict[str, Any]] = await asyncio.wrap_future(self._turns.ask(lambda: self._told(read)))
        self.requests += 1
        self.pictures += len(pictures)
        return told

    def warm_up(self) -> None:
        """Start the processes, and let the model see a first picture, so that the first who asks does not wait."""
        black = io.BytesIO()
        Image.new("RGB", (8, 8)).save(black, "PNG")
        views = list(self._readers.map(self._viewers.view, [black.getvalue()] * self.runtime.workers))
        self._turns.ask(lambda: self._told(views[:1])).result()

    def close(self) -> None:
        """End the processes. What is being computed is left to itself, and ends with the program at the latest."""
        self._viewers.close()
        self._readers.shutdown(cancel_futures=True)
        self._turns.end()

    def _told(self, read: Sequence[PixelArray | str]) -> list[dict[str, Any]]:
        views = [one for one in read if not isinstance(one, str)]
        if not views:
            return [{"error": reason} for reason in read]
        probs = iter(view_probs(self.model, torch.from_numpy(np.stack(views)), self.runtime))
        names = self.model.class_names
        return [{"error": one} if isinstance(one, str) else named_probs(next(probs), names) for one in read]


class _Turns(threading.Thread):
    """One thread that does what it is given, in order; a program that ends does not wait for it, as for a pool's."""

    def __init__(self) -> None:
        super().__init__(name="headstart-answer", daemon=True)
        self._jobs: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self.start()

    def ask(self, work: Callable[[], Any]) -> Future[Any]:
        """What the work comes to, once it is its turn."""
        future: Future[Any] = Future()
        self._jobs.put((future, work))
        return future

    def end(self) -> None:
        """Take no more."""
        self._jobs.put(None)

    def run(self) -> None:
        while (job := self._jobs.get()) is not None:
            future, work = job
            if future.set_running_or_notify_cancel():  # else whoever asked has gone
                try:
                    future.set_result(work())
                except BaseException as error:  # handed over to whoever waits
                    future.set_exception(error)
