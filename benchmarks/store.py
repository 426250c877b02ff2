"""The chat store where its user waits for it: SQLite as it is, as it was (--before another checkout), and PostgreSQL beside.

Every figure is a median in milliseconds, with every save on disk (PostgreSQL: on this machine, over a unix socket).
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
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


async def median_ms(action: Callable[[int], Awaitable[Any]], count: int) -> float:
    times = []
    for number in range(count):
        begun = time.perf_counter()
        await action(number)
        times.append(time.perf_counter() - begun)
    return round(statistics.median(times) * 1000, 3)


async def measure(store: Any, count: int) -> dict[str, float]:
    """Fill a new store with CHATS chats, then time what the page does."""
    from modules.chat.store import NewConversation

    await store.open()
    chats = []
    for chat in range(CHATS):
        chats.append((await store.add_conversation(NewConversation(f"Chat {chat}", nodes_of(chat, MESSAGES)))).id)
    longest = (await store.add_conversation(NewConversation("Long", nodes_of(CHATS, 400)))).id
    changes = []

    async def send(number: int) -> None:
        changes.append(await store.add_message(chats[number], "a question", client_id=f"c{number}", generation=f"g{number}"))

    figures = {"send": await median_ms(send, count)}
    node = changes[0].node
    figures["checkpoint_4k"] = await median_ms(lambda n: store.checkpoint(node, "g0", "x" * 4096 + str(n)), count)

    async def finish(n: int) -> None:
        await store.finish(changes[n].node, f"g{n}", text=text_of(n, 1), status="complete")

    figures["finish"] = await median_ms(finish, count)
    figures["open_20"] = await median_ms(lambda n: store.snapshot(chats[-1 - n]), count)
    figures["open_400"] = await median_ms(lambda n: store.snapshot(longest), count)
    figures["list_1000"] = await median_ms(lambda n: store.conversations(), count)
    figures["search_rare"] = await median_ms(lambda n: store.conversations(rare(n * 7)), count)
    figures["search_common"] = await median_ms(lambda n: store.conversations("lighthouse keeper"), max(3, count // 4))
    figures["search_short"] = await median_ms(lambda n: store.conversations("zz"), max(3, count // 4))
    await store.close()
    return figures


def one(place: str, count: int) -> None:
    """In a process of its own, on the checkout that comes first in sys.path."""
    folder = Path(tempfile.mkdtemp(prefix="switchyard-bench-"))
    if "://" in place:
        from modules.chat.store_postgres import PostgresChatStore

        store: Any = PostgresChatStore(place, folder)
    else:
        from modules.chat.store_sqlite import SqliteChatStore

        store = SqliteChatStore(folder)
    print(json.dumps(asyncio.run(measure(store, count))))


def run(tree: Path, place: str, count: int) -> dict[str, float]:
    # The tree's modules first: what is imported later finds them there.
    code = f"import sys; sys.path[:0] = [{str(tree)!r}]; import modules.chat.store_sqlite; "
    code += f"sys.path[:0] = [{str(ROOT / 'benchmarks')!r}]; import store; store.one({place!r}, {count})"
    done = subprocess.run(
        [str(Overlays.find(ROOT).python("parent")), "-c", code], cwd=tree, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return dict(json.loads(done.stdout))


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(statistics.median(r[name] for r in runs), 3) for name in runs[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--count", type=int, default=100, help="actions of each kind")
    parser.add_argument("--before", type=Path, help="another checkout, whose SQLite store is measured in turn with this one's")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from tests import postgres_lab

    reason = postgres_lab.why_not()
    runs: dict[str, list[dict[str, float]]] = {}
    with report("store") as figures:
        for _ in range(args.repetitions):
            if args.before:
                runs.setdefault("sqlite_before", []).append(run(args.before.resolve(), "sqlite", args.count))
            runs.setdefault("sqlite", []).append(run(ROOT, "sqlite", args.count))
            if reason is None:
                with postgres_lab.running(durable=True) as server:
                    runs.setdefault("postgresql", []).append(run(ROOT, server.database(), args.count))
        figures.update({name: medians(found) for name, found in runs.items()})
        for other in ("sqlite_before", "postgresql"):
            if other in figures:
                up, down = ("sqlite", other) if other == "sqlite_before" else (other, "sqlite")
                figures[f"{up}_to_{down}"] = {n: round(figures[up][n] / figures[down][n], 2) for n in figures["sqlite"]}
        figures |= {"chats": CHATS, "messages": MESSAGES, "repetitions": args.repetitions, "count": args.count}
        if reason is not None:
            figures["postgresql_skipped"] = reason


if __name__ == "__main__":
    main()
