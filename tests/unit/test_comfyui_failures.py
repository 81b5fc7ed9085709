"""What ComfyUI says of a failure, in words for a user. Answers are as captured from ComfyUI 0.3.64."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rushes.engines.comfyui.failures import failed, is_out_of_memory, label, outcome, refused, scrubbed
from rushes.engines.comfyui.patch import with_loras

GRAPH = {
    "1": {"class_type": "LoadImage", "inputs": {"image": "missing.png"}},
    "2": {
        "class_type": "ImageScale",
        "inputs": {"image": ["1", 0], "upscale_method": "bogus", "width": 99999999},
        "_meta": {"title": "Make it fit"},
    },
    "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0]}},
    "37": {
        "class_type": "UNETLoader",
        "inputs": {"unet_name": "wan/high.safetensors"},
        "_meta": {"title": "High noise"},
    },
    "57": {
        "class_type": "KSamplerAdvanced",
        "inputs": {"model": ["37", 0]},
        "_meta": {"title": "High noise pass"},
    },
}
IMAGE = {
    "errors": [
        {
            "type": "custom_validation_failed",
            "message": "Custom validation failed for node",
            "details": "image - Invalid image file: missing.png",
            "extra_info": {"input_name": "image"},
        }
    ],
    "class_type": "LoadImage",
}
TOO_WIDE = {
    "type": "value_bigger_than_max",
    "message": "Value 99999999 bigger than max of 16384",
    "details": "width",
    "extra_info": {
        "input_name": "width",
        "input_config": ["INT", {"default": 512, "min": 0, "max": 16384, "step": 1}],
        "received_value": 99999999,
    },
}
BOGUS = {
    "type": "value_not_in_list",
    "message": "Value not in list",
    "details": "upscale_method: 'bogus' not in ['nearest-exact', 'bilinear']",
    "extra_info": {
        "input_name": "upscale_method",
        "input_config": [["nearest-exact", "bilinear"], {}],
        "received_value": "bogus",
    },
}
NO_HEIGHT = {
    "type": "required_input_missing",
    "message": "Required input is missing",
    "details": "height",
    "extra_info": {"input_name": "height"},
}


def answer(**node_errors: object) -> dict:
    return {
        "error": {
            "type": "prompt_outputs_failed_validation",
            "message": "Prompt outputs failed validation",
            "details": "",
            "extra_info": {},
        },
        "node_errors": {key.removeprefix("n"): value for key, value in node_errors.items()},
    }


def scale(*errors: dict) -> dict:
    return answer(n2={"errors": list(errors), "dependent_outputs": ["3"], "class_type": "ImageScale"})


# -- refused --------------------------------------------------------------------------------------------
def test_a_refusal_of_a_bound_input_names_the_public_field_and_what_fits() -> None:
    targets = {
        "2_width": (("2", "width"),),
        "frame": (("2", "width"), ("9", "size")),
        "seed": (("57", "seed"),),
    }

    error = refused(400, scale(TOO_WIDE, BOGUS), GRAPH, targets)

    assert "value_refused" == error.reason
    assert "2_width, frame: 99999999 is too much. The most is 16384." == error.message
    assert "2 ImageScale (Make it fit)" == error.node
    assert (False, False) == (error.retryable, error.began)


@pytest.mark.parametrize(
    ("problem", "said"),
    [
        (TOO_WIDE, "99999999 is too much. The most is 16384."),
        (
            TOO_WIDE
            | {
                "type": "value_smaller_than_min",
                "extra_info": {
                    "input_name": "width",
                    "input_config": ["INT", {"min": 16, "max": 16384}],
                    "received_value": 2,
                },
            },
            "2 is too little. The least is 16.",
        ),
        (BOGUS, "'bogus' is none of what can be chosen here. Use one of: nearest-exact, bilinear."),
        (
            BOGUS
            | {
                "extra_info": {
                    "input_name": "upscale_method",
                    "input_config": ["COMBO", {"options": ["area", "lanczos"]}],
                    "received_value": "bogus",
                }
            },
            "'bogus' is none of what can be chosen here. Use one of: area, lanczos.",
        ),
        (
            BOGUS | {"extra_info": BOGUS["extra_info"] | {"input_config": None}},
            "'bogus' is none of what can be chosen here.",
        ),
        (NO_HEIGHT, "A value is needed."),
        (
            {
                "type": "invalid_input_type",
                "message": "Failed to convert an input value to a INT value",
                "details": "width, abc, invalid literal for int()",
                "extra_info": {"input_name": "width", "input_config": ["INT", {}], "received_value": "abc"},
            },
            "'abc' cannot be used as INT.",
        ),
        (
            {
                "type": "return_type_mismatch",
                "message": "Return type mismatch between linked nodes",
                "details": "width, received_type(IMAGE) mismatch input_type(INT)",
                "extra_info": {"input_name": "width"},
            },
            "Return type mismatch between linked nodes: received_type(IMAGE) mismatch input_type(INT).",
        ),
        (
            {
                "type": "exception_during_validation",
                "message": "Exception when validating node",
                "details": "[Errno 2] No such file: '/srv/comfy/input/a.png'",
                "extra_info": {"traceback": ["  File /srv/comfy/execution.py"]},
            },
            "Exception when validating node: [Errno 2] No such file: 'a.png'.",
        ),
    ],
)
def test_every_kind_of_refusal_is_one_clear_sentence(problem: dict, said: str) -> None:
    name = problem["extra_info"].get("input_name")
    where = "node 'Make it fit'" + (f", input {name}" if name else "")

    error = refused(400, scale(problem), GRAPH, {})
    assert ("workflow_refused", f"ComfyUI refuses the model's workflow at {where}: {said}") == (
        error.reason,
        error.message,
    )
    if name:
        error = refused(400, scale(problem), GRAPH, {"wish": (("2", name),)})
        assert ("value_refused", f"wish: {said}") == (error.reason, error.message)


def test_a_file_that_an_input_names_is_the_inputs_fault() -> None:
    error = refused(400, answer(n1=IMAGE), GRAPH, {"68_image": (("1", "image"),)})
    assert ("value_refused", "68_image: Invalid image file: missing.png.") == (error.reason, error.message)
    error = refused(400, answer(n1=IMAGE), GRAPH, {})
    assert "workflow_refused" == error.reason
    assert "at node 'LoadImage', input image: Invalid image file" in error.message


def missing(value: str, listed: object = None) -> dict:
    return {
        "errors": [
            {
                "type": "value_not_in_list",
                "message": "Value not in list",
                "details": f"unet_name: '{value}' not in (list of length 43)",
                "extra_info": {"input_name": "unet_name", "input_config": listed, "received_value": value},
            }
        ],
        "class_type": "UNETLoader",
    }


def test_weights_that_are_not_there_are_named_and_not_the_ones_that_are() -> None:
    listed = [["secret_model.safetensors"], {}]
    error = refused(400, answer(n37=missing("wan/high.safetensors", listed)), GRAPH, {})

    assert "weights_missing" == error.reason
    assert "37 UNETLoader (High noise)" == error.node
    assert "The file 'high.safetensors' is missing" in error.message
    assert "node 'High noise', input unet_name" in error.message
    assert "rushes models check" in error.message
    assert "secret" not in error.message


def test_what_only_the_operator_can_mend_stands_first() -> None:
    body = answer(n2=scale(TOO_WIDE)["node_errors"]["2"], n37=missing("high.gguf"), n38=missing("vae.pth"))

    error = refused(400, body, GRAPH, {"2_width": (("2", "width"),)})

    assert "weights_missing" == error.reason
    assert "high.gguf" in error.message
    assert "vae.pth" in error.message
    assert "width" not in error.message


def test_many_problems_are_counted_not_listed() -> None:
    body = answer(**{f"n{number}": missing(f"part{number}.safetensors") for number in range(5)})
    message = refused(400, body, GRAPH, {}).message
    assert message.endswith(" … and 2 more.")
    assert "part2" in message
    assert "part3" not in message


def test_a_lora_of_the_request_is_the_requests_fault() -> None:
    graph = with_loras(GRAPH, ["37"], [{"path": "styles/nope.safetensors", "scale": 1.0}])
    problem = missing("styles/nope.safetensors")
    problem["errors"][0]["extra_info"]["input_name"] = "lora_name"
    error = refused(400, answer(n58=problem), graph, {})
    assert ("value_refused", "loras: this server has no LoRA 'styles/nope.safetensors'.") == (
        error.reason,
        error.message,
    )
    problem["errors"] = [
        TOO_WIDE
        | {"extra_info": TOO_WIDE["extra_info"] | {"input_name": "strength_model", "received_value": 999}}
    ]
    error = refused(400, answer(n58=problem), graph, {})
    assert ("value_refused", "loras: 999 is too much. The most is 16384.") == (error.reason, error.message)


@pytest.mark.parametrize(
    "error",
    [
        {
            "type": "invalid_prompt",
            "message": "Cannot execute because node WanVideoSampler does not exist.",
            "details": "Node ID '#598'",
            "extra_info": {},
        },
        {
            "type": "missing_node_type",
            "message": "Node 'WanVideoSampler' not found. The custom node may not be installed.",
            "details": "Node ID '#598'",
            "extra_info": {"node_id": "598", "class_type": "WanVideoSampler", "node_title": "x"},
        },
    ],
)
def test_a_missing_node_class_is_named(error: dict) -> None:
    for graph in ({}, {"598": {"class_type": "WanVideoSampler", "inputs": {}, "_meta": {"title": "Sampler"}}}):
        said = refused(400, {"error": error, "node_errors": {}}, graph, {})
        assert "node_missing" == said.reason
        assert "'WanVideoSampler'" in said.message
        assert "rushes models check" in said.message
        assert said.node is not None
        assert said.node.startswith("598 WanVideoSampler")


def test_partial_acceptance_is_a_refusal() -> None:
    body = {"prompt_id": "5dfe8fe4", "number": 10, "node_errors": {"1": IMAGE}}
    assert "workflow_refused" == refused(200, body, GRAPH, {}).reason


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (
            400,
            {"error": {"type": "prompt_no_outputs", "message": "Prompt has no outputs"}},
            "Prompt has no outputs.",
        ),
        (
            400,
            {"error": {"type": "no_prompt", "message": "No prompt provided", "details": "No prompt provided"}},
            "workflow: No prompt provided.",
        ),
        (400, {"error": "prompt is too long"}, "prompt is too long."),
        (500, "500 Internal Server Error\n\nServer got itself in trouble", "the server answered 500."),
        (400, None, "the server answered 400."),
        (400, {"error": None, "node_errors": {"1": None, "2": {"errors": [None]}}}, "the server answered 400."),
        (413, "too large", "larger than the server takes"),
    ],
)
def test_a_refusal_without_a_node_is_told_too(status: int, body: object, words: str) -> None:
    error = refused(status, body, GRAPH, {})
    assert ("workflow_refused", False) == (error.reason, error.retryable)
    assert words in error.message


# -- failed ---------------------------------------------------------------------------------------------
FAILED = {
    "node_id": "57",
    "node_type": "KSamplerAdvanced",
    "exception_message": "The size of tensor a (5) must match the size of tensor b (16)\n",
    "exception_type": "RuntimeError",
    "traceback": ['  File "/srv/comfy/execution.py", line 496, in execute\n    output_data = 1\n'],
    "current_inputs": {"positive": ["a private prompt"]},
}
OUT_OF_MEMORY = [
    {"exception_type": "torch.OutOfMemoryError", "exception_message": "Allocation on device \n"},
    {"exception_type": "torch.cuda.OutOfMemoryError", "exception_message": "x"},
    {"exception_type": "torch.cuda.OutOfMemoryError"},
    {"exception_type": "MemoryError", "exception_message": "\nno tips"},
    {
        "exception_type": "numpy._core._exceptions._ArrayMemoryError",
        "exception_message": "Unable to allocate 9 GiB",
    },
    {"exception_type": "RuntimeError", "exception_message": "CUDA out of memory. Tried to allocate 2.00 GiB"},
    {"exception_type": "RuntimeError", "exception_message": "CUDA error: out of memory"},
    {"exception_type": "RuntimeError", "exception_message": "HIP out of memory. Tried to allocate"},
    {"exception_type": "RuntimeError", "exception_message": "MPS backend out of memory (MPS allocated: 18 GB"},
    {
        "exception_type": "torch.AcceleratorError",
        "exception_message": "Allocation on device 0 would exceed allowed",
    },
    {
        "exception_type": "RuntimeError",
        "exception_message": '[alloc_cpu.cpp:117] DefaultCPUAllocator: can\'t allocate memory: you "x"',
    },
    {
        "exception_type": "RuntimeError",
        "exception_message": "DefaultCPUAllocator: not enough memory: you tried",
    },
    {
        "exception_type": "RuntimeError",
        "exception_message": "CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate",
    },
    {
        "exception_type": "Odd",
        "exception_message": "x\nThis error means you ran out of memory on your GPU.\n\nTIPS: y",
    },
]


def test_a_failure_names_the_node_and_the_reason_alone() -> None:
    error = failed(FAILED, GRAPH)

    assert "node_failed" == error.reason
    assert "57 KSamplerAdvanced (High noise pass)" == error.node
    assert (
        "The generation failed in node 'High noise pass': RuntimeError: The size of tensor a (5) must match the "
        "size of tensor b (16)." == error.message
    )
    assert (False, True) == (error.retryable, error.began)
    assert not is_out_of_memory(FAILED)


@pytest.mark.parametrize("message", OUT_OF_MEMORY)
def test_out_of_memory_is_named_as_such(message: dict) -> None:
    assert is_out_of_memory(message)
    error = failed(FAILED | message, GRAPH)
    assert ("out_of_memory", "57 KSamplerAdvanced (High noise pass)") == (error.reason, error.node)
    assert (
        "The machine ran out of memory in node 'High noise pass'. Use a smaller size, or fewer frames."
        == error.message
    )


@pytest.mark.parametrize(
    "text", ["the device is out of paper", "memory", "list index out of range", "Memory format mismatch"]
)
def test_other_failures_are_no_lack_of_memory(text: str) -> None:
    assert not is_out_of_memory({"exception_type": "RuntimeError", "exception_message": text})


def test_a_failure_of_which_little_is_known_is_told() -> None:
    assert "The generation failed in ComfyUI. ComfyUI gives no reason." == failed({}, GRAPH).message
    assert failed({}, GRAPH).node is None
    error = failed({"node_id": "12.0.3", "node_type": "Inner", "exception_type": "ValueError"}, {})
    assert ("12.0.3 Inner", "The generation failed in node 'Inner': ValueError.") == (error.node, error.message)
    made = {"12": {"class_type": "Outer", "inputs": {}, "_meta": {"title": "Loop"}}}
    assert "12.0.3 Inner (Loop)" == label(made, "12.0.3", "Inner")


# -- scrubbing ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("No such file: '/home/me/ComfyUI/models/vae/x y.pt'", "No such file: 'x y.pt'"),
        ("cannot read /srv/comfy/input/a.png: truncated", "cannot read a.png: truncated"),
        ("in /srv/comfy/nodes.py:12", "in nodes.py:12"),
        ("(/srv/comfy/nodes.py)", "(nodes.py)"),
        ("path=/data/models", "path=models"),
        ("~/comfy/models/x.pt is old", "x.pt is old"),
        (r"cannot read C:\Users\me\My Models\x.pt now", "cannot read x.pt now"),
        (r"FileNotFoundError: 'D:\\AI\\ComfyUI\\x.pt'", "FileNotFoundError: 'x.pt'"),
        (r"C:/ComfyUI/main.py failed", "main.py failed"),
        (r"\\nas\models\x.pt failed", "x.pt failed"),
        ("file:///srv/comfy/a.png failed", "a.png failed"),
        ("see https://example.org/a/b for help", "see https://example.org/a/b for help"),
        ("models/vae/x.pt is relative", "models/vae/x.pt is relative"),
        (
            "unsupported operand type(s) for '/': 'int' and 'str'",
            "unsupported operand type(s) for '/': 'int' and 'str'",
        ),
        ("shapes 3/4 and 16:9", "shapes 3/4 and 16:9"),
        ("  a\n\n b\t c ", "a b c"),
        (
            'broke\nTraceback (most recent call last):\n  File "/srv/a.py", line 3, in f\n    g(x)\n\nE: no',
            "broke E: no",
        ),
        ('no\n  File "/srv/a.py", line 3, in f\n    g(x)\nmore', "no more"),
    ],
)
def test_messages_lose_paths_and_tracebacks_and_stay_readable(text: str, clean: str) -> None:
    assert clean == scrubbed(text)


def test_long_messages_are_cut_between_words() -> None:
    assert "word word…" == scrubbed("word " * 1000, 12)
    assert 400 >= len(scrubbed("x" * 100_000))
    frames = "Traceback (most recent call last):\n" + '  File "/a/b.py", line 1\n    f()\n' * 9999
    ends = scrubbed(f"first {frames}E: end")
    assert ends.startswith("first")
    assert ends.endswith("E: end")


@given(st.text(max_size=300))
def test_scrubbing_takes_any_text(text: str) -> None:
    assert 60 >= len(scrubbed(text, 60))
    assert "\n" not in scrubbed(text, 60)


@given(st.lists(st.text("abc_-.", min_size=1), min_size=2, max_size=6), st.sampled_from("/\\"))
def test_no_folder_of_an_absolute_path_stays(parts: list[str], separator: str) -> None:
    folders = [f"folder{part}" for part in parts]
    path = ("C:\\" if separator == "\\" else "/") + separator.join(folders) + separator + "name.pt"
    for text in (f"cannot open {path} here", f"cannot open '{path}' here", f"[{path}]"):
        assert "folder" not in scrubbed(text)
        assert "name.pt" in scrubbed(text)


# -- how it ended ---------------------------------------------------------------------------------------
INTERRUPTED = {"prompt_id": "9e5f", "node_id": "3", "node_type": "KSampler", "executed": [], "timestamp": 1}


@pytest.mark.parametrize(
    ("entry", "word", "data"),
    [
        (
            {
                "status": {
                    "status_str": "success",
                    "completed": True,
                    "messages": [["execution_start", {}], ["execution_success", {"timestamp": 2}]],
                }
            },
            "success",
            {"timestamp": 2},
        ),
        (
            {
                "status": {
                    "status_str": "error",
                    "completed": False,
                    "messages": [["execution_start", {}], ["execution_interrupted", INTERRUPTED]],
                }
            },
            "interrupted",
            INTERRUPTED,
        ),
        (
            {"status": {"status_str": "error", "completed": False, "messages": [("execution_error", FAILED)]}},
            "error",
            FAILED,
        ),
        ({"status": {"status_str": "error", "completed": False, "messages": []}}, "error", {}),
        ({"status": {"status_str": "error", "messages": [None, [], ["execution_error"]]}}, "error", {}),
        ({"status": {"status_str": "success", "completed": False}}, "unknown", {}),
        ({"status": {}}, "unknown", {}),
        ({"status": None, "outputs": {"9": {"images": []}}}, "success", {}),
        ({"outputs": {"9": {"images": []}}}, "success", {}),
        ({"outputs": {}}, "unknown", {}),
        ({}, "unknown", {}),
    ],
)
def test_the_history_says_how_a_prompt_ended(entry: dict, word: str, data: dict) -> None:
    assert (word, data) == outcome(entry)
