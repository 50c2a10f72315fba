"""On a GPU: is it right, and how fast? Two commands of about four minutes; no network, no datasets.

    python tests/evidence/gpu.py correct     what runs on the GPU computes the same as on a CPU
    python tests/evidence/gpu.py speed       a KD step and decoding, sizes of Qwen2.5 0.5B <- 1.5B
    python tests/evidence/gpu.py correct speed --rehearse     the same with tiny models on a CPU

Each row is written to --out FILE (default: $OUT or out/, gpu.jsonl) as it comes. A part that fails
is a row that says so, and the next part goes on. Weights are random: speed does not depend on them.
"""
import argparse
import gc
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/evidence")]
import bench
import torch
import transformers

import common
import kd_forward

VOCAB, PEAK_FLOPS, PEAK_BYTES = 151_936, 790e12, 4.3e12  # H200, measured: bf16 product, traffic
SIZES = {"0.5b": (896, 4864, 24, 14), "1.5b": (1536, 8960, 28, 12)}
SECONDS = 225  # of a command; after these no part is begun


def qwen(size, small, dtype=torch.float32):
    hidden, between, layers, heads = SIZES[size]
    if small:
        hidden, between, layers, heads = hidden // 16, 128, 2, 4
    torch.manual_seed(hidden)
    with torch.device(bench.DEVICE):
        model = transformers.AutoModelForCausalLM.from_config(transformers.Qwen2Config(
            vocab_size=1000 if small else VOCAB, hidden_size=hidden, intermediate_size=between,
            num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=2,
            max_position_embeddings=2048, tie_word_embeddings=True, eos_token_id=0, pad_token_id=0))
    model = model.to(dtype).eval()
    model.vocab, model.role = model.config.vocab_size, "student"
    model.tokenizer = bench.SimpleNamespace(eos_token_id=0)
    return model


