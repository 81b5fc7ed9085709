"""A ComfyUI of our own: how it is started and ended, on small programs that listen, crash, fork and resist; and on
a real ComfyUI where COMFYUI_DIR names one.
"""

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from rushes.engines.comfyui.process import ComfyProcess, _Lines, choose_python
from rushes.errors import EngineError, SettingsError

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="process groups")

LISTEN = """
import argparse, asyncio, json, os, signal, socket, subprocess, sys, time
parser = argparse.ArgumentParser()
for name in ("--disable-auto-launch", "--disable-metadata", "--cpu"):
    parser.add_argument(name, action="store_true")
for name in ("listen", "port", "preview-method", "input-directory", "output-directory", "temp-directory",
             "user-directory", "database-url", "cuda-device", "fault", "extra"):
    parser.add_argument("--" + name)
args = parser.parse_args()
open("started.jsonl", "a").write(json.dumps(
    {"pid": os.getpid(), "args": vars(args), "env": dict(os.environ), "argv": sys.argv, "cwd": os.getcwd(),
     "stdin": sys.stdin.read(), "group": os.getpgrp()}) + "\\n")
BEFORE
async def main():
    server = await asyncio.start_server(lambda reader, writer: writer.close(), args.listen, int(args.port))
    print("To see the GUI go to: http://%s:%s" % (args.listen, args.port))
    AFTER
    await server.serve_forever()
asyncio.run(main())
"""


class Comfy:
    """A folder with a ``main.py``, and what its runs wrote down of themselves."""

    def __init__(self, path: Path) -> None:
        self.folder, self.work = path / "ComfyUI", path / "work"
        self.folder.mkdir()
        self.made: list[ComfyProcess] = []

    def program(self, before: str = "", after: str = "pass") -> None:
        text = LISTEN.replace("BEFORE", textwrap.dedent(before)).replace(
            "    AFTER", textwrap.indent(textwrap.dedent(after).strip(), "    ")
        )
        (self.folder / "main.py").write_text(text)

    def start(
        self, arguments: str = "", number: int = 0, seconds: float = 60, python: str = sys.executable
    ) -> ComfyProcess:
        process = ComfyProcess.start(
            self.folder, python=python, arguments=arguments, work=self.work, number=number, seconds=seconds
        )
        self.made.append(process)
        return process

    @property
    def runs(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "started.jsonl").read_text().splitlines()]


@pytest.fixture
def comfy(tmp_path: Path) -> Iterator[Comfy]:
    made = Comfy(tmp_path)
    made.program()
    yield made
    for process in made.made:
        process.stop()


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.01)


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def group_is_empty(group: int) -> bool:
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):
            if os.getpgid(process.pid) == group and not gone(process.pid):
                return False
    return True


