"""Measure Rushes in front of a real ComfyUI against the bare ComfyUI, in one run.

    COMFYUI_DIR=/srv/ComfyUI python bench/comfyui.py

Starts the ComfyUIs itself, on the CPU, with folders of their own. A complete run writes bench/COMFYUI.md. The exit
status is 0 whatever is measured, but not where something could not be.
"""

import argparse
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from comfyui_parts import latency, overlap, throughput, two
from comfyui_servers import Server, comfyuis
from report import Bench, conclude, machine
from rushes.engines.comfyui.catalogue import describe, fetch_system_stats
from servers import PEERS

PARTS: dict[str, Callable[[Bench, Sequence[Server]], None]] = {
    "latency": latency,
    "throughput": throughput,
    "two": two,
    "overlap": overlap,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds; prints only")
    parser.add_argument("--only", choices=PARTS, help="one part; nothing is written unless --output says where")
    parser.add_argument("--output", type=Path, help="where the table goes (default: bench/COMFYUI.md)")
    options = parser.parse_args()
    facts = [fact for fact in machine() if fact[0] != "Generator"]
    PEERS.mkdir(exist_ok=True)
    root = Path(tempfile.mkdtemp(prefix="comfyui-", dir=PEERS))
    bench = Bench(root, options.quick)
    try:
        with comfyuis(root, 2 if options.only in (None, "two") else 1) as servers:
            facts.append(("ComfyUI", f"{describe(fetch_system_stats(servers[0].url))}; on the CPU"))
            for name, part in PARTS.items():
                if options.only in (None, name):
                    part(bench, servers)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    conclude(bench, facts, options, Path(__file__), "COMFYUI.md")


if __name__ == "__main__":
    main()
