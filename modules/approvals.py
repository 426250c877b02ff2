"""Requests for a model that is not loaded, under `--model-switch ask`: they wait here until somebody on the page decides."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from modules.errors import Conflict, NotFound

WAIT_S = 600.0


@dataclass(eq=False)
class _Asked:
    answer: asyncio.Future[bool]
    waiting: int = 0


class Approvals:
    """One question for each model, however many requests wait for it. `changed` tells the pages."""

    def __init__(self, changed: Callable[[], None], wait_s: float = WAIT_S) -> None:
        self._changed = changed
        self._wait_s = wait_s
        self._asked: dict[str, _Asked] = {}

    def pending(self) -> list[dict[str, Any]]:
        """The questions, JSON-safe: model and how many requests wait for it."""
        return [{"model": model, "waiting": asked.waiting} for model, asked in self._asked.items()]

    async def ask(self, model: str) -> None:
        """Wait for a yes. Raises Conflict for a no, and when nobody answers. A request that leaves takes its question along."""
        asked = self._asked.get(model)
        if asked is None:
            asked = self._asked[model] = _Asked(asyncio.get_running_loop().create_future())
        asked.waiting += 1
        self._changed()
        try:
            approved = await asyncio.wait_for(asyncio.shield(asked.answer), self._wait_s)
        except asyncio.TimeoutError:
            raise Conflict(
                f"The model {model} is not loaded, and its operator did not answer.", hint="Try again later."
            ) from None
        finally:
            asked.waiting -= 1
            if asked.waiting == 0 and self._asked.get(model) is asked:
                del self._asked[model]
            self._changed()
        if not approved:
            raise Conflict(f"The model {model} is not loaded, and its operator refused to load it.", hint="Use a loaded one.")

    def answer(self, model: str, approved: bool) -> None:
        """Decide for everybody who waits. Raises NotFound when nobody does (any more)."""
        asked = self._asked.pop(model, None)
        if asked is None:
            raise NotFound("Nobody asks for that model any more.", param="model")
        asked.answer.set_result(approved)
        self._changed()
