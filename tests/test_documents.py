"""The README and the site: what they show runs, and what they link to exists."""

import random
import re
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import greedyprune

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("one_thread")
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINKING = [*DOCUMENTS, ROOT / "CONTRIBUTING.md"]
OPTIONAL = {"lightning", "matplotlib", "sklearn", "torch_pruning", "transformers"}
BLOCK = re.compile(r"^( *)```python\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
IMPORT = re.compile(r"^ *(?:from|import) (?:greedyprune\.integrations\.)?(\w+)", re.MULTILINE)
FENCED = re.compile(r"^( *)```.*?^\1```$", re.DOTALL | re.MULTILINE)
ABOUT = re.compile(r"^ *print\(.*# about ([^a-z]+)")
NUMBER = re.compile(r"\d+(?:\.\d+)?")
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")


def blocks(document: Path) -> list[str]:
    """The python blocks, each after as many empty lines as there are before it in the document."""
    text = document.read_text()
    return [
        "\n" * text.count("\n", 0, block.start(2)) + textwrap.dedent(block[2])
        for block in BLOCK.finditer(text)
    ]


class Printing:
    """`print` for a document: its numbers have to be near those of the comment, "# about 0.9"."""

    def __init__(self, document: Path) -> None:
        self.lines = document.read_text().split("\n")

    def __call__(self, *values: object) -> None:
        line = self.lines[sys._getframe(1).f_lineno - 1]
        if about := ABOUT.match(line):
            written = [float(number) for number in NUMBER.findall(about[1])]
            printed = [float(value) for value in values]  # type: ignore[arg-type]
            assert printed == pytest.approx(written, rel=0.1, abs=0.03), line


def name(document: Path) -> str:
    return document.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if blocks(d)], ids=name)
def test_blocks_run(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, in one namespace, in an empty folder."""
    code = blocks(document)
    for package in OPTIONAL & set(IMPORT.findall("\n".join(code))):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    names: dict[str, object] = {"__name__": "__main__", "print": Printing(document)}
    for block in code:
        exec(compile(block, name(document), "exec"), names)


def test_there_are_blocks() -> None:
    assert sum(len(blocks(document)) for document in DOCUMENTS) > 40
    assert blocks(ROOT / "README.md")


@pytest.mark.parametrize("document", LINKING, ids=name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in LINK.findall(FENCED.sub("", document.read_text())):
        assert (document.parent / target).exists(), target


def test_the_reference_has_every_public_name() -> None:
    pages = "\n".join(page.read_text() for page in (ROOT / "docs" / "reference").glob("*.md"))
    described = re.findall(r"^::: greedyprune\.([\w.]+)", pages, re.MULTILINE)
    assert sorted(set(greedyprune.__all__) - set(described)) == []


def docstrings_shown() -> dict[str, str]:
    """The docstrings of everything that a page of the reference shows, by name."""
    pages = "\n".join(page.read_text() for page in (ROOT / "docs" / "reference").glob("*.md"))
    shown = {}
    for path in re.findall(r"^::: greedyprune\.([\w.]+)", pages, re.MULTILINE):
        if path.startswith("integrations."):  # each needs an extra
            continue
        thing: object = greedyprune
        for part in path.split("."):
            thing = getattr(thing, part)
        shown[path] = str(thing.__doc__)
        for name, member in getattr(thing, "__dict__", {}).items():
            home = getattr(member, "__module__", None)
            imported = isinstance(thing, ModuleType) and home != thing.__name__
            if member.__doc__ and not imported and not name.startswith("_"):
                shown[f"{path}.{name}"] = member.__doc__
    return shown


def test_docstrings_are_no_html() -> None:
    """A page shows <a> as an element of HTML, unless it is code."""
    shown = docstrings_shown()
    assert len(shown) > 60
    for name, text in shown.items():
        prose = re.sub(
            r"`[^`]*`", "", "\n".join(re.sub(r"^ *>>>.*", "", x) for x in text.split("\n"))
        )
        assert not re.search(r"<[a-z/]", prose), name


def test_no_two_fields_share_a_description() -> None:
    """`a, b: the parameters` becomes two entries that say the same."""
    for name, text in docstrings_shown().items():
        assert not re.search(r"^ *[a-z]\w*(, [a-z]\w*)+: ", text, re.MULTILINE), name


def test_the_house_names_every_room() -> None:
    page = (ROOT / "docs" / "house.md").read_text()
    folders = [path.parent for path in (ROOT / "greedyprune").glob("*/__init__.py")]
    assert folders
    for folder in folders:
        assert f"`{folder.name}/`" in page, folder.name


def test_the_house_names_files_that_exist() -> None:
    page = (ROOT / "docs" / "house.md").read_text()
    names = set(re.findall(r"`([a-z_/]+\.(?:py|h|cpp|toml|md))`", page))
    assert len(names) > 20
    folders = ("greedyprune", "csrc", "tests", "docs")
    files = [f"/{file.name}" for file in ROOT.iterdir()]
    for folder in folders:
        files += [f"/{name(file)}" for file in (ROOT / folder).rglob("*.*")]
    for path in sorted(names):
        assert any(file.endswith(f"/{path}") for file in files), path


def test_the_readme_is_short_and_names_the_first_commands() -> None:
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 130
    assert "make test" in text
    assert "make demo" in text
