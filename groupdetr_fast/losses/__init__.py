"""From outputs and targets to losses: matchers and criteria. They know neither detectors nor training loops."""

from .criterion import SetCriterion
from .mask_criterion import MaskCriterion
from .mask_matcher import MaskMatcher
from .matcher import GroupMatcher, Matching

__all__ = ["GroupMatcher", "MaskCriterion", "MaskMatcher", "Matching", "SetCriterion"]
