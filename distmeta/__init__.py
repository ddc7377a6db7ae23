"""distmeta: distributed gradient-based meta-learning on Ray and PyTorch."""

from distmeta.adaptation import Adapted, adapt, evaluate
from distmeta.algorithms import (
    CAVIA,
    EMAML,
    IMAML,
    MAML,
    R2D2,
    Joint,
    LearnedOptimizer,
    MAMLpp,
    MetaAlgorithm,
    MetaCurvature,
    MetaSGD,
    ProMP,
    ProtoMAML,
    Reptile,
    WarpGrad,
)
from distmeta.core.types import Batch, Episode, Split, Task, TaskDistribution, TaskSpec
from distmeta.errors import DistmetaError, Stopped
from distmeta.runs import RunFolder
from distmeta.tasks.mixture import Mixture
from distmeta.training import resume, train

__all__ = [
    "CAVIA",
    "EMAML",
    "IMAML",
    "MAML",
    "R2D2",
    "Adapted",
    "Batch",
    "DistmetaError",
    "Episode",
    "Joint",
    "LearnedOptimizer",
    "MAMLpp",
    "MetaAlgorithm",
    "MetaCurvature",
    "MetaSGD",
    "Mixture",
    "ProMP",
    "ProtoMAML",
    "Reptile",
    "RunFolder",
    "Split",
    "Stopped",
    "Task",
    "TaskDistribution",
    "TaskSpec",
    "WarpGrad",
    "adapt",
    "evaluate",
    "resume",
    "train",
]
