"""The native wire, state by state, as the seeds and RunComfy's documentation show it."""

import base64
import re

import httpx
import pytest

from rushes.queue.base import Beat
from rushes.requests.record import Failure, Progress
from support.app import BASE, SAMPLE, T2I, VACE, App, running_app
from support.engines import png


def error(answer: httpx.Response, status: int, code: int) -> dict:
    """Every error has this one form."""
    assert status == answer.status_code, answer.text
    body = answer.json()
    assert set(body) <= {"error_code", "error_message", "detail"}
    assert code == body["error_code"]
    assert body["error_message"]
    assert answer.headers["x-request-id"]
    assert answer.headers["content-type"] == "application/json"
    return body


async def test_submit_answers_the_four_fields(app: App) -> None:
    answer = await app.http.post(f"/v1/models/{VACE}", json={"56_text": "a man", "118_image": SAMPLE})
    assert answer.status_code == 200
    body = answer.json()
    id_ = body["request_id"]
    assert {
        "request_id": id_,
        "status_url": f"{BASE}/v1/requests/{id_}/status",
        "result_url": f"{BASE}/v1/requests/{id_}/result",
        "cancel_url": f"{BASE}/v1/requests/{id_}/cancel",
    } == body
    assert re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", id_)


async def test_in_queue(app: App) -> None:
    first, second = await app.submit(), await app.submit()
    for id_, position in ((first, 1), (second, 2)):
        urls = {f"{verb}_url": f"{BASE}/v1/requests/{id_}/{verb}" for verb in ("status", "result")}
        expected = {"request_id": id_, "status": "in_queue", "queue_position": position, **urls}
        assert expected == (await app.http.get(f"/v1/requests/{id_}/status")).json()
        early = (await app.http.get(f"/v1/requests/{id_}/result")).json()
        assert ("in_queue", position) == (early["status"], early["queue_position"])
        assert "output" not in early
    await app.claim()
    assert (await app.http.get(f"/v1/requests/{second}/status")).json()["queue_position"] == 1


async def test_in_progress(app: App) -> None:
    id_ = await app.submit()
    lease = await app.claim()
    await app.store.renew([Beat(lease.request.id, lease.fence, Progress(0.42, "rendering", eta=3.14))])
    status = (await app.http.get(f"/v1/requests/{id_}/status")).json()
    assert tuple(status[name] for name in ("status", "progress", "stage", "eta")) == (
        "in_progress",
        0.42,
        "rendering",
        3.1,
    )
    assert "queue_position" not in status
    early = await app.http.get(f"/v1/requests/{id_}/result")
    assert early.status_code == 200
    assert early.json()["status"] == "in_progress"
    assert "output" not in early.json()


