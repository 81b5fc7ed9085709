"""Commands on this machine: catalogs, stores in the wrong folder, and what `doctor` finds."""

import json
import shlex
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from rushes.catalog.load import Catalog
from rushes.cli import exits
from rushes.cli.main import execute
from support.stub_server import KEY, MODEL, StubServer, running

T2I = "wan-ai/wan-2-5/text-to-image"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("BASE_URL", "API_KEY", "DATA_DIR", "DATABASE_URL", "STORAGE_URL"):
        monkeypatch.delenv(f"RUSHES_{name}", raising=False)
    return tmp_path


@pytest.fixture
def stub(here: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StubServer]:
    with running() as server:
        monkeypatch.setenv("RUSHES_API_KEY", KEY)
        yield server


# models


@pytest.mark.parametrize("entry", Catalog.load().entries(), ids=lambda entry: entry.model.id)
def test_the_command_that_is_shown_can_be_pasted(
    here: Path, capfd: pytest.CaptureFixture[str], entry: object
) -> None:
    model = entry.model  # type: ignore[attr-defined]
    assert 0 == execute(["models", "show", model.id])
    line = capfd.readouterr().out.splitlines()[-1]
    words = shlex.split(line)
    assert ["rushes", "run", model.id] == words[:3]
    given = dict(word.split("=", 1) for word in words[4::2])
    assert {name: str(model.sample[name]) for name in model.required} == given


