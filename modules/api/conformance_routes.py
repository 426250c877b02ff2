"""/conformance: what works on each loaded model, tried over this server's own port, as a page and as JSON."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.responses import HTMLResponse, JSONResponse

from modules.errors import AppError, NoModelLoaded

if TYPE_CHECKING:
    from modules.conformance.runner import Column
    from modules.services import Services

# The probes come in as whoever asked for them.
_CREDENTIALS = ("authorization", "x-api-key", "api-key", "cookie", "host")


class Conformance:
    """The latest run, and the one going on. One at a time: a second request gets the first one's results."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._columns: list[Column] = []
        self._task: asyncio.Task[None] | None = None
        self._now = ""
        self._problem = ""

    @property
    def running(self) -> bool:
        return self._task is not None and not self._task.done()

    def state(self) -> dict[str, Any]:
        from modules.conformance.runner import report

        return {"running": self.running, "now": self._now, "problem": self._problem, **report(self._columns)}

    def start(self, url: str, headers: dict[str, str]) -> None:
        """Raises NoModelLoaded."""
        from modules.conformance.runner import Column

        if self.running:
            return
        ready = [r for r in self._services.manager.residents() if r.state == "ready"]
        if not ready:
            raise NoModelLoaded("No model is loaded.", hint="Load one in the web page's model menu.")
        self._columns = [Column(resident.loader, resident.model.id) for resident in ready]
        self._problem = ""
        self._task = asyncio.get_running_loop().create_task(self._run(url, headers))

    async def _run(self, url: str, headers: dict[str, str]) -> None:
        from modules.conformance.runner import http_client, run_column

        def tell(column: Column, what: str) -> None:
            self._now = f"{column.loader}: {what}"

        try:
            async with http_client(url, headers) as http:
                for column in self._columns:
                    await run_column(http, column, tell)
        except (OSError, AppError) as error:
            self._problem = f"The run ended early: {type(error).__name__}."
        finally:
            self._now = ""


def build_router(services: Services) -> APIRouter:
    router = APIRouter(tags=["Conformance"])
    conformance = Conformance(services)

    @router.get("/conformance", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(PAGE)

    @router.get("/v1/internal/conformance")
    async def results() -> JSONResponse:
        """Feature × loader: the latest run's results, also while it goes on."""
        return JSONResponse(conformance.state())

    @router.post("/v1/internal/conformance")
    async def start(request: Request) -> JSONResponse:
        """Try every loaded model; it takes a few seconds for each. GET shows how far it is."""
        server = request.scope.get("server") or ("127.0.0.1", 7860)
        host = f"[{server[0]}]" if ":" in server[0] else server[0]
        headers = {name: request.headers[name] for name in _CREDENTIALS if name in request.headers}
        conformance.start(f"{request.url.scheme}://{host}:{server[1]}{request.scope.get('root_path', '')}", headers)
        return JSONResponse(conformance.state())

    return router


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Switchyard: conformance</title><style>
:root { color-scheme: light dark; --line: #8884; --dim: #777; --yes: #18794e; --no: #c62a2f }
@media (prefers-color-scheme: dark) { :root { --dim: #aaa; --yes: #4cc38a; --no: #ff8589 } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 0 auto; padding: 1.5rem }
h1 { font-size: 1.5rem; margin-top: 0 } p { max-width: 44rem }
button { font: inherit; padding: .5rem 1.2rem; min-height: 44px; border-radius: 8px; border: 1px solid var(--line) }
.scroll { overflow-x: auto } table { border-collapse: collapse; width: 100%; margin: 1rem 0 }
th, td { border-top: 1px solid var(--line); padding: .4rem .8rem .4rem 0; text-align: left; vertical-align: top }
thead th { border-top: 0; overflow-wrap: anywhere } th small { display: block; font-weight: normal; color: var(--dim) }
tbody th { font-weight: normal; min-width: 9rem } .group th { color: var(--dim); padding-top: 1.2rem; border-top: 0 }
.pass { color: var(--yes) } .fail { color: var(--no); font-weight: 600 } .unsupported { color: var(--dim) }
td small { display: block; color: var(--dim); font-weight: normal; max-width: 26rem; overflow-wrap: anywhere }
</style></head><body>
<h1>What works on which backend</h1>
<p>Sends requests of every protocol to each loaded model over this server's own port. The same as
<code>server.py conformance</code>, which also tries backends that are installed but not loaded.
<a href="docs">API reference</a></p>
<button id="run">Run</button> <span id="now" role="status"></span>
<div class="scroll"><table><thead id="head"></thead><tbody id="body"></tbody></table></div>
<script>
const $ = id => document.getElementById(id), words = { pass: "yes", fail: "no", unsupported: "not there" };
const make = (tag, text, parent) => { const e = document.createElement(tag); e.textContent = text; parent?.append(e); return e; };
function draw(state) {
  const head = $("head"), body = $("body");
  head.textContent = body.textContent = "";
  $("run").disabled = state.running;
  $("now").textContent = state.running ? state.now + " …" : state.problem;
  if (!state.columns.length) return;
  const top = make("tr", "", head);
  make("th", "", top);
  for (const column of state.columns) {
    const cell = make("th", column.loader, top);
    make("small", column.model, cell);
    make("small", column.error || `${column.passed} yes, ${column.failed} no, ${column.unsupported} not there`, cell);
  }
  let group = "";
  for (const row of state.rows) {
    if (row.group !== group) {
      const line = make("tr", "", body), cell = make("th", group = row.group, line);
      line.className = "group"; cell.colSpan = state.columns.length + 1;
    }
    const line = make("tr", "", body);
    make("th", row.title, line).scope = "row";
    for (const cell of row.cells) {
      const box = make("td", cell ? words[cell.state] : "", line);
      if (!cell) continue;
      box.className = cell.state;
      if (cell.reason) make("small", cell.reason, box);
    }
  }
}
async function ask(method) {
  const answer = await fetch("v1/internal/conformance", { method });
  const state = await answer.json();
  if (!answer.ok) throw new Error(state.error.message);
  draw(state);
  if (state.running) setTimeout(() => ask("GET").catch(tell), 500);
}
const tell = error => { $("now").textContent = error.message; $("run").disabled = false; };
$("run").addEventListener("click", () => ask("POST").catch(tell));
ask("GET").catch(tell);
</script></body></html>
"""
