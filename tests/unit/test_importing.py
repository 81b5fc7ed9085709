"""From a graph to a proposed model: what is found, what it is called, what it drives."""

import copy
from pathlib import Path

import pytest

from rushes.catalog.audit import audit
from rushes.catalog.importing.propose import CannotImport, propose
from rushes.catalog.samples import sample_names
from rushes.catalog.workflow import Graph
from support.importing import (
    bound,
    by_role,
    first_last,
    inputs,
    named,
    node,
    object_info,
    text_to_image,
    two_experts,
    written,
)


# -- a whole one ----------------------------------------------------------------------------------------------
def test_text_to_image_gets_the_inputs_that_people_change(tmp_path: Path) -> None:
    proposal = propose(text_to_image(), object_info())

    assert [
        ("6_text", "prompt"),
        ("7_text", "negative_prompt"),
        ("5_widthx5_height", "resolution"),
        ("3_seed", "seed"),
        ("3_steps", "steps"),
        ("3_cfg", "guidance"),
    ] == [(field.name, field.role) for field in proposal.fields]
    assert ("image", ("text-to-image",), ("4",)) == (proposal.output, proposal.categories, proposal.loras)
    assert [("model.safetensors", "checkpoints")] == [(w.file, w.folder) for w in proposal.weights]
    model, binder = written(proposal, tmp_path)
    assert () == binder.unbound
    assert (("6_text",), {"6_text": "a lighthouse in a storm"}) == (model.required, model.sample)


def test_types_bounds_and_defaults_are_the_nodes_own(tmp_path: Path) -> None:
    graph = text_to_image()
    graph["3"]["inputs"]["cfg"] = 8.000000000000002  # as pages save it

    model, _ = written(propose(graph, object_info()), tmp_path)

    fields = {field.name: field for field in model.inputs}
    seed, steps, cfg = fields["3_seed"], fields["3_steps"], fields["3_cfg"]
    assert ("integer", 20, 1, 10000) == (steps.type, steps.default, steps.minimum, steps.maximum)
    assert ("float", 8.0, 0.0, 100.0) == (cfg.type, cfg.default, cfg.minimum, cfg.maximum)
    assert ("integer", 156680208700286, None, None) == (seed.type, seed.default, seed.minimum, seed.maximum)
    assert "How often the picture is refined." == steps.description


def test_sizes_to_choose_from_have_about_as_many_pixels() -> None:
    size = by_role(propose(text_to_image(), object_info()))["resolution"]

    assert "1024x1024 (1:1)" == size.default
    assert size.enum is not None
    assert {"768x1360 (9:16)", "1360x768 (16:9)", "1024x1024 (1:1)"} <= set(size.enum)
    for text in size.enum:
        width, height = map(int, str(text).partition(" ")[0].split("x"))
        assert 0 == width % 16 == height % 16
        assert 0.95 < width * height / 1024**2 < 1.05


def test_the_workflows_own_size_is_one_of_them_whatever_it_is() -> None:
    graph = text_to_image()
    graph["5"]["inputs"] |= {"width": 1000, "height": 504}

    size = by_role(propose(graph, object_info()))["resolution"]

    assert "1000x504" == size.default
    assert size.enum is not None
    assert "1000x504" in size.enum


# -- prompts --------------------------------------------------------------------------------------------------
def test_prompts_are_told_apart_by_where_they_lead_not_by_their_place() -> None:
    graph = text_to_image()
    graph["3"]["inputs"] |= {"positive": ["7", 0], "negative": ["6", 0]}

    roles = by_role(propose(graph, object_info()))

    assert ("7_text", "6_text") == (roles["prompt"].name, roles["negative_prompt"].name)


def test_one_text_for_both_is_the_prompt() -> None:
    graph = text_to_image()
    graph["7"] = node("ConditioningZeroOut", conditioning=["6", 0])

    roles = by_role(propose(graph, object_info()))

    assert "6_text" == roles["prompt"].name
    assert "negative_prompt" not in roles


def test_a_prompt_is_found_in_the_primitive_that_feeds_it() -> None:
    graph = text_to_image()
    graph["10"] = node("PrimitiveStringMultiline", value="a mountain")
    graph["11"] = node("PrimitiveString", value="ugly")
    graph["6"]["inputs"]["text"] = ["10", 0]
    graph["7"]["inputs"]["text"] = ["11", 0]

    roles = by_role(propose(graph, object_info()))

    assert ("10_value", "a mountain") == (roles["prompt"].name, roles["prompt"].default)
    assert ("11_value", "ugly") == (roles["negative_prompt"].name, roles["negative_prompt"].default)


