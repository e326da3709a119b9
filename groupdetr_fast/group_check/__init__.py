"""Whether the groups of a detector, of this package or any other, see each other in training."""

from .check import check_groups
from .evaluation_loss import EvaluationLoss
from .report import GroupReport, OutputReport

__all__ = ["EvaluationLoss", "GroupReport", "OutputReport", "check_groups"]
