"""`mymodel.py` with its remedies: fused ops, a cache that is written in place, a head for the token that is sampled.

The weights are those of `mymodel.py`, some of them concatenated; the results are the same but for rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


@dataclass
class GPTConfig:
    vocab_size: int = 50304  # 50257 padded to a multiple of 64
    dim: int = 2048
    n_layers: int = 24
    n_heads: int = 16
    n_kv_heads: int = 4
    hidden_dim: int = 5632
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    max_batch: int = 8
    max_len: int = 4096
    dtype: torch.dtype = torch.bfloat16

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads


def rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + rotate_half(x) * sin


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


class Attention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = config.n_heads, config.n_kv_heads, config.head_dim
        self.qkv_proj = nn.Linear(config.dim, (config.n_heads + 2 * config.n_kv_heads) * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.n_heads * config.head_dim, config.dim, bias=False)
        cache = (config.max_batch, config.n_kv_heads, config.max_len, config.head_dim)
        self.register_buffer("k_cache", torch.zeros(cache), persistent=False)
        self.register_buffer("v_cache", torch.zeros(cache), persistent=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, start: int) -> Tensor:
        B, T, _ = x.shape
        qkv = self.qkv_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
        q, k, v = qkv.split((self.n_heads, self.n_kv_heads, self.n_kv_heads), dim=1)

        self.k_cache[:B, :, start : start + T] = apply_rotary(k, cos, sin)
        self.v_cache[:B, :, start : start + T] = v
        k = self.k_cache[:B, :, : start + T]
        v = self.v_cache[:B, :, : start + T]

        q = apply_rotary(q, cos, sin)
        whole = T > 1 and start == 0  # is_causal counts from the first key, so later parts of a prompt need a mask
        mask = None if whole or T == 1 else torch.ones(T, start + T, dtype=torch.bool, device=x.device).tril(start)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=whole, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.dim, 2 * config.hidden_dim, bias=False)
        self.down_proj = nn.Linear(config.hidden_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(*self.gate_up_proj(x).chunk(2, dim=-1)))


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.attn = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, start: int) -> Tensor:
        x = x + self.attn(self.attn_norm(x), cos, sin, start)
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    def __init__(self, config: GPTConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or GPTConfig()
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.n_layers)])
        self.norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        angles = torch.outer(torch.arange(config.max_len, dtype=torch.float32), 1.0 / config.rope_theta**exponent)
        angles = torch.cat((angles, angles), dim=-1)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self.to(config.dtype)

    def forward(self, tokens: Tensor, start_pos: int) -> Tensor:
        end = start_pos + tokens.shape[1]
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, self.cos[start_pos:end], self.sin[start_pos:end], start_pos)
        return self.lm_head(self.norm(x[:, -1:]))


def build() -> GPT:
    return GPT().eval()


if __name__ == "__main__":
    step = torch.compile(build())
    with torch.no_grad():
        logits = step(torch.randint(50257, (1, 16)), 0)
        for position in range(16, 20):
            logits = step(logits[:, -1:, :50257].argmax(-1), position)
