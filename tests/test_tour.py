"""docs/tour.ipynb runs as it stands there, and keeps its pictures."""

from __future__ import annotations

import nbformat
import pytest
from conftest import PROCESS, ROOT
from nbclient import NotebookClient

TOUR = ROOT / "docs" / "tour.ipynb"
LARGEST = 1_000_000  # bytes
# as shipped, and for the test
SETTINGS = {
    "count, ages = 4, [45, 55, 65, 75, 85]": "count, ages = 2, [65, 85]",
    "workers=1)": "workers=1, spacing=4.0)",
}
# what must be true at its end
CHECKS = """
assert between[0].shape == changed[0].shape == (1, 32, 32, 32) and len(samples) == 5
assert torch.corrcoef(torch.stack([reconstruction.flatten(), scans.flatten()]))[0, 1] > 0.95
assert (table["psnr"] > 30).all()
errors = distance(scan), distance(changed)
assert errors[1][ages.index(65)] < 1e-3 and errors[1][-1] < 0.8 * errors[0][-1]
"""


def pictures(notebook: nbformat.NotebookNode) -> int:
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", []))
    return sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.fixture
def tour():
    return nbformat.read(TOUR, as_version=4)


def test_the_tour_is_shipped_as_it_ran(tour):
    nbformat.validate(tour)
    assert TOUR.stat().st_size < LARGEST and pictures(tour) == 8
    cells = [cell for cell in tour.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))  # once, from top to bottom
    assert not any(
        output.output_type in ("error", "stream") and output.get("name") != "stdout"
        for cell in cells
        for output in cell.outputs
    )


def test_the_tour_runs(tour, tmp_path, monkeypatch):
    for name, value in (PROCESS | {"TMPDIR": str(tmp_path)}).items():
        monkeypatch.setenv(name, value)
    for shipped, tested in SETTINGS.items():
        assert any(shipped in cell.source for cell in tour.cells)
        for cell in tour.cells:
            cell.source = cell.source.replace(shipped, tested)
    tour.cells.append(nbformat.v4.new_code_cell(CHECKS))
    # Jupyter starts a notebook in its own folder
    NotebookClient(tour, timeout=300, resources={"metadata": {"path": str(TOUR.parent)}}).execute()
    assert pictures(tour) == 8
