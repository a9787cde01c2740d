"""Folders that transformers wrote, in our decoder: the same logits, and a clear word for what is not whole or not ours."""

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from etastar.hub.folders import load_checkpoint
from etastar.model.granite import granite_config, to_granite_state
from etastar.model.parametrization import Scalars
from etastar.model.shapes import parameter_shapes
from etastar.recipe import Model

transformers = pytest.importorskip("transformers")

DENSE = dict(vocab_size=101, hidden_size=48, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2, intermediate_size=80,
             max_position_embeddings=24, rms_norm_eps=1e-5, embedding_multiplier=11.3, residual_multiplier=0.22,
             attention_multiplier=0.0371, logits_scaling=6.5, initializer_range=0.1, bos_token_id=0, eos_token_id=0,
             rope_parameters={"rope_theta": 500.0, "rope_type": "default"})
MIXTURE = DENSE | dict(intermediate_size=40, num_local_experts=7, num_experts_per_tok=3)
KINDS = {f"{kind} {head}": (model, config, body | {"tie_word_embeddings": head == "tied"}) for head in ("tied", "untied")
         for kind, model, config, body in (("dense", transformers.GraniteForCausalLM, transformers.GraniteConfig, DENSE),
                                           ("mixture", transformers.GraniteMoeForCausalLM, transformers.GraniteMoeConfig, MIXTURE))}


def saved(folder: Path, kind="dense tied", **options):
    """A random model of transformers, written by it."""
    model, config, body = KINDS[kind]
    torch.manual_seed(5)
    theirs = model(config(**body)).eval()
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if "norm" in name:
                weight.mul_(torch.rand_like(weight) + 0.5)  # gains that are not all one
    theirs.save_pretrained(folder, **options)
    return theirs


def changed(folder: Path, **config):
    """The folder, with other entries of its config.json; None leaves an entry out."""
    path = folder / "config.json"
    body = json.loads(path.read_text()) | config
    path.write_text(json.dumps({key: value for key, value in body.items() if value is not None}))
    return folder


def rewritten(folder: Path, **tensors):
    """The folder, with other tensors in its file; None leaves one out."""
    path = folder / "model.safetensors"
    body = {k: v.clone() for k, v in load_file(path).items()} | {k.replace("__", "."): v for k, v in tensors.items()}
    path.unlink()
    save_file({k: v for k, v in body.items() if v is not None}, path, metadata={"format": "pt"})
    return folder


