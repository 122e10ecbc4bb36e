"""What the documentation shows runs: every notebook, and the Python blocks of the page on data.

A notebook that runs to its end has passed its own last cells, which assert what it says.
"""

import asyncio
import importlib.util
import os
import pathlib
import re
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
SECONDS = 120

MISSING = [name for name in ("ipykernel", "nbclient", "nbformat") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (make dev installs them)")


def this_python():
    """A kernel manager that starts this very interpreter, whatever kernels are installed."""
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec

    class ThisPython(AsyncKernelManager):
        kernel_spec = KernelSpec(
            argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
            display_name="this Python",
            language="python",
        )

    return ThisPython


def execute(notebook, folder):
    """Runs all cells in `folder`; a cell that fails, or too long a run, raises."""
    from nbclient import NotebookClient

    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "JKD_DATA_DIR": os.environ.get("JKD_DATA_DIR", str(ROOT / ".cache" / "data")),
        "IPYTHONDIR": str(folder / "ipython"),
    }
    client = NotebookClient(notebook, kernel_manager_class=this_python(), timeout=None)
    asyncio.run(asyncio.wait_for(client.async_execute(env=env, cwd=str(folder)), SECONDS))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_its_assertions_hold(path, tmp_path):
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert any(re.search(r"^assert ", cell.source, re.M) for cell in cells[-2:])
    execute(notebook, tmp_path)
    assert all(cell.execution_count for cell in cells)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_stored_for_small_diffs(path):
    import nbformat

    text = path.read_text(encoding="utf-8")
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    assert nbformat.writes(notebook) == text.removesuffix("\n")
    for cell in notebook.cells:
        # Names, not the random ids of a new cell: they say where a diff is.
        assert re.fullmatch(r"[a-z]+(-[a-z]+)*", cell.id)
        if cell.cell_type == "code":
            assert not cell.outputs
            assert cell.execution_count is None


def test_a_false_assertion_fails(tmp_path):
    import nbformat
    from nbclient.exceptions import CellExecutionError

    true = f"import os, sys\nassert (sys.executable, os.getcwd()) == {(sys.executable, str(tmp_path))}"
    cells = [nbformat.v4.new_code_cell(source) for source in (true, "assert 1 + 1 == 3, 'sum'")]
    with pytest.raises(CellExecutionError) as failure:
        execute(nbformat.v4.new_notebook(cells=cells), tmp_path)
    assert (failure.value.ename, failure.value.evalue) == ("AssertionError", "sum")


def test_code_on_the_data_page_runs():
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    assert blocks
    names = {}
    for block in blocks:
        exec(compile(block, "docs/data.md", "exec"), names)
