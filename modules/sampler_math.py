"""Samplers as pure functions over one row of logits, each from its own definition.

Shapes: `logits` is a 1-D float array over the candidates (the whole vocabulary, or what earlier samplers left), natural-log
units, -inf for a banned candidate. Penalties and reshapers return new logits of the same length. Truncators return the
positions to keep (at least one, in no promised order). Nothing here has state; `modules.samplers.SamplerChain` holds it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Indices = NDArray[np.integer]

# The tail of a large vocabulary is sorted only when the likeliest this many don't decide.
_HEAD = 512
# p-e-w's own cap on the match length: it bounds the cost and keeps base ** length finite.
DRY_LONGEST_MATCH = 50
# Mirostat 1 estimates the Zipf exponent from this many likeliest tokens (the paper's m).
MIROSTAT_M = 100
# llama.cpp's adaptive-p curve: quadratic near the target, linear far from it.
_ADAPTIVE_PEAK, _ADAPTIVE_SHARPNESS, _ADAPTIVE_WIDTH = 5.0, 10.0, 0.3


def softmax(logits: Floats) -> Floats:
    weights = np.exp(logits - logits.max())
    return np.asarray(weights / weights.sum())


def log_softmax(logits: Floats) -> Floats:
    shifted = logits - logits.max()
    return np.asarray(shifted - math.log(float(np.exp(shifted).sum(dtype=np.float64))))


def entropy(probs: Floats) -> float:
    """Shannon entropy in nats; a zero probability counts nothing."""
    positive = probs[probs > 0]
    return float(-(positive * np.log(positive)).sum())


def _descending(values: Floats) -> Indices:
    return np.asarray(np.argsort(-values, kind="stable"))


def guided(logits: Floats, negative: Floats, scale: float) -> Floats:
    """Classifier-free guidance (Sanchez et al. 2023) on log-softmax scores: negative + scale * (positive - negative)."""
    calm = log_softmax(negative)
    return np.asarray(calm + scale * (log_softmax(logits) - calm))


def likeliest(values: Floats, count: int) -> Indices:
    """The positions of the `count` largest values, largest first."""
    if count >= values.size:
        return _descending(values)
    head = np.argpartition(values, values.size - count)[-count:]
    return np.asarray(head[np.argsort(-values[head], kind="stable")])


# --- penalties -------------------------------------------------------------------------------------------------


def repetition_penalty(logits: Floats, seen: Indices, penalty: float) -> Floats:
    """Keskar et al. 2019 (CTRL), in the form of HF transformers: a seen token's positive logit is divided by the penalty, a
    negative one multiplied. `seen` are positions without repeats."""
    out: Floats = logits.copy()
    chosen = out[seen]
    out[seen] = np.where(chosen < 0, chosen * penalty, chosen / penalty)
    return out


def additive_penalty(logits: Floats, seen: Indices, counts: NDArray[np.integer], presence: float, frequency: float) -> Floats:
    """OpenAI's presence (once) and frequency (per occurrence) penalties: logit - presence - frequency * count."""
    out: Floats = logits.copy()
    out[seen] -= (presence + frequency * counts).astype(out.dtype)
    return out


def dry_matches(history: NDArray[np.integer], breakers: frozenset[int]) -> dict[int, int]:
    """DRY (p-e-w 2024): token -> length of the longest end of `history` that it would repeat, if it came next.

    For each earlier place where the last token stood, count how far the text before agrees with the text's own end, stopping
    at a sequence breaker; the token that followed there would go on with that repeat.
    """
    lengths: dict[int, int] = {}
    if history.size < 2 or int(history[-1]) in breakers:
        return lengths
    tokens = history.tolist()
    end = len(tokens) - 1
    for place in np.flatnonzero(history[:-1] == history[-1]).tolist():
        follower = tokens[place + 1]
        if follower in breakers:
            continue
        length = 1
        while length < DRY_LONGEST_MATCH and length <= place:
            before = tokens[end - length]
            if tokens[place - length] != before or before in breakers:
                break
            length += 1
        lengths[follower] = max(lengths.get(follower, 0), length)
    return lengths


