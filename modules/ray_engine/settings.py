"""What `--engine ray` was told, checked in the server and handed to its child processes as JSON."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from modules.errors import ConfigError

if TYPE_CHECKING:
    from modules.config import Config

_ADDRESS = re.compile(r"[A-Za-z0-9._\-\[\]:]+:\d{1,5}")


@dataclass(frozen=True, slots=True)
class RaySettings:
    """`address` is HOST:PORT of a cluster's head, None for a Ray of our own. Each replica reserves `cpus` cores and `gpus` GPUs
    (fractions share one)."""

    address: str | None = None
    minimum: int = 1
    maximum: int = 1
    cpus: float = 1.0
    gpus: float = 0.0
    routing: str = "prefix"

    @classmethod
    def of(cls, config: Config) -> RaySettings:
        """Raises ConfigError."""
        minimum, maximum = parse_replicas(config.ray_replicas)
        address = config.ray_address
        if address is not None and not _ADDRESS.fullmatch(address):
            raise ConfigError(f"--ray-address {address!r} is no HOST:PORT.", hint="The head prints it: such as 10.0.0.5:6379.")
        if config.ray_cpus < 0 or config.ray_gpus < 0:
            raise ConfigError("--ray-cpus and --ray-gpus can't be negative.")
        if config.ray_gpus > 1 and config.ray_gpus % 1:
            raise ConfigError("--ray-gpus above one must be a whole number: a replica can't hold a part of a second GPU.")
        return cls(address, minimum, maximum, config.ray_cpus, config.ray_gpus, config.ray_routing)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> RaySettings:
        return cls(**json.loads(text))


def parse_replicas(text: str) -> tuple[int, int]:
    """ "2" is two replicas, "1:4" between one and four as the load asks. Raises ConfigError."""
    found = re.fullmatch(r"\s*(\d+)\s*(?::\s*(\d+)\s*)?", text)
    if not found or not 1 <= int(found[1]) <= int(found[2] or found[1]) <= 1000:
        raise ConfigError(
            f"--ray-replicas {text!r} is no MIN or MIN:MAX.", hint="Give a number from 1 on, or a range such as 1:4."
        )
    return int(found[1]), int(found[2] or found[1])
