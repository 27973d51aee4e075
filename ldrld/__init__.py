"""Local Dense Logit Relations for knowledge distillation. Importing this needs torch and nothing else."""
__version__ = "0.1.0"

from ldrld import losses
from ldrld.adw import adw_weights
from ldrld.loss import LDRLD

__all__ = ["LDRLD", "adw_weights", "losses"]
