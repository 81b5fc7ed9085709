"""Which remotes the settings name, where they are, and which key goes to which of them."""

import pickle
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rushes.engines.remote.configured import (
    RemoteConfig,
    Secret,
    cautions,
    configured,
    hidden_from_slots,
    key_variable,
    key_variables,
)
from rushes.errors import SettingsError
from rushes.settings import REMOTE_KINDS, Remote, Settings, load, remote_of, remotes_of

VENDORS = {
    "DASHSCOPE_API_KEY": "dash",
    "RUNCOMFY_TOKEN": "run",
    "FAL_KEY": "fal",
    "REPLICATE_API_TOKEN": "rep",
    "OPENAI_API_KEY": "open",
}


def remotes(text: str, **environ: str) -> dict[str, tuple[str, str, str | None]]:
    """Kind, address and key of each, by name."""
    found = configured(load({"RUSHES_REMOTES": text}), environ)
    return {one.name: (one.kind, one.base_url, one.key.value if one.key else None) for one in found}


# -- entries of the setting ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "remote"),
    [
        ("fal", Remote("fal", "fal", "")),
        ("dashscope", Remote("dashscope", "dashscope", "")),
        ("dashscope@us", Remote("dashscope", "dashscope", "us")),
        ("beijing=dashscope@cn", Remote("beijing", "dashscope", "cn")),
        (
            "box=openai-video@HTTP://Box:80/v1/",
            Remote("box", "openai-video", "http://box/v1"),
        ),
        (" other = runcomfy @ https://a.example ", Remote("other", "runcomfy", "https://a.example")),
        ("a.b_c-1=fal", Remote("a.b_c-1", "fal", "")),
        ("fal=fal@https://q.example/fal", Remote("fal", "fal", "https://q.example/fal")),
    ],
)
def test_an_entry(text: str, remote: Remote) -> None:
    assert remote == remote_of(text)
    assert (text.strip(),) == load({"RUSHES_REMOTES": f"{text},"}).remotes


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "fall",
            "there is no kind 'fall', but dashscope, runcomfy, openai-video, fal, replicate; did you mean fal?",
        ),
        ("box=openai", "did you mean openai-video?"),
        ("zzz", "there is no such kind, but dashscope, runcomfy, openai-video, fal, replicate"),
        ("box=", "there is no such kind"),
        ("=fal", "the name ''"),
        ("fal, box=zzz", "entry 2: there is no such kind"),
        ("My-Box=fal", "the name 'My-Box' has other than lower-case letters"),
        ("a--b=fal", "the name 'a--b'"),
        ("wan=fal", "a fal cannot be named 'wan', the name of another engine"),
        ("local=fal", "cannot be named 'local'"),
        ("fal=replicate", "a replicate cannot be named 'fal'"),
        ("fal@", "nothing stands behind the @"),
        ("openai-video", "openai-video@http://127.0.0.1:8000/v1"),
        ("dashscope@eu", "there is intl, us and cn"),
        ("dashscope@int", "did you mean intl?"),
        ("fal@queue.example", "write a whole address, such as https://api.example"),
        ("fal@ftp://a", "write a whole address"),
        ("runcomfy@https://a/?key=pass-word", "write a whole address"),
        ("runcomfy@https://me:pass-word@a.example", "an address holds no user or key"),
        ("fal, fal", "it names fal twice; give one of them another name: other=fal@…"),
        ("a=fal,a=replicate", "it names a twice"),
        (
            "my-box=fal,my.box=replicate",
            "my-box and my.box would both have RUSHES_REMOTE_MY_BOX_KEY as their key",
        ),
        ("a.b=fal,x=fal,a_b=fal", "a.b and a_b would both have RUSHES_REMOTE_A_B_KEY"),
        ("openai_video=fal,openai-video@http://a", "would both have RUSHES_REMOTE_OPENAI_VIDEO_KEY"),
    ],
)
def test_an_entry_that_cannot_be(text: str, said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load({"RUSHES_REMOTES": text})
    assert said in caught.value.message
    assert caught.value.message.startswith("RUSHES_REMOTES: remotes: ")
    assert "pass-word" not in caught.value.message
    with pytest.raises(SettingsError) as caught:
        configured(Settings(remotes=tuple(text.split(","))), VENDORS)
    assert caught.value.message.startswith("remotes: ")
    assert said in caught.value.message


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("https://user:pa55word@host.example/v1", "pa55word"),
        ("box=https://user:pa55word@host.example/v1", "pa55word"),
        ("https://user:pa55word@host.example/v1=fal", "pa55word"),
        ("fal=sk-live-0123456789abcdef", "0123456789"),
        ("fal=0123456789abcdef", "0123456789"),
        ("0123456789abcdef", "0123456789"),
        ("FAL_KEY=abcd1234:efgh", "abcd1234"),
        ("abcd1234:EFGH=fal", "abcd1234"),
        ("SK_LIVE_0123456789ABCDEF0123456789=fal", "0123456789"),
        ("fal@sk-live-0123456789abcdef", "0123456789"),
        ("fal@abcd1234:efgh5678", "abcd1234"),
        ("fal@https://host/?key=abcdef123456", "abcdef123456"),
        ("fal@https://k:abcdef123456@host/x", "abcdef123456"),
        ("fal@https://k:abcdef/123456@host/x", "abcdef"),
        ("dashscope@sk-0123456789", "0123456789"),
        ("a--b@0123456789=fal", "0123456789"),
        ("fal,box=fal@http://k:[0123456789", "0123456789"),
    ],
)
def test_a_secret_in_the_wrong_place_is_not_shown(tmp_path: Path, text: str, secret: str) -> None:
    file = tmp_path / "rushes.toml"
    file.write_text(f"remotes = {text.split(',')!r}\n")
    said = []
    for environ, source in (({"RUSHES_REMOTES": text}, None), ({}, file)):
        with pytest.raises(SettingsError) as caught:
            load(environ, file=source)
        said.append(caught.value.message)
    with pytest.raises(SettingsError) as caught:
        configured(Settings(remotes=tuple(text.split(","))), VENDORS)
    said.append(caught.value.message)
    assert [] == [words for words in said if secret.lower() in words.lower()]
    assert all("remotes: entry " in words for words in said)


