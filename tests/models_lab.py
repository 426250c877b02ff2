"""Small models for the other labs: made on the spot, quantised, read back. Importing it lets them import the product."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from modules.errors import AppError  # noqa: E402
from modules.quantize import _job  # noqa: E402
from modules.quantize.settings import QuantizeSettings  # noqa: E402

torch.set_num_threads(1)  # tiny matrices: a second thread costs more than it gains, most of all on a busy machine

TEXT = (ROOT / "modules" / "quantize" / "calibration.txt").read_text(encoding="utf-8")
CONTEXT = 128


def tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {piece: index for index, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(folder)


def configs() -> dict[str, Any]:
    from transformers import BloomConfig, GPT2Config, GPTNeoXConfig, LlamaConfig, MistralConfig, OPTConfig, Qwen2Config

    common = {"vocab_size": 256, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    llama = common | {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
    }
    return {
        "llama": LlamaConfig(**llama),
        "mistral": MistralConfig(**llama),
        "qwen2": Qwen2Config(**llama, tie_word_embeddings=True),
        "gpt_neox": GPTNeoXConfig(**{k: v for k, v in llama.items() if k != "num_key_value_heads"}),
        "opt": OPTConfig(
            **common, hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=CONTEXT,
            word_embed_proj_dim=64,
        ),
        "bloom": BloomConfig(**common, hidden_size=64, n_layer=2, n_head=4),
        "gpt2": GPT2Config(**common, n_embd=64, n_layer=2, n_head=4, n_positions=CONTEXT),
    }  # fmt: skip


def make_model(folder: Path, config: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.02)
    model.save_pretrained(folder)
    tokenizer(folder)
    return model


def reference(base: Path, checkpoint: Path) -> Any:
    """The base model through transformers in float32 with the checkpoint's weights dequantised bit by bit (not our unpacking)."""
    import transformers
    from safetensors.torch import load_file

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    modules = dict(model.named_modules())
    bits = json.loads((checkpoint / "quantize_config.json").read_text(encoding="utf-8"))["bits"]
    tensors = {k: v for file in checkpoint.glob("*.safetensors") for k, v in load_file(file).items()}

    def stream(words: np.ndarray) -> np.ndarray:
        """Values along the last axis of int32 words."""
        flat = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=-1, bitorder="little")
        return (flat.reshape(*words.shape[:-1], -1, bits) << np.arange(bits, dtype=np.uint8)).sum(-1).astype(np.float32)

    parameters = dict(model.named_parameters())
    for key, tensor in tensors.items():
        name = next(
            (n for n in (key, f"{model.base_model_prefix}.{key}", key.replace("embed_out", "lm_head")) if n in parameters), None
        )
        if name is not None:
            parameters[name].data.copy_(tensor)
    for key in [k for k in tensors if k.endswith(".qweight")]:
        stem = key.removesuffix(".qweight")
        codes = stream(tensors[key].numpy().T).T
        zeros = stream(tensors[f"{stem}.qzeros"].numpy()) + 1
        index = tensors[f"{stem}.g_idx"].long()
        weight = (torch.from_numpy(codes) - torch.from_numpy(zeros)[index]) * tensors[f"{stem}.scales"].float()[index]
        module = next(modules[n] for n in (stem, f"{model.base_model_prefix}.{stem}") if n in modules)
        target = module.weight.data
        target.copy_(weight if type(module).__name__ == "Conv1D" else weight.T)
    return model


def run_checkpoint(checkpoint: Path, kernel: str) -> Any:
    """Our runtime's model for a checkpoint."""
    from loaders._gptq_load import load
    from loaders.gptq_for_llama import SPEC

    options = {option.name: option.default for option in SPEC.options} | {"kernel": kernel}
    return load(str(checkpoint), options, lambda _: None)


def settings_for(base: Path, **settings: Any) -> QuantizeSettings:
    """Few and short windows of a short text: reading the bundled sample takes longer than all the rest here."""
    text = base.parent / "calibration.txt"
    if not text.exists():
        pieces = (TEXT[start : start + 1_500] for start in range(0, 190_000, 9_500))  # of all it holds, not its beginning
        text.write_text("".join(pieces), encoding="utf-8")
    given = {"nsamples": 24, "seqlen": 64, "group_size": 32, "calibration": str(text)}
    return QuantizeSettings(**given | settings)


def quantize(base: Path, out: Path, **settings: Any) -> dict[str, Any]:
    events: list[dict[str, Any]] = []
    result = _job.run(_job.Job(base, out, settings_for(base, **settings)), events.append)
    return result | {"events": [event for event in events if "layer" in event or "note" in event]}


def error_of(call: Any) -> list[str]:
    """Its code and text, "none" where the call goes well."""
    try:
        call()
    except AppError as error:
        return [error.code, str(error)]
    return ["none", ""]
