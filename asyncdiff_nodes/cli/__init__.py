"""The command line: ``python -m asyncdiff_nodes COMMAND`` or, when installed, ``asyncdiff COMMAND``."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "demo": "make pictures with the shipped model, sequentially and with AsyncDiff, side by side",
    "demo-comfy": "run the demo workflow in an installed ComfyUI and keep the picture",
    "plan": "show where a model would be cut, what crosses the cuts and the predicted speed-up",
    "plans": "show what each of 2, 3 and 4 devices would hold and send of every model, at its true size",
    "bench": "measure plans with real processes against the unrouted model",
    "compare": "measure what asynchrony does to the pictures, beside fewer steps at equal cost",
    "similarity": "show how alike each block's output is from step to step",
    "selftest": "try out whether this machine's devices work together exactly, and how fast",
    "doctor": "check this machine and say what is wrong and how to cure it",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    words = sys.argv[1:] if argv is None else list(argv)
    asked = next((word for word in words if word in COMMANDS), None)
    try:
        return _main(words, asked)
    except ModuleNotFoundError as error:
        from .packages import missing

        if not (needed := missing(error)):
            raise
        print(f"asyncdiff {asked} needs {needed}", file=sys.stderr)
        return 2


def _main(words: Sequence[str], asked: str | None) -> int:
    parser = argparse.ArgumentParser(prog="asyncdiff", description="All of your devices denoise one image together.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        command = commands.add_parser(
            name, help=summary, description=summary[0].upper() + summary[1:] + ".",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )  # fmt: skip
        if name == asked:  # no other: each needs packages of its own
            module = importlib.import_module(f"{__name__}.commands.{name.replace('-', '_')}")
            module.add_arguments(command)
            file = getattr(module, "JSON", None)
            command.add_argument("--json", metavar="FILE", default=file, help="also write the numbers to FILE")
            command.set_defaults(run=module.run)
    arguments = parser.parse_args(words)
    arguments.invocation = " ".join(["asyncdiff", *words])

    from asyncdiff_nodes.engine import AsyncDiffError

    from .report import write_json

    try:
        result = arguments.run(arguments)
        if arguments.json:
            write_json(arguments.json, result, arguments.invocation)
    except (AsyncDiffError, FileNotFoundError, ValueError) as error:
        print(f"asyncdiff {arguments.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 1 if result.get("failed") else 0
