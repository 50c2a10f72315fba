"""Speed as ratios within one run: contenders take turns (A B C A B C ...), medians, correctness gate first.

    python tests/evidence/bench.py [--rounds 3] [--json FILE] [--only kd_step sample]
    python tests/evidence/bench.py --print      write the table of the committed assets/bench.json into tests/README.md

A ratio above 1 says that ours is faster (or smaller). `textbook` is the loop that everybody writes: both models'
logits for every position, masked afterwards. It is written plainly below and stays as it is. Peers take part where
they are installed (pip install trl liger-kernel accelerate): the loss functions of TRL's GKDTrainer (trl_gkd) and
DistillationTrainer (trl_chunked) and of Liger-Kernel (liger), called on the same batch without their trainers around
them, which can only help them.

`of the floor` is the share of our time that the matrix products of the work take when they are done again alone, each
with operands of the same shape, layout and dtype, plus the optimizer's weights, gradients and moments read and written
once at the speed of a copy. No implementation of the same mathematics goes below it: what is missing to 1 is overhead.
"""
import argparse
import gc
import itertools
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import torch
import torch.nn.functional as F
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import common
import dpkd
import kd_forward
import llmr

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
B, T, RESPONSE = 16, 128, 50  # 39 % of the tokens are response tokens


def model(hidden, layers, vocab, seed, dtype=torch.float32):
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=vocab, hidden_size=hidden, intermediate_size=hidden * 5 // 2, num_hidden_layers=layers,
                         num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=1024,
                         tie_word_embeddings=True, eos_token_id=0, pad_token_id=0)
    m = LlamaForCausalLM(config).to(DEVICE, dtype)
    m.vocab = vocab
    return m


def examples(vocab, n=B, seed=0):
    g = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(n):
        ids = torch.randint(1, vocab, (T,), generator=g).tolist()
        out.append(common.Example(ids[:T - RESPONSE], ids[:T - RESPONSE], ids[T - RESPONSE:]))
    return out


def textbook_loss(student, teacher, batch, mask, dtype):
    """What everybody writes: (B,T,V) logits of both models, shift, KL at every position, mask, mean."""
    with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
        student_logits = student(input_ids=batch.tokens).logits[:, :-1].float()
        with torch.no_grad():
            teacher_logits = teacher(input_ids=batch.tokens).logits[:, :-1].float()
    logp, logq = F.log_softmax(teacher_logits, -1), F.log_softmax(student_logits, -1)
    kl = (logp.exp() * (logp - logq)).sum(-1)
    return (kl * mask[:, 1:]).sum() / mask[:, 1:].sum()


def bf16_is_fast():
    """Whether this CPU multiplies bfloat16 with instructions made for it: without them a step takes minutes."""
    def seconds(dtype):
        a = torch.randn(512, 512, device=DEVICE).to(dtype)
        a @ a
        begin = time.perf_counter()
        a @ a
        return time.perf_counter() - begin
    return DEVICE.type == "cuda" or seconds(torch.bfloat16) < 5 * seconds(torch.float32)


def peers():
    """{name: loss(student, teacher, batch, mask, dtype)} of what is installed; forward KL, mean over response tokens."""
    def bodies(student, teacher, batch, dtype):
        with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
            hidden = student.base_model(input_ids=batch.tokens)[0][:, :-1]
            with torch.no_grad():
                return hidden, teacher.base_model(input_ids=batch.tokens)[0][:, :-1]

    def trl_gkd(student, teacher, batch, mask, dtype):
        me = SimpleNamespace(teacher_model=teacher, beta=0, generalized_jsd_loss=GKDTrainer.generalized_jsd_loss)
        inputs = dict(input_ids=batch.tokens, attention_mask=torch.ones_like(batch.tokens),
                      labels=batch.tokens.masked_fill(mask == 0, -100))
        with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
            return GKDTrainer.compute_loss(me, student, inputs)

    def trl_chunked(student, teacher, batch, mask, dtype):
        hidden, teacher_hidden = bodies(student, teacher, batch, dtype)
        weights = student.lm_head.weight.to(hidden.dtype), teacher.lm_head.weight.to(teacher_hidden.dtype)
        return _chunked_divergence_loss(hidden, teacher_hidden, *weights, mask[:, 1:], beta=0.0)[0]

    def liger(student, teacher, batch, mask, dtype):
        hidden, teacher_hidden = bodies(student, teacher, batch, dtype)
        labels = batch.tokens.masked_fill(mask == 0, -100)[:, 1:].flatten()
        loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=False)
        return loss(hidden.flatten(0, 1), student.lm_head.weight.to(hidden.dtype), teacher_hidden.flatten(0, 1),
                    teacher.lm_head.weight.to(teacher_hidden.dtype), labels)
    found = {}
    try:
        from trl.experimental.gkd.gkd_trainer import GKDTrainer
        from trl.trainer.distillation_trainer import _chunked_divergence_loss
        found |= {"trl_gkd": trl_gkd, "trl_chunked": trl_chunked}
    except (ImportError, RuntimeError):  # TRL wraps what is missing
        print("TRL is not installed (pip install trl accelerate): its rows are left out")
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
        found["liger"] = liger
    except (ImportError, RuntimeError):  # TRL wraps what is missing
        print("Liger-Kernel is not installed (pip install liger-kernel): its rows are left out")
    return found


