"""The graphs of the models that come with Rushes: whole, bound, and exact in what they make."""

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final

import pytest

from rushes.catalog import load
from rushes.catalog.bindings import Binder
from rushes.catalog.manifest import read_manifest
from rushes.catalog.model import Input, Model, Role
from rushes.catalog.resolution import parse_resolution
from rushes.catalog.roles import roles_of
from rushes.catalog.workflow import Graph, Workflow, is_link, read_graph, variant_names, workflow_of

FLF: Final = "community/wan-2-2/first-last-frame"
VACE: Final = "community/wan-2-2/vace-fun"
FUSIONX: Final = "community/wan-2-1/fusionx/image-to-video"
T2I: Final = "wan-ai/wan-2-5/text-to-image"
WRAPPER: Final = "wanvideowrapper"
WORKFLOWS: Final = [(FLF, None), (VACE, None), (FUSIONX, None), (FUSIONX, WRAPPER), (T2I, None)]
VIDEO_WORKFLOWS: Final = WORKFLOWS[:-1]

CORE: Final = {
    *(
        "CLIPLoader",
        "UNETLoader",
        "VAELoader",
        "CLIPVisionLoader",
        "LoadImage",
        "PrimitiveInt",
        "PrimitiveFloat",
    ),
    *("CLIPTextEncode", "CLIPVisionEncode", "ModelSamplingSD3", "KSampler", "KSamplerAdvanced", "ImageScale"),
    *("WanFirstLastFrameToVideo", "WanVaceToVideo", "WanImageToVideo", "EmptyHunyuanLatentVideo"),
    *("TrimVideoLatent", "VAEDecode", "ImageCrop", "CreateVideo", "SaveVideo", "SaveImage"),
}
"""Nodes of ComfyUI itself, as its 0.3.64 lists them."""
LOADED: Final = {
    "CLIPLoader": ("clip_name", "text_encoders"),
    "UNETLoader": ("unet_name", "diffusion_models"),
    "VAELoader": ("vae_name", "vae"),
    "CLIPVisionLoader": ("clip_name", "clip_vision"),
    "LoadWanVideoT5TextEncoder": ("model_name", "text_encoders"),
    "WanVideoModelLoader": ("model", "diffusion_models"),
    "WanVideoVAELoader": ("model_name", "vae"),
}
"""The input that names a file of weights, and the folder that it is in."""
MAKERS: Final = {
    "WanFirstLastFrameToVideo": "length",
    "WanVaceToVideo": "length",
    "WanImageToVideo": "length",
    "WanVideoImageToVideoEncode": "num_frames",
    "EmptyHunyuanLatentVideo": "length",
}
"""Nodes that say how large the frames are that are generated, each with its input for how many."""


@cache
def model_of(id_: str) -> Model:
    root = Path(load.__file__).parent / "models"
    return read_manifest(root / id_, root)


@cache
def parts(id_: str, variant: str | None) -> tuple[Model, Workflow, Graph]:
    model = model_of(id_)
    workflow = workflow_of(model, (variant,) if variant else ())
    return model, workflow, read_graph(model, workflow)


def named(model: Model, role: Role) -> Input:
    field = model.field(role)
    assert field is not None, role
    return field


def bound(id_: str, variant: str | None = None, **by_role: Any) -> Graph:
    """The graph of a request with defaults but for these values, files named after their roles."""
    model, workflow, graph = parts(id_, variant)
    given = model.sample | {field.name: field.default for field in model.inputs if field.default is not None}
    given |= {named(model, role).name: value for role, value in by_role.items()}  # type: ignore[arg-type]
    files = {field.name: f"{field.role}.png" for field in model.inputs if field.name in model.files()}
    return Binder(model, workflow, graph).bind(given, roles_of(model, given), files)


