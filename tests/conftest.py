"""Tiny random models of six kinds and small data, made on the spot. Nothing needs a network."""
import atexit
import functools
import importlib
import inspect
import json
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
CACHES = tempfile.mkdtemp(prefix="kd-tests-")  # before any import that reads these variables
atexit.register(shutil.rmtree, CACHES, ignore_errors=True)
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": CACHES,
               "HF_DATASETS_CACHE": f"{CACHES}/datasets", "XDG_CACHE_HOME": f"{CACHES}/xdg"}

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedTokenizerFast,
)

import common

torch.set_num_threads(1)  # steps this small are many times slower on two threads
inspect.getsource = functools.cache(inspect.getsource)  # parse_args reads common.py with it
WORDS = ("the a cat dog bird sat ran on under mat tree house red blue green and then it was very "
         "happy sad !").split()
KINDS = ["gpt2", "llama", "qwen2", "opt", "t5", "t5-scaled"]


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "ignore:.* is deprecated:FutureWarning")


def small_tokenizer(t5=False):
    """Byte-level BPE. Like GPT-2's it has one special token for everything; T5's ends prompts."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rng, special = random.Random(0), ["<pad>", "</s>"] if t5 else ["<|endoftext|>"]
    text = [" ".join(rng.choices(WORDS, k=12)) for _ in range(200)]
    backend.train_from_iterator(text, trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    backend.decoder = decoders.ByteLevel()
    if not t5:
        return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>")


def auto_class(config):
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def small_model(kind, size, vocab, seed=0, scale=8, **changes):
    """A random model of a kind; its distributions are far from uniform."""
    name = kind.split("-")[0]
    own = {"gpt2": dict(n_layer=2), "opt": dict(ffn_dim=2 * size, word_embed_proj_dim=size),
           "t5": dict(num_layers=1, d_ff=2 * size, d_kv=size // 2, decoder_start_token_id=0,
                      eos_token_id=1, scale_decoder_outputs=kind == "t5-scaled")}
    llama = dict(intermediate_size=2 * size, num_key_value_heads=1,
                 tie_word_embeddings=kind == "qwen2")
    both = dict(hidden_size=size, num_attention_heads=2, vocab_size=vocab, bos_token_id=0,
                eos_token_id=0, pad_token_id=0)
    if name != "t5":
        both |= dict(num_hidden_layers=2, max_position_embeddings=256)
    config = AutoConfig.for_model(name, **both | own.get(name, llama) | changes)
    torch.manual_seed(seed)
    model = auto_class(config).from_config(config)
    for p in model.parameters():  # such small initial weights give nearly uniform distributions
        p.data *= scale if p.dim() > 1 and name != "t5" else 1
    model.role = "student"
    return model.eval()


def plain_logits(model, x, y):
    """(len(y), V), by the model's own forward pass of one unpadded example."""
    if model.config.is_encoder_decoder:
        start = [model.config.decoder_start_token_id]
        return model(input_ids=torch.tensor([x]),
                     decoder_input_ids=torch.tensor([start + y[:-1]])).logits[0]
    return model(input_ids=torch.tensor([x + y])).logits[0, len(x) - 1:-1]


def make_pair(kind, root):
    """Save a tiny teacher and student -> their directories. Qwen2's heads differ in size."""
    tokenizer = small_tokenizer("t5" in kind)
    for role, size, seed in (("teacher", 32, 1), ("student", 16, 2)):
        padded = 24 if kind == "qwen2" and role == "teacher" else 8
        model = small_model(kind, size, len(tokenizer) + padded, seed,
                            eos_token_id=tokenizer.eos_token_id)
        model.save_pretrained(root / role)
        tokenizer.save_pretrained(root / role)
    return root / "teacher", root / "student"


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def small_run(Config, pair, data, out, /, **settings):
    """Settings of any script for a run of a second; those that it does not have are left out."""
    names = common.settings_of(Config)
    small = dict(max_prompt=24, max_response=12, steps=4, batch_size=8, lr=1e-3, warmup=2,
                 eval_every=2, eval_rows=4, log_every=1, save_every=2, holdout=0.1, max_tokens=16,
                 interval=2, gap_rows=4, budget=24, round_size=4, retrain=2, passes=1, device="cpu",
                 teacher=str(pair[0]), student=str(pair[1]), data=str(data), out=str(out))
    return Config(**{k: v for k, v in {**small, **settings}.items() if k in names})


def any_run(script, root, out, /, **settings):
    """small_run of any script, with the models and data of the fixture any_root."""
    Config = importlib.import_module(script).Config
    data = {"gold": "reviews", "ddk": "corpus"}.get(script, "rows.jsonl")
    return small_run(Config, (root / "models/teacher", root / "models/student"), root / data, out,
                     task=str(root / "task.json"), **settings)


def flags(cfg):
    """The command line that gives these settings."""
    words = []
    for name in common.settings_of(type(cfg)):
        value, flag = getattr(cfg, name), name.replace("_", "-")
        is_switch = isinstance(value, bool)
        words.append(f"--{'' if value else 'no-'}{flag}" if is_switch else f"--{flag}={value}")
    return words


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """pair(kind) -> (teacher directory, student directory), made once."""
    return functools.cache(lambda kind: make_pair(kind, tmp_path_factory.mktemp("pair")))


@pytest.fixture(scope="session")
def any_root(tmp_path_factory):
    """A folder with models that have dropout, and data for every script: rows.jsonl, corpus/ with
    three domains, and for gold.py reviews/ and task.json, whose samples any LLM can write."""
    root, rng = tmp_path_factory.mktemp("any"), random.Random(1)
    make_pair("gpt2", root / "models")
    text = lambda low, high, words=WORDS: " ".join(rng.choices(words, k=rng.randint(low, high)))
    prompts = [text(3, 9) for _ in range(80)]
    write_rows(root / "rows.jsonl", [{"prompt": x, "response": " ".join(sorted(x.split()))}
                                     for x in prompts])
    for i, (name, n) in enumerate((("big", 400), ("mid", 150), ("small", 80))):
        rows = [{"text": text(5, 30, WORDS[6 * i:6 * i + 8])} for _ in range(n)]
        write_rows(root / f"corpus/{name}.jsonl", rows)
    for split, n in (("train", 20), ("valid", 6), ("test", 8)):
        rows = [{"text": text(4, 4), "label": rng.choice(["bad", "good"])} for _ in range(n)]
        write_rows(root / f"reviews/{split}.jsonl", rows)
    write_rows(root / "task.json", [{
        "fields": {"text": "text"}, "label": "label", "labels": {"bad": "", "good": ""},
        "student": "{text}", "shots": 2, "max_new": 8, "lengths": [1, 400], "stop": [],
        "write": {"prompt": "{shots}", "shot": "{sample} ! ", "sample": "{label} {text}",
                  "plain": "", "ood": "then "}}])
    return root


@pytest.fixture(scope="session")
def rows_file(any_root):
    return any_root / "rows.jsonl"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Every test asks its teacher anew."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
