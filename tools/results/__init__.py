"""Claims of the papers at small scale: trains both sides of each, and tabulates the outcome."""
