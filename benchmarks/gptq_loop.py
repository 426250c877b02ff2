"""One engine of gptq_speed.py in a process of its own: the loops of raw_loop.py, and our GPTQ runtime without its worker.

Reads one JSON line per run from stdin {"prompt", "tokens"}, answers {"decode_tok_s", "ttft_s", "rss_anon", "prompt_tokens"};
the first line, when the model is loaded, says how it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import raw_loop

ROOT = Path(__file__).resolve().parent.parent


def gptq(model: str, threads: int, context: int, kernel: str) -> tuple[raw_loop.Run, str]:
    """Our runtime's greedy loop, and what it says of its kernels. Each run reads its prompt anew."""
    sys.path.insert(0, str(ROOT))
    from loaders.gptq_for_llama import SPEC, GptqEngine
    from modules.engine import CancelToken
    from modules.schema import GenerationRequest, StopParams, TokenEvent

    engine = GptqEngine()
    options = {option.name: option.default for option in SPEC.options}
    info = engine.load(model, options | {"threads": threads, "ctx_size": context, "kernel": kernel}, lambda _: None)

    def run(prompt: str, tokens: int) -> list[float]:
        engine.runner._prefix.reset()
        ids = tuple(engine.encode(prompt, False))
        run.prompt_tokens = len(ids)  # type: ignore[attr-defined]
        stop = StopParams(tokens, min_tokens=tokens, ignore_eos=True)
        request = GenerationRequest("run", token_ids=ids, sampling={"temperature": 0.0}, stop=stop)
        stamps: list[float] = []
        for event in engine.generate(request, CancelToken()):
            if isinstance(event, TokenEvent):
                stamps.extend([time.perf_counter()] * len(event.token_ids))
        return stamps

    return run, f"{info.engine} {' '.join(info.notes)}".strip()


def rss_anon() -> int:
    """This process's own memory in bytes; 0 where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", choices=["llama_cpp", "transformers", "gptq"])
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--how", default="float32", help="dtype of transformers, kernel of gptq")
    arguments = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    given = (arguments.model, arguments.threads, arguments.context, arguments.how)
    if arguments.engine == "gptq":
        run, about = gptq(*given)
    else:
        make = raw_loop.llama_cpp if arguments.engine == "llama_cpp" else raw_loop.transformers
        run, about = make(*given), f"{arguments.engine} {arguments.how}".strip()
    print(json.dumps({"engine": about}), file=answers, flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        started = time.perf_counter()
        stamps = run(order["prompt"], order["tokens"])
        result = {
            "ttft_s": stamps[0] - started,
            "decode_tok_s": (len(stamps) - 1) / max(stamps[-1] - stamps[0], 1e-9),
            "rss_anon": rss_anon(),
            "prompt_tokens": getattr(run, "prompt_tokens", None),
        }
        print(json.dumps(result), file=answers, flush=True)


if __name__ == "__main__":
    main()
