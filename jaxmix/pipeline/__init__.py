"""The pipeline: requests, the job that a batch is drawn from, and the programs that draw it."""
