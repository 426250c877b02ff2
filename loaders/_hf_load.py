"""Reads a Hugging Face folder into memory for `loaders.transformers`, and turns every failure into a typed error."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loaders._estimate import FLOAT32_SHARE
from loaders._hf_text import TextCodec
from loaders._hf_vision import Vision, open_vision
from loaders._lora import put_over
from loaders._process import memory_given_back
from modules.detect.config_keys import CONFIG_FILES, refuse_code
from modules.errors import (
    AppError,
    BackendUnavailable,
    CorruptModel,
    IncompatibleModel,
    InvalidParameter,
    LoadError,
    LoadOutOfMemory,
    UnsafeModel,
    is_out_of_memory,
    one_line,
)
from modules.schema import LoadProgress, ModelInfo, Quantization

if TYPE_CHECKING:
    from modules.engine import Progress

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
# Markers that end a turn in common chat templates; a template that writes one ends its answers with it.
_END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<turn|>", "<|endoftext|>", "</s>", "<|eot|>")
_DEFAULT_CONTEXT = 4096
_GIB = 1 << 30
_SMALLER = "Choose a smaller model, load_in_4bit, or a GGUF quantisation of it."


@dataclass(frozen=True)
class Loaded:
    """A model ready to run. `model` is the transformers model, `input_device` where its token ids go."""

    model: Any
    text: TextCodec
    info: ModelInfo
    input_device: Any
    vision: Vision | None = None

    @property
    def eos_ids(self) -> frozenset[int]:
        return frozenset(self.info.eos_token_ids)


@dataclass(frozen=True)
class Parts:
    """A model of transformers' classes as it was read, with what it was read from."""

    path: str
    options: dict[str, Any]
    model: Any
    tokenizer: Any
    config: Any

    def info(self, *, notes: Iterable[str] = (), **known: Any) -> ModelInfo:
        """What any such model says about itself, beside what its loader has `known`."""
        text_config = self.config.get_text_config(decoder=True)
        trained = int(getattr(text_config, "max_position_embeddings", 0) or _DEFAULT_CONTEXT)
        context = self.options["ctx_size"] or trained
        if context > trained:
            notes = (*notes, f"The context of {context} is beyond the {trained} tokens the model was trained on.")
        return ModelInfo(
            name=Path(self.path).name,
            path=self.path,
            architecture=(self.config.architectures or [type(self.model).__name__])[0],
            context_length=context,
            vocab_size=int(text_config.vocab_size),
            chat_template=chat_template(self.tokenizer),
            bos_token=self.tokenizer.bos_token,
            eos_token=self.tokenizer.eos_token,
            eos_token_ids=tuple(sorted(end_token_ids(self.model.generation_config.eos_token_id, self.tokenizer))),
            notes=tuple(notes),
            **known,
        )


