"""Reads a GPTQ checkpoint through auto-gptq or GPTQModel, whichever is installed, and puts this product's kernels in.

Which layers are packed, and how, is read from the file's header first (modules.quantize.layout), so that what the package would
get wrong in silence is refused, or put right by our kernels: auto-gptq 0.7.1 knows one zero convention only.
"""

from __future__ import annotations

import importlib.util
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from loaders import _hf_compat, _hf_load
from loaders._gptq_load import Checkpoint, Chooser, dtype_on, on_one_device, open_checkpoint
from loaders._gptq_tensors import unpack
from loaders._hf_text import TextCodec
from loaders._process import memory_given_back
from loaders.autogptq import PACKAGE_KERNEL
from modules.detect.weights import INDEX
from modules.errors import AppError, BackendUnavailable, CorruptModel, IncompatibleModel
from modules.quantize.layout import LayerLayout, read_layouts
from modules.schema import LoadProgress, ModelInfo, Quantization

if TYPE_CHECKING:
    from modules.engine import Progress

Package = Literal["auto-gptq", "gptqmodel"]
_INSTEAD = "Load it with GPTQ-for-LLaMA, which reads it."


@dataclass(frozen=True)
class Packed:
    """What the file holds: its packed layers by name, and the settings they have in common."""

    layouts: dict[str, LayerLayout]
    bits: int
    group_size: int
    desc_act: bool
    sym: bool


def load(path: str, options: dict[str, Any], progress: Progress) -> _hf_load.Loaded:
    """The model at `path`, a folder or one .safetensors in it. Raises LoadError's subclasses."""
    progress(LoadProgress("Reading the file's header"))
    checkpoint = open_checkpoint(Path(path))
    package = installed_package()
    packed = read_packed(checkpoint)
    own = options["kernel"] == PACKAGE_KERNEL
    if own:
        check_own_kernel(packed, package)
    if options["threads"]:
        torch.set_num_threads(options["threads"])
    device = torch.device("cuda" if torch.cuda.is_available() and not options["cpu"] else "cpu")
    progress(LoadProgress(f"Starting {package}"))
    try:
        import transformers

        transformers.utils.logging.set_verbosity_error()
        tokenizer = _hf_compat.read_tokenizer(checkpoint.folder)
        config = _hf_compat.read_config(checkpoint.folder)
        progress(LoadProgress("Reading weights"))
        with memory_given_back():  # else the package's layers stay beside ours
            model = _through_package(package, checkpoint, packed, config, device if own else torch.device("cpu"))
            used = Counter({PACKAGE_KERNEL: len(packed.layouts)})
            if not own:
                for parameter in model.parameters():  # not the buffers: computed ones stay in float32
                    parameter.data = parameter.data.to(device, dtype_on(device))
                used = swap(model, package, checkpoint, packed, Chooser(options["kernel"], device, packed.layouts), progress)
                if device.type != "cpu":  # a kernel on the CPU holds the addresses of its tensors: nothing may move them
                    model.to(device)
        _generation_config(checkpoint.folder, model)
    except AppError:
        raise
    except Exception as error:
        traceback.print_exception(error)
        raise _hf_load.typed(error, checkpoint.config_json, f"{package} can't read the checkpoint") from error
    model.eval()
    info = _describe(_hf_load.Parts(path, options, model, tokenizer, config), packed, package, used, device)
    return _hf_load.Loaded(model, TextCodec(tokenizer), info, device)


def installed_package() -> Package:
    """The package this environment holds; auto-gptq where both are."""
    if importlib.util.find_spec("auto_gptq"):
        return "auto-gptq"
    if importlib.util.find_spec("gptqmodel"):
        return "gptqmodel"
    raise BackendUnavailable("Neither auto-gptq nor GPTQModel is installed.", hint="Install AutoGPTQ from the Models tab.")


# --- what the file holds ---------------------------------------------------------------------------------------


def read_packed(checkpoint: Checkpoint) -> Packed:
    """The packed layers, checked against what the packages can hold: one width and one group size for all of them."""
    entries = {name: entry for name, (_, entry) in checkpoint.entries.items()}
    layouts = read_layouts(entries, checkpoint.settings, lambda _: None)
    if any(layout.zeros == "float" for layout in layouts.values()):
        raise IncompatibleModel("The file is of GPTQ's oldest layout (float zeros), which auto-gptq can't read.", hint=_INSTEAD)
    bits = {layout.bits for layout in layouts.values()}
    if len(bits) > 1:
        raise IncompatibleModel(
            f"The layers are of {' and '.join(map(str, sorted(bits)))} bits; auto-gptq takes one width for all.", hint=_INSTEAD
        )
    groups = {-1 if layout.groups == 1 else layout.group_size for layout in layouts.values()}
    if len(groups) > 1 and groups - {-1} == {max(groups)}:
        groups.discard(-1)  # a layer no wider than one group
    if len(groups) > 1:
        raise IncompatibleModel("The layers have groups of different sizes; auto-gptq takes one size.", hint=_INSTEAD)
    order = ordered(layouts, checkpoint.reader())
    return Packed(layouts, bits.pop(), groups.pop(), order, bool(checkpoint.settings.get("sym", True)))


