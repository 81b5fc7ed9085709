"""From public inputs to node inputs: what binds by name, what by expression, and what is named as wrong."""

import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rushes.catalog.bindings import LONGEST_NAME, Binder, like, public_name, resolution_name
from rushes.catalog.manifest import _FIELD_NAME
from rushes.catalog.model import Input, Model
from rushes.catalog.roles import roles_of
from rushes.catalog.workflow import Graph, Workflow
from rushes.errors import EngineError, ManifestError

PROMPT = Input("6_text", "Prompt", "string", "prompt")
NEGATIVE = Input("7_text", "Negative", "string", "negative_prompt")
STEPS = Input("57_steps", "Steps", "integer", "steps", default=20)
SEED = Input("57_noise_seed", "Seed", "integer", "seed")
SIZE = Input("71_widthx71_height", "Size", "string", "resolution")
START = Input("62_image", "Start", "string", "start_image")
FRAMES = Input("67_length", "Frames", "integer", "frames")


def model(*inputs: Input) -> Model:
    return Model(
        id="my/model",
        name="Mine",
        description="",
        categories=(),
        output="video",
        inputs=inputs,
        required=(),
        folder=Path("/models/my/model"),
    )


def graph(**nodes: dict[str, Any]) -> Graph:
    """Nodes by id; ``n57`` is node "57"."""
    return {
        id_.removeprefix("n"): {"class_type": f"Class{id_}", "inputs": inputs} for id_, inputs in nodes.items()
    }


def wan() -> Graph:
    return graph(
        n6={"text": "a cat", "clip": ["38", 0]},
        n7={"text": "blurry", "clip": ["38", 0]},
        n38={"clip_name": "umt5"},
        n57={"steps": 20, "noise_seed": 0, "cfg": 4.0, "end_at_step": 10, "model": ["38", 0]},
        n58={"steps": 20, "cfg": 4.0, "start_at_step": 10},
        n62={"image": "end.png"},
        n67={"length": 81, "width": 640, "height": 640},
        n71={"width": 640, "height": 640},
    )


def bind(
    inputs: tuple[Input, ...],
    given_: dict[str, Any],
    bindings: dict[str, str] | None = None,
    *,
    nodes: Graph | None = None,
    files: dict[str, str] | None = None,
) -> Graph:
    ours = model(*inputs)
    binder = Binder(ours, Workflow(graph="g.json", bindings=bindings or {}), nodes or wan())
    return binder.bind(given_, roles_of(ours, given_), files or {})


def changed(before: Graph, after: Graph) -> dict[str, Any]:
    return {
        f"{id_}.{name}": value
        for id_, node in after.items()
        for name, value in node["inputs"].items()
        if value != before[id_]["inputs"][name]
    }


def wrong(inputs: tuple[Input, ...], bindings: dict[str, str], nodes: Graph | None = None) -> ManifestError:
    with pytest.raises(ManifestError) as caught:
        Binder(model(*inputs), Workflow(graph="g.json", bindings=bindings), nodes or wan())
    assert "/models/my/model/model.toml" == caught.value.file
    return caught.value


# -- by name ------------------------------------------------------------------------------------------------
def test_names_bind_by_themselves() -> None:
    ours = bind(
        (PROMPT, STEPS, SEED, SIZE, FRAMES),
        {
            "6_text": "x",
            "57_steps": 8,
            "57_noise_seed": 2**64 - 1,
            "71_widthx71_height": "540x960",
            "67_length": 5,
        },
    )

    assert {
        "6.text": "x",
        "57.steps": 8,
        "57.noise_seed": 2**64 - 1,
        "71.width": 540,
        "71.height": 960,
        "67.length": 5,
    } == changed(wan(), ours)


def test_a_resolution_over_two_nodes() -> None:
    field = Input("4_valuex3_value", "Size", "string", "resolution")
    ours = bind((field,), {field.name: "1024x576"}, nodes=graph(n3={"value": 1}, n4={"value": 1}))

    assert (576, 1024) == (ours["3"]["inputs"]["value"], ours["4"]["inputs"]["value"])


