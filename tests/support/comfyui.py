"""ComfyUI servers for tests, in processes of their own: the stub, and a real one where there is one.

A real ComfyUI is found through the environment alone: ``COMFYUI_DIR`` (its folder), ``COMFYUI_PYTHON`` (its python;
default: its own virtual environment, else this one) and ``COMFYUI_PYTHONPATH`` (put in its PYTHONPATH).
"""

import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import httpx

from support.server import eventually, free_port

TESTS = Path(__file__).parent.parent
START_SECONDS = 90.0
Graph = dict[str, dict[str, Any]]


def real_dir() -> Path | None:
    """The folder of a real ComfyUI, where the environment names one."""
    named = os.environ.get("COMFYUI_DIR")
    return Path(named) if named else None


def real_python(folder: Path) -> str:
    own = folder / "venv" / "bin" / "python"
    return os.environ.get("COMFYUI_PYTHON") or (str(own) if own.exists() else sys.executable)


def kinds() -> list[str]:
    return ["stub", "real"] if real_dir() else ["stub"]


class Comfy:
    """One ComfyUI, stub or real, on one port for as long as this object lives; it can die and come back."""

    def __init__(self, kind: str, folder: Path, *, arguments: tuple[str, ...] = ()) -> None:
        self.kind, self.folder = kind, folder
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / "log"
        self.process: subprocess.Popen[bytes] | None = None
        self._arguments = arguments
        self._http = httpx.Client(base_url=self.url, timeout=30, trust_env=False)
        for name in ("in", "out", "temp", "user"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / "paths.yaml").write_text(f"tests:\n  custom_nodes: {TESTS / 'support' / 'comfy_nodes'}\n")

    # -- life -------------------------------------------------------------------------------------------
    def command(self) -> tuple[list[str], Path, dict[str, str]]:
        """(arguments, working directory, environment) of the program."""
        environment = dict(os.environ)
        given = [
            *("--listen", "127.0.0.1", "--port", str(self.port), "--cpu"),
            *("--input-directory", str(self.input_dir), "--output-directory", str(self.output_dir)),
            *("--temp-directory", str(self.folder / "temp"), "--user-directory", str(self.folder / "user")),
            *("--extra-model-paths-config", str(self.folder / "paths.yaml"), *self._arguments),
        ]
        if self.kind == "stub":
            environment["PYTHONPATH"] = str(TESTS)
            return [sys.executable, "-m", "support.comfyui_stub", *given], self.folder, environment
        folder = real_dir()
        assert folder is not None, "COMFYUI_DIR names no ComfyUI"
        environment["PYTHONPATH"] = os.environ.get("COMFYUI_PYTHONPATH", "")
        return [real_python(folder), "main.py", *given], folder, environment

    def start(self, *, wait: bool = True) -> "Comfy":
        command, folder, environment = self.command()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        if wait:
            eventually(self.answers, START_SECONDS, "ComfyUI answers")
        return self

    def answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log.read_text()[-3000:]
        try:
            return self._http.get("/system_stats", timeout=2).status_code == 200
        except httpx.HTTPError:
            return False

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def kill(self) -> None:
        """kill -9, as the kernel's out-of-memory killer would."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        self.thaw()
        self._end(signal.SIGTERM)

    def _end(self, with_signal: signal.Signals) -> None:
        if self.alive:
            assert self.process is not None
            self.process.send_signal(with_signal)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(10)

    def freeze(self) -> None:
        """Connections are accepted by the kernel and nothing answers."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        if self.alive:
            assert self.process is not None
            self.process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        self.stop()
        self._http.close()

    def reset(self) -> None:
        """As new: running, nothing queued, no history, nothing cached."""
        self.thaw()
        if not self.alive:
            self.start()
            return
        self.post("/queue", {"clear": True})
        self.post("/interrupt", {})
        try:
            eventually(lambda: not self.running() and not self.pending(), 5, "the queue is empty")
        except AssertionError:  # a node that cannot be interrupted
            self.kill()
            self.start()
            return
        self.post("/free", {"unload_models": True, "free_memory": True})
        self.post("/history", {"clear": True})

    # -- folders ----------------------------------------------------------------------------------------
    @property
    def input_dir(self) -> Path:
        return self.folder / "in"

    @property
    def output_dir(self) -> Path:
        return self.folder / "out"

    @property
    def temp_dir(self) -> Path:
        return self.folder / "temp" / "temp"

    def text_of_log(self) -> str:
        return self.log.read_text(errors="replace")

    # -- talking, as a plain client ---------------------------------------------------------------------
    def get(self, path: str, **query: Any) -> Any:
        answer = self._http.get(path, params=query)
        assert answer.status_code == 200, (answer.status_code, answer.text)
        return answer.json()

    def post(self, path: str, body: Any) -> httpx.Response:
        return self._http.post(path, json=body)

    def request(self, method: str, path: str, **more: Any) -> httpx.Response:
        return self._http.request(method, path, **more)

    def queue_prompt(self, graph: Graph, **more: Any) -> str:
        """Queue a prompt that must be accepted; its id."""
        body = {"prompt": graph, "client_id": uuid.uuid4().hex, **more}
        answer = self.post("/prompt", body)
        assert answer.status_code == 200, answer.text
        assert {} == answer.json()["node_errors"], answer.text
        return str(answer.json()["prompt_id"])

    def running(self) -> list[Any]:
        return list(self.get("/queue")["queue_running"])

    def pending(self) -> list[Any]:
        return list(self.get("/queue")["queue_pending"])

    def history(self) -> dict[str, Any]:
        return dict(self.get("/history"))

    def entry(self, prompt_id: str, seconds: float = 30.0) -> dict[str, Any]:
        """The prompt's history entry, once it is there."""
        return dict(
            eventually(
                lambda: self.get(f"/history/{prompt_id}").get(prompt_id), seconds, f"{prompt_id} has ended"
            )
        )

    def idle(self) -> bool:
        return not self.running() and not self.pending()


def wait_for_port(port: int, seconds: float = 10.0) -> None:
    """Until something listens there."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    raise AssertionError(f"nothing listens on {port}")
