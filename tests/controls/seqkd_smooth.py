"""Control: SeqKD with label smoothing and early stopping, what one does first when teacher texts are few.

A copy of kd_forward.py (`git diff --no-index kd_forward.py tests/controls/seqkd_smooth.py`). The responses
y are samples of the teacher, one for each training prompt, and with s = cfg.smoothing

    L = mean over response tokens of (1 - s) (-log q(y_t|x,y_<t)) + s/V sum_v -log q(v|x,y_<t)

Every --eval-every steps kl_pq is measured on validation prompts, and the student that was best by it is the
one that is kept: with few texts the later ones have learned them by heart. Smoothing: Szegedy et al. 2016,
https://arxiv.org/abs/1512.00567

Held against: dpkd.py, which gets new text of the student at every step where these texts stay the same few.
A rival that overfits is no rival: this one is stopped in time.

Few texts means few training prompts: a folder with a short train.jsonl, and valid.jsonl and test.jsonl as
they are.

What to watch: `best_step` in the result. At the last step there was no overfitting to stop, and more steps
may help.

    python -m tests.controls.seqkd_smooth                                       all prompts of the tiny world
    python data/answers/prepare.py out/answers-0                                or its last 64, which have no label:
    mkdir -p out/few-0 && cp out/answers-0/data/*.jsonl out/few-0
    tail -n 64 out/answers-0/data/train.jsonl > out/few-0/train.jsonl
    python -m tests.controls.seqkd_smooth --data out/few-0 --teacher out/answers-0/teacher \
        --student out/answers-0/student --eval-every 20
"""
import math
import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import common


@dataclass
class Config(common.Settings):
    # method
    smoothing: float = 0.1           # share of the target that is spread over all tokens; 0: none
    # optimization
    steps: int = 500                 # optimizer steps; 0 only evaluates
    batch_size: int = 64             # sequences of one optimizer step
    accum: int = 1                   # micro-batches they are split into: raise it when memory runs out
    lr: float = 3e-3                 # peak; right for the tiny world, 1e-5 to 5e-5 for pretrained models
    warmup: int = 20                 # steps of linear warm-up; after it a cosine down to a tenth of lr
    weight_decay: float = 0.01       # AdamW's
    clip: float = 1.0                # largest gradient norm
    eval_every: int = 20             # steps between evaluations: as fine as the best student can be told

    unused = ("text_field", "cache_gib")  # shared settings without effect here: setting one is an error


# ----------------------------------------------------------------------------------------------------------
# The method
# ----------------------------------------------------------------------------------------------------------
# R: the response tokens of a micro-batch, one row each, response after response; V vocabulary, H hidden
# size, B responses. No row is a prompt token or padding, so no loss needs a mask.
def smoothed_loss(student_logits, targets, smoothing):
    """The loss of each row, and CE. (R,V), (R,) -> two (R,)."""
    logq = F.log_softmax(student_logits, -1)       # (R,V)
    ce = -logq.gather(-1, targets[:, None])[:, 0]  # (R,)
    return (1 - smoothing) * ce - smoothing * logq.mean(-1), ce


class Best:
    """The student that was best by kl_pq on validation prompts. Part of the checkpoint."""

    def __init__(self):
        self.kl, self.step, self.weights = math.inf, -1, {}

    def look(self, kl, step, student):
        if kl < self.kl:
            self.kl, self.step = kl, step
            self.weights = {k: v.detach().cpu().clone() for k, v in student.state_dict().items()}

    def state_dict(self):
        return dict(vars(self))

    def load_state_dict(self, state):
        vars(self).update(state)


# ----------------------------------------------------------------------------------------------------------
# The loop
# ----------------------------------------------------------------------------------------------------------
def train(cfg) -> dict:
    """One run: it fills out/<name>/ and returns its final metrics."""
    common.check_settings(cfg, smoothing=(0, 1))
    run = common.Run(cfg, __file__)
    if run.finished:
        return run.finished
    device, dtype = run.device, common.compute_dtype(cfg, run.device)

    # models: the teacher is frozen, in the compute dtype; the student keeps fp32 weights, cast on the fly
    student, teacher, tokenizer = common.load_pair(cfg, device)
    if teacher is None:
        raise common.BadInput("--teacher none: the responses are the teacher's, so name a --teacher")

    # data
    data = common.load_data(cfg, student, teacher, tokenizer)
    examples = common.teacher_answers(teacher, data.train, tokenizer, cfg)
    batches = common.Batches(examples, student, None, cfg, device)

    # what is called in the loop. A forward pass ends at the hidden states (R,H); rowwise_loss makes logits
    # of them and calls row_loss, chunk by chunk: whole (R,V) logits would take most of a step's memory
    student_fwd = common.response_states(student, cfg.compile)
    compiled_loss = common.try_compile(smoothed_loss) if cfg.compile else smoothed_loss
    row_loss = lambda logits, _, targets: compiled_loss(logits, targets, cfg.smoothing)
    evaluate = common.make_evaluator(cfg, teacher, tokenizer, data.valid)
    evaluate_test = common.make_evaluator(cfg, teacher, tokenizer, data.test)
    before = evaluate_test(student)  # ahead of run.start, which may load a later student from a checkpoint

    # optimizer; beta_2 = 0.98 averages squared gradients over 50 steps, not 1000: runs have a few hundred
    optimizer = torch.optim.AdamW(student.parameters(), lr=cfg.lr, betas=(0.9, 0.98),
                                  weight_decay=cfg.weight_decay, fused=True)
    best = Best()
    start = run.start(student=student, optimizer=optimizer, best=best)
    student.train()

    for step in range(start, cfg.steps + 1):
        if step % cfg.eval_every == 0 or step == cfg.steps:
            metrics = evaluate(student)
            run.evaluated(step, metrics)
            best.look(common.broadcast(metrics["kl_pq"]), step, student)
            common.show_samples(run, student, data.valid, tokenizer, cfg)
        if step == cfg.steps:
            break

        lr = common.lr_at(step, cfg)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # one step over accum micro-batches: sums are divided once, by the tokens of the whole step
        micro = batches.at(step)
        n_tokens = common.all_reduce_sum(sum(len(b.targets) for b in micro))
        totals = 0.0
        for batch in micro:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                student_hidden = student_fwd(batch)  # (R,H)
            sums = common.rowwise_loss(row_loss, student, student_hidden, batch.targets)  # (2,) loss CE
            (sums[0] / n_tokens).backward()
            totals = totals + sums.detach() / n_tokens
        common.reduce_gradients(student, totals)
        grad_norm = torch.nn.utils.clip_grad_norm_(student.parameters(), cfg.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        if step % cfg.log_every == 0 or step + 1 == cfg.steps:
            loss, ce = totals.tolist()
            run.log(step, loss=loss, ce=ce, grad_norm=grad_norm.item(), lr=lr, tokens=n_tokens)
        run.end_step(step + 1, student=student, optimizer=optimizer, best=best)

    student.load_state_dict(best.weights)
    run.print(f"kept: the student of step {best.step}, kl_pq {best.kl:.3f} on validation prompts")
    report = {"teacher": evaluate_test(teacher)}
    return run.finish(student, tokenizer, {**report, "before": before, "after": evaluate_test(student)},
                      best_step=best.step)


if __name__ == "__main__":
    sys.exit(common.main(train, Config))
