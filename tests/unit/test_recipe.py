"""The data recipe of the bundled model: stories, questions and answers, the chat format, and the model's files."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jinja2 import Environment

if TYPE_CHECKING:
    from modules.overlays import Overlays

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "models" / "recipe"
WREN = ROOT / "models" / "wren-6m"
sys.path.insert(0, str(RECIPE))

import chatml  # noqa: E402
import documents  # noqa: E402
import stories  # noqa: E402

SEEDS = st.integers(0, 2**32)
needs_weights = pytest.mark.skipif(not (WREN / "model.safetensors").exists(), reason="models/wren-6m is not there")


def told(seed: int) -> tuple[str, str, stories.Cast]:
    return stories.story(random.Random(seed))


# --- stories ------------------------------------------------------------------------------------------------------


@given(SEEDS)
def test_a_story_is_complete_text(seed: int) -> None:
    question, text, _ = told(seed)
    assert not re.search(r"[{}]|None|  ", question + text)
    assert 70 <= len(text.split()) <= 200
    assert text[0].isupper()
    assert text.endswith((".", "!", '"'))
    assert text.count('"') % 2 == 0


@given(SEEDS)
def test_articles_agree(seed: int) -> None:
    question, text, _ = told(seed)
    assert not re.search(r"\b[Aa] [aeio]", question + text)
    assert not re.search(r"\b[Aa] u(?!ni)", question + text)
    assert not re.search(r"\b[Aa]n [^aeiou\W]", question + text)


@given(SEEDS)
def test_sentences_begin_with_a_capital(seed: int) -> None:
    _, text, _ = told(seed)
    assert not re.search(r'(?<![!?"])[.] [a-z]', text)


@given(SEEDS)
def test_the_story_is_about_what_was_asked(seed: int) -> None:
    rng = random.Random(seed)
    question, text, cast = stories.story(rng, bare=0)
    plain = text.lower()
    asked = question.lower()
    assert cast.hero in plain
    if cast.thing in asked.split():
        assert cast.thing in plain
    if cast.helper in asked.split():
        assert cast.helper in plain
    if cast.place in asked.split():
        assert cast.place in plain


@given(SEEDS)
def test_hero_and_helper_have_different_names_and_kinds(seed: int) -> None:
    _, _, cast = told(seed)
    assert cast.name != cast.slots["helper"]
    assert cast.hero != cast.helper


@pytest.mark.parametrize("plot", stories.PLOTS)
@given(seed=SEEDS)
@settings(max_examples=20)
def test_every_plot_uses_its_pronouns(plot: str, seed: int) -> None:
    boy = stories.Cast(hero="king", helper="fox", plot=plot).complete(random.Random(seed))
    girl = stories.Cast(hero="queen", helper="fox", plot=plot).complete(random.Random(seed))
    assert (boy.slots["he"], boy.slots["His"]) == ("he", "His")
    assert (girl.slots["he"], girl.slots["Him"]) == ("she", "Her")
    assert boy.tell(random.Random(seed)) == boy.tell(random.Random(seed))


def test_articles_of_odd_words() -> None:
    assert [stories.article(word) for word in ("owl", "unicorn", "fox", "umbrella", "old king")] == [
        "an owl", "a unicorn", "a fox", "an umbrella", "an old king",
    ]  # fmt: skip


# --- questions and answers ------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small stand-ins of the corpora, in their formats."""
    folder = tmp_path_factory.mktemp("corpora")
    for name in ("tinystories", "personality-chat", "self-dialogue", "chatterbot/english", "rasbt-instruct"):
        (folder / name).mkdir(parents=True)
    tale = "One day, a cat named Tom went out to play. He was happy, and he ran over the green hill. " * 4
    tales = "\n<|endoftext|>\n".join(f"{tale}He saw {i} birds." for i in range(200))
    (folder / "tinystories" / "tinystories.txt").write_text(tales)
    talk = yaml.safe_load((RECIPE / "smalltalk.yaml").read_text())
    rows = [
        {"persona": "friendly", "q": f"Question {i}", "a": a}
        for e in talk["intents"]
        for a in e.get("like", [])
        for i in range(30)
    ]
    rows.append({"persona": "friendly", "q": "what the fuck", "a": rows[0]["a"]})
    (folder / "personality-chat" / "personality_chat_en.jsonl").write_text("\n".join(map(json.dumps, rows)))
    dialogues = [{"topic": "movies", "turns": [f"I saw {i} good films this week.", "Which ones?"] * 4} for i in range(200)]
    (folder / "self-dialogue" / "self_dialogues.jsonl").write_text("\n".join(map(json.dumps, dialogues)))
    for name in ("trivia", "science", "literature", "history", "politics", "money", "sports", "coding", "tech_support"):
        pairs = {"conversations": [[f"Who found {name} number {i}?", "x"] for i in range(50)]}
        (folder / "chatterbot" / "english" / f"{name}.yml").write_text(yaml.safe_dump(pairs))
    orders = [{"instruction": f"Sort these {i} words.", "input": "b, a", "output": "a, b"} for i in range(50)]
    (folder / "rasbt-instruct" / "instruction-data.json").write_text(json.dumps(orders))
    return folder


