"""A GGUF file as a model: what its keys say it is, and whether a chat can run on it."""

from __future__ import annotations

import re
from pathlib import Path

from modules.detect.draft import Draft, text
from modules.detect.ggml_types import FILE_TYPES
from modules.detect.gguf_header import GgufHeader, read_gguf_header
from modules.detect.projector import is_projector
from modules.detect.safetensors_header import shown
from modules.errors import CorruptModel, IncompatibleModel
from modules.schema import Quantization

_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
_BLOCK = re.compile(r"(?:^|\.)blk\.(\d{1,6})\.")
# Architectures whose converters leave whole blocks out.
_SPARSE = frozenset({"deci"})
# Encoders: they turn text into one vector and generate nothing.
_ENCODERS = frozenset(
    "bert nomic-bert nomic-bert-moe neo-bert jina-bert-v2 jina-bert-v3 modern-bert eurobert gemma-embedding t5encoder "
    "wavtokenizer-dec".split()
)


def examine_gguf(path: Path, draft: Draft) -> None:
    """Fill `draft` from the GGUF file at `path`. Raises LoadError's subclasses, OSError."""
    draft.format = "gguf"
    draft.files = [path.name]
    draft.size_bytes = path.stat().st_size
    header = read_gguf_header(path)
    architecture = header.text("general.architecture")
    if architecture is None:
        _refuse_no_model(path, header, draft)
        raise _broken(path, "it does not name its architecture")
    draft.architecture = architecture
    draft.license = text(header.text("general.license"))
    draft.base_model = text(header.text("general.base_model.0.repo_url") or header.text("general.base_model.0.name"))
    draft.has_chat_template = _has(header, "tokenizer.chat_template")
    draft.context_length = header.integer(f"{architecture}.context_length")
    draft.vocab_size = header.lengths.get("tokenizer.ggml.tokens")
    shards = shard_paths(path, header)
    _fill_weights(header, draft, shards)
    _refuse_no_model(path, header, draft)
    _check_shards(path, header, shards)
    _check_values(path, header, architecture, draft)


def _fill_weights(header: GgufHeader, draft: Draft, shards: list[Path]) -> None:
    headers = [header]
    for shard in shards[1:]:
        if shard.is_file():
            headers.append(read_gguf_header(shard))
            draft.files.append(shard.name)
            draft.size_bytes += shard.stat().st_size
    tensors = [tensor for part in headers for tensor in part.tensors.values()]
    if not tensors:
        return
    draft.parameters = sum(tensor.elements for tensor in tensors)
    stored = 8 * sum(tensor.size_bytes for tensor in tensors)
    by_bytes: dict[str, int] = {}
    for tensor in tensors:
        by_bytes[tensor.type] = by_bytes.get(tensor.type, 0) + tensor.size_bytes
    declared = header.integer("general.file_type")
    label = FILE_TYPES.get(declared) if declared is not None else None
    draft.quantization = Quantization(label or max(by_bytes, key=by_bytes.__getitem__), round(stored / draft.parameters, 2))


def _refuse_no_model(path: Path, header: GgufHeader, draft: Draft) -> None:
    """GGUF files that are whole, but no language model."""
    kind = header.text("general.type") or "model"
    if kind == "adapter":
        draft.format = "lora"
        return
    if is_projector(header.values):
        draft.format = "mmproj"
        raise IncompatibleModel(
            f"{path.name} is a multimodal projector (mmproj), the part that reads images for another model; it can't chat.",
            hint="Put it into the folder of the language model it belongs to, and load that one.",
        )
    if kind in ("imatrix", "vocab") or (draft.architecture and not header.tensors):
        what = "an importance matrix" if kind == "imatrix" else "a vocabulary without weights"
        raise IncompatibleModel(f"{path.name} holds {what}; it can't chat.", hint="Get the model's full GGUF file.")
    if draft.architecture in _ENCODERS:
        raise IncompatibleModel(
            f"{path.name} is an embedding model ({draft.architecture}): it turns text into vectors and can't chat.",
            hint="Choose a model that generates text.",
        )


def shard_paths(path: Path, header: GgufHeader) -> list[Path]:
    """All the files of a split model in order, `path` alone for one that is whole."""
    count = header.integer("split.count") or 1
    match = _SHARD.fullmatch(path.name)
    if count <= 1 or not match or int(match["count"]) != count:
        return [path]
    return [path.with_name(f"{match['stem']}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]


def _check_shards(path: Path, header: GgufHeader, shards: list[Path]) -> None:
    count = header.integer("split.count") or 1
    if count <= 1:
        return
    if len(shards) != count:
        raise IncompatibleModel(
            f"{path.name} is one of {count} parts, but is not named like one (NAME-00001-of-{count:05d}.gguf).",
            hint="Give the parts back the names they were published under.",
        )
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise CorruptModel(
            f"The part {missing[0]} of {path.name} is missing.", hint="Fetch the missing parts into the same folder."
        )
    if (header.integer("split.no") or 0) != 0:
        raise IncompatibleModel(f"{path.name} is not the first part of its model.", hint=f"Load {shards[0].name}.")


def _check_values(path: Path, header: GgufHeader, architecture: str, draft: Draft) -> None:
    if draft.format == "lora":
        return
    blocks = header.values.get(f"{architecture}.block_count")
    if blocks is not None and (type(blocks) is not int or not 1 <= blocks <= 10_000):
        raise _broken(path, f"{architecture}.block_count is {blocks}")
    context = header.values.get(f"{architecture}.context_length")
    if context is not None and (type(context) is not int or not 1 <= context <= 2**31):
        raise _broken(path, f"{architecture}.context_length is {context}")
    if draft.vocab_size is None:
        if header.text("tokenizer.ggml.model") not in (None, "none", "no_vocab"):
            raise _broken(path, "it has no vocabulary")
        return
    if draft.vocab_size == 0:
        raise _broken(path, "its vocabulary is empty")
    for key in ("bos", "eos", "unknown", "padding"):
        token = header.values.get(f"tokenizer.ggml.{key}_token_id")
        # 2^32 - 1 and -1 are how "none" is written.
        if token not in (None, 2**32 - 1, -1) and not (type(token) is int and 0 <= token < draft.vocab_size):
            raise _broken(path, f"its {key} token id {token} is outside the vocabulary of {draft.vocab_size:,}")
    split = (header.integer("split.count") or 1) > 1
    _check_embedding(path, header, architecture, draft.vocab_size)
    if blocks is not None and not split and architecture not in _SPARSE:
        present = {match[1] for name in header.tensors if (match := _BLOCK.search(name))}
        for number in range(blocks):
            if str(number) not in present:
                raise _broken(path, f"it claims {blocks} blocks, but has no tensor of block {number}")


def _check_embedding(path: Path, header: GgufHeader, architecture: str, vocab: int) -> None:
    tensor = header.tensors.get("token_embd.weight")
    width = header.integer(f"{architecture}.embedding_length")
    if tensor is None or width is None:
        return
    if len(tensor.shape) != 2 or tensor.shape[0] != width or tensor.shape[1] < vocab:
        shape = " x ".join(str(side) for side in reversed(tensor.shape))
        raise _broken(path, f"tensor token_embd.weight is {shape}, its keys say {vocab} x {width}")


def _has(header: GgufHeader, key: str) -> bool:
    return header.text(key) is not None or header.lengths.get(key, 0) > 0


def _broken(path: Path, reason: str) -> CorruptModel:
    return CorruptModel(
        f"{shown(path.name)} is damaged: {reason}.", hint="Fetch the file again, or convert the original model again."
    )
