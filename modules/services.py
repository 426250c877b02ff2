"""Everything a route, the page or a subcommand may need, built once and handed round; no module-level state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import asyncio

    from modules.batch.jobs import BatchJobs
    from modules.chat.attachments import Attachments
    from modules.chat.service import ChatService
    from modules.chat.store import ChatStore
    from modules.chat.templates import TemplateRenderer
    from modules.config import Config
    from modules.conversions import Conversions
    from modules.download.account import HubAccount
    from modules.download.jobs import Downloads
    from modules.evaluate.jobs import EvaluationJobs
    from modules.events import EventBus
    from modules.generation import Runs
    from modules.installs import InstallManager
    from modules.library import LocalLibrary
    from modules.model_manager import ModelManager
    from modules.overlays import Overlays
    from modules.presets import Presets
    from modules.quantizations import Quantizations
    from modules.ray_engine.client import RayEngine
    from modules.remotes.watch import Remotes
    from modules.residents import Resident
    from modules.schema import LoaderSpec
    from modules.settings import ModelSettings, Settings
    from modules.shelf import Shelf


@dataclass
class Services:
    """Built by `modules.wiring`; belongs to one event loop, `loop` once it runs."""

    config: Config
    specs: dict[str, LoaderSpec]
    overlays: Overlays
    library: LocalLibrary
    remotes: Remotes
    events: EventBus
    manager: ModelManager
    runs: Runs
    templates: TemplateRenderer
    attachments: Attachments
    settings: Settings
    model_settings: ModelSettings
    presets: Presets
    store: ChatStore
    installs: InstallManager
    evaluations: EvaluationJobs
    quantizations: Quantizations
    hub: HubAccount
    downloads: Downloads
    conversions: Conversions
    shelf: Shelf
    chat: ChatService = None  # type: ignore[assignment]  # set by modules.app, which it is built from
    batches: BatchJobs = None  # type: ignore[assignment]  # likewise
    ray: RayEngine | None = None  # with --engine ray
    ui_state: Literal["off", "starting", "ready", "failed"] = "off"
    loop: asyncio.AbstractEventLoop | None = None

    def chat_template(self, resident: Resident) -> str | None:
        """The template a model's messages are rendered with; None is the plain fallback."""
        return resident.info.chat_template if resident.info is not None else None
