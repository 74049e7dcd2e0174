"""P-tuning: both encoders, what is stored, published counts, PEFT as oracle, places, tuning of the base as well."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn

import inlay
from inlay.errors import MethodError
from methods.test_prompt import LENGTH, peft_model
from tiny import batch, tiny


def piece_of(adapter):
    return next(p for p in adapter.pieces.values() if hasattr(p, "places"))


def bert_base(**config):
    with torch.device("meta"):
        return transformers.BertForMaskedLM(transformers.BertConfig(**{"num_hidden_layers": 1, **config}))


class TestCounts:
    @pytest.mark.proves("count", "ptuning")
    def test_lama_encoder_of_the_paper(self):
        """6,912 values are stored of 8,278,272 that are trained, with 9 tokens at width 768."""
        method = inlay.PTuning(template="{prompt:3} [MASK] {prompt:3} {subject} {prompt:3}")
        adapter = inlay.attach(bert_base(), method)
        assert adapter.trained_parameters == 8_278_272
        assert adapter.stored_parameters == 6_912

    def test_few_shot_encoder_is_twice_as_wide(self):
        adapter = inlay.attach(bert_base(), inlay.PTuning(template="{prompt:9} {text}", hidden=768))
        lstm = nn.LSTM(768, 768, 2, bidirectional=True, device="meta")
        expected = 9 * 768 + sum(p.numel() for p in lstm.parameters()) + 2 * 768 * 768 + 768 + 768 * 768 + 768
        assert adapter.trained_parameters == expected

    def test_mlp_alone(self):
        adapter = inlay.attach(bert_base(), inlay.PTuning(template="{prompt:9} {text}", encoder="mlp"))
        assert adapter.trained_parameters == 9 * 768 + 2 * (768 * 768 + 768)
        assert adapter.stored_parameters == 6_912


@pytest.mark.proves("oracle", "ptuning")
def test_the_encoder_is_the_published_one():
    """h = MLP(BiLSTM(E)), against a plain LSTM and the two layers written out."""
    adapter = inlay.attach(tiny("llama"), inlay.PTuning(template="{prompt:4} {text}"))
    own = {n.split(".encoder.")[1]: p.detach() for n, p in adapter.named_parameters()}
    lstm = nn.LSTM(32, 16, 2, bidirectional=True, batch_first=True)
    lstm.load_state_dict({n.removeprefix("lstm."): p for n, p in own.items() if n.startswith("lstm.")})
    hidden = lstm(own["E"][None])[0][0]
    h = torch.relu(hidden @ own["mlp.0.weight"].T + own["mlp.0.bias"]) @ own["mlp.2.weight"].T + own["mlp.2.bias"]
    torch.testing.assert_close(piece_of(adapter)(), h)
    adapter = inlay.attach(tiny("llama"), inlay.PTuning(template="{prompt:4} {text}", encoder="mlp"))
    own = {n.split(".encoder.")[1]: p.detach() for n, p in adapter.named_parameters()}
    h = torch.relu(own["E"] @ own["mlp.0.weight"].T + own["mlp.0.bias"]) @ own["mlp.2.weight"].T + own["mlp.2.bias"]
    torch.testing.assert_close(piece_of(adapter)(), h)


@pytest.mark.parametrize("encoder", ["MLP", "LSTM"])
@pytest.mark.parametrize(
    ("family", "task", "kind"),
    [("llama", "causal", "CAUSAL_LM"), ("bert", "token", "TOKEN_CLS"), ("t5", "seq2seq", "SEQ_2_SEQ_LM")],
)
@pytest.mark.proves("oracle", "ptuning")
def test_logits_equal_those_of_peft(family, task, kind, encoder):
    """PEFT's encoders have other layers, but what both store is the n x d result."""
    model = tiny(family, task)
    settings = {"encoder_reparameterization_type": encoder, "encoder_hidden_size": 24}
    theirs = peft_model(copy.deepcopy(model), "p_tuning", kind, **settings)
    method = inlay.PTuning(template=f"{{prompt:{LENGTH}}} {{text}}", places=((0, LENGTH),))
    adapter = inlay.attach(model, method, head=None)
    piece_of(adapter).load_stored({"h": theirs.get_prompt(batch_size=1)[0, :LENGTH].detach()})
    inputs = batch(model, labels=task != "token")
    with torch.no_grad():
        expected = theirs(**inputs).logits
        torch.testing.assert_close(
            model(**inputs).logits, expected if family == "t5" else expected[:, LENGTH:], rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("keep", [False, True])
def test_the_result_alone_is_stored_unless_training_shall_go_on(tmp_path, keep):
    model = tiny("bert", "mlm")
    adapter = inlay.attach(model, inlay.PTuning(template="{prompt:4} {text} {prompt:2}", dropout=0.2))
    model.eval()
    inputs = batch(model)
    logits = model(**inputs).logits
    model.train()
    adapter.save(tmp_path / "a", keep_training_state=keep)
    assert piece_of(adapter).encoder.training
    adapter.detach()
    model.eval()
    again = inlay.load(model, tmp_path / "a")
    assert torch.equal(model(**inputs).logits, logits)
    assert again.stored_parameters == 6 * 32
    assert (again.trained_parameters > 6 * 32) is keep
    model(**inputs).loss.backward()
    assert all(p.grad is not None for p in again.parameters())
    again.save(tmp_path / "b")
    again.detach()
    inlay.load(model, tmp_path / "b")
    assert torch.equal(model(**inputs).logits, logits)


def test_resumed_training_is_the_uninterrupted_one(tmp_path):
    def steps(model, adapter, optimizer, count):
        for _ in range(count):
            model(**batch(model)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    method = inlay.PTuning(template="{prompt:4} {text}")
    results = []
    for interrupted in (False, True):
        model = tiny("llama")
        torch.manual_seed(0)
        adapter = inlay.attach(model, method)
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.01)
        steps(model, adapter, optimizer, 2)
        if interrupted:
            adapter.save(tmp_path / "half", keep_training_state=True)
            state = optimizer.state_dict()
            adapter.detach()
            adapter = inlay.load(model, tmp_path / "half")
            optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.01)
            optimizer.load_state_dict(state)
        steps(model, adapter, optimizer, 2)
        results.append([p.detach().clone() for p in adapter.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_base_can_be_tuned_as_well():
    """As on SuperGLUE: prompt and model, each with a learning rate of its own."""
    model = tiny("bert", "mlm")
    expected = {n: p.clone() for n, p in model.state_dict().items()}
    adapter = inlay.attach(model, inlay.PTuning(template="{prompt:2} {text}", encoder="mlp") + inlay.Full())
    prompt = [p for n, p in adapter.named_parameters() if ".p_tuning." in n]
    rest = [p for n, p in adapter.named_parameters() if ".p_tuning." not in n]
    assert sum(p.numel() for p in rest) > 10_000
    inputs = batch(model)
    optimizer = torch.optim.AdamW([{"params": prompt, "lr": 1e-2}, {"params": rest, "lr": 1e-3}])
    losses = []
    for _ in range(8):
        losses.append(model(**inputs).loss)
        losses[-1].backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in prompt)
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.2
    with inlay.use(model, None):
        assert all(torch.equal(model.state_dict()[n], t) for n, t in expected.items())


def test_half_precision_and_autocast_run_the_encoder_in_full():
    model = tiny("llama", dtype=torch.bfloat16)
    adapter = inlay.attach(model, inlay.PTuning(template="{prompt:2} {text}"))
    with torch.autocast("cpu", torch.bfloat16):
        assert piece_of(adapter)().dtype == torch.float32
        model(**batch(model)).loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in adapter.parameters())


