"""What several host tests, and some tools, share."""
