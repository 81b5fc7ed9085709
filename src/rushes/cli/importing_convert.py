"""From the format of ComfyUI's pages to the API format, with comfy-cli's converter, in a process of its own.

A process of its own: the converter comes with a whole command line, which makes folders in the user's home when it
is imported; there it finds an empty home instead. What it says on its own outputs never mixes with ours.
"""

import importlib.util
import json
import logging
import os
import site
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any, Final

from rushes.catalog.workflow import Graph, NotAGraph, as_graph
from rushes.errors import EngineError, ManifestError

SECONDS: Final = 120
_INSTALL: Final = (
    "this is a workflow as ComfyUI's pages save it: `pip install 'rushes[import]'` to convert it, "
    "or export it from ComfyUI with Export (API)"
)
_SEED: Final = 0
"""Of the converter's draws: a prompt such as "a {red|blue} fox" becomes the same default every time."""


def convert(file: str, pages: Mapping[str, Any], object_info: Mapping[str, Any]) -> tuple[Graph, list[str]]:
    """The graph, and what the converter had to say.

    ``file`` is for messages. Raises ManifestError where the workflow cannot be converted, or the converter is
    not installed.
    """
    if importlib.util.find_spec("comfy_cli") is None:
        raise ManifestError(file, "", _INSTALL)
    with tempfile.TemporaryDirectory(prefix="rushes-import-") as home:
        environment = {
            **{name: value for name, value in os.environ.items() if name not in ("XDG_CONFIG_HOME", "APPDATA")},
            "HOME": home,
            "PYTHONUSERBASE": site.getuserbase(),  # which would be looked for in the new home
            "DO_NOT_TRACK": "1",
        }
        try:
            done = subprocess.run(
                [sys.executable, "-m", __name__],
                input=json.dumps({"pages": pages, "object_info": object_info}).encode(),
                capture_output=True,
                cwd=home,
                env=environment,
                timeout=SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise ManifestError(file, "", f"could not be converted within {SECONDS} seconds") from None
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        words = done.stderr.decode("utf-8", "replace").strip().splitlines() or ["it said nothing"]
        raise EngineError("import_failed", f"the converter of comfy-cli ended: {words[-1]}") from None
    if "error" in answer:
        raise ManifestError(file, "", f"cannot be converted: {answer['error']}")
    try:
        return as_graph(answer["graph"]), list(answer["notes"])
    except NotAGraph as error:
        raise ManifestError(file, "", f"cannot be converted: {error}") from None


class _Notes(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def main() -> None:
    """The child: reads a JSON object on standard input, writes one on standard output."""
    answer_to = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    given = json.loads(sys.stdin.buffer.read())
    notes = _Notes()
    logging.basicConfig(handlers=[notes], level=logging.WARNING)
    answer: dict[str, Any]
    try:
        answer = {"graph": _converted(given["pages"], given["object_info"]), "notes": notes.texts}
    except Exception as error:  # the converter's own, and whatever it did not foresee
        answer = {"error": str(error) or type(error).__name__}
    with answer_to:
        json.dump(answer, answer_to)


def _converted(pages: dict[str, Any], object_info: dict[str, Any]) -> Any:
    import random

    random.seed(_SEED)
    converter = importlib.import_module("comfy_cli.workflow_to_api")  # by name: it need not be installed
    return converter.convert_ui_to_api(pages, object_info)


if __name__ == "__main__":
    main()
