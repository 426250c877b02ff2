from __future__ import annotations

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modules import protocol
from modules.errors import AppError, EngineDead, ProtocolError, error_classes, error_from_wire
from modules.schema import (
    Done,
    GenerationRequest,
    LoaderSpec,
    ModelFiles,
    ModelInfo,
    OptionSpec,
    Quantization,
    StopParams,
    Timings,
    TokenEvent,
    TokenLogprob,
    Usage,
    from_wire,
    to_wire,
)

VALUES = [
    GenerationRequest("r", prompt="é", sampling={"temperature": 0.5}, stop=StopParams(5, 1, ("a", "b"), (3,), True), logprobs=2),
    GenerationRequest("r", token_ids=(1, 2), json_schema={"type": "object"}),
    TokenEvent("r", 3, (7, 8), "x", (TokenLogprob(7, "x", -0.5, ((7, "x", -0.5),)),)),
    Done("r", "stop", Usage(1, 2, 3), Timings(0.1, 0.2), "###", 5, {"top_k": 1}, {"tfs": "no"}, 7),
    ModelInfo("m", "/m", "echo", "gguf", quantization=Quantization("gptq", 4, 128, True, False), eos_token_ids=(2,)),
    ModelFiles("m", "/m", "hf", files=("a", "b")),
    LoaderSpec("x", "X", "a:B", "s", {"hf": 1}, frozenset({"top_k"}), (OptionSpec("o", "int", 1, "h"),), frozenset({"lora"})),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda v: type(v).__name__)
def test_wire_round_trip(value: object) -> None:
    assert from_wire(type(value), json.loads(json.dumps(to_wire(value)))) == value


def test_wire_refuses_unknown_fields() -> None:
    with pytest.raises(TypeError, match="nonsense"):
        from_wire(Usage, {"nonsense": 1})


def test_rates_leave_out_the_first_token_and_the_cache() -> None:
    usage = Usage(prompt_tokens=30, completion_tokens=11, cached_tokens=10)
    assert Timings(2.0, 5.0).prefill_rate(usage) == 10
    assert Timings(2.0, 5.0).decode_rate(usage) == 2
    assert Timings().decode_rate(Usage()) is None


def test_option_is_found_by_alias() -> None:
    spec = LoaderSpec("x", "X", "a:B", "s", {}, frozenset(), (OptionSpec("n_ctx", "int", 1, "h", aliases=("ctx_size",)),))
    assert spec.option("ctx_size") is spec.option("n_ctx") is not None
    assert spec.option("other") is None


# --- the error tree --------------------------------------------------------------------------------------------


def test_every_error_has_its_own_code_a_status_and_a_body() -> None:
    classes = error_classes()
    leaves = [cls for cls in classes if not cls.__subclasses__()]
    codes = [cls.code for cls in leaves]
    assert len(set(codes)) == len(codes), "two errors share a code"
    for cls in classes:
        error = cls("What happened.", hint="What to do.", param="p")
        assert 400 <= cls.http_status < 600
        body = error.openai_body()["error"]
        assert body == {"message": "What happened. What to do.", "type": cls.openai_type, "param": "p", "code": cls.code}
        assert (cls.http_status < 500) <= (cls.openai_type != "server_error") or cls.http_status in (422, 423)


def test_errors_cross_the_wire_as_themselves() -> None:
    for cls in error_classes():
        back = error_from_wire(json.loads(json.dumps(cls("m", hint="h", detail={"a": 1}).to_wire())))
        assert type(back) is cls and (back.message, back.hint, back.detail) == ("m", "h", {"a": 1})


def test_the_docstring_draws_the_tree() -> None:
    import modules.errors

    for cls in error_classes():
        assert cls.__name__ in (modules.errors.__doc__ or ""), f"{cls.__name__} is missing in the drawing"


def test_unknown_code_is_an_engine_error() -> None:
    assert error_from_wire({"code": "from the future", "message": "m"}).code == "engine_error"
    assert issubclass(EngineDead, AppError)


# --- frames ----------------------------------------------------------------------------------------------------


@given(st.text())
def test_frame_round_trip(text: str) -> None:
    stream = io.BytesIO(protocol.encode_frame({"type": "log", "text": text}))
    assert protocol.read_frame(stream) == {"type": "log", "text": text}
    assert protocol.read_frame(stream) is None


def test_lone_surrogates_cross() -> None:
    message = {"type": "log", "text": "a\ud800b"}
    assert protocol.read_frame(io.BytesIO(protocol.encode_frame(message))) == message


@pytest.mark.parametrize(
    "data",
    [
        b"\x00",
        b"\x00\x00\x00\x05{}",
        b"\xff\xff\xff\xff",
        b"\x00\x00\x00\x00",
        b"\x00\x00\x00\x02ab",
        b"\x00\x00\x00\x02{}",
        b'\x00\x00\x00\x0f{"type":"other"}'[:19],
    ],
)
def test_broken_frames_are_typed(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        protocol.read_frame(io.BytesIO(data))


@given(st.binary(max_size=64))
def test_any_bytes_give_a_message_or_a_protocol_error(data: bytes) -> None:
    try:
        message = protocol.read_frame(io.BytesIO(data))
    except ProtocolError:
        return
    assert message is None or message["type"] in protocol.MESSAGES


def test_a_frame_over_the_cap_is_refused() -> None:
    with pytest.raises(ProtocolError, match="limit"):
        protocol.encode_frame({"type": "log", "text": "x" * (protocol.MAX_FRAME_BYTES + 1)})
