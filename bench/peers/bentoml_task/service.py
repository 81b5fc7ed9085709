"""BentoML's asynchronous task: vace-fun's input as its users write it, submit and status as the framework
has them.

The task does nothing, or, with PEER_TASK_SECONDS, waits for so long, so that its own work does not compete
with the submits. There is no authentication and no queue position: BentoML has neither here.
"""

import asyncio
import os
from typing import Annotated, Literal

import bentoml
from pydantic import Field

SECONDS = float(os.environ.get("PEER_TASK_SECONDS", "0"))
Resolution = Literal[
    "480x480 (1:1)",
    "720x720 (1:1)",
    "480x720 (2:3)",
    "720x480 (3:2)",
    "540x960 (9:16)",
    "576x1024 (9:16)",
    "720x1280 (9:16)",
    "960x540 (16:9)",
    "1024x576 (16:9)",
    "1280x720 (16:9)",
]


@bentoml.service(workers=1, traffic={"timeout": 3600}, logging={"access": {"enabled": False}})
class VaceFun:
    @bentoml.task(route="/generate")
    async def generate(
        self,
        text: str,
        image: str,
        resolution: Resolution = "1024x576 (16:9)",
        frames: Literal[81, 141] = 81,
        fps: Annotated[int, Field(ge=12, le=24)] = 16,
        seed: int = 96860978,
        steps: Annotated[int, Field(ge=2, le=40)] = 12,
        guidance: Annotated[float, Field(ge=0, le=10)] = 3.5,
        shift: Annotated[float, Field(ge=1, le=30)] = 8,
    ) -> str:
        if SECONDS:
            await asyncio.sleep(SECONDS)
        return f"{resolution} {frames} {fps} {seed} {steps} {guidance} {shift} {len(text)} {image}"
