"""Jobs of pictures that are killed and go on."""
