"""Images through every protocol that has them, to a model that sees: its answers are those of Transformers' own `generate`."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import anthropic
import httpx
import ollama
import openai
import pytest

from modules.conformance.client import Api, Unsupported
from modules.conformance.probes import PROBES
from tests.api.conftest import Server
from tests.api.test_ui_routes import Page
from tests.conftest import ROOT
from tests.pictures import BLUE, RED, bomb, data_url, encoded, gif, png

if TYPE_CHECKING:
    from modules.overlays import Overlays

MODEL = "tiny-llava"
FAR = f"remote/far/{MODEL}"
QUESTION = "What is it?"
PICTURES = {"red": png(RED, stripes=20), "blue": png(BLUE)}
FEW = 12  # tokens, as in the lab


@dataclass
class Seeing:
    """A server with a model that sees. `expected` is what Transformers answers in each case of the lab."""

    server: Server
    expected: dict[str, Any]
    openai: openai.OpenAI
    anthropic: anthropic.Anthropic
    ollama: ollama.Client

    def answer(self, content: Any, **more: Any) -> Any:
        body = {"model": MODEL, "messages": [{"role": "user", "content": content}], "max_tokens": FEW, "temperature": 0, **more}
        return self.server.http.post("/v1/chat/completions", json=body)

    def text(self, content: Any, **more: Any) -> str:
        reply = self.answer(content, **more)
        assert reply.status_code == 200, reply.text
        return str(reply.json()["choices"][0]["message"]["content"])


def part(name: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(PICTURES[name])}}


WORDS = {"type": "text", "text": QUESTION}


@pytest.fixture(scope="module")
def seeing(overlays: Overlays, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seeing]:
    if not overlays.complete("transformers") or not overlays.has_module("transformers", "PIL"):
        pytest.skip("the Transformers environment with Pillow is not here")
    folder = tmp_path_factory.mktemp("vision")
    for name, data in PICTURES.items():
        (folder / f"{name}.png").write_bytes(data)
    line = [str(overlays.python("transformers")), str(ROOT / "tests" / "vision_lab.py"), str(folder)]
    made = subprocess.run(line, capture_output=True, text=True, env=overlays.worker_env("transformers"), timeout=300, check=False)
    assert made.returncode == 0, made.stderr[-4000:]
    server = Server(folder / "data", "--model-dir", str(folder), "--loader", "transformers", model=MODEL)
    try:
        server.wait_ready()
        server.until(lambda: ready(server), "loaded", 300)
        expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
        with (
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="x") as one,
            anthropic.Anthropic(base_url=server.url, api_key="x") as two,
            ollama.Client(host=server.url) as three,
        ):
            yield Seeing(server, expected, one, two, three)
    finally:
        server.stop()


def ready(server: Server) -> bool:
    models = {model["id"]: model for model in server.http.get("/v1/models").json()["data"]}
    assert models[MODEL]["state"] != "failed"
    return bool(models[MODEL]["state"] == "ready")


def test_the_image_reaches_the_model(seeing: Seeing) -> None:
    expected = {name: case["text"] for name, case in seeing.expected.items()}
    assert len({expected["red"], expected["blue"], expected["none"]}) == 3, "the tiny model tells the pictures apart"
    assert seeing.text([part("red"), WORDS]) == expected["red"]
    assert seeing.text([part("blue"), WORDS]) == expected["blue"]
    assert seeing.text([WORDS, part("blue"), part("red")]) == expected["both"]
    assert seeing.text(QUESTION) == expected["none"]


def test_the_prefix_cache_knows_the_images(seeing: Seeing) -> None:
    first = seeing.answer([part("red"), WORDS]).json()
    again = seeing.answer([part("red"), WORDS]).json()
    assert again["choices"][0]["message"] == first["choices"][0]["message"]
    usage = again["usage"]
    assert usage["prompt_tokens"] == seeing.expected["red"]["prompt_tokens"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"] - 1
    other = seeing.answer([part("blue"), WORDS]).json()
    assert other["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert other["choices"][0]["message"]["content"] == seeing.expected["blue"]["text"]


def test_streamed_with_samplers_and_forms(seeing: Seeing) -> None:
    client = seeing.openai
    message: Any = {"role": "user", "content": [part("red"), WORDS]}
    chunks = client.chat.completions.create(model=MODEL, messages=[message], max_tokens=FEW, temperature=0, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == seeing.expected["red"]["text"]
    assert seeing.text([part("red"), WORDS], grammar='root ::= "yes" | "no"') in ("yes", "no")
    guided = seeing.answer([part("red"), WORDS], guidance_scale=1.5, negative_prompt="No.").json()
    assert guided["choices"][0]["message"]["content"]
    contrast = seeing.answer([part("red"), WORDS], penalty_alpha=0.6, top_k=4).json()
    assert any("images" in warning for warning in contrast["warnings"])
    beams = seeing.answer([part("red"), WORDS], num_beams=2)
    assert beams.status_code == 400 and beams.json()["error"]["param"] == "num_beams"


def test_responses(seeing: Seeing) -> None:
    client = seeing.openai
    content: Any = [
        {"type": "input_image", "image_url": data_url(PICTURES["red"]), "detail": "auto"},
        {"type": "input_text", "text": QUESTION},
    ]
    made = client.responses.create(
        model=MODEL, input=[{"role": "user", "content": content}], max_output_tokens=FEW, temperature=0
    )
    assert made.output_text == seeing.expected["red"]["text"]
    more = client.responses.create(
        model=MODEL, input="And now?", previous_response_id=made.id, max_output_tokens=FEW, temperature=0
    )
    assert (
        more.usage is not None and more.usage.input_tokens > seeing.expected["red"]["prompt_tokens"]
    )  # the image is still there


def test_anthropic(seeing: Seeing) -> None:
    client = seeing.anthropic
    source: Any = {"type": "base64", "media_type": "image/png", "data": encoded(PICTURES["blue"])}
    content: Any = [{"type": "image", "source": source}, {"type": "text", "text": QUESTION}]
    made = client.messages.create(
        model=MODEL, max_tokens=FEW, extra_body={"temperature": 0}, messages=[{"role": "user", "content": content}]
    )
    block: Any = made.content[0]
    assert block.text == seeing.expected["blue"]["text"]


def test_ollama(seeing: Seeing) -> None:
    client = seeing.ollama
    options = {"temperature": 0, "num_predict": FEW, "top_k": 0, "top_p": 1.0}
    message = {"role": "user", "content": QUESTION, "images": [PICTURES["red"]]}
    assert client.chat(model=MODEL, messages=[message], options=options).message.content == seeing.expected["red"]["text"]
    made = client.generate(model=MODEL, prompt=QUESTION, images=[PICTURES["blue"]], options=options)
    assert made.response == seeing.expected["blue"]["text"]
    assert "vision" in (client.show(MODEL).capabilities or [])


def test_the_pages_chat(seeing: Seeing) -> None:
    page = Page(seeing.server)
    page.call("PUT", "settings", {"max_tokens": FEW, "sampling": {"temperature": 0}})
    red = page.call("POST", "attachments", {"image": encoded(PICTURES["red"])})["name"]
    answer = page.server.http.get(f"/ui-api/attachments/{red}")
    assert answer.content == PICTURES["red"] and answer.headers["content-type"] == "image/png"
    chat = page.new()
    told = page.ask(chat, f"{QUESTION}\n\n![red.png](cid:{red})")["messages"]
    assert told[1]["text"] == seeing.expected["red"]["text"]
    more = page.ask(chat, "And now?")["messages"][-1]
    usage = more["receipt"]["usage"]
    assert (
        usage["prompt_tokens"] > seeing.expected["red"]["prompt_tokens"] and usage["cached_tokens"] > 16
    )  # the image is read once


def test_capabilities_say_vision(seeing: Seeing) -> None:
    models = {model["id"]: model for model in seeing.server.http.get("/v1/models").json()["data"]}
    assert "vision" in models[MODEL]["capabilities"]
    assert "vision" not in models["echo"]["capabilities"]
    assert seeing.server.http.get("/props").json()["modalities"]["vision"] is True


def test_the_conformance_probe(seeing: Seeing) -> None:
    (probe,) = (probe for probe in PROBES if probe.name == "vision")

    async def run(model: str) -> None:
        async with httpx.AsyncClient(base_url=seeing.server.url, timeout=60) as http:
            await probe.run(Api(http, model))

    asyncio.run(run(MODEL))
    with pytest.raises(Unsupported, match="no images"):
        asyncio.run(run("echo"))


@pytest.fixture(scope="module")
def near(seeing: Seeing, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Another server, which has the model that sees by the `remote` backend."""
    server = Server(tmp_path_factory.mktemp("near"))
    try:
        server.wait_ready()
        saved = server.http.post("/v1/internal/remotes", json={"name": "far", "url": seeing.server.url})
        assert FAR in saved.json()["server"]["models"], saved.text
        yield server
    finally:
        assert server.stop() == 0


