"""A PostgreSQL server of the test's own: in a temporary folder, on a unix socket, as a user that is not root."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

USER, PASSWORD = "switchyard", "s3cret-pässword"
_numbers = itertools.count()


def binaries() -> Path | None:
    """The folder with initdb and postgres, newest version first; None where there is none. Debian keeps it off the PATH."""
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda p: int(p.parent.name) if p.parent.name.isdigit() else 0)
    found = shutil.which("initdb")
    for folder in [*reversed(debian), *([Path(found).resolve().parent] if found else [])]:
        if (folder / "initdb").is_file() and (folder / "postgres").is_file():
            return folder
    return None


def why_not() -> str | None:
    """Why no server can be started here, None when one can."""
    if sys.platform == "win32":
        return "needs unix sockets"
    if binaries() is None:
        return "PostgreSQL is not installed (Debian: apt-get install postgresql)"
    if os.geteuid() == 0 and _other_user() is None:
        return "PostgreSQL does not run as root, and there is no user postgres or nobody"
    return None


def _other_user() -> str | None:
    import pwd

    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name).pw_name
    return None


class Postgres:
    """A running server. `database()` gives the URL of a new, empty database."""

    def __init__(self, folder: Path, durable: bool = False) -> None:
        self._durable = durable
        folder_of_binaries = binaries()
        assert folder_of_binaries is not None
        self._binaries = folder_of_binaries
        self.folder = folder
        self._user: dict[str, Any] = {}
        if os.geteuid() == 0:
            name = _other_user() or "nobody"
            self._user = {"user": name, "extra_groups": []}
            shutil.chown(folder, name)
        secret = folder / "password"
        secret.write_text(PASSWORD, encoding="utf-8")
        command = [self._binaries / "initdb", "-D", folder / "data", "-U", USER, "--pwfile", secret, "-A", "scram-sha-256"]
        subprocess.run(
            [*map(str, command), "-E", "UTF8", "--locale", "C", "--no-sync"],
            check=True, capture_output=True, cwd=folder, **self._user,
        )  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Ready when it returns. Unless durable, what is committed survives a kill, not a power cut: no test checks its disk."""
        settings = {
            "listen_addresses": "", "unix_socket_directories": str(self.folder), "max_connections": "60",
        }  # fmt: skip
        if not self._durable:
            settings |= {"fsync": "off", "full_page_writes": "off", "autovacuum": "off", "shared_buffers": "16MB"}
        command = [str(self._binaries / "postgres"), "-D", str(self.folder / "data")]
        for name, value in settings.items():
            command += ["-c", f"{name}={value}"]
        self._process = subprocess.Popen(
            command, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **self._user
        )
        assert self._process.stderr is not None
        said = b""
        for line in self._process.stderr:
            said += line
            if b"ready to accept connections" in line:
                break
        else:
            raise AssertionError(f"PostgreSQL did not start: {said.decode(errors='replace')}")

    def stop(self, kill: bool = False) -> None:
        """Fast shutdown, which cuts every connection; or as a crash leaves it."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT if kill else signal.SIGINT)
            assert self._process.stderr is not None
            self._process.stderr.read()
            self._process.wait()
            self._process.stderr.close()
            self._process = None

    def url(self, database: str, user: str = USER, password: str = PASSWORD) -> str:
        from sqlalchemy import URL

        made = URL.create("postgresql", user, password, database=database, query={"host": str(self.folder)})
        return made.render_as_string(hide_password=False)

    def database(self) -> str:
        name = f"chats_{os.getpid()}_{next(_numbers)}"
        self.sql("postgres", f"CREATE DATABASE {name} TEMPLATE template0")
        return self.url(name)

    def sql(self, database: str, statement: str) -> list[tuple[Any, ...]]:
        """Run one statement as the superuser, in a connection of its own."""
        import psycopg

        with psycopg.connect(self.url(database), autocommit=True) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []


@contextlib.contextmanager
def running(durable: bool = False) -> Iterator[Postgres]:
    # Not pytest's own folder: another user can't enter that, and a socket's path must be short.
    folder = Path(tempfile.mkdtemp(prefix="pg-"))
    server = None
    try:
        server = Postgres(folder, durable)
        yield server
    finally:
        if server is not None:
            server.stop(kill=True)  # what it would write in an orderly end is removed at once
        shutil.rmtree(folder, ignore_errors=True)
