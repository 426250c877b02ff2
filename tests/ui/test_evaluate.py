"""The Evaluate page: runs in the background, table, answers side by side, past runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from playwright.sync_api import Page, expect

from modules.overlays import Overlays
from modules.registry import discover
from tests.conftest import ROOT
from tests.ui.conftest import check, ready, wait
from tests.ui.test_layout import PHONE, no_sideways_scroll

if TYPE_CHECKING:
    from tests.ui.conftest import Server, Visit

GGUF = "wren-6m-gguf/wren-6m-F16.gguf"
TWO = [{"model": "echo", "loader": "echo"}, {"model": "echo", "loader": "echo", "options": {"context_length": 256}}]
PLAN = {
    "targets": TWO,
    "data": ["bundled"],
    "speed": {"prompt_tokens": 16, "new_tokens": 4, "repetitions": 1, "beams": [1]},
    "questions": {"questions": ["What is a train?"], "max_tokens": 8},
}


def evaluated(server: Server, **changes: Any) -> str:
    """A finished run; its id."""
    run_id = str(server.api("POST", "/ui-api/evaluations", PLAN | changes)["id"])
    wait(lambda: not server.api("GET", f"/ui-api/evaluations/{run_id}")["active"], 60)
    return run_id


def open_tool(page: Page, name: str) -> None:
    """By the bar, or on a phone by its menu of tools."""
    if page.get_by_test_id("tools").is_visible():
        page.get_by_test_id("tools").click()
        page.get_by_role("menuitem", name=name).click()
    else:
        page.get_by_test_id(f"page-{name.lower().replace('quantise', 'quantize')}").click()


def test_a_result_is_a_table_with_reasons_plots_and_exports(visit: Visit, server: Server) -> None:
    run_id = evaluated(server, title="the first")
    page = visit.open()
    open_tool(page, "Evaluate")
    page.locator(f"[data-run='{run_id}'] [data-testid=evaluate-run]").click()
    table = page.get_by_test_id("evaluate-table")
    expect(table).to_contain_text("Decode, tok/s, 1 beam")
    expect(table.locator("tbody tr")).to_have_count(2)
    expect(page.get_by_test_id("evaluate-errors")).to_contain_text("Echo can't score text")
    expect(page.get_by_test_id("evaluate-resume")).to_be_visible()
    with page.expect_download() as download:
        page.get_by_test_id("export-csv").click()
    assert download.value.suggested_filename == f"evaluation-{run_id}.csv"
    expect(page.get_by_test_id("answers-question")).to_contain_text("What is a train?")
    page.reload()
    ready(page)
    open_tool(page, "Evaluate")
    expect(page.get_by_test_id("evaluate-results")).to_contain_text("the first")


def test_answers_can_be_judged_blind(visit: Visit, server: Server) -> None:
    run_id = evaluated(server, data=[], title="to be judged")
    page = visit.open()
    open_tool(page, "Evaluate")
    page.locator(f"[data-run='{run_id}'] [data-testid=evaluate-run]").click()
    page.get_by_test_id("answers-blind").click()
    question = page.get_by_test_id("answers-question")
    expect(question).to_contain_text("Answer A")
    expect(question).not_to_contain_text("echo through")
    page.get_by_test_id("answers-vote").first.click()
    expect(page.get_by_test_id("answers-vote").first).to_have_attribute("aria-pressed", "true")
    page.get_by_test_id("answers-blind").click()
    expect(page.get_by_test_id("answers-tally")).to_contain_text("Votes")
    assert server.api("GET", f"/ui-api/evaluations/{run_id}")["run"]["votes"]["0"] in (0, 1)


def test_runs_are_compared_and_deleted(visit: Visit, server: Server) -> None:
    ids = [evaluated(server, data=[], title=title) for title in ("left", "right")]
    page = visit.open()
    open_tool(page, "Evaluate")
    for run_id in ids:
        page.locator(f"[data-run='{run_id}'] input").check()
    page.get_by_test_id("evaluate-compare").click()
    expect(page.get_by_test_id("evaluate-table").locator("tbody tr")).to_have_count(4)
    page.locator(f"[data-run='{ids[0]}'] [data-testid=evaluate-run]").click()
    page.get_by_test_id("evaluate-delete").click()
    page.get_by_test_id("dialog").get_by_role("button", name="Delete").click()
    expect(page.locator(f"[data-run='{ids[0]}']")).to_have_count(0)


def test_a_run_belongs_to_no_page_and_can_be_stopped(visit: Visit, server: Server) -> None:
    slow = [{"model": "echo", "loader": "echo", "options": {"load_seconds": 120}}]
    run_id = str(server.api("POST", "/ui-api/evaluations", PLAN | {"targets": slow, "title": "slow"})["id"])
    page = visit.open()
    open_tool(page, "Evaluate")
    expect(page.get_by_test_id("evaluate-progress")).to_contain_text("loading")
    page.reload()
    ready(page)
    open_tool(page, "Evaluate")
    page.get_by_test_id("evaluate-cancel").click()
    expect(page.get_by_test_id("evaluate-progress")).to_have_count(0)
    expect(page.locator(f"[data-run='{run_id}']")).to_contain_text("Stopped")


def test_models_and_backends_are_chosen_and_measured(visit: Visit, server: Server) -> None:
    reason = Overlays.find(ROOT).unavailable(discover()["llamacpp"])
    if reason is not None or not (ROOT / "models" / GGUF).is_file():
        pytest.skip(reason or "the bundled model is not here")
    page = visit.open()
    open_tool(page, "Evaluate")
    expect(page.get_by_test_id("evaluate-start")).to_be_disabled()
    page.get_by_label(f"{GGUF} through llama.cpp").check()
    expect(page.get_by_test_id("evaluate-count")).to_have_text("1 row")
    page.get_by_test_id("evaluate-speed").uncheck()
    page.get_by_test_id("evaluate-title").fill("one model")
    page.get_by_test_id("evaluate-upload").set_input_files(
        {"name": "own.txt", "mimeType": "text/plain", "buffer": b"A train runs on a track. " * 300}
    )
    expect(page.get_by_test_id("evaluate-text-own.txt")).to_be_checked()
    page.get_by_test_id("evaluate-text-bundled").uncheck()
    page.get_by_test_id("evaluate-start").click()
    table = page.get_by_test_id("evaluate-table")
    expect(table).to_contain_text("Perplexity, own.txt", timeout=90_000)
    expect(page.get_by_test_id("evaluate-plots").locator("svg")).to_have_count(1)


@pytest.mark.parametrize("visit", [PHONE, {"color_scheme": "dark"}], indirect=True, ids=["phone", "dark"])
def test_both_tool_pages_fit_and_name_everything(visit: Visit, server: Server) -> None:
    evaluated(server, title="a_very_long_title_" * 8)
    page = visit.open()
    for name, marker in (("Quantise", "quantize-jobs"), ("Evaluate", "evaluate-table")):
        open_tool(page, name)
        page.get_by_test_id(marker).wait_for()
        no_sideways_scroll(page)
        assert check(page, "nameless") == []
        assert check(page, "doubled") == []


def test_the_form_is_reached_by_keyboard(visit: Visit) -> None:
    page = visit.open()
    open_tool(page, "Quantise")
    bits = page.get_by_test_id("quantize-bits")
    bits.get_by_label("4", exact=True).focus()
    page.keyboard.press("ArrowLeft")
    expect(bits.get_by_label("3", exact=True)).to_be_checked()
    page.get_by_test_id("quantize-desc_act").focus()
    page.keyboard.press("Space")
    expect(page.get_by_test_id("quantize-desc_act")).not_to_be_checked()
