"""One chat: sending, stopping, versions, branches, deleting, reloading in mid-stream."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from playwright.sync_api import expect

from tests.ui.conftest import answer, body, growing, ready, send, wait

if TYPE_CHECKING:
    from tests.ui.conftest import Server, Visit


def test_a_message_is_answered_and_shows_its_receipt(visit: Visit) -> None:
    page = visit.open()
    send(page, "Hello **world**, this is an echo.")
    message = answer(page)
    assert body(message).strip() == "Hello world, this is an echo."
    expect(message.locator("strong")).to_have_text("world")
    chip = message.get_by_test_id("receipt-chip")
    expect(chip).to_have_text(re.compile(r"\d+ tokens · "))
    chip.click()
    receipt = page.get_by_test_id("receipt")
    expect(receipt).to_contain_text("the model ended it")
    expect(receipt).to_contain_text("temperature")
    page.keyboard.press("Escape")
    expect(receipt).to_have_count(0)
    expect(page.get_by_test_id("title")).to_have_text(re.compile("Hello"))
    expect(page.get_by_test_id("announce")).to_have_text(re.compile("complete"))


def test_enter_sends_and_shift_enter_makes_a_new_line(visit: Visit) -> None:
    page = visit.open()
    composer = page.get_by_test_id("composer")
    composer.fill("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    expect(composer).to_have_value("one\ntwo")
    page.keyboard.press("Enter")
    answer(page)
    expect(composer).to_have_value("")
    expect(page.get_by_test_id("message")).to_have_count(2)


def test_enter_pressed_often_sends_once(visit: Visit) -> None:
    page = visit.open()
    page.get_by_test_id("composer").fill("only once")
    for _ in range(20):
        page.keyboard.press("Enter", delay=0)
    answer(page)
    page.wait_for_timeout(300)
    expect(page.get_by_test_id("message")).to_have_count(2)


def test_stop_keeps_the_text_and_escape_does_it_too(visit: Visit) -> None:
    page = visit.open()
    for press in ("button", "key"):
        send(page, "[[echo tokens=5000 rate=50]]")
        growing(page, 30)
        if press == "button":
            page.get_by_test_id("stop").click()
        else:
            page.keyboard.press("Escape")
        stopped = answer(page, "interrupted")
        assert 30 < len(body(stopped)) < 2000
        expect(stopped.get_by_test_id("receipt-chip")).to_contain_text("stopped")
        expect(page.get_by_test_id("send")).to_be_visible()


def test_regenerate_makes_versions_that_can_be_paged(visit: Visit) -> None:
    page = visit.open()
    send(page, "[[echo tokens=12 random=1]]")
    first = body(answer(page))
    page.get_by_test_id("regenerate").last.click()
    expect(page.get_by_test_id("version").last).to_have_text("2/2")
    second = body(answer(page))
    assert first != second
    page.get_by_test_id("previous-version").last.click()
    expect(page.get_by_test_id("version").last).to_have_text("1/2")
    assert body(page.get_by_test_id("message").last) == first
    expect(page.get_by_test_id("previous-version").last).to_be_disabled()
    page.get_by_test_id("next-version").last.click()
    expect(page.get_by_test_id("version").last).to_have_text("2/2")
    assert body(page.get_by_test_id("message").last) == second


def test_an_edited_message_becomes_a_branch(visit: Visit) -> None:
    page = visit.open()
    send(page, "the first question")
    answer(page)
    send(page, "a second one")
    answer(page)
    page.get_by_test_id("edit").first.click()
    page.get_by_test_id("editor").fill("another first question")
    page.get_by_test_id("editor-save").click()
    expect(page.get_by_test_id("message")).to_have_count(2)
    assert "another first question" in body(answer(page))
    page.get_by_test_id("previous-version").first.click()
    expect(page.get_by_test_id("message")).to_have_count(4)
    assert "a second one" in body(page.get_by_test_id("message").last)


def test_an_answer_can_be_edited_and_the_arrow_key_edits_the_last_message(visit: Visit) -> None:
    page = visit.open()
    send(page, "words to change")
    answer(page)
    page.get_by_test_id("edit").last.click()
    page.get_by_test_id("editor").fill("changed `words`")
    page.get_by_test_id("editor-save").click()
    expect(page.get_by_test_id("version").last).to_have_text("2/2")
    assert body(page.get_by_test_id("message").last) == "changed words"
    page.get_by_test_id("composer").focus()
    page.keyboard.press("ArrowUp")
    expect(page.get_by_test_id("editor")).to_have_value("words to change")
    page.keyboard.press("Escape")
    expect(page.get_by_test_id("editor")).to_have_count(0)


def test_continue_goes_on_from_the_text(visit: Visit) -> None:
    page = visit.open()
    send(page, "[[echo tokens=4000 rate=60]]")
    growing(page, 20)
    page.get_by_test_id("stop").click()
    kept = body(answer(page, "interrupted"))
    page.get_by_test_id("continue").last.click()
    growing(page, len(kept) + 20)
    page.keyboard.press("Escape")
    text = body(answer(page, "interrupted"))
    assert text.startswith(kept.rstrip())
    page.reload()
    ready(page)
    assert body(page.get_by_test_id("message").last) == text


def test_a_deleted_message_comes_back(visit: Visit) -> None:
    page = visit.open()
    send(page, "please stay")
    answer(page)
    page.get_by_test_id("delete").last.click()
    expect(page.get_by_test_id("message")).to_have_count(1)
    page.get_by_test_id("toasts").get_by_text("Undo").click()
    expect(page.get_by_test_id("message")).to_have_count(2)
    assert body(page.get_by_test_id("message").last).strip() == "please stay"


def test_reload_in_mid_stream_loses_nothing(visit: Visit, server: Server) -> None:
    page = visit.open()
    send(page, "[[echo tokens=160 rate=80]]")
    growing(page, 30)
    page.reload()
    ready(page)
    message = answer(page)
    chat = page.evaluate("new URLSearchParams(location.search).get('c')")
    stored = server.api("GET", f"/ui-api/conversations/{chat}")["messages"][-1]
    assert stored["receipt"]["usage"]["completion_tokens"] >= 160
    assert body(message).split() == stored["text"].split()


def test_a_closed_tab_lets_the_answer_go_on(visit: Visit, server: Server) -> None:
    page = visit.open()
    send(page, "[[echo tokens=120 rate=80]]")
    growing(page, 20)
    chat = page.evaluate("new URLSearchParams(location.search).get('c')")
    page.close()
    node = wait(
        lambda: next(
            (
                m
                for m in server.api("GET", f"/ui-api/conversations/{chat}")["messages"]
                if m["status"] == "complete" and m["role"] == "assistant"
            ),
            None,
        )
    )
    assert node["receipt"]["usage"]["completion_tokens"] >= 120


def test_switching_chats_in_mid_stream_keeps_each_answer_in_its_own_chat(visit: Visit) -> None:
    page = visit.open()
    send(page, "[[echo tokens=200 rate=80]] long one")
    growing(page, 20)
    page.get_by_test_id("new-chat").click()
    send(page, "a short one")
    assert body(answer(page)).strip() == "a short one"
    page.locator(".sy-conversation", has_text="long one").first.click()
    expect(page.get_by_test_id("message").first).to_contain_text("long one")
    expect(page.get_by_test_id("message")).to_have_count(2)
    assert "short" not in body(answer(page))


def test_a_draft_survives_a_reload_and_belongs_to_its_chat(visit: Visit) -> None:
    page = visit.open()
    send(page, "a chat with a draft")
    answer(page)
    page.get_by_test_id("composer").fill("half a thought")
    page.reload()
    ready(page)
    expect(page.get_by_test_id("composer")).to_have_value("half a thought")
    page.get_by_test_id("new-chat").click()
    expect(page.get_by_test_id("composer")).to_have_value("")


def test_prefill_progress_is_shown_before_the_first_token(visit: Visit) -> None:
    page = visit.open()
    send(page, "[[echo prefill=4 delay=1.5]] slow prompt")
    expect(page.get_by_test_id("run-status")).to_contain_text("Reading the prompt")
    answer(page)
    expect(page.get_by_test_id("run-status")).to_have_count(0)


def test_the_jump_button_appears_when_the_reader_scrolls_away(visit: Visit, server: Server) -> None:
    page = visit.open(server.import_chat([f"message {n}\n\n" + "words " * 60 for n in range(40)]))
    expect(page.get_by_test_id("jump")).to_be_hidden()
    page.get_by_test_id("log").hover()
    page.mouse.wheel(0, -3000)
    expect(page.get_by_test_id("jump")).to_be_visible()
    page.get_by_test_id("jump").click()
    expect(page.get_by_test_id("jump")).to_be_hidden()
    wait(
        lambda: page.evaluate(
            "(() => { const l = document.querySelector('.sy-log'); return l.scrollHeight - l.scrollTop - l.clientHeight < 40 })()"
        )
    )


def test_a_system_prompt_belongs_to_its_chat(visit: Visit, server: Server) -> None:
    page = visit.open()
    page.get_by_test_id("system-prompt").click()
    page.get_by_test_id("system-prompt-text").fill("You are a signal box.")
    page.get_by_role("button", name="Save", exact=True).click()
    send(page, "hello")
    answer(page)
    chat = page.evaluate("new URLSearchParams(location.search).get('c')")
    assert server.api("GET", f"/ui-api/conversations/{chat}")["system_prompt"] == "You are a signal box."


def test_a_long_history_is_shown_in_windows(visit: Visit, server: Server) -> None:
    chat = server.import_chat([f"message {n}" for n in range(1400)])
    page = visit.open(chat)
    page.wait_for_selector(".sy-log[data-filled]")
    expect(page.get_by_test_id("message")).to_have_count(400)
    assert body(page.get_by_test_id("message").last).strip() == "message 1399"
    page.locator(".sy-older").evaluate("(button) => button.click()")
    wait(lambda: page.get_by_test_id("message").count() >= 600)
