"""The table of the server's options.

`Config`'s fields are its rows: name, type, default, help, group, flags. The command line parser, the environment names, the
settings file's keys and the commented sample file are loops over it (modules.command_line). A loader's options are not here: they
come from its `LoaderSpec.options`, under the same flags and precedence, and end in `Config.loader_options` (only those given).
Flags keep text-generation-webui's names where they mean the same.
"""

from __future__ import annotations

import argparse  # noqa: TC003 - the annotations of Config are read at run time
import dataclasses
import ipaddress
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modules.errors import ConfigError
from modules.options import ROOT, Kind, Option
from modules.ray_engine.settings import RaySettings

if typing.TYPE_CHECKING:
    from modules.schema import OptionSpec

LOOPBACK_HOST = "127.0.0.1"
TORCH_HELP = "Torch build to install: auto, cpu, cu126, cu130, rocm7.2, xpu, mps. Read by the start scripts."


def _option(
    default: Any,
    help: str,
    group: str,
    *,
    aliases: tuple[str, ...] = (),
    metavar: str = "",
    choices: tuple[str, ...] = (),
    secret: bool = False,
) -> Any:
    meta = {"help": help, "group": group, "aliases": aliases, "metavar": metavar, "choices": choices}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: tuple(default), metadata=meta)
    return dataclasses.field(default=default, metadata=meta, repr=not secret)


