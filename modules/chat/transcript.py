"""A conversation as Markdown, for people: what is on screen, in order. With images it is a zip of the text and their files."""

from __future__ import annotations

import asyncio
import datetime
import tempfile
import zipfile
from typing import IO, TYPE_CHECKING

from modules.chat.attachments import REFERENCE
from modules.chat.store_images import names_in

if TYPE_CHECKING:
    import re
    from collections.abc import Mapping

    from modules.chat.attachments import Attachments
    from modules.chat.store import NewConversation, NewNode


def to_markdown(conversation: NewConversation, places: Mapping[str, str]) -> str:
    """The path on screen. `places` is where each image's file lies, by its name; one without a place is said to be gone."""

    def image(match: re.Match[str]) -> str:
        place = places.get(match[2])
        return f"![{match[1]}]({place})" if place is not None else f"*(the image {match[1]} is no longer kept)*"

    parts = [f"# {conversation.title}"]
    if conversation.system_prompt.strip():
        parts.append("\n".join(f"> {line}".rstrip() for line in conversation.system_prompt.strip().splitlines()))
    for node in _path(conversation):
        parts.append(f"## {_who(node)}")
        if node.text.strip():
            parts.append(REFERENCE.sub(image, node.text.strip()))
    return "\n\n".join(parts) + "\n"


def _path(conversation: NewConversation) -> list[NewNode]:
    nodes = {node.key: node for node in conversation.nodes}
    path, key = [], conversation.leaf
    while key is not None and key in nodes:
        path.append(nodes[key])
        key = nodes[key].parent
    return path[::-1]


def _who(node: NewNode) -> str:
    if node.role == "assistant":
        name = node.model or "Assistant"
        return name if node.status == "complete" else f"{name} ({node.status})"
    return {"user": "You", "system": "System"}[node.role]


async def to_file(conversation: NewConversation, attachments: Attachments) -> tuple[IO[bytes], str]:
    """(an open file from its beginning, "md" or "zip"). The caller closes it."""
    names = names_in(node.text for node in _path(conversation))
    file = tempfile.TemporaryFile()  # noqa: SIM115 - the caller's
    try:
        if names:
            await _archive(conversation, names, attachments, file)
        else:
            file.write(to_markdown(conversation, {}).encode())
        file.seek(0)
    except BaseException:
        file.close()
        raise
    return file, "zip" if names else "md"


async def _archive(conversation: NewConversation, names: list[str], attachments: Attachments, file: IO[bytes]) -> None:
    places: dict[str, str] = {}
    when = datetime.datetime.now().timetuple()[:6]
    with zipfile.ZipFile(file, "w") as archive:
        for number, name in enumerate(names, 1):
            data = await attachments.find(name)
            if data is not None:
                places[name] = f"images/{number}.{name.rpartition('.')[2]}"
                await asyncio.to_thread(archive.writestr, zipfile.ZipInfo(places[name], when), data)
        archive.writestr(zipfile.ZipInfo("chat.md", when), to_markdown(conversation, places), zipfile.ZIP_DEFLATED)
