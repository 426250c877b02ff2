"""Reads an RWKV model for `loaders.rwkv`: version by tensors, strategy, tokenizer, and a typed error for every failure."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from loaders._hf_load import Loaded, chat_template, end_token_ids, typed
from loaders._hf_text import TextCodec
from loaders._rwkv_text import BYTE_SIZE, END_OF_TEXT, PILE_SIZE, WORLD_SIZE, ByteCodec, byte_codec, world_codec
from modules.detect.rwkv import RwkvShape, rwkv_shape
from modules.detect.safetensors_header import read_safetensors_header
from modules.detect.weights import find_weights
from modules.errors import (
    AppError,
    CorruptModel,
    IncompatibleModel,
    InvalidParameter,
    LoadOutOfMemory,
    UnsafeModel,
    is_out_of_memory,
)
from modules.schema import LoadProgress, ModelInfo, Quantization

if TYPE_CHECKING:
    from modules.engine import Progress

_DEFAULT_CONTEXT = 4096
_PILE_FILES = ("20B_tokenizer.json", "tokenizer.json")
_WORLD_FILE = "rwkv_vocab_v20230424.txt"
_PART = re.compile(r"(cpu|mps|cuda(?::\d+)?) (fp32|fp16|bf16)(i8|i4|i3)?(?: \*(\d+)(\+)?)?")
_FORM = "It is a device and a number format, such as `cpu fp32` or `cuda fp16i8 *10 -> cpu fp32`."


def load(path: str, options: Mapping[str, Any], progress: Progress) -> Loaded:
    """The model at `path`, a .safetensors file or a folder with one. Raises LoadError's subclasses and InvalidParameter."""
    place = Path(path)
    file = weights_file(place)
    header = read_safetensors_header(file)
    shape = rwkv_shape({name: tensor.shape for name, tensor in header.tensors.items()})
    progress(LoadProgress("Starting RWKV"))
    _set_switches(shape.version, kernel=options["cuda_kernel"])
    import torch

    if options["threads"]:
        torch.set_num_threads(options["threads"])
    cuda = torch.cuda.is_available()
    if options["cuda_kernel"] and not cuda:
        raise InvalidParameter("There is no CUDA GPU to compile kernels for.", hint="Turn cuda_kernel off.", param="cuda_kernel")
    strategy = checked_strategy(options["strategy"], shape, cuda=cuda)
    progress(LoadProgress("Reading the tokenizer"))
    text, sidecars = read_text(place, shape.vocab, options["tokenizer"])
    progress(LoadProgress("Reading weights", 0.0))
    try:
        model = _read_model(file, strategy, progress)
        if options["ln_x_eps"]:
            _set_eps(options["ln_x_eps"], shape.version)
    except AppError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise LoadOutOfMemory(
                "The memory is too small for this model.",
                hint="Choose a smaller one, or a strategy with fp16i8 or a layer split.",
            ) from error
        raise typed(error, {}, "The weights and the rwkv package do not agree") from error
    info = _describe(place, options, shape, strategy, model, sidecars, torch)
    device = "cpu" if strategy.startswith("cpu") else strategy.split(" ")[0]
    return Loaded(model, cast(TextCodec, text), info, torch.device(device))


def weights_file(place: Path) -> Path:
    """The one .safetensors file of a model. Raises when it is a pickle, missing or split."""
    if place.is_dir():
        files = {item.name: item.stat().st_size for item in place.iterdir() if item.is_file()}
        names = find_weights(place, files)
        if len(names) != 1:
            raise IncompatibleModel("The RWKV backend reads one file.", hint="Join the parts into one .safetensors file.")
        return place / names[0]
    if place.suffix in (".pth", ".pt", ".bin"):
        raise UnsafeModel(
            f"{place.name} is a Python pickle, which can run any code when it is opened, so it is refused.",
            hint=f"If you trust this file: `server.py convert {shlex.quote(place.name)} --to safetensors --allow-pickle`.",
        )
    return place


