"""DPKD as its authors released it: it compares the likeliest tokens, and samples nothing.

Code: https://github.com/microsoft/LMOps/tree/main/dpkd, of the paper arxiv.org/abs/2406.19774

The loss of the paper prefers whole responses: see dpkd.py. This one looks at single tokens, so it
is a copy of kd_forward.py: `git diff --no-index kd_forward.py tests/controls/dpkd_token.py` shows
the method. At each token of a response of the teacher p, with the student q:

    a = argmax_v p(v|x,y_<t),  b = argmax_v q(v|x,y_<t)
    margin = beta ( [log q(a) - log q(b)] - [log p(a) - log p(b)] )         never above 0
    L = mean over response tokens of preference (-log sigmoid(margin)) + anchor CE

    In the code the differences of log-probabilities are differences of logits, because the
    normalisers cancel. beta, preference and anchor are cfg's.

So the gradient of the preference moves two logits of a token, those of a and b, and none where
a = b. It repairs disagreements on the likeliest token and says nothing about the others. Alone it
has no reason to make q equal p. It needs the anchor, CE on the teacher's responses: SeqKD.

What differs from the release: log-softmax in fp32, where it has bf16; its term on a corpus of text,
with word-level KD in it, is left out; no dropout. It is our reading that y are samples of the
teacher, drawn once.

What to watch: `agree`, the share of tokens with a = b, rises, and `preference` falls to log 2 =
0.693, its least value. `kl_pq` on validation prompts tells whether the distribution is learned.

    python tests/controls/dpkd_token.py                             half preference, half anchor
    python tests/controls/dpkd_token.py --anchor 0                  the preference alone
    python tests/controls/dpkd_token.py --preference 0 --anchor 1   the anchor alone: SeqKD
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # where common.py is
import common


@dataclass
class Config(common.Settings):
    beta: float = 0.1                # size of the margin
    preference: float = 0.5          # weight of the preference
    anchor: float = 0.5              # weight of CE on the teacher's responses


# --- The method -----------------------------------------------------------------------------------
# R: response tokens in a batch, r: in one chunk of it; V: vocabulary, H: hidden size. Each row is
# one response token, so no loss needs a mask.
def token_preference_loss(student_logits, teacher_logits, targets, beta, preference, anchor):
    """The loss of each row, its preference, CE and margin, and whether a = b. (r,V), (r,V), (r,) ->
    five (r,)."""
    a = teacher_logits.argmax(-1, keepdim=True)  # (r,1)
    b = student_logits.argmax(-1, keepdim=True)  # (r,1)
    gap_q = (student_logits.gather(-1, a) - student_logits.gather(-1, b))[:, 0]  # (r,) at most 0
    gap_p = (teacher_logits.gather(-1, a) - teacher_logits.gather(-1, b))[:, 0]  # (r,) at least 0
    margin = beta * (gap_q - gap_p)
    prefer = -F.logsigmoid(margin)  # at least log 2; just that, without gradient, where a = b
    ce = F.cross_entropy(student_logits, targets, reduction="none")
    return preference * prefer + anchor * ce, prefer, ce, margin, (a == b)[:, 0].float()


# --- The loop -------------------------------------------------------------------------------------
def train(cfg) -> dict:
    """One run: it fills its directory and returns its final metrics."""
    common.check_settings(cfg, beta=(1e-6, 1e6), preference=(0, 1e6), anchor=(0, 1e6))
    if cfg.teacher == "none":
        raise common.BadInput("--teacher none: a preference needs two models: name a --teacher")
    if cfg.preference == cfg.anchor == 0:
        raise common.BadInput("--preference and --anchor are both 0: nothing is learned")
    run = common.Run(cfg, __file__)

    # data and models: the frozen teacher has the dtype of --dtype; the student's weights are fp32
    rows = common.load_rows(cfg)
    student, teacher = common.load_pair(cfg, run.device)
    data = common.load_data(cfg, rows, student, teacher)
    examples = data.train  # with or without responses
    if cfg.steps:
        examples = common.teacher_responses(teacher, examples, cfg)

    evaluate = common.Evaluator(cfg, teacher, data.valid)
    evaluate_test = common.Evaluator(cfg, teacher, data.test)
    columns = {"teacher": evaluate_test(teacher)}
    columns["before"] = evaluate_test(student)  # before run.start, which may load trained weights

    # runs are short: beta_2 = 0.98 averages squared gradients over 50 steps, the default over 1000
    optimizer = torch.optim.AdamW(student.parameters(), lr=cfg.lr, betas=(0.9, 0.98),
                                  weight_decay=cfg.weight_decay, fused=True)
    start = run.start(data.hash, student=student, optimizer=optimizer)
    loss_of = token_preference_loss
    if cfg.compile:
        loss_of = torch.compile(token_preference_loss, dynamic=True)
    common.no_dropout(student)  # as in dpkd.py
    student.train()

    for step in range(start, cfg.steps):
        if step % cfg.eval_every == 0:
            run.evaluated(step, evaluate(student), evaluate.generations)
        lr = common.set_lr(optimizer, step, cfg)

        chosen = [examples[i] for i in common.step_indices(len(examples), step, cfg)]
        micro = common.micro_batches(chosen, student, teacher, cfg)
        n_tokens = common.all_reduce_sum(sum(len(b.targets) for b in micro))
        totals = torch.zeros(5, device=run.device)
        for batch in micro:
            with common.precision(cfg, run.device):
                student_hidden = common.response_states(student, batch)                 # (R,H)
                teacher_hidden = common.response_states(teacher, batch.for_teacher)     # (R,H)
            # the logits of all R rows need too much memory; in_chunks collects the gradients
            for rows, part in common.in_chunks(student_hidden, student):
                student_logits = common.logits_of(student, part)                        # (r,V)
                teacher_logits = common.logits_of(teacher, teacher_hidden[rows])        # (r,V)
                values = loss_of(student_logits, teacher_logits, batch.targets[rows],
                                 cfg.beta, cfg.preference, cfg.anchor)                  # 5 (r,)
                (values[0].sum() / n_tokens).backward()  # n_tokens counts the whole step
                totals += torch.stack([value.detach().sum() for value in values])
        totals /= n_tokens
        common.reduce_gradients(student, totals)
        grad_norm = torch.nn.utils.clip_grad_norm_(student.parameters(), cfg.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        if step % cfg.log_every == 0 or step + 1 == cfg.steps:
            loss, preference, ce, margin, agree = totals.tolist()
            run.log(step, loss=loss, preference=preference, ce=ce, margin=margin, agree=agree,
                    grad_norm=grad_norm.item(), lr=lr, tokens=n_tokens)
        run.end_step(step + 1)

    columns["after"] = evaluate_test(student) if cfg.steps else columns["before"]
    return run.finish(student, columns, common.MEANINGS, evaluate_test.generations)


if __name__ == "__main__":
    sys.exit(common.main(train, Config))
