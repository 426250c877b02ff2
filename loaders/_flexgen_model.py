"""One OPT on FlexGen: where its parts live, and blocks of sequences run through it step by step.

The package's `OptLM` and layers do the moving and the arithmetic, in FlexGen's order: each layer's weights are brought to the
compute device once and used for all GPU batches of a block while the next layer's are on their way. Here is only the loop over
steps, as a generator, so that a step can be streamed and a block given up between two layers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from flexgen import flex_opt
from flexgen import pytorch_backend as backend
from flexgen.compression import CompressionConfig
from flexgen.opt_config import OptConfig
from flexgen.utils import ExecutionEnv, Task, ValueHolder, array_2d

from loaders._flexgen_device import CopyErrors, Disk, HostDevice, plain

if TYPE_CHECKING:
    from loaders._flexgen_plan import Plan
    from modules.detect.opt import OptShape

ALLOTMENT = 128  # tokens of cache a block gets at a time beyond its prompts
_GROUP = 64
Pick = Callable[[int, Any], Sequence[int]]
"""(index of the GPU batch, logits [rows, vocabulary] on the compute device) -> one token id per row."""


class _Mlp(flex_opt.MLP):
    """FlexGen's feed-forward layer with the checkpoint's own inner size; the package takes four times the hidden size."""

    def init_weight(self, weight_home: Any, path: str) -> None:
        h, f, dtype = self.config.input_dim, self.config.ffn_embed_dim, self.config.dtype
        layer = f"{path}decoder.layers.{self.layer_id}."
        shapes = {"fc1.weight": (f, h), "fc1.bias": (f,), "fc2.weight": (h, f), "fc2.bias": (h,)}
        shapes |= {"final_layer_norm.weight": (h,), "final_layer_norm.bias": (h,)}
        specs = [(shape, dtype, layer + name) for name, shape in shapes.items()]
        weight_home.store(flex_opt.init_weight_list(specs, self.policy, self.env))


class _Output(flex_opt.OutputEmbed):
    """FlexGen's output layer, handing the logits to the host's sampler instead of taking the largest."""

    pick: Pick
    states: Callable[[Any, Any], None] | None = None

    def forward(
        self, hidden: Any, cache_read_buf: Any, weight_read_buf: Any, attention_mask: Any, cache_write_buf: Any, i: int, k: int
    ) -> None:
        last = k == self.policy.num_gpu_batches - 1
        (w_ln, _), (b_ln, _), (w_token, _) = weight_read_buf.pop() if last else weight_read_buf.val
        states = hidden.val.data
        if self.states is None:
            states = states[:, -1]
        states = F.layer_norm(states, states.shape[-1:], weight=w_ln.data, bias=b_ln.data)
        embedding = plain(w_token)
        if self.states is not None:
            self.states(states, embedding)
            ids: Sequence[int] = [0] * len(states)
        else:
            ids = self.pick(k, F.linear(states, embedding))
        hidden.val = backend.TorchTensor.create_from_torch(torch.tensor(ids, dtype=torch.int32)[:, None], self.env.cpu)


def _gelu_mlp(device: Any, inputs: Any, wi: Any, bi: Any, wo: Any, bo: Any, w_ln: Any, b_ln: Any, donate: list[bool]) -> Any:
    """The feed-forward layer with Galactica's activation; the package knows only ReLU."""
    x = inputs.data
    out = F.linear(F.layer_norm(x, x.shape[-1:], weight=w_ln.data, bias=b_ln.data), plain(wi), bi.data)
    out = F.linear(F.gelu(out), plain(wo), bo.data).add_(x)
    if donate[0]:
        inputs.delete()
    return backend.TorchTensor.create_from_torch(out, device)


class _Hidden(dict[int, Any]):
    """Hidden states by step; a step's holders are made when it begins."""

    def __init__(self, layers: int, batches: int) -> None:
        super().__init__()
        self._sides = (layers, batches)

    def __missing__(self, step: int) -> Any:
        self[step] = array_2d(*self._sides, ValueHolder)
        return self[step]


