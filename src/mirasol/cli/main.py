"""The `mirasol` command, which knows all other rooms. Each of its commands is a module in `mirasol.cli`.

A user's error ends as one line on stderr with exit code 2, an interruption with 130. A training that a scheduler's
signal stopped ends with 0.
"""

from __future__ import annotations

import argparse
import errno
import os
import re
import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mirasol.cli import (
    ask,
    data,
    demo,
    evaluate,
    explain,
    export,
    finetune,
    info,
    init,
    plan,
    train,
)
from mirasol.cli.serving import serve, watch
from mirasol.cli.tables import ablate, compare, experiment, score
from mirasol.errors import Stopped, UserError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

DESCRIPTION = "Ask questions about what is seen and heard in a video; train and evaluate the model that answers them."
COMMANDS = {
    "ask": ask,
    "watch": watch,
    "explain": explain,
    "finetune": finetune,
    "train": train,
    "plan": plan,
    "ablate": ablate,
    "evaluate": evaluate,
    "score": score,
    "serve": serve,
    "compare": compare,
    "experiment": experiment,
    "data": data,
    "demo": demo,
    "info": info,
    "init": init,
    "export": export,
}
LONGEST_MESSAGE = 2000


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line (`sys.argv` by default). Raises SystemExit unless it ends well."""
    before, warnings.formatwarning = warnings.formatwarning, format_warning
    try:
        run_command(list(sys.argv[1:] if arguments is None else arguments))
    except (UserError, Stopped) as error:
        code = error.exit_code if isinstance(error, Stopped) else 2
        _stop(None if getattr(error, "report_from_rank_zero", False) else str(error), code)
    except KeyboardInterrupt:
        _stop("interrupted", 130)
    except BrokenPipeError:
        sys.stderr.close()
        raise SystemExit(0) from None
    except OSError as error:
        # A full disk or missing permission, in the system's words; any other OSError is a bug.
        if error.filename is None and error.errno != errno.ENOSPC:
            raise
        _stop(str(error), 2)
    finally:
        warnings.formatwarning = before


def run_command(arguments: list[str]) -> None:
    """Parses and executes. Raises UserError for arguments that cannot be parsed."""
    try:
        import jsonargparse
    except ImportError as error:
        raise UserError("the command line needs the package jsonargparse: pip install jsonargparse") from error
    # A recipe's keys are options of `train` and `plan` without being declared: the recipe's own reader checks them.
    arguments, overrides = train.split_overrides(ask.move_options_last(arguments))
    parser = make_parser(arguments)
    try:
        options = parser.parse_args(arguments)
    except jsonargparse.ArgumentError as error:
        commands = [word for word in arguments[:1] if word in COMMANDS]
        message = _simplify_message(error)
        for command in commands:
            message = message.replace(f"{command}.", "")
        raise UserError(f"{message} (see `{' '.join(['mirasol', *commands, '--help'])}`)") from error
    if options.command is None:
        parser.print_help()
        return
    _silence_libraries()
    chosen = options[options.command]
    if overrides:
        chosen.overrides = overrides
    COMMANDS[options.command].run(chosen)


def make_parser(arguments: Sequence[str]) -> ArgumentParser:
    """The parser of all commands. The help of `train` and `plan`, if asked for, lists the keys of a recipe."""
    import jsonargparse

    import mirasol

    class Formatter(argparse.RawDescriptionHelpFormatter, jsonargparse.DefaultHelpFormatter):
        """jsonargparse's types and defaults; descriptions keep their layout."""

        def _get_help_string(self, action: argparse.Action) -> str:
            # jsonargparse marks a list of positional arguments as required, also one that may be empty.
            if not action.option_strings and action.nargs == argparse.ZERO_OR_MORE:
                return action.help or ""
            return super()._get_help_string(action)

    def make(description: str, **settings: Any) -> ArgumentParser:
        return jsonargparse.ArgumentParser(
            description=description, exit_on_error=False, formatter_class=Formatter, **settings
        )

    parser = make(DESCRIPTION, prog="mirasol", version=mirasol.__version__)
    commands = parser.add_subcommands(required=False, dest="command", metavar="COMMAND", title="commands")
    for name, command in COMMANDS.items():
        sub = make(command.DESCRIPTION)
        commands.add_subcommand(name, sub, help=command.HELP)
        command.add_arguments(sub, make)
        if (
            command in (train, plan, finetune, experiment)
            and arguments[:1] == [name]
            and {"-h", "--help"} & set(arguments)
        ):
            sub.epilog = train.format_changes_help() if command is finetune else train.format_recipe_help()
    return parser


def _simplify_message(error: Exception) -> str:
    """A parser's message on one line, without its own terms."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    message = " ".join(lines).replace("Parser key ", "").removeprefix("error: ").rstrip(".")
    wrong = re.fullmatch(r'"(?:\w+\.)*(\w+)": Expected an? <class \'(int|float)\'>\. Got value: (.*)', message)
    if wrong:
        kind = "a whole number" if wrong[2] == "int" else "a finite number"
        return f"--{wrong[1].replace('_', '-')} {wrong[3]}: is not {kind}"
    return message


def format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning as one line for users, without the place in the code that it came from."""
    return f"warning: {_shorten(str(message))}\n"


def _silence_libraries() -> None:
    """Turns off the progress bars and warnings of transformers, without importing it before it is needed."""
    if "transformers" in sys.modules:
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()
    else:
        os.environ["TRANSFORMERS_VERBOSITY"] = "error"
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"


def _shorten(message: str) -> str:
    """A message on one line of bounded length, with control characters as escapes: it may quote a file's content."""
    line = " ".join(message.split())
    line = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in line)
    return line if len(line) <= LONGEST_MESSAGE else f"{line[: LONGEST_MESSAGE // 2]} … {line[-LONGEST_MESSAGE // 2 :]}"


def _stop(message: str | None, code: int) -> None:
    """Ends with one line on stderr, or without one if another process of the run has reported the error."""
    if message is not None:
        sys.stderr.write(f"mirasol: {_shorten(message)}\n")
    raise SystemExit(code) from None
