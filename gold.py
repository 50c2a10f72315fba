"""GOLD (of NAACL 2024, not TRL's): an LLM writes the training data, steered by what the student finds strange.

Gholami, Akbari, Hu, Masrani, Wang, Zhang, "GOLD: Generalized Knowledge Distillation via Out-of-Distribution-Guided
Language Data Generation", Findings of NAACL 2024, https://arxiv.org/abs/2403.19754; code:
https://github.com/mgholamikn/GOLD

The LLM p is a black box that gives text only. A task comes as a description, K real samples and label words. In round t

    X_t = p( task + real samples + F_{t-1} )                    b training samples; F on every second round only   (1)
    V_t = p( task + real samples + F_{t-1} + X_t[:2] + OOD )    b more, asked to be different from all above       (2)
    E(x,y) = - mean_j log sum_v exp f_v(x, y_<j)                energy: high where the student f has seen little   (3)
    F_t = those of V_t whose rank by E lies in [.5 b, .8 b)     strange, yet not the strangest: that is noise      (4)

For classification the label is drawn first and the LLM writes a text for it; else it writes text and answer together.
X_t and V_t all go to the data set. f is a copy of the student, trained on what there is every few rounds. At the end
a fresh student q learns y from x on the whole budget, by symmetric cross entropy against wrong labels:

    L = mean over response tokens of alpha (-log q_y) + beta (-log 1e-4) (1 - q_y)                                 (5)

    alpha = cfg.alpha, beta = cfg.beta, b = cfg.round_size, F = `feedback`, f = `scorer`. The y_j include EOS.

What differs from the paper, of which we know the abstract and the released code (which does not run as it is):
 1. Energies and losses skip padding. The code pads answers to 32 tokens and averages over all (--pad-energy 32).
 2. The budget counts samples. The code's file counting leaves half of the rounds unused.
 3. Samples that do not parse are asked for again until there are b; ranks refer to the samples that are there. Of a
    larger band its middle --feedback 2 are fed back.
 4. One schedule for all tasks: V_t in every round. For answers the code makes V_t and F on even rounds only.
 5. In prompts the label stands before the text that it conditions. Real samples are drawn from the training split.
 6. AdamW, warm-up and a cosine for the final student; equations by a parser where the code calls Python's evaluator.
 7. ProGen's feedback (most helpful samples by influence) is absent: it does not fit here in a few lines.

What to watch: `accuracy` on held-out real rows is what counts; `energy` has no zero, since a constant added to all
logits shifts it: compare within a round only. `asked` is how many texts the LLM had to write for each one kept. In a
tiny world the truth is known: `modes` and `tail_mass` should rise, `garbage` should not. The final loss says nothing.

    python gold.py                                          tiny reviews: OOD prompt and the energy band
    python gold.py --control plain --select none            no OOD prompt, no feedback (as ZeroGen does it)
    python gold.py --select top                             feed back the strangest: garbage comes with it
    python gold.py --control plain --select none --temperature 1 --top-k 0 --top-p 1       plain sampling
    python gold.py --task sums                              answers instead of labels
    python gold.py --task rte --teacher meta-llama/Llama-2-7b-chat-hf --student google-t5/t5-base --lr 5e-5 \
        --scorer-lr 5e-5 --batch-size 8 --retrain 25 --passes 1 --steps 18750 --alpha 0.1 --max-prompt 128
"""
import copy
import math
import random
import sys
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

import common


