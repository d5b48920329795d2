"""Files: hardened reads, atomic writes, and libraries that are optional."""