def test_a_resolution_as_a_text_of_one_node() -> None:
    field = Input("3_size", "Size", "string", "resolution")
    ours = bind((field,), {"3_size": "1024x576 (16:9)"}, nodes=graph(n3={"size": "64x64"}))

    assert "1024x576 (16:9)" == ours["3"]["inputs"]["size"]


def test_an_x_in_the_names_of_a_resolutions_inputs() -> None:
    field = Input("3_max_xx3_max_y", "Size", "string", "resolution")
    ours = bind((field,), {field.name: "1024x576"}, nodes=graph(n3={"max_x": 1, "max_y": 1}))

    assert {"max_x": 1024, "max_y": 576} == ours["3"]["inputs"]


def test_nodes_of_subgraphs() -> None:
    field = Input("12.3_text", "Prompt", "string", "prompt")
    ours = bind((field,), {"12.3_text": "x"}, nodes={"12:3": {"class_type": "C", "inputs": {"text": ""}}})

    assert "x" == ours["12:3"]["inputs"]["text"]


def test_a_file_has_the_name_that_comfyui_gave_it() -> None:
    ours = bind((START,), {"62_image": "https://a.b/c.png"}, files={"62_image": "rushes/1/in.png"})

    assert {"62.image": "rushes/1/in.png"} == changed(wan(), ours)


def test_a_file_that_comfyui_was_not_given_is_an_error() -> None:
    with pytest.raises(EngineError, match="62_image was not given to ComfyUI"):
        bind((START,), {"62_image": "https://a.b/c.png"})


def test_what_is_not_given_leaves_the_graph_alone() -> None:
    assert wan() == bind((PROMPT, STEPS, SIZE, START), {})


@pytest.mark.parametrize(
    ("expected", "node", "input_"),
    [
        ("57_steps", "57", "steps"),
        ("57_noise_seed", "57", "noise_seed"),
        ("12.3_text", "12:3", "text"),
        ("1_Width..px.", "1", "Width (px)"),
        ("_1_a", "-1", "a"),
        ("__a", "", "_a"),
    ],
)
def test_public_names(expected: str, node: str, input_: str) -> None:
    assert expected == public_name(node, input_)


@given(st.text(min_size=1, max_size=200), st.text(min_size=1, max_size=200))
def test_public_names_are_names_and_bind_back(node: str, input_: str) -> None:
    name = public_name(node, input_)
    field = Input(name, "X", "integer")
    ours = bind((field,), {name: 5}, nodes={node: {"class_type": "C", "inputs": {input_: 1}}})

    assert _FIELD_NAME.fullmatch(name)
    assert LONGEST_NAME >= len(name)
    assert 5 == ours[node]["inputs"][input_]


def test_the_name_of_a_resolution() -> None:
    assert "71_widthx71_height" == resolution_name(("71", "width"), ("71", "height"))


@pytest.mark.parametrize(
    ("inputs", "nodes", "key", "problem"),
    [
        (
            (Input("1_a_b", "A", "integer"),),
            {"1": {"class_type": "C", "inputs": {"a_b": 1}}, "1_a": {"class_type": "C", "inputs": {"b": 1}}},
            "inputs.1_a_b",
            "the name fits 1.a_b and 1_a.b; rename it",
        ),
        (
            (Input("1.2_a", "A", "integer"),),
            {"1:2": {"class_type": "C", "inputs": {"a": 1}}, "1.2": {"class_type": "C", "inputs": {"a": 1}}},
            "inputs.1.2_a",
            "the name fits 1:2.a and 1.2.a; rename it",
        ),
        (
            (SIZE, Input("71_width", "W", "integer")),
            {"71": {"class_type": "C", "inputs": {"width": 1, "height": 1}}},
            "inputs.71_width",
            "71_widthx71_height and 71_width set the same node input, 71.width; rename it",
        ),
        (
            (Input("1_axb_cxd_e", "S", "string", "resolution"),),
            {
                "1": {"class_type": "C", "inputs": {"a": 1, "axb_c": 1}},
                "b": {"class_type": "C", "inputs": {"cxd_e": 1}},
                "d": {"class_type": "C", "inputs": {"e": 1}},
            },
            "inputs.1_axb_cxd_e",
            "the name fits 1.axb.cxd_e and 1.axb_cxd.e; rename it",
        ),
    ],
)
def test_names_that_fit_twice_are_errors(
    inputs: tuple[Input, ...], nodes: Graph, key: str, problem: str
) -> None:
    error = wrong(inputs, {}, nodes)

    assert (key, True) == (error.key, problem in error.problem), error.problem
    assert "say what it sets in [engines.comfyui.bindings]" in error.problem


