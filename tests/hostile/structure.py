"""Constructs that reach parameters by other ways than attributes of modules, or compute weights from parameters."""

from __future__ import annotations

from hostile.constructs import STEP, Construct
from hostile.gradients import ROUND

__all__ = ["ROWS"]

DECORATED = """
def decorated(call):
    @functools.wraps(call)
    def wrapper(*args, **kwargs):
        return SCALE * call(*args, **kwargs)
    return wrapper
"""

WRAPPED = (
    Construct(
        "decorated_bound_method",
        "wrapped forward",
        top=DECORATED,
        init="self.site.forward = decorated(self.site.forward)",
        change=STEP,
    ),
    Construct(
        "decorated_class_forward",
        "wrapped forward",
        "h = self.inner(h)",
        DECORATED
        + "\nclass Inner(nn.Linear):\n    @decorated\n    def forward(self, h):\n        return super().forward(h)\n",
        "self.inner = Inner(WIDTH, WIDTH)",
        change=STEP,
    ),
    Construct("lambda", "wrapped forward", "h = self.f(h)", init="self.f = lambda h: self.site(h).tanh()", change=STEP),
    Construct(
        "local_function",
        "wrapped forward",
        "h = self.f(h)",
        init="def f(h, layer=self.site):\n    return layer(h).tanh()\nself.f = f",
        change=STEP,
    ),
    Construct(
        "partial",
        "wrapped forward",
        "h = self.f(h)",
        "def applied(layer, h):\n    return layer(h).tanh()\n",
        "self.f = functools.partial(applied, self.site)",
        change=STEP,
    ),
    Construct(
        "bound_method",
        "wrapped forward",
        "h = self.f(h).tanh()",
        init="self.f = self.site.forward",
        change=STEP,
    ),
    Construct(
        "weakref", "wrapped forward", "h = self.r()(h).tanh()", init="self.r = weakref.ref(self.site)", change=STEP
    ),
    Construct(
        "global_registry",
        "wrapped forward",
        'h = REGISTRY["site"](h).tanh()',
        "REGISTRY = {}\n",
        'REGISTRY["site"] = self.site',
        change=STEP,
    ),
    Construct(
        "thread_local",
        "wrapped forward",
        "h = LOCAL.site(h).tanh()",
        "import threading\n\nLOCAL = threading.local()\n",
        "LOCAL.site = self.site",
        change=STEP,
    ),
    Construct(
        "class_attribute",
        "wrapped forward",
        "h = Holder.layer(h).tanh()",
        "class Holder:\n    layer = None\n",
        "Holder.layer = self.site",
        change=STEP,
    ),
    Construct(
        "parameter_closure",
        "wrapped forward",
        "h = self.f(h).tanh()",
        init="w = self.site.weight\nself.f = lambda h: h @ w.T",
        change=STEP,
    ),
    Construct(
        "tied_by_closure",
        "wrapped forward",
        "h = self.f(self.site(h).tanh())",
        init="w = self.site.weight\nself.f = lambda h: h @ w",
        change=STEP,
    ),
    Construct(
        "plain_list", "wrapped forward", "h = self.layers[0](h).tanh()", init="self.layers = [self.site]", change=STEP
    ),
    Construct(
        "plain_list_unregistered",
        "wrapped forward",
        "h = self.layers[0](self.site(h)).tanh()",
        init="self.layers = [nn.Linear(WIDTH, WIDTH).double()]",
        change="with torch.no_grad():\n    model.layers[0].weight.mul_(SCALE)",
    ),
    Construct(
        "plain_dict",
        "wrapped forward",
        'h = self.of["site"](h).tanh()',
        init='self.of = {"site": self.site}',
        change=STEP,
    ),
    Construct(
        "call_overridden",
        "wrapped forward",
        "h = self.inner(h).tanh()",
        "class Inner(nn.Linear):\n    def __call__(self, h):\n        return SCALE * super().__call__(h)\n",
        "self.inner = Inner(WIDTH, WIDTH)",
        change=STEP,
    ),
    Construct(
        "getattr_overridden",
        "wrapped forward",
        "h = F.linear(h, self.outer.weight, self.outer.bias).tanh()",
        "class Outer(nn.Module):\n"
        "    def __init__(self, inner):\n        super().__init__()\n        self.inner = inner\n\n"
        "    def __getattr__(self, name):\n        try:\n            return super().__getattr__(name)\n"
        "        except AttributeError:\n            return getattr(super().__getattr__('inner'), name)\n",
        "self.outer = Outer(self.site)",
        change=STEP,
    ),
)

