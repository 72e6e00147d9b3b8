"""Training: steps and loops as pure functions, checkpoints, memory."""
