"""Checkpoints measured without being run: norms streamed in little memory; what the Power law says, against the paper's numbers."""

import json
import os
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from etastar.hub.measure import checkpoint_norms, power_law_says
from etastar.model.norms import operator_norms

MIB = 2**20
PEAK = """
import re, sys, torch
torch.set_num_threads(1)
import etastar.model.norms
from etastar.hub.measure import checkpoint_norms
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) * 1024
before = peak()
rows = len(checkpoint_norms(sys.argv[1]))
print(rows, before, peak())
"""  # ru_maxrss will not do: it is at least what the parent had when it started this process
has_proc = pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="no /proc/self/status here")


def granite_shapes(width: int, ffn_width: int, layers: int, vocab: int) -> dict[str, tuple[int, int]]:
    """A dense granite's matrices, the head tied."""
    layer = {f"self_attn.{n}_proj": (width, width) for n in "qkvo"} | {f"mlp.{n}_proj": (ffn_width, width) for n in ("gate", "up")}
    layer |= {"mlp.down_proj": (width, ffn_width)}
    shapes = {f"model.layers.{i}.{name}.weight": shape for i in range(layers) for name, shape in layer.items()}
    return {"model.embed_tokens.weight": (vocab, width)} | shapes


def write_bf16(path, shapes) -> int:
    """A safetensors file of small random bf16 entries, written in pieces; returns its bytes."""
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 2 * shape[0] * shape[1]
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    words = json.dumps(header).encode()
    words += b" " * (-len(words) % 8)
    drawn = (torch.randn(2**21 - 1, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16().view(torch.int16).numpy().tobytes()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(words)) + words)
        for start in range(0, at, len(drawn)):
            file.write(drawn[: at - start])
    return path.stat().st_size


def peak_bytes(path) -> tuple[int, int, int]:
    """(rows, peak before, peak after) of a process of its own that measures a checkpoint."""
    told = subprocess.run([sys.executable, "-c", PEAK, str(path)], capture_output=True, text=True, check=True).stdout
    rows, before, after = (int(word) for word in told.split())
    return rows, before, after


@has_proc
def test_memory_is_that_of_the_largest_tensor_not_of_the_file(tmp_path):
    """480 matrices of half a MiB each; all of them mapped at once would show as such."""
    size = write_bf16(tmp_path / "model.safetensors", {f"layers.{i}.up.weight": (8192, 32) for i in range(480)})
    rows, before, after = peak_bytes(tmp_path)
    assert size > 239 * MIB and rows == 480
    assert after - before < 160 * MIB


@has_proc
@pytest.mark.slow
def test_a_3b_checkpoint_is_measured_in_2_gb(tmp_path):
    """PowerLM-3B's matrices, in bf16, ten of its forty layers: all mapped at once they would be more than the file."""
    size = write_bf16(tmp_path / "model.safetensors", granite_shapes(width=2304, ffn_width=9216, layers=10, vocab=49_152))
    rows, before, after = peak_bytes(tmp_path)
    assert size > 1800 * MIB and rows == 2 + 10 * 7
    assert after < 2e9 and after - before < size * 0.6


