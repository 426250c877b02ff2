"""Which files of a repository to fetch: safetensors or GGUF with what belongs to them; code and pickles never."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass

from modules.detect.ggml_types import GGUF_TYPE
from modules.errors import InvalidParameter, UnsafeModel
from modules.paths import name_problem

MAX_FILES = 20_000
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz")
_CODE = (".py", ".pyc", ".so", ".dll", ".dylib", ".exe", ".sh", ".bat", ".cmd", ".ps1", ".jar", ".ipynb", ".wasm")
_OTHER_WEIGHTS = (".h5", ".msgpack", ".onnx", ".onnx_data", ".ot", ".tflite", ".mlmodel", ".mlpackage", ".engine", ".nemo")
_ARCHIVES = (".zip", ".7z", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".rar")
_SIDECARS = (".json", ".jinja", ".model", ".tiktoken", ".md", ".txt", ".yaml", ".yml")
_NAMED = re.compile(r"(licen[cs]e|notice|copying|readme|use_policy)\b.*", re.IGNORECASE)
_PROJECTOR_TYPES = ("F16", "BF16", "Q8_0", "F32")
_SHARD = re.compile(r"-\d{5}-of-\d{5}(?=\.gguf$)")


@dataclass(frozen=True, slots=True)
class RepoFile:
    """One file of a repository at one commit. `sha256` for large files, `git_sha1` (of git's blob) for the others."""

    path: str
    size: int
    sha256: str | None = None
    git_sha1: str | None = None


@dataclass(frozen=True, slots=True)
class DownloadPlan:
    """`skipped` maps a path to the reason, for the pickles, code and other forms a user may wonder about. `projector` is the path
    of the one that comes along unasked."""

    repo: str
    commit: str
    files: tuple[RepoFile, ...]
    skipped: dict[str, str]
    projector: str | None = None

    @property
    def total_bytes(self) -> int:
        return sum(file.size for file in self.files)


def choose_files(
    repo: str, commit: str, files: Sequence[RepoFile], include: Sequence[str] = (), *, with_projector: bool = True
) -> DownloadPlan:
    """Pick the files of `repo`. `include` patterns (shell style) name the weights wanted; configuration and tokenizer come along,
    and with a GGUF the projector that reads its images (`with_projector`).

    Raises UnsafeModel when there are only pickles, InvalidParameter when a choice between several GGUFs is the user's, or when a
    pattern matches nothing.
    """
    skipped: dict[str, str] = {}
    usable = [file for file in files if not _refused(file, skipped)]
    sidecars = [file for file in usable if _is_sidecar(file.path)]
    weights = [file for file in usable if file.path.endswith((".safetensors", ".gguf"))]
    if include:
        chosen = [file for file in usable if any(_matches(file.path, pattern) for pattern in include)]
        if not chosen:
            raise _nothing_matched(include, weights, skipped)
        _note_rest(weights, chosen, "not asked for", skipped)
    else:
        chosen = _default_weights(repo, weights, skipped)
    projector = _companion(chosen, weights) if with_projector else None
    if projector is not None:
        chosen = [*chosen, projector]
        skipped.pop(projector.path, None)
    if any(file.path.endswith(".gguf") for file in chosen) and not any(file.path.endswith(".safetensors") for file in chosen):
        sidecars = [file for file in sidecars if file.path.lower().endswith((".md", ".txt")) or _NAMED.fullmatch(file.path)]
    wanted = {file.path: file for file in (*chosen, *sidecars)}
    fetched = tuple(wanted[path] for path in sorted(wanted))
    return DownloadPlan(repo, commit, fetched, skipped, projector.path if projector is not None else None)


def names_projector(path: str) -> bool:
    """Whether a GGUF's name says that it is a projector; once it is here, detection asks its content."""
    return path.endswith(".gguf") and "mmproj" in path.rpartition("/")[2].lower()


def best_projector(files: Sequence[RepoFile]) -> RepoFile | None:
    """The projector to take where a repository has several: F16, which every processor computes with."""
    found = [file for file in files if names_projector(file.path)]

    def rank(file: RepoFile) -> tuple[int, int, str]:
        types = GGUF_TYPE.findall(file.path.rpartition("/")[2])
        kind = types[-1].upper() if types else ""
        return (_PROJECTOR_TYPES.index(kind) if kind in _PROJECTOR_TYPES else len(_PROJECTOR_TYPES), file.size, file.path)

    return min(found, key=rank, default=None)


def _companion(chosen: Sequence[RepoFile], weights: Sequence[RepoFile]) -> RepoFile | None:
    """The projector for the chosen GGUFs, where none of them is one."""
    ggufs = [file.path for file in chosen if file.path.endswith(".gguf")]
    if not ggufs or any(names_projector(path) for path in ggufs):
        return None
    folders = {path.rpartition("/")[0] for path in ggufs}
    return best_projector([file for file in weights if file.path.rpartition("/")[0] in folders])


@dataclass(frozen=True, slots=True)
class Variant:
    """One form of the model in a repository: its safetensors, or one GGUF with all its parts. A projector is one by itself."""

    label: str
    files: tuple[RepoFile, ...]

    @property
    def size_bytes(self) -> int:
        return sum(file.size for file in self.files)


def variants(files: Sequence[RepoFile]) -> list[Variant]:
    """What can be fetched by itself, safetensors first, then the GGUFs from small to large; what is refused is in none."""
    usable = [file for file in files if not _refused(file, {})]
    found = []
    plain = _plain_safetensors(usable)
    if plain:
        found.append(Variant("safetensors", tuple(plain)))
    ggufs: dict[str, list[RepoFile]] = {}
    for file in usable:
        if file.path.endswith(".gguf"):
            ggufs.setdefault(_SHARD.sub("", file.path), []).append(file)
    labelled = [Variant(gguf_label(name), tuple(parts)) for name, parts in ggufs.items()]
    return [*found, *sorted(labelled, key=lambda variant: (variant.size_bytes, variant.label))]


def gguf_label(name: str) -> str:
    """Its type, as its name says; else the name itself."""
    stem = name.rpartition("/")[2].removesuffix(".gguf")
    types = GGUF_TYPE.findall(stem)
    label = types[-1].upper() if types else stem
    return f"projector {label}" if names_projector(name) else label


def _plain_safetensors(files: Sequence[RepoFile]) -> list[RepoFile]:
    # consolidated.* is the same model once more, in its first publisher's layout.
    return [f for f in files if f.path.endswith(".safetensors") and "/" not in f.path and not f.path.startswith("consolidated")]


def _refused(file: RepoFile, skipped: dict[str, str]) -> bool:
    """Whether a file is never fetched, whatever is asked for; the reason goes into `skipped`."""
    path = file.path
    lowered = path.lower()
    parts = path.split("/")
    if parts[-1].startswith("."):
        return True
    if problem := next((problem for part in parts if (problem := name_problem(part))), None):
        skipped[ascii(path)[1:-1][:100]] = f"its name {problem}"
    elif lowered.endswith(_PICKLES):
        skipped[path] = "a pickle, which can run code when it is opened"
    elif lowered.endswith(_CODE):
        skipped[path] = "program code"
    elif lowered.endswith(_ARCHIVES):
        skipped[path] = "an archive"
    elif lowered.endswith(_OTHER_WEIGHTS):
        skipped[path] = "weights for another program"
    else:
        return False
    return True


def _is_sidecar(path: str) -> bool:
    return "/" not in path and (path.lower().endswith(_SIDECARS) or _NAMED.fullmatch(path) is not None)


def _default_weights(repo: str, weights: list[RepoFile], skipped: dict[str, str]) -> list[RepoFile]:
    safetensors = [file for file in weights if file.path.endswith(".safetensors") and "/" not in file.path]
    plain = _plain_safetensors(weights)
    if plain:
        _note_rest(weights, plain, "the safetensors are fetched", skipped)
        return plain
    ggufs = [file for file in weights if file.path.endswith(".gguf")]
    models = {_SHARD.sub("", file.path) for file in ggufs if not names_projector(file.path)}
    if len(models) == 1:
        return [file for file in ggufs if _SHARD.sub("", file.path) in models]
    if models:
        sizes = {name: sum(file.size for file in ggufs if _SHARD.sub("", file.path) == name) for name in sorted(models)}
        listed = ", ".join(f"{name} ({size / 1e9:.1f} GB)" for name, size in list(sizes.items())[:20])
        raise InvalidParameter(
            f"{repo} holds {len(models)} GGUF models: {listed}.",
            hint="Choose one with --include, such as '*Q4_K_M*'.",
            param="include",
        )
    if safetensors or weights:
        return safetensors or weights
    pickles = [path for path, reason in skipped.items() if reason.startswith("a pickle")]
    if pickles:
        raise UnsafeModel(
            f"{repo} has its weights only as pickles ({pickles[0]}), which can run any code when they are opened.",
            hint="Look for a copy of the model in safetensors or GGUF.",
        )
    raise InvalidParameter(
        f"{repo} holds no weights this product reads.", hint="Choose a repository with .safetensors or .gguf files."
    )


def _nothing_matched(include: Sequence[str], weights: list[RepoFile], skipped: dict[str, str]) -> InvalidParameter | UnsafeModel:
    refused = next((path for path in skipped if any(_matches(path, pattern) for pattern in include)), None)
    if refused:
        return UnsafeModel(f"{refused} is not fetched: it is {skipped[refused]}.", hint="Choose .safetensors or .gguf files.")
    names = ", ".join(file.path for file in weights[:10]) or "none"
    return InvalidParameter(f"No file matches {', '.join(include)}.", hint=f"The weights there are: {names}.", param="include")


def _matches(path: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(path.lower(), pattern.lower()) or fnmatch.fnmatchcase(
        path.rpartition("/")[2].lower(), pattern.lower()
    )


def _note_rest(weights: list[RepoFile], chosen: list[RepoFile], reason: str, skipped: dict[str, str]) -> None:
    for file in weights:
        if file not in chosen:
            skipped.setdefault(file.path, reason)
