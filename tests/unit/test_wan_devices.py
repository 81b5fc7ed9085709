"""The card of a slot, with a program that answers as nvidia-smi does."""

import subprocess
import sys
from pathlib import Path

import pytest

from rushes.cli.wan import _devices
from rushes.engines.wan import devices
from rushes.engines.wan.devices import Card
from rushes.errors import SettingsError
from rushes.settings import Settings, load

TWO = (
    "GPU-6f0a, NVIDIA H200, 143771, 9.0",
    "GPU-77b1, NVIDIA GeForce RTX 4090, 24564, 8.9",
)


@pytest.fixture
def machine(tmp_path: Path):
    """Makes the environment of a machine whose nvidia-smi prints these lines; None: it has none."""

    def environ(*lines: str, ends_with: int = 0, **more: str) -> dict[str, str]:
        program = tmp_path / "nvidia-smi"
        text = "\n".join(lines)
        program.write_text(
            '#!/bin/sh\ncase "$1" in --query-gpu=uuid,name,memory.total,compute_cap) ;; *) exit 2 ;; esac\n'
            f"/bin/cat <<'END'\n{text}\nEND\nexit {ends_with}\n"
        )
        program.chmod(0o755)
        return {"PATH": str(tmp_path), **more}

    return environ


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """The environment of a machine without a driver."""
    return {"PATH": str(tmp_path)}


def test_cards_are_read_with_their_memory_and_capability(machine):
    assert [
        Card("GPU-6f0a", "NVIDIA H200", 143771 * 2**20, (9, 0)),
        Card("GPU-77b1", "NVIDIA GeForce RTX 4090", 24564 * 2**20, (8, 9)),
    ] == devices.cards(machine(*TWO))


def test_a_card_that_tells_neither_is_still_a_card(machine):
    assert [Card("GPU-1", "NVIDIA GB10", None, None)] == devices.cards(
        machine("GPU-1, NVIDIA GB10, [N/A], [N/A]")
    )


def test_no_driver_no_cards(bare):
    assert [] == devices.cards(bare)


@pytest.mark.parametrize("said", ["No devices were found", ""])
def test_a_driver_that_finds_none(machine, said):
    assert [] == devices.cards(machine(said))


def test_a_driver_that_fails_is_logged(machine, capfd):
    assert [] == devices.cards(machine(*TWO, ends_with=9))
    assert "cards not counted" in capfd.readouterr().err


@pytest.mark.parametrize(("slot", "card"), [(0, "GPU-6f0a"), (1, "GPU-77b1")])
@pytest.mark.parametrize("setting", ["auto", "cuda"])
def test_each_slot_sees_its_own_card(machine, setting, slot, card):
    environ = machine(*TWO)
    assert "cuda" == devices.choose(setting, slot, environ)
    assert card == environ["CUDA_VISIBLE_DEVICES"]


@pytest.mark.parametrize(
    ("picked", "slot", "card"), [("1", 0, "1"), ("1, 0", 1, "0"), ("MIG-5a,MIG-5b", 1, "MIG-5b")]
)
def test_what_the_operator_picked_is_divided_further(machine, picked, slot, card):
    environ = machine(*TWO, CUDA_VISIBLE_DEVICES=picked)
    assert "cuda" == devices.choose("auto", slot, environ)
    assert card == environ["CUDA_VISIBLE_DEVICES"]


def test_auto_without_a_card_is_the_processor(bare):
    assert "cpu" == devices.choose("auto", 0, bare)
    assert "CUDA_VISIBLE_DEVICES" not in bare


@pytest.mark.parametrize("hidden", ["", "-1", "-1,0"])
def test_auto_with_hidden_cards_is_the_processor(machine, hidden):
    environ = machine(*TWO, CUDA_VISIBLE_DEVICES=hidden)
    assert "cpu" == devices.choose("auto", 0, environ)
    assert hidden == environ["CUDA_VISIBLE_DEVICES"]


def test_the_processor_where_it_is_set(machine):
    environ = machine(*TWO)
    assert "cpu" == devices.choose("cpu", 7, environ)
    assert "CUDA_VISIBLE_DEVICES" not in environ


def test_cuda_without_a_card_is_refused(bare):
    with pytest.raises(SettingsError, match="nvidia-smi tells of no card"):
        devices.choose("cuda", 0, bare)


def test_cuda_with_hidden_cards_is_refused(machine):
    with pytest.raises(SettingsError, match="no card is visible"):
        devices.choose("cuda", 0, machine(*TWO, CUDA_VISIBLE_DEVICES="-1"))


def test_cuda_where_only_the_driver_s_tool_is_missing(bare):
    """Some containers have the card and the libraries but not the program."""
    bare["CUDA_VISIBLE_DEVICES"] = "0,1"
    assert "cuda" == devices.choose("cuda", 1, bare)
    assert "1" == bare["CUDA_VISIBLE_DEVICES"]


