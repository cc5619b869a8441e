"""Speed and memory of this repository's models, compared with other implementations."""
