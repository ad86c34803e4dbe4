"""`headstart export`: its options, and the call."""

from __future__ import annotations

import argparse
from shlex import quote

from .cli_options import Command, add_quiet_option, given, short_path


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="RUN", help="run folder written by `headstart fit`")
    parser.add_argument("--format", metavar="WHICH", help="onnx or pt2, PyTorch's exported program (default: onnx)")
    parser.add_argument("--out", metavar="FOLDER", help="where to write (default: RUN-onnx or RUN-pt2 beside the run)")
    parser.add_argument("--overwrite", action="store_true", default=None, help="replace an earlier export")
    parser.add_argument(
        "--pictures", nargs="+", metavar="FILE|FOLDER", help="compare both on these (default: test pictures of the run)"
    )
    add_quiet_option(parser)


def _export(args: argparse.Namespace) -> int:
    from . import exporting

    found = exporting.export(
        args.model, progress=not args.quiet, **given(args, "format", "out", "overwrite", "pictures")
    )
    model, script = (short_path(found.path / name) for name in (found.file.name, exporting.SCRIPT))
    total = sum(found.pictures.values())
    asked = " and ".join(f"{n} {split}" for split, n in found.pictures.items())
    print(f"model    {model} ({found.file.stat().st_size / 1e6:.1f} MB, {_takes(found.one_at_a_time)})")
    print(f"agrees   on {asked} pictures: {found.same_label} of {total} with the same label,")
    record = f"; {found.recorded} as the run has them on record" if found.recorded else ""
    print(f"         probabilities within {found.probability:.1e}{record}")
    print(f"use      python {quote(str(script))} {quote(str(model))} PHOTO...")
    return 0


def _takes(one_at_a_time: bool) -> str:
    return "one picture at a time" if one_at_a_time else "any number of pictures at once"


EXPORT = Command("write a model for ONNX Runtime, checked against the run", "RUN [options]", _options, _export)
