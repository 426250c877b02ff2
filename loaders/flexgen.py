"""FlexGen: OPT and Galactica with weights, cache and activations spread over GPU, CPU and disk, for many requests at once.

`_flexgen_plan` checks the options, `_flexgen_device` fits the package to the machine, `_flexgen_model` runs a block of sequences,
`_flexgen_batch` makes blocks of requests.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loaders._estimate import context_of
from loaders._flexgen_package import check_package
from loaders._flexgen_plan import Plan, cache_elements, elements, main_memory_bytes, plan_of, weight_bytes
from loaders._logits import NEED_THE_MODEL, THREADS, LogitsEngine, ctx_size
from loaders._process import give_back_at_once
from modules import sampling as table
from modules.errors import CorruptModel, LoadError, LoadOutOfMemory, StorageFull, is_out_of_memory
from modules.plan.types import Machine, Memory, Setting, Shape
from modules.schema import LoaderSpec, LoadProgress, ModelFiles, ModelInfo, OptionSpec, Quantization

if TYPE_CHECKING:
    from collections.abc import Mapping

    from loaders._flexgen_model import FlexModel
    from modules.detect.opt import OptShape
    from modules.engine import Progress

_PERCENT = "Percent of the {} on GPU, CPU and disk; they add up to 100."
_OFFLOAD = "switchyard-flexgen-"

SPEC = LoaderSpec(
    name="flexgen",
    title="FlexGen",
    engine="loaders.flexgen:FlexGenEngine",
    summary="OPT and Galactica in little memory, many requests at once: weights and cache over GPU, CPU and disk.",
    formats={"flexgen": 100, "hf": 10},
    samplers=frozenset(table.PARAMETERS) - NEED_THE_MODEL,
    options=(
        OptionSpec("w_percent", "str", "100,0,0", _PERCENT.format("weights")),
        OptionSpec("cache_percent", "str", "100,0,0", _PERCENT.format("attention cache")),
        OptionSpec("act_percent", "str", "100,0,0", _PERCENT.format("activations") + " FlexGen keeps them in one place."),
        OptionSpec(
            "percent",
            "str",
            "",
            "FlexGen's own form of the three: GPU and CPU percent of weights, cache and activations, the rest of each on disk: "
            "0 100 100 0 100 0. Takes the place of the three.",
            advanced=True,
        ),
        OptionSpec("gpu_batch_size", "int", 16, "Sequences computed together.", minimum=1, maximum=4096),
        OptionSpec(
            "num_gpu_batches",
            "int",
            1,
            "GPU batches in a block: each layer's weights are brought once for all of them.",
            minimum=1,
            maximum=256,
        ),
        OptionSpec(
            "compress_weight", "bool", False, "Keep the weights in 4 bits, in groups of 64.", aliases=("compress-weight",)
        ),
        OptionSpec("compress_cache", "bool", False, "Keep the attention cache in 4 bits.", aliases=("compress-cache",)),
        OptionSpec(
            "pin_weight", "bool", True, "Pin the weights in main memory, for faster copies to a GPU.", aliases=("pin-weight",)
        ),
        OptionSpec("overlap", "bool", True, "Bring the next layer's weights and cache while this one computes."),
        OptionSpec("sep_layer", "bool", True, "Bring attention and feed-forward parts of a layer one by one.", advanced=True),
        OptionSpec(
            "cpu_cache_compute", "bool", False, "Compute attention on the CPU, where the cache is (with a GPU).", advanced=True
        ),
        OptionSpec(
            "dtype",
            "choice",
            "auto",
            "Number format of what is kept on CPU and disk. auto: float16. Arithmetic without a GPU is float32.",
            choices=("auto", "float16", "float32"),
            advanced=True,
        ),
        ctx_size(),
        OptionSpec("cpu", "bool", False, "Stay on the CPU even if there is a GPU."),
        OptionSpec("offload_dir", "path", "", "Folder for what is kept on disk; empty is a temporary one.", advanced=True),
        THREADS,
    ),
    features=frozenset({"logprobs", "echo", "score", "embeddings", "grammar", "json_schema", "regex"}),
    overlay="flexgen",
    probe=("torch", "flexgen", "transformers"),
    slots=16,
    notes=("A request that comes while a block of others runs waits for the next block.",),
)


def refusal(files: ModelFiles) -> str | None:
    """Why a folder of safetensors is none of FlexGen's, in one line."""
    from modules.detect.draft import read_json
    from modules.detect.opt import opt_shape

    if files.format != "hf":
        return None
    if files.architecture != "OPTForCausalLM":
        return f"runs OPT and Galactica models; this is {files.architecture or 'of an unknown architecture'}."
    try:
        opt_shape(read_json(Path(files.path) / "config.json"))
    except LoadError as error:
        return error.message
    except OSError:
        return None  # the load says it better
    return None


