"""Figures of the inside of models and of training; see ``python -m tools.visualize --help``."""
