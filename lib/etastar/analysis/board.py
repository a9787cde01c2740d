"""The verdict board: all findings of one kind of evidence corrected together, with its controls at the top."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
from statsmodels.stats.multitest import multipletests

from etastar.analysis.claims import LEVEL, Claim, Finding, interval_of, registry_hash
from etastar.analysis.controls import Control
from etastar.analysis.paired import Estimate

DECISIVE = ("reproduced", "contradicted", "differs at this scale")
COLUMNS = ["claim", "paper", "evidence", "published", "estimate", "low", "high", "n", "verdict", "reason", "unit", "primary", "p_raw",
           "p_adjusted", "detectable", "exploratory", "study", "statement"]


def verdicts(findings: list[Finding]) -> pd.DataFrame:
    """One row a finding, corrected for many claims: Holm at 5 % over primaries, Benjamini–Hochberg at 5 % over the rest.

    Families are the kinds of evidence, never mixed. A verdict that does not survive becomes inconclusive and says so.
    Columns: claim, paper, evidence, published, estimate, low, high, n, verdict, reason and more; `low` and `high` are the
    interval the claim was judged by.
    """
    adjusted = {}
    for evidence in {f.evidence for f in findings}:
        for primary, method in ((True, "holm"), (False, "fdr_bh")):
            family = [f for f in findings if f.evidence == evidence and f.claim.primary == primary and f.estimate is not None]
            if family:
                adjusted |= zip([_key(f) for f in family], multipletests([f.p for f in family], LEVEL, method)[1], strict=True)
    if len({_key(f) for f in findings}) != len(findings):
        raise ValueError("a claim has two findings of one kind of evidence; pool nothing, judge each once")
    return pd.DataFrame([_row(f, adjusted.get(_key(f), math.nan)) for f in findings], columns=COLUMNS)


def _key(finding: Finding) -> tuple:
    return finding.claim.id, finding.evidence


def _row(f: Finding, p_adjusted: float) -> dict:
    low, high = interval_of(f.claim, f.estimate) if f.estimate else (math.nan, math.nan)
    verdict, reason = f.verdict, f.reason
    if verdict in DECISIVE and not p_adjusted < LEVEL:
        verdict = "inconclusive"
        reason = f"{f.verdict} before correction (p = {f.p:.2g}) but not after it for many claims (p = {p_adjusted:.2g}); {f.reason}"
    return {"claim": f.claim.id, "paper": f.claim.paper, "evidence": f.evidence, "published": f.claim.published,
            "estimate": f.estimate.value if f.estimate else math.nan, "low": low, "high": high,
            "n": f.estimate.n if f.estimate else 0, "verdict": verdict, "reason": reason, "unit": f.claim.unit,
            "primary": f.claim.primary, "p_raw": f.p, "p_adjusted": float(p_adjusted), "detectable": f.detectable,
            "exploratory": f.registry != registry_hash(), "study": f.claim.study, "statement": f.claim.statement}


@dataclasses.dataclass(frozen=True)
class Board:
    """A table of verdicts with the controls that ran beside it."""

    frame: pd.DataFrame
    controls: tuple[Control, ...]

    @property
    def sound(self) -> bool:
        """Whether all controls passed."""
        return all(c.passed for c in self.controls)

    @property
    def expected_false(self) -> float:
        """Expected false verdicts: 5 % that any primary of a kind of evidence is one, and 5 % of the decisive rest."""
        decisive = self.frame[self.frame.verdict.isin(DECISIVE)]
        return LEVEL * decisive[decisive.primary].evidence.nunique() + LEVEL * int((~decisive.primary.astype(bool)).sum())

    def headline(self) -> str:
        """What stands at the top, controls first."""
        counts = ", ".join(f"{n} {v}" for v, n in self.frame.verdict.value_counts().items())
        lines = [f"**{len(self.frame)} claims**: {counts}. Expected false verdicts among the decided: {self.expected_false:.2f}."]
        failed = [c for c in self.controls if not c.passed]
        if failed:
            lines.insert(0, "**A control failed; do not trust this board.** " + " ".join(f"{c.name}: {c.detail}." for c in failed))
        elif self.controls:
            lines.append("Controls passed: " + "; ".join(f"{c.name} ({c.detail})" for c in self.controls) + ".")
        else:
            lines.append("No control ran: nothing on this board was trained at a size that counts.")
        return "\n\n".join(lines)

    def interpretation(self) -> str:
        """One line a decided claim, one for what is open."""
        decided = self.frame[self.frame.verdict.isin(DECISIVE)]
        lines = [f"- *{r.claim}* ({r.paper}, {r.evidence}): **{r.verdict}**: {r.reason}." for r in decided.itertuples()]
        still = self.frame[~self.frame.verdict.isin(DECISIVE)].groupby("verdict").claim.apply(", ".join)
        lines += [f"- {verdict}: {names}." for verdict, names in still.items()]
        return "\n".join(lines)

    def controls_frame(self) -> pd.DataFrame:
        """The controls as a table."""
        return pd.DataFrame([dataclasses.asdict(c) for c in self.controls], columns=["name", "passed", "detail"])

    def write(self, path: Path) -> Path:
        """JSON of the board: registry hash, controls, expected false verdicts, rows."""
        body = {"registry": registry_hash(), "expected_false_verdicts": self.expected_false, "sound": self.sound,
                "controls": [dataclasses.asdict(c) for c in self.controls], "rows": plain(self.frame.to_dict("records"))}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(body, indent=1, allow_nan=False))
        return path


def read_board(path: Path) -> Board:
    """The board that `write` wrote; ValueError where the file is missing or not whole."""
    body = _read(path, {"controls", "rows"})
    frame = pd.DataFrame(body["rows"], columns=COLUMNS)
    numeric = ["published", "estimate", "low", "high", "p_raw", "p_adjusted", "detectable"]
    frame[numeric] = frame[numeric].astype(float)
    return Board(frame, tuple(Control(**c) for c in body["controls"]))


def write_findings(path: Path, findings: list[Finding], controls: list[Control], about: dict) -> Path:
    """A study's findings as JSON, for a board of several studies; `about` (preset, provenance) goes with them."""
    rows = [dataclasses.asdict(f) for f in findings]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(plain({"findings": rows, "controls": [dataclasses.asdict(c) for c in controls], **about}), indent=1,
                               allow_nan=False))
    return path


