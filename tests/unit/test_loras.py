"""LoRAs as an input: what fits, what the answer says of what does not, and how a command line gives them."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import openapi_spec_validator
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rushes.api.openapi import model_openapi
from rushes.catalog.load import load_entry
from rushes.catalog.loras import MOST, enforced_loras_schema, lora_problems
from rushes.catalog.model import Input, Model
from rushes.catalog.paths import LONGEST_PATH, why_unsafe
from rushes.catalog.roles import roles_of
from rushes.catalog.schema import seed_schema
from rushes.catalog.validate import Validator
from rushes.cli.inputs import parse_value
from rushes.errors import InvalidInput


def model(*, required: bool = False) -> Model:
    return Model(
        id="my/model",
        name="Mine",
        description="",
        categories=(),
        output="image",
        inputs=(Input("steps", "Steps", "integer", "steps", default=4), Input("l", "LoRAs", "loras", "loras")),
        required=("l",) if required else (),
        folder=Path(),
    )


def check(value: Any, *, required: bool = False) -> Any:
    return Validator(model(required=required)).validate(json.dumps({"l": value}).encode())


def refused(value: Any, *, required: bool = False) -> list[dict[str, Any]]:
    with pytest.raises(InvalidInput) as caught:
        check(value, required=required)
    assert caught.value.detail
    return caught.value.detail


# -- what fits ----------------------------------------------------------------------------------------------
def test_the_default_scale_is_filled_in_and_stored() -> None:
    ours = check(
        [{"path": "a.safetensors"}, {"scale": 0, "path": "wan/b c.safetensors"}, {"path": "ü", "scale": None}]
    )

    expected = [
        {"path": "a.safetensors", "scale": 1.0},
        {"path": "wan/b c.safetensors", "scale": 0},
        {"path": "ü", "scale": 1.0},
    ]
    assert {"steps": 4, "l": expected} == ours.input
    assert ours.input == orjson.loads(ours.json)
    assert {} == ours.files
    assert expected == roles_of(model(), ours.input)["loras"]


def test_what_came_out_fits_again_unchanged() -> None:
    once = check([{"path": "a.safetensors"}])

    assert once == Validator(model()).validate(once.json)


def test_what_was_given_is_not_changed() -> None:
    given_ = {"l": [{"path": "a", "scale": None}]}

    Validator(model()).validate_input(given_)

    assert {"l": [{"path": "a", "scale": None}]} == given_


@pytest.mark.parametrize("body", [{}, {"l": None}])
def test_without_loras_there_is_no_such_role(body: dict[str, Any]) -> None:
    ours = Validator(model()).validate_input(body)

    assert {"steps": 4} == ours.input == roles_of(model(), ours.input)


def test_an_empty_list_and_the_longest_fit() -> None:
    assert [] == check([]).input["l"]
    assert MOST == len(check([{"path": "a"}] * MOST).input["l"])


# -- what does not ------------------------------------------------------------------------------------------
FIX = "give the file's name in the server's loras folder, such as \"wan/style.safetensors\""


@pytest.mark.parametrize(
    ("value", "loc", "kind", "message"),
    [
        ("a", [], "type", "l must be a list such as "),
        ({"path": "a"}, [], "type", "l must be a list such as "),
        ([{"path": "a"}] * 9, [], "max_items", "l takes 8 LoRAs at most; it has 9"),
        (["a"], [0], "type", 'l[0] must be an object such as {"path": "style.safetensors"}'),
        (
            [{"path": "a"}, {}],
            [1, "path"],
            "missing",
            "l[1].path is required: the name of a file in the server's",
        ),
        ([{"path": None}], [0, "path"], "type", "l[0].path must be a string"),
        ([{"path": 5}], [0, "path"], "type", f"l[0].path must be a string: {FIX}"),
        ([{"path": ""}], [0, "path"], "path", f"l[0].path is empty: {FIX}"),
        ([{"path": "https://a.b/c"}], [0, "path"], "path", f"l[0].path is an address, not a file: {FIX}"),
        ([{"path": "C:/a"}], [0, "path"], "path", "l[0].path holds a colon"),
        ([{"path": "/etc/passwd"}], [0, "path"], "path", "l[0].path begins with a slash"),
        ([{"path": "a\\b"}], [0, "path"], "path", "l[0].path holds a backslash; write /"),
        ([{"path": "a/../../b"}], [0, "path"], "path", 'l[0].path leads out of its folder with ".."'),
        ([{"path": "a//b"}], [0, "path"], "path", "an empty part or a single dot"),
        ([{"path": "./b"}], [0, "path"], "path", "an empty part or a single dot"),
        ([{"path": "a\0"}], [0, "path"], "path", "a control character"),
        ([{"path": "a" * 501}], [0, "path"], "path", "more than 500 characters"),
        ([{"path": "a", "scale": "1"}], [0, "scale"], "type", "l[0].scale must be a number, such as 1.0"),
        ([{"path": "a", "scale": True}], [0, "scale"], "type", "must be a number"),
        (
            [{"path": "a", "scale": 101}],
            [0, "scale"],
            "maximum",
            "l[0].scale must be from -100 to 100; got 101",
        ),
        ([{"path": "a", "scale": -1e9}], [0, "scale"], "minimum", "got -1e+09"),
        (
            [{"path": "a", "scal": 1}],
            [0, "scal"],
            "unknown_field",
            "l[0].scal is no key of a LoRA; did you mean scale?",
        ),
    ],
)
def test_messages_name_index_key_and_fix(value: Any, loc: list[Any], kind: str, message: str) -> None:
    [entry] = refused(value)

    assert (["l", *loc], kind) == (entry["loc"], entry["type"])
    assert entry["msg"].startswith("l")
    assert message in entry["msg"]


def test_every_item_at_fault_is_listed_beside_the_other_fields() -> None:
    body = {"steps": "4", "l": [{"path": "../a", "scale": "x"}, {"path": "b"}, {}], "z": 1}
    with pytest.raises(InvalidInput) as caught:
        Validator(model()).validate_input(body)

    assert [["steps"], ["l", 0, "path"], ["l", 0, "scale"], ["l", 2, "path"], ["z"]] == [
        entry["loc"] for entry in caught.value.detail or []
    ]


def test_a_required_list() -> None:
    assert (["l"], "missing") == (
        refused(None, required=True)[0]["loc"],
        refused(None, required=True)[0]["type"],
    )
    with pytest.raises(InvalidInput, match="l is required"):
        Validator(model(required=True)).validate(b"{}")


def test_an_error_stays_small() -> None:
    items = [{"k" * 100_000: 1, "path": "p" * 100_000} for _ in range(8)]

    assert 20_000 > len(orjson.dumps(refused(items)))


# -- the words and the schema agree -------------------------------------------------------------------------
PATHS = st.lists(
    st.sampled_from(["a", "b.c", "..", ".", "/", "\\", ":", "\0", "\x7f", " ", "…"]), max_size=6
).map("".join) | st.text(max_size=8)
ITEMS = st.dictionaries(st.sampled_from(["path", "scale", "scal"]), PATHS | st.none() | st.booleans()) | (
    st.fixed_dictionaries({"path": PATHS}, optional={"scale": st.floats(allow_nan=False, allow_infinity=False)})
)


@given(st.lists(ITEMS | st.integers(), max_size=10) | ITEMS)
def test_the_schema_and_the_words_agree(value: Any) -> None:
    peer = jsonschema.Draft202012Validator(enforced_loras_schema())

    assert peer.is_valid(value) == (not lora_problems(value))


@given(PATHS)
def test_no_path_leads_out_of_a_folder(path: str) -> None:
    safe = why_unsafe(path) is None
    inside = (Path("/srv/loras") / path).resolve() if "\0" not in path else Path("/")

    assert not safe or (inside.is_relative_to("/srv/loras") and inside != Path("/srv/loras"))
    assert LONGEST_PATH >= len(path)


# -- the document and the command line ----------------------------------------------------------------------
def test_the_command_line_takes_them_as_json() -> None:
    field = seed_schema(model())["properties"]["l"]
    text = '[{"path": "a.safetensors"}]'

    assert [{"path": "a.safetensors"}] == parse_value(text, field)
    with pytest.raises(ValueError, match="must be a JSON array"):
        parse_value("a.safetensors", field)


def test_the_models_openapi_document_is_valid(tmp_path: Path) -> None:
    folder = tmp_path / "my" / "model"
    folder.mkdir(parents=True)
    fields = 'name = "loras"\ntitle = "LoRAs"\ntype = "loras"\nrole = "loras"\n'
    (folder / "model.toml").write_text(f'name = "Mine"\noutput = "image"\n[[inputs]]\n{fields}')

    document = model_openapi(load_entry(folder, tmp_path), "http://127.0.0.1:8000")

    openapi_spec_validator.validate(document)
    submit = document["paths"]["/v1/models/my/model"]["post"]
    schema = submit["requestBody"]["content"]["application/json"]["schema"]["properties"]["loras"]
    assert {"title": "LoRAs", "description": "", **enforced_loras_schema()} == {"description": "", **schema}
