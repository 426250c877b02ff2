"""llama.cpp: GGUF files, by llama-cpp-python's library where it was compiled, else by xllamacpp's, which comes prebuilt.

This module is the spec and the thin engine. `_llama_capi` binds the C interface of either library, `_llama_load` opens a model,
`_llama_sampling` picks tokens, `_llama_generate` runs it all in the one compute thread. No server and no port is involved, but
where xllamacpp's library hides the C interface (Windows): there `_xllamacpp_server` drives its in-process server.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, cast

from loaders._llama_memory import MOST_CONTEXT_BY_DEFAULT
from loaders._llama_memory import estimate as estimate
from loaders._llama_memory import settings as settings
from loaders._logits import NEED_THE_MODEL, ctx_size, guidance_of
from modules import sampling as table
from modules.engine import CancelToken, Engine, Progress
from modules.errors import BackendUnavailable, InvalidGrammar, UnsupportedParameter
from modules.grammar import Grammars, Vocabulary
from modules.schema import Event, GenerationRequest, LoaderSpec, LoadProgress, ModelInfo, OptionSpec

if TYPE_CHECKING:
    from loaders._llama_generate import LlamaRunner
    from loaders._llama_load import LlamaModel
    from loaders._xllamacpp_server import ServerModel

_CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")

_NO_GUIDANCE = "llama.cpp's server reads one prompt for each answer; guidance needs two."

SPEC = LoaderSpec(
    name="llamacpp",
    title="llama.cpp",
    engine="loaders.llamacpp:LlamaCppEngine",
    summary="GGUF files in every quantisation, fast on any CPU and on GPUs.",
    formats={"gguf": 100},
    samplers=frozenset(table.PARAMETERS) - NEED_THE_MODEL,
    options=(
        ctx_size(f"Context length in tokens; 0 is the model's own, at most {MOST_CONTEXT_BY_DEFAULT}."),
        OptionSpec(
            "gpu_layers",
            "int",
            -1,
            "Layers on the GPU; -1 is all, 0 none. Without a GPU it does nothing.",
            minimum=-1,
            maximum=10_000,
            aliases=("n_gpu_layers", "gpu-layers", "n-gpu-layers"),
        ),
        OptionSpec("threads", "int", 0, "CPU threads for decoding; 0 chooses.", minimum=0, maximum=1024, aliases=("n_threads",)),
        OptionSpec(
            "threads_batch",
            "int",
            0,
            "CPU threads for the prefill; 0 is as many as for decoding.",
            minimum=0,
            maximum=1024,
            aliases=("n_threads_batch", "threads-batch"),
            advanced=True,
        ),
        OptionSpec(
            "batch_size",
            "int",
            512,
            "Tokens per step of the prefill.",
            minimum=1,
            maximum=65_536,
            aliases=("n_batch", "batch-size"),
            advanced=True,
        ),
        OptionSpec(
            "ubatch_size",
            "int",
            512,
            "Tokens computed at once in such a step.",
            minimum=1,
            maximum=65_536,
            aliases=("n_ubatch", "ubatch-size"),
            advanced=True,
        ),
        OptionSpec("cache_type_k", "choice", "f16", "Number format of the cached keys.", choices=_CACHE_TYPES, advanced=True),
        OptionSpec(
            "cache_type_v",
            "choice",
            "f16",
            "Number format of the cached values; a quantised one needs flash_attn.",
            choices=_CACHE_TYPES,
            advanced=True,
        ),
        OptionSpec("flash_attn", "choice", "auto", "Flash attention.", choices=("auto", "on", "off"), advanced=True),
        OptionSpec("tensor_split", "str", "", "Share of the model per GPU: 60,40.", aliases=("tensor-split",), advanced=True),
        OptionSpec(
            "split_mode",
            "choice",
            "layer",
            "How a model is spread over several GPUs.",
            choices=("none", "layer", "row"),
            aliases=("split-mode",),
            advanced=True,
        ),
        OptionSpec("main_gpu", "int", 0, "The GPU for what is not split.", minimum=0, maximum=64, advanced=True),
        OptionSpec("no_mmap", "bool", False, "Read the file into memory at once.", aliases=("no-mmap",), advanced=True),
        OptionSpec("mlock", "bool", False, "Keep the weights from being swapped out.", advanced=True),
        OptionSpec(
            "numa",
            "choice",
            "off",
            "Memory placement on machines with several CPU sockets.",
            choices=("off", "distribute", "isolate", "numactl"),
            advanced=True,
        ),
        OptionSpec("no_kv_offload", "bool", False, "Keep the KV cache off the GPU.", aliases=("no-kv-offload",), advanced=True),
        OptionSpec("rope_freq_base", "float", 0.0, "RoPE base frequency; 0 is the model's.", minimum=0, advanced=True),
        OptionSpec("rope_freq_scale", "float", 0.0, "RoPE frequency scale; 0 is the model's.", minimum=0, advanced=True),
        OptionSpec(
            "rope_scaling",
            "choice",
            "auto",
            "RoPE scaling method.",
            choices=("auto", "none", "linear", "yarn", "longrope"),
            advanced=True,
        ),
        OptionSpec("swa_full", "bool", False, "Sliding-window models: keep the whole cache, for reuse.", advanced=True),
        OptionSpec(
            "mmproj",
            "path",
            "",
            "The projector (mmproj file) of a model that sees. Empty: the one in the model's folder.",
            advanced=True,
        ),
        OptionSpec(
            "no_mmproj",
            "bool",
            False,
            "Leave the projector out: less memory, no images.",
            aliases=("no-mmproj",),
            advanced=True,
        ),
        OptionSpec("lora", "paths", (), "LoRA adapters (GGUF files)."),
        OptionSpec("lora_scale", "str", "", "One scale per adapter: 1,0.5. Empty: 1 each.", advanced=True),
        OptionSpec("check_tensors", "bool", False, "Look for invalid numbers in the weights while loading.", advanced=True),
        OptionSpec(
            "engine",
            "choice",
            "auto",
            "Which build of llama.cpp: the one compiled here (llama_cpp), the prebuilt one (xllamacpp), or that one's server.",
            choices=("auto", "llama_cpp", "xllamacpp", "xllamacpp_server"),
            advanced=True,
        ),
    ),
    features=frozenset({"logprobs", "echo", "grammar", "json_schema", "regex", "lora", "score", "embeddings", "vision"}),
    overlay="llamacpp",
    probe=("xllamacpp", "numpy"),
    devices=("cpu", "cuda", "rocm", "metal", "vulkan"),
    notes=(
        "Samplers that llama.cpp lacks run in our own implementation.",
        "Models with their mmproj file in the same folder read images.",
    ),
)


def to_native(sampling: dict[str, Any], *, grammar: bool = False) -> dict[str, Any]:
    """Sampling parameters as llama.cpp's samplers: {"samplers": [(name, arguments), ...], "applied", "ignored", "ours"}.

    `ours` is true where a parameter has no native sampler, so that modules.samplers picks the tokens instead.
    """
    from loaders._llama_sampling import plan

    honoured, ignored = table.split_supported(sampling, SPEC.samplers, SPEC.title)
    made = plan(honoured, grammar=grammar)
    applied = made.applied | guidance_of(honoured)
    return {"samplers": list(made.samplers), "applied": applied, "ignored": ignored | made.ignored, "ours": made.ours}


class LlamaCppEngine(Engine):
    spec = SPEC

    def __init__(self) -> None:
        self._model: LlamaModel | ServerModel | None = None
        self._runner: LlamaRunner | ServerModel | None = None
        self._schema_by_package = self._by_server = False
        self._grammars = Grammars(self._vocabulary)

    @classmethod
    def versions(cls) -> dict[str, str]:
        found = {}
        for package in ("llama-cpp-python", "xllamacpp"):
            try:
                found[package] = metadata.version(package)
            except metadata.PackageNotFoundError:
                continue
        return found

    def load(self, path: str, options: dict[str, Any], progress: Progress) -> ModelInfo:
        from loaders._llama_capi import open_library

        progress(LoadProgress("Starting llama.cpp"))
        self.close()
        library = None
        if options["engine"] != "xllamacpp_server":
            try:
                library = open_library(options["engine"])
            except BackendUnavailable as error:
                if options["engine"] == "llama_cpp" or not _has_xllamacpp():
                    raise
                print(f"llama.cpp: {error.message} Its in-process server is used instead.", file=sys.stderr)
        if library is None:
            from loaders._xllamacpp_server import ServerModel

            self._model = self._runner = ServerModel(path, options, progress)
            self._by_server = True
        else:
            from loaders._llama_generate import LlamaRunner
            from loaders._llama_load import LlamaModel

            self._model = LlamaModel(library, path, options, progress)
            self._schema_by_package = library.engine == "llama_cpp"
            self._runner = LlamaRunner(self._model)
        return self._model.info

    @property
    def model(self) -> LlamaModel | ServerModel:
        assert self._model is not None, "load comes first"
        return self._model

    @property
    def runner(self) -> LlamaRunner | ServerModel:
        assert self._runner is not None, "load comes first"
        return self._runner

    def generate(self, request: GenerationRequest, cancel: CancelToken) -> Iterator[Event | None]:
        _, ignored = table.split_supported(request.sampling, SPEC.samplers, SPEC.title)
        runner = self.runner
        if self._by_server:
            ignored |= dict.fromkeys(guidance_of(request.sampling), _NO_GUIDANCE)
        if self._by_server or find_spec("llguidance") is None:
            yield from runner.generate(request, cancel, self._grammar_of(request), ignored)
            return
        # llama.cpp reads GBNF itself; the other forms hold more than GBNF could say (patterns, ranges).
        constraint = self._grammars.constraint(request) if request.grammar is None else None
        yield from cast("LlamaRunner", runner).generate(request, cancel, request.grammar, ignored, constraint)

    def _grammar_of(self, request: GenerationRequest) -> str | None:
        """GBNF for what the answer is held to, where that is all there is."""
        if request.regex is not None:
            raise UnsupportedParameter(
                f"This build of {SPEC.title} takes a grammar or a JSON schema, no regular expression.",
                hint="Write it as a GBNF grammar.",
                param="regex",
            )
        return request.grammar if request.json_schema is None else self._schema_grammar(request.json_schema)

    def _vocabulary(self) -> Vocabulary:
        model = cast("LlamaModel", self.model)
        tokens = [model.piece(i) for i in range(model.n_vocab)]
        special = frozenset(i for i, piece in enumerate(tokens) if not piece)
        tokens = [piece or model.piece(i, special=True) for i, piece in enumerate(tokens)]
        return Vocabulary(model.n_vocab, model.eos_ids, tokens=tokens, special_ids=special)

    def _schema_grammar(self, schema: dict[str, Any]) -> str:
        """GBNF for a JSON schema: llama-cpp-python's converter, or ours, as xllamacpp's makes no GBNF."""
        from loaders._schema_gbnf import to_gbnf

        if not self._schema_by_package:
            return to_gbnf(schema)
        from llama_cpp.llama_grammar import json_schema_to_gbnf

        self.model.take_log()  # importing the package set its own
        try:
            return str(json_schema_to_gbnf(json.dumps(schema)))
        except Exception as error:
            raise InvalidGrammar(
                f"The JSON schema can't be made into a grammar: {error}.", hint="Check the schema.", param="json_schema"
            ) from error

    def encode(self, text: str, add_special: bool) -> list[int]:
        return self.model.encode(text, add_special)

    def decode(self, token_ids: Sequence[int], skip_special: bool = True) -> str:
        return self.model.decode(token_ids, skip_special)

    def token_text(self, token_id: int) -> str:
        return self.runner.token_text(token_id)

    def score(self, token_ids: Sequence[int]) -> list[float]:
        return self.runner.score(token_ids)

    def embed(self, token_ids: Sequence[int]) -> list[float]:
        if self._by_server:
            raise UnsupportedParameter(f"This build of {SPEC.title} makes no embeddings.")
        return cast("LlamaRunner", self.runner).embed(token_ids)

    def close(self) -> None:
        if self._model is not None:
            self._model.close()
        self._model = self._runner = None


def _has_xllamacpp() -> bool:
    return find_spec("xllamacpp") is not None