NAMES = st.from_regex(r"[ab1]([._-]?[ab1]){0,3}", fullmatch=True)


@given(NAMES, NAMES)
def test_names_are_refused_exactly_if_their_keys_would_be_the_same(one: str, other: str) -> None:
    texts = (f"{one}=fal", f"{other}=fal")
    if key_variable(one) != key_variable(other):
        assert [one, other] == [remote.name for remote in remotes_of(texts)]
        return
    with pytest.raises(ValueError, match="twice" if one == other else f"both have {key_variable(one)} as"):
        remotes_of(texts)


def test_what_the_settings_say_of_a_mistake() -> None:
    with pytest.raises(SettingsError) as caught:
        load({"RUSHES_REMOTES": "replicat"})
    kinds = "dashscope, runcomfy, openai-video, fal, replicate"
    said = f"entry 1: there is no kind 'replicat', but {kinds}; did you mean replicate?"
    assert f"RUSHES_REMOTES: remotes: {said}" == caught.value.message


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("remote_limit", "0"),
        ("overflow_seconds", "-1"),
        ("budget_usd_per_day", "-0.1"),
        ("budget_usd_per_day", "nan"),
        ("key_budget_usd_per_day", "inf"),
    ],
)
def test_numbers_that_cannot_be(name: str, text: str) -> None:
    with pytest.raises(SettingsError, match=f"RUSHES_{name.upper()}: {name} cannot be '{text}'"):
        load({f"RUSHES_{name.upper()}": text})


