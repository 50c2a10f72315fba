"""Word-level knowledge distillation: the student learns the teacher's whole next-token distribution.

Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", https://arxiv.org/abs/1503.02531
Kim, Rush, "Sequence-Level Knowledge Distillation", EMNLP 2016, https://arxiv.org/abs/1606.07947
All papers here but GOLD's compare with it. Kim and Rush's code: https://github.com/harvardnlp/seq2seq-attn

Take a prompt x and a response y = y_1 .. y_n, its end-of-sequence token (EOS) included. p is the teacher,
q the student.

    KL(p||q) at t = sum_v p(v|x,y_<t) log [ p(v|x,y_<t) / q(v|x,y_<t) ]       "forward" KL
    CE at t       = -log q(y_t|x,y_<t)                                         maximum likelihood
    L = mean over response tokens of (1 - alpha) CE + alpha tau^2 KL(p_tau||q_tau)

    p_tau = softmax(teacher_logits / tau), q_tau likewise. For large tau that makes gradients about tau^2
    times smaller; the factor tau^2 undoes it. In the code logp is log p_tau; logq is log q for CE and
    log q_tau for the KL; alpha = cfg.alpha, tau = cfg.tau.

Three classic baselines are settings of this one loss:
    KD      --alpha 1                          learn the teacher's distribution on the given responses
    SFT     --alpha 0                          learn the given responses, no teacher
    SeqKD   --alpha 0 --responses teacher      learn responses that the teacher wrote
With --responses teacher, --alpha 1 and --tau 1 the loss, summed over a response, estimates the KL between
whole responses, KL(p(y|x) || q(y|x)), without bias: by the chain rule that KL is the mean of this sum over
y from p.

What differs from the papers:
 1. SeqKD trains on samples of the teacher at temperature 1; the paper takes the output of a beam search.
 2. The mean runs over all response tokens of an optimizer step at once, so long responses weigh more.
 3. Prompt tokens are not trained on. CE uses the undivided logits whatever tau is, as Hinton et al. do.
 4. AdamW, no label smoothing, and dropout only where the model's own configuration has it.

The tiny world, on which the script runs without --teacher and --data, is made by data/answers/prepare.py:
every prompt has several right answers of known probability.

What to watch: `kl_pq`, KL(p||q) in nats a response on validation prompts, is what KD minimises; it should
fall. The training loss shows less: under SFT it falls while kl_pq stays or rises, which is memorising. In
the tiny world `valid_mass` is the probability that the student gives to right answers, and `mode_distance`
how far its choice among the wordings of an answer is from the teacher's (total variation, 0 to 1).

    python kd_forward.py                                        KD on the labelled rows of the tiny world
    python kd_forward.py --alpha 0                              SFT
    python kd_forward.py --responses teacher --alpha 0          SeqKD
    python kd_forward.py --responses teacher                    KD on the teacher's responses: lowest kl_pq
    python kd_forward.py --steps 0                              only evaluate
    python kd_forward.py --teacher Qwen/Qwen2.5-1.5B --student Qwen/Qwen2.5-0.5B --data my.jsonl \
        --lr 1e-5 --batch-size 32 --accum 4
"""
import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import common


@dataclass
class Config(common.Settings):
    # method
    alpha: float = 1.0               # weight of the KL, 1 - alpha of CE; 0.5 is common on human responses
    tau: float = 1.0                 # temperature of both KL softmaxes; above 1 shows small probabilities
    responses: str = "data"          # data: the given ones; teacher: its samples for every training prompt
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
def kd_loss(student_logits, teacher_logits, targets, alpha, tau):
    """The loss of each row, and its two terms CE and KL. (R,V), (R,V), (R,) -> three (R,)."""
    logq = F.log_softmax(student_logits, -1)       # (R,V)
    ce = -logq.gather(-1, targets[:, None])[:, 0]  # (R,)
    if teacher_logits is None:  # alpha = 0 needs no teacher; KL is not measured then, and logged as 0
        return ce, ce, torch.zeros_like(ce)
    if tau != 1:  # at tau = 1 this would cost a pass over (R,V) and change nothing
        logq = F.log_softmax(student_logits / tau, -1)
        teacher_logits = teacher_logits / tau
    # KL(p||q) written out: F.kl_div takes its arguments the other way round
    logp = F.log_softmax(teacher_logits, -1)       # (R,V)
    kl = (logp.exp() * (logp - logq)).sum(-1)      # (R,)
    loss = alpha * tau**2 * kl
    if alpha < 1:  # at alpha = 1 even the gradient of 0 CE would cost a pass over (R,V)
        loss = (1 - alpha) * ce + loss
    return loss, ce, kl


# ----------------------------------------------------------------------------------------------------------
# The loop
# ----------------------------------------------------------------------------------------------------------
def train(cfg) -> dict:
    """One run: it fills out/<name>/ and returns its final metrics."""
    common.check_settings(cfg, alpha=(0, 1), tau=(1e-3, 1e3), responses=["data", "teacher"])
    run = common.Run(cfg, __file__)
    if run.finished:
        return run.finished
    device, dtype = run.device, common.compute_dtype(cfg, run.device)

    # models: the teacher is frozen, in the compute dtype; the student keeps fp32 weights, cast on the fly
    student, teacher, tokenizer = common.load_pair(cfg, device)
    if teacher is None and (cfg.alpha > 0 or cfg.responses == "teacher"):
        raise common.BadInput(f"--teacher none: --alpha {cfg.alpha} with --responses {cfg.responses} "
                              "needs a teacher")

    # data
    data = common.load_data(cfg, student, teacher, tokenizer)
    examples = data.train
    if cfg.responses == "teacher":
        examples = common.teacher_answers(teacher, examples, tokenizer, cfg)
    batches = common.Batches(examples, student, teacher, cfg, device)

    # what is called in the loop. A forward pass ends at the hidden states (R,H); rowwise_loss makes logits
    # of them and calls row_loss, chunk by chunk: whole (R,V) logits would take most of a step's memory
    student_fwd = common.response_states(student, cfg.compile)
    teacher_fwd = common.teacher_states(teacher, batches, cfg) if cfg.alpha > 0 else None
    compiled_loss = common.try_compile(kd_loss) if cfg.compile else kd_loss

    def row_loss(student_logits, teacher_logits, targets):
        return compiled_loss(student_logits, teacher_logits, targets, cfg.alpha, cfg.tau)

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
                student_hidden = student_fwd(batch)                                         # (R,H)
                # teacher_batch: the same responses after the teacher's template; frozen: no graph is built
                teacher_hidden = teacher_fwd(batch.teacher_batch) if teacher_fwd else None  # (R,H)
            sums = common.rowwise_loss(row_loss, student, student_hidden, batch.targets,
                                       teacher if teacher_fwd else None, teacher_hidden)  # (3,) loss CE KL
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

    report = {"teacher": evaluate_test(teacher)} if teacher else {}
    return run.finish(student, tokenizer, {**report, "before": before, "after": evaluate_test(student)})


if __name__ == "__main__":
    sys.exit(common.main(train, Config))
