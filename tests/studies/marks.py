"""What stands on a figure, and frames cut for one: for tests of figures of norms."""

import numpy as np
from matplotlib.collections import LineCollection


def bare(frame):
    """Of one seed: no interval."""
    return frame.assign(**{name: np.nan for name in frame if name.endswith(("low", "high"))})


def only(frame, **kept):
    for name, value in kept.items():
        frame = frame[frame[name] == value]
    return frame


def xy(line):
    return np.asarray(line.get_xdata(), dtype=float), np.asarray(line.get_ydata(), dtype=float)


def title(ax):
    return ax.get_title(loc="left")


def legend(fig):
    return [text.get_text() for text in fig.legends[0].get_texts()]


def notes(fig):
    return fig.legends[0].get_title().get_text()


def faint(ax):
    return [xy(line) for line in ax.get_lines() if line.get_alpha() == 0.35]


def joined(ax):
    """Marked lines through several points that are no seeds."""
    lines = [line for line in ax.get_lines() if line.get_linestyle() != "None" and len(line.get_xdata()) > 1]
    return [line for line in lines if line.get_marker() not in ("None", "") and line.get_alpha() is None]


def marked_points(ax, size=8):
    return [line for line in ax.get_lines() if line.get_markersize() == size and len(line.get_xdata())]


def crosses(ax):
    return [xy(line) for line in ax.get_lines() if line.get_marker() == "x" and len(line.get_xdata())]


def segments(ax):
    return [np.array(c.get_segments()) for c in ax.collections if isinstance(c, LineCollection)]
