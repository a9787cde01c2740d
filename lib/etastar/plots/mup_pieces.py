"""What the figures of μP against fitting are made of: names and looks, the design they read off a frame, bowls with their best rate."""

import dataclasses

import numpy as np
import pandas as pd

from etastar.plots.style import marks

SCALINGS = {"sp": "SP", "mup": "μP", "completep": "CompleteP", "alpha 0.5": "α = 0.5", "alpha 0": "α = 0"}
RUN = ("scaling", "kind", "width", "depth", "horizon_tokens", "peak_lr", "seed", "loss")
CELL = ("scaling", "kind", "width", "depth", "horizon_tokens", "best_lr", "low", "high", "best_loss")
ROOM = 0.5  # nats above the highest bowl's best that stay in view


@dataclasses.dataclass(frozen=True)
class Design:
    """What most plain models share: blocks and horizon; and the width of the base, at which μP is SP and is trained once."""

    depth: int
    tokens: int
    base: float

    @staticmethod
    def of(frame: pd.DataFrame) -> "Design":
        """Of runs or cells; the base is the widest SP model narrower than all of μP, so that SP's smaller proxies are none."""
        plain = frame[(frame["kind"] == "") & frame["scaling"].isin(["sp", "mup"])]
        plain = plain if len(plain) else frame
        plain = plain[plain["depth"] == plain["depth"].mode()[0]]
        widths = plain.drop_duplicates(["horizon_tokens", "scaling", "width"])
        mup = widths.loc[widths["scaling"] == "mup", "width"]
        narrower = widths.loc[(widths["scaling"] == "sp") & (widths["width"] < mup.min()), "width"]
        base = narrower.max() if len(mup) else widths["width"].min()
        return Design(int(plain["depth"].iloc[0]), int(widths["horizon_tokens"].mode()[0]), float(base))

    def of_kind(self, frame: pd.DataFrame, kind: str = "") -> pd.DataFrame:
        """Rows under SP and μP of a kind, of the usual depth."""
        return frame[(frame["kind"] == kind) & (frame["depth"] == self.depth) & frame["scaling"].isin(["sp", "mup"])]

    def widths(self, frame: pd.DataFrame, scaling: str, kind: str = "") -> pd.DataFrame:
        """Rows of all widths under a scaling at the usual horizon; μP's hold the base."""
        at = self.of_kind(frame, kind)
        at = at[at["horizon_tokens"] == self.tokens]
        at_base = (at["scaling"] == "sp") & (at["width"] == self.base)
        return at[(at["scaling"] == scaling) | (at_base & (scaling == "mup"))]

    def target(self, frame: pd.DataFrame) -> tuple[int, int]:
        """(width, tokens) of the longest of μP, the widest of those; of SP where there is no μP."""
        plain = self.of_kind(frame)
        mup = plain[plain["scaling"] == "mup"]
        last = (mup if len(mup) else plain).sort_values(["horizon_tokens", "width"]).iloc[-1]
        return int(last["width"]), int(last["horizon_tokens"])


def bowl(ax, rows: pd.DataFrame, look: dict, aside: float = 1.0) -> None:
    """Seeds faint, means joined where every seed is finite, crosses above, a little aside of the rate, for runs that are not."""
    kept, lost = (rows[np.isfinite(rows["loss"]) == finite] for finite in (True, False))
    ax.plot(kept["peak_lr"], kept["loss"], look["marker"], color=look["color"], alpha=0.35, ms=4, mew=0)
    mean = rows.groupby("peak_lr")["loss"].agg(lambda loss: loss.mean(skipna=False))
    mean = mean[np.isfinite(mean)]
    ax.plot(mean.index, mean, **look)
    ax.plot(lost["peak_lr"] * aside, np.full(len(lost), 0.985), "x", color=look["color"], mew=1.4, transform=ax.get_xaxis_transform())


def vertex(ax, row, look: dict) -> None:
    """A cell's best rate and loss, with its level interval where it has one."""
    ax.plot([row.low, row.high], [row.best_loss] * 2, "|-", color=look["color"], ms=11, mew=1.4, scalex=False, scaley=False)
    ax.plot(row.best_lr, row.best_loss, look["marker"], color=look["color"], mec="white", mew=1.2, ms=9, zorder=4)


def scaling_looks() -> dict:
    """Of every scaling, the same in all panels; solid."""
    return {name: mark | {"linestyle": "-"} for name, mark in zip(SCALINGS, marks(SCALINGS), strict=True)}


def arm_name(scaling: str, kind: str) -> str:
    """A scaling by its name, and what else differs from the plain model."""
    return SCALINGS.get(scaling, scaling) + f", {kind}" * bool(kind)
