"""Extra keys in attentions that modules compute by themselves, against attention written out by hand."""

from __future__ import annotations

import copy
import math
import pickle
from types import MethodType

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import inlay
from architectures import GPT, SMALL
from attention_oracle import shake, without_adapters
from inlay.errors import AttachmentError, SiteError
from inlay.hosts.softmax import SoftmaxHost

BLOOM = {"vocab_size": 100, "hidden_size": 32, "n_layer": 2, "n_head": 4}
NEO = {
    "vocab_size": 100, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 3,
    "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
DEBERTA = SMALL | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}
FALCON = {
    "vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
XLNET = {"vocab_size": 100, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}
FUNNEL = {
    "vocab_size": 100, "block_sizes": [1, 1], "num_decoder_layers": 1, "d_model": 32, "n_head": 4, "d_head": 8,
    "d_inner": 48,
}  # fmt: skip
FSMT = {
    "langs": ["a", "b"], "src_vocab_size": 100, "tgt_vocab_size": 100, "d_model": 32, "encoder_layers": 1,
    "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip

MODELS = {
    "bloom": lambda: transformers.BloomForCausalLM(transformers.BloomConfig(**BLOOM)),
    "gptj": lambda: transformers.GPTJForCausalLM(transformers.GPTJConfig(**GPT, rotary_dim=4)),
    "gpt_neo": lambda: transformers.GPTNeoForCausalLM(transformers.GPTNeoConfig(**NEO)),
    "openai": lambda: transformers.OpenAIGPTLMHeadModel(transformers.OpenAIGPTConfig(**GPT)),
    "deberta_v2": lambda: transformers.DebertaV2ForMaskedLM(transformers.DebertaV2Config(**DEBERTA)),
    "mpnet": lambda: transformers.MPNetForMaskedLM(transformers.MPNetConfig(**SMALL)),
    "falcon": lambda: transformers.FalconForCausalLM(transformers.FalconConfig(**FALCON)),
    "falcon_alibi": lambda: transformers.FalconForCausalLM(
        transformers.FalconConfig(**FALCON, alibi=True, attn_implementation="eager")
    ),
    "xlnet": lambda: transformers.XLNetLMHeadModel(transformers.XLNetConfig(**XLNET)),
    "funnel": lambda: transformers.FunnelForMaskedLM(transformers.FunnelConfig(**FUNNEL)),
    "fsmt": lambda: transformers.FSMTForConditionalGeneration(transformers.FSMTConfig(**FSMT)),
}
CAUSAL = ("bloom", "gptj", "gpt_neo", "falcon", "falcon_alibi")


def made(name):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MODELS[name]().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        return model


def tokens(rows=3, columns=6):
    generator = torch.Generator().manual_seed(0)
    return {"input_ids": torch.randint(5, 100, (rows, columns), generator=generator)}


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def prefixed(model, name="p", seed=3, method=None, length=3):
    adapter = inlay.attach(model, method or inlay.Prefix(length=length), name=name, head=None)
    shake(adapter, seed)
    return adapter


def written_out(scores, q, k, v, extra, scale):
    """softmax over [P_k; k], then [P_v; v]; `scores` is the function from q kᵀ to the model's own scores."""
    p_k, p_v = extra
    whole = torch.cat([q @ p_k.mT * scale, scores(q @ k.mT)], -1)
    return whole.softmax(-1) @ torch.cat([p_v.expand(len(v), -1, -1, -1), v], 2)


def by_method(scores):
    """The oracle of models that have a method for the attention itself."""

    def install(module, extra):
        def attend(self, query, key, value, attention_mask=None, *args, **kwargs):
            old = isinstance(self, transformers.models.openai.modeling_openai.Attention)
            key = key.mT if old else key
            scale = scores(self, 1.0, None)
            out = written_out(lambda s: scores(self, s, attention_mask), query, key, value, extra, scale)
            return [out] if old else (out, None)

        module._attn = MethodType(attend, module)

    return install


def gptj(module, s, mask):
    return s / module.scale_attn if mask is None else s / module.scale_attn + mask


def gpt_neo(module, s, mask):
    if not isinstance(s, torch.Tensor):
        return s
    seen = module.bias[:, :, : s.shape[-2], : s.shape[-1]]
    s = s.masked_fill(~seen, -1e30)
    return s if mask is None else s + mask


def openai(module, s, mask):
    s = s / math.sqrt(8)
    if not isinstance(s, torch.Tensor):
        return s
    s = s.masked_fill(module.bias[:, :, : s.shape[-2], : s.shape[-1]] == 0, -1e4)
    return s if mask is None else s + mask


def bloom(module, extra):
    def forward(self, hidden_states, residual, alibi, attention_mask, **kwargs):
        q, k, v = self._reshape(self.query_key_value(hidden_states))
        bias = alibi.view(len(q), self.num_heads, 1, -1) + (0 if attention_mask is None else attention_mask)
        scale = 1 / math.sqrt(self.head_dim)
        out = written_out(lambda s: s * scale + bias, q, k, v, extra, scale)
        out = self.dense(out.transpose(1, 2).flatten(2))
        return residual + out, None

    module.forward = MethodType(forward, module)


def deberta_v2(module, extra):
    def forward(
        self, hidden_states, attention_mask, output_attentions=False, query_states=None, relative_pos=None,
        rel_embeddings=None,
    ):  # fmt: skip
        heads = self.num_attention_heads
        q, k, v = (
            self.transpose_for_scores(proj(hidden_states), heads)
            for proj in (self.query_proj, self.key_proj, self.value_proj)
        )
        bias = self.disentangled_attention_bias(q, k, relative_pos, rel_embeddings, 3)
        q, k, v, bias = (t.view(-1, heads, *t.shape[1:]) for t in (q, k, v, bias))
        scale = 1 / math.sqrt(3 * q.shape[-1])
        masked = lambda s: (s * scale + bias).masked_fill(~attention_mask.bool(), -1e30)  # noqa: E731
        out = written_out(masked, q, k, v, extra, scale)
        return out.transpose(1, 2).flatten(2), None

    module.forward = MethodType(forward, module)


ORACLES = {
    "bloom": bloom, "deberta_v2": deberta_v2, "gptj": by_method(gptj), "gpt_neo": by_method(gpt_neo),
    "openai": by_method(openai),
}  # fmt: skip


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ORACLES)
def test_logits_and_gradients_equal_attention_written_out(name, padded):
    model = made(name)
    inputs = tokens()
    if padded:
        mask = torch.ones_like(inputs["input_ids"])
        mask[0, : 2 if name in CAUSAL else 0] = mask[1, 4 if name not in CAUSAL else 6 :] = 0
        inputs["attention_mask"] = mask
    adapter = prefixed(model)
    plain = without_adapters(model)
    modules, leaves = dict(plain.named_modules()), {}
    for site, piece in zip(adapter.sites, adapter.pieces.values(), strict=True):
        own = {n: p.detach().clone().requires_grad_() for n, p in piece.named_parameters()}
        leaves |= {f"{site.leave}.{n}": p for n, p in own.items()}
        extra = tuple(own[n].view(3, 4, -1).transpose(0, 1)[None] for n in ("P_k", "P_v"))
        ORACLES[name](modules[site.leave], extra)
    got, expected = model(**inputs).logits, plain(**inputs).logits
    real = inputs["attention_mask"].bool() if padded else slice(None)
    torch.testing.assert_close(got[real], expected[real], rtol=1e-4, atol=1e-4)
    weight = torch.randn(expected[real].shape, generator=torch.Generator().manual_seed(1))
    (got[real] * weight).sum().backward()
    (expected[real] * weight).sum().backward()
    for site, piece in zip(adapter.sites, adapter.pieces.values(), strict=True):
        for n, p in piece.named_parameters():
            other = leaves[f"{site.leave}.{n}"].grad
            assert other.any(), n
            assert (p.grad - other).norm() <= 1e-3 * other.norm(), (site.leave, n)


@pytest.mark.parametrize("name", MODELS)
def test_rows_of_a_mixed_batch_equal_the_rows_alone_and_all_of_it_comes_off(name):
    model = made(name)
    keys, inputs = list(model.state_dict()), tokens(rows=5)
    base = logits(model, inputs)
    prefixed(model, "a", 1)
    prefixed(model, "b", 2, length=5)
    prefixed(model, "g", 4, method=inlay.Inlay(form="kv", size=2, composition="gated", gate="per_token"))
    prefixed(model, "h", 5, method=inlay.MultiHead(length=2))
    rows = ["b", None, ("a", "h"), "g", "b"]
    with inlay.use(model, rows):
        mixed = logits(model, inputs)
    for i, names in enumerate(rows):
        with inlay.use(model, names):
            alone = logits(model, inputs)
            torch.testing.assert_close(mixed[i], alone[i], rtol=1e-5, atol=1e-5, msg=f"row {i}")
            assert names is None or not torch.allclose(alone, base, atol=1e-3)
    inlay.detach(model)
    assert torch.equal(logits(model, inputs), base)
    assert list(model.state_dict()) == keys
    assert not any(isinstance(m, SoftmaxHost) for m in model.modules())


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", CAUSAL)
def test_generate_with_left_padding_and_a_cache_equals_rows_alone_without(name, beams):
    model = made(name)
    prefixed(model, "a", 1, length=4)
    ids = tokens(rows=2)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "num_beams": beams}
    with inlay.use(model, ["a", None]):
        both = model.generate(input_ids=ids, attention_mask=mask, **options)
    for row, names in enumerate(("a", None)):
        with inlay.use(model, names):
            alone = model.generate(input_ids=ids[row][mask[row].bool()][None], use_cache=False, **options)
        assert torch.equal(both[row, -4:], alone[0, -4:]), names


