"""Constructs whose state changes between calls."""

from __future__ import annotations

from hostile.constructs import Construct

__all__ = ["ROWS"]

CONFIG = """
class Config:
    def __init__(self, scale):
        self.scale = scale
        self.options = {"scale": scale}
"""
CELL = """
def cell():
    scale = 1.5
    def scaled(h):
        return h * scale
    def put(value):
        nonlocal scale
        scale = value
    return scaled, put
"""
OTHER = "h = self.act(self.site(h))"
SCALED = "h = self.scaled(self.site(h))"

ATTRIBUTES = (
    Construct(
        "attribute", "state", "h = self.site(h) * self.scale", init="self.scale = 1.5", change="model.scale = SCALE"
    ),
    Construct(
        "object",
        "state",
        "h = self.site(h) * self.config.scale",
        CONFIG,
        "self.config = Config(1.5)",
        change="model.config.scale = SCALE",
    ),
    Construct(
        "nested_object",
        "state",
        'h = self.site(h) * self.config.options["scale"]',
        CONFIG,
        "self.config = Config(1.5)",
        change='model.config.options["scale"] = SCALE',
    ),
    Construct(
        "dict",
        "state",
        'h = self.site(h) * self.of["scale"]',
        init='self.of = {"scale": 1.5}',
        change='model.of["scale"] = SCALE',
    ),
    Construct("list", "state", "h = self.site(h) * self.of[0]", init="self.of = [1.5]", change="model.of[0] = SCALE"),
    Construct("global", "state", "h = self.site(h) * FACTOR", "FACTOR = 1.5\n", change="global FACTOR\nFACTOR = SCALE"),
    Construct(
        "global_dict",
        "state",
        'h = self.site(h) * OPTIONS["scale"]',
        'OPTIONS = {"scale": 1.5}\n',
        change='OPTIONS["scale"] = SCALE',
    ),
    Construct(
        "global_of_helper",
        "state",
        "h = scaled(self.site(h))",
        "FACTOR = 1.5\n\ndef scaled(h):\n    return h * FACTOR\n",
        change="global FACTOR\nFACTOR = SCALE",
    ),
    Construct(
        "global_helper_replaced",
        "state",
        "h = helper(self.site(h))",
        "def helper(h):\n    return h.tanh()\n",
        change="global helper\nhelper = torch.sin",
    ),
    Construct(
        "closure_cell",
        "state",
        "h = self.scaled(self.site(h))",
        CELL,
        "self.scaled, self.put = cell()",
        change="model.put(SCALE)",
    ),
    Construct(
        "default_argument",
        "state",
        SCALED,
        init="def scaled(h, by=1.5):\n    return h * by\nself.scaled = scaled",
        change="model.scaled.__defaults__ = (SCALE,)",
    ),
    Construct(
        "partial_argument",
        "state",
        SCALED,
        init="self.scaled = functools.partial(torch.mul, other=torch.tensor(1.5))",
        change="model.scaled.keywords['other'].fill_(SCALE)",
    ),
    Construct(
        "numpy_array",
        "state",
        "h = self.site(h) * torch.from_numpy(self.array)",
        init="self.array = np.full(WIDTH, 1.5)",
        change="model.array[...] = SCALE",
    ),
    Construct(
        "tensor_attribute",
        "state",
        "h = self.site(h) * self.t",
        init="self.t = torch.ones(WIDTH, dtype=torch.float64)",
        change="model.t.mul_(SCALE)",
    ),
    Construct(
        "tensor_attribute_data",
        "state",
        "h = self.site(h) * self.t",
        init="self.t = torch.ones(WIDTH, dtype=torch.float64)",
        change="model.t.data = model.t * SCALE",
    ),
    Construct(
        "tensor_in_a_list",
        "state",
        "h = self.site(h) * self.ts[0]",
        init="self.ts = [torch.ones(WIDTH, dtype=torch.float64)]",
        change="model.ts[0].data = model.ts[0] * SCALE",
    ),
    Construct(
        "environment",
        "state",
        'h = self.site(h) * float(os.environ["HOSTILE_FACTOR"])',
        "import os\n\nos.environ['HOSTILE_FACTOR'] = '1.5'\n",
        change='os.environ["HOSTILE_FACTOR"] = "SCALE"',
        verify="always",
    ),
)

