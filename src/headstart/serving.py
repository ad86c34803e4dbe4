"""A saved model behind a small web server: one page for people, one address for programs.

Nothing of the network is imported before it is needed, so that its packages may be missing.
"""

from __future__ import annotations

import errno
import os
import re
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from ipaddress import IPv6Address, ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .answering import LOCAL_NAMES, Answers, Caps
from .checkpoint import load, read_card
from .classifier import Classifier, as_classifier
from .errors import RecipeError, SetupError, in_words
from .familiar import check_share, known_of
from .fields import check_number
from .run_record import read_object
from .runtime import make_runtime
from .terminal import printable, say

if TYPE_CHECKING:
    from starlette.applications import Starlette

_BACKLOG = 1024


def make_app(
    run: str | Path | Classifier,
    *,
    allow_hosts: Sequence[str] | None = (),
    device: str = "auto",
    precision: str = "fp32",
    workers: int | None = None,
    unknown: float | None = None,
    max_megabytes: int = 32,
    max_pictures: int = 64,
    max_waiting: int = 32,
) -> Starlette:
    """The application that `serve` runs, for any other ASGI server; see there for what it answers.

    Run it in one process: every process would hold the model and decode pictures for itself.

    Args:
        run: a run folder, or a model that `load` has read, of which a copy answers.
        allow_hosts: as in `serve`; None takes requests that call it by any name.
        device, precision, workers: as in `make_runtime`; workers are processes here.
        unknown: as in `predict_files`: answers say `familiar` and `unknown`, too.
        max_megabytes: of one request. max_pictures: in one request. max_waiting: requests at once; the next ones get
            status 503.
    Raises:
        SetupError: the extra `serve` is not installed; no such device. CheckpointError: no model in `run`.
        RecipeError: a number out of its range; a host that is more than a name.
    """
    proxies = _names(allow_hosts or ())
    caps = Caps(max_megabytes, max_pictures, max_waiting)
    _require_extra()
    answers, facts = _loaded(run, device, precision, workers, unknown)
    from .serving_app import application

    return application(answers, facts, caps, None if allow_hosts is None else LOCAL_NAMES, proxies)


def serve(
    run: str | Path | Classifier,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    allow_hosts: Sequence[str] = (),
    device: str = "auto",
    precision: str = "fp32",
    workers: int | None = None,
    unknown: float | None = None,
    max_megabytes: int = 32,
    max_pictures: int = 64,
    max_waiting: int = 32,
) -> None:
    """Answer pictures over HTTP until SIGINT (Ctrl-C) or SIGTERM comes; says its address, then what it has answered.

    `GET /` is a page to drop pictures on. `POST /predict` takes one picture as the body, or several as files of a form
    (multipart/form-data), and answers `{"predictions": [{"name", "pred", "prob", "probs"}]}`, to the bit what
    `predict_files` says of them; `?top=K` names the K most probable classes alone. A picture that cannot be read has
    `error` in place of the rest, and the status is 422 where none could be read. `GET /model` tells classes,
    preprocessing and test accuracy, `GET /health` that it is there.

    There is neither a password nor encryption: for others than this machine put a proxy in front that has both, on
    this machine, and name it with `allow_hosts`. Only
    pictures come in, and their names are never taken for paths; other pages that a browser has open cannot ask.

    Args:
        run: a run folder, or a model that `load` has read, of which a copy answers.
        host: the address to listen on; any but this machine's own (127.0.0.1, ::1) is warned of.
        port: 0 takes a free one.
        allow_hosts: names by which a proxy in front is called (`pictures.example`): requests and pages of theirs are
            answered, beside those that name this machine.
        device, precision, workers: as in `make_runtime`; workers are processes here.
        unknown: as in `predict_files`: answers say `familiar` and `unknown`, too.
        max_megabytes: of one request. max_pictures: in one request. max_waiting: requests at once; the next ones get
            status 503.
    Raises:
        SetupError: the extra `serve` is not installed; the host or the port cannot be had; no such device.
        CheckpointError: no model in `run`. RecipeError: a number out of its range; a host that is more than a name.
    """
    check_number("serve", "port", port, 0, 65535, whole=True)
    proxies = _names(allow_hosts)
    caps = Caps(max_megabytes, max_pictures, max_waiting)
    if unknown is not None:
        check_share(unknown)
    _require_extra()
    if isinstance(run, (str, os.PathLike)):
        read_card(Path(run))  # what is wrong with the call is told before the model is read
    with _listening(host, port) as listener:
        answers, facts = _loaded(run, device, precision, workers, unknown)
        from .serving_app import application
        from .serving_http import run_server

        try:
            answers.warm_up()
            is_local = ip_address(listener.getsockname()[0]).is_loopback
            own = (*LOCAL_NAMES, host) if is_local or proxies else None
            app = application(answers, facts, caps, own, proxies)
            _say_where(listener, host, facts, is_local=is_local)
            run_server(app, listener)
        finally:
            answers.close()
        print(f"Answered {_counted(answers.requests, 'request')} with {_counted(answers.pictures, 'picture')}.")


