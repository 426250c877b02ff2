"""The Models page in a browser: find a model, see why a backend refuses it, download, settings, other forms, trash."""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from playwright.sync_api import Browser, Locator, Page, Route, expect

from tests.ui.conftest import Server, Visit, choose, start_server, stop_server, wait
from tests.unit.hub_server import SMALL_LLAMA, FakeHub
from tests.unit.model_files import gguf_bytes, projector_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

FILES = {
    **SMALL_LLAMA,
    "pytorch_model.bin": b"\x80\x02pickle",
    "modeling_evil.py": b"print('hi')",
    "m-Q4_K_M.gguf": b"GGUF" * 1000,
    "m-Q8_0.gguf": b"GGUF" * 2000,
}


@dataclass
class Place:
    server: Server
    hub: FakeHub
    models: Path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("library")
    with FakeHub({**FILES, "huge-Q2_K.gguf": b"GGUF"}, lie_about={"huge-Q2_K.gguf": 10**15}) as hub:
        server = start_server(folder, "--model", "echo", "--hub-endpoint", hub.url)
        try:
            yield Place(server, hub, folder / "models")
        finally:
            if hub.faults.hold is not None:
                hub.faults.hold.set()
            stop_server(server)


@pytest.fixture
def page(place: Place, browser: Browser, request: pytest.FixtureRequest) -> Iterator[Page]:
    """The Models page of a server whose model folder is empty, but for what the test puts there."""
    for old in list(place.models.iterdir()):
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    place.hub.faults = type(place.hub.faults)()
    options = {"viewport": {"width": 1280, "height": 800}, **getattr(request, "param", {})}
    context = browser.new_context(**options)
    context.set_default_timeout(15_000)
    visit = Visit(context, place.server)
    opened = visit.open()
    opened.get_by_test_id("page-models").click()
    expect(opened.get_by_test_id("model-row").first).to_be_visible()
    yield opened
    if place.hub.faults.hold is not None:
        place.hub.faults.hold.set()
    for job in place.server.api("GET", "/ui-api/downloads")["jobs"]:
        if job["state"] not in ("done", "cancelled"):
            place.server.api("POST", f"/ui-api/downloads/{job['id']}/cancel")
        place.server.api("DELETE", f"/ui-api/downloads/{job['id']}")
    context.close()
    assert visit.errors == [] and visit.off_host() == []


