"""Reads a GPTQ, EXL2 or EXL3 folder for `loaders.exllama`, and maps the load options to the packages' own."""

from __future__ import annotations

import json
import re
import shutil
import sys
import traceback
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loaders import _hf_load
from loaders._exllama_nets import Net, V2Net, V3Net
from loaders._hf_text import TextCodec
from loaders._lora import adapters, lora_weights
from loaders.exllama import refusal
from modules.detect import check
from modules.errors import AppError, BackendUnavailable, CorruptModel, IncompatibleModel, InvalidParameter, LoadError, one_line
from modules.schema import LoadProgress, ModelFiles, ModelInfo

if TYPE_CHECKING:
    from collections.abc import Callable

    from modules.engine import Progress

PAGE = 256  # exllamav3 allocates its cache in pages of so many tokens
_DEFAULT_CONTEXT = 4096


def load(path: str, options: dict[str, Any], progress: Progress) -> _hf_load.Loaded:
    """The model at `path` on the GPUs. Raises LoadError's subclasses."""
    progress(LoadProgress("Reading the file's header"))
    files = check(Path(path))
    package = package_for(files)
    folder = Path(files.path)
    config = _hf_load.check_folder(folder)
    size = context_size(config, options["ctx_size"])
    check_options(package, options)
    tokenizer = FileTokenizer(folder)
    progress(LoadProgress(f"Starting {package}: its first start compiles CUDA kernels, which takes minutes"))
    import_package(package)
    import torch

    def on_module(done: int, total: int) -> None:
        progress(LoadProgress("Reading weights", done / max(total, 1)))

    try:
        make = _load_v3 if package == "exllamav3" else _load_v2
        net = make(folder, size, options, on_module, int(_text_config(config)["vocab_size"]))
    except AppError:
        raise
    except Exception as error:
        traceback.print_exception(error)
        raise typed(error, config, package) from error
    eos_ids = _hf_load.end_token_ids(_generation_eos(folder, config), tokenizer)
    info = _describe(files, config, tokenizer, eos_ids, package, size, options, torch)
    return _hf_load.Loaded(net, TextCodec(tokenizer), info, torch.device("cpu"))  # ids go in from main memory


# --- which package, which options ------------------------------------------------------------------------------


def package_for(files: ModelFiles) -> str:
    """exllamav2 for EXL2 and 4-bit GPTQ, exllamav3 for EXL3. Raises IncompatibleModel."""
    if files.format not in ("gptq", "exl2", "exl3"):
        raise IncompatibleModel(f"ExLlama runs GPTQ, EXL2 and EXL3 checkpoints; this is {files.format}.")
    if Path(files.path).is_file():
        raise IncompatibleModel(
            "ExLlama reads a folder with config.json, not a single file.", hint="Load it with GPTQ-for-LLaMA."
        )
    reason = refusal(files)
    if reason:
        raise IncompatibleModel(f"ExLlama {reason}")
    return "exllamav3" if files.format == "exl3" else "exllamav2"


def check_options(package: str, options: dict[str, Any]) -> None:
    """Raise InvalidParameter for an option the package does not have, so that none is dropped in silence."""
    if package == "exllamav3":
        for name, neutral in (("alpha_value", 1.0), ("compress_pos_emb", 1.0), ("num_experts_per_token", 0)):
            if options[name] != neutral:
                raise InvalidParameter(f"exllamav3 has no {name}.", hint="Leave it out for EXL3 models.", param=name)
    parse_split(options["gpu_split"])
    lora_weights(options)


def parse_split(text: str) -> list[float] | None:
    """GiB per GPU from "20,7"; None when empty. Raises InvalidParameter."""
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    if not parts:
        return None
    if not all(re.fullmatch(r"\d+(\.\d+)?", part) for part in parts):
        raise InvalidParameter(f"gpu_split {text!r} is no list of GiB.", hint="Such as 20,7 for two GPUs.", param="gpu_split")
    split = [float(part) for part in parts]
    if not any(split):
        raise InvalidParameter("gpu_split gives no GPU any memory.", param="gpu_split")
    return split


def context_size(config: dict[str, Any], wanted: int) -> int:
    return wanted or _trained(config) or _DEFAULT_CONTEXT


def _trained(config: dict[str, Any]) -> int:
    return int(_text_config(config).get("max_position_embeddings") or 0)


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    inner = config.get("text_config")
    found = {**config, **inner} if isinstance(inner, dict) else config
    if not isinstance(found.get("vocab_size"), int):
        raise CorruptModel("config.json names no vocab_size.", hint="Fetch it again.")
    return found


# --- the packages ----------------------------------------------------------------------------------------------


