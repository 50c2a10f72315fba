"""On-policy distillation: the teacher corrects, token by token, what the student writes itself.

Agarwal et al., "On-Policy Distillation of Language Models" (GKD), 2023, arxiv.org/abs/2306.13649
Gu et al., "MiniLLM", 2023, arxiv.org/abs/2306.08543
Thinking Machines, "On-Policy Distillation", October 2025, thinkingmachines.ai/blog

A copy of kd_forward.py: `git diff --no-index kd_forward.py tests/controls/on_policy.py` shows the
method. At every step the student q responds to the prompts, y ~ q(y|x), and the teacher p reads y:

    KL(q||p) = sum_v q(v|x,y_<t) log [ q(v|x,y_<t) / p(v|x,y_<t) ]          the "reverse" KL
    full     : L = mean over response tokens of KL(q||p)                    GKD
    sampled  : A_t = stop_gradient[ log p(y_t|x,y_<t) - log q(y_t|x,y_<t) ]
               L = mean over response tokens of - A_t log q(y_t|x,y_<t)     Thinking Machines

Both gradients have the same expectation, and the sampled one is noisier. It needs the teacher's
probability of one token only, so it also works where a teacher serves no more than that. There is
no return-to-go: what a token does to the KL of later ones is left out. MiniLLM has it.

What differs from the papers:
 1. GKD also has the generalised Jensen-Shannon divergence. Here it is KL(q||p) only.
 2. --student-share is GKD's lambda. GKD draws once for each batch who writes it; here that share of
    each step's prompts gets the student's response, and the others get the teacher's.
 3. No dropout: the loss is that of the distribution from which y was sampled.

What to watch: `kl_qp` on validation prompts is what is minimised. `kl_pq` may stay high: the
student then says a part of what the teacher says. The loss of the sampled form has no meaning; see
`kl`.

    python tests/controls/on_policy.py                          full: KL over the vocabulary
    python tests/controls/on_policy.py --form sampled           policy gradient on sampled tokens
    python tests/controls/on_policy.py --student-share .5       the teacher writes the other half
"""
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # where common.py is
import common


@dataclass
class Config(common.Settings):
    form: Literal["full", "sampled"] = "full"  # KL over all tokens, or of the sampled one
    student_share: float = 1.0       # lambda: share of responses that the student writes


# --- The method -----------------------------------------------------------------------------------
# R: response tokens in a batch, r: in one chunk of it; V: vocabulary, H: hidden size. Each row is
# one response token, so no loss needs a mask.
def reverse_kl_loss(student_logits, teacher_logits, targets, form):
    """The loss of each row and its KL(q||p). (r,V), (r,V), (r,) -> two (r,)."""
    logp = F.log_softmax(teacher_logits, -1)        # (r,V)
    logq = F.log_softmax(student_logits, -1)        # (r,V)
    kl = (logq.exp() * (logq - logp)).sum(-1)       # (r,)
    if form == "full":
        return kl, kl
    logp_y, logq_y = (log.gather(-1, targets[:, None])[:, 0] for log in (logp, logq))  # (r,)
    advantage = (logp_y - logq_y).detach()          # (r,) without detach its gradient would count
    return -advantage * logq_y, kl


# --- The loop -------------------------------------------------------------------------------------
def train(cfg) -> dict:
    """One run: it fills its directory and returns its final metrics."""
    common.check_settings(cfg, student_share=(0, 1))
    if cfg.teacher == "none":
        raise common.BadInput("--teacher none: somebody has to correct the student")
    if cfg.form == "sampled" and cfg.student_share < 1:
        raise common.BadInput(f"--student-share {cfg.student_share}: --form sampled is right for "
                              "tokens of the student only, so leave the share at 1")
    run = common.Run(cfg, __file__)

    # data and models: the frozen teacher has the dtype of --dtype; the student's weights are fp32
    rows = common.load_rows(cfg)
    student, teacher = common.load_pair(cfg, run.device)
    data = common.load_data(cfg, rows, student, teacher)
    examples = data.train  # with or without responses
    if cfg.steps and cfg.student_share < 1:
        examples = common.teacher_responses(teacher, examples, cfg)

    evaluate = common.Evaluator(cfg, teacher, data.valid)
    evaluate_test = common.Evaluator(cfg, teacher, data.test)
    columns = {"teacher": evaluate_test(teacher)}
    columns["before"] = evaluate_test(student)  # before run.start, which may load trained weights

    # runs are short: beta_2 = 0.98 averages squared gradients over 50 steps, the default over 1000
    optimizer = torch.optim.AdamW(student.parameters(), lr=cfg.lr, betas=(0.9, 0.98),
                                  weight_decay=cfg.weight_decay, fused=True)
    start = run.start(data.hash, student=student, optimizer=optimizer)
    loss_of = torch.compile(reverse_kl_loss, dynamic=True) if cfg.compile else reverse_kl_loss
    common.no_dropout(student)  # what is sampled and what is improved must be one distribution
    student.train()

    for step in range(start, cfg.steps):
        if step % cfg.eval_every == 0:
            run.evaluated(step, evaluate(student), evaluate.generations)
        lr = common.set_lr(optimizer, step, cfg)

        chosen = [examples[i] for i in common.step_indices(len(examples), step, cfg)]
        n_own, seed = round(cfg.student_share * len(chosen)), common.sample_seed(cfg.seed, step)
        chosen = common.respond(student, chosen[:n_own], cfg, seed=seed) + chosen[n_own:]
        micro = common.micro_batches(chosen, student, teacher, cfg)
        n_tokens = common.all_reduce_sum(sum(len(b.targets) for b in micro))
        totals = torch.zeros(2, device=run.device)
        for batch in micro:
            with common.precision(cfg, run.device):
                student_hidden = common.response_states(student, batch)                 # (R,H)
                teacher_hidden = common.response_states(teacher, batch.for_teacher)     # (R,H)
            # the logits of all R rows need too much memory; in_chunks collects the gradients
            for rows, part in common.in_chunks(student_hidden, student):
                student_logits = common.logits_of(student, part)                        # (r,V)
                teacher_logits = common.logits_of(teacher, teacher_hidden[rows])        # (r,V)
                loss, kl = loss_of(student_logits, teacher_logits, batch.targets[rows], cfg.form)
                (loss.sum() / n_tokens).backward()  # n_tokens counts the whole step
                totals += torch.stack([loss.detach().sum(), kl.detach().sum()])
        totals /= n_tokens
        common.reduce_gradients(student, totals)
        grad_norm = torch.nn.utils.clip_grad_norm_(student.parameters(), cfg.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        if step % cfg.log_every == 0 or step + 1 == cfg.steps:
            loss, kl = totals.tolist()
            run.log(step, loss=loss, kl=kl, grad_norm=grad_norm.item(), lr=lr, tokens=n_tokens)
        run.end_step(step + 1)

    columns["after"] = evaluate_test(student) if cfg.steps else columns["before"]
    return run.finish(student, columns, common.MEANINGS, evaluate_test.generations)


if __name__ == "__main__":
    sys.exit(common.main(train, Config))
