from pathlib import Path
from typing import Literal, get_args, get_origin

import msgspec
import pytest

from rushes.errors import SettingsError
from rushes.settings import Settings, load, setting_help


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


def test_set_to_nothing_is_not_set_where_nothing_is_no_value() -> None:
    settings = load({"RUSHES_HOST": "", "RUSHES_MODELS": "", "RUSHES_PORT": "", "RUSHES_DATABASE_URL": ""})
    assert ("127.0.0.1", "*", 8000, "") == (
        settings.host,
        settings.models,
        settings.port,
        settings.database_url,
    )


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("public_url", "foo"),
        ("public_url", "https://"),
        ("cors_origins", "https://a,http://b/"),
        ("trusted_proxies", "zz"),
        ("fetch_allow", "10.0.0.0/8,nonsense"),
        ("engine", "nope"),
        ("storage_url", "ftp://x"),
        ("database_url", "mysql://x"),
        ("access_log", "maybe"),
    ],
)
def test_values_that_cannot_work_are_refused(name: str, text: str) -> None:
    with pytest.raises(SettingsError, match=f"RUSHES_{name.upper()}"):
        load({f"RUSHES_{name.upper()}": text})


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("public_url", "https://api.example/rushes"),
        ("cors_origins", "*"),
        ("cors_origins", "https://a,http://localhost:3000"),
        ("trusted_proxies", "10.0.0.0/8, ::1"),
        ("trusted_proxies", "*"),
        ("fetch_allow", "10.0.0.0/8,fd00::/8"),
        ("engine", "my.package:make"),
        ("storage_url", "s3://bucket/prefix"),
        ("database_url", "postgresql://a@b/c"),
    ],
)
def test_values_that_can_work_are_taken(name: str, text: str) -> None:
    assert load({f"RUSHES_{name.upper()}": text})


def test_every_mistake_is_named_at_once(tmp_path: Path) -> None:
    file = tmp_path / "rushes.toml"
    file.write_text('prot = 1\nworkers = "two"\naccess_log = "maybe"\n')
    with pytest.raises(SettingsError) as caught:
        load({"RUSHES_PUBLIC_URL": "x"}, file=file)
    lines = caught.value.message.splitlines()
    assert 4 == len(lines)
    assert "did you mean 'port'?" in lines[0]


def test_a_variable_that_is_nearly_a_setting_is_not_passed_over() -> None:
    with pytest.raises(SettingsError, match=r"RUSHES_PROT: .*RUSHES_PORT"):
        load({"RUSHES_PROT": "1"})
    assert load({"RUSHES_API_KEY": "x", "RUSHES_BASE_URL": "y", "RUSHES_SOMETHING_ELSE": "z"})


def test_comfyui_servers_choose_the_engine_and_the_slots() -> None:
    settings = load({"RUSHES_COMFYUI_URLS": "http://127.0.0.1:8188, http://127.0.0.1:8189"})
    assert ("comfyui", 2) == (settings.engine, settings.workers)
    settings = load({"RUSHES_COMFYUI_DIR": "/srv/comfyui", "RUSHES_WORKERS": "3"})
    assert ("comfyui", 3, Path("/srv/comfyui")) == (settings.engine, settings.workers, settings.comfyui_dir)
    # What is said in so many words wins; no workers is what a gateway of its own says.
    assert "draft" == load({"RUSHES_COMFYUI_URLS": "http://a:1", "RUSHES_ENGINE": "draft"}).engine
    assert 0 == load({"RUSHES_COMFYUI_URLS": "http://a:1", "RUSHES_WORKERS": "0"}).workers


@pytest.mark.parametrize(
    ("written", "address"),
    [
        ("http://127.0.0.1:8188/", "http://127.0.0.1:8188"),
        ("HTTP://Box.Example:80//", "http://box.example"),
        ("https://u:P@Box:8443/Comfy/", "https://u:P@box:8443/Comfy"),
        ("https://box:80", "https://box:80"),
        ("http://[FE80::1]:8188", "http://[fe80::1]:8188"),
    ],
)
def test_a_server_has_one_address(written: str, address: str) -> None:
    assert (address,) == load({"RUSHES_COMFYUI_URLS": written}).comfyui_urls


