"""Tiny models of architectures that take other ways than those of `tiny`, made from their configs alone."""

from __future__ import annotations

import torch
import transformers
from torch import Tensor, nn

SMALL = {
    "vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT = {
    "vocab_size": 100,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT = {
    "q_lora_rank": 12, "kv_lora_rank": 10, "qk_rope_head_dim": 8, "qk_nope_head_dim": 6, "v_head_dim": 7, "head_dim": 8,
    "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "moe_intermediate_size": 16,
}  # fmt: skip

CONFIGS = {
    "albert": lambda: transformers.AlbertConfig(**SMALL, embedding_size=16),
    "bloom": lambda: transformers.BloomConfig(vocab_size=100, hidden_size=32, n_layer=2, n_head=4),
    "deberta_v2": lambda: transformers.DebertaV2Config(
        **SMALL, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8, pooler_hidden_size=32
    ),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(**SMALL | LATENT),
    "gptj": lambda: transformers.GPTJConfig(**GPT, rotary_dim=4),
    "mamba": lambda: transformers.MambaConfig(
        vocab_size=100, hidden_size=32, state_size=4, num_hidden_layers=2, time_step_rank=4
    ),
    "mixtral": lambda: transformers.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4),
    "xlm": lambda: transformers.XLMConfig(vocab_size=100, emb_dim=32, n_layers=2, n_heads=4),
}
CLASSES = {
    "albert": transformers.AlbertForSequenceClassification,
    "bloom": transformers.BloomForCausalLM,
    "deberta_v2": transformers.DebertaV2ForMaskedLM,
    "deepseek_v3": transformers.DeepseekV3ForCausalLM,
    "gptj": transformers.GPTJForCausalLM,
    "mamba": transformers.MambaForCausalLM,
    "mixtral": transformers.MixtralForCausalLM,
    "xlm": transformers.XLMWithLMHeadModel,
}


def made(name: str) -> nn.Module:
    """A random model in eval mode, always with the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CLASSES[name](CONFIGS[name]()).eval()


def tokens() -> dict[str, Tensor]:
    """Two rows of six tokens."""
    generator = torch.Generator().manual_seed(0)
    return {"input_ids": torch.randint(5, 100, (2, 6), generator=generator)}


class Plain(nn.Module):
    """A transformer that someone wrote without any library: fused keys and values, no config, its own names."""

    def __init__(self, width: int = 24, depth: int = 2) -> None:
        super().__init__()
        self.words = nn.Embedding(50, width)
        self.stack = nn.ModuleList(PlainLayer(width) for _ in range(depth))
        self.out = nn.Linear(width, 50)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.words(ids)
        for layer in self.stack:
            h = layer(h)
        return self.out(h)


class PlainLayer(nn.Module):
    """Pre-LN, two heads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_a, self.ln_b = nn.LayerNorm(width), nn.LayerNorm(width)
        self.look, self.content, self.back = (nn.Linear(width, n) for n in (width, 2 * width, width))
        self.wide, self.narrow = nn.Linear(width, 40), nn.Linear(40, width)

    def forward(self, h: Tensor) -> Tensor:
        x = self.ln_a(h)
        k, v = self.content(x).chunk(2, -1)
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (self.look(x), k, v))
        h = h + self.back(torch.softmax(q @ k.mT, -1).matmul(v).transpose(1, 2).flatten(2))
        return h + self.narrow(torch.relu(self.wide(self.ln_b(h))))
