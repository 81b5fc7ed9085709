"""What `rushes models check` finds in a workflow, with and without what a ComfyUI has."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rushes.catalog.audit import Finding, Held, Holdings, audit, audit_engines, download, needs_of
from rushes.catalog.load import load_model
from rushes.catalog.model import Model
from rushes.catalog.workflow import Weight

STUB_NODES = Path(__file__).parent.parent / "support" / "comfyui_stub_nodes.json"
SIDE = {"default": 832, "min": 16, "max": 16384, "step": 16}


def node(output: list[str], *, saves: bool = False, **required: list[Any]) -> dict[str, Any]:
    return {
        "input": {"required": required},
        "output": output,
        "output_node": saves,
        "python_module": "nodes",
    }


NODES: dict[str, Any] = {
    **json.loads(STUB_NODES.read_text()),
    "UNETLoader": node(["MODEL"], unet_name=[["wan.safetensors", "sub/low.safetensors"]]),
    "Prompt": node(["CONDITIONING"], text=["STRING", {"multiline": True}]),
    "WanImageToVideo": node(
        ["IMAGE"],
        model=["MODEL", {}],
        positive=["CONDITIONING", {}],
        width=["INT", SIDE],
        height=["INT", SIDE],
        length=["INT", {"default": 81, "min": 1, "max": 16384, "step": 4}],
        steps=["INT", {"default": 20, "min": 1, "max": 30}],
        seed=["INT", {"default": 0, "min": 0, "max": 2**64 - 1}],
        sampler=[["euler", "dpmpp_2m"]],
    ),
}
GRAPH: dict[str, Any] = {
    "1": {"class_type": "UNETLoader", "inputs": {"unet_name": "wan.safetensors"}},
    "2": {"class_type": "Prompt", "inputs": {"text": "a/b or ../c"}, "_meta": {"title": "Positive"}},
    "3": {
        "class_type": "WanImageToVideo",
        "inputs": {
            "model": ["1", 0],
            "positive": ["2", 0],
            "width": 640,
            "height": 480,
            "length": 81,
            "steps": 20,
            "seed": 1,
            "sampler": "euler",
        },
    },
    "4": {"class_type": "CreateVideo", "inputs": {"images": ["3", 0], "fps": 16.0}},
    "5": {
        "class_type": "SaveVideo",
        "inputs": {"video": ["4", 0], "filename_prefix": "video/x", "format": "auto", "codec": "auto"},
    },
}
INPUTS: dict[str, dict[str, Any]] = {
    "2_text": {"type": "string", "role": "prompt", "default": "a fox"},
    "3_steps": {"type": "integer", "role": "steps", "minimum": 2, "maximum": 30, "default": 20},
    "3_seed": {"type": "integer", "role": "seed", "default": 7},
}
WEIGHT = {
    "file": "wan.safetensors",
    "folder": "diffusion_models",
    "source": "someone/wan",
    "path": "split files/wan.safetensors",
    "bytes": 14_294_736_160,
    "licence": "Apache-2.0",
}
Make = Callable[..., Model]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A model whose graph, inputs and table differ from those above in what is given; None removes."""

    def build(
        nodes: dict[str, Any] | None = None,
        inputs: dict[str, Any] | None = None,
        *,
        set_: dict[str, Any] | None = None,
        output: str = "video",
        required: tuple[str, ...] = ("2_text",),
        **table: Any,
    ) -> Model:
        graph = json.loads(json.dumps({**GRAPH, **(nodes or {})}))
        for key, value in (set_ or {}).items():
            id_, _, name = key.partition(".")
            graph[id_]["inputs"][name] = value
        folder = tmp_path / "me" / "mine"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "graph.json").write_text(json.dumps({k: v for k, v in graph.items() if v}))
        lines = ['name = "Mine"', f'output = "{output}"', f"required = {json.dumps(required)}"]
        lines += ['graph = "graph.json"']
        for name, keys in {**INPUTS, **(inputs or {})}.items():
            lines += ["[[inputs]]", f'name = "{name}"', f'title = "{name}"']
            lines += [f"{key} = {json.dumps(value)}" for key, value in (keys or {}).items()]
        lines += ["[engines.comfyui]", *(f"{k} = {json.dumps(v)}" for k, v in table.items() if k == "outputs")]
        for kind, entries in {"weights": [WEIGHT], **table}.items():
            for entry in entries if kind in ("weights", "node_packs") else ():
                lines.append(f"[[engines.comfyui.{kind}]]")
                lines += [f"{key} = {json.dumps(value)}" for key, value in entry.items()]
        lines += ["[engines.comfyui.bindings]"]
        lines += [f'"{k}" = {json.dumps(v)}' for k, v in table.get("bindings", {}).items()]
        (folder / "model.toml").write_text("\n".join(lines))
        return load_model(folder, tmp_path)

    return build