def test_norms_are_those_of_the_tensors_and_layers_are_numbered(tmp_path):
    drawn = torch.Generator().manual_seed(4)
    shapes = granite_shapes(width=24, ffn_width=40, layers=12, vocab=50) | {"lm_head.weight": (50, 24)}
    tensors = {name: torch.randn(shape, generator=drawn) for name, shape in shapes.items()}
    names = list(tensors)
    for part, some in enumerate((names[:30], names[30:])):
        save_file({name: tensors[name] for name in some}, tmp_path / f"part-{part}.safetensors")
    index = {"weight_map": {name: f"part-{int(i >= 30)}.safetensors" for i, name in enumerate(names)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    found = checkpoint_norms(tmp_path).set_index("name")
    for name in ("model.layers.11.mlp.down_proj.weight", "model.layers.3.self_attn.q_proj.weight"):
        told = found.loc[name]
        matrix = tensors[name].double().numpy()
        assert told["norm"] == pytest.approx(np.linalg.norm(matrix, 2) * (matrix.shape[1] / matrix.shape[0]) ** 0.5, rel=1e-9)
    head = tensors["lm_head.weight"].double().numpy()
    assert found.loc["lm_head.weight", "norm"] == pytest.approx(np.linalg.norm(head, axis=1).max() * 24**0.5)
    assert found.loc["model.layers.11.mlp.down_proj.weight", "layer"] == 11 and found["layer"].isna().sum() == 2
    assert found.drop(columns="layer").equals(operator_norms(tmp_path).set_index("name").loc[found.index])


def test_every_expert_of_a_granitemoe_has_the_norms_of_its_own_matrices(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(6)
    transformers.GraniteMoeForCausalLM(transformers.GraniteMoeConfig(
        vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=20,
        max_position_embeddings=16, num_local_experts=5, num_experts_per_tok=2, initializer_range=0.1,
        tie_word_embeddings=True)).save_pretrained(tmp_path)
    tensors = {name: tensor.double().numpy() for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    found = checkpoint_norms(tmp_path).set_index(["name", "part", "slot", "role"]).sort_index()
    assert len(found) == 2 + 2 * (4 + 1 + 5 * 3) and (found["shape"] != (40, 24)).all()
    moe = "model.layers.1.block_sparse_moe"
    for expert in range(5):
        gate_up, back = tensors[f"{moe}.input_linear.weight"][expert], tensors[f"{moe}.output_linear.weight"][expert]
        for part, matrix in (("gate", gate_up[:20]), ("up", gate_up[20:]), ("", back)):
            name = f"{moe}.output_linear.weight" if matrix is back else f"{moe}.input_linear.weight"
            told, (out, into) = found.loc[(name, part, expert, "hidden")], matrix.shape
            assert told["shape"] == (out, into) and told["layer"] == 1
            assert told["norm"] == told["rms_to_rms"] == pytest.approx(np.linalg.norm(matrix, 2) * (into / out) ** 0.5, rel=1e-9)
            assert told["rms_to_inf"] == pytest.approx(np.linalg.norm(matrix, axis=1).max() * into**0.5, rel=1e-12)
    router = tensors[f"{moe}.router.layer.weight"]
    assert router.shape == (5, 24)
    told = found.loc[(f"{moe}.router.layer.weight", "", 0, "hidden")]
    assert told["spectral"] == pytest.approx(np.linalg.norm(router, 2), rel=1e-9)
    assert found.loc[("model.embed_tokens.weight", "", 0)].index.tolist() == ["embedding", "output"]


def test_what_is_no_checkpoint_is_refused_and_a_pickle_never_opened(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    with pytest.raises(ValueError, match="no safetensors file and no folder of any"):
        checkpoint_norms(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a.weight": "part-1.safetensors"}}')
    with pytest.raises(ValueError, match="lacks part-1.safetensors, which its index names"):
        checkpoint_norms(tmp_path)
    save_file({"a.weight": torch.ones(64, 64)}, tmp_path / "part-1.safetensors")
    whole = (tmp_path / "part-1.safetensors").read_bytes()
    (tmp_path / "part-1.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"part-1.safetensors \(16,364 bytes\) is not a whole safetensors file"):
        checkpoint_norms(tmp_path)


def test_the_power_law_says_what_the_paper_prints():
    """arXiv 2408.13359: η = 0.0011 for a batch of 1024 sequences and 10T tokens (§3.2); the law itself, Eq. 5."""
    assert power_law_says(1024 * 4096, 10e12).wsd_peak_lr == pytest.approx(0.0011, abs=5e-5)
    lm = power_law_says(1024 * 4096, 1.25e12, cooldown_fraction=0.2)
    assert lm.wsd_peak_lr == pytest.approx(1024 * 4.6 * 1.25e12**-0.51, rel=1e-12) and lm.low < lm.wsd_peak_lr < lm.high
    assert lm.schedule_lr == pytest.approx(1024 * 4 * 1e12**-0.51, rel=1e-12)
    assert 1024 * 4 * lm.cap_until_tokens**-0.51 == pytest.approx(0.02, rel=1e-9)
    assert any("horizon_tokens" in sentence for sentence in lm.warnings) and any("batch_sequences" in sentence for sentence in lm.warnings)
    doubled = power_law_says(2 * 1024 * 4096, 1.25e12, cooldown_fraction=0.2)
    assert doubled.wsd_peak_lr == pytest.approx(2 * lm.wsd_peak_lr) and doubled.schedule_lr == pytest.approx(2 * lm.schedule_lr)
    assert power_law_says(512 * 4096, 1e9).schedule_lr == 0.02  # at its cap


@pytest.mark.parametrize("given, said", [((0, 1e9), "batch_tokens=0"), ((1e6, float("nan")), "horizon_tokens=nan"),
                                         ((1e9, 1e6), "more than the horizon"), ((1e6, 1e9, 1.0), "cooldown_fraction")])
def test_what_the_law_cannot_be_asked_is_refused(given, said):
    with pytest.raises(ValueError, match=said):
        power_law_says(*given)
