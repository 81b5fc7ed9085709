"""HTTP towards remotes, against servers that break off where they can: what was sent, what was not, what is told."""

import asyncio
import logging
import socket
import traceback
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from rushes.engines.remote.base import RemoteRefused, RemoteUnavailable, SubmitUnknown
from rushes.engines.remote.http import (
    LONGEST_PAUSE,
    LONGEST_WORDS,
    Answer,
    RemoteHTTP,
    clean,
    retry_after,
    trouble_of,
)
from support.https_server import Asked, Write, serve, write_authority
from support.remote_stub import HTML, KEY, Fault, RemoteStub, Reply, Seen, running

HEADERS = {"Authorization": f"Bearer {KEY}"}


class Echo(RemoteStub):
    """Takes jobs at /jobs, and says what it was asked."""

    def answer(self, call: Seen) -> Reply:
        if call.method == "POST" and call.path == "/jobs":
            return Reply(201, {"id": self.accept(str(len(self.jobs)), call.body.hex()).id})
        return Reply(200, {"path": call.path, "query": call.query, "method": call.method})

    def unauthorized(self, call: Seen) -> Reply:
        return Reply(401, {"detail": f"bad key {call.headers.get('authorization')}"})


@pytest.fixture
def stub() -> Iterator[Echo]:
    with running(Echo()) as started:
        yield started


@pytest.fixture
async def http(stub: Echo) -> AsyncIterator[RemoteHTTP]:
    made = RemoteHTTP("box", stub.url, HEADERS, 10)
    yield made
    await made.close()


# -- what works -----------------------------------------------------------------------------------------------
async def test_a_submit_and_a_poll(http: RemoteHTTP, stub: Echo) -> None:
    answer = await http.submit("POST", "/jobs", json={"prompt": "a kite"}, headers={"X-More": "1"})
    poll = await http.ask("GET", "state?full=1")

    assert (201, {"id": "0"}, True, True) == (answer.status, answer.fields(), answer.submitted, answer.ok)
    assert {"path": "/state", "query": {"full": ["1"]}, "method": "GET"} == poll.json()
    [submit], [asked] = stub.calls("POST", "jobs"), stub.calls("GET", "state")
    assert {"prompt": "a kite"} == submit.json
    assert (f"Bearer {KEY}", "1", "application/json") == (
        submit.headers["authorization"],
        submit.headers["x-more"],
        submit.headers["content-type"],
    )
    assert "x-more" not in asked.headers


async def test_a_form_with_a_file(http: RemoteHTTP, stub: Echo) -> None:
    answer = await http.submit(
        "POST", "jobs", data={"prompt": "a kite"}, files={"image": ("a.png", b"PNG!", "image/png")}
    )

    assert answer.status == 201
    [call] = stub.calls("POST", "jobs")
    assert call.headers["content-type"].startswith("multipart/form-data")
    assert b'name="prompt"' in call.body
    assert b"PNG!" in call.body


async def test_every_submit_has_a_connection_of_its_own(http: RemoteHTTP) -> None:
    async def handle(asked: Asked, write: Write) -> None:
        await write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")

    async with serve(handle, tls=False) as host:
        other = RemoteHTTP("box", f"http://127.0.0.1:{host.port}", {}, 10)
        for number in range(3):
            await other.submit("POST", "jobs", json={"number": number})

    assert len(host.asked) == 3


async def test_over_tls_with_the_operators_certificates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def handle(asked: Asked, write: Write) -> None:
        await write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")

    async with serve(handle) as host:
        strict = RemoteHTTP("box", f"https://127.0.0.1:{host.port}", HEADERS, 10)
        with pytest.raises(RemoteUnavailable) as caught:
            await strict.submit("POST", "jobs", json={})
        monkeypatch.setenv("SSL_CERT_FILE", write_authority(tmp_path))
        answer = await RemoteHTTP("box", f"https://127.0.0.1:{host.port}", HEADERS, 10).submit(
            "POST", "jobs", json={}
        )

    assert ("unreachable", True) == (caught.value.trouble, "certificate" in caught.value.why)
    assert answer.status == 200
    assert len(host.asked) == 1