def test_a_list_in_the_settings_file(tmp_path: Path) -> None:
    file = tmp_path / "rushes.toml"
    file.write_text('remotes = ["fal", "box=runcomfy@http://10.0.0.5:8000"]\nsecrets_file = "keys.toml"\n')
    settings = load({}, file=file)
    assert (("fal", "box=runcomfy@http://10.0.0.5:8000"), Path("keys.toml")) == (
        settings.remotes,
        settings.secrets_file,
    )


def test_variables_of_keys_are_no_settings() -> None:
    keys = {"RUSHES_REMOTE_FAL_KEY": "k", "RUSHES_REMOTE_LIMITS_KEY": "k", "RUSHES_REMOTE_MY_BOX_2_KEY": "k"}
    assert Settings() == load(keys)
    with pytest.raises(SettingsError, match="did you mean RUSHES_REMOTE_LIMIT"):
        load({"RUSHES_REMOTE_LIMITS": "1"})


# -- places -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "base_url"),
    [
        ("dashscope", "https://dashscope-intl.aliyuncs.com"),
        ("dashscope@intl", "https://dashscope-intl.aliyuncs.com"),
        ("dashscope@us", "https://dashscope-us.aliyuncs.com"),
        ("dashscope@cn", "https://dashscope.aliyuncs.com"),
        ("runcomfy", "https://model-api.runcomfy.net"),
        ("fal", "https://queue.fal.run"),
        ("replicate", "https://api.replicate.com"),
    ],
)
def test_the_vendors_own_places_and_keys(text: str, base_url: str) -> None:
    (found,) = configured(load({"RUSHES_REMOTES": text}), VENDORS)
    kind = text.partition("@")[0]
    key = {"dashscope": "dash", "runcomfy": "run", "fal": "fal", "replicate": "rep"}[kind]
    assert (kind, kind, base_url, Secret(key)) == (found.name, found.kind, found.base_url, found.key)


@pytest.mark.parametrize(
    ("text", "base_url"),
    [
        ("b=openai-video@http://box:8000", "http://box:8000/v1"),
        ("b=openai-video@http://box:8000/v1/", "http://box:8000/v1"),
        ("b=openai-video@http://box:8000/api/v3", "http://box:8000/api/v3"),
        ("b=runcomfy@https://a.example/", "https://a.example"),
        ("b=runcomfy@https://a.example/v1", "https://a.example"),
        ("b=runcomfy@https://a.example/under", "https://a.example/under"),
        ("b=replicate@http://127.0.0.1:9/v1", "http://127.0.0.1:9"),
        ("b=fal@http://127.0.0.1:9/fal/queue", "http://127.0.0.1:9/fal/queue"),
        ("b=dashscope@http://127.0.0.1:9", "http://127.0.0.1:9"),
    ],
)
def test_other_places(text: str, base_url: str) -> None:
    kind = text.partition("=")[2].partition("@")[0]
    assert {"b": (kind, base_url, "k")} == remotes(text, RUSHES_REMOTE_B_KEY="k")


def test_nothing_is_sent_anywhere_because_there_is_a_key() -> None:
    assert () == configured(Settings(), VENDORS)
    assert frozenset() == key_variables(Settings())


def test_remotes_keep_their_order() -> None:
    found = remotes("replicate, b=dashscope@cn, fal, a=dashscope", **VENDORS)
    assert ["replicate", "b", "fal", "a"] == list(found)


# -- keys ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", REMOTE_KINDS)
def test_no_vendors_key_goes_to_another_host(kind: str) -> None:
    text = f"{kind}@https://not-the-vendor.example"
    if kind in ("runcomfy", "openai-video"):
        assert remotes(text, **VENDORS)[kind][2] is None
        return
    with pytest.raises(SettingsError) as caught:
        remotes(text, **VENDORS)
    assert f"set RUSHES_REMOTE_{kind.upper()}_KEY, in the environment" in caught.value.message
    assert not any(value in caught.value.message.split() for value in VENDORS.values())


