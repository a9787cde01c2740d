"""What the figures of norm transfer are made of: panels and views, seeds with their means, optima that are open outside their grid."""

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.figure import Figure

from etastar.plots.style import MARKERS, Drawing, need, two_lines

NORM = "output-layer norm ‖W‖ RMS→∞ (log2)"
RATE_SIDES = {"low": -1, "high": 1, "wall": 1, "lr low": -1, "lr high": 1}  # which way an optimum outside its grid lies
BATCH_SIDES = {"batch low": -1, "batch high": 1}
NO_SIDE = ("", "saddle", "few rates")
OPEN = "open: outside its grid"
TALLEST = 2.0  # nats above the best that stay in view; more would press the basin flat
REACH = 2.0  # octaves that an interval of the norm may run beyond the points within view


def panels_of(n: int, width: float, height: float, xlabel: str, ylabel: str, **shared) -> tuple[Figure, list]:
    """A figure of n panels, three a row, labelled at the left and below; sizes in inches a panel."""
    columns = min(n, 3)
    fig = Drawing(layout="constrained", figsize=(width * columns + 1.2 + 1.6 * (n == 1), height * -(-n // columns) + 1.1))
    panels = fig.subplots(-(-n // columns), columns, squeeze=False, **shared).ravel()
    for i, ax in enumerate(panels[:n]):
        ax.set(xlabel=xlabel if i + columns >= n else "", ylabel=two_lines(ylabel) if i % columns == 0 else "")
        ax.tick_params(labelbottom=True)
    for ax in panels[n:]:
        ax.remove()
    return fig, list(panels[:n])


def rows_down(ax, names) -> None:
    """Named rows from the top down."""
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.grid(axis="y", visible=False)


def cap_above(ax, losses: pd.Series) -> None:
    """A view of the losses up to TALLEST above the least."""
    low, high = ax.get_ylim()
    if len(kept := losses[np.isfinite(losses)]):
        ax.set_ylim(low, min(high, kept.min() + TALLEST))


def hold(ax, values: pd.Series, reach: float = REACH, along: str = "y") -> None:
    """Intervals may run out of view `reach` beyond the values, which they would press together."""
    low, high = getattr(ax, f"get_{along}lim")()
    getattr(ax, f"set_{along}lim")(max(low, values.min() - reach), min(high, values.max() + reach))


def inside(ax, x: float, y: float) -> tuple[float, float]:
    """The point, brought within view: an optimum outside its grid may be anywhere."""
    return float(np.clip(x, *ax.get_xlim())), float(np.clip(y, *ax.get_ylim()))


def path(ax, rows: pd.DataFrame, x: str, y: str, look: dict, by: str = "peak_lr") -> None:
    """Seeds faint, means joined in the order of `by` where every seed is finite, crosses above for those that are not."""
    finite = np.isfinite(rows[y]) & np.isfinite(rows[x])
    ax.plot(rows[x][finite], rows[y][finite], look["marker"], color=look["color"], alpha=0.35, ms=4, mew=0)
    whole = rows[finite.groupby(rows[by]).transform("all")]
    mean = whole.groupby(whole[by].rename("in order"))[[x, y]].mean()
    ax.plot(mean[x], mean[y], **look)
    lost = rows[x][~np.isfinite(rows[y]) & np.isfinite(rows[x])]
    ax.plot(lost, np.full(len(lost), 0.985), "x", color=look["color"], mew=1.4, transform=ax.get_xaxis_transform())


def level(ax, value, low, high, y, mark: dict) -> None:
    """Values at their rows with level intervals."""
    ax.hlines(y, low, high, color=mark["color"], lw=2)
    ax.plot(value, y, mark["marker"], color=mark["color"], ms=7, ls="")


def star(ax, at: tuple, edge: str, towards: tuple) -> None:
    """An optimum in two dimensions, with an arrow towards where it lies beyond its grid."""
    ax.plot(*at, "*", color="black", mfc="white" if edge else "black", mec="black" if edge else "white", mew=1, ms=14, zorder=4)
    arrow(ax, at, towards, "black")


def arrow(ax, at: tuple, towards: tuple, colour: str) -> None:
    """An arrow from a point towards (−1, 0 or 1 in x, the same in y); none where both are nought."""
    if any(towards):
        look = {"arrowstyle": "<-", "color": colour, "lw": 1.4, "shrinkB": 4}
        ax.annotate("", at, xytext=tuple(24 * way for way in towards), textcoords="offset points", arrowprops=look)


def batch_looks(batches: pd.Series, colours: str = "cividis", span: tuple = (0.0, 0.88)) -> dict:
    """Colour from light to dark in the order of the batch, and marker, so that a batch reads without hue."""
    sizes = sorted(batches.unique())
    shades = colormaps[colours](np.linspace(*span, len(sizes)))[::-1]
    return {size: {"color": tuple(shade), "linestyle": "-", "marker": MARKERS[i % len(MARKERS)]}
            for i, (size, shade) in enumerate(zip(sizes, shades, strict=True))}


def edged(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with "" where no edge is told; ValueError for words that are none."""
    frame = frame.assign(edge=frame["edge"].astype(object).fillna(""))
    known = (*NO_SIDE, *RATE_SIDES, *BATCH_SIDES)
    if unknown := sorted({word for edge in frame["edge"] for word in str(edge).split(", ")} - set(known)):
        raise ValueError(f"no edge {', '.join(map(repr, unknown))}; an edge is one of {', '.join(map(repr, known))}, or two with a comma")
    return frame


def sides(edge: str) -> tuple[int, int]:
    """Which way of (batch, rate) the optimum lies from its grid."""
    return tuple(sum(way.get(word, 0) for word in edge.split(", ")) for way in (BATCH_SIDES, RATE_SIDES))


def notes_on(optima: pd.DataFrame, place: str) -> list[str]:
    """What the legend must say of open marks and of optima without a `place`, which are not drawn."""
    known = optima.dropna(subset=place)
    lost = len(optima) - len(known)
    return [OPEN] * bool((known["edge"] != "").any()) + [f"not drawn: {lost} without an optimum"] * (lost > 0)


def crossed(losses: pd.Series, words: str) -> list[str]:
    """What the legend must say where a run diverged."""
    return [words] * bool((~np.isfinite(losses)).any())


def octaves(value: float) -> str:
    """A number as a power of two."""
    return f"$2^{{{round(np.log2(value), 2):g}}}$"


def perhaps(frame: pd.DataFrame | None, *columns: str) -> pd.DataFrame:
    """The frame with these columns, or an empty one where there is none."""
    if frame is None or len(frame) == 0:
        return pd.DataFrame({name: pd.Series(dtype=float) for name in columns})
    need(frame, *columns)
    return frame
