"""Each sampler against its definition, on distributions small enough to work out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from modules import sampler_math as sm
from modules import sampling
from modules.samplers import SUPPORTED, SamplerChain, SequenceBreakers, order, token_logprob

PROBS = np.array([0.5, 0.25, 0.125, 0.0625, 0.0625])
LOGITS = np.log(PROBS)


def kept(positions: np.ndarray) -> set[int]:
    return set(positions.tolist())


def shuffled(probs: list[float]) -> tuple[np.ndarray, dict[int, int]]:
    """The same distribution in another order, and where each token went: no sampler may rely on sorted input."""
    permutation = np.random.default_rng(3).permutation(len(probs))
    return np.log(np.array(probs))[permutation], {int(old): new for new, old in enumerate(permutation)}


# --- truncation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "expected"), [(1, {0}), (2, {0, 1}), (3, {0, 1, 2}), (99, {0, 1, 2, 3, 4})])
def test_top_k_keeps_the_k_likeliest(k, expected):
    assert kept(sm.top_k(LOGITS, k)) == expected


@pytest.mark.parametrize(
    ("p", "expected"), [(0.0, {0}), (0.5, {0}), (0.51, {0, 1}), (0.75, {0, 1}), (0.8, {0, 1, 2}), (1.0, {0, 1, 2, 3, 4})]
)
def test_top_p_keeps_the_smallest_set_that_reaches_p(p, expected):
    logits, where = shuffled(PROBS.tolist())
    assert kept(sm.top_p(logits, p)) == {where[i] for i in expected}


def test_top_p_over_a_large_flat_vocabulary_needs_the_tail():
    logits = np.zeros(20_000, dtype=np.float32)
    assert sm.top_p(logits, 0.5).size == pytest.approx(10_000, abs=2)


@pytest.mark.parametrize(("share", "expected"), [(0.0, {0, 1, 2, 3, 4}), (0.24, {0, 1, 2}), (0.4, {0, 1}), (1.0, {0})])
def test_min_p_is_relative_to_the_likeliest(share, expected):
    assert kept(sm.min_p(LOGITS, share)) == expected


def test_top_a_cuts_at_a_times_the_square_of_the_largest():
    # limit = a * 0.25: 0.6 -> 0.15, between the second and the third.
    assert kept(sm.top_a(LOGITS, 0.6)) == {0, 1}
    assert kept(sm.top_a(LOGITS, 0.2)) == {0, 1, 2, 3, 4}


def test_top_n_sigma_counts_standard_deviations_of_the_logits():
    logits = np.array([3.0, 1.0, 1.0, -1.0, -np.inf])  # mean 1, standard deviation sqrt(2)
    assert kept(sm.top_n_sigma(logits, 1.0)) == {0}
    assert kept(sm.top_n_sigma(logits, 1.5)) == {0, 1, 2}
    assert kept(sm.top_n_sigma(logits, 3.0)) == {0, 1, 2, 3}


def test_typical_p_orders_by_distance_from_the_entropy():
    probs = [0.6, 0.2, 0.1, 0.1]
    expected_surprise = -sum(p * math.log(p) for p in probs)  # 1.089 nats
    distances = [abs(-math.log(p) - expected_surprise) for p in probs]
    assert min(range(4), key=distances.__getitem__) == 1  # 0.2 is the most typical, not the likeliest
    assert kept(sm.typical_p(np.log(probs), 0.15)) == {1}
    assert kept(sm.typical_p(np.log(probs), 0.75)) == {0, 1}


@pytest.mark.parametrize(("epsilon", "expected"), [(0.07, {0, 1, 2}), (0.2, {0, 1}), (0.9, {0})])
def test_epsilon_cutoff_is_absolute_and_keeps_one(epsilon, expected):
    assert kept(sm.epsilon_cutoff(LOGITS, epsilon)) == expected


def test_eta_cutoff_relaxes_where_entropy_is_high():
    sure, unsure = np.log([0.9, 0.06, 0.04]), np.log([0.4, 0.3, 0.2, 0.06, 0.04])
    # sqrt(.05) * exp(-.39) = .151 and sqrt(.05) * exp(-1.35) = .058: the first keeps epsilon = .05, the second is .058 > .05 too.
    assert kept(sm.eta_cutoff(sure, 0.05)) == {0, 1}
    # epsilon .1: min(.1, .316 * exp(-1.35) = .0819) lets .06 go but a token of .09 would stay; epsilon alone would drop it.
    assert math.sqrt(0.1) * math.exp(-sm.entropy(sm.softmax(unsure))) < 0.1
    nearly = np.log([0.4, 0.3, 0.2, 0.09, 0.01])
    assert kept(sm.eta_cutoff(nearly, 0.1)) == {0, 1, 2, 3}
    assert kept(sm.epsilon_cutoff(nearly, 0.1)) == {0, 1, 2}


def test_tail_free_cuts_where_the_curvature_fades():
    logits, where = shuffled([0.5, 0.3, 0.1, 0.06, 0.03, 0.01])
    # differences -.2 -.2 -.04 -.03 -.02; second 0 .16 .01 .01; share 0 .889 .944 1
    assert kept(sm.tail_free(logits, 0.5)) == {where[0], where[1]}
    assert kept(sm.tail_free(logits, 0.9)) == {where[0], where[1], where[2]}


def test_xtc_drops_the_top_but_the_least_likely_above_the_threshold():
    assert kept(sm.xtc(LOGITS, 0.1, ())) == {2, 3, 4}
    assert kept(sm.xtc(LOGITS, 0.3, ())) == {0, 1, 2, 3, 4}  # only one above: nothing to exclude
    assert kept(sm.xtc(LOGITS, 0.1, {1})) == {0, 1, 2, 3, 4}  # would take a protected token
    assert kept(sm.xtc(LOGITS, 0.1, {2})) == {2, 3, 4}


def test_mirostat_2_drops_tokens_of_more_surprise_than_mu():
    assert kept(sm.mirostat_2(LOGITS, 1.0)) == {0}
    assert kept(sm.mirostat_2(LOGITS, 2.5)) == {0, 1}
    assert kept(sm.mirostat_2(LOGITS, -3.0)) == {0}


def test_mirostat_1_on_a_zipf_law_finds_its_exponent():
    rank = np.arange(1, 1001)
    logits = -1.5 * np.log(rank)  # Zipf with s = 1.5
    mu, n = 5.0, 1000
    eps = 0.5
    k = ((eps * 2**mu) / (1 - n**-eps)) ** (1 / 1.5)
    assert sm.mirostat_1(logits, mu, n).size == int(k)
    assert sm.mirostat_1(logits, 0.0, n).size == 1


@pytest.mark.parametrize(
    "truncate",
    [
        lambda x: sm.top_k(x, 0),
        lambda x: sm.top_p(x, 0.0),
        lambda x: sm.min_p(x, 1.0),
        lambda x: sm.top_a(x, 1.0),
        lambda x: sm.top_n_sigma(x, 0.001),
        lambda x: sm.typical_p(x, 0.0),
        lambda x: sm.epsilon_cutoff(x, 1.0),
        lambda x: sm.eta_cutoff(x, 1.0),
        lambda x: sm.tail_free(x, 0.0),
        lambda x: sm.mirostat_1(x, -50.0, x.size),
        lambda x: sm.mirostat_2(x, -50.0),
        lambda x: sm.xtc(x, 0.0, ()),
    ],
)
@pytest.mark.parametrize("logits", [LOGITS, np.zeros(7), np.array([0.0]), np.array([5.0, -np.inf, 5.0])])
def test_a_truncator_never_leaves_nothing(truncate, logits):
    positions = truncate(logits)
    assert positions.size >= 1
    assert np.isfinite(logits[positions]).any()


# --- penalties and shape ------------------------------------------------------------------------------------------


def test_repetition_penalty_divides_positive_and_multiplies_negative():
    logits = np.array([2.0, -2.0, 2.0, -2.0])
    assert sm.repetition_penalty(logits, np.array([0, 1]), 2.0).tolist() == [1.0, -4.0, 2.0, -2.0]
    assert logits.tolist() == [2.0, -2.0, 2.0, -2.0]


def test_additive_penalties_count():
    out = sm.additive_penalty(np.zeros(4), np.array([1, 3]), np.array([1, 5]), 0.5, 0.1)
    assert out.tolist() == pytest.approx([0.0, -0.6, 0.0, -1.0])


def test_dry_measures_the_repeat_a_token_would_go_on_with():
    history = np.array([1, 2, 3, 4, 9, 9, 1, 2, 3])
    assert sm.dry_matches(history, frozenset()) == {4: 3}
    assert sm.dry_matches(history, frozenset({2})) == {4: 1}  # the breaker ends the match
    assert sm.dry_matches(history, frozenset({3})) == {}  # the text itself ends in a breaker
    assert sm.dry_matches(history, frozenset({4})) == {}  # a breaker may always come
    assert sm.dry_matches(np.array([5, 5, 5, 5]), frozenset()) == {5: 3}


def test_dry_penalty_grows_exponentially_from_the_allowed_length():
    assert sm.dry_penalties({4: 3, 5: 2, 6: 1}, 0.8, 1.75, 2) == {4: pytest.approx(0.8 * 1.75), 5: pytest.approx(0.8)}


def test_dry_match_is_capped():
    history = np.tile(np.arange(3), 200)
    assert set(sm.dry_matches(history, frozenset()).values()) == {sm.DRY_LONGEST_MATCH}


@pytest.mark.parametrize(("size", "expected"), [(1, {1, 2, 3}), (2, {3}), (3, {3}), (4, set()), (9, set()), (0, set())])
def test_no_repeat_ngram(size, expected):
    assert sm.repeated_ngram_ends(np.array([1, 2, 3, 1, 2]), size) == expected


def test_dynamic_temperature_reaches_its_ends():
    flat, sharp = np.zeros(8), np.array([200.0, 0.0, 0.0])
    assert np.ptp(sm.dynamic_temperature(np.log([0.5, 0.5, 1e-30]), 0.5, 2.0, 1.0)[:2]) == 0
    peaked = sm.dynamic_temperature(sharp, 0.5, 2.0, 1.0)  # entropy 0: the low end
    assert peaked[0] - peaked[1] == pytest.approx(400.0)
    assert sm.dynamic_temperature(flat, 0.5, 2.0, 1.0).tolist() == [0.0] * 8
    probs = np.array([0.7, 0.2, 0.1])
    share = sm.entropy(probs) / math.log(3)
    out = sm.dynamic_temperature(np.log(probs), 0.5, 2.0, 2.0)
    assert out[0] - out[2] == pytest.approx(math.log(7) / (0.5 + 1.5 * share**2))


def test_quadratic_sampling():
    logits = np.array([1.0, 0.0, -1.0, -np.inf])
    assert sm.quadratic(logits, 0.5, 1.0).tolist() == pytest.approx([1.0, 0.5, -1.0, -math.inf])
    # curve 2: half of factor * d**2 plus half of factor * d**3
    assert sm.quadratic(logits, 1.0, 2.0).tolist() == pytest.approx([1.0, 1 - 0.5 - 0.5, 1 - 2.0 - 4.0, -math.inf])


def test_adaptive_p_favours_probabilities_at_the_target():
    shaped = sm.adaptive_p(LOGITS, 0.25)
    assert int(shaped.argmax()) == 1
    assert shaped[1] == pytest.approx(5.0)
    distance = 0.25 / 0.3
    assert shaped[0] == pytest.approx(5.0 - 10 * distance**2 / (1 + distance))
    assert sm.adaptive_target(0.3, 3.0, 10.0) == pytest.approx(0.3)
    assert sm.adaptive_target(0.3, 5.0, 10.0) == pytest.approx(0.1)
    assert sm.adaptive_target(0.3, 10.0, 10.0) == 0.0


# --- the chain ----------------------------------------------------------------------------------------------------


def draws(params: dict, count: int = 4000, logits: np.ndarray = LOGITS, prompt: tuple[int, ...] = ()) -> np.ndarray:
    """Shares of each token over independent draws (a fresh history each time)."""
    counts = np.zeros(logits.size)
    for seed in range(count):
        chain = SamplerChain(sampling.check(params | {"seed": seed}), prompt, logits.size)
        counts[chain.sample(logits)] += 1
    return counts / count


def test_neutral_sampling_follows_the_model():
    assert draws({}).tolist() == pytest.approx(PROBS.tolist(), abs=0.03)


def test_temperature_sharpens_as_defined():
    squared = PROBS**2 / (PROBS**2).sum()
    assert draws({"temperature": 0.5}).tolist() == pytest.approx(squared.tolist(), abs=0.03)


def test_truncation_renormalises():
    assert draws({"top_k": 2}).tolist() == pytest.approx([2 / 3, 1 / 3, 0, 0, 0], abs=0.03)


def test_xtc_happens_as_often_as_asked():
    shares = draws({"xtc_probability": 0.5, "xtc_threshold": 0.1})
    assert shares[0] == pytest.approx(0.25, abs=0.03)
    assert shares[2] == pytest.approx(0.5 * 0.125 + 0.5 * 0.5, abs=0.03)


def test_order_matters_and_can_be_chosen():
    # top_p 0.6 keeps {0, 1}; after a temperature of 0.1 it keeps {0} alone.
    params = {"temperature": 0.1, "top_p": 0.6}
    assert draws(params | {"sampler_priority": ["temperature", "top_p"]}, 300)[1] == 0
    late = {"temperature": 10.0, "top_p": 0.6}
    assert set(np.flatnonzero(draws(late | {"temperature_last": True}, 300))) == {0, 1}
    assert len(np.flatnonzero(draws(late, 300))) > 2


def test_order_lists_every_sampler_once():
    chosen = order({"sampler_priority": ("xtc", "top_k")})
    assert chosen[:2] == ("xtc", "top_k")
    assert sorted(chosen) == sorted(sampling.SAMPLER_ORDER)
    assert order({"temperature_last": True})[-3:] == ("temperature", "dynamic_temperature", "quadratic_sampling")


def test_same_seed_same_tokens_and_another_seed_differs():
    def run(seed: int) -> list[int]:
        chain = SamplerChain(sampling.check({"seed": seed, "temperature": 2.0}), (), 5)
        return [chain.sample(LOGITS) for _ in range(64)]

    assert run(7) == run(7)
    assert run(7) != run(8)


def test_a_random_seed_is_reported_and_repeats():
    first = SamplerChain(sampling.check({"seed": -1}), (), 5)
    again = SamplerChain(sampling.check({"seed": first.seed}), (), 5)
    assert [first.sample(LOGITS) for _ in range(32)] == [again.sample(LOGITS) for _ in range(32)]


def test_greedy_is_argmax_after_penalties():
    chain = SamplerChain(sampling.check({"temperature": 0, "top_k": 1}), (), 5)
    assert chain.is_argmax
    assert chain.sample(LOGITS) == 0
    assert chain.ignored == {"top_k": "Temperature 0 always takes the likeliest token."}
    assert "temperature" in chain.applied
    penalised = SamplerChain(sampling.check({"temperature": 0, "presence_penalty": 2.0}), (0,), 5)
    assert not penalised.is_argmax
    assert penalised.sample(LOGITS) == 1


def test_the_penalty_window_forgets():
    params = {"temperature": 0, "presence_penalty": 2.0, "repetition_penalty_range": 1}
    chain = SamplerChain(sampling.check(params), (0,), 5)
    assert [chain.sample(LOGITS) for _ in range(4)] == [1, 0, 1, 0]


def test_frequency_penalty_counts_the_answer_too():
    chain = SamplerChain(sampling.check({"temperature": 0, "frequency_penalty": 0.5}), (), 2)
    logits = np.array([1.0, 0.2])
    assert [chain.sample(logits) for _ in range(5)] == [0, 0, 1, 0, 1]


def test_bans_biases_and_minimum_length():
    chain = SamplerChain(sampling.check({"temperature": 0, "ban_eos_token": True}), (), 5, eos_ids=(0,))
    assert chain.sample(LOGITS) == 1
    chain = SamplerChain(sampling.check({"temperature": 0}), (), 5, eos_ids=(0, 1))
    assert chain.sample(LOGITS, ban_ends=True) == 2
    assert chain.sample(LOGITS) == 0
    biased = SamplerChain(sampling.check({"temperature": 0, "logit_bias": {"3": 10, "99": 5}}), (), 5)
    assert biased.sample(LOGITS) == 3
    assert LOGITS.tolist() == np.log(PROBS).tolist()  # the model's row is never written to


def test_a_ban_that_leaves_nothing_is_not_applied():
    chain = SamplerChain(sampling.check({"temperature": 0, "no_repeat_ngram_size": 1}), (0, 1, 2, 3, 4), 5)
    assert chain.sample(LOGITS) == 0


def test_penalties_after_truncation_find_their_tokens():
    params = {"temperature": 0.0, "sampler_priority": ["top_k", "repetition_penalty"], "repetition_penalty": 5.0}
    assert SamplerChain(sampling.check(params), (0,), 5).sample(np.array([1.0, 0.9, 0.1, 0, 0])) == 1
    params = {"top_k": 2, "no_repeat_ngram_size": 1, "seed": 1}
    chain = SamplerChain(sampling.check(params), (0, 4), 5)
    assert chain.sample(LOGITS) == 1


def test_dry_uses_breakers_by_text():
    texts = ["a", "b", ":", "c", "d"]
    breakers = SequenceBreakers(5, texts.__getitem__)
    params = {"temperature": 0, "dry_multiplier": 10.0, "dry_allowed_length": 1}
    repeat = (0, 1, 3, 0, 1)
    logits = np.array([0.0, 0.0, 0.0, 2.0, 1.0])
    assert SamplerChain(sampling.check(params), repeat, 5, breakers=breakers).sample(logits) == 4
    broken = (0, 2, 3, 0, 2)
    assert SamplerChain(sampling.check(params), broken, 5, breakers=breakers).sample(logits) == 3


def test_encoder_penalty_favours_the_prompt():
    logits = np.array([1.0, 1.1, 0.5])
    chain = SamplerChain(sampling.check({"temperature": 0, "encoder_repetition_penalty": 1.3}), (0,), 3)
    assert chain.sample(logits) == 0


@pytest.mark.parametrize("mode", [1, 2])
def test_mirostat_steers_to_its_target(mode):
    rng = np.random.default_rng(0)
    logits = -1.1 * np.log(np.arange(1, 2001)) + rng.normal(0, 0.05, 2000)

    def mean_surprise(tau: float) -> float:
        params = {"mirostat_mode": mode, "mirostat_tau": tau, "mirostat_eta": 0.1, "seed": 5}
        chain = SamplerChain(sampling.check(params), (), logits.size)
        surprises = []
        for _ in range(400):
            candidates = sm.mirostat_2(logits, chain._mu) if mode == 2 else sm.mirostat_1(logits, chain._mu, logits.size)
            probs = dict(zip(candidates.tolist(), sm.softmax(logits[candidates]).tolist(), strict=True))
            surprises.append(-math.log2(probs[chain.sample(logits)]))
        return float(np.mean(surprises[100:]))

    assert mean_surprise(3.0) == pytest.approx(3.0, abs=0.35)
    assert mean_surprise(5.0) == pytest.approx(5.0, abs=0.35)


def test_adaptive_p_brings_the_mean_probability_to_the_target():
    probs = np.array([0.4, 0.2, 0.1, 0.1, 0.1, 0.05, 0.05])
    for target in (0.1, 0.3):
        chain = SamplerChain(sampling.check({"adaptive_target": target, "seed": 2}), (), probs.size)
        chosen = [probs[chain.sample(np.log(probs))] for _ in range(600)]
        assert np.mean(chosen) == pytest.approx(target, abs=0.04)


def test_dynamic_temperature_takes_the_place_of_the_plain_one():
    params = sampling.check({"temperature": 0.1, "dynamic_temperature": True, "dynatemp_low": 1.0, "dynatemp_high": 3.0})
    chain = SamplerChain(params, (), 5)
    assert set(chain.ignored) == {"temperature"}
    assert "temperature" not in chain.applied


def test_tiny_temperature_is_stable():
    chain = SamplerChain(sampling.check({"temperature": 1e-40, "seed": 1}), (), 5)
    assert {chain.sample(LOGITS.astype(np.float32)) for _ in range(20)} == {0}


def test_nan_logits_are_an_error_not_a_token():
    chain = SamplerChain(sampling.check({"seed": 1}), (), 3)
    with pytest.raises(FloatingPointError):
        chain.sample(np.array([np.nan, 1.0, 2.0]))


@pytest.mark.parametrize("name", sorted(SUPPORTED & set(sampling.SAMPLER_ORDER)))
def test_every_supported_sampler_runs_on_float32(name):
    """One active value each, alone, through the chain, with a history."""
    values = {"temperature": 0.7, "top_k": 3, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.2, "presence_penalty": 0.5}
    values |= {"frequency_penalty": 0.5, "top_n_sigma": 1.0, "typical_p": 0.5, "epsilon_cutoff": 100.0, "eta_cutoff": 100.0}
    values |= {"tfs": 0.8, "top_a": 0.3, "encoder_repetition_penalty": 1.2, "dynamic_temperature": True}
    chain = SamplerChain(sampling.check({name: values[name], "seed": 4}), (0, 1, 2), 5)
    logits = LOGITS.astype(np.float32)
    assert all(0 <= chain.sample(logits) < 5 for _ in range(30))
    assert name in chain.applied


def test_token_logprobs_are_the_models_own():
    entry = token_logprob(LOGITS, 1, 2, lambda i: f"<{i}>")
    assert entry.logprob == pytest.approx(math.log(0.25))
    assert [(i, text) for i, text, _ in entry.top] == [(0, "<0>"), (1, "<1>")]
    assert entry.top[0][2] == pytest.approx(math.log(0.5))
    assert token_logprob(LOGITS, 4, 0, str).top == ()
