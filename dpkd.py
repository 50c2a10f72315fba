"""Direct preference KD: prefer the teacher's answer to the student's own, by how much the student exaggerates each.

Li, Gu, Dong, Wang, Cheng, Wei, "Direct Preference Knowledge Distillation for Large Language Models", 2024,
https://arxiv.org/abs/2406.19774; official code: https://github.com/microsoft/LMOps/tree/main/dpkd

p is the teacher, q the student, x a prompt, y_t a response sampled from p, y_s one sampled from q.
Stage 1, reward plus reverse KL: max E_q[r(x,y)] - beta KL(q||p) has the solution q*(y) = p(y) exp(r/beta) / Z(x), so
r = beta log q*/p + beta log Z(x) (Eq. 2-5). It is used only as this algebra: no reward model, no RL, no estimate of KL.
Stage 2, preference: put r into Bradley-Terry's Pr(y_t beats y_s) = sigmoid(r(y_t) - r(y_s)); Z(x) cancels (Eq. 6):

    rho(y) = log q(y|x) - log p(y|x)                    sums over tokens, EOS counted, prompt and pads out
    margin = beta rho(y_t) - beta rho(y_s)              --length-norm: beta/|y_t| rho(y_t) - beta/|y_s| rho(y_s)
    L = -log sigmoid(margin)                            Eq. 7, 8; with --length-norm Eq. 9 and Algorithm 1
    grad L = -beta sigmoid(-margin) [ grad log q(y_t) - grad log q(y_s) ]   the paper's Eq. 11 has +margin: a sign slip
    whole loss = preference * L + anchor * CE(y_t) + lm_coef * CE(corpus);  logq_t = log q(y_t|x), n_t = |y_t|, ...

DPO has the same formula with the frozen *start of the student* in the place of p: its margin starts at 0 and its
labels are human. Here p is where the student should end, and the label says only who wrote the text.

The released code (--level token) is another loss: at each token of a teacher's response, with the argmaxes a of p
and b of q, margin = beta ([log q(a) - log q(b)] - [log p(a) - log p(b)]), never above 0. It repairs top-1
disagreements, moves two logits a token, says nothing about the rest of the distribution, and so needs the anchor.

On fresh pairs, without length norm, E[margin] = -beta [KL(p||q) + KL(q||p)], and for small beta grad L is beta/2 grad
KL(p||q): SeqKD. Frozen y_s from the starting student q0 lead to q = p (p/q0)^(1/beta) instead, far beyond p.

What differs from the paper:
 1. It does not say when y_s is drawn; --negatives does: each step, each epoch, or once. This decides everything.
 2. With --length-norm, log Z(x) (1/|y_t| - 1/|y_s|) is left over: Eq. 9 does not follow from Eq. 2. Off by default.
 3. beta, weights and the sampling of y_t are not in the paper: y_t is drawn once per prompt at T = 1.
 4. The LM term needs your --corpus and is off by default; CE on y_t, from the released code, is on. That code
    also mixes word-level KD into its corpus term, and takes log-softmax in bf16; here it is fp32.
 5. No dropout: log q must be that of the distribution which y_s was sampled from, or q = p is no fixed point.

What to watch: `fresh_margin`, of new pairs on validation prompts, rises to 0 from below as q nears p (noisily: the few
y_s that p finds absurd weigh most). `margin`, of the training pairs, above 0 is not success but stale pairs overfitted:
nll_t and nll_s explode while the loss nears or passes log 2 = 0.693, its value at q = p. norm_*: the gradient norm of
each term. `same`: the share of pairs with y_t = y_s (no gradient); `no_end`: of y_s cut before an EOS.

    python dpkd.py                                              Eq. 8, fresh y_s every step, anchor: 40 s
    python dpkd.py --anchor 0                                   the preference alone
    python dpkd.py --preference 0                               the anchor alone, which is SeqKD
    python dpkd.py --length-norm --beta 2                       Eq. 9
    python dpkd.py --negatives frozen --beta 0.1 --anchor 0     collapses; online cures it, the anchor halts it
    python dpkd.py --level token --beta 0.1 --preference 0.5 --anchor 0.5      the released code
    python dpkd.py --level reverse_kl                           control: KL(q||p) token by token on the student's y_s
    python dpkd.py --teacher gpt2-xl --student gpt2 --data dolly.jsonl --corpus books.txt --lm-coef 0.5 \
        --lr 1e-5 --batch-size 32 --accum 4
"""
import math
import sys
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

