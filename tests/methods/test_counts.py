"""Published parameter counts, as exact integers, from configurations alone: models are built without weights.

The counts of prefixes, prompts, bottlenecks, MAM and UniPELT stand in the tests of those methods.
"""

from __future__ import annotations

import functools

import pytest
import torch
import transformers as T

import inlay

LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
ROBERTA = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
DEBERTA = {
    "vocab_size": 128100, "type_vocab_size": 0, "max_position_embeddings": 512, "relative_attention": True,
    "position_buckets": 256, "norm_rel_ebd": "layer_norm", "share_att_key": True, "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False, "max_relative_positions": -1,
}  # fmt: skip
# The six matrices of each layer that the AdaLoRA paper adapts; DeBERTa does not run without weights, so by name.
SIX = ("query_proj", "key_proj", "value_proj", "intermediate.dense", "output.dense")
QV = ("attn.q", "attn.v")


def gpt(layers, width, heads):
    return T.GPT2LMHeadModel, T.GPT2Config(n_layer=layers, n_embd=width, n_head=heads)


def bert(task=T.BertModel, **config):
    return task, T.BertConfig(**config)


CONFIGS = {
    "bert-base-cased": lambda: bert(vocab_size=28996),
    "bert-base-uncased": bert,
    "bert-large-cased": lambda: bert(vocab_size=28996, **LARGE),
    "bert-large-uncased": lambda: bert(**LARGE),
    "bert-base-2": lambda: bert(T.BertForSequenceClassification, num_labels=2),
    "bert-large-2": lambda: bert(T.BertForSequenceClassification, num_labels=2, **LARGE),
    "roberta-base": lambda: (T.RobertaModel, T.RobertaConfig(**ROBERTA)),
    "roberta-base-2": lambda: (T.RobertaForSequenceClassification, T.RobertaConfig(num_labels=2, **ROBERTA)),
    "roberta-large": lambda: (T.RobertaModel, T.RobertaConfig(**ROBERTA, **LARGE)),
    "deberta-v3-base": lambda: (T.DebertaV2Model, T.DebertaV2Config(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072, **DEBERTA)),
    "deberta-xxl": lambda: (T.DebertaV2Model, T.DebertaV2Config(
        hidden_size=1536, num_hidden_layers=48, num_attention_heads=24, intermediate_size=6144, **DEBERTA)),
    "bart-large": lambda: (T.BartModel, T.BartConfig()),
    "mbart-large": lambda: (T.MBartModel, T.MBartConfig(vocab_size=250027)),
    "gpt2-medium": lambda: gpt(24, 1024, 16),
    "gpt2-large": lambda: gpt(36, 1280, 20),
    "gpt3": lambda: gpt(96, 12288, 96),
    "llama-7b": lambda: (T.LlamaForCausalLM, T.LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)),
}  # fmt: skip


@functools.cache
def model(name):
    cls, config = CONFIGS[name]()
    with torch.device("meta"):
        return cls(config)


def count(name, method, **options):
    adapter = inlay.attach(model(name), method, **({"head": None} | options))
    try:
        return adapter.trained_parameters
    finally:
        adapter.detach()


@pytest.mark.parametrize(("name", "parameters"), [
    ("bert-base-cased", 108_310_272), ("bert-base-uncased", 109_482_240), ("bert-large-cased", 333_579_264),
    ("bert-large-uncased", 335_141_888), ("roberta-base", 124_055_040 + 590_592),
    ("roberta-large", 354_310_144 + 1_049_600), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080),
    ("llama-7b", 6_738_415_616), ("deberta-v3-base", 183_831_552), ("bart-large", 406_291_456),
    ("mbart-large", 610_851_840),
])  # fmt: skip
def test_sizes_of_the_bases(name, parameters):
    """RoBERTa is counted without its pooler in the literature, which classification does not use."""
    from inlay.describe import base_parameters

    assert base_parameters(model(name)) == parameters


