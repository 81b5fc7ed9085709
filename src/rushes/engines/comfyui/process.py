"""A ComfyUI of our own: started, watched and ended by the slot's child process that uses it.

It never outlives that process, however that one ends: on Linux the kernel ends it (PR_SET_PDEATHSIG), and
everywhere a watcher in its process group ends the whole group, with whatever ComfyUI's nodes have started,
when the pipe from us closes. What it prints goes to our standard error as log lines, and never waits for them.

Also the entry of the process that becomes ComfyUI: ``python -m rushes.engines.comfyui.process``.
"""

import codecs
import contextlib
import os
import queue
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, Self

from rushes import log
from rushes.engines.comfyui.patch import FOLDER
from rushes.errors import EngineError, SettingsError
from rushes.guard import die_with_parent

START_SECONDS: Final = 300.0
"""ComfyUI imports torch and every node pack first; a cold disk and many packs take minutes."""
_STOP_SECONDS: Final = 10.0
_LOOK_SECONDS: Final = 0.05
_PORT_TRIES: Final = 5
_KEPT_LINES: Final = 20
_WAITING_LINES: Final = 1000
_LONGEST_LINE: Final = 4000
_PIECE_BYTES: Final = 65536
_NVIDIA_SECONDS: Final = 20.0
_HOST: Final = "127.0.0.1"
_TAKEN: Final = re.compile(r"address already in use|EADDRINUSE|WinError 10048|\[Errno (48|98)\]", re.IGNORECASE)
_DEVICE_ARGUMENTS: Final = frozenset({"--cuda-device", "--default-device", "--cpu", "--directml"})