def test_a_guider_needs_no_positive() -> None:
    graph = text_to_image()
    del graph["7"]
    graph["12"] = node("FluxGuidance", conditioning=["6", 0], guidance=3.5)
    graph["13"] = node("BasicGuider", model=["4", 0], conditioning=["12", 0])
    graph["14"] = node("RandomNoise", noise_seed=5)
    graph["15"] = node("KSamplerSelect", sampler_name="euler")
    graph["16"] = node("BasicScheduler", model=["4", 0], scheduler="simple", steps=4, denoise=1.0)
    graph["3"] = node(
        "SamplerCustomAdvanced",
        noise=["14", 0],
        guider=["13", 0],
        sampler=["15", 0],
        sigmas=["16", 0],
        latent_image=["5", 0],
    )

    roles = by_role(propose(graph, object_info()))

    assert {
        "prompt": "6_text",
        "resolution": "5_widthx5_height",
        "seed": "14_noise_seed",
        "steps": "16_steps",
        "guidance": "12_guidance",
    } == {role: field.name for role, field in roles.items()}


def test_texts_that_are_equal_have_one_input(tmp_path: Path) -> None:
    graph = text_to_image()
    graph["6"] = node("CLIPTextEncodeFlux", clip=["4", 1], clip_l="a fox", t5xxl="a fox", guidance=3.5)

    changed = bound(propose(graph, object_info()), tmp_path, **{"6_clip_l": "a hare"})

    assert ["a hare", "a hare"] == inputs(changed, "6.clip_l", "6.t5xxl")


def test_an_empty_prompt_has_a_sample_all_the_same(tmp_path: Path) -> None:
    graph = text_to_image()
    graph["6"]["inputs"]["text"] = ""

    model, _ = written(propose(graph, object_info()), tmp_path)

    assert ["6_text"] == list(model.sample)


# -- files ----------------------------------------------------------------------------------------------------
def image_to_image() -> Graph:
    graph = text_to_image()
    graph["10"] = node("LoadImage", image="somebody's.png")
    graph["5"] = node("VAEEncode", pixels=["10", 0], vae=["4", 2])
    graph["3"]["inputs"]["denoise"] = 0.6
    return graph


def test_image_to_image_takes_a_file_and_how_much_to_keep_of_it(tmp_path: Path) -> None:
    proposal = propose(image_to_image(), object_info())

    image = by_role(proposal)["start_image"]
    assert ("10_image", True, None) == (image.name, image.required, image.default)
    assert "guess" in image.remark
    assert 0.6 == named(proposal, "3_denoise").default
    model, _ = written(proposal, tmp_path)
    assert model.sample["10_image"] in sample_names()
    assert ("image-to-image",) == model.categories


def test_images_are_called_by_what_they_lead_to() -> None:
    roles = by_role(propose(first_last(), object_info()))

    assert ("21_image", "20_image") == (roles["start_image"].name, roles["end_image"].name)
    assert ("", "") == (roles["start_image"].remark, roles["end_image"].remark)


def test_a_size_that_stands_twice_is_set_twice(tmp_path: Path) -> None:
    changed = bound(propose(first_last(), object_info()), tmp_path, **{"5_widthx5_height": "848x480 (16:9)"})

    assert [848, 480, 848, 480] == inputs(changed, "5.width", "5.height", "22.width", "22.height")


def test_another_size_is_left_alone_and_said() -> None:
    graph = first_last()
    graph["22"]["inputs"]["height"] = 320

    proposal = propose(graph, object_info())

    assert ("22", "height") not in proposal.bindings
    assert any("22 (ImageScale)" in note and "640x320" in note for note in proposal.notes)


def test_frames_are_offered_as_the_node_makes_them() -> None:
    roles = by_role(propose(first_last(), object_info()))

    assert (17, 33, 49, 65, 81) == roles["frames"].enum
    assert (81, "integer", 16) == (roles["frames"].default, roles["fps"].type, roles["fps"].default)


