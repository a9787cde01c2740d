"""The verdict board: all findings of one kind of evidence corrected together, with its controls at the top."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
from statsmodels.stats.multitest import multipletests

from etastar.analysis.claims import EVIDENCE, KINDS, LEVEL, VERDICTS, Claim, Finding, interval_of, registry_hash
from etastar.analysis.controls import Control
from etastar.analysis.paired import Estimate

DECISIVE = VERDICTS[:3]
TYPES = {"claim": str, "paper": str, "evidence": str, "published": float, "estimate": float, "low": float, "high": float, "n": int,
         "verdict": str, "reason": str, "unit": str, "primary": bool, "p_raw": float, "p_adjusted": float, "detectable": float,
         "exploratory": bool, "study": str, "statement": str}
COLUMNS = list(TYPES)
MEND = "run the study again (`make reproduce`; nothing is trained twice)"


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
            "exploratory": f.registry != registry_hash(study=f.claim.study), "study": f.claim.study, "statement": f.claim.statement}


@dataclasses.dataclass(frozen=True)
class Board:
    """A table of verdicts with the controls that ran beside it."""

    frame: pd.DataFrame
    controls: tuple[Control, ...]

    @property
    def sound(self) -> bool:
        """Whether controls ran, and all of them passed."""
        return bool(self.controls) and all(c.passed for c in self.controls)

    @property
    def expected_false(self) -> float:
        """Expected false verdicts: 5 % that any primary of a kind of evidence is one, and 5 % of the decisive rest."""
        decisive = self.frame[self.frame.verdict.isin(DECISIVE)]
        return LEVEL * decisive[decisive.primary].evidence.nunique() + LEVEL * int((~decisive.primary.astype(bool)).sum())

    def headline(self) -> str:
        """What stands at the top: controls that failed or did not run, exploratory claims, counts, controls that passed."""
        counts = ", ".join(f"{n} {v}" for v, n in self.frame.verdict.value_counts().items())
        lines = [f"**{len(self.frame)} claims**: {counts}. Expected false verdicts among the decided: {self.expected_false:.2f}."]
        passed = [c for c in self.controls if c.passed]
        if passed:
            lines.append("Controls passed: " + "; ".join(f"{c.name} ({c.detail})" for c in passed) + ".")
        if changed := int(self.frame.exploratory.astype(bool).sum()):
            lines.insert(0, f"**{changed} of {len(self.frame)} claims are exploratory**: the registry changed after they were judged.")
        if warning := self.warning():
            lines.insert(0, warning)
        return "\n\n".join(lines)

    def warning(self) -> str:
        """What keeps the board from being fully controlled; empty where all controls ran and passed."""
        said = []
        for outcome, what in ((False, "failed; do not trust this board"), (None, "did not run; this board is not fully controlled")):
            if told := [f"{c.name}: {c.detail}." for c in self.controls if c.passed is outcome]:
                said.append(f"**A control {what}.** " + " ".join(told))
        if not self.controls:
            decided = self.frame.verdict.isin(DECISIVE).any()
            said.append("**No control ran; this board is not controlled.**" if decided else
                        "No control ran: nothing on this board was trained at a size that counts.")
        return "\n\n".join(said)

    def interpretation(self) -> str:
        """One line a decided claim, one for what is open; what keeps the decided from being fully controlled comes first."""
        decided = self.frame[self.frame.verdict.isin(DECISIVE)]
        lines = [self.warning() + "\n"] if len(decided) and not self.sound else []
        lines += [f"- *{r.claim}* ({r.paper}, {r.evidence}): **{r.verdict}**: {r.reason}." for r in decided.itertuples()]
        still = self.frame[~self.frame.verdict.isin(DECISIVE)].groupby("verdict").claim.apply(", ".join)
        lines += [f"- {verdict}: {names}." for verdict, names in still.items()]
        return "\n".join(lines)

    def controls_frame(self) -> pd.DataFrame:
        """The controls as a table; `passed` is yes, no or not run."""
        told = {True: "yes", False: "no", None: "not run"}
        return pd.DataFrame([(c.name, told[c.passed], c.detail) for c in self.controls], columns=["name", "passed", "detail"])

    def write(self, path: Path) -> Path:
        """JSON of the board: registry hash, controls, expected false verdicts, rows."""
        body = {"registry": registry_hash(), "expected_false_verdicts": self.expected_false, "sound": self.sound,
                "controls": [dataclasses.asdict(c) for c in self.controls], "rows": plain(self.frame.to_dict("records"))}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(body, indent=1, allow_nan=False))
        return path


def read_board(path: Path) -> Board:
    """The board that `write` wrote; every row is exploratory where the registry has changed since.

    Raises ValueError that names the file, the field and the mend where the file is missing, not whole or malformed.
    """
    body = _read(path, {"registry": str, "controls": list, "rows": list})
    rows = [_typed(TYPES, row, path, f"rows[{i}]") for i, row in enumerate(body["rows"])]
    for i, row in enumerate(rows):
        _sensible(row, path, f"rows[{i}]", p=("p_raw", "p_adjusted"))
    _judged_once([(row["claim"], row["evidence"]) for row in rows], path, "rows")
    frame = pd.DataFrame(rows, columns=COLUMNS).astype({name: kind for name, kind in TYPES.items() if kind is not str})
    frame["exploratory"] |= body["registry"] != registry_hash()
    return Board(frame, _controls(body["controls"], path))


def write_findings(path: Path, findings: list[Finding], controls: list[Control], about: dict) -> Path:
    """A study's findings as JSON, for a board of several studies; `about` (preset, provenance) goes with them."""
    rows = [dataclasses.asdict(f) for f in findings]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(plain({"findings": rows, "controls": [dataclasses.asdict(c) for c in controls], **about}), indent=1,
                               allow_nan=False))
    return path


