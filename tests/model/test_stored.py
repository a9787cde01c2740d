"""Tensors of safetensors files: which file holds each, one read at a time and let go of, and what is damaged named."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from etastar.model.norms import operator_norms
from etastar.model.stored import StoredTensors, tensor_files


def in_shards(folder, tensors, index=True):
    """Each tensor in a file of its own, with an index or without."""
    folder.mkdir(exist_ok=True)
    for name, tensor in tensors.items():
        save_file({name: tensor}, folder / f"{name}.safetensors")
    if index:
        where = {name: f"{name}.safetensors" for name in tensors}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def test_tensors_of_one_file_of_shards_and_of_a_loose_folder_are_the_same(tmp_path):
    tensors = {name: torch.randn(4, 3 + i).to(dtype) for i, (name, dtype) in enumerate(
        {"a.weight": torch.float32, "b.weight": torch.bfloat16, "c": torch.float64}.items())}
    (tmp_path / "one").mkdir()
    save_file(tensors, tmp_path / "one" / "model.safetensors")
    for path in (tmp_path / "one", tmp_path / "one" / "model.safetensors", in_shards(tmp_path / "shards", tensors),
                 in_shards(tmp_path / "loose", tensors, index=False)):
        stored = StoredTensors(path)
        assert set(stored) == set(tensors) and len(stored) == 3
        assert stored.shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        assert all(torch.equal(stored[name], tensor) and stored[name].dtype == tensor.dtype for name, tensor in tensors.items())


def test_the_whole_file_goes_before_an_index_as_transformers_has_it(tmp_path):
    folder = in_shards(tmp_path / "both", {"a": torch.ones(2, 2)})
    save_file({"b": torch.ones(2, 2)}, folder / "model.safetensors")
    assert tensor_files(folder) == {"b": folder / "model.safetensors"}


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="no /proc/self/maps here")
def test_nothing_stays_mapped_but_what_somebody_holds(tmp_path):
    folder = in_shards(tmp_path / "shards", {name: torch.randn(64, 64) for name in "abc"})

    def mapped():
        return {name for name in "abc" if any(f"{folder / name}.safetensors" in line for line in open("/proc/self/maps"))}

    stored = StoredTensors(folder)
    assert mapped() == set()
    held, _ = stored["a"], stored["b"].sum()
    assert mapped() == {"a"} and held.shape == (64, 64)
    operator_norms(folder)
    assert mapped() == {"a"}


@pytest.mark.parametrize("index, match", [
    ("{", "model.safetensors.index.json is not JSON"), ("[]", "does not hold a JSON object"),
    ("{}", "does not map tensors to safetensors files beside it"),
    ('{"weight_map": {"a": "../a.safetensors"}}', "does not map tensors to safetensors files beside it"),
    ('{"weight_map": {"a": "pytorch_model.bin"}}', "does not map tensors to safetensors files beside it"),
    ('{"weight_map": {"a": "c.safetensors"}}', "lacks c.safetensors, which its index names"),
    ('{"weight_map": {"b": "a.safetensors"}}', "disagree on a in a.safetensors, b in a.safetensors"),
])
def test_an_index_that_is_not_that_of_its_shards_is_refused(index, match, tmp_path):
    in_shards(tmp_path, {"a": torch.ones(2, 2)})
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=match):
        tensor_files(tmp_path)


def test_a_damaged_file_is_named_with_its_size(tmp_path):
    file = in_shards(tmp_path, {"a": torch.ones(8, 8)}) / "a.safetensors"
    for damaged in (file.read_bytes()[:-1], b"version https://git-lfs.github.com/spec/v1\n", b""):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"a.safetensors \({len(damaged)} bytes\) is not a whole safetensors file"):
            operator_norms(tmp_path)
