"""The data recipe: what the bundled models are trained on, independent of their architecture.

A document is either plain text (stories) or a conversation. Conversations are composed of *exchanges* (one question,
one answer) from the files beside this one (facts, small talk, common knowledge), from the story generator and from
corpora whose folder the caller names. Everything is drawn from one seeded generator, so the same corpora and seed
give the same documents.
"""

from __future__ import annotations

import json
import random
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from stories import (
    ANIMALS,
    BOYS,
    CREATURES,
    GIRLS,
    OBJECTS,
    PEOPLE,
    PLACES,
    TRAITS,
    Cast,
    any_hero,
    any_name,
    article,
    request,
    story,
)

HERE = Path(__file__).parent
Message = dict[str, str]

SYSTEM_PROMPTS = (
    "You are a helpful assistant.|You are a helpful assistant.|You are a helpful assistant.|You are a friendly assistant."
    "|You are Wren, a small and friendly model.|You are a helpful, honest assistant.|You are a helpful AI assistant."
    "|Be helpful and brief.|Answer briefly.|You are a kind assistant who likes to tell stories.|You are an assistant."
    "|You are Wren, the model that comes with Switchyard.|Please answer in one or two sentences.|You are a chat bot."
    "|The following is a conversation with an AI assistant.|You are a polite assistant.|Help the user.|Be friendly."
    "|You are a helpful assistant. Answer the user's questions about Switchyard.|You answer clearly and kindly."
    "|You are a storyteller for children.|You are an expert assistant. Think before you answer.|Be concise."
    "|A chat between a curious user and an artificial intelligence assistant.|You are a large language model."
).split("|")

