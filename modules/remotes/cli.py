"""server.py remote: save other servers as backends, look at them, try them, forget them."""

from __future__ import annotations

import asyncio
import getpass
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modules.errors import AppError, ConfigError, InvalidParameter
from modules.remotes.address import without_password
from modules.remotes.route import MAX_CA
from modules.remotes.store import KINDS, MAX_KEY, RemoteStore, Server, model_id
from modules.remotes.watch import Health, look

if TYPE_CHECKING:
    import argparse

    from modules.config import Config

KEY_VARIABLE = "SWITCHYARD_REMOTE_KEY"
CA_VARIABLE = "SWITCHYARD_REMOTE_CA"
PROXY_VARIABLE = "SWITCHYARD_REMOTE_PROXY"


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "remote",
        help="other servers as backends",
        description="Save a server with an OpenAI-compatible API (vLLM, TGI, llama-server, Ollama, tabbyAPI, another Switchyard) "
        "as a backend; its models are then listed as remote/NAME/MODEL. A running server takes changes at once. The key, where "
        f"one is needed, comes from a file, from ${KEY_VARIABLE}, or is asked for; it is kept in the data folder, for you alone.",
    )
    parser.add_argument("action", choices=("add", "list", "test", "remove"), help="save one, show all, ask one now, forget one")
    parser.add_argument("name", nargs="?", help="what the server is called here, such as gpu-box")
    parser.add_argument("url", nargs="?", help="add: its base address, such as http://192.168.1.20:8000/v1")
    parser.add_argument("--key-file", type=Path, metavar="FILE", help="add: a file that holds the key")
    parser.add_argument("--key", action="store_true", help="add: ask for the key on the terminal")
    parser.add_argument("--kind", choices=KINDS, default="auto", help="add: what it runs, where it does not show by itself")
    parser.add_argument(
        "--ca", type=Path, metavar="FILE", help=f"add: certificates (PEM) of the authorities that count for it; or ${CA_VARIABLE}"
    )
    parser.add_argument(
        "--proxy", metavar="URL", help=f"add: an HTTP proxy to reach it through; with a password better in ${PROXY_VARIABLE}"
    )
    parser.add_argument(
        "--proxy-resolves", action="store_true", help="add: the proxy looks the server's name up, not this machine"
    )
    parser.add_argument("--json", action="store_true", dest="as_json", help="list, test: machine-readable")
    return parser


def run(arguments: argparse.Namespace, config: Config) -> int:
    """Exit status: 0 done, 1 refused, or a server that does not answer."""
    store = RemoteStore(config.user_data_dir)
    try:
        _check_arguments(arguments)
        if arguments.action == "add":
            server = store.add(
                arguments.name,
                arguments.url,
                _key(arguments),
                arguments.kind,
                ca=_ca(arguments),
                proxy=arguments.proxy or os.environ.get(PROXY_VARIABLE),
                proxy_resolves=arguments.proxy_resolves,
            )
            print(f"{server.name} is saved: {server.url}")
            return _report([server], as_json=False)
        if arguments.action == "remove":
            store.remove(arguments.name)
            print(f"{arguments.name} is removed.")
            return 0
        servers = [store.get(arguments.name)] if arguments.name else list(store.servers())
        if not servers and not arguments.as_json:
            print("There are no servers. Add one: server.py remote add NAME URL")
            return 0
        status = _report(servers, as_json=arguments.as_json)
        return status if arguments.action == "test" else 0
    except ConfigError:
        raise
    except AppError as error:
        print(f"Switchyard: {error}", file=sys.stderr)
        return 1


def _check_arguments(arguments: argparse.Namespace) -> None:
    adds = arguments.action == "add"
    if (arguments.action in ("add", "remove")) and arguments.name is None:
        raise InvalidParameter(f"remote {arguments.action} needs a name.", param="name")
    if adds != (arguments.url is not None):
        raise InvalidParameter("remote add needs an address." if adds else "Only remote add takes an address.", param="url")
    if not adds and (arguments.key or arguments.key_file):
        raise InvalidParameter("Only remote add takes a key.", param="key")
    if not adds and (arguments.ca or arguments.proxy or arguments.proxy_resolves):
        raise InvalidParameter("Only remote add takes certificates and a proxy.", param="proxy")


def _key(arguments: argparse.Namespace) -> str | None:
    if arguments.key_file is not None:
        return _text(arguments.key_file, MAX_KEY, "key-file")
    if arguments.key:
        return getpass.getpass(f"Key of {arguments.name}: ")
    return os.environ.get(KEY_VARIABLE)


def _ca(arguments: argparse.Namespace) -> str | None:
    file = arguments.ca or os.environ.get(CA_VARIABLE)
    return _text(Path(file), MAX_CA, "ca") if file else None


def _text(path: Path, limit: int, param: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read(limit + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidParameter(f"{path} can't be read: {error}.", param=param) from error


def _report(servers: list[Server], *, as_json: bool) -> int:
    healths = asyncio.run(_look_at(servers))
    if as_json:
        print(json.dumps([_row(server, health) for server, health in zip(servers, healths, strict=True)], ensure_ascii=False))
    else:
        for server, health in zip(servers, healths, strict=True):
            _print(server, health)
    return int(not all(health.ok for health in healths))


async def _look_at(servers: list[Server]) -> list[Health]:
    return list(await asyncio.gather(*(look(server) for server in servers)))


def _row(server: Server, health: Health) -> dict[str, Any]:
    models = [model_id(server.name, entry["id"]) for entry in health.models]
    state = {"ok": health.ok, "latency_ms": health.latency_ms, "error": health.error}
    return {**server.public(), **state, "models": models, "checked_at": int(health.checked_at)}


def _print(server: Server, health: Health) -> None:
    key = ", with a key" if server.key else ""
    key += ", certificates of its own" if server.ca else ""
    key += f", through {without_password(server.proxy)}" if server.proxy else ""
    if not health.ok:
        print(f"{server.name}  {server.url}{key}\n  no: {health.error}")
        return
    count = len(health.models)
    at = time.strftime("%H:%M:%S", time.localtime(health.checked_at))
    print(f"{server.name}  {server.url}{key}\n  ok at {at}: {health.latency_ms:.0f} ms, {count} model{'s' if count != 1 else ''}")
    for entry in health.models[:20]:
        print(f"  {model_id(server.name, entry['id'])}")
    if count > 20:
        print(f"  … and {count - 20} more")
