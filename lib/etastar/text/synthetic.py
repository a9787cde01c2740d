"""A source with a known entropy and a known learning-curve exponent.

The stream is made of units of three tokens: group g, item i, answer a. The pair (g, i) is one of K = G² contexts, whose
ranks follow Zipf's law p_k ∝ k^−(1 + α); rank k is group k // G, item k mod G, so that groups are Zipfian too (hierarchy).
A context's answer is a fixed symbol with probability 1 − ε, else any of the A symbols alike.

Entropy, exact: a unit costs H(p) + h nats, h the entropy of an answer; a token a third of that.
Learning curve: after D units a learner knows the contexts it has seen, those with p_k·D ≳ 1, that is k ≲ D^(1/(1+α)). What it
has not seen has mass Σ_{k > D^(1/(1+α))} p_k ∝ D^(−α/(1+α)), and costs log A − h more each: the excess loss falls with the
exponent α/(1+α) until all K contexts are known. (A plain Markov source has no such range: its excess falls as 1/D.)
"""

import dataclasses
import math

import numpy as np

UNIT = 3
DOCUMENT_TOKENS = 1023  # a whole number of units


@dataclasses.dataclass(frozen=True)
class Source:
    """Parameters of the source; tokens 0 … G − 1 are groups, G … 2G − 1 items, then A answers."""

    vocab: int
    alpha: float = 0.5
    noise: float = 0.1
    seed: int = 0

    def __post_init__(self):
        if self.vocab < 16:
            raise ValueError(f"the synthetic corpus needs a vocabulary of at least 16; got {self.vocab}")
        if self.alpha <= 0 or not 0 <= self.noise < 1:
            raise ValueError(f"the synthetic corpus needs alpha > 0 and noise in [0, 1); got {self.alpha}, {self.noise}")

    @property
    def answers(self) -> int:
        """A, the number of answer symbols."""
        return max(4, self.vocab // 16)

    @property
    def groups(self) -> int:
        """G, the number of groups and of items."""
        return (self.vocab - self.answers) // 2

    def context_probabilities(self) -> np.ndarray:
        """p_k by rank: float64 (G²,)."""
        weight = np.arange(1, self.groups**2 + 1, dtype=np.float64) ** -(1 + self.alpha)
        return weight / weight.sum()

    def answer_entropy(self) -> float:
        """h in nats."""
        hit = 1 - self.noise + self.noise / self.answers
        miss = self.noise / self.answers
        return -hit * math.log(hit) - ((self.answers - 1) * miss * math.log(miss) if miss else 0.0)

    def entropy_rate(self) -> float:
        """Nats per token that no predictor can go below."""
        p = self.context_probabilities()
        return float((-(p * np.log(p)).sum() + self.answer_entropy()) / UNIT)

    def learning_curve_exponent(self) -> float:
        """Exponent of the excess loss in units seen, α / (1 + α)."""
        return self.alpha / (1 + self.alpha)

    def tokens(self, count: int, stream: int) -> np.ndarray:
        """The first `count` tokens of an independent stream: uint16."""
        units = -(-count // UNIT)
        rng = np.random.default_rng([self.seed, stream, 20_240_801])
        cumulative = np.cumsum(self.context_probabilities())
        rank = np.minimum(np.searchsorted(cumulative, rng.random(units)), self.groups**2 - 1)
        right = np.random.default_rng([self.seed, 7]).integers(self.answers, size=self.groups**2)[rank]
        answer = np.where(rng.random(units) < self.noise, rng.integers(self.answers, size=units), right)
        out = np.stack([rank // self.groups, self.groups + rank % self.groups, 2 * self.groups + answer], axis=1)
        return out.astype(np.uint16).reshape(-1)[:count]


OPTIONS = {"tokens": 2**23, "validation_tokens": 2**18, "alpha": 0.5, "noise": 0.1, "seed": 0}


def source_of(corpus) -> tuple[Source, int, int]:
    """(source, training tokens, validation tokens) of a recipe's synthetic corpus; ValueError for an unknown option."""
    given = dict(corpus.options)
    unknown = sorted(set(given) - set(OPTIONS))
    if unknown:
        raise ValueError(f"the synthetic corpus does not know {', '.join(map(repr, unknown))}; it takes {', '.join(OPTIONS)}")
    options = OPTIONS | given
    source = Source(corpus.vocab, options["alpha"], options["noise"], options["seed"])
    return source, int(options["tokens"]), int(options["validation_tokens"])