def our_loss(student, teacher, batch, fwd, teacher_fwd, dtype, kd_loss=kd_forward.kd_loss):
    with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
        hidden = fwd(batch)
        with torch.no_grad():
            teacher_hidden = teacher_fwd(batch)
    row_loss = lambda q, p, y: kd_loss(q, p, y, 1.0, 1.0)
    return common.rowwise_loss(row_loss, student, hidden, batch.targets, teacher, teacher_hidden)[0] / len(batch.targets)


def clock(call):
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def take_turns(contenders, rounds, repeat):
    """{name: seconds of one call}: median over rounds, the contenders interleaved in every round."""
    times = {name: [] for name in contenders}
    for call in contenders.values():
        call()  # warm-up
    for _ in range(rounds):
        for name, call in contenders.items():
            times[name].append(min(clock(call) for _ in range(repeat)))
    return times


class Products(TorchDispatchMode):
    """Notes every matrix product (attention's too) with the shapes, strides and dtypes of its operands."""
    NAMES = ("mm", "addmm", "bmm", "baddbmm", "_scaled_dot_product_flash_attention_for_cpu",
             "_scaled_dot_product_flash_attention_for_cpu_backward", "_scaled_dot_product_flash_attention",
             "_scaled_dot_product_efficient_attention")

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__ in self.NAMES:
            shape = lambda x: (tuple(x.shape), x.stride(), x.dtype) if torch.is_tensor(x) else x
            key = function, tuple(map(shape, args)), tuple((k, shape(v)) for k, v in (kwargs or {}).items())
            self.seen[key] = self.seen.get(key, 0) + 1
        return out


def floor(call, parameters=0):
    """Seconds that the matrix products of call() take alone, plus the optimizer's traffic for so many parameters."""
    def operand(x):
        if not (isinstance(x, tuple) and len(x) == 3 and isinstance(x[2], torch.dtype)):
            return x
        shape, stride, dtype = x
        room = 1 + sum((n - 1) * step for n, step in zip(shape, stride))
        return torch.randn(room, device=DEVICE).to(dtype).as_strided(shape, stride)

    with Products() as products:
        call()
    total = 0.0
    with torch.no_grad():
        for (function, args, kwargs), times in products.seen.items():
            made, named = [operand(x) for x in args], {k: operand(v) for k, v in kwargs}
            total += times * min(clock(lambda f=function, a=made, k=named: f(*a, **k)) for _ in range(5))
        if parameters:  # read weight, gradient and two moments, write all but the gradient: 7 passes; a copy makes 2
            a, b = torch.zeros(parameters, device=DEVICE), torch.zeros(parameters, device=DEVICE)
            total += 3.5 * min(clock(lambda: b.copy_(a)) for _ in range(5))
    return total


def size(model):
    return sum(p.numel() for p in model.parameters())


