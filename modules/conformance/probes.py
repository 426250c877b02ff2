"""The probes: each sends a request or two to one model and says whether a feature holds. Answers are short: a run is quick."""

from __future__ import annotations

import base64
import json
import re
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from modules import sampling
from modules.conformance.client import Api, Failed, Unsupported, expect
from modules.conformance.squares import BLUE, RED

Run = Callable[[Api], Awaitable["str | None"]]

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "maxLength": 12}}, "required": ["city"]},
    },
}
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["n"],
    "additionalProperties": False,
}
SCHEMA_FORMAT = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}
# A value for each sampling parameter that switches it on.
ON: dict[str, Any] = {
    "seed": 1,
    "temperature": 0.7,
    "top_k": 20,
    "dynamic_temperature": True,
    "mirostat_mode": 2,
    "num_beams": 2,
    "early_stopping": True,
    "temperature_last": True,
    "sampler_priority": ["top_k", "temperature"],
    "ban_eos_token": True,
    "skip_special_tokens": False,
    "logit_bias": {"5": 1.0},
    "dry_sequence_breakers": ["\n"],
}


@dataclass(frozen=True, slots=True)
class Probe:
    """`run` returns a note or None; raises Failed or Unsupported."""

    name: str
    title: str
    group: str
    run: Run


PROBES: list[Probe] = []


def probe(group: str, title: str) -> Callable[[Run], Run]:
    def add(run: Run) -> Run:
        PROBES.append(Probe(getattr(run, "__name__", "").strip("_"), title, group, run))
        return run

    return add


def _content(answer: Any) -> str:
    return str(answer["choices"][0]["message"]["content"] or "")


# --- OpenAI: chat --------------------------------------------------------------------------------------------------


@probe("Chat", "an answer, with usage and receipt")
async def chat(api: Api) -> None:
    answer = await api.chat("Hello")
    expect(answer["model"] == api.model, "another model answered")
    expect(answer["usage"]["completion_tokens"] > 0, "no token was counted")
    expect(answer["receipt"]["model"] == api.model, "the receipt names another model")


@probe("Chat", "same seed, same text, streamed or not")
async def chat_stream(api: Api) -> None:
    body = api.body("Tell me a story", seed=11, temperature=0.8, stream_options={"include_usage": True})
    events = await api.events("/v1/chat/completions", **body, stream=True)
    expect(events[-1][1] == "[DONE]", "the stream has no end")
    chunks = [data for _, data in events[:-1]]
    text = "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"])
    body.pop("stream_options")
    whole = await api.post("/v1/chat/completions", **body)
    expect(text == _content(whole), "the streamed text differs")
    expect(chunks[-1]["usage"]["total_tokens"] == whole["usage"]["total_tokens"], "the streamed usage differs")


@probe("Chat", "length limit and stop sequences")
async def chat_limits(api: Api) -> None:
    answer = await api.chat("Tell me a story", max_tokens=3, temperature=0)
    expect(answer["usage"]["completion_tokens"] <= 3, "more tokens than asked for")
    text = _content(await api.chat("Tell me a story", max_tokens=12, temperature=0))
    if len(text) > 3:
        stop = text[2]
        cut = await api.chat("Tell me a story", max_tokens=12, temperature=0, stop=[stop])
        expect(_content(cut) == text[: text.index(stop)], "the text does not end before the stop sequence")


@probe("Chat", "several answers (n)")
async def chat_n(api: Api) -> None:
    answer = await api.chat("Hello", n=2, seed=3, max_tokens=4)
    expect([choice["index"] for choice in answer["choices"]] == [0, 1], "not two answers")


@probe("Chat", "going on with the assistant's words")
async def chat_prefill(api: Api) -> None:
    messages = [{"role": "user", "content": "Count"}, {"role": "assistant", "content": "One, two,"}]
    await api.post("/v1/chat/completions", model=api.model, messages=messages, max_tokens=4)


@probe("Chat", "log-probabilities")
async def chat_logprobs(api: Api) -> None:
    answer = await api.chat("Hello", logprobs=True, top_logprobs=3, max_tokens=3, temperature=0)
    rows = answer["choices"][0]["logprobs"]["content"]
    expect(rows and all(row["logprob"] <= 1e-6 and len(row["top_logprobs"]) == 3 for row in rows), "not one row of three a token")


