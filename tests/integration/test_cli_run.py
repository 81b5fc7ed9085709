"""`rushes run` as a user has it: real processes, a real server, real signals."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rushes.cli import exits
from rushes.cli.main import COMMANDS, execute
from support.stub_server import KEY, MODEL, MOVIE, PICTURE, Fault, StubServer, running

RUSHES = [sys.executable, "-m", "rushes.cli.main"]
TEXT = ["-i", "56_text=a slow pan"]


@pytest.fixture
def stub() -> Iterator[StubServer]:
    with running() as server:
        yield server


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stub: StubServer) -> Path:
    """An empty current folder, with the server and the key in the environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RUSHES_BASE_URL", stub.url)
    monkeypatch.setenv("RUSHES_API_KEY", KEY)
    return tmp_path


def spawn(*arguments: str, **options: Any) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [*RUSHES, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)


def saved(stub: StubServer, ending: str = "-1.mp4") -> str:
    [identifier] = stub.jobs
    return f"{identifier}{ending}"


# a whole run


def test_run_prints_the_files_and_nothing_else(stub: StubServer, here: Path) -> None:
    process = subprocess.run(
        [*RUSHES, "run", MODEL, *TEXT, "-i", "25_value=81", "--output-dir", "out"],
        capture_output=True,
        text=True,
        check=False,
    )
    path = Path("out") / saved(stub)
    assert (0, f"{path}\n") == (process.returncode, process.stdout)
    assert MOVIE == (here / path).read_bytes()
    [job] = stub.jobs.values()
    assert {"56_text": "a slow pan", "25_value": 81} == job.input
    assert "completed" not in process.stderr
    for told in ("queued, position 2", "rendering, 42%", "succeeded", "draft engine", "not a generation"):
        assert told in process.stderr
    assert "\x1b" not in process.stderr


def test_a_terminal_gets_a_bar(stub: StubServer, here: Path) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*RUSHES, "run", MODEL, *TEXT],
        stdout=subprocess.PIPE,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "120"},
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # the other side is closed
            break
        if not chunk:
            break
        shown += chunk
    os.close(ours)
    printed, _ = process.communicate()
    assert (0, saved(stub)) == (process.returncode, printed.decode().strip())
    assert b"\x1b[" in shown
    assert b"succeeded in" in shown


