"""The library's own loop, in the main thread of a process of its own: what the product's overhead is measured against.

Runs in a backend's environment, stdlib and the backend only. Reads one JSON line per run from stdin
{"prompt", "tokens"}, answers one JSON line {"tokens", "decode_tok_s", "ttft_s", "total_s"}.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

Run = Callable[[str, int], list[float]]


def llama_cpp(model: str, threads: int, context: int, dtype: str) -> Run:
    from llama_cpp import Llama

    llm = Llama(model, n_ctx=context, n_threads=threads, n_threads_batch=threads, verbose=False)

    def run(prompt: str, tokens: int) -> list[float]:
        llm.reset()
        stamps = []
        ids = llm.tokenize(prompt.encode("utf-8"), add_bos=False, special=True)
        for token in llm.generate(ids, temp=0.0):
            llm.detokenize([token])
            stamps.append(time.perf_counter())
            if len(stamps) == tokens:
                break
        return stamps

    return run


def transformers(model: str, threads: int, context: int, dtype: str) -> Run:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.generation.streamers import BaseStreamer

    torch.set_num_threads(threads)
    tokenizer = AutoTokenizer.from_pretrained(model)
    lm = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)

    class Stamps(BaseStreamer):
        def __init__(self) -> None:
            self.stamps: list[float] = []

        def put(self, value: Any) -> None:
            if value.numel() == 1:
                tokenizer.decode(value)
                self.stamps.append(time.perf_counter())

        def end(self) -> None:
            pass

    def run(prompt: str, tokens: int) -> list[float]:
        streamer = Stamps()
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        with torch.inference_mode():
            lm.generate(**ids, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens, streamer=streamer, pad_token_id=0)
        return streamer.stamps

    return run


def rwkv(model: str, threads: int, context: int, dtype: str) -> Run:
    """The rwkv package as its own examples use it; it reads pickles only, so it gets the weights as one. `model` is version 7."""
    os.environ |= {"RWKV_V7_ON": "1", "RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"}
    import tempfile
    from pathlib import Path

    import torch
    from safetensors.torch import load_file
    from tokenizers import Tokenizer

    torch.set_num_threads(threads)
    sys.path[:] = [p for p in sys.path if Path(p).resolve() != Path(__file__).resolve().parent]  # a benchmark has that name
    from rwkv.model import RWKV

    tokenizer = Tokenizer.from_file(str(Path(model) / "tokenizer.json"))
    with tempfile.TemporaryDirectory() as folder:
        torch.save(load_file(Path(model) / "model.safetensors"), Path(folder) / "model.pth")
        lm = RWKV(model=str(Path(folder) / "model"), strategy={"float32": "cpu fp32", "bfloat16": "cpu bf16"}[dtype])

    def run(prompt: str, tokens: int) -> list[float]:
        stamps: list[float] = []
        ids, state = tokenizer.encode(prompt, add_special_tokens=False).ids, None
        while ids:
            logits, state = lm.forward(ids[:256], state)
            ids = ids[256:]
        while True:
            token = int(logits.argmax())
            tokenizer.decode([token])
            stamps.append(time.perf_counter())
            if len(stamps) == tokens:
                return stamps
            logits, state = lm.forward([token], state)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", choices=["llama_cpp", "transformers", "rwkv"])
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    make = {"llama_cpp": llama_cpp, "transformers": transformers, "rwkv": rwkv}[arguments.engine]
    run = make(arguments.model, arguments.threads, arguments.context, arguments.dtype)
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        started = time.perf_counter()
        stamps = run(order["prompt"], order["tokens"])
        result = {
            "tokens": len(stamps),
            "decode_tok_s": (len(stamps) - 1) / (stamps[-1] - stamps[0]),
            "ttft_s": stamps[0] - started,
            "total_s": stamps[-1] - started,
        }
        print(json.dumps(result), file=answers, flush=True)


if __name__ == "__main__":
    main()
