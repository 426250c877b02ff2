"""The one sampler for every loader that yields logits.

Runs the samplers of `modules.sampler_math` in the order of `sampling.SAMPLER_ORDER` (or `sampler_priority`) over numpy arrays,
so that transformers, RWKV and the GPTQ runtimes honour the same parameters in the same way. Greedy without penalties is one
argmax. Penalties look at prompt and answer, as llama.cpp and HF transformers do.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from modules import sampler_math as sm
from modules import sampling
from modules.errors import GenerationFailed
from modules.schema import TokenLogprob

if TYPE_CHECKING:
    from modules.grammar import Constraint

# What this chain honours. Guidance, contrastive and beam search and drafting need the model, not only its logits.
SUPPORTED = frozenset(sampling.PARAMETERS) - {
    "guidance_scale",
    "negative_prompt",
    "penalty_alpha",
    "num_beams",
    "length_penalty",
    "early_stopping",
    "prompt_lookup_num_tokens",
}
_TEMPERATURES = ("temperature", "dynamic_temperature", "quadratic_sampling")
# Parameters that only choose among likely tokens: greedy takes the likeliest whatever they say.
CHOOSERS = frozenset(
    "top_k top_p min_p typical_p tfs top_a epsilon_cutoff eta_cutoff top_n_sigma xtc_probability dynamic_temperature "
    "smoothing_factor mirostat_mode adaptive_target".split()
)
_BLOCK = 256
_GREEDY = "Temperature 0 always takes the likeliest token."

Step = Callable[["_Candidates"], None]
TokenText = Callable[[int], str]


def new_seed() -> int:
    """A seed that every backend can take (32 bits, never the libraries' "random" value)."""
    return secrets.randbelow(2**31)


def order(params: Mapping[str, Any]) -> tuple[str, ...]:
    """Sampler names in the order they run: those of `sampler_priority` first, then the others in their default order."""
    chosen = tuple(dict.fromkeys(params.get("sampler_priority") or ()))
    names = chosen + tuple(name for name in sampling.SAMPLER_ORDER if name not in chosen)
    if params.get("temperature_last"):
        names = tuple(n for n in names if n not in _TEMPERATURES) + tuple(n for n in names if n in _TEMPERATURES)
    return names


def ignored_when_greedy(active: Mapping[str, Any]) -> dict[str, str]:
    """What a greedy run does not look at, with the reason."""
    return {name: _GREEDY for name in active if name in CHOOSERS}


class SequenceBreakers:
    """For DRY: which tokens hold a sequence breaker. An engine keeps one, as reading a whole vocabulary takes a while."""

    def __init__(self, vocab_size: int, token_text: TokenText) -> None:
        self._vocab_size, self._token_text = vocab_size, token_text
        self._known: dict[tuple[str, ...], frozenset[int]] = {}

    def ids(self, breakers: tuple[str, ...]) -> frozenset[int]:
        if breakers not in self._known:
            if len(self._known) > 32:  # the breakers come from requests: don't collect them for ever
                self._known.clear()
            texts = ((i, self._token_text(i)) for i in range(self._vocab_size))
            self._known[breakers] = frozenset(i for i, text in texts if any(mark in text for mark in breakers))
        return self._known[breakers]


class _Candidates:
    """The tokens still in the running. `ids` is None while that is the whole vocabulary."""

    __slots__ = ("ids", "logits")

    def __init__(self, logits: sm.Floats) -> None:
        self.logits = logits
        self.ids: sm.Indices | None = None

    def keep(self, positions: sm.Indices) -> None:
        if positions.size == self.logits.size:
            return
        self.ids = positions if self.ids is None else self.ids[positions]
        self.logits = self.logits[positions]

    def positions(self, tokens: sm.Indices) -> tuple[sm.Indices, sm.Indices]:
        """(positions of those of `tokens` still here, the index of each in `tokens`). `tokens` has no repeats."""
        if self.ids is None:
            return tokens, np.arange(tokens.size)
        _, here, there = np.intersect1d(self.ids, tokens, assume_unique=True, return_indices=True)
        return here, there

    def ban(self, tokens: Iterable[int]) -> None:
        """-inf for these, unless nothing would be left."""
        here, _ = self.positions(np.fromiter(tokens, dtype=np.int64))
        banned = self.logits.copy()
        banned[here] = -np.inf
        if np.isfinite(banned).any():
            self.logits = banned


class SamplerChain:
    """Picks tokens for one generation.

    `params` are checked sampling parameters. `prompt_ids` start the history. `eos_ids` are what `ban_eos_token` and a
    minimum length ban. `breakers` finds DRY's sequence breakers (none without it). `protected_ids` are never dropped by
    XTC. `constraint` holds the answer to a grammar (`modules.grammar`): only what it allows is sampled, and it alone says where
    the text may end. `applied` and `ignored` are for the receipt; `seed` is the one in use.
    """

    def __init__(
        self,
        params: Mapping[str, Any],
        prompt_ids: Sequence[int],
        vocab_size: int,
        *,
        eos_ids: Iterable[int] = (),
        breakers: SequenceBreakers | None = None,
        protected_ids: Iterable[int] = (),
        constraint: Constraint | None = None,
    ) -> None:
        self._constraint = constraint
        supported = {name: value for name, value in params.items() if name in SUPPORTED}
        self._on = sampling.active(supported)
        self.greedy = supported.get("temperature", 1.0) == 0 and not self._on.get("dynamic_temperature")
        given = supported.get("seed", -1)
        self.seed = new_seed() if given < 0 else given
        self.ignored = ignored_when_greedy(self._on) if self.greedy else {}
        if self._on.get("dynamic_temperature") and "temperature" in self._on:
            self.ignored["temperature"] = "Dynamic temperature is on and takes its place."
        self.applied = {name: value for name, value in self._on.items() if name not in self.ignored}
        self.applied.pop("seed", None)
        if constraint is not None and "ban_eos_token" in self.applied:
            self.ignored["ban_eos_token"] = "The grammar decides where the text may end."
            del self.applied["ban_eos_token"]
        self._vocab_size = vocab_size
        self._eos_ids = np.array(sorted({i for i in eos_ids if 0 <= i < vocab_size}), dtype=np.int64)
        self._protected = frozenset(protected_ids)
        self._rng = np.random.default_rng(self.seed)
        self._mu = 2 * float(supported.get("mirostat_tau", sampling.PARAMETERS["mirostat_tau"].neutral))
        self._mirostat: tuple[sm.Indices | None, sm.Floats] | None = None
        decay = self._value("adaptive_decay")
        self._adaptive_sum = self._value("adaptive_target") / (1 - decay)
        self._adaptive_weight = 1 / (1 - decay)
        self._adaptive: tuple[sm.Indices | None, sm.Floats] | None = None
        marks = tuple(self._on.get("dry_sequence_breakers", sampling.PARAMETERS["dry_sequence_breakers"].neutral))
        self._breakers: frozenset[int] = breakers.ids(marks) if breakers and "dry_multiplier" in self._on else frozenset()
        self._bias = self._bias_arrays()
        self._steps = self._build(supported)
        self._needs_history = any(
            name in self._on
            for name in ("repetition_penalty", "presence_penalty", "frequency_penalty", "dry_multiplier", "no_repeat_ngram_size")
        )
        self._prompt_tokens = np.unique(np.asarray(prompt_ids, dtype=np.int64))
        self._length = len(prompt_ids)
        self._history = np.zeros(0, dtype=np.int64)
        if self._needs_history:
            self._history = np.empty(self._length + 1024, dtype=np.int64)
            self._history[: self._length] = prompt_ids
        self._window: tuple[sm.Indices, sm.Indices] | None = None

    @property
    def is_argmax(self) -> bool:
        """Whether the next token is simply the largest logit, so that a loader may take it without leaving its device."""
        free = self._constraint is None and "ban_eos_token" not in self._on
        return self.greedy and not self._steps and self._bias is None and free

    def sample(self, logits: sm.Floats, *, ban_ends: bool = False) -> int:
        """The next token from one row of logits [vocab]. `ban_ends` forbids the end tokens (a minimum length)."""
        candidates = self._candidates(logits, ban_ends)
        position = int(candidates.logits.argmax()) if self.greedy else self._draw(candidates.logits)
        token = position if candidates.ids is None else int(candidates.ids[position])
        self.accept(token)
        return token

    def likeliest(self, logits: sm.Floats, count: int, *, ban_ends: bool = False) -> tuple[sm.Indices, sm.Floats]:
        """At most `count` tokens, the likeliest first, and the probability of each among all, after every step of this chain:
        for a search that picks by more than that, and calls `accept` for what it picked."""
        candidates = self._candidates(logits, ban_ends)
        chances = sm.softmax(candidates.logits)
        best = sm.likeliest(candidates.logits, count)
        best = best[np.isfinite(candidates.logits[best])]
        return best if candidates.ids is None else candidates.ids[best], chances[best]

    def _candidates(self, logits: sm.Floats, ban_ends: bool) -> _Candidates:
        """What is left of a row of logits after the constraint, the bans and the steps."""
        candidates = _Candidates(logits)
        if self._bias is not None:
            tokens, values = self._bias
            candidates.logits = logits.copy()
            candidates.logits[tokens] += values
        if self._constraint is not None:
            candidates.keep(self._constraint.allowed())
            if not candidates.logits.size:
                raise GenerationFailed("The grammar allows no token here.", hint="Change the grammar.")
        elif (ban_ends or "ban_eos_token" in self._on) and self._eos_ids.size:
            candidates.ban(self._eos_ids.tolist())
        for step in self._steps:
            step(candidates)
        return candidates

    def accept(self, token: int) -> None:
        """Note a chosen token (`sample` does; a loader calls it for a token it took itself)."""
        self._window = None
        if self._constraint is not None:
            self._constraint.accept(token)
        if self._mirostat is not None:
            surprise = -math.log2(max(_probability(self._mirostat, token), 1e-30))
            self._mu -= self._value("mirostat_eta") * (surprise - self._value("mirostat_tau"))
            self._mirostat = None
        if self._adaptive is not None:
            decay = self._value("adaptive_decay")
            self._adaptive_sum = _probability(self._adaptive, token) + decay * self._adaptive_sum
            self._adaptive_weight = 1 + decay * self._adaptive_weight
            self._adaptive = None
        if self._needs_history:
            if self._length == self._history.size:
                self._history = np.concatenate([self._history, np.empty_like(self._history)])
            self._history[self._length] = token
        self._length += 1

    # --- set-up ---------------------------------------------------------------------------------------------

    def _value(self, name: str) -> float:
        return float(self._on.get(name, sampling.PARAMETERS[name].neutral))

    def _bias_arrays(self) -> tuple[sm.Indices, sm.Floats] | None:
        bias = {int(token): value for token, value in self._on.get("logit_bias", {}).items() if int(token) < self._vocab_size}
        if not bias:
            return None
        return np.array(list(bias), dtype=np.int64), np.array(list(bias.values()), dtype=np.float32)

    def _build(self, params: Mapping[str, Any]) -> tuple[Step, ...]:
        on = self._on
        parameter = {
            "dry": "dry_multiplier",
            "quadratic_sampling": "smoothing_factor",
            "adaptive_p": "adaptive_target",
            "mirostat": "mirostat_mode",
            "xtc": "xtc_probability",
            "no_repeat_ngram": "no_repeat_ngram_size",
        }
        off = self.ignored.keys() | ({"temperature"} if self.greedy else set())
        names = [name for name in order(params) if parameter.get(name, name) in on.keys() - off]
        return tuple(getattr(self, f"_step_{name}") for name in names)

    # --- one step each --------------------------------------------------------------------------------------

    def _text(self, window: int) -> sm.Indices:
        start = max(self._length - window, 0) if window > 0 else 0
        return self._history[start : self._length]

    def _counted(self) -> tuple[sm.Indices, sm.Indices]:
        """(tokens of the penalty window, how often each occurs), once per token."""
        if self._window is None:
            self._window = np.unique(self._text(int(self._on.get("repetition_penalty_range", 0))), return_counts=True)
        return self._window

    def _step_repetition_penalty(self, c: _Candidates) -> None:
        here, _ = c.positions(self._counted()[0])
        c.logits = sm.repetition_penalty(c.logits, here, self._value("repetition_penalty"))

    def _step_presence_penalty(self, c: _Candidates) -> None:
        tokens, counts = self._counted()
        here, there = c.positions(tokens)
        c.logits = sm.additive_penalty(c.logits, here, counts[there], self._value("presence_penalty"), 0.0)

    def _step_frequency_penalty(self, c: _Candidates) -> None:
        tokens, counts = self._counted()
        here, there = c.positions(tokens)
        c.logits = sm.additive_penalty(c.logits, here, counts[there], 0.0, self._value("frequency_penalty"))

    def _step_encoder_repetition_penalty(self, c: _Candidates) -> None:
        here, _ = c.positions(self._prompt_tokens)
        c.logits = sm.repetition_penalty(c.logits, here, 1 / self._value("encoder_repetition_penalty"))

    def _step_dry(self, c: _Candidates) -> None:
        lengths = sm.dry_matches(self._text(int(self._value("dry_penalty_last_n"))), self._breakers)
        penalties = sm.dry_penalties(
            lengths, self._value("dry_multiplier"), self._value("dry_base"), int(self._value("dry_allowed_length"))
        )
        if penalties:
            tokens = np.fromiter(penalties, dtype=np.int64)
            here, there = c.positions(tokens)
            c.logits = c.logits.copy()
            c.logits[here] -= np.fromiter(penalties.values(), dtype=c.logits.dtype)[there]

    def _step_no_repeat_ngram(self, c: _Candidates) -> None:
        ends = sm.repeated_ngram_ends(self._text(0), int(self._value("no_repeat_ngram_size")))
        if ends:
            c.ban(ends)

    def _step_temperature(self, c: _Candidates) -> None:
        # From the largest logit down, so that a tiny temperature overflows to -inf only.
        with np.errstate(over="ignore"):
            c.logits = (c.logits - c.logits.max()) / self._value("temperature")

    def _step_dynamic_temperature(self, c: _Candidates) -> None:
        low, high = self._value("dynatemp_low"), self._value("dynatemp_high")
        c.logits = sm.dynamic_temperature(c.logits, low, high, self._value("dynatemp_exponent"))

    def _step_quadratic_sampling(self, c: _Candidates) -> None:
        c.logits = sm.quadratic(c.logits, self._value("smoothing_factor"), self._value("smoothing_curve"))

    def _step_top_n_sigma(self, c: _Candidates) -> None:
        c.keep(sm.top_n_sigma(c.logits, self._value("top_n_sigma")))

    def _step_top_k(self, c: _Candidates) -> None:
        c.keep(sm.top_k(c.logits, int(self._value("top_k"))))

    def _step_top_p(self, c: _Candidates) -> None:
        c.keep(sm.top_p(c.logits, self._value("top_p")))

    def _step_typical_p(self, c: _Candidates) -> None:
        c.keep(sm.typical_p(c.logits, self._value("typical_p")))

    def _step_epsilon_cutoff(self, c: _Candidates) -> None:
        c.keep(sm.epsilon_cutoff(c.logits, self._value("epsilon_cutoff") * 1e-4))

    def _step_eta_cutoff(self, c: _Candidates) -> None:
        c.keep(sm.eta_cutoff(c.logits, self._value("eta_cutoff") * 1e-4))

    def _step_tfs(self, c: _Candidates) -> None:
        c.keep(sm.tail_free(c.logits, self._value("tfs")))

    def _step_top_a(self, c: _Candidates) -> None:
        c.keep(sm.top_a(c.logits, self._value("top_a")))

    def _step_min_p(self, c: _Candidates) -> None:
        c.keep(sm.min_p(c.logits, self._value("min_p")))

    def _step_adaptive_p(self, c: _Candidates) -> None:
        target = sm.adaptive_target(self._value("adaptive_target"), self._adaptive_sum, self._adaptive_weight)
        self._adaptive = (c.ids, sm.softmax(c.logits))
        c.logits = sm.adaptive_p(c.logits, target)

    def _step_mirostat(self, c: _Candidates) -> None:
        if self._on["mirostat_mode"] == 1:
            c.keep(sm.mirostat_1(c.logits, self._mu, self._vocab_size))
        else:
            c.keep(sm.mirostat_2(c.logits, self._mu))
        self._mirostat = (c.ids, sm.softmax(c.logits))

    def _step_xtc(self, c: _Candidates) -> None:
        if self._rng.random() >= self._value("xtc_probability"):
            return
        protected = self._protected if c.ids is None else np.flatnonzero(np.isin(c.ids, list(self._protected))).tolist()
        c.keep(sm.xtc(c.logits, self._value("xtc_threshold"), protected))

    def _draw(self, logits: sm.Floats) -> int:
        """One position by its probability: the inverse of the cumulative distribution at one uniform number."""
        if logits.size == 1:
            return 0
        weights = np.exp(logits - logits.max())
        # The block of the uniform number first, then its place inside: adding up a whole vocabulary one by one takes longer.
        starts = np.arange(0, weights.size, _BLOCK)
        blocks = np.cumsum(np.add.reduceat(weights, starts, dtype=np.float64))
        total = float(blocks[-1])
        if not math.isfinite(total) or total <= 0:
            raise FloatingPointError("The model's logits are not finite.")
        point = self._rng.random() * total
        block = min(int(np.searchsorted(blocks, point, side="right")), blocks.size - 1)
        mass = np.cumsum(weights[block * _BLOCK : (block + 1) * _BLOCK], dtype=np.float64)
        rest = point - (float(blocks[block - 1]) if block else 0.0)
        place = int(np.searchsorted(mass, rest, side="right"))
        # Rounding may leave the point just behind the block's end: it belongs to the last token there that has any weight.
        return block * _BLOCK + (place if place < mass.size else int(np.flatnonzero(weights[block * _BLOCK :][: mass.size])[-1]))


def _probability(remembered: tuple[sm.Indices | None, sm.Floats], token: int) -> float:
    ids, probs = remembered
    if ids is None:
        return float(probs[token])
    found = np.flatnonzero(ids == token)
    return float(probs[found[0]]) if found.size else 0.0


def token_logprob(logits: sm.Floats, token: int, alternatives: int, token_text: TokenText) -> TokenLogprob:
    """The chosen token's log-probability and the likeliest `alternatives`, under the model's own distribution: before any
    sampler and at temperature 1. `logits` is [vocab]."""
    logs = sm.log_softmax(logits)
    top = sm.likeliest(logs, alternatives).tolist() if alternatives > 0 else []
    return TokenLogprob(token, token_text(token), float(logs[token]), tuple((i, token_text(i), float(logs[i])) for i in top))
