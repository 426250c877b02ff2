"""What a replica on Ray adds to a local worker, token by token, with the echo backend: the same client on both.

Full speed: time per token of one stream. Paced at 50 tokens a second: the way of each token from the backend, which writes the
time into it, to the server; first token: from the request to its arrival. Each is the median of the replica less that of the
local worker; the two take turns. Aim: at most 1 ms a token at the median.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import ROOT, report

from modules.overlays import Overlays
from modules.ray_engine.client import RayEngine
from modules.ray_engine.settings import RaySettings
from modules.registry import load_spec
from modules.schema import GenerationRequest, StopParams, TokenEvent
from modules.worker_client import WorkerClient

if TYPE_CHECKING:
    from modules.engine_client import EngineClient

RATE = 50
SPEC = load_spec("echo")
OPTIONS = {option.name: option.default for option in SPEC.options}


async def stream(client: EngineClient, request_id: str, tokens: int, rate: float) -> tuple[float, list[tuple[float, float]]]:
    """When it was sent, and for each token when it was made and when it came, in seconds of the monotonic clock."""
    prompt = f"[[echo clock=1 tokens={tokens} rate={rate}]] x"
    request = GenerationRequest(request_id, prompt=prompt, stop=StopParams(max_tokens=tokens))
    sent = time.perf_counter()
    events = [(event, time.perf_counter()) async for event in client.generate(request) if isinstance(event, TokenEvent)]
    return sent, [(int(event.text) / 1e9, came) for event, came in events if event.text.strip()]


async def measure(rounds: int, figures: dict[str, Any]) -> None:
    overlays = Overlays.find(ROOT)
    with tempfile.TemporaryDirectory(prefix="switchyard-bench-") as folder:
        engine = RayEngine(RaySettings(), overlays, Path(folder))
        begun = time.perf_counter()
        clients: dict[str, EngineClient] = {"ray": await engine.start(SPEC), "local": await WorkerClient.start(SPEC, overlays)}
        for client in clients.values():
            await client.load("echo", OPTIONS)
        figures["start_s"] = round(time.perf_counter() - begun, 2)
        fast: dict[str, list[float]] = {name: [] for name in clients}
        late: dict[str, list[float]] = {name: [] for name in clients}
        first: dict[str, list[float]] = {name: [] for name in clients}
        for index in range(rounds + 1):
            for name, client in clients.items():
                _, quick = await stream(client, f"fast{index}", 2000, 0)
                sent, paced = await stream(client, f"paced{index}", 100, RATE)
                if index:  # the first round warms up
                    fast[name].append((quick[-1][1] - quick[0][1]) / (len(quick) - 1))
                    late[name] += [came - made for made, came in paced]
                    first[name].append(paced[0][1] - sent)
        for client in clients.values():
            await client.close()
        await engine.close()
    for name in clients:
        figures[name] = {
            "full_speed_ms_per_token": round(1000 * statistics.median(fast[name]), 4),
            "first_token_p50_ms": round(1000 * statistics.median(first[name]), 3),
            "paced_late_p50_ms": round(1000 * statistics.median(late[name]), 3),
            "paced_late_p95_ms": round(1000 * sorted(late[name])[int(0.95 * len(late[name]))], 3),
        }
    for key in ("full_speed_ms_per_token", "paced_late_p50_ms", "paced_late_p95_ms", "first_token_p50_ms"):
        figures[f"added_{key}"] = round(figures["ray"][key] - figures["local"][key], 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    given = parser.parse_args()
    with report("ray_overhead") as figures:
        asyncio.run(measure(given.rounds, figures))


if __name__ == "__main__":
    main()
