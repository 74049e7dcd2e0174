"""A small pretrained decoder for the other benchmarks: a Llama of 5.8 million parameters with a vocabulary of its own.

    python benchmarks/pretrain_tiny.py [--data FOLDER] [--output FOLDER] [--steps N] [--minutes M] [--device cuda]

It reads ten novels and the texts (never the labels) of the training sides of the other sets, trains a byte-pair
vocabulary of 4,096 pieces, and learns to continue text, 256 tokens at a time, in bf16 autocast. The result is a folder
that `AutoModelForCausalLM.from_pretrained` reads, with `training.json` beside it. A run that was interrupted, or ended
by `--minutes`, goes on where it stood when the same command is given again; a finished one is not repeated.

Matrices are trained with Muon (arXiv:2502.16982, learning rates as for AdamW), everything else with AdamW. The rate
stays constant and falls to zero over the last 30 % of the steps, so that `--steps` may be changed while that has not
begun.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy
import torch
import transformers
from torch import Tensor

FOLDER = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "inlay" / "pretrained" / "llama-6m"
SHARED = Path(os.environ.get("INLAY_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data"
END, PAD = "<|end|>", "<|pad|>"
VOCAB, LENGTH, ROWS = 4096, 256, 16
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": LENGTH,
    "tie_word_embeddings": True,
}
RATE, WARM_UP, FALL, CLIP = 3e-3, 100, 0.3, 1.0
HELD_OUT = 0.01
CHECKPOINT_SECONDS, EVAL_STEPS, EVAL_ROWS = 180, 250, 64


def lines(path: Path) -> list[str]:
    """Lines that are not empty; other line separators may stand inside a text."""
    return [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def documents(data: Path) -> Iterator[tuple[str, list[str]]]:
    """(set, its texts). Sets without a training side of their own (MR, Subj) are left out, so no test row is seen."""
    books = []
    for path in sorted((data / "gutenberg_books").glob("*.txt")):
        book = re.split(r"\*\*\* START OF[^\n]*\n|\*\*\* END OF[^\n]*", path.read_text(encoding="ascii"))[1]
        # The lines of a page are no lines of the text.
        books.append(re.sub(r"(?<!\n)\n(?!\n)", " ", book).strip())
    yield "gutenberg_books", books
    yield "tinyshakespeare", [(data / "tinyshakespeare/input.txt").read_text(encoding="utf-8")]
    yield "tinystories_sample", [(data / "tinystories_sample/tiny_stories.txt").read_text(encoding="utf-8")]
    yield "e2e_nlg", [row["ref"] for row in table(data / "e2e_nlg/e2e-dataset/trainset.csv")]
    maths = [json.loads(line) for line in lines(data / "gsm8k/train.jsonl")]
    yield "gsm8k", [f"{m['question']}\n{re.sub(r'<<.*?>>', '', m['answer'])}" for m in maths]
    papers = [json.loads(line) for line in lines(data / "scitldr/train.jsonl")]
    yield "scitldr", [" ".join(p["source"]) for p in papers]
    yield "banking77", [row["text"].strip() for row in table(data / "banking77/train.csv")]
    yield "snips", list(commands(data / "snips"))
    yield "wnut17", list(sentences(data / "wnut17/wnut17train.conll"))
    tasks = [json.loads(line) for line in lines(data / "self_instruct/seed_tasks.jsonl")]
    yield "self_instruct", ["\n".join([t["instruction"], *_parts(t["instances"])]) for t in tasks]


def _parts(instances: list[dict[str, str]]) -> list[str]:
    return [text for i in instances for text in (i["input"], i["output"]) if text]


def commands(folder: Path) -> Iterator[str]:
    for path in sorted(folder.glob("train_*.json")):
        raw = path.read_bytes()
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            text = raw.decode("latin-1")  # one file of the set
        ((_, rows),) = json.loads(text).items()
        yield from ("".join(piece["text"] for piece in row["data"]).strip() for row in rows)


def sentences(path: Path) -> Iterator[str]:
    words: list[str] = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        if line.strip():
            words.append(line.split("\t")[0])
        elif words:
            yield " ".join(words)
            words = []


def vocabulary(texts: list[str]) -> Any:
    """A byte-level byte-pair tokenizer for transformers."""
    from tokenizers import ByteLevelBPETokenizer

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(texts, vocab_size=VOCAB, special_tokens=[END, PAD], show_progress=False)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer,
        eos_token=END,
        bos_token=END,
        pad_token=PAD,
        model_max_length=LENGTH,
        padding_side="right",
    )


def tokens(data: Path, folder: Path) -> tuple[Any, numpy.ndarray[Any, Any], numpy.ndarray[Any, Any], float]:
    """Tokenizer, training and held-out sequences [N, LENGTH + 1], bytes per token of the latter; made once."""
    kept = folder / "tokens.npz"
    if kept.is_file():
        stored = numpy.load(kept)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        return tokenizer, stored["train"], stored["held_out"], float(stored["bytes_per_token"])
    if not (data / "gutenberg_books").is_dir():
        raise SystemExit(f"no texts in {data}; name the folder with --data, or its parent with INLAY_SHARED")
    sets = dict(documents(data))
    print("; ".join(f"{name} {sum(map(len, texts)) / 1e6:.1f} MB" for name, texts in sets.items()))
    tokenizer = vocabulary([part for texts in sets.values() for text in texts for part in text.split("\n\n")])
    train: list[int] = []
    held_out: list[int] = []
    held_bytes = 0
    for texts in sets.values():
        # Short texts of a set are shuffled (some are sorted by class); of long ones the end is held out.
        order = numpy.random.default_rng(0).permutation(len(texts)) if len(texts) > 20 else range(len(texts))
        ids = [[*tokenizer(texts[i])["input_ids"], tokenizer.eos_token_id] for i in order]
        if len(texts) > 20:
            count = max(1, round(HELD_OUT * len(ids)))
            parts = [(i, []) for i in ids[:-count]] + [([], i) for i in ids[-count:]]
        else:
            parts = [(i[: -max(1, round(HELD_OUT * len(i)))], i[-max(1, round(HELD_OUT * len(i))) :]) for i in ids]
        for first, last in parts:
            train += first
            held_out += last
    held_bytes = len(tokenizer.decode(held_out).replace(END, "").encode())
    arrays = [_rows(numpy.array(ids, dtype=numpy.uint16)) for ids in (train, held_out)]
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    ratio = held_bytes / len(held_out)
    with (folder / "tokens.tmp").open("wb") as file:
        numpy.savez(file, train=arrays[0], held_out=arrays[1], bytes_per_token=ratio)
    (folder / "tokens.tmp").replace(kept)
    return tokenizer, arrays[0], arrays[1], ratio


def _rows(ids: numpy.ndarray[Any, Any]) -> numpy.ndarray[Any, Any]:
    """Sequences of LENGTH + 1 that share their border token, so that every token is predicted once."""
    count = (len(ids) - 1) // LENGTH
    return numpy.stack([ids[i * LENGTH : (i + 1) * LENGTH + 1] for i in range(count)])


class Trainer:
    """Model, optimizers and the step they are at."""

    def __init__(self, tokenizer: Any, device: str) -> None:
        torch.manual_seed(0)
        ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        config = transformers.LlamaConfig(vocab_size=VOCAB, pad_token_id=tokenizer.pad_token_id, **ends, **SIZES)
        self.device = torch.device(device)
        self.model = transformers.LlamaForCausalLM(config).to(self.device)
        matrices = [p for n, p in self.model.named_parameters() if p.ndim == 2 and "embed" not in n]
        chosen = {id(p) for p in matrices}
        others = [p for p in self.model.parameters() if id(p) not in chosen]
        self.optimizers = [
            torch.optim.Muon(matrices, lr=RATE, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=RATE, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        self.step, self.seconds = 0, 0.0
        self.curve: list[dict[str, float]] = []

    def loss(self, ids_BT: Tensor) -> Tensor:
        """Mean cross-entropy of the next token, nats."""
        ids_BT = ids_BT.to(self.device)
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            logits_BTV = self.model(input_ids=ids_BT[:, :-1], use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1).float(), ids_BT[:, 1:].flatten())

    def train(self, ids_BT: Tensor, rate: float) -> float:
        """One optimizer step."""
        loss = self.loss(ids_BT)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return float(loss.detach())

    @torch.no_grad()
    def measure(self, held_out: Tensor) -> float:
        """Nats a token over held-out sequences."""
        return sum(float(self.loss(part)) * len(part) for part in held_out.split(ROWS)) / len(held_out)

    def save(self, path: Path) -> None:
        """A checkpoint that appears whole."""
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "seconds": self.seconds,
            "curve": self.curve,
        }
        torch.save(state, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)

    def resume(self, path: Path) -> None:
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, stored in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(stored)
        self.step, self.seconds, self.curve = state["step"], state["seconds"], state["curve"]


def rate_at(step: int, steps: int) -> float:
    """The learning rate: rising, constant, falling to zero."""
    return RATE * min((step + 1) / WARM_UP, 1.0, (steps - step) / max(FALL * steps, 1))


def rows_of(train: numpy.ndarray[Any, Any], step: int) -> Tensor:
    """The batch of a step: every sequence once an epoch, in an order of the epoch's own."""
    per_epoch = len(train) // ROWS
    epoch, place = divmod(step, per_epoch)
    order = numpy.random.default_rng(epoch).permutation(len(train))[place * ROWS : (place + 1) * ROWS]
    return torch.from_numpy(train[order].astype(numpy.int64))


