"""Where a slot that drives a ComfyUI keeps what is its own."""

import subprocess
import sys
from pathlib import Path

from rushes import wiring
from rushes.settings import Settings

PROGRAM = """
import sys
from pathlib import Path
from rushes import wiring
from rushes.settings import Settings
for slot in map(int, sys.argv[2:]):
    print(*wiring._comfyui_place(Settings(data_dir=Path(sys.argv[1])), slot), flush=True)
sys.stdin.read()
"""


def place(data: Path, *slots: int) -> tuple["subprocess.Popen[str]", list[str]]:
    command = [sys.executable, "-c", PROGRAM, str(data), *map(str, slots)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, [process.stdout.readline().strip() for _ in slots]


def test_a_slot_keeps_its_place_over_restarts_and_shares_it_with_nobody(tmp_path: Path) -> None:
    first, (zero, one) = place(tmp_path, 0, 1)
    second, (other,) = place(tmp_path, 0)
    assert 3 == len({zero, one, other})
    assert zero.split()[0] == one.split()[0] != other.split()[0]
    first.communicate()
    again, (same,) = place(tmp_path, 0)
    assert zero == same
    for process in (again, second):
        process.communicate()
    folder, identity = wiring._comfyui_place(Settings(data_dir=tmp_path), 0)
    assert zero == f"{folder} {identity}"
    wiring._places.pop().close()
