"""PostgreSQL behind the chat store: the connections, the SQL that is its own, and its failures as the product's.

Imported only with a database URL: SQLAlchemy and psycopg cost a plain start half a second.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import sqlalchemy
from sqlalchemy.exc import ArgumentError, DBAPIError

from modules.chat.schema_sql import APPLICATION_ID, POSTGRESQL_MIGRATIONS, Migration, add_images_postgresql
from modules.chat.store_search import Search
from modules.errors import ConfigError, StorageError, StorageFull, StorageReadOnly, StorageUnreachable, StoreLocked

if TYPE_CHECKING:
    from modules.chat.database import Database, Row

SCHEMA = "switchyard"
CONNECTIONS = 4
CONNECT_S = 5
"""Seconds until a host that does not answer counts as away."""
_SETTINGS = {
    "search_path": SCHEMA,
    "statement_timeout": "30s",
    "lock_timeout": "10s",
    "idle_in_transaction_session_timeout": "60s",  # a server that hangs must not hold a conversation for ever
    "client_encoding": "UTF8",
}


def parse_url(text: str) -> sqlalchemy.URL:
    """Raises ConfigError, which never repeats the text: it may hold a password."""
    try:
        url = sqlalchemy.make_url(text)
    except (ArgumentError, ValueError):
        raise ConfigError("--database-url is no URL.", hint="It looks like postgresql://user@host/database.") from None
    if url.get_backend_name() not in ("postgresql", "postgres"):
        raise ConfigError(
            f"--database-url: {url.get_backend_name()} is not supported.",
            hint="Use postgresql://user@host/database, or leave it out for SQLite in the data folder.",
        )
    return url.set(drivername="postgresql+psycopg")


def connect_engine(url: sqlalchemy.URL) -> sqlalchemy.Engine:
    """A pool that opens nothing yet."""
    options = " ".join([str(url.query.get("options", "")), *(f"-c {name}={value}" for name, value in _SETTINGS.items())])
    network = {"keepalives_idle": 20, "keepalives_interval": 5, "keepalives_count": 3, "tcp_user_timeout": 20_000}
    defaults = {"connect_timeout": CONNECT_S, "application_name": "switchyard", **network}
    arguments = {**{name: value for name, value in defaults.items() if name not in url.query}, "options": options.strip()}
    return sqlalchemy.create_engine(
        url.difference_update_query(["options"]),
        connect_args=arguments,
        pool_size=CONNECTIONS,
        max_overflow=1,  # the server's own session
        pool_timeout=30,
        hide_parameters=True,
    )


@functools.lru_cache(maxsize=512)
def _text(sql: str) -> sqlalchemy.TextClause:
    return sqlalchemy.text(sql)


class PostgresDatabase:
    """One open transaction (see `modules.chat.database`). A writer holds the conversation it changes by a lock on its row."""

    def __init__(self, connection: sqlalchemy.Connection) -> None:
        self._connection = connection

    def all(self, sql: str, **values: Any) -> Sequence[Row]:
        return self._connection.execute(_text(sql), _storable(values)).mappings().all()

    def one(self, sql: str, **values: Any) -> Row | None:
        return self._connection.execute(_text(sql), _storable(values)).mappings().first()

    def run(self, sql: str, **values: Any) -> int:
        return self._connection.execute(_text(sql), _storable(values)).rowcount

    def many(self, sql: str, values: Sequence[dict[str, Any]]) -> None:
        if values:
            self._connection.execute(_text(sql), [_storable(row) for row in values])

    def pick(self, select: str, column: str, values: Sequence[str] | Sequence[int]) -> Sequence[Row]:
        return self.all(f"{select} WHERE {column} = ANY(:values)", values=list(values)) if values else []

    def hold(self, conversation: str) -> None:
        self.run("SELECT id FROM conversations WHERE id = :id FOR UPDATE", id=conversation)

    def hold_of(self, node: str) -> None:
        self.run("SELECT id FROM conversations WHERE id = (SELECT conversation FROM nodes WHERE id = :id) FOR UPDATE", id=node)

    def count_change(self) -> int:
        row = self.one("SELECT nextval('touched') AS number")
        assert row is not None
        return int(row["number"])

    def count_from(self, touched: int, seq: int) -> None:
        self.one("SELECT setval('touched', :number)", number=max(1, touched))
        self.one("SELECT setval(pg_get_serial_sequence('nodes', 'seq'), :number)", number=max(1, seq))

    def image(self, name: str) -> bytes | None:
        row = self.one("SELECT data FROM images WHERE name = :name", name=name)
        return bytes(row["data"]) if row is not None else None

    def put_image(self, name: str, data: bytes, now: float) -> None:
        self.run(
            "INSERT INTO images (name, uploads, touched, data) VALUES (:name, 1, :now, :data) "
            "ON CONFLICT (name) DO UPDATE SET uploads = images.uploads + 1, touched = excluded.touched",
            name=name,
            now=now,
            data=data,
        )

    def hold_images(self, names: Sequence[str]) -> None:
        # In one order, so that two transactions never wait for each other.
        self.all("SELECT name FROM images WHERE name = ANY(:names) ORDER BY name FOR UPDATE", names=list(names))

    def drop_images(self, names: Sequence[str]) -> None:
        self.run("DELETE FROM images WHERE name = ANY(:names)", names=list(names))


def _storable(values: dict[str, Any]) -> dict[str, Any]:
    """PostgreSQL's text has no NUL, and a model may write one."""
    return {name: value.replace("\0", "") if isinstance(value, str) else value for name, value in values.items()}