@probe("Chat", "a bad parameter is refused by name")
async def chat_refusal(api: Api) -> None:
    error = await api.refused("/v1/chat/completions", **api.body("x", top_p=7))
    expect(error["error"]["param"] == "top_p", "the error does not name the parameter")


@probe("Structured output", "a JSON object")
async def json_object(api: Api) -> None:
    answer = await api.chat("A JSON object", response_format={"type": "json_object"}, max_tokens=120, temperature=0)
    if answer["choices"][0]["finish_reason"] == "stop":
        expect(isinstance(json.loads(_content(answer)), dict), "no JSON object")


@probe("Structured output", "a JSON schema")
async def json_schema(api: Api) -> None:
    answer = await api.chat("A number", response_format=SCHEMA_FORMAT, max_tokens=60)
    expect(answer["choices"][0]["finish_reason"] == "stop", "it did not end")
    value = json.loads(_content(answer))
    expect(isinstance(value["n"], int) and 0 <= value["n"] <= 9, "the schema does not hold")


@probe("Structured output", "a JSON schema, streamed")
async def json_schema_stream(api: Api) -> None:
    body = api.body("A number", response_format=SCHEMA_FORMAT, stream=True, max_tokens=60)
    events = await api.events("/v1/chat/completions", **body)
    text = "".join(d["choices"][0]["delta"].get("content") or "" for _, d in events[:-1])
    expect(set(json.loads(text)) == {"n"}, "the schema does not hold")


@probe("Structured output", "a regular expression")
async def regex(api: Api) -> None:
    text = _content(await api.chat("A date", regex=r"[0-9]{4}-[0-9]{2}", max_tokens=30))
    expect(re.fullmatch(r"[0-9]{4}-[0-9]{2}", text), "the pattern does not hold")


@probe("Structured output", "a GBNF grammar")
async def grammar(api: Api) -> None:
    text = _content(await api.chat("Yes or no?", grammar='root ::= "yes" | "no"', max_tokens=10))
    expect(text in ("yes", "no"), "the grammar does not hold")


@probe("Tools", "a call that must be made")
async def tools(api: Api) -> None:
    answer = await api.chat("Weather in Oslo?", tools=[TOOL], tool_choice="required", max_tokens=80, temperature=0)
    call = answer["choices"][0]["message"]["tool_calls"][0]["function"]
    expect(call["name"] == "weather" and "city" in json.loads(call["arguments"]), "the call does not fit its schema")


@probe("Tools", "streamed arguments")
async def tools_stream(api: Api) -> None:
    body = api.body("Weather in Oslo?", tools=[TOOL], tool_choice="required", stream=True, temperature=0)
    events = await api.events("/v1/chat/completions", **{**body, "max_tokens": 80})
    deltas = [d["choices"][0]["delta"].get("tool_calls") or [] for _, d in events[:-1] if d["choices"]]
    text = "".join(part["function"].get("arguments") or "" for delta in deltas for part in delta)
    expect("city" in json.loads(text), "the arguments are no JSON")