def test_json_is_the_result_and_the_files(
    stub: StubServer, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert 0 == execute(["run", MODEL, *TEXT, "--json"])
    printed = json.loads(capfd.readouterr().out)
    assert ("succeeded", 2.85, "draft", [saved(stub)]) == (
        printed["status"],
        printed["cost"],
        printed["engine"],
        printed["saved"],
    )


def test_files_are_never_overwritten(stub: StubServer, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    taken = here / "0198c0de-0000-7000-8000-000000000001-1.mp4"
    taken.write_bytes(b"mine")
    assert 0 == execute(["run", MODEL, *TEXT])
    assert saved(stub, "-1_2.mp4") == capfd.readouterr().out.strip()
    assert b"mine" == taken.read_bytes()


def test_an_id_and_an_address_lead_out_of_no_folder(
    stub: StubServer, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = here / "out"
    address = f"{stub.url}/files/..%2F..%2Fevil.sh"
    stub.polls = []
    stub.files["..%2F..%2Fevil.sh"] = ("image/png", PICTURE)
    stub.outcome = {"request_id": "../../evil", "status": "succeeded", "output": {"image": address}}
    assert 0 == execute(["run", MODEL, *TEXT, "--output-dir", str(folder)])
    assert [folder / "evil-1.png"] == list(folder.iterdir())
    assert [folder] == list(here.iterdir())


def test_no_wait_prints_the_id(stub: StubServer, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert 0 == execute(["run", MODEL, *TEXT, "--no-wait"])
    [identifier] = stub.jobs
    printed = capfd.readouterr()
    assert f"{identifier}\n" == printed.out
    assert f"`rushes result {identifier} --wait` waits for it" in printed.err
    assert [] == stub.calls("GET", "/status$")
    assert 0 == execute(["run", MODEL, *TEXT, "--no-wait", "--json"])
    assert {"request_id", "status_url", "result_url", "cancel_url"} == set(json.loads(capfd.readouterr().out))


# inputs


@pytest.mark.parametrize("way", ["text", "file", "stdin"])
def test_the_whole_input_comes_from_everywhere_and_i_wins(stub: StubServer, here: Path, way: str) -> None:
    whole = json.dumps({"56_text": "from the whole", "25_value": 141})
    (here / "in.json").write_text(whole)
    given = {"text": whole, "file": "@in.json", "stdin": "-"}[way]
    process = subprocess.run(
        [*RUSHES, "run", MODEL, "--input", given, *TEXT, "--no-wait"],
        input=whole if way == "stdin" else "",
        text=True,
        capture_output=True,
        check=False,
    )
    assert 0 == process.returncode
    [job] = stub.jobs.values()
    assert {"56_text": "a slow pan", "25_value": 141} == job.input


def test_local_files_are_uploaded_once(stub: StubServer, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (here / "cat.png").write_bytes(PICTURE)
    assert 0 == execute(
        ["run", MODEL, "-i", "118_image=@cat.png", "--input", '{"mask": "cat.png"}', "--no-wait"]
    )
    [stored] = stub.uploads.values()
    assert ("cat.png", "image/png", PICTURE) == (stored["name"], stored["content_type"], stored["content"])
    [job] = stub.jobs.values()
    assert {"118_image": stored["url"], "mask": stored["url"]} == job.input
    assert "uploading cat.png" in capfd.readouterr().err


@pytest.mark.parametrize(
    "value", ["https://h.example/cat.png", "Runcomfy_Example_1290_1.png", "data:image/png;base64,AAAA"]
)
def test_what_is_no_local_file_is_passed_on(stub: StubServer, here: Path, value: str) -> None:
    assert 0 == execute(["run", MODEL, "-i", f"118_image={value}", "--no-wait"])
    [job] = stub.jobs.values()
    assert {"118_image": value} == job.input
    assert {} == stub.uploads


def test_a_server_without_uploads_is_named(
    stub: StubServer, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    stub.uploads_allowed = False
    (here / "cat.png").write_bytes(PICTURE)
    assert exits.Exit.INVALID == execute(["run", MODEL, "-i", "118_image=@cat.png"])
    assert "118_image: " in (told := capfd.readouterr().err)
    assert "takes no uploads; give the public HTTPS address of cat.png" in told
    assert {} == stub.jobs


def test_a_model_whose_schema_is_not_shown_still_runs(stub: StubServer, here: Path) -> None:
    stub.fail("GET", "/v1/models/", Fault(404, {"error_code": 404001, "error_message": "no such route"}))
    assert 0 == execute(["run", MODEL, *TEXT, "-i", "25_value=81", "-i", "loop=true", "--no-wait"])
    [job] = stub.jobs.values()
    assert {"56_text": "a slow pan", "25_value": 81, "loop": True} == job.input


def test_bad_fields_are_named_before_anything_is_sent(
    stub: StubServer, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bad = ["25_value=many", "108_cfg=nan", "loop=perhaps", "118_image=@none.png", "prompts=x", "24_value=81"]
    options = [part for pair in bad for part in ("-i", pair)]
    assert exits.Exit.INVALID == execute(["run", MODEL, *options])
    lines = capfd.readouterr().err.splitlines()
    assert [
        "rushes: the input cannot be used",
        "  25_value: must be a whole number, not 'many'",
        "  108_cfg: must be a number, not 'nan'",
        "  loop: must be true or false, not 'perhaps'",
        "  118_image: there is no file 'none.png'; write @@ for a value that begins with @",
        "  prompts: is no field of this model (did you mean 56_text?)",
        "  24_value: is no field of this model (did you mean 25_value?)",
    ] == lines
    assert [] == stub.calls("POST", "")


def test_bad_fields_of_the_server_are_one_line_each(
    stub: StubServer, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    messages = ["118_image is required (Image)", "25_value must be one of 81, 141; got 82"]
    detail = [{"loc": [m.split()[0]], "msg": m, "type": "x"} for m in messages]
    summary = f"The input does not fit in 2 places: {'; '.join(messages)}."
    stub.fail("POST", "/v1/models/", Fault(422, {"error_code": 1, "error_message": summary, "detail": detail}))
    assert exits.Exit.INVALID == execute(["run", MODEL, *TEXT, "-i", "25_value=82"])
    told = capfd.readouterr().err.splitlines()
    assert ["rushes: the input does not fit the model", *(f"  {message}" for message in messages)] == told


def test_a_file_that_is_not_here_is_said_to_be(
    stub: StubServer, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    message = "118_image: 'nope.png' is neither an https:// URL nor one of the samples a.png, b.png"
    refused(stub, [{"loc": ["118_image"], "msg": message, "type": "input_not_a_file"}])
    assert exits.Exit.INVALID == execute(["run", MODEL, *TEXT, "-i", "118_image=nope.png"])
    told = capfd.readouterr().err
    assert message in told
    assert f"  118_image: there is no file 'nope.png' here ({here}), so the text itself was sent" in told


def test_a_text_that_is_given_a_file_is_refused_before_the_upload(
    stub: StubServer, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (here / "in.json").write_text("{}")
    assert exits.Exit.INVALID == execute(["run", MODEL, "-i", "56_text=@in.json"])
    assert "56_text: takes a text, not a file" in capfd.readouterr().err
    assert ([], {}) == (stub.calls("POST", ""), stub.uploads)


def test_a_refused_upload_has_one_prefix(
    stub: StubServer, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (here / "cat.png").write_bytes(b"no picture")
    stub.fail("POST", "/v1/files", Fault(422, {"error_code": 422001, "error_message": "file: it is no media."}))
    assert exits.Exit.INVALID == execute(["run", MODEL, "-i", "118_image=@cat.png"])
    assert "  118_image: cat.png was refused: it is no media\n" in capfd.readouterr().err


def refused(stub: StubServer, detail: list[dict[str, Any]]) -> None:
    summary = f"The input does not fit: {detail[0]['msg']}."
    body = {"error_code": 422001, "error_message": summary, "detail": detail}
    stub.fail("POST", "/v1/models/", Fault(422, body))


@pytest.mark.parametrize("side", ["ours", "the server's"])
def test_refused_input_is_json_where_json_was_asked_for(
    stub: StubServer, here: Path, capfd: pytest.CaptureFixture[str], side: str
) -> None:
    if side != "ours":
        refused(stub, [{"loc": ["25_value"], "msg": "25_value is wrong", "type": "enum"}])
    value = "many" if side == "ours" else "82"
    assert exits.Exit.INVALID == execute(["run", MODEL, *TEXT, "-i", f"25_value={value}", "--json"])
    printed = capfd.readouterr()
    error = json.loads(printed.out)["error"]
    assert ["25_value"] == [field["field"] for field in error["fields"]]
    assert "  25_value" in printed.err
    expected = ("BadInput", None) if side == "ours" else ("InvalidInput", 422)
    assert expected == (error["type"], error.get("http_status"))


# outputs that cannot be saved


def test_a_folder_that_takes_no_file_is_refused_before_the_submit(
    stub: StubServer, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["run", MODEL, *TEXT, "--output-dir", "/proc/foo"]
    assert exits.Exit.FAILED == execute(arguments)
    assert "rushes: cannot save to /proc/foo: " in capfd.readouterr().err
    assert exits.Exit.FAILED == execute([*arguments, "--json"])
    assert "/proc/foo" in json.loads(capfd.readouterr().out)["error"]["message"]
    assert {} == stub.jobs


def test_a_folder_that_is_lost_meanwhile_leaves_the_id_and_the_links(stub: StubServer, here: Path) -> None:
    stub.polls, stub.hold = [{"status": "in_progress"}], True
    process = spawn("run", MODEL, *TEXT, "--output-dir", "out")
    until(lambda: stub.calls("GET", "/status$"))
    (here / "out").rmdir()
    (here / "out").write_text("a file now")
    stub.hold = False
    printed, told = process.communicate()
    [identifier] = stub.jobs
    assert (exits.Exit.FAILED, "") == (process.returncode, printed)
    assert f"request {identifier} succeeded, but its outputs cannot be saved: cannot save to " in told
    assert f"  {stub.url}/files/a.mp4?signature=s3cret\n" in told
    assert f"`rushes result {identifier}` downloads it again, with another --output-dir." in told


# errors and their statuses


def test_a_failed_request(stub: StubServer, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    error = {"code": "out_of_memory", "message": "too large \x1b[31m"}
    stub.outcome = {"status": "failed", "error": error}
    assert exits.Exit.FAILED == execute(["run", MODEL, *TEXT, "--json"])
    printed = capfd.readouterr()
    assert ("failed", error) == (json.loads(printed.out)["status"], json.loads(printed.out)["error"])
    assert "failed: too large  [31m [out_of_memory]" in printed.err
    assert "completed" not in printed.err
    assert "vace-fun: failed in " in printed.err
    assert "\x1b" not in printed.err


def test_a_request_that_someone_else_cancelled(
    stub: StubServer, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    stub.polls = [{"status": "in_queue"}, {"status": "cancelled"}]
    stub.outcome = {"status": "cancelled"}
    assert exits.Exit.CANCELLED == execute(["run", MODEL, *TEXT])
    assert "was cancelled" in capfd.readouterr().err


def test_no_server(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert exits.Exit.UNREACHABLE == execute(["run", MODEL, *TEXT, "--base-url", "http://127.0.0.1:9"])
    told = capfd.readouterr().err
    assert "http://127.0.0.1:9" in told
    assert "rushes serve" in told


def test_no_key(stub: StubServer, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    os.environ.pop("RUSHES_API_KEY")
    assert exits.Exit.UNAUTHORIZED == execute(["run", MODEL, *TEXT])
    told = capfd.readouterr().err
    assert "no API key was given" in told
    assert "rushes keys create" in told


def test_a_wrong_key(stub: StubServer, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert exits.Exit.UNAUTHORIZED == execute(["run", MODEL, *TEXT, "--api-key", "wrong"])
    assert "Send a valid API key" in (told := capfd.readouterr().err)
    assert "wrong" not in told


def test_an_unknown_model(here: Path) -> None:
    assert exits.Exit.NOT_FOUND == execute(["run", "nobody/nothing", *TEXT])


def test_a_full_queue(stub: StubServer, here: Path) -> None:
    stub.fail("POST", "/v1/models/", Fault(429, {"error_code": 429002, "error_message": "full"}))
    assert exits.Exit.LIMITED == execute(["run", MODEL, *TEXT])


def test_a_server_that_fails_names_its_trace(
    stub: StubServer, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    stub.fail("POST", "/v1/models/", Fault(500, {"error_code": 500001, "error_message": "oops"}))
    assert exits.Exit.SERVER == execute(["run", MODEL, *TEXT])
    assert "X-Request-Id trace-1" in capfd.readouterr().err


def test_a_wait_that_is_over_says_how_to_go_on(
    stub: StubServer, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    stub.hold = True
    assert exits.Exit.SERVER == execute(["run", MODEL, *TEXT, "--timeout", "0.2"])
    [identifier] = stub.jobs
    told = capfd.readouterr().err
    assert f"accepted and may go on: `rushes result {identifier} --wait` waits for it" in told


def test_an_output_that_is_gone_is_named(
    stub: StubServer, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    stub.outcome = {"status": "succeeded", "output": {"image": f"{stub.url}/files/gone.png"}}
    assert exits.Exit.NOT_FOUND == execute(["run", MODEL, *TEXT])
    assert "/files/gone.png" in capfd.readouterr().err
    assert [] == list(here.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ["-i", "no-equals-sign"],
        ["--input", "[1]"],
        ["--input", "{"],
        ["--input", '{"x": NaN}'],
        ["--input", "@none.json"],
        ["--base-url", "nonsense"],
        ["--api-key", "two words"],
        ["--timeout", "0"],
        ["--nonsense"],
    ],
)
def test_command_lines_that_make_no_sense(here: Path, arguments: list[str]) -> None:
    assert exits.Exit.USAGE == execute(["run", MODEL, *arguments])


def test_a_model_id_that_is_none(here: Path) -> None:
    assert exits.Exit.USAGE == execute(["run", "../../admin", *TEXT])


# Ctrl-C


def test_ctrl_c_cancels_what_is_still_queued(stub: StubServer, here: Path) -> None:
    stub.polls, stub.hold = [{"status": "in_queue", "queue_position": 3}], True
    process = spawn("run", MODEL, *TEXT)
    until(lambda: stub.calls("GET", "/status$"))
    process.send_signal(signal.SIGINT)
    printed, told = process.communicate()
    [job] = stub.jobs.values()
    assert (130, "", "cancelled") == (process.returncode, printed, job.state)
    assert f"request {job.id} was still queued and is cancelled" in told
    assert "Traceback" not in told


def test_ctrl_c_leaves_what_runs_and_says_so(stub: StubServer, here: Path) -> None:
    stub.polls, stub.hold = [{"status": "in_progress", "progress": 0.1}], True
    process = spawn("run", MODEL, *TEXT)
    until(lambda: stub.calls("GET", "/status$"))
    process.send_signal(signal.SIGINT)
    _, told = process.communicate()
    [job] = stub.jobs.values()
    assert (130, "in_progress") == (process.returncode, job.state)
    assert f"already runs and goes on: `rushes result {job.id} --wait` fetches it" in told


def test_ctrl_c_during_the_submit_loses_no_request(stub: StubServer, here: Path) -> None:
    stub.hold = True
    stub.submit_gate.clear()
    process = spawn("run", MODEL, *TEXT)
    until(lambda: stub.jobs)
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    assert "waiting for the server's answer" in process.stderr.readline()
    stub.submit_gate.set()
    _, told = process.communicate()
    [job] = stub.jobs.values()
    assert (130, "cancelled") == (process.returncode, job.state)
    assert "was still queued and is cancelled" in told


def test_ctrl_c_with_the_server_gone(here: Path) -> None:
    with running() as stub:
        stub.hold = True
        process = spawn("run", MODEL, *TEXT, "--base-url", stub.url)
        until(lambda: stub.calls("GET", "/status$"))
        stub.fail("POST", "/cancel$", Fault(drop=True), times=9)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate()
    assert 130 == process.returncode
    assert "could not be cancelled and may go on" in told
    assert f"--wait --base-url {stub.url}` fetches it" in told


# the command itself


def test_help_imports_no_command() -> None:
    program = (
        "import sys; from rushes.cli.main import execute; status = execute(['--help']); "
        "heavy = {'httpx', 'rich', 'numpy', 'starlette', 'msgspec', 'rushes.cli.run'} & set(sys.modules); "
        "print('heavy', sorted(heavy)); sys.exit(status)"
    )
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert process.stdout.endswith("heavy []\n")
    assert all(f"\n  {name} " in process.stdout for name in COMMANDS)


def test_help_lists_every_status(capfd: pytest.CaptureFixture[str]) -> None:
    assert 0 == execute(["run", "--help"])
    assert exits.listing() in capfd.readouterr().out.replace("\n  ", "\n")


def test_the_documentation_lists_every_status() -> None:
    page = (Path(__file__).parents[2] / "docs" / "cli.md").read_text("utf-8")
    missing = [s for s, text in exits.MEANING.items() if f"| {s.value} | {text} |" not in page]
    assert [] == missing


def test_version_and_unknown_commands(capfd: pytest.CaptureFixture[str]) -> None:
    assert 0 == execute(["--version"])
    assert capfd.readouterr().out.startswith("rushes, version ")
    assert exits.Exit.USAGE == execute(["nonsense"])


def test_a_reader_that_leaves_is_no_traceback(stub: StubServer, here: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    process = subprocess.Popen([*RUSHES, "run", MODEL, *TEXT], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    _, told = process.communicate()
    assert exits.Exit.PIPE == process.returncode
    assert "Traceback" not in told
