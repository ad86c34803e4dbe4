"""The command line: parse, call, print, exit code. What the commands do lives in the library.

Nothing heavy is imported before a command runs, so that every `--help` is instant.
"""

from __future__ import annotations

import argparse
import io
import os
import select
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any, TextIO

from . import cli_advise, cli_compare, cli_shootout, cli_tuning, terminal
from .cli_audit import AUDIT
from .cli_cache import add_cache_options, run_cache
from .cli_export import EXPORT
from .cli_familiar import FAMILIAR
from .cli_options import (
    DEFAULT_RECIPE,
    EXIT_BAD_INPUT,
    PHOTOS_HELP,
    Command,
    add_audit_option,
    add_augment_option,
    add_bad_files_option,
    add_cache_option,
    add_compile_option,
    add_data_options,
    add_head_options,
    add_machine_options,
    add_picture_options,
    add_quiet_option,
    add_recipe_options,
    add_root_option,
    add_stage_options,
    given,
    new_run_path,
    refuse_beside_from_run,
    short_path,
)
from .cli_overrides import apply_overrides, override_head, picture_overrides
from .cli_predict import EVALUATE, PREDICT
from .cli_recipe import follow_tuned
from .cli_serve import SERVE
from .drawing import check_picture
from .errors import HeadstartError, Interrupted, RecipeError, SetupError, in_words, near_matches
from .fields import check_number
from .owners import launched
from .recipe import DEFAULT_BACKBONE, HeadSpec, load_recipe
from .run import tidy_up
from .run_record import is_complete, read_run

EXIT_INTERRUPTED = 130
HELP_WIDTH, LEAST_WIDTH = 100, 40


class _Parser(argparse.ArgumentParser):
    """One line on stderr for a wrong option, with near matches, instead of the whole usage."""

    def error(self, message: str) -> Any:
        self.exit(EXIT_BAD_INPUT, f"{self.prog}: error: {message}\nSee `{self.prog} --help`.\n")


def _formatter(prog: str) -> argparse.HelpFormatter:
    columns = shutil.get_terminal_size((HELP_WIDTH + 2, 24)).columns
    width = max(LEAST_WIDTH, min(HELP_WIDTH, columns - 2))
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=30, width=width)


