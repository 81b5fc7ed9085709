"""The batcher under PostgreSQL's group commit: who shares a group, and who hears which error."""

import asyncio
from collections.abc import Sequence

import pytest

from rushes.errors import StoreUnavailable
from rushes.queue.postgres.batch import Batcher


class Recorder:
    """An action that holds its first group until it is let go, as a slow commit does."""

    def __init__(self) -> None:
        self.groups: list[list[str]] = []
        self.go = asyncio.Event()

    async def __call__(self, items: Sequence[str]) -> list[str | Exception]:
        self.groups.append(list(items))
        await self.go.wait()
        if "down" in items:
            raise StoreUnavailable
        if "poison" in items:
            raise ZeroDivisionError
        return [KeyError(item) if item == "refused" else item.upper() for item in items]


def batcher(action: Recorder, **options: int) -> Batcher[str, str]:
    return Batcher(action, identity=lambda item: item, weight=len, **options)


async def outcomes(action: Recorder, batch: Batcher[str, str], *items: str) -> list[str | type]:
    """Submit ``first`` and, while it is under way, the items."""
    first = asyncio.create_task(batch("first"))
    while not action.groups:
        await asyncio.sleep(0)
    tasks = [asyncio.create_task(batch(item)) for item in items]
    await asyncio.sleep(0)
    action.go.set()
    answers = await asyncio.gather(first, *tasks, return_exceptions=True)
    return [type(a) if isinstance(a, BaseException) else a for a in answers]


async def test_what_arrives_meanwhile_goes_together() -> None:
    action = Recorder()
    assert ["FIRST", "A", "B", "C"] == await outcomes(action, batcher(action), "a", "b", "c")
    assert [["first"], ["a", "b", "c"]] == action.groups


async def test_two_of_one_identity_go_in_two_groups_in_order() -> None:
    action = Recorder()
    assert ["FIRST", "A", "B", "A"] == await outcomes(action, batcher(action), "a", "b", "a")
    assert [["first"], ["a", "b"], ["a"]] == action.groups


async def test_groups_are_bounded_in_number_and_weight() -> None:
    action = Recorder()
    await outcomes(action, batcher(action, most=2), "a", "b", "c")
    assert [["first"], ["a", "b"], ["c"]] == action.groups
    action = Recorder()
    await outcomes(action, batcher(action, weight_limit=6), "aaaa", "bb", "c", "d" * 99, "e")
    assert [["first"], ["aaaa", "bb"], ["c"], ["d" * 99], ["e"]] == action.groups


async def test_an_error_for_one_member_is_its_own() -> None:
    action = Recorder()
    assert ["FIRST", "A", KeyError, "B"] == await outcomes(action, batcher(action), "a", "refused", "b")


async def test_a_group_that_fails_is_tried_member_by_member() -> None:
    action = Recorder()
    answers = await outcomes(action, batcher(action), "a", "poison", "b")
    assert ["FIRST", "A", ZeroDivisionError, "B"] == answers
    assert [["first"], ["a", "poison", "b"], ["a"], ["poison"], ["b"]] == action.groups


async def test_an_unavailable_store_is_told_to_all_and_the_next_are_tried() -> None:
    action = Recorder()
    batch = batcher(action)
    answers = await outcomes(action, batch, "a", "down")
    assert ["FIRST", StoreUnavailable, StoreUnavailable] == answers
    assert "LATER" == await batch("later")


async def test_closing_lets_the_running_group_end_and_refuses_the_rest() -> None:
    action = Recorder()
    batch = batcher(action)
    first = asyncio.create_task(batch("first"))
    while not action.groups:
        await asyncio.sleep(0)
    late = asyncio.create_task(batch("late"))
    await asyncio.sleep(0)
    asyncio.get_running_loop().call_soon(action.go.set)
    await batch.close()
    assert "FIRST" == await first
    with pytest.raises(StoreUnavailable):
        await late
