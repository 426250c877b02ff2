"""Quantise one GGUF with llama.cpp's own function, in the llama.cpp environment.

python -m modules.convert.children.gguf_quantize IN OUT TYPE THREADS REQUANTIZE IMATRIX
python -m modules.convert.children.gguf_quantize --types
"""

from __future__ import annotations

import ctypes
import re
import sys
from pathlib import Path
from typing import Any

from modules.convert.children.report import Report
from modules.errors import AppError, BackendUnavailable, IncompatibleModel, LoadError

_PREFIXES = ("LLAMA_FTYPE_MOSTLY_", "LLAMA_FTYPE_ALL_")
_STEP = re.compile(r"\[\s*(\d+)/\s*(\d+)\]")


def main() -> int:
    report = Report()
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError) as error:  # OSError: the shared library is for another processor or half built
        report.error(BackendUnavailable(f"llama-cpp-python can't be loaded: {error}."))
        return 1
    try:
        if sys.argv[1:] == ["--types"]:
            report.done(types=sorted(library_types(llama_cpp)))
        else:
            source, out, kind, threads, requantize, imatrix = sys.argv[1:]
            _quantize(report, llama_cpp, Path(source), Path(out), kind, int(threads), requantize == "1", imatrix)
            report.done(path=out)
    except AppError as error:
        report.error(error)
        return 1
    return 0


def library_types(library: Any) -> dict[str, int]:
    """The library's own list of file types, by name without its prefix."""
    found = {}
    for name in dir(library):
        for prefix in _PREFIXES:
            if name.startswith(prefix) and isinstance(getattr(library, name), int):
                found[name.removeprefix(prefix)] = getattr(library, name)
    return found


def _quantize(report: Report, lib: Any, source: Path, out: Path, kind: str, threads: int, requantize: bool, imatrix: str) -> None:
    types = library_types(lib)
    if kind not in types:
        raise IncompatibleModel(f"This llama.cpp has no type {kind}.", hint=f"It has {', '.join(sorted(types))}.")
    stage = f"Quantizing to {kind}"
    log = _Log(report, stage)
    callback = lib.llama_log_callback(log.take)
    lib.llama_log_set(callback, ctypes.c_void_p(0))
    lib.llama_backend_init()
    params = lib.llama_model_quantize_default_params()
    params.ftype = types[kind]
    params.nthread = threads
    params.allow_requantize = requantize
    keep = None
    if imatrix:
        from modules.convert.children.imatrix import load_imatrix

        keep, params.imatrix = load_imatrix(lib, Path(imatrix))
    report.stage(stage, 0.0)
    status = lib.llama_model_quantize(str(source).encode("utf-8"), str(out).encode("utf-8"), ctypes.byref(params))
    del keep
    if status != 0:
        raise _failure(kind, log.lines)
    report.stage(stage, 1.0)
    if log.fallbacks:
        report.note(f"{log.fallbacks} tensors are in another type, because their rows don't divide into {kind}'s blocks.")


class _Log:
    """llama.cpp's log: "[ 3/ 201] name - [shape], type = f16, converting to q4_K .." gives the progress."""

    def __init__(self, report: Report, stage: str) -> None:
        self.report = report
        self.stage = stage
        self.lines: list[str] = []
        self.fallbacks = 0

    def take(self, level: int, text: bytes, data: Any) -> None:
        line = text.decode("utf-8", "replace")
        sys.stderr.write(line)
        self.lines = [*self.lines[-30:], line.strip()]
        self.fallbacks += line.count("fallback") + line.count("falling back")
        match = _STEP.search(line)
        if match:
            self.report.stage(self.stage, int(match[1]) / max(1, int(match[2])))


def _failure(kind: str, lines: list[str]) -> AppError:
    text = "\n".join(lines)
    reason = next(
        (line for line in reversed(lines) if "fail" in line.lower() or "error" in line.lower()),
        lines[-1] if lines else "no reason",
    )
    if "imatrix" in text or "importance matrix" in text:
        return IncompatibleModel(
            f"{kind} needs an importance matrix.", hint="Give one with --imatrix FILE, or choose a type from Q2_K up."
        )
    if "requantiz" in text:
        return IncompatibleModel(
            "The file is quantized already, and quantizing again loses more.",
            hint="Start from an F16 or F32 file, or pass --requantize.",
        )
    if "No space left" in text:
        return LoadError("The disk is full.", hint="Free some space, or choose another folder with --out.")
    return LoadError(f"llama.cpp could not quantize to {kind}: {reason}", hint="Choose another type, such as Q8_0.")


if __name__ == "__main__":
    sys.exit(main())
