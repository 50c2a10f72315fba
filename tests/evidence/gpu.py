"""For the day a GPU is there: two commands of at most eight minutes each. Neither network nor git nor datasets is needed.

    python tests/evidence/gpu.py speed          sampling and a KD step at real sizes, against generate and the textbook
    python tests/evidence/gpu.py correct        all scripts under CUDA and torch.compile, against the CPU
    python tests/evidence/gpu.py speed correct --rehearse       the same on a CPU with small numbers, in minutes: shows
                                                                that the commands themselves work

Each row is written when it is there, to --json FILE (default: $OUT or out/, gpu.jsonl). A part that fails is a row that
says so, and the next part goes on; what the time does not suffice for is a row, too. Speed does not depend on the
weights, so those of the real configurations (Qwen2.5 0.5B <- 1.5B) are random.
"""
import argparse
import hashlib
import importlib
import json
import math
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import torch
import transformers
from evidence import bench
from tokenizers import Tokenizer, models, pre_tokenizers

import common
import kd_forward

torch._dynamo.config.fail_on_recompile_limit_hit = True  # else half of what is called compiled may run eagerly
QWEN = {"0.5b": dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14),
        "1.5b": dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12)}
VOCAB, PEAK_FLOPS, PEAK_BYTES = 151_936, 798e12, 3.0e12  # an H100: a large bf16 product, memory traffic, as measured
PAIRS = dict(max_prompt=24, max_response=8, eval_rows=8, kl_on="references")
SCRIPTS = {  # script: settings beside the common ones
    "kd_forward": PAIRS, "llmr": PAIRS, "dpkd": PAIRS, "ddk": dict(interval=5, gap_rows=4, eval_rows=4, max_tokens=16),
    "gold": dict(task="reviews", budget=48, round_size=4, retrain=2, passes=1, max_response=6, eval_rows=20),
}
# largest relative difference of a loss from that of the CPU: matmuls in TF32, which T5 feels most, and in bf16
NEAR = {("llama", "fp32"): 1e-3, ("gpt2", "fp32"): 1e-3, ("t5", "fp32"): 2e-2}
NEAR |= {(kind, "bf16, compiled"): 5e-2 for kind in ("llama", "gpt2", "t5")}
WORDS = "the a cat dog bird sat ran on under mat tree house red blue green and then it was very happy sad !".split()


class Rows:
    """Writes each row when it comes, and knows how much time is left."""

    def __init__(self, file, seconds):
        self.file, self.end, self.failed = Path(file), time.time() + seconds, 0
        self.file.parent.mkdir(parents=True, exist_ok=True)

    def append(self, row):  # as of a list: bench.row wants no more
        self.last = row
        with open(self.file, "a") as f:
            f.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)

    def __getitem__(self, at):
        return self.last

    def part(self, name, call, *args):
        """Call it, if there is time; an exception is a row."""
        start = time.time()
        if start > self.end:
            self.append({"work": name, "skipped": "no time left"})
            return
        try:
            call(self, *args)
            self.append({"work": name, "passed": True, "seconds": round(time.time() - start, 1)})
        except Exception as e:
            self.failed += 1
            where = traceback.format_exc().strip().splitlines()[-3:]
            self.append({"work": name, "passed": False, "error": f"{type(e).__name__}: {str(e)[:500]}", "where": where})