@pytest.mark.parametrize("setting", ["auto", "cuda"])
def test_more_slots_than_cards_are_refused(machine, setting):
    with pytest.raises(SettingsError, match="2 cards are visible, and slot 3 finds none"):
        devices.choose(setting, 2, machine(*TWO))


@pytest.mark.parametrize(("slot", "cards"), [(0, "GPU-6f0a,GPU-77b1"), (1, "GPU-3,GPU-4")])
def test_each_slot_sees_all_of_its_cards(machine, slot, cards):
    environ = machine(*TWO, "GPU-3, NVIDIA H200, 143771, 9.0", "GPU-4, NVIDIA H200, 143771, 9.0")
    assert "cuda" == devices.choose("auto", slot, environ, 2)
    assert cards == environ["CUDA_VISIBLE_DEVICES"]


def test_cards_that_the_operator_picked_are_dealt_out_in_their_order(machine):
    environ = machine(*TWO, CUDA_VISIBLE_DEVICES="3,1,0,2")
    assert "cuda" == devices.choose("cuda", 1, environ, 2)
    assert "0,2" == environ["CUDA_VISIBLE_DEVICES"]


@pytest.mark.parametrize(
    ("slot", "each", "said"),
    [
        (0, 3, "wan_cards: 2 cards are visible, and a slot is to have 3. Set RUSHES_WAN_CARDS to 1."),
        (1, 2, "workers: 2 cards are visible, and slot 2 finds none. Set RUSHES_WORKERS to 1."),
    ],
)
def test_slots_whose_cards_are_too_few_are_refused(machine, slot, each, said):
    with pytest.raises(SettingsError) as caught:
        devices.choose("auto", slot, machine(*TWO), each)
    assert said == caught.value.message


def test_a_slot_that_finds_only_some_of_its_cards_is_refused(machine):
    with pytest.raises(
        SettingsError, match=r"3 cards are visible, and slot 2 finds 1 of its 2\. Set RUSHES_WORKERS to 1"
    ):
        devices.choose("auto", 1, machine(*TWO, "GPU-3, NVIDIA H200, 143771, 9.0"), 2)


@pytest.mark.parametrize(("each", "workers"), [("1", 5), ("2", 2), ("3", 1), ("8", 1)])
def test_there_is_a_slot_for_so_many_cards_each(each, workers):
    """With eight there is a slot that finds too few, and says so."""
    assert workers == load({"RUSHES_ENGINE": "wan", "RUSHES_WAN_CARDS": each}, cards=lambda: 5).workers


@pytest.mark.parametrize("text", ["0", "-1", "two"])
def test_a_number_of_cards_that_is_none_is_refused(text):
    with pytest.raises(SettingsError, match="RUSHES_WAN_CARDS"):
        load({"RUSHES_WAN_CARDS": text})


def test_doctor_tells_the_slots_of_several_cards(machine, monkeypatch):
    for name, value in machine(*TWO).items():
        monkeypatch.setenv(name, value)
    rows = _devices(Settings(engine="wan", workers=1, wan_cards=2))
    assert ("ok", "slots", "1, each with 2 cards for one video") == next(
        row for row in rows if row[1] == "slots"
    )


def test_what_is_compiled_is_kept_for_this_user_alone(tmp_path):
    environ: dict[str, str] = {}
    devices.keep_compiled(tmp_path / "wan" / "compiled", environ)
    assert {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "wan" / "compiled")} == environ
    assert 0o700 == (tmp_path / "wan" / "compiled").stat().st_mode & 0o777
    devices.keep_compiled(tmp_path / "wan" / "compiled", {})


def test_a_folder_that_the_operator_named_is_used(tmp_path):
    environ = {"TORCHINDUCTOR_CACHE_DIR": "/srv/compiled"}
    devices.keep_compiled(tmp_path / "compiled", environ)
    assert {"TORCHINDUCTOR_CACHE_DIR": "/srv/compiled"} == environ
    assert not (tmp_path / "compiled").exists()


def test_torch_s_compiler_finds_the_folder(tmp_path):
    """In a process of its own, since the variable is read once."""
    pytest.importorskip("torch", reason="needs the extra: pip install 'rushes[wan]'")
    environ = {"PATH": "/usr/bin:/bin"}
    devices.keep_compiled(tmp_path / "compiled", environ)
    program = "from torch._inductor.runtime.cache_dir_utils import cache_dir; print(cache_dir())"
    done = subprocess.run(
        [sys.executable, "-c", program], env=environ, capture_output=True, text=True, check=True, timeout=60
    )
    assert str(tmp_path / "compiled") == done.stdout.strip()
