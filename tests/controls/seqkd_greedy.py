"""Control: SeqKD on the teacher's greedy text. The paper's teacher text is the output of a beam search, not
a sample.

A copy of kd_forward.py (`git diff --no-index kd_forward.py tests/controls/seqkd_greedy.py`). Kim and Rush
(https://arxiv.org/abs/1606.07947, Eq. 8) put all the teacher's mass on its best response and train on that.
Greedy decoding is a beam of one:

    yhat_t = argmax_v p(v|x,yhat_<t)
    L = mean over the tokens of yhat of -log q(yhat_t|x,yhat_<t)

The student is taught the mode: one response to each prompt. On samples of the teacher the same cross
entropy teaches its whole distribution, as KL(p||q) does.

Held against: SeqKD on samples (kd_forward.py --responses teacher --alpha 0), and LLMR, whose optimum is the
same greedy text; `valid` at temperature 1 and `entropy` say how much of LLMR's gain is this sharpening.

What to watch: `valid_greedy` and `mode_distance`. `kl_pq` rises while the loss falls: the mode is not the
distribution.

    python -m tests.controls.seqkd_greedy                                                from the supervised student
    python -m tests.controls.seqkd_greedy --student tiny-kl --steps 600 --lr 1e-3        from the KL-distilled one
"""
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
def seqkd_loss(student_logits, targets):
    """CE of each row. (R,V), (R,) -> one (R,)."""
    logq = F.log_softmax(student_logits, -1)        # (R,V)
    return (-logq.gather(-1, targets[:, None])[:, 0],)


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
        raise common.BadInput("--teacher none: the responses are the teacher's, so name a --teacher")

    # data
    data = common.load_data(cfg, student, teacher, tokenizer)
    examples = common.answer_examples(teacher, data.train, tokenizer, cfg, temperature=0.0, role="teacher")
    batches = common.Batches(examples, student, None, cfg, device)

    # what is called in the loop. A forward pass ends at the hidden states (R,H); rowwise_loss makes logits
    # of them and calls row_loss, chunk by chunk: whole (R,V) logits would take most of a step's memory
    student_fwd = common.response_states(student, cfg.compile)
    compiled_loss = common.try_compile(seqkd_loss) if cfg.compile else seqkd_loss
    row_loss = lambda logits, _, targets: compiled_loss(logits, targets)
    evaluate = common.make_evaluator(cfg, teacher, tokenizer, data.valid)
    evaluate_test = common.make_evaluator(cfg, teacher, tokenizer, data.test)
    before = evaluate_test(student)  # ahead of run.start, which may load a later student from a checkpoint

    # optimizer; beta_2 = 0.98 averages squared gradients over 50 steps, not 1000: runs have a few hundred
    optimizer = torch.optim.AdamW(student.parameters(), lr=cfg.lr, betas=(0.9, 0.98),
                                  weight_decay=cfg.weight_decay, fused=True)
    start = run.start(student=student, optimizer=optimizer)
    student.train()

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
                student_hidden = student_fwd(batch)  # (R,H)
            sums = common.rowwise_loss(row_loss, student, student_hidden, batch.targets)
            (sums[0] / n_tokens).backward()
            totals = totals + sums.detach() / n_tokens
        common.reduce_gradients(student, totals)
        grad_norm = torch.nn.utils.clip_grad_norm_(student.parameters(), cfg.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        if step % cfg.log_every == 0 or step + 1 == cfg.steps:
            loss = totals.item()
            run.log(step, loss=loss, grad_norm=grad_norm.item(), lr=lr, tokens=n_tokens)
        run.end_step(step + 1, student=student, optimizer=optimizer)

    report = {"teacher": evaluate_test(teacher)}
    return run.finish(student, tokenizer, {**report, "before": before, "after": evaluate_test(student)})


if __name__ == "__main__":
    sys.exit(common.main(train, Config))