def test_a_second_start_image_is_a_reference() -> None:
    graph = first_last()
    graph["31"] = copy.deepcopy(graph["5"])
    graph["31"]["inputs"] |= {"start_image": ["40", 0], "positive": ["5", 0], "negative": ["5", 1]}
    graph["40"] = node("LoadImage", image="c.png")
    graph["3"]["inputs"] |= {"positive": ["31", 0]}

    roles = [field.role for field in propose(graph, object_info()).fields if field.name.endswith("_image")]

    assert ["start_image", "end_image", "reference_image"] == roles


def test_a_video_is_an_input_and_audio_is_said_to_be_none() -> None:
    graph = text_to_image()
    graph["10"] = node("LoadVideo", file="dance.mp4")
    graph["11"] = node("GetVideoComponents", video=["10", 0])
    graph["12"] = node("LoadAudio", audio="song.mp3")
    graph["5"] = node("VAEEncode", pixels=["11", 0], vae=["4", 2])
    graph["30"] = node("CreateVideo", images=["8", 0], audio=["12", 0], fps=24)
    graph["9"] = node("SaveVideo", video=["30", 0], filename_prefix="video", format="auto", codec="auto")

    proposal = propose(graph, object_info())

    video = by_role(proposal)["source_video"]
    assert ("10_file", True) == (video.name, video.required)
    assert str(video.sample).startswith("https://")
    assert ("video-to-video",) == proposal.categories
    assert any("12.audio" in note for note in proposal.notes)


# -- what else people want ------------------------------------------------------------------------------------
def test_a_node_with_a_title_of_its_authors_is_proposed() -> None:
    graph = text_to_image()
    graph["30"] = node(
        "ImageScale", "Final size", image=["8", 0], upscale_method="area", width=8, height=8, crop="disabled"
    )
    graph["9"]["inputs"]["images"] = ["30", 0]

    proposal = propose(graph, object_info())

    method = named(proposal, "30_upscale_method")
    assert ("Final size: upscale method", "area") == (method.title, method.default)
    assert method.enum is not None
    assert "lanczos" in method.enum


def test_a_node_that_is_called_as_usual_is_not() -> None:
    graph = text_to_image()
    graph["30"] = node(
        "ImageScale", "Fit it", image=["8", 0], upscale_method="area", width=8, height=8, crop="disabled"
    )
    graph["9"]["inputs"]["images"] = ["30", 0]
    info = object_info()
    info["ImageScale"] = {**info["ImageScale"], "display_name": "Fit it"}

    proposal = propose(graph, info)

    assert [] == [field.name for field in proposal.fields if field.name == "30_upscale_method"]


def test_exposing_adds_any_input_with_its_choices(tmp_path: Path) -> None:
    proposal = propose(text_to_image(), object_info(), expose=["3.sampler_name", "3.steps"])

    sampler = named(proposal, "3_sampler_name")
    assert sampler.enum is not None
    assert "uni_pc" in sampler.enum
    assert 1 == sum(field.name == "3_steps" for field in proposal.fields)
    assert ["uni_pc"] == inputs(bound(proposal, tmp_path, **{"3_sampler_name": "uni_pc"}), "3.sampler_name")


def test_exposing_what_follows_another_input_sets_it_free(tmp_path: Path) -> None:
    proposal = propose(two_experts(), object_info(), expose=["2.cfg"])

    changed = bound(proposal, tmp_path, **{"3_cfg": 4.0, "2_cfg": 1.0})

    assert [4.0, 1.0] == inputs(changed, "3.cfg", "2.cfg")


def test_exposing_an_input_that_the_graph_leaves_out_puts_its_default_there(tmp_path: Path) -> None:
    graph = text_to_image()
    del graph["5"]["inputs"]["batch_size"]

    proposal = propose(graph, object_info(), expose=["5.batch_size"])

    assert 1 == named(proposal, "5_batch_size").default
    assert [3] == inputs(bound(proposal, tmp_path, **{"5_batch_size": 3}), "5.batch_size")


@pytest.mark.parametrize(
    ("exposed", "said"),
    [
        ("3", "write NODE.INPUT"),
        (
            "33.steps",
            "there is no node 33; the nodes are 4 (CheckpointLoaderSimple), 5 (EmptyLatentImage), 6 (",
        ),
        ("ksampler.steps", "write the node's number: 3.steps"),
        ("3.step", "did you mean steps?"),
        ("3.model", "it comes from node 4 (CheckpointLoaderSimple); expose 4.ckpt_name instead"),
    ],
)
def test_exposing_what_is_not_there_says_what_is(exposed: str, said: str) -> None:
    with pytest.raises(CannotImport) as error:
        propose(text_to_image(), object_info(), expose=[exposed])

    assert said in str(error.value)


