"""PEFT's folders against PEFT itself: its folders give its logits here, ours give our logits there."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import inlay
from comparing import bits, logits, randomise, same_bits
from inlay.errors import FormatError
from tiny import batch, tiny

peft = pytest.importorskip("peft")

TASKS = {"cls": "SEQ_CLS", "token": "TOKEN_CLS", "seq2seq": "SEQ_2_SEQ_LM", "causal": "CAUSAL_LM"}


def fill(model: nn.Module, names: tuple[str, ...] = ("lora_", "ia3_", "prompt_encoder", "modules_to_save")) -> None:
    """Random values in every tensor that PEFT saves; initial ones would prove nothing."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(n in name for n in names) or parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


def theirs(family: str, task: str | None, config: Any, folder: Path, *, ours: dict[str, Any] | None = None) -> Tensor:
    """Writes a PEFT folder with random tensors and returns PEFT's logits for it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(tiny(family, task, **(ours or {})), config).eval()
        fill(model)
        model.save_pretrained(folder)
    return logits_of(model)


def logits_of(model: nn.Module) -> Tensor:
    base = model.get_base_model()
    with torch.no_grad():
        # With labels, PEFT's AdaLoRA looks for an adapter in training and fails.
        return model(**batch(base, labels=base.config.is_encoder_decoder)).logits


def in_peft(family: str, task: str | None, folder: Path, *, ours: dict[str, Any] | None = None) -> Tensor:
    """What PEFT computes with a folder that inlay wrote. A warning of a missing or unexpected key is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")
        warnings.filterwarnings("ignore", "The following rank_pattern keys")  # also for PEFT's own AdaLoRA folders
        model = peft.PeftModel.from_pretrained(tiny(family, task, **(ours or {})), folder).eval()
    return logits_of(model)