def load(path: str, options: dict[str, Any], progress: Progress) -> Loaded:
    """The model at `path` with checked `options` of the loader's spec. Raises LoadError's subclasses."""
    folder = Path(path)
    config_json = check_folder(folder)
    progress(LoadProgress("Starting Transformers"))
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    if options["threads"]:
        torch.set_num_threads(options["threads"])
    with _typed_errors(config_json):
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    progress(LoadProgress("Reading the tokenizer"))
    with _typed_errors(config_json, "The tokenizer can't be read"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    vision, blind = open_vision(path, config)
    with _typed_errors(config_json):
        arguments = native_options(options, folder, config, torch)
        progress(LoadProgress("Reading weights", 0.0))
        previous = transformers.utils.logging.set_tqdm_hook(_progress_hook(progress))
        try:
            with memory_given_back():  # else bitsandbytes' peak is between one and two times what it leaves, by chance
                model, report = model_class(transformers, vision).from_pretrained(
                    path,
                    config=config,
                    trust_remote_code=False,
                    local_files_only=True,
                    use_safetensors=True,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,  # so that the report names them; any is an error below
                    **arguments,
                )
        finally:
            transformers.utils.logging.set_tqdm_hook(previous)
        check_report(report)
        model.eval()
        model, notes = put_over(model, options, progress)
    if "past_key_values" not in _forward_parameters(model):
        raise IncompatibleModel(
            f"{type(model).__name__} keeps its state in a form this loader does not run.",
            hint="Use its GGUF form with llama.cpp, or its .pth with RWKV.",
        )
    notes += [blind] if blind else []
    info = _describe(Parts(path, options, model, tokenizer, config), notes, torch)
    if vision is not None:
        info = replace(info, image_token=vision.token, image_tokens=vision.cost())
    elif blind:
        info = replace(info, no_images=blind)
    return Loaded(model, TextCodec(tokenizer), info, _input_device(model, torch), vision)


def model_class(transformers: Any, vision: Vision | None) -> Any:
    """The class that reads images too, where the model has a processor for them."""
    return transformers.AutoModelForCausalLM if vision is None else transformers.AutoModelForImageTextToText


# --- checks before any library reads the files -----------------------------------------------------------------


def check_folder(folder: Path) -> dict[str, Any]:
    """config.json, after the checks that need no library: files present, no code to run, no pickles."""
    if not folder.exists():
        raise LoadError(f"There is nothing at {folder}.", hint="Refresh the model list: it was moved or deleted.")
    if not (folder / "config.json").is_file():
        raise CorruptModel(
            f"{folder.name} has no config.json.", hint="Point at the folder that holds config.json and *.safetensors."
        )
    config: dict[str, Any] = {}
    for name in CONFIG_FILES:
        if not (folder / name).is_file():
            continue
        try:
            content = json.loads((folder / name).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise CorruptModel(f"{name} is no valid JSON: {error}.", hint="Fetch the file again.") from error
        if not isinstance(content, dict):
            raise CorruptModel(f"{name} is no JSON object.", hint="Fetch the file again.")
        refuse_code(name, content)
        if name == "config.json":
            config = content
    if not any(folder.glob("*.safetensors")):
        if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
            raise UnsafeModel(
                f"{folder.name} holds its weights as Python pickles only, which can run any code when read.",
                hint="Get the safetensors version of the model, or convert it in a sandbox.",
            )
        raise CorruptModel(f"{folder.name} holds no *.safetensors.", hint="Download the weights again.")
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise CorruptModel(f"{folder.name} has no tokenizer.", hint="Add tokenizer.json from where the model came from.")
    return config


def check_report(report: dict[str, Any]) -> None:
    """Raise when the checkpoint does not fill the model: transformers would run on with random numbers."""
    mismatched = sorted(tuple(item) for item in report.get("mismatched_keys") or ())
    if mismatched:
        name, found, expected = mismatched[0]
        raise CorruptModel(
            f"Tensor {name} has the shape {list(found)}, config.json wants {list(expected)}"
            + (f" ({len(mismatched)} tensors differ)." if len(mismatched) > 1 else "."),
            hint="The weights and config.json do not belong together: download both again.",
        )
    missing = sorted(report.get("missing_keys") or ())
    if missing:
        raise CorruptModel(
            f"{len(missing)} tensors are missing, the first is {missing[0]}.",
            hint="The download is incomplete or config.json is of another model.",
        )


# --- options ---------------------------------------------------------------------------------------------------


def native_options(options: dict[str, Any], folder: Path, config: Any, torch: Any) -> dict[str, Any]:
    """Keyword arguments of from_pretrained for our load options."""
    on_gpu = not options["cpu"] and (torch.cuda.is_available() or torch.backends.mps.is_available())
    arguments: dict[str, Any] = {"dtype": _dtype(options["dtype"], on_gpu, folder, config, torch)}
    if options["attn_implementation"] != "auto":
        arguments["attn_implementation"] = options["attn_implementation"]
    quantised = options["load_in_8bit"] or options["load_in_4bit"]
    if quantised:
        arguments["quantization_config"] = _bitsandbytes(options, on_gpu, torch)
    memory = max_memory(options["gpu_memory"], options["cpu_memory"], torch.cuda.device_count() if on_gpu else 0)
    if options["cpu"] or not on_gpu:
        if memory or options["disk"]:
            arguments["device_map"] = "auto"
        elif quantised:
            arguments["device_map"] = {"": "cpu"}
    else:
        arguments["device_map"] = options["device_map"] if torch.cuda.is_available() else {"": "mps"}
    if memory:
        arguments["max_memory"] = memory
    if options["disk"]:
        arguments["offload_folder"] = options["disk_cache_dir"] or tempfile.mkdtemp(prefix="switchyard-offload-")
    return arguments


def max_memory(gpu: str, cpu_gib: float, gpus: int) -> dict[int | str, int]:
    """accelerate's max_memory in bytes, from "10,8" and a number of GiB; empty when nothing is limited."""
    limits: dict[int | str, int] = {}
    parts = [part.strip() for part in gpu.split(",") if part.strip()]
    for index, part in enumerate(parts[:gpus]):
        if not re.fullmatch(r"\d+(\.\d+)?", part):
            raise InvalidParameter(f"gpu_memory holds {part!r}; it is GiB per GPU, such as 10,8.", param="gpu_memory")
        limits[index] = int(float(part) * _GIB)
    if cpu_gib:
        limits["cpu"] = int(cpu_gib * _GIB)
        if gpus and not parts:
            limits |= dict.fromkeys(range(gpus), 1024 * _GIB)
    return limits


def _dtype(name: str, on_gpu: bool, folder: Path, config: Any, torch: Any) -> Any:
    if name != "auto":
        return getattr(torch, name)
    if on_gpu:
        return "auto"
    from modules.memory import available_bytes  # psutil, which the other environments that read this module lack

    stored = getattr(config, "dtype", None) or torch.float32
    as_float32 = sum(f.stat().st_size for f in folder.glob("*.safetensors")) * 4 // max(stored.itemsize, 1)
    return torch.float32 if as_float32 < FLOAT32_SHARE * available_bytes() else torch.bfloat16


def _bitsandbytes(options: dict[str, Any], on_gpu: bool, torch: Any) -> Any:
    try:
        import bitsandbytes  # noqa: F401
    except Exception as error:  # its CUDA set-up raises more than ImportError
        raise BackendUnavailable(
            f"bitsandbytes does not work here: {error}.", hint="Load without 8 or 4 bits, or install the Transformers set again."
        ) from error
    from transformers import BitsAndBytesConfig

    if options["load_in_8bit"]:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_enable_fp32_cpu_offload=True)
    compute = options["compute_dtype"]
    automatic = torch.bfloat16 if on_gpu else torch.float32
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=options["quant_type"],
        bnb_4bit_use_double_quant=options["use_double_quant"],
        bnb_4bit_compute_dtype=automatic if compute == "auto" else getattr(torch, compute),
    )