def assert_same_logits(ours, theirs, vocab=101, length=24, tolerance=1e-5):
    tokens_BxT = torch.randint(vocab, (3, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        mine, other = ours(tokens_BxT), theirs(tokens_BxT).logits
    assert mine.std() > 0.01
    torch.testing.assert_close(mine.float(), other.float(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shards", ["one file", "shards"])
def test_our_logits_are_those_of_transformers(kind, shards, tmp_path):
    theirs = saved(tmp_path, kind, **({} if shards == "one file" else {"max_shard_size": "30KB"}))
    assert (tmp_path / "model.safetensors.index.json").exists() == (shards == "shards")
    ours = load_checkpoint(tmp_path)
    assert_same_logits(ours, theirs)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    assert {p.dtype for p in ours.parameters()} == {torch.float32}


@pytest.mark.parametrize("left_out", [
    "rms_norm_eps", "tie_word_embeddings", "embedding_multiplier", "residual_multiplier", "logits_scaling", "num_key_value_heads",
    "rope_parameters", "hidden_act", "attention_bias"])
def test_an_entry_that_is_left_out_is_what_transformers_takes_for_it(left_out, tmp_path):
    body = {key: value for key, value in (DENSE | {"tie_word_embeddings": False}).items() if key != left_out}
    theirs = transformers.GraniteForCausalLM(transformers.GraniteConfig(**body)).eval()
    theirs.save_pretrained(tmp_path)
    assert_same_logits(load_checkpoint(changed(tmp_path, **{left_out: None})), theirs)


def test_a_rotary_base_in_the_old_place_is_read(tmp_path):
    theirs = saved(tmp_path)
    assert_same_logits(load_checkpoint(changed(tmp_path, rope_parameters=None, rope_theta=500.0)), theirs)


@pytest.mark.parametrize("kind", ["dense tied", "mixture untied"])
def test_the_dtype_is_the_stored_one_or_the_one_that_is_said(kind, tmp_path):
    saved(tmp_path / "fp32", kind).to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    assert {p.dtype for p in load_checkpoint(tmp_path / "bf16").parameters()} == {torch.bfloat16}
    widened = load_checkpoint(tmp_path / "bf16", dtype="float32")
    rounded = load_checkpoint(tmp_path / "fp32", dtype=torch.bfloat16)
    assert {p.dtype for p in widened.parameters()} == {torch.float32}
    for name, weight in rounded.parameters_by_name().items():
        assert torch.equal(weight.float(), widened.parameters_by_name()[name])
    with pytest.raises(ValueError, match="dtype 'int8' is none"):
        load_checkpoint(tmp_path / "bf16", dtype="int8")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_nearer_to_the_exact_logits_than_transformers_is(kind, dtype, tmp_path):
    theirs = saved(tmp_path, kind).to(dtype)
    ours, exact = load_checkpoint(tmp_path, dtype), load_checkpoint(tmp_path, dtype).float()
    tokens_BxT = torch.randint(101, (8, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = exact(tokens_BxT)
        off, theirs_off = ((found.float() - wanted).square().mean().sqrt() for found in (ours(tokens_BxT), theirs(tokens_BxT).logits))
    assert 0 < off < theirs_off and off < 2 * torch.finfo(dtype).eps * wanted.std()


def test_a_file_of_two_dtypes_asks_for_one(tmp_path):
    saved(tmp_path)
    rewritten(tmp_path, model__norm__weight=torch.ones(48, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match='tensors of BF16 and F32; say dtype= for all'):
        load_checkpoint(tmp_path)
    assert load_checkpoint(tmp_path, dtype="float32").parameters_by_name()["final_norm"].dtype == torch.float32


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="no /proc/self/maps here")
def test_matrices_stay_mapped_from_the_file(tmp_path):
    saved(tmp_path)
    ours = load_checkpoint(tmp_path)
    weight = ours.parameters_by_name()["embedding"]
    mapped = [line.split()[0].split("-") for line in open("/proc/self/maps") if str(tmp_path / "model.safetensors") in line]
    assert any(int(low, 16) <= weight.data_ptr() < int(high, 16) for low, high in mapped)


PEAK = """
import re, sys, torch
from etastar.hub.folders import load_checkpoint
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) * 1024
before = peak()
ours = load_checkpoint(sys.argv[1], dtype="bfloat16")
print(sum(p.numel() for p in ours.parameters()), peak() - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="no /proc/self/status here")
def test_weights_that_are_converted_take_their_own_memory_and_not_that_of_the_file(tmp_path):
    model = Model(width=512, depth=8, head_dim=64, context=64, ffn_width=2048)
    shapes = parameter_shapes(model, 30_000)
    state = to_granite_state({name: torch.full(shape, 0.5) for name, shape in shapes.items()}, model)
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(granite_config(model, 30_000, Scalars(1.0, 1.0, 1.0, 1.0))))
    told = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True, check=True).stdout
    params, grown = (int(word) for word in told.split())
    assert params > 48e6  # 196 MB in the file, 98 MB as bfloat16, 61 MB the largest tensor
    assert grown < 2 * params + 4 * 30_000 * 512 + 20e6


@pytest.mark.parametrize("kind, change, match", [
    ("dense tied", dict(model__norm__weight=None), "lacks model.norm.weight"),
    ("dense tied", dict(model__layers__1__self_attn__q_proj__bias=torch.zeros(48)), "has model.layers.1.self_attn.q_proj.bias, for which"),
    ("dense tied", dict(model__norm__weight=torch.ones(47)), r"model.norm.weight is \(47,\) in place of \(48,\)"),
    ("dense untied", dict(lm_head__weight=None), "lacks lm_head.weight"),
    ("dense untied", dict(lm_head__weight=torch.ones(102, 48)), r"lm_head.weight is \(102, 48\) in place of \(101, 48\)"),
    ("dense tied", dict(lm_head__weight=torch.ones(101, 48)), "ties the head .* the file has another head"),
    ("mixture tied", dict(model__layers__2__block_sparse_moe__router__layer__weight=torch.ones(6, 48)), r"\(6, 48\) in place of \(7, 48\)"),
    ("dense tied", dict(model__norm__weight=torch.ones(48, dtype=torch.int8)), "holds tensors of I8; our decoder reads F64, F32"),
], ids=["missing", "bias", "misshaped", "no head", "other vocabulary", "second head", "other experts", "quantized"])
def test_tensors_that_do_not_fit_the_config_are_named(kind, change, match, tmp_path):
    saved(tmp_path, kind)
    with pytest.raises(ValueError, match=match):
        load_checkpoint(rewritten(tmp_path, **change))


def test_a_tied_head_that_is_stored_twice_is_read_once(tmp_path):
    theirs = saved(tmp_path)
    again = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"].clone()
    ours = load_checkpoint(rewritten(tmp_path, lm_head__weight=again))
    assert "head" not in ours.parameters_by_name()
    assert_same_logits(ours, theirs)


@pytest.mark.parametrize("change, match", [
    (dict(model_type="llama"), "granite and granitemoe; .* model_type 'llama'"),
    (dict(model_type=None), "does not say model_type"),
    (dict(hidden_size=None, vocab_size=None), "does not say vocab_size, hidden_size"),
    (dict(attention_bias=True), "attention_bias=True"),
    (dict(hidden_act="gelu"), "hidden_act='gelu'"),
    (dict(head_dim=16), "heads of 16 units, 6 of them in a width of 48"),
    (dict(num_attention_heads=5), "heads of 9.6 units, 5 of them"),
    (dict(rope_parameters={"rope_theta": 500.0, "rope_type": "yarn", "factor": 4.0}), "rotary embeddings that are scaled"),
    (dict(rope_scaling={"type": "linear", "factor": 2.0}), "rotary embeddings that are scaled"),
    (dict(quantization_config={"bits": 4}), "quantized weights"),
    (dict(num_key_value_heads=4), "6 query heads cannot share 4"),
    (dict(num_hidden_layers=2), "has model.layers.2.*and 6 more"),
    (dict(num_hidden_layers=4), "lacks model.layers.3.*and 6 more"),
    (dict(intermediate_size=96), r"\(48, 80\) in place of \(48, 96\)"),
], ids=lambda given: next(iter(given)) if isinstance(given, dict) else None)
def test_a_config_of_another_model_is_refused_with_the_reason(change, match, tmp_path):
    saved(tmp_path)
    with pytest.raises(ValueError, match=match) as told:
        load_checkpoint(changed(tmp_path, **change))
    assert str(tmp_path) in str(told.value)


class _Trap:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_pickle_is_never_opened(tmp_path):
    folder, sprung = tmp_path / "checkpoint", tmp_path / "sprung"
    theirs = saved(folder)
    for name in ("pytorch_model.bin", "optimizer.pt", "model.pkl"):
        (folder / name).write_bytes(pickle.dumps(_Trap(sprung)))
    assert_same_logits(load_checkpoint(folder), theirs)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="model.pkl, optimizer.pt, pytorch_model.bin may be a pickle, which is never opened"):
        load_checkpoint(folder)
    assert not sprung.exists()
    pickle.loads((folder / "model.pkl").read_bytes()).close()
    assert sprung.exists()  # it would have sprung


def test_a_folder_that_is_not_whole_names_what_is_missing_or_damaged(tmp_path):
    with pytest.raises(ValueError, match="there is no folder"):
        load_checkpoint(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="has no config.json"):
        load_checkpoint(tmp_path)
    saved(tmp_path, max_shard_size="30KB")
    first, second, *_ = sorted(tmp_path.glob("model-*.safetensors"))
    whole = second.read_bytes()
    for damaged in (whole[:-8], b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", b""):
        second.write_bytes(damaged)
        with pytest.raises(ValueError, match=re.escape(str(second)) + rf" \({len(damaged):,} bytes\) is not a whole safetensors file"):
            load_checkpoint(tmp_path)
    second.unlink()
    with pytest.raises(ValueError, match=f"lacks {second.name}, which its index names"):
        load_checkpoint(tmp_path)
    second.write_bytes(first.read_bytes())
    with pytest.raises(ValueError, match="model.safetensors.index.json and its shards disagree on"):
        load_checkpoint(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "../elsewhere/model.safetensors"}}))
    with pytest.raises(ValueError, match="does not map tensors to safetensors files beside it"):
        load_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not JSON"):
        load_checkpoint(tmp_path)
