"""`mirasol train`: a recipe becomes a checkpoint."""

import dataclasses
import os
import sys
from collections.abc import Sequence
from typing import Any

from mirasol.cli import plan
from mirasol.errors import UserError

HELP = "train a model from a recipe"
DESCRIPTION = """Trains what a recipe (YAML) says into the recipe's output folder.

Every key of the recipe is an option too; of several --config files the later ones are laid over the earlier.

  mirasol train --config recipes/demo.yaml
  mirasol train --config recipes/demo.yaml --output runs/slow --optimizer.learning_rate 1e-5
  mirasol train --config recipes/demo.yaml --resume        go on with an interrupted run, to the same bits
  mirasol train --config recipes/demo.yaml --print-recipe  show what would be trained"""

# What is not a key of the recipe, for each command that takes one.
_OWN = {"train": ("--config", "--resume", "--print-recipe"), "plan": plan.OWN}


def add_arguments(parser: Any, make: Any) -> None:
    """Declares the arguments."""
    parser.add_argument("--config", type=str, action="append", metavar="FILE", help="the recipe; may be given again")
    parser.add_argument("--resume", action="store_true", help="go on with the run in the recipe's output folder")
    parser.add_argument("--print-recipe", action="store_true", help="print the resolved recipe and stop")


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Parts the arguments of `train` and `plan` that are keys of a recipe from its own.

    `--key.path value` and `--key.path=value` become `key.path=value`. Raises UserError for a key without a value.
    """
    if not arguments or arguments[0] not in _OWN:
        return list(arguments), []
    own, overrides, rest = [arguments[0]], [], list(arguments[1:])
    names = (*_OWN[arguments[0]], "--help", "-h")
    while rest:
        word = rest.pop(0)
        name, equals, _ = word.partition("=")
        if name == "--config" and not equals:
            own += [word, *rest[:1]]
            rest = rest[1:]
        elif not word.startswith("--") or name in names:
            own.append(word)
        elif equals:
            overrides.append(word.removeprefix("--"))
        elif rest and not rest[0].startswith("--"):
            overrides.append(f"{word.removeprefix('--')}={rest.pop(0)}")
        else:
            raise UserError(f"{word}: needs a value, e.g. {word} VALUE")
    return own, overrides


def recipe_help() -> str:
    """All keys of a recipe with their types and defaults, as the help shows them."""
    from mirasol.config.recipe import Recipe, Stage

    lines = ["keys of a recipe:", *_keys(Recipe, ""), "keys of each stage:", *_keys(Stage, "stages.NAME.")]
    return "\n".join(lines)


def _keys(kind: type, prefix: str) -> list[str]:
    lines = []
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.type):
            lines += _keys(field.type, f"{prefix}{field.name}.")
            continue
        name = field.type.__name__ if isinstance(field.type, type) else str(field.type)
        name = name.replace("typing.", "").replace("mirasol.config.recipe.", "")
        default = "required"
        if field.default is not dataclasses.MISSING:
            default = f"default: {'null' if field.default is None else field.default}"
        elif field.default_factory is not dataclasses.MISSING:
            default = "default: as it is"
        lines.append(f"  --{prefix}{field.name}  ({name}, {default})")
    return lines


def run(options: Any) -> None:
    """Trains; the last line on stdout is the checkpoint's folder."""
    from mirasol.config.recipe_io import load_recipe

    if not options.config:
        raise UserError("train needs a recipe: mirasol train --config recipes/demo.yaml")
    recipe = load_recipe(options.config, options.get("overrides") or [])
    if options.print_recipe:
        import yaml

        sys.stdout.write(yaml.safe_dump(recipe.to_dict(), sort_keys=False))
        return
    import mirasol.auto  # noqa: F401 - a resumed run finds its processor through the Auto classes
    from mirasol.console import make_console
    from mirasol.training.trainer import train

    folder = train(recipe, resume=options.resume, console=make_console())
    if os.environ.get("RANK", "0") == "0":  # torchrun numbers its processes: one tells for all
        sys.stdout.write(f"{folder}\n")
