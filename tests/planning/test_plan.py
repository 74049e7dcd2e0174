"""Plans: published figures from configurations alone, and recorded steps beside steps that ran."""

from __future__ import annotations

import gc
import json

import pytest
import torch
import transformers as T

import inlay
from inlay.errors import ConfigError, MethodError
from inlay.planning.bases import BASES, four_bits, quantised_leaves, weight_bytes
from inlay.planning.footprint import Footprint, OptimizerState, optimizer_state
from inlay.planning.picture import picture
from inlay.planning.plan import REFERENCE, bytes_of
from inlay.planning.skeleton import empty_model, file_bytes, twin
from inlay.planning.step import Conditions, inputs_like, make_inputs, record
from inlay.planning.study import Settings, Study
from inlay.train.output_head import OutputHead
from tiny import batch, tiny

GB = 1e9
SMALL = T.LlamaConfig(
    vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip
LLAMA_65B = T.LlamaConfig(
    vocab_size=32000, hidden_size=8192, intermediate_size=22016, num_hidden_layers=80, num_attention_heads=64
)


def test_llama_65b_takes_more_than_780_gb_to_fine_tune_in_16_bit():
    """12 bytes a parameter: 2 for the weight, 2 for its gradient, 8 for Adam (arXiv:2305.14314, section 1)."""
    model = empty_model(LLAMA_65B, "causal-lm", torch.bfloat16)
    parameters = list(model.parameters())
    weights, gradients = (sum(p.nbytes for p in parameters) for _ in range(2))
    total = weights + gradients + optimizer_state(parameters, "adamw_torch_fused", "cuda").device
    assert sum(p.numel() for p in parameters) == 65_285_660_672
    assert 780 * GB < total < 790 * GB


def footprint(
    config, task, base, method, length, *, checkpointing=False, optim="adamw_torch_fused", target_length=None
):
    study = Study(config, Settings(task, length, target_length, "cuda", optim, accumulates=False))
    with study.attached(method, BASES[base]) as trial:
        return trial.footprint(trial.record(checkpointing, [length]))


def test_qlora_65b_stays_below_48_gb():
    """arXiv:2305.14314: rank 64 everywhere, paged optimizer, checkpointing, a row of 512 tokens."""
    method, options = inlay.LoRA(rank=64), {"checkpointing": True, "optim": "paged_adamw_32bit"}
    found = footprint(LLAMA_65B, "causal-lm", "nf4-dq", method, 512, **options)
    memory = found.memory(1, 512)
    assert memory.total < 0.95 * 48 * GB
    assert 33 * GB < memory.weights < 39 * GB
    assert found.optimizer.host > 6 * GB
    assert found.largest_batch(512, 0.95 * (48 << 30)) >= 1


PEFT_README = [
    # name, configuration, task, published GB: full fine-tuning, LoRA (fp32, one A100 of 80 GB, 8 rows)
    ("T0_3B", T.T5Config(
        vocab_size=32128, d_model=2048, d_kv=64, d_ff=5120, num_layers=24, num_heads=32,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False), "seq2seq", 47.14, 14.4),
    ("mt0-xxl", T.T5Config(
        vocab_size=250112, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False), "seq2seq", None, 56.0),
    ("bloomz-7b1", T.BloomConfig(
        vocab_size=250880, hidden_size=4096, n_layer=30, n_head=32), "causal-lm", None, 32.0),
]  # fmt: skip


@pytest.mark.parametrize(("name", "config", "task", "full", "lora"), PEFT_README, ids=[r[0] for r in PEFT_README])
def test_published_memory_of_full_fine_tuning_and_lora(name, config, task, full, lora):
    """GPU memory in the README of PEFT. Its rows are tweets of at most 64 tokens; the models are in fp32."""
    method = inlay.LoRA(rank=8, sites=("attn.q", "attn.v"))
    found = footprint(config, task, "fp32", method, 64, target_length=8)
    assert found.memory(8, 64).total / GB == pytest.approx(lora, rel=0.1)
    if full is None:
        assert 16 * (found.weights / 4) > 80 * GB  # published as out of memory
    else:
        whole = footprint(config, task, "fp32", None, 64, target_length=8)
        assert whole.memory(8, 64).total / GB == pytest.approx(full, rel=0.1)


def saved(model, inputs, task):
    """Bytes that autograd keeps of a real forward pass, weights left out, the output alive."""
    weights = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers(), *inputs.values())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = OutputHead(model, task).loss(inputs, 0.0)
    total = sum(kept.values())
    del loss
    gc.collect()
    return total


