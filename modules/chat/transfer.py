"""Conversations as JSON: our own versioned format out and in, and what people bring from other products.

    {"format": "switchyard-conversation", "version": 1, "title", "system_prompt", "created_at", "pinned", "leaf",
     "nodes": [{"id", "parent", "role", "text", "created_at", "status", "model", "loader", "receipt", "error"}],
     "attachments": {"SHA256.png": base64, …}}

Also read: text-generation-webui's history ({"internal": [[user, bot], …], "metadata": …}) and a plain list of chat messages
({"messages": [{"role", "content"}, …]}, images as OpenAI's parts with data: URLs). What can't be mapped is reported line by line.
"""

from __future__ import annotations

import datetime
import json
import math
import re
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from modules.chat.attachments import named
from modules.chat.store import NewConversation, NewNode, Role, Status
from modules.chat.store_images import is_name, names_in
from modules.errors import InvalidImage, InvalidParameter, InvalidUnicode
from modules.images import MAX_BYTES, from_data_url

if TYPE_CHECKING:
    from modules.chat.attachments import Attachments

FORMAT = "switchyard-conversation"
VERSION = 1
MAX_NODES = 20_000
MAX_TITLE = 200
MAX_IMAGES = 2000
_SURROGATE = re.compile("[\ud800-\udfff]")
_BEGIN_VISIBLE = "<|BEGIN-VISIBLE-CHAT|>"


class Imported(NamedTuple):
    """What a file held: the conversation, what could not be mapped, and its images in base64 by the names in the texts."""

    conversation: NewConversation
    report: list[str]
    images: dict[str, str]


def clean_text(value: str, param: str = "text") -> str:
    """Text that can be kept: NUL is taken out. Raises InvalidUnicode for half a surrogate pair."""
    if _SURROGATE.search(value):
        raise InvalidUnicode(f"{param} holds half of a surrogate pair, which is no character.", param=param)
    return value.replace("\x00", "")


def clean_title(value: str) -> str:
    """One line of at most MAX_TITLE characters, without control characters."""
    line = " ".join("".join(c if c.isprintable() else " " for c in clean_text(value, "title")).split())
    return line[:MAX_TITLE]


def to_json(conversation: NewConversation) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "exported_at": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "title": conversation.title,
        "system_prompt": conversation.system_prompt,
        "created_at": conversation.created_at,
        "pinned": conversation.pinned,
        "leaf": conversation.leaf,
        "nodes": [
            {
                "id": node.key,
                "parent": node.parent,
                "role": node.role,
                "text": node.text,
                "created_at": node.created_at,
                "status": node.status,
                "model": node.model,
                "loader": node.loader,
                "receipt": node.receipt,
                "error": node.error,
            }
            for node in conversation.nodes
        ],
    }


async def json_pieces(conversation: NewConversation, attachments: Attachments) -> AsyncIterator[str]:
    """The export as a file, image by image: all of them at once may be more than the memory holds."""
    text = json.dumps(to_json(conversation), ensure_ascii=False, indent=1)
    names = shown_images(conversation)
    if not names:
        yield text
        return
    yield text.removesuffix("\n}") + ',\n "attachments": {'
    comma = ""
    for name in names:
        encoded = await attachments.encoded(name)
        if encoded is not None:
            yield f'{comma}\n  "{name}": "{encoded}"'
            comma = ","
    yield "\n }\n}"


def shown_images(conversation: NewConversation) -> list[str]:
    """The names of the images in its texts, in order."""
    return names_in(node.text for node in conversation.nodes)


def from_json(data: dict[str, Any]) -> Imported:
    """Raises InvalidParameter for a file that is none of the formats. The images are not looked at yet."""
    if data.get("format") == FORMAT:
        return _own(data)
    if isinstance(data.get("internal", data.get("data")), list):
        return Imported(*_History(data).read(), {})
    if isinstance(data.get("messages"), list):
        return _messages(data)
    raise InvalidParameter(
        "This file is no conversation this server can read.",
        hint="It takes its own export, a text-generation-webui history, or a list of chat messages.",
    )


# --- our own -------------------------------------------------------------------------------------------------------