def test_a_key_of_its_own_wins() -> None:
    found = remotes("fal, other=fal", FAL_KEY="vendor", RUSHES_REMOTE_OTHER_KEY="mine", RUSHES_REMOTE_X_KEY="x")
    assert ("vendor", "mine") == (found["fal"][2], found["other"][2])


def test_the_vendors_own_address_may_be_written_out() -> None:
    assert "fal" == remotes("fal@https://queue.fal.run/", **VENDORS)["fal"][2]
    assert "open" == remotes("openai-video@https://api.openai.com/v1", **VENDORS)["openai-video"][2]
    assert remotes("openai-video@http://api.openai.com/v1", **VENDORS)["openai-video"][2] is None


@pytest.mark.parametrize(
    ("text", "variables"),
    [
        ("fal", "FAL_KEY or RUSHES_REMOTE_FAL_KEY"),
        ("dashscope@us", "DASHSCOPE_API_KEY or RUSHES_REMOTE_DASHSCOPE_KEY"),
        ("runcomfy", "RUNCOMFY_TOKEN or RUSHES_REMOTE_RUNCOMFY_KEY"),
        ("replicate", "REPLICATE_API_TOKEN or RUSHES_REMOTE_REPLICATE_KEY"),
        ("my-box.2=fal", "FAL_KEY or RUSHES_REMOTE_MY_BOX_2_KEY"),
        ("q=fal@http://a", "RUSHES_REMOTE_Q_KEY"),
    ],
)
def test_a_key_that_is_missing_is_named(text: str, variables: str) -> None:
    for environ in ({}, dict.fromkeys(VENDORS, " "), {"RUSHES_REMOTE_NOT_THIS_KEY": "k"}):
        with pytest.raises(
            SettingsError, match=f"which needs a key: set {variables}, in the environment or in"
        ):
            remotes(text, **environ)


@pytest.mark.parametrize("value", ["two words", "line\nbreak", "clé", "a\x00b"])
def test_a_key_that_cannot_be_is_not_shown(value: str) -> None:
    with pytest.raises(SettingsError, match="FAL_KEY holds no key") as caught:
        remotes("fal", FAL_KEY=value)
    assert value not in caught.value.message


def test_spaces_around_a_key_are_not_part_of_it() -> None:
    assert "k" == remotes("fal", FAL_KEY=" k\n")["fal"][2]


@given(st.text(alphabet=st.characters(codec="ascii", categories=["L", "N"]), min_size=8))
def test_a_secret_shows_itself_nowhere(value: str) -> None:
    secret = Secret(value)
    config = RemoteConfig("fal", "fal", "https://queue.fal.run", secret)
    for shown in (repr(secret), str(secret), f"{secret}", repr(config), str(config), f"{config!s:>99}"):
        assert value not in shown
    assert (value, Secret(value)) == (secret.value, secret)
    with pytest.raises(TypeError):
        pickle.dumps(config)
    with pytest.raises(TypeError):
        msgspec.json.encode(config)


def test_the_variables_that_keys_are_read_from() -> None:
    settings = load({"RUSHES_REMOTES": "fal, my-box=openai-video@http://a, dashscope@cn"})
    wanted = {
        "FAL_KEY",
        "RUSHES_REMOTE_FAL_KEY",
        "RUSHES_REMOTE_MY_BOX_KEY",
        "DASHSCOPE_API_KEY",
        "RUSHES_REMOTE_DASHSCOPE_KEY",
    }
    assert wanted == key_variables(settings)
    assert "RUSHES_REMOTE_A_B_C_KEY" == key_variable("a.b-c")