def test_a_name_that_fits_twice_can_be_bound_by_expressions() -> None:
    nodes = {"1": {"class_type": "C", "inputs": {"a_b": 1}}, "1_a": {"class_type": "C", "inputs": {"b": 1}}}
    ours = bind(
        (Input("1_a_b", "A", "integer"),),
        {"1_a_b": 9},
        {"1.a_b": "input['1_a_b']", "1_a.b": "input['1_a_b'] + 1"},
        nodes=nodes,
    )

    assert (9, 10) == (ours["1"]["inputs"]["a_b"], ours["1_a"]["inputs"]["b"])


# -- by expression ------------------------------------------------------------------------------------------
def test_one_input_fans_out() -> None:
    ours = bind(
        (STEPS,),
        {"57_steps": 9},
        {"58.steps": "steps", "57.end_at_step": "steps // 2", "58.start_at_step": "input['57_steps'] // 2"},
    )

    assert {"57.steps": 9, "58.steps": 9, "57.end_at_step": 4, "58.start_at_step": 4} == changed(wan(), ours)


def test_an_expression_wins_over_a_name_and_over_a_link() -> None:
    ours = bind((PROMPT, STEPS), {"57_steps": 9, "6_text": "x"}, {"57.steps": "steps * 2", "6.clip": "prompt"})

    assert {"57.steps": 18, "6.text": "x", "6.clip": "x"} == changed(wan(), ours)


def test_sizes_and_files_have_names() -> None:
    ours = bind(
        (SIZE, START),
        {"71_widthx71_height": "540x960", "62_image": "data:…"},
        {
            "67.width": "round_up(width, 16)",
            "67.height": "height",
            "6.text": "start_image",
            "7.text": "input['62_image']",
        },
        files={"62_image": "rushes/a.png"},
    )

    names = {"62.image": "rushes/a.png", "6.text": "rushes/a.png", "7.text": "rushes/a.png"}
    assert {"67.width": 544, "67.height": 960, "71.width": 540, "71.height": 960, **names} == changed(
        wan(), ours
    )


def test_the_first_reference_image_given_has_the_role() -> None:
    pictures = tuple(Input(f"r{n}", "R", "string", "reference_image") for n in range(3))
    ours = bind(
        pictures,
        {"r1": "x", "r2": "y"},
        {"62.image": "reference_image"},
        files={"r2": "two.png", "r1": "one.png"},
    )

    assert {"62.image": "one.png"} == changed(wan(), ours)


def test_a_binding_with_a_value_that_is_not_there_is_skipped() -> None:
    bindings = {"7.text": "negative_prompt", "6.text": "prompt + negative_prompt", "58.cfg": "float(steps)"}

    assert wan() == bind((PROMPT, NEGATIVE, STEPS), {}, bindings)
    assert {"58.cfg": 3.0, "57.steps": 3} == changed(
        wan(), bind((PROMPT, NEGATIVE, STEPS), {"57_steps": 3}, bindings)
    )


