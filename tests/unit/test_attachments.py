"""Images of the page's messages: kept once, shown to models that see, carried by exports, gone when nothing refers to them."""

from __future__ import annotations

import asyncio
import io
import json
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from modules.chat import store_images, transcript
from modules.chat.attachments import LEFT_OUT, Attachments, named, with_images
from modules.chat.places import open_place
from modules.chat.store_images import names_in
from modules.chat.store_sqlite import SqliteChatStore
from modules.chat.transfer import from_json, json_pieces, shown_images, to_json
from modules.errors import InvalidImage, NotFound, StorageError
from modules.schema import ModelInfo
from tests.pictures import BLUE, RED, bomb, data_url, encoded, gif, png

if TYPE_CHECKING:
    from modules.chat.store import ChatStore
    from tests.postgres_lab import Postgres

    from .conftest import Place

BLIND = ModelInfo("wren", "/m", "echo", "hf")
SEES = ModelInfo("llava", "/m", "transformers", "hf", image_token="<image>", image_tokens=17)
RED_NAME = named(encoded(png(RED)))[0]


@pytest.fixture
async def store(place: Place) -> AsyncIterator[ChatStore]:
    store = place()
    await store.open()
    yield store
    await store.close()


@pytest.fixture
def files(store: ChatStore) -> Attachments:
    return Attachments(store)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


async def say(store: ChatStore, chat: str, text: str, key: str) -> str:
    """A message with its answer; the message's id."""
    change = await store.add_message(chat, text, client_id=key, generation=key)
    assert change.node is not None
    await store.finish(change.node, key, text="seen", status="complete")
    return change.snapshot.messages[-2].id


async def purge(store: ChatStore, chat: str) -> None:
    await store.update(chat, {"trashed": True})
    await store.purge(chat)


async def test_an_image_is_kept_once_under_its_hash(files: Attachments) -> None:
    name = await files.save(encoded(png(RED)))
    assert await files.save(encoded(png(RED))) == name == RED_NAME and name.endswith(".png")
    assert await files.read(name) == png(RED) and await files.encoded(name) == encoded(png(RED))


@pytest.mark.parametrize("name", ["", "a.png", "../settings.yaml", "0" * 64 + ".png", "0" * 64 + ".exe", "0" * 64])
async def test_other_names_lead_nowhere(tmp_path: Path, name: str) -> None:
    (tmp_path / "settings.yaml").write_text("secret")
    store = SqliteChatStore(tmp_path)
    await store.open()
    with pytest.raises(NotFound):
        await Attachments(store).read(name)
    assert await Attachments(store).encoded(name) is None
    await store.close()


async def test_what_can_not_be_kept_is_typed(tmp_path: Path) -> None:
    store = SqliteChatStore(tmp_path)
    await store.open()
    files = Attachments(store)
    with pytest.raises(InvalidImage):
        await files.save(encoded(b"hello"))
    (tmp_path / "attachments").write_text("a file where the folder should be")
    with pytest.raises(StorageError, match="could not be kept"):
        await files.save(encoded(png()))
    assert (await store.create()).id, "chats go on"
    await store.close()


# --- what a model is shown -------------------------------------------------------------------------------------------


async def test_a_model_that_sees_gets_the_images_before_the_words(files: Attachments) -> None:
    red, blue = await files.save(encoded(png(RED))), await files.save(encoded(png(BLUE)))
    warnings: list[str] = []
    told = [user(f"What is it?\n\n![a b](cid:{red})\n\n![](cid:{blue})"), {"role": "assistant", "content": f"![x](cid:{red})"}]
    made = await with_images(told, files, SEES, warnings)
    images = [{"type": "image", "image": encoded(png(color))} for color in (RED, BLUE)]
    assert made == [
        {"role": "user", "content": "What is it?", "parts": [*images, {"type": "text", "text": "What is it?"}]},
        told[1],  # an answer shows no images to the model
    ]
    assert warnings == []


