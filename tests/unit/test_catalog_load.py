"""The catalog: what comes with it, what users add, and what happens while they edit."""

import os
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest

from rushes.catalog.listing import model_detail, model_summary
from rushes.catalog.load import Catalog, load_model
from rushes.errors import ManifestError

MANIFEST = """
name = "{name}"
description = "Paints with {name}."
categories = ["text-to-image", "mine"]
output = "image"
required = ["prompt"]

[[inputs]]
name = "prompt"
title = "Prompt"
type = "string"
role = "prompt"
default = "a fox"
"""


def write(root: Path, id_: str = "me/mine", text: str = "", name: str = "Mine") -> Path:
    folder = root / id_
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.toml").write_text(text or MANIFEST.format(name=name), "utf-8")
    return folder


def names(catalog: Catalog) -> dict[str, str]:
    return {entry.model.id: entry.model.name for entry in catalog.entries()}


# -- what comes with it -------------------------------------------------------------------------------------
def test_the_four_models() -> None:
    catalog = Catalog.load()

    assert () == catalog.broken
    assert {
        "community/wan-2-1/fusionx/image-to-video": "video",
        "community/wan-2-2/first-last-frame": "video",
        "community/wan-2-2/vace-fun": "video",
        "wan-ai/wan-2-5/text-to-image": "image",
    } == {entry.model.id: entry.model.output for entry in catalog.entries()}


@pytest.mark.parametrize(
    ("id_", "roles"),
    [
        (
            "community/wan-2-2/vace-fun",
            "prompt reference_image resolution frames fps seed steps guidance shift",
        ),
        (
            "community/wan-2-1/fusionx/image-to-video",
            "prompt start_image seed resolution steps guidance shift frames fps",
        ),
        (
            "community/wan-2-2/first-last-frame",
            "start_image end_image prompt resolution frames fps seed steps guidance shift",
        ),
        ("wan-ai/wan-2-5/text-to-image", "prompt negative_prompt resolution"),
    ],
)
def test_every_input_has_its_role(id_: str, roles: str) -> None:
    entry = Catalog.load().get(id_)

    assert entry is not None
    assert roles.split() == [field.role for field in entry.model.inputs]


def test_the_samples_are_what_the_seeds_send() -> None:
    entry = Catalog.load().get("community/wan-2-2/first-last-frame")

    assert entry is not None
    assert {
        "62_image": "Runcomfy_Example_1259_2.png",
        "6_text": "Puppy, playing, happy, barking, joyful",
        "68_image": "Runcomfy_Example_1259_1.png",
    } == entry.model.sample
    assert entry.model.sample["68_image"] == entry.model.inputs[0].default


def test_unknown_ids() -> None:
    catalog = Catalog.load()

    assert [None] * 4 == [catalog.get(id_) for id_ in ("", "community", "community/wan-2-2", "../models")]


# -- searching ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("expected", "query"),
    [
        (4, {}),
        (4, {"text": "WAN"}),
        (1, {"text": "first frame"}),
        (1, {"text": "fusionx"}),
        (0, {"text": "fusionx vace"}),
        (3, {"category": "image-to-video"}),
        (0, {"category": "image"}),
        (1, {"kind": "image"}),
        (2, {"text": "wan 2.2", "kind": "video"}),
    ],
)
def test_search(expected: int, query: dict[str, str]) -> None:
    found, total = Catalog.load().search(**query)

    assert (expected, expected) == (len(found), total)


def test_pages_of_a_search_cover_it_once() -> None:
    catalog = Catalog.load()

    pages = [catalog.search(limit=3, offset=offset) for offset in (0, 3, 6)]

    assert [(3, 4), (1, 4), (0, 4)] == [(len(page), total) for page, total in pages]
    assert list(catalog.entries()) == pages[0][0] + pages[1][0]


def test_categories() -> None:
    assert ["first-last-frame", "image-to-video", "reference-to-video", "text-to-image"] == (
        Catalog.load().categories()
    )


def test_listing() -> None:
    entry = Catalog.load().get("wan-ai/wan-2-5/text-to-image")
    assert entry is not None

    summary, detail = model_summary(entry), model_detail(entry)

    assert {
        "model_id": "wan-ai/wan-2-5/text-to-image",
        "display_name": "Wan 2.5: text to image",
        "description": entry.model.description,
        "categories": ["text-to-image"],
        "output_type": "image",
        "base_price_usd": 0.0,
        "price_unit": "output",
    } == summary
    assert summary.items() <= detail.items()
    assert entry.input_schema == detail["input_schema"]
    assert entry.model.sample == detail["sample"]
    assert "input_schema" in model_summary(entry, include_schema=True)