def checked_strategy(text: str, shape: RwkvShape, *, cuda: bool) -> str:
    """`text` in the package's own form. Raises InvalidParameter when it is no strategy, or when this machine or model
    can't follow it."""
    if text.strip() in ("", "auto"):
        return "cuda fp16" if cuda else "cpu fp32"
    parts = [" ".join(part.split()) for part in text.split("->")]
    for part in parts:
        match = _PART.fullmatch(part)
        if not match:
            raise InvalidParameter(f"{part!r} is no strategy.", hint=_FORM, param="strategy")
        device, number, weights, _, _ = match.groups()
        if device.startswith("cuda") and not cuda:
            raise InvalidParameter(
                f"The strategy {part!r} needs a CUDA GPU; there is none.", hint="Use `cpu fp32` or `cpu bf16`.", param="strategy"
            )
        if device == "cpu" and number == "fp16":
            raise InvalidParameter("A CPU does not compute in fp16.", hint="Use `cpu fp32` or `cpu bf16`.", param="strategy")
        if weights in ("i4", "i3"):
            raise InvalidParameter(f"The package has no {weights} weights.", hint="Use i8.", param="strategy")
        if shape.version == "7" and (weights or len(parts) > 1 or "*" in part):
            raise InvalidParameter(
                f"The strategy {text!r} is for RWKV versions 4 to 6; this model is version 7, which runs in one piece.",
                hint="Use `cpu fp32`, `cpu bf16`, `cuda fp16` or `cuda bf16`.",
                param="strategy",
            )
    if any(part.endswith("+") for part in parts[1:]):
        raise InvalidParameter("Only the first part of a strategy can stream layers (+).", hint=_FORM, param="strategy")
    return " -> ".join(parts)


def _set_switches(version: str, *, kernel: bool) -> None:
    """The package decides at import what it is, so this comes before it."""
    os.environ["RWKV_JIT_ON"] = "0"
    os.environ["RWKV_CUDA_ON"] = "1" if kernel else "0"
    os.environ["RWKV_V7_ON"] = "1" if version == "7" else "0"
    sys.modules.pop("rwkv.model", None)  # of an earlier load: what it decided at import may be wrong for this model


def _read_model(file: Path, strategy: str, progress: Progress) -> Any:
    """The package's model over the file's tensors: it only knows pickles, so it is handed the table that it would read."""
    from safetensors import safe_open

    from loaders._wide_products import AsLaid, gain

    tensors: dict[str, Any] = {}
    with safe_open(file, framework="pt") as weights:
        names = list(weights.keys())
        for number, name in enumerate(names, 1):
            tensors[name] = weights.get_tensor(name)
            if number == len(names) or number % 32 == 0:
                progress(LoadProgress("Reading weights", number / len(names)))
    with contextlib.redirect_stdout(sys.stderr):
        seven = os.environ["RWKV_V7_ON"] == "1"
        wide = seven and strategy == "cpu bf16" and gain("bfloat16")
        with _unscripted() if wide else contextlib.nullcontext():
            package = importlib.import_module("rwkv.model")
        with _handed_over(package.torch, tensors), AsLaid() if wide else contextlib.nullcontext():
            model = package.RWKV(model=str(file), strategy=strategy, **({} if seven else {"verbose": False}))
        if wide:
            _lay_in_columns(model.z)
        return model


def _lay_in_columns(tensors: dict[str, Any]) -> None:
    """All that is read as `x @ w`, in place, one at a time; the package itself leaves versions 4 to 6 so."""
    from loaders._wide_products import in_columns

    for name, tensor in tensors.items():
        if tensor.dim() == 2 and "emb" not in name:
            tensors[name] = in_columns(tensor)


