"""The table [engines.wan]: what is right, what is wrong with file, key and fix, and those of the built-in models."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from rushes.catalog.audit import Finding
from rushes.catalog.audit_wan import audit_wan
from rushes.catalog.load import Catalog, load_entry
from rushes.catalog.manifest import read_manifest
from rushes.catalog.model import Model
from rushes.catalog.wan import Turbo, WanLora, WanModel, has_wan, local_folder, wan_of
from rushes.cli.checking import check
from rushes.errors import ManifestError

ROOT = Path(__file__).parents[2]
HEAD = """
name = "Mine"
output = "video"
[[inputs]]
name = "prompt"
title = "Prompt"
type = "string"
role = "prompt"
default = "a fox"
"""
WAN = '[engines.wan]\nweights = "me/wan"\n'
LORA = '[[engines.wan.loras]]\nsource = "me/style"\npath = "style.safetensors"\n'


def write(root: Path, text: str) -> Path:
    folder = root / "me" / "mine"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.toml").write_text(text, "utf-8")
    return folder


def read(root: Path, table: str, head: str = HEAD) -> Model:
    return read_manifest(write(root, head + table), root)


def wrong(root: Path, table: str) -> ManifestError:
    """As it is loaded: one that is wrong takes the model out of the catalog."""
    folder = write(root, HEAD + table)
    with pytest.raises(ManifestError) as caught:
        load_entry(folder, root)
    assert str(folder / "model.toml") == caught.value.file
    return caught.value


# -- what is right ------------------------------------------------------------------------------------------
def test_a_whole_table(tmp_path: Path) -> None:
    model = read(
        tmp_path,
        """
