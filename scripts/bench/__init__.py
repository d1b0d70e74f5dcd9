"""Seconds, bytes and FLOPs of ours beside diffusers' Flax and torch: ``python -m scripts.bench`` times them."""
