"""A whole model, block after block. What is done stays done: each block's tensors are a file in the work folder.

    .NAME.part/state.json           settings, hashes of base and calibration: what the files beside it belong to
    .NAME.part/block-0003.safetensors + .json    one finished block and its losses
    .NAME.part/model/               the checkpoint while it is put together; renamed to NAME when whole

Peak memory: the embeddings, one block in float32, its calibration inputs and the layer at work.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from modules.errors import AppError, Conflict, IncompatibleModel, InvalidParameter, StorageFull
from modules.quantize import _tree as tree
from modules.quantize._calibration import Calibration, read_calibration
from modules.quantize._checkpoint import (
    Source,
    layer_tensors,
    stored_dtype,
    write_configs,
    write_json,
    write_safetensors,
    write_weights,
)
from modules.quantize._gptq import QuantizedLayer, quantize_group, quantize_rtn
from modules.quantize._packing import unpack_rows, unpack_zeros
from modules.quantize._weights import BaseModel
from modules.quantize.settings import QuantizeSettings, check_layer, check_settings

if TYPE_CHECKING:
    from torch import Tensor

OnEvent = Callable[[dict[str, Any]], None]
_BATCH_TOKENS = 4096


@dataclass
class Job:
    """One quantisation. `device`: cpu, cuda or cuda:N. `resume` False starts over."""

    base: Path
    out: Path
    settings: QuantizeSettings
    device: str = "cpu"
    resume: bool = True
    overwrite: bool = False

    @property
    def work(self) -> Path:
        return self.out.with_name(f".{self.out.name}.part")


@dataclass
class _Hidden:
    """The calibration's hidden states in front of a block, in batches, and each block's other arguments per batch size."""

    batches: list[Tensor] = field(default_factory=list)
    arguments: dict[int, list[tree.Arguments]] = field(default_factory=dict)


def run(job: Job, on_event: OnEvent) -> dict[str, Any]:
    """Make the checkpoint; returns {path, size_bytes, seconds, mean_loss}. Raises AppError's subclasses.

    Events: {"stage"}, {"note"}, {"block", "blocks", "layer", "loss", "damp", "fraction", "eta_s"} after each layer.
    """
    started = time.monotonic()
    check_settings(job.settings)
    if job.out.exists() and not job.overwrite:
        raise Conflict(f"{job.out.name} exists already.", hint="Give another name with --out, or --overwrite.")
    if not job.base.is_dir():
        raise InvalidParameter(f"{job.base} is no folder.", hint="Give a folder with config.json and *.safetensors.")
    on_event({"stage": "Reading the model's structure"})
    base = BaseModel(job.base)
    blocks = tree.find_blocks(base.model)
    _check_layers(blocks, job.settings)
    _ask_for_space(job, base, blocks)
    calibration = _calibration(base, job, on_event) if job.settings.method == "gptq" else None
    on_event({"stage": "Hashing the base model"})
    state = _state(job, base, calibration)
    _open_work(job, state, on_event)
    with torch.inference_mode():
        _Run(job, base, blocks, calibration, on_event).blocks_in_turn()
    on_event({"stage": "Writing the checkpoint", "fraction": 1.0})
    result = _assemble(job, base, blocks, state)
    base.close()
    return result | {"seconds": round(time.monotonic() - started, 1)}


def _check_layers(blocks: tree.Blocks, settings: QuantizeSettings) -> None:
    for name, layer in tree.linears(blocks.modules[0]).items():
        rows, columns = tree.weight_in_out(layer).shape
        check_layer(f"{blocks.name}.0.{name}", rows, columns, settings)


def _ask_for_space(job: Job, base: BaseModel, blocks: tree.Blocks) -> None:
    """Raise StorageFull now rather than after hours: the finished blocks and the result are on the disk at once."""
    bits, size = job.settings.bits, job.settings.group_size
    packed = elements = 0
    for block in blocks.modules:
        for layer in tree.linears(block).values():
            rows, columns = tree.weight_in_out(layer).shape
            groups = rows // size if size > 0 else 1
            packed += rows * columns * bits // 8 + groups * columns * (2 + bits // 8 + 1) + rows * 4
            elements += rows * columns
    rest = sum(entry.elements for _, entry in base.entries.values()) - elements
    there = sum(path.stat().st_size for path in job.work.glob("block-*")) if job.work.is_dir() and job.resume else 0
    needed = 2 * packed + 2 * max(rest, 0) - there
    folder = next(parent for parent in job.out.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StorageFull(
            f"Quantising needs about {needed / 1e6:,.0f} MB in {folder}, the disk has {free / 1e6:,.0f} MB free.",
            hint="Free some space, or choose a folder on another disk with --out.",
        )


def _calibration(base: BaseModel, job: Job, on_event: OnEvent) -> Calibration:
    import transformers

    on_event({"stage": "Reading the calibration text"})
    tokenizer = transformers.AutoTokenizer.from_pretrained(job.base, trust_remote_code=False, local_files_only=True)
    context = int(getattr(base.model.config, "max_position_embeddings", 0) or job.settings.seqlen)
    calibration = read_calibration(tokenizer, job.settings, context)
    for note in calibration.notes:
        on_event({"note": note})
    return calibration


# --- the work folder -------------------------------------------------------------------------------------------


def _state(job: Job, base: BaseModel, calibration: Calibration | None) -> dict[str, Any]:
    settings = job.settings.to_dict()
    settings.pop("calibration")
    return {
        "version": 1,
        "settings": settings,
        "base": {"name": job.base.name, "sha256": _hash_files(sorted({path for path, _ in base.entries.values()}))},
        "calibration": None
        if calibration is None
        else {
            "name": calibration.name,
            "sha256": calibration.sha256,
            "windows": list(calibration.windows.shape),
            "tokens": calibration.tokens,
        },
    }


def _hash_files(paths: list[Path]) -> dict[str, str]:
    hashes = {}
    for path in paths:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
        hashes[path.name] = digest.hexdigest()
    return hashes


def _open_work(job: Job, state: dict[str, Any], on_event: OnEvent) -> None:
    """Make the work folder, or go on with the one that is there when it belongs to the very same job."""
    marker = job.work / "state.json"
    if job.work.exists() and job.resume and marker.is_file():
        if json.loads(marker.read_text(encoding="utf-8")) == state:
            done = len(list(job.work.glob("block-*.json")))
            on_event({"note": f"Going on where an earlier run stopped: {done} blocks are done."})
            return
        on_event({"note": "An earlier, unfinished run had other settings or another base: starting over."})
    if job.work.exists():
        shutil.rmtree(job.work)
    job.work.mkdir(parents=True)
    write_json(marker, state)


# --- blocks ----------------------------------------------------------------------------------------------------


class _Run:
    """The loop over the blocks."""

    def __init__(
        self, job: Job, base: BaseModel, blocks: tree.Blocks, calibration: Calibration | None, on_event: OnEvent
    ) -> None:
        self._job, self._base, self._blocks, self._on_event = job, base, blocks, on_event
        self._calibration = calibration
        self._device = torch.device(job.device)
        # On a CPU half precision is slow and gains nothing here; on a GPU the checkpoint's own type is the usual one.
        self._dtype = torch.float32 if self._device.type == "cpu" else base.model.dtype
        self._names = list(tree.linears(blocks.modules[0]))
        self._orders: dict[Any, list[list[str]]] = {}
        self._v1 = job.settings.checkpoint_format == "gptq"
        self._fresh = 0
        self._clock = time.monotonic()

    def blocks_in_turn(self) -> None:
        hidden = self._first_inputs() if self._calibration is not None else None
        count = len(self._blocks.modules)
        for index in range(count):
            name = f"{self._blocks.name}.{index}"
            block = self._blocks.modules[index]
            done = self._job.work / f"block-{index:04}"
            if hidden is None and done.with_suffix(".json").is_file():
                continue
            self._base.fill(block, name, self._device, self._dtype)
            if done.with_suffix(".json").is_file():
                self._on_event({"stage": f"Block {index + 1} of {count} was done before", "fraction": (index + 1) / count})
                self._put_back(block, name, done)
            elif hidden is None:
                self._finish(index, block, self._round(index, block))
            else:
                self._finish(index, block, self._quantize(index, block, hidden))
            if hidden is not None and index + 1 < count:
                hidden.batches = [tree.run_block(block, batch, hidden.arguments[len(batch)][index]) for batch in hidden.batches]
            self._base.empty(block)

    def _first_inputs(self) -> _Hidden:
        self._on_event({"stage": "Running the calibration text through the embeddings"})
        assert self._calibration is not None
        self._base.fill_around(self._blocks.name, self._device, self._dtype)
        first = self._blocks.modules[0]
        self._base.fill(first, f"{self._blocks.name}.0", self._device, self._dtype)
        windows = self._calibration.windows.to(self._device)
        hidden = _Hidden()
        for batch in windows.split(max(1, _BATCH_TOKENS // windows.shape[1])):
            states, arguments = tree.record_inputs(self._base.model, self._blocks, batch)
            hidden.batches.append(states)
            hidden.arguments.setdefault(len(batch), arguments)
        self._base.empty(self._base.model)  # embeddings are of no more use
        return hidden

    def _round(self, index: int, block: torch.nn.Module) -> dict[str, QuantizedLayer]:
        layers = {}
        for name, module in tree.linears(block).items():
            layers[name] = quantize_rtn(tree.weight_in_out(module), self._job.settings)
            self._report(index, name, layers[name])
        return layers

    def _quantize(self, index: int, block: torch.nn.Module, hidden: _Hidden) -> dict[str, QuantizedLayer]:
        kinds = tuple((name, type(module)) for name, module in tree.linears(block).items())
        if kinds not in self._orders:
            first = hidden.batches[0]
            self._orders[kinds] = tree.call_order(block, first, hidden.arguments[len(first)][index])
        groups = self._orders[kinds]
        layers: dict[str, QuantizedLayer] = {}
        steps = [[group] for group in groups] if self._job.settings.true_sequential else [groups]
        for step in steps:
            moments = self._moments(index, block, hidden, step)
            for number, group in enumerate(step):
                for name, layer in self._group(index, block, group, moments.take_mean(number)).items():
                    layers[name] = layer
                    tree.set_weight_in_out(block.get_submodule(name), layer.weight())
                    self._report(index, name, layer)
        for name in self._names:
            if name not in layers:  # an expert that no calibration token reached
                module = tree.linears(block)[name]
                layers[name] = quantize_rtn(tree.weight_in_out(module), self._job.settings)
                tree.set_weight_in_out(module, layers[name].weight())
                self._on_event({"note": f"{name} of block {index} saw no calibration token: rounded to nearest."})
                self._report(index, name, layers[name])
        return layers

    def _group(self, index: int, block: torch.nn.Module, names: list[str], moments: Tensor) -> dict[str, QuantizedLayer]:
        """The layers `names`, which have the same inputs."""
        try:
            weights = [tree.weight_in_out(block.get_submodule(name)) for name in names]
            return dict(zip(names, quantize_group(weights, moments, self._job.settings), strict=True))
        except AppError as error:
            error.message = f"Layer {self._blocks.name}.{index}.{names[0]}: {error.message}"
            raise

    def _moments(self, index: int, block: torch.nn.Module, hidden: _Hidden, step: list[list[str]]) -> tree.Moments:
        moments = tree.Moments(block, step, stop_early=True)
        try:
            for batch in hidden.batches:
                try:
                    tree.run_block(block, batch, hidden.arguments[len(batch)][index])
                except tree.StopForward:
                    continue
        finally:
            moments.close()
        return moments

    def _finish(self, index: int, block: torch.nn.Module, layers: dict[str, QuantizedLayer]) -> None:
        """Write the block: its tensors, then the losses, whose file says that the block is whole."""
        name = f"{self._blocks.name}.{index}"
        tensors: dict[str, Tensor] = {}
        for local, layer in layers.items():
            module = block.get_submodule(local)
            stem = self._stem(f"{name}.{local}")
            bias = module.bias if isinstance(module.bias, torch.Tensor) else None
            tensors.update(layer_tensors(stem, layer, bias, self._job.settings.bits, v1=self._v1))
        done = self._job.work / f"block-{index:04}"
        sources = [Source(key, t.dtype, tuple(t.shape), partial(_same, t)) for key, t in tensors.items()]
        write_safetensors(done.with_suffix(".safetensors"), sources)
        losses = {local: {"loss": layer.loss, "damp": layer.damp} for local, layer in layers.items()}
        write_json(done.with_suffix(".json"), losses)

    def _put_back(self, block: torch.nn.Module, name: str, done: Path) -> None:
        """A block that an earlier run finished: its weights as they are in the file, for the inputs of the next block."""
        from safetensors.torch import load_file

        bits = self._job.settings.bits
        tensors = load_file(done.with_suffix(".safetensors"))
        for local in self._names:
            stem = self._stem(f"{name}.{local}")
            layer = QuantizedLayer(
                torch.from_numpy(unpack_rows(tensors[f"{stem}.qweight"].numpy(), bits)),
                tensors[f"{stem}.scales"],
                torch.from_numpy(unpack_zeros(tensors[f"{stem}.qzeros"].numpy(), bits, v1=self._v1)),
                tensors[f"{stem}.g_idx"],
                0.0,
            )
            tree.set_weight_in_out(block.get_submodule(local), layer.weight().to(self._device))

    def _stem(self, name: str) -> str:
        key = self._base.key_of(f"{name}.weight")
        assert key is not None
        return key.removesuffix(".weight")

    def _report(self, index: int, name: str, layer: QuantizedLayer) -> None:
        self._fresh += 1
        per_block, count = len(self._names), len(self._blocks.modules)
        position = index * per_block + self._names.index(name) + 1
        finished = len(list(self._job.work.glob("block-*.json"))) * per_block
        left = max(count * per_block - finished - (self._fresh - 1) % per_block - 1, 0)
        pace = (time.monotonic() - self._clock) / self._fresh
        self._on_event(
            {
                "block": index + 1,
                "blocks": count,
                "layer": name,
                "loss": layer.loss,
                "damp": layer.damp,
                "fraction": min(position / (count * per_block), 1.0),
                "eta_s": round(pace * left, 1),
            }
        )


def _same(tensor: Tensor) -> Tensor:
    return tensor


# --- the result ------------------------------------------------------------------------------------------------


def _assemble(job: Job, base: BaseModel, blocks: tree.Blocks, state: dict[str, Any]) -> dict[str, Any]:
    folder = job.work / "model"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    sources: list[Source] = []
    replaced: set[str] = set()
    losses: dict[str, Any] = {}
    for index, block in enumerate(blocks.modules):
        name = f"{blocks.name}.{index}"
        for local in tree.linears(block):
            for leaf in ("weight", "bias"):
                key = base.key_of(f"{name}.{local}.{leaf}")
                if key is not None:
                    replaced.add(key)
        done = job.work / f"block-{index:04}"
        losses |= {f"{name}.{k}": v for k, v in json.loads(done.with_suffix(".json").read_text(encoding="utf-8")).items()}
        sources.extend(_sources_in(done.with_suffix(".safetensors")))
    for key in base.entries:
        if key not in replaced:
            tensor_dtype, shape = _entry(base, key)
            sources.append(Source(key, stored_dtype(tensor_dtype), shape, partial(base.read, key)))
    if not losses:
        raise IncompatibleModel("The model has no layer to quantise.")
    write_weights(folder, sources)
    mean = sum(entry["loss"] for entry in losses.values()) / len(losses)
    write_configs(folder, job.base, job.settings, state | {"tool": "Switchyard 0.1.0", "mean_loss": mean, "layers": losses})
    if job.out.exists():
        os.replace(job.out, job.work / "replaced")
    os.replace(folder, job.out)
    shutil.rmtree(job.work)
    size = sum(path.stat().st_size for path in job.out.iterdir())
    return {"path": str(job.out), "size_bytes": size, "mean_loss": mean, "layers": len(losses)}


_TORCH = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def _entry(base: BaseModel, key: str) -> tuple[torch.dtype, tuple[int, ...]]:
    entry = base.entries[key][1]
    if entry.dtype not in _TORCH:
        raise IncompatibleModel(f"Tensor {key} is of type {entry.dtype}, which a GPTQ checkpoint does not hold.")
    return _TORCH[entry.dtype], entry.shape


def _sources_in(path: Path) -> list[Source]:
    from modules.detect.weights import read_safetensors

    header = read_safetensors(path)
    return [Source(key, _TORCH[e.dtype], e.shape, partial(_read_one, path, key)) for key, e in header.tensors.items()]


def _read_one(path: Path, key: str) -> Tensor:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(key)
        return tensor