async def test_what_is_left_out_is_said(files: Attachments) -> None:
    red, gone = await files.save(encoded(png(RED))), "0" * 64 + ".png"
    warnings: list[str] = []
    assert await with_images([user(f"![a](cid:{red})"), user(f"Hi ![a](cid:{red})")], files, BLIND, warnings) == [
        user(LEFT_OUT),
        user("Hi"),
    ]
    assert warnings == ["wren reads no images: 2 images were left out."]
    warnings.clear()
    assert await with_images([user(f"Hi ![a](cid:{gone})")], files, SEES, warnings) == [user("Hi")]
    assert "no longer" in warnings[0]


# --- what goes, and when ---------------------------------------------------------------------------------------------


async def test_an_image_goes_with_the_last_chat_that_shows_it(store: ChatStore, files: Attachments) -> None:
    red, blue = await files.save(encoded(png(RED))), await files.save(encoded(png(BLUE)))
    first, second = (await store.create()).id, (await store.create()).id
    await say(store, first, f"both ![a](cid:{red}) ![b](cid:{blue})", "1")
    await say(store, second, f"one ![b](cid:{blue})", "2")
    await purge(store, first)
    assert await store.image(red) is None and await store.image(blue) == png(BLUE)
    await purge(store, second)
    assert await store.image(blue) is None


async def test_what_can_be_undone_keeps_its_image(store: ChatStore, files: Attachments) -> None:
    red = await files.save(encoded(png(RED)))
    chat, other = (await store.create()).id, (await store.create()).id
    node = await say(store, chat, f"![a](cid:{red})", "1")
    _, token = await store.delete(node)
    await purge(store, other)
    assert await store.drop_images() == 0 and await store.image(red) == png(RED)
    await store.undo(token)
    edited = await store.add_version(node, "without it", client_id="2")
    assert edited.snapshot.messages[0].text == "without it"
    assert await store.drop_images() == 0 and await store.image(red) == png(RED), "the other version shows it"
    await purge(store, chat)
    assert await store.image(red) is None


