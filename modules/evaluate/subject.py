"""One model under measurement, in a worker of its own: it never takes the place of the chats' model."""

from __future__ import annotations

import asyncio
import itertools
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modules.errors import LoadOutOfMemory
from modules.load_options import complete_options
from modules.plan.admission import need_of
from modules.plan.machine import this_machine
from modules.schema import Done, GenerationRequest, StopParams, TokenEvent
from modules.worker_client import WorkerClient

if TYPE_CHECKING:
    from modules.engine_client import EngineClient
    from modules.overlays import Overlays
    from modules.schema import LoaderSpec, LoadProgress, ModelFiles, ModelInfo

_ids = itertools.count()


class Subject:
    """A loaded model. Make one with `open`, end it with `close`."""

    def __init__(self, client: EngineClient, model: ModelFiles, info: ModelInfo, load_s: float) -> None:
        self.client = client
        self.model = model
        self.info = info
        self.load_s = load_s
        self._device_peak: int | None = None
        self._seen_peak = 0

    @classmethod
    async def open(
        cls,
        model: ModelFiles,
        spec: LoaderSpec,
        options: Mapping[str, Any],
        overlays: Overlays,
        on_progress: Callable[[LoadProgress], None],
    ) -> Subject:
        """Start a worker and load. Raises LoadError's subclasses, EngineDead; LoadOutOfMemory before it is tried in vain."""
        complete = complete_options(spec, options)
        machine = await asyncio.to_thread(this_machine, Path(model.path), bandwidth=False)
        need = await asyncio.to_thread(need_of, model, spec, complete, machine)
        needed, free = need.memory.at_load, machine.ram_available_bytes
        if needed > free:
            raise LoadOutOfMemory(
                f"{model.id} needs about {needed / 1e9:.1f} GB beside what is loaded; {free / 1e9:.1f} GB are free.",
                hint="Unload the chats' model, or choose a smaller one.",
            )
        client = await WorkerClient.start(spec, overlays)
        try:
            started = time.perf_counter()
            info = await client.load(model.path, complete, on_progress)
            return cls(client, model, info, time.perf_counter() - started)
        except BaseException:
            await client.close(grace_s=0.5)
            raise

    async def close(self) -> None:
        await self.client.close(grace_s=2.0)

    # --- memory ---------------------------------------------------------------------------------------------------

    def look_at_memory(self) -> None:
        """Note what the worker holds now, for systems that don't keep the peak themselves."""
        self._seen_peak = max(self._seen_peak, self.client.memory_bytes() or 0)

    def peak_memory(self) -> int | None:
        """The most main memory the worker has held, in bytes: libraries, weights (mapped files included), caches."""
        self.look_at_memory()
        return max(self._seen_peak, _system_peak(self.client.pid)) or None

    def peak_device_memory(self) -> int | None:
        """The same for the GPU, as the engine reports it."""
        return self._device_peak

    # --- generation -----------------------------------------------------------------------------------------------

    async def generate(
        self, *, prompt: str | None = None, token_ids: tuple[int, ...] | None = None, max_tokens: int,
        sampling: dict[str, Any] | None = None, stop: tuple[str, ...] = (), add_special: bool = True, ignore_eos: bool = False,
    ) -> tuple[list[int], str, Done]:  # fmt: skip
        """One answer, greedy unless `sampling` says otherwise: ids, text, and the engine's account of it."""
        request = GenerationRequest(
            f"evaluate-{next(_ids)}",
            prompt=prompt,
            token_ids=token_ids,
            sampling={"temperature": 0.0} if sampling is None else sampling,
            stop=StopParams(max_tokens=max_tokens, stop=stop, ignore_eos=ignore_eos),
            add_special=add_special,
        )
        ids: list[int] = []
        text: list[str] = []
        done: Done | None = None
        async for event in self.client.generate(request):
            if isinstance(event, TokenEvent):
                ids += event.token_ids
                text.append(event.text)
            elif isinstance(event, Done):
                done = event
        assert done is not None, "a generation ends with Done or an error"
        if done.peak_memory_bytes and any(device not in ("cpu", "disk") for device in self.info.device_map):
            self._device_peak = max(self._device_peak or 0, done.peak_memory_bytes)
        return ids, "".join(text), done


def _system_peak(pid: int | None) -> int:
    """VmHWM on Linux, the peak working set on Windows, 0 where the system keeps none for others to read."""
    if pid is None:
        return 0
    if sys.platform == "linux":
        try:
            lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
        except OSError:  # it has just ended
            return 0
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)
    import psutil

    try:
        return int(getattr(psutil.Process(pid).memory_info(), "peak_wset", 0))
    except psutil.Error:
        return 0
