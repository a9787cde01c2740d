"""What has to be known to train a run again: versions, device, commit, corpus."""

import functools
import hashlib
import platform
import subprocess
from pathlib import Path

import numpy as np
import torch

import etastar
from etastar.recipe import Recipe


@functools.cache
def machine() -> dict:
    """Versions, device and commit of this installation."""
    return {
        "etastar": etastar.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "cpu": _cpu(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def provenance(recipe: Recipe) -> dict:
    """The machine, the corpus and the control array of one run."""
    lr = np.ascontiguousarray(recipe.lr(), dtype="<f8")
    return {**machine(), "corpus_fingerprint": recipe.corpus_fingerprint, "lr_sha256": hashlib.sha256(lr).hexdigest(),
            "threads": torch.get_num_threads()}


def _commit() -> str | None:
    try:
        told = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=Path(__file__).parent,
                              capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return told.stdout.strip() or None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
