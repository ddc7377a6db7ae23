"""What distmeta offers to Python; each name loads its module when it is first used."""

from .adaptation import Adapted, adapt, evaluate
from .algorithms import (
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
from .core.types import Batch, Episode, Split, Task, TaskDistribution, TaskSpec
from .errors import DistmetaError, Stopped
from .runs import RunFolder
from .tasks.mixture import Mixture
from .training import resume, train

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
