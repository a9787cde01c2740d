"""Notebooks run headless and strictly: unknown parameters, failed cells and missing artefacts are errors."""

import ast
import contextlib
import json
import logging
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

HEADINGS = (
    "Question",
    "Claim",
    "Design",
    "Parameters",
    "Run",
    "Figure",
    "Interpretation",
    "Verdict",
    "What would change our mind",
)
MAX_CELL_LINES = 15
TRACEBACK_LINES = 12


class NotebookFailed(RuntimeError):
    """A cell raised, the kernel died, or a promised file was not written; the message says which and where to look."""


def repository_root() -> Path:
    """The checkout this package runs from; FileNotFoundError when it was installed without its notebooks."""
    root = Path(__file__).resolve().parents[2]
    if not ((root / "pyproject.toml").exists() and (root / "notebooks").is_dir()):
        raise FileNotFoundError(
            f"no notebooks beside {root}: etastar must be installed editable from its own checkout "
            "(`make setup`) to run them"
        )
    return root


def from_root(path) -> Path:
    """A path as a notebook means it: a relative one starts at the repository's root, wherever the kernel was started."""
    return Path(path) if Path(path).is_absolute() else repository_root() / path


def run_notebook(path, parameters: Mapping, out, expected_artefacts: Iterable = ()) -> Path:
    """Execute a copy of a notebook with the running interpreter, from the repository's root; returns the copy's path.

    `parameters` replace those of the cell tagged "parameters"; numpy values, paths and tuples become JSON. Each path of
    `expected_artefacts` must have been written by this run. The log stands beside `out`, ending in .log.
    Raises ValueError before anything runs for unknown names and values that are no JSON, NotebookFailed afterwards.
    """
    import papermill

    path, out = Path(path).resolve(), Path(out).resolve()
    known = check_parameters_cell(path)
    if unknown := sorted(set(parameters) - set(known)):
        raise ValueError(f"{path.name} has no parameter {', '.join(map(repr, unknown))}; it takes: {', '.join(known)}")
    given = {name: json_value(item, name) for name, item in parameters.items()}
    promised = [Path(item).resolve() for item in expected_artefacts]
    before = {item: _written(item) for item in promised}
    out.parent.mkdir(parents=True, exist_ok=True)
    log = out.with_suffix(".log")
    with _logging_to(log):
        try:
            papermill.execute_notebook(
                path,
                out,
                given,
                kernel_name="python3",
                language="python",
                cwd=repository_root(),
                log_output=True,
                progress_bar={"desc": path.stem, "leave": False} if sys.stderr.isatty() else False,
                kernel_manager_class=_this_interpreter(),
            )
        except papermill.PapermillExecutionError as error:
            raise NotebookFailed(_explain(path, bool(given), error, log)) from None
        except RuntimeError as error:
            raise NotebookFailed(
                f"{path.name}: the kernel stopped ({error}); too little memory is the usual cause. The log is {log}"
            ) from error
    stale = [str(item) for item in promised if _written(item) in (None, before[item])]
    if stale:
        raise NotebookFailed(f"{path.name} ran to its end without writing {', '.join(stale)}; see {out}")
    return out


def check_parameters_cell(path) -> dict:
    """Names and defaults of a notebook's parameters cell; ValueError unless it is one cell of literal assignments."""
    cells = [cell for cell in _read(path)["cells"] if "parameters" in cell["metadata"].get("tags", [])]
    if len(cells) != 1:
        raise ValueError(f'{Path(path).name} must have one cell tagged "parameters"; it has {len(cells)}')
    found = {}
    for statement in ast.parse(_source(cells[0])).body:
        targets = [statement.target] if isinstance(statement, ast.AnnAssign) else getattr(statement, "targets", [])
        try:
            (target,) = targets
            found[target.id] = json_value(ast.literal_eval(statement.value), target.id, exact=True)
        except (ValueError, AttributeError, TypeError):
            raise ValueError(
                f"{Path(path).name}: the parameters cell may hold only lines like `name = 3`, with "
                f"numbers, strings, None, lists or dicts; got `{ast.unparse(statement)}`"
            ) from None
    return found


def json_value(item, name: str, exact: bool = False):
    """A parameter as papermill can write it: numpy scalars, arrays, paths and tuples become plain values and lists.

    With `exact`, only what is plain already is let through. Raises ValueError naming the parameter for anything else.
    """
    if item is None or type(item) in (bool, int, float, str):
        return item
    if type(item) is list:
        return [json_value(part, name, exact) for part in item]
    if type(item) is dict and all(type(key) is str for key in item):
        return {key: json_value(part, name, exact) for key, part in item.items()}
    if not exact and isinstance(item, tuple | np.ndarray | np.generic):
        return json_value(list(item) if isinstance(item, tuple) else item.tolist(), name)
    if not exact and isinstance(item, Path):
        return str(item)
    raise ValueError(
        f"parameter {name!r} must be a number, a string, None, a list or a dict of those; "
        f"got {item!r} ({type(item).__name__})"
    )


def skeleton_problems(path) -> list[str]:
    """What is wrong with a committed notebook: headings, long cells, outputs, the parameters cell; [] when nothing."""
    book, problems = _read(path), []
    text = "\n".join(_source(cell) for cell in book["cells"] if cell["cell_type"] == "markdown")
    headings = [found.strip() for found in re.findall(r"^## (.+)$", text, flags=re.MULTILINE)]
    if headings != list(HEADINGS):
        problems.append(f"second-level headings are {headings}; they must be {list(HEADINGS)}")
    if not _source(book["cells"][0]).startswith("# "):
        problems.append("the first cell must open with a title")
    if "papermill" in book["metadata"]:
        problems.append("holds papermill metadata: an executed copy was committed")
    for number, cell in enumerate(book["cells"], 1):
        if cell["cell_type"] != "code":
            continue
        if (lines := len(_source(cell).splitlines())) > MAX_CELL_LINES:
            problems.append(f"cell {number} has {lines} lines; {MAX_CELL_LINES} are allowed")
        if cell["outputs"] or cell["execution_count"] is not None:
            problems.append(f"cell {number} was committed with its output")
    try:
        check_parameters_cell(path)
    except ValueError as error:
        problems.append(str(error))
    return problems


def _read(path) -> dict:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def _source(cell) -> str:
    return "".join(cell["source"])


def _written(path: Path):
    """Identity of what stands at a path now; None where nothing does."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _this_interpreter():
    """A kernel manager that starts this very interpreter, whatever kernels the user has registered as "python3"."""
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    class ThisInterpreter(AsyncKernelManager):
        @property
        def kernel_spec(self):
            return KernelSpec(
                argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
                display_name="Python 3",
                language="python",
            )

    return ThisInterpreter


@contextlib.contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    """papermill's log, the cells' output in it, to a file while the block runs."""
    logger, handler = logging.getLogger("papermill"), logging.FileHandler(path, mode="w", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate
        handler.close()


def _explain(path: Path, injected: bool, error, log: Path) -> str:
    """Where a notebook failed, counted in the notebook's own cells, and the last lines of why."""
    tagged = [i for i, cell in enumerate(_read(path)["cells"]) if "parameters" in cell["metadata"].get("tags", [])][0]
    number = error.cell_index + 1 - (injected and error.cell_index > tagged)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error.traceback)).strip().splitlines()
    tail = "\n".join(f"    {line}" for line in plain[-TRACEBACK_LINES:])
    head = f"{path.name}, cell {number} (In [{error.exec_count}]) failed: {error.ename}: {error.evalue}"
    return f"{head}\n{tail}\nThe whole traceback is in {log}"