def test_models_are_this_machines_without_a_server(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert 0 == execute(["models", "list"])
    assert 1 + len(Catalog.load().entries()) == len(capfd.readouterr().out.splitlines())


def test_models_are_the_servers_where_one_is_named(
    stub: StubServer, here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert 0 == execute(["models", "list", "--base-url", stub.url, "--search", "vace"])
    printed = capfd.readouterr()
    assert [MODEL] == [line.split()[0] for line in printed.out.splitlines()[1:]]
    assert f"as {stub.url} shows it" in printed.err
    assert (["vace"], ["200"]) == (stub.seen[-1].query["search"], stub.seen[-1].query["limit"])
    monkeypatch.setenv("RUSHES_BASE_URL", stub.url)
    assert 0 == execute(["models", "show", MODEL])
    shown = capfd.readouterr().out
    assert "108_cfg" in shown
    assert f"rushes run {MODEL} -i 56_text=VALUE -i 118_image=Runcomfy_Example_1290_1.png\n" in shown
    assert 0 == execute(["models", "show", MODEL, "--json"])
    assert 0.05 == json.loads(capfd.readouterr().out)["base_price_usd"]
    assert exits.Exit.NOT_FOUND == execute(["models", "show", T2I])
    assert exits.Exit.UNAUTHORIZED == execute(["models", "list", "--api-key", "wrong"])


# the wrong folder


@pytest.mark.parametrize(
    "command",
    ["keys list", "keys revoke x", "requests list", "requests show x", "requests cancel x", "worker"],
)
def test_no_command_but_serve_and_create_makes_a_store(
    here: Path, capfd: pytest.CaptureFixture[str], command: str
) -> None:
    assert exits.Exit.USAGE == execute(command.split())
    assert "there is no " in capfd.readouterr().err
    assert [] == list(here.iterdir())


def test_the_wrong_folder_is_told_with_the_way_out(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    execute(["requests", "list", "--data-dir", "elsewhere"])
    expected = "rushes: there is no store at elsewhere: run it where the server runs, or give --data-dir\n"
    assert expected == capfd.readouterr().err


def test_doctor_makes_nothing(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert 0 == execute(["doctor"])
    assert "run this in its folder, or give --data-dir" in capfd.readouterr().out
    (here / "rushes-data").mkdir()
    assert 0 == execute(["doctor"])
    assert [] == list((here / "rushes-data").iterdir())


def test_a_new_key_says_which_store_knows_it(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert 0 == execute(["keys", "create", "--name", "one"])
    first = capfd.readouterr()
    assert (1, "rsh_") == (len(first.out.splitlines()), first.out[:4])
    store = here / "rushes-data" / "rushes.db"
    assert f"There was no store yet, so a new one was made: {store}." in first.err
    assert "in its folder, or with its --data-dir" in first.err
    assert 0 == execute(["keys", "create", "--name", "two"])
    second = capfd.readouterr()
    assert f"The key 'two' is for the server with the store {store}.\n" == second.err
    assert first.out.strip() not in first.err


# doctor


def doctor(capfd: pytest.CaptureFixture[str]) -> tuple[int, dict[str, tuple[str, str]]]:
    """Its status, and by what was looked at how it is and what is said of it."""
    status = execute(["doctor"])
    printed = capfd.readouterr()
    assert "Traceback" not in printed.out + printed.err
    rows = (line.partition(": ") for line in printed.out.splitlines())
    return status, {head[6:]: (head[:4].strip(), text) for head, _, text in rows}


def test_doctor_names_the_cause_of_storage_trouble(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    s3_at(monkeypatch, "http://127.0.0.1:9", "s3://bucket/films-401-403-404")  # numbers that mean nothing
    status, found = doctor(capfd)
    state, text = found["storage"]
    assert (1, "bad") == (status, state)
    place = "s3://bucket/films-401-403-404 at http://127.0.0.1:9"
    assert f"{place}: Connection refused. Check that it is running" in text


@pytest.mark.parametrize(
    ("answer", "step"),
    [
        (401, "Check the AWS_* credentials"),
        (403, "Check the AWS_* credentials"),
        (404, "Create the bucket"),
        (405, "Check RUSHES_STORAGE_URL and the storage's own log"),
    ],
)
def test_doctor_says_what_to_do_about_a_storage_that_refuses(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], answer: int, step: str
) -> None:
    class Refusing(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(answer)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        s3_at(monkeypatch, f"http://127.0.0.1:{server.server_port}", "s3://bucket/films")
        status, found = doctor(capfd)
        server.shutdown()
    assert (1, "bad") == (status, found["storage"][0])
    assert step in found["storage"][1]


def s3_at(monkeypatch: pytest.MonkeyPatch, endpoint: str, storage: str) -> None:
    monkeypatch.setenv("RUSHES_STORAGE_URL", storage)
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")


def test_doctor_names_a_local_folder_that_takes_no_file(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (here / "rushes-data").mkdir()
    (here / "rushes-data" / "files").write_text("no folder")
    status, found = doctor(capfd)
    assert (1, "bad") == (status, found["storage"][0])
    assert "rushes-data/files: " in found["storage"][1]


def test_doctor_looks_at_addresses_and_patterns(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RUSHES_HOST", "0.0.0.0")
    monkeypatch.setenv("RUSHES_TRUSTED_PROXIES", "*")
    monkeypatch.setenv("RUSHES_FETCH_ALLOW", "0.0.0.0/0")
    monkeypatch.setenv("RUSHES_MODELS", "nope/*,community/*")
    status, found = doctor(capfd)
    assert 0 == status
    for what, words in {
        "public_url": "RUSHES_PUBLIC_URL",
        "trusted_proxies": "name your proxies",
        "fetch_allow": "any machine of yours",
        "worker models": "no model fits 'nope/*'",
    }.items():
        assert "note" == found[what][0]
        assert words in found[what][1]
    monkeypatch.setenv("RUSHES_PUBLIC_URL", "http://localhost:8000")
    monkeypatch.setenv("RUSHES_MODELS", "nope/*")
    status, found = doctor(capfd)
    assert 1 == status
    assert "others cannot reach this" in found["public_url"][1]
    assert "the workers serve nothing" in found["worker models"][1]


@pytest.mark.parametrize("body", ["raise RuntimeError('no\\nGPU')", "def make(:", "make = 1", ""])
def test_an_engine_that_does_not_load_is_one_line(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], body: str
) -> None:
    name = f"engine_{abs(hash(body))}"
    (here / f"{name}.py").write_text(body)
    monkeypatch.syspath_prepend(str(here))
    monkeypatch.setenv("RUSHES_ENGINE", f"{name}:make")
    status, found = doctor(capfd)
    assert (1, "bad") == (status, found[f"engine {name}:make"][0])


def test_a_setting_that_cannot_be_is_a_finding(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RUSHES_FETCH_ALLOW", "everything")
    status, found = doctor(capfd)
    assert (1, "bad", True) == (status, found["setting"][0], "fetch_allow" in found["setting"][1])
    assert "python" in found
