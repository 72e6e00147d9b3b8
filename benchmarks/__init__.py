"""Measurements: each script states what it measured, on what, and how often."""
