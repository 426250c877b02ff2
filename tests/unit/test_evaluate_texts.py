"""Data sets by name and by file: how they are joined, and what is said when they are not there."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from modules.errors import InvalidParameter
from modules.evaluate.questions import read_questions
from modules.evaluate.texts import BUNDLED, listed, read_text


def test_wikitext_is_joined_as_the_papers_join_the_hubs_rows(tmp_path: Path) -> None:
    (tmp_path / "wiki.test.raw").write_text(" \n = Title = \n \n Some text . \n", encoding="utf-8")
    text = read_text("wikitext2", [tmp_path])
    assert text.content == "\n\n = Title = \n\n\n\n\n Some text . \n"
    assert (text.name, text.words) == ("wikitext2", 6)


def test_ptb_is_one_line_and_c4_the_first_documents(tmp_path: Path) -> None:
    (tmp_path / "ptb.test.txt").write_text(" no it was n't \n black monday \n", encoding="utf-8")
    assert read_text("ptb", [tmp_path]).content == "no it was n't black monday"
    with gzip.open(tmp_path / "c4-validation.00000-of-00008.json.gz", "wt", encoding="utf-8") as file:
        for index in range(1200):
            file.write(json.dumps({"text": f"d{index}", "url": "x"}) + "\n")
    text = read_text("c4", [tmp_path])
    assert text.content.split()[-1] == "d1099"
    assert text.max_windows == 256


def test_a_missing_data_set_says_what_to_fetch_and_where_to_put_it(tmp_path: Path) -> None:
    with pytest.raises(InvalidParameter) as caught:
        read_text("wikitext2", [tmp_path / "datasets"])
    assert "wiki.test.raw" in caught.value.hint
    assert str(tmp_path / "datasets") in caught.value.hint
    assert "--dataset-dir" in caught.value.hint


def test_any_file_is_a_text(tmp_path: Path) -> None:
    path = tmp_path / "mein text.txt"
    path.write_bytes(b"\xef\xbb\xbfGr\xc3\xbc\xc3\x9fe\r\naus Wien\n")
    assert read_text(str(path), [tmp_path]).content == "Grüße\naus Wien\n"
    assert read_text("mein text.txt", [tmp_path]).name == "mein text"
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n', encoding="utf-8")
    assert read_text(str(tmp_path / "rows.jsonl"), [tmp_path]).content == "one\n\ntwo"
    assert len(read_text(BUNDLED, [tmp_path]).content) > 50_000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("latin.txt", b"caf\xe9", "no UTF-8"),
        ("empty.txt", b" \n", "holds no text"),
        ("rows.jsonl", b'{"id": 1}\n', 'has no "text"'),
        ("rows.jsonl", b"{nonsense", "lines of JSON"),
        ("rows.json.gz", b"not gzip", "lines of JSON"),
    ],
)
def test_what_is_no_text_says_why(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidParameter, match=message):
        read_text(str(tmp_path / name), [tmp_path])


def test_a_name_that_is_nothing_lists_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(InvalidParameter) as caught:
        read_text("wikitext3", [tmp_path])
    assert "wikitext2" in str(caught.value)


def test_the_page_is_offered_what_is_here(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("x", encoding="utf-8")
    (tmp_path / "picture.png").write_bytes(b"x")
    (tmp_path / "ptb.test.txt").write_text("x", encoding="utf-8")
    found = {str(entry["name"]): entry["there"] for entry in listed([tmp_path])}
    assert found == {"bundled": True, "wikitext2": False, "ptb": True, "c4": False, "own.txt": True}


def test_questions_come_from_lists_of_every_kind(tmp_path: Path) -> None:
    assert len(read_questions().questions) == 5
    (tmp_path / "q.txt").write_text("One?\n\nTwo?\n", encoding="utf-8")
    assert read_questions(tmp_path / "q.txt").questions == ("One?", "Two?")
    (tmp_path / "q.yaml").write_text("system: Be brief.\nquestions:\n  - A?\n", encoding="utf-8")
    assert read_questions(tmp_path / "q.yaml").system == "Be brief."
    (tmp_path / "q.json").write_text('["A?"]', encoding="utf-8")
    assert read_questions(tmp_path / "q.json").questions == ("A?",)
    for name, content in (("empty.txt", "\n"), ("bad.json", "{"), ("map.json", '{"questions": 3}'), ("bad.yaml", "a: [")):
        (tmp_path / name).write_text(content, encoding="utf-8")
        with pytest.raises(InvalidParameter):
            read_questions(tmp_path / name)
    with pytest.raises(InvalidParameter, match="no file"):
        read_questions(tmp_path / "nothing.txt")
