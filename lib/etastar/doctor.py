"""What this machine has, whether it is set up as locked, and how runs will be executed on it, with reasons."""

import importlib.metadata
import json
import os
import platform
import re
import shutil
import sys
import time
from pathlib import Path

from etastar.cache import cache_folder

LEAST_FREE_GB = 5
GEMM_SIDE = 512
GB_A_WORKER = 0.8
MEND = {"store": "choose another with --store", "cache": "choose another with ETASTAR_CACHE"}
LONG_SWEEP_TOKENS = 200_000_000  # an hour or so of the small shape that is timed
SLOW_GEMM_GFLOPS = 20  # a core below this is shared, throttled, or has no vector units worth the name


def doctor(store=None, measure: bool = False) -> dict:
    """Facts about this machine as JSON; takes about two seconds, one of them a matrix product on one thread.

    Keys: python, torch, packages, cpu, gpu, gemm_gflops (one thread, fp32), compiler, folders, corpora, execution (what
    the engine does here by default, and why) and warnings, each of which says how to mend it. With `measure` also ways:
    how fast a small shape trains in each way of computing it, and which `execution="auto"` would take for a long sweep.
    """
    import torch

    found = {
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "torch": {"version": torch.__version__, "cuda_build": torch.version.cuda},
        "packages": _packages(_lock_file()),
        "cpu": _cpu(),
        "gpu": _gpu(torch),
        "gemm_gflops": _gemm_gflops(torch),
        "compiler": shutil.which(os.environ.get("CXX", "")) or shutil.which("g++") or shutil.which("clang++"),
        "folders": {"store": _folder(Path(store or "runs")), "cache": _folder(cache_folder())},
        "corpora": _corpora(),
    }
    found["execution"] = _execution(found)
    if measure:
        found["ways"] = _ways()
    found["warnings"] = _warnings(found)
    return found


def format_doctor(found: dict) -> str:
    """The facts as lines to read."""
    packages, cpu, gpu = found["packages"], found["cpu"], found["gpu"]
    differing = len(packages["differing"]) + len(packages["missing"])
    locked = (
        f"{packages['locked']} locked, {differing or 'none'} differing or missing"
        if packages["locked"]
        else "no lock found"
    )
    memory = f"{cpu['memory_gb']:.1f} GB of memory" if cpu["memory_gb"] else "memory unknown"
    lines = {
        "python": f"{found['python']['version']} ({found['python']['executable']})",
        "torch": f"{found['torch']['version']}, "
        + (f"CUDA {found['torch']['cuda_build']}" if found["torch"]["cuda_build"] else "CPU only"),
        "packages": locked,
        "cpu": f"{cpu['model']}; {cpu['cores']:g} of {cpu['cores_of_machine']} cores for us, {memory}",
        "gpu": f"{gpu['name']}, {gpu['memory_gb']:.0f} GB" if gpu else "none",
        "speed": f"{found['gemm_gflops']:.0f} GFLOP/s, fp32 matrix product on one thread",
        "compiler": found["compiler"] or "none (only torch.compile would need one)",
        **{name: _say_folder(folder) for name, folder in found["folders"].items()},
        "corpora": ", ".join(
            f"{c['source']} vocab {c['vocab']}: {c['train_tokens'] / 1e6:.1f}M tokens" for c in found["corpora"]
        )
        or "none tokenized yet (done on first use)",
        "execution": "{workers} workers of {threads} thread, {device}, {precision}, {mode}".format(
            **found["execution"]
        ),
    }
    text = [f"{name:>10}  {line}" for name, line in lines.items()]
    text += [f"{'':>10}  because {reason}" for reason in found["execution"]["reasons"]]
    text += _say_ways(found.get("ways", []))
    text += [f"{'warning':>10}  {warning}" for warning in found["warnings"]] or [f"{'warnings':>10}  none"]
    return "\n".join(text)


