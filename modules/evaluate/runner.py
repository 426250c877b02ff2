"""One evaluation: every target in turn, each in a worker of its own, every finished number kept at once.

A run is a dict that goes to the store as it is: what is measured is written before the next measurement begins, so that a
crash, a dead worker or Ctrl-C loses at most one window of text. `Evaluation.resume` goes on with what is missing.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modules.chat.templates import TemplateRenderer
from modules.errors import AppError, BackendUnavailable, Conflict, EngineDead, IncompatibleModel, InvalidParameter
from modules.evaluate import agreement, harness, measure
from modules.evaluate.environment import machine, software
from modules.evaluate.plan import Plan, Target, check, loader_for
from modules.evaluate.store import VERSION, EvaluationStore, alive, this_process
from modules.evaluate.subject import Subject
from modules.evaluate.texts import BUNDLED, Text, read_text

if TYPE_CHECKING:
    from modules.library import LocalLibrary
    from modules.overlays import Overlays
    from modules.schema import LoaderSpec, LoadProgress, ModelFiles

SAVE_EVERY_S = 5.0
OnChange = Callable[[dict[str, Any]], None]


@dataclasses.dataclass
class Surroundings:
    """What a run needs of the server or the command line. `by_path` allows models outside the folders: the operator's."""

    library: LocalLibrary
    specs: dict[str, LoaderSpec]
    overlays: Overlays
    store: EvaluationStore
    datasets: list[Path]
    options: Callable[[str, str], dict[str, Any]] = lambda model, loader: {}
    by_path: bool = False


