"""Before a run: the blocks of a model, where to cut them, who computes what when, and how long that takes."""
