"""Packed layers of a GPTQ checkpoint inside llama.cpp's converter: as GGUF blocks with the same numbers, or dequantised.

The converter reorders the rows of some weights (queries and keys for its kind of rotary embedding, fused projections, stacks of
experts). What it does to a weight is learned by handing it one whose numbers say where they come from; the packed rows then go
the same way. An architecture that does more than move whole rows is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from modules.convert.children.gptq_blocks import BYTES, Packed, problem, rounded, to_blocks
from modules.convert.gptq import BLOCK, group_size, refused, settings_of
from modules.detect.draft import folder_files
from modules.detect.safetensors_header import Tensor as Entry
from modules.detect.weights import find_weights
from modules.errors import CorruptModel
from modules.quantize._names import names_on_disk
from modules.quantize._packing import unpack_rows, unpack_zeros
from modules.quantize._weights import skeleton
from modules.quantize.layout import LayerLayout, read_layouts

if TYPE_CHECKING:
    from modules.convert.children.report import Report

_PARTS = ("qweight", "qzeros", "scales", "g_idx", "zeros")
_FILE_TYPES = {"Q4_0": "MOSTLY_Q4_0", "Q4_1": "MOSTLY_Q4_1", "Q8_0": "MOSTLY_Q8_0"}


def install(report: Report, folder: Path, kind: str | None) -> None:
    """Make the converter (already on sys.path) take the GPTQ folder. `kind` Q4_0, Q4_1 or Q8_0 keeps the packed numbers."""
    from conversion import ModelBase  # type: ignore[import-not-found]
    from conversion.base import TextModel  # type: ignore[import-not-found]

    names = find_weights(folder, folder_files(folder))
    ModelBase.get_model_part_names = staticmethod(
        lambda folder, prefix, suffix: names if suffix == ".safetensors" and prefix == "model" else []
    )
    ModelBase.dequant_model = lambda self: Layers(report, folder, self, kind).put()
    if kind:
        prepare = TextModel.prepare_metadata

        def prepare_metadata(self: Any, vocab_only: bool) -> None:
            import gguf

            self.ftype = gguf.LlamaFileType[_FILE_TYPES[kind]]
            prepare(self, vocab_only)
            if self.metadata.quantized_by is None:
                self.gguf_writer.add_quantized_by("GPTQ checkpoint, converted without quantising again by Switchyard")

        TextModel.prepare_metadata = prepare_metadata


@dataclass(frozen=True)
class _Rows:
    """Where the rows of one GGUF tensor come from: `layer` and `row`, int arrays over its rows. `shape` is the whole tensor's."""

    name: str
    shape: tuple[int, ...]
    layer: Any
    row: Any