[engines.wan]
weights = "me/wan"
revision = "refs/pr/3"
bytes = 126_000_000_000
licence = "Apache-2.0"
stand_in = "Another at one frame"
scheduler = "lcm"
steps = 30
guidance = 5
guidance_2 = 3.0
shift = 5.0
frames = 81
fps = 16
negative_prompt = "模糊"
[[engines.wan.loras]]
source = "me/style"
path = "loras/style.safetensors"
revision = "0123abc"
scale = -0.5
experts = "high"
bytes = 12
licence = "MIT"
[engines.wan.turbo]
steps = 4
guidance = 1.5
shift = 3.0
scheduler = "euler"
[[engines.wan.turbo.loras]]
source = "./loras"
path = "fast.safetensors"
""",
    )
    assert has_wan(model)
    assert WanModel(
        weights="me/wan",
        revision="refs/pr/3",
        bytes=126_000_000_000,
        licence="Apache-2.0",
        stand_in="Another at one frame",
        scheduler="lcm",
        steps=30,
        guidance=5.0,
        guidance_2=3.0,
        shift=5.0,
        frames=81,
        fps=16.0,
        negative_prompt="模糊",
        loras=(WanLora("me/style", "loras/style.safetensors", "0123abc", -0.5, "high", 12, "MIT"),),
        turbo=Turbo(4, (WanLora("./loras", "fast.safetensors"),), 1.5, 3.0, "euler"),
    ) == wan_of(model)


def test_the_weights_alone_are_enough(tmp_path: Path) -> None:
    wan = wan_of(load_entry(write(tmp_path, HEAD + WAN), tmp_path).model)
    assert WanModel("me/wan") == wan
    assert ("unipc", None, (), None) == (wan.scheduler, wan.steps, wan.loras, wan.turbo)


def test_a_model_without_the_table_does_not_run_on_wan(tmp_path: Path) -> None:
    model = read(tmp_path, "")
    assert not has_wan(model)
    with pytest.raises(ManifestError, match=r'me/mine has no table \[engines.wan\].*weights = "…"'):
        wan_of(model)


@pytest.mark.parametrize(
    ("source", "folder"),
    [("me/wan", None), ("./weights", "{model}/weights"), ("/models/wan", "/models/wan"), ("./", "{model}")],
)
def test_a_source_is_a_repository_or_a_folder(tmp_path: Path, source: str, folder: str | None) -> None:
    model = read(tmp_path, f'[engines.wan]\nweights = "{source}"\n')
    assert source == wan_of(model).weights
    expected = None if folder is None else Path(folder.format(model=model.folder))
    assert expected == local_folder(source, model)


def test_one_file_for_each_expert_is_not_twice_the_same(tmp_path: Path) -> None:
    table = WAN + "".join(f'{LORA}experts = "{experts}"\n' for experts in ("high", "low"))
    assert ("high", "low") == tuple(lora.experts for lora in wan_of(read(tmp_path, table)).loras)


# -- what is wrong ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("table", "key", "problem"),
    [
        ("[engines.wan]\nsteps = 4\n", "engines.wan.weights", 'is missing: name the repository, weights = "'),
        (f"{WAN}step = 4\n", "engines.wan.step", "did you mean steps?"),
        (f'{WAN}scheduler = "eular"\n', "engines.wan.scheduler", "'eular' is none of unipc, euler, lcm; did"),
        (f'{WAN}scheduler = "x"\n', "engines.wan.scheduler", "'x' is none of unipc, euler, lcm"),
        (f'{WAN}steps = "4"\n', "engines.wan.steps", "must be a whole number, not a text"),
        (f"{WAN}steps = true\n", "engines.wan.steps", "must be a whole number, not true or false"),
        (f"{WAN}steps = 4.5\n", "engines.wan.steps", "must be a whole number, not a number with a point"),
        (f"{WAN}guidance = true\n", "engines.wan.guidance", "must be a number, not true or false"),
        (f"{WAN}licence = 2020-01-01\n", "engines.wan.licence", "must be a text, not a date"),
        (f"{WAN}steps = 0\n", "engines.wan.steps", "must be from 1 to 1000; it is 0"),
        (f"{WAN}guidance = -0.1\n", "engines.wan.guidance", "must be from 0 to 100"),
        (f"{WAN}guidance_2 = 101\n", "engines.wan.guidance_2", "must be from 0 to 100; it is 101"),
        (f"{WAN}shift = nan\n", "engines.wan.shift", "must be from 0.01 to 100; it is nan"),
        (f"{WAN}shift = 0\n", "engines.wan.shift", "must be from 0.01"),
        (f"{WAN}frames = 4094\n", "engines.wan.frames", "must be from 1 to 4093"),
        (f"{WAN}fps = inf\n", "engines.wan.fps", "must be from 0.1 to 240"),
        (f"{WAN}bytes = 0\n", "engines.wan.bytes", "above 0"),
        ('[engines.wan]\nweights = ""\n', "engines.wan.weights", "neither a repository, owner/name, nor a"),
        ('[engines.wan]\nweights = "wan"\n', "engines.wan.weights", "'wan' is neither a repository"),
        ('[engines.wan]\nweights = "~/wan"\n', "engines.wan.weights", "an absolute path, or one that begins"),
        ('[engines.wan]\nweights = "https://hub.test/me/wan"\n', "engines.wan.weights", "neither a"),
        ('[engines.wan]\nweights = "./a\\u0000"\n', "engines.wan.weights", "NUL"),
        ('[engines.wan]\nweights = "./w"\nrevision = "abc"\n', "engines.wan.revision", "has no revisions"),
        (f'{WAN}revision = "a b"\n', "engines.wan.revision", "'a b' must be a commit"),
        (f"{WAN}loras = 1\n", "engines.wan.loras", "must be a list of tables, not a number"),
        (f"{WAN}loras = [1]\n", "engines.wan.loras[0]", "must be a table, not a number"),
        (
            f'{WAN}[[engines.wan.loras]]\npath = "a.safetensors"\n',
            "engines.wan.loras[0].source",
            'is missing: name the repository, source = "owner/name", or a folder',
        ),
        (
            f'{WAN}[[engines.wan.loras]]\nsource = "me/style"\n',
            "engines.wan.loras[0].path",
            'is missing: name the file in it, path = "name.safetensors"',
        ),
        (f"{WAN}{LORA}strength = 1.0\n", "engines.wan.loras[0].strength", "there is no such key"),
        (f'{WAN}{LORA}experts = "hihg"\n', "engines.wan.loras[0].experts", "did you mean high?"),
        (f"{WAN}{LORA}scale = 101.0\n", "engines.wan.loras[0].scale", "must be from -100 to 100; it is 101"),
        (f"{WAN}{LORA}bytes = -1\n", "engines.wan.loras[0].bytes", "above 0"),
        (
            f'{WAN}[[engines.wan.loras]]\nsource = "me/style"\npath = "../a.safetensors"\n',
            "engines.wan.loras[0].path",
            "leads out of its folder",
        ),
        (
            f'{WAN}[[engines.wan.loras]]\nsource = "me/style"\npath = "a.pt"\n',
            "engines.wan.loras[0].path",
            "must end in .safetensors",
        ),
        (
            f'{WAN}[[engines.wan.loras]]\nsource = "style"\npath = "a.safetensors"\n',
            "engines.wan.loras[0].source",
            "'style' is neither",
        ),
        (f'{WAN}{LORA}{LORA}experts = "low"\n', "engines.wan.loras[1].path", "listed twice for the low expert"),
        (f"{WAN}turbo = 1\n", "engines.wan.turbo", "must be a table, not a number"),
        (f"{WAN}[engines.wan.turbo]\n", "engines.wan.turbo.steps", "is missing: say how many steps"),
        (f"{WAN}[engines.wan.turbo]\nsteps = 0\n", "engines.wan.turbo.steps", "must be from 1"),
        (f"{WAN}[engines.wan.turbo]\nsteps = 4\ncfg = 1\n", "engines.wan.turbo.cfg", "there is no such key"),
        (
            f"{WAN}[engines.wan.turbo]\nsteps = 4\n{LORA.replace('wan.', 'wan.turbo.')}scale = nan\n",
            "engines.wan.turbo.loras[0].scale",
            "it is nan",
        ),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, table: str, key: str, problem: str) -> None:
    error = wrong(tmp_path, table)
    assert key == error.key
    assert problem in error.problem


def test_a_wrong_table_leaves_the_other_models_alone(tmp_path: Path) -> None:
    write(tmp_path, f"{HEAD}{WAN}step = 4\n")
    catalog = Catalog.load(tmp_path)
    assert ["engines.wan.step"] == [error.key for error in catalog.broken]
    assert catalog.get("community/wan-2-2/vace-fun") is not None


# -- what `rushes models check` says ------------------------------------------------------------------------
def kinds(model: Model) -> list[tuple[str, str, str]]:
    return [(one.severity, one.where, one.kind) for one in audit_wan(model)]


def pipeline(folder: Path, name: str = "WanPipeline") -> None:
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": name}))


def test_nothing_is_found_in_a_right_table_nor_without_one(tmp_path: Path) -> None:
    pipeline(tmp_path / "me" / "mine" / "weights")
    (tmp_path / "me" / "mine" / "a.safetensors").write_bytes(b"")
    lora = '[[engines.wan.loras]]\nsource = "./"\npath = "a.safetensors"\n'
    assert [] == audit_wan(read(tmp_path, f'[engines.wan]\nweights = "./weights"\n{lora}'))
    assert [] == audit_wan(read(tmp_path, ""))


def test_a_wrong_table_is_a_finding(tmp_path: Path) -> None:
    model = read(tmp_path, f"{WAN}step = 4\n")
    where = f"{model.folder / 'model.toml'}: engines.wan.step"
    problem = "there is no such key; did you mean steps?"
    assert [Finding("error", "me/mine", where, "manifest", problem)] == audit_wan(model)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    model = read(tmp_path, '[engines.wan]\nweights = "./weights"\n')
    (found,) = audit_wan(model)
    assert f"there is no folder {model.folder / 'weights'}" == found.text
    assert ("error", "missing_weights") == (found.severity, found.kind)
    (model.folder / "weights").mkdir()
    (found,) = audit_wan(model)
    assert f"there is no {model.folder / 'weights' / 'model_index.json'}" == found.text


def test_weights_that_are_no_wan_or_no_json_or_no_file(tmp_path: Path) -> None:
    pipeline(tmp_path / "flux", "FluxPipeline")
    pipeline(tmp_path / "list")
    pipeline(tmp_path / "damaged")
    (tmp_path / "list" / "model_index.json").write_text("[]")
    (tmp_path / "damaged" / "model_index.json").write_text("{")
    (tmp_path / "folder" / "model_index.json").mkdir(parents=True)

    def kind_of(name: str) -> str:
        (found,) = audit_wan(read(tmp_path, f'[engines.wan]\nweights = "{tmp_path / name}"\n'))
        assert ("error", "engines.wan.weights") == (found.severity, found.where)
        return found.kind

    names = ("flux", "list", "damaged", "folder")
    expected = ["wrong_pipeline", "wrong_pipeline", "damaged_weights", "missing_weights"]
    assert expected == [kind_of(name) for name in names]


@pytest.mark.parametrize("path", ["a.safetensors", f"{'a' * 300}.safetensors"])
def test_loras_that_are_not_in_their_folder(tmp_path: Path, path: str) -> None:
    lora = f'source = "/nowhere"\npath = "{path}"\n'
    turbo = f"[engines.wan.turbo]\nsteps = 4\n[[engines.wan.turbo.loras]]\n{lora}"
    model = read(tmp_path, f"{WAN}[[engines.wan.loras]]\n{lora}{turbo}")
    missing = [("error", f"engines.wan.{t}loras[0]", "missing_weights") for t in ("", "turbo.")]
    assert missing == kinds(model)
    assert f"there is no file /nowhere/{path}" == audit_wan(model)[0].text


def test_inputs_that_have_no_effect_or_allow_what_is_refused(tmp_path: Path) -> None:
    def field(name: str, rest: str) -> str:
        return f'[[inputs]]\nname = "{name}"\ntitle = "X"\n{rest}\n'

    head = 'name = "Mine"\noutput = "image"\n' + "".join(
        (
            field("style", 'type = "string"\ndefault = "a"'),
            field("length", 'type = "integer"\nrole = "frames"\ndefault = 81'),
            field("steps", 'type = "integer"\nrole = "steps"\nminimum = 0\nmaximum = 50\ndefault = 4'),
            field("shift", 'type = "float"\nrole = "shift"\nenum = [0, 5, 200.5]\ndefault = 5'),
            field("cfg", 'type = "float"\nrole = "guidance"\ndefault = 4'),
        )
    )
    model = read(tmp_path, WAN, head)
    assert [
        ("warning", "model.toml", "no_prompt"),
        ("warning", "style", "unused_input"),
        ("warning", "length", "unused_input"),
        ("warning", "steps", "out_of_bounds"),
        ("warning", "shift", "out_of_bounds"),
    ] == kinds(model)
    assert "allows 0, 200.5; the Wan engine takes 0.01 to 100" == audit_wan(model)[-1].text


def test_the_command_says_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "models", f'{HEAD}[engines.wan]\nweights = "/nowhere/wan"\n')
    environment = {"RUSHES_MODELS_DIR": str(tmp_path / "models")}
    runner = CliRunner(env=environment)
    result = runner.invoke(check, ["me/mine", "--offline", "--json"], standalone_mode=False)
    assert 1 == result.return_value
    answer = json.loads(result.stdout)
    (error,) = (one for one in answer["findings"] if one["severity"] == "error")
    assert ("engines.wan.weights", "missing_weights", []) == (error["where"], error["kind"], error["comfyui"])
    text = runner.invoke(check, ["me/mine", "--offline"], standalone_mode=False)
    assert "there is no folder /nowhere/wan" in text.stdout
    assert "1 error(s)" in text.stdout


@pytest.fixture
def checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """What `rushes models check` answers, with the engine wan, of the models in the folder ``models``."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str, **more: str) -> tuple[int, str, str]:
        environment = {"RUSHES_MODELS_DIR": str(tmp_path / "models"), "RUSHES_ENGINE": "wan", **more}
        result = CliRunner(env=environment).invoke(check, list(arguments), standalone_mode=False)
        if result.exception is not None:
            raise result.exception
        return result.return_value, result.stdout, result.stderr

    return call