def row(rows, work, baseline, times, note="", floor=None):
    ours, theirs = times["ours"], times[baseline]
    ratios = sorted(b / a for a, b in zip(ours, theirs))
    rows.append({"work": work, "contender": "ours", "baseline": baseline, "ratio": round(statistics.median(ratios), 3),
                 "lowest": round(ratios[0], 3), "highest": round(ratios[-1], 3),
                 "ours_ms": round(1000 * statistics.median(ours), 2), "baseline_ms": round(1000 * statistics.median(theirs), 2)})
    r = rows[-1]
    if floor:
        r["of_floor"] = round(floor / statistics.median(ours), 3)
        note += f" {100 * r['of_floor']:.0f} % of our time is the floor"
    print(f"{work:<22} against {baseline:<10} {r['ratio']:6.2f}x  ({r['lowest']:.2f} to {r['highest']:.2f})   "
          f"{r['ours_ms']:9.1f} ms against {r['baseline_ms']:9.1f} ms {note}", flush=True)


def bench_kd_step(rows, rounds, vocab, dtype, name, rivals):
    teacher = model(512, 4, vocab, 1, dtype).eval().requires_grad_(False)
    batch = common.collate(examples(vocab), teacher).to(DEVICE)
    mask = torch.zeros(B, T, device=DEVICE)
    mask[:, T - RESPONSE:] = 1
    sides, losses, steps = {}, {}, {}
    other = {"textbook": textbook_loss, **rivals}
    for side in ("ours", *other):
        student = model(256, 2, vocab, 2)
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, fused=side == "ours")
        fwd, teacher_fwd = common.response_states(student), common.response_states(teacher)
        if side == "ours":
            loss = lambda s=student, f=fwd, t=teacher_fwd: our_loss(s, teacher, batch, f, t, dtype)
        else:
            loss = lambda s=student, f=other[side]: f(s, teacher, batch, mask, dtype)

        def step(loss=loss, optimizer=optimizer, student=student):
            value = loss()
            value.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return value.item()
        sides[side], losses[side], steps[side] = student, loss, step
    # gate: five steps from the same weights on the same batch agree, or no time is printed
    first = {side: [step() for _ in range(5)] for side, step in steps.items()}
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for side in [x for x in first if any(not math.isclose(a, b, rel_tol=tolerance) for a, b in zip(first["ours"], first[x]))]:
        assert side in rivals, f"{name}: losses differ, {first}"
        print(f"{name}: {side} computes something else, so no time is printed: {first[side]} against {first['ours']}")
        del steps[side]
    times, least = take_turns(steps, rounds, 3), floor(steps["ours"], size(sides["ours"]))
    for side in steps:
        if side != "ours":
            row(rows, name, side, times, floor=least)

    def forward_backward(side):
        losses[side]().backward()
        sides[side].zero_grad(set_to_none=True)
    # the head alone: loss and gradient from given hidden states
    with torch.no_grad():
        hidden, teacher_hidden = common.response_states(sides["ours"])(batch).float(), common.response_states(teacher)(batch)
        full, teacher_full = sides["ours"].base_model(batch.tokens)[0].float(), teacher.base_model(batch.tokens)[0]

    def head_ours():
        h = hidden.to(dtype).requires_grad_()
        kd = lambda q, p, y: kd_forward.kd_loss(q, p, y, 1.0, 1.0)
        common.rowwise_loss(kd, sides["ours"], h, batch.targets, teacher, teacher_hidden)[0].backward()

    def head_textbook():
        h = full.to(dtype).requires_grad_()
        with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
            q = sides["ours"].lm_head(h)[:, :-1].float()
            with torch.no_grad():
                p = teacher.lm_head(teacher_full)[:, :-1].float()
        logp, logq = F.log_softmax(p, -1), F.log_softmax(q, -1)
        ((logp.exp() * (logp - logq)).sum(-1) * mask[:, 1:]).sum().backward()
    heads = {"ours": head_ours, "textbook": head_textbook}
    row(rows, name.replace("step", "head"), "textbook", take_turns(heads, rounds, 3), floor=floor(head_ours))


