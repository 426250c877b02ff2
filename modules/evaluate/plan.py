"""What an evaluation is asked for: which models through which backends, on what, measured how. Checked before anything runs."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from modules.errors import InvalidParameter
from modules.evaluate.windows import PROTOCOLS, Protocol
from modules.registry import rank

if TYPE_CHECKING:
    from modules.registry import Choice, Environment
    from modules.schema import LoaderSpec, ModelFiles

DEFAULT_CONTEXT = 2048  # what the papers use; a model with a shorter one is measured at its own
MAX_TARGETS = 64


@dataclass(frozen=True, slots=True)
class Target:
    """One model through one backend. `loader` None is the best one; `options` are that backend's load options."""

    model: str
    loader: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return f"{self.model}@{self.loader}" if self.loader else self.model


@dataclass(frozen=True, slots=True)
class SpeedPlan:
    """Prefill of `prompt_tokens`, then `new_tokens` decoded, `repetitions` times after a warm-up, for each number of beams."""

    prompt_tokens: int = 512
    new_tokens: int = 64
    repetitions: int = 3
    beams: tuple[int, ...] = (1, 4)


@dataclass(frozen=True, slots=True)
class QuestionPlan:
    """The same questions to every model, greedily. `reference` is the index of the ground truth among the targets."""

    questions: tuple[str, ...]
    system: str = ""
    max_tokens: int = 96
    reference: int | None = None


@dataclass(frozen=True, slots=True)
class TaskPlan:
    """Tasks of lm-evaluation-harness: its own, and those of the task files in `folder`. `limit` documents of each (0: all).
    `fetch` lets it get the tasks' data from the Hub; else they must be here."""

    tasks: tuple[str, ...]
    few_shot: int | None = None
    limit: int = 0
    folder: str = ""
    fetch: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """`max_windows` 0 measures the whole text. `context` 0 is 2048 or what the model holds."""

    targets: tuple[Target, ...]
    data: tuple[str, ...] = ()
    context: int = 0
    stride: int = 0
    windows: Protocol = "papers"
    max_windows: int = 0
    speed: SpeedPlan | None = None
    questions: QuestionPlan | None = None
    tasks: TaskPlan | None = None
    title: str = ""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """A plan from JSON: the page's request, or a stored run's. Raises InvalidParameter for what does not fit."""
        values = _known(cls, data, "plan")
        targets = values.get("targets")
        if not isinstance(targets, (list, tuple)):
            raise InvalidParameter("targets must be a list.", param="targets")
        values["targets"] = tuple(Target(**_known(Target, t, "targets")) for t in targets)
        values["data"] = _texts(values.get("data") or (), "data")
        for name, kind in (("speed", SpeedPlan), ("questions", QuestionPlan), ("tasks", TaskPlan)):
            part = values.get(name)
            values[name] = None if part is None else _part(kind, part, name)
        plan = cls(**values)
        check(plan)
        return plan


def _part(kind: type, data: Any, name: str) -> Any:
    values = _known(kind, data, name)
    for key in ("beams", "questions", "tasks"):
        if key in values:
            values[key] = _texts(values[key], name) if key != "beams" else tuple(values[key])
    return kind(**values)


def _known(kind: Any, data: Any, where: str) -> dict[str, Any]:
    if not isinstance(data, Mapping):
        raise InvalidParameter(f"{where} must be an object.", param=where)
    names = {f.name for f in dataclasses.fields(kind)}
    unknown = sorted(map(str, data.keys() - names))
    if unknown:
        raise InvalidParameter(f"There is no field {unknown[0][:64]!r} in {where}.", param=where)
    return dict(data)


def _texts(values: Any, name: str) -> tuple[str, ...]:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise InvalidParameter(f"{name} must be a list of texts.", param=name)
    found = tuple(values)
    if not all(isinstance(value, str) and value.strip() for value in found):
        raise InvalidParameter(f"{name} must be a list of texts.", param=name)
    return found


