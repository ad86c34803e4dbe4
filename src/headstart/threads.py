"""Work on many pictures at once."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar
from weakref import WeakKeyDictionary

_turns: WeakKeyDictionary[object, threading.RLock] = WeakKeyDictionary()
_making_turns = threading.Lock()
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def available_cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def alone_with(thing: object) -> threading.RLock:
    """A lock to be held while `thing` is worked on in place; the thread that holds it may take it again."""
    with _making_turns:
        return _turns.setdefault(thing, threading.RLock())


def map_threads(
    function: Callable[[_Item], _Result],
    items: Sequence[_Item],
    *,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[_Result]:
    """`[function(item) for item in items]` in threads; decoding and resizing run outside Python's lock.

    Args:
        workers: threads; 0 is one per CPU core, 1 stays in the calling thread.
        progress: called with (items done, items in all) after each part of at most 64.
    """
    workers = workers or available_cores()
    size = max(1, min(64, len(items) // (4 * workers)))
    parts = [items[i : i + size] for i in range(0, len(items), size)]
    results: list[_Result] = []

    def run(part: Sequence[_Item]) -> list[_Result]:
        return [function(item) for item in part]

    def gather(outputs: Iterable[list[_Result]]) -> list[_Result]:
        for output in outputs:
            results.extend(output)
            if progress is not None:
                progress(len(results), len(items))
        return results

    if min(workers, len(parts)) <= 1:
        return gather(map(run, parts))
    pool = ThreadPoolExecutor(workers)
    try:
        return gather(pool.map(run, parts))
    finally:
        pool.shutdown(cancel_futures=True)  # an error or Ctrl-C does not wait for the pictures still queued
