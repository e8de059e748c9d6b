"""Models that nobody wrote: random steps, written out as the source of a module, with data and a way to compute.

A case is plain data, so that it prints, and shrinks by leaving steps out; what a step becomes depends on the shape that
it finds, so that every list of steps is a model.
"""

from __future__ import annotations

import copy
import linecache
import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from comparison import QUANTITIES, check_result
from torch import Tensor, nn

import fxcurv
import passes
from fxcurv.losses.base import as_loss
from fxcurv.quantities.selection import chosen
from fxcurv.runtime.memory import Chunks
from fxcurv.runtime.program import Program
from fxcurv.runtime.run import Minibatch, run

__all__ = ["DTYPES", "FORCED", "KINDS", "Case", "check", "draw", "script", "smaller", "source", "written"]

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}

FORCED = (
    *("InputCovariance", "OutputCovariance", "Gram", "Gradient", "Diagonal"),
    *("CovarianceOfPatches", "PooledPatches", "KeptInputs", "KeptOutputs", "KeptEntries", "GradientOfConvolution"),
    *("DiagonalOfSinglePositions", "DiagonalBySample", "DiagonalByPairs"),
)

LOSSES = (
    'nn.CrossEntropyLoss(reduction="mean")',
    'nn.CrossEntropyLoss(reduction="sum")',
    "nn.CrossEntropyLoss(label_smoothing=0.2)",
    "nn.CrossEntropyLoss(weight=torch.tensor([0.5, 1.0, 2.0]))",
    "nn.MSELoss()",
    'nn.MSELoss(reduction="sum")',
    "nn.BCEWithLogitsLoss()",
)

LAYOUTS = (
    "x",
    "x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x",
    "x.contiguous(memory_format=torch.channels_last_3d) if x.ndim == 5 else x",
    "torch.stack([x, x], -1)[..., 0]",
    "x.transpose(1, -1).contiguous().transpose(1, -1)",
    "x[:1].expand_as(x)",
)


@dataclass(frozen=True)
class Case:
    """A model as its steps, and how it is computed: `parts` cuts samples and columns, if it is not 0."""

    steps: tuple[tuple[str, int], ...]
    shape: tuple[int, ...]
    batch: int = 2
    loss: str = LOSSES[0]
    layout: str = LAYOUTS[0]
    dtype: str = "float64"
    forced: str | None = None
    parts: int = 0
    seed: int = 0

    def model(self) -> nn.Module:
        """The model, in eval mode; its parameters come from the case alone."""
        name, text = f"<generated {abs(hash(self))}>", source(self)
        linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
        names: dict[str, Any] = {}
        exec(compile(text, name, "exec"), names)
        return names["build"]()

    def data(self) -> tuple[Tensor, Tensor]:
        """x and y."""
        names: dict[str, Any] = {"torch": torch}
        exec(data_source(self), names)
        return names["x"], names["y"]


# Steps ------------------------------------------------------------------------------------------------------------


@dataclass
class Writer:
    """A model as it is written: lines of `__init__` and of `forward`, and the shapes that they give, batch left out."""

    shape: tuple[int, ...]
    inits: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    earlier: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    layers: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    changed: bool = False

    def layer(self, make: str, shape: tuple[int, ...]) -> None:
        """x = a new layer of x."""
        name = f"m{len(self.inits)}"
        self.inits.append(f"self.{name} = {make}")
        self.layers.append((name, self.shape, shape))
        self.then(f"self.{name}(x)", shape)

    def then(self, expression: str, shape: tuple[int, ...] | None = None) -> None:
        """x = an expression of x."""
        self.lines.append(f"x = {expression}")
        self.shape = self.shape if shape is None else shape
        self.changed = True

    def keep(self) -> None:
        """Remember x for later steps."""
        name = f"x{len(self.earlier)}"
        self.lines.append(f"{name} = x")
        self.earlier.append((name, self.shape))

    def same(self, draw: random.Random) -> str | None:
        """An earlier value of this shape."""
        names = [name for name, shape in self.earlier if shape == self.shape]
        return draw.choice(names) if names else None