def import_package(package: str) -> None:
    """Import it, which compiles its kernels the first time. Raises BackendUnavailable with what is missing."""
    import torch

    if not torch.cuda.is_available():
        raise BackendUnavailable(
            "ExLlama needs an NVIDIA GPU with CUDA, and torch sees none.",
            hint="Use GPTQ-for-LLaMA or AutoGPTQ for GPTQ files; EXL2 and EXL3 run on NVIDIA GPUs only.",
        )
    try:
        __import__(package)
    except Exception as error:  # the compiler's failures are of many kinds
        traceback.print_exception(error)
        raise BackendUnavailable(why_no_import(package, error, torch.version.cuda), hint=_toolkit(torch.version.cuda)) from error


def why_no_import(package: str, error: Exception, cuda: str | None) -> str:
    """One line for a failed import: most often the compiler is missing."""
    if isinstance(error, ModuleNotFoundError) and error.name == package:
        return f"{package} is not installed."
    missing = [tool for tool in ("nvcc", "cl" if sys.platform == "win32" else "g++") if shutil.which(tool) is None]
    text = one_line(error)
    if missing or "CUDA_HOME" in text:
        return f"{package}'s CUDA kernels can't be compiled: {' and '.join(missing) or 'CUDA_HOME'} not found."
    return f"{package} can't be started with torch's CUDA {cuda}: {text}."


def _toolkit(cuda: str | None) -> str:
    return (
        f"Install the CUDA toolkit {cuda or ''} (nvcc) and a C++ compiler and load again, or install a wheel of the package with "
        "compiled kernels into the exllama environment."
    )


def _load_v2(folder: Path, size: int, options: dict[str, Any], on_module: Callable[[int, int], None], vocab_size: int) -> Net:
    import exllamav2 as ex

    config = ex.ExLlamaV2Config()
    config.model_dir = str(folder)
    config.prepare()
    config.max_seq_len = size
    config.max_input_len = min(options["prefill_chunk"], size)
    config.max_attention_size = config.max_input_len**2
    config.scale_alpha_value = options["alpha_value"]
    if options["compress_pos_emb"] != 1.0:
        config.scale_pos_emb = options["compress_pos_emb"]
    if options["num_experts_per_token"]:
        config.num_experts_per_token = options["num_experts_per_token"]
    for name in ("no_flash_attn", "no_xformers", "no_sdpa"):
        setattr(config, name, options[name] or getattr(config, name))
    config.arch_compat_overrides(quiet=True)
    model = ex.ExLlamaV2(config)
    kinds = {"fp16": ex.ExLlamaV2Cache, "q8": ex.ExLlamaV2Cache_Q8, "q6": ex.ExLlamaV2Cache_Q6, "q4": ex.ExLlamaV2Cache_Q4}
    kind = kinds[options["kv_cache"]]
    split = parse_split(options["gpu_split"])
    if options["tensor_parallel"]:
        model.load_tp(gpu_split=split, callback=on_module, expect_cache_tokens=size, expect_cache_base=kind)
        cache = ex.ExLlamaV2Cache_TP(model, base=kind, max_seq_len=size)
    elif split:
        model.load(gpu_split=split, callback=on_module)
        cache = kind(model, max_seq_len=size)
    else:
        cache = kind(model, max_seq_len=size, lazy=True)
        model.load_autosplit(cache, callback=on_module)
    loras = [ex.ExLlamaV2Lora.from_directory(model, str(folder), weight) for folder, weight in adapters_of(options)]
    return V2Net(model, cache, loras, config.max_input_len, vocab_size)