@contextlib.contextmanager
def _unscripted() -> Iterator[None]:
    """The package scripts all of version 7, where nothing can be laid or multiplied otherwise; imported here it stays Python."""
    import torch

    jit: Any = torch.jit
    kept = jit.ScriptModule, jit.script, jit.script_method
    jit.ScriptModule, jit.script, jit.script_method = torch.nn.Module, _as_it_is, _as_it_is
    try:
        yield
    finally:
        jit.ScriptModule, jit.script, jit.script_method = kept


def _as_it_is(function: Any) -> Any:
    return function


@contextlib.contextmanager
def _handed_over(torch: Any, tensors: dict[str, Any]) -> Iterator[None]:
    """`torch.load` gives `tensors`, whatever it is asked for."""
    kept = torch.load
    torch.load = lambda *_, **__: tensors
    try:
        yield
    finally:
        torch.load = kept


class _Functional:
    """`torch.nn.functional` with another epsilon in `group_norm`, for the package's module alone."""

    def __init__(self, functional: Any, eps: float) -> None:
        self._functional, self._eps = functional, eps

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._functional, name)
        setattr(self, name, found)  # looked up once
        return found

    def group_norm(self, *args: Any, eps: float = 0.0, **named: Any) -> Any:
        return self._functional.group_norm(*args, **named, eps=self._eps)


def _set_eps(eps: float, version: str) -> None:
    if version not in ("5", "5.1", "5.2", "6"):
        raise InvalidParameter(f"An RWKV v{version} has no ln_x_eps to set.", hint="Leave ln_x_eps at 0.", param="ln_x_eps")
    package: Any = sys.modules["rwkv.model"]
    package.F = _Functional(package.F, eps)


# --- tokenizer ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sidecars:
    """What the files beside the weights say: end tokens, chat template, special tokens and the trained context (0: nothing)."""

    eos_ids: frozenset[int] = frozenset()
    template: str | None = None
    bos: str | None = None
    eos: str | None = None
    context: int = 0


def read_text(place: Path, vocab: int, choice: str) -> tuple[ByteCodec | TextCodec, Sidecars]:
    """The tokenizer for a vocabulary of `vocab` rows, and what else the folder says.

    Raises IncompatibleModel when no tokenizer fits, CorruptModel when the one that should can't be read.
    """
    folder = place if place.is_dir() else None
    if choice == "auto" and folder and (folder / "tokenizer.json").is_file():
        return _json_codec(folder / "tokenizer.json", vocab, folder)
    kind = choice if choice != "auto" else {BYTE_SIZE: "bytes", WORLD_SIZE: "world", PILE_SIZE: "20b"}.get(vocab)
    beside = next((f for f in ((folder or place.parent) / name for name in _PILE_FILES) if f.is_file()), None)
    if kind == "20b" or (kind is None and 50_000 < vocab < 52_000 and beside):  # some files round the rows up
        if beside is None:
            raise IncompatibleModel(
                f"This model's vocabulary of {vocab:,} is the Pile's, whose tokenizer is not here.",
                hint="Put 20B_tokenizer.json (from RWKV-LM or GPT-NeoX-20B) into the model's folder.",
            )
        return _json_codec(beside, vocab, folder)
    if kind == "bytes" and vocab >= BYTE_SIZE:
        return byte_codec(), Sidecars(frozenset({0}))  # as in RWKV's other vocabularies; no text holds a zero byte
    if kind == "world" and vocab >= WORLD_SIZE:
        spec = importlib.util.find_spec("rwkv")
        package = Path(spec.origin).parent if spec and spec.origin else Path()
        return world_codec(package / _WORLD_FILE), Sidecars(frozenset({0}), eos=END_OF_TEXT)
    raise IncompatibleModel(
        f"No tokenizer fits a vocabulary of {vocab:,} tokens"
        + (f", least of all {choice!r}." if choice != "auto" else ": World has 65,536, the Pile's 50,277, bytes 256."),
        hint="Put the tokenizer.json it was trained with beside it, in a folder of their own.",
    )