def make_model(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (folder / name).write_bytes(FILES[name])


def row(page: Page, model: str) -> Locator:
    return page.locator(f'[data-testid=model-row][data-model="{model}"]')


def listed(page: Page, place: Place, model: str) -> Locator:
    make_model(place.models / model)
    page.get_by_test_id("refresh-models").click()
    expect(row(page, model)).to_be_visible()
    return row(page, model)


def more(found: Locator, page: Page, item: str) -> None:
    found.get_by_test_id("model-more").click()
    page.get_by_role("menuitem", name=item).click()


def look(page: Page, repository: str) -> None:
    page.get_by_test_id("download-open").click()
    page.get_by_test_id("download-repository").fill(repository)
    page.get_by_test_id("download-look").click()


def job_is(page: Page, state: str) -> Locator:
    card = page.locator(f'[data-testid=download][data-state="{state}"]')
    expect(card).to_be_visible(timeout=30_000)
    return card


def test_a_model_is_described_and_each_refusal_has_its_reason(page: Page, place: Place) -> None:
    (place.models / "broken.gguf").write_bytes(b"GGUF broken")
    found = listed(page, place, "llama")
    expect(found).to_contain_text(re.compile(r"Safetensors.*LlamaForCausalLM.*parameters.*context"))
    why = found.get_by_test_id("why-not")
    why.locator("summary").click()
    expect(why).to_contain_text(re.compile(r"llama\.cpp: .*GGUF"))
    expect(row(page, "broken.gguf")).to_contain_text("damaged")
    page.get_by_test_id("model-filter").fill("safetensors llama nothing-else")
    expect(page.get_by_test_id("model-row")).to_have_count(0)
    page.get_by_test_id("model-filter").fill("hf llama")
    expect(row(page, "llama")).to_be_visible()
    expect(row(page, "echo")).to_have_count(0)


def test_a_repository_is_looked_into_and_fetched(page: Page, place: Place) -> None:
    look(page, "https://hub.example/owner/name/tree/main")
    expect(page.get_by_test_id("download-repository")).to_have_value("owner/name")
    expect(page.get_by_test_id("download-branch")).to_have_value("main")
    found = page.get_by_test_id("download-found")
    for form, verdict in (("safetensors", "Fits"), ("Q4_K_M", "Fits"), ("Q2_K", "Too large")):
        expect(found.locator(f'[data-variant="{form}"]')).to_contain_text(verdict)
    skipped = page.get_by_test_id("look-skipped")
    skipped.locator("summary").click()
    expect(skipped).to_contain_text(re.compile("modeling_evil.py: program code"))
    expect(skipped).to_contain_text(re.compile("pytorch_model.bin: a pickle"))
    page.get_by_test_id("download-start").click()
    done = job_is(page, "done")
    expect(row(page, "owner_name")).to_contain_text("LlamaForCausalLM")
    assert not (place.models / "owner_name" / "pytorch_model.bin").exists()
    done.get_by_test_id("download-forget").click()
    expect(done).to_have_count(0)


def test_one_quantization_is_fetched_alone(page: Page, place: Place) -> None:
    look(page, "owner/name")
    found = page.get_by_test_id("download-found")
    found.locator('[data-variant="safetensors"] input').uncheck()
    expect(page.get_by_test_id("download-start")).to_be_disabled()
    found.locator('[data-variant="Q8_0"] input').check()
    page.get_by_test_id("download-start").click()
    job_is(page, "done")
    assert [path.name for path in (place.models / "owner_name").glob("*.*") if path.name[0] != "."] == ["m-Q8_0.gguf"]


@pytest.fixture
def with_projectors(place: Place) -> Iterator[None]:
    """The repository has projectors, too."""
    own = {"mmproj-F16.gguf": projector_bytes(), "mmproj-F32.gguf": projector_bytes(), "m-Q8_0.gguf": gguf_bytes()}
    before = dict(place.hub.files)
    place.hub.files.update(own)
    yield
    place.hub.files.clear()
    place.hub.files.update(before)


@pytest.mark.usefixtures("with_projectors")
def test_with_a_gguf_comes_its_projector_and_the_model_shows_it(page: Page, place: Place) -> None:
    look(page, "owner/name")
    found = page.get_by_test_id("download-found")
    expect(found).to_contain_text("so does, with a GGUF, the projector that reads images")
    found.locator('[data-variant="safetensors"] input').uncheck()
    best = found.locator('[data-variant="projector F16"] input')
    expect(best).not_to_be_checked()
    found.locator('[data-variant="Q8_0"] input').check()
    expect(best).to_be_checked()
    found.locator('[data-variant="Q8_0"] input').uncheck()
    expect(best).not_to_be_checked()
    found.locator('[data-variant="Q8_0"] input').check()
    page.get_by_test_id("download-start").click()
    job_is(page, "done")
    names = sorted(path.name for path in (place.models / "owner_name").glob("*.*") if path.name[0] != ".")
    assert names == ["m-Q8_0.gguf", "mmproj-F16.gguf"]
    expect(row(page, "owner_name/m-Q8_0.gguf")).to_contain_text("reads images (mmproj-F16.gguf)")
    expect(row(page, "owner_name/mmproj-F16.gguf")).to_have_count(0)


@pytest.mark.usefixtures("with_projectors")
def test_who_leaves_the_projector_out_gets_none(page: Page, place: Place) -> None:
    look(page, "owner/name")
    found = page.get_by_test_id("download-found")
    found.locator('[data-variant="safetensors"] input').uncheck()
    found.locator('[data-variant="Q8_0"] input').check()
    found.locator('[data-variant="projector F16"] input').uncheck()
    page.get_by_test_id("download-start").click()
    job_is(page, "done")
    assert [path.name for path in (place.models / "owner_name").glob("*.gguf")] == ["m-Q8_0.gguf"]


def test_paused_reloaded_resumed(page: Page, place: Place) -> None:
    gate = place.hub.faults.hold = threading.Event()
    look(page, "owner/name")
    page.get_by_test_id("download-start").click()
    running = job_is(page, "running")
    expect(running.get_by_test_id("download-progress")).to_contain_text(re.compile(r"of \d.*file \d of 3"))
    running.get_by_test_id("download-pause").click()
    job_is(page, "paused")
    page.reload()
    page.get_by_test_id("page-models").click()
    gate.set()
    job_is(page, "paused").get_by_test_id("download-resume").click()
    job_is(page, "done")
    assert (place.models / "owner_name" / "model.safetensors").read_bytes() == FILES["model.safetensors"]


def test_cancelling_asks_and_leaves_nothing(page: Page, place: Place) -> None:
    place.hub.faults.hold = threading.Event()
    look(page, "owner/name")
    page.get_by_test_id("download-start").click()
    job_is(page, "running").get_by_test_id("download-cancel").click()
    page.get_by_role("button", name="Cancel the download").click()
    job_is(page, "cancelled")
    wait(lambda: not (place.models / "owner_name").exists())


@pytest.mark.parametrize(
    ("fault", "words"),
    [({"gated": True}, "gated"), ({"info_html": True}, "makes no sense"), ({"info_status": 500}, "HTTP 500")],
)
def test_what_the_hub_refuses_is_said_where_it_was_asked(page: Page, place: Place, fault: dict[str, object], words: str) -> None:
    for name, value in fault.items():
        setattr(place.hub.faults, name, value)
    look(page, "owner/name")
    expect(page.get_by_test_id("download-form").get_by_role("alert")).to_contain_text(words)


def test_a_failed_download_says_why_and_is_tried_again(page: Page, place: Place) -> None:
    look(page, "owner/name")
    expect(page.get_by_test_id("download-start")).to_be_enabled()
    place.hub.faults.html = True
    page.get_by_test_id("download-start").click()
    failed = job_is(page, "failed")
    expect(failed).to_contain_text("a web page was sent instead")
    place.hub.faults.html = False
    failed.get_by_test_id("download-resume").click()
    job_is(page, "done")


def test_a_token_is_kept_and_not_shown_again(page: Page, place: Place) -> None:
    page.get_by_test_id("download-open").click()
    page.get_by_test_id("download-hub-edit").click()
    page.get_by_test_id("hub-token").fill("hf_topsecret")
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_test_id("download-hub")).to_contain_text("with your token")
    place.hub.requests.clear()
    page.get_by_test_id("download-repository").fill("owner/name")
    page.get_by_test_id("download-look").click()
    expect(page.get_by_test_id("download-start")).to_be_visible()
    assert {headers.get("authorization") for _, headers in place.hub.requests} == {"Bearer hf_topsecret"}
    assert "topsecret" not in page.content()
    page.get_by_test_id("download-hub-edit").click()
    expect(page.get_by_test_id("hub-token")).to_have_value("")
    page.get_by_text("Forget the saved token").click()
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_test_id("download-hub")).to_contain_text("without a token")