def value(graph: Graph, node_id: str, name: str) -> Any:
    """What a node is given, through the nodes that only hold a value."""
    given = graph[node_id]["inputs"][name]
    if is_link(given) and graph[given[0]]["class_type"].startswith("Primitive"):
        return graph[given[0]]["inputs"]["value"]
    return given


def of_class(graph: Graph, *classes: str) -> list[str]:
    return [id_ for id_, node in graph.items() if node["class_type"] in classes]


def only(graph: Graph, *classes: str) -> str:
    (found,) = of_class(graph, *classes)
    return found


def size(graph: Graph, node_id: str) -> tuple[int, int]:
    return value(graph, node_id, "width"), value(graph, node_id, "height")


# -- whole ----------------------------------------------------------------------------------------------------
def test_every_workflow_is_looked_at_here() -> None:
    entries = load.Catalog.load().entries()

    found = {(entry.model.id, name) for entry in entries for name in (None, *variant_names(entry.model))}
    assert set(WORKFLOWS) == found


@pytest.mark.parametrize(("id_", "variant"), WORKFLOWS)
def test_every_public_input_reaches_a_node(id_: str, variant: str | None) -> None:
    model, workflow, graph = parts(id_, variant)

    binder = Binder(model, workflow, graph)

    assert () == binder.unbound
    assert {field.name for field in model.inputs} == set(binder.targets)


@pytest.mark.parametrize(("id_", "variant"), WORKFLOWS)
def test_every_node_has_a_title_of_its_own_and_serves_the_output(id_: str, variant: str | None) -> None:
    _, workflow, graph = parts(id_, variant)

    titles = [node["_meta"]["title"] for node in graph.values()]
    needed, left = set(), list(workflow.outputs)
    while left:
        id_ = left.pop()
        needed.add(id_)
        links = [given[0] for given in graph[id_]["inputs"].values() if is_link(given)]
        left += [link for link in links if link not in needed]

    assert len(set(titles)) == len(titles)
    assert all(titles)
    assert set(graph) == needed


@pytest.mark.parametrize(("id_", "variant"), WORKFLOWS)
def test_nodes_are_of_comfyui_itself_or_of_a_pack_that_is_named(id_: str, variant: str | None) -> None:
    _, workflow, graph = parts(id_, variant)

    used = {node["class_type"] for node in graph.values()}
    packed = {name for pack in workflow.node_packs for name in pack.nodes}

    assert used - CORE == packed
    assert (WRAPPER == variant) == bool(packed)
    assert all(pack.source.startswith("https://github.com/") for pack in workflow.node_packs)


@pytest.mark.parametrize(("id_", "variant"), WORKFLOWS)
def test_the_weights_are_those_that_the_graph_loads(id_: str, variant: str | None) -> None:
    _, workflow, graph = parts(id_, variant)

    loaded = set()
    for node in graph.values():
        if node["class_type"] in LOADED:
            name, folder = LOADED[node["class_type"]]
            loaded.add((folder, node["inputs"][name]))

    assert loaded == {(weight.folder, weight.file) for weight in workflow.weights}
    assert len(loaded) == len(workflow.weights)
    for weight in workflow.weights:
        assert "Apache-2.0" == weight.licence
        assert weight.path.endswith(weight.file)
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", weight.source)
        assert weight.sha256 is None or re.fullmatch(r"[0-9a-f]{64}", weight.sha256)
        assert weight.bytes is None or weight.bytes > 10**8


def test_one_file_is_the_same_everywhere() -> None:
    known: dict[str, tuple[int | None, str | None]] = {}
    for id_, variant in WORKFLOWS:
        for weight in parts(id_, variant)[1].weights:
            assert (weight.bytes, weight.sha256) == known.setdefault(weight.file, (weight.bytes, weight.sha256))


@pytest.mark.parametrize(("id_", "variant"), WORKFLOWS)
def test_loras_go_behind_every_diffusion_model_that_core_nodes_load(id_: str, variant: str | None) -> None:
    _, workflow, graph = parts(id_, variant)

    assert of_class(graph, "UNETLoader") == list(workflow.loras)


