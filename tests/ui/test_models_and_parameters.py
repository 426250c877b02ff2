"""Loading, switching and unloading from the page; crashes; generation parameters and presets."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
from playwright.sync_api import Page, Route, expect

from modules.sampling import PARAMETERS
from tests.ui.conftest import ROOT, answer, body, choices, choose, growing, ready, send, wait

if TYPE_CHECKING:
    from tests.ui.conftest import Server, Visit


@pytest.fixture
def fresh_echo(server: Server) -> Iterator[None]:
    """Whatever a test does to the model or the settings, the next one finds the echo model and the defaults."""
    before = server.api("GET", "/ui-api/settings")
    yield
    server.api("PUT", "/ui-api/settings", {name: before[name] for name in ("sampling", "max_tokens", "stop", "preset")})
    server.load_echo()


def active(server: Server) -> dict[str, Any] | None:
    state = server.api("GET", "/ui-api/models")
    return next((r for r in state["residents"] if r["id"] == state["active"]), None)


@pytest.mark.usefixtures("fresh_echo")
def test_unload_and_load_from_the_top_bar(visit: Visit, server: Server) -> None:
    page = visit.open()
    expect(page.get_by_test_id("model-state")).to_have_attribute("data-state", "ready")
    page.locator("#sy-unload").click()
    expect(page.get_by_test_id("toasts")).to_contain_text(re.compile(r"Memory: .* before, .* after"))
    expect(page.get_by_test_id("model-state")).to_have_attribute("data-state", "empty")
    expect(page.get_by_test_id("empty")).to_contain_text("Load a model to start")
    send(page, "is anybody there?")
    expect(page.locator(".sy-toast, [data-testid=error-card]").first).to_contain_text(re.compile("[Nn]o model"))
    choose(page, "#sy-model", "echo")
    page.locator("#sy-load").click()
    expect(page.get_by_test_id("model-state")).to_have_attribute("data-state", "ready")
    loaded = active(server)
    assert loaded is not None
    assert loaded["loader"] == "echo"


@pytest.mark.usefixtures("fresh_echo")
def test_a_load_waits_for_what_the_choice_fills_in(visit: Visit, server: Server) -> None:
    page = visit.open()
    page.locator("#sy-unload").click()
    expect(page.get_by_test_id("model-state")).to_have_attribute("data-state", "empty")
    expect(page.locator("#sy-model input")).not_to_have_value(re.compile("^echo"))

    def slowly(route: Route) -> None:
        page.wait_for_timeout(700)
        route.continue_()

    page.route("**/gradio_api/**", slowly)
    choose(page, "#sy-model", "echo")
    page.locator("#sy-load").click()
    expect(page.get_by_test_id("model-state")).to_have_attribute("data-state", "ready", timeout=20_000)
    loaded = active(server)
    assert loaded is not None and loaded["loader"] == "echo"
    page.unroute_all(behavior="ignoreErrors")


@pytest.mark.usefixtures("fresh_echo")
def test_an_answer_that_was_overtaken_does_not_undo_a_choice(visit: Visit, server: Server) -> None:
    page = visit.open()
    page.locator("#sy-unload").click()
    expect(page.locator("#sy-model input")).not_to_have_value(re.compile("^echo"))
    held: list[Route] = []
    hold = True

    def answers_late(route: Route) -> None:
        is_fill = '"event_data":{"model":' in (route.request.post_data or "")
        held.append(route) if is_fill and hold else route.continue_()

    page.route("**/gradio_api/**", answers_late)
    page.evaluate("window.switchyard.refreshControls()")
    wait(lambda: page.wait_for_timeout(50) or held)
    choose(page, "#sy-model", "echo")
    expect(page.locator("#sy-backend input")).to_have_value("Echo")
    page.locator("#sy-load").click()
    hold = False
    for route in held:
        route.continue_()
    expect(page.get_by_test_id("model-state")).to_have_attribute("data-state", "ready")
    loaded = active(server)
    assert loaded is not None and loaded["loader"] == "echo"
    expect(page.locator("#sy-model input")).to_have_value(re.compile("^echo"))
    page.unroute_all(behavior="ignoreErrors")


@pytest.mark.usefixtures("fresh_echo")
def test_a_change_of_the_lists_keeps_the_choice_and_what_was_typed(visit: Visit, server: Server) -> None:
    page = visit.open()
    page.get_by_test_id("page-models").click()
    choose(page, "#sy-model", "wren-6m-gguf")
    expect(page.locator("#sy-backend input")).to_have_value("llama.cpp")
    form = page.locator("#sy-o-llamacpp-threads input")
    form.fill("7")
    form.blur()
    model = str(page.locator("#sy-model input").input_value())
    page.locator("#sy-model input").click()
    page.get_by_test_id("page-models").click()  # left as it was: no choice that would fill in the options again
    file = server.data.parent / "models" / "plain.gguf"
    shutil.copy(ROOT / "models" / "wren-6m-gguf" / "wren-6m-F16.gguf", file)
    with page.expect_response("**/gradio_api/**"):
        new = server.api("POST", "/ui-api/models/rename", {"model": file.name, "name": "renamed"})["model"]
    page.locator("#sy-model input").click()
    expect(choices(page).filter(has_text=new)).to_be_visible()
    page.keyboard.press("Escape")
    (server.data.parent / "models" / new).unlink()
    expect(page.locator("#sy-model input")).to_have_value(model)
    expect(page.locator("#sy-backend input")).to_have_value("llama.cpp")
    expect(form).to_have_value("7")


@pytest.mark.usefixtures("fresh_echo")
def test_a_load_shows_its_progress_and_an_option_of_the_form_counts(visit: Visit, server: Server) -> None:
    page = visit.open()
    page.get_by_test_id("page-models").click()
    form = page.locator("#sy-o-echo-load_seconds input")
    form.fill("2")
    form.blur()
    page.locator("#sy-load").click()
    expect(page.get_by_test_id("model-state")).to_have_attribute("data-state", "loading")
    expect(page.get_by_test_id("model-state")).to_contain_text(re.compile(r"Warming up the echo \d+ %"))
    expect(page.get_by_test_id("model-state")).to_have_attribute("data-state", "ready")
    loaded = active(server)
    assert loaded is not None
    assert loaded["options"]["load_seconds"] == 2


@pytest.mark.usefixtures("fresh_echo")
def test_a_failed_load_says_why(visit: Visit, server: Server) -> None:
    page = visit.open()
    server.api("POST", "/ui-api/models/load", {"model": "echo", "loader": "echo", "options": {"fault": "corrupt"}})
    expect(page.get_by_test_id("load-failure")).to_contain_text("The echo model is corrupt")
    page.keyboard.press("Escape")


def test_the_backend_dropdown_says_why_a_backend_cannot_take_the_model(visit: Visit) -> None:
    page = visit.open()
    page.locator("#sy-backend input").click()
    expect(choices(page).filter(has_text=re.compile(r"Echo\s*$"))).to_be_visible()
    expect(choices(page).filter(has_text=re.compile("needs.*this is the echo test model")).first).to_be_visible()


def test_a_backend_that_cannot_take_the_model_offers_its_bundled_one(visit: Visit, server: Server) -> None:
    """One click on a backend, one on Load: for Echo it is echo, whatever model was chosen."""
    listed = server.api("GET", "/v1/models")["data"]
    other = next((model["id"] for model in listed if "wren" in model["id"]), None)
    if other is None:
        pytest.skip("needs a second model")
    page = visit.open()
    choose(page, "#sy-model", other)
    choose(page, "#sy-backend", "Echo")
    expect(page.locator("#sy-model input")).to_have_value(re.compile(r"^echo"))
    expect(page.locator("#sy-backend input")).to_have_value("Echo")


def test_the_models_page_lists_models_and_backends(visit: Visit, server: Server) -> None:
    page = visit.open()
    page.get_by_test_id("page-models").click()
    expect(page.get_by_test_id("resident").first).to_contain_text("echo")
    expect(page.get_by_test_id("model-row").filter(has_text="echo").first).to_be_visible()
    expect(page.get_by_test_id("loader-row")).to_have_count(len(server.api("GET", "/ui-api/models")["loaders"]))


@pytest.mark.usefixtures("fresh_echo")
def test_a_crash_keeps_the_text_and_reload_continues(visit: Visit) -> None:
    page = visit.open()
    send(page, "[[echo tokens=60 rate=60 crash_at=30]]")
    card = page.get_by_test_id("error-card")
    expect(card).to_contain_text("The backend stopped")
    expect(card).to_contain_text(re.compile("SIGSEGV|exit"))
    expect(card.locator("pre")).to_contain_text("about to crash")
    kept = body(page.get_by_test_id("message").last)
    assert len(kept) > 20
    page.get_by_test_id("edit").first.click()
    page.keyboard.press("Escape")
    card.get_by_test_id("reload-continue").click()
    wait(lambda: len(body(page.get_by_test_id("message").last)) > len(kept))
    assert body(page.get_by_test_id("message").last).startswith(kept.rstrip())


def open_panel(page: Page) -> None:
    page.get_by_test_id("parameters").click()
    expect(page.locator("#sy-params")).to_be_in_viewport()


@pytest.mark.usefixtures("fresh_echo")
def test_a_parameter_is_written_through_used_and_kept(visit: Visit, server: Server) -> None:
    page = visit.open()
    open_panel(page)
    number = page.locator("#sy-p-temperature input[type=number]")
    number.fill("0.35")
    number.press("Enter")
    wait(lambda: server.api("GET", "/ui-api/settings")["sampling"]["temperature"] == 0.35)
    limit = page.locator("#sy-p-max_tokens input")
    limit.fill("5")
    wait(lambda: server.api("GET", "/ui-api/settings")["max_tokens"] == 5)
    send(page, "one two three four five six seven eight nine ten")
    message = answer(page)
    message.get_by_test_id("receipt-chip").click()
    expect(page.get_by_test_id("receipt")).to_contain_text("0.35")
    expect(page.get_by_test_id("receipt")).to_contain_text("the token limit was reached")
    page.keyboard.press("Escape")
    page.reload()
    ready(page)
    expect(page.locator("#sy-p-temperature input[type=number]")).to_have_value("0.35")
    expect(page.locator("#sy-p-max_tokens input")).to_have_value("5")


@pytest.mark.usefixtures("fresh_echo")
def test_presets_are_saved_loaded_and_deleted(visit: Visit, server: Server) -> None:
    page = visit.open()
    open_panel(page)
    number = page.locator("#sy-p-temperature input[type=number]")
    number.fill("1.7")
    number.press("Enter")
    page.locator("#sy-preset-save").click()
    page.get_by_role("textbox", name="Save preset").fill("Wild Ä")
    page.get_by_role("dialog").get_by_role("button", name="Save").click()
    expect(page.get_by_test_id("toasts")).to_contain_text("Saved as Wild Ä")
    assert server.api("GET", "/ui-api/presets/Wild%20%C3%84")["sampling"]["temperature"] == 1.7
    page.locator("#sy-preset-neutral").click()
    expect(number).to_have_value("1")
    choose(page, "#sy-preset", "Wild Ä")
    expect(number).to_have_value("1.7")
    page.locator("#sy-preset-delete").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(page.get_by_test_id("toasts")).to_contain_text("is deleted")
    assert "Wild Ä" not in json_names(server.api("GET", "/ui-api/presets"))


def json_names(presets: Any) -> list[str]:
    return [preset["name"] if isinstance(preset, dict) else preset for preset in presets["presets"]]


def test_every_parameter_has_a_control_and_unsupported_ones_say_so(visit: Visit) -> None:
    page = visit.open()
    open_panel(page)
    for group in ("penalties", "truncation", "shape", "search", "order", "tokens"):
        page.locator(f"#sy-group-{group} button").first.click()
    for name in PARAMETERS:
        expect(page.locator(f"#sy-p-{name}")).to_be_attached()
    expect(page.locator("#sy-p-mirostat_mode")).to_contain_text("Echo does not have this.")
    expect(page.locator("#sy-p-mirostat_mode input[type=number]")).to_be_disabled()
    expect(page.locator("#sy-p-temperature input[type=number]")).to_be_enabled()


@pytest.mark.usefixtures("fresh_echo")
def test_an_ignored_parameter_is_on_the_receipt(visit: Visit, server: Server) -> None:
    server.api("PUT", "/ui-api/settings", {"sampling": {"dry_multiplier": 0.8}})
    page = visit.open()
    send(page, "with a sampler that echo lacks")
    answer(page).get_by_test_id("receipt-chip").click()
    expect(page.get_by_test_id("receipt")).to_contain_text("dry_multiplier")
    expect(page.get_by_test_id("receipt")).to_contain_text("Echo does not have")
    server.api("PUT", "/ui-api/settings", {"sampling": {"dry_multiplier": 0.0}})


def test_a_second_page_follows_the_settings(visit: Visit, server: Server) -> None:
    page = visit.open()
    server.api("PUT", "/ui-api/settings", {"sampling": {"top_p": 0.42}})
    open_panel(page)
    expect(page.locator("#sy-p-top_p input[type=number]")).to_have_value("0.42")
    server.api("PUT", "/ui-api/settings", {"sampling": {"top_p": 0.95}})
    expect(page.locator("#sy-p-top_p input[type=number]")).to_have_value("0.95")


def test_a_background_install_shows_its_progress_and_log(visit: Visit) -> None:
    """The server's own events need a package index; here they are replayed as its stream sends them."""
    job = {"overlay": "transformers", "title": "Transformers"}
    lines = [
        {
            **job,
            "state": "running",
            "stage": "downloading torch",
            "fraction": 0.4,
            "line": "Collecting torch",
        },
        {**job, "state": "failed", "stage": "the disk is full", "fraction": None, "line": "No space left"},
    ]
    stream = "retry: 600000\n\n" + "".join(f"event: install\ndata: {json.dumps(line)}\n\n" for line in lines)
    visit.page.route("**/ui-api/events", lambda route: route.fulfill(content_type="text/event-stream", body=stream))
    page = visit.open()
    bar = page.get_by_test_id("install-bar")
    expect(bar).to_contain_text("Transformers could not be installed: the disk is full")
    bar.get_by_role("button", name="Log").click()
    expect(bar.locator("pre")).to_have_text("Collecting torch\nNo space left")
    bar.get_by_role("button", name="Hide the installation").click()
    expect(bar).to_be_hidden()


@pytest.mark.usefixtures("fresh_echo")
def test_a_switch_while_an_answer_is_written_asks_first(visit: Visit, server: Server) -> None:
    page = visit.open()
    send(page, "[[echo tokens=3000 rate=40]]")
    growing(page, 10)
    wait(lambda: (active(server) or {}).get("active_requests"))
    page.reload()
    ready(page)
    page.locator("#sy-load").click()
    dialog = page.get_by_test_id("switch-dialog")
    expect(dialog).to_contain_text("still at work")
    dialog.get_by_role("button", name="Close").click()
    page.keyboard.press("Escape")
    answer(page, "interrupted")