@pytest.mark.parametrize(("name", "biases", "query_and_intermediate"), [
    ("bert-base-cased", 102_912, 46_080), ("bert-base-uncased", 102_912, 46_080),
    ("bert-large-cased", 272_384, 122_880), ("bert-large-uncased", 272_384, 122_880),
])  # fmt: skip
@pytest.mark.proves("count", "bitfit")
def test_bitfit_on_bert(name, biases, query_and_intermediate):
    """11 d L + 2 d. 0.09 % is BERT-base and 0.08 % BERT-large; the articles give one figure for both."""
    assert count(name, inlay.BitFit()) == biases
    assert count(name, inlay.BitFit(sites=("attn.q", "ffn.up"))) == query_and_intermediate
    share = biases / sum(p.numel() for p in model(name).parameters())
    assert round(100 * share, 2) in ({0.09, 0.1} if "base" in name else {0.08})


@pytest.mark.parametrize(
    ("name", "head"), [("bert-base-2", 1_538), ("bert-large-2", 2_050), ("roberta-base-2", 592_130)]
)
@pytest.mark.proves("count", "headonly")
def test_heads_for_two_labels(name, head):
    adapter = inlay.attach(model(name), inlay.BitFit())
    assert adapter.head_parameters == head
    adapter.detach()
    assert count(name, inlay.HeadOnly()) == head


@pytest.mark.parametrize(("name", "rank", "sites", "parameters", "published"), [
    ("roberta-base", 8, QV, 294_912, "0.3M; 0.8M in the code's README is wrong, or has the head of 592,130 in it"),
    ("roberta-large", 8, QV, 786_432, "0.8M"),
    ("deberta-xxl", 16, ("query_proj", "value_proj"), 4_718_592, "4.7M"),
    ("gpt2-medium", 4, QV, 393_216, "0.35M is wrong: microsoft/LoRA#172; the published file holds 393,216 numbers"),
    ("gpt2-large", 4, QV, 737_280, "0.77M, which is 0.1 % of the model"),
    ("gpt3", 1, QV, 4_718_592, "4.7M"),
    ("gpt3", 4, QV, 18_874_368, "18M"),
    ("gpt3", 8, QV, 37_748_736, "37.7M"),
    ("gpt3", 2, ("attn.q", "attn.k", "attn.v", "attn.o"), 18_874_368, "37.7M in appendix D is a slip"),
    ("deberta-v3-base", 1, SIX, 165_888, "0.17M"),
    ("deberta-v3-base", 2, SIX, 331_776, "0.33M"),
    ("deberta-v3-base", 4, SIX, 663_552, "0.67M"),
    ("deberta-v3-base", 8, SIX, 1_327_104, "1.33M"),
    ("llama-7b", 8, QV, 4_194_304, "0.06 %"),
    ("llama-7b", 64, "linear", 159_907_840, "160M in QLoRA"),
    ("llama-7b", 32, ("attn.q", "attn.k", "attn.v", "ffn.up", "ffn.down"), 56_098_816, "0.83 %"),
])  # fmt: skip
@pytest.mark.proves("count", "lora")
def test_lora(name, rank, sites, parameters, published):
    assert count(name, inlay.LoRA(rank=rank, sites=sites)) == parameters, published


def test_lora_on_a_fused_projection_as_a_whole_counts_the_same_and_is_another_map():
    """r (d + 3 d) shares one A among q, k and v; r for each of q and v, as published, has two of its own."""
    assert count("gpt2-medium", inlay.LoRA(rank=4, sites="c_attn")) == 24 * 4 * (1024 + 3 * 1024) == 393_216


@pytest.mark.proves("count", "dora")
def test_dora():
    """LLaMA-7B, rank 32: one magnitude for each of 27,392 outputs a layer more than LoRA. 0.846 % of the base."""
    sites = ("attn.q", "attn.k", "attn.v", "ffn.up", "ffn.down")
    found = count("llama-7b", inlay.DoRA(rank=32, sites=sites))
    assert found == 56_098_816 + 32 * (3 * 4096 + 11008 + 4096) == 56_975_360
    assert round(100 * found / 6_738_415_616, 3) == 0.846


