"""llama.cpp's own converter, put into the Transformers environment.

convert_hf_to_gguf.py with its `conversion` and `gguf` packages is inside llama-cpp-python's source distribution and in no
wheel. pip fetches the source distribution (through the user's pip settings and mirrors, checked against the index's hash);
nothing is built. The converter's Python files are unpacked into `<environment>/share/llama.cpp-converter`.

Standard library only: the installer calls `install_converter` while it makes the environment.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

LLAMA_CPP_PYTHON = "0.3.36"
ENTRY = "convert_hf_to_gguf.py"
VERSION_FILE = "VERSION"
_MEMBER = re.compile(
    r"[^/]+/vendor/llama\.cpp/(convert_(?:hf|lora)_to_gguf\.py|LICENSE|conversion/\w+\.py|gguf-py/(?:LICENSE|gguf/\w+\.py))"
)
_MAX_MEMBER_BYTES = 20_000_000
_MAX_TOTAL_BYTES = 60_000_000


class ConverterError(Exception):
    """The converter could not be fetched or unpacked; one line that says what to do."""


def converter_dir(env_dir: Path) -> Path:
    """Where the converter of an environment lies."""
    return env_dir / "share" / "llama.cpp-converter"


def has_converter(env_dir: Path, version: str = LLAMA_CPP_PYTHON) -> bool:
    folder = converter_dir(env_dir)
    try:
        return (folder / VERSION_FILE).read_text(encoding="utf-8").strip() == version and (folder / ENTRY).is_file()
    except OSError:
        return False


def install_converter(
    env_dir: Path,
    python: Path,
    *,
    sdist_dir: Path | None = None,
    version: str = LLAMA_CPP_PYTHON,
    on_line: Callable[[str], None] | None = None,
) -> Path:
    """Put the converter into the environment `env_dir`, unless this version is there; return its folder.

    `python` is an interpreter with pip. `sdist_dir` is looked in first and keeps the source distribution for the build of
    llama-cpp-python, which needs the same file. Raises ConverterError.
    """
    if has_converter(env_dir, version):
        return converter_dir(env_dir)
    with contextlib.ExitStack() as stack:
        folder = sdist_dir or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="switchyard-sdist-")))
        archive = _sdist_in(folder, version) or _download(python, folder, version, on_line or (lambda line: None))
        return unpack_converter(archive, env_dir, version)


def _sdist_in(folder: Path, version: str) -> Path | None:
    found = folder / f"llama_cpp_python-{version}.tar.gz"
    return found if found.is_file() else None


def _download(python: Path, folder: Path, version: str, on_line: Callable[[str], None]) -> Path:
    """`pip download` reads the package's metadata but compiles nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    package = "llama-cpp-python"
    command = [
        str(python),
        "-m",
        "pip",
        "download",
        "--progress-bar",
        "off",  # its bars are no lines
        "--no-deps",
        "--no-binary",
        package,
        f"{package}=={version}",
        "--dest",
        str(folder),
    ]
    on_line(f"Fetching {package} {version} (source) for its GGUF converter")
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
    )
    tail: list[str] = []
    with process:
        for line in process.stdout or ():
            tail = [*tail[-9:], line.strip()]
            on_line(line.strip())
    found = _sdist_in(folder, version)
    if process.returncode or found is None:
        reason = next((line for line in reversed(tail) if "error" in line.lower()), tail[-1] if tail else "no output")
        raise ConverterError(f"The GGUF converter could not be fetched: {reason}. Check the network and install again.")
    return found


def unpack_converter(archive: Path, env_dir: Path, version: str = LLAMA_CPP_PYTHON) -> Path:
    """Unpack the converter's files from the source distribution `archive`; complete or not at all. Raises ConverterError."""
    target = converter_dir(env_dir)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    total = 0
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                match = _MEMBER.fullmatch(member.name)
                if not match or not member.isreg():
                    continue
                total += member.size
                source = tar.extractfile(member)
                if source is None or member.size > _MAX_MEMBER_BYTES or total > _MAX_TOTAL_BYTES:
                    raise ConverterError(f"The source distribution holds an unexpected {member.name}.")
                path = part.joinpath(*PurePosixPath(match[1]).parts)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(source.read())
    except (OSError, tarfile.TarError, EOFError) as error:
        shutil.rmtree(part, ignore_errors=True)
        raise ConverterError(
            f"The source distribution {archive.name} can't be unpacked: {error}. Delete it and install again."
        ) from error
    if not (part / ENTRY).is_file() or not (part / "gguf-py" / "gguf").is_dir():
        shutil.rmtree(part, ignore_errors=True)
        raise ConverterError(f"The source distribution {archive.name} holds no {ENTRY}.")
    (part / VERSION_FILE).write_text(version + "\n", encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    os.replace(part, target)
    return target
