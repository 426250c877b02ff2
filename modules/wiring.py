"""The services put together from a configuration, started and ended in order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable
from typing import TYPE_CHECKING, Any

from modules.chat.attachments import Attachments
from modules.chat.places import open_place
from modules.chat.templates import TemplateRenderer
from modules.conversions import Conversions
from modules.download.account import HubAccount
from modules.download.jobs import Downloads
from modules.errors import AppError, ModelNotFound
from modules.evaluate.jobs import EvaluationJobs
from modules.evaluate.runner import Surroundings
from modules.evaluate.store import EvaluationStore
from modules.events import EventBus
from modules.generation import Runs
from modules.installs import InstallManager
from modules.library import LocalLibrary
from modules.model_manager import ModelManager
from modules.options import ROOT
from modules.overlays import Overlays
from modules.presets import Presets
from modules.quantizations import Quantizations
from modules.ray_engine.client import RayEngine
from modules.ray_engine.settings import RaySettings
from modules.registry import discover, rank
from modules.remotes.store import RemoteStore
from modules.remotes.watch import Remotes
from modules.services import Services
from modules.settings import ModelSettings, Settings
from modules.shelf import Shelf
from modules.worker_client import WorkerClient

if TYPE_CHECKING:
    from collections.abc import Callable

    from modules.config import Config
    from modules.engine_client import EngineClient
    from modules.residents import Resident
    from modules.schema import LoaderSpec

log = logging.getLogger(__name__)


def build_services(config: Config) -> Services:
    """Everything, at rest: no process started, no file written."""
    specs = discover()
    overlays = Overlays.find(ROOT)
    events = EventBus()
    remotes = Remotes(RemoteStore(config.user_data_dir), events)
    library = LocalLibrary(config.model_dirs, specs.values(), remotes, config.user_data_dir / "model_headers.json")
    presets = Presets(config.preset_dir)
    settings = Settings(config.user_data_dir / "settings.yaml", presets)
    model_settings = ModelSettings(config.user_data_dir / "model_settings.yaml", specs)

    ray = RayEngine(RaySettings.of(config), overlays, config.user_data_dir) if config.engine == "ray" else None

    def start_worker(spec: LoaderSpec, on_log: Callable[[str], None]) -> Awaitable[EngineClient]:
        if ray is not None and "remote" not in spec.formats:  # what computes elsewhere needs no replicas here
            return ray.start(spec, on_log)
        return WorkerClient.start(spec, overlays, on_log=on_log)

    def model_options(model: str, loader: str) -> dict[str, Any]:
        given, saved = config.options_for(specs[loader].options), model_settings.options(model, loader)
        # Flags are the base for every model; for the one that --model names they are the last word.
        return {**saved, **given} if config.model == model else {**given, **saved}

    manager = ModelManager(
        library,
        specs,
        overlays,
        events,
        start_worker,
        model_options=model_options,
        model_loader=model_settings.loader,
        switch_policy=config.model_switch,  # type: ignore[arg-type]
        idle_timeout_s=config.idle_timeout * 60,
        max_models=config.max_models,
        load_anyway=config.load_anyway,
    )
    around = Surroundings(
        library=library,
        specs=specs,
        overlays=overlays,
        store=EvaluationStore(config.user_data_dir / "evaluations"),
        datasets=[config.user_data_dir / "datasets"],
        options=model_options,
    )
    store = open_place(config.database_url or config.user_data_dir, config.user_data_dir)
    hub = HubAccount(config.user_data_dir, config.hub_endpoint, config.hub_proxy)
    return Services(
        config=config,
        specs=specs,
        overlays=overlays,
        library=library,
        remotes=remotes,
        events=events,
        manager=manager,
        runs=Runs(manager),
        templates=TemplateRenderer(),
        attachments=Attachments(store),
        settings=settings,
        model_settings=model_settings,
        presets=presets,
        store=store,
        ray=ray,
        installs=InstallManager(overlays, events, torch=config.torch),
        evaluations=EvaluationJobs(around, events),
        quantizations=Quantizations(library, config.model_dir, overlays, events, config.user_data_dir / "quantizations.json"),
        hub=hub,
        conversions=Conversions(library, config.model_dir, overlays, events),
        shelf=Shelf(library, model_settings),
        downloads=Downloads(hub, config.model_dir, events, config.user_data_dir / "downloads.json"),
    )


@contextlib.asynccontextmanager
async def running(services: Services) -> AsyncIterator[None]:
    """Open the store, serve inside, and leave nothing behind. Raises StoreLocked when another server has the data folder."""
    services.loop = asyncio.get_running_loop()
    notices = await services.store.open()
    background: set[asyncio.Task[Any]] = set()
    try:
        for notice in notices:
            log.warning("%s", notice.text)
        for problem in (*services.settings.problems, *services.model_settings.problems):
            log.warning("%s", problem)
        if services.chat is not None:
            await services.chat.start([*services.settings.problems, *services.model_settings.problems])
        if services.batches is not None:
            await services.batches.start_up()
        services.manager.on_active = lambda resident: _remember(services, resident, background)
        services.manager.idle.watch()
        _keep(background, services.remotes.watch())
        _keep(background, services.templates.warm())
        if not services.config.no_model:
            _keep(background, load_first_model(services, services.manager.expect_first()))
        services.downloads.start_up()
        if services.config.background_install:
            services.installs.resume()
        yield
    finally:
        for task in background:
            task.cancel()
        await asyncio.gather(*background, return_exceptions=True)
        if services.batches is not None:
            await services.batches.close()
        await end_streams(services)
        if services.chat is not None:
            await services.chat.close()
        await services.downloads.close()
        await services.installs.close()
        await services.evaluations.close()
        await services.quantizations.close()
        await services.conversions.close()
        await services.manager.close()
        if services.ray is not None:
            await services.ray.close()
        await services.templates.close()
        await services.store.close()


async def end_streams(services: Services) -> None:
    """Stop every generation, with its text kept, and let every open event stream end."""
    await services.runs.close(timeout_s=4.0)
    services.events.close()


def _keep(background: set[asyncio.Task[Any]], work: Any) -> None:
    task = asyncio.get_running_loop().create_task(work)
    background.add(task)
    task.add_done_callback(lambda done: _ended(background, done))


def _ended(background: set[asyncio.Task[Any]], task: asyncio.Task[Any]) -> None:
    background.discard(task)
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("%s", error, exc_info=None if isinstance(error, AppError) else error)


def _remember(services: Services, resident: Resident, background: set[asyncio.Task[Any]]) -> None:
    """The model to start with next time."""
    last = {"model": resident.model.id, "loader": resident.loader}
    if services.settings["last_model"] != last:
        _keep(background, asyncio.to_thread(services.settings.update, {"last_model": last}))


# --- the first model -----------------------------------------------------------------------------------------------


async def load_first_model(services: Services, settle: Callable[[], None]) -> None:
    """--model, else the last active one, else the bundled one; again whenever an installation ends, until one is there."""
    with services.events.subscribe() as events:
        while True:
            try:
                if await _load_first(services):
                    return
            finally:
                settle()
            async for event in events:
                if event.kind == "install" and event.data.get("state") == "done":
                    break
            else:
                return


async def _load_first(services: Services) -> bool:
    """Whether something was loaded or is the user's business now."""
    manager, config = services.manager, services.config
    if manager.residents() and manager.state() != "failed":
        return True
    if config.model is not None:
        try:
            model = await asyncio.to_thread(services.library.admit, config.model)
        except ModelNotFound as error:
            log.warning("--model %s: %s", config.model, error)
            return True
        return await _try_load(services, model.id, config.loader)
    last = services.settings["last_model"] if services.settings["autoload_last_model"] else None
    if last is not None and await _try_load(services, last["model"], last["loader"]):
        return True
    bundled = await asyncio.to_thread(services.library.bundled)
    ranked = [choice for model in bundled for choice in [rank(model, services.specs.values(), services.overlays)[0]] if choice.ok]
    order = {"gguf": 0, "hf": 1}
    for model in sorted(bundled, key=lambda m: (order.get(m.format, 2), m.id)):
        if any(c.ok for c in rank(model, services.specs.values(), services.overlays)):
            return await _try_load(services, model.id, config.loader)
    if not bundled:
        log.info("no model is there yet: put one into %s", config.model_dir)
        return True
    log.info("the bundled model waits for its backend to be installed" if not ranked else "the bundled model can't be loaded")
    return False


async def _try_load(services: Services, model: str, loader: str | None) -> bool:
    try:
        resident = await services.manager.load(model, loader)
    except AppError as error:
        log.error("loading %s: %s", model, error)
        return False
    log.info("%s is ready (%s)", resident.model.id, resident.loader)
    return True
