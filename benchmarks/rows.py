"""Rows of results, printed as they come: JSON lines for programs, tables for eyes.

A `ratio` is always of speeds, own over the reference's: above 1 is faster than the reference.
"""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator

HIDDEN = ("bench", "shape")  # said once above the table


def show(rows: Iterable[dict], as_json: bool) -> None:
    """Print rows; a table is printed when its last row has come."""
    if as_json:
        for row in rows:
            print(json.dumps(row), flush=True)
        return
    for (bench, shape), group in itertools.groupby(rows, key=lambda row: (row["bench"], row.get("shape"))):
        print(f"{bench} {shape or ''}".strip(), table(list(group)), sep="\n", end="\n\n", flush=True)


def table(rows: list[dict]) -> str:
    """Rows as aligned columns, what is alike in all said once; a single row as lines of name and value."""
    if len(rows) == 1:
        return "\n".join(f"  {name:>24}  {_say(name, value)}" for name, value in rows[0].items() if name not in HIDDEN)
    names = [name for name in dict.fromkeys(itertools.chain(*rows)) if name not in HIDDEN]
    common = [name for name in names if all(name in row and row[name] == rows[0][name] for row in rows)]
    said = "  " + ", ".join(f"{name} {_say(name, rows[0][name])}" for name in common)
    names = [name for name in names if name not in common]
    cells = [names] + [[_say(name, row.get(name)) for name in names] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  " + "  ".join(f"{c:>{w}}" for c, w in zip(line, widths, strict=True)) for line in cells]
    return "\n".join([said, *lines] if common else lines)


def _say(name: str, value) -> str:
    if value is None:
        return "–"
    if name.endswith("_bytes"):
        return f"{value / 2**20:,.0f} MiB"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def in_turns(ways: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each way measured, round by round; the order turns, so that no way always follows the same other."""
    measured = {way: [] for way in ways}
    for order in itertools.islice(orders(list(ways)), rounds):
        for way in order:
            measured[way].append(ways[way]())
    return measured


def orders(items: list) -> Iterator[list]:
    """The items in order, again starting with the second, and so on for ever."""
    for first in itertools.cycle(range(len(items))):
        yield items[first:] + items[:first]
