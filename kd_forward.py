"""Word-level knowledge distillation: the student learns the teacher's next-token distribution.

Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", arxiv.org/abs/1503.02531
Kim, Rush, "Sequence-Level Knowledge Distillation", EMNLP 2016, arxiv.org/abs/1606.07947

x is a prompt, y = y_1 .. y_n is a response with its end-of-sequence token (EOS). The teacher is p,
the student is q. At token t, y_<t are the tokens before it, and v runs over the vocabulary:

    CE       = -log q(y_t|x,y_<t)                                           maximum likelihood
    KL(p||q) = sum_v p(v|x,y_<t) log [ p(v|x,y_<t) / q(v|x,y_<t) ]          the "forward" KL
    L        = mean over response tokens of (1 - alpha) CE + alpha tau^2 KL(p_tau||q_tau)

    p_tau = softmax(teacher_logits / tau), and q_tau likewise. A large tau makes the gradient about
    tau^2 times smaller, and the factor tau^2 undoes this. In the code: alpha = cfg.alpha, tau =
    cfg.tau, logp = log p_tau; logq is first log q, for CE, and then log q_tau, for the KL.

Points 1 and 2 differ from the papers; point 3 lists choices that are easy to overlook:
 1. SeqKD (see below) learns the teacher's samples at temperature 1; Kim and Rush use beam search.
 2. The mean runs over all response tokens of a step at once, so long responses weigh more.
 3. Only responses have a loss. CE does not divide the logits by tau; Hinton et al. do the same.

What to watch: `kl_pq`, KL(p||q) summed over a response to a validation prompt, should fall. The
training loss, a mean over tokens, can mislead: with --alpha 0 it falls while kl_pq rises, because
the student memorises the given responses.

    python kd_forward.py                                 KD on the given responses
    python kd_forward.py --alpha 0                       SFT, supervised fine-tuning: no KL
    python kd_forward.py --alpha 0 --responses teacher   SeqKD: learn the teacher's responses
    python kd_forward.py --responses teacher             KD on the teacher's responses: lowest kl_pq
    python kd_forward.py --steps 0                       only evaluate
    python kd_forward.py --teacher Qwen/Qwen2.5-1.5B --student Qwen/Qwen2.5-0.5B --data my.jsonl \
        --max-response 512 --lr 1e-5 --batch-size 32 --accum 4
"""
import sys
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

import common


@dataclass
class Config(common.Settings):
    alpha: float = 1.0               # weight of the KL; CE gets 1 - alpha; try .5 on human text
    tau: float = 1.0                 # temperature of both softmaxes; above 1 lifts rare tokens
    responses: Literal["data", "teacher"] = "data"  # the given ones, or the teacher's own
    cache: bool = False              # keep teacher states: the teacher then reads each example once


# --- The method -----------------------------------------------------------------------------------
# R: response tokens in a batch, r: in one chunk of it; V: vocabulary, H: hidden size. Each row is
# one response token, so no loss needs a mask.
def kd_loss(student_logits, teacher_logits, targets, alpha, tau):
    """Loss, CE and KL of each row. Shapes: (r,V); (r,V) or None; (r,) -> three tensors of (r,)."""
    logq = F.log_softmax(student_logits, -1)       # (r,V)
    ce = -logq.gather(-1, targets[:, None])[:, 0]  # (r,)
    if teacher_logits is None:  # alpha = 0 needs no teacher; the KL is then logged as 0
        return ce, ce, torch.zeros_like(ce)
    if tau != 1:  # at tau = 1 these passes over (r,V) would change nothing
        logq = F.log_softmax(student_logits / tau, -1)
        teacher_logits = teacher_logits / tau
    # KL(p||q) written out, because F.kl_div takes its arguments the other way round
    logp = F.log_softmax(teacher_logits, -1)       # (r,V)
    kl = (logp.exp() * (logp - logq)).sum(-1)      # (r,)
    loss = alpha * tau**2 * kl
    if alpha < 1:  # at alpha = 1 adding 0 * ce would cost one more backward pass over (r,V)
        loss = loss + (1 - alpha) * ce
    return loss, ce, kl


def cached_states(teacher, batch, kept):
    """The teacher's hidden states (R,H) of a batch. New examples go into `kept` {example: states},
    and later epochs reuse it: responses never change, and the head makes the same logits again."""
    if not all(e in kept for e in batch.examples):
        hidden = common.response_states(teacher, batch.for_teacher)
        kept.update(zip(batch.examples, hidden.cpu().split(batch.lengths.tolist())))
    return torch.cat([kept[e] for e in batch.examples]).to(batch.tokens.device)


