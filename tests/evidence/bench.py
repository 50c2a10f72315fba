"""Speed as ratios within one run: the contenders take turns (A B C A B C ...), medians count.

    python tests/evidence/bench.py [--rounds 3] [--only kd_step sample] [--json FILE]

First a gate: both sides of every work start from the same weights, and their first gradients and
the losses of five steps must agree (in fp32 to 1e-4). If one pair does not, no time is printed and
the exit status is 1. A ratio above 1 says that ours is faster, or smaller.

`textbook` is the loop that everybody writes: both models' logits for every position, masked
afterwards. Peers take part where they are installed (pip install trl accelerate liger-kernel): the
losses of TRL's DistillationTrainer and of Liger-Kernel, without the trainers around them.

The floor of a work is the time of its matrix products alone, attention's included, plus the
optimizer's weights, gradients and moments read and written once at the speed of a copy. `of_floor`
is the floor's share of our time: what is missing to 1 is overhead.
"""
import argparse
import ctypes
import json
import math
import os
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import common
import dpkd
import kd_forward
import llmr

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
B, T, N = 16, 128, 50  # sequences, their tokens, and how many of these belong to the response


def model(hidden, layers, vocab, seed, dtype=torch.float32):
    """A Llama with random weights, for speed does not depend on them. Token 0 is EOS."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=hidden * 5 // 2,
        num_hidden_layers=layers, num_attention_heads=4, max_position_embeddings=1024,
        tie_word_embeddings=True, eos_token_id=0, pad_token_id=0)
    made = LlamaForCausalLM(config).to(DEVICE, dtype).eval()
    made.vocab, made.tokenizer, made.role = vocab, SimpleNamespace(eos_token_id=0), "student"
    return made


def teacher_model(vocab, dtype=torch.float32, layers=4):
    return model(512, layers, vocab, 1, dtype).requires_grad_(False)


def examples(vocab, seed=0):
    ids = torch.randint(1, vocab, (B, T), generator=torch.Generator().manual_seed(seed)).tolist()
    prompts = [x[:-N] for x in ids]
    return [common.Example(prompt, prompt, x[-N:]) for prompt, x in zip(prompts, ids)]


# --- What is measured: seconds, GiB, and the floor ------------------------------------------------
def seconds_of(call):
    wait = torch.cuda.synchronize if DEVICE.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def memory_of(call):
    """GiB that a call takes at most beyond what was there before (on a CPU: Linux only)."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**30
    status = lambda key: int(Path("/proc/self/status").read_text().split(key)[1].split()[0]) / 2**20
    ctypes.CDLL("libc.so.6").malloc_trim(0)         # or what was freed before would serve unseen
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back
    before = status("VmRSS:")
    call()
    return status("VmHWM:") - before


class Products(TorchDispatchMode):
    """Does every matrix product inside again alone, and adds up their seconds."""
    seconds = 0.0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        call, name = lambda: function(*args, **(kwargs or {})), function.overloadpacket.__name__
        if name in ("mm", "addmm", "bmm", "baddbmm") or name.startswith("_scaled_dot_product"):
            self.seconds += min(seconds_of(call) for _ in range(3))
        return call()


def floor(call, parameters):
    with Products() as products:
        call()
    a, b = torch.zeros(2, parameters, device=DEVICE)
    copy = min(seconds_of(lambda: b.copy_(a)) for _ in range(5))
    return products.seconds + 3.5 * copy  # a copy makes 2 passes; AdamW reads 4 arrays, writes 3