Step = Callable[[Writer, random.Random], None]


def convolution(w: Writer, r: random.Random) -> None:
    """Any geometry that leaves something; a BatchNorm behind every third."""
    channels, *sizes = w.shape
    if not 1 <= len(sizes) <= 3 or math.prod(sizes) > 200:
        return
    kernel = [r.choice((1, 2, 3)) for _ in sizes]
    stride, dilation = ([r.choice((1, 1, 2)) for _ in sizes] for _ in range(2))
    padding = [r.choice((0, 1, 2)) for _ in sizes]
    rows = zip(sizes, kernel, stride, dilation, padding, strict=True)
    out = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, d, p in rows]
    if min(out) < 1 or any(
        n + 2 * p - d * (k - 1) < 1 for n, k, d, p in zip(sizes, kernel, dilation, padding, strict=True)
    ):
        return
    groups = r.choice([g for g in (1, 1, 2, 3, channels) if channels % g == 0])
    width = groups * r.choice((1, 1, 2)) if groups > 1 else r.choice((1, 2, 3, 4))
    bias, norm = r.random() < 0.5, r.random() < 0.4
    options = f"{tuple(stride)}, {tuple(padding)}, {tuple(dilation)}, {groups}, bias={bias}"
    w.layer(f"nn.Conv{len(sizes)}d({channels}, {width}, {tuple(kernel)}, {options})", (width, *out))
    if norm:
        batch_norm(w, r)


def batch_norm(w: Writer, r: random.Random) -> None:
    """Over channels."""
    axes = len(w.shape)
    if axes <= 4:
        dim = max(1, axes - 1)
        w.layer(f"nn.BatchNorm{dim}d({w.shape[0]}, affine={r.random() < 0.8})", w.shape)


def group_norm(w: Writer, r: random.Random) -> None:
    """GroupNorm or InstanceNorm, where a channel has more than one entry."""
    if len(w.shape) > 1 and math.prod(w.shape[1:]) > 1:
        groups = r.choice([g for g in (1, 2, w.shape[0]) if w.shape[0] % g == 0])
        w.layer(f"nn.GroupNorm({groups}, {w.shape[0]})", w.shape)


def layer_norm(w: Writer, r: random.Random) -> None:
    """Over the last axis."""
    if w.shape[-1] > 2:
        w.layer(f"nn.LayerNorm({w.shape[-1]}, bias={r.random() < 0.5})", w.shape)


def linear(w: Writer, r: random.Random) -> None:
    """Over the last axis, whatever is in front of it."""
    width = r.choice((1, 2, 3, 4, 6))
    w.layer(f"nn.Linear({w.shape[-1]}, {width}, bias={r.random() < 0.6})", (*w.shape[:-1], width))


def again(w: Writer, r: random.Random) -> None:
    """A layer that has been used before, where it fits."""
    fitting = [(name, out) for name, into, out in w.layers if into == w.shape]
    if fitting:
        name, out = r.choice(fitting)
        w.then(f"self.{name}(x)", out)


def tied(w: Writer, r: random.Random) -> None:
    """A Linear with the weight of an earlier one, or its transpose."""
    earlier = [(n, m) for n, m in zip(w.inits, w.layers, strict=False) if "nn.Linear" in n]
    for init, (name, into, out) in r.sample(earlier, len(earlier)):
        del init
        if into[-1] == w.shape[-1]:
            w.then(f"F.linear(x, self.{name}.weight)", (*w.shape[:-1], out[-1]))
            return
        if out[-1] == w.shape[-1]:
            w.then(f"x @ self.{name}.weight", (*w.shape[:-1], into[-1]))
            return