def _progress_hook(progress: Progress) -> Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]:
    """For transformers' tqdm hook: reports its "Loading weights" bar as load progress, at most a hundred times."""

    class Bar:
        def __init__(self, items: Iterable[Any], total: int) -> None:
            self._items, self._total = items, total

        def __iter__(self) -> Iterator[Any]:
            shown = -1
            for done, item in enumerate(self._items):
                percent = 100 * done // max(self._total, 1)
                if percent > shown:
                    shown = percent
                    progress(LoadProgress("Reading weights", done / max(self._total, 1)))
                yield item

    def hook(factory: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs.get("desc") != "Loading weights" or not args:
            return factory(*args, **kwargs)
        items = list(args[0])
        return Bar(items, len(items))

    return hook


# --- what was loaded -------------------------------------------------------------------------------------------


def end_token_ids(generation_eos: Any, tokenizer: Any) -> frozenset[int]:
    """Every id that ends an answer: generation_config's list, the tokenizer's EOS, and the template's end-of-turn marker."""
    ids = {generation_eos} if isinstance(generation_eos, int) else set(generation_eos or ())
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    template = chat_template(tokenizer) or ""
    for marker in _END_OF_TURN:
        if marker in template:
            token = tokenizer.convert_tokens_to_ids(marker)
            if isinstance(token, int) and token != tokenizer.unk_token_id:
                ids.add(token)
    return frozenset(ids)


def chat_template(tokenizer: Any) -> str | None:
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default") or next(iter(template.values()), None)
    return template


def _forward_parameters(model: Any) -> Iterable[str]:
    import inspect

    return inspect.signature(model.forward).parameters


def _input_device(model: Any, torch: Any) -> Any:
    device = model.get_input_embeddings().weight.device
    if device.type != "meta":
        return device
    # Offloaded to disk: accelerate computes it where its hook says.
    hook = getattr(model.get_input_embeddings(), "_hf_hook", None)
    return torch.device(getattr(hook, "execution_device", None) or "cpu")


def _describe(parts: Parts, notes: list[str], torch: Any) -> ModelInfo:
    model, options = parts.model, parts.options
    quantization = None
    if options["load_in_8bit"] or options["load_in_4bit"]:
        quantization = Quantization("bnb", 8 if options["load_in_8bit"] else 4)
    return parts.info(
        loader="transformers",
        format="hf",
        quantization=quantization,
        dtype=str(model.dtype).removeprefix("torch."),
        device_map=_device_shares(model),
        memory_bytes=int(model.get_memory_footprint()),
        engine=f"transformers, torch {torch.__version__}, {type(model).__name__}",
        notes=notes,
    )


def _device_shares(model: Any) -> dict[str, float]:
    """Device -> share of the weights on it."""
    sizes: dict[str, int] = {}
    for name, tensor in model.named_parameters():
        device = str(tensor.device)
        if device == "meta":
            device = "disk" if "disk" in map(str, getattr(model, "hf_device_map", {}).values()) else "cpu"
        sizes[device] = sizes.get(device, 0) + tensor.numel() * tensor.element_size()
        del name
    total = sum(sizes.values()) or 1
    return {device: round(size / total, 4) for device, size in sizes.items()}


# --- errors ----------------------------------------------------------------------------------------------------


class _typed_errors:
    """Context: what transformers, accelerate and torch raise while loading, as LoadError's subclasses."""

    def __init__(self, config: dict[str, Any], what: str = "config.json and the library do not agree") -> None:
        self._config, self._what = config, what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, AppError):
            import traceback

            traceback.print_exception(error)
            raise typed(error, self._config, self._what) from error


