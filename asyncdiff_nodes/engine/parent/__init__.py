"""The caller's side of a group: it starts ranks, tells them of each call, and watches them."""
