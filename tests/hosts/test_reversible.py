"""Blocks that run without gradients and again in a backward pass of their own, against the same blocks written out."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import inlay
from inlay.errors import AttachmentError, TrainingError

METHODS = {
    "lora": inlay.LoRA(rank=2),
    "dora": inlay.DoRA(rank=2),
    "ia3": inlay.IA3(),
    "bottleneck": inlay.Bottleneck(size=4),
    "full": inlay.Full(sites="linear"),
}
DROPPING = {
    "lora": inlay.LoRA(rank=2, dropout=0.4),
    "adalora": inlay.AdaLoRA(init_rank=3, target_rank=2, total_steps=50, dropout=0.4),
    "dora": inlay.DoRA(rank=2, dropout=0.4),
    "bottleneck": inlay.Bottleneck(size=4, dropout=0.4),
}


def reformer(chunk: int = 4) -> transformers.ReformerModelWithLMHead:
    """A random Reformer in training mode, one layer of each attention; rows longer than a chunk are hashed and cut."""
    config = transformers.ReformerConfig(
        vocab_size=100, hidden_size=32, num_attention_heads=4, attention_head_size=8, feed_forward_size=48,
        attn_layers=["local", "lsh"], axial_pos_embds=False, max_position_embeddings=64, is_decoder=True,
        hidden_dropout_prob=0.0, local_attention_probs_dropout_prob=0.0, local_attn_chunk_length=chunk,
        lsh_attn_chunk_length=chunk, num_hashes=2, num_buckets=4, hash_seed=0, initializer_range=0.15, use_cache=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.ReformerModelWithLMHead(config).train()


def tokens() -> Tensor:
    return torch.randint(5, 100, (2, 8), generator=torch.Generator().manual_seed(1))


def attach(model: nn.Module, method: inlay.Method, name: str = "one", **options: object) -> inlay.Adapter:
    torch.manual_seed(2)
    adapter = inlay.attach(model, method, name, **options)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return adapter


def unrolled(model: transformers.ReformerModelWithLMHead, **inputs: Tensor) -> Tensor:
    """y1 = x1 + f(x2) and y2 = x2 + g(y1) by plain autograd, with the random numbers of the pass before."""
    x1 = x2 = model.reformer.embeddings(**inputs)
    for layer in model.reformer.encoder.layers:
        torch.manual_seed(layer.attention_seed)
        x1 = x1 + layer.attention(x2).hidden_states
        torch.manual_seed(layer.feed_forward_seed)
        x2 = x2 + layer.feed_forward(x1)
    return model.lm_head(model.reformer.encoder.layer_norm(torch.cat([x1, x2], dim=-1)))


def gradients(logits: Tensor, adapter: inlay.Adapter) -> dict[str, Tensor]:
    """Of a sum with random weights; every parameter has one."""
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
    (logits * weights).sum().backward()
    found = {name: p.grad for name, p in adapter.named_parameters() if p.requires_grad}
    for parameter in adapter.parameters():
        parameter.grad = None
    assert [name for name, grad in found.items() if grad is None] == []
    return found


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Reversible layers compute their inputs from their outputs, which costs a digit or two."""
    for name, grad in wanted.items():
        scale = float(grad.abs().max())
        assert scale > 0
        torch.testing.assert_close(found[name], grad, rtol=0, atol=1e-4 * scale, msg=lambda m, n=name: f"{n}: {m}")


def as_written_out(model: nn.Module, method: inlay.Method) -> None:
    """Values and gradients are those of the blocks written out."""
    ids, adapter = tokens(), attach(model, method)
    logits = model(ids).logits
    found = gradients(logits, adapter)
    wanted = unrolled(model, input_ids=ids)
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
    same(found, gradients(wanted, adapter))


@pytest.mark.parametrize("name", METHODS)
def test_values_and_gradients_are_those_of_the_blocks_written_out(name: str) -> None:
    as_written_out(reformer(), METHODS[name])


