"""Recipe files: YAML mappings of main.py's flags to values."""

import argparse
from argparse import BooleanOptionalAction as OnOff
from pathlib import Path
from typing import Any

import yaml

from utils import UserError


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that is there twice; PyYAML's own would take the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: list[Any] = []
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key!r} is there twice", key_node.start_mark
                )
            seen.append(key)
        return super().construct_mapping(node, deep)


def recipe_argv(parser: argparse.ArgumentParser, path: str) -> list[str]:
    """The flags of a recipe file as command-line words.

    Raises:
        UserError: The file cannot be read, names no flag or one twice, or a flag does not take
            its value.
    """
    try:
        recipe = yaml.load(Path(path).read_text(), _StrictLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read recipe {path}: {error}") from error
    if not isinstance(recipe, dict):
        raise UserError(f"recipe {path} must be a mapping of flags to values")
    actions = {action.dest: action for action in parser._actions}
    argv: list[str] = []
    spelled: dict[str, Any] = {}
    for key, value in recipe.items():
        name = str(key).replace("-", "_")
        if name not in actions or name in ("help", "config"):
            raise UserError(f"recipe {path}: {key!r} is no flag of main.py")
        if name in spelled:
            raise UserError(f"recipe {path}: {key!r} and {spelled[name]!r} are the same flag")
        spelled[name] = key
        if value is None or value == actions[name].default == []:
            continue
        try:
            argv += _words(parser, actions[name], value)
        except (ValueError, argparse.ArgumentError) as error:
            reason = getattr(error, "message", error)
            raise UserError(f"recipe {path}: {key!r} is {value!r}: {reason}") from error
    return argv


def _words(parser: argparse.ArgumentParser, action: argparse.Action, value: Any) -> list[str]:
    """A flag and its value in a recipe as command-line words.

    Raises:
        ValueError: The value is of another kind than the flag's.
        argparse.ArgumentError: The flag does not take it.
    """
    flag = action.option_strings[0]
    if isinstance(action, OnOff) or action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError("it must be true or false")
        off = ["--no-" + flag.removeprefix("--")] if isinstance(action, OnOff) else []
        return [flag] if value else off
    several = action.nargs == "+"
    values = value if several and isinstance(value, list) else [value]
    if not values or any(isinstance(item, bool | list | dict) for item in values):
        raise ValueError("it must be one value" + (" or a list of values" if several else ""))
    for word in map(str, values):
        parser._check_value(action, parser._get_value(action, word))
    return [flag, *map(str, values)] if several else [f"{flag}={value}"]