def random_examples(model, n, width):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, model.vocab, (n, width), generator=generator).tolist()
    prompts = [x[:width // 2] for x in ids]
    return [common.Example(prompt, prompt, x[width // 2:]) for prompt, x in zip(prompts, ids)]


# --- correct --------------------------------------------------------------------------------------
def greedy(small):
    """fp32: the greedy texts are those of `generate`, from prompts of different lengths."""
    bench.sample_b64("sample_b64", 8 if small else 64)  # its gate
    yield {"texts": 64}


def gradients(small):
    """KD's first gradient in chunks, recomputed and in bf16, against the textbook's in fp32."""
    teacher, found = qwen("1.5b", small).requires_grad_(False), {}
    data = random_examples(teacher, 4, 32 if small else 256)
    for how in ("textbook", "chunks", "recompute", "bf16"):
        student = qwen("0.5b", small).train()
        teacher = teacher.to(torch.bfloat16 if how == "bf16" else torch.float32)
        if how == "recompute":
            student.gradient_checkpointing_enable({"use_reentrant": False})
        cfg = kd_forward.Config(dtype="bfloat16" if how == "bf16" else "float32")
        batch = common.collate(data, student, teacher)
        if how == "textbook":
            loss = bench.rival(bench.textbook, student, teacher, batch, cfg)
        else:
            loss = bench.our_kd(student, teacher, batch, cfg)
        found[how] = torch.cat([p.grad.flatten() for p in student.parameters()]), loss.item()
        right, right_loss = found["textbook"]
        off = float((found[how][0] - right).norm() / right.norm())
        yield {"how": how, "loss": loss.item(), "gradient_off": off}
        limit = 0.1 if how == "bf16" else 1e-3
        assert off < limit and math.isclose(loss.item(), right_loss, rel_tol=limit), how


# kd_forward.py, except that it ends behind its first checkpoint, as if it was killed
KILLED = """import sys, common, kd_forward
save = common.Run.save
common.Run.save = lambda run, step: (save(run, step), sys.exit(9))
common.main(kd_forward.train, kd_forward.Config)"""


def script(small):
    """kd_forward.py with its defaults: its losses on the device are those on a CPU, compiled ones
    too, and those of a resumed run are the same bit by bit."""
    ways = {"cpu": "--device cpu", "fp32": "", "recompute": "--recompute", "resume": "",
            "bf16": "--dtype bfloat16", "compile": "--compile"}
    with tempfile.TemporaryDirectory() as folder:
        losses, seconds = {}, 600 if small else 100
        for how, words in ways.items():
            out, start = f"{folder}/{how}", time.time()
            flags = ("--steps 12 --batch-size 16 --log-every 1 --save-every 5 --eval-rows 8 "
                     f"--dtype float32 --out {out} {words}").split()
            command = [sys.executable, "kd_forward.py", *flags]
            if how == "resume":
                killed = [sys.executable, "-c", KILLED, *flags]
                subprocess.run(killed, cwd=ROOT, capture_output=True, timeout=seconds)
                assert not Path(out, "result.json").exists()
                command = [sys.executable, "kd_forward.py", "--resume", out]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True,
                                  timeout=seconds)
            assert done.returncode == 0, f"{how}: {done.stderr[-600:]}"
            log = [json.loads(x) for x in Path(out, "log.jsonl").read_text().splitlines()]
            losses[how] = [x["loss"] for x in log if "loss" in x]
            off = max(abs(a - b) / abs(a) for a, b in zip(losses["cpu"], losses[how]))
            peak = json.loads(Path(out, "result.json").read_text())["peak_gib"]
            yield {"how": how, "off_cpu": off, "peak_gib": peak, "seconds": time.time() - start}
            assert len(losses[how]) == 12, f"{how}: {len(losses[how])} lines of the log"
            assert off < (5e-2 if how == "bf16" else 5e-3), f"{how}: other losses"  # TF32
            assert how != "resume" or losses[how] == losses["fp32"], "resumed otherwise"


# --- speed ----------------------------------------------------------------------------------------
def step(small):
    """A KD step of 32 x 512 tokens, half of them responses, bf16: eager, compiled, recomputed."""
    n, width, micro = (4, 32, 2) if small else (32, 512, 8)
    teacher = qwen("1.5b", small, torch.bfloat16).requires_grad_(False)
    cfg = kd_forward.Config(dtype="bfloat16", batch_size=n, accum=n // micro)
    data = random_examples(teacher, n, width)
    for how in ("eager", "recompute", "compile"):
        student = qwen("0.5b", small).train()
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=True)
        loss_of = kd_forward.kd_loss
        if how == "recompute":
            student.gradient_checkpointing_enable({"use_reentrant": False})
        if how == "compile":  # as in common.load_pair and kd_forward.train
            torch._dynamo.config.recompile_limit = 64
            student.base_model.compile(dynamic=True)
            teacher.base_model.compile(dynamic=True)
            loss_of = torch.compile(loss_of, dynamic=True)
        parts = common.micro_batches(data, student, teacher, cfg)

        def call(student=student, optimizer=optimizer, loss_of=loss_of, parts=parts):
            for batch in parts:
                bench.our_kd(student, teacher, batch, cfg, loss_of=loss_of)
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        if bench.DEVICE.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        first, seconds = bench.seconds_of(call), min(bench.seconds_of(call) for _ in range(3))
        tokens, response = n * width, n * width // 2
        inner = [m.num_parameters() - m.vocab * m.config.hidden_size for m in (student, teacher)]
        work = tokens * (6 * inner[0] + 2 * inner[1]) + response * student.vocab * (
            6 * student.config.hidden_size + 2 * teacher.config.hidden_size)
        yield {"how": how, "first_call_seconds": first, "ms": 1000 * seconds,
               "tokens_per_s": tokens / seconds, "of_peak_flops": work / seconds / PEAK_FLOPS,
               "peak_gib": torch.cuda.max_memory_allocated() / 2**30}


def decode(small):
    """Milliseconds of a decoding step, against the bytes that it must read."""
    new = 4 if small else 64
    model = qwen("0.5b", small, torch.float32 if small else torch.bfloat16)
    read = 2 * sum(p.numel() for p in model.parameters())
    for size in (1, 32, 256):
        prompts = [e.prompt for e in random_examples(model, size, 128)]
        ids = torch.tensor(prompts, device=bench.DEVICE)
        ours = lambda: common.sample(model, prompts, new, seed=1)
        generate = lambda: model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True,
                                          top_k=0, min_new_tokens=new, max_new_tokens=new)
        for call in (ours, generate):
            call()
        times = [min(bench.seconds_of(call) for _ in range(2)) for call in (ours, generate)]
        yield {"batch": size, "ms_per_token": 1000 * times[0] / new,
               "generate_ms_per_token": 1000 * times[1] / new,
               "tokens_per_s": size * new / times[0],
               "of_peak_bytes": read * new / PEAK_BYTES / times[0]}


PARTS = {"correct": (greedy, gradients, script), "speed": (step, decode)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("commands", nargs="+", choices=list(PARTS))
    parser.add_argument("--out", default=str(Path(os.environ.get("OUT", "out"), "gpu.jsonl")))
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args()
    if bench.DEVICE.type == "cpu" and not args.rehearse:
        sys.exit("no GPU here: --rehearse runs everything on the CPU with tiny models")
    failed = 0
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    with open(args.out, "a", buffering=1) as file:
        def write(row):
            row = {k: round(v, 7) if isinstance(v, float) else v for k, v in row.items()}
            line = json.dumps(row)
            print(line, flush=True)
            file.write(line + "\n")

        gpu = torch.cuda.get_device_name() if bench.DEVICE.type == "cuda" else "CPU, tiny models"
        write({"part": "machine", "gpu": gpu, "torch": torch.__version__,
               "transformers": transformers.__version__})
        for command in args.commands:
            torch.set_float32_matmul_precision("highest" if command == "correct" else "high")
            end = time.time() + (math.inf if args.rehearse else SECONDS)
            for part in PARTS[command]:
                row = {"part": part.__name__, "passed": time.time() < end}
                try:
                    for found in part(args.rehearse) if row["passed"] else ():
                        write({"part": part.__name__, **found})
                except Exception as e:
                    row |= {"passed": False, "error": f"{type(e).__name__}: {str(e)[:500]}"}
                write(row)
                failed += not row["passed"]
                gc.collect()
                torch.cuda.empty_cache()
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
