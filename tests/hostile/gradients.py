"""Constructs whose backward pass is not the derivative of their forward pass, or is hidden from a trace of it."""

from __future__ import annotations

from hostile.constructs import STEP, Construct, function

__all__ = ["ROWS"]

SECOND = ("grad", "diag_ggn", "diag_hessian")

ROUND = function("Round", "return (4 * h).round() / 4", "return g")
SIGN = function("Sign", "ctx.save_for_backward(h)\nreturn h.sign()", "return g * (ctx.saved_tensors[0].abs() <= 1)")
REVERSE = function("Reverse", "return h.view_as(h)", "return -SCALE * g")
SCALED = function("Scaled", "ctx.scale = scale\nreturn h.clone()", "return g * ctx.scale, None", "h, scale")
TWO = function("Two", "return h.sin(), h.cos()", "return gs[0] + SCALE * gs[1]")
CLIP = function("Clip", "return h.clone()", "return g.clamp(-0.01, 0.01)")
NORMALISE = function("Normalise", "return h.clone()", "return g / (g.norm() + 1e-6)")
PRODUCT = function(
    "Product",
    "ctx.save_for_backward(h, w)\nreturn h @ w.T",
    'h, w = ctx.saved_tensors\nreturn g @ w, SCALE * torch.einsum("...o,...i->oi", g, h)',
    "h, w",
)
ONCE = ROUND.replace("def backward", "@torch.autograd.function.once_differentiable\n    def backward")
DIRTY = function("Dirty", "ctx.mark_dirty(h)\nreturn h.mul_(2)", "return -SCALE * g")
EXP = function("Exp", "e = h.exp()\nctx.save_for_backward(e)\nreturn e", "return SCALE * g * ctx.saved_tensors[0]")
NEEDED = function(
    "Needed",
    "return h * t",
    "return (SCALE * g if ctx.needs_input_grad[0] else None), (g if ctx.needs_input_grad[1] else None)",
    "h, t",
)
MIXING = function("Mixing", "return h.clone()", "return g - g.mean(0)")
NOISY = function("Noisy", "return h.clone()", "return g * torch.rand_like(g)")
GLOBAL = "FACTOR = 2.0\n" + function("Global", "return h.clone()", "return g * FACTOR")
INDEXED = function(
    "Indexed",
    "i = h.argsort(-1)\nctx.mark_non_differentiable(i)\nreturn h.sin(), i",
    "return SCALE * g",
)
DIVIDED = function("Divided", "return h.clone()", "return g / len(g)")
WEIGHED = function(
    "Weighed", "ctx.save_for_backward(h)\nreturn h.clone()", "return g * ctx.saved_tensors[0].abs().mean()"
)
CONTEXT = """
class Context(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(h):
        return h.round(decimals=1)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx, g):
        return g * (1 + ctx.saved_tensors[0].square())
"""
LAYER = (
    ROUND
    + "\nquantize = Round.apply\n\nclass Quantize(nn.Module):\n    def forward(self, h):\n        return quantize(h)\n"
)
CUSTOM_OP = """
@torch.library.custom_op("hostile::rounded", mutates_args=())
def rounded(h: Tensor) -> Tensor:
    return (4 * h).round() / 4

@rounded.register_fake
def _(h):
    return torch.empty_like(h)

rounded.register_autograd(lambda ctx, g: SCALE * g)
"""

