"""Softmax, attention in all its forms, and recurrent layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from samples.rows import IMAGE, TOKENS, Model, Op, functions, modules

LOWER = torch.ones(6, 6).tril().bool()
BIAS = torch.arange(36.0, dtype=torch.float64).view(6, 6).sin()
NOT_LAST = torch.tensor([False, False, True])


def grouped_queries(x: Tensor) -> Tensor:
    """Four heads of queries share two heads of keys and values."""
    return F.scaled_dot_product_attention(x, x[:, :2].tanh(), x[:, 2:], enable_gqa=True)


def padded_attention(x: Tensor) -> Tensor:
    """A mask from the data: keys with a negative first entry are seen by their own query only."""
    mask = (x[..., 0] > 0).unsqueeze(-2) | torch.eye(x.shape[-2], dtype=torch.bool)
    return F.scaled_dot_product_attention(x, x, x.sin(), attn_mask=mask)


ATTENTION: dict[str, Op] = {
    "softmax_last": lambda x: x.softmax(-1),
    "softmax2d": nn.Softmax2d(),
    "softmin": lambda x: F.softmin(x, dim=2),
    "softmax_wide": lambda x: x.softmax(-1, dtype=torch.float64),
    "log_softmax_pixels": lambda x: x.flatten(2).log_softmax(-1),
    "plain": lambda x: F.scaled_dot_product_attention(x, x.tanh(), x.sin()),
    "mask": lambda x: F.scaled_dot_product_attention(x, x.tanh(), x.sin(), attn_mask=LOWER),
    "bias": lambda x: F.scaled_dot_product_attention(x, x.tanh(), x.sin(), attn_mask=BIAS),
    "causal": lambda x: F.scaled_dot_product_attention(x, x.tanh(), x.sin(), is_causal=True),
    "scale": lambda x: F.scaled_dot_product_attention(x, x.tanh(), x.sin(), scale=0.3),
    "grouped_queries": grouped_queries,
    "mask_from_data": padded_attention,
    "by_hand": lambda x: (x @ x.tanh().mT * 0.4).masked_fill(~LOWER, -torch.inf).softmax(-1) @ x.sin(),
    "additive_mask": lambda x: (x @ x.mT + torch.full((6, 6), -torch.inf, dtype=x.dtype).triu(1)).softmax(-1) @ x,
}


class SelfAttention(nn.Module):
    """`nn.MultiheadAttention` on [N, T, C], with its options."""

    def __init__(self, batch_first: bool = True, call: dict[str, Any] | None = None, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=batch_first, **options)
        self.batch_first, self.call = batch_first, {"need_weights": False, **(call or {})}

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.batch_first else x.transpose(0, 1)
        y = self.attention(y, y, y, **self.call)[0]
        return y if self.batch_first else y.transpose(0, 1)


class CrossAttention(nn.Module):
    """Keys and values of other sizes than the queries, so that the three projections are parameters of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, kdim=3, vdim=2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x[..., :3], x[..., 1:3], need_weights=False)[0]


def weights_of_attention() -> nn.Module:
    """The output and the averaged attention weights, both differentiated."""
    return Model(
        lambda m, x: torch.cat(m.attention(x, x.tanh(), x), -1), attention=nn.MultiheadAttention(4, 2, batch_first=True)
    )


def padding_from_data() -> nn.Module:
    """Positions with a negative last entry are padding, the first never is."""

    def forward(m: Any, x: Tensor) -> Tensor:
        padding = (x[..., -1] < 0) & (torch.arange(x.shape[1]) > 0)
        return m.attention(x, x, x, key_padding_mask=padding, need_weights=False)[0]

    return Model(forward, attention=nn.MultiheadAttention(4, 2, batch_first=True))


def decoder() -> nn.Module:
    """A decoder layer that looks at the whole sequence from its first two tokens."""
    layer = nn.TransformerDecoderLayer(4, 2, 3, batch_first=True)
    return Model(lambda m, x: m.layer(x[:, :2], x.tanh()), layer=layer)


