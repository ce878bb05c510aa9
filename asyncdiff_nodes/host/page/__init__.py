"""What the page and the nodes show: state, progress, reports, and the user's settings."""