def bench_sample(rows, rounds):
    m = model(256, 4, 4000, 3).eval()
    g = torch.Generator().manual_seed(0)
    prompts = [torch.randint(1, 4000, (8 + i % 24,), generator=g).tolist() for i in range(64)]
    width = max(map(len, prompts))
    ids, mask = common.pad(prompts, width, left=True).to(DEVICE), None
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=DEVICE)
    kw = dict(max_new_tokens=64, eos_token_id=0, pad_token_id=0)
    theirs = m.generate(ids, attention_mask=mask, do_sample=False, **kw)[:, width:]
    ours = common.sample(m, prompts, 64, temperature=0, eos=0)[0]
    same = sum(o == t.tolist()[:len(o)] for o, t in zip(ours, theirs))
    assert same >= 60, f"greedy decoding agrees for {same} of 64 prompts only"  # fp32 ties may fall either way
    row(rows, "sample_b64", "generate", take_turns({
        "ours": lambda: common.sample(m, prompts, 64, eos=0),
        "generate": lambda: m.generate(ids, attention_mask=mask, do_sample=True, top_k=0, top_p=1.0, **kw)}, rounds, 1),
        note="(no row ends early)", floor=floor(lambda: common.sample(m, prompts, 64, eos=0)))
    with torch.no_grad():  # an end of sequence with probability about 1/30 a token: lengths vary as real ones do
        bias = torch.zeros(4000, device=DEVICE)
        bias[0] = math.log(4000 / 30)
    head = m.lm_head
    m.lm_head = torch.nn.Linear(256, 4000).to(DEVICE)
    m.lm_head.weight, m.lm_head.bias = head.weight, torch.nn.Parameter(bias)
    row(rows, "sample_b64_ragged", "generate", take_turns({
        "ours": lambda: common.sample(m, prompts, 64, eos=0),
        "generate": lambda: m.generate(ids, attention_mask=mask, do_sample=True, top_k=0, top_p=1.0, **kw)}, rounds, 1),
        note="(ends about every 30 tokens)", floor=floor(lambda: common.sample(m, prompts, 64, eos=0)))


def bench_llmr(rows, rounds, vocab=32_000, dtype=torch.float32):
    """One update of llmr.py against the official code's way: `generate` that returns the logits of all steps, then
    the teacher's and the student's logits and softmaxes for every response token at once, kept as (B,N,V).
    Both sample for themselves; the gate compares losses and gradient norms on the same responses."""
    teacher = model(512, 4, vocab, 1, dtype).eval().requires_grad_(False)
    prompts = [common.Example(e.prompt, e.prompt, []) for e in examples(vocab)]
    width, marks = T - RESPONSE, []

    def mark():
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        marks.append(time.perf_counter())

    def ours(student, seed, responses=None):  # as in the loop of llmr.py, with its defaults
        fwd, teacher_fwd = common.response_states(student), common.response_states(teacher)
        mark()
        if responses is None:
            responses, _ = common.sample(student, [e.prompt for e in prompts], RESPONSE, seed=seed, eos=0)
        mark()
        answered = [common.Example(e.prompt, e.prompt, r) for e, r in zip(prompts, responses)]
        lengths = torch.tensor([len(r) for r in responses], device=DEVICE)
        with torch.no_grad(), torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
            batch = common.collate(answered, teacher).to(DEVICE)
            values = common.row_scalars(lambda p, y: llmr.teacher_values(p, y, "max"), teacher, teacher_fwd(batch), batch.targets)
        q, v, _ = (common.pad_responses(x, lengths, int(lengths.max())) for x in values)
        returns = llmr.returns_to_go(llmr.induced_reward(q, v, lengths))
        mark()
        batch = common.collate(answered, student).to(DEVICE)
        with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
            hidden = fwd(batch)
        inside = torch.arange(returns.shape[1], device=DEVICE) < lengths[:, None]
        weights = llmr.policy_weights(returns[inside], None, None)
        loss = llmr.policy_gradient_loss(common.token_logprobs(student, hidden, batch.targets), weights) / len(prompts)
        loss.backward()
        return loss

    def official(student, seed, responses=None):
        ids = torch.tensor([e.prompt for e in prompts], device=DEVICE)
        if responses is None:
            torch.manual_seed(seed)
            made = student.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, top_p=1.0, max_new_tokens=RESPONSE,
                                    eos_token_id=0, pad_token_id=0, output_scores=True, return_dict_in_generate=True)
            torch.stack(made.scores, 1).softmax(-1)  # (B,N,V): the probabilities of the sampler, for the ratio
            tokens = made.sequences
        else:
            tokens = torch.cat([ids, torch.tensor(responses, device=DEVICE)], 1)
        y, mask = tokens[:, width:], (tokens[:, width:] == 0).cumsum(-1).cumsum(-1) <= 1  # all until the first end
        ended = (y == 0).any(-1)
        with torch.no_grad(), torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
            f = teacher(input_ids=tokens).logits[:, width - 1:].float()  # (B,N+1,V)
            f = f - f.mean(-1, keepdim=True)
            action_value = f[:, :-1].gather(-1, y[..., None])[..., 0] * mask
            value = f.max(-1).values
            value[:, 1:][(y == 0) | ~mask] = 0
            value[:, -1][~ended] = 0  # cut: our default grants what it subtracts; the official code would discard it
            returns = ((action_value - value[:, 1:]) * mask).flip(-1).cumsum(-1).flip(-1)
        with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
            logq = student(input_ids=tokens).logits[:, width - 1:-1].float().log_softmax(-1)  # (B,N,V)
        loss = -(returns * logq.gather(-1, y[..., None])[..., 0] * mask).sum() / len(prompts)
        loss.backward()
        return loss

    sides, found = {}, {}
    fixed = [e.response for e in examples(vocab)]
    for name, update in (("ours", ours), ("official_way", official)):
        student = model(256, 2, vocab, 2)
        student.eval()
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, fused=True)

        def step(seed=0, responses=None, student=student, optimizer=optimizer, update=update):
            loss = update(student, seed, responses)
            norm = torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            mark()
            return [loss.item(), norm.item()]
        sides[name], found[name] = step, [x for _ in range(5) for x in step(responses=fixed)]
    for a, b in zip(found["ours"], found["official_way"]):
        assert math.isclose(a, b, rel_tol=1e-4 if dtype == torch.float32 else 2e-2), f"llmr_update: losses or norms differ, {found}"
    row(rows, "llmr_update", "official_way", take_turns(sides, rounds, 1), floor=floor(sides["ours"], size(student)))
    shares = []
    for seed in range(rounds):
        marks.clear()
        sides["ours"](seed)
        shares.append([b - a for a, b in itertools.pairwise(marks)])
    parts = [statistics.median(x) for x in zip(*shares)]
    rows[-1] |= {"updates_per_s": round(1 / sum(parts), 2),
                 **{k: round(x / sum(parts), 3) for k, x in zip(("share_sampling", "share_teacher", "share_student"), parts)}}
    print(" " * 22 + ", ".join(f"{k} {rows[-1][k]}" for k in list(rows[-1])[-4:]))