class ComfyProcess:
    """One running ComfyUI that listens on a free loopback port.

    Its folders lie below ``work/slot-<number>`` and are ours alone; all but the user folder are emptied at
    each start, as a ComfyUI forgets its files' names when it ends. What lies in the input folder of the
    ComfyUI itself can still be named by a workflow: it is linked into ours.

    ComfyUI gets ``--disable-metadata``: else each file that it makes carries the whole workflow, with all its
    inputs, to whoever gets the file. Whoever wants that starts ComfyUI by hand and sets RUSHES_COMFYUI_URLS.
    The operator's arguments come before ours, so that the address, the folders and the port stay ours, and
    behind what can be chosen otherwise (``--preview-method``).
    """

    url: str

    def __init__(
        self, folder: Path, python: str, arguments: Sequence[str], slot: Path, device: str | None
    ) -> None:
        self._folder, self._python, self._arguments = folder, python, arguments
        self._device = device
        self.input_dir, self.output_dir = slot / "input", slot / "output"
        self._temp_parent, self._user_dir = slot, slot / "user"
        self.temp_dir = slot / "temp"
        """ComfyUI puts a folder ``temp`` below the one that it is given."""
        self._kept: deque[str] = deque(maxlen=_KEPT_LINES)
        self._keeping = threading.Lock()
        self._popen: subprocess.Popen[bytes] | None = None
        self._ending = threading.Lock()
        self._stopped = False
        self._held: socket.socket | None = None
        self._read_all = threading.Event()

    @classmethod
    def start(
        cls,
        folder: Path,
        *,
        python: str,
        arguments: str,
        work: Path,
        number: int,
        seconds: float = START_SECONDS,
    ) -> Self:
        """Start the ComfyUI of ``folder`` for the slot ``number`` and wait until it listens.

        ``python`` empty takes the ComfyUI's own virtual environment, else our Python. ``arguments`` are more
        of them, as on a command line. With several NVIDIA GPUs each slot gets one, by its number, unless the
        arguments name a device. Raises SettingsError for settings that cannot be used, and EngineError
        ``engine_start_failed`` with its last words for a ComfyUI that ends, or does not listen in time.
        """
        folder = folder.expanduser().resolve()
        if not (folder / "main.py").is_file():
            raise SettingsError(f"comfyui_dir: {folder} is no ComfyUI: it has no main.py")
        try:
            words = shlex.split(arguments)
        except ValueError as error:
            raise SettingsError(f"comfyui_args cannot be read ({error}): {arguments!r}") from None
        program = choose_python(folder, python)
        device = None if _DEVICE_ARGUMENTS & {word.partition("=")[0] for word in words} else _device(number)
        deadline = time.monotonic() + seconds
        for _ in range(_PORT_TRIES):
            made = cls(folder, program, words, work.resolve() / f"slot-{number}", device)
            made._launch()
            if made._listens(deadline):
                return made
            ended = not made.alive()
            made.stop()
            if not (ended and _TAKEN.search(made.last_words())):
                break
        state = "does not start" if ended else f"does not listen after {seconds:g} s"
        raise EngineError(
            "engine_start_failed",
            f"The ComfyUI in {folder} {state}. Its last words:\n{made.last_words() or '(none)'}",
            retryable=True,
            began=False,
            replace=True,
        )

    @property
    def pid(self) -> int:
        """ComfyUI's process id; its process group has the same number."""
        assert self._popen is not None
        return self._popen.pid

    def alive(self) -> bool:
        """Whether it runs. Not whether it answers."""
        return self._popen is not None and self._popen.poll() is None

    def last_words(self) -> str:
        """The last lines that it printed, for the operator."""
        if not self.alive():
            self._read_all.wait(1.0)
        with self._keeping:
            return "\n".join(self._kept)

    def stop(self) -> None:
        """End it and everything that it started. Returns when it is gone; may be called again."""
        with self._ending:
            if self._stopped or self._popen is None:
                return
            self._stopped = True
            popen = self._popen
            # The watcher is a member of the group until the group is killed, so its number is still its own.
            _signal_group(popen.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                popen.wait(_STOP_SECONDS)
            _signal_group(popen.pid, signal.SIGKILL)
            popen.wait()
            assert popen.stdin is not None
            with contextlib.suppress(OSError):
                popen.stdin.close()
            if self._held is not None:
                self._held.close()

    # -- starting -----------------------------------------------------------------------------------------
    def _prepare(self) -> None:
        """Make our folders, without what an earlier ComfyUI left in them."""
        for folder in (self.input_dir, self.output_dir, self.temp_dir):
            shutil.rmtree(folder, ignore_errors=True)
        for folder in (self.input_dir, self.output_dir, self.temp_dir, self._user_dir):
            folder.mkdir(parents=True, exist_ok=True)
        theirs = self._folder / "input"
        for entry in theirs.iterdir() if theirs.is_dir() else ():
            if entry.name != FOLDER:
                with contextlib.suppress(OSError):
                    (self.input_dir / entry.name).symlink_to(entry)

    def _launch(self) -> None:
        """Start the process in a thread that lives as long as it does: the kernel takes the end of the thread
        that started a process for the end of its parent.
        """
        self._prepare()
        self._held, port = _free_port()
        self.url = f"http://{_HOST}:{port}"
        command = self._command(port)
        started = threading.Event()
        failure: list[OSError] = []

        def keep() -> None:
            try:
                self._popen = popen = subprocess.Popen(
                    [sys.executable, "-P", "-m", __name__, str(os.getpid()), *command],
                    cwd=self._folder,
                    env=_environment(os.environ, self._device),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    bufsize=0,
                    start_new_session=True,
                )
            except OSError as error:
                failure.append(error)
                return
            finally:
                started.set()
            self._relay(popen)
            popen.wait()

        threading.Thread(target=keep, name="rushes-comfyui", daemon=True).start()
        started.wait()
        if failure:
            if self._held is not None:
                self._held.close()
            raise failure[0]

    def _command(self, port: int) -> list[str]:
        overridable = ["--preview-method", "auto"]
        fixed = {
            "--disable-auto-launch": (),
            "--disable-metadata": (),
            "--listen": (_HOST,),
            "--port": (str(port),),
            "--input-directory": (str(self.input_dir),),
            "--output-directory": (str(self.output_dir),),
            "--temp-directory": (str(self._temp_parent),),
            "--user-directory": (str(self._user_dir),),
            # Else all slots share the file in the ComfyUI's folder, and newer ones lock it.
            "--database-url": (f"sqlite:///{self._user_dir / 'comfyui.db'}",),
        }
        known = self._known_options()
        ours = [
            word for name, values in fixed.items() if not known or name in known for word in (name, *values)
        ]
        return [self._python, "-u", "main.py", *overridable, *self._arguments, *ours]

    def _known_options(self) -> frozenset[str]:
        """The options of this version, as one that it does not know ends it; empty where that is not told."""
        try:
            text = (self._folder / "comfy" / "cli_args.py").read_text("utf-8", "replace")
        except OSError:
            return frozenset()
        return frozenset(re.findall(r"""["'](--[a-z][a-z0-9-]*)["']""", text))

    def _listens(self, deadline: float) -> bool:
        """Wait until it accepts connections; False where it ends before, or time does. The port is held for it
        alone, so whoever answers there is it.
        """
        port = int(self.url.rpartition(":")[2])
        while self.alive() and time.monotonic() < deadline:
            try:
                socket.create_connection((_HOST, port), timeout=1.0).close()
            except OSError:
                time.sleep(_LOOK_SECONDS)
            else:
                return self.alive()
        return False

    # -- what it prints -----------------------------------------------------------------------------------
    def _relay(self, popen: "subprocess.Popen[bytes]") -> None:
        """Read all that it prints, at once; a second thread logs it, and lines that it cannot keep up with are
        counted and dropped: a ComfyUI that waits for our log would wait in the middle of a generation.
        """
        lines: queue.Queue[str | None] = queue.Queue(_WAITING_LINES)
        writer = threading.Thread(
            target=_log_lines, args=(lines, popen.pid), name="rushes-comfyui-log", daemon=True
        )
        writer.start()
        splitter = _Lines()
        assert popen.stdout is not None
        dropped = 0
        while piece := os.read(popen.stdout.fileno(), _PIECE_BYTES):
            dropped = self._pass_on(splitter.feed(piece), lines, dropped)
        self._pass_on(splitter.rest(), lines, dropped)
        popen.stdout.close()
        self._read_all.set()
        lines.put(None)

    def _pass_on(self, texts: Sequence[str], lines: "queue.Queue[str | None]", dropped: int) -> int:
        for text in texts:
            with self._keeping:
                self._kept.append(text)
            try:
                if dropped:
                    lines.put_nowait(f"({dropped} lines left out: they came faster than the log takes them)")
                    dropped = 0
                lines.put_nowait(text)
            except queue.Full:
                dropped += 1
        return dropped


class _Lines:
    """Bytes into lines as a terminal would have them in the end: progress bars overwrite themselves."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._open = ""

    def feed(self, piece: bytes) -> list[str]:
        *whole, self._open = (self._open + self._decoder.decode(piece)).split("\n")
        if "\r" in self._open[:-1]:  # keep a last one: "\n" may follow
            self._open = self._open[self._open.rindex("\r", 0, -1) + 1 :]
        if len(self._open) > _PIECE_BYTES:
            whole.append(self._open)
            self._open = ""
        return [text for line in whole if (text := _shown(line))]

    def rest(self) -> list[str]:
        return [text for text in [_shown(self._open + self._decoder.decode(b"", final=True))] if text]


def _shown(line: str) -> str:
    return line.rstrip("\r").rpartition("\r")[2].rstrip()[:_LONGEST_LINE]


def _log_lines(lines: "queue.Queue[str | None]", pid: int) -> None:
    while (line := lines.get()) is not None:
        log.event("comfyui", pid=pid, line=line)


# -- choices --------------------------------------------------------------------------------------------
def choose_python(folder: Path, setting: str) -> str:
    """The Python of the ComfyUI in ``folder``: the setting, or the one of a virtual environment in the folder or
    beside it, or ours. Raises SettingsError for a setting that is no program.
    """
    if setting:
        found = shutil.which(setting)
        if found is None:
            raise SettingsError(f"comfyui_python: there is no program {setting!r}")
        return str(Path(found).absolute())  # not resolved: a link into an environment is that environment
    for place in (folder, folder.parent):
        for name in (".venv", "venv"):
            python = place / name / "bin" / "python"
            if os.access(python, os.X_OK):
                return str(python)
    return sys.executable


def _device(number: int) -> str | None:
    """The GPU of this slot, as CUDA_VISIBLE_DEVICES names it; None where there are not several.

    A choice that the operator has made in that variable is divided further.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible is not None else [str(one) for one in range(_count_gpus())]
    return devices[number % len(devices)].strip() if len(devices) > 1 else None


def _count_gpus() -> int:
    program = shutil.which("nvidia-smi")
    if program is None:
        return 0
    try:
        done = subprocess.run(
            [program, "-L"], stdin=subprocess.DEVNULL, capture_output=True, timeout=_NVIDIA_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        log.event("GPUs not counted", error=str(error))
        return 0
    return sum(line.startswith(b"GPU ") for line in done.stdout.splitlines())


def _environment(ours: Mapping[str, str], device: str | None) -> dict[str, str]:
    """Ours without the settings: node packs are others' code, and a database's address holds its password."""
    made = {name: value for name, value in ours.items() if not name.startswith("RUSHES_")}
    if device is not None:
        made["CUDA_VISIBLE_DEVICES"] = device
    return made


def _free_port() -> tuple[socket.socket | None, int]:
    """A free port, and on Linux the socket that keeps it free for a server that sets SO_REUSEADDR, as asyncio
    does: as long as the socket is bound without listening, such a server can bind, and the kernel gives the
    port to nobody who asks for any. Elsewhere another process may come first; then another is tried.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind((_HOST, 0))
    port = int(held.getsockname()[1])
    if sys.platform == "linux":
        return held, port
    else:  # noqa: RET505  the type checker skips what is not for its platform
        held.close()
        return None, port


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


# -- the process that becomes ComfyUI -------------------------------------------------------------------
def _become(parent: int, command: Sequence[str]) -> None:
    """Leave a watcher behind, then be ``command``. Standard input is the pipe from ``parent``."""
    if sys.platform == "linux":
        die_with_parent(parent)  # holds through execv; what does the same elsewhere would not
    if os.fork() == 0:
        _watch()
    nowhere = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nowhere, 0)
    os.execv(command[0], list(command))  # noqa: S606  a list: no shell has a say


def _watch() -> None:
    """End the whole group when the parent has ended: its end of the pipe closes then. Stays in the group, so
    that the group's number is not given to another meanwhile, and is killed with it.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    for descriptor in (1, 2):  # else the reader of ComfyUI's output would not see its end
        os.close(descriptor)
    while os.read(0, 1):
        pass
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    _become(int(sys.argv[1]), sys.argv[2:])
