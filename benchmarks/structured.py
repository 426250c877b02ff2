"""Structured output: tokens per second with a JSON schema over free text, same model, same run; and what compiling costs.

Both are streamed through the API by turns, so that both see the same machine. Aims: at least 0.9 of free text; at most 200 ms to
compile each of the fifty commonest schemas.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

from common import ROOT, Server, report

from modules.grammar import Grammars, Vocabulary
from modules.schema import GenerationRequest
from tests.unit.schema_shapes import SHAPES

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"story": {"type": "array", "items": {"type": "string", "maxLength": 200}, "minItems": 50}},
    "required": ["story"],
    "additionalProperties": False,
}


def rate(server: Server, model: str, tokens: int, **fields: Any) -> float:
    """Decode tokens per second of one answer, as the worker timed it."""
    body = {"model": model, "messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": tokens, "seed": 1}
    answer = server.http.post("/v1/chat/completions", json={**body, "temperature": 0.8, **fields})
    answer.raise_for_status()
    receipt = answer.json()["receipt"]
    if receipt["usage"]["completion_tokens"] < tokens // 2:
        raise SystemExit(f"The answer ended after {receipt['usage']['completion_tokens']} tokens.")
    return float(receipt["decode_tok_s"])


def speed(model: str, loader: str, tokens: int, rounds: int) -> dict[str, Any]:
    with Server("--nowebui", "--no-model") as server:
        server.load(model, loader)
        free: list[float] = []
        held: list[float] = []
        for _ in range(rounds + 1):
            free.append(rate(server, model, tokens, ban_eos_token=True))
            held.append(rate(server, model, tokens, json_schema=SCHEMA))
        ratios = [h / f for h, f in zip(held[1:], free[1:], strict=True)]
        return {
            "free_tok_s": statistics.median(free[1:]),
            "json_schema_tok_s": statistics.median(held[1:]),
            "ratio": round(statistics.median(ratios), 3),
            "ratios": [round(r, 3) for r in ratios],
        }


def compile_times() -> dict[str, Any]:
    """Milliseconds for each of the common schemas over the vocabulary of the bundled model, each compiled anew."""
    tokenizer = (ROOT / "models" / "wren-6m" / "tokenizer.json").read_text(encoding="utf-8")
    grammars = Grammars(lambda: Vocabulary(4096, frozenset({0, 2}), tokenizer_json=tokenizer))
    begun = time.perf_counter()
    grammars.constraint(GenerationRequest("first", prompt="", regex="a"))
    first = 1000 * (time.perf_counter() - begun)
    times = {}
    for name, schema in SHAPES.items():
        begun = time.perf_counter()
        constraint = grammars.constraint(GenerationRequest(name, prompt="", json_schema=schema))
        assert constraint is not None
        constraint.allowed()
        times[name] = round(1000 * (time.perf_counter() - begun), 2)
    slowest = max(times, key=lambda name: times[name])
    return {
        "tokenizer_once_ms": round(first, 1),
        "schemas": len(times),
        "median_ms": statistics.median(times.values()),
        "slowest_ms": times[slowest],
        "slowest": slowest,
        "all_within_200_ms": times[slowest] <= 200,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--models",
        type=json.loads,
        default={
            "wren-6m": "transformers",
            "wren-6m-gptq-4bit-128g": "gptq_for_llama",
            "wren-6m-gguf/wren-6m-F16.gguf": "llamacpp",
        },
        help="JSON object: model -> loader",
    )
    arguments = parser.parse_args()
    with report("structured") as figures:
        figures["compile"] = compile_times()
        for model, loader in arguments.models.items():
            figures[f"{model} on {loader}"] = speed(model, loader, arguments.tokens, arguments.rounds)


if __name__ == "__main__":
    main()
