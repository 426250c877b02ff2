"""Experiments with FlexGen for tests/unit/test_loader_flexgen.py, in the FlexGen environment (the tests' own has no torch):

python tests/flexgen_lab.py FOLDER BUNDLED     prints one line of JSON: {experiment: result}

FOLDER is an empty one to work in, BUNDLED the bundled OPT ("" without one).
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from loaders._flexgen_plan import weight_bytes  # noqa: E402
from loaders.flexgen import SPEC, FlexGenEngine  # noqa: E402
from modules.convert.children.hf_to_flexgen import convert  # noqa: E402
from modules.engine import CancelToken  # noqa: E402
from modules.errors import AppError  # noqa: E402
from modules.opt_weights import open_weights  # noqa: E402
from modules.schema import Done, GenerationRequest, StopParams, TokenEvent  # noqa: E402

TEXTS = ("Once upon a time", "A", "The little dog ran to the big red house and", "Hello! How")
TOKENS = 12
PLACEMENTS: dict[str, dict[str, Any]] = {
    "all on the GPU's side": {},
    "all on CPU": {"w_percent": "0,100,0", "cache_percent": "0,100,0", "act_percent": "0,100,0"},
    "mixed, several GPU batches": {
        "w_percent": "40,30,30",
        "cache_percent": "50,30,20",
        "gpu_batch_size": 2,
        "num_gpu_batches": 4,
    },
    "all on disk": {"percent": "0 0 0 0 0 0", "gpu_batch_size": 3, "num_gpu_batches": 2},
    "on disk without overlap, whole layers": {
        "w_percent": "0,0,100",
        "cache_percent": "0,0,100",
        "overlap": False,
        "sep_layer": False,
    },
    "float32 on CPU, several GPU batches": {
        "w_percent": "0,100,0",
        "dtype": "float32",
        "gpu_batch_size": 1,
        "num_gpu_batches": 8,
    },
}


def main() -> None:
    folder, bundled = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    galactica = tiny(folder / "tiny galactica", activation_function="gelu", enable_bias=False, ffn_dim=80)
    opt = tiny(folder / "tiny öpt")
    model = Path(bundled) if bundled else opt
    experiments: dict[str, Callable[[], Any]] = {
        "reference": lambda: greedy_reference(model),
        "placements": lambda: {name: greedy(model, **options) for name, options in PLACEMENTS.items()},
        "homes": lambda: [homes(opt, w_percent=percents) for percents in ("0,40,60", "30,30,40", "0,0,100")],
        "galactica": lambda: {"reference": scores_reference(galactica), "ours": scores(galactica)},
        "4 bit": lambda: compressed(model),
        "grown": lambda: grown(opt),
        "converted": lambda: converted(opt, folder / "tiny öpt-np"),
        "aside": lambda: score_while_generating(opt),
        "cancelled": lambda: cancelled(opt),
        "spares": spares,
        "offload left": lambda: [path.name for path in folder.glob("offload/*")],
    }
    results = {}
    for name, experiment in experiments.items():
        begun = time.process_time()
        results[name] = experiment()
        print(f"{name}: {time.process_time() - begun:.1f} s of processor time", file=sys.stderr, flush=True)
    print(json.dumps(results))


def tiny(folder: Path, **changes: Any) -> Path:
    """A random OPT of 2 layers with the bundled model's tokenizer cut to bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    torch.manual_seed(0)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<s>", "<pad>", "</s>", *alphabet])}
    core = Tokenizer(models.BPE(vocabulary, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    sizes = {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.OPTConfig(**{"vocab_size": len(vocabulary), "max_position_embeddings": 320, **sizes, **changes})
    model = transformers.OPTForCausalLM(config)
    for parameter in model.parameters():
        parameter.data = parameter.data + 0.2 * torch.randn_like(parameter)
    model.half().save_pretrained(folder)
    marks = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=core, **marks).save_pretrained(folder)
    return folder


def homes(folder: Path, **options: Any) -> tuple[dict[str, int], dict[str, int]]:
    """Where the weights are, and where the plan says they will be."""
    running = engine(folder, **options)
    model: Any = running._model
    found = model.bytes_by_home(), weight_bytes(open_weights(folder).shape, model.plan)
    running.close()
    return found


# --- ours ------------------------------------------------------------------------------------------------------


def engine(folder: Path, **options: Any) -> FlexGenEngine:
    made = FlexGenEngine()
    offload = str(Path(sys.argv[1]) / "offload")
    defaults = {o.name: o.default for o in SPEC.options} | {"threads": 1, "offload_dir": offload}
    made.load(str(folder), defaults | options, lambda p: None)
    return made


def request(name: str, ids: list[int], tokens: int) -> GenerationRequest:
    stop = StopParams(tokens, ignore_eos=True)
    return GenerationRequest(name, token_ids=tuple(ids), sampling={"temperature": 0.0}, stop=stop)


def run(made: FlexGenEngine, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """All prompts at once, stepped in turn as the worker does."""
    requests = [request(f"r{n}", ids, tokens) for n, ids in enumerate(prompts)]
    streams = {r.request_id: made.generate(r, CancelToken()) for r in requests}
    found: dict[str, list[int]] = {name: [] for name in streams}
    while streams:
        for name, events in list(streams.items()):
            event = next(events)
            if isinstance(event, TokenEvent):
                found[name] += event.token_ids
            if isinstance(event, Done):
                del streams[name]
    return list(found.values())


def prompts_of(folder: Path) -> list[list[int]]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return [tokenizer(text).input_ids for text in TEXTS]


def greedy(folder: Path, **options: Any) -> list[list[int]]:
    made = engine(folder, **options)
    try:
        return run(made, prompts_of(folder), TOKENS)
    finally:
        made.close()


def scores(folder: Path, **options: Any) -> list[float]:
    made = engine(folder, **options)
    try:
        return made.score(prompts_of(folder)[2])
    finally:
        made.close()


def compressed(folder: Path) -> dict[str, Any]:
    return {
        "plain": scores(folder),
        "weights": scores(folder, compress_weight=True, w_percent="30,30,40"),
        "cache": greedy(folder, compress_cache=True, cache_percent="0,100,0"),
        "cache on disk": greedy(folder, compress_cache=True, cache_percent="0,0,100"),
    }


def grown(folder: Path) -> dict[str, Any]:
    """More tokens than a block's first allotment of cache, with the cache in every place."""
    ids = prompts_of(folder)[:2]
    found = {}
    for name, options in {"gpu": {}, "mixed": {"cache_percent": "50,50,0"}, "disk": {"cache_percent": "0,0,100"}}.items():
        made = engine(folder, **options)
        found[name] = run(made, ids, 140)
        made.close()
    return found


def converted(folder: Path, out: Path) -> dict[str, Any]:
    convert(folder, out, "float16", lambda stage, fraction=None: None)
    for path in folder.glob("*.json"):  # the parent's part of a conversion
        shutil.copy(path, out)
    return {"before": scores(folder), "after": scores(out), "from disk": scores(out, w_percent="0,0,100")}


def score_while_generating(folder: Path) -> dict[str, Any]:
    """Scoring between two steps of a block changes neither."""
    ids = prompts_of(folder)
    made = engine(folder, w_percent="0,50,50")
    alone, block = made.score(ids[2]), run(made, ids[:2], 8)
    found: list[int] = []
    between = []
    for event in made.generate(request("r", ids[0], 8), CancelToken()):
        if isinstance(event, TokenEvent):
            found += event.token_ids
            between.append(made.score(ids[2]) == alone)
    made.close()
    return {"scores": between, "tokens": found, "expected": block[0]}


def cancelled(folder: Path) -> dict[str, Any]:
    """A cancelled request ends while the others go on; the next block is as good as ever."""
    ids = prompts_of(folder)
    made = engine(folder)
    whole = run(made, ids[:2], 8)
    tokens = [CancelToken(), CancelToken()]
    streams = [made.generate(request(f"c{n}", ids[n], 8), token) for n, token in enumerate(tokens)]
    ends: dict[int, Any] = {}
    texts: dict[int, list[int]] = {0: [], 1: []}
    while len(ends) < 2:
        for n in {0, 1} - ends.keys():
            event = next(streams[n])
            if isinstance(event, TokenEvent):
                texts[n] += event.token_ids
                if n == 0 and len(texts[0]) == 3:
                    tokens[0].cancel()
            if isinstance(event, Done):
                ends[n] = event.finish_reason
    again = run(made, ids[:2], 8)
    made.close()
    return {"reasons": [ends[0], ends[1]], "first": len(texts[0]), "second": texts[1], "whole": whole, "again": again}


# --- transformers ----------------------------------------------------------------------------------------------


def spares() -> dict[str, bool]:
    """Memory for weights that are expanded: of one in use, of one that is done with, and what another shape leaves of it."""
    from loaders._flexgen_device import Spares  # imports the package, which the experiments before have set up

    kept = Spares()
    first, second = kept.take((3, 4)), kept.take((3, 4))
    first.fill_(1)
    second.fill_(2)
    place = first.data_ptr()
    both = bool((first == 1).all())
    del first
    third = kept.take((3, 4))
    reused = third.data_ptr() == place and bool((second == 2).all())
    del third
    kept.take((4, 3))
    held = {shape: len(pairs) for shape, pairs in kept._kept.items()}
    return {"apart": both, "reused": reused, "freed": held == {(3, 4): 1, (4, 3): 1}}


def reference(folder: Path) -> Any:
    return transformers.OPTForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def greedy_reference(folder: Path) -> list[list[int]]:
    model, found = reference(folder), []
    for ids in prompts_of(folder):
        given = torch.tensor([ids])
        out = model.generate(
            given, attention_mask=torch.ones_like(given), do_sample=False, min_new_tokens=TOKENS, max_new_tokens=TOKENS,
            eos_token_id=None, pad_token_id=0, temperature=None, top_p=None, top_k=None,
        )  # fmt: skip
        found.append(out[0, len(ids) :].tolist())
    return found


def scores_reference(folder: Path) -> list[float]:
    ids = torch.tensor([prompts_of(folder)[2]])
    with torch.inference_mode():
        logs = reference(folder)(ids).logits[0, :-1].log_softmax(-1)
    return logs.gather(1, ids[0, 1:, None])[:, 0].tolist()


if __name__ == "__main__":
    status = 1
    try:
        main()
        status = 0
    except AppError as error:
        print(f"{error.code}: {error}", file=sys.stderr)
    except Exception:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # FlexGen's copy threads would keep a failed run alive
