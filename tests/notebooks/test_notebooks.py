"""Every notebook runs from its first cell to its last, as it is shipped: without outputs."""

import sys
import textwrap
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

from cloister.audit.canary import Canary, Stage, search
from cloister.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
PLOTS = {"01-distil-and-export": 2, "02-compare-tiers": 1}  # that there are at least


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # its kernel is reached through a socket of this machine
    notebook = nbformat.read(path, as_version=4)
    assert not [cell for cell in notebook.cells if cell.get("outputs")]
    NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    shown = [
        output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in shown if output.output_type == "error"]
    plots = sum("image/png" in output.get("data", {}) for output in shown)
    assert plots >= PLOTS.get(path.stem, 0)


CELLS = (
    """
    from pathlib import Path
    from cloister import Engine, Session, reference
    session = Session(Engine(reference.bundle_path("nano-1")))
    session
    """,
    """
    answer = list(session.stream(Path("prompt.txt").read_text(), max_tokens=2))
    session
    """,
    """
    list(session.stream(Path("prompt.txt").read_text() * 400))
    """,
)


def test_history_and_tracebacks_of_a_notebook_hold_nothing_of_what_a_session_was_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer_dir: Path
) -> None:
    monkeypatch.undo()
    stage, canary = Stage(tmp_path / "stage"), Canary.new("notebook")
    stage.root.mkdir()
    history = stage.root / "history.sqlite"
    (tmp_path / "prompt.txt").write_text(canary.text, "utf-8")
    notebook = new_notebook(cells=[new_code_cell(textwrap.dedent(cell)) for cell in CELLS])
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", allow_errors=True,
        resources={"metadata": {"path": str(tmp_path)}}, ipython_hist_file=str(history),
    ).execute(env={**stage.environment(), "PYTHONPATH": ":".join(sys.path)})
    (error,) = [
        output for cell in notebook.cells for output in cell.outputs
        if output.output_type == "error"]
    assert error.ename == "ContextExceeded"
    assert b"session.stream" in history.read_bytes()
    nbformat.write(notebook, stage.root / "saved.ipynb")
    tokenizer = Tokenizer.from_files(
        tokenizer_dir / "tokenizer.json", tokenizer_dir / "chat_template.jinja")
    assert search(stage.root, [canary], tokenizer) == []