def test_a_price_note_is_listed(tmp_path: Path) -> None:
    write(tmp_path, text=MANIFEST.format(name="Mine") + '\n[price]\nbase_usd = 0.5\nnote = "At night."\n')
    entry = Catalog.load(tmp_path).get("me/mine")

    assert entry is not None
    summary = model_summary(entry)
    assert (0.5, "At night.") == (summary["base_price_usd"], summary["pricing_note"])


# -- a user's models ----------------------------------------------------------------------------------------
def test_a_users_model_joins_the_others(tmp_path: Path) -> None:
    write(tmp_path, "me/deeper/mine")
    catalog = Catalog.load(tmp_path)

    assert 5 == len(catalog.entries())
    entry = catalog.get("me/deeper/mine")
    assert entry is not None
    assert tmp_path / "me/deeper/mine" == entry.model.folder
    assert {"prompt": "a fox"} == entry.model.sample
    assert {"prompt": "x"} == entry.validator.validate(b'{"prompt": "x"}').input


def test_a_users_model_wins_over_a_built_in_one_while_it_is_there(tmp_path: Path) -> None:
    id_ = "wan-ai/wan-2-5/text-to-image"
    folder = write(tmp_path, id_)
    catalog = Catalog.load(tmp_path)
    assert "Mine" == names(catalog)[id_]

    (folder / "model.toml").unlink()

    assert catalog.refresh()
    assert "Wan 2.5: text to image" == names(catalog)[id_]


def test_changes_are_picked_up_without_a_restart(tmp_path: Path) -> None:
    catalog = Catalog.load(tmp_path)
    assert 4 == len(catalog.entries())
    assert not catalog.refresh()
    version = catalog.version

    folder = write(tmp_path)
    assert catalog.refresh()
    assert "Mine" == names(catalog)["me/mine"]
    assert version < catalog.version

    write(tmp_path, name="Mine, better")
    assert catalog.refresh()
    assert "Mine, better" == names(catalog)["me/mine"]

    (folder / "sample.json").write_text('{"prompt": "an owl"}')
    assert catalog.refresh()
    entry = catalog.get("me/mine")
    assert entry is not None
    assert {"prompt": "an owl"} == entry.model.sample

    (folder / "sample.json").unlink()
    (folder / "model.toml").unlink()
    assert catalog.refresh()
    assert "me/mine" not in names(catalog)
    assert not catalog.refresh()


def test_a_change_of_the_same_size_is_seen(tmp_path: Path) -> None:
    folder = write(tmp_path, name="Mine A")
    catalog = Catalog.load(tmp_path)
    before = (folder / "model.toml").stat()

    write(tmp_path, name="Mine B")
    os.utime(folder / "model.toml", ns=(before.st_atime_ns, before.st_mtime_ns + 1))

    assert catalog.refresh()
    assert "Mine B" == names(catalog)["me/mine"]


def test_an_unchanged_model_is_not_built_again(tmp_path: Path) -> None:
    write(tmp_path)
    catalog = Catalog.load(tmp_path)
    before = catalog.get("me/mine")

    write(tmp_path, "me/other")

    assert catalog.refresh()
    assert before is catalog.get("me/mine")


def test_checks_are_made_when_due(tmp_path: Path) -> None:
    catalog = Catalog.load(tmp_path)
    assert not catalog.refresh_if_due(100.0)
    write(tmp_path)

    assert not catalog.refresh_if_due(100.9)
    assert 4 == len(catalog.entries())
    assert catalog.refresh_if_due(101.0)
    assert 5 == len(catalog.entries())


def test_without_a_folder_nothing_is_ever_due() -> None:
    catalog = Catalog.load()

    assert not catalog.refresh_if_due(0.0)
    assert not catalog.refresh()


def test_a_missing_folder_is_named_until_it_is_there(tmp_path: Path) -> None:
    root = tmp_path / "models"
    catalog = Catalog.load(root)

    assert 4 == len(catalog.entries())
    assert [str(root)] == [error.file for error in catalog.broken]
    assert "create it" in catalog.broken[0].problem
    assert not catalog.refresh()

    root.mkdir()
    assert catalog.refresh()
    assert () == catalog.broken


# -- broken ones --------------------------------------------------------------------------------------------
def test_a_broken_model_takes_no_other_down(tmp_path: Path) -> None:
    write(tmp_path, "me/good")
    folder = write(tmp_path, "me/bad", 'name = "Bad"\noutput = "movie"\n')
    catalog = Catalog.load(tmp_path)

    assert "me/good" in names(catalog)
    assert "me/bad" not in names(catalog)
    assert [(str(folder / "model.toml"), "output")] == [(e.file, e.key) for e in catalog.broken]