def typed(error: Exception, config: dict[str, Any], what: str) -> AppError:
    """The typed form of a loading failure; `what` begins the sentence for content that makes the library stumble."""
    text = one_line(error)
    kind = type(error).__name__
    if is_out_of_memory(error):
        return LoadOutOfMemory("The memory is too small for this model.", hint=_SMALLER)
    if (
        "does not recognize this architecture" in text
        or "Unrecognized configuration class" in text
        or "Unrecognized model" in text
    ):
        name = config.get("model_type") or (config.get("architectures") or ["unknown"])[0]
        return IncompatibleModel(
            f"This version of Transformers has no text-generating architecture {name!r}.",
            hint="Update, or use a GGUF of the model with llama.cpp.",
        )
    if isinstance(error, ImportError):
        return BackendUnavailable(f"A package is missing: {text}.", hint="Install the Transformers set again.")
    if "Safetensor" in kind or "header" in text.lower():
        return CorruptModel(f"The weights can't be read: {text}.", hint="Download the file again.")
    if isinstance(error, (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError)):
        return CorruptModel(f"{what}: {kind}: {text}.", hint="Get the file again from where the model came from.")
    if "okenizer" in what:
        return CorruptModel(f"{what}: {text}.", hint="Get tokenizer.json again from where the model came from.")
    return LoadError(f"Transformers could not load the model: {text}.", hint="The log has the details.")
