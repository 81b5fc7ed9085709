"""The schemas of the four models against the seed pages, whose JSON stands unchanged in ``seeds/``."""

import json
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

from rushes.catalog.load import Catalog
from rushes.catalog.model import Input, Model
from rushes.catalog.schema import (
    INTEGER_LARGEST,
    INTEGER_SMALLEST,
    SEED_LARGEST,
    enforced_schema,
    integer_bounds,
    output_schema,
    seed_schema,
    standard,
)

SEEDS = Path(__file__).parent / "seeds"
IDS = [
    "community/wan-2-1/fusionx/image-to-video",
    "community/wan-2-2/first-last-frame",
    "community/wan-2-2/vace-fun",
    "wan-ai/wan-2-5/text-to-image",
]


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return Catalog.load()


def seed(id_: str) -> dict[str, Any]:
    return json.loads((SEEDS / f"{id_.replace('/', '__')}.json").read_text("utf-8"))


def model(catalog: Catalog, id_: str) -> Model:
    entry = catalog.get(id_)
    assert entry is not None
    return entry.model


def text(value: Any) -> str:
    """JSON with sorted keys: unlike ==, this tells 8 from 8.0 and 1 from true."""
    return json.dumps(value, sort_keys=True)


@pytest.mark.parametrize("id_", IDS)
def test_input_schema_is_the_seeds(catalog: Catalog, id_: str) -> None:
    expected = seed(id_)
    expected["title"] = "Input schema"  # the pages print it in their own language

    assert text(expected) == text(seed_schema(model(catalog, id_)))


@pytest.mark.parametrize("id_", IDS)
def test_order_is_the_seeds(catalog: Catalog, id_: str) -> None:
    expected, ours = seed(id_), seed_schema(model(catalog, id_))

    assert list(expected["properties"]) == list(ours["properties"])
    assert expected["required"] == ours["required"]
    assert list(expected) == list(ours)


def test_output_schema_is_the_seeds_in_english() -> None:
    expected = json.loads((SEEDS / "output.json").read_text("utf-8"))
    descriptions = {
        "image": "URL of a single image",
        "video": "URL of a single video",
        "images": "URLs of several images",
        "videos": "URLs of several videos",
    }
    for name, keywords in expected["output"]["properties"].items():
        keywords["description"] = descriptions[name]

    assert text(expected) == text(output_schema())


@pytest.mark.parametrize("id_", IDS)
def test_standard_changes_only_float_and_unknown_fields(id_: str) -> None:
    schema = seed(id_)
    before = text(schema)

    ours = standard(schema)

    assert before == text(schema)
    jsonschema_rs.meta.validate(ours)
    assert "https://json-schema.org/draft/2020-12/schema" == ours.pop("$schema")
    assert ours.pop("additionalProperties") is False
    assert before.replace('"type": "float"', '"type": "number"') == text(ours)


def test_the_dialect_is_not_standard_by_itself(catalog: Catalog) -> None:
    with pytest.raises(jsonschema_rs.ValidationError, match="float"):
        jsonschema_rs.meta.validate(seed_schema(model(catalog, IDS[0])))


@pytest.mark.parametrize("id_", IDS)
def test_enforced_adds_only_what_the_server_holds_to(catalog: Catalog, id_: str) -> None:
    ours = model(catalog, id_)
    plain, enforced = standard(seed_schema(ours)), enforced_schema(ours)

    jsonschema_rs.meta.validate(enforced)
    for field in ours.inputs:
        expected = dict(plain["properties"][field.name])
        if field.role == "seed":
            expected |= {
                "minimum": -1,
                "maximum": SEED_LARGEST,
                "description": "-1 draws one at random.",
            }
        elif field.type == "integer":
            expected = {"minimum": INTEGER_SMALLEST, "maximum": INTEGER_LARGEST} | expected
        elif field.name in ours.files():
            expected |= {"minLength": 1}
        assert text(expected) == text(enforced["properties"][field.name])


@pytest.mark.parametrize(
    ("expected", "field"),
    [
        ((INTEGER_SMALLEST, INTEGER_LARGEST), Input("a", "A", "integer")),
        ((-1, SEED_LARGEST), Input("a", "A", "integer", "seed")),
        ((0, 2**32 - 1), Input("a", "A", "integer", "seed", minimum=0, maximum=2**32 - 1)),
        ((-1, 9), Input("a", "A", "integer", "seed", minimum=-50, maximum=9)),
        ((2, 3), Input("a", "A", "integer", minimum=1.5, maximum=3.5)),
        ((-1, INTEGER_LARGEST), Input("a", "A", "integer", minimum=-1.5, maximum=1e30)),
    ],
)
def test_integer_bounds(expected: tuple[int, int], field: Input) -> None:
    assert expected == integer_bounds(field)


def test_every_keyword_of_an_input_reaches_the_schema(catalog: Catalog, tmp_path: Path) -> None:
    ours = Model(
        id="a/b",
        name="A",
        description="",
        categories=(),
        output="image",
        inputs=(Input("t", "T", "string", min_length=1, max_length=9, default="x", description="D"),),
        required=(),
        folder=tmp_path,
    )

    assert {
        "title": "T",
        "description": "D",
        "type": "string",
        "minLength": 1,
        "maxLength": 9,
        "default": "x",
    } == seed_schema(ours)["properties"]["t"]


LORAS = Input("loras", "LoRAs", "loras", "loras", description="Styles.")


def with_loras(folder: Path) -> Model:
    return Model(
        id="a/b",
        name="A",
        description="",
        categories=(),
        output="image",
        inputs=(LORAS,),
        required=(),
        folder=folder,
    )


def test_a_list_of_loras_on_the_wire(tmp_path: Path) -> None:
    assert {
        "title": "LoRAs",
        "description": "Styles.",
        "type": "array",
        "items": {
            "type": "object",
            "properties": {"path": {"type": "string"}, "scale": {"type": "number", "default": 1.0}},
            "required": ["path"],
            "additionalProperties": False,
        },
    } == seed_schema(with_loras(tmp_path))["properties"]["loras"]


def test_a_list_of_loras_as_enforced_is_standard_and_bounded(tmp_path: Path) -> None:
    enforced = enforced_schema(with_loras(tmp_path))

    jsonschema_rs.meta.validate(enforced)
    keywords = enforced["properties"]["loras"]
    assert ("LoRAs", "Styles.", 8) == (keywords["title"], keywords["description"], keywords["maxItems"])
    item = keywords["items"]["properties"]
    assert (-100.0, 100.0, 1.0) == tuple(item["scale"][word] for word in ("minimum", "maximum", "default"))
    assert (1, 500) == (item["path"]["minLength"], item["path"]["maxLength"])
