"""Data: batches, sources of examples, and views of images."""