def read_findings(path: Path) -> tuple[list[Finding], list[Control], dict]:
    """(findings, controls, the rest) of a study; ValueError where the file is missing or not whole."""
    body = _read(path, {"findings", "controls"})
    findings = []
    for row in body.pop("findings"):
        claim = {k: tuple(v) if isinstance(v, list) else math.nan if v is None else v for k, v in row["claim"].items()}
        estimate = Estimate(**row["estimate"]) if row["estimate"] else None
        numbers = {k: math.nan if row[k] is None else row[k] for k in ("p", "detectable")}
        findings.append(Finding(**{**row, **numbers, "claim": Claim(**claim), "estimate": estimate}))
    return findings, [Control(**c) for c in body.pop("controls")], body


def plain(item):
    """JSON-ready: numpy scalars as Python's, what is not finite as null."""
    if isinstance(item, dict):
        return {k: plain(v) for k, v in item.items()}
    if isinstance(item, list | tuple):
        return [plain(v) for v in item]
    if isinstance(item, np.generic):
        item = item.item()
    return None if isinstance(item, float) and not math.isfinite(item) else item


def _read(path: Path, needed: set[str]) -> dict:
    try:
        body = json.loads(Path(path).read_text())
        if needed <= set(body):
            return body
    except (OSError, ValueError):
        pass
    raise ValueError(f"{path} is missing or not whole; run `make reproduce` again (nothing is trained twice)")
