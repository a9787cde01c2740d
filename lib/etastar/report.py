"""One self-contained HTML page of a preset's results: controls, verdict board, figures, provenance."""

import base64
import collections
import json
import math
import re
from pathlib import Path

from etastar.analysis.claims import registry_hash

MARKS = {"reproduced": "●", "contradicted": "✗", "differs at this scale": "■", "inconclusive": "◆", "untested": "–"}
UNITS = {"token_fraction": "% of tokens", "nats": "nats per token"}
REPORTED = ("findings", "controls", "rows")  # parts of a findings file shown elsewhere on the page


def write_report(results_dir) -> Path:
    """Write results_dir/report.html from what stands there; returns its path.

    Read are claims.json (the board), */findings.json (provenance), */*.png (figures) and notebooks/*.ipynb (links);
    what is missing is left out. Raises FileNotFoundError where there is no such folder, ValueError for a damaged file.
    """
    folder = Path(results_dir).resolve()
    if not folder.is_dir():
        raise FileNotFoundError(f"no results in {folder}; `make reproduce PRESET={folder.name}` makes them")
    page = _template().render(
        preset=folder.name,
        **_board(folder / "claims.json"),
        studies=_figures(folder),
        notebooks=sorted(path.name for path in (folder / "notebooks").glob("*.ipynb")),
        provenance=_provenance(folder),
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _template():
    from jinja2 import Environment

    source = Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8")
    return Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(source)


def _board(path: Path) -> dict:
    body = _json(path) if path.exists() else {}
    body = {"rows": body} if isinstance(body, list) else body
    rows, controls = body.get("rows", []), body.get("controls", [])
    changed = "registry" in body and body["registry"] != registry_hash()
    boards = collections.defaultdict(list)
    for row in rows:
        boards[row.get("evidence") or "unnamed"].append(_shown(row | {"exploratory": row.get("exploratory") or changed}))
    return {
        "boards": boards,
        "controls": controls,
        "failed": any(control.get("passed") is False for control in controls),
        "idle": any(control.get("passed") is None for control in controls),
        "registry_changed": changed,
        "counts": collections.Counter(row.get("verdict", "untested") for row in rows),
        "expected_false": body.get("expected_false_verdicts"),
    }


def _shown(row: dict) -> dict:
    """A row of the board as the strings its cells hold."""
    verdict, unit = row.get("verdict", "untested"), row.get("unit", "")
    low, high = _number(row.get("low"), unit), _number(row.get("high"), unit)
    paper = row.get("paper") or ""
    return {
        "verdict": verdict,
        "mark": MARKS.get(verdict, "?"),
        "claim": row.get("claim", ""),
        "unit": UNITS.get(unit, unit),
        "paper": paper,
        "statement": row.get("statement") or row.get("claim", ""),
        "reason": row.get("reason") or "",
        "address": f"https://arxiv.org/abs/{paper}" if re.fullmatch(r"\d{4}\.\d{4,5}", paper) else None,
        "primary": row.get("primary"),
        "exploratory": row.get("exploratory"),
        "n": row.get("n") or "",
        "published": _number(row.get("published"), unit),
        "estimate": _number(row.get("estimate"), unit),
        "interval": f"{low} … {high}" if low and high else "",
        "p": _number(row.get("p_adjusted"), "p"),
        "detectable": _number(row.get("detectable"), unit),
    }


def _number(item, unit: str) -> str:
    """Three digits (token fractions in per cent) with a real minus sign; nothing for what is not known."""
    if item is None or not math.isfinite(item):
        return ""
    if unit == "p" and item < 0.001:
        return "< 0.001"
    return (f"{100 * item:.1f}" if unit == "token_fraction" else f"{item:.3g}").replace("-", "−")


def _figures(folder: Path) -> dict[str, list[dict]]:
    studies = collections.defaultdict(list)
    for path in sorted(folder.glob("*/*.png")):
        data = base64.b64encode(path.read_bytes()).decode()
        studies[path.parent.name].append({"caption": path.stem.replace("_", " "), "data": data})
    return studies


def _provenance(folder: Path) -> dict[str, dict]:
    """By study, the facts its findings file states about how it was made."""
    told = {}
    for path in sorted(folder.glob("*/findings.json")):
        facts = {name: item for name, item in _json(path).items() if name not in REPORTED}
        facts = facts | facts.pop("provenance", {})
        told[path.parent.name] = {
            name: item if isinstance(item, str) else json.dumps(item) for name, item in facts.items()
        }
    return told


def _json(path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); `make reproduce` writes it again") from None
