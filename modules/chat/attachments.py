"""Images that belong to messages of the page's chats: checked on their way in, kept by the chat store (`store_images`), shown to
the models that see."""

from __future__ import annotations

import asyncio
import base64
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from modules import images
from modules.chat.store_images import NAME, is_name, name_of
from modules.errors import InvalidImage, NotFound

if TYPE_CHECKING:
    from modules.chat.store import ChatStore
    from modules.schema import ModelInfo

REFERENCE = re.compile(rf"!\[([^\]\n]{{0,200}})\]\(cid:({NAME})\)")
LEFT_OUT = "[image]"


def named(encoded: str, param: str = "image") -> tuple[str, bytes]:
    """(what an image in base64 is called, its bytes). Raises InvalidImage."""
    data = base64.b64decode(images.from_base64(encoded, param))
    return name_of(data, images.check(data).kind), data


class Attachments:
    """The images of one chat store."""

    def __init__(self, store: ChatStore) -> None:
        self._store = store

    async def save(self, encoded: str) -> str:
        """Keep an image in base64 for a message that is about to refer to it; its name. Raises InvalidImage or StorageError."""
        name, data = await asyncio.to_thread(named, encoded)
        await self._store.keep_image(name, data)
        return name

    async def take_in(self, found: Mapping[str, str], wanted: Sequence[str]) -> list[str]:
        """Keep the images of an import, by name, that its messages want; what was left out, in words. Raises StorageError."""
        broken = missing = 0
        for name in wanted:
            if name not in found:
                missing += await self._store.image(name) is None
                continue
            try:
                meant, data = await asyncio.to_thread(named, found[name])
            except InvalidImage:
                meant, data = "", b""
            if meant == name:
                await self._store.keep_image(name, data)
            else:
                broken += 1
        report = []
        if missing:
            report.append(f"{missing} × an image that is not in the file.")
        if broken:
            report.append(f"{broken} × an image that is damaged, too large, or not what its name says was left out.")
        if unused := len(found.keys() - set(wanted)):
            report.append(f"{unused} × an image that no message shows was left out.")
        return report

    async def find(self, name: str) -> bytes | None:
        """None where it is gone, or never was."""
        return await self._store.image(name) if is_name(name) else None

    async def read(self, name: str) -> bytes:
        """Raises NotFound."""
        data = await self.find(name)
        if data is None:
            raise NotFound("There is no such image.")
        return data

    async def encoded(self, name: str) -> str | None:
        """The image in base64, None where it is gone."""
        data = await self.find(name)
        return None if data is None else await asyncio.to_thread(lambda: base64.b64encode(data).decode("ascii"))


async def with_images(
    messages: Sequence[dict[str, Any]], files: Attachments, info: ModelInfo | None, warnings: list[str]
) -> list[dict[str, Any]]:
    """The messages with the user's images as parts (`modules.chat.vision`), before the words. What can't be shown to this model
    is left out, and `warnings` say so."""
    sees = info is not None and info.image_token is not None
    made, unseen, gone = [], 0, 0
    for message in messages:
        names = [name for _, name in REFERENCE.findall(message["content"])] if message["role"] == "user" else []
        if not names:
            made.append(message)
            continue
        words = REFERENCE.sub("", message["content"]).strip()
        found = [await files.encoded(name) for name in names] if sees else []
        gone += found.count(None)
        unseen += 0 if sees else len(names)
        parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in found if image is not None]
        shown = {**message, "content": words or ("" if parts else LEFT_OUT)}
        if parts:
            shown["parts"] = [*parts, {"type": "text", "text": words}]
        made.append(shown)
    if unseen:
        why = f" {info.no_images}" if info is not None and info.no_images else ""
        count = "1 image was" if unseen == 1 else f"{unseen} images were"
        warnings.append(f"{info.name if info else 'This model'} reads no images: {count} left out.{why}")
    if gone:
        warnings.append(f"{gone} of the images are no longer kept and were left out.")
    return made
