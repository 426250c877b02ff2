"""Which replica takes a request: Serve's router interface with a policy that knows the worker's slots.

Serve's power-of-two looks at two replicas and at a queue length that counts tokenising, too. This counts the generations it has
sent to each (the gateway is the deployment's only client, so the count is exact), gives a replica no more than it runs at once,
and prefers the one that last saw the longest beginning of this prompt, whose prefix cache saves the prefill. Serve's own
PrefixCacheAffinityRouter is in ray.serve.llm, which needs pyarrow and asks one more actor before each request.
"""

from __future__ import annotations

import random
from typing import Any, ClassVar

from ray.serve.request_router import RequestRouter

from modules.ray_engine.routing import Loads, Prefixes


class SlotRouter(RequestRouter):  # type: ignore[misc]  # Ray is not there when mypy runs
    """See the module. `slots`, of the one deployment that this process speaks to, is known once a replica has loaded."""

    slots: ClassVar[int] = 1

    def initialize_state(self, prefix: bool = True) -> None:
        self._loads = Loads()
        self._prefixes = Prefixes() if prefix else None

    async def choose_replicas(self, candidate_replicas: list[Any], pending_request: Any = None) -> list[list[Any]]:
        by_id = {replica.replica_id: replica for replica in candidate_replicas}
        if pending_request is None or pending_request.metadata.call_method != "generate":
            return [[random.choice(candidate_replicas)]] if candidate_replicas else []
        request_id = pending_request.metadata.internal_request_id
        self._loads.remove(request_id)
        free = {key for key in by_id if self._loads.on(key) < self.slots}
        if not free:
            pending_request.routing_context.should_backoff = True
            return []
        keys = self._prefixes.keys(pending_request.args[0]) if self._prefixes is not None else []
        chosen = self._prefixes.best(keys, free) if self._prefixes is not None else None
        if chosen is None:
            least = min(self._loads.on(key) for key in free)
            chosen = random.choice([key for key in free if self._loads.on(key) == least])
        if self._prefixes is not None:
            self._prefixes.remember(keys, chosen)
        # Counted from now on: the next request is routed before this one has been sent.
        self._loads.add(request_id, chosen)
        pending_request.future.add_done_callback(lambda future: self._loads.remove(request_id) if future.cancelled() else None)
        return [[by_id[chosen]]]

    def on_request_completed(self, replica_id: Any, internal_request_id: str) -> None:
        self._loads.remove(internal_request_id)
