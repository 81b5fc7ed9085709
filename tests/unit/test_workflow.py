"""A model's workflow: graphs that are none, tables that are wrong, variants; each named with file, key and fix."""

import json
from pathlib import Path
from typing import Any

import pytest

from rushes.catalog.load import Catalog, load_entry
from rushes.catalog.manifest import read_manifest
from rushes.catalog.model import Model
from rushes.catalog.workflow import (
    NodePack,
    NotAGraph,
    Weight,
    Workflow,
    as_graph,
    has_workflow,
    read_graph,
    variant_names,
    workflow_of,
)
from rushes.errors import ManifestError

HEAD = """
name = "Mine"
output = "video"
"""
INPUTS = """
[[inputs]]
name = "6_text"
title = "Prompt"
type = "string"
role = "prompt"
default = "a fox"

[[inputs]]
name = "57_steps"
title = "Steps"
type = "integer"
role = "steps"
minimum = 4
maximum = 20
default = 8
"""
GRAPH: dict[str, Any] = {
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "", "clip": ["38", 0]}},
    "38": {"class_type": "CLIPLoader", "inputs": {"clip_name": "umt5"}},
    "57": {"class_type": "KSamplerAdvanced", "inputs": {"steps": 20, "positive": ["6", 0]}},
    "61": {"class_type": "SaveVideo", "inputs": {"video": ["57", 0]}, "_meta": {"title": "Save"}},
}
WEIGHT = """
[[engines.comfyui.weights]]
file = "wan/high.safetensors"
folder = "diffusion_models"
source = "Comfy-Org/Wan_2.2_ComfyUI_Repackaged"
path = "split_files/high.safetensors"
bytes = 14294736160
sha256 = "0123456789abcdefABCDEF0123456789abcdef0123456789abcdef0123456789"
licence = "Apache-2.0"
"""
PACK = """
[[engines.comfyui.node_packs]]
name = "ComfyUI-WanVideoWrapper"
source = "https://github.com/kijai/ComfyUI-WanVideoWrapper"
nodes = ["WanVideoSampler"]
"""


def write(root: Path, table: str, *, top: str = 'graph = "graph.json"', **graphs: Any) -> Path:
    folder = root / "me" / "mine"
    folder.mkdir(parents=True)
    (folder / "model.toml").write_text(f"{top}\n{HEAD}{INPUTS}{table}", "utf-8")
    for name, graph in {"graph": GRAPH, **graphs}.items():
        if graph is not None:
            text = graph if isinstance(graph, str) else json.dumps(graph)
            (folder / f"{name}.json").write_text(text, "utf-8")
    return folder


def read(root: Path, table: str, **kwargs: Any) -> Model:
    return read_manifest(write(root, table, **kwargs), root)


def wrong(root: Path, table: str, **kwargs: Any) -> ManifestError:
    folder = write(root, table, **kwargs)
    with pytest.raises(ManifestError) as caught:
        load_entry(folder, root)
    assert str(folder) == str(Path(caught.value.file).parent)
    return caught.value


# -- what is right ------------------------------------------------------------------------------------------
def test_a_whole_table(tmp_path: Path) -> None:
    table = comfyui('outputs = ["61"]\nloras = ["38"]') + bindings('"57.steps" = "steps + 1"')
    folder = write(tmp_path, f"{table}{WEIGHT}{PACK}")
    model = load_entry(folder, tmp_path).model

    workflow = workflow_of(model)

    assert (
        Workflow(
            graph="graph.json",
            bindings={"57.steps": "steps + 1"},
            outputs=("61",),
            loras=("38",),
            weights=(
                Weight(
                    "wan/high.safetensors",
                    "diffusion_models",
                    "Comfy-Org/Wan_2.2_ComfyUI_Repackaged",
                    "split_files/high.safetensors",
                    14294736160,
                    "0123456789abcdefABCDEF0123456789abcdef0123456789abcdef0123456789",
                    "Apache-2.0",
                ),
            ),
            node_packs=(
                NodePack(
                    "ComfyUI-WanVideoWrapper",
                    "https://github.com/kijai/ComfyUI-WanVideoWrapper",
                    ("WanVideoSampler",),
                ),
            ),
        )
        == workflow
    )
    assert GRAPH == read_graph(model, workflow)


