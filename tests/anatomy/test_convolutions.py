"""Projections that are convolutions of one position, features that stand second, and what merges positions."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import inlay
from inlay.errors import AttachmentError, FormatError, MergeError
from inlay.quant.bridge import logical_shape, weight_of


class Block(nn.Module):
    """x + down(relu(norm(up(x)))) over [B, C, W]."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.up = nn.Conv1d(8, 16, 1, groups=groups)
        self.norm = nn.BatchNorm1d(16)
        self.down = nn.Conv1d(16, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.norm(self.up(x))))


class Net(nn.Module):
    """Two blocks."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(groups) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def net(groups: int = 1) -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    model = Net(groups).eval()
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.add_(torch.rand_like(buffer))
    return model, torch.randn(2, 8, 5)


@pytest.mark.parametrize("groups", [1, 4])
def test_a_convolution_of_one_position_is_the_product_with_its_dense_weight(groups: int) -> None:
    conv = nn.Conv1d(8, 16, 1, groups=groups, bias=False)
    x = torch.randn(3, 8, 5)
    torch.testing.assert_close(F.linear(x.mT, weight_of(conv)).mT, conv(x))
    assert logical_shape(conv) == (16, 8)


def test_other_convolutions_are_no_projections() -> None:
    for conv in (nn.Conv1d(8, 8, 3), nn.Conv1d(8, 8, 1, stride=2), nn.Conv1d(8, 8, 1, padding=1)):
        with pytest.raises(inlay.errors.QuantizationError):
            logical_shape(conv)


@pytest.mark.parametrize("groups", [1, 4])
def test_lora_acts_on_the_features_at_axis_one(groups: int) -> None:
    model, x = net(groups)
    base = model(x)
    adapter = inlay.attach(model, inlay.LoRA(rank=2, alpha=2, sites="up"), example={"x": x})
    assert torch.equal(model(x), base)
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_()
    seen = model.layers[0].up(x)
    A, B = (dict(adapter.named_parameters())[f"layers.0.up.lora.{n}"] for n in "AB")
    frozen = F.conv1d(x, model.layers[0].up.weight, model.layers[0].up.bias, groups=groups)
    torch.testing.assert_close(seen, frozen + (x.mT @ A.mT @ B.mT).mT)


@pytest.mark.parametrize("method", [inlay.LoRA(rank=2), inlay.DoRA(rank=2), inlay.IA3(sites="linear")])
def test_merging_gives_the_same_function(method: inlay.Method) -> None:
    model, x = net()
    adapter = inlay.attach(model, method, example={"x": x})
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.1 * torch.randn_like(p))
        wanted = model(x)
        adapter.merge()
        torch.testing.assert_close(model(x), wanted)


def test_groups_have_no_room_for_a_merge() -> None:
    model, x = net(groups=4)
    adapter = inlay.attach(model, inlay.LoRA(rank=2, sites="up"), example={"x": x})
    with pytest.raises(MergeError, match="4 groups"):
        adapter.merge()


def test_peft_is_refused(tmp_path: object) -> None:
    model, x = net()
    adapter = inlay.attach(model, inlay.LoRA(rank=2), example={"x": x})
    with pytest.raises(FormatError, match="convolution"):
        adapter.save(f"{tmp_path}/a", format="peft")


def test_the_bias_of_a_batch_norm_is_one_number_a_channel() -> None:
    model, x = net()
    adapter = inlay.attach(model, inlay.BitFit(sites="norm"), example={"x": x})
    key = "layers.0.norm.bitfit.b"
    own = dict(adapter.named_parameters())[key]
    assert own.shape == (16,)
    hidden = torch.randn(2, 16, 5)
    before = model.layers[0].norm(hidden)
    with torch.no_grad():
        own.copy_(torch.arange(16.0))
    torch.testing.assert_close(model.layers[0].norm(hidden), before + torch.arange(16.0)[:, None])


def test_the_span_of_two_convolutions_is_a_feed_forward_span() -> None:
    model, x = net()
    first, _ = inlay.anatomy(model, example={"x": x}).select("ffn")
    assert (first.enter, first.leave, first.axis) == ("layers.0.up", "layers.0.down", 1)
    adapter = inlay.attach(model, inlay.Bottleneck(size=3, reads="x", sites="ffn"), example={"x": x})
    model(x).sum().backward()
    assert all(p.grad is not None for p in adapter.parameters())


class Merging(nn.Module):
    """Halves the tokens, as patch merging does."""

    def __init__(self) -> None:
        super().__init__()
        self.reduction = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.reduction(x.reshape(x.shape[0], -1, 16))


def test_what_merges_positions_is_no_feed_forward_span() -> None:
    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 8))
            self.downsample = Merging()

        def forward(self, x: Tensor) -> Tensor:
            return self.downsample(x + self.mlp(x))[..., :8]

    model = nn.Sequential(Stage(), Stage())
    sites = inlay.anatomy(model, example={"input": torch.randn(2, 8, 8)}).select("ffn")
    assert [s.leave for s in sites] == ["0.mlp.2", "1.mlp.2"]


def test_a_sequential_can_be_hosted_whole() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2))
    x = torch.randn(3, 4)
    base = model(x)
    adapter = inlay.attach(model, inlay.Bottleneck(size=2, sites="0"), example={"input": x})
    assert torch.equal(model(x), base)
    model(x).sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in adapter.parameters())


class Softmax(torch.autograd.Function):
    """Computes its softmax where torch records nothing, as DeBERTa's first code did."""

    @staticmethod
    def forward(ctx: object, scores: Tensor) -> Tensor:
        shares = torch.softmax(scores, -1)
        ctx.save_for_backward(shares)  # type: ignore[attr-defined]
        return shares

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:  # type: ignore[override]
        (shares,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return shares * (grad - (grad * shares).sum(-1, keepdim=True))


class Attention(nn.Module):
    """One head, with a softmax of its own."""

    def __init__(self, hidden: bool) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.hidden = hidden

    def forward(self, x: Tensor) -> Tensor:
        scores = self.q(x)[:, None] @ self.k(x)[:, None].mT
        shares = (
            Softmax.apply(scores) if self.hidden and torch.is_grad_enabled() and self.training else scores.softmax(-1)
        )
        return self.o((shares @ self.v(x)[:, None])[:, 0])


def test_a_softmax_that_gives_the_keys_no_gradient_is_refused() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Attention(hidden=True)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.attention(x)

    model = nn.ModuleList([Layer(), Layer()])
    whole = nn.Sequential(*model)
    x = torch.randn(2, 5, 8)
    inlay.attach(whole.eval(), inlay.Prefix(length=2, mid=None), example={"input": x})
    whole(x).sum().backward()
    with pytest.raises(AttachmentError, match="autograd function of its own"):
        whole.train()(x)


class Pair(NamedTuple):
    """What some modules return."""

    hidden: Tensor
    other: int


def test_a_named_tuple_stays_one() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Pair:
            return Pair(self.a(x), 7)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).hidden * self.inner(x).other

    model, x = Outer(), torch.randn(3, 4)
    base = model(x)
    inlay.attach(model, inlay.Bottleneck(size=2, sites="inner"), example={"x": x})
    assert torch.equal(model(x), base)


def test_a_span_has_its_features_where_its_end_has_them() -> None:
    """LeViT's attention ends in a norm that sees all tokens of all rows laid flat, features second."""
    config = transformers.LevitConfig(
        image_size=64, hidden_sizes=[16, 24, 32], num_attention_heads=[2, 3, 4], depths=[1, 1, 1], key_dim=[8, 8, 8]
    )
    model = transformers.LevitForImageClassification(config).eval()
    image = {"pixel_values": torch.randn(2, 3, 64, 64)}
    before = model(**image).logits.detach()
    adapter = inlay.attach(model, inlay.Bottleneck(), example=image)
    assert torch.equal(model(**image).logits, before)
    model(**image).logits.sum().backward()
    assert all(p.grad is not None for p in adapter.parameters())
