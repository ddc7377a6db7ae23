"""Meta-gradients of many tasks as one compiled program (``train.strategy: compiled``)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from math import isfinite
from typing import Any

import torch

from distmeta.core.algorithm import MetaAlgorithm
from distmeta.core.types import Batch, Metrics, Params
from distmeta.errors import ConfigError, one_line

AtOnce = Callable[[Params, Batch, Batch], tuple[Params, Metrics]]  # by position
"""From joined meta-parameters and the support and query sets of some tasks, stacked, to their meta-gradients and
metrics, stacked."""

MOST = 16  # programs: each takes seconds to minutes to compile
TOLERANCE = 1e-3  # of the difference to what is compiled, relative: rounding leaves some 1e-6


class Programs:
    """A cache of compiled programs, one for each form of the data and phase of the algorithm.

    The function is run once on the data at hand, with all its derivatives, and the tensor operations are written down;
    torch's compiler makes one program of them, whose intermediate results mostly stay in registers. A network as small
    as that of the sinusoids spends most of its time between operations otherwise.

    Equal operations give equal programs on equal hardware, and so equal bits in every worker.
    """

    def __init__(self) -> None:
        self._kept: dict[Hashable, AtOnce] = {}

    def __reduce__(self) -> tuple[type[Programs], tuple[()]]:
        return Programs, ()  # each process compiles for itself

    def of(self, key: Hashable, function: AtOnce, params: Params, support: Batch, query: Batch) -> AtOnce:
        """The program of ``function`` for data of this form.

        Args:
            key: What ``function`` and the form of its arguments depend on.
            function, params, support, query: What to compile, and its arguments.

        Raises:
            ConfigError: There is no compiler, there are too many forms, or the program computes something else.
        """
        if key not in self._kept:
            if len(self._kept) == MOST:
                raise ConfigError(
                    "train.strategy: compiled makes one program for each form of the tasks and phase of the algorithm, "
                    f"and these have more than {MOST}: set train.strategy=vmap"
                )
            self._kept[key] = _compile(function, params, support, query)
        return self._kept[key]


def check_phases(algorithm: MetaAlgorithm, steps: int) -> None:
    """Raises `ConfigError` if the meta-gradient changes so often with the outer step that compiling is in vain."""
    phases = len({algorithm.phase(step) for step in range(steps)})
    if phases > MOST:
        raise ConfigError(
            f"the meta-gradient of {type(algorithm).__name__} changes {phases - 1} times in {steps} outer steps with "
            "these settings, and train.strategy: compiled would compile it each time: set train.strategy=vmap"
        )


def _compile(function: AtOnce, params: Params, support: Batch, query: Batch) -> AtOnce:
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns that there is no GPU
    from torch._dynamo.exc import BackendCompilerFailed  # these take a second to load
    from torch._inductor import config
    from torch.fx.experimental.proxy_tensor import make_fx

    # Dropout as uncompiled code draws it; no choice by measuring, which could differ from worker to worker.
    options: dict[str, Any] = {"fallback_random": True, "deterministic": True}
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices), torch.no_grad(), config.patch(compile_threads=1):
        torch.manual_seed(0)
        expected = function(params, support, query)
        traced = make_fx(function)(params, support, query)
        program: AtOnce = torch.compile(traced, fullgraph=True, dynamic=False, options=options)
        torch.manual_seed(0)
        try:
            found = program(params, support, query)
        except BackendCompilerFailed as error:
            raise ConfigError(
                f"train.strategy: compiled cannot be used here ({one_line(error.inner_exception)}): it needs a C++ "
                "compiler (g++), or Triton on a GPU; set train.strategy=vmap"
            ) from error
    both = [(found[0][name], tensor) for name, tensor in expected[0].items()]
    size = sum(float(tensor.square().sum()) for _, tensor in both)
    difference = (sum(float((one - other).square().sum()) for one, other in both) / (size + 1e-24)) ** 0.5
    if not difference < TOLERANCE and isfinite(size):  # what is not finite is told of by those who ask for it
        raise ConfigError(
            "train.strategy: compiled gives another meta-gradient than vmap does (relative difference "
            f"{difference:.1e}); set train.strategy=vmap"
        )
    return program