def load_far(near: Server, **options: Any) -> None:
    """The far model, freshly loaded with these options."""
    body = {"model": FAR, "loader": "remote", "options": options}
    made = near.http.post("/ui-api/models/load", json=body)
    assert made.status_code == 200, made.text
    number = made.json()["resident"]["id"]

    def is_ready() -> bool:
        residents = near.http.get("/ui-api/models").json()["residents"]
        return any(r["id"] == number and r["state"] == "ready" for r in residents)

    near.until(is_ready, "loaded")


def test_images_travel_to_a_model_of_another_server(seeing: Seeing, near: Server) -> None:
    listed = {model["id"]: model for model in near.http.get("/v1/models").json()["data"]}
    assert "vision" in listed[FAR]["capabilities"] and "vision" not in listed["remote/far/echo"]["capabilities"]
    load_far(near)

    def answer(content: Any, **more: Any) -> Any:
        body = {"model": FAR, "messages": [{"role": "user", "content": content}], "max_tokens": FEW, "temperature": 0, **more}
        return near.http.post("/v1/chat/completions", json=body)

    for case, content in {
        "red": [part("red"), WORDS], "blue": [part("blue"), WORDS], "both": [WORDS, part("blue"), part("red")], "none": QUESTION,
    }.items():  # fmt: skip
        made = answer(content).json()
        assert made["choices"][0]["message"]["content"] == seeing.expected[case]["text"], case
        assert made["usage"]["prompt_tokens"] == seeing.expected[case]["prompt_tokens"]
    turns = [
        {"role": "user", "content": [part("red"), WORDS]}, {"role": "assistant", "content": "Red."},
        {"role": "user", "content": [part("blue"), {"type": "text", "text": "And this?"}]},
    ]  # fmt: skip
    here, there = [
        server.http.post("/v1/chat/completions", json={"model": model, "messages": turns, "max_tokens": FEW, "temperature": 0})
        for server, model in ((near, FAR), (seeing.server, MODEL))
    ]
    assert here.json()["choices"][0]["message"]["content"] == there.json()["choices"][0]["message"]["content"]
    refused = answer([part("red")] * 16).json()["error"]
    assert refused["code"] == "context_length_exceeded", "the far server counts"
    broken = answer([{"type": "image_url", "image_url": {"url": data_url(broken_pixels())}}, WORDS])
    assert broken.status_code == 400 and "damaged" in broken.json()["error"]["message"]


