"""The main job: run the studies' notebooks headless, gather their findings on one board, write the report."""

import sys
import time
from pathlib import Path

from etastar.notebook import repository_root, run_notebook
from etastar.report import write_report
from etastar.studies import STUDIES, find_study, resolve_preset

FINDINGS = "00_findings"


def reproduce(preset: str, study: str, minutes: float | None, store: Path, results: Path) -> int:
    """Execute the notebooks of a preset and write results/PRESET/report.html; returns the exit status.

    Notebooks are executed in copies below results/PRESET/notebooks; what was trained before is not trained again.
    Raises ValueError for an unknown study or preset before anything runs.
    """
    preset = resolve_preset(preset)
    stems = list(STUDIES) if study == "all" else [_stem(study)]
    folder = results.resolve() / preset
    (folder / "notebooks").mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    for stem in stems:
        print(f"── {stem} ({preset} preset)", file=sys.stderr, flush=True)
        parameters = {"preset": preset, "minutes": minutes, "store": str(store.resolve()), "results": str(results.resolve())}
        _execute(stem, parameters, folder, expected=[folder / stem / "findings.json", *find_study(stem).promised(folder / stem)])
    _execute(FINDINGS, {"preset": preset, "results": str(results.resolve())}, folder, expected=[folder / "claims.json"])
    report = write_report(folder)
    print(f"done in {(time.monotonic() - began) / 60:.1f} min; the report is {report}")
    return 0


def _stem(study: str) -> str:
    module = find_study(study)
    return next(stem for stem, name in STUDIES.items() if module.__name__.endswith(f".{name}"))


def _execute(stem: str, parameters: dict, folder: Path, expected: list[Path]) -> None:
    run_notebook(repository_root() / "notebooks" / f"{stem}.ipynb", parameters, folder / "notebooks" / f"{stem}.ipynb", expected)
