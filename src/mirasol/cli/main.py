"""The `mirasol` command: the only room that knows all others. Each command is a module in `mirasol.cli`.

Errors that are the user's to mend end as one line on stderr and exit code 2, an interruption with 130. A training that
a scheduler's signal stopped ends with 0.
"""

import errno
import sys
from collections.abc import Sequence
from typing import Any

from mirasol.cli import ask, compare, data, demo, evaluate, export, info, init, plan, score, train
from mirasol.errors import Stopped, UserError

DESCRIPTION = "Ask questions about what is seen and heard in a video; train and evaluate the model that answers them."
COMMANDS = {
    "ask": ask,
    "train": train,
    "plan": plan,
    "evaluate": evaluate,
    "score": score,
    "compare": compare,
    "data": data,
    "demo": demo,
    "info": info,
    "init": init,
    "export": export,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line (`sys.argv` by default). Raises SystemExit where it does not end well."""
    try:
        run(list(sys.argv[1:] if arguments is None else arguments))
    except UserError as error:
        _stop(None if getattr(error, "told_by_first", False) else str(error), 2)
    except Stopped as stopped:
        _stop(None if getattr(stopped, "told_by_first", False) else str(stopped), stopped.exit_code)
    except KeyboardInterrupt:
        _stop("interrupted", 130)
    except BrokenPipeError:
        sys.stderr.close()
        raise SystemExit(0) from None
    except OSError as error:
        # A full disk or a folder that may not be written: the system's own words name it; all else is a bug.
        if error.filename is None and error.errno != errno.ENOSPC:
            raise
        _stop(str(error), 2)


def run(arguments: list[str]) -> None:
    """Parses and executes. Raises UserError for what cannot be parsed."""
    try:
        import jsonargparse
    except ImportError as error:
        raise UserError("the command line needs the package jsonargparse: pip install jsonargparse") from error
    # A recipe's keys are options of `train` and `plan` without being declared: the recipe's own reader checks them.
    arguments, overrides = train.split_overrides(arguments)
    parser = _parser(jsonargparse, arguments)
    try:
        options = parser.parse_args(arguments)
    except jsonargparse.ArgumentError as error:
        words = [word for word in arguments[:1] if word in COMMANDS]
        message = _plain(error)
        for word in words:
            message = message.replace(f"{word}.", "")
        raise UserError(f"{message} (see `{' '.join(['mirasol', *words, '--help'])}`)") from error
    if options.command is None:
        parser.print_help()
        return
    _quiet_libraries()
    chosen = options[options.command]
    if overrides:
        chosen.overrides = overrides
    COMMANDS[options.command].run(chosen)


def _parser(jsonargparse: Any, arguments: Sequence[str]) -> Any:
    import argparse

    import mirasol

    class Formatter(argparse.RawDescriptionHelpFormatter, jsonargparse.DefaultHelpFormatter):
        """Types and defaults of jsonargparse, descriptions laid out as they are written."""

    def make(description: str, **settings: Any) -> Any:
        return jsonargparse.ArgumentParser(
            description=description, exit_on_error=False, formatter_class=Formatter, **settings
        )

    parser = make(DESCRIPTION, prog="mirasol", version=mirasol.__version__)
    commands = parser.add_subcommands(required=False, dest="command", metavar="COMMAND", title="commands")
    for name, command in COMMANDS.items():
        sub = make(command.DESCRIPTION)
        commands.add_subcommand(name, sub, help=command.HELP)
        command.add_arguments(sub, make)
        if command in (train, plan) and arguments[:1] == [name] and {"-h", "--help"} & set(arguments):
            sub.epilog = train.recipe_help()
    return parser


def _plain(error: Exception) -> str:
    """The gist of a parser's message on one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines).replace("Parser key ", "").removeprefix("error: ").rstrip(".")


def _quiet_libraries() -> None:
    """Progress bars and advice of transformers have no place beside this command's own output."""
    import importlib.util

    if importlib.util.find_spec("transformers") is None:
        return
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _stop(message: str | None, code: int) -> None:
    """Ends with one line, unless another process of the run has told it already."""
    if message is not None:
        sys.stderr.write(f"mirasol: {' '.join(message.split())}\n")
    raise SystemExit(code) from None
