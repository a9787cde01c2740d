"""Another program that takes a core, as a browser or a second job does."""

import contextlib
import subprocess
import sys


@contextlib.contextmanager
def busy_core():
    """One process that computes without end while the block runs."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()
