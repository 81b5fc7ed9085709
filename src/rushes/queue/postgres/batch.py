"""Group commit: what arrives while a transaction is under way goes together in the next one."""

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Sequence
from typing import Generic, TypeVar

from rushes.errors import StoreUnavailable

T = TypeVar("T")
R = TypeVar("R")


class Batcher(Generic[T, R]):
    """Runs ``action`` over groups of items, one group at a time.

    ``action`` answers a result, or an error to raise, for each item, in order. A group that fails as a whole
    is taken apart and each member tried alone, so that one bad item fails nobody else; unless the store is
    unavailable, which all of them hear at once. Two items of one ``identity`` never share a group. A group
    ends at ``most`` items or ``weight_limit`` of summed ``weight``.
    """

    def __init__(
        self,
        action: Callable[[Sequence[T]], Awaitable[Sequence[R | Exception]]],
        *,
        identity: Callable[[T], Hashable],
        weight: Callable[[T], int] = lambda _: 1,
        most: int = 128,
        weight_limit: int = 4 * 1024 * 1024,
    ) -> None:
        self._action = action
        self._identity = identity
        self._weight = weight
        self._most = most
        self._weight_limit = weight_limit
        self._waiting: list[tuple[T, asyncio.Future[R]]] = []
        self._task: asyncio.Task[None] | None = None

    async def __call__(self, item: T) -> R:
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        return await future

    async def close(self) -> None:
        """Let what is under way end; what has not begun is refused."""
        waiting, self._waiting = self._waiting, []
        _refuse(waiting, StoreUnavailable("The store is being closed."))
        if self._task is not None:
            await self._task

    async def _run(self) -> None:
        try:
            while self._waiting:
                group = self._next_group()
                try:
                    await self._run_group(group)
                except BaseException as error:
                    _refuse(group, error if isinstance(error, Exception) else StoreUnavailable())
                    if not isinstance(error, Exception):
                        _refuse(self._waiting, StoreUnavailable())
                        raise
        finally:
            self._task = None

    def _next_group(self) -> list[tuple[T, asyncio.Future[R]]]:
        group: list[tuple[T, asyncio.Future[R]]] = []
        left: list[tuple[T, asyncio.Future[R]]] = []
        seen: set[Hashable] = set()
        weight = 0
        for place, (item, future) in enumerate(self._waiting):
            if len(group) == self._most or (group and weight + self._weight(item) > self._weight_limit):
                left.extend(self._waiting[place:])
                break
            identity = self._identity(item)
            if identity in seen:
                left.append((item, future))
                continue
            seen.add(identity)
            weight += self._weight(item)
            group.append((item, future))
        self._waiting = left
        return group

    async def _run_group(self, group: list[tuple[T, asyncio.Future[R]]]) -> None:
        try:
            results = await self._action([item for item, _ in group])
        except StoreUnavailable:
            raise
        except Exception:
            if len(group) == 1:
                raise
            for member in group:
                try:
                    await self._run_group([member])
                except Exception as error:
                    _refuse([member], error)
            return
        for (_, future), result in zip(group, results, strict=True):
            if future.done():
                continue
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)


def _refuse(group: list[tuple[T, asyncio.Future[R]]], error: Exception) -> None:
    for _, future in group:
        if not future.done():
            future.set_exception(error)
