"""Random walks over the store's actions, checked against what must always hold."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from modules.errors import Conflict, InvalidParameter, NotFound

if TYPE_CHECKING:
    from modules.chat.store import Change, ChatStore, Snapshot

    from .conftest import Place

STEPS = 120


class Walk:
    def __init__(self, store: ChatStore, conversation: str, seed: int) -> None:
        self.store = store
        self.conversation = conversation
        self.chance = random.Random(seed)
        self.nodes: list[str] = []
        self.texts: dict[str, str] = {}
        self.tokens: list[str] = []
        self.number = 0
        self.revision = 0

    async def step(self) -> Snapshot:
        self.number += 1
        key = f"k{self.number}"
        actions = [
            self.send,
            self.send,
            self.send,
            self.answer,
            self.go_on,
            self.edit,
            self.delete,
            self.undo,
            self.look,
            self.again,
        ]
        return await self.chance.choice(actions)(key)

    def node(self) -> str:
        return self.chance.choice(self.nodes) if self.nodes else "nothing"

    async def written(self, change: Change, key: str) -> Snapshot:
        if change.node is not None and change.fresh:
            text = change.prefix + f"answer {key}"
            assert await self.store.finish(change.node, key, text=text, status=self.chance.choice(["complete", "failed"]))
            self.texts[change.node] = text
        snapshot = await self.store.snapshot(self.conversation)
        for message in snapshot.messages:
            if message.id not in self.nodes:
                self.nodes.append(message.id)
                self.texts[message.id] = message.text
        return snapshot

    async def send(self, key: str) -> Snapshot:
        parent = self.node() if self.nodes and self.chance.random() < 0.4 else None
        change = await self.store.add_message(
            self.conversation, f"question {key}", client_id=key, generation=key, parent=parent, branch=self.chance.random() < 0.7
        )
        return await self.written(change, key)

    async def answer(self, key: str) -> Snapshot:
        return await self.written(await self.store.add_answer(self.node(), client_id=key, generation=key), key)

    async def go_on(self, key: str) -> Snapshot:
        return await self.written(await self.store.reopen(self.node(), client_id=key, generation=key), key)

    async def edit(self, key: str) -> Snapshot:
        generation = key if self.chance.random() < 0.5 else None
        change = await self.store.add_version(self.node(), f"edit {key}", client_id=key, generation=generation)
        return await self.written(change, key)

    async def delete(self, key: str) -> Snapshot:
        snapshot, token = await self.store.delete(self.node())
        self.tokens.append(token)
        return snapshot

    async def undo(self, key: str) -> Snapshot:
        return await self.store.undo(self.chance.choice(self.tokens) if self.tokens else "none")

    async def look(self, key: str) -> Snapshot:
        return await self.store.update(self.conversation, {"leaf": self.node()})

    async def again(self, key: str) -> Snapshot:
        """A client id that was used before."""
        old = f"k{self.chance.randint(1, self.number)}"
        before = await self.store.snapshot(self.conversation)
        change = await self.store.add_answer(self.node(), client_id=old, generation="never")
        if change.fresh:
            return await self.written(change, "never")
        assert change.snapshot.revision == before.revision
        return change.snapshot

    def check(self, snapshot: Snapshot) -> None:
        assert snapshot.revision >= self.revision
        self.revision = snapshot.revision
        parent = None
        for message in snapshot.messages:
            assert message.parent == parent, "one unbroken path"
            assert message.id in message.siblings and len(set(message.siblings)) == len(message.siblings)
            assert message.status != "generating"
            assert message.text == self.texts.get(message.id, message.text), "nobody else writes into a message"
            parent = message.id
        assert snapshot.leaf == parent


WALKS = [("index", seed) for seed in range(8)] + [("postgresql", seed) for seed in range(4)]


@pytest.mark.parametrize(("place", "seed"), WALKS, indirect=["place"])
async def test_random_walks(place: Place, seed: int) -> None:
    store = place()
    await store.open()
    walk = Walk(store, (await store.create()).id, seed)
    done = 0
    for _ in range(STEPS):
        try:
            walk.check(await walk.step())
            done += 1
        except (Conflict, NotFound, InvalidParameter):
            walk.check(await store.snapshot(walk.conversation))
    assert done > STEPS / 3
    for token in reversed(walk.tokens):
        try:
            await store.undo(token)
        except Conflict:
            continue
    export = await store.export(walk.conversation)
    assert {node.key for node in export.nodes} == set(walk.nodes), "everything deleted came back"
    assert {node.key: node.text for node in export.nodes} == walk.texts
    copy = await store.add_conversation(export)
    final = await store.snapshot(walk.conversation)
    assert [m.text for m in copy.messages] == [m.text for m in final.messages]
    await store.close()
    store = place()
    assert await store.open() == []
    assert await store.snapshot(walk.conversation) == final
    await store.close()