@dataclass
class Config:
    # models and data
    teacher: str = "tiny"            # the LLM: model directory or hub name, chat or base; tiny: the tiny world's
    student: str = "tiny"            # the same; a directory with config.json but no weights starts from random ones
    data: str = "auto"               # real rows (shots, test): auto: the task's; else as --data elsewhere, tiny:N too
    task: str = "reviews"            # an entry of assets/gold_tasks.json, or a .json file of your own in that form
    template: str = "auto"           # text around {prompt} for the student; auto: its chat template, else a line break
    max_prompt: int = 256            # tokens of the student's prompt; longer prompts lose their beginning
    max_response: int = 64           # tokens of the student's answer
    llm_prompt: int = 4096           # most tokens of a prompt to the LLM; how many it may write is the task's max_new
    holdout: float = 0.05            # share of prompts held out for valid, and again for test, where data has no splits
    teacher_device_map: str = ""     # e.g. auto: spread a large teacher over devices (needs accelerate)
    # method
    budget: int = 3008               # samples to generate and to train on, those of the OOD prompt included
    round_size: int = 8              # b: samples of one call of the LLM
    control: str = "ood"             # ood: Eq. 2 in every round; plain: Eq. 1 alone; real: real rows, as a yardstick
    select: str = "band"             # what is fed back: band (Eq. 4), top (highest energies), random, none
    feedback: int = 2                # most samples fed back
    temperature: float = 0.6         # of the LLM; with top_k and top_p what chat models use: it is what narrows
    top_k: int = 10                  # the LLM samples among its k likeliest tokens; 0: all
    top_p: float = 0.9               # and among the fewest that hold this share; 1: all
    retrain: int = 12                # rounds between trainings of the scorer; the paper's code: 25
    passes: int = 3                  # epochs over all samples so far, each time; the paper's code: 1
    scorer_lr: float = 2e-3          # its rate, constant; 5e-5 for pretrained models
    pad_energy: int = 0              # average energies over this many tokens, padding included, as the code (32) does
    loss: str = "sce"                # of the final student: sce (Eq. 5) or ce
    alpha: float = 0.1               # weight of CE in SCE; the code has 1, .1 and .01
    beta: float = 1.0                # weight of reverse CE; 0 leaves alpha CE
    label_noise: float = 0.0         # control: plant this share of wrong labels before the final student
    # optimization
    steps: int = 1000                # optimizer steps; 0 only evaluates
    batch_size: int = 32             # sequences of one optimizer step
    accum: int = 1                   # micro-batches they are split into: raise it when memory runs out
    lr: float = 5e-3                 # peak; right for the tiny world, 1e-5 to 5e-5 for pretrained models
    warmup: int = 20                 # steps of linear warm-up; after it a cosine down to a tenth of lr
    weight_decay: float = 0.01       # AdamW's
    clip: float = 1.0                # largest gradient norm
    # system
    eval_every: int = 250            # steps between evaluations on validation rows
    eval_rows: int = 800             # most test rows to evaluate on (validation: at most 200)
    log_every: int = 20              # rounds, and steps, between lines of the log
    save_every: int = 500            # steps between checkpoints; what the LLM wrote is kept at once
    seed: int = 0                    # of shots, labels, sampling, data order and random weights
    device: str = "auto"             # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"              # float32 or bfloat16 for activations and teacher; the student's weights stay fp32
    compile: bool = torch.cuda.is_available()  # torch.compile: minutes at the start, faster steps; for long runs
    recompute: bool = False          # forget activations, compute them again for the gradient: less memory, slower
    out: str = ""                    # directory of this run; empty: out/<script and changed settings>
    resume: bool = False             # go on from the last checkpoint
    overwrite: bool = False          # delete an earlier run in the same directory first


# ---------------------------------------------------------------------------------------------------------------
# The method
# ---------------------------------------------------------------------------------------------------------------
def energy(logits):
    """Eq. 3 of each row. Never a probability: softmax would cancel what is asked for. (R,V) -> (R,)."""
    return -logits.logsumexp(-1)


