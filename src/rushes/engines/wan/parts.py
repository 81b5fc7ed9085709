"""The parts of a pipeline, loaded by their libraries' own loaders, and whole. Imports torch.

A loader fills tensors that are missing with random numbers and says so in its log at most; here that is refused,
and before anything large is read wherever the files' heads tell.
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import accelerate
import diffusers
import torch
import transformers
from safetensors import SafetensorError, safe_open
from tokenizers import models

from rushes import log
from rushes.engines.wan import layout, memory
from rushes.errors import EngineError

Kind = layout.Kind

PIPELINES: Final = layout.PIPELINES
TRANSFORMERS: Final = ("transformer", "transformer_2")
NEEDED: Final = ("tokenizer", "text_encoder", "vae", "scheduler", "transformer")
_STORED: Final = {"F32": torch.float32, "F16": torch.float32, "BF16": torch.bfloat16}
"""In what the processor computes, by what the files hold; half floats are not made for it."""
_NAMED: Final = 3
"""Tensors named in a message."""


def unusable(where: str, why: str) -> EngineError:
    """``where`` is a file's name in the weights' folder, never a path of the machine: users read it."""
    text = f"The weights of this model cannot be used: {where} {why}. The server's operator has to mend them."
    log.event("weights unusable", where=where, why=why)
    return EngineError("weights_unusable", text)


@contextmanager
def reading(where: str) -> Iterator[None]:
    """What a library raises about files in this block is an EngineError ``weights_unusable``; the log has its words.

    Lack of memory, and libraries that are not there, stay what they are.
    """
    try:
        yield
    except EngineError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, SafetensorError) as error:
        if memory.is_out_of_memory(error):
            raise
        log.event("weights not loaded", where=where, error=f"{type(error).__name__}: {error}")
        raise unusable(where, "cannot be loaded") from error


def classes(kind: Kind) -> dict[str, str]:
    """The class of each part with weights."""
    transformer = "WanVACETransformer3DModel" if kind == "vace" else "WanTransformer3DModel"
    return {
        "text_encoder": "UMT5EncoderModel",
        "image_encoder": "CLIPVisionModel",
        "vae": "AutoencoderKLWan",
        **dict.fromkeys(TRANSFORMERS, transformer),
    }


def check(folder: Path) -> tuple[Kind, dict[str, tuple[str, str]]]:
    """What kind of pipeline lies in ``folder``, and its parts. Raises EngineError ``weights_unusable`` where it is
    none that this engine knows, or its files are not all there and whole, as far as their heads tell.
    """
    try:
        index = json.loads((folder / layout.INDEX).read_text("utf-8"))
        parts = layout.components(index)
    except (OSError, ValueError, AttributeError) as error:
        log.event("weights not loaded", where=layout.INDEX, folder=str(folder), error=str(error))
        raise unusable(layout.INDEX, "is missing or cannot be read") from None
    if problem := layout.foreign(index):
        raise unusable(layout.INDEX, problem)
    kind = PIPELINES[index["_class_name"]]
    for part in NEEDED:
        if part not in parts:
            raise unusable(layout.INDEX, f"names no {part}")
    for part, class_ in classes(kind).items():
        if part in parts and parts[part][1] != class_:
            raise unusable(layout.INDEX, f"gives {part} the class {parts[part][1]!r}; it must be {class_!r}")
    if (index.get("boundary_ratio") is None) != (TRANSFORMERS[1] not in parts):
        raise unusable(layout.INDEX, "must name both boundary_ratio and transformer_2, or neither")
    for where, why in sorted(layout.lacking(folder).items()):
        raise unusable(where, why)
    for part in classes(kind).keys() & parts.keys():
        _check_index(folder / part)
    return kind, parts


def stored_dtype(place: Path) -> torch.dtype:
    """In what the processor is to compute with the weights in this folder: what most of them are stored in."""
    elements: dict[str, int] = {}
    for dtype, shape in _tensors(place).values():
        elements[dtype] = elements.get(dtype, 0) + math.prod(shape)
    most = max(elements, key=lambda dtype: elements[dtype], default="F32")
    return _STORED.get(most, torch.bfloat16)


def size_of(place: Path, dtype: torch.dtype) -> int:
    """Bytes that the weights in this folder will take as ``dtype``."""
    itemsize: int = dtype.itemsize
    return sum(math.prod(shape) for _, shape in _tensors(place).values()) * itemsize


def load(folder: Path, part: str, class_: str, dtype: torch.dtype, device: torch.device) -> Any:
    """A part with weights, on ``device``, ready to be used and never trained."""
    place = folder / part
    options: dict[str, Any] = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
    with reading(part), _default_dtype_kept():
        if hasattr(diffusers, class_):
            maker = getattr(diffusers, class_)
            _compare(place, maker)
            module, info = maker.from_pretrained(place, torch_dtype=dtype, device_map={"": device}, **options)
        else:
            maker = getattr(transformers, class_)
            options["ignore_mismatched_sizes"] = True  # they come back in the report
            module, info = maker.from_pretrained(place, dtype=dtype, **options)
        _check_report(part, info)
        return module.to(device).eval().requires_grad_(requires_grad=False)


def restore_byte_fallback(tokenizer: Any) -> None:
    """Spell characters that the vocabulary lacks in bytes, as the text encoder was trained to read them.

    transformers 5 rebuilds T5's tokenizers from their vocabulary alone and loses that; such characters all became
    the same "unknown". The vocabulary has a piece for each byte where that is not meant to be.
    """
    backend = tokenizer.backend_tokenizer
    model = json.loads(backend.to_str())["model"]
    if (
        model["type"] == "Unigram"
        and not model["byte_fallback"]
        and tokenizer.get_vocab().get("<0x00>") is not None
    ):
        pieces = [(piece, score) for piece, score in model["vocab"]]
        backend.model = models.Unigram(pieces, model["unk_id"], byte_fallback=True)


def _compare(place: Path, maker: Any) -> None:
    """The names and shapes in the files against those that ``config.json`` makes, without reading the weights."""
    with reading(f"{place.name}/config.json"):
        config = maker.load_config(place, local_files_only=True)
        with accelerate.init_empty_weights():
            expected = {name: tuple(one.shape) for name, one in maker.from_config(config).state_dict().items()}
    found = {name: shape for name, (_, shape) in _tensors(place).items()}
    missing = sorted(expected.keys() - found.keys())
    if missing:
        raise unusable(place.name, f"lacks {_some(missing)}")
    for name, shape in expected.items():
        if shape != found[name]:
            raise unusable(
                f"{place.name}/{_file_of(place, name)}",
                f"has {name} in the shape {_by(found[name])}, and config.json asks for {_by(shape)}",
            )


def _check_report(part: str, info: Mapping[str, Any]) -> None:
    """What the loader itself says it had to make up."""
    if info["missing_keys"]:
        raise unusable(part, f"lacks {_some(sorted(info['missing_keys']))}")
    if info["mismatched_keys"]:
        names = sorted(str(entry[0]) for entry in info["mismatched_keys"])
        raise unusable(part, f"has shapes that config.json does not ask for: {_some(names)}")
    if info["error_msgs"]:
        log.event("weights not loaded", where=part, error="; ".join(map(str, info["error_msgs"])))
        raise unusable(part, "cannot be loaded")


def _check_index(place: Path) -> None:
    """That each shard holds what the index looks for in it."""
    index = next(place.glob("*.safetensors.index.json"), None)
    if index is None:
        return
    with reading(f"{place.name}/{index.name}"):
        wanted = json.loads(index.read_text("utf-8"))["weight_map"]
        if all((place / name).is_file() for name in set(wanted.values())):
            files: dict[str, list[str]] = {}
            for tensor, name in wanted.items():
                files.setdefault(name, []).append(tensor)
            for name, names in sorted(files.items()):
                with reading(f"{place.name}/{name}"), safe_open(place / name, "pt") as opened:
                    missing = sorted(set(names) - set(opened.keys()))
                if missing:
                    raise unusable(f"{place.name}/{name}", f"lacks {_some(missing)}")


def _tensors(place: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Stored type and shape of each tensor in the files of one part, from the files' heads."""
    found = {}
    for file in _files(place):
        with reading(f"{place.name}/{file.name}"), safe_open(file, "pt") as opened:
            for name in sorted(opened.keys()):
                part = opened.get_slice(name)
                found[name] = (str(part.get_dtype()), tuple(part.get_shape()))
    return found


def _files(place: Path) -> list[Path]:
    index = next(place.glob("*.safetensors.index.json"), None)
    if index is None:
        return sorted(place.glob("*.safetensors"))
    names = json.loads(index.read_text("utf-8"))["weight_map"].values()
    return [place / name for name in sorted(set(names))]


def _file_of(place: Path, tensor: str) -> str:
    for file in _files(place):
        with safe_open(file, "pt") as opened:
            names = set(opened.keys())
        if tensor in names:
            return file.name
    return ""


@contextmanager
def _default_dtype_kept() -> Iterator[None]:
    """A loader of diffusers that raises leaves torch's default type set to what it was loading."""
    before = torch.get_default_dtype()
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more tensors" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a single number"
