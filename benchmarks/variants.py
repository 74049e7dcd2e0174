"""The same model with each method, from inlay and from PEFT, ready for training steps.

    frozen      no adapter: forward, and backward through to the embeddings' output
    full        every weight trained
    inlay       the method attached by inlay
    peft        PEFT as it comes
    peft best   PEFT with the adapter in the dtype of the base (autocast_adapter_dtype=False) and, where that computes
                exactly, with torch's switch of fp32 products to oneDNN

All come from one seed: the base weights are equal, and LoRA's factors are copied from inlay's adapter to PEFT's.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import inlay
from inlay.quant import NF4, quantize

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, ALPHA, LENGTH, BOTTLENECK = 16, 32, 20, 64
METHODS = ("lora", "dora", "adalora", "ia3", "bottleneck", "prefix", "prompt", "bitfit", "qlora")
NOT_IN_PEFT = ("bottleneck", "bitfit")
NAMES = ("frozen", "full", "inlay", "peft", "peft best")


@dataclass(frozen=True)
class Size:
    """A Llama shape and a batch of it."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    rows: int
    length: int

    @property
    def tokens(self) -> int:
        """Tokens in one step."""
        return self.rows * self.length


SIZES = {
    "tiny": Size(64, 176, 4, 4, 4, 256, 1, 16),
    "small": Size(384, 1024, 6, 6, 6, 1024, 4, 32),
    "large": Size(1024, 2816, 3, 8, 8, 4096, 4, 128),
}


@dataclass(eq=False)
class Variant:
    """One model that takes steps."""

    name: str
    model: Any
    batch: dict[str, Tensor]
    device: str
    optimizer: torch.optim.Optimizer | None
    switch: bool = False
    after: Any = None
    loss: float = float("nan")
    split: dict[str, list[float]] = field(default_factory=dict)

    def forward(self) -> Tensor:
        """The loss."""
        loss: Tensor = self.model(**self.batch).loss
        return loss

    def step(self) -> None:
        """One training step; milliseconds of its parts are appended to `split`."""
        with fp32_switch(self.switch):
            marks = [self._now()]
            loss = self.forward()
            marks.append(self._now())
            loss.backward()
            marks.append(self._now())
            if self.optimizer is not None:
                self.optimizer.step()
                if self.after is not None:
                    self.after()
                self.optimizer.zero_grad(set_to_none=True)
            elif self.batch.get("inputs_embeds") is not None:
                self.batch["inputs_embeds"].grad = None
            marks.append(self._now())
        self.loss = float(loss.detach())
        for part, start, end in zip(("forward", "backward", "optimizer"), marks, marks[1:], strict=False):
            self.split.setdefault(part, []).append((end - start) * 1e3)

    def _now(self) -> float:
        # With one thread processor time (user and system), which other processes on the machine disturb least.
        if self.device == "cpu" and torch.get_num_threads() == 1:
            return time.process_time()
        if self.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter()


@contextmanager
def fp32_switch(on: bool) -> Iterator[None]:
    """torch's switch of fp32 products to oneDNN, while it is on."""
    settings: Any = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    if on:
        settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


def switch_is_exact() -> bool:
    """Whether the switch leaves fp32 products exact; with AMX they are really computed in bf16."""
    a, b = torch.randn(256, 256), torch.randn(256, 256)
    with fp32_switch(True):
        quick = a @ b
    exact = a.double() @ b.double()
    return float((quick - exact).norm() / exact.norm()) < 1e-5


def base(size: Size, dtype: torch.dtype, device: str = "cpu", biases: bool = False) -> Any:
    """A Llama with random weights, in training mode."""
    transformers.logging.set_verbosity_error()
    config = transformers.LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.ffn,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        vocab_size=size.vocab,
        attention_bias=biases,
        mlp_bias=biases,
        use_cache=False,
        max_position_embeddings=8192,
    )
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = transformers.LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    return model.train()


