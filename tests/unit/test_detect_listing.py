"""The list of models: what is in it, by which names, and what is remembered of it."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from modules.detect import check, find_model, list_models
from modules.errors import ModelNotFound
from tests.unit.model_files import gguf_bytes, hf_folder, lora_folder, sharded, write_json


def model_dir(tmp_path: Path) -> Path:
    root = tmp_path / "models"
    hf_folder(root / "llama" / "hf")
    (root / "llama" / "llama-Q4_0.gguf").write_bytes(gguf_bytes())
    (root / "top.gguf").write_bytes(gguf_bytes())
    (root / "renamed.dat").write_bytes(gguf_bytes())
    (root / "broken.gguf").write_bytes(b"")
    (root / ".hidden.gguf").write_bytes(gguf_bytes())
    (root / "unfinished.gguf.part").write_bytes(gguf_bytes())
    (root / "notes.txt").write_text("GGUF", encoding="utf-8")
    (root / "data.bin").write_bytes(bytes(100))
    (root / "split-00001-of-00002.gguf").write_bytes(gguf_bytes())
    (root / "split-00002-of-00002.gguf").write_bytes(gguf_bytes())
    write_json(root / "bundled.json", {"models": ["llama/h?"]})
    lora_folder(root / "style")
    return root


def test_a_folder_of_models(tmp_path: Path) -> None:
    models = list_models([model_dir(tmp_path)])
    assert [model.id for model in models] == [
        "broken.gguf", "llama/hf", "llama/llama-Q4_0.gguf", "renamed.dat", "split-00001-of-00002.gguf", "style", "top.gguf"
    ]  # fmt: skip
    assert [model.id for model in models if model.bundled] == ["llama/hf"]
    assert [model.id for model in models if model.problem] == ["broken.gguf"]
    assert list_models([tmp_path / "absent"]) == []


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    root = tmp_path / "models"
    root.mkdir()
    path = root / "m.gguf"
    path.write_bytes(gguf_bytes()[:-300])
    assert list_models([root])[0].problem
    path.write_bytes(gguf_bytes())
    assert list_models([root])[0].problem is None
    path.unlink()
    assert list_models([root]) == []


def test_two_folders_with_one_name(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "m.gguf").write_bytes(gguf_bytes())
    models = list_models([tmp_path / "one", tmp_path / "two"])
    assert [model.id for model in models] == ["m.gguf", "two/m.gguf"]


def test_a_model_by_its_name(tmp_path: Path) -> None:
    root = model_dir(tmp_path)
    for name in ("llama/hf", "hf", "HF"):
        assert find_model(name, [root]).id == "llama/hf"
    assert find_model("top", [root]).id == "top.gguf"
    assert find_model("llama-q4_0", [root]).id == "llama/llama-Q4_0.gguf"
    with pytest.raises(ModelNotFound, match=r"Did you mean top.gguf"):
        find_model("topp.gguf", [root])


@pytest.mark.parametrize("name", ["", "../models/top.gguf", "/etc/passwd", "top.gguf/../top.gguf", "x" * 10**6, "a\0b", "a\nb"])
def test_no_name_reaches_outside_or_comes_back(tmp_path: Path, name: str) -> None:
    root = model_dir(tmp_path)
    with pytest.raises(ModelNotFound) as caught:
        find_model(name, [root])
    assert len(str(caught.value)) < 1000
    assert "passwd" not in str(caught.value)
    assert str(root) not in str(caught.value)


def test_a_path_only_where_it_is_allowed(tmp_path: Path) -> None:
    root = model_dir(tmp_path)
    outside = tmp_path / "outside.gguf"
    outside.write_bytes(gguf_bytes())
    with pytest.raises(ModelNotFound):
        find_model(str(outside), [root])
    assert find_model(str(outside), [root], allow_paths=True).path == str(outside)
    assert find_model(str(root / "top.gguf"), [root], allow_paths=True).id == "top.gguf"


def test_links_are_followed_and_circles_end(tmp_path: Path) -> None:
    root = model_dir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "big.gguf").write_bytes(gguf_bytes())
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "circle").symlink_to(root)
    ids = [model.id for model in list_models([root])]
    assert "linked/big.gguf" in ids
    assert "circle/top.gguf" in ids
    assert not any(model_id.count("circle") > 5 for model_id in ids)


def test_weights_that_are_links_as_in_the_hubs_cache(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "models--o--n" / "snapshots" / "main")
    blobs = tmp_path / "models--o--n" / "blobs"
    blobs.mkdir()
    for path in folder.glob("*.safetensors"):
        path.rename(blobs / path.name)
        path.symlink_to(blobs / path.name)
    assert check(folder).problem is None


@pytest.mark.slow
def test_a_thousand_models_are_listed_in_a_second(tmp_path: Path) -> None:
    root = tmp_path / "models"
    for number in range(500):
        hf_folder(root / f"hf-{number}")
        (root / f"m-{number}.gguf").write_bytes(gguf_bytes())
    assert len(list_models([root])) == 1000
    started = time.process_time()
    assert len(list_models([root])) == 1000
    assert time.process_time() - started < 1.0


def test_what_headers_said_is_kept_until_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from modules.detect import listing
    from modules.detect.remembered import HeaderCache

    models = tmp_path / "models"
    models.mkdir()
    (models / "a.gguf").write_bytes(b"GGUF broken")
    kept = tmp_path / "data" / "headers.json"
    first = listing.list_models([models], HeaderCache(kept))
    read: list[str] = []
    examine = listing.examine
    monkeypatch.setattr(listing, "examine", lambda path, **options: (read.append(path.name), examine(path, **options))[1])
    assert listing.list_models([models], HeaderCache(kept)) == first and read == []
    (models / "a.gguf").write_bytes(b"GGUF broken otherwise")
    changed = listing.list_models([models], HeaderCache(kept))
    assert read == ["a.gguf"] and changed[0].size_bytes == 21
    (models / "a.gguf").unlink()
    (models / "b.gguf").write_bytes(b"GGUF broken")
    listing.list_models([models], HeaderCache(kept))
    assert list(json.loads(kept.read_text(encoding="utf-8"))["models"]) == [str(models / "b.gguf")]


@pytest.mark.parametrize(
    "text",
    [
        '{"models": {',
        "[]",
        "{}",
        '{"rules": "other", "models": {"x": [1, {}]}}',
        "\x00",
        '{"rules": "R", "models": {"P": ["D", {"no": 1}]}}',
    ],
)
def test_a_file_of_headers_that_is_torn_or_foreign_counts_for_nothing(tmp_path: Path, text: str) -> None:
    from modules.detect import listing, remembered

    (tmp_path / "a.gguf").write_bytes(b"GGUF broken")
    digest = remembered._digest(listing._fingerprint(tmp_path / "a.gguf"))
    kept = tmp_path / "headers.json"
    text = (
        text.replace('"R"', f'"{remembered._rules()}"')
        .replace('"P"', json.dumps(str(tmp_path / "a.gguf")))
        .replace('"D"', f'"{digest}"')
    )
    kept.write_text(text, encoding="utf-8")
    (found,) = listing.list_models([tmp_path], remembered.HeaderCache(kept))
    assert found.problem and "damaged" in found.problem
