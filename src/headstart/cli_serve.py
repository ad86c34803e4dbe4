"""`headstart serve`: a trained model behind a web page and an address for programs."""

from __future__ import annotations

import argparse
import os
import sys
import threading

from .cli_options import Command, add_machine_options, add_unknown_option, given


def _serve_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="RUN", help="run folder written by `headstart fit`")
    parser.add_argument(
        "--host", metavar="ADDRESS", help="listen there; 0.0.0.0 is open to others (default: 127.0.0.1, this machine)"
    )
    parser.add_argument("--port", type=int, metavar="N", help="0 takes a free one (default: 8000)")
    parser.add_argument(
        "--allow-host",
        action="append",
        metavar="NAME",
        help="answer requests and pages of this name, a proxy's on this machine (repeatable)",
    )
    add_unknown_option(parser)
    group = parser.add_argument_group("limits")
    group.add_argument("--max-megabytes", type=int, metavar="N", help="of one request (default: 32)")
    group.add_argument("--max-pictures", type=int, metavar="N", help="in one request (default: 64)")
    group.add_argument(
        "--max-waiting", type=int, metavar="N", help="requests at once; the next are sent away (default: 32)"
    )
    add_machine_options(parser, workers="processes that decode pictures")


def _serve(args: argparse.Namespace) -> int:
    from . import serving
    from .answering import ANSWERING

    before = threading.enumerate()
    limits = given(args, "max_megabytes", "max_pictures", "max_waiting")
    serving.serve(
        args.model, allow_hosts=args.allow_host or (), **limits,
        **given(args, "host", "port", "device", "precision", "workers", "unknown"),
    )  # fmt: skip
    if any(thread.name == ANSWERING for thread in threading.enumerate() if thread not in before):
        # A slow model's last batch, which PyTorch would not let a program end without.
        sys.stdout.flush()
        os._exit(0)
    return 0


SERVE = Command(
    "answer pictures on a web page and over HTTP",
    "RUN [options]",
    _serve_options,
    _serve,
    "There is neither a password nor encryption: for others put a proxy in front, and name it with --allow-host."
    " Ctrl-C ends it.",
)
