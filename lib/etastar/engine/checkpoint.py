"""Tensors on disk: safetensors files written whole or not at all, checked by size and sha256 when read."""

import hashlib
import json
import os
import threading
from pathlib import Path

import torch
from safetensors.torch import load, save


class Damaged(ValueError):
    """A file of a store is shorter, longer or other than what was recorded; the message names the mend."""


def write_whole(path: Path, data: bytes) -> dict:
    """Write bytes through a temporary, flush them to the disk and rename; returns {"bytes", "sha256"}."""
    partial = path.with_name(f".{path.name}.{threading.get_native_id()}")
    with open(partial, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def read_whole(path: Path, recorded: dict) -> bytes:
    """The bytes of a file; raises Damaged where they are not the recorded ones."""
    check_size(path, recorded)
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != recorded["sha256"]:
        raise Damaged(f"{path} has sha256 {found[:12]}… but {recorded['sha256'][:12]}… was written; {MEND}")
    return data


def check_size(path: Path, recorded: dict) -> None:
    """Raise Damaged where a file is missing or not as long as recorded."""
    size = path.stat().st_size if path.exists() else None
    if size != recorded["bytes"]:
        found = "is missing" if size is None else f"has {size} bytes"
        raise Damaged(f"{path} {found}, but {recorded['bytes']} bytes were written; {MEND}")


MEND = "`etastar runs gc --damaged` sets it aside and the next run trains it again; no other run is touched"


def write_json(path: Path, body: dict) -> dict:
    """JSON through `write_whole`."""
    return write_whole(path, json.dumps(body, indent=1, sort_keys=True, allow_nan=False).encode())


def read_json(path: Path) -> dict:
    """A JSON object; raises Damaged where the file is not one."""
    try:
        body = json.loads(path.read_bytes())
    except (ValueError, OSError) as error:
        raise Damaged(f"{path} cannot be read as JSON ({error}); {MEND}") from None
    if not isinstance(body, dict):
        raise Damaged(f"{path} does not hold a JSON object; {MEND}")
    return body


def tensor_bytes(tensors: dict[str, torch.Tensor]) -> bytes:
    """A safetensors file; names sorted, tensors contiguous on the CPU."""
    return save({name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)})


def tensors_of(data: bytes) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file."""
    return load(data)


def state_tensors(params: dict, moments: dict, step: int) -> dict[str, torch.Tensor]:
    """One dictionary of a whole training state: parameters, optimizer moments, averages, and the step as a 0-d tensor."""
    return (
        {f"param/{name}": tensor for name, tensor in params.items()}
        | {name if name.startswith(AVERAGE) else f"optimizer/{name}": tensor for name, tensor in moments.items()}
        | {"step": torch.tensor(step)}
    )


AVERAGE = "average/"  # first part of the names of what is read out and never feeds back


def split_state(tensors: dict[str, torch.Tensor]) -> tuple[dict, dict, int]:
    """(parameters, moments, step) of `state_tensors`."""
    params = {name.removeprefix("param/"): t for name, t in tensors.items() if name.startswith("param/")}
    moments = {name.removeprefix("optimizer/"): t for name, t in tensors.items() if name.startswith(("optimizer/", AVERAGE))}
    return params, moments, int(tensors["step"])
