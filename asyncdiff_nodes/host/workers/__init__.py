"""The ranks as the host keeps them: groups, their memory, and the network and weights that they are given."""
