"""The layout of a pipeline's repository, as diffusers saves it: which of its files are loaded, and are they whole.

A repository holds more than a pipeline is loaded from: pictures, other precisions, other formats, older copies.
Everything here decides by names and by the first bytes of files; neither torch nor the hub is needed. Only
safetensors are taken: other formats of weights can hold programs.

Sources: ``DiffusionPipeline.download`` and ``ModelMixin.from_pretrained`` of diffusers 0.42,
``_get_resolved_checkpoint_files`` of transformers 5, and the format's own page
(https://huggingface.co/docs/safetensors).
"""

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Final, Literal

Kind = Literal["text", "image", "vace"]

INDEX: Final = "model_index.json"
PIPELINES: Final[dict[str, Kind]] = {
    "WanPipeline": "text",
    "WanImageToVideoPipeline": "image",
    "WanVACEPipeline": "vace",
}
"""The classes of diffusers that this engine runs."""
SPREAD: Final[tuple[Kind, ...]] = ("text", "image")
"""Those whose transformer diffusers can spread over several cards: it has a plan for that (``_cp_plan``)."""
SUFFIX: Final = ".safetensors"
_STEMS: Final = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
"""What each library calls the weights of a component."""
_SHARD: Final = r"-\d{5}-of-\d{5}\.safetensors"
_PLAIN: Final = frozenset({".json", ".txt", ".model", ".jinja", ".tiktoken"})
"""Endings of the files of a tokenizer, a scheduler, an image processor."""
_LARGEST_HEADER: Final = 100_000_000
"""Bytes; the limit of the safetensors library itself."""
_POINTER: Final = b"version https://git-lfs"
_NO_WEIGHTS: Final = (
    "Scheduler",
    "Tokenizer",
    "TokenizerFast",
    "Processor",
    "ProcessorFast",
    "FeatureExtractor",
)


def components(index: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Library and class of each part of the pipeline, by the name of its folder."""
    found = {}
    for name, value in index.items():
        if isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value):
            found[name] = (value[0], value[1])
    return found


def foreign(index: Mapping[str, Any]) -> str | None:
    """What follows upon the name of a `model_index.json` whose pipeline this engine does not run; else None."""
    name = str(index.get("_class_name"))
    return None if name in PIPELINES else f"names the pipeline {name!r}; known are {', '.join(PIPELINES)}"


def foreign_in(folder: Path) -> str | None:
    """The same of the pipeline in ``folder``; None where its `model_index.json` cannot be read, too."""
    try:
        return foreign(read_index(folder))
    except ValueError:
        return None


def not_spread(folder: Path) -> str:
    """Why the pipeline in ``folder`` cannot be spread over several cards; empty where it can, and where its
    `model_index.json` cannot be read.
    """
    try:
        kind = PIPELINES.get(str(read_index(folder).get("_class_name")))
    except ValueError:
        return ""
    return f"diffusers cannot spread {kind.upper()} models" if kind is not None and kind not in SPREAD else ""


def without_weights(names: Collection[str], index: Mapping[str, Any]) -> list[str]:
    """The parts of the pipeline that need weights and have not one file of safetensors among a repository's files."""
    held = {name.rpartition("/")[0] for name in names if name.endswith(SUFFIX)}
    parts = components(index).items()
    return [part for part, (_, class_) in parts if part not in held and not class_.endswith(_NO_WEIGHTS)]


def wanted(names: Collection[str], index: Mapping[str, Any]) -> list[str]:
    """Those of a repository's files that its pipeline is loaded from, sorted; what is missing is not told."""
    found = [INDEX]
    for part, (library, class_) in components(index).items():
        inside = [name.removeprefix(f"{part}/") for name in names if name.startswith(f"{part}/")]
        inside = [name for name in inside if "/" not in name]
        if class_.endswith(_NO_WEIGHTS):
            chosen = [name for name in inside if PurePosixPath(name).suffix in _PLAIN]
        else:
            chosen = [name for name in inside if name in ("config.json", "generation_config.json")]
            chosen += _weights(inside, library)
        found += [f"{part}/{name}" for name in chosen]
    return sorted(found)


def read_index(folder: Path) -> dict[str, Any]:
    """What `model_index.json` says. Raises ValueError, whose text follows upon the name of the folder."""
    try:
        index = json.loads((folder / INDEX).read_text("utf-8"))
    except FileNotFoundError:
        found = f"has no {INDEX}" if folder.is_dir() else "is not there"
        raise ValueError(f"{found}: a folder in the layout of diffusers is needed") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"has a {INDEX} that cannot be read: {error}") from None
    if not isinstance(index, dict) or not components(index):
        raise ValueError(f"has a {INDEX} that names no parts of a pipeline")
    return index


