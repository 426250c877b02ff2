"""`/ui-api`: what the page's own JavaScript talks to. JSON in and out, errors as everywhere, tokens as server-sent events."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import APIRouter

from modules.api import (
    remotes,
    ui_attachments,
    ui_batch,
    ui_conversations,
    ui_downloads,
    ui_evaluate,
    ui_events,
    ui_library,
    ui_models,
    ui_quantize,
    ui_settings,
)

if TYPE_CHECKING:
    from modules.services import Services


def build_router(services: Services) -> APIRouter:
    """All of it, over services whose `chat` is set."""
    router = APIRouter()
    router.include_router(ui_conversations.build_router(services.chat, services.attachments))
    router.include_router(ui_attachments.build_router(services.attachments))
    router.include_router(ui_events.build_router(services))
    router.include_router(ui_library.build_router(services))
    router.include_router(ui_models.build_router(services))
    router.include_router(ui_settings.build_router(services))
    router.include_router(ui_evaluate.build_router(services))
    router.include_router(ui_downloads.build_router(services))
    router.include_router(ui_quantize.build_router(services))
    router.include_router(ui_batch.build_router(services))
    router.include_router(remotes.build_router(services))
    return router
