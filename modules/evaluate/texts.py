"""The texts perplexity is measured on: any file, or a data set by name, joined as the papers join it. Nothing is downloaded."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from modules.errors import InvalidParameter

HELD_OUT = Path(__file__).with_name("heldout.txt")
MAX_BYTES = 512 << 20


@dataclass(frozen=True, slots=True)
class Text:
    """`name` is what tables show. `max_windows` 0 is all."""

    name: str
    title: str
    content: str
    source: str
    max_windows: int = 0

    @property
    def words(self) -> int:
        """Words between white space, as word perplexity counts them."""
        return len(self.content.split())

    @property
    def size(self) -> int:
        return len(self.content.encode("utf-8"))


@dataclass(frozen=True, slots=True)
class DataSet:
    """A known data set: the file names it is looked for under, and where it comes from."""

    name: str
    title: str
    files: tuple[str, ...]
    fetch: str
    join: Callable[[Path], str]
    max_windows: int = 0


def _wikitext(path: Path) -> str:
    """Rows are lines; blank ones are empty; two line breaks between rows (as GPTQ's evaluation joins the Hub's rows)."""
    rows = _rows(path) if path.suffix in (".jsonl", ".json", ".gz") else _lines(path)
    return "\n\n".join(row if row.strip() else "" for row in rows)


def _ptb(path: Path) -> str:
    """One sentence per line, a space between."""
    rows = _rows(path) if path.suffix in (".jsonl", ".json", ".gz") else _lines(path)
    return " ".join(row.strip() for row in rows)


def _c4(path: Path) -> str:
    """The first 1100 documents of the validation split, a space between."""
    if path.suffix == ".txt":
        return _read(path)
    documents = [row for row, _ in zip(_rows(path), range(1100), strict=False)]
    return " ".join(documents)


DATA_SETS = {
    data.name: data
    for data in (
        DataSet(
            "wikitext2",
            "WikiText-2, test",
            ("wiki.test.raw", "wikitext2.txt", "wikitext2.jsonl", "wikitext-2-raw/wiki.test.raw", "wikitext-2/wiki.test.raw"),
            "wiki.test.raw of WikiText-2 raw (on the Hugging Face Hub: Salesforce/wikitext, wikitext-2-raw-v1, split test; "
            "one row per line)",
            _wikitext,
        ),
        DataSet(
            "ptb",
            "Penn Treebank, test",
            ("ptb.test.txt", "ptb.txt", "ptb.jsonl", "ptb/ptb.test.txt"),
            "ptb.test.txt of the Penn Treebank language modelling set (on the Hugging Face Hub: ptb_text_only, split test; one "
            "sentence per line)",
            _ptb,
        ),
        DataSet(
            "c4",
            "C4, validation",
            ("c4-validation.00000-of-00008.json.gz", "c4-validation.json.gz", "c4.jsonl", "c4.txt"),
            "c4-validation.00000-of-00008.json.gz (on the Hugging Face Hub: allenai/c4, folder en)",
            _c4,
            max_windows=256,
        ),
    )
}  # fmt: skip
BUNDLED = "bundled"


def names() -> list[str]:
    return [BUNDLED, *DATA_SETS]


def listed(folders: list[Path]) -> list[dict[str, object]]:
    """What the page offers: the known data sets, here or not, and the user's own files in the first folder."""
    found: list[dict[str, object]] = [{"name": BUNDLED, "title": "Held-out text (bundled)", "there": True, "fetch": ""}]
    taken = {file for known in DATA_SETS.values() for file in known.files}
    for known in DATA_SETS.values():
        found.append(
            {"name": known.name, "title": known.title, "there": find(known.name, folders) is not None, "fetch": known.fetch}
        )
    for path in sorted(folders[0].glob("*")) if folders[0].is_dir() else ():
        if path.is_file() and path.suffix in (".txt", ".md", ".jsonl") and path.name not in taken:
            found.append({"name": path.name, "title": path.name, "there": True, "fetch": "", "own": True})
    return found


def find(name: str, folders: list[Path]) -> Path | None:
    """The file of a data set by name, in the first folder that has it."""
    if name == BUNDLED:
        return HELD_OUT
    known = DATA_SETS[name]
    return next((folder / file for folder in folders for file in known.files if (folder / file).is_file()), None)


def read_text(name: str, folders: list[Path]) -> Text:
    """A data set by name, or a UTF-8 file by path. Raises InvalidParameter that says what to fetch and where to put it."""
    if name == BUNDLED:
        return Text(BUNDLED, "Held-out text of the bundled model's kind", _read(HELD_OUT), str(HELD_OUT.name))
    if name in DATA_SETS:
        known = DATA_SETS[name]
        path = find(name, folders)
        if path is None:
            raise InvalidParameter(
                f"The data set {name} is not here.",
                hint=f"Put {known.fetch} into {folders[0]} as {known.files[0]}, or give another folder with --dataset-dir.",
                param="data",
            )
        content = known.join(path)
        _not_empty(content, path)
        return Text(name, known.title, content, path.name, known.max_windows)
    path = next((p for p in (Path(name).expanduser(), *(folder / name for folder in folders)) if p.is_file()), None)
    if path is None:
        raise InvalidParameter(
            f"There is no text {name!r}.", hint=f"Give the path of a UTF-8 file, or one of {', '.join(names())}.", param="data"
        )
    content = "\n\n".join(_rows(path)) if path.suffix in (".jsonl", ".gz") else _read(path)
    _not_empty(content, path)
    return Text(path.stem, path.name, content, path.name)


def _not_empty(content: str, path: Path) -> None:
    if not content.strip():
        raise InvalidParameter(f"{path.name} holds no text.", hint="Give another file.", param="data")


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InvalidParameter(f"{path.name} is larger than {MAX_BYTES >> 20} MB.", hint="Cut a part out.", param="data")
        return path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise InvalidParameter(
            f"{path.name} is no UTF-8 text (byte {error.start}).", hint="Save it as UTF-8.", param="data"
        ) from error
    except OSError as error:
        raise InvalidParameter(f"{path.name} can't be read: {error.strerror}.", param="data") from error


def _lines(path: Path) -> list[str]:
    """The lines with their ends."""
    return _read(path).splitlines(keepends=True)


def _rows(path: Path) -> Iterator[str]:
    """The "text" (or "sentence") of each line of a .jsonl or .json.gz file, or of each entry of a JSON list."""
    try:
        with _opened(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _text_of(json.loads(line), path, number)
    except (OSError, EOFError, ValueError) as error:
        raise InvalidParameter(
            f"{path.name} can't be read as lines of JSON: {error}.", hint='Each line is an object with a "text".', param="data"
        ) from error


def _opened(path: Path) -> IO[str]:
    return gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")


def _text_of(row: object, path: Path, number: int) -> str:
    for key in ("text", "sentence"):
        if isinstance(row, dict) and isinstance(row.get(key), str):
            return str(row[key])
    raise InvalidParameter(f'Line {number} of {path.name} has no "text".', param="data")