EFFICIENCY, _LAYER_S = 0.7, 0.0005
_BASE = 280 << 20


def estimate(shape: Shape, options: Mapping[str, Any], machine: Machine) -> Memory:
    """See modules.plan.planner.Estimator: what the plan promises, for one chat that fills the context. Raises CorruptModel or
    IncompatibleModel where config.json is no OPT's."""
    from modules.detect.opt import opt_shape

    opt = opt_shape(dict(shape.config))
    plan = plan_of(dict(options), bool(machine.gpus) and not options["cpu"])
    homes = weight_bytes(opt, plan)
    context = min(context_of(shape, options), opt.positions)
    whole = main_memory_bytes(opt, plan, 1, max(context - 1, 1), 1)
    kept = homes["cpu"] + (0 if plan.cuda else homes["gpu"])
    fast = 1 - homes["disk"] / max(sum(homes.values()), 1)
    expanded = 0 if plan.cuda else homes["cpu"] / max(sum(homes.values()), 1)
    return Memory(
        weights=kept,
        compute=max(whole - homes["cpu"] - homes["gpu"], 0),
        base=_BASE,
        disk=homes["disk"],
        vram=homes["gpu"] if plan.cuda else 0,
        read=4 * shape.parameters,
        # The disk's speed is not measured; float16 that is made float32 at each step was: it takes 2.8 times as long.
        efficiency=EFFICIENCY * fast**4 / (1 + 1.8 * expanded) if fast > 0.5 else None,
        step_s=_LAYER_S * opt.layers,
    )


def settings(shape: Shape, machine: Machine) -> list[Setting]:
    """All ready to compute; half-width in memory; 4 bits; three fifths or all of it on disk."""
    memory = {"cache_percent": "0,100,0", "act_percent": "0,100,0"} if machine.gpus else {}
    return [
        Setting({}, "weights ready to compute"),
        Setting({"w_percent": "0,100,0", **memory}, "weights as float16"),
        Setting(
            {"w_percent": "0,100,0", "compress_weight": True, **memory}, "weights in 4 bits", loss=2, quantization="flexgen-4bit"
        ),
        Setting({"w_percent": "0,40,60", **memory}, "60 % of the weights on disk"),
        Setting({"w_percent": "0,0,100", **memory}, "weights on disk"),
    ]


class FlexGenEngine(LogitsEngine):
    spec = SPEC
    packages = ("flexgen", "torch", "transformers")

    def __init__(self) -> None:
        super().__init__()
        self._model: FlexModel | None = None
        self._offload: Path | None = None

    def load(self, path: str, options: dict[str, Any], progress: Progress) -> ModelInfo:
        from modules.opt_weights import open_weights

        folder = Path(path)
        progress(LoadProgress("Checking the model"))
        weights = open_weights(folder)
        shape = weights.shape
        progress(LoadProgress("Starting FlexGen"))
        import torch

        if options["threads"]:
            torch.set_num_threads(options["threads"])
        cuda = torch.cuda.is_available() and not options["cpu"]
        plan = plan_of(options, cuda)
        _check_memory(shape, plan)
        package = find_spec("flexgen")
        check_package(Path(str(package.origin if package else "")).parent)
        from loaders import _flexgen_device as device
        from loaders._flexgen_batch import Batcher
        from loaders._flexgen_model import FlexModel

        total, count = len(shape.tensors()) + 1, 0

        def on_tensor() -> None:
            nonlocal count
            count += 1
            progress(LoadProgress("Placing the weights", min(count / total, 1.0)))

        self._offload = _offload_folder(options["offload_dir"])
        _check_disk(shape, plan, self._offload)
        if plan.weights[0] < 100:  # a layer's weights are expanded when its turn comes
            give_back_at_once()
        largest = max(map(elements, shape.tensors().values()))
        errors = device.adapt(weights, max(largest, cache_elements(shape, plan)), cuda, on_tensor)
        try:
            self._model = FlexModel(shape, plan, errors, str(self._offload))
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise LoadOutOfMemory(
                    "The memory is too small for this placement of the weights.",
                    hint="Put more of the weights on CPU or disk (w_percent), or set compress_weight.",
                ) from error
            raise
        progress(LoadProgress("Reading the tokenizer"))
        text, special = _tokenizer(folder)
        info = _describe(folder, options, self._model, shape, special, torch.__version__)
        self._runner = Batcher(self._model, text, info)
        self._runner.score([0, 0])  # the first pass sets up kernels: not in the first request's time
        return info

    def memory_bytes(self) -> int | None:
        if self._model is None or not self._model.plan.cuda:
            return None
        import torch

        return int(torch.cuda.memory_reserved())

    def close(self) -> None:
        if self._model is not None:
            self._model.close()
        if self._offload is not None:
            shutil.rmtree(self._offload, ignore_errors=True)