def dry_penalties(lengths: Mapping[int, int], multiplier: float, base: float, allowed: int) -> dict[int, float]:
    """DRY: what to subtract from each token's logit: multiplier * base ** (length - allowed), from the allowed length on."""
    return {token: multiplier * base ** (length - allowed) for token, length in lengths.items() if length >= allowed}


def repeated_ngram_ends(history: NDArray[np.integer], size: int) -> set[int]:
    """Tokens that would complete an n-gram of `size` tokens that `history` already holds (Paulus et al. 2017)."""
    if size < 1 or history.size < size:
        return set()
    if size == 1:
        return set(history.tolist())
    windows = np.lib.stride_tricks.sliding_window_view(history, size)
    same = (windows[:, :-1] == history[history.size - size + 1 :]).all(axis=1)
    return set(windows[same, -1].tolist())


# --- reshaping -------------------------------------------------------------------------------------------------


def dynamic_temperature(logits: Floats, low: float, high: float, exponent: float) -> Floats:
    """Entropy-driven temperature (kalomaze 2023): low + (high - low) * (entropy / largest possible entropy) ** exponent."""
    probs = softmax(logits)
    possible = int((probs > 0).sum())
    share = entropy(probs) / math.log(possible) if possible > 1 else 0.0
    temperature = low + (high - low) * min(max(share, 0.0), 1.0) ** exponent
    return np.asarray((logits - logits.max()) / max(temperature, 1e-6))


def quadratic(logits: Floats, factor: float, curve: float) -> Floats:
    """Quadratic sampling (kalomaze 2024): with d the distance from the largest logit,
    max - factor * d**2 * (3 - curve)/2 + factor * d**3 * (curve - 1)/2, d being negative."""
    top = logits.max()
    finite = np.isfinite(logits)
    distance = np.where(finite, logits - top, 0.0)
    shaped = top - factor * (3 - curve) / 2 * distance**2 + factor * (curve - 1) / 2 * distance**3
    return np.where(finite, shaped, -np.inf)


def adaptive_p(logits: Floats, target: float) -> Floats:
    """llama.cpp's adaptive-p: logits that peak where a token's probability equals `target`, with slowly falling tails.

    peak - sharpness * d**2 / (1 + d), d = |p - target| / width. `adaptive_target` moves the target between tokens.
    """
    distance = np.abs(softmax(logits) - target) / _ADAPTIVE_WIDTH
    shaped = _ADAPTIVE_PEAK - _ADAPTIVE_SHARPNESS * distance**2 / (1 + distance)
    return np.where(np.isfinite(logits), shaped, -np.inf)


def adaptive_target(target: float, weighted_sum: float, total_weight: float) -> float:
    """Adaptive-p: aim past the target by as much as the decayed mean of the chosen probabilities fell short of it."""
    aim = target if total_weight == 0 else 2 * target - weighted_sum / total_weight
    return min(max(aim, 0.0), 1.0)


# --- truncation ------------------------------------------------------------------------------------------------


def top_k(logits: Floats, k: int) -> Indices:
    """The k likeliest (Fan et al. 2018)."""
    return likeliest(logits, max(k, 1))


def top_p(logits: Floats, p: float) -> Indices:
    """Nucleus sampling: the smallest set of likeliest tokens whose probability reaches p (Holtzman et al. 2019)."""
    probs = softmax(logits)
    count = _HEAD
    while True:
        order = likeliest(probs, count)
        mass = np.cumsum(probs[order], dtype=np.float64)
        if mass[-1] >= p or order.size == probs.size:
            return np.asarray(order[: int(np.searchsorted(mass, p)) + 1])
        count *= 8


def min_p(logits: Floats, share: float) -> Indices:
    """Tokens at least `share` times as likely as the likeliest (Nguyen et al. 2024)."""
    if share <= 0:
        return np.arange(logits.size)
    return np.flatnonzero(logits >= logits.max() + math.log(share))


def top_a(logits: Floats, a: float) -> Indices:
    """Tokens with at least a * (largest probability)**2 (BlinkDL 2022)."""
    probs = softmax(logits)
    top = probs.max()
    return np.flatnonzero(probs >= min(a * top * top, top))


