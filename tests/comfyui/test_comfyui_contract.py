"""The stub, and a real ComfyUI where there is one, against what ComfyUI 0.3.64 was recorded to say."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.comfyui import Comfy
from support.comfyui_facts import facts_of, spec_of
from support.comfyui_transcripts import SCENARIOS, STUB_NODES, transcript
from support.importing import OBJECT_INFO

RECORDED = json.loads((Path(__file__).parent / "recorded.json").read_text())
CLASSES = [
    *json.loads(STUB_NODES.read_text()).values(),
    *json.loads(OBJECT_INFO.read_text()).values(),
    *RECORDED["its_nodes"][0].values(),
]


@pytest.mark.parametrize("name", SCENARIOS)
async def test_it_says_what_comfyui_was_recorded_to_say(comfy: Comfy, name: str) -> None:
    assert RECORDED[name] == await transcript(name, comfy.url)


def test_every_conversation_is_recorded() -> None:
    assert set(SCENARIOS) == set(RECORDED)


# -- what may be kept -----------------------------------------------------------------------------------------
def values_of(value: Any, key: str) -> Iterator[Any]:
    """Everything that stands under this key, however deep."""
    if isinstance(value, dict):
        yield from [value[key]] if key in value else []
    for one in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from values_of(one, key)


@pytest.mark.parametrize("info", CLASSES, ids=lambda info: info["name"])
def test_of_classes_only_facts_are_kept(info: dict[str, Any]) -> None:
    assert facts_of(copy.deepcopy(info)) == info


def test_of_refused_inputs_only_facts_are_kept() -> None:
    configs = [*values_of(RECORDED, "input_config")]
    assert configs
    assert [spec_of(config) for config in configs] == configs


def test_sentences_are_no_facts() -> None:
    text = ["STRING", {"default": "a hare in the snow", "tooltip": "What to paint.", "multiline": True}]
    known = {"input": {"required": {"text": text}, "hidden": {"prompt": "PROMPT"}}, "name": "Paint"}
    more = {"description": "Paints.", "category": "art", "output_tooltips": ["It."], "display_name": "Paint it"}
    facts = {
        "required": {"text": ["STRING", {"default": "", "multiline": True}]},
        "hidden": {"prompt": "PROMPT"},
    }
    assert {"input": facts, "name": "Paint"} == facts_of({**known, **more})