def locked_versions(lock: Path) -> dict[str, str]:
    """Package → exact version that a lock names for the running Python."""
    wanted = {}
    for line in lock.read_text(encoding="utf-8").splitlines():
        requirement, _, marker = line.partition("#")[0].partition(";")
        since = re.search(r'python_version >= "3\.(\d+)"', marker)
        if requirement.strip() and not (since and sys.version_info < (3, int(since[1]))):
            name, version = requirement.strip().split("==")
            wanted[name] = version
    return wanted


def _lock_file() -> Path:
    return Path(__file__).resolve().parents[2] / "requirements.lock"


def _packages(lock: Path) -> dict:
    """How many packages are locked, and those installed otherwise; a local build tag (2.13.0+cpu) does not count."""
    wanted = locked_versions(lock) if lock.exists() else {}
    installed = {re.sub(r"[-_.]+", "-", d.name).lower(): d.version for d in importlib.metadata.distributions()}
    differing = {
        name: {"locked": version, "installed": installed[name]}
        for name, version in wanted.items()
        if name in installed and installed[name].split("+")[0] != version
    }
    return {"locked": len(wanted), "differing": differing, "missing": sorted(set(wanted) - set(installed))}


def _cpu() -> dict:
    from etastar.cores import affinity_cores, cgroup_cores, cores
    from etastar.engine.provenance import machine

    allowed = affinity_cores()
    quota = cgroup_cores()
    return {
        "model": machine()["cpu"],
        "cores_of_machine": os.cpu_count(),
        "cores_by_affinity": allowed,
        "cores_by_cgroup": quota,
        "cores": cores(),
        "memory_gb": _memory_gb(),
    }


