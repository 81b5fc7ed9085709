"""Rows of the result, the context that every measurement gets, and the table."""

import argparse
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from load import generator


@dataclass(frozen=True)
class Row:
    """One measured thing. ``ok`` is None where there is no target."""

    group: str
    what: str
    value: str
    target: str = ""
    ok: bool | None = None

    def verdict(self) -> str:
        return {None: "", True: "PASS", False: "below target"}[self.ok]


@dataclass
class Bench:
    """How much is measured, and where."""

    root: Path
    quick: bool = False
    rows: list[Row] = field(default_factory=list)

    @property
    def rounds(self) -> int:
        return 3 if self.quick else 5

    @property
    def seconds(self) -> float:
        """Of one round, for one server and one kind of request."""
        return 2.0 if self.quick else 4.0

    @property
    def stored(self) -> int:
        """The large number of stored, or queued, requests."""
        return 10_000 if self.quick else 100_000

    @property
    def drained(self) -> int:
        return 1_000 if self.quick else 10_000

    @property
    def singles(self) -> int:
        """How many requests are timed one by one."""
        return 30 if self.quick else 100

    def add(self, row: Row) -> None:
        self.rows.append(row)
        print(f"  {row.group:9} {row.what:62} {row.value:44} {row.target:10} {row.verdict()}", flush=True)

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def p95(values: Sequence[float]) -> float:
    return sorted(values)[int(len(values) * 0.95)]


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, str]:
    """The median of the ratios of neighbouring rounds, and all of it in words."""
    each = [a / b for a, b in zip(ours, theirs, strict=True)]
    middle = median(each)
    words = (
        f"{middle:.2f}x ({min(each):.2f}-{max(each):.2f}); {median(ours):,.0f} / {median(theirs):,.0f} per s"
    )
    return middle, words


def machine() -> list[tuple[str, str]]:
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    memory = int(Path("/proc/meminfo").read_text("utf-8").split()[1]) / 1024**2
    load = " ".join(f"{x:.2f}" for x in os.getloadavg())
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False, timeout=10
    ).stdout.strip()
    packages = ", ".join(f"{name} {version(name)}" for name in ("uvicorn", "uvloop", "starlette", "orjson"))
    return [
        ("Date", datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")),
        (
            "Machine",
            f"{cpu}, {os.cpu_count()} cores, {memory:.0f} GiB, {platform.system()} {platform.release()}",
        ),
        ("Load before", f"{load} (1, 5, 15 minutes)"),
        ("Python", f"{platform.python_version()}; {packages}"),
        ("Commit", commit or "unknown"),
        ("Generator", f"{generator()}, 32 connections, kept alive, closed loop, on a core of its own"),
    ]


def markdown(rows: Sequence[Row], command: str, facts: Sequence[tuple[str, str]]) -> str:
    lines = ["# What was measured", "", f"- Command: `{command}`"]
    lines += [f"- {name}: {value}" for name, value in facts]
    lines += ["", "| group | what | measured | target | |", "|---|---|---|---|---|"]
    lines += [f"| {r.group} | {r.what} | {r.value} | {r.target} | {r.verdict()} |" for r in rows]
    return "\n".join(lines) + "\n"


def conclude(
    bench: Bench, facts: Sequence[tuple[str, str]], options: argparse.Namespace, script: Path, name: str
) -> None:
    """Print the table. A complete run also writes it beside ``script``; ``--output`` says where else."""
    output = options.output or (None if options.only or options.quick else script.with_name(name))
    text = markdown(bench.rows, " ".join(["python", f"bench/{script.name}", *sys.argv[1:]]), facts)
    print("\n" + text)
    if output:
        output.write_text(text, "utf-8")
        print(f"written to {output}", file=sys.stderr)
