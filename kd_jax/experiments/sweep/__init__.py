"""A grid of settings, compared on a development split."""
