"""MAML: model-agnostic meta-learning (Finn, Abbeel, Levine, ICML 2017), with ANIL and BOIL as settings of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated

from distmeta.algorithms.unrolled import Unrolled
from distmeta.core.inner import InnerStep
from distmeta.core.types import MetaParams, Params, Task, TaskLoss
from distmeta.errors import ConfigError


@dataclass(frozen=True)
class MAML(Unrolled):
    """Learns an initialisation from which a few gradient steps solve a new task.

    Inner loop (their eq. 1), K steps on the support set S:  theta_{k+1} = theta_k − α ∇L(theta_k; S),  theta_0 = theta.

    Meta-gradient (their algorithm 2, line 8), on the query set Q, differentiated through the adaptation:
    ∇_theta L(theta_K(theta); Q), which for K = 1 is (I − α ∇²L(theta; S)) ∇L(theta_1; Q).

    With ``first_order`` the second derivatives are left out (their section 5.2): ∇L(theta_K; Q).

    The inner loop moves the parameters that match ``adapted_params`` and do not match ``frozen_params``; the outer loop
    learns all of them. ANIL (Raghu et al., ICLR 2020) adapts the head alone: ``adapted_params: ["classifier.*"]`` for
    the network ``conv4``. BOIL (Oh et al., ICLR 2021) adapts all but the head: ``frozen_params: ["classifier.*"]``.

    Raises:
        ConfigError: A setting is out of range (see `Unrolled`), or a pattern matches no parameter of the model.
    """

    adapted_params: Annotated[tuple[str, ...], "name patterns of the parameters that the inner loop moves"] = ("*",)
    frozen_params: Annotated[tuple[str, ...], "name patterns of parameters that it leaves alone"] = ()

    def init(self, params: Params) -> MetaParams:
        """theta alone."""
        self.moving(params)
        return MetaParams(params, {})

    def moving(self, params: Params) -> list[str]:
        """The names of ``params`` that the inner loop moves."""
        for key, patterns in (("adapted_params", self.adapted_params), ("frozen_params", self.frozen_params)):
            for pattern in patterns:
                if not any(fnmatchcase(name, pattern) for name in params):
                    raise ConfigError(
                        f"algorithm.{key}: {pattern!r} matches no parameter of the model; they are {', '.join(params)}"
                    )
        names = [n for n in params if _matches(n, self.adapted_params) and not _matches(n, self.frozen_params)]
        if not names:
            raise ConfigError(
                "algorithm.adapted_params and algorithm.frozen_params leave no parameter for the inner loop to move"
            )
        return names

    def inner_loop(
        self, meta: MetaParams, task: Task, loss: TaskLoss, *, step: int | None = None
    ) -> Iterator[InnerStep]:
        """theta_0, theta_1, …, theta_K."""
        start = self.start(meta, task, loss)
        return self.unroll(loss, start, task.support, step=step, adapted=self.moving(meta.model), state=meta.extra)

    def start(self, meta: MetaParams, task: Task, loss: TaskLoss) -> Params:
        """theta_0."""
        return meta.model


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
