"""One model as a Serve application: made, spoken to, deleted. Runs in the gateway."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modules.errors import BackendUnavailable, LoadError
from modules.ray_engine import launch, nodes
from modules.ray_engine.launch import LOOPBACK, ROOT
from modules.ray_engine.reach import check_reachable, explain_connect

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from modules.overlays import Overlays
    from modules.ray_engine.settings import RaySettings
    from modules.schema import LoaderSpec

NAMESPACE = "switchyard"
BESIDE_GENERATIONS = 32  # encode, decode, abort and health, which must not wait for a slot
LOOK_S = 60.0
ROUTER_S = 0.05
OVER = ("DEPLOY_FAILED", "NOT_STARTED", "gone")  # Serve's words for what does not come to be RUNNING by itself
DRAIN_S = 600.0  # a replica that autoscaling takes away finishes its answers
_LOGS = {"log_level": "WARNING", "enable_access_log": False}


def connect(address: str, settings: RaySettings) -> dict[str, str]:
    """Become a driver of the Ray at `address`; package -> version. Raises BackendUnavailable."""
    check_reachable(address)
    import ray
    from ray import serve

    try:
        ray.init(
            address=address, namespace=NAMESPACE, log_to_driver=False, configure_logging=False, logging_level=logging.WARNING
        )
        serve.start(proxy_location="Disabled", logging_config=_LOGS)  # no HTTP of its own
    except Exception as error:
        raise explain_connect(address, error) from error
    return {"ray": ray.__version__, "python": sys.version.split()[0]}


class Deployment:
    def __init__(self, spec: LoaderSpec, settings: RaySettings, app: str, overlays: Overlays) -> None:
        self.spec, self.settings, self.app = spec, settings, app
        self._overlays = overlays
        self._slots = spec.slots
        self._replica: Any = None
        self._arguments: tuple[Any, ...] = ()
        self._handle: Any = None
        self._board: Any = None

    @property
    def local(self) -> bool:
        return bool(os.environ.get(LOOPBACK))

    # --- the nodes ----------------------------------------------------------------------------------------------

    async def check_nodes(self, path: str) -> None:
        """Every node that could run a replica has what it needs, else a typed error that says which has not."""
        import ray

        usable = [node for node in ray.nodes() if node["Alive"] and self._could_run(node["Resources"])]
        if not usable:
            most = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            cpus, gpus = (max((r.get(kind, 0.0) for r in most), default=0.0) for kind in ("CPU", "GPU"))
            raise BackendUnavailable(
                f"No node of the Ray cluster has room for a replica: it needs {self.settings.cpus:g} CPU and "
                f"{self.settings.gpus:g} GPU; the largest has {cpus:g} and {gpus:g}.",
                hint="Lower --ray-cpus or --ray-gpus, or add nodes to the cluster.",
            )
        if self.local:
            return
        ray.cloudpickle.register_pickle_by_value(nodes)
        python = str(self._overlays.python(self.spec.overlay)) if self.spec.overlay else None
        file = path if Path(path).exists() else None
        ask = ray.remote(num_cpus=0, max_retries=0)(nodes.look)
        place = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
        asked = {
            node["NodeManagerAddress"]: ask.options(scheduling_strategy=place(node["NodeID"], soft=False)).remote(
                str(ROOT), python, file
            )
            for node in usable
        }
        here = await asyncio.to_thread(nodes.look, str(ROOT), python, file)
        try:
            found = await asyncio.wait_for(asyncio.gather(*(_answer(ref) for ref in asked.values())), LOOK_S)
        except Exception as error:
            why = " ".join(str(error).split())[:300] or type(error).__name__
            raise BackendUnavailable(
                f"The nodes of the Ray cluster could not be looked at: {why}.",
                hint="Check the cluster with `ray status`.",
            ) from error
        nodes.judge(here, dict(zip(asked, found, strict=True)), str(ROOT), self.spec.overlay or "parent", file)

    def _could_run(self, resources: dict[str, float]) -> bool:
        return resources.get("CPU", 0.0) >= max(self.settings.cpus, 0.001) and resources.get("GPU", 0.0) >= self.settings.gpus

    # --- the application ------------------------------------------------------------------------------------------

    async def create(self, path: str, options: dict[str, Any]) -> None:
        """Deploy; the replicas load on their own and say so on the board."""
        import ray
        from ray import serve

        from modules.ray_engine.replica import Board, Replica

        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        board = ray.remote(num_cpus=0, max_concurrency=10_000)(Board)
        self._board = board.options(scheduling_strategy=here).remote()
        job = {
            "loader": self.spec.name,
            "path": path,
            "options": options,
            "app": self.app,
            "is_file": Path(path).exists(),
        }
        self._replica = serve.deployment(Replica).options(name="replica")
        self._arguments = (job, self._board)
        await self._deploy()

    async def _deploy(self) -> None:
        """Tell Serve what is wanted. Always as one version: then other limits are told to the replicas that run, where a new
        version would have them replaced. Serve takes the version from its own callers alone, hence `_internal`."""
        from ray import serve

        deployment = self._replica.options(**self._options()).options(version=self.app, _internal=True)
        target = serve.RunTarget(deployment.bind(*self._arguments), name=self.app, route_prefix=None)
        handles = await asyncio.to_thread(serve.run_many, [target], wait_for_applications_running=False)
        if self._handle is None:
            self._handle = handles[0].options(_by_reference=False)

    def _options(self) -> dict[str, Any]:
        settings = self.settings
        actor: dict[str, Any] = {"num_cpus": settings.cpus, "num_gpus": settings.gpus}
        if not self.local:
            env = {**launch.SERVE, **launch.QUIET, "PYTHONPATH": str(ROOT), "SWITCHYARD_SET": str(self._overlays.set_dir)}
            actor["runtime_env"] = {"env_vars": env}
        options: dict[str, Any] = {
            "max_ongoing_requests": self._slots + BESIDE_GENERATIONS,
            "ray_actor_options": actor,
            "health_check_period_s": 1.0,
            "health_check_timeout_s": 30.0,
            "graceful_shutdown_wait_loop_s": 0.1,
            "graceful_shutdown_timeout_s": DRAIN_S,
            "max_constructor_retry_count": 3,
            "logging_config": _LOGS,
        }
        if settings.routing != "power-of-two":
            from ray.serve.config import RequestRouterConfig

            from modules.ray_engine.router import SlotRouter

            options["request_router_config"] = RequestRouterConfig(
                request_router_class=SlotRouter, request_router_kwargs={"prefix": settings.routing == "prefix"}
            )
        if settings.minimum == settings.maximum:
            return options | {"num_replicas": settings.minimum}
        bounds = {"min_replicas": settings.minimum, "initial_replicas": settings.minimum, "max_replicas": settings.maximum}
        pace = {"upscale_delay_s": 2.0, "downscale_delay_s": 60.0, "metrics_interval_s": 1.0, "look_back_period_s": 3.0}
        return options | {"autoscaling_config": {**bounds, **pace, "target_ongoing_requests": max(1.0, 0.75 * self._slots)}}

    async def loaded(self, info: dict[str, Any]) -> None:
        """The first replicas are ready: how many generations each runs at once is known, which options may decide, and Serve is
        told where it was given another number. Waits until the router knows the replicas."""
        from modules.ray_engine.router import SlotRouter

        slots = info["slots"] or self.spec.slots
        SlotRouter.slots = slots
        if slots != self._slots:
            self._slots = slots
            await self._deploy()
            while (state := await self.state()) != "RUNNING":  # a replica that is being told gets no requests
                self._check(state)
                await asyncio.sleep(ROUTER_S)
        while await self.known() < self.settings.minimum:
            self._check(await self.state())
            await asyncio.sleep(ROUTER_S)

    def _check(self, state: str) -> None:
        if state in OVER:
            raise LoadError(
                f"The replicas of {self.spec.title} ended after they had loaded ({state}).", hint="The log says more."
            )

    async def known(self) -> int:
        """How many replicas the router knows; 0 also while one of them is gone and it does not know."""
        from ray.exceptions import RayActorError
        from ray.serve.exceptions import DeploymentUnavailableError

        try:
            return len(await self._handle.broadcast("abort", "").results_async())
        except (DeploymentUnavailableError, RayActorError):
            return 0

    def whole(self, info: dict[str, Any]) -> dict[str, Any]:
        """What the server is told of the model: with the slots of all replicas that there may be."""
        low, high = self.settings.minimum, self.settings.maximum
        count = f"{low}" if low == high else f"{low} to {high}"
        where = "here" if self.local else "in the cluster"
        note = f"On Ray {where}: {count} {'replica' if high == 1 else 'replicas'}, {self.settings.routing} routing."
        return info | {"slots": self._slots * high, "notes": [*info["notes"], note]}

    async def delete(self) -> None:
        """Wait until the replicas are gone, so that their memory is free."""
        from ray import serve

        if self._board is not None:
            await asyncio.to_thread(serve.delete, self.app, _blocking=False)  # it would look once a second
            while await self.state() != "gone":
                await asyncio.sleep(ROUTER_S)

    async def state(self) -> str:
        """Serve's word for the application, "gone" without one."""
        from ray import serve

        status = (await asyncio.to_thread(serve.status)).applications.get(self.app)
        return str(status.status.value) if status is not None else "gone"

    # --- requests -------------------------------------------------------------------------------------------------

    async def notes(self) -> list[dict[str, Any]]:
        return list(await self._board.take.remote())

    async def generate(self, request: dict[str, Any]) -> AsyncIterator[bytes]:
        response = self._handle.options(stream=True, method_name="generate").remote(request)
        try:
            async for frames in response:
                yield frames
        except asyncio.CancelledError:
            response.cancel()
            raise

    async def call(self, method: str, arguments: dict[str, Any]) -> dict[str, Any]:
        return dict(await self._handle.options(method_name="call").remote(method, arguments))

    async def abort(self, request_id: str) -> None:
        await self._handle.broadcast("abort", request_id).results_async()


async def _answer(reference: Any) -> dict[str, Any]:
    return dict(await reference)
