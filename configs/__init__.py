"""Command-line flags, recipe files (``configs/*.yaml``) that preset them, and launchers."""

from configs.flags import ConfigError, get_args_parser, keyword_arguments, parse_args
from configs.launch import LaunchError, Place, find_place, rendezvous

__all__ = [
    "ConfigError",
    "LaunchError",
    "Place",
    "find_place",
    "get_args_parser",
    "keyword_arguments",
    "parse_args",
    "rendezvous",
]
