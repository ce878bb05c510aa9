"""Ranks on several machines, placed by Ray (extra ``ray``). docs/ray.md says how to set it up.

A device of a cluster is named by the cluster's address: ``ray:auto`` for the one that this machine belongs to, or
``ray://HOST:PORT`` for one that is reached through Ray Client. That is one of its GPUs; with ``/cpu`` after it, one of its CPU
cores. A list of one such name stands for all that the cluster has: its GPUs, or a core on each of its machines.
"""
