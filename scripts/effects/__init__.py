"""What each method does to the embedded model's pictures, measured with intervals."""
