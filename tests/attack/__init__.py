"""Attack test: hostile files, servers, environments and flags, each to be survived."""
