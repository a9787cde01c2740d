"""The committed notebooks keep to the skeleton, and each study has one."""

from pathlib import Path

import pytest

from etastar.notebook import repository_root, skeleton_problems
from etastar.studies import STUDIES

NOTEBOOKS = sorted((repository_root() / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_skeleton(path):
    assert skeleton_problems(path) == []


def test_every_study_has_its_notebook_and_stands_in_the_index():
    stems = {path.stem for path in NOTEBOOKS}
    index = Path(repository_root() / "notebooks/00_findings.ipynb").read_text()
    assert set(STUDIES) | {"00_findings"} == stems and all(f"{stem}.ipynb" in index for stem in STUDIES)
