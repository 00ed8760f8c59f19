"""Choosing the next token in numpy, with the arguments and the order of transformers' `generate`.

Letters: B batch, T tokens so far, V vocabulary.
"""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from neural_layers.errors import InputError

_SHAPING = ("temperature", "top_k", "top_p", "min_p", "typical_p")


@dataclass(frozen=True)
class GenerationOptions:
    """How tokens are chosen and when that ends; names and defaults are those of transformers' `generate`.

    max_new_tokens: at most so many; by default `max_length` less the prompt, or 20
    min_new_tokens: no end before so many
    do_sample:      draw from the distribution; otherwise the likeliest token (greedy). A call that leaves it out and
                    gives one of the next five samples, where transformers would not heed them.
    temperature, top_k, top_p, min_p, typical_p: of the distribution, applied in this order, when sampling
    repetition_penalty: divides the logit of a token that occurred, prompt included (multiplies where it is negative)
    no_repeat_ngram_size: no run of so many tokens occurs twice
    eos_token_id:   one or several tokens that end a row; pad_token_id: what follows in a batch
    stop_strings:   text that ends a row; it is not part of the text that is returned
    seed:           of the sampling; by default another each time

    Raises InputError for values out of range.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float | None = None
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    eos_token_id: int | tuple[int, ...] | list[int] | None = None
    pad_token_id: int | None = None
    stop_strings: str | tuple[str, ...] | list[str] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        ranges = {
            "max_new_tokens": (self.max_new_tokens is None or self.max_new_tokens >= 1, "at least 1"),
            "temperature": (self.temperature > 0, "above 0; do_sample=False takes the likeliest token"),
            "top_k": (self.top_k >= 0, "at least 0, which is no limit"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "min_p": (self.min_p is None or 0 <= self.min_p <= 1, "in [0, 1]"),
            "typical_p": (0 < self.typical_p <= 1, "in (0, 1]"),
            "repetition_penalty": (self.repetition_penalty > 0, "above 0; 1.0 is none"),
            "no_repeat_ngram_size": (self.no_repeat_ngram_size >= 0, "at least 0, which is no limit"),
        }
        for name, (is_right, wanted) in ranges.items():
            if not is_right:
                raise InputError(f"{name}={getattr(self, name)} must be {wanted}")

    @classmethod
    def resolve(cls, defaults: dict[str, Any], given: dict[str, Any]) -> "GenerationOptions":
        """Options from a generation_config.json and what a call gives; raises InputError for an unknown name."""
        names = [field.name for field in fields(cls)]
        if given.get("num_beams", 1) != 1:
            raise InputError(f"num_beams={given['num_beams']}: an exported model decodes one beam; leave num_beams out")
        unknown = sorted(set(given) - set(names) - {"num_beams"})
        if unknown:
            raise InputError(f"generate does not know {', '.join(unknown)}; it takes {', '.join(names)}")
        merged = {**{n: v for n, v in defaults.items() if v is not None}, **given}
        if "do_sample" not in given and any(given.get(name) is not None for name in _SHAPING):
            merged["do_sample"] = True
        return cls(**{name: merged[name] for name in names if name in merged})

    @property
    def ends(self) -> list[int]:
        """The tokens that end a row."""
        if self.eos_token_id is None:
            return []
        return [self.eos_token_id] if isinstance(self.eos_token_id, int) else list(self.eos_token_id)

    @property
    def padding(self) -> int:
        """What follows the end of a row in a batch."""
        if self.pad_token_id is not None:
            return self.pad_token_id
        return self.ends[0] if self.ends else 0

    @property
    def stops(self) -> list[str]:
        """The strings that end a row."""
        return [self.stop_strings] if isinstance(self.stop_strings, str) else list(self.stop_strings)

    def budget(self, prompt: int) -> int:
        """How many tokens may follow a prompt of so many."""
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        if self.max_length is None:
            return 20
        if self.max_length <= prompt:
            raise InputError(f"max_length={self.max_length} leaves nothing after a prompt of {prompt} tokens; raise it")
        return self.max_length - prompt


def choose(
    logits_BV: np.ndarray, ids_BT: np.ndarray, made: int, options: GenerationOptions, random: np.random.Generator
) -> np.ndarray:
    """The next token of each row, (B,); `made` have been chosen before."""
    scores_BV = logits_BV.astype(np.float32, copy=True)
    if options.repetition_penalty != 1.0:
        _penalise(scores_BV, ids_BT, options.repetition_penalty)
    if options.no_repeat_ngram_size:
        _ban_ngrams(scores_BV, ids_BT, options.no_repeat_ngram_size)
    if made < options.min_new_tokens and options.ends:
        scores_BV[:, options.ends] = -np.inf
    if not options.do_sample:
        greedy: np.ndarray = scores_BV.argmax(-1)
        return greedy
    # The largest of log p + Gumbel noise is a draw from p.
    drawn: np.ndarray = (_warp(scores_BV, options) + random.gumbel(size=scores_BV.shape)).argmax(-1)
    return drawn


def _penalise(scores_BV: np.ndarray, ids_BT: np.ndarray, penalty: float) -> None:
    occurred = np.take_along_axis(scores_BV, ids_BT, 1)
    np.put_along_axis(scores_BV, ids_BT, np.where(occurred < 0, occurred * penalty, occurred / penalty), 1)


def _ban_ngrams(scores_BV: np.ndarray, ids_BT: np.ndarray, size: int) -> None:
    if ids_BT.shape[1] + 1 < size:
        return
    for scores_V, ids_T in zip(scores_BV, ids_BT.tolist(), strict=True):
        last = ids_T[len(ids_T) - size + 1 :]
        begins = range(len(ids_T) - size + 1)
        scores_V[[ids_T[i + size - 1] for i in begins if ids_T[i : i + size - 1] == last]] = -np.inf


def _warp(scores_BV: np.ndarray, options: GenerationOptions) -> np.ndarray:
    """The scores at the temperature, −∞ for what the limits leave out."""
    scores_BV = scores_BV / options.temperature
    if 0 < options.top_k < scores_BV.shape[1]:
        smallest = np.partition(scores_BV, -options.top_k)[:, -options.top_k, None]
        scores_BV = np.where(scores_BV < smallest, -np.inf, scores_BV)
    if options.top_p < 1:
        scores_BV = _keep_mass(scores_BV, -scores_BV, options.top_p)
    if options.min_p:
        p_BV = _probabilities(scores_BV)
        scores_BV = np.where(p_BV < options.min_p * p_BV.max(-1, keepdims=True), -np.inf, scores_BV)
    if options.typical_p < 1:
        p_BV = _probabilities(scores_BV)
        surprise = -np.log(np.maximum(p_BV, 1e-38))
        unusual = np.abs(surprise - (p_BV * surprise).sum(-1, keepdims=True))
        scores_BV = _keep_mass(scores_BV, np.where(p_BV > 0, unusual, np.inf), options.typical_p)
    return scores_BV


def _keep_mass(scores_BV: np.ndarray, order_BV: np.ndarray, mass: float) -> np.ndarray:
    """Keep the tokens that come first in order until their probabilities sum to `mass`; at least one."""
    rank = order_BV.argsort(-1, kind="stable")
    before = np.take_along_axis(_probabilities(scores_BV), rank, 1).cumsum(-1)
    before = np.concatenate([np.zeros_like(before[:, :1]), before[:, :-1]], axis=1)
    kept = np.empty(scores_BV.shape, bool)
    np.put_along_axis(kept, rank, before < mass, 1)
    return np.where(kept, scores_BV, -np.inf)


def _probabilities(scores_BV: np.ndarray) -> np.ndarray:
    weights = np.exp(scores_BV - scores_BV.max(-1, keepdims=True))
    made: np.ndarray = weights / weights.sum(-1, keepdims=True)
    return made
