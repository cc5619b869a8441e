"""Kill a training run again and again, resume it, and compare it with an undisturbed one, bitwise.

``python -m tools.crashtest`` runs it.
"""
