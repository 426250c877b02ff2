"""Reads a GPTQ checkpoint for `loaders.gptq_for_llama`: the model's skeleton from config.json, the plain tensors, and a kernel
for each packed layer. The packed layers are those that the file holds."""

from __future__ import annotations

import json
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from loaders import _gptq_ends, _hf_load
from loaders._gptq_build import kernel as compiled_kernel
from loaders._gptq_choose import Chooser as Chooser  # the AutoGPTQ loader takes it from here
from loaders._gptq_linear import GptqLinear, int4_works, product_dtype
from loaders._gptq_tensors import unpack
from loaders._hf_text import TextCodec
from loaders._process import memory_given_back
from modules.detect.draft import folder_files, read_json
from modules.detect.sniff import no_model, sniff
from modules.detect.weights import find_weights, read_safetensors
from modules.errors import AppError, CorruptModel, IncompatibleModel, UnsafeModel
from modules.quantize._names import names_on_disk
from modules.quantize.layout import LayerLayout, read_layouts
from modules.schema import LoadProgress, ModelInfo, Quantization

if TYPE_CHECKING:
    from modules.detect.safetensors_header import Tensor as Entry
    from modules.engine import Progress

_PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
_QUANT_FILES = ("quantize_config.json", "quant_config.json")


@dataclass(frozen=True)
class Checkpoint:
    """The files of one model. `entries` maps each tensor to (file, header entry); `settings` is what the quantiser noted."""

    folder: Path
    entries: dict[str, tuple[Path, Entry]]
    settings: dict[str, Any]
    config_json: dict[str, Any]

    def reader(self) -> Callable[[str], Tensor]:
        """A function that reads one tensor; files stay open while it lives."""
        from safetensors import safe_open

        files: dict[Path, Any] = {}

        def read(name: str) -> Tensor:
            path = self.entries[name][0]
            if path not in files:
                files[path] = safe_open(path, framework="pt")
            tensor: Tensor = files[path].get_tensor(name)
            return tensor

        return read


def load(path: str, options: dict[str, Any], progress: Progress) -> _hf_load.Loaded:
    """The model at `path`, a folder or one .safetensors in it. Raises LoadError's subclasses."""
    progress(LoadProgress("Reading the file's header"))
    checkpoint = open_checkpoint(Path(path))
    import transformers

    transformers.utils.logging.set_verbosity_error()
    if options["threads"]:
        torch.set_num_threads(options["threads"])
    folder = str(checkpoint.folder)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        model = skeleton(config)
        device = torch.device("cuda" if torch.cuda.is_available() and not options["cpu"] else "cpu")
        with memory_given_back():
            layouts, choose, used = fill(model, checkpoint, device, options["kernel"], progress)
        model.generation_config = _generation_config(checkpoint.folder, model)
    except AppError:
        raise
    except Exception as error:
        traceback.print_exception(error)
        raise _hf_load.typed(error, checkpoint.config_json, "The checkpoint can't be read") from error
    parts = _hf_load.Parts(path, options, model, tokenizer, config)
    info = _describe(parts, checkpoint.settings, layouts, used, choose)
    return _hf_load.Loaded(model, TextCodec(tokenizer), info, device)


def open_checkpoint(path: Path) -> Checkpoint:
    """Find and check the files. Raises UnsafeModel for a pickle, CorruptModel for what is cut or missing."""
    if path.is_file() and path.suffix.lower() in _PICKLES:
        raise _pickled(path)
    folder = path if path.is_dir() else path.parent
    if path.is_dir() and (path / "config.json").is_file() and not any(path.glob("*.safetensors")):
        pickles = sorted(file for file in path.iterdir() if file.suffix.lower() in _PICKLES)
        if pickles:
            raise _pickled(pickles[0])
    config_json = _hf_load.check_folder(folder)
    if path.is_file():
        kind = sniff(path)
        if kind != "safetensors":
            raise no_model(kind, path.name)
        names = [path.name]
    else:
        names = find_weights(folder, folder_files(folder))
    entries: dict[str, tuple[Path, Entry]] = {}
    for name in names:
        entries.update({key: (folder / name, entry) for key, entry in read_safetensors(folder / name).tensors.items()})
    settings: dict[str, Any] = {}
    inner = config_json.get("quantization_config")
    settings.update(inner if isinstance(inner, dict) else {})
    for name in _QUANT_FILES:
        if (folder / name).is_file():
            for key, value in read_json(folder / name).items():
                settings.setdefault(key, value)
    return Checkpoint(folder, entries, settings, config_json)


