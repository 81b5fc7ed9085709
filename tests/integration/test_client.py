"""Both clients against a real server on a loopback port: one suite, run once for each."""

import asyncio
import inspect
import io
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from rushes.client import errors
from rushes.client.aio import AsyncClient
from rushes.client.sync import Client
from rushes.client.types import FileRef, Status
from support.stub_server import KEY, MODEL, MOVIE, PICTURE, Fault, StubServer, running

INPUT = {"56_text": "a slow pan", "118_image": "Runcomfy_Example_1290_1.png"}


class Either:
    """One face for both clients: every call is awaited, the synchronous one runs in a thread."""

    def __init__(self, client: Client | AsyncClient) -> None:
        self.client = client

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.client, name)

        async def call(*args: Any, **options: Any) -> Any:
            if inspect.iscoroutinefunction(method):
                return await method(*args, **options)
            return await asyncio.to_thread(method, *args, **options)

        return call


@pytest.fixture
def stub() -> Iterator[StubServer]:
    with running() as server:
        yield server


@pytest.fixture(params=["sync", "async"])
async def client(request: pytest.FixtureRequest, stub: StubServer) -> AsyncIterator[Either]:
    if request.param == "sync":
        with Client(stub.url, KEY) as plain:
            yield Either(plain)
    else:
        async with AsyncClient(stub.url, KEY) as awaited:
            yield Either(awaited)


async def connect(like: Either, url: str, key: str | None = KEY, **options: Any) -> Either:
    return Either(type(like.client)(url, key, **options))


async def close(client: Either) -> None:
    await (client.close() if isinstance(client.client, Client) else client.aclose())


def test_both_clients_offer_the_same() -> None:
    def offered(kind: type) -> dict[str, list[str]]:
        return {
            name: list(inspect.signature(method).parameters)
            for name, method in vars(kind).items()
            if not name.startswith("_") and name not in ("close", "aclose") and callable(method)
        }

    assert offered(Client) == offered(AsyncClient)
    assert {
        "submit",
        "status",
        "result",
        "cancel",
        "wait",
        "run",
        "upload",
        "models",
        "model",
        "download",
    } < set(offered(Client))


async def test_run_from_submit_to_result(client: Either, stub: StubServer) -> None:
    seen: list[Status] = []
    result = await client.run(MODEL, INPUT, on_status=seen.append)
    assert ("succeeded", "draft") == (result.status, result.engine)
    assert ["in_queue", "in_progress", "completed"] == [status.status for status in seen]
    assert (2, 0.42, "rendering") == (seen[0].queue_position, seen[1].progress, seen[1].stage)
    [submitted] = stub.calls("POST", "/v1/models/")
    assert (INPUT, f"Bearer {KEY}") == (submitted.json, submitted.headers["authorization"])


async def test_an_awaitable_callback_is_awaited(stub: StubServer) -> None:
    seen = []

    async def note(status: Status) -> None:
        await asyncio.sleep(0)
        seen.append(status.status)

    async with AsyncClient(stub.url, KEY) as client:
        await client.run(MODEL, INPUT, on_status=note)
    assert ["in_queue", "in_progress", "completed"] == seen


async def test_cost_comes_where_it_is_asked_for(client: Either, stub: StubServer) -> None:
    stub.polls = []
    request = await client.submit(MODEL, INPUT)
    result = await client.wait(request, include_cost=True)
    assert 2.85 == result.cost
    assert (await client.result(request.request_id)).cost is None


async def test_an_early_result_is_the_present_state(client: Either, stub: StubServer) -> None:
    request = await client.submit(MODEL, INPUT)
    result = await client.result(request)
    assert ("in_queue", False, ()) == (result.status, result.done, result.outputs())


