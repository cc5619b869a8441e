"""Evaluation beyond top-1: calibration, classes, and ImageNet's other test sets.

``python -m tools.validate --help``
"""
