"""The pipeline: what is asked for, what a batch is drawn from, and the programs that draw it."""