CAUSAL = nn.Transformer.generate_square_subsequent_mask(3, dtype=torch.float64)
TRANSFORMER: dict[str, Callable[[], nn.Module]] = {
    "batch_second": lambda: SelfAttention(batch_first=False),
    "mask": lambda: SelfAttention(call={"attn_mask": CAUSAL}),
    "bool_mask": lambda: SelfAttention(call={"attn_mask": torch.ones(3, 3).triu(1).bool()}),
    "causal": lambda: SelfAttention(call={"attn_mask": CAUSAL, "is_causal": True}),
    "no_bias": lambda: SelfAttention(bias=False),
    "bias_kv": lambda: SelfAttention(add_bias_kv=True),
    "zero_attn": lambda: SelfAttention(add_zero_attn=True),
    "weights": weights_of_attention,
    "padding_from_data": padding_from_data,
    "kdim": CrossAttention,
    "encoder_pre_norm": lambda: nn.TransformerEncoderLayer(
        4, 2, 3, norm_first=True, activation="gelu", batch_first=True
    ),
    "decoder": decoder,
}

# Recurrent layers


class Recurrent(nn.Module):
    """All states of a recurrent layer, and the last one."""

    def __init__(self, kind: Callable[..., Any], **options: Any) -> None:
        super().__init__()
        self.layer = kind(4, 2, **options)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x if self.layer.batch_first else x.transpose(0, 1))[0]
        return y if self.layer.batch_first else y.transpose(0, 1)


def last_state(kind: Callable[..., Any]) -> nn.Module:
    """What the layer returns besides its outputs."""

    def forward(m: Any, x: Tensor) -> Tensor:
        state = m.layer(x)[1]
        return torch.cat(state if isinstance(state, tuple) else [state], -1).transpose(0, 1)

    return Model(forward, layer=kind(4, 2, batch_first=True))


def given_state(kind: Callable[..., Any]) -> nn.Module:
    """The first state comes from the data."""
    return Model(
        lambda m, x: m.layer(x, x[:, 0, :2].tanh().unsqueeze(0).contiguous())[0], layer=kind(4, 2, batch_first=True)
    )


def cell(kind: Callable[[int, int], nn.Module]) -> nn.Module:
    """A cell, stepped over the tokens by hand."""

    def forward(m: Any, x: Tensor) -> Tensor:
        state = m.cell(x[:, 0])
        for t in range(1, x.shape[1]):
            state = m.cell(x[:, t], state)
        return torch.cat(state, -1) if isinstance(state, tuple) else state

    return Model(forward, cell=kind(4, 2))


RECURRENT: dict[str, Callable[[], nn.Module]] = {
    "rnn_relu": lambda: Recurrent(nn.RNN, nonlinearity="relu", batch_first=True),
    "rnn_time_first": lambda: Recurrent(nn.RNN),
    "rnn_no_bias": lambda: Recurrent(nn.RNN, bias=False, batch_first=True),
    "rnn_state": lambda: given_state(nn.RNN),
    "lstm": lambda: Recurrent(nn.LSTM, batch_first=True),
    "lstm_time_first": lambda: Recurrent(nn.LSTM),
    "lstm_deep": lambda: Recurrent(nn.LSTM, num_layers=2, batch_first=True),
    "lstm_both_ways": lambda: Recurrent(nn.LSTM, bidirectional=True, batch_first=True),
    "lstm_projected": lambda: Recurrent(nn.LSTM, proj_size=1, batch_first=True),
    "lstm_last": lambda: last_state(nn.LSTM),
    "gru": lambda: Recurrent(nn.GRU, batch_first=True),
    "gru_both_ways_deep": lambda: Recurrent(nn.GRU, bidirectional=True, num_layers=2, batch_first=True),
    "gru_last": lambda: last_state(nn.GRU),
    "rnn_cell": lambda: cell(nn.RNNCell),
    "lstm_cell": lambda: cell(nn.LSTMCell),
    "gru_cell": lambda: cell(nn.GRUCell),
}

SEQUENCES = (
    *functions("attention", IMAGE, ATTENTION),
    *modules("transformer", TOKENS, TRANSFORMER),
    *modules("recurrent", TOKENS, RECURRENT),
)
