"""server.py evaluate MODEL… --loader … --data …: the table of a set of models, in the foreground, kept and resumable."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modules.errors import AppError, ConfigError, InvalidParameter
from modules.evaluate import plots, report, texts
from modules.evaluate.plan import Plan, QuestionPlan, SpeedPlan, TaskPlan, cross, parse_target
from modules.evaluate.questions import BUNDLED, read_questions
from modules.evaluate.runner import Evaluation, Surroundings
from modules.evaluate.store import EvaluationStore
from modules.evaluate.windows import PROTOCOLS
from modules.library import LocalLibrary
from modules.overlays import Overlays
from modules.registry import discover
from modules.remotes.store import RemoteStore
from modules.remotes.watch import Remotes

if TYPE_CHECKING:
    from modules.config import Config

FORMATS = ("markdown", "csv", "json")


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the `evaluate` subcommand."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "evaluate",
        help="perplexity, speed, answers and tasks",
        description="Measure models through backends, one after another, each in a process of its own. Every finished number is "
        "kept under the data folder; --resume goes on with a run that was stopped.",
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help="names or paths; also MODEL@LOADER:option=value,option=value")
    parser.add_argument("--loader", nargs="+", action="extend", default=[], help="backends for every model; default: the best")
    text = parser.add_argument_group("perplexity")
    text.add_argument(
        "--data", nargs="+", action="extend", default=[], metavar="NAME|FILE", help=f"{', '.join(texts.names())}, or UTF-8 files"
    )
    text.add_argument("--dataset-dir", type=Path, metavar="DIR", help="where data sets are; default: datasets in the data folder")
    text.add_argument("--context", type=int, default=0, help="tokens per window; default: 2048 or what the model holds")
    text.add_argument("--stride", type=int, default=0, help="tokens between windows; default: the context, no overlap")
    text.add_argument("--windows", choices=PROTOCOLS, default="papers", help="how a text is cut (%(default)s)")
    text.add_argument("--max-windows", type=int, default=0, metavar="N", help="only the first N windows")
    speed = parser.add_argument_group("speed")
    speed.add_argument("--speed", action=argparse.BooleanOptionalAction, default=None, help="measure prefill and decode")
    speed.add_argument("--beams", type=int, nargs="+", default=[1, 4], metavar="N", help="numbers of beams (1 4)")
    speed.add_argument("--prompt-tokens", type=int, default=512, help="(%(default)s)")
    speed.add_argument("--new-tokens", type=int, default=64, help="(%(default)s)")
    speed.add_argument("--repetitions", type=int, default=3, help="(%(default)s)")
    answers = parser.add_argument_group("answers side by side")
    answers.add_argument(
        "--questions", nargs="?", type=Path, const=BUNDLED, metavar="FILE", help="ask the study's five, or FILE's"
    )
    answers.add_argument("--max-tokens", type=int, default=96, help="tokens of an answer (%(default)s)")
    answers.add_argument("--reference", metavar="MODEL", help="the ground truth; default: the first in float32")
    tasks = parser.add_argument_group("tasks of lm-evaluation-harness")
    tasks.add_argument("--tasks", default="", metavar="NAME,NAME")
    tasks.add_argument("--task-dir", default="", metavar="DIR", help="folder with task files of one's own (YAML)")
    tasks.add_argument("--few-shot", type=int, default=None, metavar="N", help="examples before each question")
    tasks.add_argument("--limit", type=int, default=0, metavar="N", help="only the first N documents")
    tasks.add_argument("--fetch-tasks", action="store_true", help="let it get the tasks' data from the Hugging Face Hub")
    result = parser.add_argument_group("results")
    result.add_argument("--title", default="", help="a name for this run")
    result.add_argument("--resume", nargs="?", const="last", metavar="ID", help="go on with a stopped run; default: the latest")
    result.add_argument("--list", action="store_true", help="the runs that are kept")
    result.add_argument("--compare", nargs="+", metavar="ID", help="one table of several runs")
    result.add_argument("--format", choices=FORMATS, default="markdown", help="(%(default)s)")
    result.add_argument("--out", type=Path, metavar="FILE", help="write the table here; its ending chooses the format")
    result.add_argument("--plots", type=Path, metavar="DIR", help="write the plots here (SVG)")
    return parser


def run(args: argparse.Namespace, config: Config) -> int:
    """Exit status: 0 all measured, 1 something failed (the rest is kept), 130 interrupted."""
    store = EvaluationStore(config.user_data_dir / "evaluations")
    try:
        if args.list:
            print(_listed(store))
            return 0
        if args.compare:
            _write(args, [store.load(run_id) for run_id in args.compare])
            return 0
        return _evaluate(args, config, store)
    except ConfigError:
        raise
    except AppError as error:
        print(f"Switchyard: {error}", file=sys.stderr)
        return 1


def _evaluate(args: argparse.Namespace, config: Config, store: EvaluationStore) -> int:
    specs = discover()
    library = LocalLibrary(config.model_dirs, specs.values(), Remotes(RemoteStore(config.user_data_dir)))
    around = Surroundings(
        library=library,
        specs=specs,
        overlays=Overlays.find(),
        store=store,
        datasets=[args.dataset_dir or config.user_data_dir / "datasets"],
        options=lambda model, loader: config.options_for(specs[loader].options),
        by_path=True,
    )
    line = Line()
    if args.resume:
        run_id = store.newest_unfinished() if args.resume == "last" else args.resume
        if run_id is None:
            raise InvalidParameter("No run is unfinished.", hint="--list shows the runs.")
        evaluation = Evaluation.resume(around, run_id, line.show)
        for target in evaluation.plan.targets:
            library.admit(target.model)
    else:
        plan = plan_of(args, around)
        for target in plan.targets:
            library.admit(target.model)
        evaluation = Evaluation.new(around, plan, line.show)
    line.labels = [row["label"] for row in evaluation.run["rows"]]
    try:
        record = asyncio.run(evaluation.work())
    except KeyboardInterrupt:
        line.end()
        print(f"Stopped. What is measured is kept: server.py evaluate --resume {evaluation.run['id']}", file=sys.stderr)
        _write(args, [evaluation.run])
        return 130
    line.end()
    _write(args, [record])
    for row in record["rows"]:
        for error in row["errors"]:
            print(f"Switchyard: {row['label']}, {error['stage']}: {error['message']} {error['hint']}".rstrip(), file=sys.stderr)
    print(f"Kept as {record['id']}.", file=sys.stderr)
    return 0 if record["state"] == "done" else 1


def plan_of(args: argparse.Namespace, around: Surroundings) -> Plan:
    """The plan that the flags ask for. With none, perplexity (WikiText-2 if it is here) and speed."""
    if not args.models:
        raise InvalidParameter("Which model?", hint="server.py evaluate MODEL [MODEL …]")
    for loader in args.loader:
        if loader not in around.specs:
            raise InvalidParameter(f"There is no loader {loader!r}.", hint=f"The loaders are {', '.join(around.specs)}.")
    targets = cross([parse_target(word, around.specs) for word in args.models], args.loader)
    reference = None
    if args.reference:
        named = parse_target(args.reference, around.specs)
        fits = [i for i, t in enumerate(targets) if t.model == named.model and named.loader in (None, t.loader)]
        targets, reference = (targets, fits[0]) if fits else ((*targets, named), len(targets))
    data = tuple(args.data)
    tasks = tuple(filter(None, (name.strip() for name in args.tasks.split(","))))
    nothing = not (data or args.questions or tasks or args.speed)
    if nothing and args.speed is not False:
        data = ("wikitext2",) if texts.find("wikitext2", around.datasets) else (texts.BUNDLED,)
    elif nothing:
        data = (texts.BUNDLED,)
    questions: QuestionPlan | None = None
    if args.questions:
        questions = read_questions(args.questions, args.max_tokens, reference)
    speed = SpeedPlan(args.prompt_tokens, args.new_tokens, args.repetitions, tuple(args.beams))
    return Plan(
        targets=targets,
        data=data,
        context=args.context,
        stride=args.stride,
        windows=args.windows,
        max_windows=args.max_windows,
        speed=speed if args.speed or (nothing and args.speed is None) else None,
        questions=questions,
        tasks=TaskPlan(tasks, args.few_shot, args.limit, args.task_dir, args.fetch_tasks) if tasks else None,
        title=args.title,
    )


def _write(args: argparse.Namespace, runs: list[dict[str, Any]]) -> None:
    by_ending = {".md": "markdown", ".csv": "csv", ".json": "json"}
    form = by_ending.get(args.out.suffix, args.format) if args.out else args.format
    text = render(form, runs)
    if args.out:
        args.out.write_text(text, encoding="utf-8")
    else:
        print(text, end="", flush=True)
    if args.plots:
        args.plots.mkdir(parents=True, exist_ok=True)
        made = report.table(runs)
        for name, svg in plots.plots(made.rows, made.columns).items():
            (args.plots / f"{name}.svg").write_text(svg, encoding="utf-8")


def render(form: str, runs: list[dict[str, Any]]) -> str:
    """The runs as markdown, csv or json."""
    if form == "csv":
        return report.to_csv(runs)
    if form == "json":
        return json.dumps(runs if len(runs) > 1 else runs[0], indent=1, ensure_ascii=False) + "\n"
    text = report.markdown(runs)
    answers = [report.answers_markdown(run) for run in runs]
    return text + "".join(f"\n{part}" for part in answers if part)


def _listed(store: EvaluationStore) -> str:
    lines = []
    for found in store.list():
        what = ", ".join(found["models"][:3]) + ("" if len(found["models"]) < 4 else f" and {len(found['models']) - 3} more")
        lines.append(f"{found['id']}  {found['state']:<11} {found['title'] or what}")
    return "\n".join(lines) or "No evaluation is kept yet."


class Line:
    """Progress on stderr: one line that is drawn again on a terminal, one per stage elsewhere."""

    def __init__(self) -> None:
        self.labels: list[str] = []
        self._terminal = sys.stderr.isatty()
        self._drawn = 0.0
        self._stage = ""
        self._width = 0

    def show(self, event: dict[str, Any]) -> None:
        label = self.labels[event["row"]] if event["row"] < len(self.labels) else ""
        stage = f"{label}: {event['stage'].removeprefix('text:')}"
        if not self._terminal:
            if stage != self._stage and event["stage"] != "end":
                print(stage, file=sys.stderr, flush=True)
            self._stage = stage
            return
        if time.monotonic() - self._drawn < 0.1:
            return
        self._drawn = time.monotonic()
        text = f"{stage} {event['fraction']:4.0%}  {event['words']}"[:160]
        sys.stderr.write("\r" + text.ljust(self._width))
        sys.stderr.flush()
        self._width = len(text)

    def end(self) -> None:
        if self._width:
            sys.stderr.write("\r" + " " * self._width + "\r")
            sys.stderr.flush()
