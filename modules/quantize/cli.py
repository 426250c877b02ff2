"""server.py quantize MODEL --bits 4 --group-size 128: a GPTQ checkpoint, in the foreground, with a line per layer."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from modules.command_line import exit_status
from modules.detect import find_model
from modules.quantize.process import QuantizeJob, check_source, default_out, quantize
from modules.quantize.provenance import described, read_provenance
from modules.quantize.settings import BITS, ENGINES, FORMATS, GROUP_SIZES, METHODS, QuantizeSettings, complete_settings


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the `quantize` subcommand."""
    defaults = QuantizeSettings()
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "quantize",
        help="quantise a model with GPTQ",
        description="Make a GPTQ checkpoint from a Hugging Face folder (safetensors), one decoder block at a time. "
        "Interrupted, the same command goes on where it stopped.",
    )
    parser.add_argument("source", metavar="MODEL", help="a name under the model folder, or a path")
    parser.add_argument("--bits", type=int, choices=BITS, default=defaults.bits, help="bits per weight (%(default)s)")
    parser.add_argument(
        "--group-size", type=int, choices=GROUP_SIZES, default=defaults.group_size, help="weights per scale; -1: one per column"
    )
    parser.add_argument("--method", choices=METHODS, default=defaults.method, help="gptq, or rtn: round to nearest")
    parser.add_argument(
        "--engine", choices=ENGINES, default=defaults.engine, help="who quantises: this product, or the auto-gptq package"
    )
    parser.add_argument(
        "--desc-act",
        action=argparse.BooleanOptionalAction,
        help="quantise inputs by falling activation (act-order); default: with --static-groups, so that it costs nothing later",
    )
    parser.add_argument(
        "--static-groups",
        action=argparse.BooleanOptionalAction,
        help="fix all groups' scales first; default: with --desc-act, unless only one of the two is given",
    )
    parser.add_argument("--sym", action=argparse.BooleanOptionalAction, default=defaults.sym, help="symmetric grids")
    parser.add_argument("--asym", action="store_false", dest="sym", help="grids with a zero point of their own (--no-sym)")
    parser.add_argument(
        "--true-sequential",
        action=argparse.BooleanOptionalAction,
        default=defaults.true_sequential,
        help="each layer of a block sees the quantised ones before it",
    )
    parser.add_argument("--damp", type=float, default=defaults.damp_percent, help="damping of the Hessian (%(default)s)")
    parser.add_argument("--mse", action="store_true", help="search the range of each grid for the least error")
    parser.add_argument(
        "--calibration", default=defaults.calibration, metavar="FILE", help="UTF-8 text; default: the sample that comes with this"
    )
    parser.add_argument(
        "--checkpoint-format",
        choices=FORMATS,
        default=defaults.checkpoint_format,
        help="gptq, which all readers know; gptq_v2 for --asym in GPTQModel (%(default)s)",
    )
    parser.add_argument("--nsamples", type=int, default=defaults.nsamples, help="windows of calibration text (%(default)s)")
    parser.add_argument("--seqlen", type=int, default=defaults.seqlen, help="tokens per window (%(default)s)")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder to write; default: NAME-GPTQ-4bit-128g in the model folder"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute (%(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing folder")
    parser.add_argument("--show", action="store_true", help="say how the GPTQ checkpoint MODEL was made, and stop")
    parser.add_argument("--restart", action="store_true", help="forget what an interrupted run left")
    return parser


def run(args: argparse.Namespace, config: Any) -> int:
    """Exit status: 0 done, 1 failed, 130 interrupted."""
    work = _show if args.show else _quantize
    return exit_status(work(args, config), "Stopped. The same command goes on after the last finished block.")


def settings_of(args: argparse.Namespace) -> QuantizeSettings:
    calibration = args.calibration if args.calibration == "bundled" else str(Path(args.calibration).expanduser().resolve())
    given = {
        "bits": args.bits,
        "group_size": args.group_size,
        "method": args.method,
        "engine": args.engine,
        "desc_act": args.desc_act,
        "static_groups": args.static_groups,
        "sym": args.sym,
        "true_sequential": args.true_sequential,
        "damp_percent": args.damp,
        "mse": args.mse,
        "calibration": calibration,
        "nsamples": args.nsamples,
        "seqlen": args.seqlen,
        "checkpoint_format": args.checkpoint_format,
    }
    return complete_settings({name: value for name, value in given.items() if value is not None})


async def _show(args: argparse.Namespace, config: Any) -> None:
    model = find_model(args.source, config.model_dirs, allow_paths=True)
    print("\n".join(described(read_provenance(Path(model.path)))))


async def _quantize(args: argparse.Namespace, config: Any) -> None:
    model = find_model(args.source, config.model_dirs, allow_paths=True)
    check_source(model)
    settings = settings_of(args)
    base = Path(model.path)
    out = args.out.expanduser().resolve() if args.out else default_out(base, settings, Path(config.model_dir))
    job = QuantizeJob(base, out, settings, args.device, resume=not args.restart, overwrite=args.overwrite)
    done = await quantize(job, print_event)
    size = f"{done.size_bytes / 1e6:,.1f} MB"
    print(f"{done.path} ({size}, {done.layers} layers, mean loss {done.mean_loss:.2e}, {done.seconds:.0f} s)")


def print_event(event: dict[str, Any]) -> None:
    if "layer" in event:
        place = f"block {event['block']}/{event['blocks']}  {event['layer']:<28}"
        print(f"{event['fraction']:4.0%}  {place} loss {event['loss']:.2e}  {event['eta_s']:.0f} s left")
    elif "note" in event:
        print(f"      {event['note']}")
    elif "stage" in event:
        print(f"      {event['stage']} …")
    sys.stdout.flush()
