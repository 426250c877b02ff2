"""A folder in Hugging Face layout as a model: plain, GPTQ, AWQ, EXL2, EXL3, bitsandbytes or FP8 weights, or a LoRA adapter."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modules.detect import quantized
from modules.detect.config_keys import CONFIG_FILES, refuse_code
from modules.detect.draft import Draft, folder_files, integer, read_json, text
from modules.detect.rwkv import looks_like_rwkv
from modules.detect.shapes import LLAMA_FAMILY, check_llama_shapes
from modules.detect.tokenizer import check_tokenizer
from modules.detect.weights import INDEX, check_index, find_weights, read_safetensors, read_weights
from modules.errors import CorruptModel, IncompatibleModel

if TYPE_CHECKING:
    from modules.detect.safetensors_header import Tensor

_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length", "n_ctx")
_QUANT_FILES = ("quantize_config.json", "quant_config.json")
_EMBEDDINGS = (
    "emb.weight",
    "model.embed_tokens.weight",
    "embed_tokens.weight",
    "transformer.wte.weight",
    "model.decoder.embed_tokens.weight",
)
_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*(?:\n|\Z)", re.DOTALL)


def examine_folder(path: Path, draft: Draft, *, deep: bool) -> None:
    """Fill `draft` from the folder at `path`. `deep` also reads the tokenizer.

    Raises LoadError's subclasses for what can't be loaded, OSError for what can't be read.
    """
    files = folder_files(path)
    draft.files = list(files)
    draft.size_bytes = sum(files.values())
    _read_card(path, files, draft)
    draft.has_chat_template = "chat_template.jinja" in files or "chat_template.json" in files
    if "adapter_config.json" in files:
        _examine_adapter(path, files, draft)
        return
    config = read_json(path / "config.json") if "config.json" in files else {}
    draft.format = "hf"
    _read_config(config, draft)
    quant_config = _quant_config(path, files, config)
    declared = quantized.declared_method(quant_config) if quant_config else None
    if declared:
        draft.format = quantized.format_of(declared)
        draft.quantization = quantized.describe(declared, quant_config, {})
    _refuse_code(path, files, draft)
    names = find_weights(path, files)
    tensors, _ = read_weights(path, names)
    if INDEX in files:
        check_index(path, tensors)
    _read_weights(path, config, quant_config, tensors, draft)
    if "config.json" not in files and draft.format == "hf":
        raise IncompatibleModel(
            "The folder has weights, but no config.json, so their architecture is unknown.",
            hint="Fetch config.json into the folder.",
        )
    if text(config.get("model_type")) in LLAMA_FAMILY:
        check_llama_shapes(config, tensors)
    if deep and (draft.format in ("hf", "gptq", "awq") or (draft.format == "rwkv" and "tokenizer.json" in files)):
        check_tokenizer(path, set(files), _embedding_rows(tensors))


def _read_config(config: dict[str, Any], draft: Draft) -> None:
    inner = config.get("text_config")
    sources = [config, inner] if isinstance(inner, dict) else [config]
    architectures = config.get("architectures")
    named = architectures[0] if isinstance(architectures, list) and architectures else None
    draft.architecture = text(named, 100) or text(config.get("model_type"), 100)
    draft.vision = isinstance(config.get("vision_config"), dict)
    for source in sources:
        for key in _CONTEXT_KEYS:
            draft.context_length = draft.context_length or integer(source.get(key), maximum=2**31)
        draft.vocab_size = draft.vocab_size or integer(source.get("vocab_size"), maximum=2**31)


def _quant_config(path: Path, files: dict[str, int], config: dict[str, Any]) -> dict[str, Any]:
    """The settings the quantiser wrote: inside config.json, or a file of its own; the file fills in what config.json lacks."""
    inner = config.get("quantization_config")
    found = dict(inner) if isinstance(inner, dict) else {}
    for name in _QUANT_FILES:
        if name in files:
            for key, value in read_json(path / name).items():
                found.setdefault(key, value)
    return found


def _refuse_code(path: Path, files: dict[str, int], draft: Draft) -> None:
    for name in CONFIG_FILES:
        if name in files:
            config = read_json(path / name)
            refuse_code(name, config)
            if name == "tokenizer_config.json" and config.get("chat_template"):
                draft.has_chat_template = True


def _read_weights(
    path: Path, config: dict[str, Any], quant_config: dict[str, Any], tensors: dict[str, Tensor], draft: Draft
) -> None:
    """Format, quantization and size by what the tensors are; the configuration only adds settings."""
    declared = quantized.declared_method(quant_config) if quant_config else None
    held = quantized.method_of(tensors)
    if declared in ("gptq", "awq", "exl2", "exl3") and held is None:
        raise CorruptModel(
            f"The configuration says the weights are quantized with {declared}, but they are plain.",
            hint="Weights and configuration are of two models: fetch the model again.",
        )
    if held is None and looks_like_rwkv(tensors):  # the package's own names: a config.json beside them only adds to it
        draft.format = "rwkv"
        draft.architecture = looks_like_rwkv(tensors)
    elif held and held != declared and not (declared and held in ("fp8", "bnb")):
        draft.format = quantized.format_of(held)
        draft.quantization = quantized.describe(held, quant_config, tensors)
    elif declared and draft.quantization and draft.quantization.bits is None:
        draft.quantization = quantized.describe(declared, quant_config, tensors)
    if draft.format == "gptq":
        quantized.check_gptq(path.name, tensors, draft.quantization.bits if draft.quantization else None)
    draft.parameters = quantized.count_parameters(tensors, draft.quantization)
    draft.vocab_size = draft.vocab_size or _embedding_rows(tensors)


def _embedding_rows(tensors: dict[str, Tensor]) -> int | None:
    for name in _EMBEDDINGS:
        if name in tensors and len(tensors[name].shape) == 2:
            return tensors[name].shape[0]
    return None


def _examine_adapter(path: Path, files: dict[str, int], draft: Draft) -> None:
    draft.format = "lora"
    config = read_json(path / "adapter_config.json")
    draft.base_model = text(config.get("base_model_name_or_path")) or draft.base_model
    refuse_code("adapter_config.json", config)
    if "adapter_model.safetensors" not in files:
        names = [name for name in files if name.startswith("adapter_model")]
        if names:
            read_safetensors(path / names[0])
        raise CorruptModel("The LoRA adapter has no adapter_model.safetensors.", hint="Fetch that file into the folder.")
    draft.parameters = sum(t.elements for t in read_safetensors(path / "adapter_model.safetensors").tensors.values())


def _read_card(path: Path, files: dict[str, int], draft: Draft) -> None:
    """Licence and base model from the front matter of README.md. A card that can't be read is only missing information."""
    name = next((name for name in files if name.lower() == "readme.md"), None)
    if name is None:
        return
    with (path / name).open("rb") as file:
        head = file.read(16_384).decode("utf-8", "replace").replace("\r\n", "\n")
    match = _FRONT_MATTER.match(head)
    if not match:
        return
    draft.license = text(_front(match[1], "license")) or text(_front(match[1], "license_name"))
    draft.base_model = text(_front(match[1], "base_model"))


