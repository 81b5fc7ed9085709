"""Resolutions, roles, sample pictures, and the nearest name."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rushes.catalog.load import Catalog
from rushes.catalog.model import Input, Model
from rushes.catalog.nearest import did_you_mean, nearest
from rushes.catalog.resolution import LARGEST_SIDE, SMALLEST_SIDE, parse_resolution
from rushes.catalog.roles import roles_of
from rushes.catalog.samples import sample_names, sample_path


# -- resolutions --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("expected", "text"),
    [
        ((1024, 576), "1024x576 (16:9)"),
        ((1440, 810), "1440:810 (16:9)"),
        ((1024, 1365), "1024:1365 (3:4)"),
        ((720, 480), "720X480"),
        ((1280, 720), " 1280 \u00d7 720 "),
        ((1280, 720), "1280*720"),
    ],
)
def test_resolution(expected: tuple[int, int], text: str) -> None:
    assert expected == parse_resolution(text)


def test_every_resolution_of_every_model() -> None:
    for entry in Catalog.load().entries():
        field = entry.model.field("resolution")
        assert field is not None
        for text in field.enum or ():
            width, height = parse_resolution(str(text))
            across, down = (int(part) for part in str(text).partition("(")[2].rstrip(")").split(":"))
            assert pytest.approx(across / down, rel=0.01) == width / height


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1024",
        "1024x",
        "x576",
        "16:9",
        "15x64",
        "64x16385",
        "-64x64",
        "64.5x64",
        "64x64x64",
        "٦٤x٦٤",
        "(16:9)",
    ],
)
def test_no_resolution(text: str) -> None:
    with pytest.raises(ValueError, match="is no resolution: "):
        parse_resolution(text)


@given(
    st.integers(SMALLEST_SIDE, LARGEST_SIDE), st.integers(SMALLEST_SIDE, LARGEST_SIDE), st.sampled_from("x:")
)
def test_resolutions_come_back(width: int, height: int, between: str) -> None:
    assert (width, height) == parse_resolution(f"{width}{between}{height} (1:1)")


@given(st.text(max_size=30))
def test_any_text_is_a_resolution_or_a_clear_error(text: str) -> None:
    problem, width, height = "", SMALLEST_SIDE, SMALLEST_SIDE
    try:
        width, height = parse_resolution(text)
    except ValueError as error:
        problem = str(error)
    if problem:
        assert "is no resolution" in problem
    else:
        assert SMALLEST_SIDE <= min(width, height) <= max(width, height) <= LARGEST_SIDE


# -- roles --------------------------------------------------------------------------------------------------
def test_roles_of_a_complete_input() -> None:
    entry = Catalog.load().get("community/wan-2-2/first-last-frame")
    assert entry is not None
    complete = entry.validator.validate_input(entry.model.sample).input

    assert {
        "start_image": "Runcomfy_Example_1259_1.png",
        "end_image": "Runcomfy_Example_1259_2.png",
        "prompt": "Puppy, playing, happy, barking, joyful",
        "resolution": (720, 720),
        "frames": 81,
        "fps": 16,
        "seed": 96860978,
        "steps": 20,
        "guidance": 4,
        "shift": 8,
    } == roles_of(entry.model, complete)


def test_roles_of_what_is_not_given() -> None:
    entry = Catalog.load().get("wan-ai/wan-2-5/text-to-image")
    assert entry is not None

    assert {"prompt": "x"} == roles_of(entry.model, {"prompt": "x"})


def test_the_first_given_reference_image_has_the_role() -> None:
    model = Model(
        id="a/b",
        name="A",
        description="",
        categories=(),
        output="image",
        inputs=(
            Input("r1", "R", "string", "reference_image"),
            Input("r2", "R", "string", "reference_image"),
            Input("r3", "R", "string", "reference_image"),
            Input("o", "O", "string"),
        ),
        required=(),
        folder=Path(),
    )

    assert {"reference_image": "b"} == roles_of(model, {"r2": "b", "r3": "c", "o": "x"})


# -- samples ------------------------------------------------------------------------------------------------
def test_the_pictures_that_the_seeds_name_are_there() -> None:
    named = {
        "RunComfy_examples_1235_1.png",
        "Runcomfy_Example_1259_1.png",
        "Runcomfy_Example_1259_2.png",
        "Runcomfy_Example_1290_1.png",
    }

    assert named <= set(sample_names())
    for name in named:
        path = sample_path(name)
        assert path is not None
        assert b"\x89PNG\r\n\x1a\n" == path.read_bytes()[:8]


def test_every_default_and_sample_file_of_every_model_is_there() -> None:
    for entry in Catalog.load().entries():
        defaults = {field.name: field.default for field in entry.model.inputs}
        for name in entry.model.files():
            assert sample_path(str(defaults[name])) is not None
            assert sample_path(entry.model.sample[name]) is not None


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "no-such.png",
        "../samples/Runcomfy_Example_1290_1.png",
        "./Runcomfy_Example_1290_1.png",
        "/etc/passwd",
        "runcomfy_example_1290_1.png",
        "Runcomfy_Example_1290_1.png\0",
        "../load.py",
    ],
)
def test_no_name_leads_out_of_the_folder(name: str) -> None:
    assert sample_path(name) is None


# -- the nearest name ---------------------------------------------------------------------------------------
def test_nearest() -> None:
    known, aliases = (
        ["98_seed", "56_text"],
        {"seed": "98_seed", "prompt": "56_text", "guidance scale": "108_cfg"},
    )

    assert "98_seed" == nearest("98_SEED", known)
    assert "98_seed" == nearest("98sed", known)
    assert "56_text" == nearest("Prompt", known, aliases)
    assert "56_text" == nearest("promptt", known, aliases)
    assert "108_cfg" == nearest("guidance_scale", known, aliases)
    assert nearest("zzz", known, aliases) is None
    assert nearest("x" * 1_000_000, known, aliases) is None


def test_did_you_mean() -> None:
    assert "did you mean seed?" == did_you_mean("sed", ["seed", "steps"])
    assert "known are seed, steps" == did_you_mean("zzz", ["seed", "steps"])