METHODS = {
    "lora": inlay.LoRA(),
    "bottleneck": inlay.Bottleneck(),
    "ia3": inlay.IA3(),
    "prefix": inlay.Prefix(length=4),
    "full": inlay.Full(),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "bert", "t5", "gpt2"])
def test_activations_are_those_that_autograd_keeps(family, method):
    """On the CPU, whose real step stands beside: what is alive at the end of the recorded forward pass."""
    model = tiny(family).train()
    task = {"bert": "sequence-classification", "t5": "seq2seq"}.get(family, "causal-lm")
    inlay.attach(model, METHODS[method])
    inputs = batch(model, rows=8, length=48, padding="none")
    inputs.pop("attention_mask")
    measured = saved(model, inputs, task)
    timeline = record(twin(model), task, inputs_like(inputs, 8), Conditions(device="cpu"))
    estimated = timeline.held[0] + 8 * timeline.held[1]
    assert estimated == pytest.approx(measured, rel=0.1)


def words(**changes):
    settings = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    return T.LlamaForCausalLM(T.LlamaConfig(**settings, vocab_size=4096, **changes)).train()


def test_logits_of_a_frozen_projection_are_not_kept():
    model, inputs = words(), {"input_ids": torch.zeros(4, 64, dtype=torch.long)}
    inputs["labels"] = inputs["input_ids"]
    inlay.attach(model, inlay.LoRA())
    timeline = record(twin(model), "causal-lm", inputs_like(inputs, 4), Conditions(device="cpu"))
    kept = timeline.held[0] + 4 * timeline.held[1]
    assert kept == pytest.approx(saved(model, inputs, "causal-lm"), rel=0.1)
    assert kept < 4 * 63 * 4096 * 4  # bytes of the logits


def test_pieces_of_logits_stop_growing_with_the_rows():
    footprint = Footprint(0, 0, OptimizerState(0), 0, {1: timeline_of_words()})
    small, large = (footprint.memory(rows, 1).scratch / rows for rows in (8, 800))
    assert small > 2 * 63 * 4096 * 4  # all logits of few rows, and what logsumexp makes of them
    assert large < small / 4


def timeline_of_words():
    model, inputs = words(), {"input_ids": torch.zeros(4, 64, dtype=torch.long)}
    inputs["labels"] = inputs["input_ids"]
    inlay.attach(model, inlay.LoRA())
    return record(twin(model), "causal-lm", inputs_like(inputs, 4), Conditions(device="cpu"))


def test_logits_that_the_model_changes_after_its_projection_are_kept():
    config = T.Gemma2Config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, vocab_size=4096,
    )  # fmt: skip
    model, inputs = T.Gemma2ForCausalLM(config).train(), {"input_ids": torch.zeros(4, 64, dtype=torch.long)}
    inputs["labels"] = inputs["input_ids"]
    inlay.attach(model, inlay.LoRA())
    timeline = record(twin(model), "causal-lm", inputs_like(inputs, 4), Conditions(device="cpu"))
    assert timeline.held[0] + 4 * timeline.held[1] > 4 * 63 * 4096 * 4


def test_other_batches_and_lengths_are_those_of_recordings_there():
    made = inlay.plan(SMALL, "prefix", bases=("bf16",), batch=3, length=64, gpu="64MB", device="cpu")
    cost = made.cost("prefix")
    assert cost.largest_batch
    assert cost.largest_length
    budget = 0.95 * (64 << 20)
    for rows, length, fits in [
        (cost.largest_batch, 64, True), (cost.largest_batch + 1, 64, False),
        (3, cost.largest_length, True), (3, cost.largest_length + 1, False),
    ]:  # fmt: skip
        again = inlay.plan(SMALL, "prefix", bases=("bf16",), batch=rows, length=length, device="cpu")
        assert (again.cost("prefix").peak <= budget) == fits


def test_file_size_is_that_of_the_file(tmp_path):
    model = tiny("llama")
    adapter = inlay.attach(model, inlay.LoRA(rank=3))
    adapter.save(tmp_path / "adapter")
    assert file_bytes(adapter.stored()) == (tmp_path / "adapter" / "adapter.safetensors").stat().st_size