def fit(trainer: Trainer, train: Any, held_out: Any, ratio: float, steps: int, minutes: float, kept: Path) -> bool:
    """Train to the end, or until the minutes are over; whether the end was reached."""
    few = torch.from_numpy(held_out[:: max(1, len(held_out) // EVAL_ROWS)].astype(numpy.int64))
    began = saved = time.monotonic()
    while trainer.step < steps:
        start = time.monotonic()
        loss = trainer.train(rows_of(train, trainer.step), rate_at(trainer.step, steps))
        trainer.seconds += time.monotonic() - start
        if not math.isfinite(loss):
            raise SystemExit(f"the loss is {loss} at step {trainer.step}; the last checkpoint is {kept}")
        if trainer.step % 25 == 0:
            speed = trainer.step * ROWS * LENGTH / trainer.seconds
            left = trainer.seconds / trainer.step * (steps - trainer.step) / 60
            print(
                f"step {trainer.step}/{steps}  loss {loss:.3f}  {speed:,.0f} tokens/s  {left:.0f} min left", flush=True
            )
        if trainer.step % EVAL_STEPS == 0 or trainer.step == steps:
            nats = trainer.measure(few)
            bits = nats / math.log(2) / ratio
            trainer.curve.append({"step": trainer.step, "seconds": round(trainer.seconds), "bits_per_byte": bits})
            print(f"step {trainer.step}/{steps}  held out: {nats:.3f} nats a token, {bits:.3f} bits a byte", flush=True)
        over = minutes > 0 and time.monotonic() - began > 60 * minutes
        if over or trainer.step == steps or time.monotonic() - saved > CHECKPOINT_SECONDS:
            trainer.save(kept)
            saved = time.monotonic()
        if over:
            return trainer.step >= steps
    return True


def finish(trainer: Trainer, tokenizer: Any, held_out: Any, ratio: float, folder: Path) -> dict[str, Any]:
    """Write the model in bf16 and what it reached, and show what it writes."""
    trainer.model.eval()
    nats = trainer.measure(torch.from_numpy(held_out.astype(numpy.int64)))
    ids = tokenizer("It was a dark night, and", return_tensors="pt").to(trainer.device)
    torch.manual_seed(0)
    settings = {"max_new_tokens": 100, "do_sample": True, "temperature": 0.7, "top_p": 0.95}
    sample = tokenizer.decode(trainer.model.generate(**ids, **settings)[0], skip_special_tokens=True)
    result = {
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "steps": trainer.step,
        "tokens": trainer.step * ROWS * LENGTH,
        "seconds": round(trainer.seconds),
        "threads": torch.get_num_threads(),
        "device": str(trainer.device),
        "held_out_nats_per_token": round(nats, 4),
        "held_out_bits_per_byte": round(nats / math.log(2) / ratio, 4),
        "bytes_per_token": round(ratio, 3),
        "curve": trainer.curve,
        "sample": sample,
    }
    trainer.model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "training.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, default=SHARED, help="folder of the data sets")
    parser.add_argument("--output", type=Path, default=FOLDER, help="where the model goes")
    parser.add_argument("--steps", type=int, default=2500, help=f"of {ROWS} sequences of {LENGTH} tokens")
    parser.add_argument("--minutes", type=float, default=0, help="end after this long; the same command goes on")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    folder, kept = arguments.output, arguments.output / "checkpoint.pt"
    if (folder / "training.json").is_file():
        print(f"{folder} is finished: {(folder / 'training.json').read_text(encoding='utf-8')}")
        return
    tokenizer, train, held_out, ratio = tokens(arguments.data, folder)
    trainer = Trainer(tokenizer, arguments.device)
    if kept.is_file():
        trainer.resume(kept)
        print(f"going on at step {trainer.step}")
    print(
        f"{train.size / 1e6:.2f} million tokens of {ratio:.2f} bytes, {held_out.size:,} held out; {folder}", flush=True
    )
    if not fit(trainer, train, held_out, ratio, arguments.steps, arguments.minutes, kept):
        print(f"step {trainer.step} of {arguments.steps}; the same command goes on from here")
        return
    print(json.dumps(finish(trainer, tokenizer, held_out, ratio, folder), indent=1))
    kept.unlink()


if __name__ == "__main__":
    main()
