"""Batch tools: rows in, images and a manifest out. Run from a checkout, as `python -m infer.generate`."""
