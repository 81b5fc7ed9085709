"""The sampler of one job: which noise levels it visits, and how it goes from one to the next.

Every job has its own, made from the pipeline's configuration, so that neither a shift nor a sampler's memory of past
steps can reach the next job. What diffusers has is used as it is but for four points:

- ``euler`` and ``lcm`` divide the way evenly, as ``unipc`` and ComfyUI's schedule "simple" do: 4 steps at shift 1
  begin at 1, 0.75, 0.5 and 0.25, the levels that few-step LoRAs are distilled for. diffusers' own spacing puts the
  last step at 0.001 and so would spend one of few on nothing.
- ``euler`` and ``lcm`` keep the latents in 32 bits, as ``unipc`` and ComfyUI do: diffusers rounds them after each
  step to the type of the prediction, which on a card has 16. Where predictions have 32 bits, nothing differs.
- ``lcm`` draws its noise from the job's seed; the pipelines leave it to torch's global state.
- each remembers the clean picture that it is on its way to, for the preview.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler, UniPCMultistepScheduler

from rushes.engines.wan.plan import Plan
from rushes.errors import EngineError


class _Remembering:
    """Mixed in before a scheduler of diffusers."""

    clean: torch.Tensor | None = None
    """What the last step took the latents without noise to be; flow models predict noise minus clean."""
    sigmas: torch.Tensor
    step_index: int

    def step(self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, **rest: Any) -> Any:
        stock: Any = super()
        made = stock.step(model_output, timestep, sample, **rest)
        self.clean = sample - self.sigmas[self.step_index - 1] * model_output
        return made


class _Even(_Remembering):
    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        stock: Any = super()
        stock.set_timesteps(sigmas=np.linspace(1.0, 0.0, num_inference_steps + 1)[:-1], device=device)

    def step(self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, **rest: Any) -> Any:
        return super().step(model_output.float(), timestep, sample, **rest)


class _Drawing(_Even):
    generator: torch.Generator

    def step(self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, **rest: Any) -> Any:
        return super().step(model_output, timestep, sample, generator=self.generator, **rest)


# Made by calls, since to mypy the bases are Any.
_UNIPC: Any = type("UniPC", (_Remembering, UniPCMultistepScheduler), {})
_EULER: Any = type("Euler", (_Even, FlowMatchEulerDiscreteScheduler), {})
_LCM: Any = type("LCM", (_Drawing, FlowMatchLCMScheduler), {})


def schedule(config: Mapping[str, Any], plan: Plan, generator: torch.Generator) -> Any:
    """A scheduler for ``plan`` alone. ``config``: of the pipeline's own; ``generator``: seeded, for noise in between.

    Raises :class:`EngineError` for a sampler that there is not.
    """
    trained = int(config.get("num_train_timesteps", 1000))
    if plan.scheduler == "unipc":
        own = dict(config) if config.get("_class_name") == UniPCMultistepScheduler.__name__ else {}
        flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "use_dynamic_shifting": False}
        return _UNIPC.from_config({**own, **flow, "num_train_timesteps": trained, "flow_shift": plan.shift})
    if plan.scheduler == "euler":
        return _EULER(num_train_timesteps=trained, shift=plan.shift)
    if plan.scheduler == "lcm":
        made = _LCM(num_train_timesteps=trained, shift=plan.shift)
        made.generator = generator
        return made
    raise EngineError("scheduler_unusable", f"{plan.scheduler!r} is no sampler: use unipc, euler or lcm.")
