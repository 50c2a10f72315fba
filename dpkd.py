"""Direct preference KD: learn to prefer the teacher's response to one's own, with a loss like DPO's.

Li, Gu, Dong, Wang, Cheng, Wei, "Direct Preference Knowledge Distillation for Large Language Models", 2024,
https://arxiv.org/abs/2406.19774; official code: https://github.com/microsoft/LMOps/tree/main/dpkd

p is the teacher, q the student, x a prompt; y_t is a response sampled from the teacher, y_s one from the
student (t and s are names here, not positions). EOS, the end-of-sequence token, is part of a response.

Stage 1, a reward. Take any r(x,y). The q that maximises E_q[r(x,y)] - beta KL(q||p) is

    q*(y|x) = p(y|x) exp(r/beta) / Z(x),     where Z(x) makes it sum to 1; solved for the reward:
    r = beta log q*(y|x)/p(y|x) + beta log Z(x)                                         Eq. 2-5

This is all that stage 1 is used for: no reward model is trained, and there is no RL.

Stage 2, a preference. Put r into the model of Bradley and Terry, Pr(y_t beats y_s) = sigmoid(r(y_t) -
r(y_s)). Z(x) cancels (Eq. 6), and what remains is

    rho(y) = log q(y|x) - log p(y|x)              sums over the tokens of y
    margin = beta rho(y_t) - beta rho(y_s)        --length-norm: beta rho(y_t)/|y_t| - beta rho(y_s)/|y_s|
    L      = -log sigmoid(margin)                 Eq. 7, 8; with --length-norm Eq. 9 and Algorithm 1
    total  = cfg.preference L + cfg.anchor CE(y_t) + cfg.lm_coef CE(corpus)      lm_coef: the paper's lambda

    In the code logq_t = log q(y_t|x), logp_s = log p(y_s|x), n_t = |y_t|, and so on. The gradient of L is
    -beta sigmoid(-margin) [grad log q(y_t) - grad log q(y_s)]; the paper's Eq. 11 has +margin there, a slip
    of sign.

DPO has the same formula with the frozen *start of the student* in the place of p: its margin starts at 0,
and people made its labels. Here p is where the student should end, and the label says only who wrote the
text.

When y_s is drawn decides everything, and the paper leaves it open. Fresh pairs at every step (--negatives
online) have E[margin] = -beta [KL(p||q) + KL(q||p)], and for small beta the gradient of L is beta/2 times
that of KL(p||q): SeqKD with more noise. Frozen y_s from the starting student q_0 lead to a q proportional
to p (p/q_0)^(1/beta), which overshoots: from q_0 past p.

What differs from the paper:
 1. --negatives says when y_s is drawn: every step, every epoch, or once.
 2. No length normalisation, though Algorithm 1 has it: with it beta log Z(x) (1/|y_t| - 1/|y_s|) does not
    cancel, and Eq. 9 does not follow from Eq. 2. --length-norm switches it on.
 3. The values of beta and lm_coef are ours, the paper gives none; y_t is drawn once a prompt, at
    temperature 1.
 4. The language-model term needs your --corpus, and is off by default. CE on y_t, the anchor, is not in the
    paper but in the released code; it is off too.
 5. No dropout: log q must be that of the distribution which y_s was sampled from, or q = p is no fixed
    point.
 6. The released code is another loss: at each token of a teacher's response it compares the two models'
    likeliest tokens, and samples nothing. It is tests/controls/dpkd_token.py.

What to watch: `fresh_margin`, of new pairs on validation prompts, rises to 0 from below as q nears p
(noisily: the few y_s that p finds absurd weigh most). A `margin` of the training pairs above 0, or a
`preference` far below log 2 = 0.693, its value at q = p, is no success but overfitting of old pairs: then
nll_t and nll_s, -log q(y_t) and -log q(y_s) in nats a response, explode. `same` is the share of pairs with
y_t = y_s, which give no gradient; `no_end` is the share of y_s that were cut before their EOS.

    python dpkd.py                                              fresh y_s at every step
    python dpkd.py --anchor 0.5                                 with CE on the teacher's responses beside it
    python dpkd.py --preference 0 --anchor 1                    the anchor alone: SeqKD, trained on no y_s
    python dpkd.py --length-norm --beta 2                       Eq. 9
    python dpkd.py --negatives frozen --beta 0.1                collapses; an anchor halts that
    python dpkd.py --teacher gpt2-xl --student gpt2 --data dolly.jsonl --corpus books.txt --lm-coef 0.5 \
        --lr 1e-5 --batch-size 32 --accum 4
"""
import sys
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

