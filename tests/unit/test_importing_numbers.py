"""The numbers of a workflow: one input for all that hold the same, and the step where an expert hands over."""

from pathlib import Path

import pytest

from rushes.catalog.importing.propose import propose
from support.importing import (
    bound,
    by_role,
    first_last,
    inputs,
    named,
    node,
    object_info,
    text_to_image,
    two_experts,
)


def test_two_experts_share_their_numbers_and_keep_the_hand_over(tmp_path: Path) -> None:
    proposal = propose(two_experts(), object_info())

    assert ["3_noise_seed", "3_steps", "3_cfg", "54_shift"] == [field.name for field in proposal.fields[3:]]
    changed = bound(proposal, tmp_path, **{"3_steps": 8, "3_cfg": 1.5, "54_shift": 5.0})
    assert [8, 8, 1.5, 1.5] == inputs(changed, "3.steps", "2.steps", "3.cfg", "2.cfg")
    assert [5.0, 5.0] == inputs(changed, "54.shift", "55.shift")
    assert [0, 4, 4, 10000] == inputs(
        changed, "3.start_at_step", "3.end_at_step", "2.start_at_step", "2.end_at_step"
    )


@pytest.mark.parametrize(
    ("at", "steps", "expected"), [(4, 20, 4), (4, 5, 1), (4, 2, 1), (18, 20, 18), (18, 10, 9), (18, 2, 1)]
)
def test_a_hand_over_keeps_its_place_and_leaves_both_something(
    tmp_path: Path, at: int, steps: int, expected: int
) -> None:
    graph = two_experts(start_at_step=at)
    graph["3"]["inputs"]["end_at_step"] = at

    changed = bound(propose(graph, object_info()), tmp_path, **{"3_steps": steps})

    assert [expected, expected] == inputs(changed, "3.end_at_step", "2.start_at_step")


def test_experts_with_one_step_would_leave_one_idle(tmp_path: Path) -> None:
    assert 2 == by_role(propose(two_experts(), object_info()))["steps"].minimum


def test_other_values_stay_other_inputs() -> None:
    proposal = propose(two_experts(cfg=1.0), object_info())

    assert ("3_cfg", 3.5) == (by_role(proposal)["guidance"].name, by_role(proposal)["guidance"].default)
    second = named(proposal, "2_cfg")
    assert ("other", 1.0) == (second.role, second.default)


def test_one_seed_drives_all_that_add_noise(tmp_path: Path) -> None:
    proposal = propose(two_experts(add_noise="enable", noise_seed=99), object_info())

    changed = bound(proposal, tmp_path, **{"3_noise_seed": 12345})

    assert [12345, 12345] == inputs(changed, "3.noise_seed", "2.noise_seed")
    assert any("one seed drives" in note for note in proposal.notes)


def test_primitives_have_the_role_and_the_bounds_of_what_they_feed(tmp_path: Path) -> None:
    graph = first_last()
    for id_, value in (("41", 8), ("42", 768), ("43", 512), ("44", 33)):
        graph[id_] = node("PrimitiveInt", value=value)
    graph["3"]["inputs"]["steps"] = ["41", 0]
    graph["5"]["inputs"] |= {"width": ["42", 0], "height": ["43", 0], "length": ["44", 0]}

    proposal = propose(graph, object_info())

    roles = by_role(proposal)
    steps, frames, size = roles["steps"], roles["frames"], roles["resolution"]
    assert ("41_value", 1, 10000) == (steps.name, steps.minimum, steps.maximum)
    assert ("44_value", 33) == (frames.name, frames.default)
    assert frames.enum is not None
    assert all(isinstance(one, int) and one % 4 == 1 for one in frames.enum)
    assert ("42_valuex43_value", "768x512 (3:2)") == (size.name, size.default)
    changed = bound(proposal, tmp_path, **{"42_valuex43_value": str(size.enum and size.enum[0])})
    assert inputs(changed, "42.value", "43.value") == [
        int(side) for side in str(size.enum and size.enum[0]).partition(" ")[0].split("x")
    ]


def test_primitives_that_feed_something_else_are_called_by_their_title() -> None:
    graph = text_to_image()
    graph["41"] = node("PrimitiveInt", "How many at once", value=2)
    graph["42"] = node("PrimitiveFloat", "Strength", value=0.5)
    graph["43"] = node(
        "LoraLoaderModelOnly", model=["4", 0], lora_name="x.safetensors", strength_model=["42", 0]
    )
    graph["5"]["inputs"]["batch_size"] = ["41", 0]
    graph["3"]["inputs"]["model"] = ["43", 0]

    proposal = propose(graph, object_info())

    batch, strength = named(proposal, "41_value"), named(proposal, "42_value")
    assert ("How many at once", 1, 4096) == (batch.title, batch.minimum, batch.maximum)
    assert ("Strength", 0.5) == (strength.title, strength.default)
