"""The claims of the four survey articles that inlay implements, checked: which hold, and what can be computed here.

    python benchmarks/survey_claims.py            # writes docs/survey_claims.md

Counts are made on the meta device from configs, so nothing is downloaded. What needs weights of billions of parameters
is quoted from the papers and marked so; what is a behaviour names the test that shows it; what was trained or timed
here is the result that docs/reproductions.md and the pages of benchmarks/ have from the scripts that are named.
"""

from __future__ import annotations

import datetime
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from transformers import BartConfig, BertConfig, BloomConfig, GPT2Config, LlamaConfig, T5Config

import inlay

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "survey_claims.md"

LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
BERT, BERT_LARGE = BertConfig(), BertConfig(vocab_size=28996, **LARGE)
GPT2_MEDIUM = GPT2Config(n_embd=1024, n_layer=24, n_head=16)
T0_3B = {"d_model": 2048, "d_ff": 5120, "num_layers": 24, "num_heads": 32, "vocab_size": 32128}
MT0_XXL = {"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 250112}
GATED = {"d_kv": 64, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
BLOOMZ = BloomConfig(hidden_size=4096, n_layer=30, n_head=32, vocab_size=250880)
LLAMA_65B = LlamaConfig(hidden_size=8192, intermediate_size=22016, num_hidden_layers=80, num_attention_heads=64)


def on_meta(kind: type, config: object) -> torch.nn.Module:
    """A model without weights."""
    with torch.device("meta"):
        return kind(config)  # type: ignore[no-any-return]


def attached(kind: type, config: object, method: inlay.Method) -> inlay.Adapter:
    """An adapter on a model without weights."""
    return inlay.attach(on_meta(kind, config), method, head=None)


def share(kind: type, config: object, method: inlay.Method) -> str:
    """Stored parameters and their share of the base."""
    adapter = attached(kind, config, method)
    base = sum(p.numel() for n, p in adapter.model.named_parameters() if ".inlay." not in n)
    return f"{adapter.stored_parameters:,} = {100 * adapter.stored_parameters / base:.3f} %"


def bias_share(*sites: str) -> str:
    """BitFit on BERT base and large, all biases or those of some sites."""
    method = inlay.BitFit(sites=sites or None)
    return "; ".join(
        f"{name} {share(transformers.BertModel, config, method)}"
        for name, config in (("base", BertConfig(vocab_size=28996)), ("large", BERT_LARGE))
    )


def p_tuning_range() -> str:
    """P-tuning v2 on BERT-large with short and long prompts."""
    return "; ".join(
        f"n = {n}: {share(transformers.BertModel, BertConfig(**LARGE), inlay.PTuningV2(length=n))}" for n in (8, 128)
    )


def prompt_share() -> str:
    """Prompt tuning beside P-tuning v2 at one length."""
    return share(transformers.BertModel, BertConfig(**LARGE), inlay.Prompt(length=20, init="uniform"))


def prefix_counts() -> str:
    """A prefix as trained and as stored."""
    adapter = attached(transformers.GPT2LMHeadModel, GPT2_MEDIUM, inlay.Prefix(length=5, mid=512))
    return f"GPT-2 medium, n = 5, mid 512: {adapter.trained_parameters:,} trained, {adapter.stored_parameters:,} stored"


def lora_counts() -> str:
    """q and v at r 8 against q, k, v, o at r 4: the same budget."""
    two = attached(transformers.GPT2LMHeadModel, GPT2_MEDIUM, inlay.LoRA(rank=8, sites=("attn.q", "attn.v")))
    four = attached(
        transformers.GPT2LMHeadModel, GPT2_MEDIUM, inlay.LoRA(rank=4, sites=("attn.q", "attn.k", "attn.v", "attn.o"))
    )
    return f"GPT-2 medium: q, v at r 8 {two.trained_parameters:,}; q, k, v, o at r 4 {four.trained_parameters:,}"


def diff_pruning_cost() -> str:
    """What diff pruning trains: a difference and a gate for each weight."""
    adapter = attached(transformers.BertModel, BERT, inlay.DiffPruning(structured=False))
    weights = sum(p.numel() for n, p in adapter.model.named_parameters() if ".inlay." not in n)
    return f"BERT-base: {adapter.trained_parameters:,} trained for {weights:,} weights"


def llama_memory() -> str:
    """16-bit weights and gradients, and Adam's two moments in fp32."""
    count = sum(p.numel() for p in on_meta(transformers.LlamaForCausalLM, LLAMA_65B).parameters())
    return f"{count / 1e9:.3f} x 10^9 parameters x (2 + 2 + 8) bytes = {12 * count / 1e9:.0f} GB"


def table_of_peft() -> str:
    """What weights, gradients and Adam's moments take in fp32, and the weights alone with LoRA."""
    t5 = transformers.T5ForConditionalGeneration
    models = {
        "T0-3B": on_meta(t5, T5Config(**T0_3B, **GATED)),
        "mt0-xxl": on_meta(t5, T5Config(**MT0_XXL, **GATED)),
        "bloomz-7b1": on_meta(transformers.BloomForCausalLM, BLOOMZ),
    }
    counts = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    for name in ("T0-3B", "mt0-xxl"):  # whose output embedding is a matrix of its own, which this transformers ties
        head, table = (module.weight for module in (models[name].lm_head, models[name].shared))
        counts[name] += head.numel() if head is table else 0
    counts = {name: count / 1e9 for name, count in counts.items()}
    return "; ".join(f"{n}: 16 bytes x {c:.2f} x 10^9 = {16 * c:.0f} GB, frozen {4 * c:.1f}" for n, c in counts.items())


def lora_size() -> str:
    """r (I + O) beside I O."""
    adapter = inlay.attach(torch.nn.Sequential(torch.nn.Linear(1024, 1024)), inlay.LoRA(rank=8, sites="0"), head=None)
    return f"1024 x 1024, r = 8: {adapter.trained_parameters:,} of {1024 * 1024:,} = 1.56 %"


def ran(*scripts: str) -> str:
    """What docs/reproductions.md has of these scripts."""
    sections = (ROOT / "docs" / "reproductions.md").read_text(encoding="utf-8").split("\n## ")
    found = []
    for script in scripts:
        (section,) = [s for s in sections if re.search(rf"^Run: .*reproduce/{script}\.py", s, re.M)] or [""]
        result = re.search(r"^Result: (.*)$", section, re.M)
        found.append(f"`benchmarks/reproduce/{script}.py`: {result[1] if result else 'not run yet'}")
    return "; ".join(found)


def storage_errors() -> str:
    """Error and perplexity of the ways to store four bits."""
    page = max((ROOT / "benchmarks").glob("quant-*.md")).read_text(encoding="utf-8").partition("\n## Quality")[2]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.count("|") == 7]
    errors = [f"{row[0]} {row[2]} / {row[3]}" for row in rows if row[0] and not set(row[0]) & set("-:")][1:]
    return f"`benchmarks/quant_quality.py`, error of the weights / perplexity: {', '.join(errors)}"


def nf4_bits() -> str:
    """Bits a parameter with and without double quantisation, by the block sizes."""
    plain, double = 4 + 32 / 64, 4 + 8 / 64 + 32 / (64 * 256)
    return f"{plain} and {double:.4f} bits: saves {plain - double:.3f}, {65.286 * (plain - double) / 8:.2f} GB at 65B"


def mam_counts() -> str:
    """MAM on BART-large, stored and trained."""
    adapter = attached(transformers.BartModel, BartConfig(), inlay.MAM())
    return (
        f"{adapter.stored_parameters:,} stored = {100 * adapter.stored_parameters / 406_291_456:.2f} % of BART-large; "
        f"{adapter.trained_parameters:,} while its MLP trains"
    )


def prefix_share() -> str:
    """The prefix of MAM."""
    count = attached(transformers.BartModel, BartConfig(), inlay.Prefix(length=30)).stored_parameters
    bart, mbart = 100 * count / 406_291_456, 100 * count / 610_851_840
    return f"n = 30: {count:,} = {bart:.2f} % of BART-large, {mbart:.2f} % of mBART"


def unipelt_counts() -> str:
    """UniPELT and its parts on BERT-base."""
    parts = {
        "BitFit": inlay.BitFit(),
        "prefix": inlay.Prefix(length=10),
        "LoRA": inlay.LoRA(rank=8, sites=("attn.q", "attn.v")),
        "adapter": inlay.Bottleneck.pfeiffer(16),
        "APL": inlay.UniPELT(mid=None),
    }
    return "; ".join(f"{n} {attached(transformers.BertModel, BERT, m).stored_parameters:,}" for n, m in parts.items())


@dataclass(frozen=True)
class Claim:
    """One claim: what was said, what is right, and how it is shown here."""

    text: str
    verdict: str
    shown: Callable[[], str] | str


PAPER = "quoted from the paper; needs weights that are not in this repository"
CLAIMS = (
    Claim("BERT beat the state of the art on 11 tasks in 2018", "background", "-"),
    Claim("families: additive, selective, reparametrised", "the taxonomy of arXiv:2303.15647", "`inlay methods`"),
    Claim(
        "memory of full fine-tuning and LoRA for T0-3B, mt0-xxl, bloomz-7b1 on an 80 GB GPU",
        "PEFT's published table: 47.1 / 14.4 GB, out of memory / 56, out of memory / 32; activations come on top",
        table_of_peft,
    ),
    Claim(
        "BitFit trains biases and the head",
        "right; the LayerNorm and pooler biases count too",
        "`tests/methods/test_bitfit.py`",
    ),
    Claim("biases are 0.08 to 0.09 % of BERT", "right: base is the 0.09, large the 0.08", bias_share),
    Claim("BitFit equals adapters and diff pruning on GLUE", "as published (84.2 / 84.6 / 84.8 average)", PAPER),
    Claim(
        "query and intermediate biases move most and suffice",
        "the code supports the subset",
        lambda: f"{bias_share('attn.q', 'ffn.up')}; {ran('bitfit_profile')}",
    ),
    Claim(
        "diff pruning saves no training memory",
        "right; it trains a difference and a gate for each weight of the projections",
        diff_pruning_cost,
    ),
    Claim(
        "prefix: an MLP during training, only the prefix is kept",
        "right",
        lambda: f"{prefix_counts()}; {ran('prefix_depth')}",
    ),
    Claim(
        "the prefix is decomposed into a smaller one and an MLP",
        "in the paper; the code keeps width d",
        lambda: ran("prefix_mlp"),
    ),
    Claim(
        "prefix tuning is mainly for generation",
        "evaluated there; P-tuning v2 is the same for understanding",
        "`tests/methods/test_p_tuning_v2.py`",
    ),
    Claim("prefix tuning has two disadvantages", "hard to optimise, uses up attention length (LoRA, section 3)", PAPER),
    Claim(
        "prompt tuning: input layer only; one frozen model serves all tasks in one batch",
        "right",
        "`tests/hosts/test_model.py`",
    ),
    Claim(
        "ensembling trains several prompts in one batch",
        "imprecise: the published trick is one batch at inference; here both work",
        "`tests/test_ensembling.py`",
    ),
    Claim(
        "class-label initialisation is best, 20 tokens are enough",
        "right in the paper's figure 3",
        lambda: ran("prompt_init", "prompt_length"),
    ),
    Claim(
        "P-tuning v1: embedding with LSTM and MLP, any position",
        "right; on SuperGLUE the model is tuned too",
        "`tests/methods/test_p_tuning.py`",
    ),
    Claim(
        "P-tuning v2: prompts in every layer, 0.1 to 3 % instead of 0.01 %",
        "right",
        lambda: f"{p_tuning_range()}; prompt tuning n = 20: {prompt_share()}",
    ),
    Claim(
        "LoRA: A Gaussian, B zero, merged without latency",
        "the code takes kaiming-uniform A; alpha / r belongs to the formula",
        lambda: f"`tests/methods/test_lora.py`; {ran('lora_init')}",
    ),
    Claim(
        "LoRA on attention only, or on all linear layers",
        "the paper: attention; later work: all",
        lambda: ran("lora_matrices"),
    ),
    Claim("q and v together are best", "q, k, v, o at half the rank are at least as good in table 5", lora_counts),
    Claim("r of 1 to 8 is enough", "in table 6, yes; QLoRA uses 64", lambda: ran("lora_rank")),
    Claim("h = W x + B A x with r much smaller than d", "right, with alpha / r", lora_size),
    Claim(
        "adapters add latency at inference",
        "20 to 30 % at batch 1 in LoRA's table 1",
        lambda: ran("inference_latency"),
    ),
    Claim(
        "AdaLoRA prunes singular values by importance",
        "right; vectors are kept and can come back",
        "`tests/methods/test_adalora.py`",
    ),
    Claim("AdaLoRA at 0.3 M is 1.8 points better on RTE", "87.36 against 85.56 in table 1", PAPER),
    Claim("LLaMA-65B in 16 bit needs more than 780 GB", "right", llama_memory),
    Claim(
        "QLoRA: 4 bit without loss; stores NF4, computes bf16",
        "right for the tested sizes",
        lambda: f"`tests/quant/test_linear.py`; {ran('quantised_bases')}",
    ),
    Claim(
        "NF4 is optimal by information theory",
        "the paper's claim; arXiv:2306.06965 disputes it",
        "the errors of claim 30",
    ),
    Claim("double quantisation and paged optimizers", "right", nf4_bits),
    Claim(
        "NF4 beats FP4, double quantisation costs nothing",
        "tables 2 to 4",
        lambda: f"{storage_errors()}; {ran('quantised_bases')}",
    ),
    Claim("OASST1 for chat, FLAN for MMLU", "63.9 against 62.2 at 65B", PAPER),
    Claim(
        "parallel over sequential, FFN over attention, prefix strong at 0.1 %",
        "right, but n = 30 is more than 0.1 %",
        lambda: f"{prefix_share()}; {ran('adapter_placement')}",
    ),
    Claim(
        "MAM with 6.7 % equals full fine-tuning on XSum",
        "as published; 6.7 % is the count",
        lambda: f"{mam_counts()}; {ran('mam_parts')}",
    ),
    Claim(
        "UniPELT: gated LoRA, prefix and adapter",
        "right; the gate is a mean of sigmoids",
        "`tests/methods/test_gated.py`",
    ),
    Claim(
        "UniPELT: inference 127 %, training 67 % of full fine-tuning",
        "published; the counts agree",
        lambda: f"{unipelt_counts()}; {ran('unipelt_times')}",
    ),
    Claim(
        "UniPELT gains most with 100 examples",
        "table 1: 62.59 against 60.02 for full fine-tuning",
        lambda: ran("unipelt_low_data"),
    ),
    Claim("adapters are extra layers, LoRA merges back", "right", "`tests/test_merge.py`"),
    Claim(
        "AdaLoRA: feed-forward layers deserve more rank",
        "figure 3 of the paper",
        lambda: ran("adalora_budget"),
    ),
)


def main() -> None:
    transformers.logging.set_verbosity_error()
    lines = [
        "# The survey articles' claims, checked",
        "",
        f"Written by `python benchmarks/survey_claims.py` on {datetime.date.today().isoformat()} with torch "
        f"{torch.__version__.split('+')[0]} and transformers {transformers.__version__}. Counts come from models on "
        "the meta device; a path names the test or script that shows a behaviour.",
        "",
        "| # | claim | what is right | shown here |",
        "|---|---|---|---|",
    ]
    for number, claim in enumerate(CLAIMS, 1):
        shown = claim.shown if isinstance(claim.shown, str) else claim.shown()
        print(f"{number:2} {claim.text}: {shown}")
        lines.append(f"| {number} | {claim.text} | {claim.verdict} | {shown} |")
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
