"""Control: the loss that DPKD's authors released, which compares likeliest tokens and samples nothing.

A copy of kd_forward.py (`git diff --no-index kd_forward.py tests/controls/dpkd_token.py`). The paper's Eq.
8 prefers whole responses (see dpkd.py); the code at https://github.com/microsoft/LMOps/tree/main/dpkd does
this, at each token of a response of the teacher p, with the student q:

    a = argmax_v p(v|x,y_<t),  b = argmax_v q(v|x,y_<t)
    margin = beta ( [log q(a) - log q(b)] - [log p(a) - log p(b)] )           never above 0
    L = mean over response tokens of preference (-log sigmoid(margin)) + anchor CE

    In the code the differences of log-probs are differences of logits: both normalisers cancel. beta,
    preference and anchor are cfg's.

So the gradient of the preference moves two logits of a token, those of a and b, and none where a = b. It
repairs disagreements about the likeliest token and says nothing about the rest of the distribution: alone
it has no reason to make the student's distribution the teacher's, and needs the anchor, CE on the teacher's
text.

What differs from the release: log-softmax in fp32 where it has bf16; a language-model term with word-level
KD in it is left out; the teacher's responses are samples, drawn once for every training prompt; no dropout.

Held against: dpkd.py, the loss of the paper, and SeqKD (--preference 0), which is what the anchor alone
does.

What to watch: `agree`, the share of tokens with a = b, rises; `preference` falls to log 2 = 0.693, its
least value. `kl_pq` on validation prompts tells whether the distribution is learned.

    python -m tests.controls.dpkd_token                         beta 0.1, half preference, half anchor
    python -m tests.controls.dpkd_token --anchor 0              the preference alone
    python -m tests.controls.dpkd_token --preference 0 --anchor 1       the anchor alone: SeqKD
"""
import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import common


@dataclass
class Config(common.Settings):
    # method
    beta: float = 0.1                # size of the margin
    preference: float = 0.5          # weight of the preference term
    anchor: float = 0.5              # weight of CE on the teacher's responses
    # optimization
    steps: int = 500                 # optimizer steps; 0 only evaluates
    batch_size: int = 64             # sequences of one optimizer step
    accum: int = 1                   # micro-batches they are split into: raise it when memory runs out
    lr: float = 3e-3                 # peak; right for the tiny world, 1e-5 to 5e-5 for pretrained models
    warmup: int = 20                 # steps of linear warm-up; after it a cosine down to a tenth of lr
    weight_decay: float = 0.01       # AdamW's
    clip: float = 1.0                # largest gradient norm

    unused = ("text_field",)  # shared settings without effect here: setting one is an error


# ----------------------------------------------------------------------------------------------------------
# The method
# ----------------------------------------------------------------------------------------------------------
# R: the response tokens of a micro-batch, one row each, response after response; V vocabulary, H hidden
# size, B responses. No row is a prompt token or padding, so no loss needs a mask.
def token_preference_loss(student_logits, teacher_logits, targets, beta, preference, anchor):
    """The loss of each row; preference, CE, margin, whether a = b. (R,V), (R,V), (R,) -> five (R,)."""
    a = teacher_logits.argmax(-1, keepdim=True)  # (R,1)
    b = student_logits.argmax(-1, keepdim=True)  # (R,1)
    # differences of logits: both softmax normalisers cancel, so the gradient touches logits a and b only
    gap_q = (student_logits.gather(-1, a) - student_logits.gather(-1, b))[:, 0]  # (R,) never above 0
    gap_p = (teacher_logits.gather(-1, a) - teacher_logits.gather(-1, b))[:, 0]  # (R,) never below 0
    margin = beta * (gap_q - gap_p)
    prefer = -F.logsigmoid(margin)  # at least log 2, and just that with no gradient where a = b
    ce = F.cross_entropy(student_logits, targets, reduction="none")
    return preference * prefer + anchor * ce, prefer, ce, margin, (a == b)[:, 0].to(ce.dtype)


