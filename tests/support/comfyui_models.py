"""Models on small graphs, written as folders, and jobs on them as a worker would hand them to the engine."""

import json
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rushes.catalog.load import load_model
from rushes.catalog.model import Model
from rushes.catalog.roles import roles_of
from rushes.engines.base import Job, Produced
from rushes.engines.comfyui.engine import ComfyUIEngine
from rushes.requests.record import Progress
from support.comfyui import Graph
from support.comfyui_transcripts import empty, node
from support.server import eventually

PROMPT: dict[str, Any] = {"name": "prompt", "type": "string", "role": "prompt", "default": "a test"}


def field(name: str, default: Any, **more: Any) -> dict[str, Any]:
    """An input whose type is its default's."""
    types = {bool: "boolean", int: "integer", float: "float", str: "string"}
    return {"name": name, "type": types[type(default)], "default": default, **more}


def file_field(name: str, role: str = "start_image") -> dict[str, Any]:
    return {"name": name, "type": "string", "role": role}


class Models:
    """A folder of models, such as ``models_dir`` names."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def add(
        self,
        graph: Graph,
        *inputs: dict[str, Any],
        id: str = "test/model",  # noqa: A002 - the model's own word
        output: str = "image",
        sample: dict[str, Any] | None = None,
        time_limit: float = 60.0,
        **table: Any,
    ) -> Model:
        """Write and read one model. ``table`` is ``[engines.comfyui]``."""
        folder = self.root / id
        folder.mkdir(parents=True, exist_ok=True)
        top = {
            "name": id,
            "description": "A model of the tests.",
            "categories": ["text-to-image" if output == "image" else "text-to-video"],
            "output": output,
            "time_limit": time_limit,
            "required": [one["name"] for one in inputs if "default" not in one],
            "graph": "graph.json",
        }
        lines = [f"{key} = {json.dumps(value)}" for key, value in top.items()]
        for one in (PROMPT, *inputs):
            lines += ["[[inputs]]"]
            lines += [f"{key} = {json.dumps(value)}" for key, value in {"title": one["name"], **one}.items()]
        bindings = table.pop("bindings", {})
        lines += ["[engines.comfyui]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
        lines += ["[engines.comfyui.bindings]"]
        lines += [f"{json.dumps(key)} = {json.dumps(value)}" for key, value in bindings.items()]
        files = {one["name"]: "Runcomfy_Example_1290_1.png" for one in inputs if "default" not in one}
        (folder / "sample.json").write_text(json.dumps({"prompt": "a test", **files, **(sample or {})}))
        (folder / "graph.json").write_text(json.dumps(graph))
        (folder / "model.toml").write_text("\n".join(lines) + "\n")
        return load_model(folder, self.root)


def slow_graph(**more: Any) -> Graph:
    """One picture after steps that take their time; titles as people give them."""
    sampler = node(
        "RushesTestSleep", image=["1", 0], **{"seconds": 0.2, "steps": 4, "seed": 0, "marker": "", **more}
    )
    return {
        "1": empty(),
        "2": {**sampler, "_meta": {"title": "The slow part"}},
        "3": node("SaveImage", images=["2", 0], filename_prefix="slow"),
    }


SLOW_INPUTS = (
    field("2_seconds", 0.2, minimum=0, maximum=600),
    field("2_steps", 4, minimum=1, maximum=5000),
    field("2_seed", 0, role="seed", minimum=0, maximum=10**6),
    field("2_marker", ""),
)


def slow_model(models: Models, **more: Any) -> Model:
    return models.add(slow_graph(), *SLOW_INPUTS, **more)


def make_job(
    model: Model,
    folder: Path,
    *,
    request_id: str | None = None,
    attempt: int = 1,
    files: dict[str, Path] | None = None,
    **values: Any,
) -> Job:
    """One attempt at a request with these values and the model's defaults. Names with digits: ``{"2_x": 1}``."""
    id_ = request_id or str(uuid.uuid4())
    output_dir = folder / f"{id_}-{attempt}-{uuid.uuid4().hex[:6]}" / "out"
    output_dir.mkdir(parents=True)
    files = files or {}
    complete = {one.name: one.default for one in model.inputs if one.default is not None}
    complete |= values | {name: f"https://media.test/{path.name}" for name, path in files.items()}
    roles = roles_of(model, complete)
    roles |= {one.role: files[one.name] for one in model.inputs if one.name in files}
    return Job(id_, attempt, model, complete, roles, files, output_dir)


class Work:
    """A job that an engine runs in a thread, as a worker's child process does."""

    def __init__(self, engine: ComfyUIEngine, job: Job) -> None:
        self.job = job
        self.told: list[Progress] = []
        self._made: list[Produced] | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(engine,), daemon=True)
        self._thread.start()

    def _run(self, engine: ComfyUIEngine) -> None:
        try:
            self._made = engine.run(self.job, self.told.append)
        except BaseException as error:
            self._error = error

    @property
    def over(self) -> bool:
        return not self._thread.is_alive()

    def made(self, seconds: float = 40.0) -> list[Produced]:
        """The files, once they are there."""
        self._join(seconds)
        if self._error is not None:
            raise self._error
        assert self._made is not None
        return self._made

    def error(self, seconds: float = 40.0) -> Any:
        """The error that the job must end with."""
        self._join(seconds)
        assert self._error is not None, f"it made {self._made}"
        return self._error

    def _join(self, seconds: float) -> None:
        self._thread.join(seconds)
        assert self.over, f"still running; told {self.told[-3:]}"

    def reached(self, condition: Callable[[Progress], bool], seconds: float = 30.0) -> None:
        """Wait until such a progress has been told."""

        def found() -> bool:
            assert not self.over or self._error is None, self._error
            return any(condition(progress) for progress in tuple(self.told))

        try:
            eventually(found, seconds)
        except AssertionError:
            raise AssertionError(f"no such progress; told {self.told[-5:]}, over: {self.over}") from self._error

    def stepping(self) -> "Work":
        """Wait until a node of the graph has done a step."""
        self.reached(lambda progress: bool(progress.step))
        return self