LORA: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "llama": ("llama", None, {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "rslora": ("llama", None, {"r": 4, "lora_alpha": 3, "use_rslora": True, "target_modules": ["q_proj"]}),
    "dora": ("llama", None, {"r": 4, "use_dora": True, "target_modules": ["q_proj", "up_proj"]}),
    "dora and bias": ("bert", "cls", {"r": 4, "use_dora": True, "target_modules": ["query", "output.dense"]}),
    "dora on fused conv1d": (
        "gpt2",
        None,
        {"r": 4, "use_dora": True, "target_modules": ["c_attn"], "fan_in_fan_out": True},
    ),
    "fused": ("gpt2", None, {"r": 4, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "embedding": ("bert", "mlm", {"r": 4, "target_modules": ["word_embeddings", "query"]}),
    "dora embedding": ("bert", "mlm", {"r": 4, "use_dora": True, "target_modules": ["word_embeddings", "query"]}),
    "bias all": ("bert", "cls", {"r": 4, "bias": "all", "target_modules": ["query"]}),
    "bias lora_only": ("bert", "cls", {"r": 4, "bias": "lora_only", "target_modules": ["query", "key"]}),
    "patterns": (
        "llama",
        None,
        {
            "r": 4,
            "lora_alpha": 16,
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"v_proj": 2, r"layers\.1\.self_attn\.q_proj": 6},
            "alpha_pattern": {"layers.0.self_attn.v_proj": 5},
        },
    ),
    "layers": ("llama", None, {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "regex": ("llama", None, {"r": 4, "target_modules": r".*\.1\.(self_attn\.[qk]_proj|mlp\..*_proj)"}),
    "excluded": (
        "llama",
        None,
        {"r": 4, "target_modules": ["q_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
    ),
    "all linear": ("gpt_neox", None, {"r": 4, "target_modules": "all-linear"}),
    "head": ("roberta", "cls", {"r": 4, "target_modules": ["query"]}),
    "token head": ("bert", "token", {"r": 4, "target_modules": ["value"]}),
    "modules to save": ("llama", None, {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "tied head": (
        "gpt2",
        None,
        {"r": 4, "target_modules": ["c_proj"], "modules_to_save": ["lm_head"], "fan_in_fan_out": True},
    ),
    "encoder and decoder": ("t5", None, {"r": 4, "target_modules": ["q", "wo"]}),
    "bart": ("bart", "cls", {"r": 4, "target_modules": ["q_proj", "fc2"], "modules_to_save": ["classification_head"]}),
}


@pytest.mark.parametrize("case", LORA)
@pytest.mark.proves("PEFT in/out", "lora", "dora")
def test_lora_from_peft_and_back(case, tmp_path):
    family, task, settings = LORA[case]
    config = peft.LoraConfig(task_type=TASKS.get(task or "causal"), **settings)
    config.task_type = TASKS.get(task) if task else ("SEQ_2_SEQ_LM" if family == "t5" else "CAUSAL_LM")
    there_and_back(family, task, config, tmp_path)


def there_and_back(family: str, task: str | None, config: Any, tmp_path: Path, **ours: Any) -> inlay.Adapter:
    expected = theirs(family, task, config, tmp_path / "peft", ours=ours)
    model = tiny(family, task, **ours)
    plain, before = logits(model), bits(model)
    assert not torch.allclose(expected, plain, atol=1e-2), "the adapter does nothing, so nothing is proven"
    adapter = inlay.load(model, tmp_path / "peft")
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    adapter.save(tmp_path / "ours", format="peft")
    adapter.save(tmp_path / "again", format="peft")
    for file in (tmp_path / "ours").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
    torch.testing.assert_close(in_peft(family, task, tmp_path / "ours", ours=ours), expected, atol=1e-5, rtol=1e-5)
    adapter.detach()
    assert same_bits(model, before)
    return adapter


@pytest.mark.parametrize(
    ("family", "task", "settings"),
    [
        ("llama", None, {}),
        ("llama", None, {"target_modules": ["q_proj", "o_proj", "up_proj"], "feedforward_modules": ["up_proj"]}),
        ("gpt2", None, {"fan_in_fan_out": True}),
        ("bert", "cls", {"target_modules": ["key", "value", "output.dense"], "feedforward_modules": ["output.dense"]}),
        ("t5", None, {}),
        ("bart", None, {}),
    ],
)
@pytest.mark.proves("PEFT in/out", "ia3")
def test_ia3_from_peft_and_back(family, task, settings, tmp_path):
    kind = "SEQ_CLS" if task else "SEQ_2_SEQ_LM" if family in ("t5", "bart") else "CAUSAL_LM"
    there_and_back(family, task, peft.IA3Config(task_type=kind, **settings), tmp_path)


@pytest.mark.parametrize("alpha", [8, 3, 0])
@pytest.mark.proves("PEFT in/out", "adalora")
def test_adalora_keeps_its_divisor_and_its_ranks(alpha, tmp_path):
    config = peft.AdaLoraConfig(
        init_r=6, target_r=3, lora_alpha=alpha, tinit=1, tfinal=1, total_step=6, deltaT=1, task_type="CAUSAL_LM",
        target_modules=["q_proj", "v_proj", "down_proj"],
    )  # fmt: skip
    model = tiny("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained = peft.get_peft_model(model, config)
        optimizer = torch.optim.SGD([p for p in trained.parameters() if p.requires_grad], 1e-1)
        for step in range(6):
            trained(**batch(model)).loss.backward()
            optimizer.step()
            trained.base_model.update_and_allocate(step)
            optimizer.zero_grad()
        trained.eval()
        fill(trained)
        allocator, pattern = trained.base_model.rankallocator, trained.peft_config["default"].rank_pattern
        allocator.mask_using_rank_pattern(trained.base_model.model, pattern)
        # Read again, PEFT would take the kept rank for an alpha of 0, and compute something else than was trained.
        expected = logits_of(trained)
        trained.save_pretrained(tmp_path / "peft")
    kept = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["rank_pattern"]
    assert len({sum(mask) for mask in kept.values()}) > 1, "all modules kept the same rank: nothing is proven"
    ours = tiny("llama")
    adapter = inlay.load(ours, tmp_path / "peft")
    torch.testing.assert_close(logits(ours), expected, atol=1e-5, rtol=1e-5)
    adapter.save(tmp_path / "ours", format="peft")
    torch.testing.assert_close(in_peft("llama", None, tmp_path / "ours"), expected, atol=1e-5, rtol=1e-5)


OURS: dict[str, tuple[str, str | None, inlay.Method]] = {
    "parts of a fused projection": (
        "gpt2",
        None,
        inlay.LoRA(rank={"attn.q": 2, "default": 3}, sites=("attn.q", "attn.v")),
    ),
    "dora on parts of a fused projection": ("gpt2", None, inlay.DoRA(rank=2, sites=("attn.q", "attn.v", "ffn.up"))),
    "two pairs at one module": ("llama", None, inlay.LoRA(rank=2, sites="attn.q") + inlay.LoRA(rank=3, sites="linear")),
    "embedding and all linear": ("llama", None, inlay.LoRA(rank=2, rslora=True, sites=("linear", "embed"))),
    "scaled embedding": ("bart", None, inlay.LoRA(rank=2, sites=("embed", "attn.q"))),
    "trained norms": ("llama", None, inlay.LoRA(rank=2) + inlay.Full(sites="norm")),
    "all biases": ("bert", "cls", inlay.LoRA(rank=2, sites="attn.q") + inlay.BitFit()),
    "some biases": ("bert", "cls", inlay.LoRA(rank=2, sites="attn.q") + inlay.BitFit(sites=("attn.q", "ffn.up"))),
    "biases of the adapted": ("bert", "token", inlay.LoRA(rank=2, sites="attn.q") + inlay.BitFit(sites="attn.q")),
    "layers": ("gpt_neox", None, inlay.LoRA(rank=2, sites="ffn.up", layers=(-1,))),
    "roberta": ("roberta", "cls", inlay.LoRA(rank=2, sites="attn.v")),
    "ia3 on a fused projection": ("gpt2", None, inlay.IA3()),
    "ia3": ("modernbert", "cls", inlay.IA3()),
    "adalora": ("opt", None, inlay.AdaLoRA(init_rank=4, target_rank=2)),
    "t5 classifier": ("t5", "cls", inlay.LoRA(rank=2, sites=("attn.q", "cross.v"))),
}


@pytest.mark.parametrize("case", OURS)
def test_ours_in_peft_and_back(case, tmp_path):
    family, task, method = OURS[case]
    ours = {"scale_embedding": True} if case == "scaled embedding" else {}
    model = tiny(family, task, **ours)
    plain = logits(model)
    adapter = randomise(inlay.attach(model, method))
    expected = logits(model)
    assert not torch.allclose(expected, plain, atol=1e-2)
    adapter.save(tmp_path / "a", format="peft")
    torch.testing.assert_close(in_peft(family, task, tmp_path / "a", ours=ours), expected, atol=1e-5, rtol=1e-5)
    again = tiny(family, task, **ours)
    inlay.load(again, tmp_path / "a")
    torch.testing.assert_close(logits(again), expected, atol=1e-5, rtol=1e-5)


def test_saving_while_merged_writes_the_same_folder(tmp_path):
    model = tiny("bert", "cls")
    adapter = randomise(inlay.attach(model, inlay.LoRA(rank=2, sites="attn.q") + inlay.BitFit()))
    adapter.save(tmp_path / "before", format="peft")
    adapter.merge()
    adapter.save(tmp_path / "merged", format="peft")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "merged" / name).read_bytes()


@pytest.mark.parametrize(
    ("family", "method", "named"),
    [
        ("llama", inlay.Bottleneck(size=4), "this adapter is Bottleneck[.]"),
        ("llama", inlay.LoRA(rank=2) + inlay.Bottleneck(size=4), "is LoRA[+]Bottleneck[.]"),
        ("llama", inlay.LoRA(rank=2) + inlay.IA3(), "is LoRA[+]IA3[.]"),
        (
            "llama",
            inlay.LoRA(rank=2, sites="attn.q") + inlay.DoRA(rank=2, sites="attn.v"),
            "is LoRA[+]DoRA[.]",
        ),
        ("llama", inlay.LoRA(rank=2, sites="attn.q") + inlay.Full(sites="attn.q"), "adapted as well"),
        ("llama", inlay.Full(sites="norm"), "by itself"),
        ("bert", inlay.BitFit(), "by itself"),
        ("bert", inlay.IA3() + inlay.BitFit(), "is IA3[+]BitFit[.]"),
        ("llama", inlay.LoRA(rank=2) + inlay.BitFit(sites="attn.q", add_missing=True), "no place for a new one"),
        ("llama", inlay.IA3(sites="attn.q") + inlay.IA3(sites="attn.q:input"), "one of the two"),
        ("gpt2", inlay.AdaLoRA(sites="attn.q"), "fused"),
        ("gpt2", inlay.DoRA(sites="attn.q") + inlay.DoRA(sites="attn.q"), "several DoRA"),
    ],
)
def test_what_peft_has_no_place_for_is_refused_by_name(family, method, named, tmp_path):
    adapter = inlay.attach(tiny(family), method)
    with pytest.raises(FormatError, match=named):
        adapter.save(tmp_path / "a", format="peft")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("peft") / "lora"
    theirs("bert", "cls", peft.LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS"), path)
    return path


def damaged(folder: Path, to: Path, settings: dict[str, Any] | None = None, tensors: Any = None) -> Path:
    """A copy of a folder with some settings and tensors changed; None takes one away."""
    config = json.loads((folder / "adapter_config.json").read_text()) | (settings or {})
    held = load_file(folder / "adapter_model.safetensors")
    to.mkdir()
    (to / "adapter_config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    save_file(tensors(held) if tensors else held, to / "adapter_model.safetensors")
    return to


QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query"


def test_all_that_does_not_fit_is_listed_at_once_and_the_model_stays(folder, tmp_path):
    def change(held: dict[str, Tensor]) -> dict[str, Tensor]:
        del held[f"{QUERY}.lora_A.weight"]
        held[f"{QUERY}.lora_B.weight"] = torch.zeros(32, 7)
        held["base_model.model.bert.encoder.layer.0.attention.self.quary.lora_A.weight"] = torch.zeros(2, 32)
        held["somewhere.else"] = torch.zeros(1)
        del held["base_model.model.classifier.weight"]
        return held

    model = tiny("bert", "cls")
    classes = [type(m) for m in model.modules()]
    with pytest.raises(FormatError) as caught:
        inlay.load(model, damaged(folder, tmp_path / "x", tensors=change))
    for part in ("missing .*query.lora_A", "wrong shape .*query.lora_B.*7", "quary", "somewhere.else", "classifier"):
        assert re.search(part, str(caught.value)), part
    assert [type(m) for m in model.modules()] == classes
    assert inlay.adapters(model) == {}


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"use_qalora": True}, "use_qalora=true"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa"}, "path_initial_model_for_weight_conversion"),
        ({"layer_replication": [[0, 1], [0, 1]]}, "layer_replication"),
        ({"made_up": 3, "another": "x"}, r"(?s)another.*made_up"),
        ({"r": 3}, "wrong shape"),
        ({"rank_pattern": {"query": 5}}, "wrong shape"),
        ({"target_modules": ["query"]}, "not in target_modules"),
        ({"target_modules": ["query", "value", "key"]}, "key.*named in target_modules"),
        ({"bias": "all"}, r"missing .*bias"),
        ({"modules_to_save": ["classifier", "pooler"]}, "pooler.*modules_to_save"),
        ({"peft_type": "VERA"}, "VeRA"),
        ({"peft_type": "LORRA"}, "LORA"),
        ({"peft_type": ...}, "peft_type"),
    ],
)
def test_settings_that_would_change_the_result_are_refused_by_name(folder, settings, named, tmp_path):
    with pytest.raises(FormatError, match=named):
        inlay.load(tiny("bert", "cls"), damaged(folder, tmp_path / "x", settings))


def test_unknown_settings_at_their_defaults_are_ignored(folder, tmp_path):
    settings = {"new_in_2030": None, "another": False, "third": {}, "lora_alpha": 5, "peft_version": "9.9"}
    adapter = inlay.load(tiny("bert", "cls"), damaged(folder, tmp_path / "x", settings), "named")
    assert adapter.name == "named"
    assert adapter.method.alpha == 5


def test_files_that_are_not_there_or_not_whole(folder, tmp_path):
    for name, part in (("adapter_model.safetensors", "no adapter_model"), ("adapter_config.json", "holds neither")):
        broken = damaged(folder, tmp_path / name)
        (broken / name).unlink()
        with pytest.raises(FormatError, match=part):
            inlay.load(tiny("bert", "cls"), broken)
    broken = damaged(folder, tmp_path / "short")
    blob = (broken / "adapter_model.safetensors").read_bytes()
    (broken / "adapter_model.safetensors").write_bytes(blob[:-40])
    with pytest.raises(FormatError, match="not a complete"):
        inlay.load(tiny("bert", "cls"), broken)
    (broken / "adapter_model.safetensors").rename(broken / "adapter_model.bin")
    with pytest.raises(FormatError, match=r"adapter_model\.bin.*weights_only"):
        inlay.load(tiny("bert", "cls"), broken)
    (broken / "adapter_config.json").write_text("{")
    with pytest.raises(FormatError, match="JSON"):
        inlay.load(tiny("bert", "cls"), broken)


def test_another_base_is_refused_and_a_loaded_adapter_can_be_frozen(folder):
    with pytest.raises(FormatError, match="no such module"):
        inlay.load(tiny("roberta", "cls"), folder)
    with pytest.raises(FormatError, match="wrong shape"):
        inlay.load(tiny("bert", "cls", hidden_size=48), folder)
    adapter = inlay.load(tiny("bert", "cls"), folder, trainable=False)
    assert not any(p.requires_grad for p in adapter.parameters())
    assert adapter.name == "default"


def test_a_head_of_another_width_comes_along(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    expected = theirs("bert", "cls", config, tmp_path / "five", ours={"num_labels": 5})
    model, wider = tiny("bert", "cls"), tiny("bert", "cls", num_labels=5)
    model.bert.load_state_dict(wider.bert.state_dict())
    inlay.load(model, tmp_path / "five")
    with torch.no_grad():
        found = model(**batch(model, labels=False)).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_nothing_but_an_adapter_folder_is_replaced(tmp_path):
    adapter = inlay.attach(tiny("llama"), inlay.LoRA(rank=2))
    (tmp_path / "thesis.txt").write_text("do not lose me")
    with pytest.raises(FormatError, match="no PEFT folder"):
        adapter.save(tmp_path, format="peft")
    assert (tmp_path / "thesis.txt").read_text() == "do not lose me"


def test_layernorm_tuning_is_read(tmp_path):
    expected = theirs("llama", None, peft.LNTuningConfig(task_type="CAUSAL_LM"), tmp_path / "ln")
    model = tiny("llama")
    inlay.load(model, tmp_path / "ln")
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
