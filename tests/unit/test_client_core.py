"""The client's core: every decision, without a socket and without a clock that runs."""

import io
import json
from typing import Any

import pytest

from rushes.client import errors
from rushes.client._core import Core, Effect, Fetch, Flow, Pause, Send, Tell
from rushes.client._pace import AWAY_SECONDS, Lost, Polling, Retries, backoff
from rushes.client._wire import Call, Reply, Server
from rushes.client.types import Submitted

BASE = "http://127.0.0.1:8000"
RUN = "0198c0de-0000-7000-8000-000000000001"


class Script:
    """Plays the world to a flow: answers in turn, a clock that only pauses move."""

    def __init__(self, *answers: Reply | Lost) -> None:
        self.answers = list(answers)
        self.now = 100.0
        self.effects: list[Effect] = []

    def core(self, **more: Any) -> Core:
        return Core(BASE, "secret", environ={}, clock=lambda: self.now, jitter=lambda: 0.0, **more)

    def play(self, flow: Flow[Any]) -> Any:
        try:
            effect = next(flow)
            while True:
                self.effects.append(effect)
                match effect:
                    case Pause(seconds):
                        self.now += seconds
                        effect = flow.send(None)
                    case Tell():
                        effect = flow.send(None)
                    case Send() | Fetch():
                        answer = self.answers.pop(0)
                        effect = flow.throw(answer) if isinstance(answer, Lost) else flow.send(answer)
        except StopIteration as end:
            return end.value

    @property
    def pauses(self) -> list[float]:
        return [effect.seconds for effect in self.effects if isinstance(effect, Pause)]

    @property
    def sent(self) -> list[Call]:
        return [effect.call for effect in self.effects if isinstance(effect, Send | Fetch)]


def answer(body: Any, status: int = 200, **headers: str) -> Reply:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Reply(status, named, json.dumps(body).encode(), f"{BASE}/v1/x")


def status_of(word: str, **more: Any) -> Reply:
    return answer({"request_id": RUN, "status": word, **more})


REFUSED = Lost("refused", sent=False)
DROPPED = Lost("dropped", sent=True)


# trying again


def test_a_read_is_repeated_after_every_passing_fault() -> None:
    script = Script(
        DROPPED,
        answer({}, 502),
        answer({}, 503),
        answer({}, 504),
        answer({}, 429, retry_after="7"),
        status_of("x"),
    )
    assert "x" == script.play(script.core().status(RUN)).status
    assert [0.25, 0.5, 1.0, 2.0, 7.0] == script.pauses


@pytest.mark.parametrize("status", [400, 401, 404, 422, 500])
def test_a_refusal_is_not_asked_again(status: int) -> None:
    script = Script(answer({"error_message": "no"}, status))
    with pytest.raises(errors.ApiError):
        script.play(script.core().status(RUN))
    assert [] == script.pauses


def test_repeating_is_bounded() -> None:
    script = Script(*[answer({}, 503)] * 6)
    with pytest.raises(errors.ServerError):
        script.play(script.core().status(RUN))
    assert [0.25, 0.5, 1.0, 2.0, 4.0] == script.pauses


def test_a_server_that_never_answered_is_given_up_sooner() -> None:
    script = Script(*[REFUSED] * 3)
    with pytest.raises(errors.ConnectionFailed, match=f"cannot connect to {BASE}: refused") as caught:
        script.play(script.core().status(RUN))
    assert [0.25, 0.5] == script.pauses
    assert not caught.value.sent


def test_a_server_that_answered_before_is_waited_for() -> None:
    script = Script(status_of("in_queue"), *[REFUSED] * 5, status_of("completed"))
    core = script.core()
    script.play(core.status(RUN))
    assert "completed" == script.play(core.status(RUN)).status
    assert [0.25, 0.5, 1.0, 2.0, 4.0] == script.pauses


def test_a_retry_after_beyond_patience_is_the_callers() -> None:
    script = Script(answer({"error_message": "later"}, 429, retry_after="3600"))
    with pytest.raises(errors.RateLimited) as caught:
        script.play(script.core().submit("a/b", {}))
    assert 3600.0 == caught.value.retry_after


