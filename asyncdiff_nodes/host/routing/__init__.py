"""One sampling: the hooks on a model, the calls that go to ranks, and the decisions about them."""
