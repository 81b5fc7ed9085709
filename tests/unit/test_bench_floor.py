"""The floor that `bench/gpu.py` measures against: the formula gives the numbers that were published for it."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def floor() -> ModuleType:
    path = Path(__file__).parents[2] / "bench" / "gpu_floor.py"
    spec = importlib.util.spec_from_file_location("bench_gpu_floor", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("expected", "sizes", "work"),
    [
        (113.6, {"vace_blocks": 8}, (1024, 576, 81, 12, True)),
        (122.5, {"vace_blocks": 8}, (1024, 576, 81, 12, True, 1)),
        (127.5, {"channels_in": 36}, (720, 720, 81, 20, True)),
        (17.1, {"channels_in": 36}, (720, 480, 81, 10, False)),
        (17.2, {"channels_in": 36, "picture": True}, (720, 480, 81, 10, False)),
        (10.0, {}, (1440, 816, 1, 30, True)),
    ],
    ids=[
        "vace-fun",
        "vace-fun with its reference",
        "first-last-frame",
        "fusionx",
        "fusionx with its picture's tokens",
        "text-to-image",
    ],
)
def test_the_floor_of_the_models_defaults(
    floor: ModuleType, expected: float, sizes: dict[str, object], work: tuple[object, ...]
) -> None:
    assert expected == round(floor.seconds(floor.Sizes(**sizes), floor.Work(*work)), 1)


def test_attention_is_most_of_a_large_block(floor: ModuleType) -> None:
    """62% of a layer at 1024x576 and 81 frames."""
    tokens = floor.Work(1024, 576, 81, 1, guided=False).tokens
    whole = floor.operations(floor.Sizes(blocks=1), tokens) - floor.operations(floor.Sizes(blocks=0), tokens)
    assert round(4 * tokens**2 * 5120 / whole, 2) == 0.62


def test_a_second_of_a_faster_card_does_more(floor: ModuleType) -> None:
    work = floor.Work(832, 480, 81, 4, guided=False)
    assert floor.seconds(floor.Sizes(), work, 100.0) == pytest.approx(
        2 * floor.seconds(floor.Sizes(), work, 200.0)
    )
