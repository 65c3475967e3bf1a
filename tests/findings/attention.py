"""A small decoder whose attention is given as a function, for rules that recognise how it is spelt."""

import functools

import torch
from findings.situations import graphs_of
from torch import nn
from torch.nn import functional as F

HEADS, KV_HEADS, HEAD_DIM = 8, 2, 64
WIDTH = HEADS * HEAD_DIM


class Layer(nn.Module):
    """Calls `attend` with query, key and value (B, length, heads, head_dim); it returns (B, S, heads * head_dim)."""

    def __init__(self, attend, kv_heads):
        super().__init__()
        self.attend, self.kv_heads = attend, kv_heads
        self.q = nn.Linear(WIDTH, WIDTH, bias=False)
        self.kv = nn.Linear(WIDTH, 2 * kv_heads * HEAD_DIM, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x, past):
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, HEADS, HEAD_DIM)
        k, v = self.kv(x).view(batch, length, 2, self.kv_heads, HEAD_DIM).unbind(2)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=1), torch.cat([past[1], v], dim=1)
        return x + self.out(self.attend(q, k, v)), (k, v)


class Stack(nn.Module):
    """Layers that take a tensor and what they kept in the step before; they return both."""

    def __init__(self, layers, dtype=torch.bfloat16):
        super().__init__()
        self.embed = nn.Embedding(500, WIDTH, dtype=dtype)
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(WIDTH, 500, bias=False, dtype=dtype)

    def forward(self, tokens, cache=None):
        x, new = self.embed(tokens), []
        for i, layer in enumerate(self.layers):
            x, kept = layer(x, None if cache is None else cache[i])
            new.append(kept)
        return self.head(x), new


class Decoder(Stack):
    def __init__(self, attend, kv_heads=HEADS, dtype=torch.bfloat16, layers=2):
        super().__init__([Layer(attend, kv_heads).to(dtype) for _ in range(layers)], dtype)


@functools.cache
def traced_decoder(attend, kv_heads=HEADS, dtype=torch.bfloat16, layers=2):
    """Its phases, once for all tests of it: twins are the same again and again."""
    with torch.device("meta"):
        module = Decoder(attend, kv_heads, dtype, layers)
    return graphs_of(module)


def fused(q, k, v, **kwargs):
    """What every spelling is remedied to."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, **kwargs)
    return out.transpose(1, 2).flatten(2)


def causal(q, k, v):
    """The same where a mask hides what is to come."""
    return fused(q, k, v, is_causal=q.shape[1] > 1, enable_gqa=k.shape[2] != q.shape[2])


def heads_first(q, k, v):
    """(B, heads, length, head_dim) of each."""
    return (t.transpose(1, 2) for t in (q, k, v))


def tokens_first(out):
    """(B, S, heads * head_dim) of (B, heads, S, head_dim)."""
    batch, _, length, _ = out.shape
    return out.transpose(1, 2).contiguous().view(batch, length, -1)
