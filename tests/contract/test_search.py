"""Contrastive search and guidance against their definitions, written out plainly here: whole texts, no cache, no batch."""

from __future__ import annotations

import json
import math
import subprocess
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from modules import sampling
from modules.errors import ContextLengthExceeded
from modules.schema import StopParams
from tests.contract.rows import ROWS, STORY, Row

if TYPE_CHECKING:
    from modules.overlays import Overlays
    from tests.contract.conftest import Bench

FEW = StopParams(max_tokens=24, ignore_eos=True)
CONTRAST = {"penalty_alpha": 0.6, "top_k": 4}

# Su et al. 2022, equation 5, one whole forward pass for each candidate.
REFERENCE = """
import json, sys, torch
from transformers import AutoModelForCausalLM
path, ids, alpha, k, count = json.loads(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
found = []
with torch.inference_mode():
    for _ in range(count):
        out = model(torch.tensor([ids]), output_hidden_states=True)
        chances, tokens = out.logits[0, -1].float().softmax(-1).topk(k)
        past = out.hidden_states[-1][0]
        best = None
        for chance, token in zip(chances.tolist(), tokens.tolist()):
            after = model(torch.tensor([ids + [token]]), output_hidden_states=True).hidden_states[-1][0, -1]
            likeness = torch.cosine_similarity(past, after[None], dim=-1).max().item()
            score = (1 - alpha) * chance - alpha * likeness
            if best is None or score > best[0]:
                best = (score, token)
        ids = ids + [best[1]]
        found.append(best[1])
print(json.dumps(found))
"""


# One row of each build is enough for what does not hang on the model.
MINE = [r for r in ROWS if (r.id.endswith("-wren") and r.loader != "remote") or r.id.startswith("xllamacpp_server")]


@pytest.fixture(scope="module", params=MINE, ids=lambda row: row.id)
def row(request: pytest.FixtureRequest, overlays: Overlays) -> Row:
    reason = request.param.skip_reason(overlays)
    if reason:
        pytest.skip(reason)
    row: Row = request.param
    return row


def needs(bench: Bench, parameter: str) -> None:
    if parameter not in bench.spec.samplers:
        pytest.skip(f"{bench.spec.title} has no {parameter}")


def contrast(**more: Any) -> dict[str, Any]:
    return sampling.check({**CONTRAST, **more})