SYMMETRIC = "class Symmetric(nn.Module):\n    def forward(self, w):\n        return w.triu() + w.triu(1).T\n"
QUANTIZED = ROUND + "\nclass Quantized(nn.Module):\n    def forward(self, w):\n        return Round.apply(w)\n"
PARAMETRIZE = "from torch.nn.utils import parametrizations, parametrize\n"
DOUBLED_TENSOR = """
class Doubled(Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is not F.linear:
            return super().__torch_function__(func, types, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return 2 * func(*args, **(kwargs or {}))
"""
DOUBLED_MODE = """
from torch.overrides import TorchFunctionMode

class Doubled(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return 2 * out if func is F.linear else out
"""
BUCKET = (
    "k = (x.flatten(1)[:, 0] > 0).long()\ne = self.table(k)\nh = self.site(h) + e.view(-1, *(1,) * (h.ndim - 2), WIDTH)"
)

COMPUTED = (
    Construct(
        "parametrization",
        "computed weight",
        top=PARAMETRIZE + SYMMETRIC,
        init='parametrize.register_parametrization(self.site, "weight", Symmetric())',
        change=STEP,
    ),
    Construct(
        "parametrization_function",
        "computed weight",
        top=PARAMETRIZE + QUANTIZED,
        init='parametrize.register_parametrization(self.site, "weight", Quantized())',
        change=STEP,
    ),
    Construct(
        "weight_norm", "computed weight", top=PARAMETRIZE, init="parametrizations.weight_norm(self.site)", change=STEP
    ),
    Construct("weight_norm_by_hook", "computed weight", init="torch.nn.utils.weight_norm(self.site)", change=STEP),
    Construct(
        "spectral_norm",
        "computed weight",
        top=PARAMETRIZE,
        init="parametrizations.spectral_norm(self.site)",
        change=STEP,
    ),
    Construct(
        "tensor_subclass",
        "computed weight",
        top=DOUBLED_TENSOR,
        after="model.site.weight = nn.Parameter(model.site.weight.detach().as_subclass(Doubled))",
    ),
    Construct("function_mode", "computed weight", "with Doubled():\n    h = self.site(h).tanh()", DOUBLED_MODE),
    Construct(
        "func_grad", "computed weight", "h = torch.func.grad(lambda t: self.site(t).sin().sum())(h)", change=STEP
    ),
    Construct(
        "compiled_submodule",
        "computed weight",
        after='model.site = torch.compile(model.site, backend="eager", dynamic=True)',
        reuse=True,
    ),
    Construct("unused_in_eval", "computed weight", init="self.extra = nn.Linear(WIDTH, WIDTH)"),
    Construct(
        "used_in_training_only",
        "computed weight",
        "h = self.site(h).tanh()\nif self.training:\n    h = self.extra(h)",
        init="self.extra = nn.Linear(WIDTH, WIDTH)",
    ),
    Construct("sparse_embedding", "computed weight", BUCKET, init="self.table = nn.Embedding(2, WIDTH, sparse=True)"),
    Construct(
        "embedding_max_norm", "computed weight", BUCKET, init="self.table = nn.Embedding(2, WIDTH, max_norm=0.5)"
    ),
    Construct(
        "no_grad_forward",
        "computed weight",
        "h = h + self.frozen(h)",
        init="self.other = nn.Linear(WIDTH, WIDTH)\nself.frozen = torch.no_grad()(lambda h: self.other(h))",
    ),
)

IN_PLACE = (
    Construct("in_place_on_view", "in place", "h = self.site(h)\nh[..., :1].mul_(SCALE)\nh = h.tanh()"),
    Construct("in_place_on_transpose", "in place", "h = self.site(h)\nh.transpose(0, -1)[0].add_(SCALE)\nh = h.tanh()"),
    Construct("in_place_on_saved_input", "in place", "x.data.mul_(SCALE)\nh = self.site(h).tanh()"),
    Construct(
        "in_place_on_buffer",
        "in place",
        "self.seen.add_(1)\nh = self.site(h) * self.seen",
        init='self.register_buffer("seen", torch.zeros(()))',
        change="model(x)",
    ),
    Construct(
        "in_place_on_weight",
        "in place",
        "with torch.no_grad():\n    self.site.weight.clamp_(-0.1, 0.1)\nh = self.site(h).tanh()",
    ),
)

ROWS = (*WRAPPED, *COMPUTED, *IN_PLACE)
