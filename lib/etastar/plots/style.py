"""The house style of all figures: colours with line styles and markers, axes, legends above the axes, and `save`."""

import functools
import io
import math
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.style import context
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

STYLE = Path(__file__).with_name("default.mplstyle")
LINES = ("-", "--", "-.", ":", (0, (6, 1.5)), (0, (3, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LOSS = "validation loss (nats per token)"
DIFFERENCE = "difference in validation loss (nats per token)"


def styled(function):
    """Draw in the house style without touching the caller's settings."""

    @functools.wraps(function)
    def draw(*args, **kwargs):
        with context(STYLE):
            return function(*args, **kwargs)

    return draw


class Drawing(Figure):
    """A figure that a notebook shows as a picture without pyplot, which none of this needs."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        with context(STYLE):
            self.savefig(buffer, format="png", dpi=110)
        return buffer.getvalue()


def save(fig: Figure, folder, stem: str) -> list[Path]:
    """Write folder/stem.png (150 dpi) and folder/stem.svg, the same bytes each time; returns the two paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{stem}.png", folder / f"{stem}.svg"]
    with context(STYLE):
        fig.savefig(paths[0], metadata={"Software": None})
        fig.savefig(paths[1], metadata={"Date": None, "Creator": None})
    return paths


def marks(names) -> list[dict]:
    """Colour, line style and marker of each name, so that no arm is told by colour alone."""
    colours = house_colours()
    return [
        {"color": colours[i % len(colours)], "linestyle": LINES[i % len(LINES)], "marker": MARKERS[i % len(MARKERS)]}
        for i in range(len(names))
    ]


def house_colours() -> list[str]:
    """The colours of the house style, in order."""
    return matplotlib.rcParams["axes.prop_cycle"].by_key()["color"]


def log2_axis(ax, rates) -> None:
    """Octaves on the x axis, labelled as powers of 2."""
    low, high = math.floor(math.log2(min(rates))), math.ceil(math.log2(max(rates)))
    step = max(1, -(-(high - low) // 10))
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_locator(FixedLocator([2.0**k for k in range(low, high + 1, step)]))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"$2^{{{round(math.log2(x))}}}$"))
    ax.xaxis.set_minor_locator(NullLocator())


def legend_above(fig, ax, title: str | None = None, columns: int = 4) -> None:
    """The legend above the axes, where it hides no point."""
    handles, labels = ax.get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside upper left", ncols=min(columns, len(labels)), title=title, alignment="left")


def two_lines(label: str) -> str:
    """An axis label with its unit on a second line, so that a low figure does not cut it."""
    return label.replace(" (", "\n(")


def need(frame: pd.DataFrame, *columns: str) -> None:
    """ValueError that names the columns a frame lacks, or says that it is empty."""
    if lacking := [name for name in columns if name not in frame]:
        raise ValueError(f"no column {', '.join(map(repr, lacking))}; the frame has {', '.join(map(str, frame))}")
    some(frame, "rows")


def some(things, what: str) -> None:
    """ValueError where there is nothing to draw."""
    if len(things) == 0:
        raise ValueError(f"nothing to draw: no {what}")
