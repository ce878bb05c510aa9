"""Planning, before a run: a model's blocks, where to cut them, who computes what when, and how long that takes."""
