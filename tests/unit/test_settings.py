from pathlib import Path

import pytest

from rushes.errors import SettingsError
from rushes.settings import Settings, load


def test_defaults(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Settings() == load({})


def test_the_environment_wins_over_the_file_and_options_over_both(tmp_path: Path) -> None:
    file = tmp_path / "rushes.toml"
    file.write_text('host = "0.0.0.0"\nport = 1\nworkers = 3\ncors_origins = ["https://a"]\n')
    settings = load({"RUSHES_PORT": "2", "RUSHES_WORKERS": "4"}, file=file, workers=5, engine=None)
    assert ("0.0.0.0", 2, 5, ("https://a",)) == (
        settings.host,
        settings.port,
        settings.workers,
        settings.cors_origins,
    )


def test_the_file_by_variable_and_by_place(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rushes.toml").write_text("port = 7")
    (tmp_path / "other.toml").write_text("port = 8")
    assert 7 == load({}).port
    assert 8 == load({"RUSHES_CONFIG": str(tmp_path / "other.toml")}).port


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("port", "9000", 9000),
        ("cors_origins", "https://a, https://b,", ("https://a", "https://b")),
        ("fetch_allow", "", ()),
        ("access_log", "off", False),
        ("access_log", "YES", True),
        ("draft_mark", "0", False),
        ("data_dir", "/x", Path("/x")),
        ("models_dir", "m", Path("m")),
        ("rate_limit", "0.5", 0.5),
    ],
)
def test_variables(name: str, text: str, value: object) -> None:
    assert value == getattr(load({f"RUSHES_{name.upper()}": text}), name)


@pytest.mark.parametrize(
    ("name", "text"),
    [("port", "x"), ("port", "70000"), ("access_log", "maybe"), ("workers", "-1"), ("lease_seconds", "0")],
)
def test_bad_values_name_the_variable(name: str, text: str) -> None:
    with pytest.raises(SettingsError, match=f"RUSHES_{name.upper()}.*{name}.*{text}"):
        load({f"RUSHES_{name.upper()}": text})


def test_bad_files(tmp_path: Path) -> None:
    file = tmp_path / "rushes.toml"
    file.write_text("prot = 1")
    with pytest.raises(SettingsError, match=r"rushes\.toml.*'prot'"):
        load({}, file=file)
    file.write_text("port = ")
    with pytest.raises(SettingsError, match=r"rushes\.toml"):
        load({}, file=file)
    with pytest.raises(SettingsError, match="does not exist"):
        load({}, file=tmp_path / "none.toml")


def test_settings_are_frozen() -> None:
    with pytest.raises(AttributeError):
        Settings().port = 1  # type: ignore[misc]