@probe("Tools", "a result in the conversation")
async def tool_result(api: Api) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    messages = [
        {"role": "user", "content": "Weather in Oslo?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
    ]
    await api.post("/v1/chat/completions", model=api.model, messages=messages, tools=[TOOL], max_tokens=4)


# --- OpenAI: the rest ----------------------------------------------------------------------------------------------


@probe("Completions", "a text, several texts, token ids")
async def completions(api: Api) -> None:
    answer = await api.post("/v1/completions", model=api.model, prompt=["Once", "Then"], max_tokens=4)
    expect(len(answer["choices"]) == 2, "not two answers")
    tokens = (await api.post("/tokenize", content="Once"))["tokens"]
    await api.post("/v1/completions", model=api.model, prompt=tokens, max_tokens=4)


@probe("Completions", "the prompt's own probabilities (echo)")
async def echo(api: Api) -> None:
    fields = {"echo": True, "logprobs": 1, "max_tokens": 0}
    answer = await api.post("/v1/completions", model=api.model, prompt="Once upon a time", **fields)
    values = answer["choices"][0]["logprobs"]["token_logprobs"]
    expect(values[0] is None and len(values) > 2 and all(v <= 1e-6 for v in values[1:]), "no value for each token")


@probe("Completions", "a banned token does not come (logit_bias)")
async def logit_bias(api: Api) -> None:
    fields = {"model": api.model, "prompt": "Once upon a", "max_tokens": 1, "temperature": 0}
    first = await api.post("/v1/completions", **fields)
    word = first["choices"][0]["text"]
    ids = (await api.post("/tokenize", content=word))["tokens"]
    second = await api.post("/v1/completions", **fields, logit_bias={str(token): -100 for token in ids})
    if any("logit_bias" in warning for warning in second["warnings"]):
        raise Unsupported("logit_bias has no effect on this loader.")
    expect(second["choices"][0]["text"] != word, "the banned token came")


@probe("Responses", "an answer and its events")
async def responses(api: Api) -> None:
    answer = await api.post("/v1/responses", model=api.model, input="Hello", max_output_tokens=8)
    expect(answer["object"] == "response" and answer["output"], "no output")
    events = await api.events("/v1/responses", model=api.model, input="Hello", max_output_tokens=8, stream=True)
    names = [name for name, _ in events]
    expect(names[0] == "response.created" and names[-1] in ("response.completed", "response.incomplete"), "events are missing")


@probe("Embeddings", "vectors as numbers and as base64")
async def embeddings(api: Api) -> str:
    made = await api.post("/v1/embeddings", model=api.model, input=["a cat", "a dog"])
    vector = made["data"][0]["embedding"]
    packed = await api.post("/v1/embeddings", model=api.model, input="a cat", encoding_format="base64")
    raw = base64.b64decode(packed["data"][0]["embedding"])
    unpacked = struct.unpack(f"<{len(raw) // 4}f", raw)
    expect(len(unpacked) == len(vector), "the two forms differ in length")
    expect(max(abs(a - b) for a, b in zip(vector, unpacked, strict=True)) < 1e-3, "the two forms differ")
    return f"{len(vector)} dimensions"


@probe("Sampling", "parameters that this loader honours")
async def samplers(api: Api) -> str:
    """All of them on at once would be refused by some engines' own rules, so one at a time."""
    missing = []
    for name, parameter in sampling.PARAMETERS.items():
        if name in sampling.SUBORDINATE:
            continue
        value = ON.get(name, _other(parameter))
        try:
            answer = await api.chat("Hello", max_tokens=1, **{name: value})
        except Failed as error:
            raise Failed(f"{name}: {error}") from None
        if any(name in warning for warning in answer["warnings"]):
            missing.append(name)
    total = len(sampling.PARAMETERS.keys() - sampling.SUBORDINATE.keys())
    note = f"{total - len(missing)} of {total}"
    return f"{note}; not {', '.join(missing)}" if missing else note


def _other(parameter: sampling.Parameter) -> Any:
    """A value that is not neutral, within the range."""
    low, high = parameter.ui[:2] if parameter.ui else (parameter.minimum or 0, parameter.maximum or 1)
    middle = (low + high) / 2
    value = middle if middle != parameter.neutral else (middle + high) / 2
    return int(value) if parameter.kind == "int" else value


# --- Anthropic -----------------------------------------------------------------------------------------------------


@probe("Anthropic", "messages and count_tokens")
async def anthropic(api: Api) -> None:
    answer = await api.post("/v1/messages", **api.body("Hello"))
    expect(answer["type"] == "message" and answer["content"][0]["type"] == "text", "no text block")
    body = api.body("Hello")
    body.pop("max_tokens")
    counted = await api.post("/v1/messages/count_tokens", **body)
    usage = answer["usage"]
    expect(counted["input_tokens"] == usage["input_tokens"] + usage["cache_read_input_tokens"], "the counts differ")


@probe("Anthropic", "events of a stream")
async def anthropic_stream(api: Api) -> None:
    events = await api.events("/v1/messages", **api.body("Hello"), stream=True)
    names = [name for name, _ in events]
    expect(names[0] == "message_start" and names[-2:] == ["message_delta", "message_stop"], "events are missing")


@probe("Anthropic", "tools")
async def anthropic_tools(api: Api) -> None:
    function = TOOL["function"]
    assert isinstance(function, dict)
    tool = {"name": "weather", "description": "", "input_schema": function["parameters"]}
    body = api.body("Weather in Oslo?", tools=[tool], tool_choice={"type": "any"}, temperature=0)
    answer = await api.post("/v1/messages", **{**body, "max_tokens": 80})
    expect(answer["stop_reason"] == "tool_use" and "city" in answer["content"][-1]["input"], "no call")


@probe("Chat", "images")
async def vision(api: Api) -> None:
    rows = []
    for picture in (RED, BLUE):
        parts = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}},
            {"type": "text", "text": "Colour?"},
        ]
        body = {**api.body(""), "messages": [{"role": "user", "content": parts}], "max_tokens": 1, "temperature": 0}
        answer = await api.post("/v1/chat/completions", **body, logprobs=True, top_logprobs=5)
        rows.append(answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"])
    expect(rows[0] != rows[1], "another picture changes nothing")


# --- Ollama, KoboldAI, llama-server, internal ----------------------------------------------------------------------


@probe("Ollama", "chat, streamed and whole")
async def ollama_chat(api: Api) -> None:
    body = api.body("Hello", options={"num_predict": 8, "seed": 2})
    body.pop("max_tokens")
    events = await api.events("/api/chat", **body)
    whole = await api.post("/api/chat", **body, stream=False)
    expect(events[-1][1]["done"] is True, "the stream has no end")
    expect("".join(d["message"]["content"] for _, d in events) == whole["message"]["content"], "the streamed text differs")


@probe("Ollama", "generate with context, show, tags")
async def ollama_generate(api: Api) -> None:
    options = {"num_predict": 4}
    first = await api.post("/api/generate", model=api.model, prompt="Hello", stream=False, options=options)
    await api.post("/api/generate", model=api.model, prompt="And?", context=first["context"], stream=False, options=options)
    shown = await api.post("/api/show", model=api.model)
    expect("completion" in shown["capabilities"], "no capabilities")
    listed = await api.get("/api/tags")
    expect(api.model in [model["name"] for model in listed["models"]], "it is not listed")


@probe("Ollama", "embed")
async def ollama_embed(api: Api) -> None:
    made = await api.post("/api/embed", model=api.model, input=["a", "b"])
    expect(len(made["embeddings"]) == 2, "not two vectors")


@probe("KoboldAI", "generate, streamed and whole (the active model)")
async def kobold(api: Api) -> None:
    await _active(api)
    body = {"prompt": "Once upon a time", "max_length": 8, "sampler_seed": 4}
    whole = await api.post("/api/v1/generate", **body)
    events = await api.events("/api/extra/generate/stream", **body)
    expect("".join(d["token"] for _, d in events) == whole["results"][0]["text"], "the streamed text differs")


@probe("llama-server", "completion, tokenize, detokenize, apply-template")
async def llama_server(api: Api) -> None:
    answer = await api.post("/completion", model=api.model, prompt="Once upon a time", n_predict=8)
    expect(answer["stop"] is True and answer["timings"]["predicted_n"] > 0, "no timings")
    await _active(api)
    tokens = (await api.post("/tokenize", content="hello there"))["tokens"]
    text = (await api.post("/detokenize", tokens=tokens))["content"]
    expect(text.strip() == "hello there", "tokenize and detokenize differ")
    made = await api.post("/apply-template", model=api.model, messages=[{"role": "user", "content": "hi"}])
    expect("hi" in made["prompt"], "the prompt lacks the message")


@probe("llama-server", "probabilities (n_probs)")
async def llama_probs(api: Api) -> None:
    answer = await api.post("/completion", model=api.model, prompt="Once upon a time", n_predict=2, n_probs=3)
    expect(len(answer["completion_probabilities"][0]["top_logprobs"]) == 3, "not three candidates")


@probe("Internal", "encode, decode, token-count, chat-prompt (the active model)")
async def internal(api: Api) -> None:
    await _active(api)
    encoded = await api.post("/v1/internal/encode", text="hello there")
    decoded = await api.post("/v1/internal/decode", tokens=encoded["tokens"])
    counted = await api.post("/v1/internal/token-count", text="hello there")
    expect("hello there" in decoded["text"] and counted["length"] == encoded["length"], "they disagree")


@probe("Internal", "logits (the active model)")
async def internal_logits(api: Api) -> None:
    await _active(api)
    made = await api.post("/v1/internal/logits", prompt="Once upon a time", top_logits=5)
    expect(len(made["logits"]) >= 1 and sum(made["logits"].values()) <= 1.001, "no probabilities")


async def _active(api: Api) -> None:
    """Some protocols know no model: they mean the active one."""
    info = await api.get("/v1/internal/model/info")
    if info["model_name"] != api.model:
        raise Failed("another model is the active one: choose this one on the page first")
