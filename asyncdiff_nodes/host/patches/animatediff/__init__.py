"""AnimateDiff-Evolved: motion modules are further blocks of the ranks."""
