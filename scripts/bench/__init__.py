"""Seconds, bytes and FLOPs of ours against diffusers' Flax and torch: ``python -m scripts.bench`` times them."""
