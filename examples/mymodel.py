"""A decoder-only language model in one file: RMSNorm, rotary positions, grouped-query attention, SwiGLU."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

KV = tuple[Tensor, Tensor]


@dataclass
class GPTConfig:
    vocab_size: int = 50257
    dim: int = 2048
    n_layers: int = 24
    n_heads: int = 16
    n_kv_heads: int = 4
    hidden_dim: int = 5632
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    dropout: float = 0.1
    dtype: torch.dtype = torch.bfloat16


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        # the mean of squares overflows easily, so do it in float32
        h = x.to(torch.float32)
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * h.to(x.dtype)


def rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + rotate_half(x) * sin


class Attention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.n_kv_heads = config.n_kv_heads
        self.head_dim = config.dim // config.n_heads
        self.q_proj = nn.Linear(config.dim, self.n_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.dim, self.n_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.dim, self.n_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.n_heads * self.head_dim, config.dim, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, causal: Tensor, past: KV | None) -> tuple[Tensor, KV]:
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.n_heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(B, T, self.n_kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(B, T, self.n_kv_heads, self.head_dim).transpose(1, 2)

        q = apply_rotary(q, cos, sin)
        k = apply_rotary(k, cos, sin)

        # append the new keys and values to what earlier steps left us
        if past is not None:
            k = torch.cat((past[0], k), dim=2)
            v = torch.cat((past[1], v), dim=2)
        new_past = (k, v)

        # every query head needs a key head to look at
        k = k.repeat_interleave(self.n_heads // self.n_kv_heads, dim=1)
        v = v.repeat_interleave(self.n_heads // self.n_kv_heads, dim=1)

        scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(self.head_dim)
        scores = scores.masked_fill(~causal, float("-inf"))
        probs = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
        probs = self.dropout(probs)
        out = torch.matmul(probs, v)

        out = out.transpose(1, 2).contiguous().view(B, T, -1)
        return self.o_proj(out), new_past


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.up_proj = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.down_proj = nn.Linear(config.hidden_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.dim, config.norm_eps)
        self.attn = Attention(config)
        self.mlp_norm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, causal: Tensor, past: KV | None) -> tuple[Tensor, KV]:
        h, past = self.attn(self.attn_norm(x), cos, sin, causal, past)
        x = x + h
        return x + self.mlp(self.mlp_norm(x)), past


class GPT(nn.Module):
    def __init__(self, config: GPTConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or GPTConfig()
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.n_layers)])
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.to(config.dtype)

    def rotary_tables(self, start: int, length: int, x: Tensor) -> KV:
        head_dim = self.config.dim // self.config.n_heads
        exponent = torch.arange(0, head_dim, 2, device=x.device, dtype=torch.float32) / head_dim
        position = torch.arange(start, start + length, device=x.device, dtype=torch.float32)
        angles = torch.outer(position, 1.0 / self.config.rope_theta**exponent)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)

    def forward(self, tokens: Tensor, cache: list[KV] | None = None) -> tuple[Tensor, list[KV]]:
        T = tokens.shape[1]
        start = 0 if cache is None else cache[0][0].shape[2]

        x = self.embed(tokens)
        cos, sin = self.rotary_tables(start, T, x)
        causal = torch.ones(T, start + T, dtype=torch.bool, device=tokens.device).tril(diagonal=start)

        new_cache: list[KV] = []
        for i, block in enumerate(self.blocks):
            x, past = block(x, cos, sin, causal, None if cache is None else cache[i])
            new_cache.append(past)

        # scores for the whole prompt; the sampler picks the row it wants
        logits = self.lm_head(self.norm(x))
        return logits, new_cache


def build() -> GPT:
    return GPT().eval()


if __name__ == "__main__":
    model = build()
    with torch.no_grad():
        logits, cache = model(torch.randint(model.config.vocab_size, (1, 16)))
        for _ in range(4):
            token = logits[:, -1:].argmax(-1)
            logits, cache = model(token, cache)
