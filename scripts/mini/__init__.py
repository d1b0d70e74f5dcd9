"""How the embedded model's parts are made, packaged and scored."""