# --- A work: its contenders, their gate, their turns ----------------------------------------------
@dataclass
class Work:
    name: str
    contenders: dict     # {name: call}; the first is ours
    gauge: object = seconds_of
    parameters: int = 0  # that the optimizer updates

    def measure(self, rounds):
        """A row for each rival, in seconds or GiB. A round is three turns; the median counts."""
        found = {side: [] for side in self.contenders}
        for _ in range(3 * rounds + 1):
            for side, call in self.contenders.items():
                found[side].append(self.gauge(call))
        turns = {side: values[1:] for side, values in found.items()}  # the first one warms up
        middle = {side: statistics.median(values) for side, values in turns.items()}
        of_floor = None
        if self.gauge is seconds_of:
            least = floor(self.contenders["ours"], self.parameters)
            of_floor = round(least / middle["ours"], 3)
        for side in list(turns)[1:]:
            ratio = statistics.median(b / a for a, b in zip(turns["ours"], turns[side]))
            yield {"work": self.name, "contender": "ours", "baseline": side,
                   "ratio": round(ratio, 4), "of_floor": of_floor,
                   "ours": round(middle["ours"], 4), "theirs": round(middle[side], 4)}


def training(work, losses, new_student, lr=1e-3, tolerance=1e-4):
    """The Work of {contender: function(student) that calls backward() and returns the loss}. Each
    contender has its own student; clipping and optimizer are the same for all."""
    steps, first, values = {}, {}, {}
    for side, loss in losses.items():
        student = new_student()
        optimizer = torch.optim.AdamW(student.parameters(), lr=lr, betas=(0.9, 0.98), fused=True)

        def step(student=student, optimizer=optimizer, loss=loss):
            value = loss(student).item()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return value

        loss(student)
        first[side] = torch.cat([p.grad.flatten() for p in student.parameters()])
        student.zero_grad()
        steps[side], values[side] = step, [step() for _ in range(5)]
        off = [abs(a - b) / abs(b) for a, b in zip(values[side], values["ours"])]
        off += [float((first[side] - first["ours"]).norm() / first["ours"].norm())]
        if not all(x < tolerance for x in off):  # not a number fails, too
            if side not in PEERS:
                sys.exit(f"{work}: losses or gradients of ours and {side} differ by {max(off):.1e}")
            print(f"{work}: {side} is left out, its losses or gradients differ by {max(off):.1e}")
            del steps[side]
    return Work(work, steps, parameters=student.num_parameters())


# --- KD -------------------------------------------------------------------------------------------
def our_kd(student, teacher, batch, cfg, kept=None, loss_of=kd_forward.kd_loss):
    """The lines of kd_forward.train up to the optimizer."""
    n_tokens, totals = len(batch.targets), torch.zeros(3, device=DEVICE)
    with common.precision(cfg, DEVICE):
        student_hidden = common.response_states(student, batch)
        if kept is None:
            teacher_hidden = common.response_states(teacher, batch.for_teacher)
        else:
            teacher_hidden = kd_forward.cached_states(teacher, batch, kept)
    for rows, part in common.in_chunks(student_hidden, student):
        student_logits = common.logits_of(student, part)
        teacher_logits = common.logits_of(teacher, teacher_hidden[rows])
        targets = batch.targets[rows]
        loss, ce, kl = loss_of(student_logits, teacher_logits, targets, cfg.alpha, cfg.tau)
        (loss.sum() / n_tokens).backward()
        totals += torch.stack([loss.detach().sum(), ce.detach().sum(), kl.detach().sum()])
    return totals[0] / n_tokens


def textbook(student, teacher, tokens, labels):
    """(B,T,V) logits of both models, shift, KL at every position, mask, mean."""
    student_logits = student(input_ids=tokens).logits[:, :-1].float()
    with torch.no_grad():
        teacher_logits = teacher(input_ids=tokens).logits[:, :-1].float()
    logp, logq = F.log_softmax(teacher_logits, -1), F.log_softmax(student_logits, -1)
    kl, mask = (logp.exp() * (logp - logq)).sum(-1), labels[:, 1:] != -100
    return (kl * mask).sum() / mask.sum()


def bodies(student, teacher, tokens):
    """The states and heads of both models, which the two losses below take."""
    hidden = student.base_model(input_ids=tokens)[0][:, :-1]
    with torch.no_grad():
        teacher_hidden = teacher.base_model(input_ids=tokens)[0][:, :-1]
    return hidden, teacher_hidden, student.lm_head.weight.to(hidden.dtype), teacher.lm_head.weight