# --- before anything is loaded ---------------------------------------------------------------------------------------


def _check_memory(shape: OptShape, plan: Plan) -> None:
    from modules.memory import available_bytes

    promised = weight_bytes(shape, plan)
    needed = promised["cpu"] + (0 if plan.cuda else promised["gpu"])
    available = available_bytes()
    if available and needed > available:
        raise LoadOutOfMemory(
            f"This placement keeps {needed / 1e9:.1f} GB of weights in main memory; {available / 1e9:.1f} GB are free.",
            hint="Put more of the weights on disk (w_percent), or set compress_weight.",
        )


def _check_disk(shape: OptShape, plan: Plan, folder: Path) -> None:
    needed = weight_bytes(shape, plan)["disk"]
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise StorageFull(
            f"This placement keeps up to {needed / 1e9:.1f} GB on disk; the offload folder has {free / 1e9:.1f} GB free.",
            hint="Choose another folder (offload_dir), or put less of the weights on disk.",
        )


def _offload_folder(chosen: str) -> Path:
    """A folder of this process's own; those of workers that were killed are removed."""
    base = Path(chosen).expanduser() if chosen else Path(tempfile.gettempdir())
    base.mkdir(parents=True, exist_ok=True)
    for left in base.glob(f"{_OFFLOAD}*"):
        pid = left.name.removeprefix(_OFFLOAD).partition("-")[0]
        if pid.isdigit() and int(pid) != os.getpid() and not _alive(int(pid)):
            shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{_OFFLOAD}{os.getpid()}-", dir=base))


def _alive(pid: int) -> bool:
    import psutil

    return bool(psutil.pid_exists(pid))


def _tokenizer(folder: Path) -> tuple[Any, dict[str, Any]]:
    import transformers

    from loaders._hf_load import chat_template, end_token_ids
    from loaders._hf_text import TextCodec
    from modules.detect.draft import read_json

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise CorruptModel(
            f"The tokenizer can't be read: {str(error).splitlines()[0][:200] if str(error) else type(error).__name__}.",
            hint="Copy the tokenizer's files of the same OPT into the folder.",
        ) from error
    found = {}
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            found = read_json(folder / name) | found
    special = {
        "bos": tokenizer.bos_token,
        "eos": tokenizer.eos_token,
        "eos_ids": end_token_ids(found.get("eos_token_id"), tokenizer),
        "template": chat_template(tokenizer),
    }
    return TextCodec(tokenizer), special


def _describe(
    folder: Path, options: dict[str, Any], model: FlexModel, shape: OptShape, special: dict[str, Any], torch_version: str
) -> ModelInfo:
    plan = model.plan
    homes = model.bytes_by_home()
    total = sum(homes.values()) or 1
    names = {"gpu": "cuda:0" if plan.cuda else "cpu", "cpu": "cpu", "disk": "disk"}
    shares: dict[str, float] = {}
    for home, size in homes.items():
        if size:
            shares[names[home]] = round(shares.get(names[home], 0.0) + size / total, 4)
    in_memory = homes["cpu"] + homes["gpu"]
    notes = [
        f"Weights: {homes['gpu'] / 1e6:,.0f} MB ready to compute, {homes['cpu'] / 1e6:,.0f} MB on CPU, "
        f"{homes['disk'] / 1e6:,.0f} MB on disk; blocks of up to {plan.slots} sequences."
    ]
    if not plan.cuda and (options["cpu_cache_compute"]):
        notes.append("cpu_cache_compute has no effect without a GPU.")
    context = min(options["ctx_size"] or shape.positions, shape.positions)
    if options["ctx_size"] > shape.positions:
        notes.append(f"OPT has {shape.positions} positions; a larger context is not possible.")
    return ModelInfo(
        name=folder.name,
        path=str(folder),
        loader=SPEC.name,
        format="flexgen" if (folder / "decoder.embed_tokens.weight").is_file() else "hf",
        architecture="OPTForCausalLM",
        quantization=Quantization("flexgen", 4, 64, sym=False) if plan.compress_weight else None,
        dtype="float16" if plan.cuda else "float32",
        context_length=context,
        vocab_size=shape.vocab,
        chat_template=special["template"],
        bos_token=special["bos"],
        eos_token=special["eos"],
        eos_token_ids=tuple(sorted(special["eos_ids"])),
        device_map=shares,
        memory_bytes=in_memory,
        engine=f"flexgen {FlexGenEngine.versions().get('flexgen', '')}, torch {torch_version}",
        notes=tuple(notes),
        slots=plan.slots,
    )
