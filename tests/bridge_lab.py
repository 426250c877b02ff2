"""The bridge's experiments with torch for tests/unit/test_convert_gptq.py, in the Transformers environment:

python tests/bridge_lab.py reference CHECKPOINT OUT.json    greedy ids and logits of the exact kernel (OUT.npy)
python tests/bridge_lab.py architectures FOLDER             checkpoints of several kinds, as GGUF twice: packed, and as float32
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import models_lab as lab  # noqa: E402

from modules.convert.children import hf_to_gguf  # noqa: E402
from modules.convert.gptq import exact_type  # noqa: E402
from modules.convert.library import converter_dir  # noqa: E402
from modules.detect import check  # noqa: E402

PROMPT = "<|im_start|>user\nTell me a story about a fox.<|im_end|>\n<|im_start|>assistant\n"
CASES: dict[str, dict[str, Any]] = {
    "llama": {"bits": 3},
    "qwen2": {"sym": False},
    "gpt_neox": {"bits": 8, "group_size": 64},
    "bloom": {"bits": 2, "sym": False, "group_size": -1},
    "gpt2": {"desc_act": True, "static_groups": True},
}


def reference(checkpoint: str, out: str) -> dict[str, Any]:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    model = lab.run_checkpoint(Path(checkpoint), "dense").model
    ids = tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
    prompt = len(ids)
    with torch.inference_mode():
        ids = model.generate(torch.tensor([ids]), max_new_tokens=48, do_sample=False)[0].tolist()
        logits = model(torch.tensor([ids])).logits[0].float().numpy()
    np.save(Path(out).with_suffix(".npy"), logits)
    Path(out).write_text(json.dumps({"ids": ids, "prompt": prompt}), encoding="utf-8")
    return {}


def _convert(*arguments: str) -> None:
    sys.argv = ["hf_to_gguf", *arguments]
    sys.exit(hf_to_gguf.main())


def architectures(folder: str) -> dict[str, Any]:
    """Per kind: the GGUF type, packed tensors, and those whose numbers differ from the float32 file's."""
    converter = converter_dir(Path(sys.prefix))
    sys.path.insert(0, str(converter / "gguf-py"))
    import gguf

    results = {}
    for name, settings in CASES.items():
        base, checkpoint = Path(folder) / f"{name}-base", Path(folder) / name
        config = lab.configs()[name]
        config.vocab_size = 288  # room for the special tokens that some tokenizer classes add
        lab.make_model(base, config)
        lab.quantize(base, checkpoint, nsamples=8, **settings)
        kind = exact_type(check(checkpoint))
        found = {}
        for label, packed in (("packed", kind), ("float", "float")):
            out = Path(folder) / f"{name}-{label}.gguf"
            # The converter is patched for one run: each gets a process of its own, forked after the slow imports.
            child = multiprocessing.get_context("fork").Process(
                target=_convert, args=(str(converter), str(checkpoint), str(out), "F32", name, packed)
            )
            child.start()
            child.join()
            assert child.exitcode == 0, f"{name} {label}"
            found[label] = {tensor.name: tensor for tensor in gguf.GGUFReader(out).tensors}
        packed_names = [key for key, tensor in found["packed"].items() if tensor.tensor_type.name == kind]
        assert set(found["packed"]) == set(found["float"])
        off = {}
        for key, tensor in found["packed"].items():
            wanted = np.asarray(found["float"][key].data)
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            off[key] = float(np.abs(values.reshape(wanted.shape) - wanted).max() / max(np.abs(wanted).max(), 1e-30))
        results[name] = {"kind": kind, "packed": len(packed_names), "off": off}
    return results


if __name__ == "__main__":
    result = {"reference": reference, "architectures": architectures}[sys.argv[1]](*sys.argv[2:])
    print(json.dumps(result))