def live(nodes: dict[str, Any] | None = None, **more: Any) -> Holdings:
    return Holdings("http://comfy", nodes={**NODES, **(nodes or {})}, **more)


def kinds(found: list[Finding]) -> list[tuple[str, str, str]]:
    return [(one.severity, one.kind, one.where) for one in found]


def test_a_model_that_fits_is_found_well_with_and_without_a_server(make: Make) -> None:
    model = make()
    assert [] == audit(model)
    assert [] == audit(model, comfyui=live())


@pytest.mark.parametrize("name", ["output_path", "filename_prefix", "save_dir"])
def test_a_path_that_requests_choose_is_an_error(make: Make, name: str) -> None:
    writer = {"class_type": "Writer", "inputs": {"images": ["3", 0], name: "x"}}
    model = make({"6": writer}, {f"6_{name}": {"type": "string", "default": "x"}})
    assert ("error", "unsafe_path", f"6_{name}") in kinds(audit(model))


def test_a_model_without_a_graph_is_worth_a_note(make: Make) -> None:
    made = make()
    text = (made.folder / "model.toml").read_text().replace('graph = "graph.json"', "")
    text = text.partition("[engines.comfyui]")[0]
    (made.folder / "model.toml").write_text(text)
    plain = load_model(made.folder, made.folder.parent.parent)
    assert [("note", "no_graph", "model.toml")] == kinds(audit(plain, comfyui=live()))


def test_tables_of_engines_that_rushes_has_not(make: Make) -> None:
    """No errors: an engine of one's own may have a table of any name."""
    model = make()
    assert [] == audit_engines(model)
    with (model.folder / "model.toml").open("a") as file:
        file.write(
            '\n[engines.wan]\nweights = "a/b"\n[engines.wna]\n[engines.Comfy-UI]\n[engines.mine]\nx = 1\n'
        )
    found = audit_engines(load_model(model.folder, model.folder.parent.parent))
    assert [
        ("warning", "unknown_engine", "engines.wna"),
        ("warning", "unknown_engine", "engines.Comfy-UI"),
        ("note", "unknown_engine", "engines.mine"),
    ] == kinds(found)
    assert "there is no engine wna; did you mean wan?" == found[0].text
    assert "there is no engine Comfy-UI; did you mean comfyui?" == found[1].text


def test_an_input_that_reaches_nothing(make: Make) -> None:
    more = {
        "mood": {"type": "string", "default": "calm"},
        "look": {"type": "string", "role": "start_image"},
    }
    assert [("error", "unbound_input", "look"), ("warning", "unbound_input", "mood")] == kinds(
        audit(make(inputs=more))
    )


def test_the_missing_node_is_named_with_its_pack_and_a_command(make: Make) -> None:
    pack = {"name": "Wan Pack", "source": "https://git.example/me/ComfyUI-Wan", "nodes": ["WanImageToVideo"]}
    without = {name: info for name, info in NODES.items() if name != "WanImageToVideo"}
    (found,) = audit(make(node_packs=[pack]), comfyui=Holdings("s", nodes=without))
    assert ("error", "missing_pack", "3 (WanImageToVideo)") == kinds([found])[0]
    clone = "git clone https://git.example/me/ComfyUI-Wan ComfyUI/custom_nodes/ComfyUI-Wan"
    assert found.fix.startswith(clone)
    (found,) = audit(make(), comfyui=Holdings("s", nodes=without))
    assert ("error", "missing_node", "3 (WanImageToVideo)") == kinds([found])[0]


def test_on_a_disk_a_class_that_no_source_mentions_is_missing(make: Make) -> None:
    classes = frozenset(needs_of(make()).classes - {"SaveVideo"})
    found = audit(make(), comfyui=Holdings("dir", classes=classes, packs=frozenset()))
    assert [("error", "missing_node", "5 (SaveVideo)")] == kinds(found)


