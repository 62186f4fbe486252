"""SparseCut in JAX: a vision tower joined to a language model at many depths (arXiv 2602.00505)."""

__version__ = "0.1.0"