@pytest.mark.parametrize(
    "name", ["filename_prefix", "output_path", "save dir", "folder_name", "custom_directory", "lora", "clip"]
)
def test_no_request_may_choose_a_path(tmp_path: Path, name: str) -> None:
    graph = text_to_image()
    value = "x.safetensors" if name == "lora" else "x.mp4" if name == "clip" else "x"
    graph["70"] = node("WriteSomewhere", "My writer", images=["8", 0], **{name: value, "words": "y"})
    graph["9"]["inputs"]["images"] = ["70", 0]

    with pytest.raises(CannotImport, match="which no request may choose"):
        propose(graph, object_info(), expose=[f"70.{name}"])

    proposal = propose(graph, object_info(), expose=["70.words"])
    model, _ = written(proposal, tmp_path)
    assert "70_words" in [field.name for field in proposal.fields]
    assert [] == [one for one in audit(model) if one.severity == "error"]


def test_a_node_with_a_title_proposes_no_paths(tmp_path: Path) -> None:
    graph = text_to_image()
    graph["70"] = node("Writer", "My writer", images=["8", 0], output_path="x", words="y")
    graph["9"]["inputs"]["images"] = ["70", 0]
    texts = {name: ["STRING", {}] for name in ("output_path", "words")}
    info = {"input": {"required": {"images": ["IMAGE"], **texts}}, "output": ["IMAGE"], "name": "Writer"}

    proposal = propose(graph, {**object_info(), "Writer": info})

    assert "70_words" in [field.name for field in proposal.fields]
    assert "70_output_path" not in [field.name for field in proposal.fields]


def test_ids_out_of_subgraphs_and_strange_names_bind(tmp_path: Path) -> None:
    graph = {f"12:{id_}": made for id_, made in text_to_image().items()}
    for made in graph.values():
        made["inputs"] = {
            name: [f"12:{value[0]}", value[1]] if isinstance(value, list) else value
            for name, value in made["inputs"].items()
        }
    graph["12:50"] = node("Strange", "Strange words", **{"a b/ü": 0.25, "images": ["12:8", 0]})
    graph["12:9"]["inputs"]["images"] = ["12:50", 0]

    proposal = propose(graph, object_info(), expose=["12:50.a b/ü"])

    field = proposal.fields[-1]
    _, binder = written(proposal, tmp_path)
    assert () == binder.unbound
    assert (("12:50", "a b/ü"),) == binder.targets[field.name]
    assert (("12:5", "width"), ("12:5", "height")) == binder.targets["12.5_widthx12.5_height"]


def test_names_that_would_be_the_same_are_told_apart(tmp_path: Path) -> None:
    graph = text_to_image()
    graph["8:1"] = node("PrimitiveFloat", value=0.5)
    graph["8.1"] = node("PrimitiveFloat", value=0.75)
    graph["60"] = node("Mix", a=["8:1", 0], b=["8.1", 0], images=["8", 0])
    graph["9"]["inputs"]["images"] = ["60", 0]

    proposal = propose(graph, object_info())

    changed = bound(proposal, tmp_path, **{"8.1_value": 0.1, "8.1_value_2": 0.2})
    assert {0.1, 0.2} == {changed["8:1"]["inputs"]["value"], changed["8.1"]["inputs"]["value"]}


# -- what comes out, and what is needed -----------------------------------------------------------------------
def test_a_workflow_that_only_previews_works_and_says_so() -> None:
    graph = text_to_image()
    graph["9"] = node("PreviewImage", images=["8", 0])

    proposal = propose(graph, object_info())

    assert ("image", ("9",)) == (proposal.output, proposal.outputs)
    assert any("only previews" in note for note in proposal.notes)


def test_of_several_that_save_the_video_is_the_result() -> None:
    graph = first_last()
    graph["50"] = node("SaveImage", images=["8", 0], filename_prefix="frames")

    proposal = propose(graph, object_info())

    assert ("video", ("9",)) == (proposal.output, proposal.outputs)


