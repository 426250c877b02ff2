"""YAML files that people edit: read strictly, written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from pathlib import Path
from typing import Any

import yaml

from modules.errors import ConfigError, StorageError, StorageFull, StorageReadOnly


class _StrictLoader(yaml.SafeLoader):  # type: ignore[misc] # yaml is opaque to mypy here
    """SafeLoader without aliases: a few of them nest into gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it uses aliases (*name)")
        return super().compose_node(parent, index)


def read_yaml(path: Path, limit: int = 256 * 1024) -> Any:
    """The file's content; None for an empty file. Raises ConfigError naming what is wrong, and FileNotFoundError."""
    try:
        with open(path, "rb") as file:
            data = file.read(limit + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ConfigError(f"{path.name} can't be read: {error.strerror or error}.") from error
    if len(data) > limit:
        raise ConfigError(f"{path.name} is larger than {limit // 1024} KB.")
    try:
        return parse_yaml(data.decode("utf-8-sig"))
    except (UnicodeDecodeError, RecursionError, ValueError, yaml.YAMLError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark is not None else ""
        reason = getattr(error, "problem", None) or (str(error).splitlines() or ["it nests too deep"])[0]
        raise ConfigError(f"{path.name} is no valid YAML{where}: {reason}.") from error


def parse_yaml(text: str) -> Any:
    """A text's content, plain data without aliases. Raises ValueError, RecursionError, yaml.YAMLError."""
    return yaml.load(text, Loader=_StrictLoader)


def write_yaml(path: Path, data: Any) -> None:
    """Write beside, sync, rename: a reader or a crash sees the old file or the new one. Raises StorageError's subclasses."""
    text = yaml.safe_dump(data, allow_unicode=True, sort_keys=False, default_flow_style=False)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.stem[:40]}-", suffix=".part", dir=path.parent)
        with open(descriptor, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, _mode(path))
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(OSError):  # the same disk that has just refused
                os.unlink(temporary)
        raise save_error(path.name, error) from error


def save_error(name: str, error: OSError) -> StorageError:
    """Why a file could not be saved, as the product's error."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT if hasattr(errno, "EDQUOT") else errno.ENOSPC):
        return StorageFull(f"The disk is full: {name} was not saved.", hint="Free some space, then save again.")
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EIO):
        return StorageReadOnly(f"{name} was not saved: {error.strerror}.", hint="Check that its folder is there and writable.")
    return StorageError(f"{name} was not saved: {error.strerror or error}.")


def keep_bad(path: Path) -> str:
    """Copy a file with problems to NAME.bad, so that the next save loses nothing. Returns what was done, as a sentence's end."""
    target = path.with_name(path.name + ".bad")
    try:
        target.write_bytes(path.read_bytes())
    except OSError as error:
        return f"could not be copied to {target.name} ({error.strerror})"
    return f"was copied to {target.name}"


def _mode(path: Path) -> int:
    """mkstemp makes 0600; a file that was shared stays so."""
    try:
        return path.stat().st_mode & 0o777
    except OSError:
        return 0o644