def activation(w: Writer, r: random.Random) -> None:
    """A smooth or a kinked one, in place or not."""
    functions = ("x.tanh()", "F.gelu(x)", "F.silu(x)", "torch.relu(x)", "F.relu(x * 1, inplace=True)", "x.sigmoid()")
    more = ("F.leaky_relu(x, 0.1)", "F.hardswish(x)", "x.softmax(-1)", "F.elu_(x + 0)", "x * x", "x / (1 + x.abs())")
    smooth = (
        "F.celu(x)",
        "F.selu(x)",
        "F.mish(x)",
        "F.softplus(x)",
        "F.logsigmoid(x)",
        'F.gelu(x, approximate="tanh")',
    )
    kinked = ("F.hardshrink(x)", "F.softshrink(x)", "F.hardtanh(x)", "F.relu6(x)", "F.threshold(x, 0.1, 0.2)")
    w.then(r.choice((*functions, *more, *smooth, *kinked, "F.hardsigmoid(x)", "-x")))


def held(w: Writer, r: random.Random) -> None:
    """Values through which no gradient flows, or nothing at all changes."""
    values = ("x + x.detach()", "x * (x > 0)", "x + x.sign() / 2", "x + torch.ones_like(x)", "x * torch.tensor(0.7)")
    layers = ("nn.Dropout(0.3)", "nn.Identity()")
    chosen = r.choice(values + layers)
    if chosen in layers:
        w.layer(chosen, w.shape)
    else:
        w.then(chosen)


