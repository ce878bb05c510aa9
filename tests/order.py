"""The order in which tests run."""


def together(items, shared):
    """Those with the same ``shared(item)`` one after the other, where the first of them stood: what they share is made once."""
    first = {}
    for position, item in enumerate(items):
        first.setdefault(shared(item), position)
    items.sort(key=lambda item: first[shared(item)])
