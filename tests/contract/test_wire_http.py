"""The edges of HTTP on the native wire: hosts, methods, validators, bodies, and what goes wrong inside."""

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest

from rushes.api.bodies import SMALL_BYTES
from rushes.api.gateway import Gateway
from rushes.errors import NotFound, StoreUnavailable
from rushes.settings import Settings
from support.app import BASE, SAMPLE, T2I, VACE, App, running_app
from support.engines import png


def error(answer: httpx.Response, status: int, code: int) -> dict:
    assert (status, code) == (answer.status_code, answer.json()["error_code"]), answer.text
    assert answer.headers["x-request-id"]
    assert "application/json" == answer.headers["content-type"]
    return answer.json()


def image(value: str) -> dict[str, str]:
    return {"56_text": "x", "118_image": value}


# -- addresses ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "value",
    [
        "https://[",
        "https://[::1/a.png",
        "http://ex\u2100mple.com/a.png",
        "https://user:hunter2@ex\u2100mple.com/a.png",
        "https://user:hunter2",
        "https://user:hunter2@example.com/a.png",
        f"{BASE.replace('://', '://user:hunter2@')}/v1/files/file_0",
        "//user:hunter2@example.com/a.png",
        "https://example.com:99999/a.png",
        f"{BASE}:no/outputs/x",
    ],
)
async def test_addresses_that_cannot_be_read(app: App, value: str, capfd: pytest.CaptureFixture) -> None:
    body = error(await app.http.post(f"/v1/models/{VACE}", json=image(value)), 422, 422001)
    assert [["118_image"]] == [entry["loc"] for entry in body["detail"]]
    assert "hunter2" not in str(body)
    assert "hunter2" not in capfd.readouterr().err


@pytest.mark.parametrize("host", ["[", "[::1", "a b", "a/b", "user@a", "a:b", "a:99999", "[1.2.3.4]"])
async def test_hosts_that_are_none(app: App, host: str) -> None:
    for method, path in (("POST", f"/v1/models/{VACE}"), ("GET", "/v1/models"), ("GET", "/")):
        error(await app.http.request(method, path, json=image(SAMPLE), headers={"Host": host}), 400, 400003)


@pytest.mark.parametrize("host", ["a", "A.example:8000", "[::1]:8000", "127.0.0.1"])
async def test_hosts(app: App, host: str) -> None:
    assert f"http://{host}/v1/models" == (await app.http.get("/", headers={"Host": host})).json()["models_url"]


async def test_own_addresses_are_known_however_they_are_written(app: App) -> None:
    id_ = (await app.http.post("/v1/files", content=png(16, 16))).json()["id"]
    for base in ("http://rushes.test", "HTTP://Rushes.Test", "http://rushes.test:80"):
        answer = await app.http.post(f"/v1/models/{VACE}", json=image(f"{base}/v1/files/{id_}"))
        assert 200 == answer.status_code, answer.text
    other = await app.http.post(f"/v1/models/{VACE}", json=image(f"http://rushes.test:81/v1/files/{id_}"))
    assert "input_not_https" == error(other, 422, 422001)["detail"][0]["type"]


# -- data URIs ----------------------------------------------------------------------------------------------
LARGE = bytes(range(256)) * 12_000


async def stored(app: App, value: str) -> bytes:
    answer = await app.http.post(f"/v1/models/{VACE}", json=image(value))
    assert 200 == answer.status_code, answer.text
    record = await app.store.get(answer.json()["request_id"])
    assert record is not None
    assert len(record.input) < 3000
    return b"".join([piece async for piece in app.storage.stream(record.sources["118_image"].value)])


@pytest.mark.parametrize("cut", [0, 1, 2])
async def test_data_uris_of_any_length(app: App, cut: int) -> None:
    for content in (b"abcde"[cut:], LARGE[cut:]):
        text = base64.b64encode(content).decode()
        assert content == await stored(app, f"data:image/png;base64,{text}")
        assert content == await stored(app, f"DATA:;base64,{text.rstrip('=')}")
        safe = base64.urlsafe_b64encode(content).decode()
        assert content == await stored(app, f"data:image/png;charset=x;BASE64,{safe}")