class Evaluation:
    """`run` is the record; `on_change` hears of every step with the run's progress: {row, stage, fraction, words}."""

    def __init__(self, around: Surroundings, run: dict[str, Any], on_change: OnChange) -> None:
        self.around = around
        self.run = run
        self.plan = Plan.from_dict(run["plan"])
        self._on_change = on_change
        self._saved = 0.0
        self._texts: dict[str, Text] = {}
        self._templates: TemplateRenderer | None = None

    @classmethod
    def new(cls, around: Surroundings, plan: Plan, on_change: OnChange) -> Evaluation:
        """A run that is stored from the start. Raises InvalidParameter for texts that are not here."""
        check(plan)
        for target in plan.targets:
            if target.loader is not None and target.loader not in around.specs:
                raise InvalidParameter(f"There is no backend {target.loader!r}.", hint=f"There are {', '.join(around.specs)}.")
        for name in plan.data:
            read_text(name, around.datasets)
        run = {
            "version": VERSION,
            "id": around.store.new_id(),
            "title": plan.title,
            "created": time.time(),
            "finished": None,
            "state": "running",
            "owner": this_process(),
            "plan": plan.to_dict(),
            "hardware": machine(),
            "software": software(),
            "rows": [_new_row(target) for target in plan.targets],
        }
        evaluation = cls(around, _json_safe(run), on_change)
        around.store.save(evaluation.run)
        return evaluation

    @classmethod
    def resume(cls, around: Surroundings, run_id: str, on_change: OnChange) -> Evaluation:
        """The rest of a stored run: what failed is tried again, what is there stays."""
        run = around.store.load(run_id)
        if alive(run):
            raise Conflict("This evaluation is running.", hint="Stop it first, or wait for it.")
        run["state"], run["finished"], run["owner"] = "running", None, this_process()
        for row in run["rows"]:
            row["errors"] = []
        return cls(around, run, on_change)

    async def work(self) -> dict[str, Any]:
        """Run to the end; the record. When cancelled, the state is stored as it stands and CancelledError goes on."""
        state = "interrupted"
        try:
            for index in range(len(self.run["rows"])):
                await self._target(index)
            if self.plan.questions:
                self._compare()
            state = "done" if not any(row["errors"] for row in self.run["rows"]) else "partial"
        except asyncio.CancelledError:
            state = "cancelled"
            raise
        finally:
            self.run["state"], self.run["finished"] = state, time.time()
            if self._templates is not None:
                await self._templates.close()
            self.around.store.save(self.run)
        return self.run

    # --- one target ---------------------------------------------------------------------------------------------

    async def _target(self, index: int) -> None:
        row, target = self.run["rows"][index], self.plan.targets[index]
        wanted = self._missing(row)
        if not wanted:
            return
        subject = None
        try:
            await self._step(index, "load", 0.0, "starting")
            subject = await self._open(index, target)
            for name in wanted:
                try:
                    await self._measure(index, name, subject)
                except EngineDead as error:
                    _failed(row, name, error)
                    await subject.close()
                    subject = None
                    if name == wanted[-1]:
                        break
                    subject = await self._open(index, target)  # the rest goes on with a new worker
                except AppError as error:
                    _failed(row, name, error)
                self._save()
        except AppError as error:
            _failed(row, "load", error)
        finally:
            if subject is not None:
                row["peak_memory_bytes"] = max(subject.peak_memory() or 0, row.get("peak_memory_bytes") or 0) or None
                row["peak_device_bytes"] = subject.peak_device_memory()
                await subject.close()
        self._save()
        await self._step(index, "end", 1.0, "")

    def _missing(self, row: dict[str, Any]) -> list[str]:
        """The measurements still to be made: "text:NAME", "speed", "answers", "tasks"."""
        plan = self.plan
        names = [f"text:{name}" for name in plan.data if name not in row["perplexity"]]
        names += ["speed"] if plan.speed and not row["speed"] else []
        names += ["answers"] if plan.questions and not row["answers"] else []
        return names + (["tasks"] if plan.tasks and not row["tasks"] else [])

    async def _open(self, index: int, target: Target) -> Subject:
        row, around = self.run["rows"][index], self.around
        find = around.library.admit if around.by_path else around.library.find
        model = await asyncio.to_thread(find, target.model)
        choice = loader_for(model, target.loader, around.specs, around.overlays)
        describe(row, model, choice.spec)
        if not choice.ok:
            kind = IncompatibleModel if choice.installed else BackendUnavailable
            raise kind(f"{choice.spec.title} can't take {model.id}: {choice.reason}", hint="Choose another backend.")
        await asyncio.to_thread(around.library.check, model)
        given = {name: v for name, v in around.options(model.id, choice.spec.name).items() if name not in target.options}
        options = given | target.options | self._context_option(choice.spec, target, model)

        def progress(step: LoadProgress) -> None:
            self._on_change({"row": index, "stage": "load", "fraction": step.fraction or 0.0, "words": step.stage})

        subject = await Subject.open(model, choice.spec, options, around.overlays, progress)
        row |= {
            "load_s": round(subject.load_s, 3),
            "engine": subject.info.engine,
            "dtype": subject.info.dtype,
            "device": "+".join(subject.info.device_map) or "cpu",
            "versions": subject.client.versions,
            "context_length": subject.info.context_length,
            "options": target.options,
        }
        return subject

    def _context_option(self, spec: LoaderSpec, target: Target, model: ModelFiles) -> dict[str, Any]:
        """A longer context than a backend's default, where the windows need it."""
        option = spec.option("ctx_size")
        asked = option is not None and any(name in target.options for name in (option.name, *option.aliases))
        fits = not model.context_length or self.plan.context <= model.context_length
        return {option.name: self.plan.context} if option and self.plan.context and fits and not asked else {}

    async def _measure(self, index: int, name: str, subject: Subject) -> None:
        row, plan = self.run["rows"][index], self.plan

        async def step(fraction: float, words: str) -> None:
            await self._step(index, name, fraction, words)

        if name.startswith("text:"):
            text = await self._text(name.removeprefix("text:"))

            def keep(part: measure.PartScore) -> None:
                row["unfinished"][text_name] = part.to_dict()

            text_name = name.removeprefix("text:")
            stored = row["unfinished"].get(text_name)
            row["perplexity"][text_name] = await measure.perplexity(subject, text, plan, step, keep, stored)
            row["unfinished"].pop(text_name, None)
        elif name == "speed":
            assert plan.speed is not None
            row["speed"] = await measure.speed(subject, (await self._text(BUNDLED)).content, plan.speed, step)
        elif name == "answers":
            assert plan.questions is not None
            self._templates = self._templates or TemplateRenderer()
            row["answers"] = await measure.answers(subject, plan.questions, self._templates, step)
            sample = await subject.client.encode((await self._text(BUNDLED)).content[:2000], False)
            row["tokens_hash"] = measure.ids_hash(sample)
        else:
            assert plan.tasks is not None
            row["tasks"] = await harness.run_tasks(subject, plan.tasks, self.around.overlays, step)

    async def _text(self, name: str) -> Text:
        if name not in self._texts:
            self._texts[name] = await asyncio.to_thread(read_text, name, self.around.datasets)
        return self._texts[name]

    # --- keeping and telling -----------------------------------------------------------------------------------

    async def _step(self, index: int, stage: str, fraction: float, words: str) -> None:
        self._on_change({"row": index, "stage": stage, "fraction": fraction, "words": words})
        if time.monotonic() - self._saved > SAVE_EVERY_S:
            await asyncio.to_thread(self._save)

    def _save(self) -> None:
        self.around.store.save(self.run)
        self._saved = time.monotonic()

    def _compare(self) -> None:
        """Every row's answers beside the reference's."""
        assert self.plan.questions is not None
        rows = self.run["rows"]
        index = reference_row(self.plan, rows)
        self.run["reference"] = index
        if index is None:
            return
        for row in rows:
            for mine, truth in zip(row["answers"], rows[index]["answers"], strict=False):
                same_tokens = row.get("tokens_hash") == rows[index].get("tokens_hash")
                mine["agreement"] = agreement.compare(truth, mine, same_tokens)
                mine["segments"] = agreement.segments(truth["text"], mine["text"])


