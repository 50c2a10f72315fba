"""Tiny random models of every supported architecture, saved as real model directories. Offline, a few seconds in all."""
import json
import os
import random
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    T5Config,
)

torch.set_num_threads(1)  # steps this small are many times slower on two threads
WORDS = "the a cat dog bird sat ran on under mat tree house red blue green and then it was very happy sad !".split()


def small_tokenizer(t5=False):
    """Byte-level BPE trained on a few words. Like GPT-2's it has one special token for everything; T5's ends prompts."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<pad>", "</s>"] if t5 else ["<|endoftext|>"]
    rng = random.Random(0)
    text = [" ".join(rng.choices(WORDS, k=12)) for _ in range(200)]
    backend.train_from_iterator(text, trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    from tokenizers import decoders
    backend.decoder = decoders.ByteLevel()
    if t5:
        backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
        return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>")
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


def small_config(kind, size, vocab):
    n = dict(vocab_size=vocab, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    if kind == "gpt2":
        return GPT2Config(n_embd=size, n_layer=2, n_head=2, n_positions=64, **n)
    if kind in ("t5", "t5-scaled"):
        config = T5Config(d_model=size, d_ff=2 * size, num_layers=1, num_heads=2, d_kv=size // 2, vocab_size=vocab,
                          eos_token_id=1, pad_token_id=0, decoder_start_token_id=0)
        config.scale_decoder_outputs = kind == "t5-scaled"
        return config
    if kind == "opt":
        return OPTConfig(hidden_size=size, ffn_dim=2 * size, num_hidden_layers=2, num_attention_heads=2,
                         max_position_embeddings=64, word_embed_proj_dim=size, **n)
    llama = dict(hidden_size=size, intermediate_size=2 * size, num_hidden_layers=2, num_attention_heads=2,
                 num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=kind == "qwen2", **n)
    return (LlamaConfig if kind == "llama" else Qwen2Config)(**llama)


KINDS = ["gpt2", "llama", "qwen2", "opt", "t5", "t5-scaled"]


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """pair(kind) -> (teacher directory, student directory); Qwen2's heads are padded to different sizes."""
    made = {}

    def make(kind):
        if kind not in made:
            root, tokenizer = tmp_path_factory.mktemp(kind), small_tokenizer(kind.startswith("t5"))
            for name, size, seed in (("teacher", 32, 1), ("student", 16, 2)):
                torch.manual_seed(seed)
                vocab = len(tokenizer) + (24 if kind == "qwen2" and name == "teacher" else 8)
                config = small_config(kind, size, vocab)
                auto = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
                model = auto.from_config(config)
                for p in model.parameters():  # such small initial weights give nearly uniform distributions
                    p.data.mul_(3.0) if p.dim() > 1 and not kind.startswith("t5") else None
                model.save_pretrained(root / name)
                tokenizer.save_pretrained(root / name)
            made[kind] = root / "teacher", root / "student"
        return made[kind]
    return make


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory):
    """A JSONL file of 80 rows: the response repeats the prompt's words in order, 3 to 9 words."""
    rng, path = random.Random(1), tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = []
    for _ in range(80):
        words = rng.choices(WORDS, k=rng.randint(3, 9))
        rows.append({"prompt": " ".join(words), "response": " ".join(sorted(words))})
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture
def config(pair, rows_file, tmp_path):
    """config(kind="gpt2", **settings) -> a kd_forward.Config for a run of a second."""
    import kd_forward

    def make(kind="gpt2", **settings):
        teacher, student = pair(kind)
        small = dict(teacher=str(teacher), student=str(student), data=str(rows_file), max_prompt=24, max_response=24,
                     steps=4, batch_size=8, lr=1e-3, warmup=2, eval_every=2, eval_rows=4, log_every=1, save_every=2,
                     holdout=0.1, device="cpu", compile=False, out=str(tmp_path / "run"))
        return kd_forward.Config(**{**small, **settings})
    return make


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
