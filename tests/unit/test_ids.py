"""Identifiers: the form, the order, no repetition."""

import threading
import time
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rushes.requests import ids
from rushes.requests.ids import is_request_id, new_request_id, uuid7


def test_an_id_is_a_uuid_of_version_7() -> None:
    before = time.time_ns() // 1_000_000
    parsed = uuid.UUID(uuid7())
    after = time.time_ns() // 1_000_000
    assert (7, uuid.RFC_4122) == (parsed.version, parsed.variant)
    assert before <= parsed.int >> 80 <= after


def test_ids_are_ordered_by_time() -> None:
    stamps = []
    for _ in range(2000):
        stamps.append(uuid7()[:13])
    assert sorted(stamps) == stamps


def test_ids_do_not_go_back_when_the_clock_does(monkeypatch: pytest.MonkeyPatch) -> None:
    first = uuid7()
    earlier = time.time_ns() - 3600 * 10**9
    monkeypatch.setattr(ids.time, "time_ns", lambda: earlier)
    assert first[:13] <= uuid7()[:13]


def test_ids_of_many_threads_are_all_different() -> None:
    made: list[str] = []

    def make() -> None:
        made.extend([uuid7() for _ in range(2000)])

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 8000 == len(set(made))


def test_the_rest_of_an_id_is_random() -> None:
    """Each of the 74 random bits is seen both set and unset: 2 ** -199 is the chance to miss one."""
    ones = zeros = 0
    for _ in range(200):
        value = uuid.UUID(uuid7()).int
        ones |= value
        zeros |= ~value
    random_bits = ((1 << 76) - 1) & ~(0b11 << 62) | 0
    random_bits &= ~(0xF << 76)
    assert random_bits == ones & zeros & random_bits


@pytest.mark.parametrize("_", range(20))
def test_a_request_id_has_the_form_of_one(_: int) -> None:
    assert is_request_id(new_request_id())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "0" * 36,
        "-" * 35,
        "0190a0a0-0000-7000-8000-00000000000",
        "0190a0a0-0000-7000-8000-0000000000000",
        "0190A0A0-0000-7000-8000-000000000000",
        "0190a0a0-0000-7000-8000-00000000000g",
        "0190a0a0-0000-7000-8000-00000000000\n",
        "0190a0a0-0000-7000-8000-00000000000٣",
        "../../../../../../../../etc/passwd..",
    ],
)
def test_other_texts_are_no_request_ids(text: str) -> None:
    assert not is_request_id(text)


@given(st.uuids())
def test_every_uuid_in_lower_case_has_the_form(value: uuid.UUID) -> None:
    assert is_request_id(str(value))
    assert not is_request_id(value.hex)