def test_a_workflow_that_saves_no_picture_is_none_for_us() -> None:
    with pytest.raises(CannotImport, match="no node of this workflow saves"):
        propose({"1": node("LoadAudio", audio="a.mp3"), "2": node("SaveAudio", audio=["1", 0])}, object_info())


def test_nodes_that_lead_nowhere_are_left_out() -> None:
    graph = text_to_image()
    graph["70"] = node("CLIPTextEncode", text="an older idea", clip=["4", 1])

    proposal = propose(graph, object_info())

    assert "70_text" not in [field.name for field in proposal.fields]
    assert "70" not in proposal.graph
    assert any("lead to no output: 70" in note for note in proposal.notes)
    with pytest.raises(CannotImport, match="leads to no output"):
        propose(graph, object_info(), expose=["70.text"])


def test_a_node_that_nobody_knows_may_be_an_output_and_stays() -> None:
    graph = text_to_image()
    graph["70"] = node("WriteSomewhere", images=["8", 0])

    proposal = propose(graph, object_info())

    assert "70" in proposal.graph
    assert any("may be an output" in note for note in proposal.notes)


def test_what_a_converter_leaves_in_a_connection_is_taken_out() -> None:
    graph = first_last()
    graph["5"]["inputs"]["end_image"] = 768

    proposal = propose(graph, object_info())

    assert "end_image" not in proposal.graph["5"]["inputs"]
    assert any("768" in note and "end_image" in note for note in proposal.notes)


def test_sources_of_weights_and_packs_come_from_the_pages() -> None:
    graph = text_to_image()
    graph["4"]["inputs"]["ckpt_name"] = "sub\\model.safetensors"
    graph["30"] = node("Sharpen+", images=["8", 0])
    graph["9"]["inputs"]["images"] = ["30", 0]
    address = "https://huggingface.co/some/repository/resolve/main/a/model.safetensors"
    listed = {"name": "model.safetensors", "url": address, "directory": "checkpoints", "hash": "AB" * 32}
    loader = {"type": "CheckpointLoaderSimple", "properties": {"cnr_id": "comfy-core", "models": [listed]}}
    sharpen = {"type": "Sharpen+", "properties": {"cnr_id": "essentials", "aux_id": "someone/essentials"}}
    pages = {"nodes": [loader], "definitions": {"subgraphs": [{"nodes": [sharpen]}]}}

    proposal = propose(graph, object_info(), workflow=pages)

    (weight,), (pack,) = proposal.weights, proposal.packs
    assert ("sub/model.safetensors", "checkpoints") == (weight.file, weight.folder)
    assert ("some/repository", "a/model.safetensors", "ab" * 32) == (weight.source, weight.path, weight.sha256)
    assert ("essentials", "https://github.com/someone/essentials", ("Sharpen+",)) == (
        pack.name,
        pack.source,
        pack.nodes,
    )
    assert any("has no Sharpen+" in note for note in proposal.notes)


def test_a_pack_without_an_address_is_a_note() -> None:
    info = object_info()
    info["Sharpen+"] = {**info["ImageScale"], "python_module": "custom_nodes.essentials", "name": "Sharpen+"}
    graph = text_to_image()
    graph["30"] = node("Sharpen+", image=["8", 0])
    graph["9"]["inputs"]["images"] = ["30", 0]

    proposal = propose(graph, info)

    assert [] == proposal.packs
    assert any("node pack essentials (Sharpen+)" in note for note in proposal.notes)


def test_without_a_server_types_are_guessed_and_that_is_said(tmp_path: Path) -> None:
    proposal = propose(first_last())

    roles = by_role(proposal)
    assert ("21_image", "20_image") == (roles["start_image"].name, roles["end_image"].name)
    assert ("float", None) == (roles["guidance"].type, roles["guidance"].maximum)
    assert ("5_widthx5_height", "5_length", "6_text") == (
        roles["resolution"].name,
        roles["frames"].name,
        roles["prompt"].name,
    )
    assert any("no ComfyUI was asked" in note for note in proposal.notes)
    assert ("video", ("4",)) == (proposal.output, proposal.loras)
    assert () == written(proposal, tmp_path)[1].unbound


def test_nothing_is_changed_in_the_graph_that_was_given() -> None:
    graph = text_to_image()

    propose(graph, object_info())

    assert text_to_image() == graph
