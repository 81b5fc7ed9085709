"""What the processes of a server have in their environment: keys of remotes are the worker's alone."""

from pathlib import Path

import pytest

from support.server import Server, eventually

VENDORS = ("DASHSCOPE_API_KEY", "RUNCOMFY_TOKEN", "FAL_KEY", "REPLICATE_API_TOKEN", "OPENAI_API_KEY")
KEYS = {*VENDORS, "RUSHES_REMOTE_BOX_KEY", "RUSHES_REMOTE_GONE_KEY"}


def test_slots_have_no_key_of_any_remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VENDORS:
        monkeypatch.setenv(name, "a-key")
    monkeypatch.setenv("NOT_A_KEY", "x")
    remotes = {"remotes": "box=runcomfy@http://127.0.0.1:9", "remote_box_key": "k", "remote_gone_key": "k"}
    server = Server(tmp_path / "data", workers=2, **remotes).start()
    try:
        slots = eventually(lambda: len(found := server.processes("slot")) == 2 and found, what="two slots")
        found = [slot.environ().keys() & {*KEYS, "NOT_A_KEY"} for slot in slots]

        assert [{"NOT_A_KEY"}, {"NOT_A_KEY"}] == found
        assert server.one("worker").environ().keys() >= KEYS
    finally:
        server.stop()
