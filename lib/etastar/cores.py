"""How many cores this process may really use: affinity and a container's quota both count."""

import os
from pathlib import Path


def cores() -> int:
    """Whole cores for workers: those of the affinity mask, fewer where a container's quota is smaller; at least one."""
    allowed, quota = affinity_cores(), cgroup_cores()
    return max(1, min(allowed, int(quota)) if quota else allowed)


def affinity_cores() -> int:
    """Cores of the affinity mask."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cgroup_cores(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Cores' worth of time a container may use; None where nothing limits it."""
    try:
        if (root / "cpu.max").exists():
            quota, period = (root / "cpu.max").read_text().split()
        else:
            quota = (root / "cpu/cpu.cfs_quota_us").read_text()
            period = (root / "cpu/cpu.cfs_period_us").read_text()
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError):
        return None
