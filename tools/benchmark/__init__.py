"""Speed and memory of this repository's models beside other implementations of them.

``python -m tools.benchmark --help``
"""