# ---------------------------------------------------------------------------------------------------------------
# correct: every script, 20 steps
# ---------------------------------------------------------------------------------------------------------------
def small_pair(root, kind):
    """A teacher and a student of random weights without dropout, whose noise differs between devices."""
    words = {w: i for i, w in enumerate(["<pad>", "<eos>", "<unk>", *WORDS, *map(str, range(10))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>",
                                                     unk_token="<unk>")
    for name, width, seed in (("teacher", 64, 1), ("student", 32, 2)):
        n = dict(vocab_size=len(words), bos_token_id=1, eos_token_id=1, pad_token_id=0)
        if kind == "gpt2":
            config = transformers.GPT2Config(n_embd=width, n_layer=2, n_head=2, n_positions=64, resid_pdrop=0.0,
                                             embd_pdrop=0.0, attn_pdrop=0.0, **n)
        elif kind == "t5":
            config = transformers.T5Config(d_model=width, d_ff=2 * width, num_layers=2, num_heads=2, d_kv=width // 2,
                                           dropout_rate=0.0, decoder_start_token_id=0, **n)
        else:
            config = transformers.LlamaConfig(hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
                                              num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64, **n)
        auto = transformers.AutoModelForSeq2SeqLM if kind == "t5" else transformers.AutoModelForCausalLM
        torch.manual_seed(seed)
        model = auto.from_config(config)
        for p in model.parameters():  # such small initial weights give nearly uniform distributions
            p.data.mul_(3.0) if p.dim() > 1 and kind != "t5" else None
        model.save_pretrained(root / kind / name)
        tokenizer.save_pretrained(root / kind / name)
    return dict(teacher=str(root / kind / "teacher"), student=str(root / kind / "student"))


def small_rows(root):
    rng, file = random.Random(0), root / "rows.jsonl"
    rows = [rng.choices(WORDS, k=rng.randint(3, 6)) for _ in range(300)]
    file.write_text("".join(json.dumps({"prompt": " ".join(r), "response": " ".join(sorted(r))}) + "\n" for r in rows))
    return dict(data=str(file))


def small_domains(root):
    for i in range(2):
        rng = random.Random(i)
        texts = [" ".join(rng.choices(WORDS[5 * i:5 * i + 10], k=12)) for _ in range(400)]
        (root / f"{i}.txt").write_text("\n\n".join(texts))
    return dict(domains=f"one={root / '0.txt'},two={root / '1.txt'}")


def small_reviews(root):
    """A reviews world with an LLM that was trained for seconds: it writes well-formed samples, if not good ones."""
    grammar = json.loads((ROOT / "data/reviews/grammar.json").read_text())
    grammar["rows"] = {"train": 60, "valid": 10, "each_topic": 1}
    grammar["models"] = {"student": {"width": 16, "layers": 1, "heads": 2}, "teacher": {
        "width": 32, "layers": 1, "heads": 2, "pages": 600, "steps": 40, "batch_size": 8, "lr": 1e-2}}
    (root / "grammar.json").write_text(json.dumps(grammar))
    command = [sys.executable, str(ROOT / "data/reviews/prepare.py"), str(root / "reviews"), "--grammar",
               str(root / "grammar.json")]
    subprocess.run(command, check=True, capture_output=True)
    return {name: str(root / "reviews" / name) for name in ("teacher", "student", "data")}


def correct(rows, device):
    """fp32 on the CPU, fp32 on the device, bf16 and compiled on the device. The losses of a script without sampling
    agree; elsewhere the noise differs between devices, and the runs must end and stay finite."""
    with tempfile.TemporaryDirectory() as tmp:
        root = Path(tmp)
        os.environ["XDG_CACHE_HOME"] = str(root / "cache")
        own = {kind: small_pair(root, kind) | small_rows(root) for kind in ("llama", "gpt2", "t5")}
        for kind in own:
            rows.part(f"correct kd_forward {kind}", one_script, device, root, "kd_forward", kind, own[kind])
        for script in ("llmr", "dpkd"):
            rows.part(f"correct {script} llama", one_script, device, root, script, "llama", own["llama"])
        domains = {k: v for k, v in own["llama"].items() if k != "data"} | small_domains(root)
        rows.part("correct ddk llama", one_script, device, root, "ddk", "llama", domains)
        rows.part("correct gold llama", lambda *a: one_script(*a, small_reviews(root)), device, root, "gold", "llama")


def one_script(rows, device, root, script, kind, own):
    losses, module = {}, importlib.import_module(script)
    for name, how in {"cpu": dict(device="cpu", dtype="float32"), "fp32": dict(device=device, dtype="float32"),
                      "bf16, compiled": dict(device=device, dtype="bfloat16", compile=True)}.items():
        out, start = root / f"{kind}-{script}-{name}".replace(" ", ""), time.time()
        module.train(module.Config(**{**own, **how, **SCRIPTS[script]}, steps=20, batch_size=16, warmup=2, eval_every=20,
                                   log_every=1, out=str(out)))
        log = [json.loads(x) for x in (out / "log.jsonl").read_text().splitlines()]
        losses[name] = [x["loss"] for x in log if "loss" in x]
        worst = max(abs(a - b) / abs(a) for a, b in zip(losses["cpu"], losses[name]))
        rows.append({"work": "correct", "script": script, "model": kind, "how": name, "first": losses[name][0],
                     "last": losses[name][-1], "off_cpu": worst, "seconds": round(time.time() - start, 1)})
        assert len(losses[name]) == 20 and all(map(math.isfinite, losses[name])), f"{name}: losses {losses[name]}"
        near = NEAR.get((kind, name)) if script in ("kd_forward", "ddk") else None
        assert near is None or worst < near, f"{name}: a loss is {worst:.1e} off the CPU's, {near} is allowed"


# ---------------------------------------------------------------------------------------------------------------
# speed: one model's sampling, one pair's KD step
# ---------------------------------------------------------------------------------------------------------------
def qwen(size, device, small, dtype=torch.float32):
    n = QWEN[size] if not small else dict(hidden_size=64 if size == "0.5b" else 128, intermediate_size=128,
                                          num_hidden_layers=2, num_attention_heads=4)
    config = transformers.Qwen2Config(vocab_size=1000 if small else VOCAB, num_key_value_heads=2, tie_word_embeddings=True,
                                      max_position_embeddings=2048, bos_token_id=0, eos_token_id=0, pad_token_id=0, **n)
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    model.vocab = config.vocab_size
    return model


def parameters(model):
    return sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()


def random_prompts(model, n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(1, model.vocab, (64,), generator=g).tolist() for _ in range(n)]


HOW = dict(eos=0, compiled=True, static=True)


def greedy(rows, device, small):
    """fp32: the compiled sampler says what generate says. bf16, where near ties fall either way: each token that it
    chose is one of the likeliest for the training forward, by 0.1 of a logit; and its log-probs are those too."""
    n, new = (4, 8) if small else (8, 32)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    model = qwen("0.5b", device, small)
    prompts = random_prompts(model, n)
    ours = common.sample(model, prompts, new, temperature=0, **HOW)[0]
    ids = torch.tensor(prompts, device=device)
    theirs = model.generate(ids, do_sample=False, max_new_tokens=new, eos_token_id=0, pad_token_id=0)[:, 64:].tolist()
    same = sum(a == b[:len(a)] for a, b in zip(ours, theirs)) / n
    torch.set_float32_matmul_precision(before)
    model = qwen("0.5b", device, small, torch.bfloat16)  # the same weights
    states = common.response_states(model)

    def scored(responses, values):
        batch = common.collate([common.Example(p, p, r) for p, r in zip(prompts, responses)], model).to(torch.device(device))
        with torch.no_grad():
            return common.row_scalars(values, model, states(batch), batch.targets)[0].cpu()
    behind = lambda z, y: (z.amax(-1) - z.gather(-1, y[:, None])[:, 0],)
    said = common.sample(model, prompts, new, temperature=0, **HOW)[0]
    drawn, logprobs = common.sample(model, prompts, new, temperature=1.0, seed=1, **HOW)
    gap = scored(said, behind).max().item()
    again = scored(drawn, lambda z, y: (common.log_softmax_at(z, y),))
    off = (again - torch.cat(logprobs)).abs().mean().item()
    rows.append({"work": "greedy", "fp32_equal": same, "bf16_behind_the_likeliest": gap, "bf16_logprob_difference": off})
    assert same >= 0.9, f"fp32: {same:.0%} of the greedy texts are those of generate"
    assert gap <= 0.1, f"bf16: a chosen token is {gap:.3f} behind the likeliest"
    assert off < 0.05, f"bf16: log-probs are off by {off:.3f} in the mean"


def sampler(rows, device, small):
    """32 responses of 128 tokens, against generate and against the bytes that each decoding step must read."""
    model = qwen("0.5b", device, small, torch.float32 if small else torch.bfloat16)
    n, new = (4, 8) if small else (32, 128)
    prompts = random_prompts(model, n)
    ids = torch.tensor(prompts, device=device)
    times = bench.take_turns({
        "ours": lambda: common.sample(model, prompts, new, seed=1, **HOW),
        "generate": lambda: model.generate(ids, do_sample=True, top_k=0, top_p=1.0, min_new_tokens=new, max_new_tokens=new,
                                           eos_token_id=0, pad_token_id=0)}, 3, 1)
    bench.row(rows, "gpu_sample_b32", "generate", times)
    read = 2 * (parameters(model) + model.vocab * model.config.hidden_size)
    rows.append({"work": "gpu_sample_b32", "baseline": "floor", "of_floor": read / PEAK_BYTES * new / min(times["ours"])})


def step(rows, device, small):
    """KD, 0.5B <- 1.5B, 32 sequences of 256 + 256 tokens, bf16: ours compiled and eager, textbook and peers in the
    micro-batches that fit; response tokens a second and the share of the peak."""
    n, width, micro = (4, 32, 2) if small else (32, 512, 4)
    most = 2 if small else 16
    teacher, dtype = qwen("1.5b", device, small, torch.bfloat16).requires_grad_(False), torch.bfloat16
    student = qwen("0.5b", device, small)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=True)
    g = torch.Generator().manual_seed(0)
    data = [common.Example(x[:width // 2], x[:width // 2], x[width // 2:])
            for x in torch.randint(1, student.vocab, (n, width), generator=g).tolist()]
    bench.DEVICE = torch.device(device)

    def contender(loss, size, compiled=False):
        parts = [common.collate(data[i:i + size], student).to(bench.DEVICE) for i in range(0, n, size)]
        masks = torch.zeros(size, width, device=device)
        masks[:, width // 2:] = 1
        fwd, teacher_fwd = (common.response_states(m, compiled) for m in (student, teacher))
        kd_loss = common.try_compile(kd_forward.kd_loss) if compiled else kd_forward.kd_loss

        def call():
            for batch in parts:
                if loss is None:
                    value = bench.our_loss(student, teacher, batch, fwd, teacher_fwd, dtype, kd_loss)
                else:
                    value = loss(student, teacher, batch, masks, dtype)
                (value * size / n).backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return call

    calls = {"ours": contender(None, most, True), "ours_eager": contender(None, most),
             "textbook": contender(bench.textbook_loss, micro), **{k: contender(f, micro) for k, f in bench.peers().items()}}
    for name, call in list(calls.items()):
        try:
            start = time.time()
            call()
            rows.append({"work": "gpu_kd_step", "contender": name, "first_call_seconds": round(time.time() - start, 1)})
        except Exception as e:  # out of memory, or a peer that does not run here
            rows.append({"work": "gpu_kd_step", "contender": name, "error": f"{type(e).__name__}: {str(e)[:300]}"})
            optimizer.zero_grad(set_to_none=True)
            del calls[name]
    times = bench.take_turns(calls, 3, 1)
    tokens, response, V = n * width, n * width // 2, student.vocab
    work = tokens * (6 * parameters(student) + 2 * parameters(teacher)) \
        + response * V * (6 * student.config.hidden_size + 2 * teacher.config.hidden_size)
    for name in calls:
        if name != "ours":
            bench.row(rows, "gpu_kd_step", name, times)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
    rows.append({"work": "gpu_kd_step", "contender": "ours", "baseline": "floor", "peak_gib": peak,
                 "response_tokens_per_s": response / min(times["ours"]), "of_floor": work / PEAK_FLOPS / min(times["ours"])})


def speed(rows, device, small):
    rows.part("greedy", greedy, device, small)
    rows.part("sampler", sampler, device, small)
    rows.part("step", step, device, small)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commands", nargs="+", choices=["speed", "correct"])
    parser.add_argument("--json", default=str(Path(os.environ.get("OUT", "out")) / "gpu.jsonl"))
    parser.add_argument("--minutes", type=float, default=6, help="after these no new part of a command is begun")
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args()
    if not torch.cuda.is_available() and not args.rehearse:
        sys.exit("no GPU here: --rehearse runs the same on the CPU with small numbers")
    device, failed = "cpu" if args.rehearse else "cuda", 0
    gpu = torch.cuda.get_device_name() if device == "cuda" else "rehearsal on a CPU"
    files = [ROOT / "common.py", *(ROOT / f"{s}.py" for s in SCRIPTS), Path(__file__), Path(bench.__file__)]
    code = hashlib.sha1(b"".join(f.read_bytes() for f in files)).hexdigest()[:12]
    for name in args.commands:
        rows = Rows(args.json, 60 * args.minutes)
        rows.append({"work": "machine", "command": name, "gpu": gpu, "torch": torch.__version__, "code": code,
                     "transformers": transformers.__version__, "python": platform.python_version()})
        correct(rows, device) if name == "correct" else speed(rows, device, args.rehearse)
        failed += rows.failed
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
