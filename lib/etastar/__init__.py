"""etastar (η*, the optimal learning rate): re-tests what the learning-rate papers claim, on your own hardware."""

import importlib

__version__ = "0.1.0"

_PUBLIC = {
    "recipe": ("Recipe", "Model", "Mixture", "Corpus", "AdamW", "ScheduleFreeAdamW", "Scion", "SP", "MuP", "CompleteP", "UnitNorm",
               "Execution"),
    "transfer": ("transfer",),
    "coordinates": ("coordinate_check", "measure_coordinates", "judge_coordinates"),
    "schedules": ("Constant", "Cosine", "WSD", "LinearToZero", "MultiStep", "InverseSqrt", "Power", "Branch", "Table"),
    "torch_schedule": ("to_lambda_lr",),
    "observe": ("Observe",),
    "model.norms": ("operator_norms",),
    "optim.distributed_scion": ("ScionOptimizer", "scion_groups"),
    "engine.execute": ("run",),
    "engine.run": ("Run", "find_run"),
    "engine.between": ("loss_between",),
    "analysis.bowl": ("fit_bowl", "Bowl", "EdgeOptimum"),
    "analysis.paired": ("compare",),
    "analysis.board": ("verdicts",),
    "analysis.power_law": ("fit_power_law",),
    "analysis.loss_law": ("fit_loss_law",),
    "analysis.valley": ("fit_valley",),
    "analysis.designed_schedule": ("design_schedule", "design_from_curves"),
    "analysis.laws": ("laws", "recommend", "LawWarning"),
    "analysis.read_runs": ("read_runs",),
    "archives": ("archive",),
    "hub.checkpoints": ("fetch_checkpoint",),
    "hub.folders": ("load_checkpoint",),
    "hub.export": ("export",),
    "hub.push": ("push",),
    "hub.perplexity": ("perplexity",),
    "hub.evaluate": ("evaluate",),
    "hub.measure": ("checkpoint_norms", "power_law_says"),
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    """Public names are imported when first used, so that `import etastar` is quick and pulls in no torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'etastar' has no attribute {name!r}")
    found = getattr(importlib.import_module(f"etastar.{_HOME[name]}"), name)
    globals()[name] = found
    return found


def __dir__():
    return __all__
