"""The process that runs lm-evaluation-harness: `python -m modules.evaluate.harness_child REQUEST` in its environment.

It computes nothing of the model: see modules.evaluate.harness, which answers its calls over stdin and stdout.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any, TextIO

from modules.errors import AppError, EngineError, InvalidParameter, one_line

MAX_NEW_TOKENS = 256


class Pipe:
    """One call out, one answer in."""

    def __init__(self) -> None:
        self._sink: TextIO = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        sys.stdout = sys.stderr

    def send(self, message: dict[str, Any]) -> None:
        self._sink.write(json.dumps(message) + "\n")
        self._sink.flush()

    def call(self, name: str, **arguments: Any) -> Any:
        self.send({"call": name} | arguments)
        line = sys.stdin.readline()
        if not line:
            raise EOFError("the evaluation has ended")
        return json.loads(line)["value"]


def make_model(pipe: Pipe, request: dict[str, Any]) -> Any:
    """An `lm_eval` model whose tokens and numbers come over the pipe."""
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM

    context = int(request["context"])

    class PipeModel(TemplateLM):  # type: ignore[misc]  # the harness lives in another environment than mypy
        tokenizer_name = str(request["model"])

        @property
        def eot_token_id(self) -> int:
            return int(request["first_id"])

        @property
        def max_length(self) -> int:
            return context

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return list(pipe.call("encode", text=string, add_special=bool(add_special_tokens)))

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            # Where a document has one request, the task asks whether the model would write it (LAMBADA); among several
            # choices only the likelihoods count, and the answer to that question would cost a generation each.
            seen: dict[Any, int] = {}
            for item in requests:
                seen[item.task_name, item.doc_id] = seen.get((item.task_name, item.doc_id), 0) + 1
            self._greedy = [seen[item.task_name, item.doc_id] == 1 for item in requests]
            return list(super().loglikelihood(requests, disable_tqdm=True))

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            items = []
            for (_, before, after), greedy in zip(requests, self._greedy, strict=True):
                kept = after[-(context - 1) :]
                items.append([before[-(context - len(kept)) :], kept, greedy])
            values = pipe.call("loglikelihood", items=items, words="request")
            return [(float(total), bool(greedy)) for total, greedy in values]

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            totals = []
            for item in requests:
                ids = self.tok_encode(item.args[0])
                windows = utils.get_rolling_token_windows(ids, self.prefix_token_id, context - 1, 1)
                pairs = [utils.make_disjoint_window(window) for window in windows]
                values = pipe.call("loglikelihood", items=[[a, b, False] for a, b in pairs], words="window")
                totals.append(sum(float(total) for total, _ in values))
            return totals

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            items = []
            for item in requests:
                text, options = item.args
                until = options.get("until") or []
                most = int(options.get("max_gen_toks") or MAX_NEW_TOKENS)
                ids = self.tok_encode(text)[-max(1, context - most) :]
                sampling = (
                    {"temperature": float(options.get("temperature") or 0.0)}
                    if options.get("do_sample")
                    else {"temperature": 0.0}
                )
                items.append([ids or [self.eot_token_id], [until] if isinstance(until, str) else list(until), most, sampling])
            return [str(text) for text in pipe.call("generate", items=items, words="answer")]

    return PipeModel()


def run(pipe: Pipe, request: dict[str, Any]) -> dict[str, Any]:
    from importlib import metadata

    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=request["folder"] or None)
    unknown = [name for name in request["tasks"] if not _known(manager, name)]
    if unknown:
        raise InvalidParameter(
            f"lm-evaluation-harness knows no task {unknown[0]!r}.",
            hint="Check its name, or give the folder of its YAML file.",
            param="tasks",
        )
    found = simple_evaluate(
        make_model(pipe, request),
        tasks=request["tasks"],
        num_fewshot=request["few_shot"],
        limit=request["limit"] or None,
        task_manager=manager,
        log_samples=False,
        bootstrap_iters=1000,
    )
    results = {task: _numbers(values) for task, values in found["results"].items()}
    return {
        "results": {task: values for task, values in results.items() if values},
        "few_shot": found.get("n-shot", {}),
        "samples": {task: counts.get("effective") for task, counts in found.get("n-samples", {}).items()},
        "versions": found.get("versions", {}),
        "harness": metadata.version("lm_eval"),
    }


def _known(manager: Any, name: str) -> bool:
    return bool(manager.match_tasks([name]))


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    """ "acc,none" -> acc; what is no number is left out."""
    found = {}
    for key, value in values.items():
        name, _, filtered = key.partition(",")
        if (
            key not in ("sample_len", "alias")
            and isinstance(value, (int, float))
            and not isinstance(value, bool)
            and value == value
        ):
            found[name if filtered in ("", "none") else f"{name} ({filtered})"] = float(value)
    return found


def _typed(error: Exception) -> AppError:
    names = {type(part).__name__ for part in _chain(error)}
    if names & {
        "OfflineModeIsEnabled",
        "DatasetNotFoundError",
        "ConnectionError",
        "LocalEntryNotFoundError",
        "FileNotFoundError",
    }:
        return InvalidParameter(
            f"The data of a task are not here: {one_line(error)}.",
            hint="Fetch them once with --fetch-tasks, or give a task of your own whose data_files are local.",
            param="tasks",
        )
    return EngineError(f"lm-evaluation-harness failed: {one_line(error)}.", hint="See the log.")


def _chain(error: BaseException | None) -> Sequence[BaseException]:
    found = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def main(text: str) -> int:
    pipe = Pipe()
    try:
        pipe.send({"done": run(pipe, json.loads(text))})
    except AppError as error:
        pipe.send({"error": error.to_wire()})
        return 1
    except Exception as error:
        traceback.print_exc()
        pipe.send({"error": _typed(error).to_wire()})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