def trl_chunked(student, teacher, tokens, labels):
    from trl.trainer.distillation_trainer import _chunked_divergence_loss
    mask = (labels[:, 1:] != -100).float()
    return _chunked_divergence_loss(*bodies(student, teacher, tokens), mask, beta=0.0)[0]


def liger(student, teacher, tokens, labels):
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    fused = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0,
                                    compiled=False)
    hidden, teacher_hidden, weight, teacher_weight = bodies(student, teacher, tokens)
    return fused(hidden.flatten(0, 1), weight, teacher_hidden.flatten(0, 1), teacher_weight,
                 labels[:, 1:].flatten())


PEERS = {"trl_chunked": trl_chunked, "liger": liger}


def rival(loss_of, student, teacher, batch, cfg):
    """A loss above with its backward pass; labels are -100 at prompts, as these losses expect."""
    labels = torch.full_like(batch.tokens, -100)
    labels.view(-1)[batch.positions + 1] = batch.targets
    with common.precision(cfg, DEVICE):
        loss = loss_of(student, teacher, batch.tokens, labels)
    loss.backward()
    return loss.detach()


def kd_step(name):
    vocab, fp32 = {"v32k": 32_000, "v4k": 4000}[name.split("_")[2]], name.endswith("fp32")
    cfg = kd_forward.Config(dtype="float32" if fp32 else "bfloat16")
    teacher = teacher_model(vocab, getattr(torch, cfg.dtype))
    batch = common.collate(examples(vocab), teacher, teacher)
    losses = {"ours": lambda student: our_kd(student, teacher, batch, cfg),
              "textbook": lambda student: rival(textbook, student, teacher, batch, cfg)}
    for peer, loss_of in PEERS.items():
        try:
            rival(loss_of, model(256, 2, vocab, 2), teacher, batch, cfg)
            losses[peer] = lambda student, f=loss_of: rival(f, student, teacher, batch, cfg)
        except (ImportError, RuntimeError) as e:  # TRL wraps what is missing
            print(f"{name} without {peer}: {str(e).splitlines()[0]}")
    return training(name, losses, lambda: model(256, 2, vocab, 2), tolerance=1e-4 if fp32 else 0.05)


def loss_memory(name, vocab=152_000):
    """Forward and backward alone, of bodies so small that the logits are all that counts."""
    cfg = kd_forward.Config(dtype="float32")
    teacher = model(64, 1, vocab, 1).requires_grad_(False)
    batch = common.collate(examples(vocab), teacher, teacher)
    losses = {"ours": lambda student: our_kd(student, teacher, batch, cfg),
              "textbook": lambda student: rival(textbook, student, teacher, batch, cfg)}
    training(name, losses, lambda: model(64, 1, vocab, 2))  # the gate
    student = model(64, 1, vocab, 2)
    calls = {side: lambda f=f: f(student) for side, f in losses.items()}
    return Work(name, calls, gauge=memory_of)


def epoch2_cached(name):
    """Four steps of kd_forward.py --cache in its second epoch, against the same in the first."""
    cfg, teacher = kd_forward.Config(dtype="float32"), teacher_model(4000, layers=6)
    batches = [common.collate(examples(4000, seed), teacher, teacher) for seed in range(4)]
    kept = {}
    epoch = lambda student, kept: sum(our_kd(student, teacher, b, cfg, kept) for b in batches)
    losses = {"ours": lambda student: epoch(student, kept),
              "epoch1": lambda student: epoch(student, {})}
    return training(name, losses, lambda: model(192, 2, 4000, 2))


