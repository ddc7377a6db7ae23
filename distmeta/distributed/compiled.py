"""Meta-gradients of many tasks as one compiled program (``train.strategy: compiled``)."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Hashable
from typing import Any

import torch

from distmeta.core.algorithm import MetaAlgorithm
from distmeta.core.loss import Precision
from distmeta.core.types import Batch, Metrics, Params
from distmeta.errors import ConfigError, one_line

AtOnce = Callable[[Params, Batch, Batch], tuple[Params, Metrics]]  # by position
"""From joined meta-parameters and the support and query sets of some tasks, stacked, to their meta-gradients and
metrics, stacked."""

MOST = 16  # programs: each takes seconds to minutes to compile
TOLERANCE: dict[Precision, float] = {"float32": 1e-3, "bfloat16": 2e-2}
"""Of the relative difference to what is compiled: rounding mostly leaves some 1e-6, and in bfloat16 some 1e-3."""


class Programs:
    """A cache of programs, one for each form of the data and phase of the algorithm.

    To compile, the function is run once on the data at hand, with all its derivatives, and the tensor operations are
    written down; torch's compiler makes one program of them, whose intermediate results mostly stay in registers. A
    network as small as that of the sinusoids spends most of its time between operations otherwise.

    On a GPU a program is then recorded as a CUDA graph: its hundreds of kernels are started as one, and the GPU never
    waits for Python.

    Equal operations give equal programs on equal hardware, and so equal bits in every worker.
    """

    def __init__(self) -> None:
        self._kept: dict[Hashable, AtOnce] = {}
        self._pool: Any = None

    def __reduce__(self) -> tuple[type[Programs], tuple[()]]:
        return Programs, ()  # each process has its own

    def of(
        self,
        key: Hashable,
        function: AtOnce,
        params: Params,
        support: Batch,
        query: Batch,
        precision: Precision = "float32",
    ) -> AtOnce:
        """The program of ``function`` for data of this form.

        Args:
            key: What ``function`` and the form of its arguments depend on.
            function, params, support, query: What to compile, and its arguments.
            precision: That of the model.

        Raises:
            ConfigError: There is no compiler, there are too many forms, or the program computes something else.
        """
        if key not in self._kept:
            if len(self._kept) == MOST:
                raise ConfigError(
                    "train.strategy: compiled makes one program for each form of the tasks and phase of the algorithm, "
                    f"and these have more than {MOST}: set train.strategy=vmap"
                )
            program = _compile(function, params, support, query, precision)
            self._kept[key] = self._recorded(program, params, support, query) if support[0].is_cuda else program
        return self._kept[key]

    def _recorded(self, program: AtOnce, params: Params, support: Batch, query: Batch) -> AtOnce:
        """``program`` as a CUDA graph. Those of all forms share the memory of what lies between: one runs at a time.

        Raises:
            ConfigError: The program waits for the GPU itself.
        """
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        held: tuple[Params, Batch, Batch] = (
            {name: tensor.clone() for name, tensor in params.items()},
            tuple(tensor.clone() for tensor in support),
            tuple(tensor.clone() for tensor in query),
        )
        graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        try:
            with torch.random.fork_rng(range(torch.cuda.device_count())), torch.no_grad():
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    program(*held)  # libraries must not be loaded, as at their first use on a stream, while it records
                torch.cuda.current_stream().wait_stream(side)
                with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                    gradient, metrics = program(*held)
        except torch.OutOfMemoryError:
            raise  # which has another remedy
        except RuntimeError as error:
            raise ConfigError(
                "train.strategy: compiled cannot be used here, since the meta-gradient cannot be recorded as a CUDA "
                f"graph ({one_line(error)}); set train.strategy=vmap"
            ) from error

        def replay(params: Params, support: Batch, query: Batch) -> tuple[Params, Metrics]:
            for name, tensor in params.items():
                held[0][name].copy_(tensor)
            for kept, given in zip(held[1] + held[2], support + query, strict=True):
                kept.copy_(given)
            graph.replay()
            first, second = ({n: t.clone() for n, t in results.items()} for results in (gradient, metrics))
            return first, second

        return replay


def check_phases(algorithm: MetaAlgorithm, steps: int) -> None:
    """Raises `ConfigError` if the meta-gradient changes so often with the outer step that compiling is in vain."""
    phases = len({algorithm.phase(step) for step in range(steps)})
    if phases > MOST:
        raise ConfigError(
            f"the meta-gradient of {type(algorithm).__name__} changes {phases - 1} times in {steps} outer steps with "
            "these settings, and train.strategy: compiled would compile it each time: set train.strategy=vmap"
        )


def _compile(function: AtOnce, params: Params, support: Batch, query: Batch, precision: Precision) -> AtOnce:
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns that there is no GPU
    from torch._dynamo.exc import BackendCompilerFailed  # these take a second to load
    from torch._inductor import config
    from torch.fx.experimental.proxy_tensor import make_fx

    # Dropout as uncompiled code draws it; no choice by measuring, which could differ from worker to worker; what is
    # rounded to bfloat16 stays so, where the compiler would leave out one cast and the next.
    options: dict[str, Any] = {"fallback_random": True, "deterministic": True}
    options["emulate_precision_casts"] = precision != "float32"
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    # Processes that compile beside each other pay for Triton's many small kernels alone.
    threads = {} if support[0].is_cuda else {"compile_threads": 1}
    with torch.random.fork_rng(devices), torch.no_grad(), config.patch(threads), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # advice to round to fewer bits, and what it cannot make faster
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
        difference, bound = _difference(found[0], expected[0]), TOLERANCE[precision]
        if difference >= bound:  # unless that is what a last bit of the parameters makes of it
            torch.manual_seed(1)
            nudged = {n: p + torch.finfo(p.dtype).eps * p * torch.randn_like(p) for n, p in params.items()}
            torch.manual_seed(0)
            bound = max(bound, 10 * _difference(function(nudged, support, query)[0], expected[0]))
    sound = all(bool(tensor.isfinite().all()) for tensor in expected[0].values())
    if sound and not difference < bound:  # what is not finite is told of by those who ask for it
        raise ConfigError(
            "train.strategy: compiled gives another meta-gradient than vmap does (relative difference "
            f"{difference:.1e}); set train.strategy=vmap"
        )
    return program


def _difference(one: Params, other: Params) -> float:
    """‖one − other‖ / ‖other‖."""
    size = sum(float(tensor.square().sum()) for tensor in other.values())
    distance = sum(float((one[name] - tensor).square().sum()) for name, tensor in other.items())
    return (distance / (size + 1e-24)) ** 0.5