def _json_codec(path: Path, vocab: int, folder: Path | None) -> tuple[TextCodec, Sidecars]:
    from tokenizers import Tokenizer

    try:
        core = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception for everything
        raise CorruptModel(f"{path.name} can't be read: {error}.", hint="Fetch the tokenizer again.") from error
    size = core.get_vocab_size(with_added_tokens=True)
    if size > vocab:
        raise IncompatibleModel(
            f"{path.name} has {size:,} tokens, the model only {vocab:,}.",
            hint="The tokenizer belongs to another model: put the one this model was trained with beside it.",
        )
    sidecars = _sidecars(folder, core)
    bos = core.token_to_id(sidecars.bos) if sidecars.bos else None
    return TextCodec(SimpleNamespace(backend_tokenizer=core, bos_token_id=bos)), sidecars


def _sidecars(folder: Path | None, core: Any) -> Sidecars:
    if folder is None:
        end = core.token_to_id(END_OF_TEXT)
        return Sidecars(frozenset() if end is None else frozenset({end}), eos=None if end is None else END_OF_TEXT)
    config, generation, model = (
        _json(folder / name) for name in ("tokenizer_config.json", "generation_config.json", "config.json")
    )
    jinja = folder / "chat_template.jinja"
    eos = config.get("eos_token")
    tokenizer = SimpleNamespace(
        eos_token_id=core.token_to_id(eos) if isinstance(eos, str) else None,
        chat_template=jinja.read_text(encoding="utf-8") if jinja.is_file() else config.get("chat_template"),
        convert_tokens_to_ids=core.token_to_id,
        unk_token_id=None,
    )
    context = model.get("max_position_embeddings") or config.get("model_max_length")
    return Sidecars(
        end_token_ids(generation.get("eos_token_id"), tokenizer),
        chat_template(tokenizer),
        config.get("bos_token") if isinstance(config.get("bos_token"), str) else None,
        eos if isinstance(eos, str) else None,
        context if isinstance(context, int) and 0 < context < 2**31 else 0,
    )


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CorruptModel(f"{path.name} can't be read: {error}.", hint="Fetch the file again.") from error
    if not isinstance(value, dict):
        raise CorruptModel(f"{path.name} is no JSON object.", hint="Fetch the file again.")
    return value


# --- description ----------------------------------------------------------------------------------------------------


def _describe(
    place: Path,
    options: Mapping[str, Any],
    shape: RwkvShape,
    strategy: str,
    model: Any,
    sidecars: Sidecars,
    torch: Any,
) -> ModelInfo:
    trained = sidecars.context or _DEFAULT_CONTEXT
    context = options["ctx_size"] or trained
    notes: tuple[str, ...] = ()
    if sidecars.context and context > trained:
        notes = (f"The context of {context} is beyond the {trained} tokens the model was trained on.",)
    tensors = list((model.z if shape.version == "7" else model.w).values())
    total = sum(t.numel() * t.element_size() for t in tensors)
    shares: dict[str, float] = {}
    for tensor in tensors:
        name = str(tensor.device)
        shares[name] = shares.get(name, 0.0) + tensor.numel() * tensor.element_size() / max(total, 1)
    number = strategy.split(" ")[1]
    return ModelInfo(
        name=place.name,
        path=str(place),
        loader="rwkv",
        format="rwkv",
        architecture=f"RWKV v{shape.version}",
        quantization=Quantization("int8", 8) if number.endswith("i8") else None,
        dtype={"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}[number[:4]],
        context_length=context,
        vocab_size=shape.vocab,
        chat_template=sidecars.template,
        bos_token=sidecars.bos,
        eos_token=sidecars.eos,
        eos_token_ids=tuple(sorted(i for i in sidecars.eos_ids if 0 <= i < shape.vocab)),
        device_map={name: round(share, 4) for name, share in shares.items()},
        memory_bytes=int(total),
        engine=f"rwkv, torch {torch.__version__}, v{shape.version}, {strategy}",
        notes=notes,
    )
