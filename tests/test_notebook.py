import json
import sys
from pathlib import Path

import numpy as np
import pytest

from etastar import notebook
from etastar.notebook import (
    HEADINGS,
    NotebookFailed,
    check_parameters_cell,
    json_value,
    run_notebook,
    skeleton_problems,
)

COMMITTED = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def test_every_parameter_reaches_the_kernel_as_a_plain_value(make_notebook, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = tmp_path / "told.json"
    path = make_notebook(
        ("parameters", "out = ''\nsteps = 1\nrates = []\nlr = 0.1\nminutes = 3"),
        (
            "code",
            "import json, os, sys\nbody = dict(steps=steps, rates=rates, lr=lr, minutes=minutes, "
            "cwd=os.getcwd(), python=sys.executable)\nwith open(out, 'w') as f:\n    json.dump(body, f)",
        ),
    )
    given = {"out": told, "steps": np.int64(7), "rates": (np.float32(0.5), 2), "lr": np.float64(0.25), "minutes": None}
    copy = run_notebook(path, given, tmp_path / "done" / "copy.ipynb", [told])
    found = json.loads(told.read_text())
    assert found.pop("cwd") == str(notebook.repository_root())
    assert found.pop("python") == sys.executable
    assert found == {"steps": 7, "rates": [0.5, 2], "lr": 0.25, "minutes": None}
    assert copy.exists() and copy.with_suffix(".log").exists()


def test_a_users_own_python3_kernel_is_not_taken(make_notebook, tmp_path, monkeypatch):
    rogue = tmp_path / "jupyter" / "kernels" / "python3"
    rogue.mkdir(parents=True)
    (rogue / "kernel.json").write_text(
        json.dumps({"argv": ["/no/such/python", "{connection_file}"], "display_name": "x", "language": "python"})
    )
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    path = make_notebook(("parameters", "a = 1"), ("code", "assert a == 2"))
    assert run_notebook(path, {"a": 2}, tmp_path / "copy.ipynb").exists()


def test_unknown_parameters_are_refused_before_anything_runs(make_notebook, tmp_path):
    path = make_notebook(("parameters", "preset = 'smoke'\nminutes = None"), ("code", "raise SystemError"))
    with pytest.raises(ValueError, match="no parameter 'presett'; it takes: preset, minutes"):
        run_notebook(path, {"presett": "cpu"}, tmp_path / "copy.ipynb")
    with pytest.raises(ValueError, match="parameter 'preset' must be a number"):
        run_notebook(path, {"preset": object()}, tmp_path / "copy.ipynb")
    assert not (tmp_path / "copy.ipynb").exists()


def test_a_failing_cell_is_named_as_the_author_counts(make_notebook, tmp_path):
    path = make_notebook(
        ("markdown", "# T"), ("parameters", "a = 1"), ("code", "b = a"), ("code", "print('on the way')\n1 / b")
    )
    with pytest.raises(
        NotebookFailed, match=r"cell 4 \(In \[4\]\) failed: ZeroDivisionError: division by zero"
    ) as caught:
        run_notebook(path, {"a": 0}, tmp_path / "copy.ipynb")
    assert "1 / b" in str(caught.value) and "\x1b" not in str(caught.value)
    assert "on the way" in (tmp_path / "copy.log").read_text()


def test_a_run_that_writes_nothing_or_leaves_an_old_file_is_no_success(make_notebook, tmp_path):
    promised = tmp_path / "findings.json"
    path = make_notebook(("parameters", "a = 1"), ("code", "pass"))
    with pytest.raises(NotebookFailed, match="without writing .*findings.json"):
        run_notebook(path, {}, tmp_path / "copy.ipynb", [promised])
    promised.write_text("from last time")
    with pytest.raises(NotebookFailed, match="without writing .*findings.json"):
        run_notebook(path, {}, tmp_path / "copy.ipynb", [promised])


def test_a_dead_kernel_is_reported(make_notebook, tmp_path):
    path = make_notebook(("parameters", "a = 1"), ("code", "import os\nos._exit(1)"))
    with pytest.raises(NotebookFailed, match="the kernel stopped"):
        run_notebook(path, {}, tmp_path / "copy.ipynb")


@pytest.mark.parametrize(
    "source",
    ["a = 2 * 3", "import os", "a = (1, 2)", "a = b = 3", "a, b = 1, 2", "a += 1", "print(1)", "a = f'{1}'", "a = {1}"],
)
def test_a_parameters_cell_holds_literals_only(make_notebook, source):
    with pytest.raises(ValueError, match="parameters cell may hold only"):
        check_parameters_cell(make_notebook(("parameters", source)))


def test_the_parameters_cell_is_read_with_its_defaults(make_notebook):
    path = make_notebook(
        ("parameters", "preset = 'smoke'  # or cpu\nlr: float = -1e-3\nseeds = [1, 2]\nnothing = None")
    )
    assert check_parameters_cell(path) == {"preset": "smoke", "lr": -0.001, "seeds": [1, 2], "nothing": None}
    with pytest.raises(ValueError, match='one cell tagged "parameters"; it has 0'):
        check_parameters_cell(make_notebook(("code", "a = 1")))
    with pytest.raises(ValueError, match="it has 2"):
        check_parameters_cell(make_notebook(("parameters", "a = 1"), ("parameters", "b = 1")))


def test_values_become_json():
    assert json_value({"a": (np.arange(2), Path("x"))}, "p") == {"a": [[0, 1], "x"]}
    assert type(json_value(np.bool_(True), "p")) is bool
    with pytest.raises(ValueError, match="'p' must be"):
        json_value({1: 2}, "p")


def _skeleton(headings=HEADINGS):
    return [("markdown", "# Title"), *(("markdown", f"## {name}") for name in headings), ("parameters", "a = 1")]


def test_a_notebook_on_the_skeleton_has_no_problems(make_notebook):
    assert skeleton_problems(make_notebook(*_skeleton())) == []


def test_departures_from_the_skeleton_are_named(make_notebook):
    assert "second-level headings" in skeleton_problems(make_notebook(*_skeleton(HEADINGS[::-1])))[0]
    assert skeleton_problems(make_notebook(*_skeleton(), ("code", "x = 1\n" * 16))) == [
        "cell 12 has 16 lines; 15 are allowed"
    ]
    stream = {"output_type": "stream", "name": "stdout", "text": "1"}
    assert skeleton_problems(make_notebook(*_skeleton(), outputs=[stream])) == ["cell 11 was committed with its output"]
    assert 'tagged "parameters"' in skeleton_problems(make_notebook(*_skeleton()[:-1]))[0]
    assert "open with a title" in skeleton_problems(make_notebook(*_skeleton()[1:]))[0]


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_notebooks_follow_the_skeleton(path):
    assert skeleton_problems(path) == []
