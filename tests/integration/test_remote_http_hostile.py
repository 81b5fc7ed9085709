"""Answers of gateways in front of a remote, and of remotes that mean harm: read within bounds, told as they are."""

import gzip
import zlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

import msgspec
import pytest

from rushes.engines.remote.base import RemoteUnavailable, SubmitUnknown
from rushes.engines.remote.http import (
    BODY_LIMIT,
    DEEPEST,
    LARGE_LIMIT,
    LONGEST_WORDS,
    MOST_VALUES,
    Answer,
    RemoteHTTP,
    clean,
    id_of,
    trouble_of,
)
from support.remote_stub import HTML, KEY, Fault, RemoteStub, Reply, Seen, running

HEADERS = {"Authorization": f"Bearer {KEY}"}
ORIGIN = "https://api.vendor.example"


class Jobs(RemoteStub):
    """Takes jobs at /jobs."""

    def answer(self, call: Seen) -> Reply:
        if call.method == "POST":
            return Reply(201, {"id": self.accept(str(len(self.jobs)), call.body.hex()).id})
        return Reply(200, {"path": call.path})

    def unauthorized(self, call: Seen) -> Reply:
        return Reply(401, {"detail": "bad key"})


@pytest.fixture
def stub() -> Iterator[Jobs]:
    with running(Jobs()) as started:
        yield started


@pytest.fixture
async def http(stub: Jobs) -> AsyncIterator[RemoteHTTP]:
    made = RemoteHTTP("box", stub.url, HEADERS, 20)
    yield made
    await made.close()


# -- gateways -------------------------------------------------------------------------------------------------
def cloudflare(status: int, **more: Any) -> dict[str, Any]:
    """What it answers those who accept JSON, as its documentation shows it."""
    return {
        "type": f"https://developers.cloudflare.com/support/troubleshooting/http-status-codes/error-{status}/",
        "title": f"Error {status}",
        "status": status,
        "detail": "The origin web server did not answer in time.",
        "instance": "9f1c",
        "error_code": status,
        "error_category": "origin",
        "cloudflare_error": True,
        "retryable": True,
        "retry_after": 120,
    } | more


def answered(status: int, body: Any = None, **headers: str) -> Answer:
    content = body.encode() if isinstance(body, str) else msgspec.json.encode(body)
    return Answer("box", status, {k.replace("_", "-"): v for k, v in headers.items()}, content, submitted=True)


ENVOY = "upstream connect error or disconnect/reset before headers."
UNKNOWN: list[tuple[int, Any]] = [
    *((status, {"detail": "the vendor's own words"}) for status in (502, 504, 505, 520, 522, 524, 526)),
    *((status, cloudflare(status)) for status in (500, 502, 503, 520, 524)),
    (500, cloudflare(500, cloudflare_error=None)),
    (500, {"cloudflare_error": True, "detail": "x"}),
    (500, {"message": "Internal Server Error"}),
    (503, {"message": "Service Unavailable"}),
    (504, {"message": "Endpoint request timed out"}),
    (502, {"message": "An invalid response was received from the upstream server", "request_id": "1"}),
    *((503, f"{ENVOY} reset reason: {why}") for why in ("connection termination", "remote reset", "")),
    (503, f"{ENVOY} retried and the latest reset reason: remote connection failure"),
    (503, {"message": f"{ENVOY} reset reason: connection termination", "code": 503}),
]


@pytest.mark.parametrize(("status", "body"), UNKNOWN, ids=str)
@pytest.mark.parametrize("pause", [{}, {"retry_after": "120"}], ids=["", "retry-after"])
def test_an_error_of_a_gateway_says_nothing_of_the_job(status: int, body: Any, pause: dict[str, str]) -> None:
    answer = answered(status, body, **pause)

    assert isinstance(trouble_of(answer, "words", own_error=True), SubmitUnknown)
    assert isinstance(trouble_of(answer, "words"), SubmitUnknown)
    polled = trouble_of(msgspec.structs.replace(answer, submitted=False), "words", own_error=True)
    assert isinstance(polled, RemoteUnavailable)
    assert ("fault", 120.0 if pause else None) == (polled.trouble, polled.retry_after)


@pytest.mark.parametrize("status", [500, 501, 503])
def test_an_error_of_its_own_took_nothing(status: int) -> None:
    trouble = trouble_of(answered(status, {"detail": "no GPU is free"}), "no GPU is free", own_error=True)

    assert isinstance(trouble, RemoteUnavailable)
    assert trouble.trouble == "fault"


