"""Images that belong to messages of the page's chats.

A message's text holds a reference, `![name](cid:SHA256.kind)`, and the file lies in the data folder under that name: the same
image is there once, and neither the store of conversations nor an older version of it has to know about images.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import hashlib
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modules import images
from modules.errors import NotFound, StorageError, StorageFull

if TYPE_CHECKING:
    from modules.schema import ModelInfo

_NAME = r"[0-9a-f]{64}\.(?:png|jpeg|webp|gif)"
REFERENCE = re.compile(rf"!\[([^\]\n]{{0,200}})\]\(cid:({_NAME})\)")
LEFT_OUT = "[image]"


class Attachments:
    """The files. All methods block."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def save(self, encoded: str) -> str:
        """Keep an image in base64; its name. Raises InvalidImage or StorageError."""
        data = base64.b64decode(images.from_base64(encoded, "image"))
        name = f"{hashlib.sha256(data).hexdigest()}.{images.check(data).kind}"
        path = self._folder / name
        if path.is_file():
            return name
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            handle, part = tempfile.mkstemp(suffix=".part", dir=self._folder)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(part, path)
            except BaseException:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(part)
                raise
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise StorageFull("The disk is full: the image was not kept.", hint="Make room, then try again.") from error
            raise StorageError(f"The image could not be kept: {error.strerror}.", hint="Check the data folder.") from error
        return name

    def path(self, name: str) -> Path:
        """Raises NotFound."""
        path = self._folder / name
        if not re.fullmatch(_NAME, name) or not path.is_file():
            raise NotFound("There is no such image.")
        return path

    def encoded(self, name: str) -> str | None:
        """The image in base64, None when its file is gone."""
        try:
            return base64.b64encode(self.path(name).read_bytes()).decode("ascii")
        except (NotFound, OSError):
            return None


def with_images(
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
        found = [files.encoded(name) for name in names] if sees else []
        gone += found.count(None)
        unseen += 0 if sees else len(names)
        parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in found if image is not None]
        shown = {**message, "content": words or ("" if parts else LEFT_OUT)}
        if parts:
            shown["parts"] = [*parts, {"type": "text", "text": words}]
        made.append(shown)
    if unseen:
        count = "1 image was" if unseen == 1 else f"{unseen} images were"
        warnings.append(f"{info.name if info else 'This model'} reads no images: {count} left out.")
    if gone:
        warnings.append(f"{gone} of the images are no longer in the data folder and were left out.")
    return made