async def test_cancel_while_queued_and_while_running(client: Either, stub: StubServer) -> None:
    stub.hold = True
    queued = await client.submit(MODEL, INPUT)
    assert (await client.cancel(queued)).cancelled
    with pytest.raises(errors.RequestCancelled):
        await client.wait(queued)
    stub.polls = [{"status": "in_progress"}]
    runs = await client.submit(MODEL, INPUT)
    await client.status(runs)
    answer = await client.cancel(runs.request_id)
    assert (False, "not_cancellable", "in_progress") == (answer.cancelled, answer.outcome, answer.status)


async def test_a_failed_request_carries_its_error(client: Either, stub: StubServer) -> None:
    stub.outcome = {
        "status": "failed",
        "error": {"code": "out_of_memory", "message": "too large", "node": "57"},
    }
    with pytest.raises(errors.RequestFailed, match=r"too large \[out_of_memory\]") as caught:
        await client.run(MODEL, INPUT)
    error = caught.value.result.error
    assert error is not None
    assert ("out_of_memory", "57") == (error.code, error.node)


async def test_a_wait_that_is_given_up_leaves_the_request(client: Either, stub: StubServer) -> None:
    stub.hold = True
    request = await client.submit(MODEL, INPUT)
    with pytest.raises(errors.WaitTimeout):
        await client.wait(request, timeout=0.3)
    assert (await client.status(request)).status == "in_progress"


async def test_urls_of_another_origin_are_not_followed(client: Either, stub: StubServer) -> None:
    with running() as other:
        stub.public = other.url
        request = await client.submit(MODEL, INPUT)
        assert request.status_url is not None
        assert request.status_url.startswith(other.url)
        await client.status(request)
        await client.result(request)
        await client.cancel(request)
        assert [] == other.seen


async def test_faults_in_passing_are_overcome(client: Either, stub: StubServer) -> None:
    stub.fail("GET", "/status$", Fault(drop=True))
    stub.fail("GET", "/status$", Fault(502, b"<html>"))
    stub.fail("GET", "/status$", Fault(503, {}, {"Retry-After": "0"}))
    stub.fail("GET", "/result$", Fault(429, {}, {"Retry-After": "0"}))
    assert "succeeded" == (await client.run(MODEL, INPUT)).status


async def test_a_submit_whose_answer_is_lost_is_not_sent_again(client: Either, stub: StubServer) -> None:
    stub.fail("POST", "/v1/models/", Fault(drop=True))
    with pytest.raises(errors.ConnectionFailed, match="may have been accepted") as caught:
        await client.submit(MODEL, INPUT)
    assert caught.value.sent
    assert 1 == len(stub.calls("POST", "/v1/models/"))


async def test_a_submit_that_was_refused_for_now_is_sent_again(client: Either, stub: StubServer) -> None:
    body = {"error_code": 429002, "error_message": "full"}
    stub.fail("POST", "/v1/models/", Fault(429, body, {"Retry-After": "0"}))
    stub.fail("POST", "/v1/models/", Fault(503, {}, {"Retry-After": "0"}))
    await client.submit(MODEL, INPUT)
    assert 3 == len(stub.calls("POST", "/v1/models/"))
    assert 1 == len(stub.jobs)


async def test_a_full_queue_without_a_time_is_the_callers(client: Either, stub: StubServer) -> None:
    stub.fail("POST", "/v1/models/", Fault(429, {"error_code": 429002, "error_message": "full"}))
    with pytest.raises(errors.RateLimited, match="full"):
        await client.submit(MODEL, INPUT)


async def test_no_server(client: Either) -> None:
    nobody = await connect(client, "http://127.0.0.1:9")
    with pytest.raises(errors.ConnectionFailed, match=r"cannot connect to http://127\.0\.0\.1:9") as caught:
        await nobody.submit(MODEL, INPUT)
    assert not caught.value.sent
    await close(nobody)


async def test_a_server_that_says_nothing_runs_into_the_timeout(client: Either) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # connects, but nobody reads
        hasty = await connect(client, f"http://127.0.0.1:{silent.getsockname()[1]}", timeout=0.2)
        with pytest.raises(errors.ConnectionFailed, match="no answer in time"):
            await hasty.submit(MODEL, INPUT)
        await close(hasty)