def test_a_good_model_of_the_engine_wan_is_not_told_about_comfyui(
    tmp_path: Path, checked: Callable[..., tuple[int, str, str]]
) -> None:
    write(tmp_path / "models", HEAD + WAN)
    said = "1 model(s) read; 0 error(s), 0 warning(s)\n"
    assert (0, said, "") == checked("me/mine")
    _, out, err = checked("me/mine", RUSHES_ENGINE="draft")
    assert "does not run on ComfyUI" in out
    assert "No ComfyUI was asked" in err


def test_a_model_without_the_table_does_not_run_on_the_engine_wan(
    tmp_path: Path, checked: Callable[..., tuple[int, str, str]]
) -> None:
    write(tmp_path / "models", f'{HEAD}[engines.wna]\nweights = "me/wan"\n')
    code, out, err = checked("me/mine")
    assert (0, "") == (code, err)
    assert "has no table [engines.wan]: it does not run on the engine wan" in out
    assert "there is no engine wna; did you mean wan?" in out
    assert "ComfyUI" not in out


def test_the_weights_of_the_setting_are_looked_at(
    tmp_path: Path, checked: Callable[..., tuple[int, str, str]]
) -> None:
    write(tmp_path / "models", f'{HEAD}[engines.wan]\nweights = "/nowhere/wan"\n')
    pipeline(tmp_path / "good")
    for place in ("good", "./good", str(tmp_path / "good"), "me/wan@main"):  # instead of the manifest's
        assert 0 == checked("me/mine", RUSHES_WAN_WEIGHTS=f"me/mine={place}")[0], place
    (tmp_path / "empty").mkdir()
    for place, problem in (
        ("empty", f"there is no {tmp_path / 'empty' / 'model_index.json'}"),
        ("./gone", f"there is no folder {tmp_path / 'gone'}"),
        ("~nobody-at-all/wan", "there is no folder"),
        ("gone", "'gone' is neither a folder that is there nor a repository"),
    ):
        code, out, _ = checked("me/mine", RUSHES_WAN_WEIGHTS=f"me/mine={place}")
        assert 1 == code, place
        assert f"RUSHES_WAN_WEIGHTS\n           {problem}" in out