def test_a_pack_that_is_there_but_does_not_load_is_told_apart(make: Make) -> None:
    pack = {"name": "Wan Pack", "source": "https://git.example/me/ComfyUI-Wan", "nodes": ["WanImageToVideo"]}
    without = {name: info for name, info in NODES.items() if name != "WanImageToVideo"}
    there = Holdings("s", nodes=without, packs=frozenset({"comfyui-wan"}))
    (found,) = audit(make(node_packs=[pack]), comfyui=there)
    assert "does not load" in found.text


def test_packs_that_the_manifest_does_not_list_and_those_it_lists_for_nothing(make: Make) -> None:
    foreign = {**NODES["WanImageToVideo"], "python_module": "custom_nodes.ComfyUI-Wan"}
    pack = {"name": "Other", "source": "https://git.example/other", "nodes": ["Unused"]}
    found = audit(make(node_packs=[pack]), comfyui=live({"WanImageToVideo": foreign}))
    assert [
        ("warning", "unused_pack", "node_packs: Other"),
        ("warning", "unlisted_pack", "3 (WanImageToVideo)"),
    ] == kinds(found)


def test_missing_weights_come_with_their_size_licence_and_a_command(make: Make) -> None:
    nodes = {"UNETLoader": node(["MODEL"], unet_name=[["other.safetensors"]])}
    (found,) = audit(make(), comfyui=live(nodes))
    assert ("error", "missing_weights", "1.unet_name (UNETLoader)") == kinds([found])[0]
    assert "in diffusion_models, 14.3 GB, Apache-2.0" in found.text
    assert found.fix == (
        "hf download someone/wan 'split files/wan.safetensors' --local-dir ComfyUI/models/diffusion_models && "
        "mv 'ComfyUI/models/diffusion_models/split files/wan.safetensors' "
        "ComfyUI/models/diffusion_models/wan.safetensors"
    )


def test_weights_that_lie_in_another_folder_are_found_there(make: Make) -> None:
    nodes = {"UNETLoader": node(["MODEL"], unet_name=[["wan2/wan.safetensors"]])}
    (found,) = audit(make(), comfyui=live(nodes))
    assert "there is 'wan2/wan.safetensors': write that into the graph" == found.fix


@pytest.mark.parametrize(
    ("weight", "command"),
    [
        (Weight("a.pt", "vae", "x/y"), "hf download x/y a.pt --local-dir M"),
        (
            Weight("b/a.pt", "vae", "x/y", "a.pt"),
            "hf download x/y a.pt --local-dir M && mkdir -p M/b && mv M/a.pt M/b/a.pt",
        ),
        (Weight("a.pt", "vae", "https://h/z.pt"), "curl -fL --create-dirs -C - -o M/a.pt https://h/z.pt"),
        (
            Weight("a.pt", "vae", "https://h/r", "z.pt"),
            "curl -fL --create-dirs -C - -o M/a.pt https://h/r/z.pt",
        ),
        (Weight("a.pt", "vae"), "put it at M/a.pt; the manifest names no source"),
    ],
)
def test_commands_that_get_weights(weight: Weight, command: str) -> None:
    assert command == download(weight, "M")


def test_weights_without_a_listing_and_listings_without_a_loader(make: Make) -> None:
    other = {**WEIGHT, "file": "other.safetensors"}
    assert [
        ("warning", "unlisted_weights", "1.unet_name (UNETLoader)"),
        ("warning", "unused_weights", "weights"),
    ] == kinds(audit(make(weights=[other])))


def test_weights_on_a_disk_are_compared_by_size_and_checksum(make: Make) -> None:
    weight = {**WEIGHT, "sha256": "a" * 64}
    names = {"diffusion_models": frozenset({"wan.safetensors"})}
    key = ("diffusion_models", "wan.safetensors")

    def found(held: Held) -> list[tuple[str, str, str]]:
        return kinds(audit(make(weights=[weight]), comfyui=Holdings("d", weights=names, files={key: held})))

    damaged = [("error", "damaged_weights", "1.unet_name (UNETLoader)")]
    assert damaged == found(Held(5))
    assert damaged == found(Held(14_294_736_160, "b" * 64))
    assert [] == found(Held(14_294_736_160, "A" * 64))
    assert [] == found(Held(14_294_736_160))


def test_weights_of_an_enum_have_to_be_there_each(make: Make) -> None:
    choice = {"type": "string", "enum": ["wan.safetensors", "gone.safetensors"], "default": "wan.safetensors"}
    found = audit(make(inputs={"1_unet_name": choice}), comfyui=live())
    assert [
        ("error", "missing_weights", "1.unet_name (UNETLoader)"),
        ("warning", "unlisted_weights", "1.unet_name (UNETLoader)"),
    ] == kinds(found)
    assert "gone.safetensors" in found[0].text