def test_a_graph_alone_is_a_workflow(tmp_path: Path) -> None:
    model = load_entry(write(tmp_path, ""), tmp_path).model

    assert (True, (), Workflow(graph="graph.json")) == (
        has_workflow(model),
        variant_names(model),
        workflow_of(model, ("lite",)),
    )


def test_the_tables_graph_wins(tmp_path: Path) -> None:
    other = {"1": {"class_type": "EmptyImage", "inputs": {}}}
    model = read(tmp_path, '[engines.comfyui]\ngraph = "other.json"\n', other=other)

    assert other == read_graph(model, workflow_of(model))


def test_a_model_without_a_graph_is_right_but_does_not_run_on_comfyui(tmp_path: Path) -> None:
    model = load_entry(write(tmp_path, "", top=""), tmp_path).model

    assert not has_workflow(model)
    with pytest.raises(
        ManifestError, match="me/mine has no workflow, so ComfyUI cannot run it: add one"
    ) as caught:
        workflow_of(model)
    assert "graph" == caught.value.key


def test_every_built_in_model_has_a_workflow() -> None:
    entries = Catalog.load().entries()

    assert 4 == len(entries)
    for entry in entries:
        for variant in ("", *variant_names(entry.model)):
            workflow = workflow_of(entry.model, (variant,))
            assert set(workflow.outputs) <= read_graph(entry.model, workflow).keys()


# -- variants -----------------------------------------------------------------------------------------------
VARIANTS = """
[engines.comfyui]
outputs = ["61"]
[engines.comfyui.bindings]
"57.steps" = "steps + 1"
[engines.comfyui.variants.lite]
outputs = []
loras = ["38"]
[engines.comfyui.variants.wrapper]
graph = "wrapper.json"
outputs = ["1"]
[engines.comfyui.variants.wrapper.bindings]
"1.steps" = "steps"
"""
WRAPPER = {"1": {"class_type": "WanVideoSampler", "inputs": {"steps": 4}}}


def test_a_variant_replaces_whole_keys(tmp_path: Path) -> None:
    model = load_entry(write(tmp_path, VARIANTS, wrapper=WRAPPER), tmp_path).model
    plain = Workflow(graph="graph.json", outputs=("61",), bindings={"57.steps": "steps + 1"})
    lite = Workflow(graph="graph.json", loras=("38",), bindings={"57.steps": "steps + 1"})
    wrapper = Workflow(graph="wrapper.json", outputs=("1",), bindings={"1.steps": "steps"})

    assert ("lite", "wrapper") == variant_names(model)
    assert plain == workflow_of(model)
    assert plain == workflow_of(model, ("unknown",))
    assert lite == workflow_of(model, ("lite",))
    assert wrapper == workflow_of(model, ("unknown", "wrapper", "lite"))
    assert WRAPPER == read_graph(model, wrapper)


def test_a_model_of_variants_only(tmp_path: Path) -> None:
    table = '[engines.comfyui.variants.wrapper]\ngraph = "wrapper.json"\n'
    model = load_entry(write(tmp_path, table, top="", graph=None, wrapper=WRAPPER), tmp_path).model

    assert has_workflow(model)
    assert Workflow(graph="wrapper.json") == workflow_of(model, ("wrapper",))
    with pytest.raises(
        ManifestError, match="has a workflow only as wrapper: name one of them in RUSHES_COMFYUI"
    ):
        workflow_of(model)


# -- tables that are wrong ----------------------------------------------------------------------------------
def comfyui(text: str) -> str:
    return f"[engines.comfyui]\n{text}\n"


def bindings(text: str) -> str:
    return f"[engines.comfyui.bindings]\n{text}\n"


T = "engines.comfyui"


