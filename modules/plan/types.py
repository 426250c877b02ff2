"""The planner's data: a model by its headers, a machine, what a loader needs, and what comes of the three. Standard library only:
workers import the loaders' modules, which use these."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from modules.schema import ModelFormat, Quantization

How = Literal["load", "convert", "quantize", "download", "install"]
Level = Literal["fits", "tight", "no"]

MIB = 1 << 20
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class Gpu:
    """One accelerator with memory of its own. Bytes."""

    name: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class Machine:
    """What there is to run on. `ram_bytes` and `ram_available_bytes` are inside the container's limit where it has one.
    `instructions` are the CPU's vector sets by the kernel's names; `bandwidth` is bytes of main memory read per second by all
    cores, None where it was not measured."""

    ram_bytes: int
    ram_available_bytes: int
    cores: int = 1
    gpus: tuple[Gpu, ...] = ()
    disk_free_bytes: int = 0
    instructions: tuple[str, ...] = ()
    bandwidth: float | None = None
    platform: str = "linux"

    @property
    def vram_free_bytes(self) -> int:
        return sum(gpu.free_bytes for gpu in self.gpus)


@dataclass(frozen=True, slots=True)
class Shape:
    """A model as its headers describe it. Counts are elements, sizes bytes, 0 where the headers don't say.

    `keys` and `values` are what a token adds to the attention cache, summed over the layers that remember everything;
    `windowed` the sum of both over layers that remember `window` tokens. `score_heads` are the attention heads of a layer.
    `state` is what a recurrent model keeps instead, however long the text. `active` is the share of `matrices` that a token reads
    (mixtures of experts). `packed` are the quantised matrices' elements (GPTQ), `largest` the largest matrix's.
    `sight` is the weights of a GGUF's projector in bytes, `sight_buffers` what it computes an image in.
    `gap` says what the headers leave open, so that an estimate is only "at least".
    """

    format: ModelFormat
    architecture: str | None
    file_bytes: int
    parameters: int
    quantization: Quantization | None = None
    stored: Mapping[str, int] = field(default_factory=dict)  # number format in the files -> bytes of weights
    layers: int = 0
    hidden: int = 0
    heads: int = 0
    head_dim: int = 0
    ffn: int = 0
    vocab: int = 0
    context: int = 0
    tied: bool = False
    embedding: int = 0
    output: int = 0
    embedding_bytes: int = 0
    output_bytes: int = 0
    packed: int = 0
    packed_bytes: int = 0
    group_size: int = 0
    largest: int = 0
    keys: int = 0
    values: int = 0
    windowed: int = 0
    window: int = 0
    state: int = 0
    active: float = 1.0
    sight: int = 0
    sight_buffers: int = 0
    version: str = ""
    path: str = ""
    config: Mapping[str, Any] = field(default_factory=dict, repr=False)
    gap: str = ""

    @property
    def matrices(self) -> int:
        """Elements beside the two ends (embedding and output)."""
        return max(self.parameters - self.embedding - self.output, 0)

    def cache_elements(self, tokens: int) -> int:
        """Elements of the attention cache for a text of `tokens`."""
        return tokens * (self.keys + self.values) + min(tokens, self.window or tokens) * self.windowed


@dataclass(frozen=True, slots=True)
class Memory:
    """What one loader needs for one model under one set of options. Bytes of main memory unless they say otherwise.

    `weights` and `base` (interpreter and libraries) are there from the load on; `mapped` are file pages that generating reads,
    which the kernel could take back and read again; `loading` is held beside them while loading only; `cache` (full context) and
    `compute` while generating. `grows`: the cache comes with the text, not with the load. `vram` and `disk` are beside all that.
    `read` is what one token reads of the memory, `efficiency` the share of the machine's bandwidth that this loader reaches
    (None: not known, and so is the speed), `step_s` what a token costs beside it.
    """

    weights: int
    cache: int = 0
    compute: int = 0
    base: int = 0
    mapped: int = 0
    loading: int = 0
    vram: int = 0
    disk: int = 0
    grows: bool = True
    read: int = 0
    efficiency: float | None = None
    step_s: float = 0.0

    @property
    def ram(self) -> int:
        """The peak, with the context filled."""
        return self.base + self.weights + self.mapped + max(self.loading, self.cache + self.compute)

    @property
    def at_load(self) -> int:
        """The peak of loading alone: what must be there, or the load fails."""
        return self.base + self.weights + self.mapped + max(self.loading, 0 if self.grows else self.cache)


@dataclass(frozen=True, slots=True)
class Setting:
    """Load options worth trying. `loss` orders what they cost in quality: 0 nothing, 1 hardly seen, 2 seen, 3 plain to see."""

    options: Mapping[str, Any]
    what: str = ""
    loss: int = 0
    quantization: str | None = None


@dataclass(frozen=True, slots=True)
class Fit:
    """One way to run a model here. `quantization` None is as the files are; `options` are ready for a load request.

    `ram_bytes` is the peak of main memory with the context filled, None where the headers say too little. `tokens_per_second`
    is of one chat, None where it is unknown. `how` is what comes first; `reason` is one line for a person.
    """

    loader: str
    title: str
    quantization: str | None
    context_length: int
    cache_type: str | None
    options: dict[str, Any]
    ram_bytes: int | None
    vram_bytes: int
    disk_bytes: int
    tokens_per_second: float | None
    fits: bool
    installed: bool
    how: How
    reason: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a file that is not here yet would run here: for the list of a repository's files."""

    level: Level
    reason: str