async def test_succeeded(app: App) -> None:
    id_ = await app.submit()
    await app.produce(await app.claim())
    assert (await app.http.get(f"/v1/requests/{id_}/status")).json()["status"] == "completed"
    result = (await app.http.get(f"/v1/requests/{id_}/result")).json()
    assert (result["status"], result["engine"], result["model_id"]) == ("succeeded", "draft", T2I)
    assert result["output"]["images"] == [result["output"]["image"]]
    assert "video" not in result["output"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", result["created_at"])
    assert result["created_at"] <= result["started_at"] <= result["finished_at"]
    assert "cost" not in result
    priced = await app.http.get(f"/v1/requests/{id_}/result", params={"include_cost": "true"})
    assert priced.json()["cost"] == 0.25


async def test_a_video_is_told_from_an_image(app: App) -> None:
    id_ = await app.submit()
    await app.produce(await app.claim(), kind="video")
    result = (await app.http.get(f"/v1/requests/{id_}/result")).json()
    assert {"video", "videos"} == set(result["output"])
    assert (result["files"][0]["frames"], result["files"][0]["fps"]) == (81, 16.0)


async def test_failed(app: App) -> None:
    id_ = await app.submit()
    await app.store.fail(await app.claim(), Failure("bad_node", "It broke.", node="57 KSampler"))
    assert (await app.http.get(f"/v1/requests/{id_}/status")).json()["status"] == "completed"
    result = (await app.http.get(f"/v1/requests/{id_}/result")).json()
    assert result["status"] == "failed"
    assert result["error"] == {"code": "bad_node", "message": "It broke.", "node": "57 KSampler"}
    assert "output" not in result


async def test_cancel_while_queued(app: App) -> None:
    id_ = await app.submit()
    for _ in range(2):
        answer = await app.http.post(f"/v1/requests/{id_}/cancel")
        assert answer.status_code == 202
        assert {"request_id": id_, "status": "cancelled", "outcome": "cancelled"} == answer.json()
    assert (await app.http.get(f"/v1/requests/{id_}/status")).json()["status"] == "cancelled"
    assert (await app.http.get(f"/v1/requests/{id_}/result")).json()["status"] == "cancelled"


async def test_what_runs_or_has_ended_is_not_cancellable(app: App) -> None:
    id_ = await app.submit()
    lease = await app.claim()
    for status in ("in_progress", "completed"):
        answer = await app.http.post(f"/v1/requests/{id_}/cancel")
        assert answer.status_code == 202
        assert {"request_id": id_, "status": status, "outcome": "not_cancellable"} == answer.json()
        if status == "in_progress":
            await app.produce(lease)


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer ", "Basic abc", "Bearer rsh_no", "Bearer ünïcode"]
)
async def test_without_a_valid_key(app: App, header: str | None) -> None:
    id_ = await app.submit()
    headers = {} if header is None else {"Authorization": header.encode()}
    async with httpx.AsyncClient(transport=app.http._transport, base_url=BASE) as nobody:
        for method, path in (
            ("POST", f"/v1/models/{T2I}"),
            ("GET", f"/v1/requests/{id_}/status"),
            ("GET", f"/v1/requests/{id_}/result"),
            ("POST", f"/v1/requests/{id_}/cancel"),
            ("GET", "/v1/models"),
            ("POST", "/v1/files"),
        ):
            answer = await nobody.request(method, path, headers=headers, content=b"{}")
            error(answer, 401, 400004)
            assert answer.headers["www-authenticate"] == "Bearer"


async def test_a_revoked_key_stops_working(app: App) -> None:
    assert (await app.stranger.get("/v1/models")).status_code == 200
    await app.store.revoke_key("other")
    error(await app.stranger.get("/v1/models"), 401, 400004)


async def test_another_accounts_request_does_not_exist(app: App) -> None:
    id_ = await app.submit()
    unknown = "01a1fc73-7526-715f-9349-20fd19fec7bd"
    for method, verb in (("GET", "status"), ("GET", "result"), ("POST", "cancel")):
        theirs = error(await app.stranger.request(method, f"/v1/requests/{id_}/{verb}"), 404, 404001)
        none = error(await app.http.request(method, f"/v1/requests/{unknown}/{verb}"), 404, 404001)
        assert theirs == none
    assert (await app.http.get(f"/v1/requests/{id_}/status")).json()["status"] == "in_queue"


async def test_wrong_addresses_and_methods(app: App) -> None:
    id_ = await app.submit()
    error(await app.http.get("/v1/requests/nonsense/status"), 400, 400001)
    error(await app.http.get(f"/v1/requests/{id_}/nonsense"), 404, 404001)
    error(await app.http.get(f"/v1/requests/{id_}"), 404, 404001)
    error(await app.http.post(f"/v1/requests/{id_}/status"), 405, 405001)
    error(await app.http.get(f"/v1/requests/{id_}/cancel"), 405, 405001)
    error(await app.http.delete("/v1/models"), 405, 405001)
    error(await app.http.get("/nothing/here"), 404, 404001)
    body = error(await app.http.post("/v1/models/no/such", json={}), 404, 404001)
    assert "GET /v1/models" in body["error_message"]


