"""Images on the page: attached, shown in the turn, told apart from what the model can see."""

from __future__ import annotations

import re
import zipfile
from typing import TYPE_CHECKING

from playwright.sync_api import expect

from tests.pictures import RED, bomb, encoded, png
from tests.ui.conftest import answer, body, ready

if TYPE_CHECKING:
    from pathlib import Path

    from playwright.sync_api import FilePayload, Page

    from tests.ui.conftest import Visit


def picture(name: str = "red [1].png", data: bytes | None = None, media: str = "image/png") -> FilePayload:
    return {"name": name, "mimeType": media, "buffer": data or png(RED)}


def attach(page: Page, *files: FilePayload) -> None:
    page.get_by_test_id("attach-file").set_input_files(list(files))


def test_an_image_goes_with_its_message_and_the_receipt_says_who_saw_it(visit: Visit) -> None:
    page = visit.open()
    attach(page, picture(), picture("blue.png"))
    strip = page.get_by_test_id("attached")
    expect(strip.locator("img")).to_have_count(2)
    expect(page.get_by_test_id("attach-note")).to_have_text("echo reads no images: it will only get the words.")
    strip.get_by_label("Remove blue.png").click()
    expect(strip.locator("img")).to_have_count(1)
    page.get_by_test_id("composer").fill("What is it?")
    page.get_by_test_id("send").click()
    message = answer(page)
    assert body(message) == "What is it?", "the model got the words alone"
    expect(strip).to_be_hidden()
    shown = page.locator(".sy-message[data-role=user] .sy-body img")
    expect(shown).to_have_attribute("src", re.compile(r"/ui-api/attachments/[0-9a-f]{64}\.png$"))
    expect(shown).to_have_attribute("alt", "red  1 .png")
    page.wait_for_function("document.querySelector('.sy-message[data-role=user] .sy-body img').naturalWidth === 40")
    chip = message.get_by_test_id("receipt-chip")
    expect(chip).to_have_class(re.compile("sy-has-warnings"))
    chip.click()
    expect(page.get_by_test_id("receipt")).to_contain_text("echo reads no images: 1 image was left out.")
    page.keyboard.press("Escape")
    page.reload()
    ready(page)
    page.wait_for_function("document.querySelector('.sy-message[data-role=user] .sy-body img')?.naturalWidth === 40")
    assert visit.errors == [] and visit.off_host() == []


def test_an_image_alone_is_a_message(visit: Visit) -> None:
    page = visit.open()
    attach(page, picture())
    page.get_by_test_id("send").click()
    assert body(answer(page)) == "[image]"


def test_what_is_no_image_is_said_and_the_text_stays(visit: Visit) -> None:
    page = visit.open()
    attach(page, picture("notes.txt", b"hello", "text/plain"))
    expect(page.get_by_text("notes.txt is no image that can be sent")).to_be_visible()
    expect(page.get_by_test_id("attached")).to_be_hidden()
    for name, data, words in (("bomb.png", bomb(), "50000 × 50000"), ("cut.png", png()[:-20], "cut short")):
        attach(page, picture(name, data))
        page.get_by_test_id("composer").fill("Look")
        page.get_by_test_id("send").click()
        expect(page.get_by_text(re.compile(words))).to_be_visible()
        expect(page.get_by_test_id("composer")).to_have_value("Look")
        page.get_by_label(f"Remove {name}").press("Enter")  # a toast may lie over it
        expect(page.get_by_test_id("attached")).to_be_hidden()
    expect(page.get_by_test_id("message")).to_have_count(0)


def test_a_pasted_image_is_attached(visit: Visit) -> None:
    page = visit.open()
    page.evaluate(
        """(data) => {
          const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
          const transfer = new DataTransfer();
          transfer.items.add(new File([bytes], 'clip.png', { type: 'image/png' }));
          const area = document.querySelector('[data-testid=composer]');
          area.dispatchEvent(new ClipboardEvent('paste', { clipboardData: transfer, bubbles: true, cancelable: true }));
        }""",
        encoded(png()),
    )
    expect(page.get_by_test_id("attached").locator("img")).to_have_count(1)


def test_an_export_carries_the_image_and_an_import_shows_it_again(visit: Visit, tmp_path: Path) -> None:
    page = visit.open()
    attach(page, picture())
    page.get_by_test_id("composer").fill("Keep it")
    page.get_by_test_id("send").click()
    answer(page)
    chat = page.evaluate("new URLSearchParams(location.search).get('c')")
    files = {"Export as JSON": tmp_path / "chat.json", "Export as Markdown": tmp_path / "chat.zip"}
    for label, file in files.items():
        with page.expect_download() as download:
            page.get_by_test_id("chat-menu").click()
            page.get_by_role("menuitem", name=label).click()
        assert download.value.suggested_filename.endswith(file.suffix)
        download.value.save_as(file)
    with zipfile.ZipFile(files["Export as Markdown"]) as archive:
        assert archive.read("images/1.png") == png(RED)
    address = f"/ui-api/conversations/{chat}"
    visit.server.api("PATCH", address, {"trashed": True})
    visit.server.api("DELETE", address)
    page.get_by_test_id("new-chat").click()
    page.get_by_test_id("import-file").set_input_files(files["Export as JSON"])
    page.wait_for_function("document.querySelector('.sy-message[data-role=user] .sy-body img')?.naturalWidth === 40")