@pytest.mark.rows(loader="transformers")  # the reference reads the model as Transformers does
def test_contrastive_search_is_the_papers(bench: Bench, overlays: Overlays) -> None:
    prompt = bench.run(bench.client.encode(STORY, add_special=True))
    question = json.dumps([str(bench.row.model()), prompt, 0.6, 4, 24])
    line = [str(overlays.python("transformers")), "-c", REFERENCE, question]
    environment = overlays.worker_env("transformers")
    ran = subprocess.run(line, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert ran.returncode == 0, ran.stderr
    answer = bench.generate(STORY, sampling=contrast(), stop=FEW)
    assert answer.ids == json.loads(ran.stdout)
    assert answer.end.applied == CONTRAST
    assert answer.ids != bench.generate(STORY, stop=FEW).ids


def test_contrastive_search_in_every_loader_that_has_it(bench: Bench) -> None:
    needs(bench, "penalty_alpha")
    greedy = bench.generate(STORY, stop=FEW)
    assert bench.generate(STORY, sampling=contrast(penalty_alpha=1e-7), stop=FEW).ids == greedy.ids  # likelihood alone
    first = bench.generate(STORY, sampling=contrast(temperature=0.7), stop=FEW)
    assert first.ids == bench.generate(STORY, sampling=contrast(), stop=FEW).ids != greedy.ids
    assert len(first.tokens) > 4, "it comes token by token"
    assert set(first.end.ignored) == {"temperature"}
    assert bench.generate(STORY, stop=FEW).ids == greedy.ids, "the next request finds its cache as it was"


def test_contrastive_search_keeps_the_stop_rules(bench: Bench) -> None:
    needs(bench, "penalty_alpha")
    whole = bench.generate(STORY, sampling=contrast(), stop=FEW)
    stop = whole.text[12:16]
    cut = bench.generate(STORY, sampling=contrast(), stop=replace(FEW, stop=(stop,)))
    assert cut.text == whole.text[: whole.text.index(stop)] and cut.end.finish_reason == "stop"
    aborted = bench.generate(STORY, sampling=contrast(), stop=StopParams(max_tokens=200, ignore_eos=True), abort_after=3)
    assert aborted.end.finish_reason == "cancelled" and len(aborted.ids) < 200
    held = bench.generate(STORY, sampling=contrast(), grammar='root ::= "yes" | "no"')
    assert held.text in {"yes", "no"} and held.end.finish_reason == "stop"


def test_contrastive_search_needs_candidates(bench: Bench) -> None:
    needs(bench, "penalty_alpha")
    answer = bench.generate(STORY, sampling=sampling.check({"penalty_alpha": 0.6, "temperature": 0}), stop=FEW)
    assert "top_k" in answer.end.ignored["penalty_alpha"]
    assert answer.ids == bench.generate(STORY, stop=FEW).ids


# --- guidance -------------------------------------------------------------------------------------------------------


def rows_of(bench: Bench, ids: list[int], vocab: int, count: int, **values: Any) -> tuple[list[int], list[dict[int, float]]]:
    """(greedy ids, the log-probabilities of the whole vocabulary before each of them)."""
    stop = StopParams(max_tokens=count, ignore_eos=True)
    sampled = sampling.check({"temperature": 0, **values})
    answer = bench.generate(None, token_ids=tuple(ids), sampling=sampled, stop=stop, logprobs=vocab)
    entries = [entry for event in answer.tokens for entry in event.logprobs]
    return answer.ids, [{token: value for token, _, value in entry.top} for entry in entries]


def normal(row: dict[int, float]) -> dict[int, float]:
    top = max(row.values())
    total = top + math.log(sum(math.exp(value - top) for value in row.values()))
    return {token: value - total for token, value in row.items()}


def test_guidance_is_its_definition(bench: Bench) -> None:
    needs(bench, "guidance_scale")
    if "guidance" in bench.row.lacks:
        pytest.skip("this build reads one prompt for each answer")
    info = bench.client.info
    assert info is not None
    scale, away = 2.5, "The big dog barked at"
    prompt = bench.run(bench.client.encode(STORY, add_special=True))
    negative = bench.run(bench.client.encode(away, add_special=False))
    ids, found = rows_of(bench, prompt, info.vocab_size, 3, guidance_scale=scale, negative_prompt=away)
    assert len(found) == 3
    for step, row in enumerate(found):
        _, (pos,) = rows_of(bench, [*prompt, *ids[:step]], info.vocab_size, 1)
        _, (neg,) = rows_of(bench, [*negative, *ids[:step]], info.vocab_size, 1)
        expected = normal({token: neg[token] + scale * (pos[token] - neg[token]) for token in pos})
        likely = [token for token, value in expected.items() if value > -25]
        assert {t: row[t] for t in likely} == pytest.approx({t: expected[t] for t in likely}, abs=0.05)
        assert max(expected, key=expected.__getitem__) == ids[step]


def test_guidance_with_samplers_and_forms(bench: Bench) -> None:
    needs(bench, "guidance_scale")
    if "guidance" in bench.row.lacks:
        answer = bench.generate(STORY, sampling=sampling.check({"guidance_scale": 2.0, "negative_prompt": "No."}))
        assert set(answer.end.ignored) == {"guidance_scale", "negative_prompt"}
        return
    values = sampling.check({"guidance_scale": 1.5, "negative_prompt": "No.", "seed": 3, "top_p": 0.9, "repetition_penalty": 1.1})
    bench.generate(STORY, sampling=values, stop=FEW)  # the two after it find the same prefix in the cache
    first, again = (bench.generate(STORY, sampling=values, stop=FEW) for _ in range(2))
    assert first.ids == again.ids and first.end.applied["guidance_scale"] == 1.5 and first.end.applied["top_p"] == 0.9
    plain = bench.generate(STORY, stop=FEW).ids
    held = bench.generate(STORY, sampling=values, grammar='root ::= "yes" | "no"')
    assert held.text in {"yes", "no"}
    assert bench.generate(STORY, stop=FEW).ids == plain, "the next request is not guided"
    with pytest.raises(ContextLengthExceeded, match="negative prompt"):
        bench.generate("a", sampling=sampling.check({"guidance_scale": 2.0, "negative_prompt": "word " * 20_000}), stop=FEW)


# --- forms ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["grammar", "regex"])
def test_a_form_leaves_the_odds_of_what_it_allows_as_they_are(bench: Bench, form: str) -> None:
    """Two tokens are equally likely and a third, refused, as likely as both: each of the two must come about half the time."""
    if bench.row.loader not in ("llamacpp", "transformers") or "guidance" in bench.row.lacks:
        pytest.skip("one loader with the shared sampler is enough; this build tells no vocabulary")
    info = bench.client.info
    assert info is not None
    prompt = bench.run(bench.client.encode(STORY, add_special=True))
    _, (row,) = rows_of(bench, prompt, info.vocab_size, 1)
    letters = [bench.run(bench.client.encode(f"{STORY}{letter}", add_special=True))[-1] for letter in "acz"]
    if len(set(letters)) < 3 or not set(letters) <= row.keys():
        pytest.skip("this vocabulary has no tokens of single letters")
    first, second, refused = sorted(letters)
    words = [bench.run(bench.client.decode([token])).strip() for token in (first, second)]
    bias = {str(token): 30.0 - row[token] for token in (first, second)} | {str(refused): 30.7 - row[refused]}
    source = f'root ::= "{words[0]}" | "{words[1]}"' if form == "grammar" else "|".join(words)
    found = []
    for seed in range(120):
        answer = bench.generate(
            None,
            token_ids=tuple(prompt),
            sampling=sampling.check({"seed": seed, "logit_bias": bias}),
            stop=StopParams(max_tokens=1),
            **{form: source},
        )
        found.append(answer.text.strip())
    assert set(found) == set(words)
    assert 40 <= found.count(words[0]) <= 80
