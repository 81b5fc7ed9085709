"""`rushes models import`: a workflow of ComfyUI becomes a model folder."""

import os
import re
import shlex
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import click
import orjson

from rushes.catalog.importing.propose import CannotImport, Proposal, propose
from rushes.catalog.importing.write import files_of
from rushes.catalog.load import BUILTIN, load_entry
from rushes.catalog.manifest import FEWEST_SEGMENTS, MOST_SEGMENTS, model_id
from rushes.catalog.model import FILE_ROLES, Model
from rushes.catalog.paths import MANIFEST, shown
from rushes.cli.checking import address
from rushes.cli.importing_convert import convert
from rushes.cli.importing_files import read_source
from rushes.cli.options import config_option, load
from rushes.cli.show import clean, table
from rushes.errors import ManifestError
from rushes.settings import Settings

DEFAULT_FOLDER: Final = Path("models")
_SHORT: Final = 48
"""Characters of a value in the table."""
_WORDS: Final = 40
"""Characters of a prompt in the command to paste."""


@click.command(name="import")
@click.argument("workflow", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--id", "id_", metavar="OWNER/NAME", help="The model's id (default: local/ and the file's name).")
@click.option(
    "--comfyui",
    "url",
    metavar="URL",
    callback=address,
    help="A running ComfyUI (default: the first that is set up).",
)
@click.option(
    "--object-info",
    type=click.Path(dir_okay=False, path_type=Path),
    help="What a ComfyUI answers at /object_info, saved to a file: instead of a server.",
)
@click.option("--expose", multiple=True, metavar="NODE.INPUT", help="One more input; may be repeated.")
@click.option("--name", help="The model's name for people (default: made of the file's name).")
@click.option(
    "--into",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for models (default: RUSHES_MODELS_DIR, else ./models).",
)
@click.option("--force", is_flag=True, help="Write over a model that is there.")
@config_option
def import_(
    workflow: Path,
    *,
    id_: str | None,
    url: str | None,
    object_info: Path | None,
    expose: tuple[str, ...],
    name: str | None,
    into: Path | None,
    force: bool,
    config: Path | None,
) -> None:
    """Make a model of a ComfyUI workflow.

    WORKFLOW is what ComfyUI saves: JSON in either of its formats, or a PNG, WebP, MP4 or WebM with the workflow
    inside. The inputs that people change are proposed; the folder that is written is yours to edit.
    """
    settings = load(config)
    root = into or settings.models_dir or DEFAULT_FOLDER
    id_ = id_ or f"local/{_slug(workflow.stem)}"
    folder = _checked_folder(root, id_, force=force)
    known, where = _object_info(settings, url, object_info)
    proposal = _proposal(workflow, known, expose)
    if where:
        proposal.notes.insert(0, f"types, bounds and choices are those of {where}")
    if (BUILTIN.joinpath(*id_.split("/")) / MANIFEST).exists():
        proposal.notes.append(f"{id_} comes with Rushes, too: where this folder is read, yours takes its place")
    files = files_of(proposal, id_=id_, name=name or _title(workflow.stem), source=workflow.name)
    model = _write(root, folder, id_, files)
    _report(settings, root, model, proposal)


# -- reading --------------------------------------------------------------------------------------------------
def _object_info(settings: Settings, url: str | None, file: Path | None) -> tuple[dict[str, Any] | None, str]:
    """What is known of the nodes, and whose word it is; nothing where nobody can be asked."""
    if url and file:
        raise click.UsageError("give --comfyui or --object-info, not both")
    if file:
        return _read_object_info(file), shown(file)
    url = url or next(iter(settings.comfyui_urls), None)
    if url is None:
        return None, ""
    from rushes.engines.comfyui.catalogue import without_password
    from rushes.wiring import comfyui_object_info

    return comfyui_object_info(url), without_password(url)


def _read_object_info(file: Path) -> dict[str, Any]:
    try:
        value = orjson.loads(file.read_bytes())
    except OSError as error:
        raise ManifestError(shown(file), "", f"cannot be read: {error.strerror}") from None
    except orjson.JSONDecodeError as error:
        raise ManifestError(shown(file), "", f"this is not JSON: {error}") from None
    if not isinstance(value, dict) or not any(
        isinstance(node, dict) and "input" in node for node in value.values()
    ):
        raise ManifestError(shown(file), "", "is not what a ComfyUI answers at /object_info")
    return value


def _proposal(workflow: Path, known: Mapping[str, Any] | None, expose: tuple[str, ...]) -> Proposal:
    file = shown(workflow)
    source = read_source(workflow)
    graph = source.graph
    remarks: list[str] = []
    if graph is None:
        if known is None:
            raise ManifestError(
                file,
                "",
                "this is a workflow as ComfyUI's pages save it, and only a ComfyUI can tell what is in it: give "
                "--comfyui URL or --object-info FILE, or export it with Export (API)",
            )
        assert source.pages is not None
        graph, remarks = convert(file, source.pages, known)
    try:
        proposal = propose(graph, known, workflow=source.pages, expose=expose)
    except CannotImport as error:
        raise ManifestError(file, "", str(error)) from None
    proposal.notes += [f"converter: {remark}" for remark in remarks]
    return proposal