@pytest.mark.parametrize("shift", [0, 1, 2])
async def test_data_uris_with_escapes(app: App, shift: int) -> None:
    """However the pieces in which it is decoded fall."""
    for size in (40, 1_200_000):
        text = "a" * shift + "%41%zz%" * (size // 7)
        assert b"a" * shift + b"A%zz%" * (size // 7) == await stored(app, f"data:,{text}")


async def test_data_uris_that_are_refused(tmp_path: Path) -> None:
    async with running_app(tmp_path / "data", max_image_bytes=1_500_000) as app:
        large = base64.b64encode(LARGE[:1_200_000]).decode()
        for text, reason in (
            ("base64,", "input_not_a_file"),
            ("base64,A", "input_not_a_file"),
            ("base64,QUJD=", "input_not_a_file"),
            ("base64,QQ===", "input_not_a_file"),
            ("base64,QQ==QUJD", "input_not_a_file"),
            ("base64,é", "input_not_a_file"),
            (f"base64,{large[:-1]}!", "input_not_a_file"),
            (f"base64,{large[: 1 << 20]}QQ=={large[1 << 20 :]}", "input_not_a_file"),
            (f"x={'x' * 2000};base64,QUJD", "input_not_a_file"),
            (f"base64,{large}{large}", "input_too_large"),
            (f"x,{'a' * 1_500_001}", "input_too_large"),
        ):
            answer = await app.http.post(f"/v1/models/{VACE}", json=image(f"data:image/png;{text}"))
            assert reason == error(answer, 422, 422001)["detail"][0]["type"], text[:60]
        assert [] == [meta.key async for meta in app.storage.list()]
        assert 0 == sum((await app.store.counts()).values())


# -- bodies -------------------------------------------------------------------------------------------------
async def test_the_rate_is_looked_at_before_the_body(tmp_path: Path) -> None:
    async with running_app(tmp_path / "data", rate_limit=0.1) as app:
        assert 200 == (await app.http.post(f"/v1/models/{T2I}", json={"prompt": "x"})).status_code
        read = []

        async def body():
            read.append(1)
            yield b"{}"

        error(await app.http.post(f"/v1/models/{T2I}", content=body()), 429, 429001)
        assert [] == read


@pytest.mark.parametrize("size", [10, SMALL_BYTES - 100, SMALL_BYTES + 100, 3_000_000])
async def test_bodies_in_pieces(app: App, tmp_path: Path, size: int) -> None:
    async def pieces():
        yield b'{"prompt": "x"'
        for at in range(0, size, 50_000):
            yield b" " * min(50_000, size - at)
        yield b"}"

    answer = await app.http.post(f"/v1/models/{T2I}", content=pieces())
    assert 200 == answer.status_code, answer.text
    assert [] == list((tmp_path / "data" / "scratch").iterdir())


async def raw(app: App, scope: dict[str, Any], *events: dict[str, Any]) -> list[dict[str, Any]]:
    """Call the application itself; what it sent."""
    transport = app.http._transport
    assert isinstance(transport, httpx.ASGITransport)
    left, sent = list(events), []

    async def receive():
        return left.pop(0)

    async def send(message):
        sent.append(message)

    key = app.http.headers["authorization"].encode()
    given = {"type": "http", "http_version": "1.1", "scheme": "http", "query_string": b"", "root_path": ""}
    given |= {"headers": [(b"host", b"a"), (b"authorization", key)], **scope}
    await transport.app(given, receive, send)  # type: ignore[arg-type]
    return sent


@pytest.mark.parametrize("size", [14, 2_000_000])
@pytest.mark.parametrize("path", [f"/v1/models/{T2I}", "/v1/files"])
async def test_clients_that_leave_in_the_middle(app: App, tmp_path: Path, path: str, size: int) -> None:
    body = b'{"prompt":"x"}'.ljust(size)
    sent = await raw(
        app,
        {"method": "POST", "path": path},
        {"type": "http.request", "body": body, "more_body": True},
        {"type": "http.disconnect"},
    )
    assert [400] == [message["status"] for message in sent if "status" in message]
    assert 0 == sum((await app.store.counts()).values())
    assert [] == list((tmp_path / "data" / "scratch").iterdir())


# -- forms --------------------------------------------------------------------------------------------------
async def test_forms_in_pieces_of_any_size(app: App) -> None:
    content = png(64, 48)
    form = b'--b\r\nContent-Disposition: form-data; name="note"\r\n\r\nhi\r\n--b\r\n'
    form += b'content-disposition: form-data; filename="a\xc3\xa9.png"; name="content"\r\n\r\n'
    form += content + b"\r\n--b--\r\n"
    for step in (1, 7, 1000, len(form)):

        async def pieces(step: int = step):
            for at in range(0, len(form), step):
                yield form[at : at + step]

        headers = {"Content-Type": "multipart/form-data; boundary=b"}
        answer = await app.http.post("/v1/files", content=pieces(), headers=headers)
        assert 200 == answer.status_code, answer.text
        assert ("aé.png", len(content)) == (answer.json()["name"], answer.json()["size"])


async def test_forms_that_are_refused(app: App, tmp_path: Path) -> None:
    part = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nx'
    field = b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\nx\r\n'
    for form in (
        part,
        part + b"\r\n" + part + b"\r\n--b--\r\n",
        field * 17 + b"--b--\r\n",
        b"--b\r\nX-A: b\r\n\r\nx\r\n--b--\r\n",
        b'--b\r\nContent-Disposition: form-data; name="' + b"a" * 20_000,
    ):
        headers = {"Content-Type": "multipart/form-data; boundary=b"}
        body = error(await app.http.post("/v1/files", content=form, headers=headers), 400, 400003)
        assert "form cannot be read" in body["error_message"]
    assert [] == list((tmp_path / "data" / "scratch").iterdir())


# -- what goes wrong inside ---------------------------------------------------------------------------------
async def test_a_disk_that_cannot_be_written(app: App, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "data" / "scratch")
    large = b'{"prompt": "x"' + b" " * SMALL_BYTES + b"}"
    for answer in (
        await app.http.post("/v1/files", content=png(8, 8)),
        await app.http.post(f"/v1/models/{T2I}", content=large),
    ):
        error(answer, 503, 503001)
        assert "1" == answer.headers["retry-after"]
        assert str(tmp_path) not in answer.text


async def test_a_mistake_of_ours(app: App, monkeypatch, capfd: pytest.CaptureFixture) -> None:
    async def broken() -> None:
        raise ZeroDivisionError("hunter2")

    monkeypatch.setattr(app.store, "ping", broken)
    error(await app.http.get("/healthz", headers={"X-Request-Id": "t-1"}), 500, 500001)
    logged = capfd.readouterr().err
    assert (1, 1) == (logged.count("ZeroDivisionError: hunter2"), logged.count('"trace":"t-1"'))


@pytest.mark.parametrize("raised", [ZeroDivisionError(), NotFound(), StoreUnavailable()])
async def test_an_answer_that_has_begun_is_not_followed_by_another(tmp_path: Path, raised: Exception) -> None:
    async def others(scope, receive, send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise raised

    settings = Settings(data_dir=tmp_path, access_log=False)
    sent = []

    async def send(message) -> None:
        sent.append(message)

    gateway = Gateway(None, settings, others, tmp_path)  # type: ignore[arg-type]
    scope = {"type": "http", "method": "GET", "path": "/", "scheme": "http", "headers": []}
    await gateway(scope, None, send)  # type: ignore[arg-type]
    assert ["http.response.start"] == [message["type"] for message in sent]


# -- RFC 9110 -----------------------------------------------------------------------------------------------
@pytest.fixture
async def url(app: App) -> str:
    id_ = await app.submit()
    await app.produce(await app.claim(), bytes(range(100)))
    return str((await app.http.get(f"/v1/requests/{id_}/result")).json()["output"]["image"])


async def test_validators(app: App, url: str) -> None:
    etag = (await app.http.get(url)).headers["etag"]
    for known in ("*", etag, f"W/{etag}", f'"a,b", W/{etag}', f'"x",{etag}'):
        answer = await app.http.get(url, headers={"If-None-Match": known})
        assert (304, etag, b"") == (answer.status_code, answer.headers["etag"], answer.content), known
    for other in ('"x"', 'W/"x"', etag.strip('"'), ""):
        assert 200 == (await app.http.get(url, headers={"If-None-Match": other})).status_code, other


async def test_ranges_outside_say_the_size(app: App, url: str) -> None:
    answer = await app.http.get(url, headers={"Range": "bytes=100-"})
    error(answer, 416, 416001)
    assert "bytes */100" == answer.headers["content-range"]


async def test_a_range_is_for_get(app: App, url: str) -> None:
    for wanted in ("bytes=2-3", "bytes=100-"):
        answer = await app.http.head(url, headers={"Range": wanted})
        assert (200, "100") == (answer.status_code, answer.headers["content-length"])
        assert "content-range" not in answer.headers


async def test_wrong_methods_name_the_right_ones(app: App) -> None:
    id_ = await app.submit()
    for method, path, allowed in (
        ("POST", f"/v1/requests/{id_}/status", {"GET", "HEAD"}),
        ("DELETE", f"/v1/requests/{id_}/result", {"GET", "HEAD"}),
        ("GET", f"/v1/requests/{id_}/cancel", {"POST"}),
        ("DELETE", f"/v1/models/{T2I}", {"GET", "HEAD", "POST"}),
        ("POST", "/v1/models", {"GET", "HEAD"}),
        ("GET", "/v1/files", {"POST"}),
    ):
        answer = await app.http.request(method, path)
        error(answer, 405, 405001)
        assert allowed == set(answer.headers["allow"].split(", ")), path


async def test_preflights_have_an_id(tmp_path: Path) -> None:
    async with running_app(tmp_path / "data", cors_origins=("https://app.example",)) as app:
        headers = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
        answer = await app.http.options(f"/v1/models/{T2I}", headers=headers)
        assert 200 == answer.status_code
        assert answer.headers["x-request-id"]
        answer = await app.http.options("/v1/models", headers={**headers, "X-Request-Id": "abc"})
        assert "abc" == answer.headers["x-request-id"]
        headers["Origin"] = "https://evil.example"
        error(await app.http.options("/v1/models", headers=headers), 400, 400003)


async def test_a_model_takes_get_and_post(app: App) -> None:
    answer = await app.http.delete(f"/v1/models/{T2I}")
    assert 405 == answer.status_code
    assert {"GET", "HEAD", "POST"} == set(answer.headers["allow"].split(", "))


async def test_a_file_of_this_server_under_another_name_gets_a_hint(app: App) -> None:
    value = "http://localhost:8000/v1/files/file_01a1fc73-7526-715f-9349-20fd19fec7bd"
    answer = await app.http.post(f"/v1/models/{VACE}", json={"56_text": "x", "118_image": value})
    assert 422 == answer.status_code
    assert "give its id, or its address under http://rushes.test" in answer.json()["detail"][0]["msg"]


async def test_the_log_names_the_key_on_every_route(tmp_path, capfd) -> None:
    async with running_app(tmp_path / "data", access_log=True) as app:
        await app.http.get("/v1/models")
        await app.http.post("/v1/files", content=png(8, 8))
        await app.submit()
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    keys = [line["key"] for line in lines if line["event"] == "http"]
    assert 3 == len(keys)
    assert 1 == len(set(keys))
    assert keys[0].startswith("key_")
