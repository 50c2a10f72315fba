"""Tiny random models of every supported architecture, saved as real model directories. Offline, a few seconds in all."""
import dataclasses
import functools
import importlib.util
import inspect
import json
import os
import random
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    T5Config,
)

import common

torch.set_num_threads(1)  # steps this small are many times slower on two threads
inspect.getsource = functools.cache(inspect.getsource)  # parse_args reads common.py with it: .1 s a command line
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


def make_pair(kind, root):
    """Save a tiny teacher and student -> (teacher directory, student directory); Qwen2's heads differ in size. Of kind
    t5<gpt2 the student is a T5 and its teacher a GPT-2."""
    tokenizer = small_tokenizer("t5" in kind)
    for name, size, seed in (("teacher", 32, 1), ("student", 16, 2)):
        torch.manual_seed(seed)
        own = kind.split("<")[-1 if name == "teacher" else 0]
        vocab = len(tokenizer) + (24 if own == "qwen2" and name == "teacher" else 8)
        config = small_config(own, size, vocab)
        auto = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
        model = auto.from_config(config)
        for p in model.parameters():  # such small initial weights give nearly uniform distributions
            p.data.mul_(3.0) if p.dim() > 1 and not own.startswith("t5") else None
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root / "teacher", root / "student"


def make_rows(path):
    """A JSONL file of 80 rows: the response repeats the prompt's words in order, 3 to 9 words."""
    rng, rows = random.Random(1), []
    for _ in range(80):
        words = rng.choices(WORDS, k=rng.randint(3, 9))
        rows.append({"prompt": " ".join(words), "response": " ".join(sorted(words))})
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def make_corpus(path):
    """Three domains with a vocabulary each, of which the first is the largest."""
    path.mkdir(parents=True)
    for i, (name, n) in enumerate((("big", 400), ("mid", 150), ("small", 80))):
        rng = random.Random(i)
        texts = [" ".join(rng.choices(WORDS[6 * i:6 * i + 8], k=rng.randint(5, 30))) for _ in range(n)]
        (path / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return path


@functools.cache
def prepare(world):
    """data/<world>/prepare.py as a module."""
    spec = importlib.util.spec_from_file_location(f"prepare_{world}", ROOT / f"data/{world}/prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def small_grammar(world, path, **changes):
    """data/<world>/grammar.json with some of its entries changed, for a world that is made in seconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**json.loads((ROOT / f"data/{world}/grammar.json").read_text()), **changes}))
    return path


def make_world(world, root, grammar, *options):
    """What `python data/<world>/prepare.py root` makes from a small grammar, unless it is there already. The commands
    that it runs are run in this process, and evaluate on one row: to start torch takes longer than to train."""
    if root.exists():
        return root
    module = prepare(world)

    def run_here(command, **kw):
        script = importlib.import_module(Path(command[1]).stem)
        script.train(common.parse_args(script.Config, [*command[2:], "--eval-rows", "1"]))
        return SimpleNamespace(stdout=[], wait=lambda: 0)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(module, "subprocess", SimpleNamespace(Popen=run_here, PIPE=None, STDOUT=None))
        m.setattr(sys, "argv", ["prepare.py", str(root), "--grammar", str(grammar), *options])
        module.main()
    return root


def make_gold_world(root, kind="reviews"):
    """A reviews world whose LLM was trained for a second: it writes well-formed samples, if not good ones."""
    llm = {"width": 32, "layers": 1, "heads": 2, "pages": 600, "steps": 120 if kind == "sums" else 40, "batch_size": 8, "lr": 1e-2}
    grammar = small_grammar("reviews", root / f"{kind}.json", rows={"train": 60, "valid": 10, "each_topic": 1},
                            models={"teacher": llm, "student": {"width": 16, "layers": 1, "heads": 2}})
    return make_world("reviews", root / kind, grammar, "--kind", kind)


SMALL_GOLD = dict(task="reviews", budget=48, round_size=4, retrain=2, passes=1, log_every=1, max_response=6, eval_rows=20)


def settings_of(config_class):
    """The names of what can be set: the fields of a Config without its `unused`."""
    return {f.name for f in dataclasses.fields(config_class)} - set(config_class.unused)


def small_run(config_class, pair, data, out, /, **settings):
    """Settings of any script for a run of a second."""
    small = dict(teacher=str(pair[0]), student=str(pair[1]), data=str(data), max_prompt=24, max_response=12, steps=4,
                 batch_size=8, lr=1e-3, warmup=2, eval_every=2, eval_rows=4, log_every=1, save_every=2, holdout=0.1,
                 max_tokens=16, interval=2, gap_rows=4, device="cpu", compile=False, out=str(out))
    return config_class(**{**{k: v for k, v in small.items() if k in settings_of(config_class)}, **settings})


def any_run(script, root, out, /, **settings):
    """small_run of any script, its models and data made in `root` where they are missing; settings that the script does
    not have are left out. For the tools kill.py, fuzz.py and museum.py."""
    config = importlib.import_module(script).Config
    names = settings_of(config)
    settings = {k: v for k, v in settings.items() if k in names}
    if "task" in names:  # gold and its controls
        world = make_gold_world(root / "gold")
        return small_run(config, (world / "teacher", world / "student"), world / "data", out, **{**SMALL_GOLD, **settings})
    pair = root / "models/teacher", root / "models/student"
    if not pair[1].exists():
        make_pair("gpt2", root / "models")  # GPT-2 has dropout
    data = root / ("rows.jsonl" if "prompt_field" in names else "corpus")
    if not data.exists():
        make_rows(data) if "prompt_field" in names else make_corpus(data)
    return small_run(config, pair, data, out, **settings)


def flags(cfg):
    """The command line that gives these settings."""
    names = {k: k.replace("_", "-") for k in vars(cfg) if k in settings_of(type(cfg))}
    values = {k: getattr(cfg, k) for k in names}
    return [f"--{'' if v else 'no-'}{names[k]}" if isinstance(v, bool) else f"--{names[k]}={v}" for k, v in values.items()]


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """pair(kind) -> (teacher directory, student directory), made once."""
    made = {}
    return lambda kind: made[kind] if kind in made else made.setdefault(kind, make_pair(kind, tmp_path_factory.mktemp(kind)))


@pytest.fixture(scope="session")
def any_root(tmp_path_factory):
    """Where any_run keeps the models and data it makes."""
    return tmp_path_factory.mktemp("any")


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory):
    return make_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")


@pytest.fixture
def config(pair, rows_file, tmp_path):
    """config(kind="gpt2", **settings) -> a kd_forward.Config for a run of a second."""
    import kd_forward
    return lambda kind="gpt2", **settings: small_run(kd_forward.Config, pair(kind), rows_file, tmp_path / "run", **settings)


@pytest.fixture
def resumes_bitwise(monkeypatch, capsys):
    """resumes_bitwise(train, cfg, died=3) asserts that a run of `cfg`, ended right after step `died` and resumed from
    the last checkpoint before it, ends bit by bit like one that went through; returns both runs' last checkpoint parts.

    Every script's test is `resumes_bitwise(llmr.train, llmr_config(steps=6, save_every=2))`. Choose save_every so
    that 0 < saved < died < steps, and settings under which state is old at the checkpoint (a stale sampler, negatives
    of an earlier epoch). Compared: student directory, log.jsonl without times, result.json without times and memory.
    """
    def run(train, cfg, died=3):
        saved = died - died % cfg.save_every
        assert 0 < saved < died < cfg.steps, "the kill must lie after a checkpoint and before the end"
        whole, cut = (dataclasses.replace(cfg, out=cfg.out + name) for name in ("-whole", "-cut"))
        train(whole)
        end_step = common.Run.end_step

        def killed(self, step, **parts):
            end_step(self, step, **parts)
            if step == died:
                raise SystemExit(9)
        monkeypatch.setattr(common.Run, "end_step", killed)
        with pytest.raises(SystemExit):
            train(cut)
        monkeypatch.setattr(common.Run, "end_step", end_step)
        torch.manual_seed(999)  # a new process: nothing may hang on this one's random state
        train(dataclasses.replace(cut, resume=True))
        assert f"resumed from {cut.out}/checkpoint.pt at step {saved}" in capsys.readouterr().out
        assert outcome(whole.out) == outcome(cut.out)
        return [torch.load(f"{c.out}/checkpoint.pt", weights_only=True)["parts"] for c in (whole, cut)]
    return run


def outcome(out):
    """What must not depend on how often a run was killed: the student's files, the log, the result; no times."""
    files = {f.name: f.read_bytes() for f in sorted(Path(out, "student").iterdir())}
    log = [{k: v for k, v in json.loads(x).items() if k != "seconds"} for x in open(f"{out}/log.jsonl")]
    result = json.loads(Path(out, "result.json").read_text())
    return files, log, {k: v for k, v in result.items() if not k.endswith("seconds") and k != "peak_gib"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
