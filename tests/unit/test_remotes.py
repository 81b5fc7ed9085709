"""The tables of a manifest for remote engines: what they send, what it costs, and what is wrong with them."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rushes.catalog.load import Catalog, load_model
from rushes.catalog.model import Model
from rushes.catalog.remotes import (
    KINDS,
    OPTIONS,
    RemoteTable,
    estimate_usd,
    remote_table,
    remote_values,
)
from rushes.catalog.roles import roles_of
from rushes.errors import EngineError, ManifestError
from rushes.settings import Settings, setting_help

INPUTS = """
name = "M"
output = "video"
required = ["text", "first"]
[[inputs]]
name = "text"
title = "T"
type = "string"
role = "prompt"
default = "a fox"
[[inputs]]
name = "not"
title = "N"
type = "string"
role = "negative_prompt"
[[inputs]]
name = "first"
title = "F"
type = "string"
role = "start_image"
default = "https://a.example/1.png"
[[inputs]]
name = "like"
title = "L"
type = "string"
role = "reference_image"
[[inputs]]
name = "like_too"
title = "L"
type = "string"
role = "reference_image"
[[inputs]]
name = "size"
title = "S"
type = "string"
role = "resolution"
enum = ["832x480", "1280x720"]
default = "832x480"
[[inputs]]
name = "count"
title = "C"
type = "integer"
role = "frames"
minimum = 16
maximum = 160
default = 80
[[inputs]]
name = "rate"
title = "R"
type = "float"
role = "fps"
default = 16
[[inputs]]
name = "dice"
title = "D"
type = "integer"
role = "seed"
[[inputs]]
name = "mood"
title = "M"
type = "string"
default = "calm"
"""
GIVEN: dict[str, Any] = {
    "text": "a fox",
    "first": "https://a.example/1.png",
    "size": "832x480",
    "count": 80,
    "rate": 16,
    "mood": "calm",
}


def load(root: Path, tables: str, *, inputs: str = INPUTS, id_: str = "me/mine") -> Model:
    folder = root / id_
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.toml").write_text(inputs + tables, "utf-8")
    return load_model(folder, root)


def table_of(model: Model, kind: str = "fal") -> RemoteTable:
    table = remote_table(model, kind)
    assert table is not None
    return table


def sent(model: Model, given: dict[str, Any], kind: str = "fal") -> dict[str, Any]:
    files = {name: f"<{name}>" for name in model.files() if name in given}
    return remote_values(
        table_of(model, kind), given, roles_of(model, given), files, draw_seed=lambda _low, _high: 7
    )


# -- which models a kind runs -------------------------------------------------------------------------------
def test_a_kind_runs_what_has_a_table_and_runcomfy_everything(tmp_path: Path) -> None:
    model = load(tmp_path, '[engines.fal]\nmodel = "fal-ai/wan"\n')

    assert {"fal", "runcomfy"} == {kind for kind in KINDS if remote_table(model, kind)}
    assert ("fal-ai/wan", None, "output", {}, {}) == (
        (fal := table_of(model)).model,
        fal.price_usd,
        fal.price_unit,
        fal.input,
        fal.options,
    )
    assert "me/mine" == table_of(model, "runcomfy").model
    assert {"first": "start_image", "like": "reference_image", "like_too": "reference_image"} == fal.file_fields


def test_a_table_for_runcomfy_may_leave_the_model_out(tmp_path: Path) -> None:
    model = load(tmp_path, "[engines.runcomfy]\nprice_usd = 0.3\n")
    assert ("me/mine", 0.3) == ((table := table_of(model, "runcomfy")).model, table.price_usd)
    model = load(tmp_path, '[engines.runcomfy]\nmodel = "wan-ai/wan-2-5/text-to-image"\n')
    assert "wan-ai/wan-2-5/text-to-image" == table_of(model, "runcomfy").model


def test_options_of_a_kind(tmp_path: Path) -> None:
    model = load(
        tmp_path,
        """
