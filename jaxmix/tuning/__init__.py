"""What learns: the update step, losses, input pipeline, checkpoints and the loop that joins them."""
