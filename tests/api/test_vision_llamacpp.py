"""Images through llama.cpp: a tiny LLaVA as GGUF with its projector answers what Transformers answers, with each build."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anthropic
import ollama
import pytest

from modules.schema import ChatInput, StopParams
from tests.api.conftest import Server
from tests.api.test_ui_routes import Page
from tests.conftest import ROOT
from tests.contract.test_remote_servers import connected, llama_server
from tests.pictures import BLUE, RED, data_url, encoded, png

if TYPE_CHECKING:
    from modules.overlays import Overlays

MODEL, PROJECTOR = "tiny-llava-F32.gguf", "mmproj-tiny-llava-F32.gguf"
QUESTION = "What is it?"
# As large as the model's own images: the two ways to scale pictures differ.
PICTURES = {"red": png(RED, 32, 32, stripes=16), "blue": png(BLUE, 32, 32), "wide": png(BLUE, 64, 32, stripes=9)}
FEW = 6  # tokens, as in the lab
IMAGE_TOKENS = 16
# Natural-log probability of each token; llama.cpp looks GELU up in a table of 16-bit numbers and caches 16-bit keys.
TOLERANCE = 0.05


@dataclass
class Seeing:
    """A server with the model loaded by one build of llama.cpp. `expected` is what Transformers answers in each case."""

    server: Server
    folder: Path
    expected: dict[str, Any]
    engine: str

    def load(self, **args: Any) -> Any:
        body = {"model_name": f"seer/{MODEL}", "args": {"loader": "llamacpp", "engine": self.engine, "threads": 1, **args}}
        return self.server.http.post("/v1/internal/model/load", json=body)

    def answer(self, content: Any, **more: Any) -> Any:
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": FEW, "temperature": 0, **more}
        return self.server.http.post("/v1/chat/completions", json=body)

    def text(self, content: Any, **more: Any) -> str:
        reply = self.answer(content, **more)
        assert reply.status_code == 200, reply.text
        return str(reply.json()["choices"][0]["message"]["content"])

    def usage(self, content: Any) -> tuple[int, int]:
        """(prompt tokens, those of them from the cache)."""
        usage = self.answer(content).json()["usage"]
        return usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]


def part(name: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(PICTURES[name])}}


WORDS = {"type": "text", "text": QUESTION}


@pytest.fixture(scope="module")
def lab(overlays: Overlays, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model: GGUF and projector in models/seer, its language model alone twice, and Transformers' answers."""
    if not overlays.complete("transformers") or not overlays.has_module("transformers", "PIL"):
        pytest.skip("the Transformers environment with Pillow is not here")
    if not overlays.has_module("llamacpp", "PIL"):
        pytest.skip("the llama.cpp environment with Pillow is not here")
    folder = tmp_path_factory.mktemp("lab")
    for name, data in PICTURES.items():
        (folder / f"{name}.png").write_bytes(data)
    models = folder / "models"
    line = [str(overlays.python("transformers")), str(ROOT / "tests" / "vision_gguf_lab.py"), str(folder)]
    made = subprocess.run(line, capture_output=True, text=True, env=overlays.worker_env("transformers"), timeout=300, check=False)
    assert made.returncode == 0, made.stderr[-4000:]
    for name in ("blind", "named"):
        (models / name).mkdir()
        shutil.copy(models / "seer" / MODEL, models / name / f"{name}.gguf")
    return folder


@pytest.fixture(scope="module")
def server(lab: Path) -> Iterator[Server]:
    server = Server(lab / "data", "--model-dir", str(lab / "models"), model=None)
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module", params=["llama_cpp", "xllamacpp"])
def seeing(lab: Path, server: Server, overlays: Overlays, request: pytest.FixtureRequest) -> Seeing:
    if not overlays.has_module("llamacpp", request.param):
        pytest.skip(f"{request.param} is not in the llama.cpp environment")
    expected = json.loads((lab / "expected.json").read_text(encoding="utf-8"))["llava"]
    made = Seeing(server, lab / "models", expected, request.param)
    reply = made.load()
    assert reply.status_code == 200, reply.text
    return made