import common


@dataclass
class Config(common.Settings):
    # method
    negatives: str = "online"        # when y_s is drawn: online, each step; epoch, each epoch; frozen, once
    beta: float = 0.5                # strength of stage 1's KL; --length-norm needs several times as much
    length_norm: bool = False        # divide rho(y) by |y|, as in Eq. 9
    preference: float = 1.0          # weight of L; at 0 no y_s is drawn to train on
    anchor: float = 0.0              # weight of CE on the teacher's responses, mean over tokens
    lm_coef: float = 0.0             # weight of CE on --corpus, the paper's lambda
    corpus: str = ""                 # running text: .txt (blank line: next document), .jsonl, folder, hub
    # optimization
    steps: int = 500                 # optimizer steps; 0 only evaluates
    batch_size: int = 64             # sequences of one optimizer step
    accum: int = 1                   # micro-batches they are split into: raise it when memory runs out
    lr: float = 3e-3                 # peak; right for the tiny world, 1e-5 to 5e-5 for pretrained models
    warmup: int = 20                 # steps of linear warm-up; after it a cosine down to a tenth of lr
    weight_decay: float = 0.01       # AdamW's
    clip: float = 1.0                # largest gradient norm

    unused = ("cache_gib",)  # shared settings without effect here: setting one is an error


# ----------------------------------------------------------------------------------------------------------
# The method
# ----------------------------------------------------------------------------------------------------------
# R: the response tokens of a micro-batch, one row each, response after response; V vocabulary, H hidden
# size, B responses or pairs. No row is a prompt token or padding, so no loss needs a mask.
def preference_loss(logq_t, logp_t, logq_s, logp_s, n_t, n_s, beta, length_norm):
    """L and the margin of each pair, Eq. 8, with length_norm Eq. 9. Six (B,) -> two (B,)."""
    rho_t = logq_t - logp_t  # (B,) above 0: the student finds y_t likelier than the teacher does
    rho_s = logq_s - logp_s  # (B,) the same of y_s
    if length_norm:
        rho_t, rho_s = rho_t / n_t, rho_s / n_s
    margin = beta * (rho_t - rho_s)
    return -F.logsigmoid(margin), margin  # log(sigmoid()) would be -inf for margins of -100, which do occur


def response_logprobs(model, hidden, batch):
    """log q(y|x) of whole responses, EOS included, with gradient. (R,H) -> (B,)."""
    token_logprobs = common.token_logprobs(model, hidden, batch.targets)  # (R,)
    return token_logprobs.new_zeros(len(batch.lengths)).index_add(0, batch.owner, token_logprobs)


def fixed_logprobs(model, examples, cfg, role):
    """response_logprobs without gradient, in its own batches: (len(examples),) float64 on the CPU."""
    at_target = lambda logits, _, targets: (common.log_softmax_at(logits, targets),)
    return common.per_response(at_target, model, None, examples, cfg, role)[:, 0]


class StudentAnswers(dict):
    """{example: (y_s, log p(y_s|x))}. It is part of a checkpoint: the weights that drew old y_s are gone."""
    state_dict = dict.copy         # the two methods that a checkpoint asks for
    load_state_dict = dict.update


