"""Workflows and descriptions of nodes for the tests of `rushes models import`."""

import json
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import comfyui_workflow_templates_json

from rushes.catalog.bindings import Binder
from rushes.catalog.importing.fields import Field
from rushes.catalog.importing.propose import Proposal
from rushes.catalog.importing.write import files_of
from rushes.catalog.load import load_entry
from rushes.catalog.model import Model
from rushes.catalog.roles import roles_of
from rushes.catalog.workflow import Graph, read_graph, workflow_of

OBJECT_INFO = Path(__file__).parent.parent / "data" / "comfyui_object_info.json"
"""Facts of what ComfyUI 0.3.64 answers at /object_info: the classes of these tests, without files and prose."""
TEMPLATES = (
    "video_wan2_2_14B_flf2v",
    "video_wan_vace_14B_ref2v",
    "image_to_video_wan",
    "text_to_video_wan",
)
"""Official workflows whose nodes that ComfyUI has."""


@cache
def _object_info() -> str:
    return OBJECT_INFO.read_text("utf-8")


def object_info() -> dict[str, Any]:
    """The recorded facts, and a tooltip of our own where a real server has one of its own."""
    infos = dict(json.loads(_object_info()))
    infos["KSampler"]["input"]["required"]["steps"][1]["tooltip"] = "How often the picture is refined."
    return infos


def template(name: str) -> dict[str, Any]:
    """An official workflow, as ComfyUI's pages save it."""
    folder = resources.files(comfyui_workflow_templates_json) / "templates"
    return dict(json.loads((folder / f"{name}.json").read_text("utf-8")))


def node(class_type: str, title: str = "", **inputs: Any) -> dict[str, Any]:
    made: dict[str, Any] = {"class_type": class_type, "inputs": inputs}
    return made | ({"_meta": {"title": title}} if title else {})


def text_to_image() -> Graph:
    """The workflow that every ComfyUI starts with."""
    return {
        "4": node("CheckpointLoaderSimple", ckpt_name="model.safetensors"),
        "5": node("EmptyLatentImage", width=1024, height=1024, batch_size=1),
        "6": node("CLIPTextEncode", text="a lighthouse in a storm", clip=["4", 1]),
        "7": node("CLIPTextEncode", text="blurry", clip=["4", 1]),
        "3": node(
            "KSampler",
            seed=156680208700286,
            steps=20,
            cfg=8,
            sampler_name="euler",
            scheduler="normal",
            denoise=1,
            model=["4", 0],
            positive=["6", 0],
            negative=["7", 0],
            latent_image=["5", 0],
        ),
        "8": node("VAEDecode", samples=["3", 0], vae=["4", 2]),
        "9": node("SaveImage", images=["8", 0], filename_prefix="ComfyUI"),
    }


def first_last() -> Graph:
    graph = text_to_image()
    graph["20"] = node("LoadImage", image="a.png")
    graph["21"] = node("LoadImage", image="b.png")
    graph["22"] = node(
        "ImageScale", image=["21", 0], upscale_method="lanczos", width=640, height=640, crop="center"
    )
    graph["5"] = node(
        "WanFirstLastFrameToVideo",
        width=640,
        height=640,
        length=81,
        batch_size=1,
        positive=["6", 0],
        negative=["7", 0],
        vae=["4", 2],
        start_image=["22", 0],
        end_image=["20", 0],
    )
    graph["3"]["inputs"] |= {"positive": ["5", 0], "negative": ["5", 1], "latent_image": ["5", 2]}
    graph["30"] = node("CreateVideo", images=["8", 0], fps=16)
    graph["9"] = node("SaveVideo", video=["30", 0], filename_prefix="video", format="auto", codec="auto")
    return graph


def two_experts(**second: Any) -> Graph:
    """Two samplers that share a schedule, as Wan 2.2's templates have them."""
    graph = text_to_image()
    expert: dict[str, Any] = {
        "steps": 20,
        "cfg": 3.5,
        "sampler_name": "euler",
        "scheduler": "simple",
        "positive": ["6", 0],
        "negative": ["7", 0],
    }
    graph["3"] = node(
        "KSamplerAdvanced",
        **expert,
        add_noise="enable",
        noise_seed=7,
        start_at_step=0,
        end_at_step=10,
        return_with_leftover_noise="enable",
        model=["54", 0],
        latent_image=["5", 0],
    )
    last: dict[str, Any] = {
        **expert,
        "add_noise": "disable",
        "noise_seed": 0,
        "start_at_step": 10,
        "end_at_step": 10000,
        "return_with_leftover_noise": "disable",
        "model": ["55", 0],
        "latent_image": ["3", 0],
        **second,
    }
    graph["2"] = node("KSamplerAdvanced", **last)
    graph["55"] = node("ModelSamplingSD3", shift=8, model=["4", 0])
    graph["54"] = node("ModelSamplingSD3", shift=8, model=["4", 0])
    graph["8"]["inputs"]["samples"] = ["2", 0]
    return graph


def written(proposal: Proposal, root: Path, id_: str = "local/imported") -> tuple[Model, Binder]:
    """The proposal as a folder, read back as a server would; raises where anything is wrong with it."""
    folder = root / id_
    folder.mkdir(parents=True)
    for name, text in files_of(proposal, id_=id_, name="Imported", source="workflow.json").items():
        (folder / name).write_text(text, "utf-8")
    model = load_entry(folder, root).model
    workflow = workflow_of(model)
    return model, Binder(model, workflow, read_graph(model, workflow))


def by_role(proposal: Proposal) -> dict[str, Field]:
    return {field.role: field for field in proposal.fields if field.role != "other"}


def named(proposal: Proposal, name: str) -> Field:
    return next(field for field in proposal.fields if field.name == name)


def bound(proposal: Proposal, root: Path, **changed: Any) -> Graph:
    """The graph of a request that changes some inputs and takes the defaults of the others."""
    model, binder = written(proposal, root)
    given = {f.name: f.default for f in model.inputs if f.default is not None} | model.sample | changed
    files = {name: f"rushes/{name}.png" for name in model.files()}
    return binder.bind(given, roles_of(model, given) | files, files)


def inputs(graph: Graph, *targets: str) -> list[Any]:
    parts = [target.split(".") for target in targets]
    return [graph[id_]["inputs"][name] for id_, name in parts]
