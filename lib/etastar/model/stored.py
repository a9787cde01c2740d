"""Tensors of safetensors files by name, one read at a time and nothing left open, so that a model of any size fits in little memory."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


class StoredTensors(Mapping):
    """The tensors of a file or folder by name, mapped from their file while somebody holds them; `shapes` and `dtypes` ("F32") as the
    headers have them.

    A file is opened anew for every tensor: pages of a map that were read count as this process's memory until the whole map is closed.
    """

    def __init__(self, path: Path):
        self.files = tensor_files(path)
        self.shapes, self.dtypes = {}, {}
        for file in dict.fromkeys(self.files.values()):
            with opened(file) as tensors:
                told = {name: tensors.get_slice(name) for name in tensors.keys()}
                self.shapes |= {name: tuple(one.get_shape()) for name, one in told.items()}
                self.dtypes |= {name: one.get_dtype() for name, one in told.items()}

    def __getitem__(self, name: str) -> torch.Tensor:
        with opened(self.files[name]) as tensors:
            return tensors.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


def tensor_files(path: Path) -> dict[str, Path]:
    """The file of each tensor of a safetensors file, or of a folder: its model.safetensors, else the shards of its index, else all.

    Raises ValueError for a damaged file, a shard that is missing or is not what the index says, and where there is no safetensors file;
    files of other kinds are never opened.
    """
    if path.is_file() or (path / WEIGHTS).is_file():
        return _held([path if path.is_file() else path / WEIGHTS])
    if (path / INDEX).is_file():
        return _of_index(path)
    if not (files := sorted(path.glob("*.safetensors"))):
        raise ValueError(f"{path} is no safetensors file and no folder of any; give the folder of a checkpoint, or one of its files")
    return _held(files)


def opened(file: Path):
    """An open safetensors file; ValueError where it is damaged."""
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} ({file.stat().st_size:,} bytes) is not a whole safetensors file: {error}; fetch it again (a few hundred "
                         "bytes are git-lfs's note of a file, not the weights)") from None


def json_object(file: Path) -> dict:
    """The object in a JSON file; ValueError where there is none."""
    try:
        body = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}); fetch it again") from None
    if not isinstance(body, dict):
        raise ValueError(f"{file} does not hold a JSON object; fetch it again")
    return body


def listed(names: list[str]) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _held(files: list[Path]) -> dict[str, Path]:
    held = {}
    for file in files:
        with opened(file) as tensors:
            held |= dict.fromkeys(tensors.keys(), file)
    return held


def _of_index(folder: Path) -> dict[str, Path]:
    places = json_object(folder / INDEX).get("weight_map")
    shards = sorted(set(places.values())) if isinstance(places, dict) and all(isinstance(s, str) for s in places.values()) else None
    if not shards or any(Path(shard).name != shard or not shard.endswith(".safetensors") for shard in shards):
        raise ValueError(f"{folder / INDEX} does not map tensors to safetensors files beside it; fetch it again")
    if missing := [shard for shard in shards if not (folder / shard).is_file()]:
        raise ValueError(f"{folder} lacks {listed(missing)}, which its index names; fetch the whole checkpoint again")
    held = {(name, shard) for shard in shards for name in _held([folder / shard])}
    if unlike := sorted(held ^ set(places.items())):
        raise ValueError(f"{folder}: {INDEX} and its shards disagree on {listed([f'{name} in {shard}' for name, shard in unlike])}; "
                         "fetch the checkpoint again")
    return {name: folder / shard for name, shard in places.items()}
