"""For the day a GPU is there: all scripts under CUDA and torch.compile, then speed at real sizes. No network needed.

    python tests/gpu.py --json FILE         about 10 minutes on one large GPU
    python tests/gpu.py --rehearse          the same on a CPU with small numbers: shows that the command itself works

Speed does not depend on the weights, so those of the real configurations (Qwen2.5 0.5B <- 1.5B) are random.
"""
import argparse
import importlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
import bench
import torch
import transformers
from conftest import WORDS, small_config, small_tokenizer

import common

QWEN = {"0.5b": dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14),
        "1.5b": dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12)}
VOCAB, PEAK_FLOPS, PEAK_BYTES = 151_936, 798e12, 3.0e12  # an H100: a large bf16 product, memory traffic, as measured
PAIRS = dict(max_prompt=24, max_response=8, eval_rows=8, kl_on="references")
SCRIPTS = {  # script: settings beside the common ones; gold.py needs an LLM that can write, that of its tiny world
    "kd_forward": PAIRS, "llmr": PAIRS, "dpkd": PAIRS, "ddk": dict(interval=5, gap_rows=4, eval_rows=4, max_tokens=16),
    "gold": dict(budget=64, retrain=2, eval_rows=20, teacher="tiny", student="tiny", data="auto"),
}


def pair(root, kind):
    tokenizer = small_tokenizer(kind.startswith("t5"))
    for name, size, seed in (("teacher", 64, 1), ("student", 32, 2)):
        torch.manual_seed(seed)
        config = small_config(kind, size, len(tokenizer) + 8)
        for name_of in ("dropout_rate", "resid_pdrop", "embd_pdrop", "attn_pdrop"):  # its noise differs between devices
            if hasattr(config, name_of):
                setattr(config, name_of, 0.0)
        auto = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
        auto.from_config(config).save_pretrained(root / kind / name)
        tokenizer.save_pretrained(root / kind / name)
    return dict(teacher=str(root / kind / "teacher"), student=str(root / kind / "student"))


def correct(rows, device):
    """Every script, 20 steps: fp32 on the CPU, fp32 on the device, bf16 and compiled on the device. The losses of a
    script without sampling agree; elsewhere the noise differs between devices, and the runs must end and stay finite."""
    with tempfile.TemporaryDirectory() as tmp:
        root = Path(tmp)
        data = root / "rows.jsonl"
        data.write_text("".join(json.dumps({"prompt": f"{a} {b} {i}", "response": f"{b} {a} {b}"}) + "\n"
                                for i in range(2) for a in WORDS for b in WORDS[:8]))
        for name, first in (("a.txt", 0), ("b.txt", 5)):
            (root / name).write_text("\n\n".join(f"{a} {b} {c}" for a in WORDS for b in WORDS[first:] for c in WORDS[:5]))
        for kind in ("llama", "gpt2", "t5"):
            models = pair(root, kind)
            for script, extra in SCRIPTS.items():
                if kind != "llama" and script != "kd_forward":
                    continue
                losses, module = {}, importlib.import_module(script)
                for name, how in {"cpu": dict(device="cpu", dtype="float32", compile=False),
                                  "fp32": dict(device=device, dtype="float32", compile=False),
                                  "bf16, compiled": dict(device=device, dtype="bfloat16", compile=True)}.items():
                    out = root / f"{kind}-{script}-{name}".replace(" ", "")
                    start = time.time()
                    texts = {"domains": f"one={root / 'a.txt'},two={root / 'b.txt'}"} if script == "ddk" else {"data": str(data)}
                    module.train(module.Config(**{**models, **texts, **how, **extra}, steps=20, batch_size=16, warmup=2,
                                               eval_every=20, log_every=1, out=str(out)))
                    log = [json.loads(x) for x in (out / "log.jsonl").read_text().splitlines()]
                    losses[name] = [x["loss"] for x in log if "loss" in x]
                    rows.append({"work": "correct", "script": script, "model": kind, "how": name, "first": losses[name][0],
                                 "last": losses[name][-1], "seconds": round(time.time() - start, 1)})
                    assert all(map(math.isfinite, losses[name])), rows[-1]
                if script == "kd_forward":
                    for name, near in (("fp32", 1e-3), ("bf16, compiled", 5e-2)):
                        worst = max(abs(a - b) / abs(a) for a, b in zip(losses["cpu"], losses[name]))
                        assert worst < near, f"{kind}, {name}: loss {worst:.1e} off the CPU's"


def qwen(size, device, small, dtype=torch.float32):
    n = QWEN[size] if not small else dict(hidden_size=64 if size == "0.5b" else 128, intermediate_size=128,
                                          num_hidden_layers=2, num_attention_heads=2)
    config = transformers.Qwen2Config(vocab_size=1000 if small else VOCAB, num_key_value_heads=2, tie_word_embeddings=True,
                                      max_position_embeddings=2048, bos_token_id=0, eos_token_id=0, pad_token_id=0, **n)
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    model.vocab = config.vocab_size
    return model


