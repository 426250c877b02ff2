"""Zero-shot tasks by lm-evaluation-harness (the package `lm_eval`), which runs in an environment of its own beside the worker.

The harness makes the requests and scores the answers; this side computes them on the model that is open anyway, so that every
backend that can score can be measured and the tokens are always the model's own. The two talk by lines of JSON over pipes: the
harness asks {"call", ...}, the answer is {"value"} or {"error"}. Nothing is fetched unless that is asked for.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from modules.child_process import Ended, run_job
from modules.errors import BackendUnavailable, EngineError, GenerationFailed, IncompatibleModel
from modules.overlays import start_script
from modules.schema import features_of

if TYPE_CHECKING:
    from modules.evaluate.plan import TaskPlan
    from modules.evaluate.subject import Subject
    from modules.overlays import Overlays

OVERLAY = "lm_eval"
OnStep = Callable[[float, str], Awaitable[None]]


def unavailable(overlays: Overlays) -> str | None:
    """Why tasks can't be run here, with the fix; None when they can."""
    if overlays.complete(OVERLAY) and overlays.has_module(OVERLAY, "lm_eval"):
        return None
    return f"lm-evaluation-harness is not installed: {start_script()} install {OVERLAY}"


async def run_tasks(subject: Subject, plan: TaskPlan, overlays: Overlays, on_step: OnStep) -> dict[str, Any]:
    """The tasks' results: {"results": {task: {metric: value}}, "few_shot", "samples", "versions", "harness"}.

    Raises BackendUnavailable without the package, IncompatibleModel for a backend that can't score, EngineDead when the worker
    dies, and what the harness names: an unknown task, data that are not here.
    """
    if (reason := unavailable(overlays)) is not None:
        raise BackendUnavailable("Tasks need lm-evaluation-harness.", hint=f"{reason}.")
    if "score" not in features_of(subject.client.spec, subject.info):
        raise IncompatibleModel(
            f"{subject.client.spec.title} can't score text, which tasks need.", hint="Choose another backend."
        )
    await on_step(0.0, "starting lm-evaluation-harness")
    ended = await _run(plan, subject, overlays, _Answers(subject, on_step))
    if ended.result is None:
        raise EngineError(
            f"lm-evaluation-harness ended (exit status {ended.exit_code}): {ended.last_words}",
            hint="Run `doctor`, or install its environment again.",
            detail=ended.detail,
        )
    return ended.result


async def _run(plan: TaskPlan, subject: Subject, overlays: Overlays, answers: _Answers) -> Ended:
    request = {
        "tasks": list(plan.tasks),
        "few_shot": plan.few_shot,
        "limit": plan.limit,
        "folder": plan.folder,
        "context": subject.info.context_length or 2048,
        "first_id": await _first(subject),
        "model": subject.model.id,
    }
    environment = overlays.worker_env(OVERLAY) | {"HF_DATASETS_OFFLINE": "0" if plan.fetch else "1"}
    if plan.fetch:
        proxies = {k: v for k, v in os.environ.items() if k.upper().endswith("_PROXY")}
        environment |= proxies | {"HF_HUB_OFFLINE": "0"}
    command = [str(overlays.python(OVERLAY)), "-m", "modules.evaluate.harness_child", json.dumps(request)]
    return await run_job(command, environment, overlays.root, answers.answer)


async def _first(subject: Subject) -> int:
    from modules.evaluate.measure import first_id

    return await first_id(subject)


class _Answers:
    """The harness's calls, on one open model."""

    def __init__(self, subject: Subject, on_step: OnStep) -> None:
        self._subject = subject
        self._on_step = on_step

    async def answer(self, message: dict[str, Any]) -> Any:
        call = message["call"]
        if call == "encode":
            return await self._subject.client.encode(message["text"], bool(message["add_special"]))
        items = message["items"]
        values = []
        for index, item in enumerate(items):
            await self._on_step(index / len(items), f"{message['words']} {index + 1} of {len(items)}")
            values.append(await (self._loglikelihood(*item) if call == "loglikelihood" else self._generate(*item)))
            self._subject.look_at_memory()
        return values

    async def _loglikelihood(self, context: list[int], continuation: list[int], greedy: bool) -> list[Any]:
        """(sum of the continuation's log-probabilities, is it what the model would write)."""
        values = (await self._subject.client.score(context + continuation))[-len(continuation) :]
        total = math.fsum(values)
        if not math.isfinite(total):
            raise GenerationFailed(
                f"{self._subject.model.id} gave numbers that are not finite.", hint="Load it in another format."
            )
        is_greedy = False
        if greedy:
            ids, _, _ = await self._subject.generate(token_ids=tuple(context), max_tokens=len(continuation), ignore_eos=True)
            is_greedy = ids == continuation
        return [total, is_greedy]

    async def _generate(self, context: list[int], stop: list[str], most: int, sampling: dict[str, Any]) -> str:
        _, text, _ = await self._subject.generate(token_ids=tuple(context), max_tokens=most, stop=tuple(stop), sampling=sampling)
        return text
