"""Every way in which a model folder can be wrong is named with file, key and fix."""

import re
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest

from rushes.catalog.bindings import NUMBER_ROLES, RANDOM_SEED, Binder
from rushes.catalog.expressions import FUNCTIONS
from rushes.catalog.load import load_entry, load_model
from rushes.catalog.manifest import _Manifest
from rushes.catalog.model import FILE_ROLES, Input, Price, Role
from rushes.catalog.roles import roles_of
from rushes.catalog.workflow import NodePack, Weight, Workflow, read_graph, workflow_of
from rushes.errors import ManifestError

HEAD = """
name = "Mine"
categories = ["text-to-video"]
output = "video"
required = ["prompt"]
"""
PROMPT = """
[[inputs]]
name = "prompt"
title = "Prompt"
type = "string"
role = "prompt"
default = "a fox"
"""


def field(keys: str, *, name: str = "x", type_: str = "integer") -> str:
    return f'{HEAD}{PROMPT}\n[[inputs]]\nname = "{name}"\ntitle = "X"\ntype = "{type_}"\n{keys}\n'


def write(root: Path, text: str, id_: str = "me/mine", **files: str) -> Path:
    folder = root / id_
    folder.mkdir(parents=True)
    (folder / "model.toml").write_text(text, "utf-8")
    for name, content in files.items():
        (folder / f"{name}.json").write_text(content, "utf-8")
    return folder


def wrong(folder: Path, root: Path) -> ManifestError:
    with pytest.raises(ManifestError) as caught:
        load_model(folder, root)
    return caught.value


def test_a_whole_manifest(tmp_path: Path) -> None:
    text = f"""
name = "Mine"
description = "D"
categories = ["a", "b"]
output = "video"
required = ["prompt"]
time_limit = 60
graph = "graph.json"

[price]
base_usd = 0.25
unit = "second"
note = "N"

[engines.comfy]
checkpoint = "wan.safetensors"
{PROMPT}
[[inputs]]
name = "size"
title = "Size"
type = "string"
role = "resolution"
enum = ["64x64 (1:1)", "128:64 (2:1)"]
default = "128:64 (2:1)"

[[inputs]]
name = "cfg"
title = "CFG"
description = "How strictly."
type = "float"
role = "guidance"
minimum = 0.5
maximum = 10
default = 4
"""
    folder = write(
        tmp_path, text, graph='{"1": {"class_type": "EmptyImage", "inputs": {}}}', sample='{"prompt": "an owl"}'
    )

    model = load_model(folder, tmp_path)

    assert ("me/mine", "Mine", "D", ("a", "b"), "video") == (
        model.id,
        model.name,
        model.description,
        model.categories,
        model.output,
    )
    assert (("prompt",), 60.0, "graph.json", folder) == (
        model.required,
        model.time_limit,
        model.graph,
        model.folder,
    )
    assert Price(0.25, "second", "N") == model.price
    assert {"comfy": {"checkpoint": "wan.safetensors"}} == model.options
    assert {"prompt": "an owl"} == model.sample
    assert Input("prompt", "Prompt", "string", "prompt", default="a fox") == model.inputs[0]
    assert (
        Input(
            "cfg", "CFG", "float", "guidance", description="How strictly.", minimum=0.5, maximum=10, default=4
        )
        == model.inputs[2]
    )


def test_what_may_be_left_out(tmp_path: Path) -> None:
    text = 'name = "M"\noutput = "image"\n[[inputs]]\nname = "a"\ntitle = "A"\ntype = "boolean"\n'
    model = load_model(write(tmp_path, text), tmp_path)

    assert ((), (), "", {}, {}, None, 3600.0, Price()) == (
        model.required,
        model.categories,
        model.description,
        model.sample,
        model.options,
        model.graph,
        model.time_limit,
        model.price,
    )
    assert "other" == model.inputs[0].role