class _Version(argparse.Action):
    """`--version`: the installed version, looked up only when asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        from importlib.metadata import version

        print(f"headstart {version('headstart')}")
        parser.exit()


# ---- fit -------------------------------------------------------------------------------------------------------


def _fit_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("photos", metavar="PHOTOS", help=PHOTOS_HELP)
    group = parser.add_argument_group("run")
    group.add_argument("--out", metavar="RUN", help="run folder (default: runs/PHOTOS-BACKBONE, numbered if taken)")
    group.add_argument("--overwrite", action="store_true", help="replace an existing run folder")
    group.add_argument(
        "--resume",
        action="store_true",
        default=None,
        help="go on with the run in --out that was stopped or killed, to the same bits; begin it where there is none",
    )
    group.add_argument("--auto", action="store_true", help="train by what `headstart advise` proposes for the pictures")
    group.add_argument("--limit", type=int, metavar="N", help="dry run on N pictures")
    add_cache_option(group)
    add_audit_option(group)
    add_quiet_option(group)
    add_data_options(parser)
    group = parser.add_argument_group("backbone")
    group.add_argument("--backbone", metavar="NAME", help=f"any timm model (default: {DEFAULT_BACKBONE})")
    group.add_argument(
        "--weights",
        metavar="WHICH",
        help="hub, none, a .safetensors or .pth file, or an earlier run folder (default: hub, or none where the recipe "
        "trains from scratch)",
    )
    group.add_argument(
        "--from-run",
        metavar="RUN",
        help="go on from this run's whole model; its head keeps what it knows by class name, new classes get new rows",
    )
    add_picture_options(parser)
    add_head_options(parser)
    add_recipe_options(parser)
    add_stage_options(parser)
    add_compile_option(add_machine_options(parser))


def _fit(args: argparse.Namespace) -> int:
    options = vars(args)
    if args.resume and not args.out:
        raise RecipeError("--resume goes on with the run in --out: name it.")
    out_folder = Path(args.out or "").expanduser()
    if args.resume and not args.overwrite and is_complete(out_folder):
        done = read_run(out_folder)
        tidy_up(out_folder)
        terminal.say(f"{args.out} is complete.")
        _print_run(done.metrics, done.history, out_folder)
        return 0
    refuse_beside_from_run(options)
    follow_tuned(args)
    advice = cli_advise.follow_advice(args) if args.auto else None
    recipe = apply_overrides(advice.recipe if advice else load_recipe(args.recipe or DEFAULT_RECIPE), options)
    spec_overrides = picture_overrides(options)
    backbone = args.backbone or DEFAULT_BACKBONE
    came_from = f"from-{Path(args.from_run).resolve().name}" if args.from_run else backbone
    from . import recipes

    new = new_run_path(args.photos, came_from, overwrite=args.overwrite)
    with nullcontext(args.out) if args.out else new as out:
        result = recipes.fine_tune(
            args.photos,
            backbone=backbone,
            weights=args.weights,
            out=out,
            recipe=recipe,
            overwrite=args.overwrite,
            spec_overrides=spec_overrides,
            progress=not args.quiet,
            **given(args, "bad_files", "val", "test", "val_folder", "test_folder", "root", "limit"),
            **given(args, "resume", "from_run", "device", "precision", "workers", "compile", "cache", "audit"),
        )
    if result.run_path is None:  # one of several processes: another one writes and prints
        return 0
    if advice:
        advice.write_facts(result.run_path)
    _print_run(result.metrics, result.history, result.run_path)
    return 0


def _print_run(metrics: dict[str, Any], history: list[dict[str, Any]], run: Path) -> None:
    from .cautions import cautions

    print(terminal.closing_table(metrics))
    print(terminal.notes(cautions(history, metrics)), end="")
    print(f"\nrun     {short_path(run)}\nreport  {short_path(run / 'report.html')}")


# ---- summary, preview, demo ------------------------------------------------------------------------------------


def _summary_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="BACKBONE|RUN", help="a timm model's name, or a run folder")
    parser.add_argument("--freeze-line", metavar="WHERE", help="draw it here: head, all, last:N or a block")
    parser.add_argument("--batchnorm", metavar="MODE", help="of the backbone behind the line: fixed, frozen or train")
    parser.add_argument("--classes", type=int, metavar="N", help="put a head for N classes on the backbone")
    parser.add_argument("--image-size", type=int, metavar="PX", help="side of the input (default: the backbone's own)")
    add_head_options(parser)


def _summary(args: argparse.Namespace) -> int:
    _refuse_idle_options(args)
    head = override_head(HeadSpec(), vars(args))
    from .layers import summary

    placed = given(args, "freeze_line", "batchnorm", "image_size")
    print(summary(args.model, head=head, num_classes=args.classes, **placed).text())
    return 0


def _refuse_idle_options(args: argparse.Namespace) -> None:
    """An option that would change nothing is an error, not a silent no."""
    is_folder = Path(args.model).is_dir()
    of_head = ("hidden", "head_batchnorm", "head_dropout", "output")
    idle = given(args, *of_head) if args.classes is None or is_folder else {}
    if is_folder:
        idle |= given(args, "classes", "image_size", "pool", "features_from")
    if idle:
        flags = ", ".join("--" + name.replace("_", "-") for name in idle)
        why = "a run folder has its own head and image size" if is_folder else "without --classes there is no head"
        raise RecipeError(f"summary {args.model}: {flags} would change nothing, since {why}. Leave it out.")


def _preview_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("photos", metavar="PHOTOS", help=PHOTOS_HELP)
    parser.add_argument("--out", metavar="FILE", help="png, jpg, pdf or svg (default: preview.png)")
    parser.add_argument("--backbone", metavar="NAME", help=f"for its preparation (default: {DEFAULT_BACKBONE})")
    parser.add_argument("--seed", type=int, metavar="N", help="which pictures, and how they are changed")
    add_root_option(parser)
    add_bad_files_option(parser, "stop where it is drawn (no others are opened), or open all, name it and go on")
    add_augment_option(parser)
    add_picture_options(parser)


def _preview(args: argparse.Namespace) -> int:
    recipe = apply_overrides(load_recipe(DEFAULT_RECIPE), {"augment": args.augment, "erasing": args.erasing})
    if args.seed is not None:
        check_number("preview", "--seed", args.seed, 0, whole=True)
    overrides = picture_overrides(vars(args))
    out = args.out or "preview.png"
    check_picture("Preview", out)
    from .backbones import create_backbone, override_spec
    from .dataset import load_images
    from .groundwork import say_left_out
    from .sheets import preview_sheet

    _, spec = create_backbone(args.backbone or DEFAULT_BACKBONE, weights="none", image_size=overrides.get("image_size"))
    skips = args.bad_files == "skip"  # otherwise only the pictures of the sheet are decoded
    table = load_images(args.photos, root=args.root, check=skips, **given(args, "bad_files"))
    say_left_out(table, skips)
    spec = override_spec(spec, **overrides)
    print(preview_sheet(table, spec, recipe.augment, out, **given(args, "seed")))
    return 0


def _demo_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", metavar="FOLDER", help="where the pictures and the runs go (default: runs/demo)")
    parser.add_argument("--seed", type=int, metavar="N", help="of the split, the first weights and the order")
    add_quiet_option(parser)


def _demo(args: argparse.Namespace) -> int:
    from . import demo

    result = demo.run_demo(progress=not args.quiet, **given(args, "out", "seed"))
    print(terminal.scores_table(result.scores))
    print(f"\nreport  {short_path(result.report_path)}")
    return 0


# ---- main ------------------------------------------------------------------------------------------------------

COMMANDS: dict[str, Command] = {
    "fit": Command(
        "train a classifier on a folder of labelled pictures",
        "PHOTOS [options]",
        _fit_options,
        _fit,
    ),
    "audit": AUDIT,
    "advise": cli_advise.COMMAND,
    "compare": cli_compare.COMMAND,
    "shootout": cli_shootout.COMMAND,
    "lr": cli_tuning.LR,
    "sweep": cli_tuning.SWEEP,
    "evaluate": EVALUATE,
    "predict": PREDICT,
    "familiar": FAMILIAR,
    "export": EXPORT,
    "serve": SERVE,
    "summary": Command(
        "list a model's layers, with the freeze line drawn in", "BACKBONE|RUN [options]", _summary_options, _summary
    ),
    "preview": Command(
        "draw a sheet of labelled pictures and of one picture's augmentations",
        "PHOTOS [options]",
        _preview_options,
        _preview,
    ),
    "cache": Command(
        "show or empty the cache folder: decoded pictures and stored features",
        "list|clear [options]",
        add_cache_options,
        run_cache,
        "HEADSTART_CACHE sets the folder, HEADSTART_CACHE_LIMIT its largest size (default 20GB).",
    ),
    "demo": Command(
        "transfer between scanned digits in two minutes, without network", "[options]", _demo_options, _demo
    ),
}


def build_parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser of `headstart`, and that of each command by its name."""
    shared: dict[str, Any] = {"formatter_class": _formatter, "allow_abbrev": False}
    parser = _Parser(
        prog="headstart",
        usage="headstart COMMAND ...",
        description="Fine-tune pretrained image classifiers. `headstart COMMAND --help` lists a command's options.",
        **shared,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version")
    parser.add_argument("--debug", action="store_true", help="show the whole trace of an error")
    words = parser.add_subparsers(metavar="COMMAND", dest="command", required=True, title="commands", prog="headstart")
    parsers: dict[str, argparse.ArgumentParser] = {}
    for name, command in COMMANDS.items():
        one = words.add_parser(
            name,
            help=command.title,
            usage=f"headstart {name} {command.usage}",
            description=f"{command.title[0].upper()}{command.title[1:]}.",
            epilog=command.notes,
            **shared,
        )
        command.add_options(one)
        # Left out of the namespace when absent, so that `headstart --debug fit` is not undone.
        one.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show the trace of an error")
        parsers[name] = one
    return parser, parsers


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser, parsers = build_parser()
    args, extra = parser.parse_known_args(argv)
    if extra:
        one = parsers[args.command]
        flags = tuple(flag for action in one._actions for flag in action.option_strings if flag.startswith("--"))
        flag = extra[0].partition("=")[0]
        close = near_matches(flag, flags, n=1) if flag.startswith("-") else ""
        one.error(f"{extra[0]!r} is not understood.{close}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for bad input, 130 after Ctrl-C."""
    with _open_streams():
        args = _parse(argv)
        try:
            with _stopped_by_the_system():
                _refuse_together(args)
                code = COMMANDS[args.command].run(args)
                sys.stdout.flush()
                return code
        except (HeadstartError, OSError, KeyboardInterrupt) as error:
            # The reader of our output may have seen enough, as in `headstart summary vgg16 | head`.
            code = 0 if isinstance(error, BrokenPipeError) and _is_unread(sys.stdout) else _explain(error, args)
            _silence_if_stuck(sys.stdout)
            return code
        except (MemoryError, RuntimeError) as error:
            from .memory import is_out_of_memory  # with PyTorch, which a RuntimeError comes from

            if not is_out_of_memory(error):
                raise
            words = f"Out of memory ({in_words(error)}). Take a smaller --image-size or --backbone, or free memory."
            return _explain(SetupError(words), args)


@contextmanager
def _open_streams() -> Iterator[None]:
    """Stdout and stderr can be written to, whatever the caller has made of them.

    Where one is closed, what would go there goes nowhere. A class or file name that a terminal cannot show is escaped.
    """
    with ExitStack() as stack:
        for name, redirect in (("stdout", redirect_stdout), ("stderr", redirect_stderr)):
            stream = getattr(sys, name)
            if stream is None or getattr(stream, "closed", False):
                nowhere = stack.enter_context(Path(os.devnull).open("w", encoding="utf-8", errors="backslashreplace"))
                stack.enter_context(redirect(nowhere))
            elif isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        try:
            yield
        finally:
            _silence_if_stuck(sys.stderr)


def _is_unread(stream: TextIO) -> bool:
    """Whether nobody reads any more what goes into this stream, a pipe."""
    try:
        stream.flush()
        reader = select.poll()
        reader.register(stream.fileno(), 0)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in reader.poll(0))
    except BrokenPipeError:
        return True
    except (OSError, ValueError, AttributeError):  # no file behind it, or a system without `poll`
        return False


def _silence_if_stuck(stream: TextIO) -> None:
    """What a stream holds and cannot write goes nowhere: Python would try again at its end, for another exit code."""
    try:
        stream.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextmanager
def _stopped_by_the_system() -> Iterator[None]:
    """SIGTERM, by which a queue or a container ends a program, is taken as Ctrl-C is: what there is is kept.

    Not in processes that work together, which would wait for one another.
    """
    here = threading.current_thread() is threading.main_thread() and launched()[1] == 1
    if not here or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _refuse_together(args: argparse.Namespace) -> None:
    """Of processes that work together only those of `fit` wait for each other, and leave writing to one."""
    what = f"{args.command} --auto" if getattr(args, "auto", False) else args.command
    world = launched()[1]
    if world > 1 and hasattr(args, "device") and what != "fit":
        raise SetupError(
            f"{what} runs in one process, and {world} have been started together, as WORLD_SIZE or the like says; only"
            " fit trains in several. Start it without accelerate launch or torchrun."
        )


def _explain(error: BaseException, args: argparse.Namespace) -> int:
    """One clear message on stderr, behind the trace when `--debug` asks for it; returns the exit code."""
    if args.debug:
        import traceback

        terminal.say("".join(traceback.format_exception(error)).rstrip(), last=True)
    if isinstance(error, (Interrupted, KeyboardInterrupt)):
        terminal.say(str(error) or "Stopped by hand. Give the same command again to start over.", last=True)
        return EXIT_INTERRUPTED
    rank = launched()[0]
    # What all processes run into, the main one tells; of the others a line is enough to find the one that is alone.
    words = f"(process {rank}) {str(error).partition(chr(10))[0]}" if rank else str(error)
    terminal.say(f"headstart {args.command}: error: {words}", last=True)
    return EXIT_BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