def test_renamed_deleted_and_taken_back(page: Page, place: Place) -> None:
    more(listed(page, place, "llama"), page, "Rename")
    page.get_by_label("Rename the model").last.fill("mine")
    page.get_by_role("button", name="Rename").click()
    expect(row(page, "mine")).to_be_visible()
    expect(row(page, "llama")).to_have_count(0)
    more(row(page, "mine"), page, "Delete")
    page.get_by_role("button", name="Delete", exact=True).click()
    expect(row(page, "mine")).to_have_count(0)
    page.get_by_test_id("open-trash").click()
    page.get_by_test_id("trash-row").get_by_test_id("trash-restore").click()
    expect(row(page, "mine")).to_be_visible()
    page.keyboard.press("Escape")
    more(row(page, "mine"), page, "Delete")
    page.get_by_role("button", name="Delete", exact=True).click()
    expect(row(page, "mine")).to_have_count(0)
    page.get_by_test_id("open-trash").click()
    page.get_by_role("button", name="Empty the trash").click()
    page.get_by_role("button", name="Delete for good").click()
    wait(lambda: place.server.api("GET", "/ui-api/trash")["entries"] == [])


def test_settings_belong_to_one_model(page: Page, place: Place) -> None:
    make_model(place.models / "other")
    found = listed(page, place, "llama")
    choose(page, "#sy-model", "llama")
    expect(page.locator("#sy-backend input")).to_have_value("Transformers")
    in_bits = page.locator("#sy-o-transformers-load_in_4bit input")
    expect(in_bits).not_to_be_checked()
    more(found, page, "Settings")
    page.get_by_test_id("setting-loader").select_option("transformers")
    page.get_by_test_id("setting-load_in_4bit").check()
    page.get_by_role("button", name="Save", exact=True).click()
    settings: Callable[[str], object] = lambda model: place.server.api("GET", f"/ui-api/models/settings?model={model}")  # noqa: E731
    wait(lambda: settings("llama") == {"loader": "transformers", "options": {"transformers": {"load_in_4bit": True}}})
    assert settings("other") == {"loader": None, "options": {}}
    more(row(page, "llama"), page, "Settings")
    expect(page.get_by_test_id("setting-load_in_4bit")).to_be_checked()
    expect(in_bits).to_be_checked()
    page.get_by_role("button", name="Forget").click()
    wait(lambda: settings("llama") == {"loader": None, "options": {}})
    expect(in_bits).not_to_be_checked()