class PostgresSearch(Search):
    """Texts case folded as Python folds them, whatever the database's locale; found by LIKE, with pg_trgm's index where it is."""

    def prepare(self, db: Database) -> None:
        unindexed = "SELECT id FROM nodes WHERE indexed = 0 AND status <> 'generating' LIMIT 500"
        while rows := db.all(unindexed):
            self.add(db, [row["id"] for row in rows])

    def add(self, db: Database, nodes: Sequence[str]) -> None:
        found = db.pick("SELECT id, seq, text, status FROM nodes", "id", nodes)
        rows = [{"seq": row["seq"], "folded": row["text"].casefold()} for row in found if row["status"] != "generating"]
        db.many(
            "INSERT INTO nodes_text (seq, folded) VALUES (:seq, :folded) "
            "ON CONFLICT (seq) DO UPDATE SET folded = excluded.folded",
            rows,
        )
        db.many("UPDATE nodes SET indexed = 1 WHERE seq = :seq", [{"seq": row["seq"]} for row in rows])

    def forget(self, db: Database, conversation: str) -> None:
        """They go with their nodes."""

    def matches(self, db: Database, words: list[str]) -> dict[str, int]:
        values = {f"w{n}": f"%{_escaped(word)}%" for n, word in enumerate(words)}
        like = "".join(f" AND t.folded LIKE :{name}" for name in values)
        of = f"FROM nodes_text t JOIN nodes n ON n.seq = t.seq WHERE n.deleted IS NULL{like} GROUP BY n.conversation"
        found = {row["conversation"]: row["seq"] for row in db.all(f"SELECT n.conversation, max(n.seq) AS seq {of}", **values)}
        # What is being written now: a few.
        for row in db.all("SELECT conversation, seq, text FROM nodes WHERE indexed = 0 AND deleted IS NULL"):
            folded = row["text"].casefold()
            if all(word in folded for word in words):
                found[row["conversation"]] = max(row["seq"], found.get(row["conversation"], 0))
        return found


def _escaped(word: str) -> str:
    return word.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")


# --- the schema ------------------------------------------------------------------------------------------------------


class _Driver:
    """A connection as a migration sees it."""

    def __init__(self, connection: sqlalchemy.Connection) -> None:
        self._connection = connection

    def execute(self, sql: str, /) -> Any:
        return self._connection.exec_driver_sql(sql)


def migrate(engine: sqlalchemy.Engine, migrations: tuple[Migration, ...] = POSTGRESQL_MIGRATIONS) -> None:
    """Bring the database to the newest schema in one transaction, one server at a time.

    Raises StorageError for a database that is newer, StoreLocked while servers of the older version use it.
    """
    with engine.begin() as connection:
        db = PostgresDatabase(connection)
        row = connection.exec_driver_sql("SHOW server_encoding").one()
        if row[0] != "UTF8":
            raise StorageError(
                f"The database's encoding is {row[0]}: it can't hold every text.", hint="Make one with ENCODING 'UTF8'."
            )
        db.run("SELECT pg_advisory_xact_lock(:key, 0)", key=APPLICATION_ID)
        if db.one("SELECT to_regnamespace(:name) AS found", name=SCHEMA)["found"] is None:  # type: ignore[index]
            connection.exec_driver_sql(f"CREATE SCHEMA {SCHEMA}")
        version = schema_version(db)
        if version > len(migrations):
            raise StorageError(
                f"The database was written by a newer version (schema {version}, this one knows {len(migrations)}) "
                "and was left alone.",
                hint="Update this server, or choose another database.",
            )
        db.run("SET LOCAL statement_timeout = 0")
        if version == len(migrations):
            _add_images(db, connection)
            return
        if version and (others := living(db)):
            raise StoreLocked(
                f"The database has to be brought to a newer schema, and {len(others)} servers of the older version use it.",
                hint="Stop them, start this one, then start the others with the new version.",
            )
        for step in migrations[version:]:
            step(_Driver(connection))
        db.run("INSERT INTO meta (key, value) VALUES ('schema', :version) ON CONFLICT (key) DO UPDATE SET value = excluded.value",
               version=str(len(migrations)))  # fmt: skip
        _add_images(db, connection)