def test_a_model_that_breaks_stays_as_it_was_and_is_named(tmp_path: Path) -> None:
    write(tmp_path, name="Good")
    catalog = Catalog.load(tmp_path)

    for text in ("name = ", "name = 5"):
        folder = write(tmp_path, text=text)
        assert catalog.refresh()
        assert "Good" == names(catalog)["me/mine"]
        assert [str(folder / "model.toml")] == [error.file for error in catalog.broken]
        assert "last good version stays in use" in catalog.broken[0].message

    write(tmp_path, name="Better")
    assert catalog.refresh()
    assert "Better" == names(catalog)["me/mine"]
    assert () == catalog.broken


def test_a_broken_override_leaves_the_built_in_model(tmp_path: Path) -> None:
    id_ = "wan-ai/wan-2-5/text-to-image"
    write(tmp_path, id_, "name = ")
    catalog = Catalog.load(tmp_path)

    assert "Wan 2.5: text to image" == names(catalog)[id_]
    assert 1 == len(catalog.broken)


def test_hidden_folders_are_no_models(tmp_path: Path) -> None:
    write(tmp_path, ".git/me")
    write(tmp_path, "me/.old")
    catalog = Catalog.load(tmp_path)

    assert 4 == len(catalog.entries())
    assert () == catalog.broken


def test_links_are_followed_and_circles_end(tmp_path: Path) -> None:
    elsewhere = write(tmp_path / "elsewhere", "x")
    root = tmp_path / "models"
    (root / "me").mkdir(parents=True)
    (root / "me/linked").symlink_to(elsewhere)
    (root / "me/circle").symlink_to(root)
    (root / "me/dangling").symlink_to(root / "nowhere")
    catalog = Catalog.load(root)

    assert 5 == len(catalog.entries())
    assert catalog.get("me/linked") is not None
    assert () == catalog.broken


def test_a_sample_that_does_not_fit_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path)
    (folder / "sample.json").write_bytes(orjson.dumps({"prompt": 5}))

    with pytest.raises(ManifestError) as caught:
        load_model(folder, tmp_path)

    assert (str(folder / "sample.json"), "prompt") == (caught.value.file, caught.value.key)
    assert "prompt must be a string; got 5" == caught.value.problem


def nested_toml(file: Path) -> None:
    file.write_bytes(b"a = " + b"[" * 5000)


def nested_tables(file: Path) -> None:
    file.write_bytes(b"a = " + b"{b=" * 5000)


def binary(file: Path) -> None:
    file.write_bytes(bytes(range(256)) * 100)


def a_folder(file: Path) -> None:
    (file / "deeper").mkdir(parents=True)


def circle(file: Path) -> None:
    file.symlink_to(file)


def nothing(file: Path) -> None:
    file.symlink_to(file.parent / "nowhere")


def unreadable(file: Path) -> None:
    """A regular file that cannot be read by anybody, not even by root."""
    file.symlink_to("/proc/self/mem")


def forbidden(file: Path) -> None:
    file.write_bytes(b"name = ")
    file.chmod(0)


@pytest.mark.parametrize(
    "make",
    [nested_toml, nested_tables, binary, a_folder, circle, nothing, unreadable, forbidden],
)
def test_whatever_a_manifest_is_the_others_work_and_it_is_named(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    write(tmp_path, "me/good")
    file = tmp_path / "me/bad/model.toml"
    file.parent.mkdir()
    catalog = Catalog.load(tmp_path)
    version = catalog.version

    make(file)

    assert catalog.refresh()
    assert "me/good" in names(catalog)
    assert [str(file)] == [error.file for error in catalog.broken]
    assert version < catalog.version
    assert not catalog.refresh()
    assert [str(file)] == [error.file for error in Catalog.load(tmp_path).broken]


@pytest.mark.parametrize("name", ["sample.json", "graph.json"])
def test_whatever_a_file_beside_the_manifest_is_the_others_work_and_it_is_named(
    tmp_path: Path, name: str
) -> None:
    write(tmp_path, "me/good")
    folder = write(tmp_path, "me/bad", 'graph = "graph.json"\n' + MANIFEST.format(name="Bad"))
    (folder / "graph.json").write_text("{}")
    (folder / name).write_bytes(b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b"}")
    if name == "graph.json":
        (folder / name).write_bytes(b"[" * 5000)
    catalog = Catalog.load(tmp_path)

    assert "me/good" in names(catalog)
    assert [str(folder / name)] == [error.file for error in catalog.broken]


def test_a_name_that_is_no_text_is_named_in_words_that_can_be_logged(tmp_path: Path) -> None:
    folder = write(tmp_path, os.fsdecode(b"me/b\xffd"))
    catalog = Catalog.load(tmp_path)

    (error,) = catalog.broken
    assert error.message.encode()
    assert "b\\xffd" in error.file
    assert 4 == len(catalog.entries())
    assert folder.exists()
