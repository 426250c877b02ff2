"""What the benchmarks share: a server of our own, the hardware's description, and where results go."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT))

import httpx  # noqa: E402
import psutil  # noqa: E402

from modules.overlays import Overlays  # noqa: E402


def hardware() -> dict[str, Any]:
    """What the figures were taken on."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
        flags = next((line for line in lines if line.startswith("flags")), "").split()
        model += ", " + " ".join(f for f in ("avx2", "avx512f", "amx_tile") if f in flags)
    return {
        "cpu": model,
        "cores": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "gradio": importlib.metadata.version("gradio"),
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """A real server process on a port of its own, with a fresh data folder."""

    def __init__(self, *flags: str, wait_ready: bool = True, environment: dict[str, str] | None = None) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._data = tempfile.mkdtemp(prefix="switchyard-bench-")
        self._log = open(Path(self._data) / "server.log", "w+b")  # noqa: SIM115 - closed in close()
        python = Overlays.find(ROOT).python("parent")
        command = [str(python), "server.py", "--listen-port", str(self.port), "--user-data-dir", self._data, *flags]
        self.started = time.perf_counter()
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdout=self._log, stderr=subprocess.STDOUT, env=os.environ | (environment or {})
        )
        self.http = httpx.Client(base_url=self.url, timeout=600)
        if wait_ready:
            self.wait("/v1/models" if "--no-model" in flags else "/health")  # healthy means that a model is ready

    def wait(self, path: str, status: int = 200, limit_s: float = 600) -> float:
        """Poll until `path` answers `status`; seconds since the start."""
        while time.perf_counter() - self.started < limit_s:
            if self.process.poll() is not None:
                raise SystemExit(f"The server ended:\n{self.log()}")
            with contextlib.suppress(httpx.TransportError):
                if self.http.get(path).status_code == status:
                    return time.perf_counter() - self.started
            time.sleep(0.01)
        raise SystemExit(f"{path} did not answer {status}:\n{self.log()}")

    def log(self) -> str:
        return Path(self._log.name).read_text(encoding="utf-8", errors="replace")[-4000:]

    def load(self, model: str, loader: str | None = None, **options: Any) -> dict[str, Any]:
        """Load a model and wait until it is ready."""
        body = {"model": model, "loader": loader, "options": options}
        answer = self.http.post("/ui-api/models/load", json=body)
        answer.raise_for_status()
        resident = answer.json()["resident"]["id"]
        while True:
            found = next(r for r in self.http.get("/ui-api/models").json()["residents"] if r["id"] == resident)
            if found["state"] == "ready":
                return dict(found)
            if found["state"] == "failed":
                raise SystemExit(f"{model} did not load: {found['error']}")
            time.sleep(0.01)

    def unload(self) -> None:
        self.http.post("/ui-api/models/unload", json={}).raise_for_status()

    def close(self) -> None:
        self.http.close()
        self.process.terminate()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._log.close()
        shutil.rmtree(self._data, ignore_errors=True)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def run_in(environment: str, *command: object) -> None:
    """A command of the project's Python in a backend's environment: `run_in("rwkv", "benchmarks/make_rwkv.py", folder)`."""
    overlays = Overlays.find(ROOT)
    words = [str(overlays.python(environment)), *map(str, command)]
    subprocess.run(words, cwd=ROOT, check=True, env=overlays.worker_env(environment), stdout=subprocess.DEVNULL)


class Loop:
    """A script of ours in a backend's environment that holds a model: a JSON line asks, a JSON line answers."""

    def __init__(self, overlay: str, script: str, *arguments: object) -> None:
        overlays = Overlays.find(ROOT)
        command = [overlays.python(overlay), ROOT / "benchmarks" / script, *arguments]
        self.process = subprocess.Popen(
            [*map(str, command)],
            cwd=ROOT,
            env=overlays.worker_env(overlay),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.about = self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"The engine ended with {self.process.wait()}: {self.process.args}")
        return dict(json.loads(line))

    def run(self, prompt: str, tokens: int) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"prompt": prompt, "tokens": tokens}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def rss_anon(pid: int) -> int:
    """RssAnon + VmSwap of a process in bytes: its own memory, without what the page cache lends it (Linux)."""
    wanted = {"RssAnon:", "VmSwap:"}
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.split()[0] in wanted)


def linear_fit(values: Sequence[float]) -> tuple[float, float]:
    """(slope per step, R²) of the least-squares line through equally spaced values."""
    steps = range(len(values))
    slope, intercept = statistics.linear_regression(steps, values)
    mean = statistics.fmean(values)
    total = sum((v - mean) ** 2 for v in values)
    rest = sum((v - intercept - slope * x) ** 2 for x, v in zip(steps, values, strict=True))
    return slope, 1 - rest / total if total else 0.0


def _without_folders(argument: str) -> str:
    """A path of this machine says nothing elsewhere but its name."""
    return Path(argument).name if Path(argument).is_absolute() else argument


@contextlib.contextmanager
def report(name: str) -> Iterator[dict[str, Any]]:
    """Collect figures; at the end write benchmarks/results/NAME.json and print them."""
    figures: dict[str, Any] = {}
    yield figures
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    result = {
        "benchmark": name,
        "command": " ".join(["python", os.path.relpath(sys.argv[0], ROOT), *map(_without_folders, sys.argv[1:])]),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": commit.stdout.strip(),
        "hardware": hardware(),
        "figures": figures,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1, ensure_ascii=False)
    (RESULTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    print(text)
