"""What scores are good for, in numbers: influence over time, agreement with retraining, finding and removing bad samples.

Every function takes arrays or an `Influence`. Here they stand together; each is written in the module it comes from.
"""

from dit_fast.correlation import StageCorrelation, agreement, agreement_by_pattern, compare, stage_correlation
from dit_fast.curves import Curves, curves, stages
from dit_fast.detection import (
    average_precision,
    detection_auc,
    detection_curve,
    detection_table,
    found_fraction,
    suspicion,
)
from dit_fast.patterns import PATTERNS, PatternRule, Patterns, patterns

__all__ = [
    "PATTERNS",
    "Curves",
    "PatternRule",
    "Patterns",
    "StageCorrelation",
    "agreement",
    "agreement_by_pattern",
    "average_precision",
    "compare",
    "curves",
    "detection_auc",
    "detection_curve",
    "detection_table",
    "found_fraction",
    "patterns",
    "stage_correlation",
    "stages",
    "suspicion",
]