def parameters(model):
    return sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()


def sampler(rows, device, small):
    """The static cache with a compiled step: greedy equals generate, kept log-probs equal the training forward's; then
    speed at batch 32 against generate and against the bytes that one decoding step must read."""
    model = qwen("0.5b", device, small, torch.float32 if small else torch.bfloat16)
    g = torch.Generator().manual_seed(0)
    n, new = (4, 8) if small else (32, 128)
    prompts = [torch.randint(1, model.vocab, (64,), generator=g).tolist() for _ in range(n)]
    ids = torch.tensor(prompts, device=device)
    how = dict(eos=0, compiled=True, static=True)
    ours, logprobs = common.sample(model, prompts, new, temperature=1.0, seed=1, **how)
    batch = common.collate([common.Example(p, p, r) for p, r in zip(prompts, ours)], model).to(torch.device(device))
    with torch.no_grad():
        again = common.token_logprobs(model, common.response_states(model)(batch), batch.targets)
    off = (again.cpu() - torch.cat(logprobs)).abs().mean().item()
    greedy = common.sample(model, prompts, new, temperature=0, **how)[0]
    theirs = model.generate(ids, do_sample=False, max_new_tokens=new, eos_token_id=0, pad_token_id=0)[:, 64:].tolist()
    same = sum(a[:8] == b[:8] for a, b in zip(greedy, theirs)) / n  # bf16: later tokens may part ways on near ties
    rows.append({"work": "sampler", "logprob_difference": off, "greedy_equal_8_tokens": same})
    assert off < 0.05 and same > 0.7, rows[-1]
    times = bench.take_turns({
        "ours": lambda: common.sample(model, prompts, new, seed=1, **how),
        "generate": lambda: model.generate(ids, do_sample=True, top_k=0, top_p=1.0, min_new_tokens=new, max_new_tokens=new,
                                           eos_token_id=0, pad_token_id=0)}, 3, 1)
    bench.row(rows, "gpu_sample_b32", "generate", times)
    read = 2 * (parameters(model) + model.vocab * model.config.hidden_size)
    rows[-1]["of_floor"] = read / PEAK_BYTES * new / min(times["ours"])


def step(rows, device, small):
    """KD, 0.5B <- 1.5B, 32 sequences of 256 + 256 tokens, bf16: ours, ours compiled, textbook and peers in the micro-
    batches that fit; response tokens a second and the share of the peak."""
    n, width, micro = (4, 32, 2) if small else (32, 512, 4)
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

        def call():
            for batch in parts:
                value = bench.our_loss(student, teacher, batch, fwd, teacher_fwd, dtype) if loss is None else \
                    loss(student, teacher, batch, masks, dtype)
                (value * size / n).backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return call
    calls = {"ours": contender(None, 16 if not small else 2, True), "ours_eager": contender(None, 16 if not small else 2),
             "textbook": contender(bench.textbook_loss, micro), **{k: contender(f, micro) for k, f in bench.peers().items()}}
    times = bench.take_turns(calls, 3, 1)
    tokens, rows_, V = n * width, n * width // 2, student.vocab
    work = tokens * (6 * parameters(student) + 2 * parameters(teacher)) \
        + rows_ * V * (6 * student.config.hidden_size + 2 * teacher.config.hidden_size)
    for name in calls:
        if name != "ours":
            bench.row(rows, "gpu_kd_step", name, times)
    rows.append({"work": "gpu_kd_step", "contender": "ours", "baseline": "floor", "response_tokens_per_s": rows_ / min(times["ours"]),
                 "of_floor": work / PEAK_FLOPS / min(times["ours"])})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", default="")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--only", nargs="*", default=["correct", "sampler", "step"])
    args = parser.parse_args()
    if not torch.cuda.is_available() and not args.rehearse:
        sys.exit("no GPU here: --rehearse runs the same on the CPU with small numbers")
    device, rows = "cpu" if args.rehearse else "cuda", []
    for name, call in (("correct", lambda: correct(rows, device)), ("sampler", lambda: sampler(rows, device, args.rehearse)),
                       ("step", lambda: step(rows, device, args.rehearse))):
        if name in args.only:
            start = time.time()
            call()
            print(f"{name}: passed in {time.time() - start:.0f} s", flush=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    gpu = torch.cuda.get_device_name() if device == "cuda" else "rehearsal on a CPU"
    text = json.dumps({"machine": f"{gpu}, torch {torch.__version__}, transformers {transformers.__version__}",
                       "commit": commit, "gate": "passed", "rows": rows}, indent=1)
    print(text)
    if args.json:
        Path(args.json).write_text(text)


if __name__ == "__main__":
    main()