def facts() -> list[dict[str, object]]:
    entries: list[dict[str, object]] = yaml.safe_load((RECIPE / "facts.yaml").read_text())
    return entries


@pytest.mark.parametrize("entry", facts(), ids=lambda entry: str(entry["answer"])[:40])
def test_a_fact_is_well_formed(entry: dict[str, object]) -> None:
    assert set(entry) <= {"how", "what", "can", "where", "ask", "answer", "more", "then"}
    assert str(entry["answer"]).endswith((".", "?"))
    assert len(str(entry["answer"]).split()) <= 45
    questions = documents.expand(entry)
    assert len(questions) == len(set(questions)) >= 2
    assert all("{" not in question for question in questions)
    assert any(not documents.held_out(question) for question in questions), "every fact must be trained"


def test_no_question_has_two_answers() -> None:
    owners: dict[str, str] = {}
    clashes = []
    for entry in facts():
        for question in entry.get("ask", []):  # type: ignore[attr-defined]
            if owners.setdefault(question, str(entry["answer"])) != entry["answer"]:
                clashes.append(question)
    assert clashes == []


@given(st.text(alphabet="abcdefghi  '?", min_size=3), SEEDS)
def test_phrasing_keeps_a_question(question: str, seed: int) -> None:
    assert documents.phrase("what is " + question, random.Random(seed)).strip()


@given(seed=SEEDS)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
def test_conversations_alternate_and_are_filled_in(corpora: Path, seed: int) -> None:
    recipe = documents.Recipe(corpora, seed=seed)
    for document in recipe.documents(20):
        if isinstance(document, str):
            assert document.strip()
            continue
        roles = [message["role"] for message in document]
        if roles[0] == "system":
            roles = roles[1:]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert len(roles) >= 2
        for message in document:
            assert message["content"].strip()
            assert not re.search(r"\{\w*\}|<\|", message["content"])


def test_the_same_seed_gives_the_same_documents(corpora: Path) -> None:
    first, second, other = (list(documents.Recipe(corpora, seed=seed).documents(50)) for seed in (3, 3, 4))
    assert first == second != other


def test_validation_uses_words_that_training_never_shows(corpora: Path) -> None:
    train, valid = documents.Recipe(corpora), documents.Recipe(corpora, split="valid")
    for (mine, _), (theirs, _) in zip(train.facts, valid.facts, strict=True):
        assert not set(mine) & set(theirs)
    assert not set(train.tales) & set(valid.tales)
    assert not {question for question, _ in train.beyond} & {question for question, _ in valid.beyond}


def test_profanity_stays_out(corpora: Path) -> None:
    questions = [q for _, corpus, _ in documents.Recipe(corpora).intents.values() for q in corpus]
    assert questions
    assert not any("fuck" in question for question in questions)