def answers(process: ComfyProcess) -> bool:
    host, port = process.url.removeprefix("http://").split(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError:
        return False
    return True


# -- starting -------------------------------------------------------------------------------------------
def test_it_listens_when_start_returns_and_has_all_that_it_needs(comfy: Comfy, monkeypatch) -> None:
    monkeypatch.setenv("RUSHES_DATABASE_URL", "postgresql://secret@db/x")
    monkeypatch.setenv("SOMETHING_ELSE", "stays")

    process = comfy.start("--extra 'two words' --port 1 --preview-method taesd", number=3)

    assert process.alive()
    assert answers(process)
    (run,) = comfy.runs
    slot = comfy.work / "slot-3"
    expected = {
        "listen": "127.0.0.1",
        "port": process.url.rpartition(":")[2],
        "preview_method": "taesd",
        "disable_auto_launch": True,
        "disable_metadata": True,
        "input_directory": str(slot / "input"),
        "output_directory": str(slot / "output"),
        "temp_directory": str(slot),
        "user_directory": str(slot / "user"),
        "database_url": f"sqlite:///{slot / 'user' / 'comfyui.db'}",
        "extra": "two words",
    }
    assert expected == {name: run["args"][name] for name in expected}
    folders = (slot / "input", slot / "output", slot / "temp")
    assert folders == (process.input_dir, process.output_dir, process.temp_dir)
    assert all(folder.is_dir() for folder in folders)
    assert (process.pid, process.pid) == (run["pid"], run["group"])
    assert ("", str(comfy.folder)) == (run["stdin"], run["cwd"])
    assert "stays" == run["env"]["SOMETHING_ELSE"]
    assert not [name for name in run["env"] if name.startswith("RUSHES_")]


def test_options_that_the_version_does_not_know_are_left_out(comfy: Comfy) -> None:
    (comfy.folder / "comfy").mkdir()
    (comfy.folder / "comfy" / "cli_args.py").write_text(
        'parser.add_argument("--listen"); parser.add_argument("--port", x="--help me")\n'
    )
    comfy.start()
    (run,) = comfy.runs
    assert {"main.py", "--listen", "--port", "--preview-method"} == {
        word for word in run["argv"] if word.startswith(("--", "main"))
    }


def test_folders_are_emptied_at_the_start_but_the_users(comfy: Comfy) -> None:
    (comfy.folder / "input" / "sub").mkdir(parents=True)
    (comfy.folder / "input" / "rushes").mkdir()
    (comfy.folder / "input" / "mask.png").write_bytes(b"mask")
    slot = comfy.work / "slot-0"
    for name in ("input", "output", "temp", "user"):
        (slot / name / "rushes").mkdir(parents=True)
        (slot / name / "rushes" / "old.png").write_bytes(b"old")

    process = comfy.start()

    assert b"mask" == (process.input_dir / "mask.png").read_bytes()
    assert {"mask.png", "sub"} == {path.name for path in process.input_dir.iterdir()}
    assert [] == [*process.output_dir.iterdir(), *process.temp_dir.iterdir()]
    assert (slot / "user" / "rushes" / "old.png").exists()
    process.stop()
    comfy.start()
    assert b"mask" == (comfy.folder / "input" / "mask.png").read_bytes()


def test_two_slots_run_side_by_side(comfy: Comfy) -> None:
    one, two = comfy.start(number=0), comfy.start(number=1)
    assert one.url != two.url
    assert one.output_dir != two.output_dir
    assert answers(one)
    assert answers(two)
    one.stop()
    assert not one.alive()
    assert answers(two)


def test_a_port_that_is_taken_meanwhile_is_chosen_anew(comfy: Comfy) -> None:
    comfy.program(
        before="""
        if len(open("started.jsonl").readlines()) == 1:  # a rival that comes between choosing and binding
            rival = socket.socket()
            rival.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            rival.bind((args.listen, int(args.port)))
            rival.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        """
    )
    process = comfy.start()
    first, second = (run["args"]["port"] for run in comfy.runs)
    assert first != second
    assert process.url.endswith(f":{second}")
    assert answers(process)


def test_nobody_else_is_given_the_port_while_it_starts(comfy: Comfy) -> None:
    if sys.platform != "linux":
        pytest.skip("the port is held on Linux alone")
    comfy.program(
        before="""
        rival = socket.socket()
        try:
            rival.bind((args.listen, int(args.port)))
            sys.exit("a rival could have it")
        except OSError as error:
            assert error.errno == 98, error
        """
    )
    assert answers(comfy.start())


# -- failing to start -----------------------------------------------------------------------------------
def test_one_that_ends_at_once_says_why(comfy: Comfy) -> None:
    comfy.program(before="print('a line that came before'); import torch_that_is_not_there")
    with pytest.raises(EngineError) as caught:
        comfy.start()
    assert ("engine_start_failed", True, False) == (
        caught.value.reason,
        caught.value.retryable,
        caught.value.began,
    )
    assert "does not start" in caught.value.message
    assert "a line that came before" in caught.value.message
    assert "No module named 'torch_that_is_not_there'" in caught.value.message
    assert 1 == len(comfy.runs)


def test_one_that_never_listens_is_ended(comfy: Comfy) -> None:
    comfy.program(before="print('importing'); time.sleep(600)")
    with pytest.raises(EngineError, match="does not listen after 2 s") as caught:
        comfy.start(seconds=2)
    assert "importing" in caught.value.message
    (run,) = comfy.runs
    assert gone(run["pid"])


def test_settings_that_cannot_be_used_are_named(comfy: Comfy, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"comfyui_args.*No closing quotation"):
        comfy.start("--extra 'open")
    with pytest.raises(SettingsError, match="no program 'no-such-python'"):
        comfy.start(python="no-such-python")
    (comfy.folder / "main.py").unlink()
    with pytest.raises(SettingsError, match=r"no main\.py"):
        comfy.start()


def test_the_python_is_the_settings_or_the_environments_or_ours(tmp_path: Path) -> None:
    folder = tmp_path / "up" / "ComfyUI"
    folder.mkdir(parents=True)
    assert sys.executable == choose_python(folder, "")
    expected = []
    for place in (folder.parent / "venv", folder.parent / ".venv", folder / "venv", folder / ".venv"):
        (place / "bin").mkdir(parents=True)
        python = place / "bin" / "python"
        python.symlink_to(sys.executable)
        expected.append(str(python))
        assert expected[-1] == choose_python(folder, "")
    assert expected[0] == choose_python(folder, expected[0])


# -- GPUs -----------------------------------------------------------------------------------------------
@pytest.fixture
def gpus(tmp_path: Path, monkeypatch) -> Callable[[str], None]:
    def have(script: str) -> None:
        program = tmp_path / "bin" / "nvidia-smi"
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return have


@pytest.mark.parametrize(
    ("script", "visible", "arguments", "expected"),
    [
        ("echo GPU 0: A; echo '  MIG 1g'; echo GPU 1: B", None, "", "1"),
        ("echo GPU 0: A; echo GPU 1: B; echo GPU 2: C", None, "", "0"),
        ("echo GPU 0: A", None, "", None),
        ("echo no driver >&2; exit 9", None, "", None),
        ("echo GPU 0: A; echo GPU 1: B", "4, GPU-5f", "", "GPU-5f"),
        ("echo GPU 0: A; echo GPU 1: B", "4", "", "4"),
        ("echo GPU 0: A; echo GPU 1: B", None, "--cuda-device 7", None),
        ("echo GPU 0: A; echo GPU 1: B", None, "--cpu", None),
    ],
)
def test_each_slot_has_a_gpu_of_several(
    comfy: Comfy, gpus, monkeypatch, script: str, visible: str | None, arguments: str, expected: str | None
) -> None:
    gpus(script)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    comfy.start(arguments, number=3)
    assert expected == comfy.runs[0]["env"].get("CUDA_VISIBLE_DEVICES")


# -- ending ---------------------------------------------------------------------------------------------
GRANDCHILD = """
stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", stubborn], stdout=subprocess.PIPE)
child.stdout.readline()
open("grandchild", "w").write(str(child.pid))
"""


def test_stopping_ends_it_and_what_it_started(comfy: Comfy) -> None:
    comfy.program(before=GRANDCHILD)
    process = comfy.start()
    grandchild = int((comfy.folder / "grandchild").read_text())
    assert not gone(grandchild)
    process.stop()
    assert not process.alive()
    until(lambda: group_is_empty(process.pid))
    assert gone(grandchild)
    process.stop()


def test_one_that_ignores_the_signal_is_killed(comfy: Comfy, monkeypatch) -> None:
    monkeypatch.setattr("rushes.engines.comfyui.process._STOP_SECONDS", 0.5)
    comfy.program(before="signal.signal(signal.SIGTERM, signal.SIG_IGN)")
    process = comfy.start()
    process.stop()
    assert not process.alive()
    assert gone(process.pid)


def test_one_that_dies_is_seen_and_what_it_started_goes_with_the_stop(comfy: Comfy) -> None:
    comfy.program(before=GRANDCHILD, after="print('the last words')")
    process = comfy.start()
    os.kill(process.pid, signal.SIGKILL)
    until(lambda: not process.alive())
    assert process.last_words().endswith("the last words")
    grandchild = int((comfy.folder / "grandchild").read_text())
    assert not gone(grandchild)
    process.stop()
    until(lambda: gone(grandchild))


PARENT = """
import sys, threading, time
from pathlib import Path
from rushes.engines.comfyui.process import ComfyProcess
made = []
def start():
    folder, work = map(Path, sys.argv[1:])
    made.append(ComfyProcess.start(folder, python=sys.executable, arguments="", work=work, number=0))
thread = threading.Thread(target=start)
thread.start()
thread.join()  # the thread that asked is gone: that alone must not end it
print("ready", flush=True)
sys.stdin.read()
print(made[0].alive(), flush=True)
"""


def parent(comfy: Comfy) -> "subprocess.Popen[bytes]":
    started = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(comfy.folder), str(comfy.work)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert started.stdout is not None
    assert b"ready\n" == started.stdout.readline()
    return started


@pytest.mark.parametrize("end", ["kill", "exit"])
def test_it_does_not_outlive_us(comfy: Comfy, end: str) -> None:
    comfy.program(before=GRANDCHILD)
    with parent(comfy) as us:
        (run,) = comfy.runs
        grandchild = int((comfy.folder / "grandchild").read_text())
        assert not gone(run["pid"])
        if end == "kill":
            us.kill()
        else:
            assert b"True\n" == us.communicate(b"")[0]
        until(lambda: gone(run["pid"]))
        until(lambda: gone(grandchild))
        until(lambda: group_is_empty(run["group"]))


# -- what it prints -------------------------------------------------------------------------------------
def test_its_lines_go_to_the_log(comfy: Comfy, capfd) -> None:
    comfy.program(
        before=r"""
        print("on standard output")
        print("on standard error", file=sys.stderr)
        for step in range(200):
            sys.stderr.write("\r%d%%|###" % step)
        sys.stderr.write("\n")
        sys.stdout.buffer.write("猫 ".encode() + b"\xff\r\n\n")
        sys.stdout.flush()
        """
    )
    process = comfy.start()
    process.stop()
    assert process.last_words().splitlines()[:4] == [
        "on standard output",
        "on standard error",
        "199%|###",
        "猫 �",
    ]

    seen: list[dict] = []

    def logged() -> bool:
        seen.extend(json.loads(line) for line in capfd.readouterr().err.splitlines())
        return any("To see the GUI" in event["line"] for event in seen)

    until(logged)
    assert ["on standard output", "on standard error", "199%|###"] == [event["line"] for event in seen][:3]
    assert {("comfyui", process.pid)} == {(event["event"], event["pid"]) for event in seen}


def test_a_log_that_nobody_reads_does_not_hold_it_up(comfy: Comfy, monkeypatch) -> None:
    comfy.program(
        before="""
        for number in range(100_000):
            print(number, "x" * 40)
        """
    )
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as unread, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", unread)
        process = comfy.start()  # five megabytes go into a pipe that takes 64 KiB
        assert answers(process)
        until(lambda: "99999" in process.last_words())
        process.stop()
        os.close(reading)
        until(lambda: "rushes-comfyui-log" not in [thread.name for thread in threading.enumerate()])


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_lines_are_the_same_however_they_arrive(size: int) -> None:
    text = "one\r\n  10%\r 20%\r100%\ntwo 猫\n\nlast".encode()
    splitter = _Lines()
    lines = [line for at in range(0, len(text), size) for line in splitter.feed(text[at : at + size])]
    assert ["one", "100%", "two 猫", "last"] == lines + splitter.rest()


def test_a_line_without_an_end_is_bounded() -> None:
    splitter = _Lines()
    lines = [line for _ in range(100) for line in splitter.feed(b"x" * 10_000)]
    assert lines
    assert {4000} == {len(line) for line in lines}
    splitter = _Lines()
    for step in range(100_000):
        assert [] == splitter.feed(b"\r%d" % step)
    assert ["99999"] == splitter.rest()


# -- the real one ---------------------------------------------------------------------------------------
@pytest.mark.skipif("COMFYUI_DIR" not in os.environ, reason="COMFYUI_DIR names no real ComfyUI")
def test_a_real_comfyui_starts_and_ends(tmp_path: Path, monkeypatch) -> None:
    if path := os.environ.get("COMFYUI_PYTHONPATH"):
        monkeypatch.setenv("PYTHONPATH", path)
    process = ComfyProcess.start(
        Path(os.environ["COMFYUI_DIR"]),
        python=os.environ.get("COMFYUI_PYTHON", ""),
        arguments=os.environ.get("COMFYUI_ARGS", "--cpu"),
        work=tmp_path / "work with a space",
        number=1,
        seconds=100,
    )
    try:
        with urllib.request.urlopen(f"{process.url}/system_stats", timeout=30) as answer:
            argv = json.load(answer)["system"]["argv"]
        assert "--disable-metadata" in argv
        assert str(process.input_dir) in argv, shlex.join(argv)
        (process.output_dir / "rushes").mkdir()
        (process.output_dir / "rushes" / "a.txt").write_text("a")
        (process.temp_dir / "b.txt").write_text("b")
        for query in ("filename=a.txt&subfolder=rushes&type=output", "filename=b.txt&type=temp"):
            with urllib.request.urlopen(f"{process.url}/view?{query}", timeout=30) as answer:
                assert 1 == len(answer.read())
    finally:
        process.stop()
    assert not process.alive()
    until(lambda: group_is_empty(process.pid))
