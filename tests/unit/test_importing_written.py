"""What `rushes models import` writes: TOML that reads back, and manifests that pass their own check, always."""

import json
import math
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from rushes.catalog.audit import Holdings, audit
from rushes.catalog.importing import toml
from rushes.catalog.importing.propose import CannotImport, Proposal, propose
from rushes.catalog.importing.write import files_of, manifest_of
from rushes.catalog.load import load_entry
from rushes.catalog.workflow import Graph
from rushes.cli.importing_convert import convert
from support.importing import TEMPLATES, node, object_info, template, text_to_image, written

# -- TOML -----------------------------------------------------------------------------------------------------
SCALARS = (
    st.text()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
)


@given(st.dictionaries(st.text(), SCALARS | st.lists(SCALARS).map(tuple), max_size=6))
def test_toml_reads_back(table: dict[str, Any]) -> None:
    text = "".join(toml.pair(name, value) for name, value in table.items())

    read = {name: tuple(one) if isinstance(one, list) else one for name, one in tomllib.loads(text).items()}
    assert table == read
    assert [type(value) for value in table.values()] == [type(value) for value in read.values()]


@given(st.text(st.characters()))
def test_a_comment_is_one_line_whatever_is_in_it(words: str) -> None:
    assert {"after": 1} == tomllib.loads(toml.comment(words) + "after = 1\n")


def test_halves_of_characters_become_a_sign_for_them() -> None:
    assert {"a": "\ufffd!"} == tomllib.loads(toml.pair("a", "\ud800!"))


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_no_manifest_can_hold_these(number: float) -> None:
    with pytest.raises(ValueError, match="cannot be written"):
        toml.scalar(number)


# -- every class ----------------------------------------------------------------------------------------------
def default_of(spec: list[Any]) -> Any:
    """A value for an input of a node: its default, else something of its type; None for a connection."""
    more = spec[1] if len(spec) > 1 else {}
    choices = spec[0] if isinstance(spec[0], list) else more.get("options")
    if "default" in more:
        return more["default"]
    if choices is not None:
        return choices[0] if choices else "file.png"
    return {"INT": more.get("min", 0), "FLOAT": more.get("max", 1), "STRING": "words", "BOOLEAN": True}.get(
        spec[0]
    )


def exposing_all(graph: Graph, info: dict[str, Any] | None) -> Proposal | None:
    """A proposal with every input of node 1 that can be one; None where nothing can."""
    exposed = []
    for name in graph["1"]["inputs"]:
        try:
            propose(graph, info, expose=[f"1.{name}"])
        except CannotImport:
            continue
        exposed.append(f"1.{name}")
    try:
        return propose(graph, info, expose=exposed)
    except CannotImport:
        assert not exposed
        return None


@pytest.mark.parametrize("described", [True, False], ids=["described", "guessed"])
@pytest.mark.parametrize("class_type", object_info())
def test_every_class_passes_its_own_check(class_type: str, described: bool, tmp_path: Path) -> None:
    info = object_info()
    sections = info[class_type]["input"]
    specs = {**sections.get("required", {}), **sections.get("optional", {})}
    values = {name: default_of(spec) for name, spec in specs.items()}
    graph = {
        "1": node(class_type, **{name: value for name, value in values.items() if value is not None}),
        "2": node("SaveImage", images=["1", 0], filename_prefix="x"),
    }

    proposal = exposing_all(graph, info if described else None)

    if proposal:
        _, binder = written(proposal, tmp_path)
        assert () == binder.unbound


# -- anything that a custom node may say -----------------------------------------------------------------------
ANY = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
NUMBER = st.integers(-(2**70), 2**70) | st.floats() | st.sampled_from([0, 1, 2**64 - 1, 2**63, -1, 0.5])
SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "default": ANY,
        "min": NUMBER | ANY,
        "max": NUMBER | ANY,
        "step": NUMBER | ANY,
        "tooltip": ANY,
        "multiline": st.booleans(),
        "options": st.lists(ANY, max_size=4) | ANY,
        "control_after_generate": st.booleans(),
        "image_upload": st.booleans(),
        "video_upload": st.booleans(),
    },
)
TYPE = st.sampled_from(
    ["INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "IMAGE", "*", "INT,FLOAT", ""]
) | st.lists(ANY, max_size=5)
SPEC = st.tuples(TYPE, SETTINGS).map(list) | st.tuples(TYPE).map(list) | ANY
VALUE = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    st.sampled_from(["x.safetensors", "../../x.ckpt", "a.png", 16, 20, 81, 1.5, 640]),
)
NUMBERS = ["seed", "noise_seed", "steps", "cfg", "shift", "length", "fps", "width", "height", "denoise"]
OTHERS = [
    "start_at_step",
    "end_at_step",
    "text",
    "negative_prompt",
    "image",
    "file",
    "ckpt_name",
    "value",
    "ü .x",
]
NAMES = st.sampled_from([*NUMBERS, *OTHERS])
TITLE = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
NODE = st.fixed_dictionaries({"inputs": st.dictionaries(NAMES, VALUE, max_size=6), "title": TITLE})
CLASSES = ["A", "PrimitiveInt", "B\n"]


