"""Beam search, through transformers' `generate()`: the one way to decode here that is not our own loop."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from modules.samplers import new_seed
from modules.schema import Done, Event, GenerationRequest, PrefillProgress, Timings, Usage

if TYPE_CHECKING:
    from loaders._hf_generate import HfRunner
    from modules.engine import CancelToken


def beam_search(
    runner: HfRunner, request: GenerationRequest, cancel: CancelToken, arguments: dict[str, Any], ignored: dict[str, str]
) -> Iterator[Event | None]:
    """Beams through `generate()`: the text comes at the end, in one piece."""
    import torch
    from transformers import StoppingCriteriaList

    started = time.perf_counter()
    ids = runner.prompt_ids(request)
    assembler = runner.assembler(request, ids)
    room = runner.info.context_length - len(ids)
    limit = room if request.stop.max_tokens is None else min(request.stop.max_tokens, room)
    ends = sorted(assembler.end_ids)
    banned = request.sampling.get("ban_eos_token", False) or not ends
    yield PrefillProgress(request.request_id, 0, len(ids))
    found: list[int] = []
    if limit > 0:
        try:
            with runner.products(len(ids)):
                output = runner.model.generate(
                    torch.tensor([ids], device=runner.device),
                    attention_mask=torch.ones((1, len(ids)), dtype=torch.long, device=runner.device),
                    max_new_tokens=limit,
                    min_new_tokens=limit if banned else min(request.stop.min_tokens, limit),
                    eos_token_id=ends or None,
                    pad_token_id=ends[0] if ends else 0,
                    stopping_criteria=StoppingCriteriaList([lambda rows, *_, **__: torch.full((len(rows),), cancel.cancelled)]),
                    **arguments,
                )
        except Exception as error:
            runner.raise_typed(error)
        found = output[0, len(ids) :].tolist()
    yield PrefillProgress(request.request_id, len(ids), len(ids))
    ended = time.perf_counter()
    for token in found:
        if assembler.finish_reason is None:
            event = assembler.push(token)
            if event is not None:
                yield event
    if assembler.finish_reason is None:
        event = assembler.cancel()
        if event is not None:
            yield event
    yield Done(
        request.request_id,
        "cancelled" if cancel.cancelled else assembler.finish_reason or "length",
        Usage(len(ids), assembler.count),
        Timings(0.0, ended - started),
        stop_match=assembler.stop_match,
        peak_memory_bytes=runner.peak_memory(),
        applied={k: v for k, v in arguments.items() if k != "do_sample"},
        ignored=ignored,
        seed=new_seed() if request.sampling.get("seed", -1) < 0 else request.sampling["seed"],
    )
