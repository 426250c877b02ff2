"""Messages with images, for a model that sees.

A canonical message keeps its words in `content`; one with images has `parts` beside it: {"type": "text", "text"} and
{"type": "image", "image": base64} in their order. `shape` turns them into what the model's template takes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from modules.errors import InvalidImage, UnsupportedParameter
from modules.images import MAX_IMAGES

if TYPE_CHECKING:
    from modules.residents import Resident
    from modules.schema import ModelFiles, ModelInfo

# A template that has a branch for a part of this type puts the model's own mark there.
_KNOWS_PARTS = re.compile(r"""['"](image|image_url)['"]""")
_TAKES_TEXT = re.compile(r"\bis (not )?string\b")


def images_of(messages: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """The images of all messages in order, as base64. Raises InvalidImage for too many."""
    found = tuple(part["image"] for message in messages for part in message.get("parts", ()) if part["type"] == "image")
    if len(found) > MAX_IMAGES:
        raise InvalidImage(
            f"There are {len(found)} images; at most {MAX_IMAGES} are read.",
            hint="Send fewer.",
            param="messages",
            detail={"reason": "count"},
        )
    return found


def without_pixels(messages: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    """The messages with the places of their images alone: the images themselves go beside them, in the same order."""
    return tuple(
        {**message, "parts": [{"type": "image"} if part["type"] == "image" else part for part in message["parts"]]}
        if "parts" in message
        else message
        for message in messages
    )


def sees(model: ModelFiles, resident: Resident | None) -> bool:
    """Whether the model reads images: as it is loaded, else by its files."""
    return resident.info.image_token is not None if resident is not None and resident.info is not None else model.vision


def check_sees(info: ModelInfo | None) -> None:
    """Raises UnsupportedParameter for a model that reads no images."""
    if info is None or info.image_token is None:
        name = f"{info.name} reads" if info is not None else "This model reads"
        hint = "Load a model with vision, or leave the image out."
        if info is not None and info.format == "remote":
            hint = "If it does where it runs, load it with vision=yes and chat_rendering=server; else leave the image out."
        elif info is not None and info.no_images:
            hint = info.no_images
        raise UnsupportedParameter(f"{name} no images.", hint=hint, param="messages")


def shape(messages: Sequence[dict[str, Any]], template: str | None, info: ModelInfo | None) -> list[dict[str, Any]]:
    """The messages as the template takes them. A template that knows parts gets parts (all messages do where it takes nothing
    else); any other gets the words with the model's `image_token` in the images' places. Where the engine puts in what belongs
    around an image (`image_inline`), every template gets the words, in a part of their own where it takes nothing else."""
    if info is None or info.image_token is None:
        return list(messages)
    knows = template is not None and _KNOWS_PARTS.search(template) is not None
    all_parts = knows and template is not None and not _TAKES_TEXT.search(template)
    mark = info.image_token if knows else f"{info.image_token}\n"
    shaped = []
    for message in messages:
        parts = message.get("parts")
        plain = {key: value for key, value in message.items() if key != "parts"}
        if parts and (info.image_inline or not knows):
            plain["content"] = "".join(mark if part["type"] == "image" else part["text"] for part in parts)
            parts = None
        if knows and (parts or all_parts):
            given = parts or [{"type": "text", "text": plain["content"]}]
            plain["content"] = [{"type": "image"} if part["type"] == "image" else part for part in given]
        shaped.append(plain)
    return shaped
