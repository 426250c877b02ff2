"""Image files to pixels, for every loader that sees: one set of limits, one meaning of transparency and orientation."""

from __future__ import annotations

import base64
import io
import struct
import warnings
import zlib
from collections.abc import Sequence
from typing import Any

from modules import images
from modules.errors import InvalidImage, InvalidParameter

_FORMATS = tuple(kind.upper() for kind in images.KINDS.values())


def check_marks(prompt: str, mark: str, files: Sequence[str]) -> None:
    """Raises InvalidParameter unless the prompt has one mark for each image."""
    marks = prompt.count(mark)
    if marks != len(files):
        raise InvalidParameter(
            f"The prompt has {marks} places for images ({mark}) and {len(files)} images were sent.",
            hint="Leave the model's own mark for images out of the text.",
            param="messages",
        )


def decode(file: str) -> Any:
    """An image file in base64 as an upright RGB picture of Pillow, what is transparent on white. Raises InvalidImage."""
    from PIL import Image, ImageOps

    data = base64.b64decode(file)
    images.check(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture: Image.Image = Image.open(io.BytesIO(data), formats=_FORMATS)
            picture.load()
            picture = ImageOps.exif_transpose(picture)
            if "transparency" in picture.info or picture.mode in ("RGBA", "LA", "PA"):
                picture = picture.convert("RGBA")
                return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
            return picture.convert("RGB")
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError) as error:
        raise InvalidImage(
            "The image is damaged.", hint="Send another copy of it.", detail={"reason": "broken", "why": str(error)[:200]}
        ) from None
    except Image.DecompressionBombWarning:
        raise InvalidImage("The image has too many pixels.", hint="Make it smaller.", detail={"reason": "pixels"}) from None
