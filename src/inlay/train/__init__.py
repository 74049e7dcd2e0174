"""Training: the loop, optimizers, metrics, checkpoints, and the folder that a run leaves."""
