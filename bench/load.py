"""The load generator: keep-alive connections in a closed loop, the same for every server measured.

wrk where it is installed, else the generator below: an asyncio.Protocol that writes prebuilt bytes and reads
Content-Length, which needs nothing beside Python. Either runs as a process of its own on one core. As a program
(``python load.py SPEC.json``) this file is that generator; the specification is what :class:`Spec` holds.
"""

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import cast

LUA = """
local shots = {{ {shots} }}
local at = 0
function request()
  at = at % #shots + 1
  return shots[at]
end
function done(summary, latency, requests)
  local e = summary.errors
  io.write(string.format(
    '\\nJSON{{"count": %d, "microseconds": %d, "p50": %f, "p99": %f, "errors": %d}}\\n',
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(99),
    e.connect + e.read + e.write + e.status + e.timeout))
end
"""


@dataclass(frozen=True)
class Shot:
    """One HTTP request, ready to be written as bytes."""

    method: str
    path: str
    headers: dict[str, str] = field(default_factory=dict)
    body: str = ""

    def wire(self) -> bytes:
        body = self.body.encode()
        lines = [f"{self.method} {self.path} HTTP/1.1", "Host: 127.0.0.1"]
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        if body or self.method == "POST":
            lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


@dataclass(frozen=True)
class Measured:
    """What one round gave: requests per second, latency percentiles in milliseconds."""

    rate: float
    p50: float
    p99: float
    count: int
    errors: int
    """Broken connections and answers that were not 2xx."""


@dataclass(frozen=True)
class Spec:
    port: int
    shots: list[str]
    """Prebuilt requests, latin-1; sent in turn."""
    connections: int
    seconds: float
    count: int = 0
    """End after so many answers instead, and keep their bodies."""


def pinned(cpu: int | None, argv: Sequence[str]) -> list[str]:
    """``argv`` on one core. Cores are counted from 0; None leaves it free."""
    taskset = shutil.which("taskset")
    if cpu is None:
        return list(argv)
    if taskset is None:
        raise SystemExit("bench: taskset (util-linux) is needed to hold a server on one core")
    return [taskset, "-c", str(cpu), *argv]


def generator() -> str:
    """The generator that is used: wrk where this machine has it and BENCH_GENERATOR does not say "own"."""
    own = os.environ.get("BENCH_GENERATOR") == "own" or shutil.which("wrk") is None
    return "bench/load.py" if own else "wrk"


def measure(
    port: int,
    shots: Sequence[Shot],
    seconds: float,
    *,
    connections: int = 32,
    cpu: int | None = 1,
) -> Measured:
    """One round against 127.0.0.1:``port``."""
    if generator() == "wrk":
        return _wrk(port, shots, seconds, connections, cpu)
    spec = Spec(port, [s.wire().decode("latin-1") for s in shots], connections, seconds)
    measured: Measured = Measured(**_own(spec, cpu)["measured"])
    return measured


def collect(port: int, shots: Sequence[Shot], count: int, *, connections: int = 32) -> list[str]:
    """Send ``count`` requests and answer the bodies of the 2xx answers, with our own generator, on any core."""
    spec = Spec(port, [s.wire().decode("latin-1") for s in shots], connections, 600.0, count)
    answer = _own(spec, None)
    if answer["measured"]["errors"]:
        raise SystemExit(
            f"bench: {answer['measured']['errors']} of {count} requests failed: {answer['failure']}"
        )
    bodies: list[str] = answer["bodies"]
    if len(bodies) != count:
        raise SystemExit(f"bench: {len(bodies)} of {count} requests were answered in {spec.seconds:.0f} s")
    return bodies


def _wrk(port: int, shots: Sequence[Shot], seconds: float, connections: int, cpu: int | None) -> Measured:
    def quoted(data: bytes) -> str:
        return '"' + "".join(f"\\{byte:03d}" for byte in data) + '"'

    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(LUA.format(shots=", ".join(quoted(s.wire()) for s in shots)))
        script.flush()
        # wrk takes whole seconds
        argv = [
            "wrk",
            "-t1",
            f"-c{connections}",
            f"-d{max(1, round(seconds))}s",
            "--timeout",
            "30s",
            "-s",
            script.name,
        ]
        argv.append(f"http://127.0.0.1:{port}")
        done = subprocess.run(
            pinned(cpu, argv), capture_output=True, text=True, timeout=seconds + 60, check=True
        )
    found = json.loads(done.stdout.partition("JSON")[2])
    return Measured(
        rate=found["count"] / (found["microseconds"] / 1e6),
        p50=found["p50"] / 1e3,
        p99=found["p99"] / 1e3,
        count=found["count"],
        errors=found["errors"],
    )


