"""server.py convert MODEL --to gguf --type TYPE: a conversion in the foreground, with its progress on one line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modules.command_line import exit_status
from modules.convert.flexgen import convert_flexgen
from modules.convert.gguf import AUTO, ConvertJob, convert, library_types
from modules.convert.unpickle import convert_pickle
from modules.detect import find_model
from modules.progress_line import ProgressLine

if TYPE_CHECKING:
    import argparse


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the `convert` subcommand."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "convert",
        help="convert and quantise models",
        description="Convert a Hugging Face or GPTQ folder to GGUF, or quantise a GGUF, with llama.cpp's own tools. "
        "Turn pickled weights into safetensors, or an OPT into FlexGen's arrays.",
    )
    parser.add_argument("source", metavar="MODEL", nargs="?", help="a name under the model folder, or a path")
    parser.add_argument("--to", choices=("gguf", "safetensors", "flexgen"), default="gguf", help="format to write")
    parser.add_argument(
        "--type",
        default=AUTO,
        help="GGUF type: F32, F16, BF16, Q8_0, Q6_K, Q5_K_M, Q4_K_M, Q4_0, … (--types lists all); "
        "default: F16, and for a GPTQ checkpoint the type that holds the same numbers",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="file to write; default: NAME-TYPE.gguf, or NAME-np for FlexGen, beside the model",
    )
    parser.add_argument("--imatrix", type=Path, metavar="FILE", help="importance matrix; types below Q2_K need one")
    parser.add_argument("--requantize", action="store_true", help="quantise a quantised source again, at a loss")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    parser.add_argument(
        "--allow-pickle", action="store_true", help="with --to safetensors: open a .bin, .pt or .pth file you trust, fenced in"
    )
    parser.add_argument("--types", action="store_true", dest="list_types", help="list the types the installed llama.cpp writes")
    return parser


def run(args: argparse.Namespace, config: Any) -> int:
    """Exit status: 0 done, 1 failed, 2 wrong arguments, 130 interrupted."""
    if not args.list_types and not args.source:
        print("Switchyard: convert needs a MODEL: a name under the model folder, or a path.", file=sys.stderr)
        return 2
    work = _list_types() if args.list_types else _convert(args, config)
    return exit_status(work, "Stopped; nothing was left behind that looks like a model.")


async def _list_types() -> None:
    print("\n".join(await library_types()))


async def _convert(args: argparse.Namespace, config: Any) -> None:
    model = find_model(args.source, config.model_dirs, allow_paths=True)
    line = ProgressLine()
    out = args.out.expanduser().resolve() if args.out else None
    job = ConvertJob(
        source=Path(model.path),
        type=args.type,
        out=out,
        imatrix=args.imatrix.expanduser() if args.imatrix else None,
        requantize=args.requantize,
        overwrite=args.overwrite,
    )
    try:
        if args.to == "flexgen":
            kind = "F16" if args.type == AUTO else args.type
            done = await convert_flexgen(job.source, line.show, type=kind, out=out, overwrite=args.overwrite)
        elif args.to == "safetensors":
            allow = args.allow_pickle
            done = await convert_pickle(job.source, line.show, allow_pickle=allow, out=out, overwrite=args.overwrite)
        else:
            done = await convert(job, line.show)
    finally:
        line.close()
    for note in done.notes:
        print(note)
    print(f"{done.path} ({done.size_bytes / 1e6:,.1f} MB, {done.type}, {done.seconds:.0f} s)")
