"""Measure the Wan engine on a GPU against stock diffusers and the FLOP floor, in the same run:

    python bench/gpu.py --only first-last-frame --output FILE.md
    python bench/gpu.py --only vace-fun --output FILE.md
    python bench/gpu.py --only turbo --output FILE.md
    python bench/gpu.py --only load|attention --output FILE.md

Each takes up to ten minutes on an H200; without --only all of them follow each other. Beside FILE.md a FILE.json is
written. The models are of full size, with random weights made on the device: nothing is downloaded. Whether
FirstBlockCache skips anything depends on what real weights make of a video, so `fast` is measured without it.
The floor is `gpu_floor.py`'s and is an H200's in bf16, whatever the card.

    python bench/gpu.py --device cpu --tiny    # tries the bench itself, in a minute; its times mean nothing
"""

import argparse
import json
import os
import platform
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gpu_models import CASES, tiny
from report import Bench, markdown

PARTS = (*CASES, "attention", "load")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, help="one part")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small models and sizes: to try the bench")
    parser.add_argument(
        "--steps", type=int, default=4, help="of each loop; the default steps are extrapolated from them"
    )
    parser.add_argument("--whole", action="store_true", help="measure all of the model's default steps")
    parser.add_argument(
        "--minutes", type=float, default=8.5, help="later than that no part begins (each part has so many)"
    )
    parser.add_argument("--output", type=Path, help="Markdown; numbers go into a .json beside it")
    options = parser.parse_args()
    if options.steps < 3:
        parser.error("--steps: the first one is not counted; a median needs two more")
    import torch

    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("bench: no CUDA device; to try the bench itself: --device cpu --tiny")
    import gpu_parts

    bench = Bench(Path())
    cases = {name: tiny(case) if options.tiny else case for name, case in CASES.items()}
    judged = options.device.startswith("cuda") and not options.tiny
    steps = 0 if options.whole else options.steps
    run = gpu_parts.Run(bench, options.device, steps, 0.0, judged)
    known = facts(options.device)
    for part in PARTS:
        if options.only in (None, part):
            run.until = time.monotonic() + options.minutes * 60
            if part == "attention":
                gpu_parts.attention(run, list(cases.values()))
            elif part == "load":
                gpu_parts.loading(run, cases["turbo"])
            else:
                gpu_parts.generate(run, cases[part])
    text = markdown(bench.rows, " ".join(["python", "bench/gpu.py", *sys.argv[1:]]), known)
    print("\n" + text)
    if options.output:
        options.output.write_text(text, "utf-8")
        numbers = {"facts": dict(known), "judged": judged} | run.numbers
        options.output.with_suffix(".json").write_text(json.dumps(numbers, indent=2) + "\n", "utf-8")


def facts(device: str) -> list[tuple[str, str]]:
    import torch

    card = "none: on the processor"
    if device.startswith("cuda"):
        known: Any = torch.cuda.get_device_properties(device)
        built = f"compute capability {known.major}.{known.minor}, CUDA {torch.version.cuda}"
        card = f"{known.name}, {known.total_memory / 2**30:.0f} GiB, {built}"
    libraries = ("torch", "diffusers", "transformers", "torchao")
    return [
        ("Date", datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")),
        ("Card", card),
        ("Processor", f"{platform.machine()}, {os.cpu_count()} cores"),
        (
            "Python",
            f"{platform.python_version()}; " + ", ".join(f"{name} {version(name)}" for name in libraries),
        ),
    ]


if __name__ == "__main__":
    main()