@pytest.mark.parametrize(
    ("environment", "workers"),
    [
        ({"RUSHES_ENGINE": "wan"}, 3),
        ({"RUSHES_ENGINE": "wan", "RUSHES_WORKERS": "2"}, 2),
        ({"RUSHES_ENGINE": "wan", "RUSHES_WAN_DEVICE": "cpu"}, 1),
        ({"RUSHES_ENGINE": "draft"}, 1),
    ],
)
def test_wan_has_a_slot_for_each_card(environment: dict[str, str], workers: int) -> None:
    assert workers == load(environment, cards=lambda: 3).workers
    assert max(1, workers * (environment.get("RUSHES_WORKERS") == "2")) == load(environment, cards=int).workers


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("wan_profile", "warp", "there is exact, fast and turbo"),
        ("wan_profile", "Turbo", "there is exact, fast and turbo; did you mean turbo?"),
        ("wan_device", "cdua", "there is auto, cuda and cpu; did you mean cuda?"),
    ],
)
def test_a_setting_of_few_words_names_them(name: str, text: str, said: str) -> None:
    variable = f"RUSHES_{name.upper()}"
    with pytest.raises(SettingsError) as caught:
        load({variable: text})
    assert f"{variable}: {name} cannot be {text!r}: {said}" == caught.value.message


def test_the_help_of_a_setting_of_few_words_names_them() -> None:
    kinds = {field.name: get_args(field.type)[0] for field in msgspec.structs.fields(Settings)}
    words = {name: get_args(kind) for name, kind in kinds.items() if get_origin(kind) is Literal}
    assert {"wan_profile", "wan_device"} <= set(words)
    for name, known in words.items():
        assert all(f"`{word}`" in setting_help(name) for word in known), name


@pytest.mark.parametrize("text", ["me/model", "=folder", "me/model="])
def test_weights_name_a_model_and_a_place(text: str) -> None:
    with pytest.raises(SettingsError, match="wan_weights"):
        load({"RUSHES_WAN_WEIGHTS": text})


def test_an_empty_path_is_no_path(tmp_path: Path) -> None:
    settings = load({"RUSHES_MODELS_DIR": "", "RUSHES_COMFYUI_DIR": ""})
    assert (None, None, "draft") == (settings.models_dir, settings.comfyui_dir, settings.engine)
    file = tmp_path / "rushes.toml"
    file.write_text('models_dir = ""\ncomfyui_dir = "/srv/ComfyUI"\n')
    settings = load({"RUSHES_COMFYUI_DIR": ""}, file=file)
    assert (None, Path("/srv/ComfyUI")) == (settings.models_dir, settings.comfyui_dir)


@pytest.mark.parametrize(
    ("words", "environment"),
    [
        ("not both", {"RUSHES_COMFYUI_URLS": "http://a:1", "RUSHES_COMFYUI_DIR": "/srv"}),
        ("one slot for each of 1", {"RUSHES_COMFYUI_URLS": "http://a:1", "RUSHES_WORKERS": "2"}),
        ("twice", {"RUSHES_COMFYUI_URLS": "http://a:1,http://a:1"}),
        ("needs RUSHES_COMFYUI_URLS", {"RUSHES_ENGINE": "comfyui"}),
        ("http://a:1 twice", {"RUSHES_COMFYUI_URLS": "http://a:1,http://a:1/"}),
        ("http://a twice", {"RUSHES_COMFYUI_URLS": "http://u:p@A/,http://u:p@a:80"}),
        ("https://[::1]/x twice", {"RUSHES_COMFYUI_URLS": "https://[::1]:443/x/,HTTPS://[::1]/x"}),
        ("such as http://localhost:8188", {"RUSHES_COMFYUI_URLS": "localhost:8188"}),
        ("such as http://10.0.0.2:8188/a", {"RUSHES_COMFYUI_URLS": "10.0.0.2:8188/a"}),
        ("such as http://127.0.0.1:8188", {"RUSHES_COMFYUI_URLS": "ftp://a"}),
        ("such as http://127.0.0.1:8188", {"RUSHES_COMFYUI_URLS": "http://a:99999"}),
    ],
)
def test_comfyui_settings_that_cannot_be(words: str, environment: dict[str, str]) -> None:
    with pytest.raises(SettingsError) as refused:
        load(environment)
    assert words in refused.value.message