def bench_cache(rows, rounds):
    teacher, student = model(512, 6, 4000, 1).eval().requires_grad_(False), model(192, 2, 4000, 2)
    data = examples(4000, 64)
    cfg = SimpleNamespace(batch_size=16, accum=1, seed=0, compile=False, cache_gib=1.0)
    batches = common.Batches(data, student, teacher, cfg, DEVICE)
    fwd, plain = common.response_states(student), common.response_states(teacher)
    cached = common.teacher_states(teacher, batches, cfg)

    def epoch(states):
        for step in range(4):
            batch = batches.at(step)[0]
            with torch.no_grad():
                teacher_hidden = states(batch.teacher_batch)
            kd = lambda q, p, y: kd_forward.kd_loss(q, p, y, 1.0, 1.0)
            common.rowwise_loss(kd, student, fwd(batch), batch.targets, teacher, teacher_hidden)[0].backward()
    epoch(cached)
    row(rows, "epoch2_cached", "epoch1", take_turns({"ours": lambda: epoch(cached), "epoch1": lambda: epoch(plain)}, rounds, 1))


def bench_dpkd(rows, rounds, vocab=32_000, dtype=torch.float32):
    """One step of dpkd.py on pairs (y_t, y_s) that are there already, against what code made from a DPO trainer does:
    both texts of both models in full, (2B,T,V), every time. Ours scores y_t with the teacher once for the whole run."""
    teacher = model(512, 4, vocab, 1, dtype).eval().requires_grad_(False)
    chosen, drawn = examples(vocab, seed=0), examples(vocab, seed=1)
    drawn = [common.Example(c.prompt, c.prompt, d.response) for c, d in zip(chosen, drawn)]
    batch, batch_s = (common.collate(x, teacher).to(DEVICE) for x in (chosen, drawn))
    both = torch.cat([batch.tokens, batch_s.tokens])
    mask = torch.zeros(2 * B, T, device=DEVICE)
    mask[:, T - RESPONSE:] = 1

    def textbook(student):
        def sums(model):
            with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
                logits = model(input_ids=both).logits[:, :-1].float()
            logq = F.log_softmax(logits, -1).gather(-1, both[:, 1:, None])[..., 0]
            return (logq * mask[:, 1:]).sum(-1).chunk(2)
        q_t, q_s = sums(student)
        with torch.no_grad():
            p_t, p_s = sums(teacher)
        return -F.logsigmoid(0.1 * ((q_t - p_t) - (q_s - p_s))).mean() - q_t.sum() / len(batch.targets)

    def score(model, batch):  # log p(y|x) of whole responses, without gradient
        with torch.no_grad(), torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
            hidden = common.response_states(model)(batch)
            values = common.row_scalars(lambda z, y: (common.log_softmax_at(z, y),), model, hidden, batch.targets)
            return values[0].new_zeros(len(batch.lengths)).index_add(0, batch.owner, values[0])
    p_t = score(teacher, batch)

    def ours(student):
        p_s, fwd, q = score(teacher, batch_s), common.response_states(student), []
        for b in (batch, batch_s):
            with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
                hidden = fwd(b)
            q.append(dpkd.response_logprobs(student, hidden, b))
        return dpkd.preference_loss(q[0], p_t, q[1], p_s, None, None, 0.1, False)[0].mean() - q[0].sum() / len(batch.targets)

    steps, found = {}, {}
    for name, loss in (("ours", ours), ("textbook", textbook)):
        student = model(256, 2, vocab, 2)
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, fused=name == "ours")

        def step(student=student, optimizer=optimizer, loss=loss):
            value = loss(student)
            value.backward()
            norm = torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return [value.item(), norm.item()]
        steps[name], found[name] = step, [x for _ in range(5) for x in step()]
    for a, b in zip(found["ours"], found["textbook"]):
        assert math.isclose(a, b, rel_tol=1e-4), f"dpkd_step: losses or norms differ, {found}"
    row(rows, "dpkd_step", "textbook", take_turns(steps, rounds, 2), floor=floor(steps["ours"], size(student)))


