"""The remote loader against a server that does what a test tells it: mappings, answers of every kind, and every fault."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from loaders._remote_kinds import KINDS, form_fields, stop_fields, to_native
from loaders._remote_read import ChatReader
from loaders.remote import SPEC, RemoteEngine
from modules.engine import CancelToken
from modules.errors import (
    AppError,
    BackendUnavailable,
    ContextLengthExceeded,
    EngineTimeout,
    ModelNotFound,
    RemoteBusy,
    RemoteError,
    RequestError,
    UnsupportedParameter,
)
from modules.remotes.store import RemoteStore, model_path
from modules.sampling import PARAMETERS
from modules.schema import ChatInput, Done, GenerationRequest, ModelInfo, StopParams, TokenEvent
from tests.pictures import data_url, encoded, gif, png
from tests.unit.far_server import FarServer, Handler, far_server

KEY = "sk-a-secret-key"
CHAT = "/v1/chat/completions"
RAW = "/v1/completions"
HELLO = ChatInput(({"role": "user", "content": "Hello"},))
Start = Callable[..., tuple[RemoteEngine, ModelInfo]]


@pytest.fixture
def far() -> Iterator[FarServer]:
    with far_server() as server:
        yield server


@pytest.fixture
def start(far: FarServer, tmp_path: Path) -> Iterator[Start]:
    """Load the model `m` of the server; further arguments are options."""
    store = RemoteStore(tmp_path)
    engines: list[RemoteEngine] = []

    def load(model: str = "m", kind: str = "auto", key: str | None = KEY, **options: Any) -> tuple[RemoteEngine, ModelInfo]:
        with contextlib.suppress(AppError):
            store.remove("far")
        store.add("far", far.url, key, kind)
        engine = RemoteEngine()
        complete = {option.name: option.default for option in SPEC.options} | options
        info = engine.load(model_path(store.path, "far", model), complete, lambda _: None)
        engines.append(engine)
        return engine, info

    yield load
    for engine in engines:
        engine.close()


def ask(engine: RemoteEngine, **fields: Any) -> tuple[str, Done]:
    """(the text, the end) of one request. Raises what the engine raises."""
    stop = fields.pop("stop", StopParams(max_tokens=20))
    if "prompt" not in fields and "token_ids" not in fields:
        fields.setdefault("chat", HELLO)
    text, end = "", None
    for event in engine.generate(GenerationRequest("r", stop=stop, **fields), CancelToken()):
        if event is None:
            engine.wait_for_news()
        elif isinstance(event, TokenEvent):
            text += event.text
        elif isinstance(event, Done):
            end = event
    assert end is not None
    return text, end


def says(*texts: str, finish: str = "stop", usage: bool = True) -> Callable[[Handler], None]:
    """A chat and a completion at once: each piece as `content` and as `text`."""

    def answer(handler: Handler) -> None:
        handler.begin()
        for text in texts:
            handler.piece(delta={"content": text}, text=text)
        handler.piece(delta={}, text="", finish_reason=finish)
        if usage:
            handler.data(json.dumps({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3}}).encode())
        handler.data(b"[DONE]")

    return answer


# --- what goes out -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.name)
def test_every_parameter_is_sent_or_reported(kind: Any) -> None:
    values = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.2, "presence_penalty": 0.3,
        "frequency_penalty": 0.4, "typical_p": 0.8, "num_beams": 2, "mirostat_mode": 2, "seed": 5, "tfs": 0.9, "top_a": 0.2,
        "dry_multiplier": 0.7, "xtc_probability": 0.4, "no_repeat_ngram_size": 3, "ban_eos_token": True,
    }  # fmt: skip
    assert values.keys() <= PARAMETERS.keys()
    fields, ignored = to_native(kind, values)
    for name, value in values.items():
        if name in kind.samplers:
            assert fields[kind.samplers[name]] == value
        else:
            assert kind.title in ignored[name]


def test_neutral_values_are_sent_where_the_server_has_other_defaults() -> None:
    fields, ignored = to_native(KINDS["llama-server"], {"temperature": 0.0, "top_k": 0})
    assert fields == {
        "temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0, "repeat_penalty": 1.0
    } and not ignored  # fmt: skip
    assert to_native(KINDS["vllm"], {"top_k": 0})[0]["top_k"] == -1
    assert "top_p" not in to_native(KINDS["tgi"], {"top_p": 1.0})[0], "TGI takes only what is below 1"
    assert to_native(KINDS["switchyard"], {"temperature": 1.0, "dry_sequence_breakers": ("a",)})[0] == {
        "dry_sequence_breakers": ["a"]
    }
    windowed = {"repetition_penalty": 1.1, "repetition_penalty_range": 0}
    assert "repeat_last_n" not in to_native(KINDS["llama-server"], windowed)[0]


def test_stops_that_do_not_fit_are_left_to_us() -> None:
    stop = StopParams(stop=("a", "b", "c", "d", "e"), min_tokens=3, ignore_eos=True)
    fields, ignored, ours = stop_fields(KINDS["openai"], stop)
    assert fields == {"stop": ["a", "b", "c", "d"]} and ours == ("e",) and ignored.keys() == {"min_tokens", "ignore_eos"}
    assert stop_fields(KINDS["vllm"], stop)[0] == {"stop": list("abcde"), "min_tokens": 3, "ignore_eos": True}


def test_forms() -> None:
    schema = {"type": "object"}
    none: dict[str, Any] = {"grammar": None, "schema": None, "regex": None}
    assert form_fields(KINDS["openai"], chat=True, **none) == {}
    asked = form_fields(KINDS["openai"], chat=True, **{**none, "schema": schema})
    assert asked is not None and asked["response_format"]["json_schema"]["schema"] == schema
    assert form_fields(KINDS["openai"], chat=False, **{**none, "schema": schema}) is None
    assert form_fields(KINDS["openai"], chat=True, **{**none, "regex": "a+"}) is None
    assert form_fields(KINDS["llama-server"], chat=False, **{**none, "schema": schema}) == {"json_schema": schema}
    assert form_fields(KINDS["switchyard"], chat=True, **{**none, "regex": "a+"}) == {"regex": "a+"}
    assert form_fields(KINDS["tabbyapi"], chat=True, **{**none, "grammar": "g"}) == {"grammar_string": "g"}


def test_a_chat_travels_as_messages(far: FarServer, start: Start) -> None:
    far.routes[CHAT] = says("Hi", " there")
    engine, info = start()
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    messages = (
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "2"},
    )
    text, end = ask(
        engine, chat=ChatInput(messages, tools=(tool,), tool_choice="f"), sampling={"temperature": 0.5, "top_k": 4}, logprobs=2
    )
    assert text == "Hi there" and end.finish_reason == "stop" and end.usage.prompt_tokens == 7
    assert end.ignored == {"top_k": "OpenAI-compatible server does not have top_k."} and end.applied["temperature"] == 0.5
    [body] = far.asked(CHAT)
    assert body["model"] == "m" and body["max_tokens"] == 20 and body["stream"] and body["seed"] == end.seed
    assert body["messages"][1]["tool_calls"][0]["function"]["arguments"] == '{"a": 1}', "JSON text, as OpenAI has it"
    assert body["tools"] == [tool] and body["tool_choice"] == {"type": "function", "function": {"name": "f"}}
    assert body["logprobs"] is True and body["top_logprobs"] == 2
    assert far.requests[-1][2]["Authorization"] == f"Bearer {KEY}"
    assert {"tokenizer", "score", "grammar", "top_k"} <= set(info.lacks) and "messages" not in info.lacks


def test_a_prompt_goes_to_the_raw_endpoint(far: FarServer, start: Start) -> None:
    far.routes[RAW] = says("and so on", finish="length")
    engine, _ = start()
    text, end = ask(engine, prompt="Once", logprobs=None)
    assert (text, end.finish_reason) == ("and so on", "length")
    assert far.asked(RAW)[0]["prompt"] == "Once" and "messages" not in far.asked(RAW)[0]
    with pytest.raises(UnsupportedParameter, match="token ids"):
        ask(engine, token_ids=(1, 2))
    with pytest.raises(UnsupportedParameter, match="form"):
        ask(engine, prompt="Once", regex="a+")


def test_a_fifth_stop_is_matched_here(far: FarServer, start: Start) -> None:
    far.routes[CHAT] = says("one STO", "P two")
    engine, _ = start()
    text, end = ask(engine, stop=StopParams(max_tokens=9, stop=("1", "2", "3", "4", "STOP")))
    assert (text, end.finish_reason, end.stop_match) == ("one ", "stop", "STOP")


# --- what comes back -----------------------------------------------------------------------------------------------


def test_reasoning_and_calls_become_one_text(far: FarServer, start: Start) -> None:
    def answer(handler: Handler) -> None:
        handler.begin()
        handler.piece(delta={"role": "assistant", "reasoning_content": "Let me "})
        handler.piece(delta={"reasoning_content": "see."})
        handler.piece(delta={"content": "I ask."})
        handler.piece(delta={"tool_calls": [{"index": 0, "id": "a", "function": {"name": "f", "arguments": ""}}]})
        handler.piece(delta={"tool_calls": [{"index": 0, "function": {"arguments": '{"x":'}}]})
        handler.piece(delta={"tool_calls": [{"index": 0, "function": {"arguments": " 1}"}}]})
        handler.piece(delta={"tool_calls": [{"index": 1, "function": {"name": "g", "arguments": None}}]})
        handler.piece(delta={}, finish_reason="tool_calls")

    far.routes[CHAT] = answer
    text, end = ask(start()[0])
    assert text == (
        "<think>\nLet me see.\n</think>\n\nI ask.<tool_call>\n"
        '{"name": "f", "arguments": {"x": 1}}\n</tool_call>\n<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>\n'
    )
    assert end.finish_reason == "stop"


def test_a_chat_reader_takes_strange_deltas() -> None:
    reader = ChatReader()
    assert reader.feed({"content": 3, "tool_calls": "x", "reasoning": None}) == ""
    assert reader.feed({"tool_calls": [{"function": "no"}, 5, {"index": "z", "function": {"arguments": "lost"}}]}) == ""
    assert reader.feed({"content": "a"}) + reader.close() == "a"


def test_a_whole_answer_where_a_stream_was_asked_for(far: FarServer, start: Start) -> None:
    whole = {"choices": [{"message": {"content": "All at once"}, "finish_reason": "stop"}], "usage": {"prompt_tokens": 2}}
    far.routes[CHAT] = lambda handler: handler.send_json(whole)
    assert ask(start()[0])[0] == "All at once"


def test_log_probabilities_of_both_forms(far: FarServer, start: Start) -> None:
    def chat(handler: Handler) -> None:
        handler.begin()
        top = [{"token": "a", "logprob": -0.1}, {"token": "b", "logprob": -2.5}]
        handler.piece(delta={"content": "a"}, logprobs={"content": [{"token": "a", "logprob": -0.1, "top_logprobs": top}]})
        handler.piece(delta={}, finish_reason="stop")

    def raw(handler: Handler) -> None:
        handler.begin()
        lists = {"tokens": ["a"], "token_logprobs": [-0.1], "top_logprobs": [{"b": -2.5, "a": -0.1}]}
        handler.piece(text="a", logprobs=lists, finish_reason="stop")

    far.routes[CHAT], far.routes[RAW] = chat, raw
    engine, _ = start()
    for fields in ({"chat": HELLO}, {"prompt": "x"}):
        request = GenerationRequest("r", logprobs=2, stop=StopParams(max_tokens=3), **fields)  # type: ignore[arg-type]
        events = [e for e in engine.generate(request, CancelToken()) if isinstance(e, TokenEvent)]
        [item] = [item for event in events for item in event.logprobs]
        assert (item.text, item.logprob) == ("a", -0.1) and item.top == ((-1, "a", -0.1), (-1, "b", -2.5))


# --- which server it is ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("owner", "title"),
    [("vllm", "vLLM"), ("llamacpp", "llama-server"), ("library", "Ollama"), ("tabbyAPI", "tabbyAPI"), ("x", "OpenAI-compatible")],
)
def test_a_server_is_known_by_its_list(far: FarServer, start: Start, owner: str, title: str) -> None:
    far.owner = owner
    _, info = start()
    assert info.engine is not None and info.engine.startswith(title) and info.engine.endswith("at far")


def test_a_server_is_known_by_its_routes_or_by_its_owner(far: FarServer, start: Start) -> None:
    far.routes["/info"] = lambda h: h.send_json({"model_id": "m", "max_total_tokens": 2048, "version": "3.3"})
    _, info = start()
    assert (info.engine, info.context_length) == ("TGI 3.3 at far", 2048)
    far.routes["/tokenize"] = lambda h: h.send_json({"tokens": [1, 2], "count": 2})
    far.routes["/detokenize"] = lambda h: h.send_json({"prompt": "ab"})
    engine, info = start(kind="vllm")
    assert info.architecture == "vLLM" and "tokenizer" not in info.lacks
    assert engine.encode("ab", False) == [1, 2] and engine.decode([1, 2]) == "ab"
    assert far.asked("/tokenize")[-1] == {"prompt": "ab", "add_special_tokens": False, "model": "m"}


PICTURE = encoded(png())
LOOK = ChatInput(({"role": "user", "content": "What?", "parts": [{"type": "image"}, {"type": "text", "text": "What?"}]},))


@pytest.mark.parametrize(
    ("kind", "told", "sees"),
    [
        ("openai", {}, None),
        ("openai", {"entry": {"architecture": {"input_modalities": ["text", "image"]}}}, True),
        ("openai", {"entry": {"capabilities": {"vision": True, "completion_chat": True}}}, True),
        ("openai", {"entry": {"capabilities": {"vision": False}}}, False),
        ("vllm", {}, None),
        ("switchyard", {"entry": {"capabilities": ["logprobs", "vision"]}}, True),
        ("switchyard", {"entry": {"capabilities": ["logprobs"]}}, False),
        ("llama-server", {"/props": {"modalities": {"vision": True, "audio": False}}}, True),
        ("llama-server", {"/props": {"modalities": {"vision": False}}}, False),
        ("llama-server", {"/props": {"modalities": 3}}, None),
        ("ollama", {"/api/show": {"capabilities": ["completion", "vision"]}}, True),
        ("ollama", {"/api/show": {"capabilities": ["completion"]}}, False),
        ("ollama", {}, None),
        ("tgi", {"/info": {"model_pipeline_tag": "image-text-to-text"}}, True),
        ("tgi", {"/info": {"model_pipeline_tag": "text-generation"}}, False),
        ("tabbyapi", {"/v1/model": {"parameters": {"use_vision": True}}}, True),
        ("tabbyapi", {"/v1/model": {"parameters": {}}}, None),
    ],
)
def test_whether_a_model_sees_is_asked_of_its_server(
    far: FarServer, start: Start, kind: str, told: dict[str, Any], sees: bool | None
) -> None:
    far.routes["/v1/models"] = lambda h: h.send_json({"data": [{"id": "m", **told.get("entry", {})}]})
    for path, value in told.items():
        far.routes[path] = lambda h, value=value: h.send_json(value)  # type: ignore[misc]
    far.routes[CHAT] = says("red")
    engine, info = start(kind=kind)
    assert (info.image_token is not None, "vision" not in info.lacks) == (sees is True,) * 2
    assert any("vision=yes" in note for note in info.notes) == (sees is None)
    assert (start(kind=kind, vision="yes")[1].image_token, start(kind=kind, vision="no")[1].image_token) == ("<image>", None)
    assert start(kind=kind, vision="yes", chat_rendering="plain")[1].image_token is None
    if sees:
        ask(engine, chat=LOOK, images=(PICTURE,))
        [message] = far.asked(CHAT)[-1]["messages"]
        assert message == {
            "role": "user",
            "content": [{"type": "image_url", "image_url": {"url": data_url(png())}}, {"type": "text", "text": "What?"}],
        }


def test_an_error_in_the_stream_keeps_its_kind(far: FarServer, start: Start) -> None:
    told: list[tuple[dict[str, Any], type[AppError]]] = [
        ({"message": "The image is damaged.", "type": "invalid_request_error", "code": "invalid_image"}, RequestError),
        ({"message": "no such thing", "code": 400}, RequestError),
        ({"message": "it broke", "type": "server_error"}, RemoteError),
        ({"message": "later", "code": 503}, RemoteBusy),
    ]
    engine, _ = start(busy_retries=0)
    for error, expected in told:

        def answer(handler: Handler, error: dict[str, Any] = error) -> None:
            handler.begin()
            handler.data(json.dumps({"error": error}).encode())

        far.routes[CHAT] = answer
        with pytest.raises(expected, match=error["message"]) as caught:
            ask(engine)
        assert type(caught.value) is expected


def test_images_are_told_in_their_order_and_by_their_kind(far: FarServer, start: Start) -> None:
    far.routes[CHAT] = says("x")
    image, words = {"type": "image"}, {"type": "text", "text": ""}
    messages = (
        {"role": "user", "content": "", "parts": [image, words]},
        {"role": "assistant", "content": "One."},
        {"role": "user", "content": "b", "parts": [{"type": "text", "text": "b"}, image]},
    )
    engine, _ = start(vision="yes")
    ask(engine, chat=ChatInput(messages), images=(PICTURE, encoded(gif())))
    first, answer, last = far.asked(CHAT)[-1]["messages"]
    assert first["content"] == [{"type": "image_url", "image_url": {"url": data_url(png())}}] and answer["content"] == "One."
    assert last["content"][1]["image_url"]["url"] == data_url(gif(), "image/gif") and "parts" not in last


def test_our_own_limit_is_kept_to(far: FarServer, start: Start) -> None:
    far.routes["/tokenize"] = lambda h: h.send_json({"tokens": list(range(len(h.body["prompt"])))})
    far.routes[RAW] = says("x")
    engine, info = start(kind="vllm", ctx_size=10)
    assert info.context_length == 10
    ask(engine, prompt="abcd", stop=StopParams())
    assert far.asked(RAW)[-1]["max_tokens"] == 6
    with pytest.raises(ContextLengthExceeded, match="10 tokens"):
        ask(engine, prompt="a" * 10)


# --- faults ---------------------------------------------------------------------------------------------------------


def _redirect(to: str, status: int = 307) -> Callable[[Handler], None]:
    return lambda handler: handler.send_bytes(b"", "text/plain", status, Location=to)


def test_a_redirect_to_another_place_is_refused(far: FarServer, start: Start) -> None:
    with far_server() as inner:
        far.routes[CHAT] = _redirect(f"{inner.url}/chat/completions")
        with pytest.raises(RemoteError, match="another place"):
            ask(start()[0])
        far.routes["/v1/models"] = _redirect(f"http://user:{KEY}@localhost:{inner.server_port}/v1/models", 302)
        with pytest.raises(BackendUnavailable, match="another place") as caught:
            start()
        assert inner.requests == [] and KEY not in str(caught.value)


def test_a_redirect_at_the_same_place_is_followed(far: FarServer, start: Start) -> None:
    far.routes[CHAT] = _redirect("/there", 308)
    far.routes["/there"] = says("found")
    engine, _ = start()
    assert ask(engine)[0] == "found"
    far.routes[CHAT] = _redirect(CHAT)
    with pytest.raises(RemoteError, match="circle"):
        ask(engine)
    far.routes[CHAT] = _redirect("/there", 302)
    with pytest.raises(RemoteError, match="drops"):
        ask(engine)


def test_a_refused_key_is_not_our_clients_fault_and_is_not_shown(far: FarServer, start: Start) -> None:
    engine, _ = start()
    far.routes[CHAT] = lambda h: h.send_json({"error": {"message": f"Incorrect API key: {KEY}", "code": "invalid_api_key"}}, 401)
    with pytest.raises(RemoteError, match=r"refused its key \(401\)") as caught:
        ask(engine)
    assert KEY not in str(caught.value.to_wire()) and caught.value.http_status == 502
    far.routes["/v1/models"] = lambda h: h.send_json({"detail": "who are you?"}, 403)
    with pytest.raises(BackendUnavailable, match="without a key"):
        start(key=None)


def test_a_busy_server_is_asked_again(far: FarServer, start: Start) -> None:
    refusals = [429, 503]

    def answer(handler: Handler) -> None:
        if refusals:
            handler.send_json({"error": {"message": "later"}}, refusals.pop(), Retry_After="0")
        else:
            says("now")(handler)

    far.routes[CHAT] = answer
    engine, _ = start()
    assert ask(engine)[0] == "now" and len(far.asked(CHAT)) == 3
    far.routes[CHAT] = lambda h: h.send_json({"error": "queue full"}, 503, Retry_After="100")
    with pytest.raises(RemoteBusy, match="queue full") as caught:
        ask(engine)
    assert caught.value.detail == {"retry_after": 100.0} and "100 s" in caught.value.hint
    assert len(far.asked(CHAT)) == 4, "nobody waits so long"
    engine, _ = start(busy_retries=0)
    far.routes[CHAT] = lambda h: h.send_bytes(b"<html>busy", "text/html", 429)
    with pytest.raises(RemoteBusy):
        ask(engine)


def _ends_early(handler: Handler) -> None:
    handler.begin()
    handler.piece(delta={"content": "half"})


def _breaks_off(handler: Handler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Type", "text/event-stream")
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    handler.piece(delta={"content": "half"})
    handler.close_connection = True


def _long_line(handler: Handler) -> None:
    handler.begin()
    with contextlib.suppress(OSError):
        handler.data(b"x" * (5 << 20))


def _error_in_the_middle(handler: Handler) -> None:
    handler.begin()
    handler.piece(delta={"content": "half"})
    handler.data(b'{"error": {"message": "CUDA out of memory", "code": 500}}')


def _no_json(handler: Handler) -> None:
    handler.begin()
    handler.data(b"{not json")


@pytest.mark.parametrize(
    ("answer", "says_what"),
    [
        (_ends_early, "in the middle"),
        (_breaks_off, "broke the connection"),
        (_long_line, "more than 4 MB"),
        (_error_in_the_middle, "CUDA out of memory"),
        (_no_json, "no JSON"),
        (lambda h: h.send_bytes(b"<html>Log in</html>", "text/html"), "text/html"),
        (lambda h: h.send_bytes(b"[" * 100_000, "application/json"), "no OpenAI API"),
        (lambda h: h.send_bytes(b" " * (17 << 20), "application/json"), "more than 16 MB"),
        (lambda h: h.send_json({"error": "boom"}, 500), "boom"),
        (lambda h: h.send_json({"choices": []}), "in the middle"),
        (lambda h: h.send_json({"detail": "Not Found"}, 404), "no such route"),
    ],
)  # fmt: skip
def test_a_server_that_misbehaves_is_a_typed_error(far: FarServer, start: Start, answer: Any, says_what: str) -> None:
    engine, _ = start()
    far.routes[CHAT] = answer
    with pytest.raises(RemoteError, match=says_what) as caught:
        ask(engine)
    assert caught.value.hint
    far.routes[CHAT] = says("good again")
    assert ask(engine)[0] == "good again"


def test_a_server_that_hangs_is_given_up(far: FarServer, start: Start) -> None:
    engine, _ = start(silence_s=0.2)
    far.routes[CHAT] = lambda handler: (far.release.wait(60), None)[1]
    with pytest.raises(EngineTimeout, match="sent nothing"):
        ask(engine)


def test_bytes_that_are_no_text_become_marks(far: FarServer, start: Start) -> None:
    def answer(handler: Handler) -> None:
        handler.begin()
        handler.data(b'{"choices": [{"delta": {"content": "caf\xff!"}, "finish_reason": "stop"}]}')

    far.routes[CHAT] = answer
    assert ask(start()[0])[0] == "caf�!"


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (400, {"error": {"message": "no", "code": "context_length_exceeded"}}, ContextLengthExceeded),
        (400, {"message": "This model's maximum context length is 4096 tokens"}, ContextLengthExceeded),
        (422, {"error": "Input validation error"}, RequestError),
        (404, {"error": {"message": "The model `m` does not exist"}}, ModelNotFound),
    ],
)
def test_a_refused_request_is_the_clients(far: FarServer, start: Start, status: int, body: Any, error: type[AppError]) -> None:
    engine, _ = start()
    far.routes[CHAT] = lambda h: h.send_json(body, status)
    with pytest.raises(error) as caught:
        ask(engine)
    assert caught.value.http_status < 500


def test_a_model_list_that_changed(far: FarServer, start: Start) -> None:
    far.models = ["other"]
    with pytest.raises(ModelNotFound, match="has no model 'm' now") as caught:
        start()
    assert "other" in caught.value.hint
    far.routes["/v1/models"] = lambda h: h.send_json({"data": "soon"})
    with pytest.raises(BackendUnavailable, match="no list of models"):
        start()


def test_a_server_that_is_not_there(far: FarServer, start: Start) -> None:
    engine, _ = start()
    far.shutdown()
    far.server_close()
    with pytest.raises(RemoteError, match="can't be reached"):
        ask(engine)


def test_a_cancelled_answer_hangs_up(far: FarServer, start: Start) -> None:
    def answer(handler: Handler) -> None:
        handler.begin()
        handler.piece(delta={"content": "word"})
        handler.wait_for_end()
        far.closed.set()

    far.routes[CHAT] = answer
    engine, _ = start()
    cancel = CancelToken()
    text, end = "", None
    due = time.monotonic() + 60
    for event in engine.generate(GenerationRequest("r", chat=HELLO), cancel):
        assert time.monotonic() < due
        if isinstance(event, TokenEvent):
            text += event.text
            cancel.cancel()
        elif isinstance(event, Done):
            end = event
    assert text == "word" and end is not None and end.finish_reason == "cancelled" and end.usage.completion_tokens == 1
    assert far.closed.wait(60), "the far server goes on for nobody"
