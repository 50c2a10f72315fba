"""Direct preference KD: prefer the teacher's answer to the student's own, by how much the student exaggerates each.

Li, Gu, Dong, Wang, Cheng, Wei, "Direct Preference Knowledge Distillation for Large Language Models", 2024,
https://arxiv.org/abs/2406.19774; official code: https://github.com/microsoft/LMOps/tree/main/dpkd

p is the teacher, q the student, x a prompt, y_t a response sampled from the teacher, y_s one sampled from the student.

Stage 1, a reward and a reverse KL: max E_q[r(x,y)] - beta KL(q||p) has the solution q*(y) = p(y) exp(r/beta) / Z(x).
Solved for the reward, r = beta log q*(y)/p(y) + beta log Z(x) (Eq. 2-5). No reward model is trained, there is no RL
and no estimate of the KL: this algebra is all that stage 1 is used for.
Stage 2, a preference: put r into the model of Bradley and Terry, Pr(y_t beats y_s) = sigmoid(r(y_t) - r(y_s)). Z(x)
cancels (Eq. 6), and what remains is

    rho(y) = log q(y|x) - log p(y|x)                    sums over the tokens of y, EOS counted, prompt and padding not
    margin = beta rho(y_t) - beta rho(y_s)              --length-norm: beta rho(y_t)/|y_t| - beta rho(y_s)/|y_s|
    L      = -log sigmoid(margin)                       Eq. 7, 8; with --length-norm Eq. 9 and Algorithm 1
    whole loss = preference L + anchor CE(y_t) + lm_coef CE(corpus)

    In the code logq_t = log q(y_t|x), logp_s = log p(y_s|x), n_t = |y_t|, and so on. The gradient of L is
    -beta sigmoid(-margin) [grad log q(y_t) - grad log q(y_s)]; the paper's Eq. 11 has +margin there, a slip of sign.

DPO has the same formula with the frozen *start of the student* in the place of p: its margin starts at 0, and people
made its labels. Here p is where the student should end, and the label says only who wrote the text.

When y_s is drawn decides everything, and the paper does not say. Fresh pairs at every step (--negatives online) have
E[margin] = -beta [KL(p||q) + KL(q||p)], and for small beta the gradient of L is beta/2 times that of KL(p||q): SeqKD
with more noise. Frozen y_s from the starting student q_0 lead to q = p (p/q_0)^(1/beta) instead, far beyond p.

What differs from the paper:
 1. --negatives says when y_s is drawn: every step, every epoch, or once.
 2. With --length-norm a rest log Z(x) (1/|y_t| - 1/|y_s|) does not cancel: Eq. 9 does not follow from Eq. 2. Off.
 3. beta and lm_coef are ours, the paper names neither; y_t is drawn once for each prompt, at temperature 1.
 4. The language-model term needs your --corpus, and is off by default. CE on y_t, the anchor, is not in the paper but
    in the released code; it is off too.
 5. No dropout: log q must be that of the distribution which y_s was sampled from, or q = p is no fixed point.
 6. The released code is another loss: at each token of a teacher's response it compares the two models' likeliest
    tokens, and samples nothing. It is tests/controls/dpkd_token.py.

What to watch: `fresh_margin`, of new pairs on validation prompts, rises to 0 from below as q nears p (noisily: the few
y_s that p finds absurd weigh most). A `margin` of the training pairs above 0 is no success but old pairs overfitted:
nll_t and nll_s explode while the loss nears log 2 = 0.693, its value at q = p, or passes it. `same` is the share of
pairs with y_t = y_s, which give no gradient; `no_end` that of y_s cut before an EOS.

    python dpkd.py                                              fresh y_s at every step
    python dpkd.py --anchor 0.5                                 with CE on the teacher's responses beside it
    python dpkd.py --preference 0 --anchor 1                    the anchor alone, which is SeqKD
    python dpkd.py --length-norm --beta 2                       Eq. 9
    python dpkd.py --negatives frozen --beta 0.1                collapses; online cures it, an anchor halts it
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
    negatives: str = "online"        # when y_s is drawn: online, every step; epoch, every epoch; frozen, once
    beta: float = 0.5                # strength of stage 1's KL; --length-norm wants several times as much
    length_norm: bool = False        # divide rho(y) by |y|, as in Eq. 9
    preference: float = 1.0          # weight of the preference term
    anchor: float = 0.0              # weight of CE on the teacher's responses, mean over tokens
    lm_coef: float = 0.0             # weight of CE on --corpus, the paper's lambda
    corpus: str = ""                 # running text: a .txt (blank lines part documents), .jsonl, folder, hub data
    # optimization
    steps: int = 500                 # optimizer steps; 0 only evaluates
    batch_size: int = 64             # sequences of one optimizer step
    accum: int = 1                   # micro-batches they are split into: raise it when memory runs out
    lr: float = 3e-3                 # peak; right for the tiny world, 1e-5 to 5e-5 for pretrained models
    warmup: int = 20                 # steps of linear warm-up; after it a cosine down to a tenth of lr
    weight_decay: float = 0.01       # AdamW's
    clip: float = 1.0                # largest gradient norm

    unused = ("cache_gib",)


# ---------------------------------------------------------------------------------------------------------------
# The method
# ---------------------------------------------------------------------------------------------------------------
def preference_loss(logq_t, logp_t, logq_s, logp_s, n_t, n_s, beta, length_norm):
    """L and the margin of each pair, Eq. 8, with length_norm Eq. 9. Six (B,) -> two (B,)."""
    rho_t = logq_t - logp_t  # (B,) by how much the student exaggerates the teacher's text
    rho_s = logq_s - logp_s  # (B,) and its own
    if length_norm:
        rho_t, rho_s = rho_t / n_t, rho_s / n_s
    margin = beta * (rho_t - rho_s)
    return -F.logsigmoid(margin), margin  # log(sigmoid()) would be -inf for margins of -100, which do occur


def response_logprobs(model, hidden, batch):
    """log q(y|x) of whole responses, with gradient. (R,H) -> (B,). Rows hold no prompt and no padding, but EOS."""
    token_logprobs = common.token_logprobs(model, hidden, batch.targets)  # (R,)
    return token_logprobs.new_zeros(len(batch.lengths)).index_add(0, batch.owner, token_logprobs)


def log_likelihood(model, examples, cfg, role):
    """The same without gradient, of any number of examples: (len(examples),) float64 on the CPU."""
    at_target = lambda logits, _, targets: (common.log_softmax_at(logits, targets),)
    return common.per_response(at_target, model, None, examples, cfg, role)[:, 0]


class StudentAnswers(dict):
    """{example: (y_s, log p(y_s|x))}. Part of the checkpoint: the weights that old ones were drawn from are gone."""
    state_dict, load_state_dict = dict.copy, dict.update


# ---------------------------------------------------------------------------------------------------------------
# The loop
# ---------------------------------------------------------------------------------------------------------------
def train(cfg):
    common.check_settings(cfg, negatives=["online", "epoch", "frozen"], beta=(1e-6, 1e6), preference=(0, 1e6),
                          anchor=(0, 1e6), lm_coef=(0, 1e6))
    if cfg.teacher == "none":
        raise common.BadInput("--teacher none: the preference compares the student with a teacher: name one")
    if cfg.lm_coef > 0 and not cfg.corpus:
        raise common.BadInput(f"--lm-coef {cfg.lm_coef} needs a text: name one with --corpus, or leave it at 0")
    if cfg.preference == cfg.anchor == cfg.lm_coef == 0:
        raise common.BadInput("--preference, --anchor and --lm-coef are all 0: nothing to train on")
    run = common.Run(cfg, __file__)
    if run.finished:
        return run.finished
    device, dtype = run.device, common.compute_dtype(cfg, run.device)

    # models: the teacher is frozen and in the compute dtype, the student keeps fp32 weights and is cast on the fly
    student, teacher, tokenizer = common.load_pair(cfg, device)

    # data
    data = common.load_data(cfg, student, teacher, tokenizer)
    examples = common.teacher_answers(teacher, data.train, tokenizer, cfg)  # y_t of every training prompt
    batches = common.Batches(examples, student, teacher, cfg, device)
    logp_t = log_likelihood(teacher, batches.examples, cfg, "teacher").float().to(device)  # (N,) y_t never changes
    corpus = None
    if cfg.lm_coef > 0:
        corpus = common.Batches(common.load_corpus(cfg.corpus, tokenizer, cfg), student, None, cfg, device)

    # what is called in the loop
    student_fwd = common.response_states(student, cfg.compile)
    lm_loss = lambda q, _, y: (F.cross_entropy(q, y, reduction="none"),)
    # y_s and y_t are noise of their own: with one seed for both, a student equal to its teacher would repeat y_t
    seed = lambda step: common.noise_seed(0, (cfg.seed + 1) * 1_000_003 + step)
    y_s, eos = StudentAnswers(), tokenizer.eos_token_id
    evaluate = common.make_evaluator(cfg, teacher, tokenizer, data.valid)
    evaluate_test = common.make_evaluator(cfg, teacher, tokenizer, data.test)
    evaluate_fresh = fresh_pairs(teacher, student, data.valid, tokenizer, cfg, seed)
    before = evaluate_test(student)

    # optimizer
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

        # y_s: those that are due, in one sampler call, from the student as it is now; the teacher scores each once
        micro, N = batches.at(step), len(batches.examples)
        ids = [i for batch in micro for i in batch.ids]
        new_epoch = step == 0 or step * cfg.batch_size // N != (step - 1) * cfg.batch_size // N
        if cfg.negatives == "online":
            due = ids
        elif step == 0 or cfg.negatives == "epoch" and new_epoch:
            due = range(N)
        else:
            due = []
        if due:
            drawn = common.sampled(student, [batches.examples[i] for i in due], tokenizer, cfg, seed=seed(step))
            scored = log_likelihood(teacher, drawn, cfg, "teacher").tolist()
            y_s.update({i: (e.response, logp) for i, e, logp in zip(due, drawn, scored)})

        # one optimizer step over accum micro-batches: sums are divided once, by the tokens or pairs of the whole step
        texts = corpus.at(step) if corpus else []
        n_pairs = cfg.batch_size
        n_tokens = common.all_reduce_sum(sum(len(b.targets) for b in micro))
        n_text = common.all_reduce_sum(sum(len(b.targets) for b in texts))
        totals = 0.0
        for k, batch in enumerate(micro):
            batch_s = batches.collate([replace(batches.examples[i], response=y_s[i][0]) for i in batch.ids])
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                student_hidden_t = student_fwd(batch)    # (R_t,H)
                student_hidden_s = student_fwd(batch_s)  # (R_s,H)
            logq_t = response_logprobs(student, student_hidden_t, batch)      # (B,)
            logq_s = response_logprobs(student, student_hidden_s, batch_s)    # (B,)
            logp_s = torch.tensor([y_s[i][1] for i in batch.ids], device=device)  # (B,)
            # where y_s = y_t take the same numbers twice: the gradient is then exactly 0, however rounding falls
            same = torch.tensor([y_s[i][0] == batches.examples[i].response for i in batch.ids], device=device)
            logp_s = torch.where(same, logp_t[batch.ids], logp_s)
            logq_s = torch.where(same, logq_t, logq_s)
            losses, margin = preference_loss(logq_t, logp_t[batch.ids], logq_s, logp_s, batch.lengths,
                                             batch_s.lengths, cfg.beta, cfg.length_norm)
            preference, ce = losses.sum() / n_pairs, -logq_t.sum() / n_tokens
            loss = cfg.preference * preference + cfg.anchor * ce
            if corpus:
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    text_hidden = student_fwd(texts[k])  # (R,H)
                sums = common.rowwise_loss(lm_loss, student, text_hidden, texts[k].targets)
                loss = loss + cfg.lm_coef * sums[0] / n_text
            loss.backward()
            pairs = torch.stack([margin.sum(), -logq_t.sum(), -logq_s.sum()]) / n_pairs
            totals = totals + torch.cat([torch.stack([loss, preference, ce]), pairs]).detach()
        common.reduce_gradients(student, totals)
        grad_norm = torch.nn.utils.clip_grad_norm_(student.parameters(), cfg.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        if step % cfg.log_every == 0 or step + 1 == cfg.steps:
            loss, preference, ce, margin, nll_t, nll_s = totals.tolist()
            same = sum(y_s[i][0] == batches.examples[i].response for i in ids) / len(ids)
            no_end = sum(y_s[i][0][-1] != eos for i in ids) / len(ids)
            run.log(step, loss=loss, preference=preference, ce=ce, margin=margin, nll_t=nll_t, nll_s=nll_s, same=same,
                    no_end=no_end, grad_norm=grad_norm.item(), lr=lr, tokens=n_tokens)
        run.end_step(step + 1, student=student, optimizer=optimizer, y_s=y_s)

    report = {"teacher": evaluate_test(teacher)}
    return run.finish(student, tokenizer, {**report, "before": before, "after": evaluate_test(student)})


def fresh_pairs(teacher, student, examples, tokenizer, cfg, seed):
    """A function () -> metrics of pairs that nothing was trained on: y_t drawn once, y_s from the student as it is."""
    held_t = common.sampled(teacher, examples, tokenizer, cfg, seed=seed(-1), role="teacher")
    logp_t = log_likelihood(teacher, held_t, cfg, "teacher")
    n_t = torch.tensor([len(e.response) for e in held_t])

    def evaluate_fresh():
        held_s = common.sampled(student, examples, tokenizer, cfg, seed=seed(-2))
        logp_s = log_likelihood(teacher, held_s, cfg, "teacher")
        logq_t, logq_s = (log_likelihood(student, held, cfg, "student") for held in (held_t, held_s))
        n_s = torch.tensor([len(e.response) for e in held_s])
        _, margin = preference_loss(logq_t, logp_t, logq_s, logp_s, n_t, n_s, cfg.beta, cfg.length_norm)
        return {"fresh_margin": margin.mean().item(), "fresh_nll_t": -logq_t.mean().item(),
                "fresh_nll_s": -logq_s.mean().item()}

    return evaluate_fresh


if __name__ == "__main__":
    sys.exit(common.main(train, Config))