def test_the_image_reaches_the_model(seeing: Seeing) -> None:
    expected = {name: case["text"] for name, case in seeing.expected.items()}
    assert len({expected["red"], expected["blue"], expected["none"]}) == 3, "the tiny model tells the pictures apart"
    assert seeing.text([part("red"), WORDS]) == expected["red"]
    assert seeing.text([part("blue"), WORDS]) == expected["blue"]
    assert seeing.text([WORDS, part("blue"), part("red")]) == expected["both"]
    assert seeing.text(QUESTION) == expected["none"]


def test_the_numbers_are_those_of_transformers(seeing: Seeing) -> None:
    for name, content in {"red": [part("red"), WORDS], "both": [WORDS, part("blue"), part("red")]}.items():
        reply = seeing.answer(content, logprobs=True).json()["choices"][0]["logprobs"]["content"]
        wanted = seeing.expected[name]["logprobs"]
        assert [entry["logprob"] for entry in reply] == pytest.approx(wanted, abs=TOLERANCE)


def test_the_prefix_cache_knows_the_images(seeing: Seeing) -> None:
    total = seeing.expected["red"]["prompt_tokens"]
    seeing.usage("another text")
    assert seeing.usage([part("red"), WORDS])[0] == total
    assert seeing.usage([part("red"), WORDS]) == (total, total - 1)
    before = total - IMAGE_TOKENS - len(f"{QUESTION}assistant:")
    assert seeing.usage([part("blue"), WORDS]) == (total, before), "only what stands before the other image"
    assert seeing.text([part("blue"), WORDS]) == seeing.expected["blue"]["text"]
    assert seeing.text([part("red"), WORDS]) == seeing.expected["red"]["text"]
    # An image that was cut off in its middle is read as a whole again: nothing of it is shared.
    assert seeing.text([WORDS, part("blue"), part("red")]) == seeing.expected["both"]["text"]
    assert seeing.text([WORDS, part("blue"), part("red")]) == seeing.expected["both"]["text"]


@pytest.mark.parametrize("options", [{}, {"batch_size": 5, "ubatch_size": 3}], ids=str)
def test_images_that_take_fewer_positions_than_tokens(seeing: Seeing, lab: Path, options: dict[str, int]) -> None:
    expected = json.loads((lab / "expected.json").read_text(encoding="utf-8"))["qwen"]
    http = seeing.server.http
    args = {"loader": "llamacpp", "engine": seeing.engine, "threads": 1, **options}
    contents = {
        "first": [part("wide"), WORDS],
        "later": [{"type": "text", "text": "Look: "}, part("wide"), {"type": "text", "text": " and "}, part("wide"), WORDS],
    }
    try:
        body = {"model_name": "turner/tiny-qwen-F32.gguf", "args": args}
        assert http.post("/v1/internal/model/load", json=body).status_code == 200
        for name in ("first", "later", "later", "first"):  # and once from the cache
            answer = seeing.answer(contents[name], logprobs=True).json()
            told = [entry["logprob"] for entry in answer["choices"][0]["logprobs"]["content"]]
            assert told == pytest.approx(expected[name]["logprobs"], abs=TOLERANCE)
            assert answer["usage"]["prompt_tokens"] == expected[name]["prompt_tokens"]
    finally:
        assert seeing.load().status_code == 200


def test_an_image_that_must_be_read_at_once_is(seeing: Seeing) -> None:
    """Its 4 tokens see each other: in batches of 2 llama.cpp would end the process."""
    answers = []
    try:
        for options in ({}, {"batch_size": 2, "ubatch_size": 2}):
            args = {"loader": "llamacpp", "engine": seeing.engine, "threads": 1, **options}
            body = {"model_name": "whole/tiny-whole-F32.gguf", "args": args}
            assert seeing.server.http.post("/v1/internal/model/load", json=body).status_code == 200
            answers.append([seeing.text([part(name), WORDS]) for name in ("red", "blue", "red")])
        first, blue, again = answers[0]
        assert first == again != blue and answers[0] == answers[1]
    finally:
        assert seeing.load().status_code == 200


def test_small_batches_give_the_same(seeing: Seeing) -> None:
    try:
        assert seeing.load(batch_size=7, ubatch_size=3).status_code == 200
        assert seeing.text([WORDS, part("blue"), part("red")]) == seeing.expected["both"]["text"]
    finally:
        assert seeing.load().status_code == 200