def bench_gold(rows, rounds):
    """What GOLD's LLM writes in a round, 16 texts from prompts of different length: in one call, against `generate` in
    one padded batch, and prompt by prompt. top-k 50, top-p .95, ends after about 30 tokens."""
    m = model(256, 4, 4000, 3).eval()
    head, m.lm_head = m.lm_head, torch.nn.Linear(256, 4000).to(DEVICE)
    m.lm_head.weight = head.weight
    with torch.no_grad():
        m.lm_head.bias.zero_()
        m.lm_head.bias[0] = math.log(50 / 30)  # of the 50 tokens that top-k leaves
    g = torch.Generator().manual_seed(0)
    prompts = [torch.randint(1, 4000, (150 + 7 * i,), generator=g).tolist() for i in range(16)]
    width = max(map(len, prompts))
    ids = common.pad(prompts, width, left=True).to(DEVICE)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=DEVICE)
    kw = dict(max_new_tokens=64, eos_token_id=0, pad_token_id=0)
    theirs = m.generate(ids, attention_mask=mask, do_sample=False, **kw)[:, width:].tolist()
    ours = common.sample(m, prompts, 64, temperature=0, eos=0)[0]
    assert sum(a == b[:len(a)] for a, b in zip(ours, theirs)) >= 15, "gold_round: greedy decoding does not agree"
    kw |= dict(do_sample=True, top_k=50, top_p=0.95)
    times = take_turns({"ours": lambda: common.sample(m, prompts, 64, top_k=50, top_p=0.95, eos=0),
                        "generate": lambda: m.generate(ids, attention_mask=mask, **kw),
                        "one_by_one": lambda: [m.generate(torch.tensor([p], device=DEVICE), **kw) for p in prompts]}, rounds, 1)
    for baseline in ("generate", "one_by_one"):
        row(rows, "gold_round", baseline, times)


def script(name, folder, *settings):
    """Seconds of `python name.py` as a reader would call it, and its result.json. The tiny world is built beforehand."""
    command = [sys.executable, f"{name}.py", *settings, "--out", str(Path(folder) / name), "--overwrite"]
    seconds = clock(lambda: subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL))
    return seconds, json.loads((Path(folder) / name / "result.json").read_text())