@pytest.mark.parametrize(
    ("table", "key", "problem"),
    [
        (comfyui('output = ["61"]'), f"{T}.output", "there is no such key; did you mean outputs?"),
        (comfyui("outputs = 61"), f"{T}.outputs", "Expected `array`, got `int`"),
        (comfyui("outputs = [61]"), f"{T}.outputs[0]", "Expected `str`, got `int`"),
        (comfyui('outputs = ["62"]'), f"{T}.outputs", "there is no node '62' in the graph; did you mean 6?"),
        (comfyui('loras = ["x"]'), f"{T}.loras", "there is no node 'x' in the graph; known are 6, 38, 57, 61"),
        (comfyui('outputs = ["61", "61"]'), f"{T}.outputs", "node '61' stands here twice"),
        (comfyui("graph = 5"), f"{T}.graph", "Expected `str`, got `int`"),
        (comfyui('graph = "none.json"'), f"{T}.graph", "none.json cannot be read: No such file"),
        (comfyui('graph = "../graph.json"'), f"{T}.graph", "must be the bare name of a file"),
        (comfyui('graph = ".."'), f"{T}.graph", "must be the bare name of a file"),
        (
            comfyui("variants = 5"),
            f"{T}.variants",
            "must be a table of tables: [engines.comfyui.variants.NAME]",
        ),
        (comfyui("[engines.comfyui.variants]\na = 5"), f"{T}.variants.a", "must be a table: ["),
        (bindings('57.steps = "steps"'), f"{T}.bindings.57", 'the whole name in quotes: "57.steps" = …'),
        (bindings('"57.steps" = 20'), f'{T}.bindings."57.steps"', 'stands in quotes: "57.steps" = "20"'),
        (bindings('"57.steps" = true'), f'{T}.bindings."57.steps"', '"57.steps" = "True"'),
        (bindings('"57.steps" = "stepss"'), f'{T}.bindings."57.steps"', "did you mean steps?"),
        (
            bindings('"57.cfg" = "steps"'),
            f'{T}.bindings."57.cfg"',
            "node 57 (KSamplerAdvanced) has no input 'cfg'",
        ),
        (bindings('"57.steps" = "8 // (steps - 8)"'), f"{T}.bindings", "cannot be computed from 57_steps"),
        (bindings('"57.steps" = "8 // (steps - 4)"'), f"{T}.bindings", "division or modulo by zero"),
        (bindings('"57.steps" = "8 // (steps - 20)"'), f"{T}.bindings", "division or modulo by zero"),
        (
            "[engines.comfyui.variants.lite]\noutput = []\n",
            f"{T}.variants.lite.output",
            "did you mean outputs?",
        ),
        (
            '[engines.comfyui.variants.lite.bindings]\n"57.step" = "1"\n',
            f'{T}.variants.lite.bindings."57.step"',
            "did you mean steps?",
        ),
        (
            '[engines.comfyui.variants.lite]\noutputs = ["9"]\n',
            f"{T}.variants.lite.outputs",
            "there is no node '9'",
        ),
        (
            f'{bindings("")}[engines.comfyui.variants.lite]\ngraph = "none.json"\n',
            f"{T}.variants.lite.graph",
            "none.json cannot be read",
        ),
        (WEIGHT.replace("licence", "license"), f"{T}.weights[0].license", "did you mean licence?"),
        (WEIGHT.replace("wan/high", "../high"), f"{T}.weights[0].file", 'leads out of its folder with ".."'),
        (WEIGHT.replace('"diffusion_models"', '""'), f"{T}.weights[0].folder", "'' is empty"),
        (WEIGHT.replace("diffusion", "/diffusion"), f"{T}.weights[0].folder", "begins with a slash"),
        (WEIGHT.replace("split_files/", "a//"), f"{T}.weights[0].path", "an empty part"),
        (WEIGHT.replace("14294736160", "0"), f"{T}.weights[0].bytes", "above 0"),
        (WEIGHT.replace("14294736160", '"x"'), f"{T}.weights[0].bytes", "Expected `int | null`, got `str`"),
        (WEIGHT.replace("ABCDEF", "ABCDEG"), f"{T}.weights[0].sha256", "64 hexadecimal digits"),
        (WEIGHT.replace("Comfy-Org/W", "W"), f"{T}.weights[0].source", "neither owner/repository nor an https"),
        (WEIGHT.replace("Comfy-Org/", "http://a.b/"), f"{T}.weights[0].source", "neither owner/repository"),
        (WEIGHT.replace('source = "Comfy', '# "'), f"{T}.weights[0].path", "name it under source"),
        (WEIGHT + WEIGHT, f"{T}.weights[1].file", "diffusion_models/wan/high.safetensors is listed twice"),
        (WEIGHT.replace("file =", "#"), f"{T}.weights[0]", "missing required field `file`"),
        (PACK.replace("https", "http"), f"{T}.node_packs[0].source", "must be an https address"),
        (PACK.replace('"ComfyUI-WanVideoWrapper"', '" "'), f"{T}.node_packs[0].name", "give the pack's name"),
        (PACK.replace("nodes", "node"), f"{T}.node_packs[0].node", "did you mean nodes?"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, table: str, key: str, problem: str) -> None:
    error = wrong(tmp_path, table)

    assert (key, True) == (error.key, problem in error.problem), error.message


@pytest.mark.parametrize("table", ['[engines.comfyui]\noutputs = ["61"]\n', WEIGHT])
def test_a_table_without_a_graph_speaks_of_nothing(tmp_path: Path, table: str) -> None:
    error = wrong(tmp_path, table, top="")

    assert (f"{T}.graph", "name the file that these keys speak of") == (error.key, error.problem)


def test_bounds_between_whole_numbers_and_seeds_are_tried_as_requests_may_have_them(tmp_path: Path) -> None:
    seed = '[[inputs]]\nname = "s"\ntitle = "S"\ntype = "integer"\nrole = "seed"\nminimum = -1\ndefault = 1\n'
    table = seed + bindings('"57.steps" = "8 // (steps - 3) + 8 // (seed + 1)"')
    folder = write(tmp_path, table)
    file = folder / "model.toml"
    file.write_text(file.read_text().replace("minimum = 4\n", "minimum = 3.5\n"))

    assert () == Catalog.load(tmp_path).broken


def test_a_weights_source_may_be_an_address(tmp_path: Path) -> None:
    table = WEIGHT.replace("Comfy-Org/Wan_2.2_ComfyUI_Repackaged", "https://a.b/c.safetensors")
    model = read(tmp_path, table)

    assert "https://a.b/c.safetensors" == workflow_of(model).weights[0].source


# -- graphs that are none -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("graph", "problem"),
    [
        ("{", "this is not JSON: "),
        ("[1]", "must be a JSON object: export the workflow in ComfyUI's API format"),
        ("{}", "there is no node in it"),
        ({"last_node_id": 3, "nodes": [], "links": []}, "run `rushes models import` on it"),
        ({"prompt": GRAPH, "client_id": "x"}, 'keep only what stands under "prompt"'),
        ({"1": 5}, "node '1' is no JSON object"),
        ({"1": {}}, "node '1' has no class_type: export the workflow in ComfyUI's API format"),
        ({"1": {"class_type": "EmptyImage"}}, "node '1' (EmptyImage) has no table \"inputs\""),
        (
            {"1": {"class_type": "A", "inputs": {"a": ["2", 0]}}},
            "input 1.a is linked to node '2', which is not in",
        ),
        (
            {"1": {"class_type": "A", "inputs": {"a": [1, 0]}}},
            "input 1.a holds a list that is no link [node id in",
        ),
        ({"1": {"class_type": "A", "inputs": {"a": [1, 2, 3]}}}, 'is written {"__value__": [...]}'),
    ],
)
def test_a_graph_that_is_none_is_named(tmp_path: Path, graph: Any, problem: str) -> None:
    error = wrong(tmp_path, "", graph=graph)

    assert ("graph.json", "") == (Path(error.file).name, error.key)
    assert problem in error.problem


def test_lists_as_values_and_links_by_float_are_right() -> None:
    graph = {
        "1": {"class_type": "A", "inputs": {"a": {"__value__": [1, 2]}, "b": ["12:3", 0.0]}},
        "12:3": {"class_type": "B", "inputs": {}},
    }

    assert graph is as_graph(graph)
    with pytest.raises(NotAGraph, match="must be a JSON object"):
        as_graph([graph])


def test_a_graph_that_changes_is_read_again(tmp_path: Path) -> None:
    folder = write(tmp_path, "")
    catalog = Catalog.load(tmp_path)
    assert () == catalog.broken

    (folder / "graph.json").write_text("{}")
    catalog.refresh()

    assert ["graph.json"] == [Path(error.file).name for error in catalog.broken]
    assert "its last good version stays in use" in catalog.broken[0].problem


@pytest.mark.parametrize("options", [{"comfyui": {"outputs": 5}}, {"comfyui": {"variants": {"a": 5}}}])
def test_models_that_were_not_loaded_are_checked_as_well(options: dict[str, Any]) -> None:
    model = Model("a/b", "A", "", (), "image", (), (), Path("/models/a/b"), graph="g.json", options=options)

    with pytest.raises(ManifestError, match=r"^/models/a/b/model.toml: engines.comfyui"):
        workflow_of(model)
