"""Checkpoint files: reading, verifying and loading weights."""
