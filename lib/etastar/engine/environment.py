"""The environment of a worker process: one thread, this very package, and memory that is kept for the next step."""

import os
from pathlib import Path

# A step frees every activation and asks for it again. By default glibc hands blocks of a megabyte back to the system, which
# clears each page on its way in: a tenth of a small model's step. These and large pages are for the GNU C library; others ignore them.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_TOP_PAD_": str(2**23)}


def one_thread_environment(compiled_code: Path | None = None) -> dict[str, str]:
    """Environment of a one-thread process; `compiled_code` is a folder where torch.compile keeps what it made.

    What the user set for the allocator or the compiler's cache stands.
    """
    one_thread = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    here = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    tunables = ":".join(filter(None, [os.environ.get("GLIBC_TUNABLES"), "glibc.malloc.hugetlb=1"]))
    cache = {} if compiled_code is None else {"TORCHINDUCTOR_CACHE_DIR": str(compiled_code.absolute())}
    return {**KEEP_MEMORY, **cache, **os.environ, **one_thread, "PYTHONPATH": here, "GLIBC_TUNABLES": tunables}
