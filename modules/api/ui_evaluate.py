"""The page's routes for evaluations: start, follow, stop, resume, compare, export, vote; and the texts they are measured on."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from modules.api.ui_body import Body
from modules.errors import Conflict, InvalidParameter
from modules.evaluate import harness, plots, questions, report, texts
from modules.evaluate.cli import render
from modules.evaluate.plan import Plan
from modules.paths import confine

if TYPE_CHECKING:
    from modules.services import Services

MAX_COMPARED = 20
KINDS = {"csv": "text/csv", "json": "application/json", "markdown": "text/markdown"}
ENDINGS = {"csv": "csv", "json": "json", "markdown": "md"}


def build_router(services: Services) -> APIRouter:
    """`/ui-api/evaluations` and `/ui-api/datasets`."""
    router = APIRouter(prefix="/ui-api", include_in_schema=False)
    jobs = services.evaluations
    store, folders = jobs.around.store, jobs.around.datasets

    @router.get("/evaluations")
    async def overview() -> JSONResponse:
        """The runs that are kept, what is at work, and what can be chosen."""
        asked = await asyncio.to_thread(questions.read_questions)
        return JSONResponse(
            {
                "runs": await asyncio.to_thread(store.list),
                "active": jobs.progress(),
                "data": await asyncio.to_thread(texts.listed, folders),
                "folder": str(folders[0]),
                "questions": {"system": asked.system, "questions": list(asked.questions), "max_tokens": asked.max_tokens},
                "harness": harness.unavailable(services.overlays),
            }
        )

    @router.post("/evaluations")
    async def start(request: Request) -> JSONResponse:
        body = await Body.of(request)
        plan = Plan.from_dict(body.rest())
        known = {str(entry["name"]) for entry in await asyncio.to_thread(texts.listed, folders)}
        for name in plan.data:  # the page names what it was offered; paths are for the command line
            if name not in known:
                raise InvalidParameter("There is no such text.", hint="Add it to the texts first.", param="data")
        return JSONResponse({"id": await jobs.start(plan)})

    @router.get("/evaluations/compare")
    async def compare(ids: str) -> JSONResponse:
        return JSONResponse(_shown(await _several(services, ids)))

    @router.get("/evaluations/export")
    async def export(ids: str, format: str = "markdown") -> Response:
        if format not in KINDS:
            raise InvalidParameter(f"format must be one of {', '.join(KINDS)}.", param="format")
        runs = await _several(services, ids)
        name = f"evaluation-{runs[0]['id']}.{ENDINGS[format]}"
        headers = {"Content-Disposition": f'attachment; filename="{name}"'}
        return Response(render(format, runs), media_type=KINDS[format], headers=headers)

    @router.post("/evaluations/install")
    async def install() -> JSONResponse:
        """lm-evaluation-harness, in the background."""
        return JSONResponse({"install": services.installs.install(harness.OVERLAY)})

    @router.get("/evaluations/{run_id}")
    async def one(run_id: str) -> JSONResponse:
        run = await asyncio.to_thread(jobs.run, run_id)
        return JSONResponse(_shown([run]) | {"run": _light(run), "active": jobs.active(run_id)})

    @router.post("/evaluations/{run_id}/cancel")
    async def cancel(run_id: str) -> JSONResponse:
        await jobs.cancel(run_id)
        return JSONResponse({})

    @router.post("/evaluations/{run_id}/resume")
    async def resume(run_id: str) -> JSONResponse:
        return JSONResponse({"id": await jobs.resume(run_id)})

    @router.post("/evaluations/{run_id}/vote")
    async def vote(run_id: str, request: Request) -> JSONResponse:
        """Which answer to one question was the better one, chosen without knowing whose it was; -1 takes a vote back."""
        body = await Body.of(request)
        question, row = body.optional_int("question"), body.optional_int("row")
        body.end()
        if jobs.active(run_id):
            raise Conflict("This evaluation is running.", hint="Vote when it has ended.")
        run = await asyncio.to_thread(store.load, run_id)
        if question is None or row is None or not 0 <= question < _asked(run) or not -1 <= row < len(run["rows"]):
            raise InvalidParameter("There is no such answer.", param="row")
        votes = run.setdefault("votes", {})
        votes.pop(str(question), None)
        if row >= 0:
            votes[str(question)] = row
        await asyncio.to_thread(store.save, run)
        return JSONResponse({"votes": votes})

    @router.delete("/evaluations/{run_id}")
    async def delete(run_id: str) -> JSONResponse:
        if jobs.active(run_id):
            raise Conflict("This evaluation is running.", hint="Stop it first.")
        await asyncio.to_thread(store.delete, run_id)
        return JSONResponse({})

    @router.put("/datasets/{name}")
    async def put_text(name: str, request: Request) -> JSONResponse:
        """Keep a text of the user's own, for perplexity and for calibration."""
        body = await Body.of(request)
        text = body.text("text", limit=64 << 20)
        body.end()
        if not name.endswith((".txt", ".md", ".jsonl")):
            raise InvalidParameter("A text's name ends in .txt, .md or .jsonl.", param="name")
        if not text.strip():
            raise InvalidParameter("The text is empty.", param="text")
        await asyncio.to_thread(_keep_text, folders[0], name, text)
        return JSONResponse({"data": await asyncio.to_thread(texts.listed, folders)})

    return router


def _keep_text(folder: Any, name: str, text: str) -> None:
    from modules.yaml_file import save_error

    path = confine(folder, name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.part")
        beside.write_text(text, encoding="utf-8", newline="\n")
        beside.replace(path)
    except OSError as error:
        raise save_error(name, error) from error


async def _several(services: Services, ids: str) -> list[dict[str, Any]]:
    wanted = list(dict.fromkeys(filter(None, ids.split(","))))
    if not 1 <= len(wanted) <= MAX_COMPARED:
        raise InvalidParameter(f"Name between 1 and {MAX_COMPARED} evaluations.", param="ids")
    return [await asyncio.to_thread(services.evaluations.run, run_id) for run_id in wanted]


def _shown(runs: list[dict[str, Any]]) -> dict[str, Any]:
    made = report.table(runs)
    return {
        "table": made.to_dict(),
        "plots": plots.plots(made.rows, made.columns),
        "conditions": [report.conditions(run) for run in runs],
        "same_machine": len({str(run["hardware"].get("cpu")) + str(run["hardware"].get("accelerator")) for run in runs}) == 1,
    }


def _light(run: dict[str, Any]) -> dict[str, Any]:
    """The record without the sums of windows and the tokens' ids."""
    rows = []
    for row in run["rows"]:
        answers = [{k: v for k, v in answer.items() if k not in ("ids", "pieces")} for answer in row["answers"]]
        rows.append({k: v for k, v in row.items() if k != "unfinished"} | {"answers": answers})
    return run | {"rows": rows}


def _asked(run: dict[str, Any]) -> int:
    return len((run["plan"].get("questions") or {}).get("questions") or [])