import common


@dataclass
class Config:
    # models and data
    teacher: str = "tiny"            # model directory or hub name; tiny: the tiny world's
    student: str = "tiny"            # the same; a directory with config.json but no weights starts from random ones
    data: str = "tiny"               # .jsonl, .csv, dir of train/valid/test.jsonl, saved/hub dataset; tiny:N: world N
    prompt_field: str = "prompt"     # name of the prompt in a row of data
    response_field: str = "response" # name of the response; null there marks a prompt without one
    template: str = "auto"           # text around {prompt}; auto: the chat template, else the prompt and a line break
    teacher_template: str = ""       # if the teacher is to read another template than the student
    max_prompt: int = 256            # tokens; longer prompts lose their beginning
    max_response: int = 256          # tokens; longer responses lose their end and with it EOS
    holdout: float = 0.05            # share of prompts held out for valid, and again for test, where data has no splits
    teacher_device_map: str = ""     # e.g. auto: spread a large teacher over devices (needs accelerate)
    # method
    level: str = "sequence"          # sequence: Algorithm 1; token: the released code; reverse_kl: control on y_s
    negatives: str = "online"        # when y_s is drawn: online, every step; epoch, every epoch; frozen, once
    beta: float = 0.5                # strength of stage 1's KL; --length-norm wants several times as much
    length_norm: bool = False        # divide rho(y) by |y|, as in Eq. 9
    preference: float = 1.0          # weight of the preference term; 0 leaves the anchor alone, which is SeqKD
    anchor: float = 0.5              # weight of CE on the teacher's responses, mean over tokens
    lm_coef: float = 0.0             # weight of CE on --corpus, the paper's lambda
    corpus: str = ""                 # plain text (blank lines part documents) or .jsonl with a field "text"
    # optimization
    steps: int = 500                 # optimizer steps; 0 only evaluates
    batch_size: int = 64             # sequences of one optimizer step
    accum: int = 1                   # micro-batches they are split into: raise it when memory runs out
    lr: float = 3e-3                 # peak; right for the tiny world, 1e-5 to 5e-5 for pretrained models
    warmup: int = 20                 # steps of linear warm-up; after it a cosine down to a tenth of lr
    weight_decay: float = 0.01       # AdamW's
    clip: float = 1.0                # largest gradient norm
    # system
    eval_every: int = 100            # steps between evaluations on validation rows
    eval_rows: int = 500             # most test rows to evaluate on (validation: at most 200)
    eval_temperature: float = 1.0    # temperature of the evaluated distribution; the _greedy metrics have none
    kl_on: str = "samples"           # samples: KL on samples of teacher and student; references: on the given responses
    log_every: int = 20              # steps between lines of the log
    save_every: int = 500            # steps between checkpoints
    cache_gib: float = 0.0           # keep the teacher's final hidden states: saves its forward pass after epoch 1
    seed: int = 0                    # of data order, sampling and random weights
    device: str = "auto"             # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"              # float32 or bfloat16 for activations and teacher; the student's weights stay fp32
    compile: bool = torch.cuda.is_available()  # torch.compile: minutes at the start, faster steps; for long runs
    recompute: bool = False          # forget activations, compute them again for the gradient: less memory, slower
    out: str = ""                    # directory of this run; empty: out/<script and changed settings>
    resume: bool = False             # go on from the last checkpoint
    overwrite: bool = False          # delete an earlier run in the same directory first


