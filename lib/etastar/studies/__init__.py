"""Floor 4: one file a finding. Each offers recipes(preset), measure(runs), judge(measurements), figures(measurements)."""

import importlib
from types import ModuleType

STUDIES = {"01_cosine_vs_wsd": "cosine_vs_wsd", "02_cooldown": "cooldown", "03_averaging": "averaging",
           "04_power_laws": "power_laws", "05_norm_transfer": "norm_transfer", "06_mup_vs_fitting": "mup_vs_fitting",
           "07_released_checkpoints": "released_checkpoints"}
PRESETS = ("smoke", "cpu", "night", "gpu", "paper")


def find_study(name: str) -> ModuleType:
    """The module of a study by its notebook's stem, with or without the number; ValueError lists the known."""
    for stem, module in STUDIES.items():
        if name in (stem, module, stem.split("_")[0]):
            return importlib.import_module(f"etastar.studies.{module}")
    raise ValueError(f"unknown study {name!r}; known: all, {', '.join(STUDIES)}")


def resolve_preset(name: str) -> str:
    """The preset itself, with "auto" turned into "gpu" where there is one and "cpu" elsewhere; ValueError otherwise."""
    if name == "auto":
        import torch

        return "gpu" if torch.cuda.is_available() else "cpu"
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; known: auto, {', '.join(PRESETS)}")
    return name