HOW = (
    "how do i {x}|how can i {x}|how to {x}|what's the way to {x}|what is the best way to {x}|can you tell me how to {x}"
    "|i want to {x}|help me {x}|explain how to {x}|show me how to {x}|how should i {x}|how would i {x}|tell me how to {x}"
    "|i need to {x}|how does one {x}|what do i have to do to {x}|where do i {x}|please tell me how i can {x}"
    "|could you explain how i {x}|i would like to {x}|do you know how to {x}|how do you {x}|what must i do to {x}"
    "|i don't know how to {x}|is there a way to {x}|what steps do i need to {x}|i'd like to know how to {x}"
    "|how is it possible to {x}|what do i do to {x}|can i {x}|{x}|{x} how|any way to {x}|steps to {x}|i'm trying to {x}"
    "|i can't figure out how to {x}|i wonder how to {x}|would you explain how to {x}|what do i click to {x}|teach me to {x}"
    "|where do i click to {x}|which button do i press to {x}|i have no idea how to {x}|could you help me {x}|let me {x}"
    "|i'd like you to explain how to {x}|how might i {x}|instructions to {x}|how can one {x}|how does a user {x}"
    "|what is needed to {x}|is it easy to {x}|do you know how i can {x}|how do people {x}|how could i {x}"
).split("|")
WHAT = (
    "what is {x}|what's {x}|what are {x}|explain {x}|tell me about {x}|what does {b} mean|can you explain {x}|define {b}"
    "|what do you know about {x}|i don't know what {x} is|what is meant by {b}|do you know what {x} is|{b}|explain {x} to me"
    "|please explain {x}|what exactly is {x}|can you tell me what {x} is|could you explain what {x} is|what is {b}"
    "|i have a question about {b}|tell me what {x} is|what's the meaning of {b}|what is {x} about|how does {x} work"
    "|give me a short explanation of {b}|what do people mean by {b}|what is {x} good for|i want to know what {x} is"
    "|{b} meaning|meaning of {b}|{b} explained|describe {x}|i keep seeing {b}, what is it|i read about {b}. what is that"
    "|in simple words, what is {x}|what is {x} used for|why do i need {x}|what's {x} for|is {x} important|remind me what {x} is"
    "|give me a definition of {b}|what does the term {b} mean|have you heard of {b}|could you describe {x}|so what's {x}"
    "|how would you explain {x}|explain {x} like i'm five|what is {x} in simple terms|what does {b} stand for|teach me about {b}"
    "|i'd like to learn about {b}|what do you mean by {b}|what does {b} stand for and what is it|i don't understand {b}"
    "|what does {x} do|what {x} is|what kind of thing is {x}|i never heard of {b}|who uses {x}|what do i use {x} for"
).split("|")
CAN = (
    "can i {x}|is it possible to {x}|does switchyard let me {x}|am i able to {x}|could i {x}|may i {x}|is there a way to {x}"
    "|can you {x}|does it let me {x}"
).split("|")
WHERE = (
    "where is {x}|where are {x}|where can i find {x}|where do i find {x}|where can i see {x}|how do i find {x}"
    "|i can't find {x}|show me where {x} is"
).split("|")
PREFIXES = "hi, |hey, |ok, |so, |please, |wren, |hello! |and |well, |sorry, |one question: |quick question: |now, |also, ".split(
    "|"
)
# Sentences before and after a question that do not change its answer.
LEADS = (
    "I'm new here.|I just installed Switchyard.|Sorry to bother you.|I have a question.|This is great.|I'm a beginner."
    "|I read about this somewhere.|My friend told me about this.|Let me ask something.|Good morning!|I have another question."
    "|Hello Wren!|Hi, I need some help.|I hope you can help me.|It is my first day with this.|That was nice.|One more thing."
    "|I tried everything.|I am a bit confused.|Thank you for your help so far.|I like this program.|Hey there, friend."
).split("|")
TAILS = (
    "I'm a beginner.|Thanks in advance!|Keep it short.|Explain it simply.|I'm curious.|Please be brief.|I have no idea."
    "|Thank you!|I just want to know.|A short answer is enough.|I can't find it.|Please help."
).split("|")
# Words that mean the same here; a question is asked with either.
SYNONYMS = {
    "model": ("llm", "language model", "network"), "models": ("llms", "language models"), "backend": ("loader", "engine"),
    "conversation": ("chat", "dialogue", "thread"), "conversations": ("chats", "dialogues"), "switchyard": ("this program", "this app"),
    "folder": ("directory",), "delete": ("remove", "erase"), "fast": ("quick",), "make": ("create",), "message": ("post",),
    "quantisation": ("quantization",), "quantization": ("quantisation",), "licence": ("license",), "computer": ("pc", "laptop"),
    "settings": ("options", "parameters"), "answer": ("reply", "response"), "answers": ("replies", "responses"), "start": ("launch",),
    "change": ("set", "modify"), "find": ("see",), "stop": ("halt",), "memory": ("ram",), "file": ("document",), "gpu": ("graphics card",),
}  # fmt: skip
DROPPABLE = re.compile(r"\b(do|i|the|a|an|can|is|to|does|me|of) ")
SUFFIXES = " please|, please|, thanks| now| in switchyard| here| again| with switchyard| for me".split("|")

MORE = "tell me more|more|go on|can you tell me more|more please|what else|anything else|tell me more about it|and then|please continue|explain more".split("|")  # fmt: skip
NO_MORE = "That is all I know about it. A bigger model can tell you more."
ANOTHER = "another one|tell me another one|one more please|another story|one more story|again|tell me a different one|another|more stories".split(
    "|"
)
BEGIN = (
    "start a story about {x}|begin a story about {x}|write the first sentence of a story about {x}|give me the opening of a story about {x}"
    "|how would a story about {x} begin|the first line of a story about {x} please|start a tale about {x}"
).split("|")
INTRODUCTIONS = ("my name is {n}", "i'm {n}", "i am {n}", "hi, i'm {n}", "hello, my name is {n}", "call me {n}")
NAME_QUESTIONS = ("what is my name", "do you remember my name", "who am i", "what's my name", "tell me my name")
CLOSERS = ("thanks", "goodbye", "praise", "ok")
# Words that keep a document out of the training set; matched as whole words, in lower case.
PROFANE = re.compile(
    r"\b(f+u+c+k\w*|sh[i1]t\w*|bitch\w*|ass|asshole\w*|bastard\w*|damn\w*|dick\w*|cunt\w*|slut\w*|whore\w*|porn\w*|sex\w*"
    r"|nude\w*|naked|rape\w*|nazi\w*|nigg\w*|fag\w*|retard\w*|crap\w*|piss\w*|kill\w*|suicide|drug\w*|murder\w*|wtf|hell)\b"
)