def _add_images(db: Database, connection: sqlalchemy.Connection) -> None:
    """Looked for first: to make the index if it is not there would hold up every writer, though it is there."""
    found = db.one("SELECT to_regclass(:name) AS found", name=f"{SCHEMA}.images")
    if found is None or found["found"] is None:
        add_images_postgresql(_Driver(connection))


def schema_version(db: Database) -> int:
    """0 where there are no tables yet."""
    found = db.one("SELECT to_regclass(:name) AS found", name=f"{SCHEMA}.meta")
    row = db.one("SELECT value FROM meta WHERE key = 'schema'") if found and found["found"] is not None else None
    return int(row["value"]) if row else 0


def index_trigrams(engine: sqlalchemy.Engine) -> StorageError | None:
    """Make search fast, where the server has pg_trgm and lets us; otherwise why not."""
    try:
        with engine.begin() as connection:
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({APPLICATION_ID}, 0)")
            connection.exec_driver_sql("CREATE EXTENSION IF NOT EXISTS pg_trgm")
            connection.exec_driver_sql("SET LOCAL statement_timeout = 0")
            index = "CREATE INDEX IF NOT EXISTS nodes_text_trigrams ON nodes_text"
            connection.exec_driver_sql(f"{index} USING gin (folded gin_trgm_ops)")
    except DBAPIError as error:
        return storage_error(error)
    return None


def living(db: Database) -> set[int]:
    """The numbers of the servers that live: each holds an advisory lock by its session, which ends when the server does."""
    return {int(row["number"]) for row in db.all(f"{_LIVING} AND objid <> 0", key=APPLICATION_ID)}


_LIVING = """
SELECT objid AS number FROM pg_locks
WHERE locktype = 'advisory' AND granted AND objsubid = 2 AND classid = CAST(:key AS oid)
AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""


def interrupt_dead(db: Database) -> Sequence[Row]:
    """Mark the answers whose server has ended; their conversations. The generation stays theirs: a server that was only cut off
    comes back and goes on writing."""
    return db.all(_INTERRUPT_DEAD, key=APPLICATION_ID)


_INTERRUPT_DEAD = f"""
UPDATE nodes SET status = 'interrupted' WHERE status = 'generating'
AND split_part(generation, '/', 1) NOT IN (SELECT CAST(number AS TEXT) FROM ({_LIVING}) living) RETURNING conversation
"""


def interrupt(db: Database, generations: list[str]) -> Sequence[Row]:
    """Mark these, which nobody writes; their conversations."""
    return db.all(
        "UPDATE nodes SET status = 'interrupted', generation = NULL "
        "WHERE status = 'generating' AND generation = ANY(:generations) RETURNING conversation",
        generations=generations,
    )


# --- failures --------------------------------------------------------------------------------------------------------

_HINTS = {
    "28": "Check the user and the password of --database-url, PGPASSWORD or ~/.pgpass.",
    "3D": "Make it (createdb), or name another one in --database-url.",
    "42501": "Let the user create a schema: GRANT CREATE ON DATABASE … TO …",
    "53300": "Raise the server's max_connections, or run fewer servers.",
}


def storage_error(error: DBAPIError) -> StorageError:
    """The database's failure as the product's. PostgreSQL's own words are shown: they hold no password and no text of a chat."""
    state = str(getattr(error.orig, "sqlstate", None) or "")
    words = " ".join(str(error.orig).split("\n")[0].split()).rstrip(".")
    if state in ("53100", "53200"):
        return StorageFull(f"The database is full: the chat could not be saved ({words}).", hint="Free some space on its server.")
    if state == "25006":
        return StorageReadOnly(
            "The database takes no changes: the chat could not be saved.",
            hint="It is read-only, perhaps a standby: name its primary in --database-url.",
        )
    hint = _HINTS.get(state, _HINTS.get(state[:2], "")) or _hint_of_words(words)
    if is_lost(error):
        return StorageUnreachable(
            f"The database can't be reached: {words}.", hint=hint or "Check that it runs and can be reached."
        )
    if state in ("55P03", "57014", "40P01", "40001"):
        return StorageUnreachable(f"The database is too busy: {words}.", hint="Try again in a moment.")
    return StorageError(f"The database refuses: {words}.", hint=hint)


def _hint_of_words(words: str) -> str:
    """A refused connection has no code, only words."""
    if "password" in words or "authentication" in words or "role " in words:
        return _HINTS["28"]
    return _HINTS["3D"] if "database " in words and "does not exist" in words else ""


def is_lost(error: DBAPIError) -> bool:
    """Whether the connection is gone, or there never was one."""
    state = str(getattr(error.orig, "sqlstate", None) or "")
    return (
        error.connection_invalidated
        or state[:2] in ("08", "28", "3D", "53")
        or state.startswith("57P0")
        or (not state and isinstance(error, sqlalchemy.exc.OperationalError))
    )


def is_passing(error: DBAPIError) -> bool:
    """Whether the same transaction may go through when it is run again: others were in its way."""
    return str(getattr(error.orig, "sqlstate", None) or "") in ("40001", "40P01", "23505")
