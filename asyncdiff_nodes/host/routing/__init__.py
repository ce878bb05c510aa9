"""One sampling: from the hooks on a model to the calls that go to ranks, and what decides how they go."""
