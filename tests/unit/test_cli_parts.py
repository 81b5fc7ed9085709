"""What the command line decides and shows by itself: values, files, statuses, lines."""

from pathlib import Path
from typing import Any

import pytest

from rushes.cli import exits, show
from rushes.cli.inputs import BadInput, LocalFile, not_here, parse_value, read_pairs, resolve, takes_file
from rushes.cli.options import store_place, unmatched
from rushes.cli.outcome import later
from rushes.client.types import Status
from rushes.errors import InvalidInput, RushesError, SettingsError
from rushes.settings import Settings
from support.stub_server import SCHEMA


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("81", {"type": "integer"}, 81),
        ("81.0", {"type": "integer"}, 81),
        ("18446744073709551615", {"type": "integer"}, 2**64 - 1),
        ("-1", {"type": "integer"}, -1),
        ("3.5", {"type": "float"}, 3.5),
        ("3", {"type": "float"}, 3),
        ("1e-3", {"type": "number"}, 0.001),
        ("YES", {"type": "boolean"}, True),
        ("off", {"type": "boolean"}, False),
        ("81", {"type": "string"}, "81"),
        ("", {"type": "string"}, ""),
        ("a=b", {"type": ["null", "string"]}, "a=b"),
        ('["a"]', {"type": "array"}, ["a"]),
        ('{"path": "x"}', {"type": "object"}, {"path": "x"}),
        ("81", None, 81),
        ("true", {}, True),
        ("a lighthouse", None, "a lighthouse"),
        ("NaN", None, "NaN"),
    ],
)
def test_values_are_read_by_the_schema(text: str, field: dict[str, Any] | None, value: object) -> None:
    assert (type(value), value) == (type(parse_value(text, field)), parse_value(text, field))


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("1.5", "integer"),
        ("inf", "integer"),
        ("x", "float"),
        ("inf", "number"),
        ("2", "boolean"),
        ("[", "array"),
    ],
)
def test_values_that_do_not_fit_are_refused(text: str, kind: str) -> None:
    with pytest.raises(ValueError, match="must be"):
        parse_value(text, {"type": kind})


@pytest.mark.parametrize(
    ("name", "title", "expected"),
    [
        ("118_image", "Image", True),
        ("68_image", "Start Image", True),
        ("source", "Source video", True),
        ("56_text", "Prompt", False),
        ("image_prompt", "Image prompt", False),
        ("imagery", "Style", False),
    ],
)
def test_file_fields_are_known_by_their_names(name: str, title: str, *, expected: bool) -> None:
    assert expected == takes_file(name, {"type": "string", "title": title})


def test_fields_of_other_types_take_no_file() -> None:
    assert not takes_file("num_images", {"type": "integer", "title": "Images"})
    assert not takes_file("image", {"type": "string", "enum": ["a", "b"]})


def test_an_at_sign_can_be_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").write_bytes(b"")
    assert {"56_text": "@a"} == resolve({}, {"56_text": "@@a"}, SCHEMA)
    assert {"118_image": LocalFile(Path("a"))} == resolve({}, {"118_image": "@a"}, SCHEMA)


def test_of_a_json_input_only_file_fields_name_local_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").write_bytes(b"")
    given = {"56_text": "a", "118_image": "a", "25_value": 81}
    assert {"56_text": "a", "118_image": LocalFile(Path("a")), "25_value": 81} == resolve(given, {}, SCHEMA)


@pytest.mark.parametrize(
    ("name", "file", "field"),
    [
        ("56_text", "in.json", {"type": "string", "title": "Prompt"}),
        ("56_text", "cat.png", {"type": "string", "title": "Prompt"}),
        ("style", "style.txt", {"type": "string", "title": "Style"}),
        ("size", "cat.png", {"type": "string", "title": "Size", "enum": ["a", "b"]}),
    ],
)
def test_a_text_takes_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, file: str, field: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / file).write_bytes(b"{}")
    with pytest.raises(BadInput) as caught:
        resolve({}, {name: f"@{file}"}, {"properties": {name: field}})
    [bad] = caught.value.fields
    assert name == bad.field
    assert "takes a text, not a file" in bad.message
    assert "--input @FILE" in bad.message


