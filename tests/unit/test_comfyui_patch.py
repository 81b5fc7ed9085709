"""Changes to a bound graph: LoRA chains and output names."""

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rushes.engines.comfyui.patch import is_added_lora, with_loras, with_prefix
from rushes.errors import EngineError


def graph() -> dict:
    return {
        "37": {
            "class_type": "UNETLoader",
            "inputs": {"unet_name": "high.safetensors"},
            "_meta": {"title": "High"},
        },
        "56": {"class_type": "UNETLoader", "inputs": {"unet_name": "low.safetensors"}},
        "54": {"class_type": "ModelSamplingSD3", "inputs": {"shift": 5.0, "model": ["37", 0]}},
        "55": {"class_type": "ModelSamplingSD3", "inputs": {"shift": 5.0, "model": ["56", 0]}},
        "57:9": {"class_type": "Spy", "inputs": {"model": ["37", 0], "other": ["37", 1], "pair": [37, 0]}},
        "60.0.99": {"class_type": "Nested", "inputs": {}},
    }


def links(made: dict, node_id: str, name: str = "model") -> list[tuple[str, str, float]]:
    """The LoRAs between an input and the first node of another class, in the order in which they apply."""
    chain = []
    while (node := made[made[node_id]["inputs"][name][0]])["class_type"] == "LoraLoaderModelOnly":
        chain.append((node["inputs"]["lora_name"], node["inputs"]["strength_model"]))
        node_id, name = made[node_id]["inputs"][name][0], "model"
    return [*chain[::-1], made[node_id]["inputs"][name][0]]


def test_loras_stand_between_a_node_and_all_that_use_it() -> None:
    before = graph()
    made = with_loras(
        before, ["37", "56"], [{"path": "a/x.safetensors", "scale": 0.5}, {"path": "y.safetensors"}]
    )

    expected = [("a/x.safetensors", 0.5), ("y.safetensors", 1.0)]
    assert [*expected, "37"] == links(made, "54")
    assert [*expected, "56"] == links(made, "55")
    assert [*expected, "37"] == links(made, "57:9")
    assert [*expected, "37"] == links(made, "57:9", "pair")
    assert ["37", 1] == made["57:9"]["inputs"]["other"]
    added = sorted(set(made) - set(before))
    assert ["100", "101", "102", "103"] == added
    assert all(is_added_lora(made[key]) for key in added)
    assert not any(is_added_lora(made[key]) for key in before)
    assert graph() == before


def test_without_loras_the_graph_stays() -> None:
    assert graph() == with_loras(graph(), ["37"], [])
    assert graph() == with_loras(graph(), [], [{"path": "x"}])
    assert not is_added_lora(None)


def test_a_lora_place_that_the_graph_lacks_is_named() -> None:
    with pytest.raises(EngineError, match="behind node 99") as caught:
        with_loras(graph(), ["99"], [{"path": "x"}])
    assert ("workflow_refused", False, False) == (
        caught.value.reason,
        caught.value.began,
        caught.value.retryable,
    )


@pytest.mark.parametrize(
    ("prefix", "last"),
    [
        ("ComfyUI", "ComfyUI"),
        ("video/ComfyUI", "ComfyUI"),
        ("C:\\Users\\me\\out", "out"),
        ("C:out", "out"),
        ("\\\\server\\share\\take", "take"),
        ("/abs/take", "take"),
        ("takes/", "output"),
        ("", "output"),
        ("..", "output"),
        ("a/../..", "output"),
        ("a/ . ", "output"),
        ("%year%-%month%/shot_%width%x%height%", "shot_%width%x%height%"),
        ("%date:yyyy-MM-dd%/take_%date:hhmmss%", "take_%date:hhmmss%"),
        ("take_%date:dd/MM%", "take_%date:dd-MM%"),
        ("100%/take", "take"),
        ("%/../../x%", "%-..-..-x%"),
        ("ta\x00ke\n", "take"),
        ("猫/夜", "夜"),
    ],
)
def test_every_name_lies_in_the_prompts_own_folder(prefix: str, last: str) -> None:
    before = {"9": {"class_type": "SaveImage", "inputs": {"images": ["8", 0], "filename_prefix": prefix}}}
    kept = copy.deepcopy(before)

    made = with_prefix(before, "0b5c")

    assert {"images": ["8", 0], "filename_prefix": f"rushes/0b5c/{last}"} == made["9"]["inputs"]
    assert kept == before


def test_a_linked_prefix_and_other_nodes_stay() -> None:
    before = {
        "9": {"class_type": "SaveImage", "inputs": {"filename_prefix": ["3", 0]}},
        "8": {"class_type": "X"},
    }
    assert before == with_prefix(before, "0b5c")


@given(st.text())
def test_no_name_leads_out_of_the_folder(prefix: str) -> None:
    made = with_prefix({"1": {"class_type": "S", "inputs": {"filename_prefix": prefix}}}, "id")
    head, folder, *rest = made["1"]["inputs"]["filename_prefix"].split("/")
    assert ("rushes", "id", 1) == (head, folder, len(rest))
    assert "\\" not in rest[0]
    assert rest[0] not in ("", ".", "..")
