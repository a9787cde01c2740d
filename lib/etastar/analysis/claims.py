"""Claims as registered, and the rules by which a number becomes a verdict: the same for all claims of a kind.

Kinds: direction (an effect on the published side), equality (no effect beyond a margin), number (a published value within
a margin), no_worse (not above a margin). The rules were fixed before any result; a claim changed later is exploratory.
"""

import dataclasses
import functools
import hashlib
import json
import math
import tomllib
from pathlib import Path

from etastar.analysis.paired import Estimate

LEVEL = 0.05
KINDS = ("direction", "equality", "number", "no_worse")
EVIDENCE = ("archive", "recorded", "live")
VERDICTS = ("reproduced", "contradicted", "differs at this scale", "inconclusive", "untested")
MOST_PRIMARIES = 3
REGISTRY = Path(__file__).parents[1] / "studies" / "claims.toml"


@dataclasses.dataclass(frozen=True)
class Claim:
    """One claim of a paper; numbers in `unit` (token_fraction: share of tokens at equal loss, negative is better).

    `published` NaN where the paper prints no number. `margin` is the half-width of equality, number and no_worse claims
    about `published`'s target (0, `published`, 0); `smallest_effect` the least that counts for a direction. `minimum_scale`
    is the scale below which a contradiction is called a difference of scale.
    """

    id: str
    study: str
    paper: str
    place: str
    statement: str
    kind: str
    estimand: str
    arms: tuple
    unit: str
    published: float
    published_note: str
    primary: bool
    minimum_scale: dict
    matching: str
    side: str = ""
    smallest_effect: float = math.nan
    margin: float = math.nan
    rival: float = math.nan
    rival_name: str = ""
    exclusions: str = ""

    @property
    def target(self) -> float:
        """The value a margin is laid about."""
        return self.published if self.kind == "number" else 0.0


def load_claims(study: str | None = None, path: Path = REGISTRY) -> dict[str, Claim]:
    """Registered claims by id, of one study or all; ValueError names the claim and the key that is unknown or missing."""
    claims = {}
    for row in tomllib.loads(Path(path).read_text())["claim"]:
        claim = _claim(row)
        if claim.id in claims:
            raise ValueError(f"claim {claim.id!r} is registered twice")
        claims[claim.id] = claim
    for name in {c.study for c in claims.values()}:
        primaries = [c.id for c in claims.values() if c.study == name and c.primary]
        if len(primaries) > MOST_PRIMARIES:
            raise ValueError(f"study {name} has {len(primaries)} primary claims, at most {MOST_PRIMARIES} are allowed: "
                             f"{', '.join(primaries)}")
    return {c.id: c for c in claims.values() if study in (None, c.study)}


def registry_hash(path: Path = REGISTRY, study: str | None = None) -> str:
    """Hash of what is registered, for one study or all, whatever the layout of the file."""
    return _hash(Path(path).read_bytes(), study)


@functools.lru_cache  # the controls judge thousands of planted draws, and every finding carries the hash
def _hash(text: bytes, study: str | None) -> str:
    claims = [row for row in tomllib.loads(text.decode())["claim"] if study in (None, row["study"])]
    return hashlib.sha256(json.dumps(claims, sort_keys=True).encode()).hexdigest()[:16]


def _claim(row: dict) -> Claim:
    name, fields = row.get("id", "?"), {f.name: f for f in dataclasses.fields(Claim)}
    unknown = sorted(set(row) - set(fields))
    missing = sorted(n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in row)
    if unknown or missing:
        raise ValueError(f"claim {name!r}: unknown {unknown}, missing {missing}")
    claim = Claim(**{k: tuple(v) if isinstance(v, list) else v for k, v in row.items()})
    needs = {"direction": ("side", "smallest_effect"), "equality": ("margin", "rival"), "number": ("margin", "rival", "published"),
             "no_worse": ("margin",)}
    if claim.kind not in needs:
        raise ValueError(f"claim {name!r}: unknown kind {claim.kind!r}; known: {', '.join(KINDS)}")
    for field in needs[claim.kind]:
        given = getattr(claim, field)
        if given == "" or (isinstance(given, float) and math.isnan(given)):
            raise ValueError(f"claim {name!r} of kind {claim.kind} needs {field}")
    if claim.kind == "direction" and claim.side not in ("lower", "higher"):
        raise ValueError(f"claim {name!r}: side must be lower or higher; got {claim.side!r}")
    return claim


