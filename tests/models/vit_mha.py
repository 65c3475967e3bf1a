"""ViT-B/16 at 224 pixels on PyTorch's own encoder layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MHABlock(nn.Module):
    """An encoder block calling `nn.MultiheadAttention` itself, as torchvision does."""

    def __init__(self, dim: int, num_heads: int, mlp_dim: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(dim, eps=1e-6)
        self.self_attention = nn.MultiheadAttention(dim, num_heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp_dim), nn.GELU(), nn.Linear(mlp_dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        h = self.ln_1(x)
        h, _ = self.self_attention(h, h, h, need_weights=False)
        x = x + h
        return x + self.mlp(self.ln_2(x))


class VisionTransformer(nn.Module):
    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        num_classes: int = 1000,
        hidden_dim: int = 768,
        mlp_dim: int = 3072,
        num_layers: int = 12,
        num_heads: int = 12,
        encoder: str = "TransformerEncoder",
    ) -> None:
        super().__init__()
        self.conv_proj = nn.Conv2d(3, hidden_dim, kernel_size=patch_size, stride=patch_size)
        self.class_token = nn.Parameter(torch.zeros(1, 1, hidden_dim))
        self.pos_embedding = nn.Parameter(torch.zeros(1, (img_size // patch_size) ** 2 + 1, hidden_dim))
        self.encoder: nn.Module
        if encoder == "TransformerEncoder":
            layer = nn.TransformerEncoderLayer(
                hidden_dim,
                num_heads,
                mlp_dim,
                dropout=0.0,
                activation="gelu",
                layer_norm_eps=1e-6,
                batch_first=True,
                norm_first=True,
            )
            self.encoder = nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)
        else:
            self.encoder = nn.Sequential(*[MHABlock(hidden_dim, num_heads, mlp_dim) for _ in range(num_layers)])
        self.ln = nn.LayerNorm(hidden_dim, eps=1e-6)
        self.head = nn.Linear(hidden_dim, num_classes)
        nn.init.normal_(self.pos_embedding, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_proj(x).flatten(2).permute(0, 2, 1)
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = self.ln(self.encoder(x + self.pos_embedding))
        return self.head(x[:, 0])


def build() -> VisionTransformer:
    """`nn.TransformerEncoder`."""
    return VisionTransformer().eval()


def build_mha() -> VisionTransformer:
    """`nn.MultiheadAttention` called block by block."""
    return VisionTransformer(encoder="MultiheadAttention").eval()