def ordered(layouts: Mapping[str, LayerLayout], read: Callable[[str], Tensor]) -> bool:
    """Whether any layer's inputs are out of their groups' order (act-order): the file says it, settings may not."""
    for layout in layouts.values():
        if layout.has_g_idx and layout.groups > 1:
            regular = torch.arange(layout.in_features) // layout.group_size
            if not torch.equal(read(f"{layout.name}.g_idx").reshape(-1).long(), regular):
                return True
    return False


def check_own_kernel(packed: Packed, package: Package) -> None:
    """Raise IncompatibleModel where the package's own kernel would compute something else than the file means."""
    if package == "auto-gptq" and any(layout.zeros == "v2" for layout in packed.layouts.values()):
        raise IncompatibleModel(
            "The file is of format gptq_v2, which auto-gptq's kernel would read with wrong zero points.",
            hint="Leave the option kernel at auto.",
        )


# --- through the package ---------------------------------------------------------------------------------------


def _through_package(package: Package, checkpoint: Checkpoint, packed: Packed, config: Any, device: torch.device) -> Any:
    if package == "gptqmodel":
        from loaders import _autogptq_successor

        return _autogptq_successor.load(checkpoint, device)
    from loaders import _autogptq_package

    if hasattr(config, "quantization_config"):
        del config.quantization_config
    quantization = {
        "bits": packed.bits, "group_size": packed.group_size, "desc_act": packed.desc_act, "sym": packed.sym,
        "damp_percent": 0.01, "model_name_or_path": str(checkpoint.folder),
    }  # fmt: skip
    where = "cuda:0" if device.type == "cuda" else "cpu"
    return _autogptq_package.load(checkpoint.folder, _file(checkpoint), config, quantization, dtype_on(device), where)


def _file(checkpoint: Checkpoint) -> str:
    """The name of the one file, or of the index of several."""
    names = {path.name for path, _ in checkpoint.entries.values()}
    if len(names) == 1:
        return names.pop()
    if not (checkpoint.folder / INDEX).is_file():
        raise CorruptModel(f"The weights are {len(names)} files without {INDEX}.", hint="Fetch that file into the folder.")
    return INDEX


def swap(
    model: Any, package: Package, checkpoint: Checkpoint, packed: Packed, choose: Chooser, progress: Progress
) -> Counter[str]:
    """Replace every packed layer of the package by one of our kernels; how many each kernel runs.

    From auto-gptq the tensors it loaded are taken, layer by layer, so that no more than one is in memory twice. GPTQModel repacks
    them as it loads: there they come from the file.
    """
    used: Counter[str] = Counter()
    from_file = checkpoint.reader()
    sym = checkpoint.settings.get("sym")
    modules = dict(model.named_modules())
    for number, layout in enumerate(packed.layouts.values()):
        progress(LoadProgress("Putting kernels in", number / len(packed.layouts)))
        name = module_name(layout.name, modules, model.base_model_prefix)
        old = modules.pop(name)
        if not hasattr(old, "qweight"):
            raise IncompatibleModel(f"{package} does not take the packed layer {layout.name}.", hint=_INSTEAD)
        if package == "auto-gptq":
            read: Callable[[str], Tensor] = _Buffers(old)
            layout = replace(layout, has_g_idx=True, has_bias=old.bias is not None)
        else:
            read = from_file
        new = choose(unpack(layout, read, sym if isinstance(sym, bool) else None)).to(choose.device)
        used[new.kernel] += 1
        model.set_submodule(name, new)
    return used


def module_name(key: str, modules: Mapping[str, Any], prefix: str) -> str:
    """The module of a tensor's stem: transformers adds or drops the base model's prefix for some architectures."""
    for name in (key, f"{prefix}.{key}", key.removeprefix(f"{prefix}.")):
        if name in modules:
            return name
    raise CorruptModel(
        f"The file has a packed layer {key}, the model by its config.json has none.",
        hint="The weights and config.json do not belong together: fetch both again.",
    )


class _Buffers:
    """Reads "LAYER.qweight" and so on from a module."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __call__(self, name: str) -> Tensor:
        found = getattr(self._module, name.rpartition(".")[2])
        assert isinstance(found, Tensor)
        return found.detach()


# --- what was loaded -------------------------------------------------------------------------------------------


def _generation_config(folder: Path, model: Any) -> None:
    if (folder / "generation_config.json").is_file():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)


def runs_through(package: Package) -> str:
    """For people: which package has read the model, and why this one."""
    version = metadata.version(package)
    if package == "auto-gptq":
        return f"auto-gptq {version}"
    return f"GPTQModel {version}"


def _describe(parts: _hf_load.Parts, packed: Packed, package: Package, used: Counter[str], device: torch.device) -> ModelInfo:
    notes = []
    if package == "gptqmodel":
        notes.append("Read by GPTQModel, auto-gptq's successor: auto-gptq has no wheel for this Python or machine.")
    if used[PACKAGE_KERNEL] and device.type == "cpu":
        notes.append("The package's own kernel dequantises every layer for every token: very slow on a CPU.")
    kernels = ", ".join(f"{count} layers by {name}" for name, count in used.most_common())
    return parts.info(
        loader="autogptq",
        quantization=Quantization("gptq", packed.bits, packed.group_size, packed.desc_act, packed.sym),
        engine=f"{runs_through(package)}, torch {torch.__version__}: {kernels}",
        notes=notes,
        **on_one_device(parts.model, device),
    )
