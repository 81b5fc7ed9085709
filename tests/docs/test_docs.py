"""What the documents promise is there: every setting documented, every named command and file existing."""

import re
from pathlib import Path

import pytest

from rushes.cli.main import COMMANDS
from rushes.settings import Settings, setting_help, setting_names

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path for folder in (".", "docs", "architecture", "bench") for path in (ROOT / folder).glob("*.md")
)


def test_every_setting_is_documented_with_its_default() -> None:
    text = (ROOT / "docs" / "settings.md").read_text()
    rows = dict(re.findall(r"^\| `RUSHES_(\w+)` \| (.*?) \|", text, re.MULTILINE))
    assert [name.upper() for name in setting_names()] == list(rows)
    for name in setting_names():
        default = getattr(Settings(), name)
        assert rows[name.upper()] == shown(default), name
        assert setting_help(name) in text, name
        assert setting_help(name).endswith((".", "`")), name


def shown(default: object) -> str:
    if default in ("", (), None):
        return "none"
    if isinstance(default, bool):
        return "`on`" if default else "`off`"
    return f"`{default}`"


def test_every_command_is_documented() -> None:
    text = (ROOT / "docs" / "cli.md").read_text()
    for name in COMMANDS:
        assert f"## rushes {name}" in text, name


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_named_source_files_exist(page: Path) -> None:
    for target in re.findall(
        r"`((?:src|tests|bench|docs|scripts|architecture)/[\w./-]+\.\w+)`", page.read_text()
    ):
        assert (ROOT / target).exists(), f"{page.name}: {target}"


def test_no_source_file_is_longer_than_500_lines() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for path in (ROOT / "src").rglob("*.py")
        if (lines := len(path.read_text().splitlines())) > 500
    }
    assert {} == long


def test_package_modules_are_empty() -> None:
    full = [path for path in (ROOT / "src").rglob("__init__.py") if path.read_text().strip()]
    assert [] == full


def test_folders_are_those_of_the_overview() -> None:
    """A stray utils.py must not appear unnoticed: every module stands in the overview."""
    overview = (ROOT / "architecture" / "00-overview.md").read_text()
    package = ROOT / "src" / "rushes"
    names = {
        path.name + "/" if path.is_dir() else path.name
        for path in package.iterdir()
        if path.suffix == ".py" or (path.is_dir() and path.name != "__pycache__")
    }
    for name in names - {"__init__.py"}:
        assert re.search(rf"^\s*{re.escape(name)}\s", overview, re.MULTILINE), name
