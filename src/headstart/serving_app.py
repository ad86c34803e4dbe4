"""The application behind `headstart serve`: what comes in over HTTP is checked here, and answered in JSON.

Imported where one is made, and nowhere else: its packages may be missing. What a stranger sends is pictures: their
bytes stay in memory, their names are only repeated, and nothing is fetched or opened for a request.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NoReturn

from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .answering import Answers, Caps, Ended
from .errors import HeadstartError, in_words
from .serving_page import PAGE_POLICY, render_page
from .terminal import ranking, say

BODY_SECONDS = 30.0  # until a request's body has come
BODIES_HELD = 8  # times the most megabytes of one request: what the bodies of all may take at once
RETRY_SECONDS = "1"
DRAINED, DRAIN_SECONDS = 4, 10.0  # of a refused body: times the most bytes of one, and for how long
LATER = "Ask again in a moment."
UNNAMED = "picture"  # one that is sent without a name
HOW = "Send one picture as the body, or several as files of a form: curl -F picture=@photo.jpg .../predict"
_FORM = "multipart/form-data"
# What programs say of bytes they know nothing about; the last one is curl's word for any --data-binary.
_PLAIN_BYTES = ("", "application/octet-stream", "application/x-www-form-urlencoded")
_CLOSED_POLICY = "default-src 'none'; frame-ancestors 'none'"
_SAFE_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}

File = tuple[str, bytes]
"""A picture's name, as its sender calls it, and its bytes."""


def application(
    answers: Answers, facts: Mapping[str, Any], caps: Caps, hosts: Collection[str] | None, proxies: Collection[str] = ()
) -> Starlette:
    """The application; see `serving.serve` for what it answers.

    Args:
        facts: what `GET /model` tells.
        hosts: its own names, by which browsers may call it (the `Host` of a request, without the port); None takes any.
        proxies: names by which a proxy in front is called, whose pages may ask under whatever name of ours.
    """
    desk = _Desk(answers, caps)
    page = render_page(facts, caps.max_bytes)

    async def show(request: Request) -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": f"{PAGE_POLICY}; frame-ancestors 'none'"})

    async def tell_model(request: Request) -> Response:
        return _json(facts)

    async def tell_health(request: Request) -> Response:
        return _json({"status": "ok"})

    @asynccontextmanager
    async def alive(_: Starlette) -> AsyncIterator[None]:
        yield
        answers.close()

    app = Starlette(
        routes=[
            Route("/", show),
            Route("/model", tell_model),
            Route("/health", tell_health),
            Route("/predict", desk.predict, methods=["POST"]),
        ],
        middleware=[Middleware(_Door, hosts=hosts, proxies=proxies)],
        exception_handlers={
            HTTPException: _refused,
            ClientDisconnect: _gone,
            Ended: lambda *_: _ending(),
            Exception: _failed,
        },
        lifespan=alive,
    )
    app.router.redirect_slashes = False  # to an address that the client has made up
    return app


def _json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    # ASCII: names that are no Unicode travel as lone surrogates.
    return Response(json.dumps(value), status, headers, media_type="application/json")


def _refuse(status: int, words: str, **headers: str) -> NoReturn:
    raise HTTPException(status, words, {name.replace("_", "-"): text for name, text in headers.items()})


def _refused(request: Request, error: Exception) -> Response:
    """A refusal in JSON; the router's own gets words that say what to do."""
    assert isinstance(error, HTTPException)
    words, allowed = error.detail, (error.headers or {}).get("Allow")
    if error.status_code == 404:
        words = "There is nothing at this path. There is: GET /, POST /predict, GET /model, GET /health."
    elif allowed:
        takes = " or ".join(sorted(allowed.split(", ")))
        words = f"{request.method[:20]} is not for this path; it takes {takes}."
    return _json({"error": words}, error.status_code, error.headers)


def _gone(request: Request, error: Exception) -> Response:
    return _json({"error": "The request ended before its body had come."}, 400)  # which nobody reads


def _failed(request: Request, error: Exception) -> Response:
    """What is wrong on our side: told here, and to the client without the reason."""
    words = str(error) if isinstance(error, HeadstartError) else in_words(error)
    say(f"headstart serve: a request could not be answered: {words}")
    return _json({"error": "The server could not answer; its terminal says why."}, 500)


