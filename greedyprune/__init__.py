"""Physically smaller torch models by greedy forward selection.

selection = greedyprune.select(model, data)
small = greedyprune.prune(model, selection)
"""

from importlib.metadata import PackageNotFoundError, version

from .graph.slices import NotPrunableError
from .kernels.backend import show_config
from .objectives.options import Fisher, Imitation, Loss
from .pretraining import theory
from .pretraining.history import Check
from .pretraining.monitor import PretrainingMonitor
from .selector import select
from .sizes.budget import Budget
from .surgery.cut import prune, recalibrate
from .surgery.layer_selection import LayerSelection
from .surgery.layers import layers
from .surgery.optimizer import prune_optimizer
from .surgery.refit import refit
from .surgery.saving import load_pruned, save_pruned
from .surgery.selection import Selection

try:
    __version__ = version("greedyprune")
except PackageNotFoundError:  # a checkout on the path, not installed
    __version__ = "unknown"

__all__ = [
    "Budget", "Check", "Fisher", "Imitation", "LayerSelection", "Loss", "NotPrunableError",
    "PretrainingMonitor", "Selection", "layers", "load_pruned", "prune", "prune_optimizer",
    "recalibrate", "refit", "save_pruned", "select", "show_config", "theory",
]  # fmt: skip
