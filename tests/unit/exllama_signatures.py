"""What loaders/_exllama_* calls of exllamav2 0.3.2 and exllamav3 1.6.5: the names of the parameters, read from their source.

Neither can be imported without CUDA, so the calls are compared with this table; where the packages' source is there,
test_loader_exllama.py compares the table with it.
"""

from __future__ import annotations

import ast
from pathlib import Path

SIGNATURES: dict[str, dict[str, str]] = {
    "exllamav2": {
        "ExLlamaV2Config.__init__": "model_dir",
        "ExLlamaV2Config.prepare": "no_tensors",
        "ExLlamaV2Config.arch_compat_overrides": "quiet warn_only",
        "ExLlamaV2.__init__": "config lazy_load archparams",
        "ExLlamaV2.load": "gpu_split lazy stats callback callback_gen progress",
        "ExLlamaV2.load_tp": "gpu_split callback callback_gen progress expect_cache_tokens expect_cache_base",
        "ExLlamaV2.load_autosplit": "cache reserve_vram last_id_only callback callback_gen progress",
        "ExLlamaV2.forward": (
            "input_ids cache input_mask preprocess_only last_id_only loras return_last_state "
            "position_offsets abort_event cpu_logits **"
        ),
        "ExLlamaV2Cache.__init__": "model batch_size max_seq_len copy_from lazy num_key_value_heads fixed_device",
        "ExLlamaV2Cache_Q8.__init__": "model batch_size max_seq_len copy_from lazy num_key_value_heads fixed_device",
        "ExLlamaV2Cache_Q6.__init__": "model batch_size max_seq_len copy_from lazy num_key_value_heads fixed_device",
        "ExLlamaV2Cache_Q4.__init__": "model batch_size max_seq_len copy_from lazy num_key_value_heads fixed_device",
        "ExLlamaV2Cache_TP.__init__": "model base batch_size max_seq_len",
        "ExLlamaV2Lora.from_directory": "model directory lora_scaling",
    },
    "exllamav3": {
        "Config.from_directory": "directory **",
        "Model.from_config": "config component **",
        "Model.load_gen": (
            "device tp_output_device reserve_per_device use_per_device tensor_p progressbar max_chunk_size "
            "max_output_size max_output_factor callback generator tp_dev_limits tp_backend verbose "
            "max_batch_size tp_options autosplit_no_forward draft_model"
        ),
        "Model.forward": "input_ids params",
        "Model.get_recurrent_layers": "",
        "Cache.__init__": "model max_num_tokens layer_type max_batch_size max_history recurrent_dtype **",
        "Cache.release_state": "state",
        "CacheLayer_quant.__init__": "config attention cache_id max_num_tokens k_bits v_bits compand_a",
        "CacheLayer_fp16.__init__": "config attention cache_id max_num_tokens",
        "LoRA.from_directory": "model directory lora_scaling",
    },
}


def read_signatures(package: Path) -> dict[str, str]:
    """ "Class.method" -> parameter names, "**" for further keywords, of every class in a package's source."""
    found: dict[str, str] = {}
    for path in sorted(package.rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.ClassDef):
                continue
            for part in node.body:
                if isinstance(part, ast.FunctionDef):
                    names = [argument.arg for argument in part.args.args if argument.arg != "self"]
                    found[f"{node.name}.{part.name}"] = " ".join([*names, *(["**"] if part.args.kwarg else [])])
    return found
