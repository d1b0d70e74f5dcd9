"""What users hold of each paper: one file each, a `jaxmix.pipeline.request.Method`."""