@pytest.mark.parametrize(
    ("body", "headers", "taken"),
    [
        (HTML, {}, None),
        ("", {}, None),
        (HTML, {"retry_after": "soon"}, None),
        (HTML, {"retry_after": "7"}, False),
        ("no healthy upstream", {}, False),
        (f"{ENVOY} reset reason: overflow", {}, False),
        (f"{ENVOY} reset reason: remote connection failure, transport failure reason: x", {}, False),
    ],
)
def test_a_bare_503_took_nothing_only_where_it_says_so(
    body: str, headers: dict[str, str], *, taken: bool | None
) -> None:
    trouble = trouble_of(answered(503, body, **headers))

    assert isinstance(trouble, SubmitUnknown if taken is None else RemoteUnavailable)


@pytest.mark.parametrize("status", [500, 502, 503, 504, 520, 524])
@pytest.mark.parametrize("form", ["json", "html"])
async def test_a_job_that_was_taken_behind_a_gateways_error(
    http: RemoteHTTP, stub: Jobs, status: int, form: str
) -> None:
    body = cloudflare(status) if form == "json" else HTML
    stub.fail("POST", "jobs", Fault(status, body, {"X-Fault": "1"}, after=True))

    answer = await http.submit("POST", "jobs", json={"prompt": "a kite"})

    assert isinstance(trouble_of(answer, own_error=form == "json"), SubmitUnknown)
    assert status == answer.status
    assert ["0"] == list(stub.jobs)


# -- how much is read -----------------------------------------------------------------------------------------
def bomb(layers: int) -> bytes:
    packed = zlib.compressobj(9, wbits=31)
    data = b"".join(packed.compress(bytes(1 << 20)) for _ in range(64)) + packed.flush()
    for _ in range(layers - 1):
        data = gzip.compress(data, 9)
    return data


@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        ("gzip", bomb(1)),
        ("gzip, gzip", bomb(2)),
        ("GZIP", gzip.compress(b"{}")),
        ("deflate", zlib.compress(b"{}")),
        ("identity, gzip", gzip.compress(b"{}")),
        ("zstd", b"{}"),
        ("x-odd", b"{}"),
    ],
    ids=range(7),
)
async def test_compressed_answers_are_not_read(
    http: RemoteHTTP, stub: Jobs, encoding: str, body: bytes
) -> None:
    fault = Fault(200, body, {"Content-Encoding": encoding})
    stub.fail("POST", "jobs", fault)
    stub.fail("GET", "state", fault)

    with pytest.raises(SubmitUnknown, match="compressed"):
        await http.submit("POST", "jobs", json={})
    with pytest.raises(RemoteUnavailable, match="compressed") as caught:
        await http.ask("GET", "state")
    assert caught.value.trouble == "fault"
    assert len(stub.calls("POST", "jobs")) == len(stub.calls("GET", "state")) == 1


async def test_an_encoding_that_is_none_is_read(http: RemoteHTTP, stub: Jobs) -> None:
    stub.fail("GET", "state", Fault(200, {"a": 1}, {"Content-Encoding": "identity"}))

    assert {"a": 1} == (await http.ask("GET", "state")).json()


@pytest.mark.parametrize("status", [200, 422])
async def test_only_answers_with_files_may_be_large(http: RemoteHTTP, stub: Jobs, status: int) -> None:
    whole = {"file": "A" * BODY_LIMIT}
    stub.fail("POST", "jobs", Fault(status, whole), times=2)
    stub.fail("GET", "state", Fault(status, whole), times=2)

    with pytest.raises(SubmitUnknown, match="longer than"):
        await http.submit("POST", "jobs", json={})
    with pytest.raises(RemoteUnavailable, match="longer than"):
        await http.ask("GET", "state")
    assert whole == (await http.submit("POST", "jobs", json={}, large=True)).json()
    assert whole == (await http.ask("GET", "state", large=True)).json()
    assert len(stub.calls("GET", "state")) == 2


async def test_faults_are_never_large(http: RemoteHTTP, stub: Jobs) -> None:
    for method in ("POST", "GET"):
        stub.fail(method, "jobs", Fault(500, {"detail": "A" * BODY_LIMIT}))

    with pytest.raises(SubmitUnknown, match="longer than"):
        await http.submit("POST", "jobs", json={}, large=True)
    with pytest.raises(RemoteUnavailable, match="longer than"):
        await http.ask("GET", "jobs", large=True)


async def test_large_answers_end_somewhere(stub: Jobs) -> None:
    http = RemoteHTTP("box", stub.url, HEADERS, 20, large_limit=5000)
    stub.fail("POST", "jobs", Fault(200, b"x" * 5001))

    with pytest.raises(SubmitUnknown, match="longer than 5000"):
        await http.submit("POST", "jobs", json={}, large=True)
    assert LARGE_LIMIT > BODY_LIMIT


def nested(depth: int, *, objects: bool = False) -> bytes:
    return (b'{"a":' if objects else b"[") * depth + b"1" + (b"}" if objects else b"]") * depth