MODULES = (
    Construct("parameter_data", "state", change="model.site.weight.data = model.site.weight.data * SCALE"),
    Construct(
        "parameter_replaced", "state", change="model.site.weight = nn.Parameter(model.site.weight.detach() * SCALE)"
    ),
    Construct(
        "buffer_changed",
        "state",
        "h = self.site(h) * self.b",
        init='self.register_buffer("b", torch.ones(WIDTH))',
        change="model.b.mul_(SCALE)",
    ),
    Construct(
        "buffer_replaced",
        "state",
        "h = self.site(h) * self.b",
        init='self.register_buffer("b", torch.ones(WIDTH))',
        change="model.b = model.b * SCALE",
    ),
    Construct("frozen", "state", change="model.site.weight.requires_grad_(False)"),
    Construct(
        "thawed",
        "state",
        after="model.site.weight.requires_grad_(False)",
        change="model.site.weight.requires_grad_(True)",
    ),
    Construct(
        "submodule_swapped",
        "state",
        change=(
            "model.site = nn.Linear(WIDTH, WIDTH).double()\n"
            "nn.init.eye_(model.site.weight)\nnn.init.ones_(model.site.bias)"
        ),
    ),
    Construct("activation_swapped", "state", OTHER, init="self.act = nn.Tanh()", change="model.act = nn.Sigmoid()"),
    Construct("function_swapped", "state", OTHER, init="self.act = torch.tanh", change="model.act = torch.sin"),
    Construct(
        "eps_changed",
        "state",
        "h = self.norm(self.site(h))",
        init="self.norm = nn.LayerNorm(WIDTH)",
        change="model.norm.eps = 0.7",
    ),
    Construct(
        "class_forward_replaced",
        "state",
        "h = self.inner(h)",
        "class Inner(nn.Linear):\n    pass\n",
        "self.inner = Inner(WIDTH, WIDTH)",
        change="def replaced(self, h):\n    return F.linear(h, self.weight, self.bias).sin()\nInner.forward = replaced",
    ),
    Construct(
        "helper_method_replaced",
        "state",
        "h = self.inner(h)",
        "class Inner(nn.Linear):\n"
        "    def forward(self, h):\n        return self.bent(super().forward(h))\n\n"
        "    def bent(self, h):\n        return h.tanh()\n",
        "self.inner = Inner(WIDTH, WIDTH)",
        change="Inner.bent = lambda self, h: h.sin()",
    ),
    Construct(
        "class_attribute_changed",
        "state",
        "h = self.inner(h)",
        "class Inner(nn.Linear):\n    scale = 1.5\n\n"
        "    def forward(self, h):\n        return super().forward(h) * self.scale\n",
        "self.inner = Inner(WIDTH, WIDTH)",
        change="Inner.scale = SCALE",
    ),
    Construct(
        "instance_forward_replaced",
        "state",
        change="was = model.site.forward\nmodel.site.forward = lambda h: was(h).sin()",
    ),
    Construct(
        "forward_hook_added", "state", change="model.site.register_forward_hook(lambda m, args, out: SCALE * out)"
    ),
    Construct(
        "forward_hook_removed",
        "state",
        after="model.handle = model.site.register_forward_hook(lambda m, args, out: SCALE * out)",
        change="model.handle.remove()",
    ),
    Construct(
        "hook_reads_attribute",
        "state",
        init="self.scale = 1.5",
        after="model.site.register_forward_hook(lambda m, args, out: model.scale * out)",
        change="model.scale = SCALE",
    ),
    Construct(
        "dropout_trains",
        "state",
        "h = self.drop(self.site(h).tanh())",
        init="self.drop = nn.Dropout(0.5)",
        change="model.drop.train()",
    ),
    Construct(
        "training_flag",
        "state",
        "h = self.site(h).tanh()\nif self.site.training:\n    h = SCALE * h",
        change="model.site.train()",
    ),
)

CACHES = (
    Construct(
        "caches_a_statistic",
        "cache",
        "h = self.site(h)\nif self.cache is None:\n    self.cache = h.detach().abs().mean()\nh = h * self.cache",
        init="self.cache = None",
        change="model(x)",
    ),
    Construct(
        "caches_a_weight",
        "cache",
        "if self.cache is None:\n    self.cache = self.site.weight.detach() * 2\n"
        "h = F.linear(h, self.cache) + self.site(h)",
        init="self.cache = None",
        change="model(x)\nwith torch.no_grad():\n    model.site.weight.mul_(SCALE)",
    ),
    Construct(
        "caches_a_graph",
        "cache",
        "if self.cache is None:\n    self.cache = self.table[self.index]\nh = self.site(h) + self.cache",
        init="self.cache = None\nself.table = nn.Parameter(torch.randn(3))\nself.index = torch.arange(WIDTH) % 3",
        change="model(x)",
    ),
    Construct(
        "caches_positions",
        "cache",
        "if self.cache is None or len(self.cache) < len(h):\n"
        "    self.cache = torch.arange(len(h), dtype=h.dtype).view(-1, *(1,) * (h.ndim - 1))\n"
        "h = self.site(h) * (1 + self.cache[: len(h)] / 10)",
        init="self.cache = None",
        change="model(x)",
    ),
    Construct(
        "counts_calls",
        "cache",
        "self.calls += 1\nh = self.site(h)\nif self.calls > 1:\n    h = SCALE * h",
        init="self.calls = 0",
        change="model(x)",
    ),
    Construct(
        "alternates",
        "cache",
        "self.odd = not self.odd\nh = self.site(h)\nif self.odd:\n    h = SCALE * h",
        init="self.odd = False",
        change="model(x)",
    ),
    Construct(
        "remembers_the_batch_size",
        "cache",
        "h = self.site(h)\nif self.most is None:\n    self.most = len(h)\nif len(h) > self.most:\n    h = SCALE * h",
        init="self.most = None",
        change="model(x)",
    ),
    Construct(
        "keeps_the_last_output",
        "cache",
        "h = self.site(h).tanh()\nif self.last is not None:\n    h = h + self.last\nself.last = h.detach().mean(0)",
        init="self.last = None",
        change="model(x)",
    ),
)

ROWS = (*ATTRIBUTES, *MODULES, *CACHES)
