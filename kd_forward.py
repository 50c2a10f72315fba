"""Word-level knowledge distillation: the student learns the teacher's whole next-token distribution, token by token.

Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, https://arxiv.org/abs/1503.02531
Kim, Rush, "Sequence-Level Knowledge Distillation", EMNLP 2016, https://arxiv.org/abs/1606.07947
The baseline of every paper in this repository; code of the second: https://github.com/harvardnlp/seq2seq-attn

For a prompt x and a response y_1 .. y_n (its end-of-sequence token included), with p the teacher and q the student,

    KL(p||q) at t = sum_v p(v|x,y_<t) log [ p(v|x,y_<t) / q(v|x,y_<t) ]           word-level KD, "forward" KL
    CE at t       = -log q(y_t|x,y_<t)                                             maximum likelihood
    L = mean over response tokens of (1 - alpha) CE + alpha tau^2 KL(p_tau||q_tau)

    p_tau = softmax(teacher_logits / tau), q_tau likewise; tau^2 keeps the size of the gradient while tau changes.
    logp = log p_tau, logq = log q_tau, alpha = cfg.alpha, tau = cfg.tau.

Settings make the three classic baselines: KD (--alpha 1), SFT (--alpha 0), and SeqKD, maximum likelihood on the
teacher's own responses (--responses teacher --alpha 0). By the chain rule the sum of KL(p||q) over the tokens of
responses *sampled from the teacher* (--responses teacher) is an unbiased estimate of KL(p(y|x) || q(y|x)).

What differs from the papers:
 1. SeqKD trains on teacher samples at T = 1 instead of beam search: a sample keeps the teacher's variety.
 2. The mean runs over all response tokens of an optimizer step, not over sequences first: long ones weigh more.
 3. Prompt tokens are not trained on, and CE uses the undivided logits whatever tau is, as in Hinton et al.
 4. Adam without dropout or label smoothing where the model's configuration has none.

What to watch: `kl_pq` on validation prompts is what KD minimises and should fall. The training loss alone does not
tell: under SFT it falls while kl_pq stays or rises: memorising. `valid` (tiny world) counts right answers among
samples at T = 1; `mode_distance` says whether the wordings keep the teacher's shares.

    python kd_forward.py                                        KD on the labelled rows of the tiny world
    python kd_forward.py --alpha 0                              SFT
    python kd_forward.py --responses teacher --alpha 0          SeqKD
    python kd_forward.py --responses teacher                    KD on the teacher's own responses: lowest kl_pq
    python kd_forward.py --steps 0                              only evaluate
    python kd_forward.py --teacher Qwen/Qwen2.5-1.5B --student Qwen/Qwen2.5-0.5B --data my.jsonl \
        --lr 1e-5 --batch-size 32 --accum 4
"""
import math
import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import common


@dataclass
class Config:
    # models and data
    teacher: str = "tiny"            # model directory or hub name; none: no teacher (--alpha 0); tiny: the tiny world's
    student: str = "tiny"            # the same; a directory with config.json but no weights starts from random ones
    data: str = "tiny"               # .jsonl, .csv, dir of train/valid/test.jsonl, saved/hub dataset; tiny:N: world N
    prompt_field: str = "prompt"     # name of the prompt in a row of data
    response_field: str = "response" # name of the response; null there marks a prompt without one
    template: str = "auto"           # text around {prompt}; auto: the chat template, else the prompt and a line break
    teacher_template: str = ""       # if the teacher is to read another template than the student
    max_prompt: int = 256            # tokens; longer prompts lose their beginning
    max_response: int = 256          # tokens; longer responses lose their end and with it EOS
    holdout: float = 0.05            # share of prompts held out for valid, and again for test, where data has no splits
    teacher_device_map: str = ""     # e.g. auto: spread a large teacher over devices (needs accelerate)
    # method
    alpha: float = 1.0               # weight of the KL; 1 - alpha goes to CE; 0.5 is common for human-written responses
    tau: float = 1.0                 # temperature of both KL softmaxes; above 1 shows more small teacher probabilities
    responses: str = "data"          # data: given responses; teacher: the teacher's samples for every training prompt
    # optimization
    steps: int = 500                 # optimizer steps; 0 only evaluates
    batch_size: int = 64             # sequences of one optimizer step
    accum: int = 1                   # micro-batches they are split into: raise it when memory runs out
    lr: float = 3e-3                 # peak; right for the tiny world, 1e-5 to 5e-5 for pretrained models
    warmup: int = 20                 # steps of linear warm-up; after it a cosine down to a tenth of lr
    weight_decay: float = 0.01       # AdamW's
    clip: float = 1.0                # largest gradient norm
    # system
    eval_every: int = 100            # steps between evaluations on validation rows
    eval_rows: int = 500             # most test rows to evaluate on (validation: at most 200)
    eval_temperature: float = 1.0    # temperature of the evaluated distribution; the _greedy metrics have none
    kl_on: str = "samples"           # samples: KL on samples of teacher and student; references: on the given responses
    log_every: int = 20              # steps between lines of the log
    save_every: int = 500            # steps between checkpoints
    cache_gib: float = 0.0           # keep the teacher's final hidden states: saves its forward pass after epoch 1
    seed: int = 0                    # of data order, sampling and random weights
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
def kd_loss(student_logits, teacher_logits, targets, alpha, tau):
    """Per-row loss (1 - alpha) CE + alpha tau^2 KL(p||q), with its two terms. (R,V), (R,V), (R,) -> three (R,)."""
    logq = F.log_softmax(student_logits, -1)       # (R,V)
    ce = -logq.gather(-1, targets[:, None])[:, 0]  # (R,)
    if teacher_logits is None:  # alpha = 0 needs no teacher
        return ce, ce, torch.zeros_like(ce)
    if tau != 1:  # every line about (R,V) is a walk through memory, so none for nothing
        logq, teacher_logits = F.log_softmax(student_logits / tau, -1), teacher_logits / tau
    # KL(p||q) written out: F.kl_div takes its arguments the other way round, and sums over what you do not expect
    logp = F.log_softmax(teacher_logits, -1)       # (R,V)
    kl = (logp.exp() * (logp - logq)).sum(-1)      # (R,)
    soft = alpha * tau**2 * kl
    return soft if alpha == 1 else (1 - alpha) * ce + soft, ce, kl