def test_a_submit_is_not_repeated_where_its_outcome_is_unknown() -> None:
    script = Script(DROPPED)
    with pytest.raises(errors.ConnectionFailed, match="may have been accepted") as caught:
        script.play(script.core().submit("a/b", {}))
    assert caught.value.sent
    assert 1 == len(script.sent)


@pytest.mark.parametrize(
    "reply", [answer({}, 502), answer({}, 504, retry_after="1"), answer({}, 503), answer({}, 429)]
)
def test_a_submit_is_not_repeated_after_an_answer_that_leaves_it_open(reply: Reply) -> None:
    script = Script(reply)
    with pytest.raises(errors.ApiError):
        script.play(script.core().submit("a/b", {}))
    assert 1 == len(script.sent)


@pytest.mark.parametrize(
    ("first", "pause"),
    [(REFUSED, 0.25), (answer({}, 429, retry_after="2"), 2.0), (answer({}, 503, retry_after="1"), 1.0)],
)
def test_a_submit_is_repeated_where_it_certainly_was_not_accepted(first: Reply | Lost, pause: float) -> None:
    script = Script(first, answer({"request_id": RUN}))
    assert RUN == script.play(script.core().submit("a/b", {})).request_id
    assert [pause] == script.pauses


def test_backoff_grows_and_jitter_only_shortens() -> None:
    assert [0.25, 0.5, 1.0, 2.0, 4.0, 4.0] == [backoff(tried, 0.0) for tried in range(1, 7)]
    assert 0.5 == backoff(3, 1.0)


def test_a_retry_after_is_never_cut_short_by_jitter() -> None:
    call = Call("GET", BASE)
    delays = [Retries().after_reply(call, answer({}, 429, retry_after="10"), 1, jitter=j) for j in (0.0, 1.0)]
    assert [10.0, 11.0] == delays


def test_an_answer_without_what_it_must_have_is_a_servers_error() -> None:
    script = Script(answer({"hello": "world"}))
    with pytest.raises(errors.ServerError, match="request_id"):
        script.play(script.core().submit("a/b", {}))


# waiting


def test_polling_is_fast_first_and_again_after_each_change() -> None:
    polling = Polling()
    queued = [polling.pause("in_queue") for _ in range(14)]
    assert 0.02 == queued[0]
    assert 2.0 == queued[-1]
    assert queued == sorted(queued)
    assert 0.02 == polling.pause("in_progress")


def test_polling_obeys_the_servers_times() -> None:
    polling = Polling()
    assert 5.0 == polling.pause("in_queue", retry_after=5.0)
    for _ in range(12):
        polling.pause("in_queue")
    assert 0.3 == polling.pause("in_queue", eta=0.3)
    assert 0.1 == polling.pause("in_queue", eta=0.0)


def test_wait_tells_every_status_and_returns_the_result() -> None:
    result = answer({"request_id": RUN, "status": "succeeded", "output": {"image": "https://h.example/a.png"}})
    script = Script(status_of("in_queue", queue_position=1), status_of("completed"), result)
    outcome = script.play(script.core().wait(RUN))
    assert "succeeded" == outcome.status
    told = [effect.status.status for effect in script.effects if isinstance(effect, Tell)]
    assert ["in_queue", "completed"] == told


def test_wait_goes_on_where_the_result_lags_behind_the_status() -> None:
    script = Script(
        status_of("completed"), status_of("in_progress"), status_of("completed"), status_of("succeeded")
    )
    assert "succeeded" == script.play(script.core().wait(RUN)).status


@pytest.mark.parametrize(
    ("word", "kind"), [("failed", errors.RequestFailed), ("cancelled", errors.RequestCancelled)]
)
def test_wait_raises_for_what_did_not_succeed(word: str, kind: type[Exception]) -> None:
    script = Script(status_of("completed"), status_of(word, error={"code": "oom", "message": "no memory"}))
    with pytest.raises(kind, match=RUN):
        script.play(script.core().wait(RUN))


def test_wait_ends_at_its_timeout() -> None:
    script = Script(*[status_of("in_progress")] * 40)
    with pytest.raises(errors.WaitTimeout, match="is in_progress after 10 s") as caught:
        script.play(script.core().wait(RUN, timeout=10.0))
    assert 110.0 == pytest.approx(script.now)
    assert caught.value.status is not None


