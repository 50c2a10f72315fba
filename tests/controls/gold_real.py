"""Control: GOLD's final student on real rows, as many as the LLM would have written. The yardstick for what
is written.

A copy of gold.py (`git diff --no-index gold.py tests/controls/gold_real.py`) without the LLM: the training
split of the task takes the place of what it would write, from the beginning again where --budget is larger.
The student and its loss are the same:

    L = mean over response tokens of alpha (-log q_y) + beta (-log 1e-4) (1 - q_y)                       (5)

It is no rival, for the method is for those who have three real rows. In a tiny world the real rows have the
topics in their true proportion, so the rare ones are rare here too: what covers them better can do better
on the tail.

Held against: gold.py.

What to watch: `accuracy`, `accuracy_uniform` and `accuracy_tail` on real test rows.

    python -m tests.controls.gold_real
    python -m tests.controls.gold_real --task sums
"""
import json
import math
import sys
from dataclasses import dataclass, replace

import torch
from torch.nn.functional import cross_entropy

import common


@dataclass
class Config(common.Settings):
    # method
    task: str = "reviews"            # an entry of data/tasks.json, or a .json file of your own in that form
    data: str = "auto"               # real rows; auto: the task's own
    budget: int = 3008               # rows to train on
    alpha: float = 0.1               # weight of CE in Eq. 5; the code has 1, .1 and .01
    beta: float = 1.0                # weight of reverse CE; 0 leaves alpha CE
    max_response: int = 64           # tokens of the student's answer
    # optimization
    steps: int = 1000                # optimizer steps; 0 only evaluates
    batch_size: int = 32             # sequences of one optimizer step
    accum: int = 1                   # micro-batches they are split into: raise it when memory runs out
    lr: float = 5e-3                 # peak; right for the tiny world, 1e-5 to 5e-5 for pretrained models
    warmup: int = 20                 # steps of linear warm-up; after it a cosine down to a tenth of lr
    weight_decay: float = 0.01       # AdamW's
    clip: float = 1.0                # largest gradient norm
    eval_every: int = 250            # steps between evaluations on validation rows
    eval_rows: int = 800             # most test rows to evaluate on (validation: at most 200)

    # shared settings without effect here: setting one is an error
    unused = ("teacher", "prompt_field", "response_field", "text_field",
              "teacher_template", "eval_temperature", "kl_on", "cache_gib")


# ----------------------------------------------------------------------------------------------------------
# The method
# ----------------------------------------------------------------------------------------------------------
# R: the response tokens of a micro-batch, one row each, response after response; V vocabulary, H hidden
# size. No row is a prompt token or padding, so no loss needs a mask.
def sce_loss(logits, targets, alpha, beta):
    """Eq. 5 of each row, and its CE. (R,V), (R,) -> two (R,).

    The reverse cross entropy is -sum_k q_k log(target_k). With a one-hot target whose zeros are set to 1e-4
    that is -log(1e-4) (1 - q_y) = 9.21 (1 - q_y).
    """
    ce = cross_entropy(logits, targets, reduction="none")  # (R,)
    reverse_ce = -math.log(1e-4) * (1 - (-ce).exp())         # (R,)
    return alpha * ce + beta * reverse_ce, ce


# ----------------------------------------------------------------------------------------------------------
# The loop
# ----------------------------------------------------------------------------------------------------------
def train(cfg) -> dict:
    """One run: it fills out/<name>/ and returns its final metrics."""
    common.check_settings(cfg, budget=(1, 10**9), alpha=(0, 1e6), beta=(0, 1e6))
    run = common.Run(cfg, __file__)
    if run.finished:
        return run.finished
    device = run.device

    # task
    task = common.load_task(cfg.task)
    cfg = replace(cfg, teacher="none", data=(task["data"] if cfg.data == "auto" else cfg.data))
    if not cfg.data:
        raise common.BadInput(f"--task {cfg.task} names no data set: give --data")

    # models
    student, _, tokenizer = common.load_pair(cfg, device, same_tokens=False, world=task["world"])
    common.check_labels(task, tokenizer)

    # data
    rows = common.load_rows(cfg, task["world"], common.sample_reader(task),
                            {task["train"]: "train", task["test"]: "test"})
    topics = common.load_topics(cfg, task["world"])
    encode = common.row_encoder(cfg, student, None, tokenizer)
    valid = [encode(r) for r in common.spread(rows["valid"], 200)]
    test = [encode(r) for r in common.spread(rows["test"], cfg.eval_rows)]
    real = [rows["train"][i % len(rows["train"])] for i in range(cfg.budget)]
    print(f"task {task['name']}: {len(rows['train'])} real rows, {len(valid)} valid, {len(test)} test rows")

    # ahead of run.start, which may load a later student from a checkpoint
    before = evaluate(student, test, task, tokenizer, cfg)

    # optimizer; beta_2 = 0.98 averages squared gradients over 50 steps, not 1000: runs have a few hundred
    optimizer = torch.optim.AdamW(student.parameters(), lr=cfg.lr, betas=(0.9, 0.98),
                                  weight_decay=cfg.weight_decay, fused=True)
    samples = [{"sample": r["sample"], "fed": False} for r in real]
    covered = common.coverage(samples, topics)
    parts = dict(student=student, optimizer=optimizer)
    start = run.start(**parts)
    if common.processes()[0] == 0:  # the data set, for people and other scripts
        flat = [{**s["sample"], **{k: v for k, v in s.items() if k != "sample"}} for s in samples]
        lines = "".join(json.dumps(s) + "\n" for s in flat)
        (run.dir / "samples.jsonl").write_text(lines, encoding="utf-8")
    examples = [encode(r) for r in real]
    train_student(student, optimizer, examples, valid, task, tokenizer, start, parts, cfg, run)

    after = {**evaluate(student, test, task, tokenizer, cfg), **covered}
    return run.finish(student, tokenizer, {"before": before, "after": after})


def evaluate(model, examples, task, tokenizer, cfg):
    """The task's metrics of a model's greedy answers."""
    answers = common.answer_examples(model, examples, tokenizer, cfg, temperature=0.0)
    texts = [tokenizer.decode(e.response, skip_special_tokens=True) for e in answers]
    return common.task_metrics(task, texts, [e.row for e in examples])


def train_student(student, optimizer, examples, valid, task, tokenizer, start, parts, cfg, run):
    """The fresh student on the real rows, by Eq. 5."""
    device, dtype = run.device, common.compute_dtype(cfg, run.device)
    batches = common.Batches(examples, student, None, cfg, device)
    student_fwd = common.response_states(student, cfg.compile)
    compiled_loss = common.try_compile(sce_loss) if cfg.compile else sce_loss
    row_loss = lambda logits, _, targets: compiled_loss(logits, targets, cfg.alpha, cfg.beta)
    student.train()

    for step in range(start, cfg.steps + 1):
        if step % cfg.eval_every == 0 or step == cfg.steps:
            run.evaluated(step, evaluate(student, valid, task, tokenizer, cfg))
            common.show_samples(run, student, valid, tokenizer, cfg)
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
        run.end_step(step + 1, **parts)


if __name__ == "__main__":
    sys.exit(common.main(train, Config))