def pool(w: Writer, r: random.Random) -> None:
    """Maximum or mean over windows."""
    sizes = w.shape[1:]
    if not 1 <= len(sizes) <= 3 or min(sizes) < 2:
        return
    kernel, stride = r.choice((2, 2, min(3, *sizes, 3))), r.choice((1, 2))
    name = r.choice(("max", "avg", "adaptive_avg"))
    if name == "adaptive_avg":
        out = tuple(r.choice((1, 2)) for _ in sizes)
        w.then(f"F.adaptive_avg_pool{len(sizes)}d(x, {out})", (w.shape[0], *out))
        return
    out = tuple((n - kernel) // stride + 1 for n in sizes)
    w.then(f"F.{name}_pool{len(sizes)}d(x, {kernel}, {stride})", (w.shape[0], *out))


def residual(w: Writer, r: random.Random) -> None:
    """Plus, minus or times an earlier value."""
    other = w.same(r)
    if other is not None:
        w.then(r.choice((f"x + {other}", f"x - {other}", f"{other} + x.sigmoid()", f"x * {other}.tanh()")))


def project(w: Writer, r: random.Random) -> None:
    """Plus a projection of an earlier value."""
    if not w.earlier:
        return
    name, shape = r.choice(w.earlier)
    layer = f"m{len(w.inits)}"
    if shape[1:] == w.shape[1:] and 2 <= len(shape) <= 4:
        w.inits.append(f"self.{layer} = nn.Conv{len(shape) - 1}d({shape[0]}, {w.shape[0]}, 1)")
    elif shape[:-1] == w.shape[:-1]:
        w.inits.append(f"self.{layer} = nn.Linear({shape[-1]}, {w.shape[-1]})")
    else:
        return
    w.layers.append((layer, shape, w.shape))
    w.then(f"x + self.{layer}({name})")


def join(w: Writer, r: random.Random) -> None:
    """Joined with an earlier value along the channels."""
    fitting = [(name, shape) for name, shape in w.earlier if shape[1:] == w.shape[1:] and shape[0] + w.shape[0] < 9]
    if fitting:
        name, shape = r.choice(fitting)
        w.then(f"torch.cat([x, {name}], 1)", (w.shape[0] + shape[0], *w.shape[1:]))


def gate(w: Writer, r: random.Random) -> None:
    """Squeeze and excitation."""
    if len(w.shape) < 2:
        return
    layer, axes = f"m{len(w.inits)}", tuple(range(2, len(w.shape) + 1))
    w.inits.append(f"self.{layer} = nn.Linear({w.shape[0]}, {w.shape[0]})")
    w.layers.append((layer, (w.shape[0],), (w.shape[0],)))
    ones = (1,) * len(axes)
    w.then(f"x * self.{layer}(x.mean({axes})).sigmoid().view(-1, {w.shape[0]}, {', '.join(map(str, ones))})")


def rearrange(w: Writer, r: random.Random) -> None:
    """Transposed, turned, cut, padded or expanded: views of every kind."""
    s, axes = w.shape, len(w.shape)
    if axes == 1:
        choices = [("x.unsqueeze(1).expand(-1, 2, -1)", (2, *s)), ("x.flip(1)", s)]
        choices += [(f"x.view(-1, 2, {s[0] // 2})", (2, s[0] // 2))] if s[0] % 2 == 0 else []
    else:
        turned = (s[-1], *s[1:-1], s[0])
        choices = [("x.transpose(1, -1)", turned), ("x.flip(-1)", s), ("F.pad(x, (1, 0))", (*s[:-1], s[-1] + 1))]
        choices += [("x[..., ::2]", (*s[:-1], (s[-1] + 1) // 2)), ("x[:, -1:]", (1, *s[1:]))]
        choices += [("x.flatten(2).transpose(1, 2)", (math.prod(s[1:]), s[0]))] if axes > 2 else []
        choices += [
            (f"x.repeat(1, 2{', 1' * (len(s) - 1)})", (2 * s[0], *s[1:])),
            ("x.roll(1, 1)", s),
            (f"x[:, :1].expand(-1, {s[0]}{', -1' * (len(s) - 1)})", s),
        ]
    w.then(*r.choice(choices))


def reduce(w: Writer, r: random.Random) -> None:
    """One axis less."""
    if len(w.shape) > 1:
        axis, how = r.randrange(1, len(w.shape) + 1), r.choice(("mean", "sum", "amax"))
        w.then(f"x.{how}({axis})", (*w.shape[: axis - 1], *w.shape[axis:]))


def frames(w: Writer, r: random.Random) -> None:
    """The first axis goes into the batch for one layer: a convolution or a Linear."""
    if not 2 <= len(w.shape) <= 4 or min(w.shape) < 1:
        return
    first, *rest = w.shape
    layer, width = f"m{len(w.inits)}", r.choice((1, 2, 3))
    if len(rest) == 1:
        w.inits.append(f"self.{layer} = nn.Linear({rest[0]}, {width})")
        out = (width,)
    else:
        padding = r.choice((0, 1)) if min(rest[1:]) > 1 else 1
        out = (width, *(n + 2 * padding - 1 for n in rest[1:]))
        w.inits.append(f"self.{layer} = nn.Conv{len(rest) - 1}d({rest[0]}, {width}, 2, padding={padding})")
    w.layers.append((layer, tuple(rest), out))
    w.then(f"self.{layer}(x.flatten(0, 1)).unflatten(0, (-1, {first}))", (first, *out))


def attention(w: Writer, r: random.Random) -> None:
    """Self-attention over tokens, as a module or a function."""
    if len(w.shape) != 2 or w.shape[0] > 12:
        return
    tokens, width = w.shape
    heads = r.choice([h for h in (1, 2) if width % h == 0])
    layer = f"m{len(w.inits)}"
    if r.random() < 0.4:
        w.inits.append(f"self.{layer} = nn.MultiheadAttention({width}, {heads}, batch_first=True)")
        w.layers.append((layer, (-1,), (-1,)))
        w.then(f"x + self.{layer}(x, x, x, need_weights=False)[0]")
        return
    w.inits.append(f"self.{layer} = nn.Linear({width}, {3 * width})")
    w.layers.append((layer, w.shape, (tokens, 3 * width)))
    w.lines.append(f"q, k, v = self.{layer}(x).view(-1, {tokens}, 3, {heads}, {width // heads}).permute(2, 0, 3, 1, 4)")
    w.then(f"F.scaled_dot_product_attention(q, k, v, is_causal={r.random() < 0.3}).transpose(1, 2).flatten(2)")


def free(w: Writer, r: random.Random) -> None:
    """A parameter of its own: added, multiplied or joined."""
    layer, kept = f"m{len(w.inits)}", r.choice((w.shape, w.shape[-1:], (1, *w.shape[1:])))
    w.inits.append(f"self.{layer} = nn.Parameter(torch.randn({kept}) / 2)")
    w.layers.append((layer, (-1,), (-1,)))
    w.then(f"x {r.choice('+*')} self.{layer}")


KINDS: dict[str, Step] = {
    step.__name__: step
    for step in (
        *(convolution, batch_norm, group_norm, layer_norm, linear, again, tied, activation, held, pool),
        *(residual, project, join, gate, rearrange, reduce, frames, attention, free),
    )
}
OFTEN = ("convolution", "convolution", "linear", "activation", "activation", "residual", "again")


# Source -----------------------------------------------------------------------------------------------------------


def written(case: Case) -> Writer:
    """The model as it is written, up to three outputs, or for some seeds three at each of a few positions."""
    w = Writer(case.shape)
    w.keep()
    for kind, choice in case.steps:
        before, w.changed = len(w.lines), False
        KINDS[kind](w, random.Random(choice))
        if w.changed and math.prod(w.shape) > 400:
            w.then(*(("x.mean(-1)", w.shape[:-1]) if w.shape[1:] else ("x[:, :8]", (8,))))
        if len(w.lines) > before:
            w.keep()
    r, several = random.Random(case.seed), w.shape[1:] != ()
    if several and r.random() < 0.6:
        w.then(f"x.mean({tuple(range(2, len(w.shape) + 1))})", w.shape[:1])
    elif several and not (w.shape[2:] == () and w.shape[0] <= 4 and r.random() < 0.4):
        w.then("x.flatten(1)", (math.prod(w.shape),))
    *outer, width = w.shape
    w.layer(f"nn.Linear({width}, 3)", (*outer, 3))
    if outer:
        w.then("x.transpose(1, 2)", (3, *outer))
    return w


def source(case: Case) -> str:
    """The source of `build()`, which makes the model."""
    w = written(case)
    parts = ["from __future__ import annotations", "", "import torch", "from torch import Tensor, nn"]
    parts += ["from torch.nn import functional as F", "", "", "class Generated(nn.Module):"]
    parts += ["    def __init__(self) -> None:", "        super().__init__()", *(f"        {line}" for line in w.inits)]
    parts += ["", "    def forward(self, x: Tensor) -> Tensor:", *(f"        {line}" for line in w.lines)]
    parts += ["        return x", "", "", "def build() -> nn.Module:"]
    parts += ["    with torch.random.fork_rng(devices=[]):", f"        torch.manual_seed({case.seed})"]
    parts += [f"        model = Generated().{'double' if case.dtype == 'float64' else 'float'}().eval()"]
    parts += ["        for m in model.modules():", "            if isinstance(m, nn.modules.batchnorm._BatchNorm):"]
    parts += ["                m.running_mean.normal_(std=0.3), m.running_var.uniform_(0.5, 1.5)"]
    parts += ["                if m.affine:", "                    nn.init.uniform_(m.weight, -1.5, 1.5)"]
    return "\n".join([*parts, f"    return model.to(torch.{case.dtype})", ""])


def data_source(case: Case) -> str:
    """The source that makes x and y in float64."""
    out, size = written(case).shape, (case.batch, *case.shape)
    target = {
        "nn.Cross": f"torch.randint(3, {(case.batch, *out[1:])}, generator=g)",
        "nn.MSELo": f"torch.randn({(case.batch, *out)}, generator=g, dtype=torch.float64)",
        "nn.BCEWi": f"torch.rand({(case.batch, *out)}, generator=g, dtype=torch.float64)",
    }[case.loss[:8]]
    lines = [
        f"g = torch.Generator().manual_seed({case.seed})",
        f"x = torch.randn({size}, generator=g, dtype=torch.float64)",
    ]
    return "\n".join([*lines, f"x = {case.layout}", f"y = {target}", ""])


# Drawing and shrinking --------------------------------------------------------------------------------------------

SHAPES = ((3,), (4,), (2, 7), (4, 5), (6, 4), (2, 5, 4), (3, 6, 6), (1, 7, 3), (4, 4, 4), (2, 3, 4, 3), (2, 2, 4, 4))


def draw(seed: int) -> Case:
    """A case from a seed."""
    r = random.Random(seed)
    kinds = (*KINDS, *OFTEN)
    steps = tuple((r.choice(kinds), r.randrange(1 << 30)) for _ in range(r.randint(1, 7)))
    return Case(
        steps,
        r.choice(SHAPES),
        batch=r.choice((1, 2, 2, 3, 5)),
        loss=r.choice(LOSSES),
        layout=r.choice((LAYOUTS[0], *LAYOUTS)),
        dtype=r.choices(tuple(DTYPES), (16, 3, 1))[0],
        forced=r.choice(FORCED) if r.random() < 0.5 else None,
        parts=r.randrange(1, 1 << 20) if r.random() < 0.4 else 0,
        seed=seed,
    )


def smaller(case: Case, fails: Callable[[Case], bool]) -> Case:
    """A case with fewer steps and plainer settings that still fails."""
    plain = {"layout": LAYOUTS[0], "loss": LOSSES[0], "forced": None, "parts": 0, "batch": 2, "dtype": "float64"}
    found = True
    while found:
        shorter = (replace(case, steps=case.steps[:k] + case.steps[k + 1 :]) for k in range(len(case.steps)))
        plainer = (replace(case, **{k: v}) for k, v in plain.items() if getattr(case, k) != v)
        better = next((c for c in (*shorter, *plainer) if fails(c)), None)
        found = better is not None
        case = better or case
    return case


# Checking ---------------------------------------------------------------------------------------------------------

TOLERANCES = {"float64": 1e-8, "float32": 5e-3, "bfloat16": 0.5}


def check(case: Case, build: Callable[[], nn.Module] | None = None) -> str:
    """`right`, or `refused FXC…`; an AssertionError where a number is wrong. The model may come from elsewhere."""
    model, (x, y) = (build or case.model)(), case.data()
    dtype, loss = DTYPES[case.dtype], eval(case.loss).double()
    try:
        result = computed(case, model, x.to(dtype), y.to(dtype) if y.is_floating_point() else y)
    except fxcurv.FxcurvError as error:
        return f"refused {error.code}" if error.cause and error.remedy else "wrong"
    wide = copy.deepcopy(model).double()
    rounded = x.to(dtype).double().contiguous(), y.to(dtype).double() if y.is_floating_point() else y
    elsewhere = set(re.findall(r"@ self\.(m\d+\.weight)", source(case)))
    check_result(result, wide, loss, rounded, TOLERANCES[case.dtype], elsewhere)
    return "right"


def computed(case: Case, model: nn.Module, x: Tensor, y: Tensor) -> fxcurv.Curvature:
    """The curvature, with the form that is forced and in parts, if the case says so."""
    loss, quantities = eval(case.loss).to(x.dtype), list(QUANTITIES.values())
    if case.forced is None and not case.parts:
        return fxcurv.compile(model, loss, quantities)(x, y)
    algorithms = {"*": case.forced} if case.forced else None
    program = Program.of(passes.emit(model, passes.canonicalize(model, x), chosen(quantities), x, algorithms))
    r = random.Random(case.parts)
    samples, columns = (r.randint(1, len(x)), r.randint(1, 4)) if case.parts else (len(x), 100)
    return run(
        program, model, as_loss(loss), Minibatch(x, y), Chunks(samples, dict.fromkeys(program.backwards, columns))
    )


def script(case: Case) -> str:
    """A script that shows what is wrong; PYTHONPATH must have the clone and its tests."""
    body = source(case)
    more = ["", "", "if __name__ == '__main__':", "    from generated import Case, check", "", f"    case = {case!r}"]
    return "\n".join([body, *more, "    print(check(case, build))", ""])
