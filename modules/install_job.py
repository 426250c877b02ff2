"""One installation in a process of its own: `python -m modules.install_job SET TARGET [--torch BUILD]`.

Started by modules.installs. It writes one JSON object a line to stdout: {"stage", "fraction", "line"}, at last
{"state": "done" | "failed", "line"}. It ends, with everything it started, when stdin does: a server that is gone leaves no
installer behind, and the next server takes the work up where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
from pathlib import Path

from modules import llamacpp_build
from modules.convert.library import ConverterError, install_converter
from modules.environments import Installer
from modules.overlays import Overlays, env_python
from modules.pip_output import SetupError

BUILD_TARGET = "llama-cpp-python"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="install_job")
    parser.add_argument("set_dir", type=Path)
    parser.add_argument("target")
    parser.add_argument("--torch")
    arguments = parser.parse_args(argv)
    overlays = Overlays(arguments.set_dir, Path(__file__).resolve().parent.parent)
    installer = Installer(overlays, _report, torch=arguments.torch, background=True)
    threading.Thread(target=_end_with_stdin, args=(installer,), daemon=True).start()
    try:
        if arguments.target == BUILD_TARGET:
            state = llamacpp_build.ensure(installer)
        else:
            installer.ensure(arguments.target)
            state = "ok"
            if arguments.target == "llamacpp":
                llamacpp_build.ensure(installer)  # a build that can't be is no failure: xllamacpp is there
            elif arguments.target == "transformers":
                _fetch_converter(overlays)
    except SetupError as error:
        state = str(error)
    except OSError as error:
        state = f"{error.strerror or error}: {error.filename or arguments.target}"
    _send({"state": "done" if state == "ok" else "failed", "line": state})
    return 0 if state == "ok" else 1


def _fetch_converter(overlays: Overlays) -> None:
    """llama.cpp's converter, so that `convert` works offline, too. Without it the backend works: `convert` tries again."""
    env_dir = overlays.env_dir("transformers")
    try:
        install_converter(env_dir, env_python(env_dir), on_line=lambda line: _report("GGUF converter", None, line))
    except ConverterError as error:
        _report("GGUF converter", None, str(error))


def _report(stage: str, fraction: float | None, line: str) -> None:
    _send({"stage": stage, "fraction": fraction, "line": line})


def _send(message: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def _end_with_stdin(installer: Installer) -> None:
    # Not through sys.stdin: a thread that waits in its buffer aborts the interpreter's orderly end.
    while os.read(0, 1):
        pass
    installer.runner.cancel()
    if sys.platform == "win32":
        os._exit(1)
    os.killpg(0, signal.SIGKILL)  # modules.installs made this process the leader of its group


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