@pytest.mark.parametrize("schema", [None, {"properties": {"reference": {"type": "string", "title": "Ref"}}}])
def test_media_go_where_a_foreign_schema_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schema: dict[str, Any] | None
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cat.png").write_bytes(b"")
    assert {"reference": LocalFile(Path("cat.png"))} == resolve({}, {"reference": "@cat.png"}, schema)


def test_only_refused_values_that_read_like_files_are_said_to_be_missing() -> None:
    values = {"118_image": "nope.png", "56_text": "nope.png", "25_value": 81}
    assert ["118_image"] == [bad.field for bad in not_here(values, SCHEMA, {"118_image", "56_text"})]
    assert [] == not_here(values, SCHEMA, {"56_text"})
    for other in ("https://h.example/a.png", "data:image/png;base64,AA", "file_1"):
        assert [] == not_here({"118_image": other}, SCHEMA, {"118_image"})


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("The input does not fit: a is wrong..", "The input does not fit: a is wrong."),
        ("did you mean b?.", "did you mean b?"),
        ("a is wrong.; b is wrong.", "a is wrong; b is wrong."),
        ("wait for it ...", "wait for it ..."),
        ("../a.png and a..b stay", "../a.png and a..b stay"),
    ],
)
def test_sentences_put_together_lose_doubled_stops(text: str, shown: str) -> None:
    assert shown == show.tidy(text)


def test_the_command_that_fetches_later_names_a_server_that_was_named() -> None:
    assert "`rushes result x --wait`" == later("x", None)
    assert "`rushes result x --base-url 'http://h/a b'`" == later("x", "http://h/a b", wait=False)


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("", "/data/rushes.db"),
        ("postgresql://me:s3cret@db.example:5433/films", "PostgreSQL, db.example:5433/films"),
        ("postgresql://me@/films?host=/run/pg&password=s3cret", "PostgreSQL, /run/pg/films"),
    ],
)
def test_a_store_is_named_without_its_password(url: str, place: str) -> None:
    assert place == store_place(Settings(data_dir=Path("/data"), database_url=url))


def test_patterns_that_fit_no_model() -> None:
    assert ["nope/*"] == unmatched("community/*, nope/*", ["community/a"])
    assert [] == unmatched("*", ["community/a"])


def test_of_a_name_given_twice_the_last_counts() -> None:
    assert {"a": "2=3"} == read_pairs(("a=1", "a=2=3"))


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (SettingsError("port cannot be 'x'"), exits.Exit.USAGE),
        (InvalidInput("bad", detail=[{"loc": ["a"], "msg": "is wrong", "type": "x"}]), exits.Exit.INVALID),
        (RushesError("odd"), exits.Exit.FAILED),
        (KeyboardInterrupt(), exits.Exit.INTERRUPTED),
    ],
)
def test_errors_of_this_machine_have_their_statuses(error: BaseException, status: exits.Exit) -> None:
    assert status == exits.status_of(error)


def test_errors_of_this_machine_are_told_in_lines(capfd: pytest.CaptureFixture[str]) -> None:
    show.complain(InvalidInput("bad", detail=[{"loc": ["a"], "msg": "is wrong", "type": "x"}]))
    assert "rushes: bad\n  a: is wrong\n" == capfd.readouterr().err


def test_tables_are_never_cut_for_a_pipe(capfd: pytest.CaptureFixture[str]) -> None:
    show.table(["model", "file"], [["a/b", "x" * 200], ["[red]c", None]])
    expected = ["model   file", f"a/b     {'x' * 200}", "[red]c"]
    assert expected == capfd.readouterr().out.splitlines()


def test_statuses_in_words() -> None:
    queued = Status("x", "in_queue", queue_position=3)
    runs = Status("x", "in_progress", progress=0.42, eta=3.1, stage="rendering\x1b[2J")
    assert "queued, position 3" == show.describe(queued)
    assert "queued" == show.describe(Status("x", "in_queue"))
    assert "rendering [2J, 42%, about 3 s left" == show.describe(runs)
    assert "running" == show.describe(Status("x", "in_progress"))