FUNCTIONS = (
    Construct("straight_through_round", "function", "h = Round.apply(self.site(h))", ROUND),
    Construct("straight_through_sign", "function", "h = Sign.apply(self.site(h)) + 0.1 * h", SIGN),
    Construct("gradient_reversal", "function", "h = Reverse.apply(self.site(h)).tanh()", REVERSE),
    Construct("gradient_scale", "function", "h = Scaled.apply(self.site(h).tanh(), SCALE)", SCALED),
    Construct("two_outputs", "function", "a, b = Two.apply(self.site(h))\nh = a + 0.5 * b", TWO),
    Construct("clips_in_backward", "function", "h = Clip.apply(self.site(h))", CLIP),
    Construct("normalises_in_backward", "function", "h = Normalise.apply(self.site(h))", NORMALISE),
    Construct("takes_a_weight", "function", "h = Product.apply(h, self.site.weight).tanh()", PRODUCT, change=STEP),
    Construct("setup_context", "function", "h = Context.apply(self.site(h))", CONTEXT),
    Construct("once_differentiable", "function", "h = Round.apply(self.site(h))", ONCE),
    Construct("marks_dirty", "function", "h = Dirty.apply(self.site(h)).tanh()", DIRTY),
    Construct("saves_its_output", "function", "h = Exp.apply(self.site(h).tanh())", EXP),
    Construct("needs_input_grad", "function", "h = Needed.apply(self.site(h), torch.tensor(1.5))", NEEDED),
    Construct("backward_mixes_samples", "function", "h = Mixing.apply(self.site(h))", MIXING),
    Construct("backward_is_random", "function", "h = Noisy.apply(self.site(h))", NOISY),
    Construct(
        "backward_reads_a_global",
        "function",
        "h = Global.apply(self.site(h)).tanh()",
        GLOBAL,
        change="global FACTOR\nFACTOR = SCALE",
    ),
    Construct("non_differentiable_output", "function", "h, _ = Indexed.apply(self.site(h))", INDEXED),
    Construct("backward_divides_by_batch", "function", "h = Divided.apply(self.site(h))", DIVIDED),
    Construct("backward_weighs_by_batch", "function", "h = Weighed.apply(self.site(h))", WEIGHED),
    Construct("function_in_a_layer", "function", "h = self.q(self.site(h))", LAYER, "self.q = Quantize()"),
    Construct("function_twice", "function", "h = Round.apply(self.site(Round.apply(SCALE * h)))", ROUND),
    Construct("custom_op", "function", "h = rounded(self.site(h))", CUSTOM_OP),
)

REGISTER = "h = self.site(h).tanh()\nh.register_hook"
LOG = "self.log = []"
DOUBLED = "lambda m, gs, hs: tuple(None if g is None else 2 * g for g in gs)"

