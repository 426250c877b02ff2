"""Conversations from other products and from strangers."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from modules.chat.store import NewConversation, NewNode
from modules.chat.transfer import clean_text, clean_title, from_json, to_json
from modules.errors import AppError, InvalidParameter, InvalidUnicode

TREE = NewConversation(
    "Title",
    (
        NewNode("a", None, "user", "q 👩‍👩‍👧", created_at=10.0),
        NewNode("b", "a", "assistant", "x", 11.0, "failed", "m", "l", {"usage": {}}, {"code": "boom"}),
        NewNode("c", "a", "assistant", "y", 12.0),
    ),
    system_prompt="s",
    leaf="b",
    pinned=True,
    created_at=9.0,
)


def test_our_own_round_trip() -> None:
    data = json.loads(json.dumps(to_json(TREE)))
    assert from_json(data) == (TREE, [], {})


def test_history_of_another_product() -> None:
    history = {
        "internal": [["<|BEGIN-VISIBLE-CHAT|>", "Welcome"], ["hi", "b"], ["", "more"], "torn", ["x"]],
        "visible": [["", "Welcome"], ["hi", "b"]],
        "metadata": {
            "assistant_0": {"timestamp": "Nov 21, 2025 21:44", "model_name": "llama"},
            "assistant_1": {
                "versions": [{"content": "a"}, {"content": "b"}, {"no": 1}], "current_version_index": 1, "tool_sequence": [1],
            },
            "user_1": {"attachments": [{}], "timestamp": "yesterday"},
            "assistant_2": "nonsense",
        },
        "odd": 1,
    }  # fmt: skip
    new, report, _ = from_json(history)
    assert [(n.role, n.text, n.parent) for n in new.nodes] == [
        ("assistant", "Welcome", None), ("user", "hi", "a0"), ("assistant", "a", "u1"), ("assistant", "b", "u1"),
        ("assistant", "more", "a1.1"),
    ]  # fmt: skip
    assert new.nodes[0].created_at and new.nodes[0].model == "llama" and new.nodes[1].created_at is None
    text = " ".join(report)
    for word in ("2 × rows", "attachments", "tool calls", "'odd'"):
        assert word in text, report


def test_old_keys_and_plain_messages() -> None:
    assert [n.text for n in from_json({"data": [["q", "a"]], "data_visible": []})[0].nodes] == ["q", "a"]
    messages = [
        {"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "tool", "content": "t"}, 5,
        {"role": "assistant", "content": "a"},
    ]  # fmt: skip
    new, report, _ = from_json({"messages": messages, "title": "T"})
    assert (new.system_prompt, new.title, [n.text for n in new.nodes]) == ("s", "T", ["q", "a"])
    assert len(report) == 1 and report[0].startswith("2 ×")


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2}, {"version": None}, {"version": True}, {"version": "1"}, {"nodes": None}, {"nodes": [3]}, {"nodes": [{}]},
        {"title": 3}, {"system_prompt": []}, {"format": "other"}, {"attachments": []},
        {"attachments": {str(n): "" for n in range(2001)}},
        {"nodes": [{"id": "a", "text": "x", "role": "root"}]}, {"nodes": [{"id": "a", "text": "x", "role": "user", "parent": 3}]},
    ],
)  # fmt: skip
def test_bad_files_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidParameter):
        from_json({**to_json(TREE), **change})


def test_odd_values_become_harmless() -> None:
    data = to_json(TREE)
    data["nodes"][0] |= {"status": "generating", "created_at": 1e300, "model": 5, "receipt": "x", "error": []}
    data |= {"created_at": "now", "pinned": "yes", "leaf": 5}
    new, _, _ = from_json(data)
    first = new.nodes[0]
    assert (first.status, first.created_at, first.model, first.receipt, first.error) == ("interrupted", None, None, None, None)
    assert (new.created_at, new.pinned, new.leaf) == (None, False, None)


def test_cleaning() -> None:
    assert clean_text("a\x00b\u202e") == "ab\u202e"
    with pytest.raises(InvalidUnicode):
        clean_text("\ud800")
    assert clean_title(" a\r\n b\t\u202ec ") == "a b c"
    assert len(clean_title("x" * 999)) == 200


def test_mutated_files_raise_nothing_unexpected() -> None:
    """Whatever a file holds, the answer is a conversation or an AppError."""
    chance = random.Random(7)
    values: list[Any] = [None, True, -1, 1.5, "", "x", [], {}, [[]], {"a": 1}, "\ud800", 2**70, [["a", "b"]], {"versions": [1]}]

    def mutate(item: Any, depth: int = 0) -> Any:
        if chance.random() < 0.12:
            return chance.choice(values)
        if isinstance(item, dict):
            return {key: mutate(value, depth + 1) for key, value in item.items() if chance.random() > 0.05}
        return [mutate(value, depth + 1) for value in item] if isinstance(item, list) else item

    seeds = [
        to_json(TREE),
        {"internal": [["a", "b"]] * 3, "metadata": {"assistant_1": {"versions": [{"content": "c"}], "current_version_index": 0}}},
        {
            "messages": [
                {"role": "user", "content": "x"},
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]},
            ]
        },
        {**to_json(TREE), "attachments": {f"{'a' * 64}.png": "AAAA"}},
    ]
    outcomes = set()
    for _ in range(5000):
        data = mutate(chance.choice(seeds))
        if isinstance(data, dict):
            try:
                from_json(data)
                outcomes.add("read")
            except AppError as error:
                outcomes.add(error.code)
    assert {"read", "invalid_parameter", "invalid_unicode"} <= outcomes
