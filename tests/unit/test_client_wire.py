"""The client's addresses, answers and file names: pure functions of the wire."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from rushes.client import _save, _wire, errors
from rushes.client._core import Core
from rushes.client._wire import Call, Reply, Server
from rushes.client.types import FieldError, Output, Result, Submitted

BASE = "http://127.0.0.1:8000"
RUN = "0198c0de-0000-7000-8000-000000000001"


def answer(body: Any, status: int = 200) -> Reply:
    return Reply(status, {}, json.dumps(body).encode(), f"{BASE}/v1/x")


# addresses and the key


@pytest.mark.parametrize(
    ("given", "base"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("http://127.0.0.1:8000/", "http://127.0.0.1:8000"),
        ("https://model-api.runcomfy.net/v1", "https://model-api.runcomfy.net"),
        ("https://model-api.runcomfy.net/v1/", "https://model-api.runcomfy.net"),
        ("https://host.example/rushes/v1", "https://host.example/rushes"),
    ],
)
def test_base_url_is_taken_with_and_without_the_version(given: str, base: str) -> None:
    assert base == Server(given, None).base_url


@pytest.mark.parametrize(
    "given", ["", "127.0.0.1:8000", "ftp://a/", "http://", "http://a:99999", "http://u:p@a/", "http://a/?x=1"]
)
def test_what_is_no_address_is_refused(given: str) -> None:
    with pytest.raises(ValueError, match="no address of a server"):
        Server(given, None)


@pytest.mark.parametrize("key", ["two words", "line\nbreak", "schlüssel"])
def test_what_is_no_key_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match="API key"):
        Server(BASE, key)


def test_environment_gives_address_and_key() -> None:
    core = Core(environ={"RUSHES_BASE_URL": "https://a.example/v1", "RUSHES_API_KEY": " k1 \n"})
    assert ("https://a.example", "k1") == (core.server.base_url, core.server.api_key)
    assert BASE == Core(environ={}).server.base_url


def test_given_values_win_over_the_environment() -> None:
    core = Core(BASE, "", environ={"RUSHES_BASE_URL": "https://a.example", "RUSHES_API_KEY": "k1"})
    assert (BASE, None) == (core.server.base_url, core.server.api_key)


@pytest.mark.parametrize(
    "url",
    [
        "https://127.0.0.1:8000/x",
        "http://127.0.0.1:8001/x",
        "http://127.0.0.1/x",
        "http://127.0.0.1:8000@evil.example/x",
        "http://evil@127.0.0.1:8000/x",
        "http://127.0.0.1:8000.evil.example/x",
        "//evil.example/x",
        "file:///etc/passwd",
        "",
    ],
)
def test_the_key_goes_to_no_other_origin(url: str) -> None:
    server = Server(BASE, "secret")
    assert not server.owns(url)
    assert {} == server.headers_for(url)


def test_the_key_goes_to_the_own_origin() -> None:
    server = Server("https://Host.example", "secret")
    assert {"Authorization": "Bearer secret"} == server.headers_for("https://host.example:443/v1/x")


@pytest.mark.parametrize("action", ["status", "result", "cancel"])
def test_urls_of_the_server_are_followed_only_to_itself(action: str) -> None:
    server = Server(BASE, "secret")
    make: Callable[[Submitted], Call] = {
        "status": server.status,
        "result": lambda request: server.result(request, include_cost=False),
        "cancel": server.cancel,
    }[action]
    own = Submitted(RUN, **{f"{action}_url": f"{BASE}/elsewhere/{RUN}"})
    foreign = Submitted(RUN, **{f"{action}_url": f"https://evil.example/{RUN}"})
    assert f"{BASE}/elsewhere/{RUN}" == make(own).url
    assert f"{BASE}/v1/requests/{RUN}/{action}" == make(foreign).url
    assert f"{BASE}/v1/requests/{RUN}/{action}" == make(Submitted(RUN)).url


def test_ids_are_quoted_into_one_segment() -> None:
    server = Server(BASE, None)
    assert f"{BASE}/v1/requests/a%2F..%2Fb%3Fc/status" == server.status("a/../b?c").url
    assert f"{BASE}/v1/models/community/wan-2-2/a%20b" == server.model("community/wan-2-2/a b").url


@pytest.mark.parametrize("model_id", ["", "/", "a//b", "../admin", "a/./b"])
def test_model_ids_lead_nowhere_else(model_id: str) -> None:
    with pytest.raises(ValueError, match="no model id"):
        Server(BASE, None).submit(model_id, {})


def test_submit_is_compact_json_and_not_repeatable() -> None:
    call = Server(BASE, "secret").submit("a/b", {"prompt": "Zoë", "seed": 2**64 - 1})
    assert {"prompt": "Zoë", "seed": 2**64 - 1} == json.loads(call.content or b"")
    assert ("POST", f"{BASE}/v1/models/a/b", False) == (call.method, call.url, call.repeatable)
    assert "application/json" == call.headers["Content-Type"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object()])
def test_what_is_no_json_is_refused_before_it_is_sent(value: object) -> None:
    with pytest.raises(ValueError, match=r"JSON|Out of range"):
        Server(BASE, None).submit("a/b", {"x": value})


def test_queries_hold_only_what_was_given() -> None:
    call = Server(BASE, None).models({"search": "wan 2", "category": None, "limit": 5, "offset": 0})
    assert f"{BASE}/v1/models?search=wan+2&limit=5&offset=0" == call.url


# answers


def test_optional_fields_may_lack() -> None:
    assert Submitted("x") == _wire.submitted({"request_id": "x"})
    status = _wire.status({"request_id": "x", "status": "in_queue"})
    assert (None, None, None, None) == (status.queue_position, status.progress, status.eta, status.stage)
    assert () == _wire.result({"request_id": "x", "status": "succeeded"}).outputs()


def test_progress_is_read_and_bounded() -> None:
    body = {"request_id": "x", "status": "in_progress", "progress": 1.7, "eta": 3.1, "stage": "rendering"}
    status = _wire.status(body)
    assert (1.0, 3.1, "rendering", False) == (status.progress, status.eta, status.stage, status.done)


@pytest.mark.parametrize("odd", [True, "0.5", float("nan"), None, [], {}])
def test_odd_progress_is_no_progress(odd: object) -> None:
    body = {"request_id": "x", "status": "in_progress", "progress": odd, "eta": odd, "queue_position": odd}
    status = _wire.status(body)
    assert (None, None, None) == (status.progress, status.eta, status.queue_position)


def test_outputs_are_listed_once() -> None:
    a, b, c = "https://h.example/a.mp4?s=1", "https://h.example/b.png", "https://h.example/c"
    output = {"video": a, "videos": [a], "image": b, "images": [b, c], "files": [{"url": c}], "note": "done"}
    result = Result("x", "succeeded", output=output)
    assert (Output(a, "video"), Output(b, "image"), Output(c, "image")) == result.outputs()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        ({"code": "oom", "message": "no memory", "node": "57"}, "no memory [oom] (node 57)"),
        ([{"errorCode": 3, "error": "boom", "debugInfo": "…"}, {"error": "bang"}], "boom; bang [3]"),
        ("it broke", "it broke"),
        (None, "the server gave no reason"),
        ([], "the server gave no reason"),
    ],
)
def test_failures_of_every_shape_are_read(error: object, expected: str) -> None:
    result = _wire.result({"request_id": "x", "status": "failed", "error": error})
    assert expected == str(result.error)


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (401, 400004, errors.Unauthorized),
        (400, 400004, errors.Unauthorized),
        (403, 403001, errors.Unauthorized),
        (404, 404001, errors.NotFound),
        (400, 400001, errors.NotFound),
        (422, 422001, errors.InvalidInput),
        (413, 413001, errors.InvalidInput),
        (429, 429002, errors.RateLimited),
        (500, 500001, errors.ServerError),
        (503, None, errors.ServerError),
        (402, 400002, errors.ApiError),
        (302, None, errors.ApiError),
        (200, 400004, errors.Unauthorized),
        (200, "404001", errors.NotFound),
        (200, 429001, errors.RateLimited),
        (200, 500001, errors.ServerError),
    ],
)
def test_every_refusal_has_its_class(status: int, code: int | str | None, kind: type[errors.ApiError]) -> None:
    body = {"error_message": "no"} | ({"error_code": code} if code else {})
    with pytest.raises(errors.ApiError) as caught:
        _wire.body_of(answer(body, status))
    assert (kind, status, code, "no") == (
        type(caught.value),
        caught.value.status,
        caught.value.error_code,
        caught.value.message,
    )


@pytest.mark.parametrize(
    "body", [{"error_message": "no"}, {"message": "no"}, {"error": {"message": "no"}}, {"detail": "no"}]
)
def test_the_message_is_found_under_every_name(body: dict[str, Any]) -> None:
    assert "no" == _wire.error_of(answer(body, 500)).message


def test_all_fields_of_a_bad_input_are_listed() -> None:
    detail = [
        {"loc": ["body", "25_value"], "msg": "25_value must be one of 81, 141; got 82", "type": "enum"},
        {"loc": ["promptz"], "msg": "is unknown", "type": "unknown_field", "suggestion": "prompt"},
        "nonsense",
    ]
    error = _wire.error_of(answer({"error_code": 422001, "error_message": "bad", "detail": detail}, 422))
    assert [
        "25_value must be one of 81, 141; got 82",
        "promptz: is unknown (did you mean prompt?)",
    ] == [str(field) for field in error.fields]
    assert FieldError("promptz", "is unknown", "unknown_field", "prompt") == error.fields[1]
    assert "bad; 25_value must be one of 81, 141; got 82; promptz: is unknown (did you mean prompt?)" == str(
        error
    )


@pytest.mark.parametrize("body", [b"<html>", b"", b"[1]", b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_json_object_is_a_servers_error(body: bytes) -> None:
    with pytest.raises(errors.ServerError, match="is the address right"):
        _wire.body_of(Reply(200, {}, body, BASE))
    assert "HTTP 502 Bad Gateway" in _wire.error_of(Reply(502, {}, body, BASE)).message


def test_messages_cannot_steer_a_terminal() -> None:
    assert "a [31mb c" == _wire.error_of(answer({"error_message": "a\x1b[31mb\nc"}, 500)).message


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("3", 3.0), ("0.5", 0.5), ("-1", 0.0), ("soon", None), ("inf", None), ("nan", None), ("", None)],
)
def test_retry_after_in_seconds(value: str, seconds: float | None) -> None:
    assert seconds == _wire.retry_after(Reply(429, {"retry-after": value}))


def test_retry_after_as_a_date_is_counted_from_the_answers_own_date() -> None:
    headers = {"retry-after": "Sat, 21 Nov 2026 10:00:07 GMT", "date": "Sat, 21 Nov 2026 10:00:00 GMT"}
    assert 7.0 == _wire.retry_after(Reply(503, headers))


# file names


@pytest.mark.parametrize(
    ("request_id", "expected"),
    [
        (RUN, f"{RUN}-1"),
        ("../../etc/passwd", "etc_passwd-1"),
        ("..", "output-1"),
        (".hidden", "hidden-1"),
        ("a\x00b/c\\d", "a_b_c_d-1"),
        ("", "output-1"),
        ("x" * 500, "x" * 100 + "-1"),
    ],
)
def test_file_names_lead_out_of_no_folder(request_id: str, expected: str) -> None:
    assert expected == _save.stem(request_id, 1)


@pytest.mark.parametrize(
    ("url", "content_type", "expected"),
    [
        ("https://h.example/a.mp4?s=1", "application/octet-stream", "mp4"),
        ("https://h.example/a.PNG", None, "png"),
        ("https://h.example/a", "image/jpeg", "jpg"),
        ("https://h.example/a.sh", "image/webp", "webp"),
        ("https://h.example/a.py", "text/x-python", "bin"),
        ("https://h.example/", None, "bin"),
    ],
)
def test_file_endings_are_those_of_media(url: str, content_type: str | None, expected: str) -> None:
    assert expected == _save.ending(url, content_type)


@pytest.mark.parametrize("values", ["a prompt", ["a"], 1, None])
def test_an_input_that_is_no_mapping_is_refused_here(values: Any) -> None:
    with pytest.raises(ValueError, match="must be a mapping"):
        Server(BASE, None).submit("a/b", values)


def test_an_errors_sentence_has_one_stop() -> None:
    fields = (FieldError("a", "a is wrong."), FieldError("b", "is odd"))
    error = errors.InvalidInput("The input does not fit.", status=422, fields=fields)
    assert "The input does not fit; a is wrong; b: is odd" == str(error)
