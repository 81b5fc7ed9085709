"""What the tests of the Wan engine share: tiny pipelines in the hub's layout, made once and never written to."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support import tiny_diffusers

Tiny = Callable[[tiny_diffusers.Kind], Path]

FOREIGN = (
    r"torch(\.|$)",
    r"torchao(\.|$)",
    r"diffusers(\.|$)",
    r"transformers(\.|$)",
    r"accelerate(\.|$)",
    r"peft(\.|$)",
    r"huggingface_hub(\.|$)",
)
"""Libraries that deprecate each other's parts, which is nothing that we could mend; by the module that warns."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let those libraries warn: in this folder only, and of the kinds that announce removals only."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            for module in FOREIGN:
                for kind in ("DeprecationWarning", "PendingDeprecationWarning", "FutureWarning"):
                    item.add_marker(pytest.mark.filterwarnings(f"ignore::{kind}:{module}"))


@pytest.fixture(scope="module", autouse=True)
def no_hub() -> Iterator[None]:
    """Nothing here may ask the hub, in this process or in one that a test starts. Other folders' tests do ask one."""
    constants = pytest.importorskip(
        "huggingface_hub.constants", reason="needs the extra: pip install 'rushes[wan]'"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr(constants, "HF_HUB_OFFLINE", True)  # what the variable said when it was imported
        yield


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Two lanes and the other tests share the cores; more threads would only wait for each other."""
    torch = pytest.importorskip("torch", reason="needs the extra: pip install 'rushes[wan]'")
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Gives the folder of a kind's tiny pipeline; a test that changes files copies it first."""
    pytest.importorskip("diffusers", reason="needs the extra: pip install 'rushes[wan]'")
    made: dict[str, Path] = {}

    def folder(kind: tiny_diffusers.Kind) -> Path:
        if kind not in made:
            made[kind] = tiny_diffusers.save(kind, tmp_path_factory.mktemp("tiny") / kind)
        return made[kind]

    return folder


@pytest.fixture(scope="session")
def tiny_lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small LoRA in diffusers' names that fits every tiny pipeline."""
    pytest.importorskip("safetensors", reason="needs the extra: pip install 'rushes[wan]'")
    return tiny_diffusers.save_lora(tmp_path_factory.mktemp("loras") / "tiny.safetensors")