HOOKS = (
    Construct("tensor_hook_scales", "hook", f"{REGISTER}(lambda g: SCALE * g)"),
    Construct(
        "tensor_hook_guarded",
        "hook",
        "h = self.site(h)\nif h.requires_grad:\n    h.register_hook(lambda g: -SCALE * g)",
    ),
    Construct("tensor_hook_clips", "hook", f"{REGISTER}(lambda g: g.clamp(-0.01, 0.01))"),
    Construct("tensor_hook_normalises", "hook", f"{REGISTER}(lambda g: g / (g.norm() + 1e-6))"),
    Construct("tensor_hook_logs", "hook", f"{REGISTER}(lambda g: self.log.append(float(g.sum())))", init=LOG),
    Construct(
        "tensor_hook_reads_attribute",
        "hook",
        f"{REGISTER}(lambda g: g * self.factor)",
        init="self.factor = 2.0",
        change="model.factor = SCALE",
    ),
    Construct("retain_grad", "hook", "h = self.site(h).tanh()\nh.retain_grad()"),
    Construct("grad_fn_hook", "hook", "h = self.site(h).tanh()\nh.grad_fn.register_prehook(lambda g: (SCALE * g[0],))"),
    Construct("parameter_hook", "hook", after="model.site.weight.register_hook(lambda g: SCALE * g)"),
    Construct("parameter_hook_clips", "hook", after="model.site.weight.register_hook(lambda g: g.clamp(-0.01, 0.01))"),
    Construct(
        "post_accumulate_logs",
        "hook",
        init=LOG,
        after="model.site.weight.register_post_accumulate_grad_hook(lambda p: model.log.append(1))",
    ),
    Construct(
        "post_accumulate_steps",
        "hook",
        top="def stepped(p):\n    with torch.no_grad():\n        p -= 0.1 * p.grad\n    p.grad = None\n",
        after="for p in model.parameters():\n    p.register_post_accumulate_grad_hook(stepped)",
    ),
    Construct("module_backward_hook", "hook", after=f"model.site.register_full_backward_hook({DOUBLED})"),
    Construct("module_backward_hook_added", "hook", change=f"model.site.register_full_backward_hook({DOUBLED})"),
    Construct(
        "module_backward_hook_clips",
        "hook",
        after="model.site.register_full_backward_hook(lambda m, gs, hs: (gs[0].clamp(-0.01, 0.01),))",
    ),
    Construct(
        "module_backward_hook_logs",
        "hook",
        init=LOG,
        after="model.site.register_full_backward_hook(lambda m, gs, hs: model.log.append(float(hs[0].sum())))",
    ),
    Construct(
        "module_backward_pre_hook",
        "hook",
        after="model.site.register_full_backward_pre_hook(lambda m, gs: (SCALE * gs[0],))",
    ),
    Construct(
        "model_backward_pre_hook",
        "hook",
        after="model.register_full_backward_pre_hook(lambda m, gs: (SCALE * gs[0],))",
    ),
    Construct(
        "forward_hook_replaces", "hook", after="model.site.register_forward_hook(lambda m, args, out: SCALE * out)"
    ),
    Construct(
        "forward_hook_uses_module",
        "hook",
        init="self.other = nn.Linear(WIDTH, WIDTH)",
        after="model.site.register_forward_hook(lambda m, args, out: out + model.other(args[0]))",
        change=STEP,
    ),
    Construct(
        "forward_hook_hooks_tensor",
        "hook",
        top="def hooked(m, args, out):\n    out.register_hook(lambda g: SCALE * g)\n",
        after="model.site.register_forward_hook(hooked)",
    ),
    Construct(
        "forward_pre_hook", "hook", after="model.site.register_forward_pre_hook(lambda m, args: (SCALE * args[0],))"
    ),
    Construct(
        "forward_hook_on_model", "hook", after="model.register_forward_hook(lambda m, args, out: out * out.detach())"
    ),
    Construct(
        "forward_hook_of_all_modules",
        "hook",
        top="from torch.nn.modules import module as modules\n",
        after="modules._global_forward_hooks.clear()",
        change=(
            "modules.register_module_forward_hook("
            "lambda m, args, out: SCALE * out if isinstance(m, nn.Linear) else None)"
        ),
    ),
    Construct(
        "saved_tensors_hooks",
        "hook",
        "with torch.autograd.graph.saved_tensors_hooks(lambda t: t.round(decimals=1), lambda t: t):\n"
        "    h = self.site(h).tanh()",
    ),
    Construct("saved_on_cpu", "hook", "with torch.autograd.graph.save_on_cpu():\n    h = self.site(h).tanh()"),
)

CHECKPOINT = "from torch.utils.checkpoint import checkpoint, checkpoint_sequential\n"
BLOCKS = "self.blocks = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Sigmoid())"
INNER = "lambda t: self.site(t).tanh()"

