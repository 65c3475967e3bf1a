"""Shares that run with real weights and meet at their collectives give what the whole model gives."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from fxroof.analyzer.errors import WorkloadError
from fxroof.analyzer.sharding import sharded
from models import gptfast_like, llama_reference_like, moe_like
from parallel import lockstep

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

IDS = torch.randint(8, 250, (2, 13), generator=torch.Generator().manual_seed(1))
SMALL: dict[str, Any] = {
    "vocab_size": 251,  # which no number of GPUs divides
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
HIDDEN = {key: SMALL[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
LATENT: dict[str, Any] = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "n_routed_experts": 8, "n_group": 2, "topk_group": 2, "num_experts_per_tok": 3, "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}  # fmt: skip
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", SMALL),
    "llama-tied-biased": ("Llama", SMALL | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "qwen2": ("Qwen2", SMALL),
    "mixtral": ("Mixtral", SMALL | {"num_local_experts": 8}),
    "qwen3-moe": ("Qwen3Moe", SMALL | {"head_dim": 16, "moe_intermediate_size": 32, "num_experts": 8}),
    "deepseek-v3": ("DeepseekV3", SMALL | LATENT | {"num_key_value_heads": 8}),
    "gpt-oss": ("GptOss", SMALL | {"head_dim": 16, "num_local_experts": 8}),
    "phi3": ("Phi3", SMALL | {"pad_token_id": 0}),
    "gpt2": ("GPT2", {"vocab_size": 251, "n_embd": 64, "n_layer": 2, "n_head": 8, "n_positions": 64}),
    "opt": ("OPT", HIDDEN | {"ffn_dim": 96, "word_embed_proj_dim": 64, "max_position_embeddings": 64}),
    "neox": ("GPTNeoX", HIDDEN | {"intermediate_size": 96}),
}
CASES = [
    ("llama", {"tp": 2}),
    ("llama", {"tp": 4}),
    ("llama", {"tp": 8}),
    ("llama-tied-biased", {"tp": 2}),
    ("qwen2", {"tp": 4}),
    ("mixtral", {"tp": 2}),
    ("mixtral", {"ep": 2}),
    ("mixtral", {"tp": 4, "ep": 4}),
    ("qwen3-moe", {"tp": 2}),
    ("qwen3-moe", {"tp": 2, "ep": 2}),
    ("deepseek-v3", {"tp": 2}),
    ("deepseek-v3", {"tp": 2, "ep": 2}),
    ("deepseek-v3", {"ep": 4}),
    ("gpt-oss", {"tp": 2}),
    ("gpt-oss", {"tp": 2, "ep": 2}),
    ("phi3", {"tp": 2}),
    ("gpt2", {"tp": 4}),
    ("opt", {"tp": 2}),
    ("neox", {"tp": 2}),
]


@functools.cache
def built(name: str) -> Any:
    family, fields = CONFIGS[name]
    torch.manual_seed(0)
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id"))
    config = getattr(transformers, f"{family}Config")(**(tokens | fields))
    head = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    return getattr(transformers, f"{family}{head}")(config).eval()


def agree(model: torch.nn.Module, call: Callable[[Any], torch.Tensor], **shares: int) -> None:
    with torch.no_grad():
        whole = call(model)
    for share in lockstep.run(model, max(shares.values()), call, **shares):
        torch.testing.assert_close(share, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "shares"), CASES, ids=str)
def test_shares_of_transformers_models_compute_the_whole(name: str, shares: dict[str, int]) -> None:
    agree(built(name), lambda model: model(IDS).logits, **shares)


def test_shares_decode_from_their_part_of_the_cache() -> None:
    def two_steps(model: Any) -> torch.Tensor:
        first = model(IDS, use_cache=True)
        return model(IDS[:, :1], past_key_values=first.past_key_values).logits

    agree(built("llama"), two_steps, tp=2)


@pytest.mark.parametrize("tp", [2, 4, 8])
def test_shares_of_a_model_in_gpt_fasts_manner(tp: int) -> None:
    torch.manual_seed(0)
    args = gptfast_like.ModelArgs(
        block_size=32, vocab_size=250, n_layer=2, n_head=8, dim=64, intermediate_size=96, n_local_heads=4
    )
    model = gptfast_like.Transformer(args).eval()

    def prompt_and_step(share: Any) -> torch.Tensor:
        share.setup_caches(2, 16)
        share(IDS, torch.arange(13))
        return share(IDS[:, :1], torch.tensor([13]))

    agree(model, prompt_and_step, tp=tp)


def test_shares_of_metas_reference_cut_the_caches_that_it_has_from_the_start() -> None:
    torch.manual_seed(0)
    args = llama_reference_like.ModelArgs(
        dim=64, n_layers=2, n_heads=8, n_kv_heads=4, vocab_size=250, multiple_of=16, max_seq_len=32
    )
    model = llama_reference_like.Transformer(args).eval()
    for layer in model.layers:
        for key in ("cache_k", "cache_v"):
            tensor = getattr(layer.attention, key)
            delattr(layer.attention, key)
            layer.attention.register_buffer(key, tensor, persistent=False)  # as loading does
    agree(model, lambda share: share(IDS, 0), tp=4)


def test_shares_of_a_handwritten_mixture_of_experts() -> None:
    torch.manual_seed(0)
    config = moe_like.MoeConfig(
        vocab_size=250, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=8
    )
    agree(moe_like.MoeForCausalLM(config).eval(), lambda share: share(IDS)[0], tp=2)


def test_afterwards_the_model_is_as_it_was() -> None:
    model = built("gpt-oss")
    with torch.no_grad():
        before = model(IDS).logits
        state = {name: id(p) for name, p in model.named_parameters()}
        with sharded(model, tp=2, ep=2):
            assert any(id(p) != state[name] for name, p in model.named_parameters())
        assert {name: id(p) for name, p in model.named_parameters()} == state
        torch.testing.assert_close(model(IDS).logits, before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "shares", "words"),
    [
        ("llama", {"tp": 3}, ("8 heads", "--tp 2 would do")),
        ("llama", {"tp": 16}, ("8 heads", "--tp 2 or 4 or 8 would do")),
        ("mixtral", {"ep": 3}, ("8 experts", "--ep 2 would do")),
        ("mixtral", {"tp": 2, "ep": 4}, ("--tp 4 --ep 4",)),
        ("llama", {"ep": 2}, ("no plan to deal out", "--tp")),
    ],
    ids=str,
)
def test_what_cannot_be_shared_is_refused_with_what_can(name: str, shares: dict[str, int], words: tuple) -> None:
    with pytest.raises(WorkloadError) as refused, sharded(built(name), **shares):
        pass
    assert all(word in f"{refused.value.message} {refused.value.hint}" for word in words)
