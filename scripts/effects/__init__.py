"""The effect of each method on the embedded model's pictures, measured with intervals."""
