"""Tokens into the chat page, 200 messages of history, over the same stream in a plain page; long tasks at 1,000 tok/s.

The text is Markdown: paragraphs, bold, lists, tables and code. A token is what the echo loader makes one: up to eight characters.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from typing import Any

from common import Server, report
from playwright.sync_api import Page, sync_playwright

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WORDS = """the of and model token stream memory cache layer weight river light
paper stone garden window number simple quick brown""".split()

# Runs in the page: the plain page. One text node, fed by the run's own event stream.
PLAIN = """async (run) => {
  document.body.innerHTML = '<pre id="out" style="white-space:pre-wrap"></pre>';
  const node = document.createTextNode(''); document.getElementById('out').append(node);
  return await new Promise((resolve) => {
    let first = 0;
    const source = new EventSource(`/ui-api/runs/${run}/stream`);
    source.onmessage = (e) => { first ||= performance.now(); node.appendData(JSON.parse(e.data)); };
    source.addEventListener('done', () => { source.close(); requestAnimationFrame(() => resolve([first, performance.now()])); });
  });
}"""

# Runs in the chat page: when the answer's place appears, and when the finished answer stands.
WATCH = """() => {
  window.__first = 0; window.__end = 0; window.__long = [];
  const noteLong = (list) => window.__long.push(...list.getEntries().map((e) => [e.startTime, e.duration]));
  new PerformanceObserver(noteLong).observe({ type: 'longtask' });
  const count = document.querySelectorAll('[data-testid=message]').length;
  const look = () => {
    const messages = document.querySelectorAll('[data-testid=message]');
    const last = messages[messages.length - 1];
    const streaming = messages.length > count && last?.dataset.role === 'assistant';
    if (streaming && !window.__first) window.__first = performance.now();
    if (window.__first && last.querySelector('[data-testid=receipt-chip]')) window.__end = performance.now();
    else requestAnimationFrame(look);
  };
  requestAnimationFrame(look);
}"""


def markdown(tokens: int, seed: int = 1) -> str:
    """About `tokens` tokens of varied Markdown."""
    rng = random.Random(seed)
    parts, made = ["STARTMARK"], 1
    while made < tokens:
        kind = rng.random()
        if kind < 0.7:
            parts.append(" ".join(rng.choice(WORDS) if rng.random() > 0.05 else "**bold**" for _ in range(60)))
            made += 62
        elif kind < 0.8:
            parts.append("\n".join(f"- item {n} **{rng.choice(WORDS)}** `code`" for n in range(6)))
            made += 40
        elif kind < 0.9:
            parts.append("```python\n" + "\n".join(f"def f{n}(x):\n    return x + {n}" for n in range(8)) + "\n```")
            made += 90
        else:
            parts.append("| a | b |\n|---|---|\n" + "\n".join(f"| {n} | {rng.choice(WORDS)} |" for n in range(6)))
            made += 60
    return "\n\n".join(parts)


def conversation(server: Server, messages: int) -> str:
    """A chat with this many messages of history; its id."""
    rng = random.Random(7)
    pairs = [[" ".join(rng.choices(WORDS, k=30)), markdown(110, seed)] for seed in range(messages // 2)]
    made = server.http.post("/ui-api/conversations/import", json={"internal": pairs})
    made.raise_for_status()
    body = made.json()
    return str(body.get("id") or body["snapshot"]["id"])


def send(server: Server, chat: str, text: str) -> dict[str, Any]:
    body = {"text": text, "client_id": f"bench-{time.monotonic_ns()}"}
    answer = server.http.post(f"/ui-api/conversations/{chat}/messages", json=body)
    answer.raise_for_status()
    return dict(answer.json()["messages"][-1])


def plain_rate(server: Server, page: Page, chat: str, text: str) -> float:
    page.goto(f"{server.url}/health")
    run = send(server, chat, text)["run"]
    first, end = page.evaluate(PLAIN, run)
    return tokens_of(server, chat) * 1000 / (end - first)


def page_rate(server: Server, page: Page, chat: str, text: str) -> tuple[float, list[float]]:
    page.goto(f"{server.url}/?c={chat}")
    page.locator("[data-testid=message]").nth(199).wait_for(state="attached", timeout=60_000)
    page.locator("[data-testid=composer]").wait_for()
    time.sleep(1)
    page.evaluate(WATCH)
    page.locator("[data-testid=composer]").fill(text)
    page.locator("[data-testid=send]").click()
    page.wait_for_function("window.__end", timeout=120_000)
    first, end, long = page.evaluate("[window.__first, window.__end, window.__long]")
    # Long tasks of the stream; putting 12 KB of text into the message box is one of its own, before it.
    return tokens_of(server, chat) * 1000 / (end - first), [duration for start, duration in long if start + duration > first]


def tokens_of(server: Server, chat: str) -> int:
    node = server.http.get(f"/ui-api/conversations/{chat}").json()["messages"][-1]
    return int(node["receipt"]["usage"]["completion_tokens"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=10_000)
    parser.add_argument("--history", type=int, default=200)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    arguments = parser.parse_args()
    text = markdown(arguments.tokens)
    with report("page_stream") as figures, Server("--no-model", wait_ready=False) as server, sync_playwright() as playwright:
        server.wait("/config")
        server.load("echo", context_length=1_000_000)
        server.http.put("/ui-api/settings", json={"max_tokens": None}).raise_for_status()
        browser = playwright.chromium.launch(executable_path=arguments.chromium, args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        plain, full, at_rate = [], [], []
        for repetition in range(arguments.repetitions + 1):
            rates = (
                plain_rate(server, page, conversation(server, 2), f"[[echo]]{text}"),
                page_rate(server, page, conversation(server, arguments.history), f"[[echo]]{text}")[0],
            )
            if repetition:  # the first warms the caches
                plain.append(rates[0])
                full.append(rates[1])
        for _ in range(2):
            at_rate.append(page_rate(server, page, conversation(server, arguments.history), f"[[echo rate=1000]]{text}"))
        browser.close()
        long = [duration for _, tasks in at_rate for duration in tasks]
        figures.update(
            tokens=arguments.tokens,
            history_messages=arguments.history,
            repetitions=arguments.repetitions,
            page_tok_s=round(statistics.median(full)),
            plain_page_tok_s=round(statistics.median(plain)),
            ratio=round(statistics.median(f / p for f, p in zip(full, plain, strict=True)), 3),
            at_1000_tok_s={
                "measured_tok_s": [round(rate) for rate, _ in at_rate],
                "long_tasks_over_200_ms": sum(d > 200 for d in long),
                "longest_ms": round(max(long, default=0)),
            },
        )
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