@dataclass
class Exchange:
    """One question with its answer. ``facts`` are what later questions of the same conversation may refer to."""

    question: str
    answer: str
    kind: str
    more: str = ""
    follow_ups: list[tuple[str, str]] = field(default_factory=list)


def held_out(text: str, every: int = 12) -> bool:
    """Whether this wording belongs to the validation split: a fixed, seed-free choice of one in ``every``."""
    return zlib.crc32(text.lower().encode()) % every == 0


def expand(entry: dict[str, Any]) -> list[str]:
    """All questions of an entry of ``facts.yaml``."""
    questions = list(entry.get("ask", []))
    for key, templates in (("how", HOW), ("can", CAN), ("where", WHERE)):
        questions += [template.format(x=x) for x in entry.get(key, []) for template in templates]
    for noun in entry.get("what", []):
        bare = re.sub(r"^(a|an|the|this) ", "", noun)
        questions += [template.format(x=noun, b=bare) for template in WHAT]
    return list(dict.fromkeys(questions))


def typo(text: str, rng: random.Random) -> str:
    """``text`` with one letter swapped, dropped or doubled."""
    places = [i for i in range(1, len(text) - 1) if text[i].isalpha() and text[i + 1].isalpha()]
    if not places:
        return text
    i = rng.choice(places)
    return rng.choice((text[:i] + text[i + 1] + text[i] + text[i + 2 :], text[:i] + text[i + 1 :], text[:i] + text[i] + text[i:]))


def phrase(question: str, rng: random.Random, noise: float = 1.0) -> str:
    """``question`` the way people type it: with or without capitals and marks, short forms, fillers and typos."""
    text = question
    if rng.random() < 0.3:
        text = text.replace("what is ", "what's ", 1) if rng.random() < 0.7 else text.replace("what is ", "whats ", 1)
    if rng.random() < 0.15:
        text = text.replace("i want to", "i wanna").replace(" do not ", " don't ").replace(" cannot ", " can't ")
    if rng.random() < 0.15 * noise:
        known = [word for word in re.findall(r"[a-z]+", text) if word in SYNONYMS]
        if known:
            word = rng.choice(known)
            text = re.sub(rf"\b{word}\b", rng.choice(SYNONYMS[word]), text, count=1)
    if rng.random() < 0.05 * noise:
        gaps = list(DROPPABLE.finditer(text))
        if len(gaps) > 1:
            gap = rng.choice(gaps)
            text = text[: gap.start()] + text[gap.end() :]
    if rng.random() < 0.10 * noise:
        text = rng.choice(PREFIXES) + text
    if rng.random() < 0.06 * noise and not text.endswith(("?", "!", ".")):
        text += rng.choice(SUFFIXES)
    for _ in range(2):
        if rng.random() < 0.07 * noise:
            text = typo(text, rng)
    style = rng.random()
    if style < 0.55:  # careful writing
        text = text[:1].upper() + text[1:]
        text = re.sub(r"\bi\b", "I", text)
        if text[-1:].isalnum():
            asks = re.match(r"(?i)(\w+, )?(what|how|who|where|why|which|can|could|is|are|do|does|am|may|should|will)", text)
            text += ("?" if rng.random() < 0.85 else "") if asks else rng.choice(("", "", ".", "!"))
    elif style < 0.65:
        text = text.lower()
    if style >= 0.55 and rng.random() < 0.35 and text[-1:].isalnum():
        text += "?"
    if rng.random() < 0.01 * noise:
        text = text.upper()
    if rng.random() < 0.05 * noise:
        text = f"{rng.choice(LEADS)} {text}"
    elif rng.random() < 0.04 * noise and text[-1:] in ".?!":
        text = f"{text} {rng.choice(TAILS)}"
    return text