def test_the_setting_names_models_that_there_are(
    tmp_path: Path, checked: Callable[..., tuple[int, str, str]]
) -> None:
    write(tmp_path / "models", HEAD + WAN)
    code, out, _ = checked("me/mine", RUSHES_WAN_WEIGHTS="me/mien=me/other")
    assert 1 == code
    assert out.startswith("engine wan\n  error    RUSHES_WAN_WEIGHTS\n")
    assert "there is no model 'me/mien'; did you mean me/mine?" in out
    write(tmp_path / "models", f"{HEAD}{WAN}step = 4\n")
    assert "there is no model" not in checked(RUSHES_WAN_WEIGHTS="me/mine=me/other")[1]


# -- the built-in models ------------------------------------------------------------------------------------
NEGATIVE_NODES = {
    "community/wan-2-1/fusionx/image-to-video": ("601", "598", "599"),
    "community/wan-2-2/first-last-frame": ("7", "57", "54"),
    "community/wan-2-2/vace-fun": ("57", "98", "63"),
    "wan-ai/wan-2-5/text-to-image": ("72", "3", "82"),
}
"""Of each graph: the negative prompt, the sampler, the shift."""
SAMPLERS = {"euler": "euler", "uni_pc": "unipc"}


def builtin(id_: str) -> Model:
    entry = Catalog().get(id_)
    assert entry is not None
    return entry.model