@dataclass(frozen=True)
class Config:
    """Everything the server is told at start. Build it with `command_line.parse` or, in tests, directly."""

    # Where to listen
    listen: bool = _option(False, "Listen on every network interface. Needs a key: `keys create`, or --api-key.", "Server")
    listen_host: str | None = _option(None, "Address to listen on, instead of 127.0.0.1.", "Server", metavar="ADDRESS")
    listen_port: int = _option(7860, "Port of the page and the API.", "Server", aliases=("port",))
    allowed_hosts: tuple[str, ...] = _option(
        [], "More names a browser may call this server by (Host header).", "Server", metavar="NAME"
    )
    allowed_origins: tuple[str, ...] = _option([], "Web pages of other sites that may call the API.", "Server", metavar="ORIGIN")
    subpath: str = _option("", "Path under which a reverse proxy serves this, such as /switchyard.", "Server", metavar="PATH")
    ssl_keyfile: Path | None = _option(None, "TLS private key.", "Server", metavar="FILE")
    ssl_certfile: Path | None = _option(None, "TLS certificate.", "Server", metavar="FILE")
    auto_launch: bool = _option(False, "Open the page in a browser when it is ready.", "Server")
    nowebui: bool = _option(False, "The API only, without the page.", "Server")
    api_key: str | None = _option(
        None,
        "Key that clients must send (Authorization: Bearer KEY), beside those of `keys`.",
        "Server",
        metavar="KEY",
        secret=True,
    )
    admin_key: str | None = _option(
        None, "Key for loading and unloading models; default: the API key.", "Server", metavar="KEY", secret=True
    )
    i_know: bool = _option(False, "Listen beyond this machine without a key. Anyone in reach can use and stop it.", "Server")
    max_body_mb: int = _option(10, "Largest request body, in MB.", "Server")
    verbose: bool = _option(False, "Log every request and the prompts.", "Server")

    # Models
    model: str | None = _option(None, "Model to load at start: a name under --model-dir. Default: the bundled one.", "Models")
    no_model: bool = _option(False, "Start without loading a model.", "Models")
    loader: str | None = _option(None, "Backend to load it with. Default: the best that can take it.", "Models")
    model_dir: Path = _option(ROOT / "models", "Folder with the models.", "Models", metavar="DIR")
    lora: tuple[str, ...] = _option([], "LoRA adapters to apply: names under --lora-dir.", "Models", metavar="NAME")
    lora_dir: Path = _option(ROOT / "loras", "Folder with LoRA adapters.", "Models", metavar="DIR")
    idle_timeout: float = _option(0.0, "Unload a model after so many minutes without a request; 0: never.", "Models")
    max_models: int = _option(0, "Models kept loaded at once; 0: as memory allows.", "Models")
    model_switch: str = _option(
        "on",
        "May an API request load the model it names: off, ask (the request waits for a yes on the page), on.",
        "Models",
        choices=("off", "ask", "on"),
    )
    load_anyway: bool = _option(False, "Load models that the planner finds too large for this machine.", "Models")
    fetch_images: bool = _option(
        False, "Fetch images that a request names by http(s) URL, from public addresses only. Off: data: URLs only.", "Models"
    )
    strict_parameters: bool = _option(False, "Refuse a request with a parameter the backend can't honour.", "Models")

    # Scale-out
    engine: str = _option(
        "local",
        "Where models run: local (a worker each) or ray (replicas on Ray Serve; docs/scaling.md).",
        "Scale-out",
        choices=("local", "ray"),
    )
    ray_address: str | None = _option(
        None, "Ray cluster to join, HOST:PORT of its head. Default: a Ray of our own, here.", "Scale-out", metavar="ADDRESS"
    )
    ray_replicas: str = _option(
        "1", "Replicas of each model: a number, or MIN:MAX to let the load decide.", "Scale-out", metavar="MIN[:MAX]"
    )
    ray_cpus: float = _option(1.0, "CPU cores that each replica reserves in the cluster.", "Scale-out")
    ray_gpus: float = _option(0.0, "GPUs for each replica; 0.5 lets two share one.", "Scale-out")
    ray_routing: str = _option(
        "prefix",
        "Which replica takes a request: prefix (the one that knows its beginning), least-loaded, power-of-two (Serve's own).",
        "Scale-out",
        choices=("prefix", "least-loaded", "power-of-two"),
    )

    # Data
    user_data_dir: Path = _option(ROOT / "user_data", "Folder with chats, settings and logs.", "Data", metavar="DIR")
    database_url: str | None = _option(
        None,
        "Keep chats in PostgreSQL instead of the data folder: postgresql://user@host/database, or @FILE that holds such a line. "
        "Several servers may share it. A password is safer in that file, SWITCHYARD_DATABASE_URL or ~/.pgpass than in a flag.",
        "Data",
        metavar="URL",
        secret=True,
    )
    preset_dir: Path = _option(ROOT / "presets", "Folder with generation presets.", "Data", metavar="DIR")
    settings: Path | None = _option(
        None, "Settings file (YAML), keys as in --print-config. Default: config.yaml in the data folder.", "Data", metavar="FILE"
    )
    extensions: tuple[str, ...] = _option([], "Extensions to load, in this order.", "Data", metavar="NAME")

    # Downloads
    hub_endpoint: str | None = _option(
        None, "Hub to download from, such as a mirror. Default: HF_ENDPOINT, else the public one.", "Downloads", metavar="URL"
    )
    hub_proxy: str | None = _option(None, "Proxy for downloads. Default: HTTPS_PROXY and HTTP_PROXY.", "Downloads", metavar="URL")

    # Set-up
    torch: str = _option("auto", TORCH_HELP, "Set-up", metavar="BUILD")
    background_install: bool = _option(True, "Go on installing missing default backends while serving.", "Set-up")

    # Not on the command line
    loader_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    explicit: frozenset[str] = frozenset()
    command: str = "serve"
    arguments: argparse.Namespace | None = None
    warnings: tuple[str, ...] = ()

    @property
    def host(self) -> str:
        """The address to bind."""
        return self.listen_host or ("0.0.0.0" if self.listen else LOOPBACK_HOST)

    @property
    def is_loopback(self) -> bool:
        return _is_loopback(self.host)

    @property
    def url(self) -> str:
        """Where a browser on this machine finds the page."""
        scheme = "https" if self.ssl_certfile else "http"
        host = LOOPBACK_HOST if self.host in ("0.0.0.0", "::", "localhost") else self.host
        host = f"[{host}]" if ":" in host else host
        return f"{scheme}://{host}:{self.listen_port}{self.subpath}"

    @property
    def model_dirs(self) -> tuple[Path, ...]:
        """Where models are looked for: the user's folder, then the one with the bundled model."""
        return tuple(dict.fromkeys((self.model_dir, ROOT / "models")))

    def options_for(self, options: Sequence[OptionSpec]) -> dict[str, Any]:
        """What the user gave, of one loader's options, under that loader's own names."""
        given = {**self.loader_options, **({"lora": self.lora_paths} if self.lora else {})}
        return {o.name: given[name] for o in options for name in (o.name, *o.aliases) if name in given}

    @property
    def lora_paths(self) -> tuple[str, ...]:
        """The adapters of --lora: each a name under --lora-dir, or a path of its own."""
        return tuple(str(self.lora_dir / name if (self.lora_dir / name).exists() else Path(name)) for name in self.lora)


# --- the table as rows -----------------------------------------------------------------------------------------