# -- sizes ----------------------------------------------------------------------------------------------------
def sizes() -> list[tuple[str, str | None, str]]:
    return [(*one, str(text)) for one in WORKFLOWS for text in named(model_of(one[0]), "resolution").enum or ()]


@pytest.mark.parametrize(("id_", "variant", "text"), sizes())
def test_every_size_is_exactly_what_comes_out(id_: str, variant: str | None, text: str) -> None:
    graph = bound(id_, variant, resolution=text)
    asked = parse_resolution(text)
    crop = only(graph, "ImageCrop")
    makes = size(graph, only(graph, *MAKERS))

    assert asked == size(graph, crop)
    for side, name, made, wanted in zip((0, 1), "xy", makes, asked, strict=True):
        assert 0 == made % 16, side
        assert 0 <= made - wanted < 16, side
        assert (made - wanted) // 2 == graph[crop]["inputs"][name], side
    for fit in of_class(graph, "ImageScale"):
        assert makes == size(graph, fit)
        assert "center" == graph[fit]["inputs"]["crop"]


def test_there_are_sizes_that_are_no_multiple_of_16() -> None:
    odd = [text for _, _, text in sizes() if any(side % 16 for side in parse_resolution(text))]

    assert {"540x960 (9:16)", "1440:810 (16:9)", "1024:1365 (3:4)"} <= set(odd)


@pytest.mark.parametrize(("id_", "variant"), WORKFLOWS)
def test_what_is_saved_was_cropped(id_: str, variant: str | None) -> None:
    _, workflow, graph = parts(id_, variant)
    (saved,) = workflow.outputs
    while graph[saved]["class_type"] != "ImageCrop":
        inputs = graph[saved]["inputs"]
        saved = inputs.get("images", inputs.get("video"))[0]

    assert graph[graph[saved]["inputs"]["image"][0]]["class_type"] in ("VAEDecode", "WanVideoDecode")


# -- time -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("id_", "variant"), VIDEO_WORKFLOWS)
@pytest.mark.parametrize("frames", [81, 141])
def test_frames_pass_unchanged(id_: str, variant: str | None, frames: int) -> None:
    graph = bound(id_, variant, frames=frames)
    maker = only(graph, *MAKERS)

    assert frames == value(graph, maker, MAKERS[graph[maker]["class_type"]])
    assert 1 == frames % 4  # what the models can make


@pytest.mark.parametrize(("id_", "variant"), VIDEO_WORKFLOWS)
@pytest.mark.parametrize("fps", [12, 24])
def test_frames_per_second_are_what_the_file_has(id_: str, variant: str | None, fps: int) -> None:
    graph = bound(id_, variant, fps=fps)

    if WRAPPER == variant:
        assert fps == graph["609"]["inputs"]["frame_rate"]
    else:
        rate = value(graph, only(graph, "CreateVideo"), "fps")
        assert fps == rate
        assert isinstance(rate, float)


def test_text_to_image_makes_one_frame() -> None:
    assert 1 == bound(T2I)[only(parts(T2I, None)[2], "EmptyHunyuanLatentVideo")]["inputs"]["length"]