def test_a_random_seed_is_drawn_for_every_graph() -> None:
    drawn = iter((11, 12))
    workflow = Workflow(graph="g.json", bindings={"57.noise_seed": "random_seed"})
    binder = Binder(model(PROMPT), workflow, wan(), draw_seed=lambda low, high: next(drawn))
    seeds = [binder.bind({}, {}, {})["57"]["inputs"]["noise_seed"] for _ in range(2)]
    system = {
        bind((PROMPT,), {}, {"57.noise_seed": "random_seed"})["57"]["inputs"]["noise_seed"] for _ in range(20)
    }

    assert [11, 12] == seeds
    assert 20 == len(system)
    assert all(0 <= seed < 2**53 for seed in system)


def test_dots_in_node_ids_and_input_names() -> None:
    nodes: Graph = {
        "1.2": {"class_type": "C", "inputs": {"a.b": 1}},
        "1": {"class_type": "C", "inputs": {"c": 1}},
    }
    ours = bind((STEPS,), {"57_steps": 7}, {"1.2.a.b": "steps", "1.c": "steps"}, nodes=nodes)

    assert (7, 7) == (ours["1.2"]["inputs"]["a.b"], ours["1"]["inputs"]["c"])


@pytest.mark.parametrize(
    ("key", "expression", "problem"),
    [
        ("57", "steps", 'a binding\'s name is "NODE.INPUT"'),
        ("59.steps", "steps", "there is no node '59' in the graph; an input steps is in 57, 58"),
        ("59.zzz", "steps", "there is no node '59' in the graph; no node has an input zzz"),
        ("57.step", "steps", "node 57 (Classn57) has no input 'step' in the graph; did you mean steps?"),
        ("57.steps", "step", "there is no name step here; did you mean steps?"),
        ("57.steps", "guidance", "there is no name guidance here; known are prompt, steps"),
        ("57.steps", "width", "there is no name width here"),
        ("57.steps", "input['57_step']", "there is no public input '57_step'; did you mean 57_steps?"),
        ("57.steps", "input['loras']", "there is no public input 'loras'"),
        ("57.steps", "loras", "there is no name loras here"),
        ("57.steps", "steps +", "is no expression: invalid syntax"),
        ("57.steps", "steps.real", "an attribute"),
    ],
)
def test_wrong_bindings_are_named(key: str, expression: str, problem: str) -> None:
    error = wrong((PROMPT, STEPS, Input("loras", "L", "loras", "loras")), {key: expression})

    assert f'engines.comfyui.bindings."{key}"' == error.key
    assert problem in error.problem


def test_a_name_that_dots_make_unclear_is_an_error() -> None:
    nodes: Graph = {
        "1.2": {"class_type": "C", "inputs": {"a": 1}},
        "1": {"class_type": "C", "inputs": {"2.a": 1}},
    }

    assert "the nodes 1 and 1.2" in wrong((STEPS,), {"1.2.a": "steps"}, nodes).problem


def test_an_expression_without_a_value_names_inputs_and_node() -> None:
    with pytest.raises(EngineError) as caught:
        bind((STEPS,), {"57_steps": 6}, {"58.steps": "100 // (steps - 6)"})

    assert ("binding_failed", "58", False) == (caught.value.reason, caught.value.node, caught.value.retryable)
    assert (
        "58.steps of the workflow cannot be computed from 57_steps, as 100 // (steps - 6): "
        "integer division or modulo by zero." == caught.value.message
    )


# -- what reaches what --------------------------------------------------------------------------------------
def test_targets_and_unbound_inputs() -> None:
    other = Input("9_sampler", "S", "string")
    loras = Input("loras", "L", "loras", "loras")
    workflow = Workflow(
        graph="g.json", bindings={"58.steps": "steps", "57.noise_seed": "1", "67.width": "width"}
    )
    ours = Binder(model(STEPS, SEED, SIZE, other, loras), workflow, wan())

    assert {
        "57_steps": (("57", "steps"), ("58", "steps")),
        "71_widthx71_height": (("71", "width"), ("71", "height"), ("67", "width")),
    } == ours.targets
    assert ("57_noise_seed", "9_sampler", "loras") == ours.unbound


