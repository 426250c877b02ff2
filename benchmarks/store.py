"""The chat store where its user waits for it: SQLite as it is, as it was (--before another checkout), and PostgreSQL beside.

Each store is a process of its own; they take turns, so that a busy machine is as busy for each. Figures are medians in
milliseconds with every save on disk (PostgreSQL: on this machine, over a unix socket), ratios medians over the rounds; that to
before is of CPU time, which the disk's mood leaves alone.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from common import ROOT, Overlays, report

CHATS, MESSAGES = 1000, 20
WORDS = "the keeper of an old lighthouse wrote letters about storms ships lamps oil winter birds and the sea".split()
ACTIONS = "send checkpoint_4k finish open_20 open_400 list_1000 search_rare search_common search_short".split()
SLOW = ACTIONS[-4:]


def rare(chat: int) -> str:
    return hashlib.sha256(str(chat).encode()).hexdigest()[:12]


def text_of(chat: int, number: int) -> str:
    """About 600 characters; its last word is in this chat only."""
    words = [WORDS[(chat * 7 + number * 3 + n * n) % len(WORDS)] for n in range(100)]
    return " ".join([*words, rare(chat)])


def nodes_of(chat: int, count: int) -> tuple[Any, ...]:
    """A chain of messages."""
    from modules.chat.store import NewNode

    parents = [None, *map(str, range(count - 1))]
    return tuple(NewNode(str(n), parents[n], "assistant" if n % 2 else "user", text_of(chat, n)) for n in range(count))


# --- in the process of a store -----------------------------------------------------------------------------------------


async def serve(store: Any) -> None:
    """Fill a new store with CHATS chats; then a line `action count` asks for the median of so many."""
    from modules.chat.store import NewConversation

    await store.open()
    chats = []
    for chat in range(CHATS):
        chats.append((await store.add_conversation(NewConversation(f"Chat {chat}", nodes_of(chat, MESSAGES)))).id)
    longest = (await store.add_conversation(NewConversation("Long", nodes_of(CHATS, 400)))).id
    print("ready", flush=True)
    changes: list[Any] = []
    finished = 0

    async def send(n: int) -> None:
        key = f"k{len(changes)}"
        changes.append(await store.add_message(chats[len(changes)], "a question", client_id=key, generation=key))

    async def checkpoint(n: int) -> None:
        number = len(changes) - 1
        await store.checkpoint(changes[number].node, f"k{number}", "x" * 4096 + str(n))

    async def finish(n: int) -> None:
        nonlocal finished
        await store.finish(changes[finished].node, f"k{finished}", text=text_of(n, 1), status="complete")
        finished += 1

    does: dict[str, Callable[[int], Awaitable[Any]]] = {
        "send": send,
        "checkpoint_4k": checkpoint,
        "finish": finish,
        "open_20": lambda n: store.snapshot(chats[-1 - n]),
        "open_400": lambda n: store.snapshot(longest),
        "list_1000": lambda n: store.conversations(),
        "search_rare": lambda n: store.conversations(rare(n * 7)),
        "search_common": lambda n: store.conversations("lighthouse keeper"),
        "search_short": lambda n: store.conversations("zz"),
    }
    for line in sys.stdin:
        name, count = line.split()
        times, cpu = [], time.process_time()
        for number in range(int(count)):
            begun = time.perf_counter()
            await does[name](number)
            times.append(time.perf_counter() - begun)
        print(statistics.median(times) * 1000, (time.process_time() - cpu) / int(count) * 1000, flush=True)
    await store.close()


def one(place: str) -> None:
    with tempfile.TemporaryDirectory(prefix="switchyard-bench-") as folder:
        if "://" in place:
            from modules.chat.store_postgres import PostgresChatStore

            store: Any = PostgresChatStore(place, Path(folder))
        else:
            from modules.chat.store_sqlite import SqliteChatStore

            store = SqliteChatStore(Path(folder))
        asyncio.run(serve(store))


# --- in this one -------------------------------------------------------------------------------------------------------


class Child:
    """A store of one checkout in a process of its own."""

    def __init__(self, tree: Path, place: str) -> None:
        # The tree's modules first: what is imported later finds them there.
        code = f"import sys; sys.path[:0] = [{str(tree)!r}]; import modules.chat.store_sqlite; "
        code += f"sys.path[:0] = [{str(ROOT / 'benchmarks')!r}]; import store; store.one({place!r})"
        python = str(Overlays.find(ROOT).python("parent"))
        self.process = subprocess.Popen([python, "-c", code], cwd=tree, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.said()

    def said(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the store ended with {self.process.wait()}")
        return line

    def measure(self, action: str, count: int) -> tuple[float, float]:
        """(median wall time, mean CPU time) of so many, in ms."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{action} {count}\n")
        self.process.stdin.flush()
        wall, cpu = self.said().split()
        return float(wall), float(cpu)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def ratio(above: list[tuple[float, float]], below: list[tuple[float, float]], which: int) -> float:
    """The median over the rounds, of wall (0) or CPU time (1)."""
    return round(statistics.median(a[which] / b[which] for a, b in zip(above, below, strict=True)), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--count", type=int, default=20, help="actions of each kind in a round")
    parser.add_argument("--before", type=Path, help="another checkout, whose SQLite store is measured in turn with this one's")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from tests import postgres_lab

    reason = postgres_lab.why_not()
    with report("store") as figures, contextlib.ExitStack() as stack:
        stores = {"sqlite": stack.enter_context(Child(ROOT, "sqlite"))}
        if args.before:
            stores["sqlite_before"] = stack.enter_context(Child(args.before.resolve(), "sqlite"))
        if reason is None:
            server = stack.enter_context(postgres_lab.running(durable=True))
            stores["postgresql"] = stack.enter_context(Child(ROOT, server.database()))
        else:
            figures["postgresql_skipped"] = reason
        # Of each store and action, of each round: wall and CPU time.
        times: dict[str, dict[str, list[tuple[float, float]]]] = {name: {action: [] for action in ACTIONS} for name in stores}
        for number in range(args.rounds):
            for action in ACTIONS:
                count = max(2, args.count // 5) if action in SLOW else args.count
                for name in sorted(stores, reverse=bool(number % 2)):
                    times[name][action].append(stores[name].measure(action, count))
        for name in stores:
            figures[name] = {action: round(statistics.median(wall for wall, _ in times[name][action]), 2) for action in ACTIONS}
        if args.before:
            figures["cpu_to_before"] = {a: ratio(times["sqlite"][a], times["sqlite_before"][a], 1) for a in ACTIONS}
        if reason is None:
            figures["postgresql_to_sqlite"] = {a: ratio(times["postgresql"][a], times["sqlite"][a], 0) for a in ACTIONS}
        figures |= {"chats": CHATS, "messages": MESSAGES, "rounds": args.rounds, "count": args.count}


if __name__ == "__main__":
    main()
