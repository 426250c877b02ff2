"""Images of the page's messages: kept once, found again, shown to the model that sees and left out for the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from modules.chat.attachments import LEFT_OUT, Attachments, with_images
from modules.errors import InvalidImage, NotFound, StorageError
from modules.schema import ModelInfo
from tests.pictures import BLUE, RED, encoded, png

BLIND = ModelInfo("wren", "/m", "echo", "hf")
SEES = ModelInfo("llava", "/m", "transformers", "hf", image_token="<image>", image_tokens=17)


@pytest.fixture
def files(tmp_path: Path) -> Attachments:
    return Attachments(tmp_path / "attachments")


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def test_an_image_is_kept_once_under_its_hash(files: Attachments, tmp_path: Path) -> None:
    name = files.save(encoded(png(RED)))
    assert files.save(encoded(png(RED))) == name and name.endswith(".png")
    assert [path.name for path in (tmp_path / "attachments").iterdir()] == [name]
    assert files.path(name).read_bytes() == png(RED) and files.encoded(name) == encoded(png(RED))


@pytest.mark.parametrize("name", ["", "a.png", "../settings.yaml", "0" * 64 + ".png", "0" * 64 + ".exe", "0" * 64])
def test_other_names_lead_nowhere(files: Attachments, tmp_path: Path, name: str) -> None:
    (tmp_path / "settings.yaml").write_text("secret")
    with pytest.raises(NotFound):
        files.path(name)
    assert files.encoded(name) is None


def test_what_can_not_be_kept_is_typed(files: Attachments, tmp_path: Path) -> None:
    with pytest.raises(InvalidImage):
        files.save(encoded(b"hello"))
    (tmp_path / "attachments").write_text("a file where the folder should be")
    with pytest.raises(StorageError, match="could not be kept"):
        files.save(encoded(png()))


def test_a_model_that_sees_gets_the_images_before_the_words(files: Attachments) -> None:
    red, blue = files.save(encoded(png(RED))), files.save(encoded(png(BLUE)))
    warnings: list[str] = []
    told = [user(f"What is it?\n\n![a b](cid:{red})\n\n![](cid:{blue})"), {"role": "assistant", "content": f"![x](cid:{red})"}]
    made = with_images(told, files, SEES, warnings)
    images = [{"type": "image", "image": encoded(png(color))} for color in (RED, BLUE)]
    assert made == [
        {"role": "user", "content": "What is it?", "parts": [*images, {"type": "text", "text": "What is it?"}]},
        told[1],  # an answer shows no images to the model
    ]
    assert warnings == []


def test_what_is_left_out_is_said(files: Attachments) -> None:
    red, gone = files.save(encoded(png(RED))), "0" * 64 + ".png"
    warnings: list[str] = []
    assert with_images([user(f"![a](cid:{red})"), user(f"Hi ![a](cid:{red})")], files, BLIND, warnings) == [
        user(LEFT_OUT),
        user("Hi"),
    ]
    assert warnings == ["wren reads no images: 2 images were left out."]
    warnings.clear()
    assert with_images([user(f"Hi ![a](cid:{gone})")], files, SEES, warnings) == [user("Hi")]
    assert "no longer" in warnings[0]
