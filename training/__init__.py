"""A training run: flags, processes, state, files, and the loop over epochs."""
