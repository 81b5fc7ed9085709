"""The stub's queue and its one worker thread: ComfyUI 0.3.64's execution.py and prompt_worker, retold.

What reaches the outside is meant to be the same, message for message: the order of nodes, the caching by inputs
(not by node ids), what a history entry holds, and what an interrupt does.
"""

import copy
import heapq
import itertools
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, Protocol

from PIL import Image

from support.comfyui_stub_nodes import Interrupted, Nodes, OutOfMemoryError

Item = tuple[float, str, dict[str, Any], dict[str, Any], list[str]]
PREVIEW, PREVIEW_WITH_METADATA = 1, 4


class Outlet(Protocol):
    """Where messages go; None as client is everybody."""

    client_id: str | None
    last_node_id: str | None

    def send_sync(self, event: str | int, data: Any, sid: str | None = None) -> None: ...
    def queue_updated(self) -> None: ...
    def wants_metadata(self, sid: str | None) -> bool: ...


class PromptQueue:
    """In memory only: a restart loses queue and history."""

    def __init__(self, outlet: Outlet) -> None:
        self._outlet = outlet
        self._mutex = threading.RLock()
        self._not_empty = threading.Condition(self._mutex)
        self._numbers = itertools.count()
        self._queue: list[Item] = []
        self._running: dict[int, Item] = {}
        self.history: dict[str, Any] = {}
        self._flags: dict[str, bool] = {}

    def put(self, item: Item) -> None:
        with self._mutex:
            heapq.heappush(self._queue, item)
            self._outlet.queue_updated()
            self._not_empty.notify()

    def get(self, timeout: float) -> tuple[Item, int] | None:
        with self._not_empty:
            if not self._queue:
                self._not_empty.wait(timeout)
            if not self._queue:
                return None
            item = heapq.heappop(self._queue)
            number = next(self._numbers)
            self._running[number] = copy.deepcopy(item)
            self._outlet.queue_updated()
            return item, number

    def done(self, number: int, result: dict[str, Any], status: dict[str, Any]) -> None:
        with self._mutex:
            prompt = self._running.pop(number)
            self.history[prompt[1]] = {"prompt": prompt, "outputs": {}, "status": status, **result}
            self._outlet.queue_updated()

    def current(self) -> tuple[list[Item], list[Item]]:
        with self._mutex:
            return list(self._running.values()), list(self._queue)

    def remaining(self) -> int:
        with self._mutex:
            return len(self._queue) + len(self._running)

    def clear(self) -> None:
        with self._mutex:
            self._queue = []
            self._outlet.queue_updated()

    def delete(self, id_: str) -> None:
        with self._mutex:
            for place, item in enumerate(self._queue):
                if item[1] == id_:
                    self._queue.pop(place)
                    heapq.heapify(self._queue)
                    self._outlet.queue_updated()
                    return

    def set_flag(self, name: str) -> None:
        with self._mutex:
            self._flags[name] = True
            self._not_empty.notify()

    def take_flags(self) -> dict[str, bool]:
        with self._mutex:
            flags, self._flags = self._flags, {}
            return flags


class Cache:
    """Outputs by what a node and all before it were given; only what the latest prompt uses is kept."""

    def __init__(self, nodes: Nodes) -> None:
        self._nodes = nodes
        self.outputs: dict[Any, Any] = {}
        self.ui: dict[Any, Any] = {}
        self.keys: dict[str, Any] = {}

    def set_prompt(self, prompt: dict[str, Any]) -> None:
        self.keys = {id_: self._signature(prompt, id_) for id_ in prompt}
        used = set(self.keys.values())
        for kept in (self.outputs, self.ui):
            for key in [key for key in kept if key not in used]:
                del kept[key]

    def _signature(self, prompt: dict[str, Any], id_: str) -> Any:
        ancestors: dict[str, int] = {}
        self._ancestry(prompt, id_, ancestors)
        return tuple(self._immediate(prompt, one, ancestors) for one in [id_, *ancestors])

    def _ancestry(self, prompt: dict[str, Any], id_: str, found: dict[str, int]) -> None:
        for _, value in sorted(prompt.get(id_, {"inputs": {}})["inputs"].items()):
            if is_link(value) and value[0] not in found:
                found[value[0]] = len(found)
                self._ancestry(prompt, value[0], found)

    def _immediate(self, prompt: dict[str, Any], id_: str, order: dict[str, int]) -> Any:
        node = self._nodes[prompt[id_]["class_type"]]
        inputs = prompt[id_]["inputs"]
        changed = None
        if node.changed is not None and isinstance(inputs.get(node.checks), str):
            try:
                changed = node.changed(inputs[node.checks])
            except OSError:
                changed = object()  # never equal: as ComfyUI's NaN
        return (
            node.name,
            changed,
            tuple(
                (name, ("ANCESTOR", order[value[0]], value[1]) if is_link(value) else repr(value))
                for name, value in sorted(inputs.items())
            ),
        )