def read_findings(path: Path) -> tuple[list[Finding], list[Control], dict]:
    """(findings, controls, the rest) of a study.

    Raises ValueError that names the file, the field and the mend where the file is missing, not whole or malformed.
    """
    body = _read(path, {"findings": list, "controls": list})
    findings = [_finding(row, path, f"findings[{i}]") for i, row in enumerate(body.pop("findings"))]
    _judged_once([_key(f) for f in findings], path, "findings")
    return findings, list(_controls(body.pop("controls"), path)), body


def plain(item):
    """JSON-ready: numpy scalars as Python's, what is not finite as null."""
    if isinstance(item, dict):
        return {k: plain(v) for k, v in item.items()}
    if isinstance(item, list | tuple):
        return [plain(v) for v in item]
    if isinstance(item, np.generic):
        item = item.item()
    return None if isinstance(item, float) and not math.isfinite(item) else item


# -- files read back ---------------------------------------------------------------------------------------------------


def _read(path: Path, needed: dict[str, type]) -> dict:
    try:
        body = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is missing or not whole ({error}); {MEND}") from None
    if not isinstance(body, dict):
        raise _malformed(path, "the file", f"holds {_called(body)}, not named fields")
    for name, kind in needed.items():
        if not isinstance(body.get(name), kind):
            raise _malformed(path, name, f"must be {kind.__name__}; got {_called(body[name])}" if name in body else "is missing")
    return body


def _malformed(path: Path, field: str, said: str) -> ValueError:
    return ValueError(f"{path} is malformed: {field} {said}; {MEND}")


def _called(item) -> str:
    told = repr(item)
    return told if len(told) <= 60 else f"{told[:57]}..."


def _types(cls) -> dict[str, type]:
    return {f.name: f.type for f in dataclasses.fields(cls)}


def _typed(types: dict[str, type], row, path: Path, field: str) -> dict:
    """The row with null numbers as NaN; every name of `types` and no other, each of its type."""
    if not isinstance(row, dict):
        raise _malformed(path, field, f"must be named fields; got {_called(row)}")
    if odd := sorted(set(types) ^ set(row)):
        raise _malformed(path, f"{field}.{odd[0]}", "is missing" if odd[0] in types else "is unknown")
    made = {}
    for name, kind in types.items():
        item, accepted = row[name], kind
        if kind is float:
            item, accepted = math.nan if item is None else item, int | float
        elif kind is tuple:
            item = tuple(item) if isinstance(item, list) else item
        if not isinstance(item, accepted) or (isinstance(item, bool) and kind in (int, float)):
            raise _malformed(path, f"{field}.{name}", f"must be {getattr(kind, '__name__', kind)}; got {_called(item)}")
        made[name] = float(item) if kind is float else item
    return made


def _finding(row, path: Path, field: str) -> Finding:
    made = _typed(_types(Finding) | {"claim": dict, "estimate": dict | None}, row, path, field)
    made["claim"] = Claim(**_typed(_types(Claim), made["claim"], path, f"{field}.claim"))
    if made["claim"].kind not in KINDS:
        raise _malformed(path, f"{field}.claim.kind", f"must be one of {', '.join(KINDS)}; got {_called(made['claim'].kind)}")
    if made["estimate"] is not None:
        made["estimate"] = e = Estimate(**_typed(_types(Estimate), made["estimate"], path, f"{field}.estimate"))
        for name, good in (("value", math.isfinite(e.value)), ("se", e.se >= 0), ("df", e.df > 0), ("n", e.n > 0)):
            if not good:
                raise _malformed(path, f"{field}.estimate.{name}", f"cannot be {getattr(e, name)}")
    value = made["estimate"].value if made["estimate"] else math.nan
    _sensible({**made, "estimate": value}, path, field, p=("p",))
    return Finding(**made)


def _controls(rows: list, path: Path) -> tuple[Control, ...]:
    return tuple(Control(**_typed(_types(Control), row, path, f"controls[{i}]")) for i, row in enumerate(rows))


def _sensible(row: dict, path: Path, field: str, p: tuple[str, ...]) -> None:
    """Known words, shares between 0 and 1, and numbers behind whatever was judged."""
    for name, known in (("evidence", EVIDENCE), ("verdict", VERDICTS)):
        if row[name] not in known:
            raise _malformed(path, f"{field}.{name}", f"must be one of {', '.join(known)}; got {_called(row[name])}")
    decided = row["verdict"] in DECISIVE
    for name in ("estimate", *p):
        good = not decided if math.isnan(row[name]) else math.isfinite(row[name]) if name == "estimate" else 0 <= row[name] <= 1
        if not good:
            raise _malformed(path, f"{field}.{name}", f"cannot be {row[name]} where the verdict is {row['verdict']}")


def _judged_once(keys: list[tuple], path: Path, field: str) -> None:
    for i, key in enumerate(keys):
        if key in keys[:i]:
            raise _malformed(path, f"{field}[{i}].claim", f"{key[0]!r} has two findings of {key[1]} evidence")