# ---------------------------------------------------------------------------------------------------------------
# The method
# ---------------------------------------------------------------------------------------------------------------
def preference_loss(logq_t, logp_t, logq_s, logp_s, n_t, n_s, beta, length_norm):
    """-log sigmoid(margin) and the margin of each pair, Eq. 8, with length_norm Eq. 9. Six (B,) -> two (B,)."""
    rho_t, rho_s = logq_t - logp_t, logq_s - logp_s  # (B,) by how much the student exaggerates each text
    if length_norm:
        rho_t, rho_s = rho_t / n_t, rho_s / n_s
    margin = beta * (rho_t - rho_s)
    return -F.logsigmoid(margin), margin  # log(sigmoid()) would be -inf for margins of -100, which do occur


def token_preference_loss(student_logits, teacher_logits, targets, beta, preference, anchor):
    """The released code, per row: loss, preference term, CE, margin, agreement. (R,V), (R,V), (R,) -> five (R,)."""
    a, b = teacher_logits.argmax(-1, keepdim=True), student_logits.argmax(-1, keepdim=True)  # (R,1)
    # differences of logits: both softmax normalisers cancel, so the gradient touches logits a and b and no other
    gap_q = (student_logits.gather(-1, a) - student_logits.gather(-1, b))[:, 0]  # (R,) never above 0
    gap_p = (teacher_logits.gather(-1, a) - teacher_logits.gather(-1, b))[:, 0]  # (R,) never below 0
    margin = beta * (gap_q - gap_p)
    ce = F.cross_entropy(student_logits, targets, reduction="none")
    loss = -F.logsigmoid(margin)  # at least log 2, and just that with no gradient where a = b
    return preference * loss + anchor * ce, loss, ce, margin, (a == b)[:, 0].to(ce.dtype)


def response_logprobs(token_logprobs, batch):
    """log q(y|x) of whole responses from their tokens' (R,) -> (B,). Rows hold no prompt and no pad, but hold EOS."""
    return token_logprobs.new_zeros(len(batch.lengths)).index_add(0, batch.owner, token_logprobs)


def gradient_norm(term, student):
    """How hard a term pulls: the norm of its gradient, all parameters together. A second walk through the graph."""
    grads = torch.autograd.grad(term, list(student.parameters()), retain_graph=True, allow_unused=True)
    return torch.stack([g.norm() for g in grads if g is not None]).norm().item()


class Negatives(dict):
    """{example: (y_s, log p(y_s|x))}. Part of the checkpoint: the weights that old ones were drawn from are gone."""
    state_dict, load_state_dict = dict.copy, dict.update


