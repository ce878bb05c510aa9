"""Patches that nodes put on a model: one file for each kind that ranks can compute, and reasons why only the host can."""
