"""The table of a run's curve: what was logged put into it, a stretch that others go on from, and its bytes on disk."""

import io

import numpy as np
import pandas as pd

from etastar.observe import LOGS, Observe

LOGGED_COLUMNS = tuple(column for columns in LOGS.values() for column in columns)


def with_logged(frame: pd.DataFrame, logged: dict[int, dict[str, float]]) -> pd.DataFrame:
    """A curve, one row a step, with the columns of all logs: NaN but where `logged` has a number for (step, column)."""
    told = pd.DataFrame(logged, index=LOGGED_COLUMNS, dtype=np.float64).T.reindex(frame["step"])
    return frame.assign(**{column: told[column].to_numpy(np.float64) for column in LOGGED_COLUMNS})


def passed(chunk: pd.DataFrame, observe: Observe) -> pd.DataFrame:
    """A stretch of a curve as the runs have it that go on: of the state it ends with, what was not due is taken out.

    The last row of a stored stretch has every log, since a run may end there; a run that goes on must not tell who ended on its way.
    """
    if chunk.empty:
        return chunk
    step, batch_tokens = int(chunk.step.iloc[-1]), int(chunk.tokens.iloc[-1] // chunk.step.iloc[-1])
    undue = [column for log, columns in LOGS.items() if not observe.log_due(log, step, batch_tokens)
             for column in columns if column in chunk]
    chunk.loc[chunk.index[-1], undue] = np.nan
    return chunk


def parquet(frame: pd.DataFrame) -> bytes:
    """A table as the bytes of a parquet file."""
    buffer = io.BytesIO()
    frame.to_parquet(buffer, index=False)
    return buffer.getvalue()


def read_parquet(data: bytes) -> pd.DataFrame:
    """The table in the bytes of a parquet file."""
    return pd.read_parquet(io.BytesIO(data))
