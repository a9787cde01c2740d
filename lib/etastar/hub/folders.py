"""A folder of transformers' granite or granitemoe as our decoder: safetensors alone, mapped into memory and read tensor by tensor."""

from pathlib import Path

import torch

from etastar.hub.plan import PICKLED
from etastar.model.decoder import Decoder
from etastar.model.granite import from_granite_config, from_granite_state, to_granite_state
from etastar.model.parametrization import Scalars
from etastar.model.shapes import count_parameters, parameter_shapes
from etastar.model.stored import INDEX, WEIGHTS, StoredTensors, json_object, listed, opened
from etastar.recipe import SP, Model

HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"
STORED = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NEEDED = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
NEEDED_OF_MIXTURES = ("num_local_experts", "num_experts_per_tok")


def load_checkpoint(folder, dtype: torch.dtype | str | None = None) -> Decoder:
    """Our decoder with the weights of a transformers granite or granitemoe folder: tokens (B, T) int64 to logits (B, T, V).

    Reads config.json and model.safetensors, or the shards of its index, and nothing else. `dtype` (torch.bfloat16, "bfloat16") converts
    each tensor as it is read; None keeps what is stored, and matrices that both hold in one piece stay mapped from the file.
    Raises ValueError naming what is wrong: no safetensors, a damaged or missing shard, another architecture, biases, another rotary
    embedding, quantized weights, or tensors that are missing, too many or of other shapes than config.json says.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; a checkpoint of the hub is fetched first: etastar fetch checkpoint NAME")
    model, vocab, by = _shape(folder)
    stored = _Stored(folder, _named(dtype))
    _check_tensors(stored, model, vocab)
    params = from_granite_state(stored, model)
    held = sum(tensor.numel() for tensor in params.values())
    counted = count_parameters(model, vocab)["total"]
    assert held == counted, f"{folder}: {held:,} parameters were read where the shape of config.json has {counted:,}"
    decoder = Decoder(model, vocab, SP(), params)
    decoder.scalars = by  # those that the checkpoint tells, which no parametrization need have
    return decoder


def _named(dtype: torch.dtype | str | None) -> torch.dtype | None:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and found not in STORED.values():
        raise ValueError(f"dtype {dtype!r} is none that a checkpoint is computed in; take float32, bfloat16, float16 or float64")
    return found


def _shape(folder: Path) -> tuple[Model, int, Scalars]:
    """(shape, vocabulary, multipliers) that a folder's config.json tells; ValueError where it tells no granite of ours."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json; it is not the folder of a transformers checkpoint")
    config = json_object(path)
    try:
        _refuse_unlike({key: value for key, value in config.items() if value is not None})
        return from_granite_config(config)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None


def _refuse_unlike(config: dict) -> None:
    """ValueError for what from_granite_config would not see: entries that are missing, another head size, rotation or storage."""
    kind = config.get("model_type")
    needed = NEEDED + (NEEDED_OF_MIXTURES if kind == "granitemoe" else ())
    if kind in ("granite", "granitemoe", None) and (missing := [key for key in needed if key not in config]):
        raise ValueError(f"it does not say {', '.join(missing)}")
    if kind not in ("granite", "granitemoe"):
        return  # refused by its name
    width, heads = config["hidden_size"], config["num_attention_heads"]
    if width % heads or config.get("head_dim", width // heads) != width // heads:
        raise ValueError(f"heads of {config.get('head_dim', width / heads)} units, {heads} of them in a width of {width}: our decoder has "
                         "heads that fill the width")
    for told in (config.get("rope_scaling", {}), config.get("rope_parameters", {}), config):
        if told.get("rope_type", told.get("type", "default")) != "default" or told.get("partial_rotary_factor", 1) != 1:
            raise ValueError(f"rotary embeddings that are scaled or partial, {told}: our decoder turns all of a head at fixed rates")
    if "quantization_config" in config:
        raise ValueError("quantized weights; take the checkpoint as it was trained")


class _Stored(StoredTensors):
    """A folder's tensors by name, as they are stored, mapped from files that stay open; or each converted to `dtype` and let go of."""

    def __init__(self, folder: Path, dtype: torch.dtype | None):
        _refuse_without_weights(folder)
        super().__init__(folder)
        kinds = set(self.dtypes.values())
        if unknown := sorted(kinds - set(STORED)):
            raise ValueError(f"{folder} holds tensors of {', '.join(unknown)}; our decoder reads {', '.join(STORED)}")
        if dtype is None and len(kinds) > 1:
            raise ValueError(f"{folder} holds tensors of {' and '.join(sorted(kinds))}; say dtype= for all, \"float32\" for example")
        self.folder, self.dtype = folder, None if {STORED[kind] for kind in kinds} == {dtype} else dtype
        self.opened = {} if self.dtype else {file: opened(file) for file in set(self.files.values())}

    def __getitem__(self, name: str) -> torch.Tensor:
        return super().__getitem__(name).to(self.dtype) if self.dtype else self.opened[self.files[name]].get_tensor(name)


def _refuse_without_weights(folder: Path) -> None:
    if not (folder / WEIGHTS).is_file() and not (folder / INDEX).is_file():
        pickles = sorted(path.name for path in folder.iterdir() if path.name.endswith(PICKLED))
        why = f"; {', '.join(pickles[:3])} may be a pickle, which is never opened: take a revision that has safetensors" if pickles else ""
        raise ValueError(f"{folder} has neither {WEIGHTS} nor {INDEX}{why}")


def _check_tensors(stored: _Stored, model: Model, vocab: int) -> None:
    """ValueError for tensors that are missing, of no use or misshaped; a tied head that is stored again has to be the token table."""
    nothing = {name: torch.empty(shape, device="meta") for name, shape in parameter_shapes(model, vocab).items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in to_granite_state(nothing, model).items()}
    found = stored.shapes
    again = {HEAD} & set(found) if model.tied else set()
    missing, extra = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted) - again)
    if missing or extra:
        told = [f"lacks {listed(missing)}"] * bool(missing) + [f"has {listed(extra)}, for which our decoder has no place"] * bool(extra)
        raise ValueError(f"{stored.folder} is not what its config.json says: it {' and '.join(told)}")
    if wrong := [f"{name} is {found[name]} in place of {shape}" for name, shape in wanted.items() if found[name] != shape]:
        raise ValueError(f"{stored.folder} has tensors of other shapes than its config.json says: {listed(wrong)}")
    if again and not (found[HEAD] == found[TABLE] and torch.equal(stored[HEAD], stored[TABLE])):
        raise ValueError(f"{stored.folder}: config.json ties the head to the token table (tie_word_embeddings), and the file has another "
                         f"head, {HEAD}; set tie_word_embeddings to false if that is the one it was trained with")
