"""`headstart serve`: the same answers as `predict`, whoever asks meanwhile; what strangers send is refused in words."""

from __future__ import annotations

import asyncio
import http.client
import io
import json
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
from PIL import Image

from browser import start_browser
from conftest import make_picture
from headstart import create_classifier, load, make_app, predict_files, save, serve
from headstart.cli import main
from headstart.dataset import bad_reasons
from headstart.errors import CheckpointError, HeadstartError, RecipeError, SetupError
from headstart.evaluation import predict_features, unlabelled
from headstart.familiar import FILE, Familiar
from headstart.intake import Viewers
from headstart.pixels import Pixels
from headstart.transforms import load_view

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

NAMES = ("<img src=x onerror=alert(1)>", "caf\u00e9 & 'co'", "\u05d7\u05ea\u05d5\u05dc")
TEST = {"n": 40, "accuracy": 0.925, "accuracy_ci95": [0.801, 0.974], "majority_baseline": 0.5, "log_loss": 0.2}
MACHINE: dict[str, Any] = {"device": "cpu", "workers": 1}
LOCAL = ("Host", "127.0.0.1:8000")
BOUNDARY = "xyz"
FORM = ("Content-Type", f"multipart/form-data; boundary={BOUNDARY}")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model with a score, and with class names that are no plain letters."""
    folder = tmp_path_factory.mktemp("serving") / "first"
    save(create_classifier("test_resnet", NAMES, weights="none", image_size=32), folder)
    (folder / "metrics.json").write_text(json.dumps({"test": TEST}), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def app(run: Path) -> Iterator[Any]:
    with made(run) as application:
        yield application


class made:  # noqa: N801
    """An application whose processes end with the block."""

    def __init__(self, run: Path, **options: Any) -> None:
        self.app = make_app(run, **MACHINE, **options)

    def __enter__(self) -> Any:
        return self.app

    def __exit__(self, *_: object) -> None:
        async def end() -> None:
            async with self.app.router.lifespan_context(self.app):
                pass

        asyncio.run(end())


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Pictures of the kinds that programs disagree about."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    turned, plain = Image.Exif(), make_picture(rng, 0, (60, 40))
    turned[0x0112] = 6
    plain.save(folder / "plain.jpg", quality=90)
    plain.save(folder / "turned.jpg", exif=turned)
    rgba = np.dstack([np.asarray(plain), rng.integers(0, 256, (40, 60), dtype=np.uint8)])
    Image.fromarray(rgba).save(folder / "clear.png")
    Image.fromarray(rng.integers(0, 65536, (50, 70), dtype=np.uint16)).save(folder / "grey16.png")
    plain.convert("CMYK").save(folder / "cmyk.jpg")
    plain.convert("P").save(folder / "palette.gif")
    plain.save(folder / "scan.tiff")
    plain.save(folder / "small.webp", lossless=True)
    return sorted(folder.iterdir())


# ---- a client without a network --------------------------------------------------------------------------------


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        return str(self.json["error"])


async def call(
    app: Any,
    method: str,
    target: str,
    *headers: tuple[str, str],
    body: Iterable[bytes] | AsyncIterator[bytes] | bytes = b"",
) -> Answer:
    """What the application answers; the body comes in these pieces."""
    pieces = body if hasattr(body, "__anext__") else iter([body] if isinstance(body, bytes) else body)
    path, _, query = target.partition("?")
    given = headers if any(name == "Host" for name, _ in headers) else (LOCAL, *headers)
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http",
        "path": path, "raw_path": path.encode(), "query_string": query.encode(), "root_path": "",
        "headers": [(name.lower().encode(), value.encode("latin-1")) for name, value in given],
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8000),
    }  # fmt: skip

    async def receive() -> dict[str, Any]:
        try:
            piece = await anext(pieces) if hasattr(pieces, "__anext__") else next(pieces)
        except (StopIteration, StopAsyncIteration):
            return {"type": "http.request", "body": b"", "more_body": False}
        return {"type": "http.request", "body": piece, "more_body": True}

    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await app(scope, receive, send)
    heads = {name.decode().lower(): value.decode("latin-1") for name, value in sent[0]["headers"]}
    return Answer(sent[0]["status"], heads, b"".join(message.get("body", b"") for message in sent[1:]))


def ask(app: Any, method: str, target: str, *headers: tuple[str, str], **body: Any) -> Answer:
    return asyncio.run(call(app, method, target, *headers, **body))


def form(files: Sequence[tuple[str, bytes]], field: str = "picture") -> bytes:
    """Files as a browser sends them."""
    parts = [
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{field}"; filename="'.encode()
        + name.encode("utf-8", "surrogateescape")
        + b'"\r\nContent-Type: image/jpeg\r\n\r\n'
        + data
        + b"\r\n"
        for name, data in files
    ]
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()


def jpeg(seed: int = 0) -> bytes:
    out = io.BytesIO()
    make_picture(np.random.default_rng(seed), seed % 3).save(out, "JPEG")
    return out.getvalue()


def huge_by_header() -> bytes:
    """A PNG file of a few bytes that promises 10,000 megapixels."""
    import struct
    import zlib

    head = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + head
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + b"\0" * 40


# ---- answers ---------------------------------------------------------------------------------------------------


def test_answers_are_those_of_predict_to_the_bit(app: Any, run: Path, pictures: list[Path]) -> None:
    rows = predict_files(run, pictures, **MACHINE)
    told = ask(app, "POST", "/predict", FORM, body=form([(path.name, path.read_bytes()) for path in pictures]))
    assert told.status == 200
    wanted = [
        {"name": path.name} | {k: row[k] for k in row if k != "path"} for path, row in zip(pictures, rows, strict=True)
    ]
    assert told.json["predictions"] == wanted
    assert len({json.dumps(row["probs"]) for row in rows}) > 4  # they differ


def test_one_picture_as_the_body(app: Any, run: Path, pictures: list[Path]) -> None:
    row = predict_files(run, pictures[0], **MACHINE)[0]
    kinds: list[list[tuple[str, str]]] = [
        [], [("Content-Type", "image/jpeg")], [("Content-Type", "application/octet-stream")],
        [("Content-Type", "application/x-www-form-urlencoded")],
    ]  # fmt: skip
    for headers in kinds:
        told = ask(app, "POST", "/predict", *headers, body=pictures[0].read_bytes())
        assert told.json["predictions"] == [{"name": "picture"} | {k: row[k] for k in row if k != "path"}]


def test_top_names_the_most_probable_alone(app: Any) -> None:
    whole = ask(app, "POST", "/predict", body=jpeg()).json["predictions"][0]
    told = ask(app, "POST", "/predict?top=2", body=jpeg()).json["predictions"][0]
    best = sorted(whole["probs"].items(), key=lambda item: -item[1])[:2]
    assert list(told["probs"].items()) == best
    assert (told["pred"], told["prob"]) == best[0]
    for odd in ("0", "-1", "x", "", "1" * 5000, "\u0663", "1.5"):
        assert "whole number" in ask(app, "POST", f"/predict?top={odd}", body=jpeg()).error
    assert "no option" in ask(app, "POST", "/predict?tpo=2", body=jpeg()).error


def test_what_cannot_be_read_is_told_in_its_place(app: Any, tmp_path: Path) -> None:
    bad = [b"", b"<html>no", jpeg()[:400], huge_by_header(), b"\x89PNG\r\n\x1a\n"]
    files = [tmp_path / str(i) for i in range(len(bad))]
    for path, data in zip(files, bad, strict=True):
        path.write_bytes(data)
    reasons = bad_reasons(files, workers=1)
    assert None not in reasons
    told = ask(
        app, "POST", "/predict", FORM, body=form([("a", bad[0]), ("good", jpeg()), *(("b", x) for x in bad[1:])])
    )
    assert told.status == 200
    rows = told.json["predictions"]
    assert [row.get("error") for row in rows] == [reasons[0], None, *reasons[1:]]
    assert rows[1]["name"] == "good"
    for data, reason in zip(bad[1:], reasons[1:], strict=True):
        told = ask(app, "POST", "/predict", body=data)
        assert (told.status, told.json) == (422, {"predictions": [{"name": "picture", "error": reason}]})


def test_views_of_the_processes_are_the_one_view(run: Path, pictures: list[Path]) -> None:
    spec = load(run).spec
    viewers = Viewers(spec, 2)
    with ThreadPoolExecutor(4) as pool:
        views = list(pool.map(viewers.view, [path.read_bytes() for path in pictures] * 3))
    for view, path in zip(views, pictures * 3, strict=True):
        assert np.array_equal(view, load_view(path, spec).numpy())
    for seat in viewers._crew._seats:  # what crashed a decoder costs that picture alone
        if seat.worker is not None:
            seat.worker.kill()
    assert not isinstance(viewers.view(pictures[0].read_bytes()), str)
    viewers.close()
    viewers.close()
    assert viewers.view(pictures[0].read_bytes()) == "the work was stopped"


def test_who_asks_at_once_gets_the_answer_of_who_asks_alone(app: Any) -> None:
    bodies = [form([(f"{i}-{k}", jpeg(10 * i + k)) for k in range(1 + i % 4)]) for i in range(8)]
    alone = [ask(app, "POST", "/predict", FORM, body=body).body for body in bodies]

    async def together() -> list[bytes]:
        return [
            one.body for one in await asyncio.gather(*(call(app, "POST", "/predict", FORM, body=b) for b in bodies))
        ]

    assert asyncio.run(together()) == alone


def test_the_model_and_its_score(app: Any) -> None:
    told = ask(app, "GET", "/model").json
    assert told["class_names"] == list(NAMES)
    assert (told["name"], told["backbone"], told["preprocessing"]["image_size"]) == ("first", "test_resnet", 32)
    assert told["test"] == {key: TEST[key] for key in ("n", "accuracy", "accuracy_ci95", "majority_baseline")}
    assert ask(app, "GET", "/health").json == {"status": "ok"}


def test_a_model_in_memory_is_copied(run: Path) -> None:
    model = load(run)
    with made(model) as application:
        before = ask(application, "POST", "/predict", body=jpeg()).body
        for parameter in model.parameters():
            parameter.data.zero_()
        predict_files(model, Image.new("RGB", (8, 8)), **MACHINE)  # and is free for others
        assert ask(application, "POST", "/predict", body=jpeg()).body == before
        assert ask(application, "GET", "/model").json["test"] is None


# ---- the page --------------------------------------------------------------------------------------------------


def test_the_page_loads_nothing_and_names_are_escaped(app: Any) -> None:
    told = ask(app, "GET", "/")
    text = told.body.decode()
    assert told.headers["content-type"].startswith("text/html")
    assert not re.search(r"""(?:src|href|url)\s*[=(]\s*["']?(?!data:)[\w/.:]+""", text.replace("&lt;img src=x", ""))
    assert "://" not in text
    assert NAMES[0] not in text
    assert "&lt;img src=x onerror=alert(1)&gt;" in text
    assert "80.1 to 97.4" in text
    policy = told.headers["content-security-policy"]
    inside = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert inside
    assert policy == f"{inside[1]}; frame-ancestors 'none'"
    assert "default-src 'none'" in policy
    assert "script-src 'sha256-" in policy


@pytest.mark.parametrize("target", ["/", "/model", "/nothing", "/predict"])
def test_every_answer_keeps_to_itself(app: Any, target: str) -> None:
    headers = ask(app, "GET", target, ("Origin", "http://evil.example")).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "DENY"
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert not [name for name in headers if name.startswith("access-control")]


# ---- what strangers send ---------------------------------------------------------------------------------------

TRAVERSAL = (
    "../../../../etc/passwd", "..\\..\\..\\windows\\win.ini", "C:\\Users\\a\\b.jpg", "\\\\server\\share\\x.png",
    "/etc/passwd", "file:///etc/passwd", "http://127.0.0.1:1/x.jpg", "%2e%2e%2fetc%2fpasswd", "a\0b.jpg", "..",
    "....//....//x", "C:x.jpg", "CON", "x.jpg::$DATA", "~root/.ssh/id_rsa", "<script>alert(1)</script>.jpg", "\udcff",
)  # fmt: skip


def test_names_are_repeated_and_never_opened(app: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ask(app, "POST", "/predict", body=jpeg())  # processes are started now
    monkeypatch.chdir(tmp_path)
    opened: list[object] = []
    watching = [True]

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        if watching and event in ("open", "socket.connect", "subprocess.Popen", "os.remove", "os.rename"):
            opened.append(arguments)

    sys.addaudithook(watch)
    for name in TRAVERSAL:
        told = ask(app, "POST", "/predict", FORM, body=form([(name, jpeg())]))
        assert told.status == 200
        said = told.json["predictions"][0]["name"]
        assert said == name.replace("\udcff", "\ufffd") or name.endswith("\\" + said)
    watching.clear()
    assert opened == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", [*TRAVERSAL[:12], "predict/", "predict/../model", "static/x", "favicon.ico"])
def test_paths_lead_nowhere(app: Any, path: str) -> None:
    for method in ("GET", "POST", "DELETE"):
        told = ask(app, method, "/" + path)
        assert told.status == 404
        assert "POST /predict" in told.error


@pytest.mark.parametrize(
    ("method", "target", "takes"),
    [("GET", "/predict", "POST"), ("POST", "/", "GET or HEAD"), ("PUT", "/model", "GET or HEAD")],
)
def test_a_wrong_method_is_told_the_right_one(app: Any, method: str, target: str, takes: str) -> None:
    told = ask(app, method, target)
    assert told.status == 405
    assert f"it takes {takes}." in told.error


def test_wrong_contents_are_told(app: Any) -> None:
    text = ("Content-Type", "application/json")
    assert (told := ask(app, "POST", "/predict", text, body=b"{}")).status == 415
    assert "curl" in told.error
    assert ask(app, "POST", "/predict").status == 400
    field = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="url"\r\n\r\nhttp://127.0.0.1/\r\n--{BOUNDARY}--'
    for body, words in (
        (field.encode(), "Part 'url' of the form is no file"),
        (b"", "no picture in the form"),
        (form([]), "no picture"),
        (form([("a", jpeg())])[:-30], "cut off"),
        (form([("a", jpeg())])[: -len("--\r\n")] + b"\r\n", "cut off"),
        (b"--other\r\n\r\n", "cannot be read"),
    ):
        told = ask(app, "POST", "/predict", FORM, body=body)
        assert told.status == 400
        assert words in told.error
    bare = ("Content-Type", "multipart/form-data")
    assert ask(app, "POST", "/predict", bare, body=form([("a", jpeg())])).status == 400


def malformed(rng: random.Random, seeds: Sequence[bytes]) -> tuple[list[tuple[str, str]], list[bytes], str]:
    """A request that something is wrong with: headers, the body in pieces, the target."""
    body = bytearray(rng.choice(seeds))
    for _ in range(rng.randrange(1, 6)):
        at = rng.randrange(len(body) + 1)
        kind = rng.randrange(6)
        if kind == 0:
            del body[at : at + rng.randrange(1, 80)]
        elif kind == 1:
            body[at:at] = rng.choice(
                [b"\r\n", b"--xyz", b"--xyz--", b"\0", b"\r\n\r\n", b";", b'"', b"\xff" * 5, b"=" * 70]
            )
        elif kind == 2 and body:
            body[at % len(body)] = rng.randrange(256)
        elif kind == 3:
            del body[at:]
        elif kind == 4:
            body += rng.choice(seeds)[: rng.randrange(200)]
        else:
            body[at:at] = rng.randbytes(rng.randrange(40))
    kinds = (
        FORM[1], FORM[1], FORM[1], "multipart/form-data", "multipart/form-data; boundary=", "image/png", "",
        'multipart/form-data; boundary="' + "x" * 300, "multipart/form-data; charset=utf-99; boundary=xyz", "text/html",
        "multipart/mixed; boundary=xyz", "image/jpeg; q=\xff", ";;;", "MULTIPART/FORM-DATA; BOUNDARY=xyz",
        "multipart/form-data; boundary*=utf-8''xyz",
    )  # fmt: skip
    headers = [("Content-Type", rng.choice(kinds))]
    if rng.random() < 0.2:
        headers.append(("Content-Length", rng.choice(["0", "-1", "9" * 5000, "abc", "7", "\u00b2", ""])))
    if rng.random() < 0.05:
        headers.append(("Origin", rng.choice(["null", "", "http://", "http://127.0.0.1:8000", "\xff"])))
    if rng.random() < 0.05:
        headers.append(("Host", rng.choice(["", "[", "]", "[::1", "localhost:x", "127.0.0.1:", "a" * 999, "\xff"])))
    cut = rng.randrange(len(body) + 1)
    return (
        headers,
        [bytes(body[:cut]), bytes(body[cut:])],
        rng.choice(["/predict", "/predict", "/predict?top=1", "/predict?a"]),
    )


def test_malformed_requests_are_refused_in_json(app: Any) -> None:
    rng = random.Random(0)
    small = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(small, "PNG")
    seeds = [form([("a.png", small.getvalue())]), form([("a", b"x"), ("b", small.getvalue())]), small.getvalue()]

    async def all_of_them() -> dict[int, int]:
        counts: dict[int, int] = {}
        for number in range(3000):
            headers, pieces, target = malformed(rng, seeds)
            told = await call(app, "POST", target, *headers, body=pieces)
            assert told.status < 500, (number, told)
            assert isinstance(told.json, dict), number
            assert "Traceback" not in told.body.decode()
            counts[told.status] = counts.get(told.status, 0) + 1
        return counts

    counts = asyncio.run(all_of_them())
    assert {200, 400, 403, 413, 415, 422} <= {*counts}, counts


# ---- caps ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("said", [None, "10", "99999999999", "2000001"])
def test_a_body_is_read_up_to_its_cap(run: Path, said: str | None) -> None:
    taken = []

    def endless() -> Iterator[bytes]:
        while True:
            taken.append(1)
            yield b"x" * 100_000

    headers = [] if said is None else [("Content-Length", said)]
    with made(run, max_megabytes=2) as application:
        told = ask(application, "POST", "/predict", *headers, body=endless())
        assert told.status == 413
        assert "2 MB" in told.error
        # The rest is taken and thrown away, up to four times the cap: who still sends loses the answer.
        assert len(taken) == 81 + (21 if said in (None, "10") else 0)
        if said not in (None, "10"):  # who asks before it sends is told at once
            taken.clear()
            expects = ("Expect", "100-continue")
            assert ask(application, "POST", "/predict", expects, *headers, body=endless()).status == 413
            assert not taken
        assert ask(application, "POST", "/predict", body=b"x" * 2_000_000).status == 422  # and what was held is let go


def test_so_many_pictures_and_no_more(run: Path) -> None:
    with made(run, max_pictures=2) as application:
        assert ask(application, "POST", "/predict", FORM, body=form([("a", jpeg())] * 2)).status == 200
        told = ask(application, "POST", "/predict", FORM, body=form([("a", jpeg())] * 3))
    assert told.status == 413
    assert "2 pictures" in told.error


def test_who_comes_when_all_places_are_taken_is_sent_away(run: Path) -> None:
    async def later() -> AsyncIterator[bytes]:
        await asyncio.sleep(0.05)  # by then all have begun
        yield jpeg()

    async def three(body: Callable[[], Any] = jpeg) -> list[Answer]:
        return await asyncio.gather(*(call(application, "POST", "/predict", body=body()) for _ in range(3)))

    with made(run, max_waiting=2) as application:
        assert sorted(one.status for one in asyncio.run(three(later))) == [200, 200, 503]
        told = asyncio.run(three())
        assert sorted(one.status for one in told) == [200, 200, 503]
        busy = next(one for one in told if one.status == 503)
        assert busy.headers["retry-after"] == "1"
        assert [one.status for one in asyncio.run(three())].count(200) == 2  # places are free again


def test_bodies_that_are_held_have_a_cap_together(run: Path) -> None:
    async def slow(go: asyncio.Event) -> AsyncIterator[bytes]:
        yield b"x" * 900_000
        await go.wait()

    async def many() -> list[int]:
        go = asyncio.Event()
        first = [asyncio.create_task(call(application, "POST", "/predict", body=slow(go))) for _ in range(12)]
        async with asyncio.timeout(20):
            while sum(one.done() for one in first) < 4:
                await asyncio.sleep(0.01)
        done = [one.result().status for one in first if one.done()]
        small = await call(application, "POST", "/predict", body=jpeg())  # fits in
        go.set()
        return [small.status, *done, *(one.status for one in await asyncio.gather(*first))]

    with made(run, max_megabytes=1) as application:
        statuses = asyncio.run(many())  # those that have been coming for longest make room
        assert statuses == [200, 503, 503, 503, 503, 503, 503, 503, 503, *[422] * 8]
        assert asyncio.run(many()) == statuses


def test_a_body_that_does_not_come_is_not_waited_for(app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from headstart import serving_app

    monkeypatch.setattr(serving_app, "BODY_SECONDS", 0.1)

    async def dripping() -> AsyncIterator[bytes]:
        while True:
            yield b"x"
            await asyncio.sleep(0.02)

    told = ask(app, "POST", "/predict", body=dripping())
    assert told.status == 408
    assert told.headers["connection"] == "close"


# ---- other pages -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("127.0.0.1:8000", None, 200),
        ("LocalHost:8000", "http://localhost:8000", 200),
        ("[::1]:8000", "http://[::1]:8000", 200),
        ("127.0.0.1:8000", "http://127.0.0.1:8001", 403),
        ("127.0.0.1:8000", "https://evil.example", 403),
        ("127.0.0.1:8000", "null", 403),
        ("127.0.0.1:8000", "", 403),
        ("evil.example:8000", "http://evil.example:8000", 403),
        ("127.0.0.1.evil.example", None, 403),
        ("", None, 403),
    ],
)
def test_pages_from_elsewhere_cannot_ask(app: Any, host: str, origin: str | None, status: int) -> None:
    headers = [("Host", host)] + ([] if origin is None else [("Origin", origin)])
    told = ask(app, "POST", "/predict", *headers, body=jpeg())
    assert told.status == status
    assert status == 200 or told.error


def test_rebinding_reads_nothing_and_other_names_are_a_choice(run: Path, app: Any) -> None:
    assert ask(app, "GET", "/model", ("Host", "evil.example")).status == 403
    with made(run, allow_hosts=["Pictures.example"]) as application:
        assert ask(application, "GET", "/model", ("Host", "pictures.example")).status == 200
        for host in ("pictures.example", "127.0.0.1:8000"):  # a proxy may call us by our own name
            for origin, status in (("https://pictures.example", 200), ("https://evil.example", 403)):
                told = ask(application, "POST", "/predict", ("Host", host), ("Origin", origin), body=jpeg())
                assert told.status == status
    for name in ("https://x.example", "x.example/", "x.example:80", "[::2]:80", "x.example ", "*.x.example", ""):
        with pytest.raises(RecipeError, match="Give the host name alone"):
            make_app(run, allow_hosts=[name])
    for name in ("::2", "[::2]", "0:0::2"):
        with made(run, allow_hosts=[name]) as application:
            assert ask(application, "GET", "/health", ("Host", "[::2]:8000")).status == 200
    with made(run, allow_hosts=None) as application:
        assert ask(application, "GET", "/model", ("Host", "any.example")).status == 200
        told = ask(application, "POST", "/predict", ("Host", "a"), ("Origin", "http://b"), body=jpeg())
        assert told.status == 403


def test_a_page_of_another_port_of_its_own_address_may_not_ask(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from headstart import serving_http

    said = []

    def asked(application: Any, listener: socket.socket) -> None:
        host = f"0.0.0.0:{listener.getsockname()[1]}"
        for origin in (f"http://{host}", "http://0.0.0.0:3000", "http://localhost:3000", "https://pictures.example"):
            told = ask(application, "POST", "/predict", ("Host", host), ("Origin", origin), body=jpeg())
            said.append(told.status)

    monkeypatch.setattr(serving_http, "run_server", asked)
    serve(run, host="0.0.0.0", port=0, allow_hosts=["pictures.example", "localhost"], device="cpu", workers=1)
    assert said == [200, 403, 403, 200]


@pytest.fixture(scope="module")
def wary(run: Path, pictures: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, to which the first pictures are familiar."""
    folder = Path(shutil.copytree(run, tmp_path_factory.mktemp("wary") / "first"))
    model = load(folder)
    _, features = predict_features(model, Pixels(unlabelled(pictures[:6], model), model.spec))
    Familiar.of(model, features, features).write(folder)
    return folder


def test_what_is_unknown_is_told_as_predict_tells_it(wary: Path, pictures: list[Path]) -> None:
    noise = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(noise, "PNG")
    files = [path.read_bytes() for path in pictures] + [noise.getvalue()]
    with made(wary, unknown=0.5) as application:
        assert ask(application, "GET", "/model").json["unknown"] == 0.5
        body = form([(f"{i}", data) for i, data in enumerate(files)])
        told = ask(application, "POST", "/predict?top=1", FORM, body=body).json["predictions"]
    (wary / "noise.png").write_bytes(files[-1])
    said = predict_files(wary, [*pictures, wary / "noise.png"], unknown=0.5, device="cpu")
    assert {one["unknown"] for one in said} == {True, False}
    kept = ("pred", "prob", "familiar", "unknown")
    assert [{k: one[k] for k in kept} for one in told] == [{k: one[k] for k in kept} for one in said]
    with made(wary) as application:
        assert "unknown" not in ask(application, "POST", "/predict", body=files[0]).json["predictions"][0]
        assert ask(application, "GET", "/model").json["unknown"] is None
    (wary / FILE).rename(wary / "elsewhere")
    with pytest.raises(CheckpointError, match="does not hold what its model has met"):
        make_app(wary, unknown=0.5, **MACHINE)
    (wary / "elsewhere").rename(wary / FILE)


def test_a_model_that_could_not_be_made_ready_is_made_ready_for_the_next(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from headstart import answering

    real, asked = answering.scoring, list[dict[str, Any]]()

    @contextmanager
    def full_at_first(*given: Any, **named: Any) -> Iterator[Any]:
        asked.append(named)
        if len(asked) == 1:
            raise SetupError("Out of memory.")
        with real(*given, **named) as logits_of:
            yield logits_of

    monkeypatch.setattr(answering, "scoring", full_at_first)
    with made(run) as application:
        with pytest.raises(SetupError, match="Out of memory"):  # which Starlette hands on behind its answer
            ask(application, "POST", "/predict", body=jpeg())
        assert [ask(application, "POST", "/predict", body=jpeg()).status for _ in range(2)] == [200, 200]
    assert len(asked) == 2


def test_who_asks_at_the_end_is_told_so(run: Path) -> None:
    async def ended() -> Answer:
        asked = asyncio.create_task(call(application, "POST", "/predict", body=jpeg()))
        await asyncio.sleep(0.001)
        asked.cancel()  # as Uvicorn does
        return await asked

    with made(run) as application:
        told = asyncio.run(ended())
    assert (told.status, told.headers["retry-after"]) == (503, "1")
    assert "is being ended" in told.error


def test_an_error_of_ours_is_told_here_and_not_there(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from headstart.answering import Answers

    async def broken(*_: object) -> None:
        raise RuntimeError("secret")

    sent: list[bytes] = []
    monkeypatch.setattr(Answers, "of", broken)
    with made(run) as application:

        async def keep(scope: Any, receive: Any, send: Callable[[Any], Awaitable[None]]) -> None:
            async def noting(message: dict[str, Any]) -> None:
                sent.append(message.get("body", b""))
                await send(message)

            await application(scope, receive, noting)

        with pytest.raises(RuntimeError):  # a server notes it
            ask(keep, "POST", "/predict", body=jpeg())
        assert ask(application, "GET", "/health").status == 200
    assert json.loads(b"".join(sent)) == {"error": "The server could not answer; its terminal says why."}
    assert "RuntimeError: secret" in capsys.readouterr().err


# ---- the call --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"port": 65536}, RecipeError, "port is 65536"),
        ({"port": -1}, RecipeError, "from 0 to 65535"),
        ({"max_pictures": 0}, RecipeError, "max_pictures is 0"),
        ({"max_waiting": True}, RecipeError, "max_waiting"),
        ({"max_megabytes": 10**9}, RecipeError, "max_megabytes"),
        ({"host": "no such host"}, SetupError, "not known here"),
        ({"max_megabytes": 501}, RecipeError, "max_megabytes"),
        ({"allow_hosts": "pictures.example"}, RecipeError, "a list of names"),
        ({"unknown": 1.5}, RecipeError, "a share between 0 and 1"),
        ({"allow_hosts": ["ok.example", "https://x.example/"]}, RecipeError, "Give the host name alone"),
        ({"host": ""}, SetupError, "0.0.0.0"),
        ({"host": "a" * 70 + ".b"}, SetupError, "not known here"),
        ({"host": "a\0b"}, SetupError, "not known here"),
        ({"host": "192.0.2.1"}, SetupError, "cannot be listened on"),
    ],
)
def test_what_is_wrong_with_the_call_is_told_before_the_model_is_read(
    run: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], kind: type[HeadstartError], words: str
) -> None:
    monkeypatch.setattr("headstart.serving.load", None)
    with pytest.raises(kind, match=re.escape(words)):
        serve(run, **({"port": 0} | options))


def test_a_folder_without_a_model_and_a_missing_package(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headstart.serving.load", None)
    with pytest.raises(CheckpointError, match="No model in"):
        serve(tmp_path)
    monkeypatch.setitem(sys.modules, "starlette", None)
    for call_it in (serve, make_app):
        with pytest.raises(SetupError, match=re.escape("pip install 'headstart[serve]'")):
            call_it(run)


def test_a_port_in_use_is_one_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", str(run), "--port", str(port), "--device", "cpu"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    words = f"Port {port} of 127.0.0.1 is in use. Give another one with --port; 0 takes a free one."
    assert said.err == f"headstart serve: error: {words}\n"


# ---- the command -----------------------------------------------------------------------------------------------


class Server:
    """The command in a process of its own."""

    def __init__(self, run: Path, *options: str) -> None:
        command = [sys.executable, "-W", "error", "-m", "headstart.cli", "serve", str(run), "--port", "0", *options]
        self.process = subprocess.Popen(
            [*command, "--device", "cpu", "--workers", "1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.line, self.example = self.process.stdout.readline(), self.process.stdout.readline()
        found = re.match(r"http://\S+:(\d+)/ ", self.line)
        assert found, self.end()
        self.port = int(found[1])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def post(self, body: bytes) -> bytes:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("POST", "/predict", body, dict([FORM]))
            answer = connection.getresponse()
            data = answer.read()
            assert answer.status == 200, data
            return data
        finally:
            connection.close()

    def end(self, kind: int = signal.SIGTERM) -> tuple[int, float, str, str]:
        """Exit code, seconds until the end, and the rest of what it said."""
        began = time.monotonic()
        self.process.send_signal(kind)
        out, err = self.process.communicate(timeout=20)
        return self.process.returncode, time.monotonic() - began, out, err


def slow_clients(server: Server, number: int) -> list[socket.socket]:
    """Connections that have begun a request, and leave it at that."""
    length = b"Content-Length: 1000\r\n"
    begun = (b"", b"POST /pre", b"POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\n", b"POST /predict HTTP/1.1\r\nHost: "
             b"127.0.0.1\r\n" + length + b"\r\nabc")  # fmt: skip
    connections = [server.connect() for _ in range(number)]
    for i, connection in enumerate(connections):
        connection.sendall(begun[i % len(begun)])
    return connections


def test_the_command_answers_beside_slow_clients_and_ends_in_time(run: Path) -> None:
    with Server(run) as server, ExitStack() as stack:
        for connection in slow_clients(server, 60):
            stack.enter_context(connection)
        bodies = [form([(f"{i}", jpeg(i))] * (1 + i % 3)) for i in range(8)]
        alone = [server.post(body) for body in bodies]
        with ThreadPoolExecutor(8) as pool:
            began = time.monotonic()
            assert list(pool.map(server.post, bodies * 3)) == alone * 3
            assert time.monotonic() - began < 20  # where slow ones held others up it would be 30
        with server.connect() as cut:
            cut.sendall(b"POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9\r\nContent-Type: ")
            cut.sendall(FORM[1].encode() + b"\r\n\r\n--xyz?\r\n\n")
            assert cut.recv(100).startswith(b"HTTP/1.1 400 ")
        with server.connect() as broken:  # no HTTP at all
            broken.sendall(b"\x16\x03\x01\0\xff\0\r\n\r\n")
            assert broken.recv(100).startswith(b"HTTP/1.1 400 ")
        with server.connect() as chunked:
            chunked.sendall(
                b"POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\nxx\r\n"
            )
            assert b" 400 " in chunked.recv(100)
        code, seconds, out, err = server.end()
    assert (code, err) == (0, "")
    assert seconds < 12  # some two, where the machine does nothing else
    assert out == "Answered 32 requests with 60 pictures.\n"
    assert server.example == f"curl -F picture=@photo.jpg http://127.0.0.1:{server.port}/predict\n"
    assert "answers for first, test_resnet, 3 classes" in server.line


def test_the_page_asks_and_shows_what_it_is_told(run: Path, pictures: list[Path], tmp_path: Path) -> None:
    browser = start_browser(tmp_path / "profile")
    try:
        odd, plain = tmp_path / "<b>no picture.jpg", next(path for path in pictures if path.name == "plain.jpg")
        odd.write_bytes(b"GIF8")
        (tmp_path / "a folder").mkdir()
        with Server(run) as server:
            browser.open(f"http://127.0.0.1:{server.port}/", width=390)
            browser.choose("#files", [plain, odd, tmp_path / "a folder"])
            shown = "document.querySelector('#tally').textContent"
            until = time.monotonic() + 20
            while "of" in (told := browser.run(shown)) or not told:
                assert time.monotonic() < until, told
                time.sleep(0.05)
            assert told == "3 pictures, 2 without an answer"
            folder, broken, found = browser.run("[...document.querySelectorAll('#found > li')].map(e => e.innerText)")
            assert "Cannot be read here. Is it a folder, or was it moved?" in folder
            assert odd.name in broken
            assert "Cannot be read: damaged or cut off within its header." in broken
            said = predict_files(run, [plain])[0]
            assert f"{said['pred']} {100 * said['prob']:.1f}\N{NO-BREAK SPACE}%" in found
            bars = browser.run("[...document.querySelectorAll('.bars .name')].map(e => e.textContent)")
            assert bars == sorted(NAMES, key=lambda name: -said["probs"][name])
            assert browser.run("document.documentElement.scrollWidth") <= 390
            browser.click("#clear")
            assert browser.run("document.querySelectorAll('#found > li').length") == 0
            server.end()
    finally:
        browser.close()


def test_the_page_says_what_is_unknown(wary: Path, pictures: list[Path], tmp_path: Path) -> None:
    browser = start_browser(tmp_path / "profile")
    try:
        with Server(wary, "--unknown", "0.99") as server:
            browser.open(f"http://127.0.0.1:{server.port}/", width=390)
            browser.choose("#files", [pictures[-1]])
            until = time.monotonic() + 20
            while not browser.run("document.querySelectorAll('.bars').length"):
                assert time.monotonic() < until
                time.sleep(0.05)
            found = browser.run("document.querySelector('#found > li').innerText")
            assert found.startswith("Unknown\n")
            assert "Like none of the pictures that the model was trained on." in found
            assert browser.run("document.querySelectorAll('.bars .name').length") == len(NAMES)
            left = "document.querySelector('.{}').getBoundingClientRect().left"
            assert browser.run(left.format("bars")) == browser.run(left.format("state .soft"))
            server.end()
    finally:
        browser.close()


def test_other_hosts_are_warned_of_and_ctrl_c_ends_it(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    told: list[bytes] = []

    def ask_and_stop() -> None:
        for _ in range(200):
            try:
                with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
                    connection.sendall(b"GET /health HTTP/1.0\r\nHost: pictures.example\r\n\r\n")
                    told.append(connection.recv(20))
            except OSError:
                time.sleep(0.05)
            else:
                signal.raise_signal(signal.SIGINT)
                return

    before = signal.getsignal(signal.SIGINT)
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask_and_stop)
        code = main(["serve", str(run), "--host", "0.0.0.0", "--port", str(port), "--device", "cpu", "--workers", "1"])
        asking.result()
    said = capsys.readouterr()
    assert (code, told) == (0, [b"HTTP/1.1 200 OK\r\ndat"])
    assert said.out.endswith("Answered 0 requests with 0 pictures.\n")
    assert said.err.startswith(f"Warning: http://0.0.0.0:{port}/ is open to everybody")
    assert said.err.count("\n") == 1
    assert signal.getsignal(signal.SIGINT) is before


def test_who_sends_no_request_is_sent_away(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    import uvicorn
    from starlette.applications import Starlette
    from starlette.responses import PlainTextResponse
    from starlette.routing import Route

    from headstart import serving_http

    pages = {"/": "ok", "/long": "x" * 30_000_000}
    hello = Starlette(routes=[Route(path, lambda r: PlainTextResponse(pages[r.url.path])) for path in pages])
    monkeypatch.setattr(serving_http, "PATIENCE_SECONDS", 0.3)
    listener = socket.create_server(("127.0.0.1", 0))
    address, servers = listener.getsockname(), []
    real = serving_http._Server

    class Noted(real):  # type: ignore[misc,valid-type]
        def __init__(self, config: uvicorn.Config) -> None:
            super().__init__(config)
            servers.append(self)

    monkeypatch.setattr(serving_http, "_Server", Noted)
    thread = threading.Thread(target=serving_http.run_server, args=(hello, listener))
    thread.start()
    try:
        whole = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
        for begun, wanted in ((b"", False), (b"GET / HTTP", False), (whole + b"GET /", True)):
            with socket.create_connection(address, timeout=5) as connection:
                connection.sendall(begun)
                data = b""
                while True:
                    try:
                        piece = connection.recv(4096)
                    except ConnectionResetError:
                        break
                    if not piece:
                        break
                    data += piece
                assert data.endswith(b"ok") is wanted
        with socket.create_connection(address, timeout=5) as connection:  # the answer is not taken
            connection.sendall(b"GET /long HTTP/1.1\r\nHost: a\r\n\r\n")
            time.sleep(0.1)
            assert servers[0].server_state.connections
            deadline = time.monotonic() + 3
            while servers[0].server_state.connections and time.monotonic() < deadline:
                time.sleep(0.05)
            assert not servers[0].server_state.connections
    finally:
        servers[0].should_exit = True
        thread.join()
        listener.close()