def _names(allow_hosts: Sequence[str]) -> Sequence[str]:
    if isinstance(allow_hosts, str):
        raise RecipeError(f"allow_hosts is {allow_hosts!r}; it takes a list of names, even of one.")
    return [_name(one) for one in allow_hosts]


def _name(host: object) -> str:
    """The name as a request's Host is read: an IPv6 address without brackets."""
    if isinstance(host, str):
        if re.fullmatch(r"[^\s/:*?#@\[\]]+", host):
            return host
        with suppress(ValueError):
            return str(IPv6Address(re.sub(r"^\[(.*)\]$", r"\1", host)))
    raise RecipeError(
        f"allow_hosts (--allow-host) has {host!r}, which no request is called by. Give the host name alone, such as"
        " pictures.example: without https://, port, path or blanks."
    )


def _require_extra() -> None:
    try:
        import python_multipart  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError:
        raise SetupError(
            "A server needs Starlette, Uvicorn and python-multipart. Install them: pip install 'headstart[serve]'."
        ) from None


def _loaded(
    run: str | Path | Classifier, device: str, precision: str, workers: int | None, unknown: float | None
) -> tuple[Answers, dict[str, Any]]:
    """The model, ready to be asked, and what `GET /model` tells of it."""
    runtime = make_runtime(device=device, precision=precision, workers=workers)
    folder = Path(run) if isinstance(run, (str, os.PathLike)) else None
    model = deepcopy(as_classifier(run)) if folder is None else load(folder, device=runtime.device)
    known = None if unknown is None else known_of(run, model, unknown)
    facts = {
        "name": "" if folder is None else printable(Path(os.path.realpath(folder)).name),
        "backbone": model.backbone_name,
        "class_names": list(model.class_names),
        "preprocessing": model.spec.to_dict(),
        "unknown": unknown,
        "test": None if folder is None else _test_score(read_object(folder / "metrics.json")),
    }
    return Answers(model, runtime, known), facts


def _test_score(metrics: dict[str, Any]) -> dict[str, Any] | None:
    """How the model did on its run's test pictures; None where there were none."""
    test = metrics.get("test")
    if not isinstance(test, dict):
        return None
    kept = ("n", "accuracy", "accuracy_ci95", "majority_baseline")
    return {key: test.get(key) for key in kept}


# ---- where it listens ------------------------------------------------------------------------------------------


@contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens there.

    Raises:
        SetupError: the host is none of this machine's, or the port is taken or not to be had.
    """
    if not isinstance(host, str) or not host.strip():  # which the system would take for all its addresses
        raise SetupError(f"host is {host!r}; it takes an address of this machine, such as 127.0.0.1 or 0.0.0.0 (all).")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, ValueError) as error:  # a name of impossible letters is a ValueError
        reason = getattr(error, "strerror", None) or str(error)
        raise SetupError(
            f"Host {host!r} is not known here ({reason}). Give an address of this machine, such as 127.0.0.1."
        ) from None
    family, _, _, _, address = min(
        found, key=lambda info: info[0] != socket.AF_INET
    )  # the older one of localhost's two
    try:
        listener = socket.create_server(address, family=family, backlog=_BACKLOG)
    except (OSError, OverflowError) as error:
        raise _not_to_be_had(error, host, port) from None
    # By its protocol's number asyncio knows a connection over which small answers are not to wait, for 40 ms, for more.
    with socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP, fileno=listener.detach()) as listener:
        yield listener


def _not_to_be_had(error: Exception, host: str, port: int) -> SetupError:
    number = getattr(error, "errno", None)
    if number == errno.EADDRINUSE:
        return SetupError(f"Port {port} of {host} is in use. Give another one with --port; 0 takes a free one.")
    if number == errno.EACCES:
        return SetupError(
            f"Port {port} is not for this account. Give one from 1024 on with --port; 0 takes a free one."
        )
    return SetupError(
        f"{host} port {port} cannot be listened on ({in_words(error)}). Give an address of this machine with --host,"
        " such as 127.0.0.1."
    )


def _say_where(listener: socket.socket, host: str, facts: dict[str, Any], *, is_local: bool) -> None:
    """Where it answers, on stdout; that anybody may ask, on stderr."""
    name = f"[{host}]" if ":" in host else host
    address = f"http://{name}:{listener.getsockname()[1]}/"
    if not is_local:
        say(
            f"Warning: {address} is open to everybody who reaches this machine, without password or encryption. Leave"
            " --host out, and put a proxy in front that has both and whose name --allow-host tells."
        )
    of = ", ".join(filter(None, (facts["name"], facts["backbone"], _counted(len(facts["class_names"]), "class"))))
    print(f"{address} answers for {of}; Ctrl-C ends it. Try:\ncurl -F picture=@photo.jpg {address}predict", flush=True)


def _counted(n: int, what: str) -> str:
    plural = what + ("es" if what.endswith("s") else "s")
    return f"{n:,} {what if n == 1 else plural}"
