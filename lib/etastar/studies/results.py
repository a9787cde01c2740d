"""What a study leaves behind under results/PRESET, and how the findings of all studies come together on one board."""

from pathlib import Path

import pandas as pd

from etastar import plots
from etastar.analysis.board import Board, plain, read_findings, verdicts, write_findings
from etastar.analysis.claims import Finding, load_claims
from etastar.analysis.controls import Control, not_run
from etastar.engine.provenance import machine


def table(frame: pd.DataFrame):
    """A frame for a notebook's reader: text whole and to the left, four digits, – for what is not there."""
    texts = [c for c in frame if frame[c].map(lambda v: isinstance(v, str)).any()]
    return (frame.style.hide(axis="index").format(precision=4, na_rep="–", thousands=",")
            .set_properties(**{"vertical-align": "top"}).set_properties(subset=texts, **{"text-align": "left"}))


def claims_table(study: str) -> pd.DataFrame:
    """What a study's claims say and by what they are judged."""
    return pd.DataFrame([{
        "claim": c.id, "primary": c.primary, "paper": f"{c.paper}, {c.place}", "statement": c.statement, "kind": c.kind,
        "published": c.published, "unit": c.unit, "margin or smallest effect": c.smallest_effect if c.kind == "direction" else c.margin,
        "rival": f"{c.rival:g}: {c.rival_name}" if c.rival_name else "",
    } for c in load_claims(study).values()])


def design_table(recipes, arm_of) -> pd.DataFrame:
    """One row an arm (as `arm_of` names a recipe's) and horizon: how many runs, rates and seeds."""
    rows = pd.DataFrame([{"arm": arm_of(r), "horizon_tokens": r.horizon_tokens, "steps": r.total_steps, "peak_lr": r.peak_lr,
                          "seed": r.seed} for r in recipes])
    return rows.groupby(["arm", "horizon_tokens", "steps"], sort=False).agg(
        runs=("seed", "size"), rates=("peak_lr", "nunique"), seeds=("seed", "nunique")).reset_index()


def write_study(folder: Path, findings: list[Finding], controls: list[Control], figures: dict, tables: dict, about: dict) -> list[Path]:
    """findings.json, every figure as PNG and SVG, every table as CSV; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [write_findings(folder / "findings.json", findings, controls, plain(about | {"machine": machine()}))]
    for name, figure in figures.items():
        written += plots.save(figure, folder, name)
    for name, table in tables.items():
        table.to_csv(folder / f"{name}.csv", index=False)
        written.append(folder / f"{name}.csv")
    return written


def gather(folder: Path) -> Board:
    """The board of all studies that left findings in results/PRESET; ValueError where none did."""
    paths = sorted(Path(folder).glob("*/findings.json"))
    if not paths:
        raise ValueError(f"no study has left findings in {folder}; run a study's notebook or `make reproduce` first")
    findings, controls = [], []
    for path in paths:
        more, checks, _ = read_findings(path)
        findings += more
        checks = checks or [not_run("controls", "no run of this preset is large enough to count")]
        controls += [Control(f"{path.parent.name}: {c.name}", c.passed, c.detail) for c in checks]
    return Board(verdicts(findings), tuple(controls))