# --- DPKD -----------------------------------------------------------------------------------------
def dpkd_step(name, vocab=32_000, beta=0.1):
    """A step on pairs that are there already, against what code made from a DPO trainer does: both
    responses of both models in full, (2B,T,V), at every step. Ours scores y^p once for the run."""
    teacher, cfg = teacher_model(vocab), dpkd.Config(dtype="float32", beta=beta)
    drawn = [replace(a, response=b.response) for a, b in zip(examples(vocab), examples(vocab, 1))]
    logp_teacher = dpkd.fixed_logprobs(teacher, examples(vocab), cfg).to(DEVICE)
    both = torch.tensor([e.prompt + e.response for e in examples(vocab) + drawn], device=DEVICE)
    chosen = examples(vocab)

    def ours(student):  # as in dpkd.draw_due and dpkd.train
        logp_student = dpkd.fixed_logprobs(teacher, drawn, cfg).to(DEVICE)
        by_teacher = common.collate(chosen, student)
        logq_teacher = dpkd.response_logprobs(student, by_teacher)
        by_student = common.collate(drawn, student)
        logq_student = dpkd.response_logprobs(student, by_student)
        losses, _ = dpkd.preference_loss(
            logq_teacher, logp_teacher, logq_student, logp_student, by_teacher.lengths,
            by_student.lengths, cfg.beta, cfg.length_norm)
        losses.mean().backward()
        return losses.mean().detach()

    def logprobs(model):
        logq = F.log_softmax(model(input_ids=both).logits[:, :-1].float(), -1)
        return logq.gather(-1, both[:, 1:, None])[:, -N:, 0].sum(-1).chunk(2)

    def dpo_way(student):
        q_teacher, q_student = logprobs(student)
        with torch.no_grad():
            p_teacher, p_student = logprobs(teacher)
        loss = -F.logsigmoid(beta * ((q_teacher - p_teacher) - (q_student - p_student))).mean()
        loss.backward()
        return loss.detach()

    losses = {"ours": ours, "textbook": dpo_way}
    return training(name, losses, lambda: model(256, 2, vocab, 2), lr=1e-4)


# --- Sampling and LLMR ----------------------------------------------------------------------------
def sample_b64(name, new=64):
    m = model(256, 4, 4000, 3)
    if name.endswith("ragged"):  # a head whose bias gives EOS a probability of about 1 / 30
        m.lm_head.bias = torch.nn.Parameter(torch.zeros(4000, device=DEVICE))
        m.lm_head.bias.data[0] = math.log(4000 / 30)
    g = torch.Generator().manual_seed(0)
    prompts = [torch.randint(1, 4000, (8 + i % 24,), generator=g).tolist() for i in range(64)]
    ids = common.pad(prompts, left=True).to(DEVICE)
    settings = {"attention_mask": (ids != 0).long(), "max_new_tokens": new, "top_k": 0}
    theirs = m.generate(ids, do_sample=False, **settings)[:, ids.shape[1]:].tolist()
    ours = common.sample(m, prompts, new, temperature=0)
    same = sum(a == b[:len(a)] for a, b in zip(ours, theirs))
    # sums have another order, so a tie may fall either way
    assert same >= 60, f"{name}: greedy decoding agrees for {same} of 64 prompts"
    return Work(name, {"ours": lambda: common.sample(m, prompts, new),
                       "generate": lambda: m.generate(ids, do_sample=True, **settings)})