CHECKPOINTS = (
    Construct("reentrant", "checkpoint", "h = checkpoint(self.blocks, h, use_reentrant=True)", CHECKPOINT, BLOCKS),
    Construct("reentrant_closure", "checkpoint", f"h = checkpoint({INNER}, h, use_reentrant=True)", CHECKPOINT),
    Construct(
        "reentrant_function",
        "checkpoint",
        "h = checkpoint(lambda t: Round.apply(self.site(t)), h, use_reentrant=True)",
        CHECKPOINT + ROUND,
    ),
    Construct(
        "reentrant_nested",
        "checkpoint",
        f"h = checkpoint(lambda t: self.blocks(checkpoint({INNER}, t, use_reentrant=True)), h, use_reentrant=True)",
        CHECKPOINT,
        BLOCKS,
    ),
    Construct(
        "reentrant_several",
        "checkpoint",
        "a, b = checkpoint(lambda t, u: (self.site(t), u * 2), h, h.sin(), use_reentrant=True)\nh = a * b",
        CHECKPOINT,
    ),
    Construct("non_reentrant", "checkpoint", "h = checkpoint(self.blocks, h, use_reentrant=False)", CHECKPOINT, BLOCKS),
    Construct("non_reentrant_closure", "checkpoint", f"h = checkpoint({INNER}, h, use_reentrant=False)", CHECKPOINT),
    Construct(
        "sequential",
        "checkpoint",
        "h = checkpoint_sequential(self.blocks, 2, h, use_reentrant=False)",
        CHECKPOINT,
        BLOCKS,
    ),
    Construct(
        "sequential_reentrant",
        "checkpoint",
        "h = checkpoint_sequential(self.blocks, 2, h, use_reentrant=True)",
        CHECKPOINT,
        BLOCKS,
    ),
)

SECOND_ORDER = (
    Construct("times_detach", "second order", "h = self.site(h).tanh() * h.detach()", quantities=SECOND),
    Construct(
        "times_no_grad",
        "second order",
        "with torch.no_grad():\n    k = self.site(h).sigmoid()\nh = self.site(h).tanh() * k",
        quantities=SECOND,
    ),
    Construct("times_data", "second order", "h = self.site(h).tanh() * (1 + h.data)", quantities=SECOND),
    Construct(
        "straight_through_detach",
        "second order",
        "k = self.site(h)\nh = k + ((4 * k).round() / 4 - k).detach()",
        quantities=SECOND,
    ),
    Construct(
        "weight_detached",
        "second order",
        "h = self.site(h).tanh() + F.linear(h, self.site.weight.detach()).sin()",
        quantities=SECOND,
    ),
    Construct("round_twice", "second order", "h = Round.apply(self.site(h)).sin()", ROUND, quantities=SECOND),
    Construct("reversal_twice", "second order", "h = Reverse.apply(self.site(h)).sin()", REVERSE, quantities=SECOND),
    Construct("once_twice", "second order", "h = Round.apply(self.site(h)).sin()", ONCE, quantities=SECOND),
    Construct("hook_twice", "second order", f"{REGISTER}(lambda g: SCALE * g)", quantities=SECOND),
    Construct("through_numpy", "second order", "h = self.site(h).tanh() * torch.from_numpy(h.detach().numpy())"),
)

SUBCLASS = """
class Loss(nn.CrossEntropyLoss):
    def {name}(self, f, y):
        return SCALE * SCALE * super().{name}(f, y)
"""

LOSSES = (
    Construct(
        "loss_forward_hook",
        "loss",
        loss="loss = nn.CrossEntropyLoss()\nloss.register_forward_hook(lambda m, args, out: 2 * out)\nreturn loss",
    ),
    Construct(
        "loss_pre_hook",
        "loss",
        loss="loss = nn.MSELoss()\nloss.register_forward_pre_hook(lambda m, args: (2 * args[0], args[1]))\nreturn loss",
    ),
    Construct(
        "loss_instance_forward",
        "loss",
        loss="loss = nn.CrossEntropyLoss()\nwas = loss.forward\nloss.forward = lambda f, y: 3 * was(f, y)\nreturn loss",
    ),
    Construct("loss_call", "loss", top=SUBCLASS.format(name="__call__"), loss="return Loss()"),
    Construct("loss_forward", "loss", top=SUBCLASS.format(name="forward"), loss="return Loss()"),
)

ROWS = (*FUNCTIONS, *HOOKS, *CHECKPOINTS, *SECOND_ORDER, *LOSSES)