def test_wait_ends_at_its_timeout_also_while_the_server_is_away() -> None:
    script = Script(status_of("in_queue"), *[DROPPED] * 9)
    with pytest.raises(errors.WaitTimeout):
        script.play(script.core().wait(RUN, timeout=1.0))
    assert 101.0 == pytest.approx(script.now)


def test_a_wait_sits_through_a_restart_of_the_server() -> None:
    gone = [*[REFUSED] * 8, answer({}, 502), *[DROPPED] * 3]
    script = Script(status_of("in_queue"), *gone, status_of("completed"), *gone, status_of("succeeded"))
    assert "succeeded" == script.play(script.core().wait(RUN)).status


@pytest.mark.parametrize("known", [True, False])
def test_a_wait_gives_up_on_a_server_that_stays_away(known: bool) -> None:
    script = Script(*[REFUSED] * 40)
    with pytest.raises(errors.ConnectionFailed):
        script.play(script.core().wait(Submitted(RUN) if known else RUN))
    waited = script.now - 100.0
    assert (AWAY_SECONDS <= waited < AWAY_SECONDS + 5.0) if known else waited < 1.0


def test_without_retries_a_wait_gives_up_at_once() -> None:
    script = Script(status_of("in_queue"), REFUSED)
    with pytest.raises(errors.ConnectionFailed):
        script.play(script.core(retries=Retries(0)).wait(RUN))


def test_no_call_of_a_wait_may_outlast_it() -> None:
    script = Script(status_of("completed"), status_of("succeeded"))
    script.play(script.core(timeout=30.0).wait(RUN, timeout=2.0))
    assert [2.0, 2.0] == [effect.timeout for effect in script.effects if isinstance(effect, Send)]


# files


def whole(size: int) -> Reply:
    return Reply(200, {"content-type": "Video/MP4; x=1"}, received=size)


def test_a_download_goes_on_where_it_broke_off() -> None:
    broken = Lost("cut", sent=True, received=7, headers={"etag": '"one"'})
    rest = Reply(206, {"content-type": "video/mp4"}, received=20)
    script = Script(broken, rest)
    fetched = script.play(script.core().download(f"{BASE}/a.mp4", io.BytesIO()))
    assert ("video/mp4", 20) == (fetched.content_type, fetched.size)
    assert ("bytes=7-", '"one"') == (script.sent[1].headers["Range"], script.sent[1].headers["If-Range"])


@pytest.mark.parametrize("headers", [{}, {"etag": 'W/"weak"'}, {"etag": '"one"', "content-encoding": "gzip"}])
def test_a_download_without_a_firm_mark_begins_anew(headers: dict[str, str]) -> None:
    script = Script(Lost("cut", sent=True, received=7, headers=headers), whole(20))
    script.play(script.core().download(f"{BASE}/a.mp4", io.BytesIO()))
    assert "Range" not in script.sent[1].headers
    assert [0, 0] == [effect.offset for effect in script.effects if isinstance(effect, Fetch)]


def test_a_download_whose_rest_is_refused_begins_anew() -> None:
    broken = Lost("cut", sent=True, received=7, headers={"etag": '"one"'})
    script = Script(broken, answer({}, 416), whole(20))
    assert 20 == script.play(script.core().download(f"{BASE}/a.mp4", io.BytesIO())).size


def test_a_download_that_gets_nowhere_is_given_up() -> None:
    script = Script(*[DROPPED] * 6)
    with pytest.raises(errors.ConnectionFailed):
        script.play(script.core().download(f"{BASE}/a.mp4", io.BytesIO()))


def test_downloads_from_elsewhere_carry_no_key() -> None:
    script = Script(whole(1), whole(1), whole(1))
    core = script.core()
    for url in ("https://cdn.example/a.mp4", "//cdn.example/a.mp4", "/files/a.mp4"):
        script.play(core.download(url, io.BytesIO()))
    assert ["https://cdn.example/a.mp4", "http://cdn.example/a.mp4", f"{BASE}/files/a.mp4"] == [
        call.url for call in script.sent
    ]
    assert [False, False, True] == ["Authorization" in call.headers for call in script.sent]


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://h.example/a", "http://u:p@h.example/a"])
def test_only_web_addresses_are_downloaded(url: str) -> None:
    with pytest.raises(ValueError, match="no address of a file"):
        Server(BASE, None).download(url)