async def test_an_upload_waits_for_its_message(store: ChatStore, files: Attachments, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same image, referred to by a chat that is removed while another page has just uploaded it again."""
    red = await files.save(encoded(png(RED)))
    chat, next_chat = (await store.create()).id, (await store.create()).id
    await say(store, chat, f"![a](cid:{red})", "1")
    assert await files.save(encoded(png(RED))) == red
    await purge(store, chat)
    assert await store.drop_images() == 0 and await store.image(red) == png(RED)
    await say(store, next_chat, f"![a](cid:{red})", "2")
    monkeypatch.setattr(store_images, "KEEP_S", -1.0)  # every upload is old
    assert await store.drop_images() == 0 and await store.image(red) == png(RED), "a message shows it"
    blue = await files.save(encoded(png(BLUE)))
    assert await store.drop_images() == 1 and await store.image(blue) is None, "its message never came"
    assert await files.save(encoded(png(BLUE))) == blue and await store.image(blue) == png(BLUE)


async def test_uploads_and_removals_at_once_lose_nothing(place: Place, store: ChatStore, request: pytest.FixtureRequest) -> None:
    """Many uploads, messages and purges of the same two images; with PostgreSQL from two servers."""
    shared = "postgresql" in request.node.callspec.id
    other = open_place(store._engine.url.render_as_string(hide_password=False), None) if shared else store  # type: ignore[attr-defined]
    if shared:
        await other.open()
    pictures = [png(RED), png(BLUE)]

    async def turn(number: int) -> tuple[str, str]:
        server = (store, other)[number % 2]
        name = await Attachments(server).save(encoded(pictures[number % 3 % 2]))
        chat = (await server.create()).id
        await say(server, chat, f"![a](cid:{name})", f"k{number}")
        if number % 4 == 0:
            await purge(server, chat)
        return chat, name

    done = await asyncio.gather(*(turn(number) for number in range(24)))
    for number, (chat, name) in enumerate(done):
        if number % 4:
            assert await store.image(name) is not None and await other.image(name) is not None, number
            await purge(other, chat)
    assert [await store.image(name) for _, name in done] == [None] * 24
    if shared:
        await other.close()


async def test_files_that_nobody_knows_are_left_and_those_of_messages_are_taken_in(tmp_path: Path) -> None:
    """A new database beside old files, as after a repair: nothing of theirs is removed."""
    folder = tmp_path / "attachments"
    folder.mkdir()
    stray = folder / f"{'0' * 64}.png"
    for path, data in ((stray, b"?"), (folder / RED_NAME, png(RED))):
        path.write_bytes(data)
    store = SqliteChatStore(tmp_path)
    await store.open()
    chat = (await store.create()).id
    await say(store, chat, f"![a](cid:{RED_NAME}) ![b](cid:{stray.name[:-4]}.webp)", "1")
    await store.close()
    store = SqliteChatStore(tmp_path)
    await store.open()
    await purge(store, chat)
    assert [path.name for path in folder.iterdir()] == [stray.name]
    await store.close()


async def test_a_database_that_an_older_version_has_used_is_completed(place: Place) -> None:
    """It is of the same schema version, so that an update can be taken back: what is missing is made, what is there stays."""
    store: Any = place()
    await store.open()
    red = await Attachments(store).save(encoded(png(RED)))
    chat = (await store.create()).id
    await say(store, chat, f"![a](cid:{red})", "1")
    for thing in ("INDEX nodes_with_images", "TABLE images"):
        await store._write(lambda do, thing=thing: do._db.run(f"DROP {thing}"))
    await store.close()
    again: Any = place()
    assert await again.open() == []
    shared = hasattr(again, "_engine")
    assert (await again.snapshot(chat)).messages[0].text == f"![a](cid:{red})"
    assert (await again.image(red) is None) == shared, "the table of PostgreSQL held the bytes"
    assert await Attachments(again).save(encoded(png(RED))) == red and await again.image(red) == png(RED)
    await again.close()


async def test_postgresql_takes_in_the_files_of_an_older_version(postgres: Postgres, tmp_path: Path) -> None:
    url = postgres.database()
    store = open_place(url, tmp_path)
    await store.open()
    chat = (await store.create()).id
    await say(store, chat, f"![a](cid:{RED_NAME})", "1")
    await store.close()
    (tmp_path / "attachments").mkdir()
    (tmp_path / "attachments" / RED_NAME).write_bytes(png(RED))
    for folder in (tmp_path, tmp_path / "another server"):
        store = open_place(url, folder)
        await store.open()
        assert await store.image(RED_NAME) == png(RED)
        await store.close()


# --- out and in ------------------------------------------------------------------------------------------------------


async def exported(store: ChatStore, files: Attachments, chat: str) -> dict[str, Any]:
    found = json.loads("".join([piece async for piece in json_pieces(await store.export(chat), files)]))
    assert isinstance(found, dict)
    return found


async def brought_in(store: ChatStore, files: Attachments, data: dict[str, Any]) -> tuple[str, list[str]]:
    found = from_json(data)
    report = [*found.report, *await files.take_in(found.images, shown_images(found.conversation))]
    return (await store.add_conversation(found.conversation)).id, report


async def test_an_export_carries_its_images_and_an_import_restores_them(store: ChatStore, files: Attachments) -> None:
    red, blue = await files.save(encoded(png(RED))), await files.save(encoded(png(BLUE)))
    chat = (await store.create("Colours")).id
    await say(store, chat, f"![a](cid:{red}) ![a](cid:{red})", "1")
    await say(store, chat, f"![a](cid:{blue})", "2")
    data = await exported(store, files, chat)
    assert data["attachments"] == {red: encoded(png(RED)), blue: encoded(png(BLUE))}
    await purge(store, chat)
    assert await store.image(red) is None
    back, report = await brought_in(store, files, data)
    assert report == [] and await store.image(red) == png(RED) and await store.image(blue) == png(BLUE)
    assert [m.text for m in (await store.snapshot(back)).messages] == [node["text"] for node in data["nodes"]]
    await purge(store, back)
    assert await store.image(red) is None, "an import waits for no other message"


async def test_a_chat_without_images_is_exported_as_before(store: ChatStore, files: Attachments) -> None:
    chat = (await store.create()).id
    await say(store, chat, f"![gone](cid:{'0' * 64}.png)", "1")
    assert (await exported(store, files, chat))["attachments"] == {}
    plain = (await store.create()).id
    await say(store, plain, "no image", "2")
    expected = to_json(await store.export(plain))
    data = await exported(store, files, plain)
    assert {**data, "exported_at": None} == {**expected, "exported_at": None} and "attachments" not in data


async def test_images_of_a_strangers_file_are_looked_at(store: ChatStore, files: Attachments) -> None:
    bad = {kind: named(encoded(png(color)))[0] for kind, color in {"bomb": RED, "other": BLUE, "text": (1, 2, 3)}.items()}
    missing = f"{'1' * 64}.gif"
    text = " ".join(f"![x](cid:{name})" for name in (*bad.values(), missing))
    nodes = [{"id": "a", "parent": None, "role": "user", "text": text}]
    data = {
        "format": "switchyard-conversation",
        "version": 1,
        "nodes": nodes,
        "attachments": {
            bad["bomb"]: encoded(bomb()),
            bad["other"]: encoded(png(RED)),
            bad["text"]: "no base64!",
            "../../evil.png": encoded(png()),
            f"{'2' * 64}.png": encoded(png()),
            f"{'3' * 64}.png": 5,
        },
    }
    chat, report = await brought_in(store, files, data)
    assert (await store.snapshot(chat)).messages[0].text == text
    assert [await store.image(name) for name in (*bad.values(), missing)] == [None] * 4
    words = " ".join(report)
    for said in ("2 × an attachment that is no image", "1 × an image that is not in the file", "3 × an image that is damaged",
                 "1 × an image that no message shows"):  # fmt: skip
        assert said in words, report


async def test_messages_in_openais_form_bring_their_images(store: ChatStore, files: Attachments) -> None:
    parts = [
        {"type": "text", "text": "What is it?"},
        {"type": "image_url", "image_url": {"url": data_url(png(RED))}},
        {"type": "image_url", "image_url": data_url(gif(2), "image/gif")},
        {"type": "image_url", "image_url": {"url": "https://example.org/x.png"}},
        {"type": "text"},
        "odd",
    ]
    chat, report = await brought_in(store, files, {"messages": [user("hi"), {"role": "user", "content": parts}, user(3)]})  # type: ignore[arg-type]
    last = (await store.snapshot(chat)).messages[-1].text
    assert last == f"What is it?\n\n![image](cid:{RED_NAME})" and await store.image(RED_NAME) == png(RED)
    assert any("damaged" in line for line in report) and any(line.startswith("3 × parts") for line in report), report


async def test_markdown_is_a_file_alone_or_a_zip_with_its_images(store: ChatStore, files: Attachments) -> None:
    chat = (await store.create("Trip", "Be\nkind.")).id
    await say(store, chat, "hello", "1")
    file, kind = await transcript.to_file(await store.export(chat), files)
    assert kind == "md"
    assert file.read().decode() == "# Trip\n\n> Be\n> kind.\n\n## You\n\nhello\n\n## Assistant\n\nseen\n"
    file.close()
    red, gone = await files.save(encoded(png(RED))), f"{'0' * 64}.png"
    await say(store, chat, f"look ![a b](cid:{red}) ![c](cid:{gone})", "2")
    file, kind = await transcript.to_file(await store.export(chat), files)
    assert kind == "zip"
    with zipfile.ZipFile(io.BytesIO(file.read())) as archive:
        assert sorted(archive.namelist()) == ["chat.md", "images/1.png"] and archive.read("images/1.png") == png(RED)
        text = archive.read("chat.md").decode()
    file.close()
    assert "look ![a b](images/1.png) *(the image c is no longer kept)*" in text and "cid:" not in text


def test_references_are_found_as_the_page_shows_them() -> None:
    name = "a" * 64 + ".png"
    assert names_in([f"![x](cid:{name}) [y](cid:{name})", "![z](cid:../x.png)", f"cid:{name}"]) == [name]
