"""Claims of the papers at small scale: train every arm of each, and tabulate the results."""