async def test_all_failing_fields_at_once(app: App) -> None:
    given = {"56_text": 7, "25_value": 82, "38_value": 99, "steps": 3, "108_cfg": "high"}
    body = error(await app.http.post(f"/v1/models/{VACE}", json=given), 422, 422001)
    assert [entry["loc"][0] for entry in body["detail"]] == [
        "56_text",
        "118_image",
        "25_value",
        "38_value",
        "108_cfg",
        "steps",
    ]
    assert "47_value" in body["detail"][-1]["msg"]


@pytest.mark.parametrize(
    "content",
    [b"", b"nonsense", b"[]", b"null", b'{"prompt": NaN}', b"\xff\xfe{}", b'{"prompt":' * 5000, b"{" * 100_000],
)
async def test_bodies_that_are_no_input(app: App, content: bytes) -> None:
    error(await app.http.post(f"/v1/models/{T2I}", content=content), 400, 400003)


@pytest.mark.parametrize("value", ["1e999", "9" * 400, "{}", '[["x"]]', "1.5", "true"])
async def test_values_that_are_no_steps(app: App, value: str) -> None:
    text = f'{{"56_text": "x", "118_image": "{SAMPLE}", "47_value": {value}}}'
    answer = await app.http.post(f"/v1/models/{VACE}", content=text)
    assert answer.status_code in (400, 422), answer.text
    assert answer.json()["error_code"] in (400003, 422001)


async def test_a_lone_surrogate_is_no_crash(app: App) -> None:
    answer = await app.http.post(f"/v1/models/{T2I}", content=b'{"prompt": "\\ud800", "\\udfff": 1}')
    assert answer.status_code in (400, 422), answer.text


async def test_defaults_are_recorded(app: App) -> None:
    answer = await app.http.post(f"/v1/models/{VACE}", json={"56_text": "x", "118_image": SAMPLE})
    record = await app.store.get(answer.json()["request_id"])
    assert record is not None
    assert b'"4_valuex3_value":"1024x576 (16:9)"' in record.input
    assert b'"47_value":12' in record.input


async def test_body_limit(tmp_path) -> None:
    async with running_app(tmp_path / "data", max_body_bytes=2000) as app:
        body = {"prompt": "x" * 1900}
        assert (await app.http.post(f"/v1/models/{T2I}", json=body)).status_code == 200
        error(await app.http.post(f"/v1/models/{T2I}", json={"prompt": "x" * 2000}), 413, 413001)

        async def chunks():
            for _ in range(30):
                yield b" " * 100

        error(await app.http.post(f"/v1/models/{T2I}", content=chunks()), 413, 413001)


async def test_rate_limit(tmp_path) -> None:
    async with running_app(tmp_path / "data", rate_limit=0.1) as app:
        assert (await app.http.post(f"/v1/models/{T2I}", json={"prompt": "x"})).status_code == 200
        answer = await app.http.post(f"/v1/models/{T2I}", json={"prompt": "x"})
        error(answer, 429, 429001)
        assert 1 <= int(answer.headers["retry-after"]) <= 10
        # per key, and for submits alone
        assert (await app.stranger.post(f"/v1/models/{T2I}", json={"prompt": "x"})).status_code == 200
        assert (await app.http.get("/v1/models")).status_code == 200


async def test_queue_limit(tmp_path) -> None:
    async with running_app(tmp_path / "data", queue_limit=2) as app:
        await app.submit()
        await app.submit()
        answer = await app.http.post(f"/v1/models/{T2I}", json={"prompt": "x"})
        error(answer, 429, 429002)
        assert int(answer.headers["retry-after"]) >= 1
        await app.claim()
        await app.submit()


async def test_request_ids_of_clients_come_back(app: App) -> None:
    answer = await app.http.get("/v1/models", headers={"X-Request-Id": "abc-123"})
    assert answer.headers["x-request-id"] == "abc-123"
    answer = await app.http.get("/v1/models", headers={"X-Request-Id": "no spaces"})
    assert answer.headers["x-request-id"] != "no spaces"
    assert answer.headers["x-request-id"]


