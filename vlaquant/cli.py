"""The command ``vlaquant``: each subcommand reads its arguments, calls one function, and shows what came of it."""

import argparse
import io
import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import datasets
from transformers.utils import logging as transformers_logging

from vlaquant.commands import (
    run_bench,
    run_doctor,
    run_evaluate,
    run_inspect,
    run_plan,
    run_qat,
    run_quantize,
    run_report,
    run_sensitivity,
)
from vlaquant.engine.processes import launched
from vlaquant.errors import RecipeError, VlaquantError
from vlaquant.evaluate.timing import CLOCKS
from vlaquant.recipe import parse_bytes
from vlaquant.terminal import STDOUT, complain, finish, quiet_stdout

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 failed, 2 bad usage."""
    args = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO if args.debug else logging.WARNING, format="%(message)s")
    if not args.debug:
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        datasets.disable_progress_bars()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that has no arrows must not end a run of hours
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with quiet_stdout(args.json):
            outcome = args.command(args)
        if outcome is not None:
            finish(outcome, args.json)
    except VlaquantError as error:
        if args.debug:
            traceback.print_exc()
        _complain(f"error: {error}", error)
        return EXIT_USAGE if isinstance(error, RecipeError) else EXIT_FAILED
    except KeyboardInterrupt as error:
        _complain("interrupted; no output was written", error)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever reads, such as head, has seen enough; nothing is left to be written when Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def _complain(message: str, error: BaseException) -> None:
    """One line, and what others noted about the error, such as how to go on."""
    rank, size = launched()
    who = f"vlaquant, process {rank}" if size > 1 else "vlaquant"
    complain(who, [message, *getattr(error, "__notes__", [])])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vlaquant", description="Quantize a vision-language-action policy, and prove it."
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks and the log")
    commands = parser.add_subparsers(required=True, metavar="command")

    run = commands.add_parser("quantize", help="write a packed checkpoint")
    _add_recipe_arguments(run)
    run.add_argument("--output", type=Path, help="directory to write; overrides the recipe's")
    run.add_argument("--overwrite", action="store_true", help="replace the output, or an unfinished run, if it exists")
    run.add_argument("--resume", action="store_true", help="go on with an unfinished run")
    run.add_argument("--max-memory", type=_bytes, metavar="SIZE", help="such as 8GB; a run that needs more is refused")
    run.add_argument(
        "--mode",
        choices=("replay", "rerun"),
        default="replay",
        help="rerun: run all of the model in every stage (slow)",
    )
    run.add_argument("--device", default="cpu", help="where the model runs while it is calibrated, such as cuda")
    run.add_argument("--log", type=Path, metavar="FILE", help="log of the run, JSON lines (default: OUTPUT.log.jsonl)")
    run.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    _add_json_argument(run)
    run.set_defaults(command=run_quantize)

    _add_qat_arguments(
        commands.add_parser("qat", help="fine-tune with rounded weights for a while, and write a packed checkpoint")
    )
    show = commands.add_parser("plan", help="print what a recipe would do to a model")
    _add_recipe_arguments(show)
    show.add_argument("--layers", action="store_true", help="one line a layer")
    _add_json_argument(show)
    show.set_defaults(command=run_plan)

    _add_sensitivity_arguments(commands.add_parser("sensitivity", help="print what each scheme does to each layer"))
    _add_eval_arguments(commands.add_parser("eval", help="compare a quantized checkpoint with its float original"))
    _add_bench_arguments(commands.add_parser("bench", help="measure kernels, or one action of a policy"))
    doctor = commands.add_parser("doctor", help="print what this machine has, and which kernels run on it")
    _add_json_argument(doctor)
    doctor.set_defaults(command=run_doctor)

    _add_report_arguments(commands.add_parser("report", help="write one HTML page about a quantized checkpoint"))
    inspect = commands.add_parser("inspect", help="print what a quantized checkpoint holds")
    inspect.add_argument("directory", type=Path)
    inspect.add_argument("--layers", action="store_true", help="one line a layer")
    _add_json_argument(inspect)
    inspect.set_defaults(command=run_inspect)
    return parser


def _add_qat_arguments(qat: argparse.ArgumentParser) -> None:
    _add_recipe_arguments(qat)
    qat.add_argument("--output", type=Path, required=True, help="directory to write")
    qat.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    qat.add_argument("--steps", type=int, required=True, metavar="N", help="of the optimizer")
    qat.add_argument("--learning-rate", type=float, default=1e-4, help="of the first step; falls linearly to 0")
    qat.add_argument("--batch", type=int, default=8, help="samples a step")
    qat.add_argument(
        "--follow",
        choices=("float", "demonstration"),
        default="float",
        help="what the loss compares with: the float model's decision (default), or the demonstrated one",
    )
    _add_json_argument(qat)
    qat.set_defaults(command=run_qat)


def _add_eval_arguments(evaluate: argparse.ArgumentParser) -> None:
    evaluate.add_argument("--model", type=Path, required=True, help="the quantized directory")
    evaluate.add_argument("--reference", type=Path, required=True, help="the float directory")
    data = evaluate.add_mutually_exclusive_group(required=True)
    data.add_argument("--episodes", type=Path, help="recorded episodes with a split 'evaluation' (policies)")
    data.add_argument("--text", type=Path, help="a text file (language models)")
    evaluate.add_argument("--unnorm-key", help="dataset whose action statistics apply, if the policy knows several")
    evaluate.add_argument("--samples", type=int, help="observations, or windows of text (default: all, or 32)")
    evaluate.add_argument("--sequence-length", type=int, default=512, help="tokens of one window of text")
    evaluate.add_argument("--control-hz", type=float, metavar="HZ", help="actions that the robot executes a second")
    _add_json_argument(evaluate)
    loop = evaluate.add_argument_group("closed loop")
    loop.add_argument("--rollouts", type=int, default=0, metavar="N", help="paired simulated episodes a task")
    loop.add_argument("--env", default="metaworld", help="metaworld[:TASK], gymnasium:ID or libero:SUITE[/TASK]")
    loop.add_argument("--env-option", action="append", default=[], metavar="KEY=VALUE", help="of the simulator")
    loop.add_argument("--max-steps", type=int, metavar="N", help="after which an episode has failed")
    loop.add_argument("--workers", type=int, metavar="N", help="processes; 0: this one (default: at most 4)")
    loop.add_argument("--videos", type=Path, metavar="DIR", help="keep videos of episodes that end differently")
    evaluate.set_defaults(command=run_evaluate)


def _add_sensitivity_arguments(scan: argparse.ArgumentParser) -> None:
    _add_recipe_arguments(scan)
    how = scan.add_mutually_exclusive_group()
    how.add_argument("--measured", action="store_true", help="only by rounding and running (default: both)")
    how.add_argument("--estimated", action="store_true", help="only by gradients")
    scan.add_argument("--progressive", action="store_true", help="lower the precision to the budget's tolerance")
    scan.add_argument("--samples", type=int, help="overrides the budget's")
    scan.add_argument("--device", default="cpu", help="such as cuda")
    _add_json_argument(scan, "; a budget can read it")
    scan.add_argument("--plot", type=Path, metavar="FILE", help="draw it, as .png, .svg or .pdf (needs matplotlib)")
    scan.set_defaults(command=run_sensitivity)


def _add_bench_arguments(bench: argparse.ArgumentParser) -> None:
    what = bench.add_mutually_exclusive_group(required=True)
    what.add_argument("model", type=Path, nargs="?", metavar="DIR", help="a checkpoint: measure one action of it")
    what.add_argument("--shapes", metavar="OUTxIN,...", help="measure kernels on weights such as 4096x11008")
    bench.add_argument("--rounds", type=int, help="measured rounds (default: 7 for shapes, 20 for a checkpoint)")
    bench.add_argument("--threads", type=int, help="default: 1 for shapes, all that torch uses for a checkpoint")
    bench.add_argument("--clock", choices=tuple(CLOCKS), default="wall", help="cpu: of this process; for busy machines")
    bench.add_argument("--device", default="cpu", help="such as cuda")
    _add_json_argument(bench)
    kernels = bench.add_argument_group("with --shapes")
    kernels.add_argument("--tokens", type=_numbers, metavar="N,...", help="rows of the input (default: 1,8,32,50,256)")
    kernels.add_argument("--schemes", metavar="NAME,...", help="default: w4a16,w8a8,w4a8")
    kernels.add_argument("--dtype", choices=("float32", "bfloat16"), help="of activations (default: float32)")
    kernels.add_argument("--group-size", type=int, metavar="N", help="of schemes with groups (default: 128)")
    action = bench.add_argument_group("with DIR")
    action.add_argument("--reference", type=Path, metavar="DIR", help="a checkpoint to compare with")
    action.add_argument("--episodes", type=Path, help="recorded episodes with a split 'evaluation'")
    action.add_argument("--unnorm-key", help="dataset whose action statistics apply, if the policy knows several")
    action.add_argument("--dtypes", help="of the reference; stored: as on disk (default: float32,bfloat16)")
    action.add_argument("--model-dtypes", help="of DIR (default: stored)")
    bench.set_defaults(command=run_bench)


def _add_report_arguments(page: argparse.ArgumentParser) -> None:
    what = page.add_mutually_exclusive_group(required=True)
    what.add_argument("model", type=Path, nargs="?", metavar="OUT", help="the quantized directory")
    what.add_argument("--compare", type=Path, nargs="+", metavar="OUT", help="several of them, side by side")
    page.add_argument("--output", type=Path, metavar="FILE", help="default: OUT.report.html, or comparison.html")
    page.add_argument("--eval", type=Path, nargs="+", metavar="FILE", help="of vlaquant eval --json, one for each OUT")
    page.add_argument(
        "--bench", type=Path, nargs="+", metavar="FILE", help="of vlaquant bench --json, one for each OUT"
    )
    inside = page.add_argument_group("with OUT: look into both models")
    inside.add_argument("--reference", type=Path, metavar="DIR", help="the float directory: weights are compared")
    inside.add_argument("--episodes", type=Path, help="recorded episodes: activations and actions are compared")
    inside.add_argument("--unnorm-key", help="dataset whose action statistics apply, if the policy knows several")
    inside.add_argument("--measured", type=Path, metavar="FILE", help="what --json FILE wrote: no model is needed")
    _add_json_argument(page, ", with all that was found inside of both models")
    page.set_defaults(command=run_report)


def _add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, required=True, metavar="RECIPE", help="the recipe, a YAML file")
    parser.add_argument("--model", type=Path, help="directory of the float model; overrides the recipe's")


def _add_json_argument(parser: argparse.ArgumentParser, more: str = "") -> None:
    told = f"print the result as JSON in place of the text, or write it to FILE beside that{more}"
    parser.add_argument("--json", type=Path, nargs="?", const=STDOUT, metavar="FILE", help=told)


def _bytes(text: str) -> int:
    """A size such as 8GB, 500MB, 6GiB or 123456."""
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _numbers(text: str) -> tuple[int, ...]:
    """Positive whole numbers such as 1,8,32."""
    if re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text) is None:
        raise argparse.ArgumentTypeError(f"{text!r} are no positive whole numbers; write them like 1,8,32")
    return tuple(map(int, text.split(",")))


if __name__ == "__main__":
    sys.exit(main())
