"""docs/tour.ipynb runs from beginning to end, in a copy of the repository's files."""

import pytest
from conftest import ROOT


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat", reason="nbclient is not installed")
    client = pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    for item in ROOT.iterdir():
        if item.name not in {"output", "data", ".git"}:
            (tmp_path / item.name).symlink_to(item)
    monkeypatch.setenv("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # other tests run beside it
    notebook = nbformat.read(ROOT / "docs" / "tour.ipynb", as_version=4)
    client.NotebookClient(
        notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    printed = "".join(output.get("text", "") for output in outputs)
    assert "Acc@1" in printed and "error:" not in printed
    assert float(printed.rsplit(":", 1)[1]) < 1e-4  # of the exported program
    pictures = [output for output in outputs if "image/png" in output.get("data", ())]
    assert len(pictures) == 2