def _own(data: dict[str, Any]) -> Imported:
    version = data.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise InvalidParameter("The file names no version.", param="version")
    if version > VERSION:
        raise InvalidParameter(
            f"The file is of version {version}; this server reads up to {VERSION}.", hint="Update.", param="version"
        )
    nodes = data.get("nodes")
    if not isinstance(nodes, list) or len(nodes) > MAX_NODES:
        raise InvalidParameter(f"nodes must be a list of at most {MAX_NODES} messages.", param="nodes")
    images, report = _own_images(data.get("attachments"))
    conversation = NewConversation(
        title=clean_title(_string(data, "title")),
        system_prompt=clean_text(_string(data, "system_prompt"), "system_prompt"),
        pinned=data.get("pinned") is True,
        created_at=_time(data.get("created_at")),
        leaf=data.get("leaf") if isinstance(data.get("leaf"), str) else None,
        nodes=tuple(_own_node(node, f"nodes.{index}") for index, node in enumerate(nodes)),
    )
    return Imported(conversation, report, images)


def _own_images(found: Any) -> tuple[dict[str, str], list[str]]:
    if found is None:
        return {}, []
    if not isinstance(found, dict) or len(found) > MAX_IMAGES:
        raise InvalidParameter(f"attachments must be an object of at most {MAX_IMAGES} images.", param="attachments")
    images = {name: data for name, data in found.items() if is_name(name) and isinstance(data, str)}
    odd = len(found) - len(images)
    return images, [f"{odd} × an attachment that is no image by its name was left out."] if odd else []


def _own_node(node: Any, where: str) -> NewNode:
    if not isinstance(node, dict) or not isinstance(node.get("id"), str) or not isinstance(node.get("text"), str):
        raise InvalidParameter(f"{where} must be a message with id and text.", param=where)
    role, status, parent = node.get("role"), node.get("status", "complete"), node.get("parent")
    if role not in ("user", "assistant", "system"):
        raise InvalidParameter(f"{where}.role must be user, assistant or system.", param=f"{where}.role")
    if status not in ("complete", "interrupted", "failed"):
        status = "interrupted"
    if parent is not None and not isinstance(parent, str):
        raise InvalidParameter(f"{where}.parent must be an id or null.", param=f"{where}.parent")
    return NewNode(
        key=node["id"],
        parent=parent,
        role=cast("Role", role),
        text=clean_text(node["text"], f"{where}.text"),
        created_at=_time(node.get("created_at")),
        status=cast("Status", status),
        model=node["model"] if isinstance(node.get("model"), str) else None,
        loader=node["loader"] if isinstance(node.get("loader"), str) else None,
        receipt=node["receipt"] if isinstance(node.get("receipt"), dict) else None,
        error=node["error"] if isinstance(node.get("error"), dict) else None,
    )


def _string(data: dict[str, Any], name: str) -> str:
    value = data.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InvalidParameter(f"{name} must be text.", param=name)
    return value


def _time(value: Any) -> float | None:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and 0 < value < 1e11:
        return float(value)
    return None


# --- text-generation-webui ------------------------------------------------------------------------------------------


