"""Seconds and peak memory of the draft engine at the models' full default sizes.

    python bench/draft.py [--keep FOLDER]

Each kind runs in a fresh process, so that its peak is its own.
"""

import argparse
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

SAMPLES = Path(__file__).resolve().parent.parent / "src" / "rushes" / "catalog" / "samples"
WASTELAND, CORRIDOR = SAMPLES / "Runcomfy_Example_1290_1.png", SAMPLES / "RunComfy_examples_1235_1.png"
PUPPY = (SAMPLES / "Runcomfy_Example_1259_1.png", SAMPLES / "Runcomfy_Example_1259_2.png")
TRACKING = "A wide-angle tracking shot. The camera slowly dollies in. Slight handheld shake."
Case = tuple[Literal["image", "video"], dict[str, Any]]
CASES: dict[str, Case] = {
    "reference to video 1024x576 x 81": (
        "video",
        {"reference_image": WASTELAND, "prompt": TRACKING, "resolution": (1024, 576), "frames": 81, "fps": 16},
    ),
    "image to video 720x480 x 81": (
        "video",
        {
            "start_image": CORRIDOR,
            "prompt": "slowly dolly zooms out",
            "resolution": (720, 480),
            "frames": 81,
            "fps": 16,
        },
    ),
    "first and last frame 720x720 x 81": (
        "video",
        {"start_image": PUPPY[0], "end_image": PUPPY[1], "resolution": (720, 720), "frames": 81, "fps": 16},
    ),
    "first and last frame 1024x576 x 81": (
        "video",
        {"start_image": PUPPY[0], "end_image": PUPPY[1], "resolution": (1024, 576), "frames": 81, "fps": 16},
    ),
    "image to video 1280x720 x 141": (
        "video",
        {"start_image": WASTELAND, "prompt": "orbit left", "resolution": (1280, 720), "frames": 141, "fps": 24},
    ),
    "first and last frame 1280x720 x 141": (
        "video",
        {"start_image": PUPPY[0], "end_image": PUPPY[1], "resolution": (1280, 720), "frames": 141, "fps": 24},
    ),
    "text to video 1024x576 x 81": (
        "video",
        {"prompt": "A fox at dawn, the camera pans right", "resolution": (1024, 576), "frames": 81, "fps": 16},
    ),
    "text to image 1440x810": (
        "image",
        {"prompt": "A red fox stands on a rock above a misty valley at sunrise", "resolution": (1440, 810)},
    ),
    "image to image 1440x810": (
        "image",
        {"prompt": "A woman in a corridor", "start_image": CORRIDOR, "resolution": (1440, 810)},
    ),
}


def one(name: str, folder: Path) -> None:
    """Run one case in this process and print its line."""
    from rushes.catalog.model import Model
    from rushes.engines.base import Job
    from rushes.engines.draft.engine import DraftEngine

    kind, roles = CASES[name]
    model = Model("bench/draft", "Bench", "", (), kind, (), (), Path())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    (made,) = DraftEngine().run(Job("bench", 1, model, {}, roles, {}, folder), lambda progress: None)
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"{name:38} {seconds:6.2f} s  peak {peak / 1024:5.0f} MiB (idle {before / 1024:.0f})"
        f"  {made.path.stat().st_size / 1e6:5.2f} MB",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", type=Path, help="folder for the files; without it they are removed")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.case:
        one(chosen.case, chosen.keep)
        return
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        for name in CASES:
            folder = (chosen.keep or Path(scratch)) / name.replace(" ", "-")
            folder.mkdir(parents=True, exist_ok=True)
            subprocess.run([sys.executable, __file__, "--case", name, "--keep", str(folder)], check=True)


if __name__ == "__main__":
    main()