def bench_ddk(rows, rounds):
    """What looking at the gaps costs ddk.py on the tiny world: the run against itself without its looks. A ratio below
    1 is the share of time left for training."""
    with tempfile.TemporaryDirectory() as folder:
        script("ddk", folder, "--steps", "0")
        found = [script("ddk", folder, "--steps", "150", "--save-every", "1000", "--eval-every", "1000")[1] for _ in range(rounds)]
    times = {"ours": [r["seconds"] for r in found], "no_looks": [r["seconds"] - r["gap_seconds"] for r in found]}
    row(rows, "ddk_overhead", "no_looks", times)


def bench_lessons(rows):
    """Each script with its defaults, start to end, the tiny worlds being there."""
    with tempfile.TemporaryDirectory() as folder:
        for name in SCRIPTS:
            script(name, folder, "--steps", "0", *(["--budget", "32"] if name == "gold" else []))  # builds what is missing
            seconds, _ = script(name, folder)
            rows.append({"work": f"lesson_{name}", "contender": "ours", "seconds": round(seconds, 1)})
            print(f"lesson_{name:<15} python {name}.py: {seconds:.0f} s", flush=True)


MEMORY = """
import sys; sys.path.insert(0, "tests/evidence"); import bench, common, torch
side, layers, vocab = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
student, teacher = bench.model(64 * layers, layers, vocab, 2), bench.model(64, 1, vocab, 1).eval().requires_grad_(False)
if side == "recomputed":
    common.recompute(student)
batch = common.collate(bench.examples(vocab), teacher)
mask = torch.zeros(bench.B, bench.T); mask[:, bench.T - bench.RESPONSE:] = 1
for p in student.parameters(): p.grad = torch.zeros_like(p)
def status(key):  # Linux: kB; the high-water mark is set back first, or the making of the models would count
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) / 2**20
open("/proc/self/clear_refs", "w").write("5")
base = status("VmRSS")
if side != "textbook":
    bench.our_loss(student, teacher, batch, common.response_states(student), common.response_states(teacher), torch.float32).backward()
else:
    bench.textbook_loss(student, teacher, batch, mask, torch.float32).backward()
print(status("VmHWM") - base)
"""


def bench_memory(rows):
    """Extra peak memory of forward and backward at V = 152k, each side in a process of its own (Linux only)."""
    if not Path("/proc/self/clear_refs").exists():
        print("loss_memory_v152k      not measured: needs Linux")
        return
    def extra(*args):
        made = subprocess.run([sys.executable, "-c", MEMORY, *map(str, args)], capture_output=True, text=True, check=True, cwd=ROOT)
        return float(made.stdout.split()[-1])
    for work, baseline, ours, theirs in (("loss_memory_v152k", "textbook", ("ours", 1, 152_000), ("textbook", 1, 152_000)),
                                         ("recompute_memory", "kept", ("recomputed", 8, 4000), ("ours", 8, 4000))):
        a, b = extra(*ours), extra(*theirs)
        rows.append({"work": work, "contender": "ours", "baseline": baseline, "ratio": round(b / max(a, 1e-3), 2),
                     "ours_gib": round(a, 3), "baseline_gib": round(b, 3)})
        print(f"{work:<22} against {baseline:<10} {rows[-1]['ratio']:6.2f}x   {a:.2f} GiB against {b:.2f} GiB", flush=True)


# ---------------------------------------------------------------------------------------------------------------
# The table in tests/README.md
# ---------------------------------------------------------------------------------------------------------------
WORKS = {
    **{f"kd_{part}_{v}_{kind}": f"{what}, V = {n}, {dtype}" for part, what in (("step", "KD step"), ("head", "its head and loss alone"))
       for v, n in (("v32k", "32,000"), ("v4k", "4,000")) for kind, dtype in (("fp32", "fp32"), ("bf16", "bf16"))},
    "loss_memory_v152k": "extra memory of the loss, V = 152,000",
    "recompute_memory": "memory of a step with `--recompute`, 8 layers",
    "epoch2_cached": "second epoch, teacher's states remembered",
    "sample_b64": "sampling 64 responses, none ends before its 64 tokens",
    "sample_b64_ragged": "the same, ending after about 30 tokens each",
    "llmr_update": "LLMR update", "dpkd_step": "DPKD step, pairs given", "gold_round": "GOLD, 16 texts of one round",
    "ddk_overhead": "DDK, with its looks at the gaps",
}
RIVALS = {"textbook": "textbook loop", "trl_gkd": "TRL GKDTrainer's loss", "trl_chunked": "TRL DistillationTrainer's loss",
          "liger": "Liger-Kernel's fused loss", "epoch1": "first epoch", "generate": "`generate`",
          "official_way": "the official code's way", "one_by_one": "`generate`, prompt by prompt", "no_looks": "without them",
          "kept": "activations kept"}