# ---------------------------------------------------------------------------------------------------------------
# The loop
# ---------------------------------------------------------------------------------------------------------------
def train(cfg):
    common.check_settings(cfg, level=["sequence", "token", "reverse_kl"], negatives=["online", "epoch", "frozen"],
                          beta=(1e-6, 1e6), preference=(0, 1e6), anchor=(0, 1e6), lm_coef=(0, 1e6))
    if cfg.teacher == "none":
        raise common.BadInput("--teacher none: the preference compares the student with a teacher: name one")
    if cfg.lm_coef > 0 and not cfg.corpus:
        raise common.BadInput(f"--lm-coef {cfg.lm_coef} needs a text: name a file with --corpus, or leave it at 0")
    if cfg.level != "reverse_kl" and cfg.preference == cfg.anchor == cfg.lm_coef == 0:
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
    if batches.edges:  # with --compile: y_s may be longer than every y_t
        batches.edges.append(cfg.max_prompt + cfg.max_response)
    corpus = cfg.lm_coef > 0 and common.load_corpus(cfg.corpus, tokenizer, cfg)
    corpus = corpus and common.Batches(corpus, student, None, cfg, device)

    # what is called in the loop
    student_fwd, raw_fwd = (common.response_states(student, compiled) for compiled in (cfg.compile, False))
    teacher_fwd = common.teacher_states(teacher, batches, cfg) if cfg.level == "token" else \
        common.response_states(teacher, cfg.compile)
    token_loss = common.try_compile(token_preference_loss, dynamic=True) if cfg.compile else token_preference_loss
    row_loss = {"token": lambda q, p, y: token_loss(q, p, y, cfg.beta, cfg.preference, cfg.anchor),
                "reverse_kl": lambda q, p, y: common.both_kl(q, p, y)[::-1]}.get(cfg.level)  # the control: KL(q||p)
    logprobs = lambda model, part, side: common.per_response(  # of whole responses, without gradient: (len(part),)
        lambda z, _, y: (common.log_softmax_at(z, y),), model, None, part, cfg, side)[:, 0]
    seed = lambda step: common.noise_seed(0, (cfg.seed + 1) * 1_000_003 + step)  # y_t's noise would draw y_t again
    negatives, eos = Negatives(), tokenizer.eos_token_id
    logp_t = logprobs(teacher, batches.examples, "teacher").float().to(device)  # (N,) once: y_t never changes
    ruler, test_ruler = (common.make_ruler(cfg, teacher, tokenizer, part) for part in (data.valid, data.test))
    before = test_ruler(student)

    # fresh pairs: validation prompts, y_t drawn once, y_s anew from the student as it is, so none can be overfitted
    held_t = common.sampled(teacher, data.valid, tokenizer, cfg, seed=seed(-1), side="teacher")
    held_logp_t = logprobs(teacher, held_t, "teacher")

    def fresh_pairs():
        held_s = common.sampled(student, data.valid, tokenizer, cfg, seed=seed(-2))
        n_t, n_s = (torch.tensor([len(e.response) for e in part]) for part in (held_t, held_s))
        logq_t, logq_s = (logprobs(student, part, "student") for part in (held_t, held_s))
        margin = preference_loss(logq_t, held_logp_t, logq_s, logprobs(teacher, held_s, "teacher"), n_t, n_s,
                                 cfg.beta, cfg.length_norm)[1]
        return {f"fresh_{k}": x.mean().item() for k, x in dict(margin=margin, nll_t=-logq_t, nll_s=-logq_s).items()}

    # optimizer
    optimizer = torch.optim.AdamW(student.parameters(), lr=cfg.lr, betas=(0.9, 0.98), weight_decay=cfg.weight_decay,
                                  fused=True)
    start = run.start(student=student, optimizer=optimizer, negatives=negatives)
    student.eval()  # no dropout while training either, see 5 above

    for step in range(start, cfg.steps + 1):
        if step % cfg.eval_every == 0 or step == cfg.steps:
            fresh = fresh_pairs()
            run.evaluated(step, {**ruler(student), **fresh})
            run.print("      fresh pairs: " + "  ".join(f"{k} {v:.3f}" for k, v in fresh.items()))
            common.show_samples(run, student, data.valid, tokenizer, cfg)
        if step == cfg.steps:
            break

        # learning rate: linear warm-up, then a cosine down to a tenth
        progress = max(0.0, (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup))
        lr = cfg.lr * min(1.0, (step + 1) / max(1, cfg.warmup)) * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = lr

        # y_s: those that are due, in one sampler call, from the student as it is now; the teacher scores each once
        micro, N = batches.at(step), len(batches.examples)
        ids, rejected = [i for b in micro for i in b.ids], [None] * cfg.accum
        if cfg.level != "token":
            new_epoch = step * cfg.batch_size // N != (step - 1) * cfg.batch_size // N
            due = ids if cfg.negatives == "online" else range(N)
            if step == 0 or cfg.negatives == "online" or cfg.negatives == "epoch" and new_epoch:
                drawn = common.sampled(student, [batches.examples[i] for i in due], tokenizer, cfg, seed=seed(step))
                logp_s = logprobs(teacher, drawn, "teacher").tolist()
                negatives.update({i: (e.response, value) for i, e, value in zip(due, drawn, logp_s)})
            rejected = [batches.collate([replace(batches.examples[i], response=negatives[i][0]) for i in b.ids])
                        for b in micro]
        if cfg.level == "reverse_kl":  # learns on y_s, token by token
            micro = rejected

        # one optimizer step over accum micro-batches: sums are divided once, by the tokens or pairs of the whole step
        logged = step % cfg.log_every == 0 or step + 1 == cfg.steps
        fwd = raw_fwd if logged else student_fwd  # gradient norms need a graph that can be walked twice
        n_tokens, n_pairs = common.total(sum(len(b.targets) for b in micro)), cfg.batch_size
        texts, totals, norms = corpus.at(step) if corpus else [], 0.0, {}
        n_text = common.total(sum(len(b.targets) for b in texts))
        for k, (batch, batch_s) in enumerate(zip(micro, rejected)):
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                student_hidden = fwd(batch)  # (R,H) on y_t
                if cfg.level == "sequence":
                    student_hidden_s = fwd(batch_s)  # (R_s,H) on y_s
                else:
                    teacher_hidden = teacher_fwd(batch.teacher)  # (R,H)
                text_hidden = fwd(texts[k]) if corpus else None  # (R_c,H)
            if cfg.level == "sequence":
                logq_t, logq_s = (response_logprobs(common.token_logprobs(student, hidden, b.targets), b)
                                  for b, hidden in ((batch, student_hidden), (batch_s, student_hidden_s)))  # (B,)
                same = torch.tensor([negatives[i][0] == batches.examples[i].response for i in batch.ids], device=device)
                logp_s = torch.tensor([negatives[i][1] for i in batch.ids], device=device)  # (B,)
                # where y_s = y_t, the same numbers twice: the gradient is then exactly 0, however rounding falls
                logp_s, logq_s = torch.where(same, logp_t[batch.ids], logp_s), torch.where(same, logq_t, logq_s)
                losses, margin = preference_loss(logq_t, logp_t[batch.ids], logq_s, logp_s, batch.lengths,
                                                 batch_s.lengths, cfg.beta, cfg.length_norm)
                values = [losses.sum() / n_pairs, -logq_t.sum() / n_tokens,
                          *(x.sum() / n_pairs for x in (margin, -logq_t, -logq_s))]
                terms = {"preference": cfg.preference * values[0], "anchor": cfg.anchor * values[1]}
            else:
                loss, *values = common.rowwise_loss(row_loss, student, student_hidden, batch.targets, teacher,
                                                    teacher_hidden) / n_tokens
                terms = {cfg.level: loss}
            if corpus:
                lm = common.rowwise_loss(lambda q, _, y: (F.cross_entropy(q, y, reduction="none"),), student,
                                         text_hidden, texts[k].targets)[0] / n_text
                terms["lm"] = cfg.lm_coef * lm
            if logged and len(terms) > 1:  # which term steers? (of the last micro-batch)
                norms = {"norm_" + name: gradient_norm(term, student) for name, term in terms.items()}
            loss = sum(terms.values())
            loss.backward()
            totals = totals + torch.stack([loss, *values]).detach()
        common.reduce_gradients(student, totals)
        grad_norm = torch.nn.utils.clip_grad_norm_(student.parameters(), cfg.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        if logged:
            names = {"sequence": ("preference", "ce", "margin", "nll_t", "nll_s"), "reverse_kl": ("kl_pq",),
                     "token": ("preference", "ce", "margin", "agree")}[cfg.level]
            pairs = [(negatives[i][0], batches.examples[i].response) for i in ids if cfg.level != "token"]
            rates = dict(same=sum(y_s == y_t for y_s, y_t in pairs) / len(pairs),
                         no_end=sum(y_s[-1] != eos for y_s, _ in pairs) / len(pairs)) if pairs else {}
            run.log(step, **dict(zip(("loss", *names), totals.tolist())), **rates, **norms,
                    grad_norm=grad_norm.item(), lr=lr, tokens=n_tokens)
        run.end_step(step + 1, student=student, optimizer=optimizer, negatives=negatives)

    report = {"teacher": test_ruler(teacher)}
    return run.finish(student, tokenizer, {**report, "before": before, "after": test_ruler(student)})


if __name__ == "__main__":
    sys.exit(common.main(train, Config))