def test_virtual_tokens_too() -> None:
    model, ids = reformer(), tokens()
    adapter = attach(model, inlay.LoRA(rank=2) + inlay.Prompt(length=4))
    logits = model(ids).logits
    found = gradients(logits, adapter)
    prompt = next(piece for piece in adapter.pieces.values() if hasattr(piece, "places"))
    embeds = model.get_input_embeddings()(ids)
    embeds = torch.cat([embeds[:, :1], prompt().expand(2, -1, -1), embeds[:, 1:]], dim=1)
    wanted = unrolled(model, inputs_embeds=embeds)[:, 4:]  # the last virtual token predicts the second real one
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
    same(found, gradients(wanted, adapter))


@pytest.mark.parametrize("name", DROPPING)
def test_both_passes_drop_the_same(name: str) -> None:
    """On rows of one chunk: for the hashes of longer ones Reformer draws numbers in its first pass alone."""
    as_written_out(reformer(chunk=16), DROPPING[name])


def test_another_route_at_the_backward_pass() -> None:
    model, ids = reformer(), tokens()
    adapters = [attach(model, inlay.LoRA(rank=2), name) for name in "ab"]
    with torch.no_grad():
        adapters[1].pieces["reformer.encoder.layers.0.attention.output.dense.lora"].B.add_(1.0)
    inlay.use(model, "a")
    wanted = gradients(model(ids).logits, adapters[0])
    with inlay.use(model, "a"):
        logits = model(ids).logits
    inlay.use(model, "b")
    same(gradients(logits, adapters[0]), wanted)


@pytest.mark.parametrize("method", [inlay.LoRA(rank=2), inlay.Prompt(length=4)])
def test_evaluation_mode_is_refused_at_the_backward_pass_alone(method: inlay.Method) -> None:
    model, ids = reformer(), tokens()
    attach(model, method)
    loss = model.eval()(ids).logits.sum()
    with pytest.raises(TrainingError, match=r"reformer\.encoder .* it ran in evaluation mode. Call model\.train\(\)"):
        loss.backward()
    loss = model.train()(ids).logits.sum()
    model.eval()
    with pytest.raises(TrainingError, match="it is in evaluation mode"):
        loss.backward()


def test_nothing_runs_again_for_pieces_outside_the_blocks() -> None:
    model, ids = reformer(), tokens()
    adapter = attach(model, inlay.LoRA(rank=2, sites="lm_head.decoder"))
    runs = []
    model.reformer.encoder.layers[0].feed_forward.register_forward_hook(lambda *_: runs.append(1))
    gradients(model(ids).logits, adapter)
    assert len(runs) == 1


def test_detaching_leaves_no_trace_and_copies_train() -> None:
    model, ids = reformer(), tokens()
    before = {path: type(module) for path, module in model.named_modules()}
    assert inlay.anatomy(model).reruns == ("reformer.encoder",)
    adapter = attach(model, inlay.LoRA(rank=2))
    wanted = gradients(model(ids).logits, adapter)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        same(gradients(twin(ids).logits, inlay.adapters(twin)["one"]), wanted)
    inlay.detach(model)
    assert {path: type(module) for path, module in model.named_modules()} == before


class Again(nn.Module):
    """Projections in torch's reentrant checkpointing, whatever the mode: no reversible layers, but of their kind."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=True) + x
        return x


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.inner = Again()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.first(x))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_such_modules_are_known_by_what_they_do() -> None:
    model, x = Around().train(), torch.randn(2, 5, 8)
    adapter = attach(model, inlay.LoRA(rank=2, sites="*layers.*"), example={"x": x})
    found = gradients(model(x), adapter)
    y = model.inner.first(model.first(x))
    for layer in model.inner.layers:
        y = layer(y) + y
    same(found, gradients(y, adapter))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_the_model_itself_cannot_be_surrounded() -> None:
    model = Again()
    with pytest.raises(AttachmentError, match="Again itself runs its blocks again"):
        inlay.attach(model, inlay.LoRA(rank=2, sites="layers.*"), example={"x": torch.randn(2, 5, 8)})
    assert type(model) is Again
    assert all(type(layer) is nn.Linear for layer in model.layers)
