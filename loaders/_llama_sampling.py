"""Chooses tokens with llama.cpp's own samplers, or with ours for what it lacks. A GBNF grammar is llama.cpp's own affair; JSON
schemas and patterns are `modules.grammar`'s where llguidance is there.

`plan` is the pure half: sampling parameters -> the native samplers in order. `NativeSampler` builds and runs them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from modules import sampling as table
from modules.errors import InvalidGrammar
from modules.samplers import SUPPORTED, SamplerChain, ignored_when_greedy, new_seed, order

if TYPE_CHECKING:
    from loaders._llama_load import LlamaModel
    from modules.grammar import Constraint

# Our sampler names that llama.cpp has no sampler for: a request that sets one is sampled by modules.samplers.
_NOT_NATIVE = frozenset(
    "smoothing_factor smoothing_curve epsilon_cutoff eta_cutoff tfs top_a encoder_repetition_penalty no_repeat_ngram_size".split()
)
_PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
_PARAMETER = {
    "dry": "dry_multiplier",
    "adaptive_p": "adaptive_target",
    "mirostat": "mirostat_mode",
    "xtc": "xtc_probability",
}
_BY_GRAMMAR = "The grammar decides where the text may end."


@dataclass(frozen=True)
class Plan:
    """`samplers`: llama.cpp's samplers and their arguments, in order, the last one picks. `ours`: use modules.samplers."""

    samplers: tuple[tuple[str, dict[str, Any]], ...] = ()
    applied: dict[str, Any] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    ours: bool = False


def plan(sampling: Mapping[str, Any], *, grammar: bool = False) -> Plan:
    """The native samplers for these parameters (checked ones of SUPPORTED), seed and end tokens left open."""
    on = table.active({name: value for name, value in sampling.items() if name in SUPPORTED})
    if on.keys() & _NOT_NATIVE:
        return Plan(ours=True)
    value = table.neutral_values() | dict(sampling)
    greedy = value["temperature"] == 0 and not on.get("dynamic_temperature")
    ignored = ignored_when_greedy(on) if greedy else {}
    if on.get("dynamic_temperature") and "temperature" in on:
        ignored["temperature"] = "Dynamic temperature is on and takes its place."
    if "adaptive_target" in on and "mirostat_mode" in on and not greedy:
        ignored["mirostat_mode"] = "Adaptive-p picks the token."
    if grammar and "ban_eos_token" in on:
        ignored["ban_eos_token"] = _BY_GRAMMAR
    steps: list[tuple[str, dict[str, Any]]] = []
    if "logit_bias" in on or ("ban_eos_token" in on and not grammar):
        steps.append(("logit_bias", {"bias": dict(on.get("logit_bias", {})), "ban_ends": "ban_eos_token" in on and not grammar}))
    last: tuple[str, dict[str, Any]] = ("greedy", {}) if greedy else ("dist", {})
    for name in order(sampling):
        parameter = _PARAMETER.get(name, name)
        if parameter not in on or parameter in ignored:
            continue
        step = _step(name, value, greedy)
        if name in ("adaptive_p", "mirostat") and step is not None:
            last = step
        elif step is not None and step not in steps:
            steps.append(step)
    applied = {name: v for name, v in on.items() if name not in ignored and name != "seed"}
    return Plan((*steps, last), applied, ignored)


def _step(name: str, value: Mapping[str, Any], greedy: bool) -> tuple[str, dict[str, Any]] | None:
    """One of our sampler names as a native sampler with its arguments; the three penalties are one sampler there."""
    if name in _PENALTIES:
        arguments = {short: value[full] for short, full in zip(("repeat", "presence", "frequency"), _PENALTIES, strict=True)}
        return "penalties", {"last_n": value["repetition_penalty_range"], **arguments}
    if name == "temperature":
        return None if greedy else ("temp", {"t": value["temperature"]})
    if name == "dynamic_temperature":
        low, high = value["dynatemp_low"], value["dynatemp_high"]
        return "temp_ext", {"t": (low + high) / 2, "delta": (high - low) / 2, "exponent": value["dynatemp_exponent"]}
    if name == "dry":
        names = ("multiplier", "base", "allowed_length", "penalty_last_n", "sequence_breakers")
        return "dry", {short: value[f"dry_{short}"] for short in names}
    if name == "xtc":
        return "xtc", {"p": value["xtc_probability"], "t": value["xtc_threshold"]}
    if name == "mirostat":
        return f"mirostat_{value['mirostat_mode']}", {"tau": value["mirostat_tau"], "eta": value["mirostat_eta"]}
    if name == "adaptive_p":
        return "adaptive_p", {"target": value["adaptive_target"], "decay": value["adaptive_decay"]}
    if name in ("top_k", "top_p", "min_p", "typical_p", "top_n_sigma"):
        return name, {"value": value[name]}
    return None


def seed_of(sampling: Mapping[str, Any]) -> int:
    """The seed in use. llama.cpp takes 32 bits, and the largest means "random" to it."""
    given = int(sampling.get("seed", -1))
    return new_seed() if given < 0 else given % 0xFFFFFFFF


