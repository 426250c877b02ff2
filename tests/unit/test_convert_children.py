"""Conversion: where the converter comes from, and the child processes that it runs in."""

from __future__ import annotations

import asyncio
import io
import os
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from modules.convert.library import ConverterError, converter_dir, has_converter, install_converter, unpack_converter
from modules.convert.process import run_child
from modules.errors import IncompatibleModel, LoadError, LoadOutOfMemory, UnsafeModel
from modules.schema import LoadProgress

# --- the converter from the source distribution ----------------------------------------------------------------


def sdist(path: Path, extra: dict[str, bytes] | None = None, version: str = "1.0") -> Path:
    root = f"llama_cpp_python-{version}/vendor/llama.cpp/"
    files = {
        root + "convert_hf_to_gguf.py": b"print('converter')",
        root + "conversion/__init__.py": b"",
        root + "gguf-py/gguf/__init__.py": b"",
        root + "LICENSE": b"MIT",
        root + "ggml/src/ggml.c": b"int x;",
        **(extra or {}),
    }
    archive = path / f"llama_cpp_python-{version}.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo(root + "conversion/evil.py")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    return archive


def test_only_the_converters_files_are_unpacked(tmp_path: Path) -> None:
    archive = sdist(tmp_path, {"llama_cpp_python-1.0/vendor/llama.cpp/conversion/../../../../../evil.py": b"x", "/evil.py": b"x"})
    env = tmp_path / "env ü"
    assert not has_converter(env, "1.0")
    folder = install_converter(env, Path(sys.executable), sdist_dir=tmp_path, version="1.0")
    assert folder == converter_dir(env)
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()) == [
        "LICENSE", "VERSION", "conversion/__init__.py", "convert_hf_to_gguf.py", "gguf-py/gguf/__init__.py"
    ]  # fmt: skip
    assert has_converter(env, "1.0")
    assert not has_converter(env, "2.0")
    assert not list(tmp_path.rglob("evil.py"))
    archive.unlink()
    assert install_converter(env, Path("no python needed"), version="1.0") == folder


def test_a_newer_version_replaces_the_old(tmp_path: Path) -> None:
    install_converter(tmp_path / "env", Path(sys.executable), sdist_dir=tmp_path, version=sdist(tmp_path).name[17:20])
    sdist(tmp_path, version="2.0")
    install_converter(tmp_path / "env", Path(sys.executable), sdist_dir=tmp_path, version="2.0")
    assert has_converter(tmp_path / "env", "2.0")


def test_a_torn_or_foreign_archive_leaves_nothing(tmp_path: Path) -> None:
    whole = sdist(tmp_path).read_bytes()
    for data in (whole[: len(whole) // 2], b"no archive", b""):
        (tmp_path / "x.tar.gz").write_bytes(data)
        with pytest.raises(ConverterError):
            unpack_converter(tmp_path / "x.tar.gz", tmp_path / "env", "1.0")
    assert not converter_dir(tmp_path / "env").exists()
    assert not list((tmp_path / "env").rglob("*.part"))


def test_a_failing_pip_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConverterError, match=r"could not be fetched: .*Check the network"):
        install_converter(tmp_path / "env", Path(sys.executable), sdist_dir=tmp_path / "none", version="0.0.0.dev0+absent")


# --- child processes -------------------------------------------------------------------------------------------


@pytest.fixture
def child(tmp_path: Path) -> Any:
    """Run a snippet as the child; its first lines give it a Report."""

    def run(code: str, on_progress: Any = lambda progress: None) -> Any:
        (tmp_path / "snippet.py").write_text(
            f"import sys, os, time, signal\nsys.path.insert(0, {str(Path.cwd())!r})\n"
            f"from modules.convert.children.report import Report\nreport = Report()\n{code}",
            encoding="utf-8",
        )
        return run_child(Path(sys.executable), "snippet", [], dict(os.environ), tmp_path, on_progress)

    return run


def test_a_childs_messages_arrive_whatever_is_printed(child: Any) -> None:
    seen: list[LoadProgress] = []
    code = (
        "print('{\"error\": 1}')\nos.system('echo noise')\nreport.stage('Work', 0.5)\nreport.note('n')\n"
        "report.stage('Work', 1.0)\nreport.done(path='x')"
    )
    result, notes = asyncio.run(child(code, seen.append))
    assert (result, notes) == ({"path": "x"}, ["n"])
    assert seen[0] == LoadProgress("Work", 0.5)
    assert seen[-1].fraction == 1.0


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        (
            "from modules.errors import IncompatibleModel\nreport.error(IncompatibleModel('no', hint='do this'))",
            IncompatibleModel,
            "no do this",
        ),
        ("raise RuntimeError('boom')", LoadError, "boom"),
        ("sys.exit(0)", LoadError, "exit status 0"),
        ("os._exit(3)", LoadError, "exit status 3"),
        ("raise MemoryError", LoadOutOfMemory, "out of memory"),
        ("os.kill(os.getpid(), signal.SIGKILL)", LoadOutOfMemory, "out of memory"),
        ("os.write(report._fd, b'garbage\\n')\ntime.sleep(60)", LoadError, "no message"),
    ],
)
def test_every_end_of_a_child_is_a_typed_error(child: Any, code: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        asyncio.run(child(code))


@pytest.mark.skipif(os.name != "posix", reason="process groups are POSIX")
def test_cancelling_ends_the_child_and_its_children(child: Any, tmp_path: Path) -> None:
    code = (
        "import subprocess\n"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "open('pids', 'w').write(f'{os.getpid()} {p.pid}')\nreport.stage('x')\ntime.sleep(60)"
    )

    async def cancel() -> None:
        task = asyncio.create_task(child(code))
        while not (tmp_path / "pids").exists() or " " not in (tmp_path / "pids").read_text(encoding="utf-8"):
            await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    pids = [int(pid) for pid in (tmp_path / "pids").read_text(encoding="utf-8").split()]
    deadline = time.monotonic() + 5
    while any(_runs(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_runs(pid) for pid in pids)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not (state.exists() and ") Z " in state.read_text(encoding="utf-8", errors="replace"))


@pytest.mark.parametrize(
    "attempt",
    [
        "open('canary', 'w')",
        "os.open('canary', os.O_CREAT | os.O_WRONLY)",
        "os.system('touch canary')",
        "import subprocess; subprocess.run(['touch', 'canary'])",
        "import socket; socket.create_connection(('127.0.0.1', 9))",
        "os.rename('snippet.py', 'canary')",
        "import ctypes; ctypes.CDLL('libc.so.6')",
    ],
)
def test_the_fence_ends_whatever_does_more_than_read(child: Any, tmp_path: Path, attempt: str) -> None:
    code = (
        "from modules.convert.children.pickle_to_safetensors import _fence\n_fence(report)\n"
        f"try:\n    {attempt}\nexcept BaseException:\n    pass\nreport.done()"
    )
    with pytest.raises(UnsafeModel, match="more than load weights"):
        asyncio.run(child(code))
    assert not (tmp_path / "canary").exists()
