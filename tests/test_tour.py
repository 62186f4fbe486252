"""docs/tour.ipynb runs from top to bottom, and its model has learned what it is asked."""

import json
import subprocess
import sys

from runs import ROOT, with_devices

TOUR = json.loads((ROOT / "docs/tour.ipynb").read_text())


def test_it_is_a_notebook_without_outputs():
    assert (TOUR["nbformat"], set(TOUR)) == (4, {"cells", "metadata", "nbformat", "nbformat_minor"})
    assert len({cell["id"] for cell in TOUR["cells"]}) == len(TOUR["cells"])
    for cell in TOUR["cells"]:
        extra = {"outputs": [], "execution_count": None} if cell["cell_type"] == "code" else {}
        given = {key: cell[key] for key in cell.keys() - {"id", "source", "cell_type"}}
        assert given == {"metadata": {}} | extra
        assert cell["cell_type"] in ("code", "markdown")


def test_it_runs_from_top_to_bottom(tmp_path):
    """As a program: pictures that a notebook shows are opened and not shown."""
    code = "\n".join("".join(cell["source"]) for cell in TOUR["cells"] if cell["cell_type"] == "code")
    (tmp_path / "tour.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "tour.py"],
        cwd=tmp_path, env={**with_devices(1), "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    asked = [line for line in done.stdout.splitlines() if " - answered: " in line]
    assert len(asked) == 4
    for line in asked:
        expected, answered = line.partition(" expected: ")[2].split(" - answered: ")
        assert answered == expected, done.stdout
    assert "shortcuts.density" in done.stdout