@st.composite
def workflows(draw: st.DrawFn) -> tuple[Graph, dict[str, Any] | None]:
    """A chain of nodes of a few classes into a node that saves, and what a server may say of the classes."""
    graph: Graph = {}
    before: str | None = None
    for id_ in draw(st.lists(st.sampled_from(["1", "2", "3:4", "5.6", "x"]), min_size=1, unique=True)):
        made = draw(NODE)
        linked = {} if before is None else {draw(NAMES | st.just("images")): [before, 0]}
        class_type = draw(st.sampled_from(CLASSES))
        graph[id_] = node(class_type, made["title"], **{**made["inputs"], **linked})
        before = id_
    graph["end"] = node("SaveImage", images=[before, 0], filename_prefix="x")
    if draw(st.booleans()):
        return graph, None
    sections = st.fixed_dictionaries(
        {"required": st.fixed_dictionaries({}, optional=dict.fromkeys([*NUMBERS, *OTHERS], SPEC))},
        optional={"optional": ANY},
    )
    outputs = st.lists(st.sampled_from(["INT", "LATENT", "IMAGE"]) | ANY, max_size=2)
    described = st.fixed_dictionaries({"input": sections}, optional={"output": outputs | ANY})
    strange = ANY | st.fixed_dictionaries({"input": ANY | st.fixed_dictionaries({"required": ANY})})
    info = {class_type: draw(st.one_of(described, described, described, strange)) for class_type in CLASSES}
    return graph, info | {"SaveImage": object_info()["SaveImage"]}


@settings(max_examples=150, deadline=None)
@given(workflows(), st.data())
def test_whatever_a_pack_says_the_manifest_passes_its_own_check(
    made: tuple[Graph, dict[str, Any] | None], data: st.DataObject
) -> None:
    graph, info = made
    every = [f"{id_}.{name}" for id_, one in graph.items() for name in one["inputs"] if name != "images"]
    exposed = data.draw(st.lists(st.sampled_from(every), max_size=3, unique=True))
    try:
        proposal = propose(graph, info, expose=exposed)
    except CannotImport as error:
        event(str(error)[:20])
        return
    event(f"{min(3, len(proposal.fields))} fields or more, {'described' if info else 'guessed'}")

    with tempfile.TemporaryDirectory() as folder:
        _, binder = written(proposal, Path(folder))
        assert () == binder.unbound


# -- official workflows -----------------------------------------------------------------------------------------
@pytest.fixture(scope="module", params=TEMPLATES)
def imported(request: pytest.FixtureRequest) -> tuple[str, Proposal]:
    pages = template(request.param)
    graph, _ = convert(request.param, pages, object_info())
    return request.param, propose(graph, object_info(), workflow=pages)


def test_official_workflows_have_the_inputs_that_people_change(
    imported: tuple[str, Proposal], tmp_path: Path
) -> None:
    name, proposal = imported
    image = {
        "video_wan2_2_14B_flf2v": ["start_image", "end_image"],
        "video_wan_vace_14B_ref2v": ["reference_image"],
        "image_to_video_wan": ["start_image"],
        "text_to_video_wan": [],
    }[name]

    model, binder = written(proposal, tmp_path)

    numbers = ["frames", "fps", "seed", "steps", "guidance", "shift"]
    wanted = [*image, "prompt", "negative_prompt", "resolution", *numbers]
    assert wanted == [field.role for field in proposal.fields]
    assert () == binder.unbound
    assert "video" == proposal.output
    assert all(weight.source and weight.path and weight.folder for weight in proposal.weights)
    assert len(proposal.loras) == (2 if "flf2v" in name else 1)
    findings = audit(model, (), Holdings("a server without weights", nodes=object_info()))
    assert {("error", "missing_weights")} == {(one.severity, one.kind) for one in findings}


def test_first_last_frame_is_bound_as_its_two_experts_need(tmp_path: Path) -> None:
    pages = template("video_wan2_2_14B_flf2v")
    graph, _ = convert("flf2v", pages, object_info())

    proposal = propose(graph, object_info(), workflow=pages)

    assert {
        ("74", "shift"): "shift",
        ("84", "end_at_step"): "steps // 2",
        ("87", "steps"): "steps",
        ("87", "cfg"): "guidance",
        ("87", "start_at_step"): "steps // 2",
    } == proposal.bindings
    names = {field.role: field.name for field in proposal.fields}
    assert ("80_image", "89_image", "90_text", "78_text", "84_noise_seed") == tuple(
        names[role] for role in ("start_image", "end_image", "prompt", "negative_prompt", "seed")
    )


def test_loras_are_an_input_once_their_lines_are_no_comments(tmp_path: Path) -> None:
    proposal = propose(text_to_image(), object_info())
    folder = tmp_path / "local" / "x"
    folder.mkdir(parents=True)
    files = files_of(proposal, id_="local/x", name="X", source="x.json")
    begin = files["model.toml"].index("# [[inputs]]")
    end = files["model.toml"].index("\n\n", begin)
    lines = files["model.toml"][begin:end].replace("# ", "")
    files["model.toml"] = files["model.toml"][:begin] + lines + files["model.toml"][end:]
    for name, text in files.items():
        (folder / name).write_text(text, "utf-8")

    model = load_entry(folder, tmp_path).model

    assert "loras" == model.inputs[-1].type


def test_graph_and_sample_are_written_to_be_read() -> None:
    files = files_of(propose(text_to_image(), object_info()), id_="local/x", name="X", source="x.json")

    graph = json.loads(files["graph.json"])
    assert {"title": "KSampler"} == graph["3"]["_meta"]
    assert (8.0, float) == (graph["3"]["inputs"]["cfg"], type(graph["3"]["inputs"]["cfg"]))
    assert "\n  " in files["graph.json"]
    assert {"6_text": "a lighthouse in a storm"} == json.loads(files["sample.json"])


def test_names_of_files_and_titles_cannot_break_out_of_a_comment() -> None:
    graph = text_to_image()
    graph["3"]["_meta"] = {"title": "A\nname = 'broken'\n[price]"}

    text = manifest_of(propose(graph, object_info()), id_="local/x", name="X", source='"\nx = 1\n.json')

    table = tomllib.loads(text)
    assert ("X", {"base_usd": 0.0, "unit": "output"}) == (table["name"], table["price"])
    assert "x" not in table