class NativeSampler:
    """One generation's sampler chain. `next` picks from the logits of the last decode; close it when done."""

    def __init__(
        self,
        model: LlamaModel,
        sampling: Mapping[str, Any],
        prompt_ids: Sequence[int],
        *,
        grammar: str | None,
        end_ids: frozenset[int],
        constraint: Constraint | None = None,
    ) -> None:
        self._model, self._lib = model, model.lib
        self._constraint = constraint
        self._end_ids = sorted(i for i in end_ids or model.eos_ids if 0 <= i < model.n_vocab)
        self.seed = seed_of(sampling)
        self._plan = plan(sampling, grammar=grammar is not None or constraint is not None)
        names = {name for name, _ in self._plan.samplers}
        self._looks_back = bool(names & {"penalties", "dry"})
        self._steers = bool(names & {"mirostat_1", "mirostat_2", "adaptive_p"})
        self._chain = 0
        self._grammar = self._open_grammar(grammar) if grammar is not None else 0
        self._ours: SamplerChain | None = None
        if self._plan.ours:
            self._ours = SamplerChain(
                {name: v for name, v in sampling.items() if name in SUPPORTED} | {"seed": self.seed},
                prompt_ids,
                model.n_vocab,
                eos_ids=self._end_ids,
                breakers=model.breakers,
                protected_ids=model.eos_ids | set(model.encode("\n", False)[-1:]),
                constraint=constraint,
            )
        else:
            self._chain = self._build(prompt_ids)
        self.applied = self._ours.applied if self._ours else self._plan.applied
        self.ignored = self._ours.ignored if self._ours else self._plan.ignored

    def next(self, ban_ends: bool = False) -> int | None:
        """The next token; None when the grammar allows none, so that the text is at its end."""
        lib, ctx = self._lib, self._model.ctx
        if (self._constraint is not None or self._grammar) and self._ours is None:
            return self._next_held()
        if ban_ends and not self._grammar:
            # llama.cpp samples from this very buffer, which the next decode fills anew.
            logits = lib.llama_get_logits_ith(ctx, -1)
            for token in self._end_ids:
                logits[token] = float("-inf")
        if self._ours is not None:
            return self._masked_sample(self._ours) if self._grammar else self._ours.sample(self._model.logits())
        return int(lib.llama_sampler_sample(self._chain, ctx, -1))

    def close(self) -> None:
        for handle in (self._chain, self._grammar):
            if handle:
                self._lib.llama_sampler_free(handle)
        self._chain = self._grammar = 0

    # --- grammar --------------------------------------------------------------------------------------------

    def _open_grammar(self, grammar: str) -> int:
        text = grammar.encode("utf-8", "replace")
        # To llama.cpp an empty grammar is none at all.
        handle = self._lib.llama_sampler_init_grammar(self._model.vocab, text, b"root") if text.strip() else None
        if not handle:
            raise InvalidGrammar(
                f"The grammar can't be read: {self._model.log.last()}.",
                hint="It must be GBNF with a rule named root.",
                param="grammar",
            )
        return int(handle)

    def _next_held(self) -> int | None:
        """Sample freely and keep the token if the form takes it, else once more among those it takes: checking one token is far
        cheaper than the vocabulary. The second draw has a random number of its own, or the last of those tokens would come too
        often. What steers by its own picks (mirostat, adaptive-p) picks among those at once."""
        token = None if self._steers else self._free_sample()
        if token is None or not self._takes(token):
            token = self._pick(self._held_candidates())
            if token is None:
                return None
            if self._constraint is not None:
                self._constraint.accept(token)
        if self._looks_back or self._steers:
            self._lib.llama_sampler_accept(self._chain, token)
        if self._grammar:
            self._lib.llama_sampler_accept(self._grammar, token)
        return token

    def _takes(self, token: int) -> bool:
        import numpy as np

        if self._constraint is not None:
            return self._constraint.takes(token)
        return bool(np.isfinite(self._restrict([token])["logit"]).any())

    def _held_candidates(self) -> Any:
        """The candidates that may come next, with the model's logits."""
        import numpy as np

        if self._constraint is None:
            records = self._restrict(None)
            return records[np.isfinite(records["logit"])]
        allowed = self._constraint.allowed()
        records = self._candidates(allowed)
        records["logit"] = self._model.logits()[allowed]
        return records

    def _free_sample(self) -> int | None:
        """From the whole vocabulary, without telling the samplers what was picked."""
        if not self._looks_back:  # then they keep nothing of what llama.cpp's own call tells them
            return int(self._lib.llama_sampler_sample(self._chain, self._model.ctx, -1))
        return self._pick(self._candidates(None))

    def _candidates(self, tokens: Sequence[int] | None) -> Any:
        """llama_token_data records of these tokens, or of the whole vocabulary with the model's logits."""
        import numpy as np

        ids = np.arange(self._model.n_vocab, dtype=np.int32) if tokens is None else np.array(tokens, dtype=np.int32)
        records = np.zeros(ids.size, dtype=[("id", np.int32), ("logit", np.float32), ("p", np.float32)])
        records["id"] = ids
        if tokens is None:
            records["logit"] = self._model.logits()
        return records

    def _restrict(self, tokens: Sequence[int] | None) -> Any:
        """The candidates with those at -inf that the grammar does not take next."""
        from loaders._llama_capi import TokenDataArray

        records = self._candidates(tokens)
        array = TokenDataArray(records.ctypes.data, records.size, -1, False)
        self._lib.llama_sampler_apply(self._grammar, ctypes.byref(array))
        return records

    def _pick(self, records: Any) -> int | None:
        """What the samplers pick of these candidates; None where there are none."""
        from loaders._llama_capi import TokenDataArray

        if not records.size:
            return None
        array = TokenDataArray(records.ctypes.data, records.size, -1, False)
        self._lib.llama_sampler_apply(self._chain, ctypes.byref(array))
        # The samplers reorder and shorten in place; `selected` indexes what is left.
        return ctypes.c_int32.from_address(array.data + int(array.selected) * records.itemsize).value

    def _masked_sample(self, chain: SamplerChain) -> int | None:
        import numpy as np

        allowed = self._restrict(None)["logit"]
        if not np.isfinite(allowed).any():
            return None
        token = chain.sample(allowed)
        self._lib.llama_sampler_accept(self._grammar, token)
        return token

    # --- the chain ------------------------------------------------------------------------------------------

    def _build(self, prompt_ids: Sequence[int]) -> int:
        from loaders._llama_capi import ChainParams

        lib = self._lib
        chain = int(lib.llama_sampler_chain_init(ChainParams(True)))
        for name, arguments in self._plan.samplers:
            lib.llama_sampler_chain_add(chain, getattr(self, f"_new_{name}")(arguments))
        if self._looks_back:
            for token in prompt_ids[-self._model.context_length :]:
                lib.llama_sampler_accept(chain, token)
        return chain

    def _new_greedy(self, _: dict[str, Any]) -> int:
        return int(self._lib.llama_sampler_init_greedy())

    def _new_dist(self, _: dict[str, Any]) -> int:
        return int(self._lib.llama_sampler_init_dist(self.seed))

    def _new_logit_bias(self, a: dict[str, Any]) -> int:
        from loaders._llama_capi import LogitBias

        biases = {int(token): bias for token, bias in a["bias"].items() if int(token) < self._model.n_vocab}
        if a["ban_ends"]:
            biases |= dict.fromkeys(self._end_ids, float("-inf"))
        array = (LogitBias * max(len(biases), 1))(*(LogitBias(token, bias) for token, bias in biases.items()))
        return int(self._lib.llama_sampler_init_logit_bias(self._model.n_vocab, len(biases), array))

    def _new_penalties(self, a: dict[str, Any]) -> int:
        last_n = a["last_n"] or self._model.context_length
        return int(
            self._lib.llama_sampler_init_penalties(self._model.n_vocab, last_n, a["repeat"], a["frequency"], a["presence"])
        )

    def _new_dry(self, a: dict[str, Any]) -> int:
        breakers = [text.encode("utf-8", "replace") for text in a["sequence_breakers"]]
        array = (ctypes.c_char_p * max(len(breakers), 1))(*breakers)
        last_n = a["penalty_last_n"] or self._model.context_length
        return int(
            self._lib.llama_sampler_init_dry(
                self._model.vocab, a["multiplier"], a["base"], a["allowed_length"], last_n, array, len(breakers)
            )
        )

    def _new_temp(self, a: dict[str, Any]) -> int:
        return int(self._lib.llama_sampler_init_temp(a["t"]))

    def _new_temp_ext(self, a: dict[str, Any]) -> int:
        return int(self._lib.llama_sampler_init_temp_ext(a["t"], a["delta"], a["exponent"]))

    def _new_top_k(self, a: dict[str, Any]) -> int:
        return int(self._lib.llama_sampler_init_top_k(a["value"]))

    def _new_top_p(self, a: dict[str, Any]) -> int:
        return int(self._lib.llama_sampler_init_top_p(a["value"], 1))

    def _new_min_p(self, a: dict[str, Any]) -> int:
        return int(self._lib.llama_sampler_init_min_p(a["value"], 1))

    def _new_typical_p(self, a: dict[str, Any]) -> int:
        return int(self._lib.llama_sampler_init_typical(a["value"], 1))

    def _new_top_n_sigma(self, a: dict[str, Any]) -> int:
        return int(self._lib.llama_sampler_init_top_n_sigma(a["value"]))

    def _new_xtc(self, a: dict[str, Any]) -> int:
        return int(self._lib.llama_sampler_init_xtc(a["p"], a["t"], 1, self.seed))

    def _new_mirostat_1(self, a: dict[str, Any]) -> int:
        return int(self._lib.llama_sampler_init_mirostat(self._model.n_vocab, self.seed, a["tau"], a["eta"], 100))

    def _new_mirostat_2(self, a: dict[str, Any]) -> int:
        return int(self._lib.llama_sampler_init_mirostat_v2(self.seed, a["tau"], a["eta"]))

    def _new_adaptive_p(self, a: dict[str, Any]) -> int:
        return int(self._lib.llama_sampler_init_adaptive_p(a["target"], a["decay"], self.seed))
