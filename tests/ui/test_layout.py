"""Light, dark, phone, keyboard, and what assistive software needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from playwright.sync_api import Page, expect

from tests.ui.conftest import answer, check, ready, send

if TYPE_CHECKING:
    from tests.ui.conftest import Server, Visit

PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
LONG = (
    "a_very_long_word_" * 40
    + "\n\n```\n"
    + "x" * 400
    + "\n```\n\n| "
    + " | ".join("column" for _ in range(20))
    + " |\n|"
    + "---|" * 20
    + "\n"
)


def no_sideways_scroll(page: Page) -> None:
    assert page.evaluate("document.documentElement.scrollWidth") <= page.evaluate("innerWidth")


@pytest.mark.parametrize("visit", [PHONE], indirect=True)
def test_a_phone_has_room_for_everything(visit: Visit) -> None:
    page = visit.open()
    no_sideways_scroll(page)
    send(page, LONG)
    answer(page)
    no_sideways_scroll(page)
    assert check(page, "small", 40) == []
    page.get_by_test_id("drawer").click()
    expect(page.get_by_test_id("new-chat")).to_be_in_viewport()
    page.get_by_test_id("new-chat").click()
    expect(page.get_by_test_id("new-chat")).not_to_be_in_viewport()
    for name in ("models", "settings"):
        page.get_by_test_id(f"page-{name}").click()
        page.wait_for_timeout(200)
        no_sideways_scroll(page)
    page.get_by_test_id("page-chat").click()
    expect(page.get_by_test_id("composer")).to_be_in_viewport()
    page.get_by_test_id("model-state").click()
    expect(page.locator("#sy-load")).to_be_in_viewport()


BACKGROUND = "getComputedStyle(document.querySelector('.sy-chat')).backgroundColor"


def test_dark_follows_the_system_and_can_be_chosen(visit: Visit) -> None:
    page = visit.open()
    light = str(page.evaluate(BACKGROUND))

    def becomes(wanted: str) -> None:
        page.wait_for_function(f"(wanted) => {BACKGROUND} === wanted", arg=wanted)

    page.emulate_media(color_scheme="dark")
    page.wait_for_function(f"(light) => {BACKGROUND} !== light", arg=light)
    dark = str(page.evaluate(BACKGROUND))
    page.get_by_test_id("theme").click()
    becomes(light)
    page.reload()
    ready(page)
    becomes(light)
    page.get_by_test_id("theme").click()
    page.emulate_media(color_scheme="light")
    becomes(dark)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_enough_contrast(visit: Visit, server: Server, scheme: str) -> None:
    visit.page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    page = visit.open(
        server.import_chat(
            [
                "a question",
                "an answer with `code`, a [link](https://e.org) and\n\n> a quote\n\n```python\ndef f(): return 'x'  # why\n```",
            ]
        )
    )
    page.wait_for_timeout(500)
    assert check(page, "faint") == []


def test_every_control_has_a_name_and_ids_are_unique(visit: Visit) -> None:
    page = visit.open()
    send(page, "hello")
    answer(page)
    for name in ("chat", "models", "settings"):
        page.get_by_test_id(f"page-{name}").click()
        page.wait_for_timeout(200)
        assert check(page, "nameless") == []
        assert check(page, "doubled") == []
    assert page.locator("[role=log]").count() == 1
    assert page.evaluate("document.documentElement.lang") == "en"


def test_the_keyboard_reaches_and_shows_everything(visit: Visit) -> None:
    page = visit.open()
    send(page, "first")
    answer(page)
    page.keyboard.press("Alt+Slash")
    expect(page.get_by_test_id("shortcuts")).to_be_visible()
    page.keyboard.press("Escape")
    page.keyboard.press("Alt+KeyR")
    expect(page.get_by_test_id("version")).to_have_text("2/2")
    answer(page)
    page.keyboard.press("Alt+KeyN")
    expect(page.get_by_test_id("empty")).to_be_visible()
    page.keyboard.press("Alt+KeyK")
    expect(page.get_by_test_id("search")).to_be_focused()
    page.keyboard.press("Alt+KeyP")
    expect(page.locator("#sy-params")).to_be_in_viewport()
    page.get_by_test_id("new-chat").focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"


@pytest.mark.parametrize("visit", [{"reduced_motion": "reduce"}], indirect=True)
def test_motion_can_be_reduced(visit: Visit) -> None:
    page = visit.open()
    duration = page.locator("#sy-params").evaluate("(node) => getComputedStyle(node).transitionDuration")
    assert all(float(part.strip().rstrip("s")) < 0.001 for part in duration.split(","))


def test_the_empty_page_says_what_to_do(visit: Visit) -> None:
    page = visit.open()
    expect(page.get_by_test_id("empty")).to_contain_text("What shall we write?")
    page.get_by_test_id("suggestion").first.click()
    expect(page.get_by_test_id("composer")).to_have_value("Hello! What can you do?")
    expect(page.get_by_test_id("composer")).to_be_focused()