def test_the_variables_that_slots_do_not_get() -> None:
    secret = (
        dict.fromkeys(["RUSHES_REMOTE_FAL_KEY", "RUSHES_REMOTE_OLD_KEY", "Rushes_Remote_b_Key"], "k") | VENDORS
    )
    plain = dict.fromkeys(["PATH", "RUSHES_REMOTES", "RUSHES_REMOTE_LIMIT", "RUSHES_API_KEY", "HF_TOKEN"], "x")
    assert secret.keys() == hidden_from_slots(secret | plain)
    assert frozenset() == hidden_from_slots(plain)
    for kind in REMOTE_KINDS:
        text = "openai-video@https://api.openai.com/v1" if kind == "openai-video" else kind
        variables = key_variables(load({"RUSHES_REMOTES": text}))
        assert variables == hidden_from_slots(variables)


# -- the secrets file ---------------------------------------------------------------------------------------
def with_file(path: Path, text: str, environ: dict[str, str] | None = None) -> str | None:
    path.write_text(text, "utf-8")
    settings = load({"RUSHES_REMOTES": "fal", "RUSHES_SECRETS_FILE": str(path)})
    (found,) = configured(settings, environ or {})
    return found.key.value if found.key else None


def test_keys_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    assert "of-the-file" == with_file(file, 'FAL_KEY = "of-the-file"')
    assert "of-the-environment" == with_file(file, 'FAL_KEY = "of-the-file"', {"FAL_KEY": "of-the-environment"})
    assert "of-the-file" == with_file(file, 'FAL_KEY = "of-the-file"', {"FAL_KEY": ""})
    assert "own" == with_file(file, 'FAL_KEY = "x"\nRUSHES_REMOTE_FAL_KEY = "own"', {"FAL_KEY": "vendor"})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("FAL_KEY = secret-1", "is not TOML"),
        ("FAL_KEY = 12345", "FAL_KEY in .* is no text"),
        ('[fal]\nkey = "secret-1"', "fal in .* is no text"),
        ('OTHER = "x"', "which needs a key"),
    ],
)
def test_a_file_that_cannot_be_read_is_not_quoted(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(SettingsError, match=said) as caught:
        with_file(tmp_path / "keys.toml", text)
    assert "secret-1" not in caught.value.message
    assert "12345" not in caught.value.message


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    settings = load({"RUSHES_REMOTES": "fal", "RUSHES_SECRETS_FILE": str(tmp_path / "none.toml")})
    with pytest.raises(SettingsError, match=r"secrets_file: .*none\.toml cannot be read"):
        configured(settings, {"FAL_KEY": "k"})


@pytest.mark.parametrize(("mode", "said"), [(0o600, 0), (0o400, 0), (0o640, 1), (0o604, 1)])
def test_a_file_that_others_can_read_is_named(tmp_path: Path, mode: int, said: int) -> None:
    file = tmp_path / "keys.toml"
    file.write_text('FAL_KEY = "k"')
    file.chmod(mode)
    settings = load({"RUSHES_REMOTES": "fal", "RUSHES_SECRETS_FILE": str(file)})
    found = list(cautions(settings, configured(settings, {})))
    assert [f"{file} (secrets_file) can be read by other users: chmod 600 {file}"] * said == found


@pytest.mark.parametrize(
    ("place", "key", "said"),
    [
        (
            "http://10.0.0.5:8000",
            "k",
            ["the key of the remote b goes to 10.0.0.5:8000 unencrypted; use an https address"],
        ),
        ("http://10.0.0.5:8000", "", []),
        ("http://127.0.0.1:8000", "k", []),
        ("https://10.0.0.5:8000", "k", []),
    ],
)
def test_a_key_in_the_open_is_named(place: str, key: str, said: list[str]) -> None:
    settings = load({"RUSHES_REMOTES": f"b=runcomfy@{place}"})
    assert said == list(cautions(settings, configured(settings, {"RUSHES_REMOTE_B_KEY": key})))


def test_passwords_in_addresses_are_not_shown() -> None:
    with pytest.raises(SettingsError) as caught:
        load({"RUSHES_DATABASE_URL": "mysql://me:pass-word@a/b"})
    assert "mysql://***@a/b" in caught.value.message
    assert "pass-word" not in caught.value.message