@pytest.mark.parametrize("name", ["nf4", "nf4-dq"])
def test_bytes_of_a_quantised_base_are_those_of_the_model(name):
    model = tiny("gpt2")
    planned = weight_bytes(model, BASES[name], quantised_leaves(model, BASES[name]))
    inlay.quantize(model, inlay.NF4(double_quant=BASES[name].double_quant))
    tensors = {t.untyped_storage().data_ptr(): t for t in (*model.parameters(), *model.buffers())}
    assert planned == sum(t.untyped_storage().nbytes() for t in tensors.values())


def test_bits_of_nf4_with_and_without_double_quantisation():
    """4.5 and 4.127 bits a parameter (arXiv:2305.14314, section 3)."""
    count = 4096 * 4096
    assert 8 * four_bits(count, False) / count == 4.5
    assert round(8 * four_bits(count, True) / count, 3) == 4.127


def test_a_model_of_ones_own_is_left_as_it_was():
    model = tiny("llama")
    adapter = inlay.attach(model, inlay.LoRA())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    copy = twin(model)
    record(copy, "causal-lm", make_inputs("causal-lm", 8, 8), Conditions(checkpointing=True))
    assert all(p.is_meta for p in copy.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in adapter.parameters())
    assert torch.autocast is torch.amp.autocast_mode.autocast


def test_everything_in_one_plan_as_json_table_and_picture(tmp_path):
    made = inlay.plan(SMALL, ["lora", "bitfit", "lora+prefix"], gpu="1GB", length=32, batch=2)
    document = json.loads(json.dumps(made.to_dict()))
    assert {c["base"] for c in document["costs"]} == set(BASES)
    assert set(document["refused"]) == {"bitfit"}
    lora, full = made.cost("lora"), made.cost(REFERENCE)
    assert lora.step_vs_full < 1 == full.step_vs_full
    assert made.cost("lora", checkpointing=True).flops_per_token > lora.flops_per_token
    assert made.cost("lora", "int8").held_bytes >= lora.held_bytes
    text = str(made)
    assert "lora+prefix" in text
    assert "bitfit is left out" in text
    picture(made, tmp_path / "plan.png")
    picture(made, tmp_path / "plan.svg")
    assert (tmp_path / "plan.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("text", "count"), [("24GB", 24 << 30), ("80 GiB", 80 << 30), ("512mb", 512 << 20), (7, 7), (None, None)]
)
def test_amounts_of_memory(text, count):
    assert bytes_of(text) == count


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpu": "much"}, "no amount of memory"), ({"bases": ("bf61",)}, "did you mean 'bf16'"),
        ({"optim": "adam"}, "is not known"), ({"length": 1}, "a row two tokens"), ({"task": "causal"}, "causal-lm"),
    ],
)  # fmt: skip
def test_what_cannot_be_planned_is_told(options, message):
    with pytest.raises(ConfigError, match=message):
        inlay.plan(SMALL, "lora", **options)


def test_no_row_is_longer_than_a_table_of_positions():
    config = T.GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=512, n_positions=96)
    options = {"bases": ("bf16",), "batch": 2, "gpu": "8GB"}
    made = inlay.plan(config, "lora", length=64, **options)
    assert made.cost("lora").largest_length == made.positions == 96
    with pytest.raises(ConfigError, match="length=97: gpt2 has a table of 96 positions; write length=96 or less"):
        inlay.plan(config, "lora", length=97, **options)
    assert inlay.plan(SMALL, "lora", length=4096, **options).cost("lora").largest_length > 4096  # computed positions


def test_a_method_that_cannot_work_is_an_error_where_it_is_the_only_one():
    with pytest.raises(MethodError, match="none"):
        inlay.plan(SMALL, "bitfit")


def test_settings_may_follow_a_method():
    made = inlay.plan(SMALL, ["lora:rank=2:sites=attn.q", "lora"], bases=("bf16",), length=16)
    assert made.cost("lora:rank=2:sites=attn.q").trained == 2 * 2 * (64 + 64)
    assert made.cost("lora").trained > 512
    with pytest.raises(ConfigError, match="key=value"):
        inlay.plan(SMALL, "lora:rank")


@pytest.mark.parametrize(("text", "words"), [("24", "24 bytes"), ("1.5.2GB", "no amount"), ("much", "no amount")])
def test_what_is_no_amount_of_memory(text, words):
    with pytest.raises(ConfigError, match=words):
        bytes_of(text)


def test_answers_of_a_model_without_a_decoder_are_refused():
    with pytest.raises(ConfigError, match="no decoder of its own"):
        inlay.plan(SMALL, "lora", target_length=8)
