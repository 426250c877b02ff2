"""The Quantise page over the real quantiser: progress, losses, the result one click away; stop and resume."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from playwright.sync_api import Page, expect

from modules.overlays import Overlays
from modules.quantize.process import ENVIRONMENTS
from tests.conftest import ROOT
from tests.ui.conftest import wait

if TYPE_CHECKING:
    from tests.ui.conftest import Server, Visit


@pytest.fixture
def form(visit: Visit) -> Page:
    """The page, where the quantiser is installed and a model is there."""
    overlays = Overlays.find(ROOT)
    overlay, probe, _ = ENVIRONMENTS["switchyard"]
    if not overlays.complete(overlay) or not all(overlays.has_module(overlay, name) for name in probe):
        pytest.skip("the Transformers environment is not installed")
    if not (ROOT / "models" / "wren-6m" / "config.json").is_file():
        pytest.skip("the bundled model is not here")
    page = visit.open()
    page.get_by_test_id("page-quantize").click()
    page.get_by_test_id("quantize-model").select_option("wren-6m")
    page.get_by_test_id("quantize-name").evaluate("(node) => { node.closest('details').open = true; }")
    return page


@pytest.mark.slow
def test_a_model_is_quantised_and_loaded(form: Page, server: Server) -> None:
    page = form
    page.get_by_test_id("quantize-method").get_by_label("Round to nearest").check()
    page.get_by_test_id("quantize-bits").get_by_label("8", exact=True).check()
    expect(page.get_by_test_id("quantize-name")).to_have_attribute("placeholder", "wren-6m-RTN-8bit-128g")
    page.get_by_test_id("quantize-name").fill("made here")
    page.get_by_test_id("quantize-start").click()
    job = page.locator("[data-testid=quantize-job]", has_text="made here")
    expect(job).to_have_attribute("data-state", "done", timeout=200_000)
    expect(job).to_contain_text("42 layers")
    expect(job.locator("[data-testid=loss-plot] circle")).to_have_count(42)
    page.get_by_test_id("quantize-start").click()
    expect(page.get_by_test_id("dialog")).to_contain_text("exists already")
    page.get_by_test_id("dialog").get_by_role("button", name="Cancel").click()
    job.get_by_test_id("quantize-chat").click()

    def ready() -> list[str]:
        residents = server.api("GET", "/ui-api/models")["residents"]
        return [resident["model"]["id"] for resident in residents if resident["state"] == "ready"]

    wait(lambda: "made here" in ready(), 200)
    server.load_echo()


@pytest.mark.slow
def test_a_stopped_job_survives_a_reload_and_is_resumed(form: Page) -> None:
    page = form
    page.get_by_test_id("quantize-name").fill("stopped here")
    page.get_by_label("Windows", exact=True).fill("8")
    page.get_by_label("Tokens per window").fill("64")
    page.get_by_test_id("quantize-start").click()
    job = page.locator("[data-testid=quantize-job]", has_text="stopped here")
    expect(job).to_have_attribute("data-state", "running", timeout=30_000)
    job.get_by_test_id("quantize-cancel").click()
    expect(job).to_have_attribute("data-state", "cancelled")
    page.reload()
    page.get_by_test_id("page-quantize").click()
    job.get_by_test_id("quantize-resume").click()
    expect(job).to_have_attribute("data-state", "done", timeout=250_000)
    expect(job.get_by_test_id("quantize-chat")).to_be_visible()
