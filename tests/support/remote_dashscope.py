"""Model Studio as its documents have it, on a loopback port: text to image, text and images to video, tasks.

Bodies, codes and words are those of the pages "Wan text-to-image V2", "Wan image-to-video", "Wan first and last
frame to video", "Manage asynchronous tasks" and "Error codes". The words about a wrong size are inferred: no page
shows them.
"""

import uuid
from typing import Any, Final

from support.remote_stub import Job, RemoteStub, Reply, Seen, movie, picture

T2I: Final = "wan2.5-t2i-preview"
I2V: Final = "wan2.5-i2v-preview"
T2V: Final = "wan2.5-t2v-preview"
KF2V: Final = "wan2.2-kf2v-flash"
_SERVICES: Final = "/api/v1/services/aigc/"
_PATHS: Final = {
    "text2image/image-synthesis": (T2I,),
    "video-generation/video-synthesis": (I2V, T2V),
    "image2video/video-synthesis": (KF2V,),
}
_VIDEO_SIZES: Final = (
    *("832*480", "480*832", "624*624"),
    *("1280*720", "720*1280", "960*960", "1088*832", "832*1088"),
    *("1920*1080", "1080*1920", "1440*1440", "1632*1248", "1248*1632"),
)
_REQUIRED: Final = {
    T2I: ("prompt",),
    T2V: ("prompt",),
    I2V: ("img_url",),
    KF2V: ("first_frame_url", "last_frame_url"),
}


