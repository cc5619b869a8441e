"""Evaluation: calibration, classes, ImageNet's other sets; ``python -m tools.validate --help``."""
