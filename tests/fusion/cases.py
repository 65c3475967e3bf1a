"""Models whose fused traffic Inductor has counted: small modules, then whole architectures of one or two layers."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from fxroof.analyzer.meta import building, on_meta
from fxroof.analyzer.trace import export
from torch import Tensor, nn
from torch.nn import functional as F

Args = tuple[Tensor, ...]
Case = tuple[nn.Module, Args]

CASES: dict[str, Callable[[], Case]] = {}


def program(name: str) -> torch.export.ExportedProgram:
    """The exported program of a case, on the meta device; Inductor and fxroof are given this same program."""
    module, args = CASES[name]()
    return export(on_meta(module.eval()), args)


def case(function: Callable[[], Case]) -> Callable[[], Case]:
    """Register a builder under its name."""

    def build() -> Case:
        with building():
            module, args = function()
        return module, tuple(a.to("meta") for a in args)

    CASES[function.__name__] = build
    return function


def x(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def ids(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int64, device="meta")


class Fn(nn.Module):
    """A function, and the modules and parameters that it is called with."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if type(part) is Tensor else part)
        self.function = function

    def forward(self, *args: Tensor) -> Any:
        return self.function(self, *args)


def _rms(t: Tensor, weight: Tensor) -> Tensor:
    wide = t.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(t.dtype)


@case
def rms_norm() -> Case:
    return Fn(lambda m, t: _rms(t, m.w), w=x(512)), (x(4, 64, 512),)


@case
def rms_norm_bf16() -> Case:
    return Fn(lambda m, t: _rms(t, m.w), w=x(512, dtype=torch.bfloat16)), (x(4, 64, 512, dtype=torch.bfloat16),)


@case
def layer_norm() -> Case:
    return Fn(lambda m, t: m.norm(t), norm=nn.LayerNorm(512)), (x(4, 64, 512),)


@case
def swiglu_mlp() -> Case:
    def forward(m: Any, t: Tensor) -> Tensor:
        return m.down(F.silu(m.gate(t)) * m.up(t))

    up, gate = nn.Linear(256, 704, bias=False), nn.Linear(256, 704, bias=False)
    return Fn(forward, up=up, gate=gate, down=nn.Linear(704, 256, bias=False)), (x(4, 128, 256),)


@case
def gelu_mlp() -> Case:
    up, down = nn.Linear(256, 1024), nn.Linear(1024, 256)
    return Fn(lambda m, t: t + m.down(F.gelu(m.up(t), approximate="tanh")), up=up, down=down), (x(4, 128, 256),)


