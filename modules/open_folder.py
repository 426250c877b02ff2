"""Show a folder in the desktop's file manager: for a browser on the same machine, when there is a desktop."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from modules.errors import NotSupported

_WAIT_S = 10.0


def opener(platform: str = sys.platform, environ: Mapping[str, str] = os.environ) -> str | None:
    """The program that opens a folder here; "explorer" on Windows; None without a desktop."""
    if platform == "win32":
        return "explorer"
    if platform == "darwin":
        return "open"
    has_screen = bool(environ.get("DISPLAY") or environ.get("WAYLAND_DISPLAY"))
    return "xdg-open" if has_screen and shutil.which("xdg-open", path=environ.get("PATH")) else None


async def open_folder(folder: Path) -> None:
    """Raises NotSupported where there is no desktop or its program refuses."""
    program = opener()
    if program is None:
        raise NotSupported("This machine has no desktop to show a folder on.", hint="Look into the model folder by hand.")
    process = await asyncio.create_subprocess_exec(
        program,
        str(folder),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=sys.platform != "win32",
    )
    try:
        status = await asyncio.wait_for(process.wait(), _WAIT_S)
    except asyncio.TimeoutError:
        return  # some file managers stay in the foreground: it is open
    if status and program != "explorer":  # explorer says 1 when all is well
        raise NotSupported(f"{program} could not open the folder.", hint="Look into the model folder by hand.")
