"""A chat's turns: what the page asks for, saved first, then generated, then saved again.

The store holds every conversation; a Run holds the text of one generation while it grows. This module joins them: it saves
the question before the run starts, the text so far every CHECKPOINT_S, and the end. Whoever looks at a conversation sees the
stored tree with the running text laid over it. A storage failure loses nothing that is in memory: the text stays here, is
shown and exported, and is saved as soon as the disk takes it.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import secrets
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from modules.chat.attachments import with_images
from modules.chat.store import NewConversation, Node, Notice, Snapshot, Status
from modules.chat.turns import AnswerSettings, PromptBuilder, build_messages
from modules.errors import AppError, Conflict, NotFound, StorageError, StorageUnreachable

if TYPE_CHECKING:
    from collections.abc import Coroutine, Sequence

    from modules.chat.attachments import Attachments
    from modules.chat.store import Change, ChatStore
    from modules.chat.templates import TemplateRenderer
    from modules.engine_client import EngineClient
    from modules.events import EventBus
    from modules.generation import Run, Runs
    from modules.residents import Resident
    from modules.schema import GenerationRequest
    from modules.settings import Settings

log = logging.getLogger(__name__)
T = TypeVar("T")

CHECKPOINT_S = 1.5  # the promise is two seconds
BACKUP_EVERY_S = 24 * 3600.0
TIDY_EVERY_S = 3600.0
STOP_WAIT_S = 15.0
NOTICE_KEEP_S = 600.0
_SNAPSHOT_FIELDS = tuple(f.name for f in dataclasses.fields(Snapshot) if f.name != "messages")
_NODE_FIELDS = tuple(f.name for f in dataclasses.fields(Node))


@dataclass(eq=False)
class Writing:
    """One answer that is being written, or could not be saved yet. `begun` is its node as it was then."""

    node: str
    conversation: str
    run: Run
    prefix: str
    begun: Node
    checkpointed: int = 0
    final: dict[str, Any] | None = None
    saved: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def text(self) -> str:
        return self.prefix + self.run.text


class Parts(Protocol):
    """What the service works with; `modules.services.Services` has it all."""

    @property
    def store(self) -> ChatStore: ...
    @property
    def runs(self) -> Runs: ...
    @property
    def settings(self) -> Settings: ...
    @property
    def attachments(self) -> Attachments: ...
    @property
    def templates(self) -> TemplateRenderer: ...
    @property
    def events(self) -> EventBus: ...
    def chat_template(self, resident: Resident) -> str | None: ...


class ChatService:
    """All methods belong to the event loop's thread. The store is opened and closed by whoever made it."""

    def __init__(self, parts: Parts, *, checkpoint_s: float = CHECKPOINT_S, backup_every_s: float = BACKUP_EVERY_S) -> None:
        self._parts = parts
        self._store = parts.store
        self._runs = parts.runs
        self._settings = parts.settings
        self._events = parts.events
        self._checkpoint_s = checkpoint_s
        self._backup_every_s = backup_every_s
        self._writing: dict[str, Writing] = {}  # by node: not saved to its end yet
        self._by_run: dict[str, Writing] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._loops: list[asyncio.Task[None]] = []
        self._notices: list[tuple[float, Notice]] = []
        self._storage_fails = False

    # --- life ---------------------------------------------------------------------------------------------------

    async def start(self, problems: Sequence[str] = ()) -> None:
        """Begin the checkpoints and the backups; the store is open. `problems` of the start are told to the page."""
        now = time.monotonic()
        notices = [*self._store.notices, *(Notice("warning", problem) for problem in problems)]
        self._notices += [(now, notice) for notice in notices]
        self._store.on_change = self._changed_elsewhere
        self._store.on_stop = self._stop_here
        self._loops = [asyncio.create_task(loop()) for loop in (self._checkpoints, self._backups, self._tidy)]

    async def close(self) -> None:
        """Save what there is. The runs are stopped before, the store is closed after."""
        for task in self._loops:
            task.cancel()
        await asyncio.gather(*self._loops, return_exceptions=True)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=10)
        for writing in list(self._writing.values()):
            await self._save_end(writing)

    def notify(self, level: Literal["info", "warning", "error"], text: str) -> None:
        """Tell every open page, and those that open within the next minutes."""
        log.log(getattr(logging, level.upper()), "%s", text)
        self._notices.append((time.monotonic(), Notice(level, text)))
        self._events.publish("notice", {"level": level, "text": text})

    def notices(self) -> list[Notice]:
        """Recent ones, for a page that opens now."""
        limit = time.monotonic() - NOTICE_KEEP_S
        self._notices = [(at, notice) for at, notice in self._notices if at > limit]
        return [notice for _, notice in self._notices]

    # --- reading ------------------------------------------------------------------------------------------------

    async def conversations(self, query: str = "", trashed: bool = False) -> list[dict[str, Any]]:
        return [dataclasses.asdict(line) for line in await self._store.conversations(query, trashed)]

    async def snapshot(self, conversation: str) -> dict[str, Any]:
        return self.view(await self._store.snapshot(conversation))

    def view(self, snapshot: Snapshot) -> dict[str, Any]:
        """JSON for the page, with what is in memory laid over what is on disk. `unsaved` says why nothing reaches the disk."""
        data = {name: getattr(snapshot, name) for name in _SNAPSHOT_FIELDS}
        data["unsaved"] = str(self._store.memory_only) if self._store.memory_only is not None else None
        return {**data, "messages": [self.node_view(node) for node in snapshot.messages]}

    def node_view(self, node: Node) -> dict[str, Any]:
        """`offset` is the length of `text` in code points: where a stream of its run goes on."""
        data: dict[str, Any] = {name: getattr(node, name) for name in _NODE_FIELDS}
        data |= {"siblings": list(node.siblings), "run": None}
        writing = self._writing.get(node.id)
        if writing is not None:
            data["text"] = writing.text
            if writing.final is None:
                resident = writing.run.resident
                data |= {"run": writing.run.id, "status": "generating", "error": None}
                if resident is not None:
                    data |= {"model": resident.model.id, "loader": resident.loader}
            else:
                data |= writing.final
                if writing.saved.is_set():  # it was tried, and the disk refused
                    data["unsaved"] = True
        data["offset"] = len(data["text"])
        return data

    def writing(self, run_id: str) -> Writing:
        """The answer of a run, while the run is remembered."""
        writing = self._by_run.get(run_id)
        if writing is None:
            raise NotFound("There is no such generation any more.", hint="Load the conversation again.", param="run")
        return writing

    async def final_node(self, writing: Writing) -> dict[str, Any]:
        """The answer as it was saved, once its run is over; as it is in memory while the store can't be read."""
        await writing.saved.wait()
        try:
            node = (await self._store.path_to(writing.node))[1][-1]
        except StorageError as error:
            self._storage_failed(error)
            node = writing.begun
        return self.node_view(node)

    async def export(self, conversation: str) -> NewConversation:
        """The tree, with the texts in memory that are not on disk yet."""
        found = await self._store.export(conversation)
        nodes = tuple(
            dataclasses.replace(node, text=self._writing[node.key].text) if node.key in self._writing else node
            for node in found.nodes
        )
        return dataclasses.replace(found, nodes=nodes)

    # --- conversations ------------------------------------------------------------------------------------------

    async def create(self, title: str = "", system_prompt: str | None = None) -> dict[str, Any]:
        prompt = self._settings["system_prompt"] if system_prompt is None else system_prompt
        return self._changed(await self._guarded(self._store.create(title, prompt)))

    async def update(self, conversation: str, changes: dict[str, Any], revision: int | None = None) -> dict[str, Any]:
        if changes.get("trashed"):
            await self._stop_all([w for w in self._writing.values() if w.conversation == conversation])
        return self._changed(await self._guarded(self._store.update(conversation, changes, revision)))

    async def purge(self, conversation: str) -> None:
        await self._guarded(self._store.purge(conversation))
        self._events.publish("conversations", key="")

    async def add_conversation(self, new: NewConversation) -> dict[str, Any]:
        return self._changed(await self._guarded(self._store.add_conversation(new)))

    # --- turns --------------------------------------------------------------------------------------------------

    async def send(
        self,
        conversation: str,
        text: str,
        *,
        client_id: str,
        parent: str | None = None,
        revision: int | None = None,
        branch: bool = False,
    ) -> dict[str, Any]:
        run_id = _run_id()
        return await self._act(
            run_id,
            self._store.add_message(
                conversation, text, client_id=client_id, generation=run_id, parent=parent, revision=revision, branch=branch
            ),
        )

    async def regenerate(self, node: str, *, client_id: str) -> dict[str, Any]:
        """Another version of an answer, or a (first) answer to a user's message."""
        run_id = _run_id()
        return await self._act(run_id, self._store.add_answer(node, client_id=client_id, generation=run_id))

    async def continue_(self, node: str, *, client_id: str) -> dict[str, Any]:
        """Go on writing an answer."""
        unsaved = self._writing.get(node)
        if unsaved is not None and unsaved.final is not None:
            await self._save_end(unsaved)  # raises nothing; if the disk still refuses, the next line says so
        run_id = _run_id()
        return await self._act(run_id, self._store.reopen(node, client_id=client_id, generation=run_id), continued=True)

    async def edit(self, node: str, text: str, *, client_id: str, generate: bool) -> dict[str, Any]:
        """A new version beside the old one; with `generate` it is answered, or, an answer itself, continued."""
        run_id = _run_id()
        change = self._store.add_version(node, text, client_id=client_id, generation=run_id if generate else None)
        return await self._act(run_id, change, continued=True)

    async def delete(self, node: str) -> tuple[dict[str, Any], str]:
        """(the conversation without the message and what followed it, the token that brings them back)."""
        with contextlib.suppress(NotFound):  # a second click: the store answers as it did the first time
            below = set(await self._store.subtree(node))
            await self._stop_all([w for w in self._writing.values() if w.node in below])
        snapshot, token = await self._guarded(self._store.delete(node))
        return self._changed(snapshot), token

    async def undo(self, token: str) -> dict[str, Any]:
        return self._changed(await self._guarded(self._store.undo(token)))

    def stop(self, run_id: str) -> None:
        self.writing(run_id)
        self._runs.stop(run_id)

    async def stop_answer(self, node: str) -> None:
        """Stop an answer wherever it is written; nothing when it is written no more."""
        if not self._stop_here(node):
            await self._store.stop_elsewhere(node)

    def _stop_here(self, node: str) -> bool:
        writing = self._writing.get(node)
        if writing is not None and writing.final is None:
            self._runs.stop(writing.run.id)
        return writing is not None

    # --- the work -----------------------------------------------------------------------------------------------

    async def _act(self, run_id: str, change: Coroutine[Any, Any, Change], *, continued: bool = False) -> dict[str, Any]:
        """Save, then start the run. Shielded: a browser that leaves in between must not leave a node without a run."""

        async def act() -> dict[str, Any]:
            saved = await self._guarded(change)
            if saved.fresh and saved.node is not None:
                try:
                    self._launch(saved.node, saved.snapshot, run_id, saved.prefix, continued and bool(saved.prefix))
                except Exception:  # a node without a run would be "generating" for ever
                    await self._store.finish(saved.node, run_id, text=saved.prefix, status="interrupted")
                    raise
            return self._changed(saved.snapshot)

        return await asyncio.shield(self._spawn(act()))

    def _launch(self, node: str, snapshot: Snapshot, run_id: str, prefix: str, continued: bool) -> None:
        settings = self._settings
        answer = AnswerSettings(settings.sampling(), settings["max_tokens"], tuple(settings["stop"]))
        path = snapshot.messages if continued else snapshot.messages[:-1]
        messages = build_messages(snapshot.system_prompt, path, continued=continued)
        warnings: list[str] = []

        async def prepare(resident: Resident, client: EngineClient) -> GenerationRequest:
            template = self._parts.chat_template(resident)
            builder = PromptBuilder(self._parts.templates, template, resident.info, client, warnings)
            shown = await with_images(messages, self._parts.attachments, resident.info, warnings)
            return await builder.request(shown, answer, continued=continued)

        run = self._runs.start(prepare, None, warnings=warnings, run_id=run_id)
        writing = Writing(node, snapshot.id, run, prefix, snapshot.messages[-1])
        for old in [key for key in self._by_run if self._runs.get(key) is None]:
            del self._by_run[old]
        self._writing[node] = self._by_run[run_id] = writing
        run.add_done_callback(lambda _: self._ended(writing))

    def _ended(self, writing: Writing) -> None:
        run = writing.run
        status: Status = "complete"
        if run.error is not None and run.cancelled_by is None:
            status = "failed"
        elif run.finish_reason == "cancelled":
            status = "interrupted"
        resident = run.resident
        writing.final = {
            "status": status,
            "model": resident.model.id if resident else None,
            "loader": resident.loader if resident else None,
            "receipt": run.receipt,
            "error": _error_card(run.error) if status == "failed" and run.error is not None else None,
        }
        self._spawn(self._save_end(writing))

    async def _save_end(self, writing: Writing) -> None:
        """Save the answer's end, or leave it in memory for the next try."""
        assert writing.final is not None or not writing.run.done
        final = writing.final or {"status": "interrupted"}
        news = not writing.saved.is_set()
        try:
            await self._store.finish(writing.node, writing.run.id, text=writing.text, **final)
        except StorageError as error:
            self._storage_failed(error)
        else:
            news = True
            if self._writing.get(writing.node) is writing:
                del self._writing[writing.node]
            self._saved()
        writing.saved.set()
        if news:
            self._publish(writing.conversation, None)

    async def _checkpoints(self) -> None:
        while True:
            await asyncio.sleep(self._checkpoint_s)
            if self._store.memory_only is not None and await self._store.save_again():
                self._saved()
            for writing in list(self._writing.values()):
                if writing.final is not None:
                    if writing.saved.is_set():  # its first try has failed
                        await self._save_end(writing)
                elif writing.run.length > writing.checkpointed:
                    length = writing.run.length
                    try:
                        await self._store.checkpoint(writing.node, writing.run.id, writing.text)
                    except StorageError as error:
                        self._storage_failed(error)
                    else:
                        writing.checkpointed = length
                        self._saved()

    async def _backups(self) -> None:
        while True:
            try:
                made = await self._store.backup()
                if made is not None:
                    log.info("chats backed up to %s", made)
            except StorageError as error:
                self.notify("warning", f"The daily backup of the chats failed: {error}")
            await asyncio.sleep(self._backup_every_s)

    async def _tidy(self) -> None:
        """Images that were uploaded for messages that never came."""
        while True:
            await asyncio.sleep(TIDY_EVERY_S)
            try:
                await self._store.drop_images()
            except StorageError as error:
                log.warning("unused images stay for now: %s", error)

    async def _stop_all(self, writings: list[Writing]) -> None:
        for writing in writings:
            self._runs.stop(writing.run.id)
        for writing in writings:
            try:
                await asyncio.wait_for(writing.saved.wait(), STOP_WAIT_S)
            except asyncio.TimeoutError:
                raise Conflict("An answer in this conversation does not stop.", hint="Try again in a moment.") from None

    async def _guarded(self, change: Coroutine[Any, Any, T]) -> T:
        """A conflict carries the current conversation as the page knows it; a refusing disk is told to every page."""
        try:
            result = await change
        except Conflict as error:
            current = error.detail.get("snapshot")
            if isinstance(current, Snapshot):
                error.detail = self.view(current)
            raise
        except StorageError as error:
            self._storage_failed(error)
            raise
        self._saved()
        return result

    def _changed(self, snapshot: Snapshot) -> dict[str, Any]:
        self._publish(snapshot.id, snapshot.revision)
        return self.view(snapshot)

    def _publish(self, conversation: str, revision: int | None) -> None:
        """`revision` is None when only an answer came to its end: the tree is as it was; or when another server knows it."""
        self._events.publish("conversation", {"id": conversation, "revision": revision}, key=conversation)
        self._events.publish("conversations", key="")

    def _changed_elsewhere(self, conversation: str | None) -> None:
        """Another server changed it; None: any may have changed."""
        if conversation is None:
            self._events.publish("resync")
        else:
            self._publish(conversation, None)

    def _storage_failed(self, error: StorageError) -> None:
        if not self._storage_fails:
            self._storage_fails = True
            if isinstance(error, StorageUnreachable):
                rest = "Answers that are being written go on, and are saved when it is back."
            else:
                rest = "Chats go on in memory only: export what you need, it is lost if the server ends."
            self.notify("error", f"{error} {rest}")

    def _saved(self) -> None:
        if self._store.memory_only is not None:
            self._storage_failed(self._store.memory_only)
        elif self._storage_fails:
            self._storage_fails = False
            self.notify("info", "Chats are saved again.")

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _run_id() -> str:
    return f"run-{secrets.token_hex(12)}"


def _error_card(error: AppError) -> dict[str, Any]:
    """What the page shows of a failure: no path, no traceback beyond the worker's own last words."""
    return error.to_wire()