def _own(spec: Spec, cpu: int | None) -> dict:  # type: ignore[type-arg]
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(asdict(spec), file)
        file.flush()
        argv = pinned(cpu, [sys.executable, str(Path(__file__)), file.name])
        done = subprocess.run(argv, stdout=subprocess.PIPE, text=True, timeout=spec.seconds + 60, check=True)
    answer: dict = json.loads(done.stdout)  # type: ignore[type-arg]
    return answer


class _Run:
    """What the connections share."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.shots = [s.encode("latin-1") for s in spec.shots]
        self.sent = self.errors = 0
        self.latencies: list[float] = []
        self.bodies: list[str] = []
        self.failure = ""
        self.end = time.perf_counter() + spec.seconds
        self.done = asyncio.Event()

    def next(self) -> bytes | None:
        """The next request to send, or None where the run is over."""
        if self.spec.count and self.sent >= self.spec.count:
            return None
        self.sent += 1
        return self.shots[(self.sent - 1) % len(self.shots)]

    def answered(self, head: bytes, body: bytes, seconds: float) -> None:
        self.latencies.append(seconds)
        if head[9:10] != b"2":
            self.errors += 1
            self.failure = (head[:15] + b" " + body).decode("latin-1")[:500]
        elif self.spec.count:
            self.bodies.append(body.decode("latin-1"))
        over = len(self.latencies) >= self.spec.count if self.spec.count else False
        if over or time.perf_counter() >= self.end:
            self.done.set()

    def broken(self, reason: str) -> None:
        self.errors += 1
        self.failure = reason
        self.done.set()


class _Connection(asyncio.Protocol):
    """One keep-alive connection with one request in flight."""

    def __init__(self, run: _Run) -> None:
        self.run = run
        self.buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is not a subclass
        self.send()

    def send(self) -> None:
        request = self.run.next()
        if request is not None:
            self.start = time.perf_counter()
            self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, blank, rest = self.buffer.partition(b"\r\n\r\n")
        if not blank:
            return
        length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
        if len(rest) < length:
            return
        self.buffer = b""
        self.run.answered(head, rest, time.perf_counter() - self.start)
        if not self.run.done.is_set():
            self.send()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.run.done.is_set():
            self.run.broken("the server closed a connection")


async def _drive(spec: Spec) -> dict:  # type: ignore[type-arg]
    run = _Run(spec)
    loop = asyncio.get_running_loop()
    # a bug in a callback ends the run at once instead of leaving a connection silent
    loop.set_exception_handler(lambda _, context: run.broken(repr(context.get("exception", context))))
    start = time.perf_counter()
    opened = [
        (await loop.create_connection(lambda: _Connection(run), "127.0.0.1", spec.port))[0]
        for _ in range(spec.connections)
    ]
    try:
        await asyncio.wait_for(run.done.wait(), spec.seconds + 30)
    finally:
        seconds = time.perf_counter() - start
        run.done.set()
        for transport in opened:
            transport.close()
    ordered = sorted(run.latencies) or [0.0]
    return {
        "measured": asdict(
            Measured(
                rate=len(run.latencies) / seconds,
                p50=ordered[len(ordered) // 2] * 1e3,
                p99=ordered[int(len(ordered) * 0.99)] * 1e3,
                count=len(run.latencies),
                errors=run.errors,
            )
        ),
        "bodies": run.bodies,
        "failure": run.failure,
    }


def main(path: str) -> None:
    spec = Spec(**json.loads(Path(path).read_text("utf-8")))
    try:
        import uvloop  # type: ignore[import-not-found,unused-ignore]

        answer = uvloop.run(_drive(spec))
    except ImportError:
        answer = asyncio.run(_drive(spec))
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
