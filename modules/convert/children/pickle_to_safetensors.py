"""Turn pickled weights into safetensors, in a throw-away process of the Transformers environment.

    python -m modules.convert.children.pickle_to_safetensors OUT IN [IN …]

Three fences, because each has been climbed before: torch's weights_only unpickler, which builds tensors and nothing else; an
audit hook that ends the process at the first attempt to reach the network, start a program or write a file; limits on memory,
processor time and file size.
"""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path
from typing import Any

from modules.convert.children.report import Report
from modules.errors import AppError, CorruptModel, UnsafeModel

_FORBIDDEN = tuple(
    """socket.connect socket.bind socket.getaddrinfo socket.sendto subprocess.Popen os.system os.exec os.posix_spawn os.spawn
    os.fork os.forkpty os.remove os.rename os.rmdir os.mkdir os.chmod os.symlink os.link os.truncate os.kill os.putenv
    ctypes.dlopen shutil. webbrowser. urllib. http.client.connect pty.spawn""".split()
)
_WRAPPERS = ("state_dict", "model", "module", "params")
_CPU_S = 1800


def main() -> int:
    report = Report()
    sys.dont_write_bytecode = True  # a module that torch imports late would make __pycache__ behind the fence
    out, *sources = (Path(argument) for argument in sys.argv[1:])
    try:
        report.stage("Starting")
        import safetensors.torch
        import torch

        _limit(sum(path.stat().st_size for path in sources))
        _fence(report)
        tensors: dict[str, Any] = {}
        for number, source in enumerate(sources):
            report.stage("Reading the weights", number / len(sources))
            tensors |= _tensors(torch, source)
        report.stage("Writing safetensors")
        # Views of one storage would be refused, and a pickle may hold a slice of a larger one.
        safetensors.torch.save_file(
            {name: value.detach().clone().contiguous() for name, value in tensors.items()}, out, {"format": "pt"}
        )
    except AppError as error:
        report.error(error)
        return 1
    report.done(path=str(out), tensors=len(tensors))
    return 0


def _tensors(torch: Any, source: Path) -> dict[str, Any]:
    try:
        loaded = torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UnsafeModel(
            f"{source.name} holds more than tensors, so it stays refused: {str(error).splitlines()[0][:200]}",
            hint="Look for a copy of the model in safetensors or GGUF.",
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, OSError, AttributeError, IndexError) as error:
        raise CorruptModel(
            f"{source.name} can't be read: {str(error).splitlines()[0][:200]}", hint="Fetch the file again."
        ) from error
    for key in _WRAPPERS:
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict):
        raise CorruptModel(f"{source.name} holds no table of tensors.", hint="It is no model's weights.")
    found = {str(name): value for name, value in loaded.items() if isinstance(value, torch.Tensor)}
    if not found:
        raise CorruptModel(f"{source.name} holds no tensors.", hint="It is no model's weights.")
    return found


def _limit(size: int) -> None:
    """Memory for the weights twice and the libraries; elsewhere than on POSIX the other fences must do."""
    if sys.platform == "win32":
        return
    import resource

    for kind, value in (
        (resource.RLIMIT_AS, 3 * size + 16 * 2**30),
        (resource.RLIMIT_CPU, _CPU_S),
        (resource.RLIMIT_FSIZE, 2 * size + 2**24),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _fence(report: Report) -> None:
    """From here on this process only reads. A hook can't be removed, and its answer can't be caught: the process ends."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and len(arguments) > 2 and isinstance(arguments[2], int) and arguments[2] & _WRITE_FLAGS
        if writes or event.startswith(_FORBIDDEN):
            report.error(
                UnsafeModel(f"The file tried to do more than load weights ({event}); it was stopped.", hint="Delete the file.")
            )
            os._exit(97)

    sys.addaudithook(hook)


_WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


if __name__ == "__main__":
    sys.exit(main())