# ---------------------------------------------------------------------------------------------------------------
# The loop
# ---------------------------------------------------------------------------------------------------------------
def train(cfg):
    common.check_settings(cfg, alpha=(0, 1), tau=(1e-3, 1e3), responses=["data", "teacher"])
    run = common.Run(cfg, __file__)
    if run.finished:
        return run.finished
    device, dtype = run.device, common.compute_dtype(cfg, run.device)

    # models: the teacher is frozen and in the compute dtype, the student keeps fp32 weights and is cast on the fly
    student, teacher, tokenizer = common.load_pair(cfg, device)
    if teacher is None and (cfg.alpha > 0 or cfg.responses == "teacher"):
        raise common.BadInput(f"--teacher none: --alpha {cfg.alpha} with --responses {cfg.responses} needs a teacher")

    # data
    data = common.load_data(cfg, student, teacher, tokenizer)
    examples = data.train
    if cfg.responses == "teacher":
        examples = common.teacher_answers(teacher, examples, tokenizer, cfg)
    batches = common.Batches(examples, student, teacher, cfg, device)

    # what is called in the loop
    student_fwd = common.response_states(student, cfg.compile)
    teacher_fwd = common.teacher_states(teacher, batches, cfg) if cfg.alpha > 0 else None
    row_loss = common.try_compile(kd_loss, dynamic=True) if cfg.compile else kd_loss
    ruler, test_ruler = (common.make_ruler(cfg, teacher, tokenizer, part) for part in (data.valid, data.test))
    before = test_ruler(student)

    # optimizer
    optimizer = torch.optim.AdamW(student.parameters(), lr=cfg.lr, betas=(0.9, 0.98), weight_decay=cfg.weight_decay,
                                  fused=True)
    start = run.start(student=student, optimizer=optimizer)
    student.train()

    for step in range(start, cfg.steps + 1):
        if step % cfg.eval_every == 0 or step == cfg.steps:
            run.evaluated(step, ruler(student))
            common.show_samples(run, student, data.valid, tokenizer, cfg)
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
                teacher_hidden = teacher_fwd(batch.teacher) if teacher_fwd else None  # (R,H)
            sums = common.rowwise_loss(lambda q, p, y: row_loss(q, p, y, cfg.alpha, cfg.tau), student, student_hidden,
                                       batch.targets, teacher if teacher_fwd else None, teacher_hidden)  # loss, CE, KL
            (sums[0] / n_tokens).backward()
            totals = totals + sums.detach() / n_tokens
        common.reduce_gradients(student, totals)
        grad_norm = torch.nn.utils.clip_grad_norm_(student.parameters(), cfg.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        if step % cfg.log_every == 0 or step + 1 == cfg.steps:
            loss, ce, kl = totals.tolist()
            run.log(step, loss=loss, ce=ce, kl=kl, grad_norm=grad_norm.item(), lr=lr, tokens=n_tokens)
        run.end_step(step + 1, student=student, optimizer=optimizer)

    report = {"teacher": test_ruler(teacher)} if teacher else {}
    return run.finish(student, tokenizer, {**report, "before": before, "after": test_ruler(student)})


if __name__ == "__main__":
    sys.exit(common.main(train, Config))
