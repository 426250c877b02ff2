"""Run in a child process: does this build of llama-cpp-python generate with quantised weights?

    python -m modules.llamacpp_smoke SITE MODEL.gguf FOLDER

SITE holds the staged package, FOLDER takes the quantised copies. It ends with 0, or dies of what the build does wrong. The
prompt is long enough for the matrix (prefill) kernels, where the known fault is.
"""

from __future__ import annotations

import sys
from pathlib import Path

TYPES = ("Q8_0", "Q4_0")
PROMPT = b"Once upon a time there was a small bird. " * 8
NEW_TOKENS = 8


def main(site: str, model: str, folder: str) -> int:
    sys.path.insert(0, site)
    import llama_cpp

    for name in TYPES:
        copy = Path(folder, f"{name}.gguf")
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}")
        params.allow_requantize = True
        params.nthread = 1
        failed = llama_cpp.llama_model_quantize(model.encode(), str(copy).encode(), params)
        if failed:
            print(f"quantising to {name} failed with {failed}")
            return 1
        llama = llama_cpp.Llama(str(copy), n_ctx=512, n_batch=256, verbose=False)
        prompt = llama.tokenize(PROMPT)[:200]
        produced = 0
        for _ in llama.generate(prompt, temp=0.0):
            produced += 1
            if produced == NEW_TOKENS:
                break
        llama.close()
        print(f"{name}: {produced} tokens after {len(prompt)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:4]))
