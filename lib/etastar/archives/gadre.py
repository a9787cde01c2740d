"""Models of arXiv 2403.08540 (mlfoundations/scaling): over-trained decoders on C4, RedPajama and RefinedWeb, 11M to 6.9B parameters.

One file a model, with its hyper-parameters and its losses on eight validation sets. Any subset of the files can be read.
"""

import json
from pathlib import PurePosixPath

import pandas as pd

SEQUENCE_TOKENS = 2048
C4 = "c4_val"  # the paper's own measure of loss, on 174M tokens


def is_data(path: str) -> bool:
    """Whether a file of the repository is a model."""
    return path.startswith("exp_data/models/") and path.endswith(".json")


def read(paths: dict) -> pd.DataFrame:
    """One row a model: run, dataset, model, params, params_non_embedding, horizon_tokens, tokens_per_param, chinchilla_multiplier,
    peak_lr, floor_lr, weight_decay, warmup_steps, batch_sequences, batch_tokens, steps, final_loss.

    `params` include the embedding. `final_loss` is that on C4's validation set, nats per token (NaN where it was not evaluated).
    Batch and steps are NaN where the file tells a batch of 1, as those of the 7B models do. ValueError names a file and what it
    lacks.
    """
    return pd.DataFrame([_row(path, _load(path, at)) for path, at in sorted(paths.items())])


def read_evaluations(paths: dict) -> pd.DataFrame:
    """Every evaluation: run, dataset, params, horizon_tokens, validation_set, loss, low, high, low_tokens, high_tokens, sequences,
    tokens.

    Losses in nats per token. `low` and `high` are the published 95 % interval over sequences, the honest one; `low_tokens`,
    `high_tokens` that over tokens as if they were independent.
    """
    rows = []
    for path, at in sorted(paths.items()):
        body = _load(path, at)
        of = {"run": body["name"], "dataset": body["dataset_name"], "params": body["hyperparameters"]["params"],
              "horizon_tokens": body["hyperparameters"]["tokens"]}
        rows += [of | {"validation_set": _validation_set(found), "loss": found["loss"], "low": found["loss_sequences_lower_95"],
                       "high": found["loss_sequences_upper_95"], "low_tokens": found["loss_tokens_lower_95"],
                       "high_tokens": found["loss_tokens_upper_95"], "sequences": found["sequences"], "tokens": found["tokens"]}
                 for found in body["results"]]
    return pd.DataFrame(rows)


def _load(path: str, at) -> dict:
    with open(at) as file:
        body = json.load(file)
    wanted = {"hyperparameters": body, **dict.fromkeys(("model", "params", "params_no_embed", "tokens", "lr", "wd", "cd", "warmup",
                                                        "global_bs", "chinchilla_multiplier"), body.get("hyperparameters", {}))}
    lacking = [key for key in ("name", "dataset_name", "results") if key not in body] + [k for k, of in wanted.items() if k not in of]
    if lacking:
        raise ValueError(f"{path}: no {', '.join(lacking)} in it")
    return body


def _row(path: str, body: dict) -> dict:
    told = body["hyperparameters"]
    # The 7B files say 1 while their logged arguments, which contradict them in the rate too, say 2048: neither is used.
    batch_sequences = told["global_bs"] if told["global_bs"] > 1 else float("nan")
    batch_tokens = batch_sequences * SEQUENCE_TOKENS
    return {"run": body["name"], "dataset": body["dataset_name"], "model": PurePosixPath(told["model"]).stem, "params": told["params"],
            "params_non_embedding": told["params_no_embed"], "horizon_tokens": told["tokens"],
            "tokens_per_param": told["tokens"] / told["params"], "chinchilla_multiplier": told["chinchilla_multiplier"],
            "peak_lr": told["lr"], "floor_lr": told["cd"], "weight_decay": told["wd"], "warmup_steps": told["warmup"],
            "batch_sequences": batch_sequences, "batch_tokens": batch_tokens, "steps": told["tokens"] // batch_tokens,
            "final_loss": next((r["loss"] for r in body["results"] if _validation_set(r) == C4), float("nan"))}


def _validation_set(result: dict) -> str:
    """The folder that the evaluated shards lie in: c4_val, openlm, paloma_ptb and so on."""
    return PurePosixPath(result["val_data"][0]).parent.name