# -- writing --------------------------------------------------------------------------------------------------
def _slug(stem: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", stem.lower()).strip("-")[:100].strip("-") or "workflow"


def _title(stem: str) -> str:
    words = " ".join(re.split(r"[\s_-]+", stem)).strip()
    return words[:1].upper() + words[1:] or "Workflow"


def _checked_folder(root: Path, id_: str, *, force: bool) -> Path:
    """Where the model goes. Refuses ids that are none, and folders that hold something already."""
    folder = root.joinpath(*id_.split("/"))
    try:
        whole = "/".join(folder.relative_to(root).parts) == id_ and model_id(folder, root) == id_
    except (ManifestError, ValueError):  # ValueError: an absolute one leads out of the root
        whole = False
    if not whole:
        parts = [_slug(part) for part in id_.split("/") if re.search("[a-zA-Z0-9]", part)]
        likely = "/".join(["local", *(parts or ["name"])][-FEWEST_SEGMENTS:])
        raise click.UsageError(
            f"--id {id_!r}: an id is OWNER/NAME, up to {MOST_SEGMENTS} parts of lower-case letters and digits with "
            f"single dots, dashes or underscores between them, such as {likely}"
        )
    if folder.exists() and not force and (not folder.is_dir() or any(folder.iterdir())):
        raise click.UsageError(
            f"{shown(folder)} is there already: give --force to write over it, or another --id"
        )
    return folder


def _write(root: Path, folder: Path, id_: str, files: Mapping[str, str]) -> Model:
    """Write the folder, checked before it is there: a server that looks meanwhile sees all of it or nothing new."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".rushes-import-", dir=root) as scratch:
            draft = Path(scratch).joinpath(*id_.split("/"))
            draft.mkdir(parents=True)
            for name, text in files.items():
                (draft / name).write_text(text, "utf-8")
            load_entry(draft, Path(scratch))
            folder.mkdir(parents=True, exist_ok=True)
            for name in sorted(files, key=lambda one: one == MANIFEST):  # the manifest last
                os.replace(draft / name, folder / name)  # noqa: PTH105 - as everywhere for this
    except OSError as error:
        raise ManifestError(shown(folder), "", f"cannot be written: {error.strerror}") from None
    return load_entry(folder, root).model


# -- telling --------------------------------------------------------------------------------------------------
def _report(settings: Settings, root: Path, model: Model, proposal: Proposal) -> None:
    rows = []
    for field in proposal.fields:
        targets = ", ".join(f"{id_}.{name}" for id_, name in field.targets)
        default = "required" if field.required and field.default is None else _cut(field.default)
        rows.append(
            (field.name, field.title, "" if field.role == "other" else field.role, field.type, default, targets)
        )
    table(("input", "title", "role", "type", "default", "sets"), rows)
    if proposal.bindings:
        click.echo("\nalso set, by expressions:")
        for (id_, name), expression in proposal.bindings.items():
            click.echo(f"  {id_}.{name} = {expression}")
    guessed = [f"{field.name}: {field.remark}" for field in proposal.fields if field.remark]
    for title, lines in (("worth knowing:", proposal.notes), ("guessed, or special:", guessed)):
        if lines:
            click.echo(f"\n{title}")
            for line in lines:
                click.echo(f"  - {clean(line)}")
    click.echo(
        f"\n{model.id} is in {shown(model.folder)}; edit {MANIFEST}: titles, bounds, which inputs there are"
    )
    if proposal.loras:
        click.echo("LoRAs as an input: take the # from its last [[inputs]]")
    place = root.resolve()
    click.echo(
        f"a server shows it if it was started with RUSHES_MODELS_DIR={shlex.quote(str(place))}: within a second "
        "if it runs already; one that runs without has to be started again with it"
    )
    if settings.models_dir is None or place != settings.models_dir.resolve():
        click.echo(f"\nexport RUSHES_MODELS_DIR={shlex.quote(str(place))}")
    click.echo(f"\nrushes models check {model.id}")
    click.echo(_command(model))


def _command(model: Model) -> str:
    """A command that runs the model and can be pasted into a shell as it is."""
    parts = ["rushes", "run", model.id]
    texts = {one.name for one in model.inputs if one.type == "string" and one.enum is None}
    texts -= {one.name for one in model.inputs if one.role in FILE_ROLES}
    for name in model.required:
        value = str(model.sample[name])
        parts += ["-i", f"{name}={_first_words(value) if name in texts else value}"]
    return shlex.join(parts)


def _first_words(text: str) -> str:
    """A long text as far as a command needs it, on one line; ``-i`` reads it as it is."""
    words = " ".join(text.split())
    if len(words) > _WORDS:
        words = words[: _WORDS + 1].rpartition(" ")[0] or words[:_WORDS]
        words = words.rstrip(" .,;:-(")
    else:
        words = text
    return f"@{words}" if words.startswith("@") else words


def _cut(value: object) -> str:
    text = "" if value is None else clean(value)
    return text if len(text) <= _SHORT else text[: _SHORT - 1] + "…"
