"""The gateway on one core, beside its peers: polls, submits, latency under load, memory; flat as stores grow.

Server and generator each have a core. The servers take turns within a round, so that what disturbs the machine
disturbs all of them; what counts is the median of the rounds' ratios.
"""

import shutil
from collections.abc import Sequence
from typing import NamedTuple

from load import Measured, Shot, measure
from report import Bench, Row, median, ratio
from rushes_server import Rushes
from servers import BentoTask, FastApiSql, Running, resident_mib

SMALL = 100
"""Stored requests of a store that is nearly empty: half of them queued, half finished."""
FLAT = 0.8
"""What share of its speed a store of any size must keep to be called flat: the machine's noise is larger."""
MEMORY_MIB = 150


def run(bench: Bench) -> None:
    versus_peers(bench)
    flat(bench)


class Turn(NamedTuple):
    """One server's turn in a round."""

    measured: Measured
    cpu_us: float
    """The server's processor time per request in microseconds: what others do on the machine changes it less."""

    @property
    def rate(self) -> float:
        return self.measured.rate


def _load(running: Running, shots: Sequence[Shot], seconds: float, *, warm_up: bool = False) -> Turn:
    if warm_up:
        measure(running.port, shots, 1.0)
    before = running.cpu_seconds()
    measured = measure(running.port, shots, seconds)
    cpu_us = (running.cpu_seconds() - before) * 1e6 / max(1, measured.count)
    if measured.errors > measured.count // 100:
        raise SystemExit(f"bench: {measured.errors} of {measured.count} answers were errors:\n{running.tail()}")
    return Turn(measured, cpu_us)


def versus_peers(bench: Bench) -> None:
    ours = Rushes(bench.root / "gateway-rushes")
    fastapi = FastApiSql(bench.root / "gateway-fastapi", SMALL // 2, SMALL // 2)
    bento = BentoTask(bench.root / "gateway-bentoml")
    try:
        ours.start()
        ours.fill(finished=SMALL // 2, queued=SMALL // 2)
        fastapi.start()
        bento.start()
        servers = (ours, fastapi, bento)
        found: dict[tuple[str, str], list[Turn]] = {}
        for kind in ("queued", "finished", "submit"):
            for number in range(bench.rounds):
                bench.say(f"{kind}: round {number + 1} of {bench.rounds}")
                for server in servers:
                    shots = [server.submit()] if kind == "submit" else server.polls(kind)
                    got = _load(server.running, shots, bench.seconds, warm_up=number == 0)
                    found.setdefault((kind, server.name), []).append(got)
        memory = resident_mib(ours.running.listener())
        supervisor = resident_mib(ours.running.process.pid)
    finally:
        for server in (ours, fastapi, bento):
            if hasattr(server, "running"):
                server.stop()
    _ratios(bench, found)
    for (kind, name), rounds in found.items():
        what = "durable submit" if kind == "submit" else f"status of a {kind} request"
        p50 = median([turn.measured.p50 for turn in rounds])
        p99 = median([turn.measured.p99 for turn in rounds])
        errors = sum(turn.measured.errors for turn in rounds)
        value = f"p50 {p50:.1f} ms, p99 {p99:.1f} ms, {errors} errors"
        bench.add(Row("latency", f"{what}, 32 connections: {name}", value, "reported"))
    bench.add(
        Row(
            "memory",
            "gateway process after these rounds, resident",
            f"{memory:.0f} MiB (supervisor {supervisor:.0f} MiB)",
            f"<= {MEMORY_MIB} MiB",
            memory <= MEMORY_MIB,
        )
    )


def _ratios(bench: Bench, found: dict[tuple[str, str], list[Turn]]) -> None:
    wanted = {
        ("queued", FastApiSql.name): 2.5,
        ("finished", FastApiSql.name): 2.5,
        ("queued", BentoTask.name): 5.0,
        ("finished", BentoTask.name): 5.0,
        ("submit", FastApiSql.name): 2.0,
        ("submit", BentoTask.name): 3.0,
    }
    for (kind, peer), target in wanted.items():
        ours, theirs = found[kind, Rushes.name], found[kind, peer]
        middle, words = ratio([turn.rate for turn in ours], [turn.rate for turn in theirs])
        cpu = [median([turn.cpu_us for turn in turns]) for turns in (ours, theirs)]
        words += f"; CPU {cpu[0]:.0f} / {cpu[1]:.0f} us each"
        what = "durable submits" if kind == "submit" else f"status polls of {kind} requests"
        bench.add(Row("gateway", f"{what} against {peer}", words, f">= {target}x", middle >= target))


def flat(bench: Bench) -> None:
    """The same three rates on a nearly empty store and on a large one, by turns, each time on a fresh copy."""
    templates = {}
    for size in (SMALL, bench.stored):
        bench.say(f"flat: storing {size:,} requests")
        server = Rushes(bench.root / f"flat-{size}")
        server.start(cpu=None)
        try:
            server.fill(finished=size // 2, queued=size // 2)
        finally:
            server.stop()
        templates[size] = server
    found: dict[tuple[str, int], list[float]] = {}
    for number in range(bench.rounds):
        for size, template in templates.items():
            bench.say(f"flat: round {number + 1} of {bench.rounds}, {size:,} stored")
            server = template.copy(bench.root / "flat-copy")
            server.start()
            try:
                for kind in ("queued", "finished", "submit"):
                    shots = [server.submit()] if kind == "submit" else server.polls(kind)
                    rate = _load(server.running, shots, bench.seconds / 2, warm_up=True).rate
                    found.setdefault((kind, size), []).append(rate)
            finally:
                server.stop()
                shutil.rmtree(server.folder)
    for kind in ("queued", "finished", "submit"):
        middle, words = ratio(found[kind, bench.stored], found[kind, SMALL])
        what = "durable submits" if kind == "submit" else f"status polls of {kind} requests"
        text = f"{what}, {bench.stored:,} stored against {SMALL}"
        bench.add(Row("gateway", text, words, f">= {FLAT}x", middle >= FLAT))