@pytest.mark.parametrize("key", [None, "wrong"])
async def test_without_a_good_key(client: Either, stub: StubServer, key: str | None) -> None:
    stranger = await connect(client, stub.url, key or "")
    with pytest.raises(errors.Unauthorized) as caught:
        await stranger.submit(MODEL, INPUT)
    assert (401, 400004, "trace-1") == (caught.value.status, caught.value.error_code, caught.value.trace_id)
    assert (key is not None) == ("authorization" in stub.seen[-1].headers)
    await close(stranger)


async def test_unknown_names(client: Either) -> None:
    for call in (
        client.status("nobody"),
        client.result("nobody"),
        client.cancel("nobody"),
        client.model("a/b"),
    ):
        with pytest.raises(errors.NotFound):
            await call


async def test_an_error_behind_http_200(client: Either, stub: StubServer) -> None:
    stub.fail("POST", "/v1/models/", Fault(200, {"error_code": 400004, "error_message": "no such user"}))
    with pytest.raises(errors.Unauthorized, match="no such user"):
        await client.submit(MODEL, INPUT)


async def test_bad_fields_are_listed(client: Either, stub: StubServer) -> None:
    detail = [{"loc": ["25_value"], "msg": "25_value must be one of 81, 141; got 82", "type": "enum"}]
    stub.fail(
        "POST", "/v1/models/", Fault(422, {"error_code": 422001, "error_message": "bad", "detail": detail})
    )
    with pytest.raises(errors.InvalidInput) as caught:
        await client.submit(MODEL, {**INPUT, "25_value": 82})
    assert [("25_value", "enum")] == [(field.field, field.type) for field in caught.value.fields]


async def test_a_redirect_takes_the_key_nowhere(client: Either, stub: StubServer) -> None:
    with running() as other:
        stub.fail("GET", "/status$", Fault(302, {}, {"Location": f"{other.url}/v1/requests/x/status"}))
        with pytest.raises(errors.ApiError, match="points to"):
            await client.status("x")
        assert [] == other.seen


async def test_the_catalog(client: Either, stub: StubServer) -> None:
    page = await client.models(search="vace", limit=10)
    assert (1, [MODEL]) == (page.total, [model.model_id for model in page])
    assert {"search": ["vace"], "limit": ["10"]} == stub.seen[-1].query
    assert 0 == len(await client.models(search="nothing"))
    model = await client.model(MODEL)
    assert ("float", 0.05, "second") == (
        (model.input_schema or {})["properties"]["108_cfg"]["type"],
        model.base_price_usd,
        model.price_unit,
    )


@pytest.mark.parametrize("way", ["path", "text", "file"])
async def test_an_upload(client: Either, stub: StubServer, tmp_path: Path, way: str) -> None:
    path = tmp_path / "kätzchen.png"
    path.write_bytes(PICTURE)
    if way == "file":
        source = io.BytesIO(PICTURE)
        source.read(9)
        ref = await client.upload(source, name=path.name)
        assert not source.closed
    else:
        ref = await client.upload(path if way == "path" else str(path))
    assert FileRef("file1", f"{stub.url}/v1/files/file1", path.name, "image/png", len(PICTURE)) == ref
    stored = stub.uploads["file1"]
    assert ("file", PICTURE) == (stored["field"], stored["content"])


async def test_an_upload_is_whole_when_it_is_sent_again(
    client: Either, stub: StubServer, tmp_path: Path
) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(MOVIE)
    stub.fail("POST", "/v1/files", Fault(drop=True))
    await client.upload(path)
    assert [MOVIE] == [stored["content"] for stored in stub.uploads.values()]


