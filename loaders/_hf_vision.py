"""Images for models of Transformers that see: files to what the model's processor makes of them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from loaders._pictures import check_marks, decode


@dataclass(frozen=True)
class Seen:
    """A prompt with images. `ids` has as many marks for each image as the model wants; `tensors` go to the model beside them.
    `key` tells one set of images from another; `end` is the place behind the last mark."""

    ids: list[int]
    tensors: dict[str, Any]
    key: str
    end: int


class Vision:
    """A model's processor. `token` is what stands for an image in a prompt."""

    def __init__(self, processor: Any, token: str, token_id: int) -> None:
        self._processor, self.token, self._token_id = processor, token, token_id

    def read(self, prompt: str, files: tuple[str, ...], *, add_special: bool) -> Seen:
        """`files` are images in base64. Raises InvalidImage, and InvalidParameter for another number of marks in the prompt."""
        check_marks(prompt, self.token, files)
        pictures = [decode(file) for file in files]
        made = self._processor(text=[prompt], images=pictures, return_tensors="pt", add_special_tokens=add_special)
        ids = [int(token) for token in made["input_ids"][0]]
        tensors = {name: value for name, value in made.items() if name not in ("input_ids", "attention_mask")}
        end = max((place + 1 for place, token in enumerate(ids) if token == self._token_id), default=0)
        return Seen(ids, tensors, hashlib.sha256("\n".join(files).encode("ascii")).hexdigest(), end)

    def cost(self) -> int:
        """Tokens that an ordinary picture takes of the context."""
        from PIL import Image

        picture = Image.new("RGB", (640, 480))
        made = self._processor(text=[self.token], images=[picture], return_tensors="pt", add_special_tokens=False)
        return int(made["input_ids"].shape[1])


def open_vision(path: str, config: Any) -> tuple[Vision | None, str]:
    """(the processor of a model that sees, "") or (None, why there is none)."""
    import transformers

    if getattr(config, "vision_config", None) is None or type(config) not in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return None, ""
    try:
        processor = transformers.AutoProcessor.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # whatever its classes raise for files that are missing or a package that is not here
        return None, f"Its images can't be read: {str(error).splitlines()[0][:200]}"
    token = getattr(processor, "image_token", None)
    if getattr(processor, "image_processor", None) is None or not isinstance(token, str):
        return None, "Its images can't be read: the folder has no image processor (preprocessor_config.json)."
    vision = Vision(processor, token, int(processor.tokenizer.convert_tokens_to_ids(token)))
    try:
        vision.cost()
    except Exception as error:  # the same: a processor is code of many makers
        return None, f"Its images can't be read: {str(error).splitlines()[0][:200]}"
    return vision, ""