def test_a_value_that_the_node_refuses_is_found_before_a_request_meets_it(make: Make) -> None:
    steps = {"type": "integer", "role": "steps", "minimum": 0, "maximum": 40, "default": 20}
    found = audit(make(inputs={"3_steps": steps}), comfyui=live())
    assert [("error", "bounds", "3_steps")] == kinds(found)
    assert "3_steps = 0: 3.steps (WanImageToVideo): 0 is below the node's smallest, 1; also 40" == found[0].text
    assert [] == audit(make(inputs={"3_steps": steps}))


def test_a_choice_that_the_node_does_not_have(make: Make) -> None:
    sampler = {"type": "string", "enum": ["euler", "best"], "default": "euler"}
    found = audit(make(inputs={"3_sampler": sampler}), comfyui=live())
    assert [("error", "choice", "3_sampler")] == kinds(found)
    assert "'best' is not one of 'euler', 'dpmpp_2m'" in found[0].text


def test_an_input_without_bounds_is_worth_a_note(make: Make) -> None:
    found = audit(make(inputs={"3_steps": {"type": "integer", "role": "steps", "default": 20}}), comfyui=live())
    assert {("note", "bounds", "3_steps")} == set(kinds(found))


def test_a_seed_may_be_as_large_as_the_nodes_take_it(make: Make) -> None:
    nodes = {"WanImageToVideo": json.loads(json.dumps(NODES["WanImageToVideo"]))}
    nodes["WanImageToVideo"]["input"]["required"]["seed"][1]["max"] = 1000
    assert [("error", "bounds", "3_seed")] == kinds(audit(make(), comfyui=live(nodes)))


@pytest.mark.parametrize("comfyui", [None, live()])
def test_sizes_and_lengths_off_the_steps_are_found_even_without_a_server(
    make: Make, comfyui: Holdings | None
) -> None:
    inputs = {
        "3_widthx3_height": {
            "type": "string",
            "role": "resolution",
            "enum": ["640x480", "960x540"],
            "default": "640x480",
        },
        "3_length": {"type": "integer", "role": "frames", "enum": [81, 80], "default": 81},
    }
    found = audit(make(inputs=inputs), comfyui=comfyui)
    assert [("warning", "step", "3_widthx3_height"), ("warning", "step", "3_length")] == kinds(found)
    assert "540 is not a multiple of 16" in found[0].text
    assert "80 is not a multiple of 4 and 1 more" in found[1].text
    rounded = {"3.width": "round_up(width, 16)", "3.height": "round_up(height, 16)"}
    fits = {**inputs, "3_length": {**inputs["3_length"], "enum": [81, 141]}}
    assert [] == audit(make(inputs=fits, bindings=rounded), comfyui=comfyui)


def test_a_step_is_seen_through_a_primitive(make: Make) -> None:
    nodes = {"9": {"class_type": "PrimitiveInt", "inputs": {"value": 81}}}
    frames = {"9_value": {"type": "integer", "role": "frames", "minimum": 1, "maximum": 161, "default": 81}}
    found = audit(make(nodes, frames, set_={"3.length": ["9", 0]}), comfyui=live())
    assert [("warning", "step", "9_value")] == kinds(found)


def test_a_binding_without_a_value_for_some_request(make: Make) -> None:
    found = audit(make(bindings={"3.steps": "max(1, 9 // (steps - 3))"}))
    assert [("error", "bindings", "3_steps")] == kinds(found)
    assert found[0].text.startswith("3_steps = 3: a binding fails")


@pytest.mark.parametrize("name", ["/etc/passwd", "../up.safetensors", "C:\\w.safetensors", "a\\b.safetensors"])
def test_paths_that_lead_elsewhere(make: Make, name: str) -> None:
    if name.startswith("/"):
        model = make(set_={"5.filename_prefix": name})
        assert [("warning", "unsafe_path", "5.filename_prefix (SaveVideo)")] == kinds(audit(model))
        return
    found = audit(make(set_={"1.unet_name": name}, weights=[]))
    assert ("error", "unsafe_path", "1.unet_name (UNETLoader)") == kinds(found)[0]


