"""RWKV: streamed tokens per second through the API over the package's own loop; a second turn's first token over a cold one's.

    benchmarks/rwkv.py                    on a random RWKV-7 of 129 M parameters, made in a temporary folder
    benchmarks/rwkv.py --model FOLDER     on a model folder with a tokenizer.json

Each repetition runs the raw loop (a process of its own), then the API, so that both see the same machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from api_throughput import PROMPT, RawLoop, through_api
from common import Server, report, run_in

HISTORY = 1000


def first_token(server: Server, prompt: str, tokens: int = 8) -> tuple[float, dict[str, Any], str]:
    """Seconds to the first token of a text completion, its usage, and the text."""
    body: dict[str, Any] = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ban_eos_token": True, "stream": True}
    body["stream_options"] = {"include_usage": True}
    usage: dict[str, Any] = {}
    started, first, text = time.perf_counter(), 0.0, ""
    with server.http.stream("POST", "/v1/completions", json=body) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line[6:])
                usage = chunk.get("usage") or usage
                for choice in chunk["choices"]:
                    text += choice["text"]
                    first = first or (time.perf_counter() if text else 0.0)
    return first - started, usage, text


def turns(server: Server, repetition: int) -> dict[str, Any]:
    """A cold prompt of `HISTORY` tokens, then the same conversation one message later."""
    count = HISTORY
    history = f"{repetition} " + " word" * count
    while True:
        length = len(server.http.post("/v1/internal/encode", json={"text": history}).json()["tokens"])
        if length <= HISTORY:
            break
        count -= length - HISTORY
        history = f"{repetition} " + " word" * count
    cold, usage, text = first_token(server, history)
    warm, again, _ = first_token(server, history + text + " What then?")
    cached = again.get("prompt_tokens_details", {}).get("cached_tokens")
    return {"cold_s": cold, "warm_s": warm, "prompt_tokens": usage["prompt_tokens"], "cached_tokens": cached}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of an RWKV-7 with a tokenizer.json")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    with report("rwkv") as figures, tempfile.TemporaryDirectory(prefix="switchyard-rwkv-") as made:
        model = arguments.model.resolve() if arguments.model else Path(made) / "random-rwkv"
        if not arguments.model:
            run_in("rwkv", "benchmarks/make_rwkv.py", model)
        raw = RawLoop("rwkv", "rwkv", str(model), arguments.threads, "float32")
        with Server("--no-model", "--nowebui", "--model-dir", str(model.parent), wait_ready=False) as server:
            server.wait("/v1/models")
            server.load(model.name, "rwkv", threads=arguments.threads, strategy="cpu fp32", ctx_size=4096)
            rendered = server.http.post("/v1/internal/chat-prompt", json={"messages": [{"role": "user", "content": PROMPT}]})
            prompt = rendered.json()["prompt"] if rendered.status_code == 200 else PROMPT
            pairs, seconds = [], []
            for repetition in range(arguments.repetitions + 1):
                pair = (raw.run(prompt, arguments.tokens), through_api(server, model.name, arguments.tokens))
                turn = turns(server, repetition)
                if repetition:  # the first warms both up
                    pairs.append(pair)
                    seconds.append(turn)
        raw.close()
        speed = sorted(api["decode_tok_s"] / base["decode_tok_s"] for base, api in pairs)
        second = sorted(turn["warm_s"] / turn["cold_s"] for turn in seconds)
        figures.update(
            model=model.name,
            model_bytes=(model / "model.safetensors").stat().st_size,
            threads=arguments.threads,
            repetitions=len(pairs),
            raw_decode_tok_s=round(statistics.median(b["decode_tok_s"] for b, _ in pairs), 2),
            api_decode_tok_s=round(statistics.median(a["decode_tok_s"] for _, a in pairs), 2),
            decode_ratio_median=round(statistics.median(speed), 3),
            decode_ratio_range=[round(speed[0], 3), round(speed[-1], 3)],
            history_tokens=seconds[0]["prompt_tokens"],
            second_turn_cached_tokens=seconds[0]["cached_tokens"],
            cold_ttft_ms=round(1000 * statistics.median(turn["cold_s"] for turn in seconds), 1),
            second_turn_ttft_ms=round(1000 * statistics.median(turn["warm_s"] for turn in seconds), 1),
            second_turn_ratio_median=round(statistics.median(second), 3),
            second_turn_ratio_range=[round(second[0], 3), round(second[-1], 3)],
        )


if __name__ == "__main__":
    main()
