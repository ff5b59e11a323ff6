"""dit_fast: which training samples made a model what it is, and when.

Dynamic Influence Tracker scores (Xu & Wu 2025, arXiv 2502.10793) from a log written in your own training loop.

    with dit_fast.Recorder("runs/mine", model, optimizer) as recorder: ...   # log
    trajectory = dit_fast.Trajectory.open("runs/mine")
    problem = dit_fast.Problem(model, per_sample_loss, data)
    result = dit_fast.score(trajectory, problem, dit_fast.queries.loss(x_val, y_val), windows="epochs")

Sign: a score above 0 means that removing the sample raises the query's value (for a loss: the sample helped).
Unit: the query's. Alphabet of shapes: T steps, N training samples, B batch, P parameters, K adjoint columns, W windows,
Q queries, S positions in a sequence, I/O in and out features, R rank.
"""

from dit_fast import analysis, queries, reference
from dit_fast.data import with_ids
from dit_fast.errors import LogError, UnsupportedError
from dit_fast.estimate import RetrainEstimate, ScoreEstimate, estimate_score
from dit_fast.factor_options import FactorOptions
from dit_fast.index import Index
from dit_fast.log_size import LogEstimate, estimate_log
from dit_fast.ops import build_info
from dit_fast.optimizers import SGD, Adam, AdamW
from dit_fast.problem import Problem
from dit_fast.recorder import Recorder
from dit_fast.result import Influence
from dit_fast.retrain import leave_one_out
from dit_fast.score import score
from dit_fast.trajectory import Trajectory

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "FactorOptions",
    "Index",
    "Influence",
    "LogError",
    "LogEstimate",
    "Problem",
    "Recorder",
    "RetrainEstimate",
    "ScoreEstimate",
    "Trajectory",
    "UnsupportedError",
    "analysis",
    "build_info",
    "estimate_log",
    "estimate_score",
    "leave_one_out",
    "queries",
    "reference",
    "score",
    "with_ids",
]
