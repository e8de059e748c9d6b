"""The vocabulary of the canonical graph: `torch.nn` modules, and the modules below where torch has none.

Every module takes tensors and returns one tensor, holds its hyper-parameters (and, in slots, its live tensors), and
works for any batch size; a `sized` one reads it from its last input. The order is: constants and arithmetic,
normalisation, shape, selection, reductions, generic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcurv.core.shapes import Shape, resolve, show_shape

__all__ = [
    "Add",
    "Affine",
    "Blank",
    "Cast",
    "Cat",
    "Constant",
    "Detach",
    "Expand",
    "MatMul",
    "Mean",
    "Mul",
    "Neg",
    "Pad",
    "Parameter",
    "Permute",
    "Repeat",
    "Reshape",
    "Scale",
    "ScaleShift",
    "Select",
    "Shift",
    "Slice",
    "Sub",
    "Sum",
]


class Add(nn.Module):
    """y = a + alpha · b, broadcasting."""

    broadcasts: ClassVar = True

    def __init__(self, alpha: float = 1) -> None:
        super().__init__()
        self.alpha = alpha

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.add(a, b, alpha=self.alpha)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}" if self.alpha != 1 else ""


class Sub(nn.Module):
    """y = a - alpha · b, broadcasting."""

    broadcasts: ClassVar = True

    def __init__(self, alpha: float = 1) -> None:
        super().__init__()
        self.alpha = alpha

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.sub(a, b, alpha=self.alpha)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}" if self.alpha != 1 else ""


class Mul(nn.Module):
    """y = a · b, elementwise, broadcasting."""

    broadcasts: ClassVar = True

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a * b


class Neg(nn.Module):
    """y = -x."""

    def forward(self, x: Tensor) -> Tensor:
        return -x


class Constant(nn.Module):
    """y = a tensor that depends on no input and no trainable parameter; slot `value`, bound before each run."""

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value, persistent=False)

    def forward(self) -> Tensor:
        return self.value

    def extra_repr(self) -> str:
        return str(tuple(self.value.shape))


class Parameter(nn.Module):
    """y = a trainable parameter of the model that is not the weight or bias of an op; slot `value`."""

    value: nn.Parameter

    def __init__(self, value: nn.Parameter) -> None:
        super().__init__()
        self.value = value

    def forward(self) -> Tensor:
        return self.value

    def extra_repr(self) -> str:
        return str(tuple(self.value.shape))


class Repeat(nn.Module):
    """y = x.expand(shape), with the batch size of `like`."""

    broadcasts: ClassVar = True
    sized: ClassVar = True

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor, like: Tensor) -> Tensor:
        return x.expand(resolve(self.shape, len(like)))

    def extra_repr(self) -> str:
        return show_shape(self.shape)


class Blank(nn.Module):
    """y = full(shape, value), with the batch size of `like`."""

    sized: ClassVar = True

    def __init__(self, shape: Shape, value: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape, self.value, self.dtype = shape, value, dtype

    def forward(self, like: Tensor) -> Tensor:
        return torch.full(resolve(self.shape, len(like)), self.value, dtype=self.dtype, device=like.device)

    def extra_repr(self) -> str:
        return f"{show_shape(self.shape)}, value={self.value}"


class Shift(nn.Module):
    """y = x + value, with a number `value`."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        return x + self.value

    def extra_repr(self) -> str:
        return str(self.value)


class Scale(nn.Module):
    """y = x · value, with a number `value`."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        return x * self.value

    def extra_repr(self) -> str:
        return str(self.value)


class MatMul(nn.Module):
    """y[…,o] = Σ_i x[…,i] W[i,o] + b[o]: a linear layer in in–out layout; slots `weight` and `bias`."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.mT, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class Affine(nn.Module):
    """BatchNorm in eval mode: y[n,c,…] = γ[c] x̂[n,c,…] + β[c] with x̂ = (x - μ)/√(σ² + ε).

    Its slots are γ `weight`, β `bias`, μ `mean` and σ² `var`.
    """

    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor
    var: Tensor

    def __init__(self, mean: Tensor, var: Tensor, eps: float) -> None:
        super().__init__()
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("var", var, persistent=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mean, self.var, self.weight, self.bias, False, 0.0, self.eps)

    def normalized(self, x: Tensor) -> Tensor:
        """x̂ = (x - μ)/√(σ² + ε): `[n, c, …] -> [n, c, …]`."""
        return F.batch_norm(x, self.mean.to(x), self.var.to(x), None, None, False, 0.0, self.eps)

    def slope(self) -> Tensor:
        """dy/dx = γ/√(σ² + ε): `[c]`."""
        inverse = (self.var + self.eps).rsqrt()
        return inverse if self.weight is None else inverse * self.weight

    def extra_repr(self) -> str:
        return f"{self.mean.numel()}, eps={self.eps}"


