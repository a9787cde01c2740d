"""torch.compile for shapes that come and go in one process."""

import types
from collections.abc import Callable

import torch


def compiled_alone(function: Callable) -> Callable:
    """`function` compiled for fixed shapes, apart from all other compilations of it; what was compiled is freed with the result.

    torch counts the compilations of a code object, and after eight of them goes on uncompiled and says so in a log only: a
    process that trains a ninth shape would compute other bits than its recipe says. So the code object is a copy.
    """
    copy = types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__,
                              function.__closure__)
    return torch.compile(copy, dynamic=False)