class FlexModel(flex_opt.OptLM):
    """The loaded model. Everything here belongs to the compute thread."""

    def __init__(self, shape: OptShape, plan: Plan, errors: CopyErrors, offload_dir: str) -> None:
        self._errors = errors
        self.plan = plan
        env = _environment(plan, offload_dir)
        if shape.activation == "gelu":
            env.gpu.mlp = functools.partial(_gelu_mlp, env.gpu)
        flex_opt.OutputEmbed, flex_opt.MLP = _Output, _Mlp
        config = OptConfig(
            name="local",
            num_hidden_layers=shape.layers,
            max_seq_len=shape.positions,
            hidden_size=shape.hidden,
            n_head=shape.heads,
            input_dim=shape.hidden,
            ffn_embed_dim=shape.ffn,
            activation_fn=shape.activation,
            vocab_size=shape.vocab,
            dtype=np.float32 if plan.dtype == "float32" else np.float16,
        )
        with torch.inference_mode():
            super().__init__(config, env, "", _policy(plan))
        self._output = self.layers[-1]
        self._busy = False

    # --- what the package would do otherwise ------------------------------------------------------------------------

    def init_weight(self, j: int) -> None:
        """Without the package's look for the files, which ends in a download."""
        self.layers[j].init_weight(self.weight_home[j], "")

    def sync(self) -> None:
        super().sync()
        self._errors.raise_first()

    def __del__(self) -> None:
        """The process ends with the model; nothing is deleted tensor by tensor."""

    # --- blocks -----------------------------------------------------------------------------------------------------

    def run(self, prompts: Sequence[Sequence[int]], room: int, pick: Pick, stop: Callable[[], bool]) -> Iterator[float | None]:
        """Run a block of prompts together, at most `room` new tokens each.

        Yields the share of the prefill that is done (1.0 before the first tokens are picked), then None after each decoding step.
        `stop` is asked between layers; when it says so, or the iterator is closed, the block is given up.
        """
        with torch.inference_mode(), self._block(prompts, room):
            self._output.pick = pick
            for i in range(room):
                if i + 1 == self.task.gen_len < room:  # the package does not store the last token's cache
                    self._grow(min(2 * (i + 1), room))
                for done in self._step(i):
                    if stop():
                        return
                    if i == 0:
                        yield done
                if stop():
                    return
                if i:
                    yield None

    def states(self, ids: Sequence[int], use: Callable[[Any, Any], None]) -> None:
        """One forward pass over `ids`; `use` gets the last norm's output [1, tokens, hidden] and the embedding
        [vocabulary, hidden].

        May be called while a block is between two steps."""
        with torch.inference_mode(), self._aside(), self._block([ids], 1):
            self._output.states = use
            try:
                for _ in self._step(0):
                    pass
            finally:
                self._output.states = None

    @contextlib.contextmanager
    def _block(self, prompts: Sequence[Sequence[int]], room: int) -> Iterator[None]:
        """The buffers of one block; gone afterwards, whatever happened."""
        size = min(self.plan.gpu_batch_size, len(prompts))
        count = -(-len(prompts) // size)
        self._set_policy(size, count)
        length = max(map(len, prompts))
        allotment = min(room, ALLOTMENT)
        pad = self.config.pad_token_id
        self.output_ids = np.full((size * count, length + allotment), pad, dtype=np.int32)
        self._mask = np.zeros((size * count, length), dtype=bool)
        for row in range(size * count):  # rows that fill up the last GPU batch repeat the last prompt
            ids = prompts[min(row, len(prompts) - 1)]
            self.output_ids[row, length - len(ids) : length] = ids
            self._mask[row, length - len(ids) :] = True
        for name in ("cache_home", "cache_read_buf", "cache_write_buf"):
            setattr(self, name, array_2d(self.num_layers, count, ValueHolder))
        self.weight_read_buf = [ValueHolder() for _ in range(self.num_layers)]
        self.attention_mask = [ValueHolder() for _ in range(count)]
        self.hidden = _Hidden(self.num_layers, count)
        self.stopped = np.zeros((size * count, 1), dtype=bool)
        self.execute_gen_len = room
        self._allot(length, allotment)
        try:
            for j in range(self.num_layers):
                for k in range(count):
                    self.init_cache(j, k)
            if self.policy.cpu_cache_compute:
                self.env.cpu.init_attention_compute_workspace(self.config, self.task, self.policy)
            yield
        finally:
            # Copies may be under way into what is about to go; their errors are the block's own and were raised.
            self.env.disk.synchronize()
            if self.plan.cuda:
                torch.cuda.synchronize()
            for j in range(self.num_layers):
                for k in range(count):
                    self.delete_cache(j, k)
            self.env.cpu.del_attention_compute_workspace()
            self.hidden.clear()
            self._errors.first = None

    def _allot(self, prompt_len: int, gen_len: int) -> None:
        self.set_task(Task(self.output_ids, prompt_len, gen_len, None, False, 1.0, None))

    def _set_policy(self, size: int, count: int) -> None:
        """A block of fewer sequences than the plan's runs as what it is; the weights' homes do not depend on it."""
        self.policy = dataclasses.replace(self.policy, gpu_batch_size=size, num_gpu_batches=count)
        self.num_gpu_batches = count
        for layer in self.layers:
            for part in (layer, getattr(layer, "attention", None), getattr(layer, "mlp", None)):
                if part is not None:
                    part.policy = self.policy

    def update_attention_mask(self, i: int, k: int) -> None:
        if i > 0:
            super().update_attention_mask(i, k)
            return
        size = self.policy.gpu_batch_size
        device = self.env.cpu if self.policy.cpu_cache_compute else self.env.gpu
        mask = device.allocate((size, self._mask.shape[1]), bool)
        mask.load_from_np(self._mask[k * size : (k + 1) * size])
        self.attention_mask[k].store(mask)

    def _step(self, i: int) -> Iterator[float]:
        """One token for every sequence. Yields the share of the layers that is done."""
        overlap, batches, layers = self.policy.overlap, self.num_gpu_batches, self.num_layers
        for k in range(batches):
            self.update_attention_mask(i, k)
        if i == 0 and overlap:
            self.load_weight(0, 0, 0)
            self.sync()
        behind: tuple[int, int] | None = None
        for j in range(layers):
            for k in range(batches):
                if overlap:
                    if k == 0:
                        self.load_weight(i, j + 1, 0)
                    if j + 1 < layers or k + 1 < batches:
                        self.load_cache(i, j, k + 1)
                else:
                    if k == 0:
                        self.load_weight(i, j, 0, overlap=False)
                    self.load_cache(i, j, k, overlap=False)
                    self.sync()
                self.load_hidden(i, j, k)
                self.compute_layer(i, j, k)
                self.store_hidden(i, j, k)
                if behind is not None:  # one unit late: what it stores was computed before the last wait
                    self.store_cache(i, *behind)
                behind = (j, k)
                self.sync()
            yield (j + 1) / layers
        if behind is not None:
            self.store_cache(i, *behind)
            self.sync()
        self.hidden.pop(i, None)

    # --- caches -----------------------------------------------------------------------------------------------------

    def delete_cache(self, j: int, k: int) -> None:
        """Also the files of a cache that is spread over devices, which the package leaves behind."""
        for tensor in self.cache_home[j][k].pop() or ():
            _delete(tensor)

    def _grow(self, gen_len: int) -> None:
        """Room for more tokens: new caches with the old ones' content."""
        used = self.task.prompt_len + self.task.gen_len - 2
        wider = np.full((len(self.output_ids), self.task.prompt_len + gen_len), self.config.pad_token_id, dtype=np.int32)
        wider[:, : self.output_ids.shape[1]] = self.output_ids
        self.output_ids = wider
        self._allot(self.task.prompt_len, gen_len)
        for j in range(self.num_layers):
            for k in range(self.num_gpu_batches):
                old = self.cache_home[j][k].pop()
                if not old:
                    continue
                self.init_cache(j, k)
                for source, target in zip(old, self.cache_home[j][k].val, strict=True):
                    _copy_head(target, source, used)
                self.sync()
                for tensor in old:
                    _delete(tensor)
        if self.policy.cpu_cache_compute:
            self.env.cpu.init_attention_compute_workspace(self.config, self.task, self.policy)

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        """Put the block that is under way aside, and take it up again."""
        names = "policy cache_home cache_read_buf cache_write_buf weight_read_buf attention_mask".split()
        names += "hidden output_ids stopped _mask task execute_gen_len".split()
        kept = {name: getattr(self, name) for name in names if hasattr(self, name)}
        workspace = self.env.cpu.attention_compute_workspace
        try:
            yield
        finally:
            self._set_policy(kept["policy"].gpu_batch_size, kept["policy"].num_gpu_batches)
            for name, value in kept.items():
                setattr(self, name, value)
            self.set_task(self.task)
            self.env.cpu.attention_compute_workspace = workspace

    # --- what it holds ----------------------------------------------------------------------------------------------

    def bytes_by_home(self) -> dict[str, int]:
        """Bytes of the weights on each kind of device: gpu, cpu, disk. Files of the model itself count as disk."""
        found = dict.fromkeys(("gpu", "cpu", "disk"), 0)

        def add(tensor: Any) -> None:
            kind = tensor.device.device_type
            if kind == backend.DeviceType.COMPRESSED:
                add(tensor.data[0])
                add(tensor.data[1])
            else:
                home = "disk" if kind == backend.DeviceType.DISK else "gpu" if tensor.device is self.env.gpu else "cpu"
                found[home] += int(tensor.bytes)

        for holder in self.weight_home:
            for item in holder.val:
                for tensor in item.val if isinstance(item, ValueHolder) else (item,):
                    add(tensor)
        return found

    def close(self) -> None:
        self.env.close_copy_threads()


def _environment(plan: Plan, offload_dir: str) -> Any:
    gpu = backend.TorchDevice("cuda:0") if plan.cuda else HostDevice()
    cpu = backend.TorchDevice("cpu")  # the last one made is the package's global CPU
    disk = Disk(offload_dir)
    return ExecutionEnv(gpu=gpu, cpu=cpu, disk=disk, mixed=backend.TorchMixedDevice([gpu, cpu, disk]))


def _policy(plan: Plan) -> Any:
    return flex_opt.Policy(
        plan.gpu_batch_size,
        plan.num_gpu_batches,
        plan.weights[0],
        plan.weights[1],
        plan.cache[0],
        plan.cache[1],
        plan.activations[0],
        plan.activations[1],
        plan.overlap,
        plan.sep_layer,
        plan.pin_weight and plan.cuda,
        plan.cpu_cache_compute and plan.cuda,
        1.0,
        plan.compress_weight,
        CompressionConfig(num_bits=4, group_size=_GROUP, group_dim=0, symmetric=False),
        plan.compress_cache,
        CompressionConfig(num_bits=4, group_size=_GROUP, group_dim=2, symmetric=False),
    )


def _delete(tensor: Any) -> None:
    kind = tensor.device.device_type
    if kind == backend.DeviceType.MIXED:
        for part in tensor.data[0]:
            if part is not None:
                _delete(part)
    elif kind == backend.DeviceType.COMPRESSED:
        for part in tensor.data[:2]:
            _delete(part)
    tensor.delete()


def _copy_head(target: Any, source: Any, length: int) -> None:
    """The first `length` tokens of one cache [tokens, batch × heads, dim] into another."""
    if target.device.device_type == backend.DeviceType.MIXED:
        for new, old in zip(target.data[0], source.data[0], strict=True):
            if new is not None:
                _copy_head(new, old, length)
        return
    indices = (slice(0, length), slice(0, source.shape[1]))
    backend.general_copy(target, indices, source, indices)