@pytest.mark.proves("count", "adalora")
def test_adalora():
    """Init rank 12, 72 matrices; 1.27M and 0.32M in the paper are what the target ranks 8 and 2 keep on average."""
    adapter = inlay.attach(model("deberta-v3-base"), inlay.AdaLoRA(init_rank=12, target_rank=8, sites=SIX))
    assert len(adapter.pieces) == 72
    assert adapter.trained_parameters == 1_991_520
    adapter.detach()


@pytest.mark.proves("count", "diffpruning")
def test_diff_pruning_trains_more_than_everything_and_keeps_little():
    """A value and a gate for every weight and bias of BERT-large's 24 · 6 projections, and two gates a projection."""
    weights = 24 * (4 * 1024 * 1024 + 2 * 1024 * 4096)
    biases = 24 * (4 * 1024 + 4096 + 1024)
    assert count("bert-large-cased", inlay.DiffPruning()) == 2 * (weights + biases) + 2 * 24 * 6


def test_other_counts_of_the_papers():
    """RoBERTa-base biases (0.1M), GPT-3's PreEmbed of 264 tokens (3.2M), IA3 and ten prompt tokens on BERT-base."""
    assert count("roberta-base", inlay.BitFit()) in (102_144, 102_144 + 768), "without, and with the pooler"
    assert count("gpt3", inlay.Prompt(length=264, init="uniform")) == 3_244_032
    assert count("bert-base-uncased", inlay.IA3()) == 55_296
    assert count("bert-base-uncased", inlay.Prompt(length=10, init="uniform")) == 7_680


ATTENTIONS = ("attn.q", "attn.v", "cross.q", "cross.v")


@pytest.mark.proves("count", "inlay", "mam")
@pytest.mark.parametrize(("method", "formula", "biases", "printed"), [
    (inlay.Inlay(form="kv", size=200), 14_745_600, 0, "3.6"),
    (inlay.Inlay(form="kv_relu", size=200), 14_745_600, 0, "3.6"),
    (inlay.Inlay(form="bottleneck", size=200, sites=("attn", "cross")), 14_745_600, 36 * 1224, "3.6"),
    (inlay.Inlay(form="bottleneck", size=512, sites=("attn", "cross")), 37_748_736, 36 * 1536, "9.2"),
    (inlay.Inlay(form="bottleneck", size=200, sites="ffn"), 9_830_400, 24 * 1224, "2.4"),
    (inlay.Inlay(form="bottleneck", size=512, sites="ffn"), 25_165_824, 24 * 1536, "6.1"),
    (inlay.Inlay(form="bottleneck", size=1024, sites="ffn"), 50_331_648, 24 * 2048, "12.3"),
    (inlay.Bottleneck.pfeiffer(size=600), 29_491_200, 24 * 1624, "7.2"),
    (inlay.LoRA(rank=200, sites=ATTENTIONS), 29_491_200, 0, "7.2"),
    (inlay.LoRA(rank=102, sites=("ffn.up", "ffn.down")), 25_067_520, 0, "6.1"),
    (inlay.MAM(mid=None), 27_377_664, 24 * 1536, "6.7"),
    (inlay.Prefix(length=30) + inlay.LoRA(rank=102, sites=("ffn.up", "ffn.down")), 27_279_360, 0, "6.7"),
    (inlay.Prefix(length=30), 2_211_840, 0, "0.5"),
])  # fmt: skip
def test_he_et_al_on_bart_large(method, formula, biases, printed):
    """The formulas of their table 10 leave out biases. They truncate to one decimal, and print 0.1 for the last."""
    assert count("bart-large", method) == formula + biases
    assert f"{int(1000 * formula / 406_291_456) / 10:.1f}" == printed


def test_mam_elsewhere():
    """On mBART 4.49 %, where the paper prints BART's 6.7; RoBERTa-base with l = r = 16 is 0.5 % without biases."""
    assert round(100 * count("mbart-large", inlay.MAM(mid=None)) / 610_851_840, 2) == 4.49
    small = inlay.MAM(length=16, mid=None, size=16, scale=2.0)
    assert count("roberta-base", small) == 589_824 + 12 * (16 + 768)