@dataclasses.dataclass(frozen=True)
class Finding:
    """A claim with what was measured; `verdict` as it stands before many claims are corrected for, `p` of that verdict."""

    claim: Claim
    evidence: str
    estimate: Estimate | None
    verdict: str
    p: float
    detectable: float
    reason: str
    registry: str


def untested(claim: Claim, evidence: str, why: str) -> Finding:
    """A claim no run speaks of; `why` ends with the command that would test it."""
    return Finding(claim, evidence, None, "untested", math.nan, math.nan, why, registry_hash(study=claim.study))


def judge(claim: Claim, estimate: Estimate, *, evidence: str, scale: dict, matching: bool) -> Finding:
    """The verdict on one claim from one estimate, by the rules of its kind.

    `scale` has the keys of the claim's minimum scale; `matching` says whether the settings match the paper's. Raises
    ValueError for an estimate in another unit or an unknown kind of evidence.
    """
    if estimate.unit != claim.unit:
        raise ValueError(f"claim {claim.id!r} is in {claim.unit}, the estimate in {estimate.unit}")
    if evidence not in EVIDENCE:
        raise ValueError(f"unknown evidence {evidence!r}; known: {', '.join(EVIDENCE)}")
    for_it, against = (_RULES[claim.kind])(claim, estimate)
    detectable = estimate.detectable(level=LEVEL) if claim.kind == "direction" else estimate.provable_margin(level=LEVEL)
    verdict, p, reason = "inconclusive", min(for_it[0], against[0]), ""
    if for_it[0] < LEVEL and for_it[1]:
        verdict, p, reason = "reproduced", for_it[0], for_it[2]
    elif against[0] < LEVEL:
        small = [f"{k} {scale.get(k, 0):.3g} < {v:.3g}" for k, v in claim.minimum_scale.items() if not scale.get(k, 0) >= v]
        verdict = "contradicted" if matching and not small else "differs at this scale"
        p, reason = against[0], against[2]
        if verdict != "contradicted":
            reason += f" ({'; '.join(small) or 'other settings than the paper'})"
    else:
        what = "effect that could have been seen" if claim.kind == "direction" else "margin that could have been shown"
        said = for_it[2] if for_it[0] < LEVEL else "the interval decides neither way"
        reason = f"{said}; the smallest {what} is {detectable:.3g} {claim.unit}"
    return Finding(claim, evidence, estimate, verdict, float(p), detectable, reason, registry_hash(study=claim.study))


def interval_of(claim: Claim, estimate: Estimate) -> tuple[float, float]:
    """The interval a claim is judged by: 95 % for a direction, 90 % (two one-sided tests) for the others."""
    return estimate.interval(1 - LEVEL if claim.kind == "direction" else 1 - 2 * LEVEL)


def _direction(claim, e):
    sign = 1 if claim.side == "higher" else -1
    two_sided, on_side = e.p_equals(0.0), e.value * sign > 0
    enough = e.value * sign >= claim.smallest_effect
    said = f"{e.value:+.3g} {claim.unit}, {'at least' if enough else 'short of'} the smallest effect of {claim.smallest_effect:.3g}"
    other = f"{e.value:+.3g} {claim.unit}, the other side of zero"
    return (two_sided if on_side else 1.0, enough, said), (1.0 if on_side else two_sided, True, other)


def _equality(claim, e):
    low, high = claim.target - claim.margin, claim.target + claim.margin
    inside, rival = e.p_outside(low, high), e.p_equals(claim.rival) / 2
    beyond = 2 * min(e.p_above(low), e.p_below(high))
    said = f"{e.value:+.3g} {claim.unit}, within ±{claim.margin:.3g} of {claim.target:.3g}"
    if rival >= LEVEL:
        said += f", but {claim.rival_name} ({claim.rival:.3g}) is not excluded"
    other = f"{e.value:+.3g} {claim.unit}, beyond ±{claim.margin:.3g} of {claim.target:.3g}"
    return (max(inside, rival), True, said), (min(1.0, beyond), True, other)


def _no_worse(claim, e):
    said = f"{e.value:+.3g} {claim.unit}, not above the margin of {claim.margin:.3g}"
    other = f"{e.value:+.3g} {claim.unit}, above the margin of {claim.margin:.3g}"
    return (e.p_above(claim.margin), True, said), (min(1.0, 2 * e.p_below(claim.margin)), True, other)


_RULES = {"direction": _direction, "equality": _equality, "number": _equality, "no_worse": _no_worse}
