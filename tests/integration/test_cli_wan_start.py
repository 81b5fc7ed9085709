"""`rushes serve` and `rushes worker` with settings with which the Wan engine can never start."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

MODEL = "community/wan-2-2/first-last-frame"


def started(
    tmp_path: Path, command: str, *, python_path: str = "", **settings: str
) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("RUSHES_", "HF_"))}
    environ |= {
        "RUSHES_ENGINE": "wan",
        "RUSHES_DATA_DIR": str(tmp_path / "data"),
        "HF_HOME": str(tmp_path / "hf"),
    }
    environ |= {"RUSHES_PORT": "0", "PYTHONPATH": python_path, "HF_HUB_OFFLINE": "1"}
    environ |= {f"RUSHES_{name}": value for name, value in settings.items()}
    argv = [sys.executable, "-m", "rushes.cli.main", command]
    return subprocess.run(
        argv, env=environ, capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path
    )


def refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert (2, "") == (done.returncode, done.stdout), done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


@pytest.mark.parametrize("command", ["serve", "worker"])
def test_without_the_extra(tmp_path: Path, command: str) -> None:
    """As on a machine where only Rushes is installed: a finder that finds no torch stands before the others."""
    folder = tmp_path / "path"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        "import sys\n"
        "from importlib.machinery import PathFinder\n"
        "class Bare(PathFinder):\n"
        "    @classmethod\n"
        "    def find_spec(cls, name, path=None, target=None):\n"
        "        return None if name == 'torch' else PathFinder.find_spec(name, path, target)\n"
        "sys.meta_path[:] = [Bare if one is PathFinder else one for one in sys.meta_path]\n"
    )
    refused(
        started(tmp_path, command, python_path=str(folder)), "torch is missing", "pip install 'rushes[wan]'"
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"WAN_DEVICE": "cuda"}, "nvidia-smi tells of no card"),
        ({"WAN_WEIGHTS": "community/wan-2-2/last-frame=/srv/x"}, f"did you mean {MODEL}"),
        ({"MODELS": "nosuch/model"}, "none that fits RUSHES_MODELS, 'nosuch/model'"),
        ({}, "engine wan has the weights of no model yet"),
    ],
)
@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there is a card, or its tools")
def test_what_cannot_work_is_refused_at_once(tmp_path: Path, settings: dict[str, str], words: str) -> None:
    pytest.importorskip("diffusers", reason="needs the extra: pip install 'rushes[wan]'")
    refused(started(tmp_path, "serve", **settings), words)
    assert not (tmp_path / "data").exists()


def test_a_server_without_slots_needs_nothing_of_it(tmp_path: Path) -> None:
    from rushes.cli.wan_start import check_wan
    from rushes.settings import load

    check_wan(load({"RUSHES_ENGINE": "wan", "RUSHES_WORKERS": "0", "RUSHES_WAN_DEVICE": "cuda"}))