@pytest.mark.parametrize("name", ["gptj", "deberta_v2", "xlnet", "falcon"])
def test_save_load_copy_and_checkpointing(name, tmp_path):
    model = made(name)
    adapter, inputs = prefixed(model), tokens()
    before = logits(model, inputs)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other, inputs), before)
    adapter.save(tmp_path / "p")
    inlay.detach(model)
    inlay.load(model, tmp_path / "p")
    assert torch.equal(logits(model, inputs), before)


def test_gradient_checkpointing_gives_equal_gradients():
    model = made("gptj").train()
    adapter, inputs = prefixed(model), tokens()
    found = []
    for _ in range(2):
        model.zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        found.append([p.grad.clone() for p in adapter.parameters()])
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_the_prefix_of_real_words_stands_for_the_words():
    """GPT-J rotates its keys, so with positions shifted by hand the words' keys are the words themselves."""
    model = made("gptj")
    words, text = torch.randint(5, 100, (1, 4)), torch.randint(5, 100, (1, 6))
    whole = logits(model, {"input_ids": torch.cat([words, text], 1)})[:, 4:]
    adapter = inlay.attach(model, inlay.Prefix(length=4), head=None)
    assert inlay.init_prefix_from_words(adapter, words[0]) == 0.0
    shifted = logits(model, {"input_ids": text, "position_ids": torch.arange(4, 10)[None]})
    torch.testing.assert_close(shifted, whole, rtol=1e-4, atol=1e-4)