class _Door:
    """In front of all paths: whom a browser means to ask, which page asks, and headers that keep answers to
    themselves."""

    def __init__(self, app: ASGIApp, hosts: Collection[str] | None, proxies: Collection[str]) -> None:
        own = {name.lower() for name in hosts or ()}
        # A page of our own name may be another port's, which is none of ours, whatever the proxies are called.
        self._proxies = {name.lower() for name in proxies} - own
        self._app, self._hosts = app, None if hosts is None else own | self._proxies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        has_begun = False

        async def send_safely(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.setdefault("Content-Security-Policy", _CLOSED_POLICY)
                headers.update(_SAFE_HEADERS)
            await send(message)

        why = self._refusal(scope["method"], Headers(scope=scope))
        app = self._app if why is None else _json({"error": why}, 403)
        try:
            await app(scope, receive, send_safely)
        except asyncio.CancelledError:  # by the server, which waits no longer
            if has_begun:
                raise
            await _ending()(scope, receive, send_safely)

    def _refusal(self, method: str, headers: Headers) -> str | None:
        """Why the request is none of ours.

        A page from elsewhere may have its own name resolved to this machine and then ask it as if it were its own
        (DNS rebinding): it is found out by the Host. Or it may post to this address: by the Origin.
        """
        host = headers.get("host", "").lower()
        if self._hosts is not None and _name_of(host) not in self._hosts:
            known = ", ".join(sorted(self._hosts))
            return f"Host {host[:100]!r} is not served here. Ask for one of these: {known}."
        origin = headers.get("origin")
        if method in ("GET", "HEAD") or origin is None:
            return None
        asker = origin.lower().partition("://")[2]
        if asker != host and _name_of(asker) not in self._proxies:
            return f"A page of {origin[:100]!r} may not ask this server. Ask from its own page, or from a program."
        return None


def _ending() -> Response:
    """To who asks at the end."""
    words = "The server is being ended. Ask again in a moment."
    return _json({"error": words}, 503, {"Retry-After": RETRY_SECONDS})


def _name_of(host: str) -> str:
    """The name in a Host header, without the port: `::1` of `[::1]:8000`."""
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]


@dataclass(eq=False)
class _Body:
    """What has come of a request's body: `size` bytes, in `data` until its pictures are taken out.

    limit: until when the rest may come, while it does. is_dropped: the request is given up.
    """

    data: bytearray = field(default_factory=bytearray)
    size: int = 0
    limit: asyncio.Timeout | None = None
    is_dropped: bool = False


@dataclass
class _Desk:
    """Where pictures are taken in; `waiting` requests are in hand, whose and others' bodies take `held` bytes."""

    answers: Answers
    caps: Caps
    waiting: int = field(default=0, init=False)
    held: int = field(default=0, init=False)
    _bodies: list[_Body] = field(default_factory=list, init=False)

    async def predict(self, request: Request) -> Response:
        top = _top(request)
        kind, options = parse_options_header(request.headers.get("content-type", ""))
        what = kind.decode("latin-1")
        if what != _FORM and what not in _PLAIN_BYTES and not what.startswith("image/"):
            _refuse(415, f"{what[:100]} is no picture. {HOW}")
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            _refuse(415, f"The body is packed (Content-Encoding). Send it as it is. {HOW}")
        if self._is_full():
            await self._refuse_after(request, *self._full())
        with self._body_held() as body:
            await self._read(request, body)
            if self._is_full():
                _refuse(*self._full(), Retry_After=RETRY_SECONDS)
            self.waiting += 1
            try:
                files = await asyncio.to_thread(self._files, body.data, what, options.get(b"boundary", b""))
                body.data.clear()  # they hold the bytes now
                told = await self.answers.of([data for _, data in files])
                return await asyncio.to_thread(_told, files, told, top)
            finally:
                self.waiting -= 1

    def _files(self, data: bytearray, what: str, boundary: bytes) -> list[File]:
        if what == _FORM:
            return form_files(data, boundary, self.caps.max_pictures)
        if not data:
            _refuse(400, f"There is no picture in the request. {HOW}")
        return [(UNNAMED, bytes(data))]

    async def _read(self, request: Request, body: _Body) -> None:
        """Take the body in, which says how long it is, or does not, or lies."""
        said = request.headers.get("content-length", "")
        if said.isdecimal() and (len(said) > 12 or int(said) > self.caps.max_bytes):
            await self._refuse_after(request, *self._long())
        try:
            async with asyncio.timeout(BODY_SECONDS) as body.limit:
                async for chunk in request.stream():
                    if body.size + len(chunk) > self.caps.max_bytes:
                        await self._refuse_after(request, *self._long())
                    if self.held + len(chunk) > BODIES_HELD * self.caps.max_bytes and not self._drop_the_oldest(body):
                        most = BODIES_HELD * self.caps.max_megabytes
                        words = f"Too many bytes at once; all requests together may take {most} MB. {LATER}"
                        await self._refuse_after(request, 503, words)
                    body.data += chunk
                    body.size += len(chunk)
                    self.held += len(chunk)
        except TimeoutError:
            if body.is_dropped:
                _refuse(503, f"Others wait for this request's place. {LATER}", Retry_After=RETRY_SECONDS)
            late = f"The body had not come after {BODY_SECONDS:g} seconds. Send smaller pictures, or fewer at once."
            _refuse(408, late, Connection="close")
        finally:
            body.limit = None

    def _drop_the_oldest(self, asking: _Body) -> bool:
        """Give up the body that has been coming for longest, if it is not this one: slow ones keep no others out."""
        coming = [body for body in self._bodies if body.limit is not None and not body.is_dropped]
        if not coming or coming[0] is asking:
            return False
        assert coming[0].limit is not None
        coming[0].is_dropped = True
        coming[0].limit.reschedule(asyncio.get_running_loop().time())
        return True

    @contextmanager
    def _body_held(self) -> Iterator[_Body]:
        body = _Body()
        self._bodies.append(body)
        try:
            yield body
        finally:
            self._bodies.remove(body)
            self.held -= body.size

    def _is_full(self) -> bool:
        """Whether all places are taken; only who has sent its body whole takes one: slow ones keep no others out."""
        return self.waiting >= self.caps.max_waiting

    def _full(self) -> tuple[int, str]:
        return 503, f"Too many requests at once; {self.caps.max_waiting} may wait. {LATER}"

    def _long(self) -> tuple[int, str]:
        return 413, f"A request may take {self.caps.max_megabytes} MB. Send smaller pictures, or fewer at once."

    async def _refuse_after(self, request: Request, status: int, words: str) -> NoReturn:
        """Refuse once the rest of the body has come, or enough of it: a connection that is closed while its client
        sends loses the answer. Who waits to be told to go on (`Expect`) gets it at once."""
        left = DRAINED * self.caps.max_bytes
        if "expect" not in request.headers:
            with suppress(TimeoutError, RuntimeError):  # the second: it has come already
                async with asyncio.timeout(DRAIN_SECONDS):
                    async for chunk in request.stream():
                        left -= len(chunk)
                        if left < 0:
                            break
        _refuse(status, words, **({"Retry_After": RETRY_SECONDS} if status == 503 else {}))


