"""Traps in the folder of a checkpoint, pickles and code of its own, which none of the kit's ways to it may spring."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from etastar.hub.checkpoints import find_fetched
from etastar.hub.evaluate import evaluate
from etastar.hub.faults import CheckpointRefused
from etastar.hub.folders import load_checkpoint
from etastar.hub.measure import checkpoint_norms
from etastar.hub.push import push
from small_checkpoint import COMMIT, FILES, FIRST, REPO, contents, fetch, only_error

PICKLES = ("pytorch_model.bin", "pytorch_model.pt", "model.pth", "optimizer.pkl", "state.ckpt", "README.pkl", "LICENSE.BIN")


@pytest.fixture
def planted(tmp_path, trap):
    """The folder of a small granite checkpoint with pickles beside its weights and a config.json that names code of its own."""
    transformers = pytest.importorskip("transformers")
    body, code, _ = trap
    config = transformers.GraniteConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                                        max_position_embeddings=32)
    folder = tmp_path / "planted"
    transformers.GraniteForCausalLM(config).save_pretrained(folder)
    told = {"AutoConfig": "modeling_trap.Trap", "AutoModelForCausalLM": "modeling_trap.Trap", "AutoTokenizer": ["modeling_trap.Trap", None]}
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | {"auto_map": told}))
    (folder / "modeling_trap.py").write_text(code)
    for name in PICKLES:
        (folder / name).write_bytes(body)
    return folder


def test_pickles_and_code_are_neither_downloaded_nor_opened(hub, trap, tmp_path):
    body, code, sprung = trap
    planted = dict.fromkeys(PICKLES, body) | {"modeling_small.py": code.encode(), "old/model.safetensors": b"old"}
    hub.put(REPO, COMMIT, FILES | planted)
    folder, told = fetch(folder=tmp_path / "here")
    assert contents(folder) == FILES and all(name in told for name in planted)
    assert not set(planted) & {path.rsplit("/")[-1] for _, path, _, _ in hub.asked}
    (folder / "pytorch_model.bin").write_bytes(body)
    opened = _opened_by(f"{REPO}@{COMMIT}", folder)
    assert str(folder / FIRST) in opened and not any(path.endswith((".bin", ".pkl")) for path in opened) and not sprung.exists()


def _opened_by(name, folder):
    """Every path that a process opens while it finds a whole checkpoint again."""
    code = ("import sys; from etastar.hub.checkpoints import fetch_checkpoint; seen = []\n"
            "sys.addaudithook(lambda event, args: seen.append(str(args[0])) if event == 'open' else None)\n"
            f"fetch_checkpoint({name!r}, {str(folder)!r}); print('\\n'.join(seen))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_repository_of_pickles_alone_is_refused_with_the_reason(hub, trap):
    body, _, sprung = trap
    hub.put("owner/old", COMMIT, {"config.json": b"{}", "pytorch_model.bin": body})
    only_error(CheckpointRefused, "pytorch_model.bin", "can run whatever code it holds", "safetensors", name="owner/old")
    assert not hub.bodies_asked() and not sprung.exists()
    hub.put("owner/card", COMMIT, {"README.md": b"soon"})
    only_error(CheckpointRefused, "holds no *.safetensors", name="owner/card")


def test_a_checkpoint_with_traps_beside_its_weights_is_read_and_none_is_sprung(planted, trap):
    assert find_fetched(planted) == planted
    assert load_checkpoint(planted)(torch.zeros(1, 4, dtype=torch.long)).shape == (1, 4, 64)
    assert isinstance(checkpoint_norms(planted), pd.DataFrame)
    assert push(planted, "me/run", dry_run=True).left_out == tuple(sorted((*PICKLES, "modeling_trap.py")))
    assert not trap[2].exists()


def test_a_checkpoint_of_traps_alone_is_refused_and_none_is_sprung(planted, trap):
    (planted / "model.safetensors").unlink()
    for read, words in ((load_checkpoint, "pickle, which is never opened"), (checkpoint_norms, "safetensors"), (evaluate, "safetensors")):
        with pytest.raises(ValueError, match=words if read is not evaluate else "safetensors|not installed"):
            read(planted)
    with pytest.raises(ValueError, match="it needs config.json and model.safetensors"):
        push(planted, "me/run", dry_run=True)
    assert not trap[2].exists()


def test_a_pickle_that_is_called_safetensors_is_refused_and_not_sprung(planted, trap):
    (planted / "model.safetensors").write_bytes(trap[0])
    for read in (load_checkpoint, checkpoint_norms):
        with pytest.raises(ValueError, match="model.safetensors"):
            read(planted)
    assert not trap[2].exists()


def test_an_architecture_that_only_its_own_code_knows_is_refused_by_name(planted, trap):
    config = json.loads((planted / "config.json").read_text()) | {"model_type": "trap", "architectures": ["Trap"]}
    (planted / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="trap"):
        load_checkpoint(planted)
    assert not trap[2].exists()


HARNESS = """
import sys
from pathlib import Path
from etastar.hub.evaluate import evaluate
try:
    done = evaluate(sys.argv[1], "tiny", task_folder=sys.argv[2], device="cpu")
    print("scored", len(done.items))
except Exception as error:
    print("refused", type(error).__name__)
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed (extra eval)")
@pytest.mark.parametrize("kind", ["granite", "trap"])
def test_the_harness_runs_no_code_of_a_checkpoint(planted, trap, tmp_path, kind):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({str(i): i for i in range(64)}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(planted / "tokenizer.json"))
    (planted / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "auto_map": {"AutoTokenizer": ["modeling_trap.Trap", None]}, "eos_token": "0"}))
    config = json.loads((planted / "config.json").read_text()) | {"model_type": kind}
    (planted / "config.json").write_text(json.dumps(config))
    items = [{"query": "1 2 3", "choices": ["4", "5"], "gold": i % 2} for i in range(4)]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
    (tmp_path / "tiny.yaml").write_text(
        f"task: tiny\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path}/items.jsonl\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: query\ndoc_to_choice: choices\ndoc_to_target: gold\nmetric_list:\n  - metric: acc\n")
    environment = dict(PATH="/usr/bin:/bin", HOME=str(tmp_path), HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HOME=str(tmp_path / "hf"),
                       ETASTAR_CACHE=str(tmp_path / "cache"), PYTHONPATH=str(Path(__file__).parents[2] / "lib"))
    done = subprocess.run([sys.executable, "-c", HARNESS, str(planted), str(tmp_path)], capture_output=True, text=True, timeout=300,
                          env=environment, stdin=subprocess.DEVNULL)
    assert done.stdout.split()[-2:][0] == ("scored" if kind == "granite" else "refused"), done.stderr[-2000:]
    assert not trap[2].exists()
