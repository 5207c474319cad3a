"""Models by name: aliases, and the hub's files in the cache."""