def batch_of(size: Size, device: str = "cpu") -> dict[str, Tensor]:
    """Token ids and labels."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, size.vocab, (size.rows, size.length), generator=generator).to(device)
    return {"input_ids": ids, "labels": ids}


def adam(parameters: Any) -> torch.optim.Optimizer:
    """The optimizer of all variants."""
    return torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=1e-4, fused=True)


def make(name: str, method: str, size: Size, dtype: torch.dtype, dropout: float = 0.0, device: str = "cpu") -> Variant:
    """One variant of a method; `NotImplementedError` where PEFT has no such method."""
    quantised, biases = method == "qlora", method == "bitfit"
    batch = batch_of(size, device)
    if name in ("frozen", "full"):
        model = base(size, dtype, device, biases)
        if name == "full":
            return Variant(name, model, batch, device, adam(model.parameters()))
        model.requires_grad_(False)
        if quantised:
            quantize(model, NF4())
        embeds = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
        return Variant(name, model, {"inputs_embeds": embeds, "labels": batch["labels"]}, device, None)
    if name == "inlay":
        model = base(size, dtype, device, biases)
        if quantised:
            quantize(model, NF4())
        torch.manual_seed(2)
        adapter = inlay.attach(model, ours(method, dropout))
        return Variant(name, model, batch, device, adam(adapter.parameters()))
    if method in NOT_IN_PEFT:
        raise NotImplementedError(f"PEFT has no {method}")
    best = name == "peft best"
    model = theirs(base(size, dtype, device), method, dropout, dtype, autocast=not best)
    optimizer, after = adam(model.parameters()), None
    if method == "adalora":
        counter = iter(range(10**6))

        def after() -> None:
            model.base_model.update_and_allocate(next(counter))

    switch = best and dtype == torch.float32 and device == "cpu" and switch_is_exact()
    return Variant(name, model, batch, device, optimizer, switch, after)


def ours(method: str, dropout: float = 0.0) -> inlay.Method:
    """The method as inlay writes it."""
    lora = {"rank": RANK, "alpha": ALPHA, "dropout": dropout}
    made: dict[str, Any] = {
        "lora": lambda: inlay.LoRA(**lora),
        "qlora": lambda: inlay.LoRA(**lora),
        "dora": lambda: inlay.DoRA(**lora),
        "adalora": lambda: inlay.AdaLoRA(init_rank=RANK, target_rank=RANK // 2, total_steps=1000, dropout=dropout),
        "ia3": lambda: inlay.IA3(),
        "bottleneck": lambda: inlay.Bottleneck(size=BOTTLENECK),
        "prefix": lambda: inlay.Prefix(length=LENGTH),
        "prompt": lambda: inlay.Prompt(length=LENGTH),
        "bitfit": lambda: inlay.BitFit(),
    }
    method_: inlay.Method = made[method]()
    return method_


def theirs(model: Any, method: str, dropout: float, dtype: torch.dtype, autocast: bool) -> Any:
    """The method as PEFT writes it, with the settings of ours."""
    import peft

    task = {"task_type": "CAUSAL_LM"}
    lora = {"r": RANK, "lora_alpha": ALPHA, "target_modules": TARGETS, "lora_dropout": dropout, **task}
    adalora = {"init_r": RANK, "target_r": RANK // 2, "total_step": 1000, "tinit": 100, "tfinal": 300, "deltaT": 10}
    made: dict[str, Any] = {
        "lora": lambda: peft.LoraConfig(**lora),
        "qlora": lambda: peft.LoraConfig(**lora),
        "dora": lambda: peft.LoraConfig(**lora, use_dora=True),
        "adalora": lambda: peft.AdaLoraConfig(
            **adalora, lora_alpha=ALPHA, target_modules=TARGETS, lora_dropout=dropout, **task
        ),
        "ia3": lambda: peft.IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], **task
        ),
        "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=LENGTH, **task),
        "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=LENGTH, **task),
    }
    if method == "qlora":
        bitsandbytes_base(model, dtype)
    torch.manual_seed(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, made[method](), autocast_adapter_dtype=autocast)


def bitsandbytes_base(model: nn.Module, dtype: torch.dtype) -> None:
    """The projections in bitsandbytes' NF4 with double quantisation, the head dense: as inlay.quantize does it."""
    import bitsandbytes as bnb

    model.requires_grad_(False)
    for path, leaf in [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in n]:
        made = bnb.nn.Linear4bit(
            leaf.in_features, leaf.out_features, bias=leaf.bias is not None, compute_dtype=dtype, quant_type="nf4"
        )
        weight = leaf.weight.detach()
        made.weight = bnb.nn.Params4bit(
            weight.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=True, module=made
        )
        if leaf.bias is not None:
            made.bias = leaf.bias
        model.set_submodule(path, made.to(weight.device))


def copy_lora(source: Variant, target: Variant) -> None:
    """Give PEFT's LoRA the factors of inlay's, by name."""
    with torch.no_grad():
        for name, parameter in inlay.adapters(source.model)["default"].named_parameters():
            path, letter = name.split(".lora.")
            target.model.get_submodule(f"base_model.model.{path}.lora_{letter}.default").weight.copy_(parameter)


def gradient_norm(variant: Variant) -> float:
    """Norm of all gradients of one backward pass, in eval mode for methods with dropout."""
    with fp32_switch(variant.switch):
        variant.forward().backward()
    squares = [p.grad.double().square().sum() for p in variant.model.parameters() if p.grad is not None]
    variant.model.zero_grad(set_to_none=True)
    return float(torch.stack(squares).sum().sqrt())