# -- one name is not one binding ------------------------------------------------------------------------------
def experts(graph: Graph) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """What the sampler of the high-noise expert and that of the low-noise one are given."""
    high, low = sorted(
        of_class(graph, "KSamplerAdvanced"), key=lambda id_: graph[id_]["inputs"]["add_noise"] != "enable"
    )
    names = ("steps", "cfg", "noise_seed", "start_at_step", "end_at_step", "add_noise")
    return tuple({name: value(graph, id_, name) for name in names} for id_ in (high, low))  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("id_", "steps"), [*((FLF, n) for n in range(6, 21)), *((VACE, n) for n in range(2, 41))]
)
def test_two_experts_share_the_steps(id_: str, steps: int) -> None:
    high, low = experts(bound(id_, steps=steps))

    assert (steps, steps) == (high["steps"], low["steps"])
    assert (0, steps // 2) == (high["start_at_step"], high["end_at_step"])
    assert steps // 2 == low["start_at_step"]
    assert 0 < low["start_at_step"] < steps <= low["end_at_step"]


@pytest.mark.parametrize("id_", [FLF, VACE])
def test_two_experts_share_guidance_and_shift(id_: str) -> None:
    graph = bound(id_, guidance=2.5, shift=7, seed=5)
    high, low = experts(graph)

    assert (2.5, 2.5) == (high["cfg"], low["cfg"])
    assert 5 == high["noise_seed"]
    assert [7.0, 7.0] == [value(graph, id_, "shift") for id_ in of_class(graph, "ModelSamplingSD3")]


def test_the_latent_goes_from_the_high_noise_expert_to_the_low_noise_one() -> None:
    for id_ in (FLF, VACE, T2I):
        graph = parts(id_, None)[2]
        for sampler in of_class(graph, "KSamplerAdvanced"):
            inputs = graph[sampler]["inputs"]
            noise = "high_noise" if "enable" == inputs["add_noise"] else "low_noise"
            shift = graph[inputs["model"][0]]
            assert noise in graph[shift["inputs"]["model"][0]]["inputs"]["unet_name"]
            before = graph[inputs["latent_image"][0]]["class_type"]
            assert ("low_noise" == noise) == ("KSamplerAdvanced" == before)
            assert ("high_noise" == noise) == ("enable" == inputs["return_with_leftover_noise"])


def test_fusionx_reaches_its_sampler_on_either_kind_of_nodes() -> None:
    given: dict[str, Any] = {"steps": 6, "guidance": 1.5, "shift": 3, "seed": 9, "prompt": "a fox"}
    core, wrapper = bound(FUSIONX, **given), bound(FUSIONX, WRAPPER, **given)

    names = ("steps", "cfg", "seed")
    assert [6, 1.5, 9] == [core["598"]["inputs"][name] for name in names]
    assert [6, 1.5, 9] == [wrapper["598"]["inputs"][name] for name in names]
    assert (3.0, 3.0) == (core["599"]["inputs"]["shift"], wrapper["598"]["inputs"]["shift"])
    assert ("a fox", "a fox") == (core["600"]["inputs"]["text"], wrapper["600"]["inputs"]["positive_prompt"])
    assert core["601"]["inputs"]["text"] == wrapper["600"]["inputs"]["negative_prompt"]


# -- files and words ------------------------------------------------------------------------------------------
def test_images_arrive_where_they_belong() -> None:
    first_last = bound(FLF)
    maker = first_last["67"]["inputs"]
    for end in ("start_image", "end_image"):
        fit = first_last[maker[end][0]]["inputs"]
        assert f"{end}.png" == first_last[fit["image"][0]]["inputs"]["image"]

    assert "reference_image.png" == bound(VACE)["118"]["inputs"]["image"]
    assert "start_image.png" == bound(FUSIONX)["608"]["inputs"]["image"]
    assert "start_image.png" == bound(FUSIONX, WRAPPER)["608"]["inputs"]["image"]


def test_a_negative_prompt_replaces_the_graphs_own() -> None:
    negative = parts(T2I, None)[2]["72"]["inputs"]["text"]

    assert negative
    assert negative == bound(T2I)["72"]["inputs"]["text"]
    assert "blurry" == bound(T2I, negative_prompt="blurry")["72"]["inputs"]["text"]
    assert "a fox" == bound(T2I, prompt="a fox")["89"]["inputs"]["text"]


def test_every_request_for_one_text_gets_a_seed_of_its_own() -> None:
    seeds = {experts(bound(T2I))[0]["noise_seed"] for _ in range(8)}

    assert 8 == len(seeds)
    assert all(0 <= seed < 2**64 for seed in seeds)