SCRIPTS = ("kd_forward", "llmr", "dpkd", "gold", "ddk")


def table(found):
    """The text between the marks, made from a --json file."""
    lines = [f"{found['machine']}, {found['threads']} threads, transformers {found['transformers']}, commit {found['commit']}:", "",
             "| work | against | ratio (lowest to highest) | ours | theirs | of the floor |", "|---|---|---|---|---|---|"]
    for r in sorted((r for r in found["rows"] if r["work"] in WORKS), key=lambda r: list(WORKS).index(r["work"])):
        spread = f" ({r['lowest']:.2f} to {r['highest']:.2f})" if "lowest" in r else ""
        ours, theirs = ((f"{r[k]:.0f} ms" if (k := f"{side}_ms") in r else f"{r[f'{side}_gib']:.2f} GiB") for side in ("ours", "baseline"))
        share = f"{100 * r['of_floor']:.0f} %" if "of_floor" in r else ""
        lines.append(f"| {WORKS[r['work']]} | {RIVALS[r['baseline']]} | {r['ratio']:.2f}{spread} | {ours} | {theirs} | {share} |")
    took = {r["work"]: r["seconds"] for r in found["rows"] if "seconds" in r}
    if took:
        lines += ["", "Start to end, defaults, tiny worlds built before: " +
                  ", ".join(f"`{name}.py` {took[f'lesson_{name}']:.0f} s" for name in SCRIPTS if f"lesson_{name}" in took) + "."]
    return "\n".join(lines)


def with_table(text):
    """A page with the table between its marks made anew from the committed file."""
    new = table(json.loads((ROOT / "assets/bench.json").read_text()))
    return re.sub(r"(<!-- table bench -->\n).*?(<!-- end -->)", lambda m: f"{m[1]}{new}\n{m[2]}", text, flags=re.S)


def main():
    parts = {"kd_step": None, "sample": bench_sample, "llmr": bench_llmr, "dpkd": bench_dpkd, "gold": bench_gold, "cache": bench_cache,
             "ddk": bench_ddk, "memory": lambda rows, _: bench_memory(rows), "lessons": lambda rows, _: bench_lessons(rows)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", default="", help="write the rows there, too")
    parser.add_argument("--only", nargs="*", choices=list(parts), default=list(parts))
    parser.add_argument("--print", action="store_true", dest="only_print")
    args = parser.parse_args()
    if args.only_print:
        page = ROOT / "tests/README.md"
        page.write_text(with_table(page.read_text() if page.exists() else "<!-- table bench -->\n<!-- end -->\n"))
        return
    rows = []
    for part in args.only:
        if part == "kd_step":
            rivals, dtypes = peers(), {"fp32": torch.float32, "bf16": torch.bfloat16}
            if not bf16_is_fast():
                print("rows of bf16 are left out: this CPU has no instructions for it")
                del dtypes["bf16"]
            for vocab, label in ((4000, "v4k"), (32000, "v32k")):
                for kind, dtype in dtypes.items():
                    bench_kd_step(rows, args.rounds, vocab, dtype, f"kd_step_{label}_{kind}", rivals)
        else:
            parts[part](rows, args.rounds)
        gc.collect()
    if DEVICE.type == "cpu":
        print("GPU rows: not measured, no GPU here (python tests/evidence/gpu.py where there is one)")
    if args.json:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        machine = f"{platform.machine()}, {os.cpu_count()} cores, {torch.cuda.get_device_name() if DEVICE.type == 'cuda' else 'no GPU'}, torch {torch.__version__}"
        Path(args.json).write_text(json.dumps({"machine": machine, "threads": torch.get_num_threads(), "commit": commit,
                                               "transformers": transformers.__version__, "gate": "passed", "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
