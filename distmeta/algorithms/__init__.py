"""The meta-learning algorithms, one file each.

An algorithm is added by writing its file and naming its class here: configuration, command line, tests and
distribution follow from that.
"""

from distmeta.algorithms.cavia import CAVIA
from distmeta.algorithms.e_maml import EMAML
from distmeta.algorithms.imaml import IMAML
from distmeta.algorithms.joint import Joint
from distmeta.algorithms.learned_optimizer import LearnedOptimizer
from distmeta.algorithms.maml import MAML
from distmeta.algorithms.maml_pp import MAMLpp
from distmeta.algorithms.meta_curvature import MetaCurvature
from distmeta.algorithms.meta_sgd import MetaSGD
from distmeta.algorithms.promp import ProMP
from distmeta.algorithms.protomaml import ProtoMAML
from distmeta.algorithms.r2d2 import R2D2
from distmeta.algorithms.reptile import Reptile
from distmeta.algorithms.warpgrad import WarpGrad
from distmeta.core.algorithm import MetaAlgorithm

ALGORITHMS: dict[str, type[MetaAlgorithm]] = {
    "cavia": CAVIA,
    "e-maml": EMAML,
    "imaml": IMAML,
    "joint": Joint,
    "learned-optimizer": LearnedOptimizer,
    "maml": MAML,
    "maml-pp": MAMLpp,
    "meta-curvature": MetaCurvature,
    "meta-sgd": MetaSGD,
    "promp": ProMP,
    "protomaml": ProtoMAML,
    "r2d2": R2D2,
    "reptile": Reptile,
    "warpgrad": WarpGrad,
}

__all__ = [
    "ALGORITHMS",
    "CAVIA",
    "EMAML",
    "IMAML",
    "MAML",
    "R2D2",
    "Joint",
    "LearnedOptimizer",
    "MAMLpp",
    "MetaAlgorithm",
    "MetaCurvature",
    "MetaSGD",
    "ProMP",
    "ProtoMAML",
    "Reptile",
    "WarpGrad",
]