def _load_v3(folder: Path, size: int, options: dict[str, Any], on_module: Callable[[int, int], None], vocab_size: int) -> Net:
    import exllamav3 as ex

    config = ex.Config.from_directory(str(folder))
    model = ex.Model.from_config(config)
    pages = -(-size // PAGE) * PAGE
    bits = {} if options["kv_cache"] == "fp16" else {name: int(options["kv_cache"][1:]) for name in ("k_bits", "v_bits")}
    layer = ex.CacheLayer_quant if bits else ex.CacheLayer_fp16
    cache = ex.Cache(model, max_num_tokens=pages, layer_type=layer, max_batch_size=1, **bits)
    chunk = min(options["prefill_chunk"], pages)
    split = parse_split(options["gpu_split"])
    model.load(
        use_per_device=split,
        tensor_p=options["tensor_parallel"],
        max_chunk_size=chunk,
        max_output_size=chunk,
        callback=on_module,
    )
    for folder, weight in adapters_of(options):
        from exllamav3.model.lora import LoRA

        LoRA.from_directory(model, str(folder), weight)
    return V3Net(model, cache, pages, chunk, vocab_size)


def adapters_of(options: dict[str, Any]) -> list[tuple[Path, float]]:
    """Folders and weights, without a pickle that the packages would take first. Raises CorruptModel."""
    found = adapters(options)
    for folder, _ in found:
        if (folder / "adapter_model.bin").exists():
            raise CorruptModel(
                f"{folder.name} holds the adapter as a pickle, too, which exllamav2 would read first.",
                hint="Remove adapter_model.bin; the safetensors file beside it holds the same.",
            )
    return found


def typed(error: Exception, config: dict[str, Any], package: str) -> AppError:
    """The product's error for what the packages raise while loading."""
    text = one_line(error)
    if "Insufficient VRAM" in text or "insufficient VRAM" in text or "Insufficient space" in text:
        error = MemoryError(text)
    name = (config.get("architectures") or ["unknown"])[0]
    if "architecture" in text.lower() and isinstance(error, (TypeError, NotImplementedError, KeyError, AssertionError)):
        return IncompatibleModel(f"{package} does not know the architecture {name}.", hint="Use another backend for this model.")
    if isinstance(error, (AssertionError, NotImplementedError)):
        return LoadError(f"{package} does not take the model so: {text}.", hint="Change the load options, or see the log.")
    return _hf_load.typed(error, config, f"{package} can't read the checkpoint")


# --- text ------------------------------------------------------------------------------------------------------


class FileTokenizer:
    """tokenizer.json and tokenizer_config.json under the names `TextCodec` and `end_token_ids` use; no transformers needed."""

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        path = folder / "tokenizer.json"
        if not path.is_file():
            raise IncompatibleModel(
                "The model has no tokenizer.json, which ExLlama's packages need.",
                hint="Fetch that file from where the model came from.",
            )
        try:
            self.backend_tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            reason = one_line(error)
            raise CorruptModel(f"tokenizer.json can't be read: {reason}.", hint="Fetch the file again.") from error
        settings = _json(folder / "tokenizer_config.json")
        special = _json(folder / "special_tokens_map.json")
        self.bos_token = _token(settings.get("bos_token") or special.get("bos_token"))
        self.eos_token = _token(settings.get("eos_token") or special.get("eos_token"))
        self.unk_token_id = self.convert_tokens_to_ids(_token(settings.get("unk_token") or special.get("unk_token")))
        self.bos_token_id = self.convert_tokens_to_ids(self.bos_token)
        self.eos_token_id = self.convert_tokens_to_ids(self.eos_token)
        self.chat_template = _template(folder, settings)

    def convert_tokens_to_ids(self, token: str | None) -> int | None:
        found = None if token is None else self.backend_tokenizer.token_to_id(token)
        return None if found is None else int(found)


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    value = json.loads(path.read_text(encoding="utf-8-sig"))
    return value if isinstance(value, dict) else {}


def _token(value: Any) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _template(folder: Path, settings: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    found = settings.get("chat_template")
    if isinstance(found, list):
        named = {item.get("name"): item.get("template") for item in found if isinstance(item, dict)}
        found = named.get("default") or next(iter(named.values()), None)
    return found if isinstance(found, str) else None


def _generation_eos(folder: Path, config: dict[str, Any]) -> Any:
    found = _json(folder / "generation_config.json").get("eos_token_id")
    return found if found is not None else _text_config(config).get("eos_token_id")


# --- what was loaded -------------------------------------------------------------------------------------------


def _describe(
    files: ModelFiles,
    config: dict[str, Any],
    tokenizer: Any,
    eos_ids: frozenset[int],
    package: str,
    size: int,
    options: dict[str, Any],
    torch: Any,
) -> ModelInfo:
    used = {f"cuda:{i}": int(torch.cuda.memory_allocated(i)) for i in range(torch.cuda.device_count())}
    total = sum(used.values())
    trained = _trained(config)
    notes = [f"LoRA {Path(path).name}" for path in options["lora"]]
    if trained and size > trained and options["alpha_value"] == options["compress_pos_emb"] == 1.0:
        notes.append(f"The context of {size} is beyond the {trained} tokens the model was trained on.")
    return ModelInfo(
        name=Path(files.path).name,
        path=files.path,
        loader="exllama",
        format=files.format,
        architecture=files.architecture,
        quantization=files.quantization,
        dtype="float16",
        context_length=size,
        vocab_size=int(_text_config(config)["vocab_size"]),
        chat_template=tokenizer.chat_template,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        eos_token_ids=tuple(sorted(eos_ids)),
        device_map={name: round(share / total, 4) for name, share in used.items() if share} if total else {"cuda:0": 1.0},
        memory_bytes=total or None,
        engine=f"{package} {metadata.version(package)}, torch {torch.__version__}, {torch.cuda.get_device_name(0)}, "
        f"KV cache {options['kv_cache']}",
        notes=tuple(notes),
    )