_INTERNAL = frozenset({"loader_options", "explicit", "command", "arguments", "warnings"})


def server_options() -> list[Option]:
    """The server's own rows."""
    hints = typing.get_type_hints(Config)
    return [
        Option(
            field.name,
            _kind(hints[field.name]),
            () if field.default is dataclasses.MISSING else field.default,
            **{key: field.metadata[key] for key in ("help", "group", "aliases", "metavar", "choices")},
        )
        for field in dataclasses.fields(Config)
        if field.name not in _INTERNAL
    ]


def _kind(hint: Any) -> Kind:
    if typing.get_origin(hint) is tuple:
        return "list"
    args = [a for a in typing.get_args(hint) if a is not type(None)] or [hint]
    kinds: dict[Any, Kind] = {bool: "bool", int: "int", float: "float", str: "str", Path: "path"}
    return kinds[args[0]]


def loader_option_rows() -> list[Option]:
    """The loaders' options as rows, one per name: two loaders may share a name, as `n_gpu_layers` does."""
    from modules.registry import discover

    taken = {name for option in server_options() for name in (option.name, *option.aliases)}
    rows: dict[str, Option] = {}
    owners: dict[str, list[str]] = {}
    for spec in discover().values():
        for option in spec.options:
            if option.name in taken:
                continue  # `lora`: the server's own row, which options_for hands on
            owners.setdefault(option.name, []).append(spec.title)
            known = rows.get(option.name)
            choices = tuple(dict.fromkeys((*(known.choices if known else ()), *option.choices)))
            aliases = tuple(dict.fromkeys((*(known.aliases if known else ()), *option.aliases)))
            rows[option.name] = Option(
                option.name, _OPTION_KINDS[option.kind], option.default, option.help, "Loading a model", aliases, "", choices
            )
    return [
        dataclasses.replace(row, help=f"{row.help} ({', '.join(owners[name])})") for name, row in _drop_taken(rows, taken).items()
    ]


_OPTION_KINDS: dict[str, Kind] = {
    "bool": "bool",
    "int": "int",
    "float": "float",
    "str": "str",
    "choice": "str",
    "path": "str",
    "paths": "list",
}


def _drop_taken(rows: dict[str, Option], taken: set[str]) -> dict[str, Option]:
    """Without aliases that another row has as its name or had first."""
    seen = taken | rows.keys()
    result = {}
    for name, row in rows.items():
        aliases = tuple(a for a in row.aliases if a.replace("-", "_") not in seen)
        seen |= {a.replace("-", "_") for a in aliases}
        result[name] = dataclasses.replace(row, aliases=aliases)
    return result


# --- checks ----------------------------------------------------------------------------------------------------


def check(config: Config) -> None:
    """Raises ConfigError for what the options can't be together."""
    if not 0 <= config.listen_port <= 65535:
        raise ConfigError(f"--listen-port must be between 0 and 65535, not {config.listen_port}.")
    if config.idle_timeout < 0 or config.max_models < 0 or config.max_body_mb < 1:
        raise ConfigError("--idle-timeout and --max-models can't be negative, and --max-body-mb is at least 1.")
    if config.engine == "ray":
        RaySettings.of(config)
    elif asked := [f.name for f in dataclasses.fields(config) if f.name[:4] == "ray_" and getattr(config, f.name) != f.default]:
        raise ConfigError(f"--{asked[0].replace('_', '-')} is for --engine ray.", hint="Add --engine ray.")
    if (config.ssl_keyfile is None) != (config.ssl_certfile is None):
        raise ConfigError("TLS needs both --ssl-keyfile and --ssl-certfile.")
    for name in ("ssl_keyfile", "ssl_certfile"):
        path = getattr(config, name)
        if path is not None and not path.is_file():
            raise ConfigError(f"--{name.replace('_', '-')}: there is no file {path}.")
    if config.command == "serve" and not config.is_loopback and not config.i_know and not _has_key(config):
        raise ConfigError(
            f"Listening on {config.host} without an API key would let anyone in reach use this server.",
            hint="Make one with `server.py keys create NAME`, or add --api-key KEY; --i-know does it all the same.",
        )
    if config.subpath and not config.subpath.startswith("/"):
        raise ConfigError(f"--subpath must begin with a slash: /{config.subpath}")


def _has_key(config: Config) -> bool:
    from modules.keys import KeyStore

    return bool(config.api_key or config.admin_key or KeyStore(config.user_data_dir).keys())


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
