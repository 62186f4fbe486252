"""Ways of injecting, one file each; see models/interfaces.py."""