def _memory_gb() -> float | None:
    """Memory this process may use: the machine's, or its container's limit."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None
    for limit in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        try:
            total = min(total, int(limit.read_text()))
        except (OSError, ValueError):
            continue
    return total / 1e9


def _gpu(torch) -> dict | None:
    if not torch.cuda.is_available():
        return None
    told = torch.cuda.get_device_properties(0)
    return {
        "name": told.name,
        "memory_gb": told.total_memory / 1e9,
        "count": torch.cuda.device_count(),
        "capability": f"{told.major}.{told.minor}",
    }


def _gemm_gflops(torch, seconds: float = 1.0) -> float:
    """The best of many square fp32 matrix products on one thread."""
    threads, best = torch.get_num_threads(), float("inf")
    a, b = torch.randn(2, GEMM_SIDE, GEMM_SIDE, generator=torch.Generator().manual_seed(0))
    torch.set_num_threads(1)
    try:
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            began = time.perf_counter()
            torch.mm(a, b)
            best = min(best, time.perf_counter() - began)
    finally:
        torch.set_num_threads(threads)
    return 2 * GEMM_SIDE**3 / best / 1e9


def _folder(path: Path) -> dict:
    """A folder that exists or is going to: room and permission, asked of the nearest parent that exists."""
    path = path.expanduser().absolute()
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    return {
        "path": str(path),
        "exists": path.exists(),
        "writable": there.is_dir() and os.access(there, os.W_OK | os.X_OK),
        "free_gb": shutil.disk_usage(there).free / 1e9,
    }


def _corpora() -> list[dict]:
    """The tokenized corpora in the cache, each with its size."""
    found = []
    for path in sorted((cache_folder() / "corpora").glob("[!.]*/meta.json")):
        try:
            meta = json.loads(path.read_text())
            found.append(
                {
                    "source": meta["corpus"]["source"],
                    "vocab": meta["corpus"]["vocab"],
                    "train_tokens": meta["bytes"]["train.bin"] // 2,
                    "path": str(path.parent),
                }
            )
        except (ValueError, KeyError):
            found.append(
                {"source": "damaged, built again on use", "vocab": 0, "train_tokens": 0, "path": str(path.parent)}
            )
    return found


def _execution(found: dict) -> dict:
    """What the engine does here when it is told nothing else."""
    from etastar.cores import cores
    from etastar.recipe import Execution

    usual = Execution()
    told = {"precision": usual.precision, "mode": "compiled" if usual.compiled else "eager", "threads": 1}
    if found["gpu"]:
        return told | {
            "device": "cuda",
            "workers": 1,
            "reasons": [
                "preset auto is gpu where torch sees one: a single process trains a stack of runs in step"
            ],
        }
    return told | {
        "device": "cpu",
        "workers": cores(),
        "reasons": [
            f"torch sees no GPU, and on {cores()} cores one-thread processes train small runs fastest",
            "threads of one process that share a core with other work slow each other down many times over",
            "eager fp32 has the same bits in a branch and in its straight run, and costs no compilation",
        ],
    }


def _ways() -> list[dict]:
    """The ways of computing a small shape, timed with all cores at work; compilation is asked too."""
    from etastar.cores import cores
    from etastar.engine.tuning import choose
    from etastar.recipe import SP, AdamW, Corpus, Model, Recipe
    from etastar.schedules import Constant

    corpus = Corpus("synthetic", vocab=1024, options=(("tokens", 2_000_000), ("validation_tokens", 65_536)))
    recipe = Recipe(model=Model(width=64, depth=2, head_dim=32, context=64, tied=False), corpus=corpus, optimizer=AdamW(),
                    schedule=Constant(), peak_lr=1e-3, batch_tokens=2048, horizon_tokens=2048, parametrization=SP(init_std=0.1))
    table = choose(recipe, LONG_SWEEP_TOKENS, cores()).table
    return json.loads(table.to_json(orient="records"))


def _say_ways(ways: list[dict]) -> list[str]:
    lines = []
    for way in ways:
        how = "compiled" if way["compiled"] else "eager"
        how += f", parts of {way['micro_batch_sequences']:g} sequences" if way["micro_batch_sequences"] else ", whole batch"
        how += f", {way['slots']} runs a worker" if way["slots"] > 1 else ""
        lines.append(f"{'way':>10}  {how}: {way['tokens_per_s']:,.0f} tokens/s, {way['start_s']:.0f} s to start"
                     + (' ← what execution="auto" takes for an hour of this shape' if way["chosen"] else ""))
    return lines


def _warnings(found: dict) -> list[str]:
    packages, cpu, workers = found["packages"], found["cpu"], found["execution"]["workers"]
    told = []
    wrong = [f"{name} {v['installed']} (locked {v['locked']})" for name, v in packages["differing"].items()]
    wrong += [f"{name} missing" for name in packages["missing"]]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        told.append(f"not as locked: {', '.join(wrong[:5])}{more}; results may differ. `make setup` installs the lock")
    if cpu["memory_gb"] and cpu["memory_gb"] < workers * GB_A_WORKER:
        told.append(
            f"{cpu['memory_gb']:.1f} GB of memory is little for {workers} workers; "
            f"give --workers {max(1, int(cpu['memory_gb'] / GB_A_WORKER))}"
        )
    if found["gemm_gflops"] < SLOW_GEMM_GFLOPS:
        told.append(
            f"one thread reaches only {found['gemm_gflops']:.0f} GFLOP/s: the core is slow or shared; "
            "expect longer times than the presets state"
        )
    if not found["gpu"] and shutil.which("nvidia-smi"):
        told.append("an NVIDIA driver is here but torch sees no GPU; install a CUDA build of torch to use it")
    for name, folder in found["folders"].items():
        if not folder["writable"]:
            told.append(f"{name} folder {folder['path']} cannot be written; {MEND[name]}")
        elif folder["free_gb"] < LEAST_FREE_GB:
            told.append(f"only {folder['free_gb']:.1f} GB free for {name} folder {folder['path']}; {MEND[name]}")
    return told


def _say_folder(folder: dict) -> str:
    state = ("" if folder["writable"] else "NOT writable, ") + ("" if folder["exists"] else "not made yet, ")
    return f"{folder['path']} ({state}{folder['free_gb']:.0f} GB free)"
