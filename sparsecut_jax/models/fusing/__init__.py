"""Ways of fusing, one file each; see models/interfaces.py."""
