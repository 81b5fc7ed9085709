"""What a server in front adds: the same requests at a Rushes with an engine, and through another one before it.

    python bench/remote.py [--requests 60] [--at-once 8]

Both have an engine that makes a tiny picture at once, so that what is timed is everything around it. The two ways
take turns; what counts is the median of each.
"""

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from rushes.client.aio import AsyncClient

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests")]

from support.server import T2I, Server  # noqa: E402  the tests' server, which needs the path above

BODY = {"prompt": "ok"}


async def once(client: AsyncClient) -> float:
    """Seconds from the submit to the result."""
    began = time.perf_counter()
    result = await client.run(T2I, BODY)
    assert result.status == "succeeded", result
    return time.perf_counter() - began


async def rate(client: AsyncClient, count: int, at_once: int) -> float:
    """Requests a second, so many at once."""
    room = asyncio.Semaphore(at_once)

    async def one() -> None:
        async with room:
            await once(client)

    began = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(count)))
    return count / (time.perf_counter() - began)


async def measure(far: Server, near: Server, requests: int, at_once: int) -> None:
    async with (
        AsyncClient(base_url=far.url, api_key=far.key) as direct,
        AsyncClient(base_url=near.url, api_key=near.key) as through,
    ):
        for client in (direct, through):
            await once(client)
        alone: dict[str, list[float]] = {"direct": [], "through": []}
        for _ in range(requests):
            alone["direct"].append(await once(direct))
            alone["through"].append(await once(through))
        rates: dict[str, list[float]] = {"direct": [], "through": []}
        for _ in range(5):
            rates["direct"].append(await rate(direct, requests, at_once))
            rates["through"].append(await rate(through, requests, at_once))
    medians = {name: statistics.median(times) * 1000 for name, times in alone.items()}
    print(
        f"one at a time, median of {requests}: {medians['direct']:.0f} ms direct, {medians['through']:.0f} ms through"
    )
    print(f"added: {medians['through'] - medians['direct']:.0f} ms")
    ratios = [there / here for here, there in zip(rates["direct"], rates["through"], strict=True)]
    print(
        f"{at_once} at once, median of 5 rounds: {statistics.median(rates['direct']):.0f} / s direct, "
        f"{statistics.median(rates['through']):.0f} / s through ({statistics.median(ratios):.2f}x)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--at-once", type=int, default=8)
    given = parser.parse_args()
    os.environ.pop("RUSHES_CONFIG", None)
    with tempfile.TemporaryDirectory() as folder:
        far = Server(Path(folder) / "far", workers=2, access_log="off").start()
        near = Server(
            Path(folder) / "near",
            workers=0,
            access_log="off",
            remotes=f"far=runcomfy@{far.url}",
            remote_far_key=far.key,
        ).start()
        try:
            asyncio.run(measure(far, near, given.requests, given.at_once))
        finally:
            near.stop()
            far.stop()


if __name__ == "__main__":
    main()
