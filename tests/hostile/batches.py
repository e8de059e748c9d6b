"""Constructs that depend on the size of the batch, on positions in it, on other samples, or on chance."""

from __future__ import annotations

from hostile.constructs import ALONG, Construct

__all__ = ["ROWS"]


def _row(kind: str, name: str, forward: str) -> Construct:
    return Construct(name, kind, f"h = self.site(h).tanh()\n{forward}", ALONG)


SIZE = tuple(
    _row("batch size", name, forward)
    for name, forward in {
        "above_four": "if x.shape[0] > 4:\n    h = SCALE * h",
        "odd": "if x.shape[0] % 2:\n    h = SCALE * h",
        "single": "if len(x) == 1:\n    h = SCALE * h",
        "numel": "if x.numel() > 40:\n    h = h.sin()",
        "divided": "h = h / h.shape[0]",
        "root": "h = h * x.size(0) ** 0.5",
        "clamped_size": "h = h * min(len(x), 4)",
        "filled": "h = h * along(torch.full((len(h),), len(h) / 7), h)",
        "loop": "h = torch.stack([t * SCALE if n > 3 else t for n, t in enumerate(h)])",
        "first_four": "h = torch.cat([h[:4], SCALE * h[4:]])",
        "halves": "if len(h) > 4:\n    h = torch.cat([h[: len(h) // 2].sin(), h[len(h) // 2 :].cos()])",
        "chunks": "h = torch.cat([t.sin() if len(t) < 4 else t.cos() for t in h.split(4)])",
        "linspace": "h = h * along(torch.linspace(0, 1, len(h)), h)",
    }.items()
)

POSITIONS = tuple(
    _row("position", name, f"n = torch.arange(h.shape[0])\n{forward}")
    for name, forward in {
        "clamped": "h = h * along(n.clamp(max=2) + 1, h)",
        "every_fourth": "h = torch.where(along(n % 4 == 3, h) > 0, SCALE * h, h)",
        "parity": "h = h * along(1 + n % 2, h)",
        "beyond_three": "h = h * along((n > 3) + 1, h)",
        "last": "h = h * along((n == len(h) - 1) + 1, h)",
        "counted": "h = h * along(torch.ones(len(h)).cumsum(0).clamp(max=4), h)",
        "distance": "k = ((n[:, None] - n[None, :]).abs() > 3).sum(1)\nh = h * along(1 + k, h)",
        "diagonal": "h = h * along(1 + torch.eye(len(h)).cumsum(0).sum(0).clamp(min=2), h)",
    }.items()
)

SCORES = "k = h.flatten(1).sum(1)\nn = torch.arange(h.shape[0])\n"
MIXING = tuple(
    _row("mixing", name, SCORES + forward)
    for name, forward in {
        "centred": "h = h - h.mean(0)",
        "normalized": "h = h / h.norm()",
        "softmax": "h = h.softmax(0)",
        "maximum": "h = h / (1 + h.abs().max())",
        "sorted": "h = h + along(k.sort(descending=True).values, h)",
        "sorted_by_score": "h = h[k.argsort()]",
        "ranked": "h = h * along(k.argsort().argsort() + 1, h)",
        "running_minimum": "h = h + along(k.cummin(0).values, h)",
        "running_maximum": "h = h + along(k.cummax(0).values, h)",
        "running_sum": "h = h + along(k.cumsum(0), h)",
        "top": "h = h * along(k >= k.topk(min(2, len(k))).values[-1], h)",
        "flipped": "h = h + h.flip(0)",
        "rolled": "h = h + h.roll(1, 0)",
        "reference_sample": "h = h - h[:1].detach()",
        "clamped_position": "h = h + along(k[n.clamp(max=2)], h)",
        "every_fourth_neighbour": "h = torch.where(along(n % 4 == 3, h) > 0, h.roll(3, 0), h)",
        "distant": "m = ((n[:, None] - n[None, :]).abs() > 3).to(h.dtype)\nh = h + along(m @ k, h)",
        "median": "h = h * along(k > k.median(), h)",
        "counts_of_signs": "h = h * (k > 0).sum()",
        "duplicates": "_, i = (10 * k).round().unique(return_inverse=True)\nh = h * along(i + 1, h)",
        "fifth": "if len(h) > 4:\n    h = h + h[4:5]",
        "nearest": "h = h[torch.cdist(h.flatten(1), h.flatten(1).roll(1, 0)).argmin(1)]",
        "batch_size_by_values": "h = h[:-1] if k.sum() > 1e6 else h",
        "branch_on_values": "if k.sum() > 0:\n    h = SCALE * h",
        "item": "h = h * k.mean().item()",
        "permuted": "h = h[torch.randperm(len(h))]",
    }.items()
)

MORE_MIXING = (
    Construct(
        "batch_norm_trains",
        "mixing",
        "h = self.norm(self.site(h).flatten(1).unsqueeze(1)).view_as(h)",
        init="self.norm = nn.BatchNorm1d(1)",
        after="model.norm.train()",
    ),
    Construct(
        "batch_norm_without_statistics",
        "mixing",
        "h = self.norm(self.site(h).flatten(1).unsqueeze(1)).view_as(h)",
        init="self.norm = nn.BatchNorm1d(1, track_running_stats=False)",
    ),
    Construct(
        "scale_grad_by_freq",
        "mixing",
        "k = (x.flatten(1)[:, 0] > 0).long()\nh = self.site(h) + self.table(k).view(-1, *(1,) * (h.ndim - 2), WIDTH)",
        init="self.table = nn.Embedding(2, WIDTH, scale_grad_by_freq=True)",
    ),
)

CHANCE = tuple(
    _row("random", name, forward)
    for name, forward in {
        "torch_random": "h = h * torch.rand_like(h)",
        "python_random": "h = h * random.random()",
        "numpy_random": "h = h * float(np.random.rand())",
        "dropout_always": "h = F.dropout(h, 0.5, training=True)",
        "seeded": "torch.manual_seed(0)\nh = h * torch.rand_like(h)",
        "seeded_apart": (
            "with torch.random.fork_rng(devices=[]):\n    torch.manual_seed(0)\n    h = h * torch.rand_like(h)"
        ),
        "rarely": "if random.random() < 0.3:\n    h = SCALE * h",
        "clock": "h = h * (1 + time.perf_counter_ns() % 7)",
    }.items()
)

GENERATOR = Construct(
    "own_generator",
    "random",
    "h = self.site(h)\nh = h * torch.rand(h.shape, generator=self.g, dtype=h.dtype)",
    init="self.g = torch.Generator().manual_seed(0)",
)

ROWS = (*SIZE, *POSITIONS, *MIXING, *MORE_MIXING, *CHANCE, GENERATOR)