def llmr_update(name, vocab=32_000):
    """An update against the way of the official code: `generate` that returns the logits of all
    steps, then logits and softmaxes of both models for all response tokens at once, (B,N,V). In
    the gate both learn from the same given responses; behind it each side samples for itself."""
    teacher, asked, cfg = teacher_model(vocab), examples(vocab), llmr.Config(batch_size=B)
    given = [e.response[:-i - 1] + [0] for i, e in enumerate(asked)]
    given_tokens = common.pad([e.prompt + y for e, y in zip(asked, given)]).to(DEVICE)
    ids = torch.tensor([e.prompt for e in asked], device=DEVICE)
    in_gate = True

    def ours(student):  # as in llmr.train with its defaults
        responses = given if in_gate else common.sample(student, [e.prompt for e in asked], N)
        answered = [replace(e, response=y) for e, y in zip(asked, responses)]
        batch, = common.micro_batches(answered, student, teacher, cfg)
        values = common.row_values(lambda f, _, a: llmr.teacher_values(f, a, cfg.value),
                                   teacher, batch.for_teacher)
        action_value, state_value, _ = (
            llmr.pad_responses(v, batch.lengths) for v in values.unbind(-1))
        gain = llmr.returns_to_go(llmr.induced_reward(action_value, state_value, batch.lengths))
        gain = gain[torch.arange(gain.shape[1], device=DEVICE) < batch.lengths[:, None]]
        total = 0.0
        for rows, part in common.in_chunks(common.response_states(student, batch), student):
            logits = common.logits_of(student, part)
            logprobs = common.log_softmax_at(logits, batch.targets[rows])
            weights = llmr.policy_weights(gain[rows], logprobs, logprobs)
            loss = -(weights * logprobs).sum() / cfg.batch_size
            loss.backward()
            total += loss.detach()
        return total

    def official_way(student):
        tokens = given_tokens
        if not in_gate:
            made = student.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, max_new_tokens=N,
                output_scores=True, return_dict_in_generate=True)
            torch.stack(made.scores, 1).softmax(-1)  # (B,N,V): the sampler's, for the ratio
            tokens = made.sequences
        prompt = ids.shape[1]
        y = tokens[:, prompt:]
        inside = (y == 0).cumsum(-1).cumsum(-1) <= 1  # all until the first EOS
        with torch.no_grad():
            f = teacher(input_ids=tokens).logits[:, prompt - 1:-1].float()  # (B,N,V)
            f = f - f.mean(-1, keepdim=True)
            next_value = F.pad(f.amax(-1)[:, 1:], (0, 1)) * (y != 0)  # 0 at the end
            reward = (f.gather(-1, y[..., None])[..., 0] - next_value) * inside
            returns = reward.flip(-1).cumsum(-1).flip(-1)
        logq = student(input_ids=tokens).logits[:, prompt - 1:-1].float().log_softmax(-1)
        loss = -(returns * logq.gather(-1, y[..., None])[..., 0] * inside).sum() / B
        loss.backward()
        return loss.detach()

    losses = {"ours": ours, "official_way": official_way}
    work = training(name, losses, lambda: model(256, 2, vocab, 2), lr=1e-4)
    in_gate = False
    return work


# --- Command line ---------------------------------------------------------------------------------
WORKS = dict.fromkeys(["kd_step_v32k_fp32", "kd_step_v32k_bf16", "kd_step_v4k_fp32",
                       "kd_step_v4k_bf16"], kd_step)
WORKS |= {"loss_memory_v152k": loss_memory, "epoch2_cached": epoch2_cached, "dpkd_step": dpkd_step,
          "sample_b64": sample_b64, "sample_b64_ragged": sample_b64, "llmr_update": llmr_update}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=[""], help="works whose names begin like this")
    parser.add_argument("--json", help="file to write the rows to")
    args = parser.parse_args()
    chosen = [name for name in WORKS if name.startswith(tuple(args.only))]
    a = torch.randn(512, 512, device=DEVICE)
    fp32, bf16 = (min(seconds_of(lambda x=x: x @ x) for _ in range(9)) for x in (a, a.bfloat16()))
    if bf16 > 3 * fp32:
        print("rows of bf16 are left out: this CPU emulates it")
        chosen = [name for name in chosen if not name.endswith("bf16")]
    works = [WORKS[name](name) for name in chosen]  # the gates
    print(f"gate passed: {', '.join(chosen)}", flush=True)
    rows = []
    for work in works:
        for row in work.measure(args.rounds):
            print(json.dumps(row), flush=True)
            rows.append(row)
    if args.json:
        Path(args.json).write_text(json.dumps({"gate": "passed", "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
