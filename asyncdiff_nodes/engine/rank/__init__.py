"""One rank: its own blocks, stubs for those of others, and links to other ranks."""
