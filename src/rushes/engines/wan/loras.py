"""The LoRAs of one request: put beside the model's weights for its denoising, and taken away after it.

They are not fused, as the manifest's are: taking a fused one out again would leave other last bits behind.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError

from rushes import log
from rushes.engines.wan.load import Loaded
from rushes.engines.wan.memory import is_out_of_memory
from rushes.errors import EngineError

SUFFIX: Final = ".safetensors"
"""Other formats can hold programs."""


@contextmanager
def added(loaded: Loaded, loras: Sequence[tuple[str, float]], folder: Path | None) -> Iterator[None]:
    """Within, every expert works with ``loras``, each a file below ``folder`` and its scale. Nobody else may use the
    experts meanwhile. Raises EngineError ``loras_unusable`` for files that are not there or do not fit.
    """
    if not loras:
        yield
        return
    files = [(_found(path, folder), path) for path, _ in loras]
    names = [f"request_{number}" for number in range(len(files))]
    try:
        for name, (file, path) in zip(names, files, strict=True):
            _add(loaded, name, file, path)
        for expert in loaded.experts:
            expert.set_adapters(names, [scale for _, scale in loras])
        yield
    finally:
        for expert in loaded.experts:
            expert.unload_lora()


def _found(path: str, folder: Path | None) -> Path:
    if not path.endswith(SUFFIX):
        raise _unusable(path, f"must be a file that ends in {SUFFIX}")
    file = folder / path if folder is not None else None
    if folder is None or file is None or not file.is_file():
        raise _unusable(path, "is not in this server's folder of LoRAs")
    if not file.resolve().is_relative_to(folder.resolve()):
        log.event("LoRA outside of its folder", path=path)
        raise _unusable(path, "is not in this server's folder of LoRAs")
    return file


def _add(loaded: Loaded, name: str, file: Path, path: str) -> None:
    try:
        for expert in loaded.experts:
            loaded.pipe.load_lora_weights(
                file.parent,
                weight_name=file.name,
                adapter_name=name,
                use_safetensors=True,
                local_files_only=True,
                load_into_transformer_2=expert is getattr(loaded.pipe, "transformer_2", None),
            )
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        log.event("LoRA not loaded", path=path, error=f"{type(error).__name__}: {error}")
        raise _unusable(path, "cannot be loaded into this model") from error
    if not all(_fits(expert, name) for expert in loaded.experts):
        raise _unusable(path, "fits none of the model's layers")


def _fits(expert: Any, name: str) -> bool:
    """Without this: diffusers only warns where no layer has the names that a LoRA is for."""
    layers = (module for module in expert.modules() if isinstance(module, BaseTunerLayer))
    return any(name in layer.active_adapters for layer in layers)


def _unusable(path: str, why: str) -> EngineError:
    return EngineError("loras_unusable", f"The LoRA {path!r} {why}.")
