"""A construct: the lines that it adds to the source of a model."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ALONG", "STEP", "Construct", "function", "lines"]


@dataclass(frozen=True)
class Construct:
    """Lines of source around `self.site`, a Linear of the width of `h`, in the middle of a network.

    `top` is at module level, `init` in `__init__`, `forward` computes h from h, `after` runs on the finished model, and
    `change(model, x)` is the change of state between calls. `loss` is the body of `loss()`. WIDTH and SCALE stand for
    the width of `h` and a factor that is drawn. `quantities` replaces the usual ones; `verify` is an option of
    `fxcurv.compile`. With `reuse` the oracle builds the model once for each state and size of batch, not for each
    backward pass, because building takes long.
    """

    name: str
    kind: str
    forward: str = "h = self.site(h).tanh()"
    top: str = ""
    init: str = ""
    after: str = ""
    change: str = ""
    loss: str = ""
    quantities: tuple[str, ...] = ()
    verify: str = "first"
    reuse: bool = False


ALONG = """
def along(v, h):
    return v.to(h.dtype).view(-1, *(1,) * (h.ndim - 1))
"""
"""One number for each sample, to multiply h by."""

STEP = """
with torch.no_grad():
    for p in model.parameters():
        p.mul_(0.9).add_(0.05)
"""
"""A change of every parameter in place, as by an optimizer."""


def function(name: str, forward: str, backward: str, arguments: str = "h") -> str:
    """The source of an autograd.Function."""
    return (
        f"class {name}(torch.autograd.Function):\n"
        f"    @staticmethod\n    def forward(ctx, {arguments}):\n{lines(forward, 8)}\n"
        f"    @staticmethod\n    def backward(ctx, *gs):\n        g = gs[0]\n{lines(backward, 8)}\n"
    )


def lines(text: str, indent: int) -> str:
    """The lines of a text, indented."""
    return "\n".join(" " * indent + line if line else line for line in text.strip("\n").splitlines())
