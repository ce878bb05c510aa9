"""What nodes hang on a model: one file for each thing that ranks can compute, and what only the host can."""
