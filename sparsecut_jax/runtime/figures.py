"""matplotlib, set up to write files. Import it late: it takes a third of a second."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

__all__ = ["plt"]
