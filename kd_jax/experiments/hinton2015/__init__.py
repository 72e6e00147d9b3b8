"""Hinton, Vinyals and Dean (2015), section 3: every row of its MNIST table."""
