"""What every node of a cluster must have before a model is deployed on it: this code, the backend's environment, the model.

`look` runs on each node by value, so that it works where this code is missing; it imports the standard library only.
"""

from __future__ import annotations

from typing import Any

from modules.errors import BackendUnavailable, IncompatibleModel, ModelNotFound


def look(root: str, python: str | None, path: str | None) -> dict[str, Any]:
    """What is at these paths here: "code", "python", "model" (each file's size and a hash over its name, size, first and last
    MiB; None when there is nothing), "bytes"."""
    import hashlib
    import os

    digest, total = hashlib.sha256(), 0
    files = [path] if path and os.path.isfile(path) else []
    if path and os.path.isdir(path):
        files = sorted(os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names)
    for file in files:
        size = os.path.getsize(file)
        total += size
        digest.update(f"{os.path.relpath(file, path)} {size}\n".encode())
        with open(file, "rb") as stream:
            digest.update(stream.read(1 << 20))
            if size > 1 << 20:
                stream.seek(max(size - (1 << 20), 1 << 20))
                digest.update(stream.read())
    code = hashlib.sha256()
    for name in ("engine_client.py", "protocol.py", "schema.py", "worker.py", "worker_client.py"):
        try:
            with open(os.path.join(root, "modules", name), "rb") as stream:
                code.update(stream.read())
        except OSError:
            code = None  # type: ignore[assignment]
            break
    return {
        "code": code.hexdigest() if code is not None else None,
        "python": python is None or os.path.exists(python),
        "model": digest.hexdigest() if files else None,
        "bytes": total,
    }


def judge(here: dict[str, Any], found: dict[str, dict[str, Any]], root: str, overlay: str, path: str | None) -> None:
    """Raise for the first thing that a node lacks. `found` maps a node's address to its `look`."""
    count = len(found)

    def which(bad: list[str]) -> str:
        return f"{len(bad)} of {count} nodes ({', '.join(sorted(bad)[:4])}{' …' if len(bad) > 4 else ''})"

    if no_code := [node for node, look in found.items() if look["code"] != here["code"]]:
        raise BackendUnavailable(
            f"Switchyard is missing or of another version in {root} on {which(no_code)}.",
            hint="Install the same version in the same folder on every node, or let them share it.",
        )
    if no_python := [node for node, look in found.items() if not look["python"]]:
        raise BackendUnavailable(
            f"The environment {overlay} is not installed on {which(no_python)}.",
            hint=f"Run `install {overlay}` there, in the same folder as here.",
        )
    if path is None:
        return
    if missing := [node for node, look in found.items() if look["model"] is None]:
        raise ModelNotFound(
            f"The model is not at {path} on {which(missing)}.",
            hint="Put the models into a folder that all nodes share under one path, or copy them there (--model-dir names it).",
        )
    if other := [node for node, look in found.items() if look["model"] != here["model"]]:
        sizes = ", ".join(sorted({f"{found[node]['bytes']:,} bytes" for node in other}))
        raise IncompatibleModel(
            f"Another model is at {path} on {which(other)}: {sizes} there, {here['bytes']:,} bytes here, or other content.",
            hint="Copy the model there again.",
        )
