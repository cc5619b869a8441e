"""Recipe files: YAML mappings from flags of ``main.py`` to values."""

import argparse
import os
from argparse import BooleanOptionalAction as OnOff
from pathlib import Path
from typing import Any

import yaml

from models.errors import did_you_mean
from pipeline.sources.download import PIPE
from training.parser import Parser, takes_image_size
from utils import UserError

RECIPES = Path(__file__).resolve().parent.parent / "configs"
ON_COMMAND_LINE = ("help", "config", "overwrite")  # flags that a recipe cannot give
MAX_RECIPE = 1 << 15  # characters


class _StrictLoader(yaml.SafeLoader):
    """Rejects duplicate keys, of which PyYAML's loader takes the last one, and aliases."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        if self.check_event(yaml.AliasEvent):  # a few of them make billions of values
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "aliases are not supported", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: list[Any] = []
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key!r} is given twice", key_node.start_mark
                )
            seen.append(key)
        return super().construct_mapping(node, deep)


def recipe_path(name: str) -> str:
    """Return the path of a recipe: a file, else one of ``configs/``, with or without ``.yaml``.

    Raises:
        UserError: There is none; names those that are nearest.
    """
    if os.path.exists(name) and not os.path.isdir(name):
        return name
    known = {path.stem: path for path in RECIPES.glob("*.yaml")}
    asked = Path(name).name.removesuffix(".yaml")
    if asked in known and name in (asked, f"{asked}.yaml"):
        return str(known[asked])
    raise UserError(f"there is no recipe {name}{did_you_mean(asked, known)}")


def recipe_argv(parser: Parser, name: str) -> list[str]:
    """Return the flags of a recipe as command-line words.

    Args:
        parser: Of all flags.
        name: As :func:`recipe_path` takes it.

    Raises:
        UserError: The file cannot be read, has an unknown or duplicate flag, or a flag does not
            accept its value.
    """
    path = recipe_path(name)
    try:
        with open(path) as file:
            text = file.read(MAX_RECIPE + 1)
        if len(text) > MAX_RECIPE:
            raise ValueError(f"it has more than {MAX_RECIPE} characters")
        recipe = yaml.load(text, _StrictLoader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())  # a place in YAML has lines
        raise UserError(f"cannot read recipe {path}: {reason}") from error
    if not isinstance(recipe, dict):
        raise UserError(f"recipe {path} must be a mapping of flags to values")
    actions = _actions(parser)
    argv: list[str] = []
    spelled: dict[str, Any] = {}
    for key, value in recipe.items():
        name = str(key).replace("-", "_")
        if name in ON_COMMAND_LINE:
            raise UserError(f"recipe {path}: {key!r} can be given on the command line only")
        if name not in actions:
            raise UserError(f"recipe {path}: {key!r}: {parser.unknown_flag(f'--{key}')}")
        dest = actions[name].dest
        if dest in spelled:
            raise UserError(f"recipe {path}: {key!r} and {spelled[dest]!r} are the same flag")
        spelled[dest] = key
        if value is None or value == actions[name].default == []:
            continue
        try:
            argv += _words(parser, actions[name], value)
        except (ValueError, argparse.ArgumentError) as error:
            reason = getattr(error, "message", error)
            raise UserError(f"recipe {path}: {key!r} is {value!r}: {reason}") from error
    return argv


def _actions(parser: Parser) -> dict[str, argparse.Action]:
    """Return the flags that a recipe may give, by all spellings without dashes."""
    return {
        name.lstrip("-").replace("-", "_"): action
        for action in parser._actions
        if action.dest not in ON_COMMAND_LINE
        for name in [f"--{action.dest}", *action.option_strings]
        if name.startswith("--") and not name.startswith("--no-")
    }


def _words(parser: argparse.ArgumentParser, action: argparse.Action, value: Any) -> list[str]:
    """Return a flag of a recipe and its value as command-line words.

    Raises:
        ValueError: The value has another type than the flag's.
        argparse.ArgumentError: The flag does not accept it.
    """
    flag = action.option_strings[0]
    if isinstance(action, OnOff) or action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError("it must be true or false")
        off = ["--no-" + flag.removeprefix("--")] if isinstance(action, OnOff) else []
        return [flag] if value else off
    if takes_image_size(action) and isinstance(value, list):
        value = "x".join(map(str, value))
    several = action.nargs == "+"
    values = value if several and isinstance(value, list) else [value]
    if any(str(item).lstrip().startswith(PIPE) for item in values):
        raise ValueError(f"a recipe runs no commands: give {flag} on the command line")
    if not values or any(isinstance(item, bool | list | dict) for item in values):
        raise ValueError("it must be one value" + (" or a list of values" if several else ""))
    for word in map(str, values):
        parser._check_value(action, parser._get_value(action, word))
    return [flag, *map(str, values)] if several else [f"{flag}={value}"]
