"""Control: reverse KL on the student's own text, token by token. What one would do instead of LLMR or DPKD.

A copy of kd_forward.py (`git diff --no-index kd_forward.py tests/controls/reverse_kl.py`). At every step
the student q answers the prompts of the step, y_s ~ q(y|x), drawn from its weights as they are; the teacher
p reads the same text:

    KL(q||p) at t = sum_v q(v|x,y_<t) log [ q(v|x,y_<t) / p(v|x,y_<t) ]       "reverse" KL
    L = mean over the tokens of y_s of KL(q||p)

This is on-policy distillation as in MiniLLM (https://arxiv.org/abs/2306.08543) and GKD
(https://arxiv.org/abs/2306.13649), without their extras. The gradient goes through q(v|...) of each token,
not through the sampling of y_s: what a token does to the KL of later ones is left out. q = p is its fixed
point all the same.

Held against: dpkd.py, which also draws y_s at every step but uses one number for each pair of texts where
this uses V numbers for each token; llmr.py, which has a reward for each token; kd_forward.py --responses
teacher, where the text is the teacher's and the KL the other one.

What to watch: `kl_qp`, measured on validation prompts, is what is minimised. `kl_pq` may stay high while it
falls: the student then says a part of what the teacher says. `no_end` is the share of y_s cut before an
EOS.

    python -m tests.controls.reverse_kl                                         from the supervised student
    python -m tests.controls.reverse_kl --student tiny-kl --steps 600 --lr 1e-3    from the KL-distilled one
"""
import math
import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import common


@dataclass
class Config(common.Settings):
    # optimization
    steps: int = 500                 # optimizer steps; 0 only evaluates
    batch_size: int = 64             # sequences of one optimizer step
    accum: int = 1                   # micro-batches they are split into: raise it when memory runs out
    lr: float = 3e-3                 # peak; right for the tiny world, 1e-5 to 5e-5 for pretrained models
    warmup: int = 20                 # steps of linear warm-up; after it a cosine down to a tenth of lr
    weight_decay: float = 0.01       # AdamW's
    clip: float = 1.0                # largest gradient norm

    unused = ("text_field", "cache_gib")  # shared settings without effect here: setting one is an error


# ----------------------------------------------------------------------------------------------------------
# The method
# ----------------------------------------------------------------------------------------------------------
# R: the response tokens of a micro-batch, one row each, response after response; V vocabulary, H hidden
# size, B responses. No row is a prompt token or padding, so no loss needs a mask.
def reverse_kl_loss(student_logits, teacher_logits, targets):
    """KL(q||p) of each row, which is the loss, and KL(p||q) beside it. (R,V), (R,V), (R,) -> two (R,)."""
    logq = F.log_softmax(student_logits, -1)       # (R,V)
    logp = F.log_softmax(teacher_logits, -1)       # (R,V)
    return (logq.exp() * (logq - logp)).sum(-1), (logp.exp() * (logp - logq)).sum(-1)


# ----------------------------------------------------------------------------------------------------------
# The loop
# ----------------------------------------------------------------------------------------------------------
def train(cfg) -> dict:
    """One run: it fills out/<name>/ and returns its final metrics."""
    common.check_settings(cfg)
    run = common.Run(cfg, __file__)
    if run.finished:
        return run.finished
    device, dtype = run.device, common.compute_dtype(cfg, run.device)

    # models: the teacher is frozen, in the compute dtype; the student keeps fp32 weights, cast on the fly
    student, teacher, tokenizer = common.load_pair(cfg, device)
    if teacher is None:
        raise common.BadInput("--teacher none: the reverse KL compares the student with a teacher: "
                              "name one")

    # data: with or without a response, only the prompts are used
    data = common.load_data(cfg, student, teacher, tokenizer)
    examples, eos = data.train, tokenizer.eos_token_id

    # what is called in the loop. A forward pass ends at the hidden states (R,H); rowwise_loss makes logits
    # of them and calls row_loss, chunk by chunk: whole (R,V) logits would take most of a step's memory
    student_fwd = common.response_states(student, cfg.compile)
    teacher_fwd = common.response_states(teacher, cfg.compile)
    row_loss = common.try_compile(reverse_kl_loss) if cfg.compile else reverse_kl_loss
    # --compile: every width of a batch is compiled anew, so batches are padded to one of three widths
    longest = max(max(len(e.prompt), len(e.teacher_prompt)) for e in examples) + cfg.max_response
    widths = [8 * math.ceil(longest * x / 8) for x in (0.5, 0.75, 1)] if cfg.compile else ()
    evaluate = common.make_evaluator(cfg, teacher, tokenizer, data.valid)
    evaluate_test = common.make_evaluator(cfg, teacher, tokenizer, data.test)
    before = evaluate_test(student)  # ahead of run.start, which may load a later student from a checkpoint

    # optimizer; beta_2 = 0.98 averages squared gradients over 50 steps, not 1000: runs have a few hundred
    optimizer = torch.optim.AdamW(student.parameters(), lr=cfg.lr, betas=(0.9, 0.98),
                                  weight_decay=cfg.weight_decay, fused=True)
    start = run.start(student=student, optimizer=optimizer)
    student.eval()  # no dropout: what is sampled and what is improved are one distribution

    for step in range(start, cfg.steps + 1):
        if step % cfg.eval_every == 0 or step == cfg.steps:
            run.evaluated(step, evaluate(student))
            common.show_samples(run, student, data.valid, tokenizer, cfg)
        if step == cfg.steps:
            break

        lr = common.lr_at(step, cfg)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # y_s: the student answers the prompts of this step in one batched call, as it is now
        asked = [examples[i] for i in common.step_indices(len(examples), step, cfg)]
        seed = common.noise_seed(cfg.seed, step)
        answered = common.answer_examples(student, asked, tokenizer, cfg, seed=seed)
        answered.sort(key=lambda e: len(e.prompt) + len(e.response))  # less padding

        # one step over accum micro-batches: sums are divided once, by the tokens of the whole step
        n_tokens = common.all_reduce_sum(sum(len(e.response) for e in answered))
        size, totals = len(answered) // cfg.accum, 0.0
        for i in range(0, len(answered), size):
            batch = common.collate(answered[i:i + size], student, "student", widths).to(device)
            teacher_batch = common.collate(answered[i:i + size], teacher, "teacher", widths).to(device)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                student_hidden = student_fwd(batch)          # (R,H)
                teacher_hidden = teacher_fwd(teacher_batch)  # (R,H)
            sums = common.rowwise_loss(row_loss, student, student_hidden, batch.targets,
                                       teacher, teacher_hidden)  # (2,) KL(q||p) KL(p||q)
            (sums[0] / n_tokens).backward()
            totals = totals + sums.detach() / n_tokens
        common.reduce_gradients(student, totals)
        grad_norm = torch.nn.utils.clip_grad_norm_(student.parameters(), cfg.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        if step % cfg.log_every == 0 or step + 1 == cfg.steps:
            loss, kl_pq = totals.tolist()
            no_end = sum(e.response[-1] != eos for e in answered) / len(answered)
            run.log(step, loss=loss, kl_pq=kl_pq, no_end=no_end, grad_norm=grad_norm.item(), lr=lr,
                    tokens=n_tokens)
        run.end_step(step + 1, student=student, optimizer=optimizer)

    report = {"teacher": evaluate_test(teacher)}
    return run.finish(student, tokenizer, {**report, "before": before, "after": evaluate_test(student)})


if __name__ == "__main__":
    sys.exit(common.main(train, Config))