def test_encoders_have_their_special_tokens_outside():
    places = {}
    for family, task in [("llama", "causal"), ("bert", "mlm"), ("t5", "seq2seq")]:
        method = inlay.PTuning(template="{prompt:2} {prompt:1} {text} {prompt:3}", encoder="mlp")
        places[family] = piece_of(inlay.attach(tiny(family, task), method)).places
    assert places == {
        "llama": ((0, 2), (0, 1), (-1, 3)),
        "bert": ((1, 2), (1, 1), (-2, 3)),
        "t5": ((0, 2), (0, 1), (-1, 3)),
    }


def test_copies_and_compiled_models_agree():
    model = tiny("llama")
    inlay.attach(model, inlay.PTuning(template="{prompt:2} {text}"))
    inputs = batch(model, labels=False)
    logits = model(**inputs).logits
    assert torch.equal(copy.deepcopy(model)(**inputs).logits, logits)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**inputs).logits, logits, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"template": "{text}"}, "has no virtual tokens"),
        ({"template": "{prompt:0} {text}"}, "at least 1"),
        ({"template": "{prompt} {text}"}, "at least 1"),
        ({"template": "{prompt:3 {text}"}, "brace"),
        ({"template": "{prompt:3} {text}", "places": ((0, 2),)}, r"do not have the counts \(3,\)"),
        ({"encoder": "gru"}, "expected one of lstm, mlp, got 'gru'"),
    ],
)
def test_wrong_settings_are_refused(settings, words):
    with pytest.raises(MethodError, match=words):
        inlay.PTuning(**settings)