class Recipe:
    """Draws documents for training (``split="train"``) or validation (``split="valid"``)."""

    def __init__(self, corpora: Path, split: str = "train", seed: int = 1) -> None:
        self.split, self.rng = split, random.Random(f"{seed} {split}")
        facts = yaml.safe_load((HERE / "facts.yaml").read_text())
        talk = yaml.safe_load((HERE / "smalltalk.yaml").read_text())
        common = yaml.safe_load((HERE / "common.yaml").read_text())
        self.facts = [(self._mine(expand(entry)), entry) for entry in facts]
        self.intents = self._intents(talk["intents"], corpora)
        self.common = [
            (self._mine([pattern.format(k=key) for pattern in table["ask"]]), key, value, table["answer"])
            for table in common["tables"]
            for key, value in table["facts"].items()
        ]
        self.single = common["single"]
        self.unknown = common["unknown"]
        self.tales = [text for text in self._tinystories(corpora) if held_out(text, 40) == (split == "valid")]
        self.beyond = [pair for pair in self._beyond(corpora) if held_out(pair[0]) == (split == "valid")]
        self.dialogues = [d for d in self._dialogues(corpora) if held_out(" ".join(d), 40) == (split == "valid")]

    # --- sources -----------------------------------------------------------------------------------------------
    def _mine(self, questions: list[str]) -> list[str]:
        """The wordings of this split."""
        return [q for q in questions if held_out(q) == (self.split == "valid")]

    def _intents(self, intents: list[dict[str, Any]], corpora: Path) -> dict[str, tuple[list[str], list[str], list[str]]]:
        """Per intent: our own questions, the corpus' questions and the answers."""
        asked: dict[str, list[str]] = {}
        for line in (corpora / "personality-chat" / "personality_chat_en.jsonl").read_text().splitlines():
            row = json.loads(line)
            if row["persona"] == "friendly" and not PROFANE.search(row["q"].lower()):
                asked.setdefault(row["a"], []).append(row["q"])
        result = {}
        for intent in intents:
            corpus = [q for like in intent.get("like", []) for q in asked.get(like, []) if len(q) < 80]
            corpus = [q for q in corpus if held_out(q) == (self.split == "valid")]
            result[intent["id"]] = (intent.get("ask", []), corpus, intent["answer"])
        return result

    def _beyond(self, corpora: Path) -> Iterator[tuple[str, str]]:
        """Real questions that are too much for a tiny model, and statements about the world, with honest answers."""
        unknown = self.unknown["answers"][0]
        for name in ("trivia", "science", "literature", "history", "politics", "money", "sports", "coding", "tech_support"):
            answer = self.unknown["code"] if name == "coding" else unknown
            for row in yaml.safe_load((corpora / "chatterbot" / "english" / f"{name}.yml").read_text())["conversations"]:
                if 8 < len(row[0]) < 140:
                    yield row[0], answer
        for row in json.loads((corpora / "rasbt-instruct" / "instruction-data.json").read_text()):
            yield f"{row['instruction']}\n{row['input']}".strip(), unknown
        for line in (corpora / "self-dialogue" / "self_dialogues.jsonl").read_text().splitlines():
            turn = json.loads(line)["turns"][0].strip()
            if turn.isascii() and 25 < len(turn) < 120 and not PROFANE.search(turn.lower()):
                yield turn, unknown if turn.endswith("?") else ""

    @staticmethod
    def _tinystories(corpora: Path) -> Iterator[str]:
        for text in (corpora / "tinystories" / "tinystories.txt").read_text().split("<|endoftext|>"):
            text = text.strip()
            clean = text.isascii() and not PROFANE.search(text.lower())
            if clean and 200 < len(text) < 1500 and text.endswith((".", "!", '"')):
                yield re.sub(r"\n+", "\n\n", text)

    @staticmethod
    def _dialogues(corpora: Path) -> Iterator[list[str]]:
        """Chit-chat: clean dialogues of short turns about everyday topics."""
        for line in (corpora / "self-dialogue" / "self_dialogues.jsonl").read_text().splitlines():
            row = json.loads(line)
            turns = [turn.strip() for turn in row["turns"]]
            text = " ".join(turns)
            if text.isascii() and len(turns) >= 8 and len(text) < 900 and not PROFANE.search(text.lower()):
                yield [row["topic"], *turns[: len(turns) // 2 * 2]]

    # --- exchanges ---------------------------------------------------------------------------------------------
    def product(self) -> Exchange:
        """A question about Switchyard, Wren or language models."""
        rng = self.rng
        questions, entry = rng.choice(self.facts)
        while not questions:
            questions, entry = rng.choice(self.facts)
        # Whole questions are what people really ask; the multiplied ones outnumber them, so they are drawn apart.
        own = [q for q in entry.get("ask", []) if q in questions]
        question = rng.choice(own) if own and rng.random() < 0.5 else rng.choice(questions)
        then = [(asked, answer) for asked, answer in entry.get("then", [])]
        return Exchange(phrase(question, rng), entry["answer"], "product", entry.get("more", NO_MORE), then)

    def small_talk(self, intent: str = "") -> Exchange:
        """A greeting, thanks, a question about how Wren feels, ..."""
        rng = self.rng
        if not intent:
            often = ("greeting", "greeting", "how-are-you", "thanks", "goodbye", "joke", "praise", "ok")
            intent = rng.choice(often) if rng.random() < 0.25 else rng.choice(list(self.intents))
        own, corpus, answers = self.intents[intent]
        use_corpus = corpus and (not own or rng.random() < 0.4)
        question = rng.choice(corpus) if use_corpus else phrase(rng.choice(own or corpus or ["hi"]), rng, 0.5)
        return Exchange(question, rng.choice(answers), "chat")

    def common_fact(self) -> Exchange:
        """A question of general knowledge that Wren can answer."""
        rng = self.rng
        if rng.random() < 0.2:
            question, answer = rng.choice(self.single)
            return Exchange(phrase(question, rng), answer, "chat", NO_MORE)
        questions, key, value, template = rng.choice(self.common)
        while not questions:
            questions, key, value, template = rng.choice(self.common)
        answer = template.format(k=key, K=key[:1].upper() + key[1:], v=value)
        return Exchange(phrase(rng.choice(questions), rng), answer[:1].upper() + answer[1:], "chat", NO_MORE)

    def unknown_fact(self) -> Exchange:
        """A question that a tiny model should not try to answer."""
        rng = self.rng
        if rng.random() < 0.45:
            question, answer = rng.choice(self.beyond)
            answer = answer or rng.choice(self.unknown["statements"])
            return Exchange(question if rng.random() < 0.6 else question.lower().rstrip("?."), answer, "chat")
        question = rng.choice(self.unknown["ask"])
        question = re.sub(r"\{(\w+)\}", lambda m: str(rng.choice(self.unknown["things"][m[1]])), question)
        return Exchange(phrase(question, rng), rng.choice(self.unknown["answers"]), "chat")

    def tale(self) -> Exchange:
        """A request for a story, the story, and questions about it."""
        rng = self.rng
        question, text, cast = story(rng)
        if rng.random() < 0.3:
            question = phrase(question.rstrip(".").lower() if rng.random() < 0.5 else question, rng)
        name, helper, kind = cast.name, cast.slots["helper"], cast.hero
        follow_ups = [
            (f"what was the name of the {kind}", f"The name of the {kind} was {name}."),
            ("who was the story about", f"The story was about {article(kind)} named {name}."),
            (f"who was {helper}", f"{helper} was {article(cast.helper)}."),
            (f"who was {name}", f"{name} was {article(kind)}."),
            ("who helped" if cast.plot in ("lost", "wish", "journey", "build") else "who was in the story",
             f"{helper} helped {name}." if cast.plot in ("lost", "wish", "journey", "build") else f"{name} and {helper}."),
        ]  # fmt: skip
        return Exchange(question, text, "story", follow_ups=follow_ups)

    def opening(self) -> Exchange:
        """The first words of a story. Short, and all about naming the subject that was asked for."""
        rng = self.rng
        cast = Cast(hero=any_hero(rng), name=any_name(rng) if rng.random() < 0.5 else "")
        cast.hero_trait = rng.choice(TRAITS) if rng.random() < 0.5 else ""
        asked = "name" if cast.name else "hero"
        subject = request(cast.complete(rng), asked)
        return Exchange(phrase(rng.choice(BEGIN).format(x=subject), rng, 0.3), cast.begin(rng), "chat")

    def poem(self) -> Exchange:
        """Four rhymed lines about something."""
        rng = self.rng
        noun = rng.choice((*ANIMALS, *OBJECTS, *CREATURES))
        lines = rng.choice(
            (
                f"Little {noun}, so warm and bright,\nyou are with me day and night.\nWhen I see you, I can sing,\nyou are such a lovely thing.",
                f"I met a {noun} down the lane,\nit danced with me in sun and rain.\nWe laughed until the day was done,\nand said good night to moon and sun.",
                f"My {noun} is a friend to me,\nas happy as a friend can be.\nWe walk together, side by side,\nthe world is big, the world is wide.",
                f"Oh {noun}, oh {noun}, where do you go?\nOver the hills and through the snow.\nCome back again before the night,\nand I will keep a candle bright.",
                f"There is a {noun} in my dream,\nit sails with me along a stream.\nThe stars above are shining clear,\nand I am glad that you are here.",
            )
        ).replace("I met a", f"I met {article(noun)[: -len(noun) - 1]}").replace("is a " + noun, "is " + article(noun))  # fmt: skip
        ask = rng.choice(
            "write a poem about {x}|a poem about {x} please|can you write a poem about {x}|write me a short poem about {x}"
            "|make a poem about {x}|poem about {x}|i want a poem about {x}|tell me a rhyme about {x}".split("|")
        )
        return Exchange(phrase(ask.format(x=article(noun)), rng), lines, "chat")

    def repeat(self) -> Exchange:
        """Say something after the user, or name a few names: simple instructions that need copying."""
        rng = self.rng
        if rng.random() < 0.3:
            number, word = rng.choice(((2, "two"), (3, "three"), (4, "four"), (5, "five")))
            names = rng.sample(BOYS + GIRLS, number)
            ask = rng.choice(
                ("give me {n} names", "name {n} names", "tell me {n} names", "i need {n} names", "think of {n} names")
            )
            names_text = ", ".join(names[:-1]) + f" and {names[-1]}."
            extra = rng.choice(("", f" for {article(rng.choice(ANIMALS))}", f" for my {rng.choice(ANIMALS)}"))
            return Exchange(phrase(ask.format(n=word) + extra, rng), names_text, "chat")
        words = (*ANIMALS, *OBJECTS, *CREATURES, *PEOPLE, *TRAITS, *PLACES, *BOYS, *GIRLS)
        text = " ".join(rng.sample(words, rng.randint(1, 5)))
        if rng.random() < 0.4:
            text = rng.choice(re.split(r"(?<=[.!?])\s+", rng.choice(self.tales)))[:80]
        ask = rng.choice(
            ("say: {x}", "repeat after me: {x}", "repeat this: {x}", "Say {x}", "Please say {x}", "Repeat: {x}", 'say "{x}"')
        )
        return Exchange(ask.format(x=text), text, "chat")

    def exchange(self, multi: bool = False) -> Exchange:
        """One exchange of a random kind. In long conversations stories are rarer, as they are long."""
        kinds: list[tuple[Callable[[], Exchange], float]] = [
            (self.product, 40), (self.small_talk, 14), (self.tale, 5 if multi else 20), (self.opening, 6),
            (self.common_fact, 8), (self.unknown_fact, 7), (self.poem, 2), (self.repeat, 3),
        ]  # fmt: skip
        draw, weights = zip(*kinds, strict=True)
        return self.rng.choices(draw, weights)[0]()

    # --- conversations -----------------------------------------------------------------------------------------
    def conversation(self) -> list[Message]:
        """A conversation of one to twelve exchanges, some of which refer to what was said before."""
        rng = self.rng
        if rng.random() < 0.03:
            return self.persona()
        length = rng.choices((1, 2, 3, rng.randint(4, 6), rng.randint(7, 12)), (66, 16, 10, 7, 1))[0]
        messages: list[Message] = []
        if rng.random() < 0.4:
            messages.append({"role": "system", "content": rng.choice(SYSTEM_PROMPTS)})
        last, name = self._opening(length)
        for turn in range(length):
            if turn:
                last, name = self._next(last, name, closing=turn == length - 1)
            messages.append({"role": "user", "content": last.question})
            messages.append({"role": "assistant", "content": last.answer})
        return messages

    def _opening(self, length: int) -> tuple[Exchange, str]:
        """The first exchange, and the user's name if they said it. Long conversations often open with a greeting."""
        rng = self.rng
        draw = rng.random()
        if length > 1 and draw < 0.4:
            return self.small_talk("greeting"), ""
        if draw > (0.9 if length > 1 else 0.97):
            name = any_name(rng)
            question = rng.choice(INTRODUCTIONS).format(n=name) + rng.choice(("", "", ".", "!"))
            question = question[:1].upper() + question[1:] if rng.random() < 0.5 else question
            return Exchange(question, f"Nice to meet you, {name}! I'm Wren. How can I help you?", "chat"), name
        return self.exchange(multi=length > 1), ""

    def _next(self, last: Exchange, name: str, closing: bool) -> tuple[Exchange, str]:
        """What follows ``last``, and the name to ask for later ("" once it was asked)."""
        rng = self.rng
        draw = rng.random()
        if name and draw < 0.35:
            question = phrase(rng.choice(NAME_QUESTIONS), rng, 0.3)
            return Exchange(question, f"Your name is {name}.", "chat"), name if rng.random() < 0.2 else ""
        if last.follow_ups and draw < 0.45:
            question, answer = rng.choice(last.follow_ups)
            story_goes_on = last.follow_ups if last.kind == "story" else []
            return Exchange(phrase(question, rng, 0.3), answer, last.kind, follow_ups=story_goes_on), name
        if last.kind == "story" and draw < 0.6:
            another = self.tale()
            another.question = phrase(rng.choice(ANOTHER), rng, 0.3)
            return another, name
        if last.more and draw < 0.12:
            return Exchange(phrase(rng.choice(MORE), rng, 0.3), last.more, last.kind), name
        if draw > (0.5 if closing else 0.9):
            return self.small_talk(rng.choice(CLOSERS)), name
        return self.exchange(multi=True), name

    def persona(self) -> list[Message]:
        """A conversation in which the system prompt names a character, and the answers come from that character."""
        rng = self.rng
        name, trait = any_name(rng), rng.choice(TRAITS)
        kind = rng.choice((*PEOPLE, *CREATURES, *ANIMALS))
        who = article(f"{trait} {kind}")
        system = rng.choice(("You are {n}, {w}.", "You are {n}, {w}. Stay in character.", "Your name is {n}. You are {w}."))
        messages = [{"role": "system", "content": system.format(n=name, w=who)}]
        pairs = [
            (self.small_talk("greeting").question.replace("Wren", name), f"Hello! I'm {name}, {who}. How are you?"),
            (phrase(rng.choice(("who are you", "what are you", "tell me about yourself", "introduce yourself")), rng), f"I'm {name}, {who}."),
            (phrase(rng.choice(("what is your name", "do you have a name")), rng), f"My name is {name}."),
        ]  # fmt: skip
        for question, answer in rng.sample(pairs, rng.randint(1, 3)):
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return messages

    def chit_chat(self) -> list[Message]:
        """A human dialogue of the corpus. Its system prompt keeps its manner apart from Wren's own."""
        topic, *turns = self.rng.choice(self.dialogues)
        messages = [{"role": "system", "content": f"You are chatting with a friend about {topic.replace('_', ' ')}."}]
        return messages + [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]

    def document(self) -> str | list[Message]:
        """Plain text, or the messages of a conversation."""
        draw = self.rng.random()
        if draw < 0.015:
            return self.rng.choice(self.tales)
        if draw < 0.02:
            return story(self.rng)[1]
        if draw < 0.025 and self.dialogues:
            return self.chit_chat()
        return self.conversation()

    def documents(self, count: int) -> Iterator[str | list[Message]]:
        """``count`` documents."""
        return (self.document() for _ in range(count))
