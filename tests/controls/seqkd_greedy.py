"""SeqKD on the teacher's greedy responses: the paper takes the output of a beam search, no sample.

Kim, Rush, "Sequence-Level Knowledge Distillation", EMNLP 2016, arxiv.org/abs/1606.07947, Eq. 8

A copy of kd_forward.py: `git diff --no-index kd_forward.py tests/controls/seqkd_greedy.py` shows
what is different. All of the teacher's mass is put on its best response; greedy decoding is a beam
of one:

    y_t = argmax_v p(v|x,y_<t)
    L   = mean over the tokens of y of -log q(y_t|x,y_<t)

The student learns the mode: one response to each prompt. On samples of the teacher the same cross
entropy teaches its whole distribution, as KL(p||q) does. Compare it with SeqKD on samples
(kd_forward.py --responses teacher --alpha 0), and with llmr.py, whose optimum is the same text.

What to watch: `right_greedy`, `entropy` and `wording_distance`. `kl_pq` rises while the loss falls:
the mode is not the distribution.

    python tests/controls/seqkd_greedy.py                       from the supervised student
    python tests/controls/seqkd_greedy.py --student student-kl --steps 600 --lr 1e-3
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
    pass


# --- The method -----------------------------------------------------------------------------------
# R: response tokens in a batch, r: in one chunk of it; V: vocabulary, H: hidden size. Each row is
# one response token, so no loss needs a mask.
def seqkd_loss(student_logits, targets):
    """CE of each row. (r,V), (r,) -> (r,)."""
    logq = F.log_softmax(student_logits, -1)        # (r,V)
    return -logq.gather(-1, targets[:, None])[:, 0]


# --- The loop -------------------------------------------------------------------------------------
def train(cfg) -> dict:
    """One run: it fills its directory and returns its final metrics."""
    common.check_settings(cfg)
    if cfg.teacher == "none":
        raise common.BadInput("--teacher none: somebody has to write the responses")
    run = common.Run(cfg, __file__)

    # data and models: the frozen teacher has the dtype of --dtype; the student's weights are fp32
    rows = common.load_rows(cfg)
    student, teacher = common.load_pair(cfg, run.device)
    data = common.load_data(cfg, rows, student, teacher)
    examples = data.train  # with or without responses
    if cfg.steps:
        examples = common.respond(teacher, examples, cfg, temperature=0.0)

    evaluate = common.Evaluator(cfg, teacher, data.valid)
    evaluate_test = common.Evaluator(cfg, teacher, data.test)
    columns = {"teacher": evaluate_test(teacher)}
    columns["before"] = evaluate_test(student)  # before run.start, which may load trained weights

    # runs are short: beta_2 = 0.98 averages squared gradients over 50 steps, the default over 1000
    optimizer = torch.optim.AdamW(student.parameters(), lr=cfg.lr, betas=(0.9, 0.98),
                                  weight_decay=cfg.weight_decay, fused=True)
    start = run.start(data.hash, student=student, optimizer=optimizer)
    loss_of = torch.compile(seqkd_loss, dynamic=True) if cfg.compile else seqkd_loss
    student.train()

    for step in range(start, cfg.steps):
        if step % cfg.eval_every == 0:
            run.evaluated(step, evaluate(student), evaluate.generations)
        lr = common.set_lr(optimizer, step, cfg)

        chosen = [examples[i] for i in common.step_indices(len(examples), step, cfg)]
        micro = common.micro_batches(chosen, student, None, cfg)
        n_tokens = common.all_reduce_sum(sum(len(b.targets) for b in micro))
        total = torch.zeros(1, device=run.device)
        for batch in micro:
            with common.precision(cfg, run.device):
                student_hidden = common.response_states(student, batch)                 # (R,H)
            # the logits of all R rows need too much memory; in_chunks collects the gradients
            for rows, part in common.in_chunks(student_hidden, student):
                student_logits = common.logits_of(student, part)                        # (r,V)
                loss = loss_of(student_logits, batch.targets[rows])
                (loss.sum() / n_tokens).backward()  # n_tokens counts the whole step
                total += loss.detach().sum()
        total /= n_tokens
        common.reduce_gradients(student, total)
        grad_norm = torch.nn.utils.clip_grad_norm_(student.parameters(), cfg.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        if step % cfg.log_every == 0 or step + 1 == cfg.steps:
            run.log(step, loss=total.item(), grad_norm=grad_norm.item(), lr=lr, tokens=n_tokens)
        run.end_step(step + 1)

    columns["after"] = evaluate_test(student) if cfg.steps else columns["before"]
    return run.finish(student, columns, common.MEANINGS, evaluate_test.generations)


if __name__ == "__main__":
    sys.exit(common.main(train, Config))