def test_every_built_in_model_runs_on_wan_and_nothing_is_wrong_with_it() -> None:
    models = [entry.model for entry in Catalog().entries()]
    assert set(NEGATIVE_NODES) == {model.id for model in models if has_wan(model)}
    assert [] == [finding for model in models for finding in audit_wan(model)]


@pytest.mark.parametrize("id_", NEGATIVE_NODES)
def test_what_no_input_gives_is_what_the_graph_has(id_: str) -> None:
    """So that a request means the same on both engines."""
    model = builtin(id_)
    wan = wan_of(model)
    graph = json.loads((model.folder / "graph.json").read_bytes())
    negative, sampler, shift = (graph[node]["inputs"] for node in NEGATIVE_NODES[id_])

    def given(role: Any, of_table: float | None) -> float | None:
        field = model.field(role)
        return of_table if field is None else field.default  # type: ignore[return-value]

    def number(value: Any) -> float:
        """What a graph has, which may be a link to a node that holds a number."""
        return float(graph[value[0]]["inputs"]["value"] if isinstance(value, list) else value)

    assert negative["text"] == wan.negative_prompt
    assert SAMPLERS[sampler["sampler_name"]] == wan.scheduler
    assert number(sampler["steps"]) == given("steps", wan.steps)
    assert number(sampler["cfg"]) == given("guidance", wan.guidance)
    assert number(shift["shift"]) == given("shift", wan.shift)
    assert None is wan.guidance_2  # the graphs give both experts the same