def _top(request: Request) -> int | None:
    """How many classes are named, as `?top=` says; None is all."""
    odd = [name for name in request.query_params if name != "top"]
    if odd:
        _refuse(400, f"{odd[0][:100]!r} is no option of /predict; there is ?top=K, for the K most probable classes.")
    text = request.query_params.get("top")
    if text is None:
        return None
    if not text.isascii() or not text.isdecimal() or not 0 < len(text) < 10 or int(text) < 1:
        _refuse(400, f"top is {text[:100]!r}; it takes a whole number from 1.")
    return int(text)


def _told(files: Sequence[File], told: Sequence[Mapping[str, Any]], top: int | None) -> Response:
    """The answer; a picture that cannot be read has its error in its place."""
    rows: list[dict[str, Any]] = []
    for (name, _), row in zip(files, told, strict=True):
        shown = {"probs": dict(ranking(row, top))} if top and "probs" in row else {}
        rows.append({"name": name, **row, **shown})
    return _json({"predictions": rows}, 422 if all("error" in row for row in rows) else 200)


def form_files(body: bytes | bytearray, boundary: bytes, most: int) -> list[File]:
    """The files of a form, in its order, in memory.

    Args:
        most: how many there may be.
    Raises:
        HTTPException: with status 400 or 413: it is no such form, holds none, too many, or something that is no file.
    """
    parts = _Parts(most)
    try:
        parser = MultipartParser(boundary, parts.callbacks())
        parser.write(body)  # type: ignore[arg-type]
        parser.finalize()
    except ValueError as error:
        _refuse(400, f"The form cannot be read ({str(error)[:200] or 'no boundary'}). {HOW}")
    if not parts.files or not parts.is_whole:
        _refuse(400, f"There is no picture in the form, or it is cut off. {HOW}")
    return parts.files


class _Parts:
    """The parts of a form as they are found."""

    def __init__(self, most: int) -> None:
        self.files: list[File] = []
        self.is_whole = False
        self._most, self._field, self._value = most, b"", b""
        self._disposition, self._name, self._data = b"", "", bytearray()

    def callbacks(self) -> Any:
        """What the parser calls."""
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._add_to_field,
            "on_header_value": self._add_to_value,
            "on_header_end": self._end_header,
            "on_headers_finished": self._end_headers,
            "on_part_data": self._add_data,
            "on_part_end": self._end,
            "on_end": self._end_form,
        }

    def _begin(self) -> None:
        if len(self.files) >= self._most:
            _refuse(413, f"A request may hold {self._most} pictures. Send fewer at once.")
        self._disposition, self._data = b"", bytearray()

    def _add_to_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def _add_to_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        if self._field.lower() == b"content-disposition":
            self._disposition = self._value
        self._field = self._value = b""

    def _end_headers(self) -> None:
        _, options = parse_options_header(self._disposition)
        name = options.get(b"filename")
        if name is None:
            what = options.get(b"name", b"").decode("utf-8", "replace")[:100]
            _refuse(400, f"Part {what!r} of the form is no file. {HOW}")
        self._name = name.decode("utf-8", "replace") or UNNAMED

    def _add_data(self, data: bytes, start: int, end: int) -> None:
        self._data += data[start:end]

    def _end(self) -> None:
        self.files.append((self._name, bytes(self._data)))

    def _end_form(self) -> None:
        self.is_whole = True