# --- The loop -------------------------------------------------------------------------------------
def train(cfg) -> dict:
    """One run: it fills its directory and returns its final metrics."""
    common.check_settings(cfg, alpha=(0, 1), tau=(1e-3, 1e3))
    if cfg.teacher == "none" and (cfg.alpha > 0 or cfg.responses == "teacher"):
        raise common.BadInput("--teacher none: it works only with --alpha 0 and --responses data")
    run = common.Run(cfg, __file__)

    # data and models: the frozen teacher has the dtype of --dtype; the student's weights are fp32
    rows = common.load_rows(cfg)
    student, teacher = common.load_pair(cfg, run.device)
    data = common.load_data(cfg, rows, student, teacher)
    examples = data.train
    if cfg.steps and cfg.responses == "teacher":
        examples = common.teacher_responses(teacher, examples, cfg)
    examples = [e for e in examples if e.response]
    if cfg.steps and not examples:
        raise common.BadInput("no training row has a response: name the response column with "
                              "--response, or let the teacher respond with --responses teacher")

    evaluate = common.Evaluator(cfg, teacher, data.valid)
    evaluate_test = common.Evaluator(cfg, teacher, data.test)
    columns = {"teacher": evaluate_test(teacher)} if teacher else {}
    columns["before"] = evaluate_test(student)  # before run.start, which may load trained weights

    # runs are short: beta_2 = 0.98 averages squared gradients over 50 steps, the default over 1000
    optimizer = torch.optim.AdamW(student.parameters(), lr=cfg.lr, betas=(0.9, 0.98),
                                  weight_decay=cfg.weight_decay, fused=True)
    start = run.start(data.hash, student=student, optimizer=optimizer)
    loss_of = torch.compile(kd_loss, dynamic=True) if cfg.compile else kd_loss
    kept = {}  # {example: teacher's states}, filled with --cache
    student.train()

    for step in range(start, cfg.steps):
        if step % cfg.eval_every == 0:
            run.evaluated(step, evaluate(student), evaluate.generations)
        lr = common.set_lr(optimizer, step, cfg)

        chosen = [examples[i] for i in common.step_indices(len(examples), step, cfg)]
        micro = common.micro_batches(chosen, student, teacher, cfg)
        n_tokens = common.all_reduce_sum(sum(len(b.targets) for b in micro))
        totals = torch.zeros(3, device=run.device)
        for batch in micro:
            with common.precision(cfg, run.device):
                student_hidden = common.response_states(student, batch)                 # (R,H)
                if cfg.alpha > 0 and cfg.cache:
                    teacher_hidden = cached_states(teacher, batch, kept)                # (R,H)
                elif cfg.alpha > 0:  # the frozen teacher builds no graph
                    teacher_hidden = common.response_states(teacher, batch.for_teacher)
            # the logits of all R rows need too much memory; in_chunks collects the gradients
            for rows, part in common.in_chunks(student_hidden, student):
                student_logits = common.logits_of(student, part)                        # (r,V)
                teacher_logits = None
                if cfg.alpha > 0:
                    teacher_logits = common.logits_of(teacher, teacher_hidden[rows])    # (r,V)
                loss, ce, kl = loss_of(student_logits, teacher_logits, batch.targets[rows],
                                       cfg.alpha, cfg.tau)
                (loss.sum() / n_tokens).backward()  # n_tokens counts the whole step
                totals += torch.stack([loss.detach().sum(), ce.detach().sum(), kl.detach().sum()])
        totals /= n_tokens
        common.reduce_gradients(student, totals)
        grad_norm = torch.nn.utils.clip_grad_norm_(student.parameters(), cfg.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        if step % cfg.log_every == 0 or step + 1 == cfg.steps:
            loss, ce, kl = totals.tolist()
            run.log(step, loss=loss, ce=ce, kl=kl, grad_norm=grad_norm.item(), lr=lr,
                    tokens=n_tokens)
        run.end_step(step + 1)

    columns["after"] = evaluate_test(student) if cfg.steps else columns["before"]
    return run.finish(student, columns, common.MEANINGS, evaluate_test.generations)


if __name__ == "__main__":
    sys.exit(common.main(train, Config))