[engines.dashscope]
model = "wan2.5-t2i-preview"
parameters = {prompt_extend = true}
[engines.openai-video]
model = "Wan-AI/Wan2.2-T2V-A14B-Diffusers"
endpoint = "tasks"
extra = {flow_shift = 3.0}
[engines.replicate]
model = "wan-video/wan-2.2-i2v-a14b:0123abcd"
files = "url"
""",
    )
    assert {"parameters": {"prompt_extend": True}} == table_of(model, "dashscope").options
    assert {"endpoint": "tasks", "extra": {"flow_shift": 3.0}} == table_of(model, "openai-video").options
    assert {"files": "url"} == table_of(model, "replicate").options


# -- what is sent -------------------------------------------------------------------------------------------
MAPPED = """
[engines.fal]
model = "fal-ai/wan/v2.2-a14b/image-to-video"
[engines.fal.input]
prompt = "prompt + ', ' + input['mood']"
negative_prompt = "negative_prompt"
image_url = "start_image"
num_frames = "frames + 1"
resolution = "'480p' if height <= 480 else '720p'"
image_size.width = "width"
image_size.height = "height"
nested.deeper.sign = "negative_prompt"
ref_image_urls = ["reference_image", "input['like_too']"]
pair = ["start_image", "fps"]
seed = "random_seed"
steps = 27
scale = 3.5
safe = false
"""


def test_a_mapping_is_the_whole_input(tmp_path: Path) -> None:
    model = load(tmp_path, MAPPED)
    usual = {
        "prompt": "a fox, calm",
        "image_url": "<first>",
        "num_frames": 81,
        "resolution": "480p",
        "image_size": {"width": 832, "height": 480},
        "pair": ["<first>", 16],
        "seed": 7,
        "steps": 27,
        "scale": 3.5,
        "safe": False,
    }

    assert usual == sent(model, GIVEN)

    more = {"not": "blur", "like": "x", "like_too": "y", "size": "1280x720"}
    wanted = {
        **usual,
        "negative_prompt": "blur",
        "resolution": "720p",
        "image_size": {"width": 1280, "height": 720},
        "nested": {"deeper": {"sign": "blur"}},
        "ref_image_urls": ["<like>", "<like_too>"],
    }
    assert wanted == sent(model, GIVEN | more)


def test_of_a_list_those_that_are_given_are_sent(tmp_path: Path) -> None:
    model = load(tmp_path, MAPPED)
    # Of several reference images the first one given has the role.
    assert ["<like>"] == sent(model, GIVEN | {"like": "x"})["ref_image_urls"]
    assert ["<like_too>", "<like_too>"] == sent(model, GIVEN | {"like_too": "y"})["ref_image_urls"]


def test_every_draw_is_another(tmp_path: Path) -> None:
    model = load(tmp_path, '[engines.fal]\nmodel = "a/b"\ninput = {seed = "random_seed"}\n')
    table = table_of(model)
    drawn = {remote_values(table, GIVEN, {}, {"first": "x"})["seed"] for _ in range(50)}
    assert len(drawn) > 1


def test_an_expression_without_a_value_names_the_field(tmp_path: Path) -> None:
    model = load(tmp_path, '[engines.fal]\nmodel = "a/b"\ninput = {n = "1 // (frames - 100)"}\n')
    with pytest.raises(EngineError, match=r"n for fal cannot be computed as 1 // \(frames - 100\)") as caught:
        sent(model, GIVEN | {"count": 100})
    assert "binding_failed" == caught.value.reason


def test_a_file_that_is_not_at_hand(tmp_path: Path) -> None:
    model = load(tmp_path, MAPPED)
    with pytest.raises(EngineError) as caught:
        remote_values(table_of(model), GIVEN, roles_of(model, GIVEN), {})
    assert ("binding_failed", "first") == (caught.value.reason, caught.value.field)


@settings(max_examples=20)
@given(st.dictionaries(st.sampled_from(["not", "like", "like_too"]), st.text(max_size=20)))
def test_only_what_is_given_is_sent(tmp_path_factory: pytest.TempPathFactory, more: dict[str, str]) -> None:
    model = load(tmp_path_factory.mktemp("models"), MAPPED)
    values = sent(model, GIVEN | more)
    assert ("negative_prompt" in values) is ("nested" in values) is ("not" in more)
    assert ("ref_image_urls" in values) is bool({"like", "like_too"} & more.keys())


# -- what it costs ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("price", "given", "cost"),
    [
        ("", {}, None),
        ("price_usd = 0.1", {}, 0.1),
        ("price_usd = 0", {}, 0.0),
        ('price_usd = 0.1\nprice_unit = "second"', {}, 0.5),
        ('price_usd = 0.1\nprice_unit = "second"', {"count": 160}, 1.0),
        ('price_usd = 0.1\nprice_unit = "second"', {"rate": 8}, 1.0),
        ('price_usd = "frames / 16 * (0.04 if height <= 480 else 0.08)"', {}, 0.2),
        ('price_usd = "frames / 16 * (0.04 if height <= 480 else 0.08)"', {"size": "1280x720"}, 0.4),
        ('price_usd = "0.04 if height <= 480 else 0.08"\nprice_unit = "second"', {}, 0.2),
    ],
)
def test_estimates(tmp_path: Path, price: str, given: dict[str, Any], cost: float | None) -> None:
    model = load(tmp_path, f'[engines.fal]\nmodel = "a/b"\n{price}\n')
    estimate = estimate_usd(table_of(model), model, roles_of(model, GIVEN | given))
    assert cost == (estimate if estimate is None else pytest.approx(estimate))


@pytest.mark.parametrize("missing", ["frames", "fps"])
def test_what_is_needed_for_an_estimate_may_be_missing(tmp_path: Path, missing: str) -> None:
    model = load(tmp_path, '[engines.fal]\nmodel = "a/b"\nprice_usd = 0.1\nprice_unit = "second"\n')
    roles = {role: value for role, value in roles_of(model, GIVEN).items() if role != missing}
    assert estimate_usd(table_of(model), model, roles) is None
    priced = load(tmp_path, '[engines.fal]\nmodel = "a/b"\nprice_usd = "frames * fps / 1000"\n')
    assert estimate_usd(table_of(priced), priced, roles) is None
    assert 1.28 == estimate_usd(table_of(priced), priced, roles_of(priced, GIVEN))


# -- what is wrong with a table -----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("table", "key", "said"),
    [
        ("[engines.fal]", "engines.fal.model", "is missing: write what fal calls the model"),
        ('[engines.fal]\nmodel = ""', "engines.fal.model", "is no model of fal"),
        ('[engines.fal]\nmodel = "wan"', "engines.fal.model", "'fal-ai/wan/v2.2-a14b/image-to-video'"),
        ('[engines.fal]\nmodel = "../x/y"', "engines.fal.model", "is no model of fal"),
        ("[engines.fal]\nmodel = 3", "engines.fal.model", "3 is no model of fal"),
        ('[engines.dashscope]\nmodel = "a/b"', "engines.dashscope.model", "wan2.5-t2i-preview"),
        ('[engines.replicate]\nmodel = "name"', "engines.replicate.model", "owner/name"),
        ('[engines.runcomfy]\nmodel = "https://x/y"', "engines.runcomfy.model", "is no model of runcomfy"),
        ('[engines.openai-video]\nmodel = "a\\nb"', "engines.openai-video.model", "is no model of"),
        ('[engines.fal]\nmodel = "a/b"\nmodel_ = 1', "engines.fal.model_", "did you mean model?"),
        (
            '[engines.fal]\nmodel = "a/b"\nparameters = {}',
            "engines.fal.parameters",
            "known are model, price_usd",
        ),
        (
            '[engines.fal]\nmodel = "a/b"\nfiles = "URL"',
            "engines.fal.files",
            "none of data, url; did you mean url?",
        ),
        (
            '[engines.openai-video]\nmodel = "w"\nendpoint = "video"',
            "engines.openai-video.endpoint",
            "did you mean videos?",
        ),
        ('[engines.openai-video]\nmodel = "w"\nextra = 1', "engines.openai-video.extra", "must be a table"),
        ('[engines.fal]\nmodel = "a/b"\nprice_usd = -1', "engines.fal.price_usd", "0 or more"),
        ('[engines.fal]\nmodel = "a/b"\nprice_usd = nan', "engines.fal.price_usd", "0 or more"),
        ('[engines.fal]\nmodel = "a/b"\nprice_usd = true', "engines.fal.price_usd", "0 or more"),
        ('[engines.fal]\nmodel = "a/b"\nprice_usd = "fps *"', "engines.fal.price_usd", "is no expression"),
        (
            '[engines.fal]\nmodel = "a/b"\nprice_usd = "start_image"',
            "engines.fal.price_usd",
            "no name start_image",
        ),
        ('[engines.fal]\nmodel = "a/b"\nprice_usd = "prompt"', "engines.fal.price_usd", "no amount of money"),
        ('[engines.fal]\nmodel = "a/b"\nprice_usd = "80 - frames"', "engines.fal.price_usd", "for every input"),
        ('[engines.fal]\nmodel = "a/b"\nprice_unit = "second"', "engines.fal.price_unit", "without price_usd"),
        (
            '[engines.fal]\nmodel = "a/b"\nprice_usd = 1\nprice_unit = "seconds"',
            "engines.fal.price_unit",
            "'seconds' is none of output, second; did you mean second?",
        ),
        ('[engines.fal]\nmodel = "a/b"\ninput = "prompt"', "engines.fal.input", "must be a table"),
        (
            '[engines.fal]\nmodel = "a/b"\ninput = {p = "promptt"}',
            "engines.fal.input.p",
            "there is no name promptt here; did you mean prompt?",
        ),
        ('[engines.fal]\nmodel = "a/b"\ninput = {p = "end_image"}', "engines.fal.input.p", "no name end_image"),
        ('[engines.fal]\nmodel = "a/b"\ninput = {p = "720p"}', "engines.fal.input.p", "is no expression"),
        ('[engines.fal]\nmodel = "a/b"\ninput = {p = []}', "engines.fal.input.p", "is empty"),
        ('[engines.fal]\nmodel = "a/b"\ninput = {p = {}}', "engines.fal.input.p", "is empty"),
        (
            '[engines.fal]\nmodel = "a/b"\ninput = {p = [["prompt"]]}',
            "engines.fal.input.p",
            "must be an expression",
        ),
        (
            '[engines.fal]\nmodel = "a/b"\ninput = {p = 1979-05-27}',
            "engines.fal.input.p",
            "must be an expression",
        ),
        ('[engines.fal]\nmodel = "a/b"\ninput = {p.q = "x"}', "engines.fal.input.p.q", "no name x"),
        (
            '[engines.fal]\nmodel = "a/b"\ninput = {p = "1 // (frames - 160)"}',
            "engines.fal.input",
            "p for fal cannot be computed",
        ),
    ],
)
def test_what_is_wrong_with_a_table_is_named(tmp_path: Path, table: str, key: str, said: str) -> None:
    with pytest.raises(ManifestError) as caught:
        load(tmp_path, f"{table}\n")
    assert (key, str(tmp_path / "me/mine/model.toml")) == (caught.value.key, caught.value.file)
    assert said in caught.value.problem


def test_an_image_has_no_seconds(tmp_path: Path) -> None:
    image = (
        'name = "M"\noutput = "image"\n[[inputs]]\nname = "p"\ntitle = "P"\ntype = "string"\nrole = "prompt"\n'
    )
    with pytest.raises(ManifestError, match="an image has no seconds"):
        load(tmp_path, '[engines.fal]\nmodel = "a/b"\nprice_usd = 1\nprice_unit = "second"\n', inputs=image)


def test_the_kinds_are_those_of_the_settings() -> None:
    assert OPTIONS.keys() == set(KINDS)
    assert all(f"`{kind}`" in setting_help("remotes") for kind in KINDS)
    assert () == Settings().remotes


# -- the models that come with Rushes -----------------------------------------------------------------------
def test_where_the_built_in_models_run() -> None:
    found = {
        (entry.model.id, kind): table.model
        for entry in Catalog.load().entries()
        for kind in KINDS
        if (table := remote_table(entry.model, kind)) and kind != "runcomfy"
    }
    assert {
        ("wan-ai/wan-2-5/text-to-image", "dashscope"): "wan2.5-t2i-preview",
        ("wan-ai/wan-2-5/text-to-image", "fal"): "fal-ai/wan-25-preview/text-to-image",
        ("community/wan-2-2/first-last-frame", "fal"): "fal-ai/wan/v2.2-a14b/image-to-video",
    } == found


def test_what_the_built_in_models_send_to_fal() -> None:
    catalog = Catalog.load()
    entry = catalog.get("community/wan-2-2/first-last-frame")
    assert entry is not None
    given = {"6_text": "a dog", "68_image": "a", "62_image": "b", "71_widthx71_height": "540x960 (9:16)"}
    given |= {"67_length": 141, "57_noise_seed": 2**31 + 5, "57_cfg": 0.6, "54_shift": 15}
    complete = entry.validator.validate_input(
        given | {"68_image": "https://a.example/1.png", "62_image": "https://a.example/2.png"}
    ).input
    values = sent(entry.model, complete)
    assert ("<68_image>", "<62_image>", "a dog") == (
        values["image_url"],
        values["end_image_url"],
        values["prompt"],
    )
    assert ("580p", "9:16", 141, 16, 20) == (
        values["resolution"],
        values["aspect_ratio"],
        values["num_frames"],
        values["frames_per_second"],
        values["num_inference_steps"],
    )
    assert (5, 1, 1, 10) == tuple(
        values[key] for key in ("seed", "guidance_scale", "guidance_scale_2", "shift")
    )
    cost = estimate_usd(table_of(entry.model), entry.model, roles_of(entry.model, complete))
    assert 141 / 16 * 0.06 == pytest.approx(cost)


def test_every_format_of_wan_2_5_goes_to_fal_as_it_is() -> None:
    entry = Catalog.load().get("wan-ai/wan-2-5/text-to-image")
    assert entry is not None
    formats = entry.model.field("resolution")
    assert formats is not None
    assert formats.enum is not None
    for text in formats.enum:
        width, height = str(text).split(" ")[0].split(":")
        values = sent(entry.model, {"prompt": "a fox", "aspect_ratio": text})
        assert {"width": int(width), "height": int(height)} == values["image_size"]
        assert all(384 <= side <= 1440 for side in values["image_size"].values())


# -- the documentation --------------------------------------------------------------------------------------
PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text("utf-8")


def section(title: str) -> str:
    return PAGE.partition(f"## {title}\n")[2].partition("\n## ")[0]


def test_every_key_of_a_table_is_documented() -> None:
    lines = [line for line in section("Keys of a remote's table").splitlines() if line.startswith("| `")]
    keys = {"model", "price_usd", "price_unit", "input", *(key for one in OPTIONS.values() for key in one)}
    assert keys == {line.split("`")[1] for line in lines}
    for line in lines:
        key, meaning = line.split("`")[1], line.split("|")[4]
        named = {kind for kind in KINDS if f"`{kind}`" in meaning}
        assert key in ("model", "input") or {kind for kind in KINDS if key in OPTIONS[kind]} == named


def test_the_documented_tables_work(tmp_path: Path) -> None:
    model = load(tmp_path, section("Remote engines").partition("```toml\n")[2].partition("```")[0])
    assert "480p" == sent(model, GIVEN)["resolution"]
    assert {"image": "<first>", "prompt": "a fox"} == sent(model, GIVEN, "replicate")
    assert 0.2 == estimate_usd(table_of(model), model, roles_of(model, GIVEN))
