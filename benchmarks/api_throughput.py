"""Streamed tokens per second through /v1/chat/completions over the library's own loop, same model, same settings.

Each repetition runs the raw loop (a process of its own, main thread), then the API, so that both see the same machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from common import Loop, Server, report

PROMPT = "Tell me a long story about a river, a stone and a small brown dog. " * 6


class RawLoop(Loop):
    """benchmarks/raw_loop.py in the backend's environment."""

    def __init__(self, engine: str, overlay: str, model: str, threads: int, dtype: str) -> None:
        super().__init__(overlay, "raw_loop.py", engine, model, "--threads", threads, "--dtype", dtype)


def through_api(server: Server, model: str, tokens: int) -> dict[str, float]:
    """One streamed chat completion; every token counted where it arrives."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": PROMPT}],
        "max_tokens": tokens,
        "temperature": 0,
        "ban_eos_token": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    started = time.perf_counter()
    first = last = 0.0
    usage: dict[str, Any] = {}
    with server.http.stream("POST", "/v1/chat/completions", json=body) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            if chunk.get("usage"):
                usage = chunk["usage"]
            if chunk["choices"] and chunk["choices"][0]["delta"].get("content"):
                last = time.perf_counter()
                first = first or last
    return {
        "tokens": usage["completion_tokens"],
        "decode_tok_s": (usage["completion_tokens"] - 1) / (last - first),
        "ttft_s": first - started,
        "total_s": last - started,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", required=True, help="of the result file")
    parser.add_argument("--loader", choices=["llamacpp", "transformers"], required=True)
    parser.add_argument("--model", type=Path, required=True, help="a GGUF file, or a safetensors folder")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="float32", help="of the transformers model")
    arguments = parser.parse_args()
    model = arguments.model.resolve()
    options: dict[str, Any] = {"threads": arguments.threads}
    engine, overlay = ("llama_cpp", "llamacpp") if arguments.loader == "llamacpp" else ("transformers", "transformers")
    if arguments.loader == "llamacpp":
        options |= {"engine": "llama_cpp", "threads_batch": arguments.threads, "n_ctx": 2048}
    else:
        options["dtype"] = arguments.dtype
    with report(f"api_throughput-{arguments.name}") as figures:
        raw = RawLoop(engine, overlay, str(model), arguments.threads, arguments.dtype)
        with Server("--no-model", "--nowebui", "--model-dir", str(model.parent), wait_ready=False) as server:
            server.wait("/v1/models")
            server.load(model.name, arguments.loader, **options)
            rendered = server.http.post("/v1/internal/chat-prompt", json={"messages": [{"role": "user", "content": PROMPT}]})
            prompt = rendered.json()["prompt"] if rendered.status_code == 200 else PROMPT
            pairs = []
            for repetition in range(arguments.repetitions + 1):
                pair = (raw.run(prompt, arguments.tokens), through_api(server, model.name, arguments.tokens))
                if repetition:  # the first warms both up
                    pairs.append(pair)
        raw.close()
        ratios = sorted(api["decode_tok_s"] / base["decode_tok_s"] for base, api in pairs)
        figures.update(
            loader=arguments.loader,
            model=model.name,
            model_bytes=sum(f.stat().st_size for f in (model.rglob("*") if model.is_dir() else [model]) if f.is_file()),
            tokens=arguments.tokens,
            threads=arguments.threads,
            repetitions=len(pairs),
            raw_decode_tok_s=round(statistics.median(b["decode_tok_s"] for b, _ in pairs), 2),
            api_decode_tok_s=round(statistics.median(a["decode_tok_s"] for _, a in pairs), 2),
            ratio_median=round(statistics.median(ratios), 3),
            ratio_range=[round(ratios[0], 3), round(ratios[-1], 3)],
            raw_ttft_ms=round(1000 * statistics.median(b["ttft_s"] for b, _ in pairs), 1),
            api_ttft_ms=round(1000 * statistics.median(a["ttft_s"] for _, a in pairs), 1),
        )


if __name__ == "__main__":
    main()