class ScaleShift(nn.Module):
    """y = γ x + β, with γ and β of the shape of some axes of x that are followed by `behind` more axes.

    The last step of normalizations. Its slots are γ `weight` and β `bias`.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, behind: int = 0) -> None:
        super().__init__()
        self.register_parameter("bias", None)
        self.behind = behind

    def forward(self, x: Tensor) -> Tensor:
        scale = self.along(self.weight)
        return x * scale if self.bias is None else torch.addcmul(self.along(self.bias), x, scale)

    def along(self, vector: Tensor) -> Tensor:
        """γ or β, viewed so that it broadcasts to x."""
        return vector.view(*vector.shape, *(1,) * self.behind) if self.behind else vector

    def channels(self, x: Tensor, lead: int) -> Tensor:
        """`[*lead, …, *γ.shape, *behind] -> [*lead, s, g, 1]`: entries of one scale are its positions."""
        behind, own = x.ndim - self.behind, x.ndim - self.behind - self.weight.ndim
        order = [*range(own), *range(behind, x.ndim), *range(own, behind)]
        return x.permute(order).reshape(*x.shape[:lead], -1, self.weight.numel(), 1)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, behind={self.behind}"


class Reshape(nn.Module):
    """y = x.reshape(shape); the axis that grows with the batch is -1."""

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(shape)

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(self.shape)

    def extra_repr(self) -> str:
        return str(self.shape)


class Expand(nn.Module):
    """y = x.expand(shape); -1 keeps an axis."""

    broadcasts: ClassVar = True

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(shape)

    def forward(self, x: Tensor) -> Tensor:
        return x.expand(self.shape)

    def extra_repr(self) -> str:
        return str(self.shape)


class Permute(nn.Module):
    """y = x.permute(dims)."""

    def __init__(self, dims: Sequence[int]) -> None:
        super().__init__()
        self.dims = tuple(dims)
        self.inverse = tuple(sorted(range(len(self.dims)), key=self.dims.__getitem__))

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.dims)

    def extra_repr(self) -> str:
        return str(self.dims)


class Cast(nn.Module):
    """y = x.to(dtype)."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)

    def extra_repr(self) -> str:
        return str(self.dtype)


class Detach(nn.Module):
    """y = x, non-differentiable, for autograd as for the rules: second derivatives differentiate the graph itself."""

    def forward(self, x: Tensor) -> Tensor:
        return x.detach()


class Slice(nn.Module):
    """y = x[…, start:stop:step, …] along `dim`."""

    def __init__(self, dim: int, start: int, stop: int, step: int = 1) -> None:
        super().__init__()
        self.dim, self.start, self.stop, self.step = dim, start, stop, step

    def forward(self, x: Tensor) -> Tensor:
        return x[self.index(x.ndim)]

    def index(self, ndim: int) -> tuple[slice, ...]:
        """The index tuple that selects the slice from a tensor with `ndim` axes."""
        axis = self.dim % ndim
        return (*(slice(None),) * axis, slice(self.start, self.stop, self.step))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, {self.start}:{self.stop}:{self.step}"


class Select(nn.Module):
    """y = x[…, index, …] along `dim`, which is removed."""

    def __init__(self, dim: int, index: int) -> None:
        super().__init__()
        self.dim, self.index = dim, index

    def forward(self, x: Tensor) -> Tensor:
        return x.select(self.dim, self.index)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, index={self.index}"


class Cat(nn.Module):
    """y = cat(xs, dim)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, *xs: Tensor) -> Tensor:
        return torch.cat(xs, self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class Pad(nn.Module):
    """y = pad(x): the last axes are extended (or, where negative, cropped); mode as in `torch.nn.functional.pad`."""

    def __init__(self, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> None:
        super().__init__()
        self.pad, self.mode, self.value = tuple(pad), mode, value

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, self.pad, self.mode, self.value)

    def extra_repr(self) -> str:
        return f"{self.pad}, mode={self.mode!r}" + (f", value={self.value}" if self.value else "")


class Sum(nn.Module):
    """y = Σ x over `dims`."""

    def __init__(self, dims: Sequence[int], keepdim: bool = False) -> None:
        super().__init__()
        self.dims, self.keepdim = tuple(dims), keepdim

    def forward(self, x: Tensor) -> Tensor:
        return x.sum(self.dims, self.keepdim)

    def extra_repr(self) -> str:
        return f"{self.dims}, keepdim={self.keepdim}"


class Mean(nn.Module):
    """y = mean of x over `dims`."""

    def __init__(self, dims: Sequence[int], keepdim: bool = False) -> None:
        super().__init__()
        self.dims, self.keepdim = tuple(dims), keepdim

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(self.dims, self.keepdim)

    def extra_repr(self) -> str:
        return f"{self.dims}, keepdim={self.keepdim}"
