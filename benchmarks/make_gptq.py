"""A GPTQ checkpoint of a random-weight model, rounded to nearest layer by layer: for speed measurements, not for talk.

Runs in the transformers environment: `<set>/transformers/bin/python benchmarks/make_gptq.py MODEL OUT --bits 4`. `--desc-act`
shuffles the groups of the inputs, as act-order does.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bits", type=int, choices=(2, 3, 4, 8), default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--desc-act", action="store_true")
    arguments = parser.parse_args()

    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    from modules.quantize._packing import pack_rows, pack_zeros

    torch.manual_seed(0)
    bits, group = arguments.bits, arguments.group_size
    middle = 1 << (bits - 1)
    tensors = {}
    for file in sorted(arguments.model.glob("*.safetensors")):
        with safe_open(file, framework="pt") as source:
            for name in source.keys():  # noqa: SIM118 - not a dictionary
                tensor = source.get_tensor(name)
                if ".layers." not in name or tensor.dim() != 2:
                    tensors[name] = tensor.half()
                    continue
                weight = tensor.T.float()
                inputs, outputs = weight.shape
                if inputs % group:
                    raise SystemExit(f"{name} has {inputs} inputs, no multiple of {group}")
                g_idx = torch.arange(inputs, dtype=torch.int32) // group
                if arguments.desc_act:
                    g_idx = g_idx[torch.randperm(inputs, generator=torch.Generator().manual_seed(inputs))]
                order = torch.argsort(g_idx, stable=True)
                grouped = weight[order].reshape(-1, group, outputs)
                scales = (grouped.abs().amax(dim=1) / (middle - 0.5)).clamp(min=1e-6).half()
                rounded = grouped.div_(scales.float()[:, None]).round_().add_(middle).clamp_(0, 2 * middle - 1)
                codes = torch.empty((inputs, outputs), dtype=torch.uint8)
                codes[order] = rounded.to(torch.uint8).reshape(inputs, outputs)
                stem = name.removesuffix(".weight")
                tensors[f"{stem}.qweight"] = torch.from_numpy(pack_rows(codes.numpy(), bits))
                zeros = torch.full(scales.shape, middle, dtype=torch.uint8)
                tensors[f"{stem}.qzeros"] = torch.from_numpy(pack_zeros(zeros.numpy(), bits))
                tensors[f"{stem}.scales"], tensors[f"{stem}.g_idx"] = scales, g_idx
    arguments.out.mkdir(parents=True, exist_ok=True)
    for extra in arguments.model.iterdir():
        if extra.suffix in (".json", ".jinja") and "index" not in extra.name:
            shutil.copy(extra, arguments.out / extra.name)
    settings = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": arguments.desc_act, "sym": True}
    settings["checkpoint_format"] = "gptq"
    (arguments.out / "quantize_config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
    save_file(tensors, arguments.out / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()