class Layers:
    """The packed layers of the model that the converter holds open."""

    def __init__(self, report: Report, folder: Path, model: Any, kind: str | None) -> None:
        self._report, self._model, self._kind = report, model, kind
        self._settings = settings_of(folder)
        self._tensors: dict[str, Callable[[], Any]] = model.model_tensors
        self._skeleton = skeleton(folder)
        self._names = {key: name for name, key in names_on_disk(self._skeleton, self._plain_names()).items()}
        self._layouts = read_layouts(self._entries(), self._settings, lambda stem: None)

    def put(self) -> None:
        """Give the converter a float weight for every packed layer, or write their blocks and take them out of its hands."""
        self._check_biases()
        sources = {stem: {part: self._tensors.get(f"{stem}.{part}") for part in _PARTS} for stem in self._layouts}
        for stem in self._layouts:
            for part in _PARTS:
                self._tensors.pop(f"{stem}.{part}", None)
        self._sources = sources
        if self._kind is None:
            for stem in self._layouts:
                self._tensors[f"{stem}.weight"] = partial(self._lazy_weight, stem)
            return
        self._check()
        blocks: dict[str, list[str]] = {}
        for stem in self._layouts:
            blocks.setdefault(_block_of(stem), []).append(stem)
        for done, stems in enumerate(blocks.values(), 1):
            for rows in self._moved(stems):
                self._add(stems, rows)
            self._report.stage("Following the rows", done / len(blocks))
        kinds = sorted({self.kind_of(stem) for stem in self._layouts})
        self._report.note(f"{len(self._layouts)} layers became {' and '.join(kinds)} as they are; nothing was quantised again.")

    def kind_of(self, stem: str) -> str:
        """A checkpoint with several widths gets a type for each layer."""
        assert self._kind is not None
        if self._layouts[stem].bits == 8:
            return "Q8_0"
        return "Q4_1" if self._kind == "Q8_0" else self._kind

    # --- reading -----------------------------------------------------------------------------------------------

    def _plain_names(self) -> list[str]:
        packed = ".qweight"
        return [key.removesuffix(packed) + ".weight" if key.endswith(packed) else key for key in self._tensors]

    def _entries(self) -> dict[str, Entry]:
        """The tensors' types and shapes in the form of a file's header."""
        import torch

        names = {torch.int32: "I32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
        entries = {}
        for key, read in self._tensors.items():
            tensor = read()
            entries[key] = Entry(names.get(tensor.dtype, "U8"), tuple(tensor.shape), 0, 0)
        return entries

    def _array(self, stem: str, part: str) -> Any:
        from conversion.base import LazyTorchTensor

        read = self._sources[stem][part]
        assert read is not None
        tensor = LazyTorchTensor.to_eager(read())
        return (tensor.float() if tensor.is_floating_point() else tensor).numpy()

    def _grid(self, stem: str) -> tuple[Any, Any, Any]:
        """(scales, zeros, g_idx) of a layer."""
        layout = self._layouts[stem]
        scales = self._array(stem, "scales").reshape(-1, layout.out_features)
        if layout.zeros == "float":
            zeros = self._array(stem, "zeros").reshape(1, -1) / np.where(scales == 0, 1, scales)
        else:
            zeros = unpack_zeros(self._array(stem, "qzeros"), layout.bits, v1=layout.zeros == "v1").astype(np.float32)
        if layout.has_g_idx:
            g_idx = self._array(stem, "g_idx").reshape(-1).astype(np.int64)
        else:
            g_idx = np.arange(layout.in_features) // group_size(layout, self._settings)
        if not np.isfinite(scales).all() or not np.isfinite(zeros).all():
            raise CorruptModel(f"Tensor {stem}.scales holds NaN or infinite numbers.", hint="Fetch the file again.")
        if g_idx.min() < 0 or g_idx.max() >= layout.groups:
            raise CorruptModel(f"{stem}.g_idx points to group {g_idx.max()} of {layout.groups}.", hint="Fetch the file again.")
        return scales, zeros, g_idx

    def _layer(self, stem: str) -> Packed:
        scales, zeros, g_idx = self._grid(stem)
        bits = self._layouts[stem].bits
        return Packed(unpack_rows(self._array(stem, "qweight"), bits), scales, zeros, g_idx, bits)

    # --- checks ------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        """All that the header does not tell, before anything is written."""
        changed = 0
        for done, (stem, layout) in enumerate(self._layouts.items()):
            self._report.stage("Checking the layers", done / len(self._layouts))
            grid = Packed(np.empty((0, 0), np.uint8), *self._grid(stem), layout.bits)
            reason = problem(grid, self.kind_of(stem))
            if reason:
                raise refused(f"Layer {stem} {reason}")
            changed += rounded(grid, self.kind_of(stem))
        if changed:
            self._report.note(f"Scales or minima of {changed} layers were rounded to float16, by 2⁻¹¹ of their size at most.")

    def _check_biases(self) -> None:
        """AutoGPTQ writes a bias of zeros for every packed layer; llama.cpp takes only those that the model has."""
        from conversion.base import LazyTorchTensor

        for stem in self._layouts:
            name = f"{stem}.bias"
            if name not in self._tensors or name in self._names or f"{stem}.weight" not in self._names:
                continue
            if LazyTorchTensor.to_eager(self._tensors[name]()).count_nonzero():
                raise CorruptModel(
                    f"The file has a bias {name}, the model by its config.json has none.",
                    hint="The weights and config.json do not belong together: fetch both again.",
                )
            del self._tensors[name]

    # --- the converter's order of rows -------------------------------------------------------------------------

    def _transposed(self, stem: str) -> bool:
        """Whether the model keeps this weight as [in, out] (GPT-2's Conv1D)."""
        name = self._names.get(f"{stem}.weight", "").removesuffix(".weight")
        return bool(name) and type(self._skeleton.get_submodule(name)).__name__ == "Conv1D"

    def _moved(self, stems: list[str]) -> Iterator[_Rows]:
        """What the converter makes of the weights `stems` of one block: each row of the result and where it comes from."""
        import torch

        layouts = [self._layouts[stem] for stem in stems]
        first = np.cumsum([0, *(layout.in_features * layout.out_features for layout in layouts)])
        # Element (row, column) of layer l holds first[l] + row · in + column.
        dtype = torch.int32 if first[-1] < 2**31 else torch.int64
        used = [np.zeros(layout.out_features, dtype=np.int64) for layout in layouts]
        for number, (stem, layout) in enumerate(zip(stems, layouts, strict=True)):
            marks = torch.arange(int(first[number]), int(first[number + 1]), dtype=dtype)
            marks = marks.reshape(layout.out_features, layout.in_features)
            weight = marks.T if self._transposed(stem) else marks
            for name, result in self._model.modify_tensors(weight, f"{stem}.weight", _number(stem)):
                yield self._decode(name, result, layouts, first, used)
        if any((count != 1).any() for count in used):
            raise refused(f"llama.cpp's converter does not keep every row of block {_block_of(stems[0])} of this architecture")

    def _decode(self, name: str, result: Any, layouts: list[LayerLayout], first: Any, used: list[Any]) -> _Rows:
        marks = result.reshape(-1, result.shape[-1])
        heads = marks[:, 0].numpy().astype(np.int64)
        layer = np.searchsorted(first, heads, side="right") - 1
        inputs = np.array([layout.in_features for layout in layouts])[layer]
        row, rest = np.divmod(heads - first[layer], inputs)
        whole = (marks[:, :1] + _arange_like(marks)) == marks
        if rest.any() or (inputs != result.shape[-1]).any() or not bool(whole.all()):
            raise refused(f"llama.cpp's converter changes more than the order of the rows of {name}")
        for number, count in enumerate(used):
            np.add.at(count, row[layer == number], 1)
        return _Rows(name, tuple(result.shape), layer, row)

    # --- writing -----------------------------------------------------------------------------------------------

    def _add(self, stems: list[str], rows: _Rows) -> None:
        import gguf

        kinds = {self.kind_of(stems[number]) for number in set(rows.layer.tolist())}
        if len(kinds) > 1:
            raise refused(f"{rows.name} would hold layers of several widths")
        kind = kinds.pop()
        shape = (*rows.shape[:-1], rows.shape[-1] // BLOCK * BYTES[kind])
        data = gguf.LazyNumpyTensor(
            meta=gguf.LazyNumpyTensor.meta_with_dtype_and_shape(np.uint8, shape),
            func=partial(self._blocks, stems, rows, kind, shape),
        )
        self._model.gguf_writer.add_tensor(rows.name, data, raw_dtype=gguf.GGMLQuantizationType[kind])

    def _blocks(self, stems: list[str], rows: _Rows, kind: str, shape: tuple[int, ...]) -> Any:
        data = np.empty((len(rows.row), shape[-1]), dtype=np.uint8)
        for number in np.unique(rows.layer):
            here = rows.layer == number
            data[here] = to_blocks(self._layer(stems[number]), kind, rows.row[here])
        return data.reshape(shape)

    def _lazy_weight(self, stem: str) -> Any:
        """A float32 weight in the model's own form, made when it is written."""
        import torch
        from conversion.base import LazyTorchTensor

        layout = self._layouts[stem]
        flip = self._transposed(stem)
        shape = (layout.in_features, layout.out_features) if flip else (layout.out_features, layout.in_features)

        def weight() -> Any:
            values = self._layer(stem).weight()
            return torch.from_numpy(np.ascontiguousarray(values.T) if flip else values)

        return LazyTorchTensor(meta=LazyTorchTensor.meta_with_dtype_and_shape(torch.float32, shape), func=weight)


def _arange_like(marks: Any) -> Any:
    import torch

    return torch.arange(marks.shape[1], dtype=marks.dtype)


def _number(stem: str) -> int | None:
    return next((int(part) for part in stem.split(".") if part.isdecimal()), None)


def _block_of(stem: str) -> str:
    return str(_number(stem))
