"""Talking to a `rushes serve` that has ComfyUIs behind it, and looking at both sides."""

import threading
import time
from collections import Counter
from types import TracebackType
from typing import Any, Self

import httpx

from rushes.catalog.model import Model
from rushes.requests.record import Request
from support.comfyui import Comfy
from support.server import Server


def submit(server: Server, model: Model, **values: Any) -> str:
    answer = server.call("POST", f"/v1/models/{model.id}", json={"prompt": "a test", **values})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["request_id"])


def record(server: Server, id_: str) -> Request:
    found = server.with_store(lambda store: store.get(id_))
    assert found is not None
    return found


def of_requests(comfy: Comfy) -> list[str]:
    """The requests whose prompts are in ComfyUI's queue, running first."""
    entries = [*comfy.running(), *comfy.pending()]
    return [entry[3]["rushes"]["request"] for entry in entries if "rushes" in entry[3]]


def made_there(comfy: Comfy) -> int:
    """Prompts of ours that have saved a file there."""
    return len({path.parent for path in (comfy.output_dir / "rushes").rglob("*.png")})


class Watcher(threading.Thread):
    """Looks at the queues all the time: ``most`` is the largest number of prompts of one request at once."""

    def __init__(self, *comfys: Comfy) -> None:
        super().__init__(daemon=True)
        self._urls = [comfy.url for comfy in comfys]
        self._over = threading.Event()
        self.most = 0
        self.attempts: dict[str, set[int]] = {}

    def run(self) -> None:
        with httpx.Client(timeout=5, trust_env=False) as client:
            while not self._over.is_set():
                seen: Counter[str] = Counter()
                for url in self._urls:
                    try:
                        queue = client.get(f"{url}/queue").json()
                    except httpx.HTTPError:
                        continue
                    for entry in [*queue["queue_running"], *queue["queue_pending"]]:
                        about = entry[3].get("rushes")
                        if about:
                            seen[about["request"]] += 1
                            self.attempts.setdefault(about["request"], set()).add(about["attempt"])
                self.most = max([self.most, *seen.values()])
                time.sleep(0.01)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None
    ) -> None:
        self._over.set()
        self.join(10)


def succeeded(server: Server, id_: str, seconds: float = 60.0) -> dict[str, Any]:
    result = server.finished(id_, seconds)
    assert result["status"] == "succeeded", result
    return result
