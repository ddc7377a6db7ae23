"""The meta-learning algorithms, one file each.

An algorithm is added by writing its file and naming its class here: configuration, command line, tests and
distribution follow from that.
"""

from distmeta.algorithms.maml import MAML
from distmeta.algorithms.reptile import Reptile
from distmeta.core.algorithm import MetaAlgorithm

ALGORITHMS: dict[str, type[MetaAlgorithm]] = {"maml": MAML, "reptile": Reptile}

__all__ = ["ALGORITHMS", "MAML", "MetaAlgorithm", "Reptile"]
