"""Pictures of what is within a net; see ``python -m tools.visualize --help``."""
