"""ExLlama without CUDA: what it takes and refuses, the option mapping, the sharing of one KV cache, the calls it makes."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from loaders import _exllama_load as load_module
from loaders._exllama_load import adapters_of, check_options, context_size, package_for, parse_split, typed, why_no_import
from loaders._exllama_nets import Net, Session, V2Net, V3Net
from loaders.exllama import SPEC, ExllamaEngine, refusal
from modules import sampling
from modules.errors import AppError, CorruptModel, IncompatibleModel, InvalidParameter, LoadError, LoadOutOfMemory
from modules.load_options import complete_options
from modules.registry import rank
from modules.schema import ModelFiles, Quantization
from tests.conftest import ROOT
from tests.unit.exllama_signatures import SIGNATURES, read_signatures

if TYPE_CHECKING:
    from collections.abc import Callable

    from modules.overlays import Overlays
    from modules.schema import LoaderSpec


def model(form: str, bits: float | None = 4, path: str = "/no such place") -> ModelFiles:
    return ModelFiles("m", path, form, quantization=Quantization(form, bits))  # type: ignore[arg-type]


class Ready:
    """A machine on which every loader runs."""

    def unavailable(self, spec: LoaderSpec) -> str | None:
        return None


# --- what it takes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form,bits,package",
    [("gptq", 4, "exllamav2"), ("gptq", None, "exllamav2"), ("exl2", 4.25, "exllamav2"), ("exl3", 3.0, "exllamav3")],
)
def test_the_package_is_chosen_by_format(form: str, bits: float | None, package: str) -> None:
    assert package_for(model(form, bits)) == package


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_gptq_of_other_widths_is_refused_in_the_list_and_at_the_load(bits: int) -> None:
    choice = rank(model("gptq", bits), [SPEC], Ready())[0]
    assert not choice.ok and f"this has {bits}" in choice.reason and "GPTQ-for-LLaMA" in choice.reason
    with pytest.raises(IncompatibleModel, match=f"this has {bits}"):
        package_for(model("gptq", bits))


def test_other_formats_and_single_files_are_refused(tmp_path: Path) -> None:
    assert refusal(model("exl2", 2.5)) is None
    with pytest.raises(IncompatibleModel, match="gguf"):
        package_for(model("gguf"))
    single = tmp_path / "llama-4bit.safetensors"
    single.write_bytes(b"")
    with pytest.raises(IncompatibleModel, match="folder"):
        package_for(model("gptq", 4, str(single)))


def test_a_machine_without_a_gpu_is_told_so(overlays: Overlays, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modules.overlays.nvidia_present", lambda platform=sys.platform: False)
    choice = rank(model("gptq", 4), [SPEC], overlays)[0]
    assert not choice.ok and choice.reason == "needs an NVIDIA GPU with CUDA; none was found here."


def test_set_up_leaves_it_out_without_a_gpu_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import one_click
    from modules.pip_output import SetupError

    lines: list[str] = []
    console: Any = SimpleNamespace(line=lines.append)
    monkeypatch.setattr("modules.overlays.nvidia_present", lambda platform=sys.platform: False)
    assert one_click.Launch._usable(["torch", "exllama"], console) == ["torch"]
    assert lines == ["ExLlama is left out: it needs an NVIDIA GPU with CUDA; none was found here."]
    with pytest.raises(SetupError, match="ExLlama needs an NVIDIA GPU"):
        object.__new__(one_click.Launch).install_named(["exllama"])
    monkeypatch.setattr("modules.overlays.nvidia_present", lambda platform=sys.platform: True)
    assert one_click.Launch._usable(["torch", "exllama"], console) == ["torch", "exllama"]


# --- options ------------------------------------------------------------------------------------------------------


def options(**values: Any) -> dict[str, Any]:
    return complete_options(SPEC, values)


def test_options_take_the_names_people_know() -> None:
    made = options(max_seq_len=4096, **{"gpu-split": "20,7", "enable_tp": True, "kv_cache": "q6"})
    assert (made["ctx_size"], made["gpu_split"], made["tensor_parallel"], made["kv_cache"]) == (4096, "20,7", True, "q6")


@pytest.mark.parametrize("text,split", [("", None), (" ", None), ("20,7", [20.0, 7.0]), ("0, 7.5", [0.0, 7.5]), ("24", [24.0])])
def test_gpu_split(text: str, split: list[float] | None) -> None:
    assert parse_split(text) == split


@pytest.mark.parametrize("text", ["a", "20,", "20;7", "-1,5", "0,0", "1e3", "nan", "20GB"])
def test_a_bad_gpu_split_is_typed(text: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        parse_split(text)
    assert caught.value.param == "gpu_split"


@pytest.mark.parametrize("name,value", [("alpha_value", 2.0), ("compress_pos_emb", 4.0), ("num_experts_per_token", 3)])
def test_what_exllamav3_does_not_have_is_refused(name: str, value: float) -> None:
    check_options("exllamav2", options(**{name: value}))
    with pytest.raises(InvalidParameter) as caught:
        check_options("exllamav3", options(**{name: value}))
    assert caught.value.param == name


def test_as_many_weights_as_adapters() -> None:
    with pytest.raises(InvalidParameter, match="1 adapters and 2 weights"):
        check_options("exllamav2", options(lora=["a"], lora_weights="1,2"))


def test_the_context_is_the_models_own_unless_asked() -> None:
    config = {"max_position_embeddings": 8192, "vocab_size": 10}
    assert (context_size(config, 0), context_size(config, 512), context_size({"vocab_size": 10}, 0)) == (8192, 512, 4096)
    assert context_size({"text_config": config}, 0) == 8192
    with pytest.raises(CorruptModel, match="vocab_size"):
        context_size({}, 0)


# --- sampling -----------------------------------------------------------------------------------------------------


def test_every_parameter_is_honoured_or_reported() -> None:
    for parameter in sampling.PARAMETERS.values():
        value = {"float": parameter.maximum, "int": 2, "bool": not parameter.neutral, "bias": {"1": 2.0}}.get(parameter.kind)
        if value is None or not sampling.active({parameter.name: value}):
            continue
        made = ExllamaEngine.to_native(sampling.check({parameter.name: value}))
        assert parameter.name in made["sampler"] or "ExLlama" in made["ignored"][parameter.name], parameter.name
    assert "num_beams" in ExllamaEngine.to_native(sampling.check({"num_beams": 2}))["ignored"]


# --- text ---------------------------------------------------------------------------------------------------------

_READ = """
import json, sys
from pathlib import Path
from loaders._exllama_load import FileTokenizer, _generation_eos
from loaders._hf_load import end_token_ids
from loaders._hf_text import TextCodec
folder = Path(sys.argv[1])
tokenizer = FileTokenizer(folder)
codec = TextCodec(tokenizer)
ids = codec.encode("Once upon a time <|im_end|>", True)
config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
print(json.dumps([
    tokenizer.bos_token, tokenizer.bos_token_id, tokenizer.eos_token, tokenizer.eos_token_id, codec.decode(ids, False),
    ids[-1], sorted(end_token_ids(_generation_eos(folder, config), tokenizer)), tokenizer.chat_template,
    [name for name in ("torch", "transformers") if name in sys.modules],
]))
"""


def test_the_tokenizer_is_read_without_transformers(overlays: Overlays) -> None:
    """In the environment of Transformers, for its tokenizers package alone: ExLlama's is there on CUDA machines only."""
    if not overlays.has_module("transformers", "tokenizers"):
        pytest.skip("the Transformers environment is not installed")
    folder = ROOT / "models" / "wren-6m-gptq-4bit-128g"
    done = subprocess.run(
        [str(overlays.python("transformers")), "-c", _READ, str(folder)], cwd=ROOT, env=overlays.worker_env("transformers"),
        capture_output=True, text=True, encoding="utf-8", timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *found, template, loaded = json.loads(done.stdout)
    assert found == ["<|endoftext|>", 0, "<|im_end|>", 2, "Once upon a time <|im_end|>", 2, [0, 2]]
    assert template == (folder / "chat_template.jinja").read_text(encoding="utf-8")
    assert loaded == [], "it needs neither"


# --- one KV cache, several sessions -------------------------------------------------------------------------------


class Ids:
    """As much of a torch tensor of ids [1, n] as the nets use."""

    def __init__(self, rows: list[list[int]]) -> None:
        self.rows = rows

    def __getitem__(self, index: int) -> SimpleNamespace:
        return SimpleNamespace(tolist=lambda: list(self.rows[index]))

    def new_tensor(self, rows: list[list[int]]) -> Ids:
        return Ids(rows)


VOCAB, PADDED = 50, 64


def logits_after(held: list[int]) -> list[float]:
    """Numbers that depend on every id and its place: a cache with a wrong id anywhere gives others."""
    rng = np.random.default_rng(hash(tuple(held)) % 2**32)
    return [float(v) for v in rng.normal(size=PADDED)]


class FakeBuffer:
    """A KV cache: position -> id."""

    def __init__(self) -> None:
        self.held: list[int] = []
        self.current_seq_len = 0
        self.passes: list[int] = []

    def run(self, past: int, ids: list[int], last: int | None) -> Any:
        assert past <= len(self.held), "there is a hole in the cache"
        self.held = self.held[:past] + ids
        self.passes.append(len(ids))
        rows = [logits_after(self.held[: past + n + 1]) for n in range(len(ids))]
        return np.array([rows[-last:] if last else rows])


class FakeV2:
    def forward(self, input_ids: Ids, cache: FakeBuffer, last_id_only: bool, loras: list[Any] | None) -> Any:
        assert loras is None or loras
        made = cache.run(cache.current_seq_len, input_ids.rows[0], 1 if last_id_only else None)
        cache.current_seq_len += len(input_ids.rows[0])
        return made


class FakeV3:
    """`recurrent`: with a state beside the cache, as exllamav3 keeps it: one slot, given back by release_state."""

    def __init__(self, recurrent: bool) -> None:
        self.recurrent = recurrent
        self.released = 0

    def get_recurrent_layers(self) -> list[str]:
        return ["layer"] if self.recurrent else []

    def forward(self, input_ids: Ids, params: dict[str, Any]) -> Any:
        assert params["attn_mode"] == "flash_attn" and params["batch_shape"] == (1, 256)
        ids = input_ids.rows[0]
        if self.recurrent:
            states = params.setdefault("recurrent_states", [{"position": 0}])
            assert states[0]["position"] == params["past_len"], "the state does not match the place"
            states[0]["position"] += len(ids)
        return params["cache"].run(params["past_len"], ids, params["last_tokens_only"])


class FakeV3Cache(FakeBuffer):
    def __init__(self, owner: FakeV3) -> None:
        super().__init__()
        self.owner = owner

    def release_state(self, state: dict[str, int]) -> None:
        self.owner.released += 1


def v2() -> tuple[Net, FakeBuffer]:
    cache = FakeBuffer()
    return V2Net(FakeV2(), cache, [], 8, VOCAB), cache


def v3(recurrent: bool = False) -> tuple[Net, FakeBuffer]:
    made = FakeV3(recurrent)
    cache = FakeV3Cache(made)
    return V3Net(made, cache, 256, 8, VOCAB), cache


def ask(net: Net, session: Session, *ids: int, keep: int = 1) -> Any:
    return net(input_ids=Ids([list(ids)]), past_key_values=session, use_cache=True, logits_to_keep=keep).logits


def expected(*ids: int) -> list[float]:
    return logits_after(list(ids))[:VOCAB]


@pytest.mark.parametrize("make", [v2, v3, lambda: v3(recurrent=True)], ids=["v2", "v3", "v3 recurrent"])
class TestNets:
    def test_logits_are_those_of_the_whole_text_without_the_padding(self, make: Callable[[], tuple[Net, FakeBuffer]]) -> None:
        net, _ = make()
        session = net.new_cache()
        ask(net, session, 1, 2, 3)
        assert ask(net, session, 4)[0, -1].tolist() == expected(1, 2, 3, 4)
        assert session.ids == [1, 2, 3, 4]

    def test_several_positions_at_once(self, make: Callable[[], tuple[Net, FakeBuffer]]) -> None:
        net, _ = make()
        session = net.new_cache()
        ask(net, session, 9)
        rows = ask(net, session, 5, 6, 7, keep=3)
        assert rows.shape == (1, 3, VOCAB)
        assert rows[0].tolist() == [expected(9, 5), expected(9, 5, 6), expected(9, 5, 6, 7)]

    def test_a_second_session_does_not_spoil_the_first(self, make: Callable[[], tuple[Net, FakeBuffer]]) -> None:
        net, cache = make()
        first, second = net.new_cache(), net.new_cache()
        ask(net, first, *range(1, 20))
        assert ask(net, second, 30, 31)[0, -1].tolist() == expected(30, 31)
        cache.passes.clear()
        assert ask(net, first, 20)[0, -1].tolist() == expected(*range(1, 21))
        assert cache.passes == [8, 8, 3, 1], "computed again in chunks, then the new token"
        assert ask(net, first, 21)[0, -1].tolist() == expected(*range(1, 22))


@pytest.mark.parametrize("make", [v2, v3], ids=["v2", "v3"])
def test_a_shared_prefix_is_kept(make: Callable[[], tuple[Net, FakeBuffer]]) -> None:
    net, cache = make()
    session = net.new_cache()
    assert session.croppable
    ask(net, session, 1, 2, 3, 4, 5)
    session.crop(-2)
    cache.passes.clear()
    assert ask(net, session, 7)[0, -1].tolist() == expected(1, 2, 3, 7)
    assert cache.passes == [1]


def test_recurrent_layers_can_not_go_back_and_their_state_is_given_back() -> None:
    net, cache = v3(recurrent=True)
    first = net.new_cache()
    assert not first.croppable
    ask(net, first, 1, 2)
    ask(net, net.new_cache(), 3)
    assert isinstance(cache, FakeV3Cache) and cache.owner.released == 1


# --- the calls of the packages ------------------------------------------------------------------------------------


def _calls(package: str) -> list[tuple[str, int, set[str]]]:
    """(method, positional arguments, keywords) of what our code calls of a package and the table knows."""
    functions = {"exllamav2": {"_load_v2", "V2Net"}, "exllamav3": {"_load_v3", "V3Net"}}[package]
    names: dict[str, str] = {}
    for key in SIGNATURES[package]:
        owner, _, method = key.partition(".")
        names[owner if method == "__init__" else method.replace("load_gen", "load")] = key
    found = []
    for module in ("_exllama_load.py", "_exllama_nets.py"):
        tree = ast.parse((ROOT / "loaders" / module).read_text(encoding="utf-8"))
        for part in tree.body:
            if not isinstance(part, (ast.FunctionDef, ast.ClassDef)) or part.name not in functions:
                continue
            for node in ast.walk(part):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in names:
                    keywords = {keyword.arg for keyword in node.keywords if keyword.arg}
                    found.append((names[node.func.attr], len(node.args), keywords))
    return found


@pytest.mark.parametrize("package", ["exllamav2", "exllamav3"])
def test_calls_fit_the_signatures(package: str) -> None:
    calls = _calls(package)
    assert len({name for name, _, _ in calls}) >= 6, "the calls are found"
    for name, positional, keywords in calls:
        parameters = SIGNATURES[package][name].split()
        free = "**" in parameters
        named = [parameter for parameter in parameters if parameter != "**"]
        assert positional <= len(named), name
        assert free or keywords <= set(named[positional:]), f"{name}: {keywords - set(named[positional:])}"


@pytest.mark.parametrize("package", ["exllamav2", "exllamav3"])
def test_the_table_is_the_packages_own(package: str, overlays: Overlays) -> None:
    folder = next((site / package for site in overlays.layers("exllama") if (site / package).is_dir()), None)
    if folder is None:
        pytest.skip(f"{package} is not in the exllama environment")
    source = read_signatures(folder)
    for name, parameters in SIGNATURES[package].items():
        assert source.get(name) == parameters, name


class Recorder:
    """Stands for one class of a package: remembers how it was made."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        self.arguments, self.keywords = arguments, keywords

    def __getattr__(self, name: str) -> Any:
        if name.startswith("no_"):
            return False
        return lambda *arguments, **keywords: setattr(self, f"_{name}", (arguments, keywords))


def fake_v2() -> ModuleType:
    module = ModuleType("exllamav2")
    for name in ("Config", "", "Cache", "Cache_Q8", "Cache_Q6", "Cache_Q4", "Cache_TP"):
        setattr(module, f"ExLlamaV2{name}", type(name or "Model", (Recorder,), {}))
    module.ExLlamaV2Lora = SimpleNamespace(from_directory=lambda *arguments: arguments)  # type: ignore[attr-defined]
    return module


def load_v2(monkeypatch: pytest.MonkeyPatch, **values: Any) -> Any:
    monkeypatch.setitem(sys.modules, "exllamav2", fake_v2())
    net = load_module._load_v2(Path("/m"), 1024, options(**values), lambda done, total: None, VOCAB)
    return net


def test_v2_fills_the_gpus_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    net = load_v2(monkeypatch, kv_cache="q4", alpha_value=2.5, no_sdpa=True)
    config = net._model.arguments[0]
    assert (config.model_dir, config.max_seq_len, config.max_input_len, config.scale_alpha_value) == ("/m", 1024, 1024, 2.5)
    assert (config.no_sdpa, config.no_flash_attn) == (True, False)
    assert type(net._cache).__name__ == "Cache_Q4" and net._cache.keywords["lazy"] is True
    assert net._model._load_autosplit[0] == (net._cache,)


def test_v2_keeps_to_a_split(monkeypatch: pytest.MonkeyPatch) -> None:
    net = load_v2(monkeypatch, gpu_split="10,8", prefill_chunk=64)
    assert net._model._load[1]["gpu_split"] == [10.0, 8.0] and "lazy" not in net._cache.keywords
    assert net._model.arguments[0].max_input_len == 64


def test_v2_tensor_parallel(monkeypatch: pytest.MonkeyPatch) -> None:
    net = load_v2(monkeypatch, tensor_parallel=True, kv_cache="q8")
    assert type(net._cache).__name__ == "Cache_TP" and net._cache.keywords["base"].__name__ == "Cache_Q8"
    assert net._model._load_tp[1]["expect_cache_tokens"] == 1024


def test_v2_adapters(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes(b"{}")
    net = load_v2(monkeypatch, lora=[str(tmp_path)], lora_weights="0.5")
    assert net._loras == [(net._model, str(tmp_path), 0.5)]
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(CorruptModel, match="pickle"):
        adapters_of({"lora": [str(tmp_path)], "lora_weights": ""})
    with pytest.raises(CorruptModel, match="no LoRA adapter"):
        adapters_of({"lora": [str(tmp_path / "none")], "lora_weights": ""})


def test_v3_cache_in_pages_and_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("exllamav3")
    for name in ("Cache", "CacheLayer_quant", "CacheLayer_fp16"):
        setattr(module, name, type(name, (Recorder,), {}))
    module.Config = SimpleNamespace(from_directory=lambda folder: folder)  # type: ignore[attr-defined]
    module.Model = SimpleNamespace(from_config=Recorder)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "exllamav3", module)
    net: Any = load_module._load_v3(Path("/m"), 1000, options(kv_cache="q6", gpu_split="8"), lambda done, total: None, VOCAB)
    assert net._cache.keywords["max_num_tokens"] == 1024 and net._size == 1024
    assert (net._cache.keywords["k_bits"], net._cache.keywords["v_bits"]) == (6, 6)
    assert net._cache.keywords["layer_type"].__name__ == "CacheLayer_quant"
    assert net._model._load[1]["use_per_device"] == [8.0] and net._model._load[1]["max_output_size"] == 1024
    net = load_module._load_v3(Path("/m"), 256, options(), lambda done, total: None, VOCAB)
    assert net._cache.keywords["layer_type"].__name__ == "CacheLayer_fp16" and "k_bits" not in net._cache.keywords


# --- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error,kind,says",
    [
        (RuntimeError("Insufficient VRAM for model and cache"), LoadOutOfMemory, "memory"),
        (AssertionError("Total sequence length exceeds cache size"), LoadError, "exllamav2 does not take the model so"),
        (ValueError(" ## Could not find model.layers.0.mlp.down_proj.* in model"), CorruptModel, "Could not find"),
        (NotImplementedError("Unknown architecture Foo in config.json"), IncompatibleModel, "FooForCausalLM"),
    ],
)
def test_what_the_packages_raise_is_typed(error: Exception, kind: type[AppError], says: str) -> None:
    made = typed(error, {"architectures": ["FooForCausalLM"]}, "exllamav2")
    assert type(made) is kind and says in made.message and made.hint


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    reason = why_no_import("exllamav2", OSError("CUDA_HOME environment variable is not set."), "13.0")
    assert reason.startswith("exllamav2's CUDA kernels can't be compiled: nvcc and")
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    assert "CUDA 13.0: boom" in why_no_import("exllamav3", RuntimeError("boom"), "13.0")
    missing = ModuleNotFoundError("No module named 'exllamav3'", name="exllamav3")
    assert why_no_import("exllamav3", missing, None) == "exllamav3 is not installed."
