"""Names from strangers, confined (catalogue B16)."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modules.errors import InvalidParameter
from modules.paths import confine, is_inside, name_problem

BAD = [
    "", ".", "..", "../x", "..\\x", "a/b", "a\\b", "/etc", "C:x", "\\\\srv\\s", "%2e%2e", "a%2Fb", "%5c", "x\0y", ".hidden",
    "CON", "con.txt", "nul", "COM1.gguf", "LPT9", "com¹", "a/", "x.", "x ", " x", "a" * 300, "é" * 150,
    "a\nb", "a\x7fb", "\x1b[31m", "gnp\u202etxt", "a\u200bb", "\ud800", 'a"b', "a|b", "a?b", "*", "<a>", "a:b",
]  # fmt: skip
GOOD = [
    "model",
    "Llama 3.1 (8B) [Q4_K_M]",
    "модель",
    "模型-7b",
    "שלום",
    "🚀 rocket",
    "a.b.c",
    "console",
    "con_",
    "x%20y",
    "100% real",
    "é" * 50,
]


@pytest.mark.parametrize("name", BAD)
def test_a_bad_name_is_refused_without_telling_what_exists(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        confine(tmp_path, name)
    assert str(tmp_path) not in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize("name", GOOD)
def test_a_good_name_becomes_a_file_of_that_name(tmp_path: Path, name: str) -> None:
    path = confine(tmp_path, name)
    path.write_text("x", encoding="utf-8")
    assert path.parent == tmp_path
    assert [unicodedata.normalize("NFC", p.name) for p in tmp_path.iterdir()] == [unicodedata.normalize("NFC", name)]


def test_composed_and_decomposed_letters_are_one_name(tmp_path: Path) -> None:
    assert confine(tmp_path, "Caf\u00e9") == confine(tmp_path, "Cafe\u0301")


def test_nested_names_are_checked_part_by_part(tmp_path: Path) -> None:
    assert confine(tmp_path, "llama/hf/q4.gguf", nested=True) == tmp_path / "llama" / "hf" / "q4.gguf"
    for name in ("a/../../b", "/a", "a//b", "a/", "a/CON", "/".join("abcdefghi")):
        with pytest.raises(InvalidParameter):
            confine(tmp_path, name, nested=True)


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret").write_text("x", encoding="utf-8")
    (root / "out").symlink_to(tmp_path / "secret")
    (root / "within").symlink_to(root / "file")
    (root / "loop").symlink_to(root / "loop")
    with pytest.raises(InvalidParameter, match="link"):
        confine(root, "out")
    assert confine(root, "within").name == "within"
    assert not is_inside(root / "out", root)


@given(st.text(max_size=80))
def test_any_text_is_refused_or_stays_inside(name: str) -> None:
    root = Path("/srv/models")
    try:
        path = confine(root, name)
    except InvalidParameter:
        return
    assert path.parent == root
    assert path.name == unicodedata.normalize("NFC", name)
    assert name_problem(path.name) is None