def is_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)


class Executor:
    def __init__(self, nodes: Nodes, outlet: Outlet) -> None:
        self._nodes, self._outlet = nodes, outlet
        self._interrupt = threading.Event()
        self.reset()

    def reset(self) -> None:
        self._cache = Cache(self._nodes)

    def interrupt(self) -> None:
        self._interrupt.set()

    def _throw_if_interrupted(self) -> None:
        if self._interrupt.is_set():
            self._interrupt.clear()
            raise Interrupted

    # -- messages ---------------------------------------------------------------------------------------
    def _tell(self, event: str, data: dict[str, Any], *, status: bool = True, broadcast: bool = False) -> None:
        if status:
            data = {**data, "timestamp": int(time.time() * 1000)}
            self._messages.append((event, data))
        if self._outlet.client_id is not None or broadcast:
            self._outlet.send_sync(event, data, self._outlet.client_id)

    def _progress_state(self, id_: str, value: float, total: float, state: str) -> None:
        self._states[id_] = {"value": value, "max": total, "state": state}
        shown = {one: {**values, **self._about(one)} for one, values in self._states.items()}
        data = {"prompt_id": self._prompt_id, "nodes": shown}
        self._outlet.send_sync("progress_state", data, self._outlet.client_id)

    def _about(self, id_: str) -> dict[str, Any]:
        return {
            "node_id": id_,
            "prompt_id": self._prompt_id,
            "display_node_id": id_,
            "parent_node_id": None,
            "real_node_id": id_,
        }

    def progress(self, value: int, total: int, preview: Image.Image | None) -> None:
        """The hook of main.py, called by nodes at each step."""
        self._throw_if_interrupted()
        id_, client = self._node_id, self._outlet.client_id
        self._progress_state(id_, value, total, "running")
        old_form = not self._outlet.wants_metadata(client)
        if preview is not None and not old_form:
            self._outlet.send_sync(PREVIEW_WITH_METADATA, (preview, self._about(id_)), client)
        data = {"value": value, "max": total, "prompt_id": self._prompt_id, "node": id_}
        self._outlet.send_sync("progress", data, client)
        if preview is not None and old_form:
            self._outlet.send_sync(PREVIEW, preview, client)

    # -- a prompt ---------------------------------------------------------------------------------------
    def execute(self, item: Item) -> tuple[dict[str, Any], dict[str, Any]]:
        """Run one prompt; what its history entry says besides the prompt: (outputs and meta, status)."""
        _, self._prompt_id, prompt, extra, to_run = item
        self._interrupt.clear()
        self._outlet.client_id = extra.get("client_id")
        self._messages: list[tuple[str, dict[str, Any]]] = []
        self._states: dict[str, dict[str, Any]] = {}
        self._tell("execution_start", {"prompt_id": self._prompt_id})
        self._cache.set_prompt(prompt)
        cached = [id_ for id_ in prompt if self._cache.keys[id_] in self._cache.outputs]
        self._tell("execution_cached", {"nodes": cached, "prompt_id": self._prompt_id})
        success = self._run_all(prompt, to_run)
        outputs, meta = {}, {}
        for id_ in set(prompt):
            ui = self._cache.ui.get(self._cache.keys[id_])
            if ui is not None:
                outputs[id_], meta[id_] = ui["output"], ui["meta"]
        self._outlet.last_node_id = None
        status = {
            "status_str": "success" if success else "error",
            "completed": success,
            "messages": self._messages,
        }
        return {"outputs": outputs, "meta": meta}, status

    def _run_all(self, prompt: dict[str, Any], to_run: list[str]) -> bool:
        before = list(self._cache.keys)
        executed: set[str] = set()
        waiting = self._waiting(prompt, to_run)
        while waiting:
            ready = [id_ for id_, blockers in waiting.items() if not blockers]
            if not ready:
                self._failed(
                    prompt, next(iter(waiting)), executed, before, RuntimeError("Dependency cycle detected")
                )
                return False
            id_ = self._pick(prompt, ready, waiting)
            try:
                self._run(prompt, id_, executed)
            except Exception as error:
                self._failed(prompt, id_, executed, before, error)
                return False
            del waiting[id_]
            for blockers in waiting.values():
                blockers.discard(id_)
        self._tell("execution_success", {"prompt_id": self._prompt_id})
        return True

    def _waiting(self, prompt: dict[str, Any], to_run: list[str]) -> dict[str, set[str]]:
        """The nodes to run and what each waits for; what stands before a cached node is not run."""
        waiting: dict[str, set[str]] = {}
        stack = list(reversed(to_run))
        while stack:
            id_ = stack.pop()
            if id_ in waiting:
                continue
            links = [value[0] for value in prompt[id_]["inputs"].values() if is_link(value)]
            waiting[id_] = {link for link in links if self._cache.keys[link] not in self._cache.outputs}
            stack += waiting[id_]
        return waiting

    def _pick(self, prompt: dict[str, Any], ready: list[str], waiting: dict[str, set[str]]) -> str:
        """Outputs first, then what outputs wait for, then what those wait for."""

        def is_output(id_: str) -> bool:
            return self._nodes[prompt[id_]["class_type"]].is_output

        def after(id_: str) -> list[str]:
            return [other for other, blockers in waiting.items() if id_ in blockers]

        for id_ in ready:
            if is_output(id_):
                return id_
        for id_ in ready:
            if any(is_output(next_) for next_ in after(id_)):
                return id_
        for id_ in ready:
            if any(is_output(second) for next_ in after(id_) for second in after(next_)):
                return id_
        return ready[0]

    def _run(self, prompt: dict[str, Any], id_: str, executed: set[str]) -> None:
        key = self._cache.keys[id_]
        if key in self._cache.outputs:
            ui = self._cache.ui.get(key) or {}
            self._tell("executed", self._executed(id_, ui.get("output")), status=False)
            self._progress_state(id_, 1, 1, "finished")
            return
        self._node_id = id_
        self._progress_state(id_, 0.0, 1.0, "running")
        self._inputs: dict[str, Any] = {}
        node = self._nodes[prompt[id_]["class_type"]]
        known = node.inputs()
        for name, value in prompt[id_]["inputs"].items():
            if is_link(value):
                self._inputs[name] = self._cache.outputs[self._cache.keys[value[0]]][value[1]]
            elif name in known:
                self._inputs[name] = value
        if "prompt" in node.info["input"].get("hidden", {}):
            self._inputs["prompt"] = prompt
        if self._outlet.client_id is not None:
            self._outlet.last_node_id = id_
        data = {"node": id_, "display_node": id_, "prompt_id": self._prompt_id}
        self._tell("executing", data, status=False)
        self._throw_if_interrupted()
        outputs, ui = node.run(**self._inputs)
        if ui:
            meta = {"node_id": id_, "display_node": id_, "parent_node": None, "real_node_id": id_}
            self._cache.ui[key] = {"meta": meta, "output": ui}
            self._tell("executed", self._executed(id_, ui), status=False)
        self._cache.outputs[key] = outputs
        last = self._states[id_]
        self._progress_state(id_, last["max"], last["max"], "finished")
        executed.add(id_)

    def _executed(self, id_: str, output: Any) -> dict[str, Any]:
        return {"node": id_, "display_node": id_, "output": output, "prompt_id": self._prompt_id}

    def _failed(
        self, prompt: dict[str, Any], id_: str, executed: set[str], before: list[str], error: Exception
    ) -> None:
        about = {
            "prompt_id": self._prompt_id,
            "node_id": id_,
            "node_type": prompt[id_]["class_type"],
            "executed": list(executed),
        }
        if isinstance(error, Interrupted):
            self._tell("execution_interrupted", about, broadcast=True)
            return
        tips = ""
        if isinstance(error, OutOfMemoryError):
            tips = (
                "This error means you ran out of memory on your GPU.\n\nTIPS: smaller pictures, fewer of them."
            )
        plain = (int, float, bool, str, type(None))
        inputs = {
            name: [value if isinstance(value, plain) else str(value)] for name, value in self._inputs.items()
        }
        module = type(error).__module__
        self._tell(
            "execution_error",
            {
                **about,
                "exception_message": f"{error}\n{tips}",
                "exception_type": ("" if module == "builtins" else f"{module}.") + type(error).__qualname__,
                "traceback": traceback.format_tb(error.__traceback__),
                "current_inputs": inputs,
                "current_outputs": before,
            },
        )


def work(queue: PromptQueue, executor: Executor, outlet: Outlet) -> None:
    """ComfyUI's prompt_worker: for ever."""
    while True:
        taken = queue.get(timeout=1000.0)
        if taken is not None:
            item, number = taken
            result, status = executor.execute(item)
            queue.done(number, result, status)
            if outlet.client_id is not None:
                data = {"node": None, "prompt_id": item[1]}
                outlet.send_sync("executing", data, outlet.client_id)
        if queue.take_flags().get("free_memory"):
            executor.reset()


def start(queue: PromptQueue, executor: Executor, outlet: Outlet) -> None:
    target: Callable[..., None] = work
    threading.Thread(target=target, daemon=True, args=(queue, executor, outlet)).start()