def fresh_pairs(teacher, student, examples, tokenizer, cfg, seed):
    """A function () -> metrics of pairs that nothing was trained on: y_t drawn once, y_s from the student
    as it is."""
    fresh_t = common.answer_examples(teacher, examples, tokenizer, cfg, seed=seed(-1), role="teacher")
    logp_t = fixed_logprobs(teacher, fresh_t, cfg, "teacher")
    n_t = torch.tensor([len(e.response) for e in fresh_t])

    def evaluate_fresh():
        fresh_s = common.answer_examples(student, examples, tokenizer, cfg, seed=seed(-2))
        logp_s = fixed_logprobs(teacher, fresh_s, cfg, "teacher")
        logq_t = fixed_logprobs(student, fresh_t, cfg, "student")
        logq_s = fixed_logprobs(student, fresh_s, cfg, "student")
        n_s = torch.tensor([len(e.response) for e in fresh_s])
        _, margin = preference_loss(logq_t, logp_t, logq_s, logp_s, n_t, n_s, cfg.beta, cfg.length_norm)
        return {"fresh_margin": margin.mean().item(), "fresh_nll_t": -logq_t.mean().item(),
                "fresh_nll_s": -logq_s.mean().item()}

    return evaluate_fresh


# ----------------------------------------------------------------------------------------------------------
# The loop
# ----------------------------------------------------------------------------------------------------------
def train(cfg) -> dict:
    """One run: it fills out/<name>/ and returns its final metrics."""
    common.check_settings(cfg, negatives=["online", "epoch", "frozen"], beta=(1e-6, 1e6),
                          preference=(0, 1e6), anchor=(0, 1e6), lm_coef=(0, 1e6))
    if cfg.lm_coef > 0 and not cfg.corpus:
        raise common.BadInput(f"--lm-coef {cfg.lm_coef} needs a text: name one with --corpus, "
                              "or leave it at 0")
    if cfg.preference == cfg.anchor == cfg.lm_coef == 0:
        raise common.BadInput("--preference, --anchor and --lm-coef are all 0: nothing to train on")
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
    examples = common.teacher_answers(teacher, data.train, tokenizer, cfg)  # y_t of every training prompt
    batches = common.Batches(examples, student, None, cfg, device)  # the teacher has batches of its own
    # y_t never changes, nor does what the teacher thinks of it: one number for each training prompt
    logp_t = fixed_logprobs(teacher, batches.examples, cfg, "teacher").float().to(device)
    corpus = None
    if cfg.lm_coef > 0:
        corpus = common.Batches(common.load_corpus(cfg.corpus, tokenizer, cfg), student, None, cfg, device)

    # what is called in the loop: see kd_forward.py
    student_fwd = common.response_states(student, cfg.compile)
    lm_loss = lambda logits, _, targets: (F.cross_entropy(logits, targets, reduction="none"),)
    # other noise than that of y_t (seed cfg.seed): else a student equal to its teacher would repeat every
    # y_t
    seed = lambda step: common.noise_seed(cfg.seed + 1, step)
    y_s, eos, paired = StudentAnswers(), tokenizer.eos_token_id, cfg.preference > 0
    evaluate = common.make_evaluator(cfg, teacher, tokenizer, data.valid)
    evaluate_test = common.make_evaluator(cfg, teacher, tokenizer, data.test)
    evaluate_fresh = fresh_pairs(teacher, student, data.valid, tokenizer, cfg, seed)
    before = evaluate_test(student)  # ahead of run.start, which may load a later student from a checkpoint

    # optimizer; beta_2 = 0.98 averages squared gradients over 50 steps, not 1000: runs have a few hundred
    optimizer = torch.optim.AdamW(student.parameters(), lr=cfg.lr, betas=(0.9, 0.98),
                                  weight_decay=cfg.weight_decay, fused=True)
    start = run.start(student=student, optimizer=optimizer, y_s=y_s)
    student.eval()  # no dropout while training either, see 5 above

    for step in range(start, cfg.steps + 1):
        if step % cfg.eval_every == 0 or step == cfg.steps:
            fresh = evaluate_fresh()
            run.evaluated(step, {**evaluate(student), **fresh})
            run.print("      fresh pairs: " + "  ".join(f"{k} {v:.3f}" for k, v in fresh.items()))
            common.show_samples(run, student, data.valid, tokenizer, cfg)
        if step == cfg.steps:
            break

        lr = common.lr_at(step, cfg)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # y_s: those that are due, from the student as it is now; the teacher scores each once
        micro = batches.at(step)
        ids = [i for batch in micro for i in batch.ids]
        epoch = lambda step: step * cfg.batch_size // len(batches.examples)
        if not paired:
            due = []
        elif cfg.negatives == "online":
            due = ids
        elif step == 0 or cfg.negatives == "epoch" and epoch(step) != epoch(step - 1):
            due = range(len(batches.examples))
        else:
            due = []
        if due:
            asked = [batches.examples[i] for i in due]
            drawn = common.answer_examples(student, asked, tokenizer, cfg, seed=seed(step))
            scored = fixed_logprobs(teacher, drawn, cfg, "teacher").tolist()
            new = {i: (e.response, logp) for i, e, logp in zip(due, drawn, scored)}
            # under torchrun all use process 0's draw of the whole data: it is the one that a checkpoint
            # keeps
            y_s.clear()  # all that are needed are new
            y_s.update(new if cfg.negatives == "online" else common.broadcast(new))

        # one step over accum micro-batches: sums are divided once, by the tokens or pairs of the whole step
        texts = corpus.at(step) if corpus else []
        n_pairs = cfg.batch_size
        n_tokens = common.all_reduce_sum(sum(len(b.targets) for b in micro))
        n_text = common.all_reduce_sum(sum(len(b.targets) for b in texts))
        totals = 0.0
        for k, batch in enumerate(micro):
            if paired:
                own = [replace(batches.examples[i], response=y_s[i][0]) for i in batch.ids]
                batch_s = batches.collate(own)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                student_hidden_t = student_fwd(batch)                          # (R_t,H)
                student_hidden_s = student_fwd(batch_s) if paired else None    # (R_s,H)
            logq_t = response_logprobs(student, student_hidden_t, batch)       # (B,)
            terms = {}
            if paired:
                logq_s = response_logprobs(student, student_hidden_s, batch_s)        # (B,)
                logp_s = torch.tensor([y_s[i][1] for i in batch.ids], device=device)  # (B,)
                # where y_s = y_t take the same numbers twice: the gradient is then exactly 0
                same = torch.tensor([e.response == batches.examples[i].response
                                     for i, e in zip(batch.ids, own)], device=device)  # (B,)
                no_end = torch.tensor([e.response[-1] != eos for e in own], device=device)  # (B,)
                logp_s = torch.where(same, logp_t[batch.ids], logp_s)
                logq_s = torch.where(same, logq_t, logq_s)
                losses, margin = preference_loss(logq_t, logp_t[batch.ids], logq_s, logp_s, batch.lengths,
                                                 batch_s.lengths, cfg.beta, cfg.length_norm)
                terms = {"preference": losses.sum() / n_pairs, "margin": margin.sum() / n_pairs,
                         "nll_s": -logq_s.sum() / n_pairs, "same": same.sum() / n_pairs,
                         "no_end": no_end.sum() / n_pairs}
            terms |= {"ce": -logq_t.sum() / n_tokens, "nll_t": -logq_t.sum() / n_pairs}
            loss = cfg.preference * terms.get("preference", 0) + cfg.anchor * terms["ce"]
            if corpus:
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    text_hidden = student_fwd(texts[k])  # (R,H)
                sums = common.rowwise_loss(lm_loss, student, text_hidden, texts[k].targets)
                loss = loss + cfg.lm_coef * sums[0] / n_text
            loss.backward()
            terms = {"loss": loss, **terms}
            totals = totals + torch.stack([x.detach() for x in terms.values()])
        common.reduce_gradients(student, totals)
        grad_norm = torch.nn.utils.clip_grad_norm_(student.parameters(), cfg.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        if step % cfg.log_every == 0 or step + 1 == cfg.steps:
            run.log(step, **dict(zip(terms, totals.tolist())), grad_norm=grad_norm.item(), lr=lr,
                    tokens=n_tokens)
        run.end_step(step + 1, student=student, optimizer=optimizer, y_s=y_s)

    report = {"teacher": evaluate_test(teacher)}
    return run.finish(student, tokenizer, {**report, "before": before, "after": evaluate_test(student)})


if __name__ == "__main__":
    sys.exit(common.main(train, Config))
