"""The notebooks run from top to bottom, and what is kept of them is what a reader needs."""

import re
from pathlib import Path

import pytest

pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
from nbclient import NotebookClient  # noqa: E402
from nbformat import NotebookNode  # noqa: E402

FOLDER = Path(__file__).parents[2] / "examples" / "notebooks"
NOTEBOOKS = sorted(path.name for path in FOLDER.glob("*.ipynb"))


def read(name: str) -> NotebookNode:
    return nbformat.read(FOLDER / name, as_version=4)


def code_of(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts_of(cell: NotebookNode) -> str:
    """All that a cell shows, but for its pictures."""
    shown = (output.get("data") or {"text/plain": output.get("text")} for output in cell.outputs)
    return "\n".join(
        str(text) for texts in shown for kind, text in texts.items() if kind.startswith("text/")
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_runs(name: str, tmp_path: Path) -> None:
    notebook = read(name)
    assert any('DATA = "digits"' in cell.source for cell in code_of(notebook))  # the small one
    client = NotebookClient(notebook, timeout=280, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()  # raises what a cell raises
    said = "\n".join(map(texts_of, code_of(notebook)))
    assert re.findall(r"^(?:same|the same) .*: (\w+)$", said, re.MULTILINE) == ["True"]
    assert not list(tmp_path.iterdir())  # what it wrote is gone


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_what_is_kept(name: str) -> None:
    """Run once, in order, with pictures; no errors, warnings, or paths of a machine; small."""
    notebook = read(name)
    assert (FOLDER / name).stat().st_size < 500_000
    cells = code_of(notebook)
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    said = "\n".join(map(texts_of, cells))
    assert not re.search(r"[Ww]arning|(?<![\w.<])/(?:home|root|tmp|work|usr|Users)/", said)


def test_there_are_two() -> None:
    assert NOTEBOOKS == ["how_much_pretraining.ipynb", "prune_a_cnn.ipynb"]
    for name in NOTEBOOKS:  # links between them, and to the README
        text = "\n".join(cell.source for cell in read(name).cells if cell.cell_type == "markdown")
        targets = re.findall(r"\]\((?!http)([^)#]+)\)", text)
        assert len(targets) >= 2
        for target in targets:
            assert (FOLDER / target).exists(), f"{name}: {target}"
