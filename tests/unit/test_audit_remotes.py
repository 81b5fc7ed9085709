"""What `rushes models check` says of routes and of tables for remotes."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from rushes.catalog.audit import Finding, audit_engines
from rushes.catalog.audit_remotes import audit_remotes
from rushes.catalog.load import load_model
from rushes.catalog.model import Model
from rushes.cli.checking import check

INPUTS = """
name = "M"
output = "image"
[[inputs]]
name = "text"
title = "T"
type = "string"
role = "prompt"
"""


def load(root: Path, tables: str) -> Model:
    folder = root / "me" / "mine"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.toml").write_text(INPUTS + tables, "utf-8")
    return load_model(folder, root)


ROUTES = """
[[routes]]
engine = "local"
[[routes]]
engine = "box"
[[routes]]
engine = "replicate"
[[routes]]
engine = "fal"
max_cost_usd = 0.5
[[routes]]
engine = "runcomfy"
"""


def kinds(findings: list[Finding]) -> list[tuple[str, str, str]]:
    return [(one.severity, one.where, one.kind) for one in findings]


def test_routes_that_lead_nowhere_are_named(tmp_path: Path) -> None:
    model = load(tmp_path, f'[engines.fal]\nmodel = "a/b"\n{ROUTES}')

    found = list(audit_remotes(model, {}, budget=False))

    assert [
        ("note", "routes[1]", "unknown_route"),
        ("warning", "routes[2]", "idle_route"),
        ("warning", "routes[3]", "idle_route"),
    ] == kinds(found)
    assert "[engines.replicate]" in found[1].fix
    assert "price_usd" in found[2].fix
    # A name is known from the settings; then its kind is what counts.
    assert [("warning", "routes[2]", "idle_route"), ("warning", "routes[3]", "idle_route")] == kinds(
        list(audit_remotes(model, {"box": "runcomfy"}, budget=False))
    )
    typo = load(tmp_path, '[[routes]]\nengine = "fall"\n')
    assert "did you mean fal?" in next(audit_remotes(typo, {}, budget=False)).text


def test_what_a_budget_cannot_count_is_named(tmp_path: Path) -> None:
    model = load(tmp_path, '[engines.fal]\nmodel = "a/b"\n[engines.replicate]\nmodel = "a/b"\nprice_usd = 1\n')
    remotes = {"fal": "fal", "fal-2": "fal", "replicate": "replicate", "dashscope": "dashscope"}
    assert [("note", "engines.fal", "no_price")] == kinds(list(audit_remotes(model, remotes, budget=True)))
    assert [] == list(audit_remotes(model, remotes, budget=False))


def test_tables_of_remotes_are_known(tmp_path: Path) -> None:
    model = load(tmp_path, '[engines.fal]\nmodel = "a/b"\n[engines.falll]\nx = 1\n')
    (finding,) = audit_engines(model)
    assert ("warning", "engines.falll") == (finding.severity, finding.where)
    assert "did you mean fal?" in finding.text


def test_the_check_compares_routes_with_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(tmp_path / "models", f'[engines.fal]\nmodel = "a/b"\n{ROUTES}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RUSHES_MODELS_DIR", str(tmp_path / "models"))

    def said() -> list[str]:
        result = CliRunner().invoke(check, ["--offline", "--json", "me/mine"], standalone_mode=False)
        return [one["where"] for one in json.loads(result.stdout)["findings"] if one["kind"] != "no_graph"]

    assert ["routes[1]", "routes[2]", "routes[3]"] == said()
    monkeypatch.setenv("RUSHES_REMOTES", "box=runcomfy@http://127.0.0.1:9, fal")
    monkeypatch.setenv("RUSHES_KEY_BUDGET_USD_PER_DAY", "1")
    assert ["routes[2]", "routes[3]", "engines.runcomfy", "engines.fal"] == said()
