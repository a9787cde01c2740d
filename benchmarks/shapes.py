"""The shapes that are measured, their recipes, and the bytes that training them takes by count."""

import dataclasses

from etastar.model.shapes import count_parameters
from etastar.recipe import AdamW, Corpus, Execution, Model, Recipe
from etastar.schedules import Constant


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model, its vocabulary and the tokens of a step; the head is untied, as in most small-model code."""

    name: str
    model: Model
    vocab: int
    batch_tokens: int


def _shape(name, width, depth, head_dim, context, vocab, batch_tokens) -> Shape:
    return Shape(name, Model(width=width, depth=depth, head_dim=head_dim, context=context, tied=False), vocab, batch_tokens)


SHAPES = {
    "cpu": {shape.name: shape for shape in (
        _shape("XS", 32, 2, 16, 64, 512, 2048),
        _shape("S", 64, 2, 32, 64, 1024, 1024),
        _shape("M", 128, 4, 32, 128, 1024, 4096),
        _shape("L", 256, 4, 64, 256, 2048, 4096),
    )},
    "cuda": {shape.name: shape for shape in (
        _shape("0.2M", 64, 2, 64, 128, 1024, 4096),
        _shape("1M", 128, 4, 64, 256, 1024, 8192),
        _shape("5M", 256, 6, 64, 256, 4096, 16_384),
        _shape("30M", 512, 8, 64, 512, 8192, 32_768),
        _shape("124M", 768, 12, 64, 1024, 32_768, 16_384),
    )},
}
TINY = _shape("tiny", 32, 2, 16, 32, 64, 128)  # for tests; in no default


def shapes(names: list[str] | None, device: str) -> list[Shape]:
    """Shapes by name, all of the device where none is named; ValueError for one that is not known."""
    known = SHAPES[device] | {TINY.name: TINY}
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise ValueError(f"unknown shape {unknown[0]!r} for device {device}; known: {', '.join(SHAPES[device])}")
    return [known[name] for name in names or SHAPES[device]]


def recipe_of(shape: Shape, device: str = "cpu", precision: str | None = None, compiled: bool = False, **changes) -> Recipe:
    """The recipe that every way trains: AdamW at a constant rate on synthetic tokens; fp32 on a CPU, bf16 on a GPU."""
    corpus = Corpus("synthetic", vocab=shape.vocab, options=(("tokens", 2_000_000), ("validation_tokens", 65_536)))
    precision = precision or ("bf16" if device == "cuda" else "fp32")
    execution = Execution(device=device, precision=precision, compiled=compiled)
    given = dict(model=shape.model, corpus=corpus, optimizer=AdamW(), schedule=Constant(), peak_lr=1e-3, seed=0,
                 batch_tokens=shape.batch_tokens, horizon_tokens=shape.batch_tokens, execution=execution)
    return Recipe(**(given | changes))


def counted_bytes(shape: Shape, models: int, precision: str) -> int:
    """Bytes that training `models` models at once needs by count: 16 a parameter, and the activations of one step.

    Parameter, gradient and two moments are 4 bytes each. For its backward pass a plain decoder keeps, each once and for every
    token: in a block the stream before either norm and after it (4 D), q, k, v (3 D), what attention gives (D), gate and up
    (2 F) and their product (F); at the end the stream before and after the norm (2 D) and the probabilities (V, always fp32).
    """
    model, size = shape.model, 2 if precision == "bf16" else 4
    stream = model.depth * (8 * model.width + 3 * model.resolved_ffn_width) + 2 * model.width
    parameters = count_parameters(model, shape.vocab)["total"]
    return models * (16 * parameters + shape.batch_tokens * (size * stream + 4 * shape.vocab))
