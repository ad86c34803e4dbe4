"""Decoding in processes of its own, with limits: a file that crashes, hangs or bloats a decoder costs that file alone.

A worker is `python -c ...` of the same interpreter, which imports the decoder and nothing heavy (torchcodec, where it
was chosen, brings PyTorch). It reads requests and writes answers through pipes, as JSON behind its length and bytes
behind that: nothing is pickled, no module of the caller's is imported again, so notebooks and scripts without
`if __name__ == "__main__"` work. The limits bound what a picture costs; they are no wall against code that takes a
decoder over.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import PIL

from . import decode
from .errors import SetupError

MAX_MESSAGE = (
    1 << 20
)  # bytes of a request or an answer, without its blobs: a broken worker cannot fill the parent's memory
MAX_REASON = 500
_START_SECONDS = 60.0  # until a worker has imported the decoder: reached where something is badly wrong
_STARTED = "import sys; sys.path[:] = {path!r}; from headstart.{room} import serve; serve()"
_ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
# The C library (glibc; others know nothing of it) gives the memory of a picture back to the system after each, which
# then clears every page anew for the next one: a millisecond of five. What is larger than 8 MB still goes back at once.
_KEEPS_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(8 << 20), "MALLOC_TRIM_THRESHOLD_": str(32 << 20)}
PLAIN = "isolate"  # the room whose workers say whether files decode, and nothing else
MAX_BLOB = 1 << 30  # bytes of pixels in an answer


@dataclass(frozen=True)
class Limits:
    """What one file may cost.

    seconds: processor time, which a busy machine does not stretch: the same files are refused on every run. Windows
    has no such timer. wait_seconds: time by the clock, for a file that waits for what never comes.
    memory_bytes: address space of a worker, 0 for no limit; kept on Linux alone (macOS accepts a limit without keeping
    it, Windows has none of the kind).
    """

    seconds: float = 5.0
    wait_seconds: float = 30.0
    memory_bytes: int = 2 << 30


class Struck(str):
    """A reason that is no verdict of the decoder: a death or a limit, which another machine or day may not see."""


@dataclass(frozen=True)
class Answer:
    """What a worker says of a file: why it does not decode, and what was made of it, as told values and as bytes."""

    reason: str | None
    told: dict[str, Any] = field(default_factory=dict)
    blobs: Sequence[bytes | bytearray | memoryview] = ()


Work = Callable[[Path | bytes, Callable[[], None]], Answer]
"""A worker's: the answer for a file, or for a file's bytes.

It calls its second argument once the decoder is done, which lifts its time limit.
"""


class WorkerDied(Exception):
    """The worker ended before it answered; the message says how, in bare words.

    is_certain: it would end so again.
    """

    is_certain = False


class Worker:
    """One process that decodes files, one at a time; `greet` comes before the first.

    Raises:
        SetupError: it cannot be started.
    """

    def __init__(self, limits: Limits, room: str = PLAIN, settings: dict[str, Any] | None = None) -> None:
        self._limits, self._settings = limits, settings or {}
        self._deadline: float | None = None
        self._overdue = False
        code = _STARTED.format(path=[str(Path(__file__).parents[1]), *sys.path], room=room)
        if not sys.executable:
            raise SetupError("This Python does not know its own program (sys.executable); run it as `python`.")
        try:
            # -P: the working folder, which may hold anything, is not searched for modules.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", code],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                # The environment may name another decoder by now than this process has taken.
                env={**_KEEPS_MEMORY, **os.environ, **_ONE_THREAD, decode.DECODER_VARIABLE: decode.DECODER},
                creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
            )
        except OSError as error:
            raise SetupError(f"No process for decoding pictures can be started ({error}).") from error

    def greet(self) -> None:
        """Hand the limits over and wait until the decoder is imported.

        Raises:
            SetupError: it is not to be imported there.
        """
        caps = {"max_pixels": decode.MAX_PIXELS, "max_bytes": decode.MAX_BYTES}
        try:
            told, _ = self._exchange(self._settings | asdict(self._limits) | caps, _START_SECONDS)
        except WorkerDied as death:
            raise SetupError(
                f"A process for decoding pictures did not start: {death}. Does `{sys.executable} -c 'import PIL.Image,"
                " numpy'` work here?"
            ) from None
        if told.get("decoder") != decode.decoder_version() or told.get("pillow") != PIL.__version__:
            self.close()
            raise SetupError("What decodes pictures has changed since this Python was started; start it again.")

    def ask(self, source: str | Path | bytes) -> Answer:
        """What it makes of this file, or of a file's bytes.

        Raises:
            WorkerDied: the worker did not live to answer, or took too long and was killed.
        """
        sent = (source,) if isinstance(source, bytes) else ()
        request = {} if sent else {"path": str(source)}
        told, blobs = self._exchange(request, self._limits.wait_seconds, sent)
        reason = told.get("reason")
        if reason is None:
            return Answer(None, told, blobs)
        text = str(reason)[:MAX_REASON]
        return Answer(Struck(text) if told.get("struck") else text, told)

    def check_time(self) -> None:
        """Kill the worker if its answer is overdue."""
        deadline = self._deadline
        if deadline is not None and time.monotonic() > deadline:
            self._overdue = True
            self._process.kill()

    def kill(self) -> None:
        """End it at once; `close` still has to follow."""
        self._process.kill()

    def close(self) -> None:
        """End the process and give its pipes back."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):  # a request that was never read is still in the buffer
                    pipe.close()

    def _exchange(
        self, request: dict[str, Any], seconds: float, sent: Sequence[bytes] = ()
    ) -> tuple[dict[str, Any], tuple[bytearray, ...]]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._deadline = time.monotonic() + seconds
        try:
            _send(self._process.stdin, request, sent)
            answer = _receive(self._process.stdout)
        except (OSError, ValueError):
            answer = None
        finally:
            self._deadline = None
        if answer is None:
            self.close()
            raise self._death(seconds)
        return answer

    def _death(self, seconds: float) -> WorkerDied:
        if self._overdue:
            return WorkerDied(f"its decoding was not done after {seconds:g} seconds")
        code = self._process.returncode
        if code is None or code >= 0:
            return WorkerDied(f"it crashes the decoder (exit code {code})")
        if -code == getattr(signal, "SIGPROF", None):
            death = WorkerDied(f"its decoding takes more than {self._limits.seconds:g} seconds")
            death.is_certain = True
            return death
        known = -code in {kind.value for kind in signal.Signals}
        return WorkerDied(f"it crashes the decoder ({signal.Signals(-code).name if known else f'signal {-code}'})")