class DashScopeStub(RemoteStub):
    def __init__(self, **more: Any) -> None:
        super().__init__(**more)
        self.least_pixels = 1280 * 1280
        """Of a picture; an older page has 768 * 768."""
        self.refuses = "forbidden"
        self.refuses_output = "disgusting"
        self.failure: tuple[str, str] | None = None
        """The code and the words with which every task fails."""
        self.odd_output: dict[str, Any] | None = None
        """What the output of a task that succeeded has besides its id and state."""
        self.late: list[int] = []
        """The status of each of the next polls that do not find their task yet: 200, as UNKNOWN, or 404."""
        self.grows: int = 0
        """Pixels by which pictures are wider than they were asked to be."""

    def unauthorized(self, call: Seen) -> Reply:
        return _error(401, "InvalidApiKey", "Invalid API-key provided.")

    def answer(self, call: Seen) -> Reply:
        if call.method == "POST" and call.path.startswith(_SERVICES):
            return self._create(call, call.path.removeprefix(_SERVICES))
        head, _, task = call.path.partition("/api/v1/tasks/")
        if head or not task:
            return _error(404, "NotFound", "Not found.")
        name, _, verb = task.partition("/")
        job = self.jobs.get(name)
        if call.method == "POST" and verb == "cancel":
            return self._cancel(job)
        status = self.late.pop(0) if job is not None and self.late else 200 if job is None else 0
        if status == 404:
            return _error(404, "NotFound", "The task cannot be found.")
        if job is None or status:
            return _ok({"task_id": name, "task_status": "UNKNOWN"})
        return self._show(job)

    # -- creating ---------------------------------------------------------------------------------------------
    def _create(self, call: Seen, path: str) -> Reply:
        body = call.json
        model = body.get("model")
        if call.headers.get("x-dashscope-async") != "enable":
            return _error(403, "AccessDenied", "current user api does not support synchronous calls.")
        if path not in _PATHS:
            return _error(404, "NotFound", "Not found.")
        if not model:
            return _error(400, "BadRequest.EmptyModel", 'Required parameter "model" missing from request.')
        if model not in _REQUIRED:
            return _error(404, "ModelNotFound", f"Model not found ({model})!")
        if model not in _PATHS[path]:
            return _error(400, "InvalidParameter", "url error, please check url!")
        problem = self._problem(model, body.get("input") or {}, body.get("parameters") or {})
        if problem:
            return problem
        job = self.accept(str(uuid.uuid4()), body)
        return _ok({"task_status": "PENDING", "task_id": job.id})

    def _problem(self, model: str, given: dict[str, Any], parameters: dict[str, Any]) -> Reply | None:
        if not all(given.get(name) for name in _REQUIRED[model]):
            return _error(400, "BadRequest.EmptyInput", "Required input parameter missing from request.")
        if any(
            not str(given[name]).startswith(("data:image/", "https://")) for name in given if "_url" in name
        ):
            return _error(400, "InvalidURL", "Invalid URL provided in your request.")
        if self.refuses in given.get("prompt", ""):
            return _error(400, "DataInspectionFailed", "Input data may contain inappropriate content.")
        seed = parameters.get("seed", 0)
        if type(seed) is not int or not 0 <= seed < 2**31:
            return _invalid("seed must be in [0, 2147483647]")
        if model == T2I:
            width, height = map(int, parameters.get("size", "1280*1280").split("*"))
            if not (self.least_pixels <= width * height <= 1440 * 1440 and 0.25 <= width / height <= 4):
                return _invalid(f"the size {width}*{height} is not supported")
        if model == T2V and parameters.get("size", "1920*1080") not in _VIDEO_SIZES:
            return _invalid("size is not supported")
        if model in (I2V, KF2V) and parameters.get("resolution", "720P") not in ("480P", "720P", "1080P"):
            return _invalid("resolution is not supported")
        if model in (I2V, T2V) and parameters.get("duration", 5) not in (5, 10):
            return _invalid("duration must be in [5, 10]")
        return None

    # -- tasks ------------------------------------------------------------------------------------------------
    def _show(self, job: Job) -> Reply:
        state = self.step(job)
        times = {"task_id": job.id, "submit_time": "2026-11-21 10:00:00.011"}
        if state == "cancelled":
            return _ok(times | {"task_status": "CANCELED", "end_time": "2026-11-21 10:00:01.000"})
        if state != "done":
            status = "PENDING" if job.asked == 1 else "RUNNING"
            return _ok(times | {"task_status": status, "task_metrics": _metrics(0, 0)})
        times |= {"scheduled_time": "2026-11-21 10:00:00.037", "end_time": "2026-11-21 10:01:10.421"}
        failure = self.failure
        if self.refuses_output in job.body["input"].get("prompt", ""):
            failure = ("DataInspectionFailed", "Output data may contain inappropriate content.")
        if failure:
            failed = {"task_status": "FAILED", "code": failure[0], "message": failure[1]}
            return _ok(times | failed | {"task_metrics": _metrics(0, 1)})
        made, usage = self._made(job)
        return _ok(times | {"task_status": "SUCCEEDED"} | made, usage=usage)

    def _made(self, job: Job) -> tuple[dict[str, Any], dict[str, Any]]:
        prompt, parameters = job.body["input"].get("prompt", ""), job.body["parameters"]
        if self.odd_output is not None:
            return self.odd_output, {"image_count": 1}
        if job.body["model"] != T2I:
            url = self.output_url(movie(), "video/mp4")
            return {"video_url": url, "orig_prompt": prompt}, {"video_count": 1, "duration": 5, "SR": 720}
        width, height = map(int, parameters["size"].split("*"))
        number = parameters.get("n", 4)
        results = [
            {
                "orig_prompt": prompt,
                "actual_prompt": prompt,
                "url": self.output_url(picture(width + self.grows, height), "image/png"),
            }
            for _ in range(number)
        ]
        return {"results": results, "task_metrics": _metrics(number, 0)}, {"image_count": number}

    def _cancel(self, job: Job | None) -> Reply:
        if job is None or job.asked > 1:
            words = "Failed to cancel the task, please confirm if the task is in PENDING status."
            return _error(400, "UnsupportedOperation", words)
        job.cancelled = True
        return Reply(200, {"request_id": str(uuid.uuid4())})


def _metrics(succeeded: int, failed: int) -> dict[str, int]:
    return {"TOTAL": 1, "SUCCEEDED": succeeded, "FAILED": failed}


def _ok(output: dict[str, Any], **more: Any) -> Reply:
    return Reply(200, {"request_id": str(uuid.uuid4()), "output": output} | more)


def _error(status: int, code: str, message: str) -> Reply:
    return Reply(status, {"request_id": str(uuid.uuid4()), "code": code, "message": message})


def _invalid(message: str) -> Reply:
    return _error(400, "InvalidParameter", message)