async def test_an_unreachable_store_answers_503(app: App) -> None:
    await app.store.close()
    for method, path in (("POST", f"/v1/models/{T2I}"), ("GET", "/healthz"), ("GET", "/v1/models")):
        answer = await app.http.request(method, path, json={"prompt": "x"})
        error(answer, 503, 503001)
        assert int(answer.headers["retry-after"]) >= 1


async def test_cors(tmp_path) -> None:
    async with running_app(tmp_path / "data", cors_origins=("https://app.example",)) as app:
        preflight = await app.http.options(
            f"/v1/models/{T2I}",
            headers={
                "Origin": "https://app.example",
                "Access-Control-Request-Method": "POST",
                "Access-Control-Request-Headers": "authorization, content-type",
            },
        )
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == "https://app.example"
        answer = await app.http.get("/v1/models", headers={"Origin": "https://app.example"})
        assert answer.headers["access-control-allow-origin"] == "https://app.example"
        other = await app.http.get("/v1/models", headers={"Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers


async def test_public_url_and_forwarded_base(tmp_path) -> None:
    async with running_app(tmp_path / "data", public_url="https://api.example/rushes/") as app:
        answer = await app.http.post(f"/v1/models/{T2I}", json={"prompt": "x"})
        assert answer.json()["status_url"].startswith("https://api.example/rushes/v1/requests/")


async def test_file_inputs_that_are_refused_at_once(app: App) -> None:
    for value, reason in (
        ("http://example.com/a.png", "input_not_https"),
        ("https://127.0.0.1/a.png", "input_address_refused"),
        ("https://[::1]/a.png", "input_address_refused"),
        ("https://169.254.169.254/latest/meta-data", "input_address_refused"),
        ("nosuch.png", "input_not_a_file"),
        ("../../etc/passwd", "input_not_a_file"),
        ("data:image/png;base64,!!!", "input_not_a_file"),
        ("data:image/png", "input_not_a_file"),
        ("file_01a1fc73-7526-715f-9349-20fd19fec7bd", "input_gone"),
        (f"{BASE}/v1/files/file_0", "input_gone"),
        (f"{BASE}/outputs/x/1/1.png?expires=9999999999&signature=x", "input_link_expired"),
    ):
        answer = await app.http.post(f"/v1/models/{VACE}", json={"56_text": "x", "118_image": value})
        detail = error(answer, 422, 422001)["detail"]
        assert [(["118_image"], reason)] == [(entry["loc"], entry["type"]) for entry in detail], value
        assert "118_image" in detail[0]["msg"]
    assert sum((await app.store.counts()).values()) == 0


async def test_a_data_uri_is_stored_and_kept_out_of_the_record(app: App) -> None:
    value = "data:image/png;base64," + base64.b64encode(png(40, 30)).decode()
    answer = await app.http.post(f"/v1/models/{VACE}", json={"56_text": "x", "118_image": value})
    assert answer.status_code == 200, answer.text
    record = await app.store.get(answer.json()["request_id"])
    assert record is not None
    assert record.inputs == "pending"
    source = record.sources["118_image"]
    assert source.kind == "stored"
    assert len(png(40, 30)) == (await app.storage.head(source.value)).size
    assert len(record.input) < 3000


async def test_upload_then_use(app: App) -> None:
    content = png(64, 48)
    for options in (
        {"files": {"file": ("a b.png", content, "image/png")}},
        {"content": content, "headers": {"Content-Type": "image/png"}},
    ):
        answer = await app.http.post("/v1/files", **options)
        assert answer.status_code == 200, answer.text
        file = answer.json()
        assert {"id", "url", "name", "content_type", "size"} == set(file)
        assert ("image/png", len(content)) == (file["content_type"], file["size"])
        assert file == (await app.http.get(file["url"])).json()
        error(await app.stranger.get(file["url"]), 404, 404001)
        for value in (file["url"], file["id"]):
            given = {"56_text": "x", "118_image": value}
            accepted = await app.http.post(f"/v1/models/{VACE}", json=given)
            assert accepted.status_code == 200, accepted.text
            refused = await app.stranger.post(f"/v1/models/{VACE}", json=given)
            assert error(refused, 422, 422001)["detail"][0]["type"] == "input_gone"


async def test_uploads_that_are_refused(app: App) -> None:
    whole = png(64, 48)
    for content in (b"", b"<html><body>login</body></html>", whole[:100], b"\x89PNG\r\n\x1a\n" + b"\0" * 200):
        answer = await app.http.post("/v1/files", content=content, headers={"Content-Type": "image/png"})
        assert error(answer, 422, 422001)["detail"][0]["loc"] == ["file"]
    answer = await app.http.post("/v1/files", data={"name": "x"}, files={"other": ("a.png", whole)})
    error(answer, 422, 422001)
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    error(await app.http.post("/v1/files", content=b"garbage", headers=headers), 400, 400003)
    headers = {"Content-Type": "multipart/form-data"}
    error(await app.http.post("/v1/files", content=b"garbage", headers=headers), 400, 400003)


async def test_upload_limit(tmp_path) -> None:
    async with running_app(tmp_path / "data", max_image_bytes=20_000, max_video_bytes=20_000) as app:
        small, large = png(40, 40), png(400, 400)
        assert (await app.http.post("/v1/files", content=small)).status_code == 200
        error(await app.http.post("/v1/files", content=large), 413, 413001)
        error(await app.http.post("/v1/files", files={"file": ("a.png", large)}), 413, 413001)

        async def chunks():
            for _ in range(100):
                yield b"\0" * 10_000

        error(await app.http.post("/v1/files", content=chunks()), 413, 413001)


async def test_an_output_can_be_the_next_input(app: App) -> None:
    id_ = await app.submit()
    output = await app.produce(await app.claim(), png(32, 32))
    url = (await app.http.get(f"/v1/requests/{id_}/result")).json()["output"]["image"]
    answer = await app.http.post(f"/v1/models/{VACE}", json={"56_text": "x", "118_image": url})
    assert answer.status_code == 200, answer.text
    record = await app.store.get(answer.json()["request_id"])
    assert record is not None
    assert output.key == record.sources["118_image"].value
    assert b"signature" not in record.input


class TestOutputs:
    @pytest.fixture
    async def url(self, app: App) -> str:
        id_ = await app.submit()
        await app.produce(await app.claim(), bytes(range(100)))
        result = await app.http.get(f"/v1/requests/{id_}/result")
        return str(result.json()["output"]["image"])

    async def test_whole(self, app: App, url: str) -> None:
        async with httpx.AsyncClient(transport=app.http._transport) as anyone:
            answer = await anyone.get(url)
        assert bytes(range(100)) == answer.content
        assert tuple(
            answer.headers[name]
            for name in ("content-type", "x-content-type-options", "accept-ranges", "content-length")
        ) == ("image/png", "nosniff", "bytes", "100")
        assert re.fullmatch(r'"[^"]+"', answer.headers["etag"])

    @pytest.mark.parametrize(
        ("header", "start", "end"),
        [("bytes=0-9", 0, 10), ("bytes=90-", 90, 100), ("bytes=-5", 95, 100), ("bytes=50-5000", 50, 100)],
    )
    async def test_ranges(self, app: App, url: str, header: str, start: int, end: int) -> None:
        answer = await app.http.get(url, headers={"Range": header})
        assert answer.status_code == 206
        assert bytes(range(start, end)) == answer.content
        assert f"bytes {start}-{end - 1}/100" == answer.headers["content-range"]

    async def test_no_ranges(self, app: App, url: str) -> None:
        for header in ("bytes=5-2", "pages=1-2", "bytes=", "bytes=0-1,4-5"):
            answer = await app.http.get(url, headers={"Range": header})
            assert (answer.status_code, len(answer.content)) == (200, 100), header
        error(await app.http.get(url, headers={"Range": "bytes=100-"}), 416, 416001)

    async def test_validators(self, app: App, url: str) -> None:
        etag = (await app.http.get(url)).headers["etag"]
        assert (await app.http.get(url, headers={"If-None-Match": etag})).status_code == 304
        same = await app.http.get(url, headers={"Range": "bytes=0-0", "If-Range": etag})
        other = await app.http.get(url, headers={"Range": "bytes=0-0", "If-Range": '"other"'})
        assert (same.status_code, other.status_code) == (206, 200)
        head = await app.http.head(url)
        assert (head.status_code, head.headers["content-length"], head.content) == (200, "100", b"")

    async def test_links_cannot_be_changed(self, app: App, url: str) -> None:
        for wrong in (
            url.split("?")[0],
            url[:-1] + ("A" if url[-1] != "A" else "B"),
            re.sub(r"expires=\d+", "expires=9999999999", url),
            re.sub(r"expires=\d+", "expires=x", url),
            url.replace("1.png", "2.png"),
            url.replace("/outputs/", "/outputs/../files/"),
        ):
            answer = await app.http.get(wrong)
            assert answer.status_code in (403, 404), wrong

    async def test_links_expire_and_are_renewed(self, tmp_path) -> None:
        async with running_app(tmp_path / "short", output_url_seconds=1) as app:
            id_ = await app.submit()
            await app.produce(await app.claim())
            urls = []
            for _ in range(2):
                result = (await app.http.get(f"/v1/requests/{id_}/result")).json()
                urls.append(result["output"]["image"])
            old = re.sub(r"expires=\d+", "expires=1000000000", urls[0])
            error(await app.http.get(old), 403, 403001)
            assert (await app.http.get(urls[1])).status_code == 200

    async def test_swept_outputs_say_so(self, app: App) -> None:
        id_ = await app.submit()
        await app.produce(await app.claim())
        assert [id_] == [request.id for request in await app.store.sweep(4e9, 10)]
        result = (await app.http.get(f"/v1/requests/{id_}/result")).json()
        assert (result["status"], result["output"]) == ("succeeded", {})
        assert result["expired_at"]


async def test_catalog_routes(app: App) -> None:
    listing = (await app.http.get("/v1/models")).json()
    assert 4 == listing["total"] == len(listing["models"])
    page = (await app.http.get("/v1/models", params={"limit": 1, "offset": 1})).json()
    assert [listing["models"][1]] == page["models"]
    found = (await app.http.get("/v1/models", params={"search": "vace"})).json()
    assert [model["model_id"] for model in found["models"]] == [VACE]
    categories = (await app.http.get("/v1/models/categories")).json()["categories"]
    assert "text-to-image" in categories
    of_one = (await app.http.get("/v1/models", params={"category": "text-to-image"})).json()
    assert [model["model_id"] for model in of_one["models"]] == [T2I]
    one = (await app.http.get(f"/v1/models/{VACE}")).json()
    assert next(iter(one["input_schema"]["properties"])) == "56_text"
    error(await app.http.get("/v1/models", params={"limit": "many"}), 400, 400003)
    error(await app.http.get("/v1/models", params={"limit": 0}), 400, 400003)
    error(await app.http.get("/v1/models/no/such"), 404, 404001)
    document = (await app.http.get(f"/v1/models/{VACE}/openapi.json")).json()
    assert document["openapi"][:3] == "3.1"
    whole = (await app.http.get("/openapi.json")).json()
    assert f"/v1/models/{VACE}" in whole["paths"]
    assert (await app.http.get("/")).json()["name"] == "Rushes"
    assert (await app.http.get("/healthz")).json() == {"status": "ok"}