# ---- the worker's side -----------------------------------------------------------------------------------------


def serve(prepare: Callable[[dict[str, Any]], Work] | None = None) -> None:
    """Answer requests from standard input until it ends; runs in the worker.

    Args:
        prepare: makes the work of the settings that came first; None: each file is decoded, and that is all.
    """
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nothing a library prints gets between the answers
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    settings, _ = _receive(requests) or ({}, ())
    decode.MAX_PIXELS, decode.MAX_BYTES = int(settings["max_pixels"]), int(settings["max_bytes"])
    memory, seconds = int(settings["memory_bytes"]), float(settings["seconds"])
    work = prepare(settings) if prepare else _decoded
    decode.import_decoder()
    _limit_memory(memory)
    _send(answers, {"decoder": decode.decoder_version(), "pillow": PIL.__version__})
    while (request := _receive(requests)) is not None:
        _set_timer(seconds)
        try:
            answer = work(_asked(*request), lambda: _set_timer(0))
        except MemoryError:
            answer = Answer(Struck(f"its decoding needs more than {memory >> 20:,} MB of memory"))
        _set_timer(0)
        verdict = {"reason": answer.reason, "struck": isinstance(answer.reason, Struck)}
        _send(answers, answer.told | verdict, answer.blobs)
        del answer  # the memory is the next file's


def _asked(request: dict[str, Any], blobs: Sequence[bytearray]) -> Path | bytes:
    """The file that is asked about, by its path or by its bytes."""
    return bytes(blobs[0]) if blobs else Path(request["path"])


def _decoded(source: Path | bytes, done: Callable[[], None]) -> Answer:
    return Answer(decode.bad_reason(source))


def _limit_memory(nbytes: int) -> None:
    """Limit the address space; what a decoder's libraries have taken of it by now comes on top."""
    if nbytes and sys.platform == "linux":
        import resource

        if decode.DECODER != "pillow":
            nbytes += int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        limit = nbytes if hard == resource.RLIM_INFINITY else min(nbytes, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # no core files of crashed decoders


def _set_timer(seconds: float) -> None:
    """The system ends this process once it has used up so much processor time; 0 takes that back."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


# ---- messages --------------------------------------------------------------------------------------------------


def _send(pipe: IO[bytes], message: dict[str, Any], blobs: Sequence[bytes | bytearray | memoryview] = ()) -> None:
    # ASCII: names that are no Unicode travel as lone surrogates.
    data = json.dumps(message | {"blobs": [len(blob) for blob in blobs]}).encode()
    pipe.write(len(data).to_bytes(4, "big") + data)
    for blob in blobs:
        pipe.write(blob)
    pipe.flush()


def _receive(pipe: IO[bytes] | BinaryIO) -> tuple[dict[str, Any], tuple[bytearray, ...]] | None:
    """The next message and its blobs; None at the end of the stream.

    Raises:
        ValueError: what comes is no message.
    """
    head = pipe.read(4)
    if len(head) < 4:
        return None
    length = int.from_bytes(head, "big")
    if length > MAX_MESSAGE:
        raise ValueError(f"a message of {length} bytes")
    data = pipe.read(length)
    if len(data) < length:
        return None
    message = json.loads(data)
    if not isinstance(message, dict):
        raise ValueError("a message that is no object")
    lengths = [int(length) for length in message.pop("blobs", ())]
    if any(length < 0 for length in lengths) or sum(lengths) > MAX_BLOB:
        raise ValueError(f"blobs of {lengths} bytes")
    blobs = tuple(bytearray(length) for length in lengths)
    for blob in blobs:
        if cast(BufferedReader, pipe).readinto(blob) < len(blob):
            return None
    return message, blobs
