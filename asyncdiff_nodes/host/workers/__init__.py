"""The ranks, seen from the host: groups, their memory, and the network and weights that they get."""