def _pickled(path: Path) -> UnsafeModel:
    return UnsafeModel(
        f"{path.name} is a Python pickle, which can run any code when it is opened, so it is refused.",
        hint="Get the checkpoint as .safetensors; or, if you trust this file, "
        f"`server.py convert {path.name} --to safetensors --allow-pickle`.",
    )


def skeleton(config: Any) -> Any:
    """The model without weights (meta device), computed buffers real; its code sees no quantization."""
    import transformers
    from accelerate import init_empty_weights

    if getattr(config, "is_encoder_decoder", False):
        raise IncompatibleModel("The model has an encoder; this runtime runs decoder models.")
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with init_empty_weights(include_buffers=False):
        model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return model.eval()


def fill(
    model: Any, checkpoint: Checkpoint, device: torch.device, kernel: str, progress: Progress
) -> tuple[list[LayerLayout], Chooser, Counter[str]]:
    """Put every tensor of the checkpoint into the model; returns the packed layers, what chose, and how many each kernel runs."""
    packed = ".qweight"
    plain = [key.removesuffix(packed) + ".weight" if key.endswith(packed) else key for key in checkpoint.entries]
    keys = names_on_disk(model, plain)
    where = {key.removesuffix(".weight"): name.removesuffix(".weight") for name, key in keys.items() if name.endswith(".weight")}
    modules = dict(model.named_modules())

    def module_of(stem: str) -> nn.Module | None:
        return modules.get(where.get(stem, ""))

    def width(stem: str) -> int | None:
        found = module_of(stem)
        weight = getattr(found, "weight", None)
        if weight is None or weight.dim() != 2:
            raise CorruptModel(
                f"The file has a packed layer {stem}, the model by its config.json has none.",
                hint="The weights and config.json do not belong together: fetch both again.",
            )
        return int(weight.shape[0] if type(found).__name__ == "Conv1D" else weight.shape[1])

    layouts = read_layouts({name: entry for name, (_, entry) in checkpoint.entries.items()}, checkpoint.settings, width)
    read = checkpoint.reader()
    sym = checkpoint.settings.get("sym")
    choose = Chooser(kernel, device, layouts, lambda line: progress(LoadProgress(line)))
    used: Counter[str] = Counter()
    for number, layout in enumerate(layouts.values()):
        progress(LoadProgress("Unpacking layers", number / len(layouts)))
        old = module_of(layout.name)
        outputs = old.weight.shape[1 if type(old).__name__ == "Conv1D" else 0]  # type: ignore[union-attr,index]
        if outputs != layout.out_features:
            raise CorruptModel(
                f"Tensor {layout.name}.qweight has {layout.out_features} outputs, the model's layer has {outputs}.",
                hint="The weights and config.json do not belong together: fetch both again.",
            )
        new = choose(unpack(layout, read, sym if isinstance(sym, bool) else None)).to(device)
        used[new.kernel] += 1
        model.set_submodule(where[layout.name], new)
    progress(LoadProgress("Reading the other tensors", 1.0))
    on_cpu = device.type == "cpu"
    _fill_plain(model, keys, read, device, _gptq_ends.kept_as_stored(model, choose.wanted) if on_cpu else frozenset())
    if on_cpu and _gptq_ends.finish(model, choose.wanted):
        used["output"] += 1
    return list(layouts.values()), choose, used