def test_another_products_settings_are_imported(page: Page, place: Place) -> None:
    listed(page, place, "llama")
    page.get_by_test_id("import-settings").click()
    text = b"llama$:\n  loader: Transformers\n  load-in-4bit: true\n  instruction_template: Alpaca\n"
    page.get_by_test_id("settings-file").set_input_files({"name": "config-user.yaml", "mimeType": "text/yaml", "buffer": text})
    result = page.get_by_test_id("import-result")
    expect(result).to_contain_text("Settings of 1 model taken")
    result.locator("summary").click()
    expect(result).to_contain_text("the model's own chat template is used")
    place.server.api("DELETE", "/ui-api/models/settings?model=llama")


def test_the_fit_and_the_other_forms_are_a_click_away(page: Page, place: Place) -> None:
    found = listed(page, place, "llama")
    more(found, page, "What fits")
    expect(page.get_by_test_id("fit-row").first).to_contain_text(re.compile("Transformers|llama.cpp"))
    page.keyboard.press("Escape")
    more(found, page, "Make another form")
    dialog = page.get_by_test_id("make-dialog")
    for form in ("GGUF Q4_K_M", "GGUF Q8_0", "GPTQ 4 bits", "bitsandbytes 4 bits"):
        expect(dialog).to_contain_text(form)
    page.keyboard.press("Escape")
    more(found, page, "Compare")
    expect(page.get_by_test_id("page-evaluate")).to_have_attribute("aria-current", "page")


def test_an_installation_shows_its_progress_and_log_beside_the_backend(page: Page) -> None:
    """What the server says of a backend that is missing and of its installation: a developer's set lacks and installs none."""

    def missing(route: Route) -> None:
        answer = route.fetch()
        body = answer.json()
        for loader in body["loaders"]:
            if loader["name"] == "rwkv":
                loader.update(installed=False, ready=False, installable=True, reason="not installed")
        route.fulfill(response=answer, json=body)

    page.route("**/ui-api/models", missing)
    page.get_by_test_id("refresh-models").click()
    here = page.locator("[data-testid=loader-row][data-loader=rwkv]").get_by_test_id("install-here")
    expect(here.get_by_test_id("install")).to_be_visible()
    send = "(event) => import(new URL('ui-static/js/api.js', document.baseURI).href).then((api) => api.emit('install', event))"
    event = {"overlay": "rwkv", "title": "RWKV", "state": "running", "stage": "fetching", "fraction": 0.5}
    event["line"] = "Collecting <b>x</b>"
    page.evaluate(send, event)
    expect(here).to_contain_text("Installing: fetching")
    here.locator("summary").click()
    expect(here.locator("pre")).to_have_text("Collecting <b>x</b>")
    bar = page.get_by_test_id("install-bar")
    expect(bar).to_contain_text("Installing RWKV fetching")
    foot = bar.bounding_box()
    assert foot is not None
    wait(
        lambda: (
            page.locator("#sy-tabs").evaluate("(node) => parseFloat(getComputedStyle(node).paddingTop)")
            >= foot["y"] + foot["height"]
        )
    )
    bar.get_by_role("button", name="Hide").click()
    page.evaluate(send, event)
    expect(bar).to_be_hidden()
    page.evaluate(send, {**event, "state": "failed", "stage": "no network", "line": "no network"})
    expect(bar).to_contain_text("RWKV could not be installed: no network")
    expect(here.locator(".sy-card-error")).to_have_text("no network")
    expect(here.get_by_test_id("install")).to_be_visible()
    page.unroute_all(behavior="ignoreErrors")


def test_a_thousand_models_are_drawn_as_they_are_needed(page: Page, place: Place) -> None:
    for number in range(300):
        (place.models / f"m{number:03}.gguf").write_bytes(b"GGUF broken")
    page.get_by_test_id("refresh-models").click()
    expect(page.get_by_test_id("model-count")).to_contain_text("30")
    assert page.get_by_test_id("model-row").count() < 200
    page.get_by_test_id("model-filter").fill("m299")
    expect(row(page, "m299.gguf")).to_be_visible()


PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}


@pytest.mark.parametrize("page", [PHONE], indirect=True)
def test_it_all_has_room_on_a_phone(page: Page, place: Place) -> None:
    look(page, "owner/name")
    expect(page.get_by_test_id("download-start")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    more(row(page, "wren-6m"), page, "What fits") if row(page, "wren-6m").count() else None
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
