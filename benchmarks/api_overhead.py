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


class Connection:
    """A kept connection that costs next to nothing itself: the figures are the server's."""

    def __init__(self, url: str, model: str = "echo") -> None:
        self._address = url.removeprefix("http://")
        self._model = model
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def stream(self, text: str, tokens: int) -> dict[str, Any]:
        host, port = self._address.split(":")
        reader, writer = self._streams = self._streams or await asyncio.open_connection(host, int(port))
        message = {"model": self._model, "messages": [{"role": "user", "content": text}], "max_tokens": tokens, "stream": True}
        body = json.dumps(message).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {self._address}\r\nContent-Type: application/json\r\n"
        stamps: list[float] = []
        pieces: list[str] = []
        begun = time.perf_counter()
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        status = int((await reader.readline()).split()[1])
        error: Any = status if status != 200 else None
        while (line := await reader.readline()) not in (b"0\r\n", b""):
            if not line.startswith(b"data: {"):
                continue
            now, data = time.perf_counter(), json.loads(line[6:])
            if "error" in data:
                error = data["error"]["code"]
            elif data["choices"] and (piece := data["choices"][0]["delta"].get("content")):
                stamps.append(now)
                pieces.append(piece)
        await reader.readline()  # the blank line after the last chunk
        return {"begun": begun, "stamps": stamps, "text": "".join(pieces), "error": error}

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()


async def together(connections: list[Connection], texts: list[str], tokens: int, apart_s: float = 0.0) -> list[dict[str, Any]]:
    """One stream on each connection, begun `apart_s` after the one before it."""

    async def one(index: int) -> dict[str, Any]:
        await asyncio.sleep(index * apart_s)
        return await connections[index].stream(texts[index], tokens)

    return await asyncio.gather(*(one(index) for index in range(len(texts))))


async def added(url: str, streams: int, tokens: int, rounds: int, raw: dict[str, float]) -> dict[str, float]:
    """Milliseconds above the raw engine. Time per token is at full speed, all streams at once: the engine serves them in turn, so
    a stream's own share of its time is counted once for each of them. Time to first token is that of a stream that begins while
    the others run at 50 tokens a second; `burst` is that of streams that all begin in the same instant."""
    connections = [Connection(url) for _ in range(streams)]
    fast, steady = ([f"[[echo tokens={tokens}{rate}]] x"] * streams for rate in ("", " rate=50"))
    bursts: list[float] = []
    each: list[float] = []
    firsts: list[float] = []
    await together(connections, fast, tokens)
    for _ in range(rounds):
        for answer in await together(connections, fast, tokens):
            stamps = answer["stamps"]
            bursts.append(stamps[0] - answer["begun"] - raw["ttft_s"] * streams)
            # All streams share one core of the engine, one of the server and one of this client.
            each.append((stamps[-1] - stamps[0]) / (tokens - 1) / streams - raw["per_token_s"])
        answers = await together(connections, steady, tokens, apart_s=0.05)
        firsts += [answer["stamps"][0] - answer["begun"] - raw["ttft_s"] for answer in answers]
    for connection in connections:
        connection.close()
    return {
        "ttft_added_p50_ms": round(1000 * statistics.median(firsts), 3),
        "ttft_added_p95_ms": round(1000 * sorted(firsts)[int(0.95 * len(firsts))], 3),
        "ttft_burst_p50_ms": round(1000 * statistics.median(bursts), 3),
        "per_token_added_p50_ms": round(1000 * statistics.median(each), 4),
    }


async def crowd(url: str, streams: int, tokens: int, rate: float) -> dict[str, Any]:
    """`streams` at once, each of `tokens` tokens at `rate` a second with one word of its own."""
    words = [f"s{index}x" for index in range(streams)]
    texts = [f"[[echo rate={rate}]] " + " ".join([word] * tokens) for word in words]
    connections = [Connection(url) for _ in texts]
    answers = await together(connections, texts, tokens)
    for connection in connections:
        connection.close()
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
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rate", type=float, default=5.0, help="tokens a second of each of the 200 streams")
    arguments = parser.parse_args()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        raw = pool.apply(raw_engine, (arguments.tokens, arguments.rounds))
    with report("api_overhead") as figures, Server("--nowebui", "--model", "echo") as server:
        figures["raw_engine_ms"] = {name: round(1000 * value, 4) for name, value in raw.items()}
        for streams in (1, 16):
            made = added(server.url, streams, arguments.tokens, arguments.rounds, raw)
            figures[f"{streams} streams"] = asyncio.run(made)
        figures["crowd"] = asyncio.run(crowd(server.url, 200, arguments.tokens, arguments.rate))


if __name__ == "__main__":
    main()