def test_compile_runs_around_such_a_module():
    model = made("gptj")
    prefixed(model)
    inputs = tokens()
    expected = logits(model, inputs)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(logits(compiled, inputs), expected)


class Scoring(nn.Module):
    """One block whose attention goes from scores to shares as `how` says."""

    def __init__(self, how):
        super().__init__()
        self.words = nn.Embedding(20, 8)
        self.blocks = nn.ModuleList([Block(how)])

    def forward(self, input_ids):
        h = self.words(input_ids)
        for block in self.blocks:
            h = block(h)
        return h


class Block(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.attention, self.up, self.down = Attention(how), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, h):
        h = h + self.attention(h)
        return h + self.down(F.gelu(self.up(h)))


class Attention(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.how = how

    def forward(self, h):
        q, k, v = (p(h).unflatten(-1, (2, 4)).transpose(1, 2) for p in (self.q, self.k, self.v))
        s = self.how(q @ k.mT / 2)
        return self.o((s @ v).transpose(1, 2).flatten(2))


REFUSED = {
    "sort": (lambda s: s.sort(-1).values.softmax(-1), "sort"),
    "sigmoid before": (lambda s: (s.sigmoid() * 3).softmax(-1), "sigmoid"),
    "a number for each key": (lambda s: (s * torch.linspace(1, 2, s.shape[-1])).softmax(-1), "a number for each key"),
    "softmax over queries": (lambda s: s.softmax(-2), "another axis"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_scores_that_cannot_be_followed_are_refused_by_name(case):
    how, word = REFUSED[case]
    model = Scoring(how)
    example = {"input_ids": torch.arange(6)[None]}
    before = {n: type(m) for n, m in model.named_modules()}
    try:
        inlay.attach(model, inlay.Prefix(length=2), example=example)
    except SiteError:
        pass  # the anatomy saw already that there is no softmax over keys
    else:
        with pytest.raises(AttachmentError, match=word):
            model(**example)
        inlay.detach(model)
    assert {n: type(m) for n, m in model.named_modules()} == before


FOLLOWED = {
    "soft cap": lambda s: (4 * torch.tanh(s / 4)).softmax(-1),
    "in place": lambda s: s.mul_(2).add_(torch.arange(6.0)).softmax(-1),
    "shifted by the largest": lambda s: (s - s.amax(-1, keepdim=True)).softmax(-1),
    "merged heads": lambda s: s.view(-1, *s.shape[2:]).softmax(-1).view_as(s),
    "masked twice": lambda s: F.softmax(s.masked_fill(MASK, -1e9), -1).masked_fill(MASK, 0.0),
    "where": lambda s: torch.where(MASK, torch.tensor(-1e9), s.float()).softmax(-1, dtype=torch.float32).type_as(s),
    "negated order": lambda s: (torch.arange(6.0) + s).softmax(dim=3),
}
MASK = torch.ones(6, 6, dtype=torch.bool).triu(1)
CAPPED = {"soft cap": lambda p: 4 * torch.tanh(p / 4), "in place": lambda p: p * 2}


@pytest.mark.parametrize("case", FOLLOWED)
def test_every_way_of_scoring_that_is_followed_gives_the_joint_softmax(case):
    """The scores the module would have, written out beside those of the prefix, and one softmax over both."""
    how = FOLLOWED[case]
    torch.manual_seed(0)
    model = Scoring(how)
    ids = torch.arange(6)[None]
    adapter = inlay.attach(model, inlay.Prefix(length=2), example={"input_ids": ids})
    shake(adapter)
    got = model.blocks[0].attention(x := torch.randn(3, 6, 8))
    base, piece = without_adapters(model).blocks[0].attention, next(iter(adapter.pieces.values()))
    p_k, p_v = (getattr(piece, n).view(2, 2, 4).transpose(0, 1) for n in ("P_k", "P_v"))
    q, k, v = (p(x).unflatten(-1, (2, 4)).transpose(1, 2) for p in (base.q, base.k, base.v))
    shares = how(q @ k.mT / 2)
    with torch.no_grad():
        scores = _before_softmax(how, q @ k.mT / 2)
    extra = CAPPED.get(case, lambda p: p)(q @ p_k.mT / 2)
    if case == "shifted by the largest":
        extra = extra - (q @ k.mT / 2).amax(-1, keepdim=True)
    gate = torch.sigmoid(extra.logsumexp(-1, keepdim=True) - scores.logsumexp(-1, keepdim=True))
    out = (1 - gate) * (shares @ v) + gate * (extra.softmax(-1) @ p_v)
    torch.testing.assert_close(got, base.o(out.transpose(1, 2).flatten(2)), rtol=1e-5, atol=1e-5)


def _before_softmax(how, s):
    """What `how` gives its softmax."""
    seen = []
    before = torch.nn.functional.softmax, torch.Tensor.softmax

    def note(x, *args, **kwargs):
        seen.append(x.clone())
        return torch.softmax(x, -1)

    try:
        torch.nn.functional.softmax = torch.Tensor.softmax = note
        how(s)
    finally:
        torch.nn.functional.softmax, torch.Tensor.softmax = before
    return seen[0].view_as(s)