@pytest.mark.parametrize(
    ("text", "key", "problem"),
    [
        # the shape
        ("name = ", "", "this is not TOML: "),
        ("", "", "missing required field `name`"),
        (HEAD, "", "missing required field `inputs`"),
        (HEAD + "inputs = []", "inputs", "give at least one [[inputs]] table"),
        (HEAD + "inputs = 5", "inputs", "Expected `array`, got `int`"),
        (HEAD + "inputs = [5]", "inputs[0]", "Expected `object`, got `int`"),
        ('heading = "x"\n' + HEAD + PROMPT, "heading", "there is no such key; known are name, output"),
        ("time_limt = 5\n" + HEAD + PROMPT, "time_limt", "there is no such key; did you mean time_limit?"),
        (HEAD + PROMPT + "maxLength = 5", "inputs.prompt.maxLength", "did you mean max_length?"),
        (HEAD + "[price]\nbase = 1\n" + PROMPT, "price.base", "did you mean base_usd?"),
        (HEAD.replace("video", "movie", 2) + PROMPT, "output", "'movie' is none of image, video"),
        (HEAD + PROMPT.replace("string", "sstring"), "inputs.prompt.type", "did you mean string?"),
        (
            HEAD + PROMPT.replace('"prompt"\ndef', '"promptt"\ndef'),
            "inputs.prompt.role",
            "did you mean prompt?",
        ),
        (HEAD + '[price]\nunit = "seconds"\n' + PROMPT, "price.unit", "did you mean second?"),
        (HEAD.replace('"Mine"', "5") + PROMPT, "name", "Expected `str`, got `int`"),
        (HEAD + PROMPT.replace('"a fox"', "[1]"), "inputs.prompt.default", "got `array`"),
        (HEAD + PROMPT.replace('title = "Prompt"\n', ""), "inputs.prompt", "required field `title`"),
        (HEAD + PROMPT.replace('name = "prompt"\n', ""), "inputs[0]", "required field `name`"),
        (HEAD + "engines = 5\n" + PROMPT, "engines", "Expected `object`"),
        # the model
        (HEAD.replace("Mine", " ") + PROMPT, "name", "give the model a name"),
        (HEAD.replace("text-to-video", "") + PROMPT, "categories", "a category is empty"),
        ("time_limit = 0\n" + HEAD + PROMPT, "time_limit", "greater than 0"),
        ("time_limit = inf\n" + HEAD + PROMPT, "time_limit", "greater than 0"),
        (HEAD + "[price]\nbase_usd = -1\n" + PROMPT, "price.base_usd", "must be 0 or more"),
        (HEAD + "[price]\nbase_usd = nan\n" + PROMPT, "price.base_usd", "must be 0 or more"),
        (HEAD + f"[price]\nbase_usd = {10**400}\n" + PROMPT, "price.base_usd", ""),
        # names
        (HEAD + PROMPT + PROMPT, "inputs.prompt", "2 inputs have this name"),
        (field("", name="a b"), "inputs.a b", "letters, digits"),
        (field("", name=""), "inputs.", "letters, digits"),
        (HEAD.replace('["prompt"]', '["promptt"]') + PROMPT, "required", "'promptt'; did you mean prompt?"),
        (HEAD.replace('["prompt"]', '["prompt", "prompt"]') + PROMPT, "required", "once is enough"),
        (
            field('role = "prompt"', type_="string"),
            "inputs",
            "only one input can have the role prompt; prompt, x",
        ),
        # roles and types
        (field('role = "seed"', type_="float"), "inputs.x.type", "the role seed needs the type integer"),
        (field('role = "fps"', type_="string"), "inputs.x.type", "needs the type integer or float"),
        (field('role = "start_image"'), "inputs.x.type", "needs the type string"),
        # bounds
        (field("minimum = 1", type_="string"), "inputs.x.minimum", "only numbers have one"),
        (field("max_length = 1"), "inputs.x.max_length", "only strings have one"),
        (field("max_length = -1", type_="string"), "inputs.x.max_length", "from 0 to"),
        (field("minimum = 3\nmaximum = 2"), "inputs.x.minimum", "3 is above maximum, 2"),
        (field("min_length = 3\nmax_length = 2", type_="string"), "inputs.x.min_length", "above max_length"),
        (field("maximum = nan", type_="float"), "inputs.x.maximum", "finite"),
        (field(f"maximum = {2**64}"), "inputs.x.maximum", "64 bits"),
        # defaults and enums
        (field("default = 1.5"), "inputs.x.default", "1.5 does not have the type integer"),
        (field("default = true"), "inputs.x.default", "True does not have the type integer"),
        (field("default = 1", type_="boolean"), "inputs.x.default", "1 does not have the type boolean"),
        (field('default = "1"', type_="float"), "inputs.x.default", "'1' does not have the type float"),
        (field("default = inf", type_="float"), "inputs.x.default", "no finite number"),
        (field("default = 1\nminimum = 2"), "inputs.x.default", "1 is below the minimum, 2"),
        (field("default = 3\nmaximum = 2"), "inputs.x.default", "3 is above the maximum, 2"),
        (field('role = "seed"\ndefault = -2'), "inputs.x.default", "-2 is below the minimum, -1"),
        (field("default = 3\nenum = [1, 2]"), "inputs.x.default", "3 is not in enum: 1, 2"),
        (field("enum = []"), "inputs.x.enum", "is empty"),
        (field("enum = [1, 1]"), "inputs.x.enum", "a value twice"),
        (field('enum = [1, "2"]'), "inputs.x.enum", "'2' does not have the type integer"),
        (field("enum = [1, 9]\nmaximum = 5"), "inputs.x.enum", "9 is above the maximum, 5"),
        (field('default = "abc"\nmax_length = 2', type_="string"), "inputs.x.default", "more than max_length"),
        (field('default = "a"\nmin_length = 2', type_="string"), "inputs.x.default", "fewer than min_length"),
        (field('default = "a\\u0000"', type_="string"), "inputs.x.default", "NUL"),
        (
            field('role = "resolution"\nenum = ["64x64", "big"]', type_="string"),
            "inputs.x.enum",
            "'big' is no resolution",
        ),
        (
            field('role = "start_image"\ndefault = "/etc/passwd"', type_="string"),
            "inputs.x.default",
            "nor a sample: RunComfy_examples_1235_1.png, Runcomfy_Example_1259_1.png",
        ),
        # LoRAs
        (field('role = "loras"', type_="string"), "inputs.x.type", "the role loras needs the type loras"),
        (field("", type_="loras"), "inputs.x.role", 'the type loras needs role = "loras"'),
        (field('role = "loras"\ndefault = "a"', type_="loras"), "inputs.x.default", "has none; take it out"),
        (field('role = "loras"\nenum = ["a"]', type_="loras"), "inputs.x.enum", "has none; take it out"),
        (field('role = "loras"\nmaximum = 2', type_="loras"), "inputs.x.maximum", "only numbers have one"),
        # the workflow; more in test_workflow.py
        ('graph = "graph.json"\n' + HEAD + PROMPT, "graph", "graph.json cannot be read: No such file"),
        ('graph = "../graph.json"\n' + HEAD + PROMPT, "graph", "must be the bare name of a file"),
        ('graph = ""\n' + HEAD + PROMPT, "graph", "must be the bare name of a file"),
        # the sample
        (HEAD + PROMPT.replace('default = "a fox"', ""), "prompt", "write a sample input to this file"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, key: str, problem: str) -> None:
    folder = write(tmp_path, text)

    error = wrong(folder, tmp_path)

    assert (key, True) == (error.key, problem in error.problem), error.message
    assert Path(error.file).parent == folder
    assert error.message.startswith(error.file)


@pytest.mark.parametrize(
    ("sample", "key", "problem"),
    [
        ("{", "", "this is not JSON: "),
        ("[]", "", "must be a JSON object"),
        ("{}", "prompt", "prompt is required (Prompt)"),
        ('{"prompt": "x", "promptt": "y"}', "promptt", "did you mean prompt?"),
    ],
)
def test_a_sample_must_fit(tmp_path: Path, sample: str, key: str, problem: str) -> None:
    folder = write(tmp_path, HEAD + PROMPT, sample=sample)

    error = wrong(folder, tmp_path)

    assert (str(folder / "sample.json"), key) == (error.file, key)
    assert problem in error.problem


def test_a_manifest_that_cannot_be_read(tmp_path: Path) -> None:
    folder = write(tmp_path, "")
    (folder / "model.toml").write_bytes(b'name = "\xff"')
    assert "this is not UTF-8" in wrong(folder, tmp_path).problem

    (folder / "model.toml").unlink()
    assert "cannot be read: No such file" in wrong(folder, tmp_path).problem

    (folder / "model.toml").mkdir()
    assert "cannot be read: Is a directory" in wrong(folder, tmp_path).problem


@pytest.mark.parametrize("id_", ["a/b", "a/b/c/d/e/f", "wan-ai/wan-2-5", "a.b/c_d", "0/1-2.3_4"])
def test_ids(tmp_path: Path, id_: str) -> None:
    assert id_ == load_model(write(tmp_path, HEAD + PROMPT, id_), tmp_path).id


@pytest.mark.parametrize(
    ("id_", "problem"),
    [
        ("a", "this one has 1: move the folder"),
        ("a/b/c/d/e/f/g", "this one has 7"),
        ("a/B", "the folder 'B' cannot be part of an id: rename it"),
        ("a b/c", "the folder 'a b'"),
        ("a--b/c", "the folder 'a--b'"),
        ("a/b-", "the folder 'b-'"),
        ("a/ü", "the folder 'ü'"),
        ("a/b\n", "the folder 'b\\n'"),
        ("a/openapi.json", "cannot be called openapi.json"),
    ],
)
def test_paths_that_are_no_ids(tmp_path: Path, id_: str, problem: str) -> None:
    assert problem in wrong(write(tmp_path, HEAD + PROMPT, id_), tmp_path).problem


def test_several_reference_images_and_others_are_allowed(tmp_path: Path) -> None:
    more = "".join(
        f'\n[[inputs]]\nname = "{name}"\ntitle = "T"\ntype = "string"\nrole = "{role}"\n'
        for name, role in (
            ("r1", "reference_image"),
            ("r2", "reference_image"),
            ("o1", "other"),
            ("o2", "other"),
        )
    )

    files: dict[str, Any] = dict(load_model(write(tmp_path, HEAD + PROMPT + more), tmp_path).files())

    assert {"r1": "image", "r2": "image"} == files


# -- the documentation --------------------------------------------------------------------------------------
DOCS = (Path(__file__).parents[2] / "docs/models.md").read_text("utf-8")


def section(title: str) -> str:
    return DOCS.partition(f"## {title}\n")[2].partition("\n## ")[0]


def block(language: str, title: str = "A whole manifest") -> str:
    return section(title).partition(f"```{language}\n")[2].partition("```")[0]


@pytest.mark.parametrize(
    ("title", "type_"),
    [
        ("Keys of a model", _Manifest),
        ("Keys of `[price]`", Price),
        ("Keys of `[[inputs]]`", Input),
        ("Keys of `[engines.comfyui]`", Workflow),
        ("Keys of `[[engines.comfyui.weights]]`", Weight),
        ("Keys of `[[engines.comfyui.node_packs]]`", NodePack),
    ],
)
def test_every_key_is_documented_and_no_other(title: str, type_: type[msgspec.Struct]) -> None:
    first_cells = [line.split("|")[1] for line in section(title).splitlines() if line.startswith("| `")]

    assert {field.name for field in msgspec.structs.fields(type_)} == set(
        re.findall(r"`(\w+)`", " ".join(first_cells))
    )


def test_every_role_is_documented() -> None:
    first_cells = [line.split("|")[1] for line in section("Roles").splitlines() if line.startswith("| `")]

    assert set(get_args(Role)) == set(re.findall(r"`(\w+)`", " ".join(first_cells)))


def test_the_documented_manifest_works(tmp_path: Path) -> None:
    model = load_model(write(tmp_path, block("toml"), "studio/portrait", sample=block("json")), tmp_path)

    assert ("Portrait", ("prompt",)) == (model.name, model.required)
    assert ["prompt", "resolution", "seed"] == [field.role for field in model.inputs]


def test_every_name_and_function_of_expressions_is_documented() -> None:
    first_cells = [line.split("|")[1] for line in section("Bindings").splitlines() if line.startswith("| `")]
    named = set(re.findall(r"`(\w+)`", " ".join(first_cells)))
    called = set(re.findall(r"`(\w+)\(", " ".join(first_cells)))

    texts = {"prompt", "negative_prompt", "width", "height"}
    assert {*texts, *NUMBER_ROLES, *FILE_ROLES, RANDOM_SEED} == named
    assert FUNCTIONS.keys() == called


def test_the_documented_workflow_works(tmp_path: Path) -> None:
    title = "A workflow for ComfyUI"
    folder = write(tmp_path, block("toml", title), "studio/postcard", graph=block("json", title))
    entry = load_entry(folder, tmp_path)
    workflow = workflow_of(entry.model)
    binder = Binder(entry.model, workflow, read_graph(entry.model, workflow))
    loras = [{"path": "style.safetensors", "scale": 0.8}]
    given = {"6_text": "A lighthouse", "5_widthx5_height": "540x960 (9:16)", "3_steps": 8, "loras": loras}

    complete = entry.validator.validate_input(given).input
    graph = binder.bind(complete, roles_of(entry.model, complete), {})

    assert () == binder.unbound
    assert "A lighthouse, as a postcard" == graph["6"]["inputs"]["text"]
    assert "text, watermark" == graph["7"]["inputs"]["text"]
    assert (544, 960) == (graph["5"]["inputs"]["width"], graph["5"]["inputs"]["height"])
    crop = graph["10"]["inputs"]
    assert (540, 960, 2, 0) == (crop["width"], crop["height"], crop["x"], crop["y"])
    assert (8, 1) == (graph["3"]["inputs"]["steps"], graph["3"]["inputs"]["seed"])
    assert loras == complete["loras"]
