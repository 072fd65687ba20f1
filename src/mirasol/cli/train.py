"""`mirasol train`: trains a recipe."""

import dataclasses
import os
import re
import sys
import types
import typing
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mirasol.cli import finetune, plan
from mirasol.cli.tables import ablate, experiment
from mirasol.errors import UserError

if TYPE_CHECKING:
    from argparse import ArgumentParser
    from collections.abc import Callable

    from jsonargparse import Namespace

HELP = "train a model from a recipe"
DESCRIPTION = """Trains a recipe (YAML) and writes the run into the recipe's output folder.

Every key of the recipe is also an option. Later --config files override earlier ones, options override all files.

  mirasol train --config recipes/demo.yaml
  mirasol train --config recipes/demo.yaml --output runs/slow --optimizer.learning_rate 1e-5
  mirasol train --config recipes/demo.yaml --resume        continue an interrupted run, bit-identically
  mirasol train --config recipes/demo.yaml --print-recipe  print the recipe with all defaults"""

# Options that are not keys of the recipe, for each command that takes a recipe.
_BARE_KEY = re.compile(r"\w+(\.\w+)*=")
_OWN_OPTIONS = {
    "train": ("--config", "--resume", "--print-recipe"),
    "plan": plan.OWN,
    "finetune": finetune.OWN,
    "experiment": experiment.OWN,
    "ablate": ablate.OWN,
}


def add_arguments(parser: "ArgumentParser", make: "Callable[..., ArgumentParser]") -> None:
    """Declares the options that are not keys of a recipe."""
    parser.add_argument("--config", type=str, action="append", metavar="FILE", help="a recipe file; may be repeated")
    parser.add_argument("--resume", action="store_true", help="continue the run in the output folder, or start it")
    parser.add_argument("--print-recipe", action="store_true", help="print the recipe with all defaults, and stop")


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separates the arguments of the commands that take a recipe into their own options and its keys.

    `--key.path value` and `--key.path=value` become `key.path=value`, which `finetune` and `experiment` take as it is,
    too. Raises UserError for a key without a value.
    """
    if not arguments or arguments[0] not in _OWN_OPTIONS:
        return list(arguments), []
    own, overrides, rest = [arguments[0]], [], list(arguments[1:])
    names = (*_OWN_OPTIONS[arguments[0]], "--help", "-h")
    takes_bare = arguments[0] in ("finetune", "experiment")
    while rest:
        word = rest.pop(0)
        name, equals, _ = word.partition("=")
        if name == "--config" and not equals:
            own += [word, *rest[:1]]
            rest = rest[1:]
        elif takes_bare and _BARE_KEY.match(word) and (own[-1] not in names or own[-1] in experiment.FLAGS):
            overrides.append(word)
        elif not word.startswith("--") or name in names:
            own.append(word)
        elif equals:
            overrides.append(word.removeprefix("--"))
        elif rest and not rest[0].startswith("--"):
            overrides.append(f"{word.removeprefix('--')}={rest.pop(0)}")
        else:
            raise UserError(f"{word}: needs a value, e.g. {word} VALUE")
    return own, overrides


def format_recipe_help() -> str:
    """All keys of a recipe with their types and defaults as options, for the help."""
    from mirasol.config.recipe import Recipe, Stage

    lines = [
        "keys of a recipe:",
        *_list_keys(Recipe, "--"),
        "keys of each stage:",
        *_list_keys(Stage, "--stages.NAME."),
    ]
    return "\n".join(lines)


def format_changes_help() -> str:
    """All keys of a recipe as `finetune` takes them, for its help."""
    from mirasol.config.recipe import Recipe, Stage

    head = "keys of the recipe, as KEY=VALUE; what is not given the rules choose (docs/finetuning.md):"
    keys = [*_list_keys(Recipe, "", "chosen"), *_list_keys(Stage, "stages.finetune.", "chosen")]
    return "\n".join([head, *keys])


def _list_keys(kind: type, prefix: str, without_default: str = "required") -> list[str]:
    lines = []
    for field in dataclasses.fields(kind):
        kinds = typing.get_args(field.type) if isinstance(field.type, types.UnionType) else (field.type,)
        if part := next((kind for kind in kinds if dataclasses.is_dataclass(kind)), None):
            lines += _list_keys(part, f"{prefix}{field.name}.", without_default)
            continue
        name = field.type.__name__ if isinstance(field.type, type) else str(field.type)
        name = name.replace("typing.", "").replace("mirasol.config.recipe.", "")
        default = without_default
        if field.default is not dataclasses.MISSING:
            default = f"default: {'null' if field.default is None else field.default}"
        elif field.default_factory is not dataclasses.MISSING:
            default = "has defaults"
        lines.append(f"  {prefix}{field.name}  ({name}, {default})")
    return lines


def run(options: "Namespace") -> None:
    """Trains. Prints the folder of the finished checkpoint."""
    from mirasol.config.recipe_io import load_recipe

    if not options.config:
        raise UserError("train needs a recipe: mirasol train --config recipes/demo.yaml")
    recipe = load_recipe(options.config, options.get("overrides") or [])
    if options.print_recipe:
        import yaml

        sys.stdout.write(yaml.safe_dump(recipe.to_dict(), sort_keys=False))
        return
    import mirasol.auto  # noqa: F401 - a resumed run loads its processor through the Auto classes
    from mirasol.console import make_console
    from mirasol.training.trainer import train

    folder = train(recipe, resume=options.resume, console=make_console())
    if os.environ.get("RANK", "0") == "0":  # with torchrun, only the first process prints
        sys.stdout.write(f"{folder}\n")
