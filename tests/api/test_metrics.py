"""/metrics, read as Prometheus reads it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from modules.api.metrics import MAX_SERIES, Counter, Histogram

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.api.conftest import Server

LINE = re.compile(r'([a-zA-Z_:][\w:]*)(?:\{((?:[a-z_]+="(?:[^"\\\n]|\\.)*",?)*)\})? (-?[\d.e+-]+|\+Inf|NaN)')


def scrape(server: Server) -> dict[str, float]:
    answer = server.http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    kinds: dict[str, str] = {}
    values: dict[str, float] = {}
    for line in answer.text.splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert name not in kinds, f"{name} is told twice"
            kinds[name] = kind
        elif not line.startswith("#"):
            match = LINE.fullmatch(line)
            assert match, line
            base = re.sub(r"_(bucket|sum|count)$", "", match[1])
            assert match[1] in kinds or kinds.get(base) == "histogram", line
            values[line.rpartition(" ")[0]] = float(match[3])
    return values


def test_figures_grow_with_use(launch: Callable[..., Server]) -> None:
    server = launch().wait_ready()
    before = scrape(server)
    assert before['switchyard_model_state{model="echo",loader="echo",state="ready"}'] == 1
    answer = server.chat("hello there").json()
    server.chat("x", temperature=-1)
    after = scrape(server)
    model = '{model="echo"}'
    assert after[f"switchyard_completion_tokens_total{model}"] == answer["usage"]["completion_tokens"]
    assert after[f"switchyard_prompt_tokens_total{model}"] == answer["usage"]["prompt_tokens"]
    assert after["llamacpp:tokens_predicted_total"] == answer["usage"]["completion_tokens"]
    assert after['switchyard_generations_total{model="echo",loader="echo",finish_reason="stop"}'] == 1
    assert after['switchyard_time_to_first_token_seconds_bucket{model="echo",le="+Inf"}'] == 1
    assert after[f"switchyard_generation_seconds_count{model}"] == 1
    chat = '{method="POST",route="/v1/chat/completions",status="%d"}'
    assert after[f"switchyard_http_requests_total{chat % 200}"] == 1
    assert after[f"switchyard_http_requests_total{chat % 400}"] == 1
    assert after["switchyard_generations_running"] == 0 and after["process_resident_memory_bytes"] > 1e6
    assert after['switchyard_model_memory_bytes{model="echo",loader="echo"}'] > 1e6


def test_a_histogram_accumulates() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 9.0):
        histogram.observe(value, model='a"b\\')
    label = 'model="a\\"b\\\\"'
    assert list(histogram.lines("x")) == [
        f'x_bucket{{{label},le="1"}} 2',
        f'x_bucket{{{label},le="2"}} 3',
        f'x_bucket{{{label},le="+Inf"}} 4',
        f"x_sum{{{label}}} 12",
        f"x_count{{{label}}} 4",
    ]


def test_labels_from_outside_do_not_fill_the_memory() -> None:
    counter = Counter()
    for number in range(MAX_SERIES + 10):
        counter.add(model=str(number))
    assert len(counter.samples()) == MAX_SERIES