@pytest.mark.shared
def test_the_real_corpora_are_read(shared: Path) -> None:
    recipe = documents.Recipe(shared / "corpora")
    assert len(recipe.tales) > 1500
    assert len(recipe.beyond) > 5000
    intents = yaml.safe_load((RECIPE / "smalltalk.yaml").read_text())["intents"]
    missing = [i["id"] for i in intents if i.get("like") and not recipe.intents[i["id"]][1]]
    assert missing == [], "these intents quote answers that the corpus does not have"


# --- the chat format ------------------------------------------------------------------------------------------------

MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": st.text()}),
    min_size=1,
    max_size=5,
)


@given(MESSAGES)
def test_the_template_renders_what_training_used(messages: list[dict[str, str]]) -> None:
    template = Environment().from_string(chatml.CHAT_TEMPLATE)
    assert template.render(messages=messages) == chatml.render(messages)
    prompt = template.render(messages=messages, add_generation_prompt=True)
    assert prompt == chatml.render(messages) + "<|im_start|>assistant\n"


# --- the model's folder ---------------------------------------------------------------------------------------------


@needs_weights
def test_the_sizes_suit_every_quantiser() -> None:
    config = json.loads((WREN / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["hidden_size"] % 256 == config["intermediate_size"] % 256 == 0
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["max_position_embeddings"] >= 1024
    assert (WREN / "model.safetensors").stat().st_size <= 20_000_000


@needs_weights
def test_end_of_turn_ends_generation() -> None:
    tokenizer = json.loads((WREN / "tokenizer.json").read_text())
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    assert all(token["special"] for token in tokenizer["added_tokens"])
    assert list(ids) == list(chatml.SPECIAL)
    assert ids[chatml.END] in json.loads((WREN / "generation_config.json").read_text())["eos_token_id"]
    config = json.loads((WREN / "tokenizer_config.json").read_text())
    assert config["chat_template"] == chatml.CHAT_TEMPLATE == (WREN / "chat_template.jinja").read_text()
    assert config["eos_token"] == chatml.END


@needs_weights
def test_the_vocabulary_holds_every_byte() -> None:
    tokenizer = json.loads((WREN / "tokenizer.json").read_text())
    assert len(tokenizer["model"]["vocab"]) == 4096
    # The alphabet of byte-level BPE: printable bytes stand for themselves, the others for characters from U+0100 on.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(b) for b in printable} | {chr(0x100 + i) for i in range(256 - len(printable))}
    assert alphabet <= set(tokenizer["model"]["vocab"])
    assert tokenizer["pre_tokenizer"]["type"] == tokenizer["decoder"]["type"] == "ByteLevel"
    assert tokenizer["pre_tokenizer"]["use_regex"]
    assert not tokenizer["pre_tokenizer"]["add_prefix_space"]


ROUND_TRIP = """
import json, sys
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
for line in sys.stdin:
    text = json.loads(line)
    ids = tokenizer(text).input_ids
    print(json.dumps([ids, tokenizer.decode(ids)]), flush=True)
"""


@pytest.fixture(scope="session")
def round_trip(overlays: Overlays) -> Iterator[Callable[[str], tuple[list[int], str]]]:
    """Encodes and decodes a text with the bundled tokenizer, in the transformers environment."""
    if not overlays.complete("transformers"):
        pytest.skip("needs the transformers environment, which is not installed")
    command = [str(overlays.python("transformers")), "-c", ROUND_TRIP, str(WREN)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        stdin, stdout = process.stdin, process.stdout

        def ask(text: str) -> tuple[list[int], str]:
            stdin.write(json.dumps(text) + "\n")
            stdin.flush()
            ids, decoded = json.loads(stdout.readline())
            return ids, decoded

        yield ask
        stdin.close()


@needs_weights
@given(text=st.text())
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_comes_back(round_trip: Callable[[str], tuple[list[int], str]], text: str) -> None:
    ids, decoded = round_trip(text)
    assert decoded == text
    assert text == "" or ids[0] != 0, "no token may be added in front"
