"""bfloat16 on this CPU: prompt and answer tokens per second of a worker, over the library's own loop and over float32.

On a 1.1B Llama (--hf, from make_model.py) with Transformers, and on a random RWKV-7 of 129 M parameters. On a CPU with
instructions for 16-bit products there is nothing to gain.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from pathlib import Path
from typing import Any

from api_throughput import RawLoop
from common import ROOT, report, run_in

from modules.load_options import complete_options
from modules.overlays import Overlays
from modules.registry import discover
from modules.schema import Done, GenerationRequest, StopParams
from modules.worker_client import WorkerClient

ANSWER = 12


async def worker(loader: str, model: Path, prompt: str, **options: Any) -> tuple[int, dict[str, float]]:
    """(tokens of the prompt, tokens per second), the better of two runs; the prompt is new each time."""
    spec, overlays = discover()[loader], Overlays.find(ROOT)
    client = await WorkerClient.start(spec, overlays)
    try:
        await client.load(str(model), complete_options(spec, {"ctx_size": 1024, **options}))
        found: list[tuple[float, float]] = []
        for repetition in range(2):
            stop = StopParams(max_tokens=ANSWER, ignore_eos=True)
            request = GenerationRequest(
                f"r{repetition}", prompt=f"{repetition}{prompt}", stop=stop, sampling={"temperature": 0.0}
            )
            async for event in client.generate(request):
                if isinstance(event, Done):
                    times, tokens = event.timings, event.usage.prompt_tokens
                    found.append((tokens / times.prefill_s, (event.usage.completion_tokens - 1) / times.decode_s))
    finally:
        await client.close()
    return tokens, rates(*(max(values) for values in zip(*found, strict=True)))


def rates(prompt: float, answer: float) -> dict[str, float]:
    return {"prompt_tok_s": round(prompt, 1), "answer_tok_s": round(answer, 1)}


def raw(overlay: str, model: Path, prompt: str, tokens: int, threads: int) -> dict[str, float]:
    loop = RawLoop(overlay, overlay, str(model), threads, "bfloat16")
    ran = [loop.run(f"{repetition}{prompt}", ANSWER) for repetition in range(2)]
    loop.close()
    return rates(*(max(values) for values in zip(*((tokens / run["ttft_s"], run["decode_tok_s"]) for run in ran), strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", type=Path, required=True, help="a Llama as safetensors")
    parser.add_argument("--tokens", type=int, default=256, help="words of the prompt")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    prompt = " word" * arguments.tokens
    with report("bfloat16") as figures, tempfile.TemporaryDirectory(prefix="switchyard-bf16-") as made:
        rwkv = Path(made) / "random-rwkv"
        run_in("rwkv", "benchmarks/make_rwkv.py", rwkv)
        cases: dict[str, tuple[Path, dict[str, Any], dict[str, Any]]] = {
            "transformers": (arguments.hf.resolve(), {"dtype": "bfloat16"}, {"dtype": "float32"}),
            "rwkv": (rwkv, {"strategy": "cpu bf16"}, {"strategy": "cpu fp32"}),
        }
        for loader, (model, narrow, wide) in cases.items():
            tokens, ours = asyncio.run(worker(loader, model, prompt, threads=arguments.threads, **narrow))
            _, full = asyncio.run(worker(loader, model, prompt, threads=arguments.threads, **wide))
            library = raw(loader, model, prompt, tokens, arguments.threads)
            figures[loader] = {
                "prompt_tokens": tokens,
                "bfloat16": ours,
                "float32": full,
                "library_bfloat16": library,
                "over_library": {name: round(ours[name] / library[name], 1) for name in ours},
                "over_float32": {name: round(ours[name] / full[name], 2) for name in ours},
            }


if __name__ == "__main__":
    main()
