"""What scores are good for, in numbers: influence over time, agreement with retraining, finding and removing bad samples.

Every function takes arrays or an `Influence`. Here they stand together; each is written in the module it comes from.
"""

from dit_fast.cleaning import Cleaning, clean
from dit_fast.correlation import StageCorrelation, agreement, agreement_by_pattern, compare, stage_correlation
from dit_fast.curves import Curves, curves, stages
from dit_fast.datamodeling import LDS, draw_groups, lds, linear_datamodeling_score
from dit_fast.detection import (
    average_precision,
    detection_auc,
    detection_curve,
    detection_table,
    found_fraction,
    suspicion,
)
from dit_fast.patterns import PATTERNS, PatternRule, Patterns, patterns
from dit_fast.suspects import baselines, confidence, sample_losses, self_influence

__all__ = [
    "LDS",
    "PATTERNS",
    "Cleaning",
    "Curves",
    "PatternRule",
    "Patterns",
    "StageCorrelation",
    "agreement",
    "agreement_by_pattern",
    "average_precision",
    "baselines",
    "clean",
    "compare",
    "confidence",
    "curves",
    "detection_auc",
    "detection_curve",
    "detection_table",
    "draw_groups",
    "found_fraction",
    "lds",
    "linear_datamodeling_score",
    "patterns",
    "sample_losses",
    "self_influence",
    "stage_correlation",
    "stages",
    "suspicion",
]
