"""/metrics: figures in Prometheus' text format, of every request, generation and loaded model.

Names follow Prometheus' rules (base units, _total for counters). Those of llama-server that mean the same are given beside
ours, so that its dashboards work.
"""

from __future__ import annotations

import os
import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING

from fastapi import APIRouter
from starlette.responses import PlainTextResponse

from modules.memory import available_bytes, process_bytes, total_bytes

if TYPE_CHECKING:
    from modules.generation import Run
    from modules.services import Services

Labels = tuple[tuple[str, str], ...]
Sample = tuple[Labels, float]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
LATENCY_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
PER_TOKEN_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
MAX_SERIES = 2000  # of one metric: a label from outside must not fill the memory


class Counter:
    def __init__(self) -> None:
        self._values: dict[Labels, float] = defaultdict(float)

    def add(self, value: float = 1.0, **labels: str) -> None:
        key = tuple(labels.items())
        if key in self._values or len(self._values) < MAX_SERIES:
            self._values[key] += value

    def samples(self) -> list[Sample]:
        return list(self._values.items())

    def total(self) -> float:
        return sum(self._values.values())


class Histogram:
    """Counts of values up to each bound, as Prometheus accumulates them."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts: dict[Labels, list[int]] = {}
        self._sums: dict[Labels, float] = defaultdict(float)

    def observe(self, value: float, **labels: str) -> None:
        key = tuple(labels.items())
        if key not in self._counts and len(self._counts) >= MAX_SERIES:
            return
        counts = self._counts.setdefault(key, [0] * (len(self._bounds) + 1))
        counts[bisect_left(self._bounds, value)] += 1
        self._sums[key] += value

    def lines(self, name: str) -> Iterable[str]:
        for key, counts in self._counts.items():
            running = 0
            for bound, count in zip((*self._bounds, float("inf")), counts, strict=True):
                running += count
                edge = "+Inf" if bound == float("inf") else f"{bound:g}"
                yield _line(f"{name}_bucket", (*key, ("le", edge)), running)
            yield _line(f"{name}_sum", key, self._sums[key])
            yield _line(f"{name}_count", key, running)


class Metrics:
    """Everything counted since the start. `ended` is told of every run, `responded` of every response."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._began = time.time()
        self._requests = Counter()
        self._runs = Counter()
        self._prompt_tokens, self._cached_tokens, self._completion_tokens = Counter(), Counter(), Counter()
        self._prefill_s, self._decode_s = Counter(), Counter()
        self._first = Histogram(LATENCY_S)
        self._whole = Histogram(LATENCY_S)
        self._waited = Histogram(LATENCY_S)
        self._token = Histogram(PER_TOKEN_S)
        self._request = Histogram(LATENCY_S)

    def responded(self, method: str, route: str, status: int, seconds: float) -> None:
        self._requests.add(method=method, route=route, status=str(status))
        if route.startswith(("/v1/", "/api/", "/completion", "/infill")):
            self._request.observe(seconds, route=route)

    def ended(self, run: Run) -> None:
        receipt, usage, timings = run.receipt or {}, run.usage, run.timings
        model = str(receipt.get("model") or "none")
        loader = str(receipt.get("loader") or "none")
        reason = run.error.code if run.error is not None else run.finish_reason or "none"
        self._runs.add(model=model, loader=loader, finish_reason=reason)
        self._prompt_tokens.add(usage.prompt_tokens, model=model)
        self._cached_tokens.add(usage.cached_tokens, model=model)
        self._completion_tokens.add(usage.completion_tokens, model=model)
        self._prefill_s.add(timings.prefill_s, model=model)
        self._decode_s.add(timings.decode_s, model=model)
        for histogram, name in ((self._first, "ttft_ms"), (self._whole, "total_ms"), (self._waited, "queue_ms")):
            if receipt.get(name) is not None:
                histogram.observe(receipt[name] / 1000, model=model)
        if usage.completion_tokens > 1 and timings.decode_s > 0:
            self._token.observe(timings.decode_s / (usage.completion_tokens - 1), model=model)

    # --- what goes out ----------------------------------------------------------------------------------------

    def text(self) -> str:
        """One scrape."""
        lines: list[str] = []

        def family(name: str, kind: str, help: str, samples: Iterable[Sample]) -> None:
            lines.extend((f"# HELP {name} {help}", f"# TYPE {name} {kind}"))
            lines.extend(_line(name, labels, value) for labels, value in samples)

        def histogram(name: str, help: str, source: Histogram) -> None:
            lines.extend((f"# HELP {name} {help}", f"# TYPE {name} histogram"))
            lines.extend(source.lines(name))

        family("switchyard_http_requests_total", "counter", "Responses by route and status.", self._requests.samples())
        family("switchyard_generations_total", "counter", "Ended generations by model and reason.", self._runs.samples())
        family("switchyard_prompt_tokens_total", "counter", "Tokens of prompts.", self._prompt_tokens.samples())
        family("switchyard_cached_tokens_total", "counter", "Prompt tokens from the cache.", self._cached_tokens.samples())
        family("switchyard_completion_tokens_total", "counter", "Generated tokens.", self._completion_tokens.samples())
        histogram("switchyard_time_to_first_token_seconds", "From the request to its first token.", self._first)
        histogram("switchyard_generation_seconds", "From the request to its last token.", self._whole)
        histogram("switchyard_queue_seconds", "Waiting for a place on the model.", self._waited)
        histogram("switchyard_time_per_token_seconds", "Mean time between the tokens of one answer.", self._token)
        histogram("switchyard_http_request_seconds", "Whole responses of the API by route.", self._request)
        for name, help, samples in self._now():
            family(name, "gauge", help, samples)
        for name, kind, help, value in self._like_llama_server():
            family(name, kind, help, [((), value)])
        return "\n".join(lines) + "\n"

    def _now(self) -> list[tuple[str, str, list[Sample]]]:
        residents = self._services.manager.residents()
        running = self._services.runs.running()

        def each(value: str) -> list[Sample]:
            return [((("model", r.model.id), ("loader", r.loader)), float(getattr(r, value) or 0)) for r in residents]

        states: list[Sample] = [((("model", r.model.id), ("loader", r.loader), ("state", r.state)), 1.0) for r in residents]
        memory: list[Sample] = [((("kind", "total"),), total_bytes()), ((("kind", "available"),), available_bytes())]
        waiting = sum(run.state == "queued" for run in running)
        return [
            ("switchyard_generations_running", "Generations at work now.", [((), len(running) - waiting)]),
            ("switchyard_generations_queued", "Generations waiting now.", [((), waiting)]),
            ("switchyard_model_active_requests", "Generations on each model now.", each("active_requests")),
            ("switchyard_model_queued_requests", "Generations waiting for each model now.", each("queued")),
            ("switchyard_model_memory_bytes", "Memory of each model's worker.", each("memory_bytes")),
            ("switchyard_model_state", "1 for each model in memory, with its state.", states),
            ("switchyard_memory_bytes", "This machine's memory.", memory),
            ("process_resident_memory_bytes", "Memory of the server without its workers.", [((), process_bytes())]),
            ("process_start_time_seconds", "When the server started, seconds since 1970.", [((), self._began)]),
            ("process_open_fds", "Open file descriptors.", [((), count)] if (count := _open_files()) is not None else []),
        ]

    def _like_llama_server(self) -> list[tuple[str, str, str, float]]:
        prompt = self._prompt_tokens.total() - self._cached_tokens.total()
        made, prefill, decode = self._completion_tokens.total(), self._prefill_s.total(), self._decode_s.total()
        running = self._services.runs.running()
        waiting = sum(run.state == "queued" for run in running)
        return [
            ("llamacpp:prompt_tokens_total", "counter", "Prompt tokens processed.", prompt),
            ("llamacpp:prompt_seconds_total", "counter", "Prompt process time.", prefill),
            ("llamacpp:tokens_predicted_total", "counter", "Generation tokens processed.", made),
            ("llamacpp:tokens_predicted_seconds_total", "counter", "Predict process time.", decode),
            (
                "llamacpp:prompt_tokens_seconds",
                "gauge",
                "Average prompt throughput in tokens/s.",
                prompt / prefill if prefill else 0,
            ),
            (
                "llamacpp:predicted_tokens_seconds",
                "gauge",
                "Average generation throughput in tokens/s.",
                made / decode if decode else 0,
            ),
            ("llamacpp:requests_processing", "gauge", "Requests processing.", len(running) - waiting),
            ("llamacpp:requests_deferred", "gauge", "Requests deferred.", waiting),
        ]


def _open_files() -> int | None:
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:  # only Linux tells this cheaply
        return None


def _line(name: str, labels: Labels, value: float) -> str:
    inner = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels)
    shown = repr(int(value)) if value == int(value) else repr(float(value))
    return f"{name}{{{inner}}} {shown}" if inner else f"{name} {shown}"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def build_router(metrics: Metrics) -> APIRouter:
    router = APIRouter(tags=["Health"])

    @router.get("/metrics", response_class=PlainTextResponse)
    async def scrape() -> PlainTextResponse:
        """Prometheus' text format: tokens, queue, latency histograms, loaded models, memory."""
        return PlainTextResponse(metrics.text(), media_type=CONTENT_TYPE)

    return router
