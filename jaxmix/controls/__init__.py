"""One paper a file: the maths of each method as a control."""