def reference_row(plan: Plan, rows: list[dict[str, Any]]) -> int | None:
    """The ground truth: as asked, else the first model in float32, else the first unquantised one, else the first at all."""
    if plan.questions and plan.questions.reference is not None:
        chosen = plan.questions.reference
        return chosen if rows[chosen]["answers"] else None
    answered = [i for i, row in enumerate(rows) if row["answers"]]
    by_truth = sorted(
        answered, key=lambda i: (rows[i].get("dtype") != "float32" or bool(rows[i].get("bits")), bool(rows[i].get("bits")), i)
    )
    return by_truth[0] if by_truth else None  # fmt: skip


def _new_row(target: Target) -> dict[str, Any]:
    return {
        "label": target.label,
        "model": target.model,
        "loader": target.loader,
        "perplexity": {},
        "unfinished": {},
        "speed": None,
        "answers": [],
        "tasks": None,
        "errors": [],
    }


def describe(row: dict[str, Any], model: ModelFiles, spec: LoaderSpec) -> None:
    """The model's facts, from its files."""
    quantization = model.quantization
    row |= {
        "model": model.id,
        "loader": spec.name,
        "loader_title": spec.title,
        "format": model.format,
        "architecture": model.architecture,
        "parameters": model.parameters,
        "size_bytes": model.size_bytes,
        "method": quantization.method if quantization else None,
        "bits": quantization.bits if quantization else None,
        "group_size": quantization.group_size if quantization else None,
        "desc_act": quantization.desc_act if quantization else None,
    }


def _failed(row: dict[str, Any], stage: str, error: AppError) -> None:
    detail = {key: error.detail[key] for key in ("exit_code", "signal") if key in error.detail}
    tail = str(error.detail.get("stderr") or "")[-2000:]
    said = {"stage": stage, "code": error.code, "message": error.message, "hint": error.hint}
    row["errors"].append(said | detail | ({"stderr": tail} if tail else {}))


def _json_safe(run: dict[str, Any]) -> dict[str, Any]:
    """Tuples become lists, as they will be after reading the file again."""
    import json

    safe: dict[str, Any] = json.loads(json.dumps(run))
    return safe
