"""Image sources: folders, archives and datasets by name."""
