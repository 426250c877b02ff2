"""The chat store: trees, versions, revisions, idempotence, search."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from modules.chat.store import NewConversation, NewNode, Snapshot
from modules.chat.store_rows import auto_title
from modules.errors import Conflict, InvalidParameter, NotFound

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from modules.chat.store import ChatStore

    from .conftest import Place


@pytest.fixture
async def store(place: Place) -> AsyncIterator[ChatStore]:
    store = place()
    assert await store.open() == []
    yield store
    await store.close()


async def ask(store: ChatStore, conversation: str, text: str, answer: str = "yes", **more: object) -> Snapshot:
    change = await store.add_message(conversation, text, client_id=f"c-{text}", generation=f"g-{text}", **more)  # type: ignore[arg-type]
    assert change.node is not None
    assert await store.finish(change.node, f"g-{text}", text=answer, status="complete", model="m", loader="echo")
    return await store.snapshot(conversation)


def texts(snapshot: Snapshot) -> list[str]:
    return [message.text for message in snapshot.messages]


async def test_a_turn_is_saved_whole_before_anything_is_generated(store: ChatStore) -> None:
    chat = await store.create(system_prompt="Be kind.")
    assert (chat.title, chat.revision, chat.messages) == ("New chat", 1, ())
    change = await store.add_message(chat.id, "# What is GPTQ?\nTell me.", client_id="c1", generation="g1")
    question, answer = change.snapshot.messages
    assert (question.role, question.status, answer.role, answer.status, answer.text) == (
        "user", "complete", "assistant", "generating", "",
    )  # fmt: skip
    assert answer.parent == question.id and change.node == answer.id and change.snapshot.leaf == answer.id
    assert change.snapshot.title == "What is GPTQ?"
    assert change.snapshot.revision == 2
    assert (await store.path_to(answer.id))[0] == "Be kind."


async def test_generation_writes_only_its_own_node(store: ChatStore) -> None:
    chat = await store.create()
    change = await store.add_message(chat.id, "hi", client_id="c1", generation="g1")
    node = change.node
    assert node is not None
    assert await store.checkpoint(node, "g1", "Hel")
    assert (await store.snapshot(chat.id)).messages[-1].text == "Hel"
    assert not await store.checkpoint(node, "other", "stolen")
    receipt, error = {"usage": {"prompt_tokens": 3}}, {"code": "worker_crashed"}
    assert await store.finish(node, "g1", text="Hello", status="failed", model="m", loader="l", receipt=receipt, error=error)
    assert not await store.checkpoint(node, "g1", "late")
    assert not await store.finish(node, "g1", text="twice", status="complete")
    snapshot = await store.snapshot(chat.id)
    done = snapshot.messages[-1]
    assert (done.text, done.status, done.model, done.loader, done.receipt, done.error) == (
        "Hello", "failed", "m", "l", receipt, error,
    )  # fmt: skip
    assert snapshot.revision == change.snapshot.revision, "an answer that comes in makes no tab stale"


async def test_the_same_client_id_acts_once(store: ChatStore) -> None:
    chat = await store.create()
    first = await store.add_message(chat.id, "hi", client_id="c1", generation="g1")
    for _ in range(50):
        again = await store.add_message(chat.id, "hi", client_id="c1", generation="g2")
        assert not again.fresh and again.node == first.node and again.snapshot.revision == first.snapshot.revision
    assert len(again.snapshot.messages) == 2
    assert first.node is not None
    with pytest.raises(InvalidParameter, match="client_id"):
        await store.add_answer(first.node, client_id="c1", generation="g3")


async def test_no_message_below_an_answer_that_is_being_written(store: ChatStore) -> None:
    chat = await store.create()
    await store.add_message(chat.id, "hi", client_id="c1", generation="g1")
    with pytest.raises(Conflict, match="still being written"):
        await store.add_message(chat.id, "more", client_id="c2", generation="g2")


async def test_regenerate_makes_versions(store: ChatStore) -> None:
    chat = await store.create()
    old = (await ask(store, chat.id, "q", "first")).messages[-1]
    change = await store.add_answer(old.id, client_id="r1", generation="g2")
    assert change.node is not None and change.snapshot.messages[-1].siblings == (old.id, change.node)
    double = await store.add_answer(old.id, client_id="r2", generation="g3")
    assert not double.fresh and double.node == change.node, "a double click writes one version"
    await store.finish(change.node, "g2", text="second", status="complete")
    back = await store.update(chat.id, {"leaf": old.id})
    assert texts(back) == ["q", "first"]
    assert texts(await store.update(chat.id, {"leaf": change.node})) == ["q", "second"]
    # From the user's message: the next answer too.
    third = await store.add_answer(old.parent or "", client_id="r4", generation="g4")
    assert len(third.snapshot.messages[-1].siblings) == 3


async def test_continue_appends_to_the_same_node(store: ChatStore) -> None:
    chat = await store.create()
    node = (await ask(store, chat.id, "q", "Once upon")).messages[-1].id
    change = await store.reopen(node, client_id="k1", generation="g2")
    assert (change.node, change.prefix) == (node, "Once upon")
    assert change.snapshot.messages[-1].status == "generating"
    await store.finish(node, "g2", text="Once upon a time", status="complete")
    await ask(store, chat.id, "next")
    with pytest.raises(Conflict, match="gone on"):
        await store.reopen(node, client_id="k2", generation="g3")
    with pytest.raises(InvalidParameter):
        await store.reopen((await store.snapshot(chat.id)).messages[0].id, client_id="k3", generation="g4")


async def test_edit_keeps_the_old_version_and_what_followed_it(store: ChatStore) -> None:
    chat = await store.create()
    await ask(store, chat.id, "q1", "a1")
    snapshot = await ask(store, chat.id, "q2", "a2")
    first = snapshot.messages[0]
    change = await store.add_version(first.id, "q1 better", client_id="e1", generation="g2")
    assert texts(change.snapshot) == ["q1 better", ""] and change.node == change.snapshot.leaf
    assert texts(await store.update(chat.id, {"leaf": first.id})) == ["q1", "a1", "q2", "a2"]
    answer = snapshot.messages[-1]
    edited = await store.add_version(answer.id, "my own words", client_id="e2")
    assert edited.node is None and texts(edited.snapshot)[-1] == "my own words"
    assert edited.snapshot.messages[-1].status == "complete"
    gone_on = await store.add_version(answer.id, "go on from", client_id="e3", generation="g4")
    assert gone_on.prefix == "go on from" and gone_on.snapshot.messages[-1].status == "generating"


async def test_a_stale_tab_conflicts_and_can_branch(store: ChatStore) -> None:
    chat = await store.create()
    seen = await ask(store, chat.id, "q1", "a1")
    await ask(store, chat.id, "from the other tab")
    with pytest.raises(Conflict) as caught:
        await store.add_message(chat.id, "mine", client_id="s1", generation="g", parent=seen.leaf, revision=seen.revision)
    assert texts(caught.value.detail["snapshot"])[2] == "from the other tab"
    change = await store.add_message(
        chat.id, "mine", client_id="s1", generation="g", parent=seen.leaf, revision=seen.revision, branch=True
    )
    assert texts(change.snapshot) == ["q1", "a1", "mine", ""]
    assert len(change.snapshot.messages[2].siblings) == 2, "both are kept"
    with pytest.raises(Conflict):
        await store.update(chat.id, {"title": "x"}, revision=seen.revision)


async def test_a_rename_elsewhere_does_not_stop_a_send(store: ChatStore) -> None:
    chat = await store.create()
    seen = await ask(store, chat.id, "q1")
    await store.update(chat.id, {"title": "Renamed"})
    change = await store.add_message(chat.id, "q2", client_id="s1", generation="g", parent=seen.leaf, revision=seen.revision)
    assert change.snapshot.title == "Renamed"


async def test_a_branch_below_a_deleted_message_goes_to_its_ancestor(store: ChatStore) -> None:
    chat = await store.create()
    seen = await ask(store, chat.id, "q1", "a1")
    await store.delete(seen.messages[1].id)
    with pytest.raises(Conflict):
        await store.add_message(chat.id, "q2", client_id="s1", generation="g", parent=seen.leaf, revision=seen.revision)
    change = await store.add_message(chat.id, "q2", client_id="s1", generation="g", parent=seen.leaf, branch=True)
    assert texts(change.snapshot) == ["q1", "q2", ""]


async def test_delete_and_undo_survive_a_restart(place: Place) -> None:
    store = place()
    await store.open()
    chat = await store.create()
    await ask(store, chat.id, "q1", "a1")
    full = await ask(store, chat.id, "q2", "a2")
    short, token = await store.delete(full.messages[2].id)
    assert texts(short) == ["q1", "a1"]
    assert (await store.delete(full.messages[2].id))[1] == token, "a double click gives the same token"
    with pytest.raises(NotFound):
        await store.add_answer(full.messages[3].id, client_id="x", generation="g")
    await store.close()
    store = place()
    await store.open()
    assert texts(await store.undo(token)) == ["q1", "a1", "q2", "a2"]
    assert texts(await store.undo(token)) == ["q1", "a1", "q2", "a2"]
    with pytest.raises(NotFound):
        await store.undo("nonsense")
    await store.close()


async def test_deleting_a_version_shows_the_other_one(store: ChatStore) -> None:
    chat = await store.create()
    old = (await ask(store, chat.id, "q", "first")).messages[-1]
    change = await store.add_answer(old.id, client_id="r1", generation="g2")
    assert change.node is not None
    await store.finish(change.node, "g2", text="second", status="complete")
    snapshot, token = await store.delete(change.node)
    assert texts(snapshot) == ["q", "first"] and snapshot.messages[-1].siblings == (old.id,)
    assert texts(await store.undo(token)) == ["q", "second"]
    root = snapshot.messages[0].id
    snapshot, token = await store.delete(root)
    assert snapshot.messages == () and snapshot.leaf is None
    assert texts(await store.undo(token)) == ["q", "second"]


async def test_undo_below_a_deleted_message_is_refused(store: ChatStore) -> None:
    chat = await store.create()
    snapshot = await ask(store, chat.id, "q", "a")
    _, inner = await store.delete(snapshot.messages[1].id)
    _, outer = await store.delete(snapshot.messages[0].id)
    with pytest.raises(Conflict, match="above"):
        await store.undo(inner)
    assert texts(await store.undo(outer)) == ["q"]
    assert texts(await store.undo(inner)) == ["q", "a"]


async def test_trash_and_purge(store: ChatStore) -> None:
    chat = await store.create()
    snapshot = await ask(store, chat.id, "secret thing")
    with pytest.raises(Conflict, match="trash"):
        await store.purge(chat.id)
    await store.update(chat.id, {"trashed": True})
    assert await store.conversations() == []
    assert [line.id for line in await store.conversations(trashed=True)] == [chat.id]
    with pytest.raises(Conflict, match="trash"):
        await store.add_message(chat.id, "more", client_id="t", generation="g")
    await store.purge(chat.id)
    with pytest.raises(NotFound):
        await store.snapshot(chat.id)
    with pytest.raises(NotFound):
        await store.path_to(snapshot.messages[0].id)
    assert await store.conversations("secret", trashed=True) == []


async def test_list_order_and_pins(store: ChatStore) -> None:
    ids = []
    for n in range(3):
        chat = await store.create()
        ids.append(chat.id)
        await ask(store, chat.id, f"question {n}", f"answer {n}")
    assert [line.id for line in await store.conversations()] == ids[::-1]
    await store.update(ids[0], {"pinned": True})
    lines = await store.conversations()
    assert [line.id for line in lines] == [ids[0], ids[2], ids[1]]
    assert lines[0].snippet == "answer 0" and not lines[0].generating
    await store.add_message(ids[1], "again", client_id="z", generation="z")
    lines = await store.conversations()
    assert [line.id for line in lines] == [ids[0], ids[1], ids[2]]
    assert lines[1].generating and lines[1].snippet == "again"


async def test_search(store: ChatStore) -> None:
    first, second = await store.create(), await store.create("École de Paris 100%")
    await ask(store, first.id, "Tell me of lighthouses", "The old keeper of the ÉTOILE lighthouse. " + "x " * 200 + "storm")
    await ask(store, second.id, "hi", "100 percent_sure")

    async def found(query: str) -> list[str]:
        return [line.id for line in await store.conversations(query)]

    assert await found("lighthouse keeper") == [first.id]
    assert await found("LIGHTHOUSE étoile") == [first.id]
    assert await found("école") == [second.id]
    assert await found("100%") == [second.id]
    assert await found("%") == [second.id] and await found("_") == [second.id]
    assert await found('"') == [] and await found('lighthouse" OR "hi') == []
    assert await found("of") == [first.id]
    assert await found("") == [second.id, first.id] == await found("   ")
    line = (await store.conversations("storm"))[0]
    assert "storm" in line.snippet and len(line.snippet) < 200
    node = (await store.snapshot(first.id)).messages[0]
    await store.delete(node.id)
    assert await found("storm") == []


async def test_update_checks_names_and_leaf(store: ChatStore) -> None:
    chat, other = await store.create(), await store.create()
    snapshot = await ask(store, other.id, "q")
    with pytest.raises(InvalidParameter):
        await store.update(chat.id, {"revision": 99})
    with pytest.raises(NotFound):
        await store.update(chat.id, {"leaf": snapshot.messages[0].id})
    with pytest.raises(NotFound):
        await store.update("nope", {"title": "x"})
    assert (await store.update(chat.id, {"title": ""})).title == "New chat"


async def test_a_leaf_goes_to_the_newest_end_below(store: ChatStore) -> None:
    chat = await store.create()
    first = await ask(store, chat.id, "q1", "a1")
    await ask(store, chat.id, "q2", "a2")
    await ask(store, chat.id, "q3", "a3", parent=first.leaf)
    snapshot = await store.update(chat.id, {"leaf": first.messages[0].id})
    assert texts(snapshot) == ["q1", "a1", "q3", "a3"]


async def test_import_and_export_keep_the_tree(store: ChatStore) -> None:
    nodes = (
        NewNode("a", None, "user", "q", created_at=1.5),
        NewNode("b", "a", "assistant", "a1", model="m", receipt={"x": 1}),
        NewNode("c", "a", "assistant", "a2", status="failed", error={"code": "boom"}),
    )
    made = await store.add_conversation(NewConversation("Imported", nodes, system_prompt="s", leaf="b", created_at=2.5))
    assert texts(made) == ["q", "a1"] and made.created_at == 2.5 and made.messages[0].created_at == 1.5
    out = await store.export(made.id)
    assert [(n.role, n.text, n.status, n.model, n.receipt, n.error) for n in out.nodes] == [
        (n.role, n.text, n.status, n.model, n.receipt, n.error) for n in nodes
    ]
    again = await store.add_conversation(out)
    assert again.id != made.id and texts(again) == texts(made)
    before = len(await store.conversations())
    with pytest.raises(InvalidParameter):
        await store.add_conversation(NewConversation("Torn", (NewNode("a", "zzz", "user", "q"),)))
    assert len(await store.conversations()) == before, "all or nothing"


async def test_long_conversation(store: ChatStore) -> None:
    nodes = [NewNode("0", None, "user", "q0")]
    nodes += [NewNode(str(n), str(n - 1), "assistant" if n % 2 else "user", f"t{n}") for n in range(1, 2001)]
    made = await store.add_conversation(NewConversation("Long", tuple(nodes)))
    assert len(made.messages) == 2001 and made.messages[-1].text == "t2000"


@pytest.mark.parametrize(
    ("text", "title"),
    [
        ("", "New chat"),
        ("\n\n  hello   world \nmore", "hello world"),
        ("word " * 40, "word word word word word word word word word word word word…"),
        ("x" * 200, "x" * 60 + "…"),
        ("### Task", "Task"),
    ],
)
def test_auto_title(text: str, title: str) -> None:
    assert auto_title(text) == title