def _fill_plain(
    model: Any,
    keys: dict[str, str],
    read: Callable[[str], Tensor],
    device: torch.device,
    as_stored: frozenset[str],
) -> None:
    model.tie_weights()
    output = model.get_output_embeddings()
    for name, parameter in list(model.named_parameters()):
        key = keys.get(name)
        tied = bool(model.config.get_text_config(decoder=True).tie_word_embeddings)
        if key is None and tied and output is not None and parameter is getattr(output, "weight", None):
            output.weight = nn.Parameter(model.get_input_embeddings().weight.detach(), requires_grad=False)
            continue
        if key is None:
            raise CorruptModel(f"Tensor {name} is missing.", hint="The download is incomplete: fetch the model again.")
        tensor = read(key)
        if tensor.shape != parameter.shape:
            raise CorruptModel(
                f"Tensor {key} has the shape {list(tensor.shape)}, config.json wants {list(parameter.shape)}.",
                hint="The weights and config.json do not belong together: fetch both again.",
            )
        owner = model.get_submodule(name.rpartition(".")[0])
        keep = name in as_stored and tensor.dtype.itemsize == 2
        held = tensor.clone() if keep else tensor.to(device, dtype_on(device))
        setattr(owner, name.rpartition(".")[2], nn.Parameter(held, requires_grad=False))
    model.tie_weights()
    for part in model.modules():
        if not isinstance(part, GptqLinear):
            for name, buffer in part.named_buffers(recurse=False):
                setattr(part, name, buffer.to(device))


_SAYS = {
    "int8": "packed, int8 activations (own kernel)",
    "exact": "packed, float32 activations (own kernel, exact)",
    "int4": "packed int4, bf16 activations",
    "dense": "dequantised to float32 at load (exact)",
    "unpack": "dequantised at each call (exact)",
    "triton": "Triton",
    "output": "(output) rounded to 8 bits",
}


def _describe(
    parts: _hf_load.Parts, settings: dict[str, Any], layouts: list[LayerLayout], used: Counter[str], choose: Chooser
) -> ModelInfo:
    packed = [module for module in parts.model.modules() if isinstance(module, GptqLinear)]
    kernels = ", ".join(f"{count} layer{'s' * (count > 1)} {_SAYS[name]}" for name, count in used.most_common())
    device = choose.device
    capability = torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else torch.cuda.get_device_name(device)
    notes = [f"{reason[0].upper()}{reason[1:]}." for reason in choose.reasons]
    if used["int8"] or used["exact"]:
        capability = compiled_kernel().instructions
    if used["int4"]:
        notes.append(f"Long prompts are multiplied in {str(product_dtype()).removeprefix('torch.')}.")
    elif used["unpack"] and device.type == "cpu" and not int4_works():
        notes.append("Packed layers are dequantised at each call, which is slow.")
    return parts.info(
        loader="gptq_for_llama",
        quantization=Quantization(
            "gptq",
            bits=max(layout.bits for layout in layouts),
            group_size=-1 if layouts[0].groups == 1 else layouts[0].group_size,
            desc_act=any(module.perm is not None for module in packed) or bool(settings.get("desc_act")),
            sym=settings.get("sym"),
        ),
        engine=f"GPTQ runtime, torch {torch.__version__}, {capability}: {kernels}",
        notes=notes,
        **on_one_device(parts.model, device),
    )


def on_one_device(model: Any, device: torch.device) -> dict[str, Any]:
    """What a GPTQ model's ModelInfo says of where it is and in which numbers."""
    return {
        "format": "gptq",
        "dtype": str(dtype_on(device)).removeprefix("torch."),
        "device_map": {str(device): 1.0},
        "memory_bytes": sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()]),
    }


def dtype_on(device: torch.device) -> torch.dtype:
    """Of the tensors that are not packed, and of what the layers compute in."""
    return torch.float32 if device.type == "cpu" else torch.float16


def _generation_config(folder: Path, model: Any) -> Any:
    from transformers import GenerationConfig

    if not (folder / "generation_config.json").is_file():
        return model.generation_config
    try:
        return GenerationConfig.from_dict(json.loads((folder / "generation_config.json").read_text(encoding="utf-8-sig")))
    except (ValueError, TypeError) as error:
        raise CorruptModel(f"generation_config.json can't be used: {error}.", hint="Fetch it again or delete it.") from error
