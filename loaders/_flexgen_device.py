"""FlexGen's package, as this product drives it: what is replaced in it, at run time and in its worker only.

On every machine: arrays on disk are read from the model's own folder instead of being copied to the offload folder; no download
is ever tried; the copy threads' relay buffer has the size of the largest tensor instead of 2 GiB each.

Without CUDA the package can't even start. There its "GPU" becomes `HostDevice`: main memory holding float32, ready to compute.
What it calls the CPU stays what it is: main memory holding compact float16 (or 4 bits), a layer of which is expanded when its
turn comes. Streams become nothing, and disk reads still overlap the arithmetic, in FlexGen's copy threads.

What it relies on in the package is in `_flexgen_package.FINGERPRINTS`; another flexgen than that is refused.
"""

from __future__ import annotations

import contextlib
import errno
import os
import types
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from flexgen import compression, flex_opt
from flexgen import pytorch_backend as backend

from modules.errors import StorageFull

if TYPE_CHECKING:
    import queue

_READ_BYTES = 4 << 20


# --- main memory as the computing device ---------------------------------------------------------------------------


class HostCompressed(compression.TorchCompressedDevice):
    """4-bit tensors of a HostDevice. The package's own unpacking on a CPU needs a workspace that only caches get."""

    def decompress(self, tensor: Any) -> Any:
        """The values in float32, in the tensor's logical shape."""
        data, scale, config = tensor.data
        size, dim = config.group_size, config.group_dim
        shape = list(tensor.shape)
        packed = data.data
        groups = packed.shape[dim] // (size // 2)
        lead, tail = list(packed.shape[:dim]), list(packed.shape[dim + 1 :])
        packed = packed.reshape(*lead, groups, size // 2, *tail)
        # Two values to a byte, the first in the upper half.
        values = torch.stack((packed >> 4, packed & 0xF), dim=dim + 2).reshape(*lead, groups, size, *tail).float()
        factor, low = scale.data.float().split(1, dim=dim + 1)
        values = values.div_(factor).add_(low).reshape(*lead, groups * size, *tail)
        return values.narrow(dim, 0, shape[dim]).reshape(shape)


class Spares:
    """Memory of expanded weights, used again for the next layer's: the kernel takes five times as long to give fresh pages as the
    expansion itself takes. What no layer uses any more goes as soon as another shape is wanted, so that no more is held than
    without this.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[int, ...], list[tuple[torch.Tensor, weakref.ref[torch.Tensor]]]] = {}

    def take(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Float32 memory that is nobody's, its values anything; it is the caller's while the tensor object lives."""
        of_shape = self._kept.get(shape, [])
        at = next((at for at, (_, user) in enumerate(of_shape) if user() is None), None)
        if at is None:
            self._kept = {key: [pair for pair in pairs if pair[1]() is not None] for key, pairs in self._kept.items()}
            memory = torch.empty(shape, dtype=torch.float32)
        else:
            memory = of_shape.pop(at)[0]
        given = memory.view(shape)
        self._kept.setdefault(shape, []).append((memory, weakref.ref(given)))
        return given


class HostDevice(backend.TorchDevice):
    """Main memory as FlexGen's compute device: float16 becomes float32 on arrival."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.name = "host"
        self.compressed_device = HostCompressed(self)
        self._spares = Spares()

    def allocate(self, shape: Any, dtype: Any, pin_memory: Any = None, name: Any = None) -> Any:
        half = dtype == np.float16
        if half and len(shape) == 2:  # a weight; of activations and caches views may outlive the tensor
            return backend.TorchTensor.create_from_torch(self._spares.take(tuple(map(int, shape))), self, name=name)
        return super().allocate(shape, np.float32 if half else dtype, pin_memory, name)

    def mha(
        self, inputs: Any, attention_mask: Any, w_q: Any, b_q: Any, w_k: Any, b_k: Any, w_v: Any, b_v: Any, w_out: Any,
        b_out: Any, w_ln: Any, b_ln: Any, n_head: int, donate: list[bool], compress_cache: bool, comp_config: Any,
    ) -> Any:  # fmt: skip
        """The prefill's attention: [batch, tokens, hidden] -> the same, and new keys and values [tokens, batch × heads, dim]."""
        x = inputs.data
        batch, tokens, hidden = x.shape
        q, k, v = self._project(x, (w_q, w_k, w_v), (b_q, b_k, b_v), w_ln, b_ln, n_head)
        mask = attention_mask.data.view(batch, 1, 1, tokens) & torch.ones(tokens, tokens, dtype=torch.bool).tril()
        mask = mask | torch.eye(tokens, dtype=torch.bool)  # a padded row attends to itself: no row may be empty
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        out = self._close(y, inputs, w_out, b_out, donate, attention_mask)

        def cached(part: Any) -> Any:
            flat = part.reshape(batch * n_head, tokens, hidden // n_head).transpose(0, 1)
            return self._cache_part(flat, compress_cache, comp_config)

        return out, cached(k), cached(v)

    def mha_gen(
        self, inputs: Any, attention_mask: Any, w_q: Any, b_q: Any, w_k: Any, b_k: Any, w_v: Any, b_v: Any, w_out: Any,
        b_out: Any, w_ln: Any, b_ln: Any, n_head: int, k_cache: Any, v_cache: Any, donate: list[bool], attn_sparsity: float,
        compress_cache: bool, comp_config: Any,
    ) -> Any:  # fmt: skip
        """One decoding step's attention over the cache [tokens, batch × heads, dim]."""
        x = inputs.data
        batch, _, hidden = x.shape
        length, dim = attention_mask.shape[1], hidden // n_head
        q, k_new, v_new = self._project(x, (w_q, w_k, w_v), (b_q, b_k, b_v), w_ln, b_ln, n_head)
        k_new, v_new = (part.reshape(1, batch * n_head, dim) for part in (k_new, v_new))

        def whole(cache: Any, new: Any) -> Any:
            past = (cache.device.decompress(cache) if compress_cache else cache.data)[:length]
            past[length - 1 : length] = new
            return past.transpose(0, 1).reshape(batch, n_head, length, dim)

        mask = attention_mask.data.view(batch, 1, 1, length)
        y = F.scaled_dot_product_attention(q, whole(k_cache, k_new), whole(v_cache, v_new), attn_mask=mask)
        out = self._close(y, inputs, w_out, b_out, donate, attention_mask)
        return out, self._cache_part(k_new, compress_cache, comp_config), self._cache_part(v_new, compress_cache, comp_config)

    def _project(self, x: Any, weights: Any, biases: Any, w_ln: Any, b_ln: Any, heads: int) -> list[Any]:
        batch, tokens, hidden = x.shape
        normed = F.layer_norm(x, (hidden,), weight=w_ln.data, bias=b_ln.data)
        pairs = zip(weights, biases, strict=True)
        return [F.linear(normed, plain(w), b.data).view(batch, tokens, heads, -1).transpose(1, 2) for w, b in pairs]

    def _close(self, y: Any, inputs: Any, w_out: Any, b_out: Any, donate: list[bool], mask: Any) -> Any:
        """Heads back to [batch, tokens, hidden], the output projection, the residual."""
        batch, _, tokens, _ = y.shape
        out = F.linear(y.transpose(1, 2).reshape(batch, tokens, -1), plain(w_out), b_out.data).add_(inputs.data)
        if donate[0]:
            inputs.delete()
        if donate[1]:
            mask.delete()
        return backend.TorchTensor.create_from_torch(out, self)

    def _cache_part(self, part: Any, compressed: bool, config: Any) -> Any:
        # A copy of its own: a view would keep the whole projection alive until the cache is stored.
        part = part.contiguous()
        return self.compressed_device.compress(part, config) if compressed else backend.TorchTensor.create_from_torch(part, self)


def plain(weight: Any) -> Any:
    """A weight's torch tensor, expanded where it is kept in 4 bits."""
    return weight.device.decompress(weight) if weight.device.device_type == backend.DeviceType.COMPRESSED else weight.data


# --- reading from disk ---------------------------------------------------------------------------------------------


def _map(tensor: Any, indices: Any) -> Any:
    """A tensor's data for a copy; a file of the model itself is mapped so that it can't be written."""
    if tensor.device.device_type == backend.DeviceType.DISK:
        data = torch.from_numpy(np.load(tensor.data, mmap_mode="r+" if tensor.delete_file else "c"))
    else:
        data = tensor.data
    return data[indices] if indices else data


def _read_whole(path: str, target: Any) -> bool:
    """Read an array's file into a contiguous tensor of its shape, a few MiB at a time: pages of a mapped file would count as
    this process's memory. False where the file's layout does not allow it."""
    with open(path, "rb") as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
        if fortran or tuple(shape) != tuple(target.shape) or not target.is_contiguous() or target.dtype == torch.bool:
            return False
        flat = target.view(-1).numpy()
        step = _READ_BYTES // dtype.itemsize
        for start in range(0, flat.size, step):
            count = min(step, flat.size - start)
            part = np.fromfile(file, dtype, count)
            if part.size < count:
                raise EOFError(f"{Path(path).name} is cut.")
            flat[start : start + count] = part
    return True


class CopyErrors:
    """What went wrong in a copy thread: the package's own threads would end without a word, and the next wait never would."""

    def __init__(self) -> None:
        self.first: Exception | None = None

    def raise_first(self) -> None:
        error, self.first = self.first, None
        if error is not None:
            raise error


def host_copy_worker(errors: CopyErrors) -> Any:
    """FlexGen's copy thread without CUDA: numpy copies, which take no computing thread of torch's."""

    def work(jobs: queue.Queue[Any], cuda_id: int) -> None:
        while True:
            job = jobs.get()
            try:
                if job is None:
                    return
                target, target_at, source, source_at = job
                on_disk = source.device.device_type == backend.DeviceType.DISK
                to = _map(target, target_at)
                if not (on_disk and not source_at and _read_whole(source.data, to)):
                    np.copyto(to.numpy(), _map(source, source_at).numpy(), casting="unsafe")
            except Exception as error:  # told to the computing thread at its next wait
                errors.first = errors.first or error
            finally:
                jobs.task_done()

    return work


class _NoCuda:
    """torch.cuda for FlexGen's modules on a machine without it."""

    class Stream:
        pass

    @staticmethod
    def stream(_: Any) -> Any:
        return contextlib.nullcontext()

    @staticmethod
    def synchronize(*_: Any) -> None:
        return None

    set_device = synchronize


def _load_from_file(weights: Any, on_tensor: Callable[[], None]) -> Any:
    """`TorchTensor.load_from_np_file` reading `weights` (modules.opt_weights) by the tensor's name."""

    def load(self: Any, file_name: str) -> None:
        on_tensor()
        name = Path(file_name).name
        path = weights.file(name)
        if self.device.device_type == backend.DeviceType.DISK and path is not None:
            self.device.delete(self)  # the empty file it has just made
            self.data, self.delete_file = str(path), False
        else:
            values = np.asarray(weights.array(name))
            self.load_from_np(values if values.flags.writeable else np.array(values))

    return load


def _move(self: Any, target: Any) -> Any:
    """`TorchTensor.move` that waits for the disk: the package deletes the source while a copy thread still reads it."""
    if self.device == target:
        return self
    moved = self.copy(target)
    for device in (self.device, target):
        if device.device_type == backend.DeviceType.DISK:
            device.synchronize()
    self.delete()
    return moved


_package_indices = compression.get_compressed_indices


def _compressed_indices(tensor: Any, indices: Any, shape: Any) -> Any:
    """The package's, as tuples: torch takes a list of slices for something else."""
    return tuple(tuple(part) for part in _package_indices(tensor, indices, shape))


class Disk(backend.TorchDisk):
    """The offload folder. Space is reserved when a tensor is made: writing to a mapped file on a full disk would end the process
    with SIGBUS."""

    def allocate(self, shape: Any, dtype: Any, pin_memory: Any = None, name: Any = None) -> Any:
        # NumPy 2 would write "np.int64(3)" into the file's header, which no reader takes.
        tensor = super().allocate(tuple(int(side) for side in shape), dtype, pin_memory, name)
        reserve = getattr(os, "posix_fallocate", None)
        if reserve is not None:
            try:
                with open(tensor.data, "r+b") as file:
                    reserve(file.fileno(), 0, os.fstat(file.fileno()).st_size)
            except OSError as error:
                self.delete(tensor)
                if error.errno == errno.ENOSPC:
                    raise StorageFull(
                        "The disk of the offload folder is full.", hint="Free some space, or choose another folder (offload_dir)."
                    ) from error
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # a file system that can't reserve
                    raise
        return tensor


def adapt(weights: Any, largest: int, cuda: bool, on_tensor: Callable[[], None]) -> CopyErrors:
    """Fit the package to this machine and model. `largest`: elements of the largest tensor that is ever copied; `on_tensor` is
    called before each tensor is loaded."""
    errors = CopyErrors()
    backend.TorchTensor.load_from_np_file = _load_from_file(weights, on_tensor)
    backend.TorchTensor.move = _move
    backend.map_to_torch_tensor = _map
    compression.get_compressed_indices = _compressed_indices
    if cuda:
        backend.GB = largest  # of the relay buffer: elements
        return errors
    stand_in = types.ModuleType("torch_without_cuda")
    stand_in.__dict__.update(torch.__dict__, cuda=_NoCuda)
    empty = torch.empty

    def unpinned(*sides: Any, pin_memory: bool = False, **rest: Any) -> Any:
        return empty(*sides, **rest)

    stand_in.__dict__["empty"] = unpinned
    for module in (backend, flex_opt, compression):
        module.torch = stand_in
    backend.copy_worker_func = host_copy_worker(errors)
    return errors