# ----------------------------------------------------------------------------------------------------------
# The loop
# ----------------------------------------------------------------------------------------------------------
def train(cfg) -> dict:
    """One run: it fills out/<name>/ and returns its final metrics."""
    common.check_settings(cfg, beta=(1e-6, 1e6), preference=(0, 1e6), anchor=(0, 1e6))
    if cfg.preference == cfg.anchor == 0:
        raise common.BadInput("--preference and --anchor are both 0: nothing to train on")
    run = common.Run(cfg, __file__)
    if run.finished:
        return run.finished
    device, dtype = run.device, common.compute_dtype(cfg, run.device)

    # models: the teacher is frozen, in the compute dtype; the student keeps fp32 weights, cast on the fly
    student, teacher, tokenizer = common.load_pair(cfg, device)
    if teacher is None:
        raise common.BadInput("--teacher none: the preference compares the student with a teacher: "
                              "name one")

    # data
    data = common.load_data(cfg, student, teacher, tokenizer)
    examples = common.teacher_answers(teacher, data.train, tokenizer, cfg)
    batches = common.Batches(examples, student, teacher, cfg, device)

    # what is called in the loop. A forward pass ends at the hidden states (R,H); rowwise_loss makes logits
    # of them and calls row_loss, chunk by chunk: whole (R,V) logits would take most of a step's memory
    student_fwd = common.response_states(student, cfg.compile)
    teacher_fwd = common.teacher_states(teacher, batches, cfg)
    compiled_loss = common.try_compile(token_preference_loss) if cfg.compile else token_preference_loss

    def row_loss(student_logits, teacher_logits, targets):
        return compiled_loss(student_logits, teacher_logits, targets, cfg.beta, cfg.preference, cfg.anchor)

    evaluate = common.make_evaluator(cfg, teacher, tokenizer, data.valid)
    evaluate_test = common.make_evaluator(cfg, teacher, tokenizer, data.test)
    before = evaluate_test(student)  # ahead of run.start, which may load a later student from a checkpoint

    # optimizer; beta_2 = 0.98 averages squared gradients over 50 steps, not 1000: runs have a few hundred
    optimizer = torch.optim.AdamW(student.parameters(), lr=cfg.lr, betas=(0.9, 0.98),
                                  weight_decay=cfg.weight_decay, fused=True)
    start = run.start(student=student, optimizer=optimizer)
    student.eval()  # no dropout, as in dpkd.py

    for step in range(start, cfg.steps + 1):
        if step % cfg.eval_every == 0 or step == cfg.steps:
            run.evaluated(step, evaluate(student))
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
                student_hidden = student_fwd(batch)                # (R,H)
                # teacher_batch: the same responses after the teacher's template; frozen: no graph is built
                teacher_hidden = teacher_fwd(batch.teacher_batch)  # (R,H)
            sums = common.rowwise_loss(row_loss, student, student_hidden, batch.targets,
                                       teacher, teacher_hidden)  # (5,) loss and its parts
            (sums[0] / n_tokens).backward()
            totals = totals + sums.detach() / n_tokens
        common.reduce_gradients(student, totals)
        grad_norm = torch.nn.utils.clip_grad_norm_(student.parameters(), cfg.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        if step % cfg.log_every == 0 or step + 1 == cfg.steps:
            loss, preference, ce, margin, agree = totals.tolist()
            run.log(step, loss=loss, preference=preference, ce=ce, margin=margin, agree=agree,
                    grad_norm=grad_norm.item(), lr=lr, tokens=n_tokens)
        run.end_step(step + 1, student=student, optimizer=optimizer)

    report = {"teacher": evaluate_test(teacher)}
    return run.finish(student, tokenizer, {**report, "before": before, "after": evaluate_test(student)})


if __name__ == "__main__":
    sys.exit(common.main(train, Config))