@pytest.mark.parametrize(
    "body",
    [
        b'{"a":[' + b"{}," * MOST_VALUES + b"{}]}",
        b'{"a":[' + b"1," * MOST_VALUES + b"1]}",
        b'{"a":' + nested(DEEPEST) + b"}",
        nested(DEEPEST + 1, objects=True),
        nested(900, objects=True),
        nested(200_000),
        b'{"a":"\\ud800"}',
        b'{"a":' + b"9" * 5000 + b"}",
        b'{"a":1e400}',
    ],
    ids=range(9),
)
def test_answers_that_would_hold_up_others_are_unreadable(body: bytes) -> None:
    answer = Answer("box", 200, {}, body, submitted=True)

    with pytest.raises(SubmitUnknown):
        answer.fields()
    with pytest.raises(RemoteUnavailable):
        msgspec.structs.replace(answer, submitted=False).fields()
    assert {} == answer.problem()


def test_answers_as_deep_and_as_full_as_they_may_be_are_read() -> None:
    deep = Answer("box", 200, {}, nested(DEEPEST, objects=True))
    full = Answer("box", 200, {}, msgspec.json.encode({"logs": ["a line"] * (MOST_VALUES - 10)}))
    wide = Answer("box", 200, {}, msgspec.json.encode({"a": [{"b": []}] * (MOST_VALUES // 4)}))

    assert ["a"] == list(deep.fields())
    assert len(full.fields()["logs"]) == MOST_VALUES - 10
    assert len(wide.fields()["a"]) == MOST_VALUES // 4


# -- words ----------------------------------------------------------------------------------------------------
def test_words_that_nest_too_deep_are_not_told() -> None:
    value: Any = "x"
    for _ in range(5000):
        value = [value]

    assert clean(value, KEY) == "…"


def test_of_long_words_the_start_is_looked_at() -> None:
    told = clean("ab " * 1_000_000, KEY)

    assert len(told) == LONGEST_WORDS
    assert told.startswith("ab ab ")


def test_no_part_of_a_key_is_left_where_words_are_cut() -> None:
    parts = [KEY[:size] for size in range(4, len(KEY))]

    for before in range(7700, 8010):
        told = clean(" " * before + KEY + "y" * 5000, KEY)
        assert [] == [part for part in parts if part in told]


# -- addresses and names --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("given", "written"),
    [
        (f"{ORIGIN}/v1/jobs/7", f"{ORIGIN}/v1/jobs/7"),
        (f"{ORIGIN}:443/v1?a=1&b=2#part", f"{ORIGIN}/v1?a=1&b=2"),
        ("HTTPS://API.Vendor.example./x", f"{ORIGIN}/x"),
        (ORIGIN, f"{ORIGIN}/"),
        ("https://user:pw@api.vendor.example/x", None),
        ("https://@api.vendor.example/x", None),
        ("https://evil.example\\@api.vendor.example/x", None),
        ("https://api.vendor.example\\x", None),
        ("https://api.vendor.example:0/x", None),
        ("https://api.vendor.example:444/x", None),
        ("https://api.vendor.example:x/x", None),
        ("https://ａpi.vendor.example/x", None),  # noqa: RUF001  another letter, which becomes this one
        ("https://api.ven\tdor.example/x", None),
        (f"{ORIGIN}/x\r\nA: b", None),
        (f"{ORIGIN}/x y", None),
        (f" {ORIGIN}/x", None),
        (f"{ORIGIN}/\x9b31m", None),
        (f"{ORIGIN}/{'x' * 2048}", None),
        ("http://api.vendor.example/x", None),
        ("https://[x", None),
        (b"https://api.vendor.example/x", None),
    ],
)
def test_an_address_of_its_own_is_written_anew(given: object, written: str | None) -> None:
    assert written == RemoteHTTP("box", ORIGIN, HEADERS).own(given)


async def test_an_address_with_a_name_in_it_is_not_asked(http: RemoteHTTP, stub: Jobs) -> None:
    with pytest.raises(RemoteUnavailable):
        await http.ask("GET", stub.url.replace("http://", "http://me:secret@") + "/state")

    assert [] == stub.seen


@pytest.mark.parametrize(
    "value",
    ["7", "0385dc79-5ff8-4d82-bcb6-4e6c3e3f9a2b", "video_68f1/a:b", "...", "x" * 200],
)
def test_a_name_that_can_be_kept(value: str) -> None:
    assert value == id_of(value)


@pytest.mark.parametrize(
    "value",
    ["", ".", "..", "a b", "a\n", "a\x9b31m\u202e", "ä", "x" * 201, 7, None, True, ["7"], b"7"],
)
def test_a_name_that_cannot(value: object) -> None:
    assert id_of(value) is None
