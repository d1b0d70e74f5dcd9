"""The public form of each paper, one file each: a `jaxmix.pipeline.request.Method`."""
