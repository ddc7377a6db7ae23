"""The fast layers of convolutional networks are torch's own, and so are their first and second derivatives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import grad, gradcheck, gradgradcheck

from distmeta.models import batched, fused

Layers = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As everywhere in training: more are slower for tensors as small as these."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def layers(stride: int, window: int, module: ModuleType = fused) -> tuple[Layers, Layers]:
    """Convolution, batch-norm, ReLU and pooling: ours, and torch's."""

    def ours(x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return module.norm_relu_pool(module.conv2d(x, weight, stride, 1), gamma, beta, 1e-5, window)

    def theirs(x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        y = F.batch_norm(F.conv2d(x, weight, stride=stride, padding=1), None, None, gamma, beta, True)
        return F.max_pool2d(F.relu(y), window)

    return ours, theirs


def inputs(dtype: torch.dtype, images: int = 3, channels: int = 2) -> tuple[Tensor, ...]:
    """x, weight, gamma (of both signs) and beta; 7 × 6 pixels, which no window of 2 or 4 divides."""
    torch.manual_seed(0)
    gamma = torch.tensor([1.0, -0.7, 0.3, 2.0])
    shapes = (images, channels, 7, 6), (4, channels, 3, 3)
    tensors = (*(torch.randn(shape) for shape in shapes), gamma, torch.randn(4))
    return tuple(tensor.to(dtype).requires_grad_() for tensor in tensors)


@pytest.mark.parametrize("module", [fused, batched])
@pytest.mark.parametrize("window", [1, 2, 3])
@pytest.mark.parametrize("stride", [1, 2])
def test_derivatives_are_those_of_finite_differences(stride: int, window: int, module: ModuleType) -> None:
    ours, theirs = layers(stride, window, module)
    tensors = inputs(torch.float64)
    torch.testing.assert_close(ours(*tensors), theirs(*tensors), rtol=1e-12, atol=1e-12)
    assert gradcheck(ours, tensors)
    assert gradgradcheck(ours, tensors)


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("wanted", [(0, 1, 2, 3), (1, 2, 3), (1,), (2,), (0, 3)])
def test_derivatives_are_torchs_whatever_is_asked_for(window: int, wanted: tuple[int, ...]) -> None:
    """Also where some tensors need no gradient, as the images of the first layer, or frozen parameters."""
    ours, theirs = layers(1, window)
    results = []
    for function in (ours, theirs):
        tensors = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(inputs(torch.float32, images=9))]
        asked = [tensors[i] for i in wanted]
        first = grad(function(*tensors).square().sum(), asked, create_graph=True)
        second = grad(sum((g * g).sum() for g in first), asked)
        results.append((*first, *second))
    for mine, reference in zip(*results, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-3, atol=1e-3 * float(reference.detach().abs().max()))


def test_function_transforms_get_torchs_own() -> None:
    ours, theirs = layers(1, 2)
    tensors = tuple(t.detach() for t in inputs(torch.float64))
    gradients = [torch.func.grad(lambda *t, f=f: f(*t).square().sum(), (0, 1, 2, 3))(*tensors) for f in (ours, theirs)]
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("stride, window", [(1, 2), (2, 1)])
def test_tasks_at_once_are_those_one_by_one(stride: int, window: int) -> None:
    """Meta-gradients through an inner step, of images with even regions, where windows have several maxima."""
    ours, theirs = layers(stride, window, batched)
    _, *params = (t.detach() for t in inputs(torch.float64))
    x = torch.randn((4, 2, 5, 2, 9, 8), dtype=torch.float64).round().clamp(0, 1)  # tasks, sets, images

    def adapted_loss(function: Layers, params: tuple[Tensor, ...], x: Tensor) -> Tensor:
        inner = torch.func.grad(lambda params: function(x[0], *params).pow(3).sum())(params)
        return function(x[1], *(p - 1e-3 * g for p, g in zip(params, inner, strict=True))).square().sum()

    def meta_gradient(function: Layers, x: Tensor) -> tuple[Tensor, ...]:
        return torch.func.grad(lambda params: adapted_loss(function, params, x))(tuple(params))

    at_once = torch.vmap(lambda x: meta_gradient(ours, x))(x)
    for tensor, *others in zip(at_once, *(meta_gradient(theirs, task) for task in x), strict=True):
        torch.testing.assert_close(tensor, torch.stack(others), rtol=1e-10, atol=1e-10)


def test_third_derivatives_are_refused() -> None:
    """They would need a graph that is not there: an error, and no wrong number."""
    ours, _ = layers(1, 1)
    tensors = inputs(torch.float64)
    first = grad(ours(*tensors).square().sum(), tensors, create_graph=True)
    with pytest.raises(NotImplementedError, match="third derivative"):
        grad(sum(g.square().sum() for g in first), tensors, create_graph=True)


def test_what_is_not_a_number_stays_visible() -> None:
    ours, _ = layers(1, 2)
    x, *others = inputs(torch.float32)
    with torch.no_grad():
        x[0, 0, 0, 0] = torch.nan
        assert not ours(x, *others).isfinite().any()
