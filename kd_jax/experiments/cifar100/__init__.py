"""The table of the distillation papers on CIFAR-100: published numbers, and our own beside them."""