def test_loras_reach_the_nodes_that_the_workflow_names() -> None:
    ours = Binder(model(Input("loras", "L", "loras", "loras")), Workflow(graph="g.json", loras=("38",)), wan())

    assert ((), {}) == (ours.unbound, ours.targets)
    value = [{"path": "a", "scale": 1.0}]
    assert wan() == ours.bind({"loras": value}, {"loras": value}, {})


def test_a_list_never_becomes_a_link() -> None:
    """A LoRA field whose name fits a node input sets nothing by that name."""
    field = Input("57_cfg", "L", "loras", "loras")

    assert wan() == bind((field,), {"57_cfg": [{"path": "a", "scale": 1.0}]})


# -- kinds of values ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("expected", "value", "before"),
    [
        (8, 8.0, 20),
        (7.5, 7.5, 8),
        (4.0, 4, 1.0),
        (2**63 + 1, 2**63 + 1, 1.0),  # no float is that number
        (1, True, 0),
        (True, True, False),
        (1, 1, False),
        ("16", 16, "24"),
        ("2.5", 2.5, ""),
        (True, True, "x"),
        ("x", "x", 5),
        (8.0, 8.0, ["4", 0]),
        (8, 8, None),
    ],
)
def test_values_keep_the_graphs_kind_where_nothing_is_lost(expected: Any, value: Any, before: Any) -> None:
    ours = like(value, before)

    assert (expected, type(expected)) == (ours, type(ours))


PLAIN = (
    st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
)
INPUTS = st.dictionaries(st.text("abc_.:x", min_size=1, max_size=4), PLAIN, min_size=1, max_size=4)
GRAPHS = st.dictionaries(st.text("12:.a", min_size=1, max_size=3), INPUTS, min_size=1, max_size=5).map(
    lambda nodes: {id_: {"class_type": "C", "inputs": inputs} for id_, inputs in nodes.items()}
)


def same(left: Any, right: Any) -> bool:
    return bool(left == right) and type(left) is type(right)


@given(GRAPHS, st.data())
def test_whatever_is_bound(nodes: Graph, data: st.DataObject) -> None:
    """The graph that was given stays; targets hold the value, all else is as it was; order does not matter."""
    targets = [(id_, name) for id_, node in nodes.items() for name in node["inputs"]]
    by_key: dict[str, list[tuple[str, str]]] = {}
    for id_ in nodes:
        for name in nodes[id_]["inputs"]:
            by_key.setdefault(f"{id_}.{name}", []).append((id_, name))
    clear = [key for key, found in by_key.items() if 1 == len(found)]
    keys = data.draw(st.lists(st.sampled_from(clear), unique=True) if clear else st.just([]))
    fields = [Input(f"f{n}", "F", "string") for n in range(3)]
    values = {f"f{n}": data.draw(PLAIN) for n in range(2)}  # f2 is never given
    chosen = {key: data.draw(st.sampled_from([field.name for field in fields])) for key in keys}
    bindings = {key: f"input['{name}']" for key, name in chosen.items()}
    before = copy.deepcopy(nodes)

    first = Binder(model(*fields), Workflow(bindings=bindings), nodes).bind(values, {}, {})
    shuffled = data.draw(st.permutations(list(bindings.items())))
    back = dict(reversed(values.items()))
    second = Binder(model(*reversed(fields)), Workflow(bindings=dict(shuffled)), nodes).bind(back, {}, {})

    assert repr(before) == repr(nodes)
    assert repr(first) == repr(second)
    expected = {by_key[key][0]: values[name] for key, name in chosen.items() if name in values}
    for id_, name in targets:
        old, new = nodes[id_]["inputs"][name], first[id_]["inputs"][name]
        assert same(like(expected[id_, name], old) if (id_, name) in expected else old, new)
    first_node = next(iter(first.values()))
    first_node["inputs"].clear()
    assert repr(before) == repr(nodes)


def test_numbers_beyond_what_json_holds_stay_floats() -> None:
    assert 2**62 == like(float(2**62), 1)
    made = like(1e30, 1)
    assert (1e30, float) == (made, type(made))