def test_every_protocol_and_the_page(seeing: Seeing) -> None:
    server, name = seeing.server, f"seer/{MODEL}"
    expected = seeing.expected
    image: Any = {"type": "input_image", "image_url": data_url(PICTURES["red"])}
    message = {"role": "user", "content": [image, {"type": "input_text", "text": QUESTION}]}
    made = server.http.post("/v1/responses", json={"input": [message], "max_output_tokens": FEW, "temperature": 0}).json()
    assert made["output"][-1]["content"][0]["text"] == expected["red"]["text"]
    with anthropic.Anthropic(base_url=server.url, api_key="x") as client:
        source: Any = {"type": "base64", "media_type": "image/png", "data": encoded(PICTURES["blue"])}
        content: Any = [{"type": "image", "source": source}, {"type": "text", "text": QUESTION}]
        told: Any = client.messages.create(
            model=name, max_tokens=FEW, extra_body={"temperature": 0}, messages=[{"role": "user", "content": content}]
        )
        assert told.content[0].text == expected["blue"]["text"]
    with ollama.Client(host=server.url) as far:
        options = {"temperature": 0, "num_predict": FEW, "top_k": 0, "top_p": 1.0}
        asked = {"role": "user", "content": QUESTION, "images": [PICTURES["red"]]}
        assert far.chat(model=name, messages=[asked], options=options).message.content == expected["red"]["text"]
        assert "vision" in (far.show(name).capabilities or [])
    page = Page(server)
    page.call("PUT", "settings", {"max_tokens": FEW, "sampling": {"temperature": 0}})
    red = page.call("POST", "attachments", {"image": encoded(PICTURES["red"])})["name"]
    chat = page.new()
    assert page.ask(chat, f"{QUESTION}\n\n![red.png](cid:{red})")["messages"][1]["text"] == expected["red"]["text"]
    usage = page.ask(chat, "And now?")["messages"][-1]["receipt"]["usage"]
    assert usage["cached_tokens"] > IMAGE_TOKENS, "the image is read once"


def test_streams_forms_and_guidance(seeing: Seeing) -> None:
    assert seeing.text([part("red"), WORDS], grammar='root ::= "yes" | "no"') in ("yes", "no")
    guided = seeing.answer([part("red"), WORDS], guidance_scale=1.5, negative_prompt="No.", repetition_penalty=1.3)
    assert guided.status_code == 200, guided.text
    body = {"messages": [{"role": "user", "content": [part("red"), WORDS]}], "max_tokens": FEW, "temperature": 0, "stream": True}
    with seeing.server.http.stream("POST", "/v1/chat/completions", json=body) as reply:
        lines = [line[6:] for line in reply.iter_lines() if line.startswith("data: {")]
    text = "".join(choice["delta"].get("content") or "" for line in lines for choice in json.loads(line)["choices"])
    assert text == seeing.expected["red"]["text"]


def test_what_is_wrong_with_an_image_is_typed(seeing: Seeing) -> None:
    whole = png(RED, 32, 32)
    place = whole.index(b"IDAT") + 6
    broken = whole[:place] + bytes(8) + whole[place + 8 :]
    reply = seeing.answer([{"type": "image_url", "image_url": {"url": data_url(broken)}}, WORDS])
    assert reply.status_code == 400 and reply.json()["error"]["code"] == "invalid_image"
    reply = seeing.answer([part("red")] * 16)  # 256 tokens of images
    assert reply.status_code == 400 and reply.json()["error"]["code"] == "context_length_exceeded"
    reply = seeing.answer([part("red"), {"type": "text", "text": "What is <__media__>?"}])
    assert reply.status_code == 400 and "<__media__>" in reply.json()["error"]["message"]
    assert seeing.text(QUESTION) == seeing.expected["none"]["text"]


def test_capabilities_and_what_belongs_to_the_model(seeing: Seeing) -> None:
    http = seeing.server.http
    models = {model["id"]: model for model in http.get("/v1/models").json()["data"]}
    assert "vision" in models[f"seer/{MODEL}"]["capabilities"] and "vision" not in models["blind/blind.gguf"]["capabilities"]
    assert not any(PROJECTOR in name for name in models)
    listed = {model["id"]: model for model in http.get("/v1/internal/model/list").json()["models"]}
    sizes = [(seeing.folder / "seer" / name).stat().st_size for name in (MODEL, PROJECTOR)]
    assert listed[f"seer/{MODEL}"]["size_bytes"] == sum(sizes) and listed[f"seer/{MODEL}"]["projector"] == PROJECTOR
    assert http.get("/props").json()["modalities"]["vision"] is True


