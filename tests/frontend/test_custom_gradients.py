"""Models with gradients of their own: the backward of a Function, hooks, reentrant checkpoints.

The oracle is plain torch: `model(x)` and one `backward()` per sample and output.
"""

from __future__ import annotations

import copy
import functools
import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
from comparison import assert_close
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import fxcurv
from fxcurv.ir import custom_gradients
from fxcurv.losses.base import as_loss
from fxcurv.quantities.selection import chosen
from fxcurv.runtime import inductor
from fxcurv.runtime.autograd import by_autograd
from fxcurv.runtime.run import Minibatch

LOSS = nn.CrossEntropyLoss()
QUANTITIES = ["batch_grad", "jacobian", "kflr"]
MORE = ["grad", "diag_ggn", "sqrt_ggn"]


# Functions --------------------------------------------------------------------------------------------------------


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


straight = Straight.apply  # a reference made before any trace


class Reversed(torch.autograd.Function):
    """Returns its argument itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        g *= -ctx.factor  # a backward may write into its argument
        return g, None


class Both(torch.autograd.Function):
    """Two tensors and a number, from a tensor and containers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, options: dict[str, Any]) -> Any:
        ctx.save_for_backward(x)
        return x.sin() * options["a"], 7, x * options["b"][0] + options["c"]

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: None, h: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return 3 * g * x.cos() - h, None


class Tanh(torch.autograd.Function):
    """The exact derivative, in the style of torch.func, with a default argument."""

    @staticmethod
    def forward(x: Tensor, scale: float = 2.0) -> Tensor:
        return (x * scale).tanh()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.save_for_backward(output)
        ctx.scale = inputs[1]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (y,) = ctx.saved_tensors
        return g * (1 - y * y) * ctx.scale, None


class Linear(torch.autograd.Function):
    """Doubles the gradient of its weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T + bias

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return g @ weight, 2 * g.T @ x, g.sum(0)


class Masked(torch.autograd.Function):
    """Outputs without a gradient, one of booleans."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        mask, sign = x > 0, x.sign()
        ctx.save_for_backward(mask)
        ctx.mark_non_differentiable(mask, sign)
        return x * mask, mask, sign

    @staticmethod
    def backward(ctx: Any, g: Tensor, *_: Any) -> Tensor:
        return g * ctx.saved_tensors[0] / 2


