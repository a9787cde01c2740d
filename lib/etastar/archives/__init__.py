"""Published run logs as tables: `archive(name)` is one tidy frame, `curves(name)` the curves behind it.

Nothing is downloaded unless asked for; `etastar fetch archives` brings the files, ETASTAR_MIRROR names a folder of them.
"""

import importlib

import pandas as pd

from etastar.archives.fetch import Fetched, Located, NotFetched, fetch_archives, locate
from etastar.archives.manifest import Archive, find_archive, load_manifest

__all__ = ["Archive", "Fetched", "Located", "NotFetched", "archive", "bootstrap", "curves", "evaluations", "fetch_archives",
           "load_manifest", "locate"]

READERS = ("haegele", "multi_power_law", "steplaw", "steplaw_moe", "gadre", "chinchilla")


def archive(name: str, download: bool = False) -> pd.DataFrame:
    """The runs of a published archive; the readers' docstrings name the columns.

    .attrs: source, commit, licence, paper and `missing`, the listed files that are not on this machine. `download` fetches
    these first. Raises NotFetched where no file is here, ValueError for names that are unknown or have no reader yet.
    """
    return _read(name, "read", download)


def curves(name: str, download: bool = False, **choice) -> pd.DataFrame:
    """The long curves of a published archive, one row a logged step; arguments are those of the reader's `read_curves`."""
    return _read(name, "read_curves", download, **choice)


def evaluations(name: str, download: bool = False) -> pd.DataFrame:
    """Every evaluation of a published archive's runs on the full validation set; ValueError where its reader knows none."""
    return _read(name, "read_evaluations", download)


def bootstrap(name: str, download: bool = False) -> pd.DataFrame:
    """The bootstrap coefficients that a published archive holds of its own fit; ValueError where its reader knows none."""
    return _read(name, "read_bootstrap", download)


def _read(name, how, download, **choice):
    found = find_archive(name)
    if name not in READERS:
        raise ValueError(f"archive {name} has no reader in this version (there are {', '.join(READERS)}); its files can be fetched")
    reader = importlib.import_module(f"etastar.archives.{name}")
    if not hasattr(reader, how):
        raise ValueError(f"archive {name} has no {how.removeprefix('read_')}")
    if download:
        problems = [f for f in fetch_archives([name]) if not f.here]
        why = problems[0].reason if problems else ""
    else:
        why = "nothing in ETASTAR_MIRROR or the cache"
    here = locate(found)
    if not any(reader.is_data(path) for path in here.paths):
        raise NotFetched(name, why)
    frame = getattr(reader, how)({p: at for p, at in here.paths.items() if reader.is_data(p)}, **choice)
    frame.attrs |= {"source": found.source, "commit": found.commit, "licence": found.licence, "paper": found.paper,
                    "missing": list(here.missing)}
    return frame
