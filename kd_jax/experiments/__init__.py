"""What the commands run: the notebook's experiment, sweeps, and published tables."""