def test_without_its_projector_a_model_refuses_images_by_name(seeing: Seeing) -> None:
    http = seeing.server.http
    try:
        for name, args, words in (
            ("blind/blind.gguf", {}, "mmproj file"),
            (f"seer/{MODEL}", {"no_mmproj": True}, "no_mmproj"),
            (f"seer/{MODEL}", {"engine": "xllamacpp_server"}, "its server"),
        ):
            body = {"model_name": name, "args": {"loader": "llamacpp", "engine": seeing.engine, "threads": 1, **args}}
            assert http.post("/v1/internal/model/load", json=body).status_code == 200
            error = seeing.answer([part("red"), WORDS]).json()["error"]
            assert error["code"] == "unsupported_parameter" and words in error["message"], error
            assert Path(name).stem in error["message"]
    finally:
        assert seeing.load().status_code == 200


def test_the_option_names_a_projector_that_lies_elsewhere(seeing: Seeing) -> None:
    name = "named/named.gguf"
    options = {"mmproj": f"seer/{PROJECTOR}", "engine": seeing.engine, "threads": 1}
    try:
        Page(seeing.server).call("POST", "models/load", {"model": name, "loader": "llamacpp", "options": options})
        assert seeing.text([part("red"), WORDS], model=name) == seeing.expected["red"]["text"]
    finally:
        assert seeing.load().status_code == 200


def test_a_wrong_projector_is_a_typed_load_error(seeing: Seeing) -> None:
    http, whole = seeing.server.http, (seeing.folder / "seer" / PROJECTOR).read_bytes()
    bad = seeing.folder / "bad"
    bad.mkdir(exist_ok=True)
    shutil.copy(seeing.folder / "seer" / MODEL, bad / "model.gguf")
    wide = whole.replace(b"projection_dim\x04\x00\x00\x00\x20", b"projection_dim\x04\x00\x00\x00\x40")
    unknown = whole.replace(b"\x03\x00\x00\x00\x00\x00\x00\x00mlp", b"\x03\x00\x00\x00\x00\x00\x00\x00xyz")
    assert wide != whole != unknown
    cases = {"wide": (wide, "another model"), "cut": (whole[:-64], "incomplete"), "unknown": (unknown, "xyz")}
    try:
        for name, (data, words) in cases.items():
            (bad / "mmproj.gguf").write_bytes(data)
            body = {"model_name": "bad/model.gguf", "args": {"loader": "llamacpp", "engine": seeing.engine, "threads": 1}}
            reply = http.post("/v1/internal/model/load", json=body)
            error = reply.json()["error"]
            assert reply.status_code == 422 and words in error["message"], (name, error)
        alone = http.post("/v1/internal/model/load", json={"model_name": f"seer/{PROJECTOR}"})
        assert alone.status_code == 422 and "multimodal projector" in alone.json()["error"]["message"]
    finally:
        shutil.rmtree(bad)
        assert seeing.load().status_code == 200


def test_images_travel_to_llama_server(lab: Path, overlays: Overlays, tmp_path: Path) -> None:
    """The `remote` backend before a real llama-server: it says that the model sees, and answers what Transformers answers."""
    folder = lab / "models" / "seer"
    expected = json.loads((lab / "expected.json").read_text(encoding="utf-8"))["llava"]
    image, words = {"type": "image"}, {"type": "text", "text": QUESTION}
    cases: dict[str, list[str | None]] = {"red": ["red", None], "blue": ["blue", None], "both": [None, "blue", "red"]}
    with connected("llama-server", llama_server(overlays, folder / MODEL, folder / PROJECTOR), tmp_path) as far:
        assert far.info.image_token is not None and "vision" not in far.info.lacks
        for case, parts in cases.items():
            message = {"role": "user", "content": QUESTION, "parts": [words if part is None else image for part in parts]}
            pictures = tuple(encoded(PICTURES[part]) for part in parts if part is not None)
            text = far.text(chat=ChatInput((message,)), images=pictures, stop=StopParams(max_tokens=FEW))
            assert text.strip() == expected[case]["text"].strip(), case
    apart = tmp_path / "blind"
    apart.mkdir()
    with connected("llama-server", llama_server(overlays, folder / MODEL), apart) as blind:
        assert blind.info.image_token is None and "vision" in blind.info.lacks
