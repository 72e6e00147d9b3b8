"""One module for each place that a `Dataset` can come from, each with a `load` that raises `DataError`."""