class _History:
    """Rows of [user, bot]; `metadata` holds versions, times and models under user_N and assistant_N."""

    def __init__(self, data: dict[str, Any]) -> None:
        self._data = data
        metadata = data.get("metadata")
        self._metadata: dict[str, Any] = metadata if isinstance(metadata, dict) else {}
        self._report: Counter[str] = Counter()
        self._nodes: list[NewNode] = []
        self._parent: str | None = None

    def read(self) -> tuple[NewConversation, list[str]]:
        rows: list[Any] = self._data.get("internal", self._data.get("data"))  # type: ignore[assignment] # from_json looked
        if len(rows) > MAX_NODES:
            raise InvalidParameter(f"The history must have at most {MAX_NODES} rows.", param="internal")
        for number, row in enumerate(rows):
            if not isinstance(row, list) or len(row) != 2 or not all(isinstance(text, str) for text in row):
                self._report["rows that are not [user, bot] were left out"] += 1
                continue
            self._user(number, row[0])
            self._bot(number, row[1])
        known = {"internal", "visible", "metadata", "data", "data_visible", "title", "name"}
        for key in sorted(self._data.keys() - known):
            self._report[f"the part {clean_title(str(key))[:40]!r} has no counterpart here"] += 1
        title = self._data.get("title", self._data.get("name"))
        report = [f"{count} × {what}." if count > 1 else f"{what}." for what, count in self._report.items()]
        return NewConversation(clean_title(title) if isinstance(title, str) else "", tuple(self._nodes)), report

    def _user(self, number: int, text: str) -> None:
        entry = self._entry(f"user_{number}")
        if entry.get("attachments"):
            self._report["attachments were left out"] += 1
        if text and text != _BEGIN_VISIBLE:
            self._add(f"u{number}", "user", text, entry)

    def _bot(self, number: int, text: str) -> None:
        entry = self._entry(f"assistant_{number}")
        if entry.get("tool_sequence"):
            self._report["tool calls were left out"] += 1
        versions = entry.get("versions")
        texts = [(v["content"], v) for v in versions if isinstance(v, dict) and isinstance(v.get("content"), str)] if isinstance(
            versions, list
        ) else []  # fmt: skip
        if not texts:
            if text:
                self._add(f"a{number}", "assistant", text, entry)
            return
        current = entry.get("current_version_index")
        if not isinstance(current, int) or isinstance(current, bool) or not 0 <= current < len(texts):
            current = len(texts) - 1
        if texts[current][0] != text and text:
            texts[current] = (text, texts[current][1])  # the row is what was on screen
        below = self._parent
        for index, (version, about) in enumerate(texts):
            self._parent = below
            self._add(f"a{number}.{index}", "assistant", version, {**entry, **about})
        self._parent = f"a{number}.{current}"

    def _entry(self, name: str) -> dict[str, Any]:
        entry = self._metadata.get(name)
        return entry if isinstance(entry, dict) else {}

    def _add(self, key: str, role: Role, text: str, entry: dict[str, Any]) -> None:
        model = entry.get("model_name")
        self._nodes.append(
            NewNode(
                key, self._parent, role, clean_text(text), created_at=_timestamp(entry.get("timestamp")),
                model=clean_text(model) if isinstance(model, str) and role == "assistant" else None,
            )
        )  # fmt: skip
        self._parent = key


def _timestamp(value: Any) -> float | None:
    """Its time stamps are for people and differ by version; one that is not understood is left out."""
    if not isinstance(value, str):
        return None
    for pattern in ("%b %d, %Y %H:%M", "%Y-%m-%d %H:%M:%S", "%Y-%m-%dT%H:%M:%S"):
        try:
            return _time(datetime.datetime.strptime(value.strip(), pattern).timestamp())
        except (ValueError, OverflowError):
            continue
    return None


# --- a list of messages ---------------------------------------------------------------------------------------------


def _messages(data: dict[str, Any]) -> Imported:
    messages = data["messages"]
    if len(messages) > MAX_NODES:
        raise InvalidParameter(f"messages must have at most {MAX_NODES} entries.", param="messages")
    report: Counter[str] = Counter()
    system: list[str] = []
    nodes: list[NewNode] = []
    images: dict[str, str] = {}
    for number, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        content = message.get("content") if isinstance(message, dict) else None
        text = _parts(content, images, report) if isinstance(content, list) else content
        if role not in ("user", "assistant", "system", "developer") or not isinstance(text, str):
            report["messages without a text of the user, the assistant or the system were left out"] += 1
        elif role in ("system", "developer"):
            system.append(clean_text(text))
        else:
            nodes.append(NewNode(str(number), nodes[-1].key if nodes else None, cast("Role", role), clean_text(text)))
    title = data.get("title")
    conversation = NewConversation(
        clean_title(title) if isinstance(title, str) else "", tuple(nodes), system_prompt="\n\n".join(system)
    )
    return Imported(conversation, [f"{count} × {what}." if count > 1 else f"{what}." for what, count in report.items()], images)


def _parts(parts: Sequence[Any], images: dict[str, str], report: Counter[str]) -> str | None:
    """The text of a message in parts, its images below the words as the page writes them; None where nothing can be read."""
    words: list[str] = []
    shown: list[str] = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        source = part.get("image_url") if kind == "image_url" else None
        url = source.get("url") if isinstance(source, dict) else source
        if kind == "text" and isinstance(part.get("text"), str):
            words.append(part["text"])
        elif isinstance(url, str) and url[:5].lower() == "data:" and len(images) < MAX_IMAGES and len(url) < 2 * MAX_BYTES:
            try:
                encoded = from_data_url(url, "messages")
                name, _ = named(encoded)
            except InvalidImage:
                report["images that are damaged or too large were left out"] += 1
            else:
                images[name] = encoded
                shown.append(f"![image](cid:{name})")
        else:
            report["parts of messages that are no text and no image in the file were left out"] += 1
    return "\n\n".join(filter(None, ["\n".join(words), *shown])) or None