async def test_outputs_are_saved_once_and_over_nothing(
    client: Either, stub: StubServer, tmp_path: Path
) -> None:
    result = await client.run(MODEL, INPUT)
    folder = tmp_path / "new" / "out"
    [first] = await client.save(result, folder)
    assert folder / f"{result.request_id}-1.mp4" == first
    [second] = await client.save(result, folder)
    assert folder / f"{result.request_id}-1_2.mp4" == second
    assert [MOVIE, MOVIE] == [first.read_bytes(), second.read_bytes()]
    assert sorted([first, second]) == sorted(folder.iterdir())
    assert 0o600 & first.stat().st_mode == 0o600


async def test_a_download_over_a_file_needs_a_word(client: Either, stub: StubServer, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        await client.download(f"{stub.url}/files/a.png", path)
    assert b"mine" == path.read_bytes()
    assert path == await client.download(f"{stub.url}/files/a.png", path, overwrite=True)
    assert PICTURE == path.read_bytes()


async def test_a_cut_download_goes_on_and_is_whole(client: Either, stub: StubServer, tmp_path: Path) -> None:
    stub.fail("GET", "/files/", Fault(cut=600_000))
    stub.fail("GET", "/files/", Fault(cut=100_000))
    path = await client.download(f"{stub.url}/files/a.mp4", tmp_path / "a.mp4")
    assert MOVIE == path.read_bytes()
    ranges = [seen.headers.get("range") for seen in stub.calls("GET", "/files/")]
    assert [None, "bytes=600000-", "bytes=700000-"] == ranges


async def test_a_file_that_changed_meanwhile_is_fetched_anew(
    client: Either, stub: StubServer, tmp_path: Path
) -> None:
    stub.fail("GET", "/files/", Fault(cut=1000))
    stub.fail("GET", "/files/", Fault(416, {}))
    path = await client.download(f"{stub.url}/files/a.mp4", tmp_path / "a.mp4")
    assert MOVIE == path.read_bytes()


async def test_a_download_that_fails_leaves_nothing(client: Either, stub: StubServer, tmp_path: Path) -> None:
    with pytest.raises(errors.NotFound):
        await client.download(f"{stub.url}/files/none.png", tmp_path / "none.png")
    assert [] == list(tmp_path.iterdir())


async def test_another_origin_sees_no_key_at_a_download(
    client: Either, stub: StubServer, tmp_path: Path
) -> None:
    with running() as other:
        await client.download(f"{other.url}/files/a.png", tmp_path / "a.png")
        stub.fail("GET", "/files/", Fault(302, {}, {"Location": f"{other.url}/files/a.png"}))
        await client.download(f"{stub.url}/files/a.png", tmp_path / "b.png")
        assert [False, False] == ["authorization" in seen.headers for seen in other.seen]
    assert "authorization" in stub.calls("GET", "/files/")[0].headers


async def test_the_environment_names_server_and_key(
    client: Either, stub: StubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUSHES_BASE_URL", f"{stub.url}/v1/")
    monkeypatch.setenv("RUSHES_API_KEY", KEY)
    own = Either(type(client.client)())
    assert 1 == (await own.models()).total
    await close(own)


async def test_a_proxy_never_stands_before_this_machine(
    client: Either, stub: StubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    own = await connect(client, stub.url)
    assert 1 == (await own.models()).total
    await close(own)


async def test_an_http_client_of_ones_own_stays_open(stub: StubServer) -> None:
    with httpx.Client() as mine:
        with Client(stub.url, KEY, http=mine) as client:
            client.models()
        assert not mine.is_closed
    async with httpx.AsyncClient() as ours:
        async with AsyncClient(stub.url, KEY, http=ours) as awaited:
            await awaited.models()
        assert not ours.is_closed


async def test_many_requests_at_once(stub: StubServer) -> None:
    async with AsyncClient(stub.url, KEY) as client:
        results = await asyncio.gather(*(client.run(MODEL, INPUT) for _ in range(20)))
    assert 20 == len({result.request_id for result in results})