def select_feedback(energies, select, most, rng):
    """Eq. 4 or a control: indices of the samples to show the LLM. Ranks are relative to how many there are."""
    n, order = len(energies), sorted(range(len(energies)), key=lambda i: energies[i])  # ascending: familiar first
    if select == "random":
        return rng.sample(range(n), min(most, n))
    if select == "top":
        return order[max(0, n - most):]
    band = order[n * 5 // 10:n * 8 // 10] if select == "band" else []
    spare = max(0, len(band) - most)
    return band[spare // 2:spare // 2 + most]


def sce_loss(logits, targets, alpha, beta):
    """Eq. 5 of each row, with its CE. The one-hot target clamped to 1e-4 makes -sum_k q_k log y_k = 9.21 (1 - q_y)."""
    ce = F.cross_entropy(logits, targets, reduction="none")  # (R,)
    rce = -math.log(1e-4) * (1 - (-ce).exp())                # (R,)
    return alpha * ce + beta * rce, ce


# ---------------------------------------------------------------------------------------------------------------
# The loop
# ---------------------------------------------------------------------------------------------------------------
def train(cfg):
    common.check_settings(cfg, control=["ood", "plain", "real"], select=["band", "top", "random", "none"],
                          loss=["sce", "ce"], budget=(1, 10**9), round_size=(1, 10**6), feedback=(1, 10**6),
                          temperature=(0, 1e3), top_k=(0, 10**9), top_p=(1e-9, 1), retrain=(1, 10**9),
                          passes=(1, 10**6), alpha=(0, 1e6), beta=(0, 1e6), label_noise=(0, 1), pad_energy=(0, 10**6))
    if cfg.control != "ood" and cfg.select != "none":
        raise common.BadInput(f"--control {cfg.control} has no OOD samples to select feedback from: add --select none")
    run = common.Run(cfg, __file__)
    if run.finished:
        return run.finished
    device, dtype = run.device, common.compute_dtype(cfg, run.device)

    # models: the teacher is frozen and in the compute dtype, the student keeps fp32 weights and is cast on the fly
    task = common.load_task(cfg.task)
    cfg = replace(cfg, data=task["data"] if cfg.data == "auto" else cfg.data)
    if not cfg.data:
        raise common.BadInput(f"--task {cfg.task} names no data set: give --data, for real samples and for the test")
    student, teacher, tokenizer = common.load_pair(cfg, device, same_tokens=False, world=task["world"])
    if teacher is None:
        raise common.BadInput("--teacher none: somebody has to write the samples, so name a --teacher")
    common.check_labels(task, tokenizer)
    scorer = copy.deepcopy(student)

    # data
    rows = common.load_rows(cfg, task["world"], common.row_reader(task), {task["train"]: "train", task["test"]: "test"})
    encode = common.row_encoder(cfg, student, None, tokenizer)
    valid, test = [encode(r) for r in rows["valid"][:200]], [encode(r) for r in rows["test"][:cfg.eval_rows]]
    real = common.pick_shots(task, rows["train"], task["shots"], random.Random(cfg.seed))
    llm_tokenizer = common.load_tokenizer(common.resolve(cfg.teacher, "teacher", cfg.data, task["world"]), "teacher")
    llm = common.Writer(teacher, llm_tokenizer, run.dir / "written.jsonl", cfg.llm_prompt, task["max_new"], cfg.seed)
    decoding = dict(temperature=cfg.temperature, top_k=cfg.top_k, top_p=cfg.top_p)
    b, words = cfg.round_size, list(task["labels"])
    print(f"task {task['name']}: {len(real)} real samples in every prompt, {len(valid)} valid, {len(test)} test rows")

    # what is called in the loop
    student_fwd, scorer_fwd = common.response_states(student, cfg.compile), common.response_states(scorer)
    alpha, beta = (cfg.alpha, cfg.beta) if cfg.loss == "sce" else (1.0, 0.0)
    row_loss = common.try_compile(sce_loss, dynamic=True) if cfg.compile else sce_loss

    def ruler(model, examples):
        answers = common.sampled(model, examples, tokenizer, cfg, temperature=0.0)
        texts = [tokenizer.decode(e.response, skip_special_tokens=True) for e in answers]
        return common.task_metrics(task, texts, [e.row for e in examples])

    def energies_of(samples):
        fill = [tokenizer.pad_token_id or 0] * cfg.pad_energy
        examples = [encode(common.student_row(task, s)) for s in samples]
        examples = [replace(e, response=e.response + fill[len(e.response):]) for e in examples]
        sums = common.per_response(lambda q, p, y: (energy(q),), scorer, None, examples, cfg)[:, 0]
        return [x / len(e.response) for x, e in zip(sums.tolist(), examples)]

    before = ruler(student, test)

    # optimizer
    optimizer, scorer_optimizer = (torch.optim.AdamW(
        m.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=cfg.weight_decay, fused=True)
        for m, lr in ((student, cfg.lr), (scorer, cfg.scorer_lr)))
    pool, per_round = common.Pool(), 2 * b if cfg.control == "ood" else b
    rounds = math.ceil(cfg.budget / per_round)
    parts = dict(student=student, optimizer=optimizer, scorer=scorer, scorer_optimizer=scorer_optimizer,
                 pool=pool, llm=llm)
    start = run.start(first=-rounds, **parts)  # rounds count up to 0, the step at which the final student starts
    scorer.train()

    # first the samples: what is drawn depends on seed and round alone
    for step in range(start, 0):
        t, rng = step + rounds, random.Random(f"{cfg.seed} {step + rounds}")

        # the scorer: a few epochs of CE over everything so far; its weights and optimizer go on from the last time
        if t > 0 and t % cfg.retrain == 0 and cfg.control == "ood":
            known = [encode(common.student_row(task, s["sample"])) for s in pool.all]
            for _ in range(cfg.passes):
                order = rng.sample(range(len(known)), len(known))
                for i in range(0, len(known), cfg.batch_size):
                    batch = common.collate([known[j] for j in order[i:i + cfg.batch_size]], scorer).to(device)
                    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                        hidden = scorer_fwd(batch)  # (R,H)
                    loss = common.rowwise_loss(lambda q, p, y: sce_loss(q, y, 1.0, 0.0), scorer, hidden, batch.targets)
                    (loss[0] / len(batch.targets)).backward()
                    scorer_optimizer.step()
                    scorer_optimizer.zero_grad(set_to_none=True)

        # Eqs. 1 and 2: labels first, then texts; energies and feedback from what was asked to be different
        feedback = [s["sample"] for s in pool.all if s["round"] == t - 1 and s["fed"]] if t % 2 == 0 else []
        labels = [[{"label": rng.choice(words)} if words else {} for _ in range(b)] for _ in range(2)]
        if cfg.control == "real":
            fresh = [rows["train"][(t * b + i) % len(rows["train"])]["sample"] for i in range(b)]
        else:
            fresh = llm.samples(task, real + feedback, labels[0], "plain", t, **decoding)
        new = [{"sample": s, "round": t, "control": "plain", "fed": False} for s in fresh]
        if cfg.control == "ood":
            strange = llm.samples(task, real + feedback + fresh[:2], labels[1], "ood", t, **decoding)
            energies = common.from_zero(energies_of(strange))
            chosen = select_feedback(energies, cfg.select, cfg.feedback, rng)
            new += [{"sample": s, "round": t, "control": "ood", "fed": i in chosen, "energy": e}
                    for i, (s, e) in enumerate(zip(strange, energies))]
        pool.all += new
        if t % cfg.log_every == 0 or t + 1 == rounds:
            known = {} if cfg.control != "ood" else {"energy": sum(energies) / b}
            run.log(step, round=t, samples=len(pool.all), asked=llm.asked / max(1, llm.kept), **known,
                    **common.census(task, pool.all))
            run.print(f"      {[s['sample'] for s in new if s['fed']][:2] or fresh[:1]}")
        run.end_step(step + 1, **parts)

    # then the student, fresh, on the budget
    pool.write(run.dir / "samples.jsonl")
    samples = [s["sample"] for s in pool.all[:cfg.budget]]
    noise = random.Random(f"noise {cfg.seed}")
    examples = [encode(common.student_row(task, s if noise.random() >= cfg.label_noise or not words else
                                          {**s, "label": noise.choice([w for w in words if w != s["label"]])}))
                for s in samples]
    batches = common.Batches(examples, student, None, cfg, device)
    student.train()

    for step in range(max(0, start), cfg.steps + 1):
        if step % cfg.eval_every == 0 or step == cfg.steps:
            run.evaluated(step, ruler(student, valid))
            common.show_samples(run, student, valid, tokenizer, cfg)
        if step == cfg.steps:
            break

        # learning rate: linear warm-up, then a cosine down to a tenth
        progress = max(0.0, (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup))
        lr = cfg.lr * min(1.0, (step + 1) / max(1, cfg.warmup)) * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = lr

        # one optimizer step over accum micro-batches: sums are divided once, by the tokens of the whole step
        micro = batches.at(step)
        n_tokens = common.total(sum(len(b.targets) for b in micro))
        totals = 0.0
        for batch in micro:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                student_hidden = student_fwd(batch)  # (R,H)
            sums = common.rowwise_loss(lambda q, p, y: row_loss(q, y, alpha, beta), student, student_hidden,
                                       batch.targets)  # loss, CE
            (sums[0] / n_tokens).backward()
            totals = totals + sums.detach() / n_tokens
        common.reduce_gradients(student, totals)
        grad_norm = torch.nn.utils.clip_grad_norm_(student.parameters(), cfg.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        if step % cfg.log_every == 0 or step + 1 == cfg.steps:
            loss, ce = totals.tolist()
            run.log(step, loss=loss, ce=ce, grad_norm=grad_norm.item(), lr=lr, tokens=n_tokens)
        run.end_step(step + 1, **parts)

    asked = [e.row for e in test]  # the LLM itself, with the same real samples in its prompt
    report = {"teacher": common.task_metrics(task, llm.answers(task, real, asked), asked)}
    after = {**ruler(student, test), **common.census(task, pool.all)}
    return run.finish(student, tokenizer, {**report, "before": before, "after": after})


if __name__ == "__main__":
    sys.exit(common.main(train, Config))