def check(plan: Plan) -> None:
    """Raise InvalidParameter for a plan that makes no sense."""
    if not 1 <= len(plan.targets) <= MAX_TARGETS:
        raise InvalidParameter(f"Give between 1 and {MAX_TARGETS} models.", param="targets")
    for target in plan.targets:
        fits = isinstance(target.model, str) and target.model and isinstance(target.options, dict)
        if not fits or not isinstance(target.loader, (str, type(None))):
            raise InvalidParameter("A target is a model, a loader and options.", param="targets")
    if not (plan.data or plan.speed or plan.questions or plan.tasks):
        raise InvalidParameter("There is nothing to measure.", hint="Choose a text, the speed, questions or tasks.", param="data")
    if plan.windows not in PROTOCOLS:
        raise InvalidParameter(f"windows must be one of {', '.join(PROTOCOLS)}.", param="windows")
    _within("context", plan.context, 0, 1 << 20)
    _within("stride", plan.stride, 0, 1 << 20)
    _within("max_windows", plan.max_windows, 0, 1 << 30)
    if plan.context and plan.stride > plan.context:
        raise InvalidParameter("The stride can't be longer than the context.", param="stride")
    if plan.speed:
        _within("prompt_tokens", plan.speed.prompt_tokens, 1, 1 << 20)
        _within("new_tokens", plan.speed.new_tokens, 2, 1 << 16)
        _within("repetitions", plan.speed.repetitions, 1, 1000)
        if not plan.speed.beams:
            raise InvalidParameter("beams must name at least one number.", param="beams")
        for beams in plan.speed.beams:
            _within("beams", beams, 1, 64)
    if plan.questions:
        _within("max_tokens", plan.questions.max_tokens, 1, 1 << 16)
        if not 1 <= len(plan.questions.questions) <= 500:
            raise InvalidParameter("Give between 1 and 500 questions.", param="questions")
        if plan.questions.reference is not None:
            _within("reference", plan.questions.reference, 0, len(plan.targets) - 1)
    if plan.tasks:
        if not plan.tasks.tasks:
            raise InvalidParameter("Name at least one task.", param="tasks")
        _within("limit", plan.tasks.limit, 0, 1 << 30)
        if not isinstance(plan.tasks.folder, str) or not isinstance(plan.tasks.fetch, bool):
            raise InvalidParameter("tasks: folder is text, fetch true or false.", param="tasks")
        if plan.tasks.few_shot is not None:
            _within("few_shot", plan.tasks.few_shot, 0, 100)


def _within(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidParameter(f"{name} must be a whole number between {low} and {high}.", param=name)


# --- from words to targets -----------------------------------------------------------------------------------------

_OPTION = re.compile(r"([A-Za-z_][\w-]*)=(.*)", re.DOTALL)


def parse_target(word: str, specs: Mapping[str, LoaderSpec]) -> Target:
    """MODEL, MODEL@LOADER or MODEL@LOADER:option=value,option=value. A model's name may hold "@" and ":"."""
    at = len(word)
    while (at := word.rfind("@", 0, at)) > 0:
        loader, colon, options = word[at + 1 :].partition(":")
        if loader in specs:
            return Target(word[:at], loader, _options(options, specs[loader]) if colon else {})
    return Target(word)


def _options(text: str, spec: LoaderSpec) -> dict[str, Any]:
    found = {}
    for part in filter(None, text.split(",")):
        match = _OPTION.fullmatch(part.strip())
        if match is None:
            raise InvalidParameter(f"{part!r} is no option.", hint="Write option=value.", param="options")
        name = match[1].replace("-", "_")
        option = spec.option(name)
        found[name] = match[2] if option is None else _value(match[2], option.kind)
    return found


def _value(text: str, kind: str) -> Any:
    try:
        if kind == "bool":
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
        if kind == "int":
            return int(text)
        if kind == "float":
            return float(text)
    except (KeyError, ValueError):
        raise InvalidParameter(f"{text!r} is no value for this option ({kind}).", param="options") from None
    return [text] if kind == "paths" else text


def cross(models: Sequence[Target], loaders: Sequence[str]) -> tuple[Target, ...]:
    """Every model through every loader; models that name their own stay as they are. Doubles are left out."""
    found = [
        target if target.loader else dataclasses.replace(target, loader=loader)
        for target in models
        for loader in loaders or (None,)
    ]
    return tuple(t for i, t in enumerate(found) if t not in found[:i])


def loader_for(model: ModelFiles, loader: str | None, specs: Mapping[str, LoaderSpec], environment: Environment) -> Choice:
    """The loader asked for or the best one, with the reason when it can't."""
    choices = rank(model, specs.values(), environment)
    return next(c for c in choices if loader is None or c.spec.name == loader)
