"""What the API adds to the engine: time to first token and time per token above the raw engine, with the echo backend.

The raw engine is a loop over EchoEngine in a process of its own. Then 200 streams of 200 tokens at once, each with its own words:
no error, no word of another stream, and how late tokens come against the rate they were asked for. Aims: p50 at most 5 ms and
0.3 ms a token at 1 and 16 streams; p99 at most 50 ms a token at 200.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import statistics
import time
from typing import Any

import httpx
from common import Server, report


def raw_engine(tokens: int, rounds: int) -> dict[str, float]:
    """Seconds to the first token and per token of the engine alone."""
    from loaders.echo import EchoEngine
    from modules.engine import CancelToken
    from modules.load_options import complete_options
    from modules.schema import GenerationRequest, StopParams, TokenEvent

    engine = EchoEngine()
    engine.load("echo", complete_options(engine.spec), lambda _: None)
    firsts, rates = [], []
    for index in range(rounds):
        request = GenerationRequest(str(index), prompt=f"[[echo tokens={tokens}]] x", stop=StopParams(max_tokens=tokens))
        begun = time.perf_counter()
        stamps = [time.perf_counter() for event in engine.generate(request, CancelToken()) if isinstance(event, TokenEvent)]
        firsts.append(stamps[0] - begun)
        rates.append((stamps[-1] - stamps[0]) / (len(stamps) - 1))
    return {"ttft_s": statistics.median(firsts), "per_token_s": statistics.median(rates)}


async def stream(client: httpx.AsyncClient, text: str, tokens: int) -> dict[str, Any]:
    body = {"model": "echo", "messages": [{"role": "user", "content": text}], "max_tokens": tokens, "stream": True}
    begun = time.perf_counter()
    stamps: list[float] = []
    pieces: list[str] = []
    error = None
    async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            data = json.loads(line[6:])
            if "error" in data:
                error = data["error"]["code"]
            elif data["choices"] and (piece := data["choices"][0]["delta"].get("content")):
                stamps.append(time.perf_counter())
                pieces.append(piece)
    return {"begun": begun, "stamps": stamps, "text": "".join(pieces), "error": error or (answer.status_code != 200 or None)}


async def together(url: str, texts: list[str], tokens: int) -> list[dict[str, Any]]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
        return await asyncio.gather(*(stream(client, text, tokens) for text in texts))


def added(url: str, streams: int, tokens: int, rounds: int, raw: dict[str, float]) -> dict[str, float]:
    """Milliseconds above the raw engine. The engine serves the streams in turn, so a stream's own share of its time is counted
    once for each of them."""
    firsts: list[float] = []
    each: list[float] = []
    for _ in range(rounds):
        for answer in asyncio.run(together(url, [f"[[echo tokens={tokens}]] x"] * streams, tokens)):
            stamps = answer["stamps"]
            firsts.append(stamps[0] - answer["begun"] - raw["ttft_s"] * streams)
            # All streams share one core of the engine, one of the server and one of this client.
            each.append((stamps[-1] - stamps[0]) / (tokens - 1) / streams - raw["per_token_s"])
    return {
        "ttft_added_p50_ms": round(1000 * statistics.median(firsts), 3),
        "per_token_added_p50_ms": round(1000 * statistics.median(each), 4),
    }


def crowd(url: str, streams: int, tokens: int, rate: float) -> dict[str, Any]:
    """`streams` at once, each of `tokens` tokens at `rate` a second with one word of its own."""
    words = [f"s{index}x" for index in range(streams)]
    texts = [f"[[echo rate={rate}]] " + " ".join([word] * tokens) for word in words]
    answers = asyncio.run(together(url, texts, tokens))
    late = []
    for answer in answers:
        if answer["stamps"]:
            begun = answer["stamps"][0]
            late += [max(0.0, stamp - begun - index / rate) for index, stamp in enumerate(answer["stamps"])]
    crossed = sum(set(answer["text"].split()) != {word} for word, answer in zip(words, answers, strict=True))
    return {
        "streams": streams,
        "tokens": tokens,
        "errors": sum(answer["error"] is not None for answer in answers),
        "cross_talk": crossed,
        "late_p50_ms": round(1000 * statistics.median(late), 2),
        "late_p99_ms": round(1000 * sorted(late)[int(0.99 * len(late))], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--rate", type=float, default=5.0, help="tokens a second of each of the 200 streams")
    arguments = parser.parse_args()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        raw = pool.apply(raw_engine, (arguments.tokens, arguments.rounds))
    with report("api_overhead") as figures, Server("--nowebui", "--model", "echo") as server:
        figures["raw_engine_ms"] = {name: round(1000 * value, 4) for name, value in raw.items()}
        for streams in (1, 16):
            added(server.url, streams, arguments.tokens, 1, raw)
            figures[f"{streams} streams"] = added(server.url, streams, arguments.tokens, arguments.rounds, raw)
        figures["crowd"] = crowd(server.url, 200, arguments.tokens, arguments.rate)


if __name__ == "__main__":
    main()