def _front(matter: str, key: str) -> str | None:
    """A key's value in simple YAML: on its line, or the first item of the list below."""
    match = re.search(rf"^{key}:[ \t]*(?:\n[ \t]*-[ \t]*)?([^\n]+)$", matter, re.MULTILINE)
    return match[1].strip().strip("'\"") if match else None


def examine_weights_file(path: Path, draft: Draft) -> None:
    """A single .safetensors file that is a model by itself: GPTQ-for-LLaMA's and RWKV's way."""
    draft.files = [path.name]
    draft.size_bytes = path.stat().st_size
    header = read_safetensors(path)
    tensors = header.tensors
    held = quantized.method_of(tensors)
    draft.license = text(header.metadata.get("license"))
    draft.vocab_size = _embedding_rows(tensors)
    if held:
        draft.format = quantized.format_of(held)
        draft.quantization = quantized.describe(held, {}, tensors)
        if held == "gptq":
            quantized.check_gptq(path.name, tensors, draft.quantization.bits)
    elif looks_like_rwkv(tensors):
        draft.format = "rwkv"
        draft.architecture = looks_like_rwkv(tensors)
        draft.vocab_size = tensors["emb.weight"].shape[0] if tensors["emb.weight"].shape else None
    elif any(".lora_A." in name or name.endswith("lora_A.weight") for name in tensors):
        draft.format = "lora"
        raise IncompatibleModel(
            f"{path.name} is a LoRA without its adapter_config.json.", hint="Fetch that file and put both in a folder."
        )
    draft.parameters = quantized.count_parameters(tensors, draft.quantization)
    if draft.format in ("unknown", "hf", "awq", "exl2", "exl3"):
        raise IncompatibleModel(
            f"{path.name} holds weights, but no configuration beside them.",
            hint="Put it in a folder with the config.json and the tokenizer it was published with.",
        )
