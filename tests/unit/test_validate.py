"""From bytes to a complete input: what fits, what does not, and what the answer then says."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rushes.catalog.load import Catalog
from rushes.catalog.model import Input, Model
from rushes.catalog.schema import enforced_schema
from rushes.catalog.validate import MOST_COMMAS, MOST_UNKNOWN, Validated, Validator
from rushes.errors import InvalidInput, MalformedRequest, RushesError

VACE = "community/wan-2-2/vace-fun"
IMAGE = "wan-ai/wan-2-5/text-to-image"
CATALOG = Catalog.load()
GOOD = {"56_text": "a fox", "118_image": "Runcomfy_Example_1290_1.png"}


def validator(id_: str = VACE) -> Validator:
    entry = CATALOG.get(id_)
    assert entry is not None
    return entry.validator


def check(given: Any, id_: str = VACE) -> Validated:
    return validator(id_).validate(json.dumps(given).encode())


def refused(given: Any, id_: str = VACE) -> list[dict[str, Any]]:
    with pytest.raises(InvalidInput) as caught:
        check(given, id_)
    assert caught.value.detail
    assert caught.value.message
    return caught.value.detail


def only(given: Any, id_: str = VACE) -> tuple[list[Any], str, str]:
    """The single entry of the refusal: where, what kind, which words."""
    detail = refused(given, id_)
    assert 1 == len(detail), detail
    assert {"loc", "msg", "type"} == detail[0].keys()
    return detail[0]["loc"], detail[0]["type"], detail[0]["msg"]


def small(*inputs: Input, required: Sequence[str] = ()) -> Model:
    return Model(
        id="my/model",
        name="Mine",
        description="",
        categories=(),
        output="image",
        inputs=inputs,
        required=tuple(required),
        folder=Path(),
    )


# -- what fits ----------------------------------------------------------------------------------------------
def test_defaults_are_filled_in_the_schemas_order() -> None:
    ours = check(dict(reversed(GOOD.items())))

    expected = {
        "56_text": "a fox",
        "118_image": "Runcomfy_Example_1290_1.png",
        "4_valuex3_value": "1024x576 (16:9)",
        "25_value": 81,
        "38_value": 16,
        "98_seed": 96860978,
        "47_value": 12,
        "108_cfg": 3.5,
        "41_value": 8,
    }
    assert expected == ours.input
    assert list(expected) == list(ours.input)
    assert json.dumps(expected) == json.dumps(json.loads(ours.json))
    assert {"118_image": "Runcomfy_Example_1290_1.png"} == ours.files


def test_an_optional_field_without_default_stays_out() -> None:
    assert {"prompt": "", "aspect_ratio": "1440:810 (16:9)"} == check({"prompt": ""}, IMAGE).input


def test_every_sample_fits() -> None:
    for entry in CATALOG.entries():
        ours = entry.validator.validate(orjson.dumps(entry.model.sample))
        assert entry.model.sample.items() <= ours.input.items()
        assert entry.model.files().keys() == ours.files.keys()


def test_what_came_out_fits_again_unchanged() -> None:
    once = check(GOOD)

    assert once == validator().validate(once.json)


def test_a_whole_float_is_an_integer() -> None:
    ours = check(GOOD | {"25_value": 81.0, "47_value": 20.0}).input

    assert ("81", "20") == (repr(ours["25_value"]), repr(ours["47_value"]))


@pytest.mark.parametrize("value", [3, 3.25])
def test_float_takes_both_kinds_of_numbers(value: float) -> None:
    assert value == check(GOOD | {"108_cfg": value}).input["108_cfg"]


def test_null_of_an_optional_field_is_not_given() -> None:
    assert check(GOOD) == check(GOOD | {"25_value": None, "98_seed": None})
    assert {"prompt": "x", "aspect_ratio": "1440:810 (16:9)"} == check(
        {"prompt": "x", "negative_prompt": None}, IMAGE
    ).input


def test_the_last_of_a_name_given_twice_counts() -> None:
    ours = validator(IMAGE).validate(b'{"prompt": "one", "prompt": "two"}')

    assert "two" == ours.input["prompt"]


def test_an_optional_file_defaults_to_its_sample() -> None:
    ours = Validator(small(Input("ref", "Ref", "string", "reference_image", default="a.png")))

    assert {"ref": "a.png"} == ours.validate(b"{}").files


def test_an_optional_file_without_default_is_no_file() -> None:
    assert {} == Validator(small(Input("ref", "Ref", "string", "start_image"))).validate(b"{}").files


# -- seeds --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", [0, 2**63, 2**64 - 1])
def test_seeds_are_what_comfyui_takes(seed: int) -> None:
    assert seed == check(GOOD | {"98_seed": seed}).input["98_seed"]


@pytest.mark.parametrize("seed", [-2, 2**64, 10**30, -(10**30)])
def test_other_seeds_are_refused_with_the_range(seed: int) -> None:
    loc, kind, message = only(GOOD | {"98_seed": seed})

    assert ["98_seed"] == loc
    assert ("minimum" if seed < 0 else "maximum") == kind
    assert message.startswith("98_seed must be from 0 to 18446744073709551615, or -1 for a random seed; got ")


def test_minus_one_draws_a_seed_that_is_recorded() -> None:
    entry = CATALOG.get(VACE)
    assert entry is not None
    asked: list[tuple[int, int]] = []

    def draw(low: int, high: int) -> int:
        asked.append((low, high))
        return 4711

    ours = Validator(entry.model, draw_seed=draw).validate(orjson.dumps(GOOD | {"98_seed": -1}))

    assert 4711 == ours.input["98_seed"]
    assert 4711 == json.loads(ours.json)["98_seed"]
    assert [(0, 2**53 - 1)] == asked


def test_drawn_seeds_differ() -> None:
    drawn = {check(GOOD | {"98_seed": -1}).input["98_seed"] for _ in range(20)}

    assert 20 == len(drawn)
    assert all(0 <= seed < 2**53 for seed in drawn)


def test_a_manifests_own_bounds_hold_for_seeds() -> None:
    bounded = small(Input("seed", "Seed", "integer", "seed", minimum=0, maximum=9, default=1))
    with pytest.raises(InvalidInput, match="seed must be from 0 to 9; got -1"):
        Validator(bounded).validate(b'{"seed": -1}')

    open_below = small(Input("seed", "Seed", "integer", "seed", maximum=9, default=-1))
    assert 9 == Validator(open_below, draw_seed=max).validate(b"{}").input["seed"]


# -- fields at fault ----------------------------------------------------------------------------------------
def test_every_failing_field_is_listed_in_order_unknown_ones_last() -> None:
    detail = refused(
        {
            "colour": "red",
            "41_value": 0.5,
            "56_txt": "a fox",
            "25_value": 82,
            "38_value": "16",
            "47_value": 41,
            "108_cfg": True,
            "118_image": "\0",
        }
    )

    assert [
        ("56_text", "missing"),
        ("118_image", "character"),
        ("25_value", "enum"),
        ("38_value", "type"),
        ("47_value", "maximum"),
        ("108_cfg", "type"),
        ("41_value", "minimum"),
        ("colour", "unknown_field"),
        ("56_txt", "unknown_field"),
    ] == [(entry["loc"][0], entry["type"]) for entry in detail]


@pytest.mark.parametrize(
    ("field", "value", "kind", "message"),
    [
        ("25_value", 82, "enum", "25_value must be one of 81, 141; got 82"),
        ("25_value", True, "enum", "25_value must be one of 81, 141; got true"),
        ("25_value", "81", "enum", 'one of 81, 141; got the string "81"'),
        ("4_valuex3_value", "1x1", "enum", '"1280x720 (16:9)"; got the string "1x1"'),
        ("38_value", 11, "minimum", "38_value must be from 12 to 24; got 11"),
        ("38_value", 25, "maximum", "38_value must be from 12 to 24; got 25"),
        ("38_value", 16.5, "type", "38_value must be an integer; got 16.5"),
        ("38_value", "16", "type", 'an integer; got the string "16"; send it without quotes'),
        ("38_value", "fast", "type", '38_value must be an integer; got the string "fast"'),
        ("38_value", False, "type", "38_value must be an integer; got false"),
        ("38_value", 10**40, "maximum", "38_value must be from 12 to 24; got 1e+40"),
        ("108_cfg", -0.01, "minimum", "108_cfg must be from 0 to 10; got -0.01"),
        ("108_cfg", True, "type", "108_cfg must be a number; got true"),
        ("108_cfg", 1e300, "maximum", "108_cfg must be from 0 to 10; got 1e+300"),
        ("108_cfg", [1], "type", "108_cfg must be a number; got an array"),
        ("56_text", 5, "type", "56_text must be a string; got 5"),
        ("56_text", {}, "type", "56_text must be a string; got an object"),
        ("56_text", None, "missing", "56_text is required (Prompt); null is no value"),
        ("56_text", "a\0b", "character", "56_text holds a NUL character (\\u0000); take it out"),
        ("118_image", "", "min_length", "118_image is empty; give an https URL, a data URI, or the name"),
    ],
)
def test_messages_name_the_field_and_the_fix(field: str, value: Any, kind: str, message: str) -> None:
    loc, type_, words = only(GOOD | {field: value})

    assert [field] == loc
    assert kind == type_
    assert message in words
    assert words.startswith(field)


def test_missing() -> None:
    assert (["118_image"], "missing", "118_image is required (Image)") == only({"56_text": "a fox"})


def test_too_long_counts_characters_not_bytes() -> None:
    assert 2048 == len(check({"prompt": "🦊" * 2048}, IMAGE).input["prompt"])
    assert (["prompt"], "max_length", "prompt must have at most 2048 characters; it has 2049") == only(
        {"prompt": "🦊" * 2049}, IMAGE
    )


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("118_imge", "118_image"),
        ("98_sed", "98_seed"),
        ("seed", "98_seed"),
        ("prompt", "56_text"),
        ("Steps", "47_value"),
        ("frames", "25_value"),
        ("number_of_frames", "25_value"),
        ("reference_image", "118_image"),
        ("guidance_scale", "108_cfg"),
    ],
)
def test_unknown_fields_name_the_nearest_known_one(name: str, meant: str) -> None:
    loc, kind, message = only(GOOD | {name: 1})

    assert [name] == loc
    assert "unknown_field" == kind
    assert f'"{name}" is no field of this model; did you mean {meant}?' == message


def test_unknown_fields_that_are_near_nothing_get_the_list() -> None:
    assert "known are 56_text, 118_image, 4_valuex3_value" in only(GOOD | {"zzz": None})[2]


def test_very_many_unknown_fields_end_in_a_count() -> None:
    detail = refused(GOOD | {f"x{n}": n for n in range(MOST_UNKNOWN + 7)})

    assert MOST_UNKNOWN + 1 == len(detail)
    assert {"loc": [], "msg": "7 more fields are unknown", "type": "unknown_field"} == detail[-1]


def test_an_error_does_not_send_a_large_value_back() -> None:
    with pytest.raises(InvalidInput) as caught:
        check(GOOD | {"38_value": "9" * 100_000, "k" * 100_000: 1})

    assert 2000 > len(orjson.dumps([caught.value.message, caught.value.detail]))


@pytest.mark.parametrize(
    ("expected", "given_"),
    [
        ("at least 3; got 2", {"n": 2}),
        ("n must be at most 18446744073709551615; got 1e+30", {"n": 10**30}),
        ("t must have at least 2 characters; it has 1", {"t": "x"}),
        ("b must be true or false; got 1", {"b": 1}),
        ('b must be true or false; got the string "true"; send it without quotes', {"b": "true"}),
        ("'sixteen' is no resolution", {"size": "sixteen"}),
        ("16x9 is no resolution: each side has 16 to 16384 pixels", {"size": "16:9"}),
    ],
)
def test_bounds_on_one_side_and_free_sizes(expected: str, given_: dict[str, Any]) -> None:
    ours = Validator(
        small(
            Input("n", "N", "integer", minimum=3),
            Input("t", "T", "string", min_length=2),
            Input("b", "B", "boolean"),
            Input("size", "Size", "string", "resolution"),
        )
    )
    with pytest.raises(InvalidInput) as caught:
        ours.validate(json.dumps(given_).encode())

    assert expected in caught.value.message


# -- bodies that are no input -------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "The body is empty"),
        (b" \n", "The body is empty"),
        (b"[]", "must be a JSON object with the input's fields, not an array"),
        (b'"x"', "not a string"),
        (b"1", "not a number"),
        (b"true", "not a boolean"),
        (b"null", "not null"),
        (b"{", "The body is not JSON: "),
        (b"{'56_text': 'x'}", "The body is not JSON: "),
        (b"\xff\xfe", "The body is not JSON: "),
        ('{"56_text": "é"}'.encode("latin-1"), "The body is not JSON: "),
        ('{"56_text": "x"}'.encode("utf-16"), "The body is not JSON: "),
        (b'\xef\xbb\xbf{"56_text": "x"}', "The body is not JSON: "),
        (b'{"56_text": "\\ud800"}', "The body is not JSON: "),
        (b'{"108_cfg": NaN}', "NaN and Infinity are no JSON numbers"),
        ('{"56_text": "é", "108_cfg": -Infinity}'.encode(), "NaN and Infinity are no JSON numbers"),
        (b'{"108_cfg": 1e999}', "The body is not JSON: "),
        (b'{"a": ' * 33 + b"1" + b"}" * 33, "deeper than 32 levels"),
        (b'{"56_text": ' + b"[" * 32 + b"]" * 32 + b"}", "deeper than 32 levels"),
        (b'{"56_text": ' + b"[" * 500_000 + b"]" * 500_000 + b"}", "The body is not JSON: "),
        (b'{"56_text": [' + b"0," * (MOST_COMMAS + 1) + b"0]}", "more than 100000 values"),
    ],
)
def test_malformed_bodies(raw: bytes, message: str) -> None:
    with pytest.raises(MalformedRequest) as caught:
        validator().validate(raw)

    assert message in caught.value.message
    assert 400 > len(caught.value.message)


def test_nesting_within_the_limit_is_a_wrong_type() -> None:
    raw = b'{"118_image": "x", "56_text": ' + b"[" * 31 + b"]" * 31 + b"}"
    with pytest.raises(InvalidInput, match="56_text must be a string; got an array"):
        validator().validate(raw)


def test_a_large_data_uri_is_no_trouble() -> None:
    uri = "data:image/png;base64," + "A" * 20_000_000

    assert uri == check(GOOD | {"118_image": uri}).files["118_image"]


# -- anything at all ----------------------------------------------------------------------------------------
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(0, 200)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
)
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner))


@given(st.binary() | st.text().map(str.encode) | JSON.map(lambda value: json.dumps(value).encode()))
def test_no_bytes_break_it(raw: bytes) -> None:
    outcome: Validated | RushesError
    try:
        outcome = validator().validate(raw)
    except RushesError as error:
        outcome = error

    if isinstance(outcome, Validated):
        assert GOOD.keys() <= outcome.input.keys()
    else:
        assert outcome.status in (400, 422)


def fields_of(id_: str) -> st.SearchStrategy[dict[str, Any]]:
    entry = CATALOG.get(id_)
    assert entry is not None
    optional = {}
    for field in entry.model.inputs:
        near: st.SearchStrategy[Any] = SCALARS
        if field.enum:
            near = near | st.sampled_from(field.enum)
        if field.type != "string":
            near = near | st.integers(-2, 45).map(float)
        optional[field.name] = near
    return st.fixed_dictionaries({}, optional=optional).map(lambda part: {**entry.model.sample, **part})


@given(fields_of(VACE))
def test_agrees_with_another_implementation_of_json_schema(given_: dict[str, Any]) -> None:
    """The verdict, but for what this module decides beyond the schema: null, and NUL characters."""
    entry = CATALOG.get(VACE)
    assert entry is not None
    required = entry.model.required
    plain = {name: value for name, value in given_.items() if value is not None or name in required}
    peer = jsonschema.Draft202012Validator(enforced_schema(entry.model))
    expected = peer.is_valid(plain) and not any(isinstance(v, str) and "\0" in v for v in plain.values())
    wrong = {str(error.path[0]) for error in peer.iter_errors(plain) if error.path}
    wrong |= {name for name, value in plain.items() if isinstance(value, str) and "\0" in value}

    detail: list[dict[str, Any]] = []
    try:
        entry.validator.validate(json.dumps(given_).encode())
    except InvalidInput as error:
        detail = error.detail or []

    assert expected == (not detail)
    assert wrong == {entry["loc"][0] for entry in detail}