def lacking(folder: Path) -> dict[str, str]:
    """What a pipeline needs that is not there or not whole: the file's name in the folder, and what is wrong.

    Under an empty name stands what is wrong with all of it.
    """
    try:
        parts = components(read_index(folder))
    except ValueError as error:
        return {"": str(error)}
    wrong: dict[str, str] = {}
    for part, (library, class_) in parts.items():
        place = folder / part
        names = {path.name for path in place.iterdir()} if place.is_dir() else set()
        for name in _needed(place, names, library, class_):
            problem = broken(place / name) if name in names else "is missing"
            if problem:
                wrong[f"{part}/{name}"] = problem
    return wrong


def broken(path: Path) -> str | None:
    """Why a file cannot be what was uploaded; None where nothing speaks against it.

    Only the beginning of weights is read: they say how long they must be.
    """
    try:
        with path.open("rb") as file:
            head = file.read(64)
            size = path.stat().st_size
            if not head:
                return "is empty"
            if head.startswith(_POINTER):
                return "is a pointer of Git LFS, not the file: run `git lfs pull` in its folder"
            if path.suffix == ".json":
                json.loads(path.read_text("utf-8"))
            if path.suffix != SUFFIX:
                return None
            length = int.from_bytes(head[:8], "little")
            if not 2 <= length <= min(_LARGEST_HEADER, max(size - 8, 2)):
                return "is not a safetensors file"
            file.seek(8)
            return _cut(json.loads(file.read(length)), size - 8 - length)
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    except (ValueError, TypeError, KeyError, AttributeError):
        return "is not a safetensors file" if path.suffix == SUFFIX else "is not JSON"


def _cut(header: Mapping[str, Any], there: int) -> str | None:
    """Whether the tensors take more or less than the bytes that are there."""
    ends = [int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"]
    whole = max(ends, default=0)
    if there == whole:
        return None
    return f"is cut off: {there} of {whole} bytes of tensors" if there < whole else "is longer than it says"


def loaded_from(folder: Path) -> list[str]:
    """The files that the pipeline in ``folder`` is loaded from. Raises ValueError."""
    index = read_index(folder)
    names = [
        INDEX,
        *(f"{part}/{path.name}" for part in components(index) for path in (folder / part).glob("*")),
    ]
    return wanted(names, index)


def _needed(place: Path, names: Collection[str], library: str, class_: str) -> Iterator[str]:
    """The files of one part without which it cannot be loaded."""
    if class_.endswith("Scheduler"):
        yield "scheduler_config.json"
    elif class_.endswith(("Tokenizer", "TokenizerFast")):
        yield "tokenizer_config.json"
        vocabulary = (
            "tokenizer.json",
            "spiece.model",
            "tokenizer.model",
            "sentencepiece.bpe.model",
            "vocab.json",
        )
        yield next((name for name in vocabulary if name in names), vocabulary[0])
    elif class_.endswith(_NO_WEIGHTS):
        kinds = ("preprocessor_config.json", "processor_config.json")
        yield next((name for name in kinds if name in names), kinds[0])
    else:
        yield "config.json"
        yield from _needed_weights(place, names, library)


def _needed_weights(place: Path, names: Collection[str], library: str) -> Iterator[str]:
    stem = _STEMS.get(library, "model")
    single, index = f"{stem}{SUFFIX}", f"{stem}{SUFFIX}.index.json"
    chosen = _weights(names, library)
    if index in names and single not in chosen:
        yield index
        yield from sorted(_shards(place / index))
    elif index not in names and any(re.fullmatch(stem + _SHARD, name) for name in names):
        yield index  # shards without it are not found
    else:
        yield single


def _shards(index: Path) -> set[str]:
    """The files that an index names; none where it cannot be read, which :func:`broken` tells."""
    try:
        return {
            PurePosixPath(name).name for name in json.loads(index.read_text("utf-8"))["weight_map"].values()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return set()


def _weights(names: Collection[str], library: str) -> list[str]:
    """The weights of one part among the ``names`` in its folder: in one file, or in shards with their index.

    Where both are there, transformers takes the one file and diffusers the shards.
    """
    stem = _STEMS.get(library, "model")
    single = [name for name in names if name == f"{stem}{SUFFIX}"]
    index = f"{stem}{SUFFIX}.index.json"
    matches: Callable[[str], object] = re.compile(stem + _SHARD).fullmatch
    sharded = [name for name in names if name == index or matches(name)] if index in names else []
    first, second = (single, sharded) if library == "transformers" else (sharded, single)
    return first or second
