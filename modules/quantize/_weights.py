"""The base model with its tensors left on disk: a skeleton on torch's meta device, filled in part by part.

So quantising needs the memory of one decoder block, not of the model.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from modules.detect.draft import Draft, folder_files
from modules.detect.hf_folder import examine_folder
from modules.detect.weights import find_weights, read_safetensors
from modules.errors import CorruptModel, IncompatibleModel
from modules.quantize._names import names_on_disk

if TYPE_CHECKING:
    from modules.detect.safetensors_header import Tensor as Entry


class BaseModel:
    """A Hugging Face folder opened for quantising. `model` is the skeleton; parameters are on "meta" until filled.

    `entries` maps each tensor on disk to (file, its header entry). Raises LoadError's subclasses.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        draft = Draft()
        examine_folder(folder, draft, deep=True)
        if draft.format != "hf" or draft.quantization:
            raise IncompatibleModel(
                f"{folder.name} is quantised already.", hint="Quantise from the original model in 16 or 32 bits."
            )
        self.entries: dict[str, tuple[Path, Entry]] = {}
        for name in find_weights(folder, folder_files(folder)):
            header = read_safetensors(folder / name)
            self.entries.update({tensor: (folder / name, entry) for tensor, entry in header.tensors.items()})
        self.model = skeleton(folder)
        self._keys = names_on_disk(self.model, self.entries)
        self._open: dict[Path, Any] = {}
        self._check_names()

    def key_of(self, parameter: str) -> str | None:
        """A parameter's name on disk; None when it is not there."""
        return self._keys.get(parameter)

    def read(self, key: str) -> torch.Tensor:
        """One tensor from disk. Raises CorruptModel when it holds NaN or infinity."""
        from safetensors import safe_open

        path, _ = self.entries[key]
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt")
        tensor: torch.Tensor = self._open[path].get_tensor(key)
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CorruptModel(f"Tensor {key} holds numbers that are not finite.", hint="Fetch the base model again.")
        return tensor

    def fill(self, module: torch.nn.Module, name: str, device: Any, dtype: Any) -> None:
        """Read the parameters of `module` (called `name` in the model) from disk, and move its buffers to `device`."""
        for local, parameter in list(module.named_parameters()):
            self._fill_one(module, local, f"{name}.{local}", parameter, device, dtype)
        _move_buffers(module, device)

    def fill_around(self, blocks: str, device: Any, dtype: Any) -> None:
        """Read what the first block's input needs: all that is outside the list called `blocks`, but for the output layer."""
        output = self.model.get_output_embeddings()
        for name, parameter in list(self.model.named_parameters()):
            if not name.startswith(blocks + ".") and (
                output is None or parameter is not output.weight or self._is_input(parameter)
            ):
                self._fill_one(self.model, name, name, parameter, device, dtype)
        _move_buffers(self.model, device)

    def _is_input(self, parameter: torch.nn.Parameter) -> bool:
        return parameter is self.model.get_input_embeddings().weight

    def _fill_one(
        self, module: torch.nn.Module, local: str, full: str, parameter: torch.nn.Parameter, device: Any, dtype: Any
    ) -> None:
        key = self.key_of(full)
        if key is None:
            raise CorruptModel(f"Tensor {full} is missing.", hint="The download is incomplete: fetch the model again.")
        tensor = self.read(key)
        if tensor.shape != parameter.shape:
            raise CorruptModel(
                f"Tensor {key} has the shape {list(tensor.shape)}, config.json wants {list(parameter.shape)}.",
                hint="The weights and config.json do not belong together: fetch both again.",
            )
        _put(module, local, torch.nn.Parameter(tensor.to(device, dtype), requires_grad=False))

    def empty(self, module: torch.nn.Module) -> None:
        """Forget the parameters of `module` again."""
        for local, parameter in list(module.named_parameters()):
            _put(module, local, torch.nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False))
        self._open.clear()  # what was read stays in memory as long as its file is mapped

    def close(self) -> None:
        self._open.clear()

    def _check_names(self) -> None:
        output = self.model.get_output_embeddings()
        for name, parameter in self.model.named_parameters():
            if self.key_of(name) is None and not (output is not None and parameter is output.weight):
                raise IncompatibleModel(
                    f"The model's weights are stored under other names than its code uses (no {name}).",
                    hint="Load it with Transformers and save it again, then quantise that.",
                )


def skeleton(folder: Path) -> Any:
    """The model by its config.json, parameters on the meta device, computed buffers real."""
    import transformers
    from accelerate import init_empty_weights

    transformers.utils.logging.set_verbosity_error()
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    if getattr(config, "is_encoder_decoder", False):
        raise IncompatibleModel(f"{folder.name} has an encoder; only decoder models are quantised.")
    if hasattr(config, "quantization_config"):  # a packed model's plain form, for the converter
        del config.quantization_config
    with init_empty_weights(include_buffers=False):
        model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    model.tie_weights()
    return model.eval()


def _move_buffers(module: torch.nn.Module, device: Any) -> None:
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, buffer.to(device))


def _put(module: torch.nn.Module, local: str, parameter: torch.nn.Parameter) -> None:
    path, _, leaf = local.rpartition(".")
    owner = module.get_submodule(path) if path else module
    setattr(owner, leaf, parameter)
