"""Flags of text-generation-webui that mean something else here, or nothing, each with the reason: a warning, not a crash.

A flag leaves this table when a loader or the server takes it up; a known flag always wins over its row here.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from modules.sampling import PARAMETERS


@dataclass(frozen=True)
class ForeignFlag:
    """`takes_values`: 0 for a switch, 1 for one value, 2 for several."""

    reason: str
    takes_values: int = 0


# Flags that mean the same as others here: {} is the value.
TRANSLATED: dict[str, tuple[str, ...]] = {
    "--bf16": ("--dtype", "bfloat16"),
    "--cache-type": ("--cache-type-k", "{}", "--cache-type-v", "{}"),
}

# Switches there, flags with a value here: what the bare flag means.
BARE: dict[str, str] = {"--numa": "distribute"}

# Flags that take several words there and one here: their words are joined.
JOINED: dict[str, int] = {"--percent": 6}
# Switches that take a yes or no as a word of its own there.
YES_OR_NO = frozenset({"--pin-weight"})
YES, NO = frozenset("yes true t y 1".split()), frozenset("no false f n 0".split())

_ALWAYS_API = "the API is always on, on the same port as the page."
_NO_SHARE = "Switchyard opens no public tunnel; use a reverse proxy or SSH."
_AUTOMATIC = "this is chosen from the model's own files."
_NO_IMAGES = "Switchyard makes no images."
_OLD_UI = "there is one page with every mode."
_ONE_KERNEL = "the kernel is chosen from what the model and the machine can do."
_GONE = "no backend of Switchyard has it."
_NOT_YET = "no loader of this release has it yet."
_NO_DRAFT = "there is no speculative decoding yet."
_PER_REQUEST = "generation parameters belong to each request; the page's presets keep your defaults."
_USERS = "chats belong to the server; use --api-key to keep others out."

_TABLE: dict[str, ForeignFlag] = {
    "--api": ForeignFlag(_ALWAYS_API),
    "--api-port": ForeignFlag(_ALWAYS_API, 1),
    "--api-enable-ipv6": ForeignFlag("use --listen-host ::."),
    "--api-disable-ipv4": ForeignFlag("use --listen-host ::."),
    "--api-blocking-port": ForeignFlag(_ALWAYS_API, 1),
    "--api-streaming-port": ForeignFlag(_ALWAYS_API, 1),
    "--public-api": ForeignFlag(_NO_SHARE),
    "--public-api-id": ForeignFlag(_NO_SHARE, 1),
    "--share": ForeignFlag(_NO_SHARE),
    "--gradio-auth": ForeignFlag(_USERS, 1),
    "--gradio-auth-path": ForeignFlag(_USERS, 1),
    "--multi-user": ForeignFlag(_USERS),
    "--portable": ForeignFlag("the folder is portable as it is."),
    "--old-colors": ForeignFlag("choose the theme on the page."),
    "--model-menu": ForeignFlag("choose the model on the page."),
    "--notebook": ForeignFlag(_OLD_UI),
    "--chat": ForeignFlag(_OLD_UI),
    "--cai-chat": ForeignFlag(_OLD_UI),
    "--character": ForeignFlag("choose the character on the page.", 1),
    "--no-stream": ForeignFlag("streaming is chosen by each request."),
    "--image-model": ForeignFlag(_NO_IMAGES, 1),
    "--image-model-dir": ForeignFlag(_NO_IMAGES, 1),
    "--image-dtype": ForeignFlag(_NO_IMAGES, 1),
    "--image-attn-backend": ForeignFlag(_NO_IMAGES, 1),
    "--image-cpu-offload": ForeignFlag(_NO_IMAGES),
    "--image-compile": ForeignFlag(_NO_IMAGES),
    "--image-quant": ForeignFlag(_NO_IMAGES, 1),
    "--multimodal-pipeline": ForeignFlag(_NO_IMAGES, 1),
    "--ik": ForeignFlag(_GONE),
    "--streaming-llm": ForeignFlag("the prefix cache is always on."),
    "--cache-capacity": ForeignFlag("the prefix cache is always on.", 1),
    "--extra-flags": ForeignFlag("give each option by its own flag.", 1),
    "--fit-target": ForeignFlag(_GONE, 1),
    "--tp-backend": ForeignFlag(_GONE, 1),
    "--cfg-cache": ForeignFlag(_GONE),
    "--no-use-fast": ForeignFlag(_AUTOMATIC),
    "--force-safetensors": ForeignFlag("pickle files are refused anyway."),
    "--no-cache": ForeignFlag("the KV cache is always on."),
    "--xformers": ForeignFlag(_ONE_KERNEL),
    "--sdp-attention": ForeignFlag(_ONE_KERNEL),
    "--low-vram": ForeignFlag("use --gpu-layers and --no-kv-offload."),
    "--llama-cpp-seed": ForeignFlag("the seed belongs to each request.", 1),
    "--wbits": ForeignFlag(_AUTOMATIC, 1),
    "--groupsize": ForeignFlag(_AUTOMATIC, 1),
    "--model-type": ForeignFlag(_AUTOMATIC, 1),
    "--desc-act": ForeignFlag(_AUTOMATIC),
    "--checkpoint": ForeignFlag(_AUTOMATIC, 1),
    "--gptq-for-llama": ForeignFlag("use --loader gptq_for_llama."),
    "--autogptq": ForeignFlag("use --loader autogptq."),
    "--flexgen": ForeignFlag("use --loader flexgen."),
    "--triton": ForeignFlag(_ONE_KERNEL),
    "--quant-attn": ForeignFlag(_ONE_KERNEL),
    "--warmup-autotune": ForeignFlag(_ONE_KERNEL),
    "--fused-mlp": ForeignFlag(_ONE_KERNEL),
    "--no-inject-fused-attention": ForeignFlag(_ONE_KERNEL),
    "--no-inject-fused-mlp": ForeignFlag(_ONE_KERNEL),
    "--no-use-cuda-fp16": ForeignFlag(_ONE_KERNEL),
    "--monkey-patch": ForeignFlag(_GONE),
    "--auto-devices": ForeignFlag("devices are shared out by default."),
    "--deepspeed": ForeignFlag(_GONE),
    "--nvme-offload-dir": ForeignFlag(_GONE, 1),
    "--local-rank": ForeignFlag(_GONE, 1),
    "--pre-layer": ForeignFlag("use --gpu-layers.", 2),
    "--model-draft": ForeignFlag(_NO_DRAFT, 1),
    "--draft-max": ForeignFlag(_NO_DRAFT, 1),
    "--gpu-layers-draft": ForeignFlag(_NO_DRAFT, 1),
    "--device-draft": ForeignFlag(_NO_DRAFT, 1),
    "--ctx-size-draft": ForeignFlag(_NO_DRAFT, 1),
    "--spec-type": ForeignFlag(_NO_DRAFT, 1),
    "--spec-ngram-size-n": ForeignFlag(_NO_DRAFT, 1),
    "--spec-ngram-size-m": ForeignFlag(_NO_DRAFT, 1),
    "--spec-ngram-min-hits": ForeignFlag(_NO_DRAFT, 1),
    "--cpu-moe": ForeignFlag(_NOT_YET),
    "--parallel": ForeignFlag("requests to one model wait in a fair queue.", 1),
    "--trust-remote-code": ForeignFlag("a model's own Python code is never run."),
    "--enable-thinking": ForeignFlag(_PER_REQUEST),
    "--preserve-thinking": ForeignFlag(_PER_REQUEST),
    "--reasoning-effort": ForeignFlag(_PER_REQUEST, 1),
    "--chat-template-file": ForeignFlag("put chat_template.jinja into the model's folder.", 1),
}
# Each generation parameter was a flag, too.
FOREIGN_FLAGS: dict[str, ForeignFlag] = {
    "--" + name.replace("_", "-"): ForeignFlag(_PER_REQUEST, 0 if parameter.kind == "bool" else 1)
    for parameter in PARAMETERS.values()
    for name in (parameter.name, *parameter.aliases)
} | _TABLE


def adopt(line: Sequence[str], known: set[str], commands: Collection[str]) -> tuple[list[str], list[str]]:
    """The line with text-generation-webui's flags turned into ours where they mean the same; the others are left out, with one
    line of warning for each. `known` are our flags, `commands` our subcommands, which are no flag's value."""
    kept: list[str] = []
    warnings: list[str] = []
    words = list(line)
    while words:
        word = words.pop(0)
        flag, equals, value = word.partition("=")
        why = FOREIGN_FLAGS.get(flag)
        if flag in BARE and not equals and (not words or words[0].startswith("--") or words[0] in commands):
            kept += [flag, BARE[flag]]
        elif flag in JOINED and not equals:
            taken = list(itertools.takewhile(_is_number, words[: JOINED[flag]]))
            del words[: len(taken)]
            kept += [f"{flag}={' '.join(taken)}"] if taken else [flag]
        elif flag in YES_OR_NO and not equals and words and words[0].lower() in YES | NO:
            kept.append(flag if words.pop(0).lower() in YES else flag.replace("--", "--no-", 1))
        elif flag in known or (flag not in TRANSLATED and why is None):
            kept.append(word)
        elif flag in TRANSLATED:
            template = TRANSLATED[flag]
            if "{}" in template and not equals:
                value = words.pop(0) if words else ""
            kept += [part.replace("{}", value) for part in template]
        elif why is not None:
            warnings.append(f"{flag} is ignored: {why.reason}")
            if not equals:
                _drop_values(words, why.takes_values, commands)
    return kept, warnings


def _is_number(word: str) -> bool:
    return word.replace(".", "", 1).isdecimal()


def _drop_values(words: list[str], most: int, commands: Collection[str]) -> None:
    """Remove the values of a flag that was left out; the next flag or subcommand is none."""
    for _ in range(1 if most == 1 else len(words) if most else 0):
        if not words or words[0].startswith("--") or words[0] in commands:
            return
        words.pop(0)