def test_weights_and_distilled_loras_are_pinned() -> None:
    """What a request generates must not change because somebody pushed to a repository."""
    for id_ in NEGATIVE_NODES:
        wan = wan_of(builtin(id_))
        turbo = wan.turbo.loras if wan.turbo else ()
        for revision in (wan.revision, *(lora.revision for lora in turbo)):
            assert re.fullmatch("[0-9a-f]{40}", revision), id_


def test_turbo_is_without_guidance_and_has_a_lora_for_each_expert() -> None:
    for id_ in NEGATIVE_NODES:
        wan = wan_of(builtin(id_))
        assert wan.turbo is not None
        assert 1.0 == wan.turbo.guidance
        distilled = {lora.experts for lora in (*wan.loras, *wan.turbo.loras)}
        assert distilled in ({"high", "low"}, {"both"}), id_


def test_the_stand_in_of_the_closed_model_is_declared() -> None:
    model = builtin("wan-ai/wan-2-5/text-to-image")
    stand_in = wan_of(model).stand_in
    assert stand_in
    assert f"the open {stand_in} stands in for it" in model.description
    assert "ComfyUI" not in model.description


@pytest.mark.parametrize(
    ("heading", "type_"),
    [
        ("## Keys of `[engines.wan]`", WanModel),
        ("## Keys of `[[engines.wan.loras]]`", WanLora),
        ("## Keys of `[engines.wan.turbo]`", Turbo),
    ],
)
def test_every_key_is_documented(heading: str, type_: type[msgspec.Struct]) -> None:
    page = (ROOT / "docs" / "models.md").read_text("utf-8")
    section = page.split(f"{heading}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.*?`) \|", section, re.MULTILINE)
    documented = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert {field.name for field in msgspec.structs.fields(type_)} == documented


def test_the_manifest_of_the_page_is_right_but_for_its_folder(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "models.md").read_text("utf-8")
    (text,) = (one for one in re.findall(r"```toml\n(.*?)```", page, re.DOTALL) if "[engines.wan]" in one)
    model = load_entry(write(tmp_path, text), tmp_path).model
    assert [("error", "engines.wan.loras[0]", "missing_weights")] == kinds(model)