class Outer(torch.autograd.Function):
    """Calls another Function in its forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return straight(x) * 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 5 * g


class InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 3 * g


class Calling(torch.autograd.Function):
    """Calls a function that it is given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.function = function
        return function(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return 3 * ctx.function(g), None


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g * (1 - ctx.saved_tensors[0].tanh() ** 2)


def identity(backward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The identity with a backward."""

    class Identity(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return backward(g)

    return Identity.apply


class Nested(torch.autograd.Function):
    """A checkpoint of one's own: its backward calls `backward()`."""

    @staticmethod
    def forward(ctx: Any, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        ctx.run = run
        ctx.save_for_backward(x)
        with torch.no_grad():
            return run(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            torch.autograd.backward(ctx.run(x), g)
        return None, x.grad


# Models -----------------------------------------------------------------------------------------------------------

Middle = Callable[["Net", Tensor], Tensor]


class Net(nn.Module):
    """Two linear layers with a function between them, which may use parameters `w` and `c`."""

    def __init__(self, middle: Middle) -> None:
        super().__init__()
        self.middle, self.log = middle, list[float]()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)
            self.w, self.c = nn.Parameter(torch.randn(5, 5)), nn.Parameter(torch.randn(5))
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.middle(self, self.a(x)).tanh())


def both(net: Net, h: Tensor) -> Tensor:
    u, number, v = Both.apply(h, {"a": 2.0, "b": [3.0], "c": net.c})  # pyright: ignore[reportGeneralTypeIssues]
    return u * number + v * v


def masked(net: Net, h: Tensor) -> Tensor:
    y, mask, sign = Masked.apply(h)  # pyright: ignore[reportGeneralTypeIssues]
    return y + mask + sign * h


def hooked(net: Net, h: Tensor) -> Tensor:
    before = h * 3
    h.register_hook(lambda g: 2 * g)
    return before + h * h


def hooks_in_order(net: Net, h: Tensor) -> Tensor:
    h.register_hook(lambda g: g.flip(1))
    h.register_hook(lambda g: g * torch.arange(5.0))
    return h * h


def hooks_in_a_loop(net: Net, h: Tensor) -> Tensor:
    for k in range(3):
        h = h + net.c * h
        h.register_hook(lambda g, k=k: (k + 1) * g)
    return h


def hook_around_writes(net: Net, h: Tensor) -> Tensor:
    h.register_hook(lambda g: 2 * g)
    h.relu_()
    h.register_hook(lambda g: 3 * g)
    return h


def hook_on_a_view(net: Net, h: Tensor) -> Tensor:
    left, right = h[:, :2], h[:, 2:]
    left.register_hook(lambda g: 5 * g)
    return torch.cat([left, right], 1) + h


def hook_with_a_tensor(net: Net, h: Tensor) -> Tensor:
    mask = (h > 0).double()
    with torch.no_grad():
        h.register_hook(lambda g: g * mask)
    return h * h


def watched(net: Net, h: Tensor) -> Tensor:
    h.register_hook(lambda g: net.log.append(g.norm().item()))
    return h


def called_with_a_closure(net: Net, h: Tensor) -> Tensor:
    scale = (h > 0).double() + 1
    return Calling.apply(h, lambda t: t * scale)  # pyright: ignore[reportReturnType]


def checkpointed(net: Net, h: Tensor) -> Tensor:
    def inner(t: Tensor) -> Any:
        return checkpoint(lambda u: F.linear(straight(u), net.w), t, use_reentrant=True) + net.c

    y: Any = checkpoint(inner, h, use_reentrant=True)
    return checkpoint_sequential(nn.Sequential(nn.Tanh(), nn.Softplus()), 2, y, use_reentrant=True)


def summed(*parts: Any) -> Middle:
    """The sum of functions, each with another weight, so that no two errors cancel."""
    return lambda net, h: torch.stack([(k + 1) * part(net, h * 1) for k, part in enumerate(parts)]).sum(0)


GOOD: dict[str, Middle] = {
    "styles": summed(
        lambda net, h: straight(h),
        lambda net, h: Straight.apply(h),
        lambda net, h: Reversed.apply(h, 0.7),
        lambda net, h: Tanh.apply(h),
        lambda net, h: Tanh.apply(h, scale=0.5),  # pyright: ignore[reportCallIssue]
        lambda net, h: Outer.apply(h),
        lambda net, h: identity(lambda g: 9 * g)(h),  # a class that is made in forward
    ),
    "in place": lambda net, h: InPlace.apply(h * 1) + 1,  # pyright: ignore[reportOperatorIssue]
    "containers": summed(both, masked, called_with_a_closure),
    "weights": summed(
        lambda net, h: Linear.apply(h, net.w, net.c), lambda net, h: F.linear(h, straight(net.w * 3), net.c)
    ),
    "hooks": summed(hooked, hooks_in_order, hooks_in_a_loop, hook_on_a_view, hook_with_a_tensor, watched),
    "hook around writes": hook_around_writes,
    "reentrant checkpoint": checkpointed,
    "checkpoint": lambda net, h: checkpoint(lambda t: F.linear(straight(t), net.w), h, use_reentrant=False),  # pyright: ignore[reportReturnType]
}


def on_module(register: Callable[[Net], object]) -> Net:
    net = Net(lambda net, h: h * h)
    register(net)
    return net


ON_MODULES: dict[str, Callable[[Net], object]] = {
    "hooks": lambda net: [
        net.b.register_full_backward_pre_hook(lambda m, g: (2 * g[0],)),
        net.b.register_full_backward_hook(lambda m, g, _: (g[0].flip(1),)),
        net.b.register_full_backward_hook(lambda m, g, _: (g[0] * torch.arange(5.0),)),
        net.a.register_full_backward_pre_hook(lambda m, g: None),
    ],
    "logging": lambda net: [
        net.a.register_full_backward_hook(lambda m, g, out: None),
        net.b.register_full_backward_hook(lambda m, g, out: net.log.append(out[0].norm().item())),
    ],
}


MODELS: dict[str, Callable[[], Net]] = {name: functools.partial(Net, middle) for name, middle in GOOD.items()} | {
    f"module {name}": functools.partial(on_module, register) for name, register in ON_MODULES.items()
}


WAYS = ("containers", "weights", "hooks", "reentrant checkpoint", "module hooks")
"""Models of which more is compared."""


def batch(n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    x = 2 * torch.randn(n, 4, dtype=torch.float64, generator=generator)
    return x, torch.randint(3, (n,), generator=generator)


def jacobians(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and J[n, c, *θ.shape] by one `backward()` per sample and output."""
    model = copy.deepcopy(model)
    y = model(x)
    J = {name: p.new_zeros(*y.shape, *p.shape) for name, p in model.named_parameters()}
    for n in range(len(x)):
        for c in range(y.shape[1]):
            model.zero_grad()
            model(x)[n, c].backward()
            for name, p in model.named_parameters():
                if p.grad is not None:
                    J[name][n, c] = p.grad
    return y.detach(), J


@pytest.mark.filterwarnings("ignore:Full backward hook is firing", "ignore:.*use_reentrant")
@pytest.mark.parametrize("name", MODELS)
def test_values_are_those_of_backward(name: str) -> None:
    model, more = MODELS[name](), name in WAYS
    compiled = fxcurv.compile(model, LOSS, QUANTITIES + MORE * more)
    for n in (3, 1, 5, 8):
        x, target = batch(n)
        with torch.set_grad_enabled(n != 5):
            result = compiled(x, target)
        y, J = jacobians(model, x)
        slope = torch.func.grad(lambda f, t=target: LOSS(f, t))(y)
        H, S = reference.loss_hessians(LOSS, y, target), reference.exact_columns(LOSS, y, target)
        for p, J_p in J.items():
            if result["batch_grad"].status[p] == "unreached":
                assert not J_p.any(), f"{p} is reached"
                continue
            assert_close(result["batch_grad"][p], torch.einsum("nc,nc...->n...", slope, J_p), p)
            assert_close(result["jacobian"][p], J_p, p)
            if more:
                at_S = torch.einsum("vnc,nc...->vn...", S, J_p)
                assert_close(result["grad"][p], torch.einsum("nc,nc...->...", slope, J_p), p)
                assert_close(result["diag_ggn"][p], torch.einsum("nc...,ncd,nd...->...", J_p, H, J_p), p)
                ours, theirs = (t.flatten(0, 1).flatten(1) for t in (result["sqrt_ggn"][p], at_S))
                assert_close(ours.T @ ours, theirs.T @ theirs, p)
        G = torch.einsum("nci,ncd,ndj->ij", J["a.bias"], H, J["a.bias"])
        assert_close(result["kflr"]["a.weight"].dense(), torch.kron(G.contiguous(), (x.T @ x / n).contiguous()), "kflr")
        assert all(p.grad is None for p in model.parameters())


# Other ways to the same numbers -----------------------------------------------------------------------------------


def flat(J: dict[str, Tensor]) -> Tensor:
    """The rows `[n·c, P]` of a Jacobian."""
    return torch.cat([J_p.flatten(0, 1).flatten(1) for J_p in J.values()], 1)


@pytest.mark.parametrize("name", ["containers", "hooks", "reentrant checkpoint"])
def test_the_fallback_products_and_the_kernel_use_the_same_backward(name: str) -> None:
    model, (x, target) = MODELS[name](), batch(3)
    _, J = jacobians(model, x)
    matrix, unit = flat(J), torch.eye(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    assert_close(fxcurv.jacobian_operator(model, (x, target)).mm(unit), matrix, "the Jacobian")
    ggn = fxcurv.ggn_operator(model, nn.MSELoss(reduction="sum"), (x, torch.zeros(3, 3, dtype=torch.float64)))
    assert_close(ggn.mm(unit), 2 * matrix.T @ matrix, "the GGN")
    kernel = matrix @ matrix.T
    for strategy in (None, "ntvp"):
        K = fxcurv.ntk(model, x, strategy=strategy)
        assert_close(K.permute(0, 2, 1, 3).reshape(9, 9), kernel, "the kernel")
    selection = chosen(["grad", "batch_grad", "diag_ggn", "kfac"])
    generator = torch.Generator().manual_seed(0)
    compiled = fxcurv.compile(model, LOSS, list(selection.quantities))(x, target, generator.clone_state())
    plain = by_autograd(model, as_loss(LOSS), selection, Minibatch(x, target, generator))
    for quantity in ("grad", "batch_grad", "diag_ggn"):
        for p, value in compiled[quantity].items():
            assert_close(plain[quantity][p], value, f"{quantity} of {p}")
    for p in ("a.weight", "b.weight"):
        assert_close(plain["kfac"][p].dense(), compiled["kfac"][p].dense(), f"kfac of {p}")


def test_second_derivatives_through_a_hook_are_refused() -> None:
    """Autograd applies the hook again, to the parts of the second derivative that saved tensors carry."""
    with pytest.raises(fxcurv.UnsupportedError, match=r"the hook .* twice.*FXC301"):
        fxcurv.compile(MODELS["hooks"](), LOSS, "diag_hessian")(*batch(3))


@pytest.mark.parametrize("name", ["weights", "containers"])
def test_second_derivatives_are_those_of_double_backward(name: str) -> None:
    model, (x, target) = MODELS[name](), batch(3)
    found = fxcurv.compile(model, LOSS, "diag_hessian")(x, target)["diag_hessian"]
    value = LOSS(model(x), target)
    for p, parameter in model.named_parameters():
        if found.status[p] == "unreached":
            continue
        (slope,) = torch.autograd.grad(value, parameter, create_graph=True)
        rows = [torch.autograd.grad(g, parameter, retain_graph=True, allow_unused=True)[0] for g in slope.flatten()]
        each = [0 if row is None else row.flatten()[k] for k, row in enumerate(rows)]
        assert_close(found[p].flatten(), torch.tensor(each, dtype=torch.float64), p)


def test_an_operator_of_inductor_calls_the_backward() -> None:
    """Without the compiler itself, which takes a minute: the graph of operators alone."""
    model, (x, target) = MODELS["containers"](), batch(3)
    program = fxcurv.compile(model, LOSS, "grad").prepare(x)
    outlined = inductor._outlined(program.forward)  # pyright: ignore[reportArgumentType, reportPrivateUsage]
    fxcurv.compile(model, LOSS, "grad")(x, target)  # binds the parameters
    assert torch.equal(outlined(x)[0], model(x))


# Refusals ---------------------------------------------------------------------------------------------------------


NOT_LINEAR: dict[str, tuple[Callable[[], Net], str]] = {
    "clipped": (lambda: Net(lambda net, h: identity(lambda g: g.clamp(-1, 1))(h)), "autograd.Function Identity at"),
    "clipped high": (lambda: Net(lambda net, h: identity(lambda g: g.clamp(-1e4, 1e4))(h)), "not linear"),
    "normalised": (lambda: Net(lambda net, h: identity(lambda g: g / g.norm())(h)), "not linear"),
    "shifted": (lambda: Net(lambda net, h: identity(lambda g: g + 1)(h)), "its backward of zero is not zero"),
    "random": (lambda: Net(lambda net, h: identity(lambda g: g * torch.rand(5))(h)), "different results"),
    "own checkpoint": (lambda: Net(lambda net, h: Nested.apply(lambda t: t @ net.w, h)), "calls backward() itself"),  # pyright: ignore
    "hook": (lambda: Net(lambda net, h: h.register_hook(lambda g: g.clamp(-1, 1)) and h), "the hook <lambda>.<lambda>"),
    "pre-hook": (
        lambda: on_module(lambda net: net.b.register_full_backward_pre_hook(lambda m, g: (g[0].clamp(-1, 1),))),
        "on a Linear",
    ),
    "grad_output": (
        lambda: on_module(lambda net: net.b.register_full_backward_hook(lambda m, g, out: (g[0] * out[0].sum(),))),
        "on a Linear",
    ),
    "old hook": (
        lambda: on_module(lambda net: net.b.register_backward_hook(lambda m, g, out: None)),
        "registered by register_backward_hook",
    ),
}


@pytest.mark.parametrize("name", NOT_LINEAR)
def test_a_backward_that_is_not_linear_is_refused_by_name(name: str) -> None:
    make, cause = NOT_LINEAR[name]
    model, (x, target) = make(), batch(3)
    for ask in (
        lambda: fxcurv.compile(model, LOSS, "grad")(x, target),
        lambda: by_autograd(model, as_loss(LOSS), chosen("grad"), Minibatch(x, target)),
        lambda: fxcurv.jacobian_operator(model, (x, target)).mm(torch.ones(73, 1, dtype=torch.float64)),
    ):
        with pytest.raises(fxcurv.UnsupportedError) as caught:
            ask()
        assert caught.value.code == "FXC108"
        assert cause in str(caught.value)
        assert "the fallback does not help" in str(caught.value)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "backward", [lambda g: g - g.mean(0), lambda g: g / len(g), lambda g: g.flip(0)], ids=["mean", "size", "flip"]
)
def test_a_backward_that_mixes_samples_is_left_to_the_fallback(backward: Callable[[Tensor], Tensor]) -> None:
    model, (x, target) = Net(lambda net, h: identity(backward)(h)), batch(3)
    with pytest.raises(fxcurv.UnsupportedError, match=r"mixes samples.*on_unsupported='fallback'.*FXC108"):
        fxcurv.compile(model, LOSS, "grad")(x, target)
    result = fxcurv.compile(model, LOSS, ["grad", "jacobian"], on_unsupported="fallback")(x, target)
    assert result["grad"].status["a.weight"] == "fallback"
    assert result["grad"].status["b.weight"] == "exact"
    _, J = jacobians(model, x)
    LOSS(model(x), target).backward()
    for p, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert_close(result["grad"][p], parameter.grad, p)
            assert_close(result["jacobian"][p], J[p], p)


def test_a_backward_without_a_graph_has_no_second_derivative() -> None:
    model, (x, target) = Net(lambda net, h: Once.apply(h)), batch(3)  # pyright: ignore[reportReturnType]
    unit = torch.ones(73, 1, dtype=torch.float64)
    for ask in (
        lambda: fxcurv.compile(model, LOSS, "diag_hessian")(x, target),
        lambda: by_autograd(model, as_loss(LOSS), chosen("diag_hessian"), Minibatch(x, target)),
        lambda: fxcurv.hessian_operator(model, LOSS, (x, target)).mm(unit),
        lambda: fxcurv.jacobian_operator(model, (x, target)).mm(unit),
    ):
        with pytest.raises(fxcurv.UnsupportedError, match=r"autograd.Function Once at .* twice.*FXC301"):
            ask()


def test_the_batch_size_is_no_argument() -> None:
    model = Net(lambda net, h: Reversed.apply(h, h.shape[0]))  # pyright: ignore[reportArgumentType]
    with pytest.raises(fxcurv.UnsupportedError, match="an argument depends on the batch size"):
        fxcurv.compile(model, LOSS, "grad")(*batch(3))


# What is left as it was -------------------------------------------------------------------------------------------


def test_hooks_that_observe_are_not_part_of_the_program() -> None:
    for make in (functools.partial(Net, watched), MODELS["module logging"]):
        model, (x, target) = make(), batch(3)
        compiled = fxcurv.compile(model, LOSS, "grad")
        compiled(x, target)
        ops = [type(m).__name__ for m in compiled.program.canonical.modules()]
        assert "CustomGradient" not in ops
        assert len(model.log) <= 3, "tried once, on three scales"


def test_torch_is_restored_and_other_threads_are_not_traced() -> None:
    forward, seen, t = vars(Straight)["forward"], list[Any](), torch.ones(2, requires_grad=True)

    def slow(net: Net, h: Tensor) -> Tensor:
        def elsewhere() -> None:
            straight(t).sum().backward()
            seen.append(t.grad)

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        return straight(h)

    fxcurv.trace(Net(slow), batch(3)[0])
    assert all(torch.equal(g, torch.ones(2)) for g in seen)
    assert len(seen) == 1
    assert vars(Straight)["forward"] is forward
    assert vars(torch.nn.modules.module)["BackwardHook"] is torch.utils.hooks.BackwardHook


def test_calls_are_forgotten_with_their_program() -> None:
    gc.collect()
    before, model = len(custom_gradients._CALLS), MODELS["containers"]()  # pyright: ignore[reportPrivateUsage]
    compiled = fxcurv.compile(model, LOSS, "grad")
    compiled(*batch(3))
    copy.deepcopy(compiled.program.canonical)(batch(2)[0])
    assert len(custom_gradients._CALLS) > before  # pyright: ignore[reportPrivateUsage]
    del model, compiled
    gc.collect()
    assert len(custom_gradients._CALLS) <= before  # pyright: ignore[reportPrivateUsage]
