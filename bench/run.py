"""Measure everything that Rushes promises about speed, beside its peers, in one run: `python bench/run.py`.

Prints a row as soon as it is known. A complete run also writes bench/RESULTS.md. The exit status is 0
whatever is measured, but not where something could not be.
"""

import argparse
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from backlog import drain, position
from gateway import flat, versus_peers
from report import Bench, conclude, machine
from servers import PEERS, peer_python
from startup import latency, startup

PARTS: dict[str, tuple[Callable[[Bench], None], ...]] = {
    "gateway": (versus_peers, flat),
    "latency": (latency,),
    "drain": (drain,),
    "position": (position,),
    "memory": (versus_peers,),
    "startup": (startup,),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer, shorter rounds and smaller stores")
    parser.add_argument("--only", choices=PARTS, help="one part; nothing is written unless --output says where")
    parser.add_argument("--output", type=Path, help="where the table goes (default: bench/RESULTS.md)")
    parser.add_argument(
        "--own-generator", action="store_true", help="bench/load.py even where wrk is installed"
    )
    options = parser.parse_args()
    if options.own_generator:
        os.environ["BENCH_GENERATOR"] = "own"
    if (os.cpu_count() or 1) < 2:
        raise SystemExit("bench: server and generator need a core each")
    facts = machine()
    PEERS.mkdir(exist_ok=True)
    if options.only in (None, "gateway", "memory"):
        peer_python()
    root = Path(tempfile.mkdtemp(prefix="run-", dir=PEERS))
    bench = Bench(root, options.quick)
    try:
        done: list[Callable[[Bench], None]] = []
        for name, parts in PARTS.items():
            for part in parts:
                if options.only in (None, name) and part not in done:
                    part(bench)
                    done.append(part)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    conclude(bench, facts, options, Path(__file__), "RESULTS.md")


if __name__ == "__main__":
    main()