def test_the_pages_images_travel_too(seeing: Seeing, near: Server) -> None:
    load_far(near)
    page = Page(near)
    page.call("PUT", "settings", {"max_tokens": FEW, "sampling": {"temperature": 0}})
    red = page.call("POST", "attachments", {"image": encoded(PICTURES["red"])})["name"]
    told = page.ask(page.new(), f"{QUESTION}\n\n![red.png](cid:{red})")["messages"]
    assert told[1]["text"] == seeing.expected["red"]["text"]
    assert not any("image" in warning for warning in told[1]["receipt"]["warnings"])


def test_images_stay_here_where_the_far_model_gets_none(seeing: Seeing, near: Server) -> None:
    for options in ({"vision": "no"}, {"chat_rendering": "plain"}):
        load_far(near, **options)
        listed = {model["id"]: model for model in near.http.get("/v1/models").json()["data"]}
        assert "vision" not in listed[FAR]["capabilities"]
        body = {"model": FAR, "messages": [{"role": "user", "content": [part("red"), WORDS]}]}
        refused = near.http.post("/v1/chat/completions", json=body)
        error = refused.json()["error"]
        assert refused.status_code == 400 and error["code"] == "unsupported_parameter" and "no images" in error["message"]
        assert "vision=yes" in str(error), error
    page = Page(near)
    red = page.call("POST", "attachments", {"image": encoded(PICTURES["red"])})["name"]
    told = page.ask(page.new(), f"{QUESTION}\n\n![red.png](cid:{red})")["messages"]
    assert "tiny-llava reads no images: 1 image was left out." in told[1]["receipt"]["warnings"]


def broken_pixels() -> bytes:
    whole = png()
    place = whole.index(b"IDAT") + 6
    return whole[:place] + bytes(8) + whole[place + 8 :]


@pytest.mark.parametrize(
    ("url", "words"),
    [
        (data_url(broken_pixels()), "damaged"),
        (data_url(png()[:-20]), "cut short"),
        (data_url(b"hello"), "no image"),
        ("data:image/png;base64,!!!", "base64"),
        (data_url(gif(2), "image/gif"), "moves"),
        (data_url(bomb()), "50000 × 50000"),
        ("file:///etc/passwd", "data: URL"),
        ("https://127.0.0.1/x.png", "fetches no images"),
    ],
)
def test_bad_images_are_typed_and_the_worker_lives(seeing: Seeing, url: str, words: str) -> None:
    reply = seeing.answer([{"type": "image_url", "image_url": {"url": url}}, WORDS])
    error = reply.json()["error"]
    assert reply.status_code == 400 and error["code"] == "invalid_image" and words in error["message"]
    assert "passwd" not in reply.text
    assert seeing.text(QUESTION) == seeing.expected["none"]["text"]


def test_too_many_and_too_long(seeing: Seeing) -> None:
    reply = seeing.answer([part("red")] * 17)
    assert reply.status_code == 400 and reply.json()["error"]["code"] == "invalid_image"
    reply = seeing.answer([part("red")] * 16)  # 272 tokens of images
    assert reply.status_code == 400 and reply.json()["error"]["code"] == "context_length_exceeded"
    reply = seeing.answer([part("red"), {"type": "text", "text": "What is <image>?"}])
    assert reply.status_code == 400 and "<image>" in reply.json()["error"]["message"]


def test_a_model_that_does_not_see(server: Server) -> None:
    body = {"model": "echo", "messages": [{"role": "user", "content": [part("red"), WORDS]}]}
    reply = server.http.post("/v1/chat/completions", json=body)
    error = reply.json()["error"]
    assert reply.status_code == 400 and error["code"] == "unsupported_parameter" and "no images" in error["message"]
    system = {"model": "echo", "messages": [{"role": "system", "content": [part("red")]}, {"role": "user", "content": "a"}]}
    assert server.http.post("/v1/chat/completions", json=system).json()["error"]["param"] == "messages.0.content.0"