async def test_the_environments_proxies_are_not_used(http: RemoteHTTP, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")

    assert (await http.ask("GET", "state")).status == 200


async def test_addresses_at_other_origins_are_not_followed(http: RemoteHTTP, stub: Echo) -> None:
    own = f"{stub.url}/v1/state"

    assert own == http.own(own)
    for other in (
        "https://elsewhere.example/x",
        stub.url.replace("http:", "https:"),
        "",
        None,
        7,
        "//x/y",
        "file:///etc",
    ):
        assert http.own(other) is None
    with running(Echo()) as elsewhere:
        for call in (http.ask, http.submit):
            with pytest.raises(RemoteUnavailable):
                await call("GET", f"{elsewhere.url}/v1/state")
        assert [] == elsewhere.seen
    assert (await http.ask("GET", own)).json()["path"] == "/v1/state"


async def test_redirects_are_not_followed(http: RemoteHTTP, stub: Echo) -> None:
    stub.fail("POST", "jobs", Fault(307, "", {"Location": f"{stub.url}/elsewhere"}))

    answer = await http.submit("POST", "jobs", json={})

    assert answer.status == 307
    assert [] == stub.calls("POST", "elsewhere")
    trouble = trouble_of(answer)
    assert isinstance(trouble, RemoteUnavailable)
    assert trouble.trouble == "fault"


# -- before and after sending ---------------------------------------------------------------------------------
async def refused_by_nobody() -> str:
    """The address of a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


@pytest.mark.parametrize("base", ["port", "http://no-such-host.invalid"])
async def test_without_a_connection_nothing_was_sent(base: str) -> None:
    http = RemoteHTTP("box", await refused_by_nobody() if base == "port" else base, HEADERS, 10)

    for call in (http.submit("POST", "jobs", json={}), http.ask("GET", "state")):
        with pytest.raises(RemoteUnavailable) as caught:
            await call
        assert caught.value.trouble == "unreachable"


async def test_a_server_that_ends_the_handshake_got_nothing() -> None:
    async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server:
        with pytest.raises(RemoteUnavailable) as caught:
            await RemoteHTTP("box", f"https://127.0.0.1:{port}", HEADERS, 10).submit("POST", "jobs", json={})

    assert caught.value.trouble == "unreachable"


@pytest.mark.parametrize(
    "fault", [Fault(lost=True), Fault(drop=True), Fault(cut=3)], ids=["lost", "drop", "cut"]
)
async def test_a_lost_answer_to_a_submit_is_unknown(http: RemoteHTTP, stub: Echo, fault: Fault) -> None:
    stub.fail("POST", "jobs", fault)

    with pytest.raises(SubmitUnknown):
        await http.submit("POST", "jobs", json={"prompt": "a kite"})

    assert len(stub.calls("POST", "jobs")) == 1
    assert (0 if fault.drop else 1) == len(stub.jobs)


@pytest.mark.parametrize("fault", [Fault(drop=True), Fault(cut=3)], ids=["drop", "cut"])
async def test_a_lost_answer_to_a_poll_is_asked_for_again_once(
    http: RemoteHTTP, stub: Echo, fault: Fault
) -> None:
    stub.fail("GET", "state", fault)
    assert (await http.ask("GET", "state")).status == 200

    stub.fail("GET", "state", fault, times=2)
    with pytest.raises(RemoteUnavailable) as caught:
        await http.ask("GET", "state")
    assert caught.value.trouble == "unreachable"


async def test_a_cancel_is_sent_once(http: RemoteHTTP, stub: Echo) -> None:
    stub.fail("POST", "cancel", Fault(drop=True))

    with pytest.raises(RemoteUnavailable):
        await http.ask("POST", "cancel")

    assert len(stub.calls("POST", "cancel")) == 1


async def test_a_server_that_does_not_answer_in_time() -> None:
    async def silent(asked: Asked, write: Write) -> None:
        await asyncio.Event().wait()

    async with serve(silent, tls=False) as host:
        http = RemoteHTTP("box", f"http://127.0.0.1:{host.port}", HEADERS, 0.2)
        with pytest.raises(SubmitUnknown):
            await http.submit("POST", "jobs", json={})
        with pytest.raises(RemoteUnavailable):
            await http.ask("GET", "state")
        await http.close()


async def test_an_answer_that_does_not_end_is_none(http: RemoteHTTP, stub: Echo) -> None:
    small = RemoteHTTP("box", stub.url, HEADERS, 10, body_limit=1000)
    stub.fail("POST", "jobs", Fault(200, b"x" * 1001))
    stub.fail("GET", "state", Fault(200, b"x" * 1001))

    with pytest.raises(SubmitUnknown):
        await small.submit("POST", "jobs", json={})
    with pytest.raises(RemoteUnavailable):
        await small.ask("GET", "state")
    assert (await small.ask("GET", "state")).status == 200
    await small.close()


# -- answers --------------------------------------------------------------------------------------------------
def answered(status: int, body: bytes = b"{}", *, submitted: bool = True, **headers: str) -> Answer:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer("box", status, named, body, submitted)


@pytest.mark.parametrize("body", [b"", b"<html>", b"\xff\xfe", b"[" * 5000, b'"text"', b"[1]", b"null"])
def test_what_is_no_object_is_unreadable(body: bytes) -> None:
    with pytest.raises(SubmitUnknown):
        answered(200, body).fields()
    with pytest.raises(RemoteUnavailable):
        answered(200, body, submitted=False).fields()
    assert {} == answered(200, body).problem()


@pytest.mark.parametrize(
    ("status", "submit", "poll"),
    [
        (400, "remote_refused", "fault"),
        (401, "key", "key"),
        (402, "funds", "funds"),
        (403, "key", "key"),
        (404, "model", "remote_lost"),
        (408, "throttled", "throttled"),
        (413, "remote_refused", "fault"),
        (422, "remote_refused", "fault"),
        (429, "throttled", "throttled"),
        (500, "unknown", "fault"),
        (502, "unknown", "fault"),
        (503, "unknown", "fault"),
        (504, "unknown", "fault"),
        (302, "fault", "fault"),
        (200, "unknown", "fault"),
    ],
)
def test_what_a_status_stands_for(status: int, submit: str, poll: str) -> None:
    def kind(error: Exception) -> str:
        assert "box" in str(error)
        if isinstance(error, RemoteRefused):
            return error.reason
        return error.trouble if isinstance(error, RemoteUnavailable) else "unknown"

    assert (submit, poll) == (
        kind(trouble_of(answered(status), "its words")),
        kind(trouble_of(answered(status, submitted=False), "its words")),
    )
    own = trouble_of(answered(status), own_error=True)
    assert ("fault" if status in (500, 503) else submit) == kind(own)


def test_a_retry_after_comes_along() -> None:
    trouble = trouble_of(answered(429, retry_after="12"))

    assert isinstance(trouble, RemoteUnavailable)
    assert trouble.retry_after == 12.0


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0.0),
        ("2.5", 2.5),
        ("-3", 0.0),
        ("99999999", LONGEST_PAUSE),
        ("nan", None),
        ("inf", None),
        ("soon", None),
        ("", None),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0),
        ("Wed, 99 Oct 9999 07:28:00 GMT", None),
        ("Thu, 31 Dec 9998 23:59:59 GMT", LONGEST_PAUSE),
    ],
)
def test_retry_after(text: str, seconds: float | None) -> None:
    assert seconds == retry_after({"retry-after": text})
    assert retry_after({}) is None


# -- words and keys -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("  two\n lines\x00\x1b[31m ", "two lines [31m"),
        (f"bad key {KEY}!", "bad key ***!"),
        ("Authorization: Bearer abcdefghijklmnop", "Authorization: ***"),
        ("Incorrect API key provided: sk-abcd1234****wxyz.", "Incorrect API key provided: ***."),
        ("see https://x.example/a?token=1&b=2#c now", "see https://x.example/a now"),
        ("see https://me:secret@x.example/a", "see https://x.example/a"),
        (f"image data:image/png;base64,{'A' * 4000} is odd", "image data:… is odd"),
        ("token has expired, key_invalid_or_expired", "token has expired, key_invalid_or_expired"),
        ({"loc": ["body", "x"]}, '{"loc":["body","x"]}'),
        ([KEY], '["***"]'),
        ("ä" * 1000, "ä" * (LONGEST_WORDS - 1) + "…"),
        ("", ""),
        (None, "null"),
    ],
)
def test_words_are_cleaned(text: Any, shown: str) -> None:
    assert shown == clean(text, KEY)


def test_both_halves_of_a_key_are_secret() -> None:
    http = RemoteHTTP("fal", "https://queue.fal.run", {"Authorization": "Key 12345678-abcd:0123456789abcdef"})

    assert (
        http.clean("bad 12345678-abcd, 0123456789abcdef, 12345678-abcd:0123456789abcdef") == "bad ***, ***, ***"
    )


@pytest.mark.parametrize("key", [KEY, "line\nbreak-0123456789", "schlüssel-0123456789", "☃-0123456789-snow"])
async def test_no_error_holds_the_key(
    stub: Echo, key: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    stub.key = "another"
    http = RemoteHTTP("box", stub.url, {"Authorization": f"Bearer {key}"}, 10)
    nobody = RemoteHTTP("box", await refused_by_nobody(), {"Authorization": f"Bearer {key}"}, 10)
    told = [repr(http), repr(vars(http))]
    for fault in (None, Fault(drop=True), Fault(cut=2), Fault(502, HTML), Fault(200, f"<p>{key}</p>")):
        for one in (http, nobody):
            for call in (one.submit, one.ask):
                if fault:
                    stub.fail("POST", "jobs", fault)
                try:
                    answer = await call("POST", "jobs", json={})
                    raise trouble_of(answer, one.clean(answer.problem() or answer.body.decode()))
                except (RemoteRefused, RemoteUnavailable, SubmitUnknown) as error:
                    told += ["".join(traceback.format_exception(error)), repr(error), str(vars(error))]
                stub.faults.clear()
    await http.close()

    told += [*capfd.readouterr(), *(record.getMessage() for record in caplog.records)]
    assert len(told) >= 64
    assert [] == [text for text in told if key in text or "0123456789" in text]
