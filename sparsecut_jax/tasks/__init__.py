"""Tasks that a model is trained for and tested on, one file each; see registry.py."""