def test_a_backslash_that_the_servers_own_list_has_is_a_windows_server(make: Make) -> None:
    nodes = {"UNETLoader": node(["MODEL"], unet_name=[["a\\b.safetensors"]])}
    found = audit(make(set_={"1.unet_name": "a\\b.safetensors"}, weights=[]), comfyui=live(nodes))
    assert [("warning", "unlisted_weights", "1.unet_name (UNETLoader)")] == kinds(found)


def test_a_free_text_must_not_choose_a_file(make: Make) -> None:
    found = audit(make(inputs={"1_unet_name": {"type": "string", "default": "wan.safetensors"}}))
    assert [("error", "unsafe_path", "1_unet_name")] == kinds(found)


@pytest.mark.parametrize(
    ("comfyui", "severity"),
    [(None, "warning"), (live(), "error"), (Holdings("dir", inputs=frozenset()), "error")],
)
def test_a_loader_that_keeps_the_file_of_the_day_it_was_exported(
    make: Make, comfyui: Holdings | None, severity: str
) -> None:
    nodes = {
        "8": {"class_type": "LoadImage", "inputs": {"image": "holiday.png"}},
        "9": {"class_type": "SaveImage", "inputs": {"images": ["8", 0], "filename_prefix": "x"}},
    }
    expected = [(severity, "left_over_file", "8.image (LoadImage)")]
    assert expected == kinds(audit(make(nodes), comfyui=comfyui))
    optional = {"8_image": {"type": "string", "role": "start_image"}}
    assert expected == kinds(audit(make(nodes, optional), comfyui=comfyui))
    given = {"8_image": {"type": "string", "role": "start_image", "default": "https://h/a.png"}}
    assert [] == audit(make(nodes, given), comfyui=comfyui)


def test_a_file_that_the_server_has_may_stay_in_the_graph(make: Make) -> None:
    nodes = {
        "8": {"class_type": "LoadImage", "inputs": {"image": "logo.png"}},
        "9": {"class_type": "SaveImage", "inputs": {"images": ["8", 0], "filename_prefix": "x"}},
    }
    loader = {**NODES["LoadImage"], "input": {"required": {"image": [["logo.png"], {"image_upload": True}]}}}
    assert [] == audit(make(nodes), comfyui=live({"LoadImage": loader}))


def test_links_that_do_not_fit_and_inputs_without_a_value(make: Make) -> None:
    found = audit(make(set_={"4.images": ["1", 0]}), comfyui=live())
    assert [("error", "bad_link", "4.images (CreateVideo)")] == kinds(found)
    assert "output 0 of node 1 is MODEL, and IMAGE is needed" == found[0].text
    found = audit(make(set_={"4.images": ["3", 4]}), comfyui=live())
    assert [("error", "bad_link", "4.images (CreateVideo)")] == kinds(found)
    found = audit(make({"4": {"class_type": "CreateVideo", "inputs": {"images": ["3", 0]}}}), comfyui=live())
    assert [("error", "missing_input", "4.fps (CreateVideo)")] == kinds(found)


@pytest.mark.parametrize("comfyui", [None, live()])
def test_outputs_that_save_nothing_or_something_else(make: Make, comfyui: Holdings | None) -> None:
    assert [("error", "missing_output", "4 (CreateVideo)"), ("error", "missing_output", "outputs")] == kinds(
        audit(make(outputs=["4"]), comfyui=live())
    )
    assert [("error", "wrong_output", "5 (SaveVideo)")] == kinds(audit(make(output="image"), comfyui=comfyui))
    preview = {"5": {"class_type": "PreviewImage", "inputs": {"images": ["3", 0]}}}
    found = audit(make(preview, output="image", outputs=["5"]), comfyui=comfyui)
    assert ("warning", "temporary_output", "5 (PreviewImage)") in kinds(found)


def test_the_worst_comes_first(make: Make) -> None:
    found = audit(make(inputs={"mood": {"type": "string", "default": "x"}}, output="image"))
    assert sorted((one.severity for one in found), key=("error", "warning", "note").index) == [
        one.severity for one in found
    ]
    assert len({one.severity for one in found}) > 1


@pytest.mark.parametrize("value", ["1.0", "512.0", "1e3", "nan", "inf", 1e400, 10**30])
def test_strange_numbers_are_no_crash(value: object) -> None:
    from rushes.catalog.audit_nodes import misfit, specs_of

    nodes = {"N": {"input": {"required": {"width": ["INT", {"min": float("-inf"), "max": 1e400, "step": 16}]}}}}
    found = misfit(specs_of(nodes, "N")["width"], "width", value)
    assert found is None or found.kind in ("step", "bounds", "type")