@case
def residual_rms_norm() -> Case:
    def forward(m: Any, t: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        total = t + u
        return total, _rms(total, m.w)

    return Fn(forward, w=x(512)), (x(4, 64, 512), x(4, 64, 512))


@case
def post_norm() -> Case:
    parts = {"proj": nn.Linear(512, 512), "norm": nn.LayerNorm(512), "up": nn.Linear(512, 1024)}

    def forward(m: Any, t: Tensor) -> tuple[Tensor, Tensor]:
        hidden = m.norm(t + m.proj(t))
        return hidden, m.up(hidden)

    return Fn(forward, **parts), (x(4, 64, 512),)


def _rope(t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = t.shape[-1] // 2
    return t * cos + torch.cat((-t[..., half:], t[..., :half]), -1) * sin


@case
def rope() -> Case:
    return Fn(lambda m, q, k, c, s: (_rope(q, c, s), _rope(k, c, s))), (
        x(2, 8, 128, 64), x(2, 2, 128, 64), x(128, 64), x(128, 64),
    )  # fmt: skip


@case
def rope_tables() -> Case:
    def forward(m: Any, q: Tensor, positions: Tensor) -> Tensor:
        angles = positions[:, :, None].float() * m.frequencies[None, None, :]
        table = torch.cat((angles, angles), -1)
        return _rope(q, table.cos()[:, None], table.sin()[:, None])

    return Fn(forward, frequencies=x(32)), (x(2, 8, 128, 64), ids(2, 128))


@case
def rope_interleaved() -> Case:
    def forward(m: Any, q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        even, odd = q[..., ::2], q[..., 1::2]
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)

    return Fn(forward), (x(2, 8, 128, 64), x(128, 32), x(128, 32))


@case
def softmax_attention() -> Case:
    def forward(m: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scores = torch.tanh(q @ k.transpose(-2, -1) / 8.0 / 30.0) * 30.0 + mask
        return scores.softmax(-1) @ v

    return Fn(forward), (x(2, 4, 128, 64), x(2, 4, 128, 64), x(2, 4, 128, 64), x(128, 128))


@case
def softmax_over_columns() -> Case:
    return Fn(lambda m, t: (t * 0.5).softmax(1)), (x(8, 64, 256),)


@case
def sdpa_block() -> Case:
    def forward(m: Any, t: Tensor) -> Tensor:
        q, k, v = (p.view(4, 128, 4, 64).transpose(1, 2) for p in m.qkv(m.norm(t)).split(256, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return t + m.out(mixed.transpose(1, 2).reshape(4, 128, 256))

    parts = {"norm": nn.LayerNorm(256), "qkv": nn.Linear(256, 768), "out": nn.Linear(256, 256)}
    return Fn(forward, **parts), (x(4, 128, 256),)


@case
def gqa_block() -> Case:
    def forward(m: Any, t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        h = _rms(t, m.w)
        q, k, v = (p(h).view(4, 128, -1, 64).transpose(1, 2) for p in (m.q, m.k, m.v))
        q, k = _rope(q, cos, sin), _rope(k, cos, sin)
        k, v = (s[:, :, None].expand(-1, -1, 4, -1, -1).reshape(4, 8, 128, 64) for s in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return t + m.out(mixed.transpose(1, 2).reshape(4, 128, 512))

    sizes = {"q": 512, "k": 128, "v": 128, "out": 512}
    linears = {name: nn.Linear(512, width, bias=False) for name, width in sizes.items()}
    return Fn(forward, w=x(512), **linears), (x(4, 128, 512), x(128, 64), x(128, 64))


@case
def conv_bn_relu() -> Case:
    conv, norm = nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
    return Fn(lambda m, t: F.relu(m.norm(m.conv(t))), conv=conv, norm=norm), (x(4, 16, 32, 32),)


@case
def conv_bn_residual() -> Case:
    parts = {f"conv{i}": nn.Conv2d(32, 32, 3, padding=1, bias=False) for i in (1, 2)}
    parts |= {f"norm{i}": nn.BatchNorm2d(32) for i in (1, 2)}
    return Fn(lambda m, t: F.relu(m.norm2(m.conv2(F.relu(m.norm1(m.conv1(t))))) + t), **parts), (x(4, 32, 32, 32),)


@case
def group_norm() -> Case:
    return Fn(lambda m, t: F.silu(m.norm(t)), norm=nn.GroupNorm(8, 64)), (x(4, 64, 16, 16),)


@case
def embedding_position() -> Case:
    def forward(m: Any, tokens: Tensor) -> Tensor:
        return m.norm(m.words(tokens) + m.positions(torch.arange(128)))

    parts = {"words": nn.Embedding(256, 128), "positions": nn.Embedding(128, 128), "norm": nn.LayerNorm(128)}
    return Fn(forward, **parts), (ids(32, 128),)


@case
def cross_entropy() -> Case:
    return Fn(lambda m, logits, labels: F.cross_entropy(logits, labels)), (x(256, 1000), ids(256))


@case
def squeeze_excite() -> Case:
    def forward(m: Any, t: Tensor) -> Tensor:
        gate = torch.sigmoid(m.up(F.relu(m.down(t.mean((2, 3))))))
        return t * gate[:, :, None, None]

    return Fn(forward, down=nn.Linear(64, 16), up=nn.Linear(16, 64)), (x(8, 64, 16, 16),)


@case
def glu() -> Case:
    return Fn(lambda m, t: F.glu(m.proj(t), -1), proj=nn.Linear(256, 512)), (x(4, 128, 256),)


@case
def geglu_packed() -> Case:
    def forward(m: Any, t: Tensor) -> Tensor:
        value, gate = m.proj(t).chunk(2, -1)
        return m.down(value * F.gelu(gate))

    return Fn(forward, proj=nn.Linear(256, 1024), down=nn.Linear(512, 256)), (x(4, 128, 256),)


@case
def many_consumers() -> Case:
    def forward(m: Any, t: Tensor, u: Tensor) -> tuple[Tensor, ...]:
        shared = torch.sin(t) + u
        return shared * 2, shared.exp() + t, (shared - u).relu()

    return Fn(forward), (x(256, 512), x(256, 512))


@case
def branches() -> Case:
    def forward(m: Any, t: Tensor) -> Tensor:
        return m.a(F.relu(t)) + m.b(torch.tanh(t)) * m.c(F.relu(t) * 2)

    return Fn(forward, **{n: nn.Linear(256, 256, bias=False) for n in "abc"}), (x(4, 64, 256),)


@case
def reduce_axes() -> Case:
    return Fn(lambda m, t: (t.sum((0, 2)), t.amax((0, 2)))), (x(16, 64, 256),)


@case
def reduce_rows_and_columns() -> Case:
    return Fn(lambda m, t: (t.sum(0), t.sum(1))), (x(512, 512),)


@case
def broadcasting() -> Case:
    return Fn(lambda m, a, b, c: (a * b + c).relu()), (x(64, 1, 256), x(1, 32, 256), x(64, 32, 1))


@case
def bias_scale_chain() -> Case:
    return Fn(lambda m, t: ((t + m.b) * m.s).sigmoid() * 2 - 1, b=x(512), s=x(512)), (x(4, 64, 512),)


@case
def casts() -> Case:
    def forward(m: Any, t: Tensor) -> tuple[Tensor, Tensor]:
        wide = t.float() * 3
        return wide.to(torch.bfloat16), wide.to(torch.float16)

    return Fn(forward), (x(256, 512, dtype=torch.bfloat16),)


@case
def transposes() -> Case:
    return Fn(lambda m, t: (t * 2).transpose(1, 2).contiguous() + 1), (x(8, 64, 128),)


@case
def gather_rows() -> Case:
    return Fn(lambda m, t, i: torch.gather(t, 1, i) * 2), (x(64, 256), ids(64, 256))


@case
def masked_fill() -> Case:
    return Fn(lambda m, t, mask: t.masked_fill(mask > 0, float("-inf")).softmax(-1)), (x(64, 512), x(64, 512))


@case
def var_mean() -> Case:
    def forward(m: Any, t: Tensor) -> Tensor:
        var, mean = torch.var_mean(t, -1, keepdim=True)
        return (t - mean) / (var + 1e-5).sqrt()

    return Fn(forward), (x(4, 64, 512),)


@case
def logsumexp() -> Case:
    return Fn(lambda m, t: t - torch.logsumexp(t, -1, keepdim=True)), (x(256, 512),)


@case
def normalize() -> Case:
    return Fn(lambda m, t: F.normalize(t, dim=-1) * m.s, s=x(512)), (x(4, 64, 512),)


@case
def mixture_gate() -> Case:
    def forward(m: Any, t: Tensor) -> Tensor:
        gates = m.router(t).softmax(-1)
        experts = torch.stack([e(t) for e in (m.a, m.b, m.c)], -1)
        return (experts * gates[:, :, None]).sum(-1)

    parts = {n: nn.Linear(256, 256, bias=False) for n in "abc"}
    return Fn(forward, router=nn.Linear(256, 3, bias=False), **parts), (x(4, 128, 256),)


@case
def reads_add_up() -> Case:
    def forward(m: Any, *many: Tensor) -> tuple[Tensor, Tensor]:
        total = functools.reduce(lambda a, b: a + b, many)
        return m.proj(total), total.sigmoid()

    return Fn(forward, proj=nn.Linear(256, 256, bias=False)), tuple(x(4, 64, 256) for _ in range(6))


@case
def realised_for_two() -> Case:
    def forward(m: Any, a: Tensor, b: Tensor, c: Tensor, d: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        total = a * b + c * d + e
        return total.sum(-1), total.t().contiguous() * 2

    return Fn(forward), tuple(x(256, 512) for _ in range(5))


@case
def adaptive_norm() -> Case:
    def forward(m: Any, t: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate = m.ada(F.silu(c)).chunk(3, -1)
        hidden = m.norm(t) * (1 + scale[:, None]) + shift[:, None]
        return t + gate[:, None] * m.proj(hidden)

    parts = {"ada": nn.Linear(256, 768), "norm": nn.LayerNorm(256, elementwise_affine=False)}
    return Fn(forward, proj=nn.Linear(256, 256), **parts), (x(4, 128, 256), x(4, 256))


@case
def max_pool() -> Case:
    return Fn(lambda m, t: F.max_pool2d(F.relu(t), 2)), (x(4, 32, 32, 32),)


@case
def upsample() -> Case:
    return Fn(lambda m, t: F.interpolate(t, scale_factor=2.0, mode="nearest") + 1), (x(4, 16, 16, 16),)


@case
def in_place_chain() -> Case:
    def forward(m: Any, t: Tensor) -> Tensor:
        hidden = m.proj(t)
        hidden.mul_(2).add_(t)
        return hidden.relu_()

    return Fn(forward, proj=nn.Linear(256, 256, bias=False)), (x(4, 64, 256),)


@case
def pad_and_shift() -> Case:
    return Fn(lambda m, t: t * 0.5 + F.pad(t, (0, 0, 1, -1)) * 0.5), (x(8, 128, 256),)


@case
def convnext_block() -> Case:
    def forward(m: Any, t: Tensor) -> Tensor:
        hidden = m.norm(m.depthwise(t).permute(0, 2, 3, 1))
        return t + (m.down(F.gelu(m.up(hidden))) * m.scale).permute(0, 3, 1, 2)

    parts = {"depthwise": nn.Conv2d(64, 64, 7, padding=3, groups=64), "norm": nn.LayerNorm(64), "scale": x(64)}
    return Fn(forward, up=nn.Linear(64, 256), down=nn.Linear(256, 64), **parts), (x(4, 64, 28, 28),)


@case
def unet_block() -> Case:
    def forward(m: Any, t: Tensor, skip: Tensor, time: Tensor) -> Tensor:
        joined = torch.cat((F.interpolate(t, scale_factor=2.0, mode="nearest"), skip), 1)
        hidden = m.conv1(F.silu(m.norm1(joined))) + m.time(F.silu(time))[:, :, None, None]
        return m.conv2(F.silu(m.norm2(hidden)))

    parts = {"conv1": nn.Conv2d(64, 32, 3, padding=1, bias=False), "conv2": nn.Conv2d(32, 32, 3, padding=1, bias=False)}
    norms = {"norm1": nn.GroupNorm(8, 64), "norm2": nn.GroupNorm(8, 32)}
    inputs = (x(4, 32, 16, 16), x(4, 32, 32, 32), x(4, 128))
    return Fn(forward, time=nn.Linear(128, 32), **parts, **norms), inputs


@case
def lstm_cell() -> Case:
    def forward(m: Any, t: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        i, f, g, o = (m.input(t) + m.hidden(h)).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c

    return Fn(forward, input=nn.Linear(256, 1024), hidden=nn.Linear(256, 1024)), tuple(x(64, 256) for _ in range(3))


@case
def shifted_windows() -> Case:
    def forward(m: Any, t: Tensor) -> Tensor:
        shifted = torch.roll(m.norm(t), (-4, -4), (1, 2)).view(4, 4, 8, 4, 8, 96)
        return m.qkv(shifted.permute(0, 1, 3, 2, 4, 5).reshape(-1, 64, 96))

    return Fn(forward, norm=nn.LayerNorm(96), qkv=nn.Linear(96, 288)), (x(4, 32, 32, 96),)


@case
def top_k_router() -> Case:
    def forward(m: Any, t: Tensor) -> tuple[Tensor, Tensor]:
        weights, experts = m.router(t).softmax(-1).topk(2, -1)
        return weights / weights.sum(-1, keepdim=True), experts

    return Fn(forward, router=nn.Linear(256, 64, bias=False)), (x(512, 256),)


@case
def alibi() -> Case:
    def forward(m: Any, scores: Tensor, slopes: Tensor) -> Tensor:
        places = torch.arange(128)
        distance = places[None] - places[:, None]
        return (scores + distance * slopes[:, None, None]).masked_fill(distance > 0, -1e9).softmax(-1)

    return Fn(forward), (x(2, 8, 128, 128), x(8))


@case
def two_norms() -> Case:
    return Fn(lambda m, t: m.b(m.a(t) * 2), a=nn.LayerNorm(512), b=nn.LayerNorm(512)), (x(256, 512),)


@case
def standardised_columns() -> Case:
    return Fn(lambda m, t: (t - t.mean(0)) / (t.std(0) + 1e-5)), (x(512, 256),)


@case
def global_norm() -> Case:
    return Fn(lambda m, t: t / t.norm()), (x(512, 256),)


@case
def quantize_rows() -> Case:
    def forward(m: Any, t: Tensor) -> tuple[Tensor, Tensor]:
        scale = t.abs().amax(-1, keepdim=True) / 127
        return (t / scale).round().clamp(-128, 127).to(torch.int8), scale

    return Fn(forward), (x(256, 512),)


@case
def running_sum() -> Case:
    return Fn(lambda m, t: torch.cumsum(t * 2, -1).exp()), (x(512, 512),)


@case
def time_embedding() -> Case:
    def forward(m: Any, t: Tensor) -> Tensor:
        angles = t[:, None] * torch.exp(-torch.arange(128) * 0.07)[None]
        return m.b(F.silu(m.a(torch.cat((angles.cos(), angles.sin()), -1))))

    return Fn(forward, a=nn.Linear(256, 512), b=nn.Linear(512, 512)), (x(64),)


@case
def token_shift() -> Case:
    def forward(m: Any, t: Tensor) -> tuple[Tensor, ...]:
        before = F.pad(t, (0, 0, 1, 0))[:, :-1]
        return tuple(
            linear(t * mix + before * (1 - mix)) for linear, mix in ((m.k, m.mix_k), (m.v, m.mix_v), (m.r, m.mix_r))
        )

    mixes = {f"mix_{n}": x(256) for n in "kvr"}
    return Fn(forward, **{n: nn.Linear(256, 256, bias=False) for n in "kvr"}, **mixes), (x(4, 128, 256),)


@case
def slices_of_an_expression() -> Case:
    def forward(m: Any, t: Tensor) -> tuple[Tensor, ...]:
        a, b, c = torch.relu(m.proj(t)).split((128, 64, 64), -1)
        return a * 2, b.exp(), c + 1

    return Fn(forward, proj=nn.Linear(256, 256)), (x(4, 128, 256),)


@case
def squared_error() -> Case:
    return Fn(lambda m, a, b: F.mse_loss(a, b)), (x(256, 512), x(256, 512))


@case
def soft_labels() -> Case:
    return Fn(lambda m, a, b: -(b * a.log_softmax(-1)).sum(-1).mean()), (x(256, 1000), x(256, 1000))


@case
def mean_pool_classifier() -> Case:
    def forward(m: Any, t: Tensor, mask: Tensor) -> Tensor:
        weights = mask.float()[..., None]
        return m.head((t * weights).sum(1) / weights.sum(1).clamp(min=1e-6))

    return Fn(forward, head=nn.Linear(256, 10)), (x(8, 128, 256), ids(8, 128))


@case
def norm_of_heads() -> Case:
    def forward(m: Any, t: Tensor) -> Tensor:
        heads = m.proj(t).view(4, 128, 8, 64)
        return (F.normalize(heads, dim=-1) * m.scale).transpose(1, 2).contiguous()

    return Fn(forward, proj=nn.Linear(512, 512), scale=x(8, 64)), (x(4, 128, 512),)


# whole architectures


class LlamaLayer(nn.Module):
    def __init__(self, dim: int, heads: int, kv_heads: int, hidden: int) -> None:
        super().__init__()
        self.head_dim = dim // heads
        self.wq = nn.Linear(dim, dim, bias=False)
        self.wk = nn.Linear(dim, kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(dim, kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(dim, dim, bias=False)
        self.w1, self.w3 = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.n1, self.n2 = nn.Parameter(torch.empty(dim)), nn.Parameter(torch.empty(dim))

    def forward(self, t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, s, d = t.shape
        h = _rms(t, self.n1)
        q, k, v = (w(h).view(b, s, -1, self.head_dim).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        mixed = F.scaled_dot_product_attention(
            _rope(q, cos, sin), _rope(k, cos, sin), v, is_causal=True, enable_gqa=True
        )
        t = t + self.wo(mixed.transpose(1, 2).reshape(b, s, d))
        h = _rms(t, self.n2)
        return t + self.w2(F.silu(self.w1(h)) * self.w3(h))


@case
def handwritten_llama() -> Case:
    layers = nn.ModuleList(LlamaLayer(512, 8, 2, 1408) for _ in range(2))

    def forward(m: Any, tokens: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        t = m.embed(tokens)
        for layer in m.layers:
            t = layer(t, cos, sin)
        return m.head(_rms(t, m.w))

    parts = {"embed": nn.Embedding(512, 512), "head": nn.Linear(512, 512, bias=False)}
    module = Fn(forward, layers=layers, w=x(512), **parts).to(torch.bfloat16)
    table = x(128, 64, dtype=torch.bfloat16)
    return module, (ids(4, 128), table, table)


def _transformer(kind: str, model: str, *args: Tensor, **config: Any) -> Case:
    import transformers

    settings = transformers.CONFIG_MAPPING[kind](**config)
    built = getattr(transformers, model)._from_config(settings, attn_implementation="sdpa", dtype=torch.bfloat16)
    output = "logits" if "LM" in model else "last_hidden_state"
    name = "pixel_values" if kind == "vit" else "input_ids"
    cache = {} if kind in ("bert", "vit") else {"use_cache": False}
    return Fn(lambda m, t: getattr(m.model(**{name: t}, **cache), output), model=built), args


_DECODER = {
    "num_hidden_layers": 2, "hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 512,
}  # fmt: skip


@case
def llama() -> Case:
    return _transformer("llama", "LlamaForCausalLM", ids(4, 128), **_DECODER)


@case
def mistral() -> Case:
    return _transformer("mistral", "MistralForCausalLM", ids(4, 128), **_DECODER, sliding_window=None)


@case
def qwen2() -> Case:
    return _transformer("qwen2", "Qwen2ForCausalLM", ids(4, 128), **_DECODER)


@case
def qwen3() -> Case:
    return _transformer("qwen3", "Qwen3ForCausalLM", ids(4, 128), **_DECODER)


@case
def gemma() -> Case:
    return _transformer("gemma", "GemmaForCausalLM", ids(4, 128), **_DECODER)


@case
def gemma3() -> Case:
    return _transformer("gemma3_text", "Gemma3ForCausalLM", ids(4, 128), **_DECODER)


@case
def phi() -> Case:
    return _transformer("phi", "PhiForCausalLM", ids(4, 128), **_DECODER)


@case
def phi3() -> Case:
    return _transformer("phi3", "Phi3ForCausalLM", ids(4, 128), **_DECODER, pad_token_id=0)


@case
def olmo2() -> Case:
    return _transformer("olmo2", "Olmo2ForCausalLM", ids(4, 128), **_DECODER, pad_token_id=0)


@case
def cohere() -> Case:
    return _transformer("cohere", "CohereForCausalLM", ids(4, 128), **_DECODER, pad_token_id=0)


@case
def gpt_neox() -> Case:
    sizes = {"hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 2048, "num_hidden_layers": 2}
    return _transformer("gpt_neox", "GPTNeoXForCausalLM", ids(4, 128), **sizes, vocab_size=512)


@case
def opt() -> Case:
    sizes = {"hidden_size": 512, "num_attention_heads": 8, "ffn_dim": 2048, "num_hidden_layers": 2}
    rest = {"vocab_size": 512, "word_embed_proj_dim": 512, "max_position_embeddings": 130}
    return _transformer("opt", "OPTForCausalLM", ids(4, 128), **sizes, **rest)


@case
def gpt2() -> Case:
    return _transformer(
        "gpt2", "GPT2LMHeadModel", ids(4, 128), n_layer=2, n_embd=256, n_head=4, vocab_size=512, n_positions=128
    )


@case
def bert() -> Case:
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024, "num_hidden_layers": 2}
    return _transformer("bert", "BertModel", ids(4, 128), **sizes, vocab_size=512, max_position_embeddings=128)


@case
def vit() -> Case:
    sizes = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768, "num_hidden_layers": 2}
    return _transformer(
        "vit", "ViTModel", x(4, 3, 112, 112, dtype=torch.bfloat16), **sizes, image_size=112, patch_size=16
    )


class Block(nn.Module):
    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(out), nn.BatchNorm2d(out)
        same = width == out and stride == 1
        self.skip = (
            nn.Identity() if same else nn.Sequential(nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        )

    def forward(self, t: Tensor) -> Tensor:
        return F.relu(self.norm2(self.conv2(F.relu(self.norm1(self.conv1(t))))) + self.skip(t))


@case
def resnet() -> Case:
    stem = nn.Sequential(nn.Conv2d(3, 32, 7, 2, 3, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    body = nn.Sequential(
        stem, Block(32, 32, 1), Block(32, 64, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 100)
    )
    return body, (x(4, 3, 64, 64),)