def top_n_sigma(logits: Floats, n: float) -> Indices:
    """Logits within n standard deviations of the largest (Tang et al. 2024); banned tokens count nothing."""
    finite = logits[np.isfinite(logits)]
    return np.flatnonzero(logits >= finite.max() - n * finite.std())


def typical_p(logits: Floats, p: float) -> Indices:
    """Locally typical sampling (Meister et al. 2022): tokens in order of | -log p - entropy | until their mass reaches p."""
    probs = softmax(logits)
    with np.errstate(divide="ignore"):
        distance = np.abs(-np.log(probs) - entropy(probs))
    order = np.argsort(distance, kind="stable")
    mass = np.cumsum(probs[order], dtype=np.float64)
    return np.asarray(order[: int(np.searchsorted(mass, p)) + 1])


def epsilon_cutoff(logits: Floats, epsilon: float) -> Indices:
    """Tokens of at least this probability (Hewitt et al. 2022); the likeliest always stays."""
    probs = softmax(logits)
    return np.flatnonzero(probs >= min(epsilon, float(probs.max())))


def eta_cutoff(logits: Floats, epsilon: float) -> Indices:
    """Like epsilon, with min(epsilon, sqrt(epsilon) * exp(-entropy)) as the limit (Hewitt et al. 2022)."""
    return epsilon_cutoff(logits, min(epsilon, math.sqrt(epsilon) * math.exp(-entropy(softmax(logits)))))


def tail_free(logits: Floats, z: float) -> Indices:
    """Tail-free sampling (Bricken 2019): cut the sorted probabilities where the shares of |second derivative| sum up to z."""
    probs = softmax(logits)
    order = _descending(probs)
    if order.size < 3:
        return order
    curvature = np.abs(np.diff(probs[order], n=2))
    total = curvature.sum()
    if total <= 0:
        return order
    # The k-th second difference belongs to the token in the middle of its three, so the first token always stays.
    return order[: 1 + int(np.searchsorted(np.cumsum(curvature / total), z, side="right"))]


def xtc(logits: Floats, threshold: float, protected: Iterable[int]) -> Indices:
    """Exclude top choices (p-e-w 2024): of the tokens at or above the threshold only the least likely stays.

    Nothing is dropped where that would take a `protected` position (end of text, newline).
    """
    probs = softmax(logits)
    above = np.flatnonzero((probs >= threshold) & (probs > 0))
    everything = np.arange(logits.size)
    if above.size < 2:
        return everything
    dropped = np.delete(above, int(np.argmin(probs[above])))
    if set(dropped.tolist()) & set(protected):
        return everything
    return np.delete(everything, dropped)


def mirostat_1(logits: Floats, mu: float, vocab_size: int) -> Indices:
    """Mirostat (Basu et al. 2020): the k likeliest, with k from the head's Zipf exponent and the aim `mu` (bits)."""
    probs = softmax(logits)
    head = likeliest(probs, MIROSTAT_M)
    sorted_probs = probs[head].astype(np.float64)
    sorted_probs = sorted_probs[sorted_probs > 0]
    if sorted_probs.size < 2:
        return head[:1]
    rank = np.arange(1, sorted_probs.size)
    t = np.log((rank + 1) / rank)
    b = np.log(sorted_probs[:-1] / sorted_probs[1:])
    s = float((t * b).sum() / (t * t).sum())
    if s <= 0:
        return likeliest(probs, 1)
    eps = s - 1
    scale = eps / (1 - vocab_size**-eps) if abs(eps) > 1e-9 else 1 / math.log(vocab_size)
    exponent = (math.log(scale) + mu * math.log(2)) / s
    k = logits.size if exponent > math.log(logits.size) else max(int(math.exp(exponent)), 1)
    return likeliest(probs, k)


def mirostat_2(logits: Floats, mu: float) -> Indices:
    """Mirostat 2: tokens whose surprise in bits is at most `mu`; the likeliest always stays."""
    probs = softmax(logits)
    with np.errstate(divide="ignore"):
        surprise = -np.log2(probs)
    return np.flatnonzero(surprise <= max(mu, float(surprise.min())))
