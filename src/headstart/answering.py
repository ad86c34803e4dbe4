"""A model that is asked from an event loop, by many at once, without one getting in another's way.

Pictures are decoded in limited processes (see `isolate`), several at once: one that crashes, hangs or bloats a decoder
costs that picture alone. What the model computes, it computes in one thread, a request after the other, each as
`predict_files` would compute it: an answer depends on the pictures of its own request, never on who asks meanwhile.
"""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import repeat
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .classifier import Classifier
from .dataspec import PixelArray
from .evaluation import LogitsOf, named_probs, scoring
from .familiar import Known
from .fields import check_number
from .intake import Viewers
from .metrics import softmax
from .runtime import Runtime
from .settings import own_settings

LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")  # by which browsers call a server on their own machine
ANSWERING = "headstart-answer"  # name of the thread that computes
_END_SECONDS = 1.5  # for a batch that is being computed

Tell = Callable[[Tensor], list[dict[str, Any]]]


class Ended(Exception):
    """The server ends before this answer."""


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
        check_number("serve", "max_megabytes", self.max_megabytes, 1, 500, whole=True)
        check_number("serve", "max_pictures", self.max_pictures, 1, 10_000, whole=True)
        check_number("serve", "max_waiting", self.max_waiting, 1, 10_000, whole=True)

    @property
    def max_bytes(self) -> int:
        """Of one request's body."""
        return self.max_megabytes * 1_000_000


class Answers:
    """The model's answers, and how many were given: `requests`, `pictures`.

    Args:
        model: nobody else's: it is held ready to answer until `close`.
        known: what is familiar to the model, where it is to be told.
    """

    def __init__(self, model: Classifier, runtime: Runtime, known: Known | None = None) -> None:
        self.model, self.runtime, self.known = model, runtime, known
        self.requests = self.pictures = 0
        self._viewers = Viewers(model.spec, runtime.workers)
        self._readers = ThreadPoolExecutor(runtime.workers, thread_name_prefix="headstart-read")
        self._turns = _Turns(model, runtime, self._told, features=known is not None)

    async def of(self, pictures: Sequence[bytes]) -> list[dict[str, Any]]:
        """For each file's bytes what `predict_files` says, or why it cannot be read, in bare words, as `error`.

        Raises:
            SetupError: no process for decoding can be started; memory runs out with a single picture.
        """
        reading = [asyncio.wrap_future(self._readers.submit(self._viewers.view, data)) for data in pictures]
        read = await asyncio.gather(*reading)
        views = [one for one in read if not isinstance(one, str)]
        said: list[dict[str, Any]] = await asyncio.wrap_future(self._turns.told(views))
        told = iter(said)
        self.requests += 1
        self.pictures += len(pictures)
        return [{"error": one} if isinstance(one, str) else next(told) for one in read]

    def _told(self, rows: Tensor) -> list[dict[str, Any]]:
        """What is said of pictures, from their logits, and their features behind those where these are asked for."""
        classes = len(self.model.class_names)
        named = [named_probs(row, self.model.class_names) for row in softmax(rows[:, :classes].numpy())]
        more = self.known.tell(rows[:, classes:]) if self.known else repeat({}, len(named))
        return [one | also for one, also in zip(named, more, strict=True)]

    def warm_up(self) -> None:
        """Start the processes, and let the model see a first picture, so that the first who asks does not wait."""
        black = io.BytesIO()
        Image.new("RGB", (8, 8)).save(black, "PNG")
        made = list(self._readers.map(self._viewers.view, [black.getvalue()] * self.runtime.workers))
        self._turns.told([one for one in made if not isinstance(one, str)][:1]).result()

    def close(self) -> None:
        """End the processes and the thread; a batch of a slow model that is being computed is not waited for."""
        self._viewers.close()
        self._readers.shutdown(cancel_futures=True)
        self._turns.end()


class _Turns(threading.Thread):
    """One thread that computes what it is asked, in order; a program that ends does not wait for it, as for a pool's.

    It makes the model ready once: for every question anew that would take several times as long as a small answer.
    """

    def __init__(self, model: Classifier, runtime: Runtime, tell: Tell, *, features: bool) -> None:
        super().__init__(name=ANSWERING, daemon=True)
        self._model, self._runtime, self._tell, self._features = model, runtime, tell, features
        self._ended = False
        self._asked: SimpleQueue[tuple[Future[list[dict[str, Any]]], Sequence[PixelArray]] | None] = SimpleQueue()
        self.start()

    def told(self, views: Sequence[PixelArray]) -> Future[list[dict[str, Any]]]:
        """What `tell` says of evaluation views, uint8 [3, S, S] each, once it is their turn."""
        future: Future[list[dict[str, Any]]] = Future()
        if views:
            self._asked.put((future, views))
        else:
            future.set_result([])
        return future

    def end(self) -> None:
        """Take no more, and wait a moment for the end. A second call does nothing."""
        if not self._ended:
            self._ended = True
            self._asked.put(None)
            self.join(_END_SECONDS)

    def run(self) -> None:
        with ExitStack() as stack:
            logits_of: LogitsOf | None = None
            while (asked := self._asked.get()) is not None:
                future, views = asked
                if not future.set_running_or_notify_cancel():  # whoever asked has gone
                    continue
                try:
                    with own_settings():
                        if logits_of is None:  # nor where it could not be made ready for the question before
                            ready = scoring(self._model, self._runtime, features=self._features)
                            logits_of = stack.enter_context(ready)
                        batches = torch.from_numpy(np.stack(views)).split(self._runtime.batch_size)
                        future.set_result(self._tell(logits_of(self._until_the_end(batches)).cpu()))
                except BaseException as error:  # handed over to whoever waits
                    future.set_exception(error)

    def _until_the_end(self, batches: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        for batch in batches:
            if self._ended:
                raise Ended
            yield batch
