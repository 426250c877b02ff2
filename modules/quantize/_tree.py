"""Decoder blocks and their linear layers, found from the module tree and from one forward pass, not by names.

So a new architecture needs no entry in a list: the blocks are the largest ModuleList of one class that holds linear layers; the
order of the layers is the order of their calls; those that are given the same tensor (query, key, value) form a group.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from modules.errors import IncompatibleModel

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


class StopForward(Exception):
    """Raised by a hook when the rest of a forward pass is of no use."""


@dataclass
class Blocks:
    """The decoder blocks, and the name of their list in the model ("model.layers")."""

    name: str
    modules: nn.ModuleList


def find_blocks(model: nn.Module) -> Blocks:
    """The decoder blocks. Raises IncompatibleModel when nothing looks like them."""
    best: Blocks | None = None
    most = 0
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or not len(module) or len({type(block) for block in module}) != 1:
            continue
        if not any(is_linear(part) for part in module.modules()):
            continue
        size = sum(parameter.numel() for parameter in module.parameters())
        if size > most:  # a list inside a block (experts) is smaller than the list of blocks
            best, most = Blocks(name, module), size
    if best is None:
        raise IncompatibleModel(f"{type(model).__name__} has no list of decoder blocks with linear layers in them.")
    return best


def is_linear(module: nn.Module) -> bool:
    """Whether this layer can be quantised: a Linear, or GPT-2's Conv1D, which is one with its weight transposed."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def linears(block: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in block.named_modules() if is_linear(module)}


def weight_in_out(module: nn.Module) -> Tensor:
    """The weight as [in, out]."""
    weight: Tensor = module.weight.data
    return weight if is_conv1d(module) else weight.T


def set_weight_in_out(module: nn.Module, weight: Tensor) -> None:
    old: Tensor = module.weight.data
    old.copy_(weight if is_conv1d(module) else weight.T)


# --- the inputs of the first block -----------------------------------------------------------------------------


@dataclass
class Arguments:
    """What the model passes to one block beside the hidden states (masks, positions), for one batch size."""

    rest: tuple[Any, ...] = ()
    named: dict[str, Any] = field(default_factory=dict)


class _Recorder(nn.Module):  # type: ignore[misc]  # torch is not in mypy's environment
    """Stands in for a block: keeps its arguments and hands the hidden states on in the form the real block returns."""

    def __init__(self, block: nn.Module, seen: list[tuple[Tensor, Arguments]], form: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self._seen, self._form = seen, form
        # Models ask their blocks what kind of attention they have (layer_type, attention_type).
        for name, value in vars(block).items():
            if not name.startswith("_") and isinstance(value, (str, int, bool)):
                setattr(self, name, value)
        self.training = False

    def forward(self, *args: Any, **named: Any) -> Any:
        hidden, rest = (args[0], args[1:]) if args else (named.pop("hidden_states"), ())
        self._seen.append((hidden, Arguments(rest, named)))
        return self._form(hidden)


def record_inputs(model: nn.Module, blocks: Blocks, windows: Tensor) -> tuple[Tensor, list[Arguments]]:
    """Run the part before the blocks on token ids [batch, length]: (hidden states of the first block, each block's arguments).

    The first block must be filled: one pass through it shows the form of a block's output.
    """
    forms: list[Any] = []
    handle = blocks.modules[0].register_forward_hook(lambda module, inputs, output: _keep_and_stop(forms, output))
    _run(model, windows[:1, : min(windows.shape[1], 8)])
    handle.remove()
    form = forms[0]

    def reply(hidden: Tensor) -> Any:
        return (hidden, *(None,) * (len(form) - 1)) if isinstance(form, tuple) else hidden

    seen: list[tuple[Tensor, Arguments]] = []
    originals = list(blocks.modules)
    try:
        for index, block in enumerate(originals):
            blocks.modules[index] = _Recorder(block, seen, reply)
        last = blocks.modules[len(originals) - 1].register_forward_hook(_stop)
        _run(model, windows)
        last.remove()
    finally:
        for index, block in enumerate(originals):
            blocks.modules[index] = block
    return seen[0][0], [arguments for _, arguments in seen]


def _keep_and_stop(forms: list[Any], output: Any) -> None:
    forms.append(output)
    raise StopForward


def _stop(module: nn.Module, inputs: Any, output: Any) -> None:
    raise StopForward


def _run(model: nn.Module, windows: Tensor) -> None:
    try:
        model(input_ids=windows, use_cache=False)
    except StopForward:
        return
    raise IncompatibleModel(f"{type(model).__name__} does not run its decoder blocks one after another.")


def run_block(block: nn.Module, hidden: Tensor, arguments: Arguments) -> Tensor:
    """One block's output hidden states."""
    output = block(hidden, *arguments.rest, **arguments.named)
    result: Tensor = output[0] if isinstance(output, tuple) else output
    return result


# --- the order of the layers in a block ------------------------------------------------------------------------


def call_order(block: nn.Module, hidden: Tensor, arguments: Arguments) -> list[list[str]]:
    """The block's linear layers in the order of their calls; neighbours that were given the same tensor share a list."""
    calls: list[tuple[str, Tensor]] = []  # holding the tensors keeps their addresses from being used again
    hooks = []
    for name, module in linears(block).items():

        def note(_: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
            calls.append((name, inputs[0]))

        hooks.append(module.register_forward_pre_hook(note))
    try:
        run_block(block, hidden, arguments)
    finally:
        for hook in hooks:
            hook.remove()
    groups: list[list[str]] = []
    known: set[str] = set()
    previous: Tensor | None = None
    for name, tensor in calls:
        if name in known:
            continue
        known.add(name)
        same = previous is not None and tensor.data_ptr() == previous.data_ptr() and tensor.shape == previous.shape
        if same:
            groups[-1].append(name)
        else:
            groups.append([name])
        previous = tensor
    return groups


class Moments:
    """Pre-hooks that sum x xᵀ over the inputs of some layers, one matrix for layers that share their input."""

    def __init__(self, block: nn.Module, groups: list[list[str]], *, stop_early: bool) -> None:
        self.sums: list[Tensor | None] = [None] * len(groups)
        self.tokens = [0] * len(groups)
        parts = linears(block)
        self._hooks = [
            parts[group[0]].register_forward_pre_hook(self._hook(index, stop_early and index == len(groups) - 1))
            for index, group in enumerate(groups)
        ]

    def _hook(self, index: int, stop: bool) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
            found = self.sums[index]
            self.sums[index] = x.T @ x if found is None else found.addmm_(x.T, x)
            self.tokens[index] += x.shape[0]
            if stop:
                raise StopForward

        return add

    def take_mean(self, index: int) -> Tensor:
        """The mean of x xᵀ, which is forgotten here."""
        found = self.sums[index]
        assert found is not None
        self.sums[index] = None
        return found.div_(max(self.tokens[index], 1))

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
