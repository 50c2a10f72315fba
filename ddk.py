"""The data mixture follows the gap: domains in which the student lags furthest behind the teacher are drawn more often.

Liu et al., "DDK: Distilling Domain Knowledge for Efficient Large Language Models", NeurIPS 2024,
https://arxiv.org/abs/2407.16154; implemented from the paper's text: official code was not found.

The corpus is split into N domains. With l_q[i] and l_p[i] the perplexities of student q and frozen teacher p on a
fixed validation set of domain i, t counting intervals of K optimizer steps, N-vectors without their index:

    rho    = l_q / l_p  = exp(CE_q - CE_p)                          the gap: domain discrepancy factor
    r_0    = softmax(rho)                                           prior shares, from the student as given      (1)
    psi    = r_t exp(rho_t+1)                                       gaps at the start of interval t+1
    r_t+1  = alpha psi / sum(psi) + (1 - alpha) / N                 factor smooth updating                       (2)
    L      = CE + gamma KL(p_tau||q_tau)                            mean over the tokens of the step             (3)

    p_tau = softmax(teacher_logits / tau). In interval 0 sequences are drawn in natural proportion, by r_1, r_2, ..
    after it. r = shares (kept as log_shares), K = cfg.interval, alpha, gamma, tau = cfg.alpha, cfg.gamma, cfg.tau.

(2) is no moving average: the old shares are multiplied by exp(rho), and (1 - alpha) goes to the uniform mixture. So
(1-alpha)/N <= r <= alpha + (1-alpha)/N: at alpha = .5 half of all data is always uniform. Only differences of rho
count. The irreducible entropy of a domain cancels in rho, so noise gets no more than its floor.

What differs from the paper, and what it leaves open:
 1. KL(p||q), the "forward" one. The paper prints (student, teacher), in which order F.kl_div computes just that.
 2. (3) is printed over validation data; here over the batches that r drew, as in its Algorithm 1. No tau^2.
 3. r_0 draws nothing, and D_0 is a "random sample" there: here in proportion to the sequences of each domain.
 4. Every sequence of a step draws its domain by r; a domain goes through all of its sequences, reshuffled, before one
    repeats, across intervals. Documents are parted by EOS and packed; a sequence may look back over an EOS.
 5. The teacher is measured once, for it does not change. Reported gaps are from a test split that steered nothing.
 6. AdamW, batch, clipping and decay are ours (the paper is silent), and the cosine starts after `warmup` steps.

What to watch: `gap_<domain>` on the validation split falls towards 1 (below 1 the student is the better one there),
`share_<domain>` follows it. `worst_gap` is what the method works on; read `mean_ce` beside it, since a mixture only
moves effort around. The training loss does not tell: it changes with the mixture.

    python ddk.py                                       DDK on six small domains
    python ddk.py --mix uniform                         the same steps, every domain equally often
    python ddk.py --mix natural                         in proportion to the corpus: plain KD
    python ddk.py --mix no-smoothing                    r = softmax(rho): what (2) is for
    python ddk.py --mix static --shares out/ddk/result.json    fixed at the average shares of another run
    python ddk.py --gamma 0                             the mixture without distillation
    python ddk.py --domains notes=notes.txt,code=src    your own files and folders, with the tiny models
    python ddk.py --teacher Qwen/Qwen1.5-14B --student Qwen/Qwen1.5-1.8B --data corpus --max-tokens 2048 --lr 3e-5 \
        --steps 30000 --batch-size 256 --accum 64 --interval 1000 --warmup 1000 --gap-rows 500
"""
import json
import math
import random
import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import common


@dataclass
class Config:
    # models and data
    teacher: str = "tiny"            # model directory or hub name; none: no teacher (--gamma 0, fixed mixture)
    student: str = "tiny"            # the same; a directory with config.json but no weights starts from random ones
    data: str = "tiny"               # directory with a file or folder for each domain; tiny, tiny:N: the tiny world N
    domains: str = ""                # or one by one: name=source,name=source; file, folder, pattern, saved or hub data
    domain_tokens: int = 0           # most training tokens of a domain, e.g. of a large hub data set; 0: all
    max_tokens: int = 64             # tokens of a packed sequence; 2048 or more for pretrained models
    holdout: float = 0.05            # share of documents held out for valid, which steers, and again for test
    teacher_device_map: str = ""     # e.g. auto: spread a large teacher over devices (needs accelerate)
    # method
    mix: str = "ddk"                 # ddk, no-smoothing (Eq. 1 alone), uniform, natural, static (see shares)
    shares: str = ""                 # static: name=share,name=share, or the result.json of a run for its average
    interval: int = 30               # K: steps between looks at the gaps; 1000 in the paper, of 30,000
    alpha: float = 0.5               # share of data that follows the gaps; 1: all of it, and a domain may starve
    gamma: float = 0.2               # weight of the KL beside CE; 0: no distillation
    tau: float = 1.0                 # temperature of both KL softmaxes
    gap_rows: int = 64               # validation sequences a domain behind each gap; 500 in the paper
    # optimization
    steps: int = 600                 # optimizer steps; 0 only evaluates
    batch_size: int = 24             # sequences of one optimizer step
    accum: int = 1                   # micro-batches they are split into: raise it when memory runs out
    lr: float = 3e-3                 # peak; right for the tiny world, 1e-5 to 5e-5 for pretrained models
    warmup: int = 20                 # steps of linear warm-up; after it a cosine down to a tenth of lr
    weight_decay: float = 0.01       # AdamW's
    clip: float = 1.0                # largest gradient norm
    # system
    eval_every: int = 30             # steps between lines on the validation gaps; dynamic mixtures look every interval
    eval_rows: int = 200             # most test sequences a domain
    log_every: int = 20              # steps between lines of the log
    save_every: int = 500            # steps between checkpoints
    seed: int = 0                    # of data order, domain draws and random weights
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
def domain_gap(student_ce, teacher_ce):
    """rho: the ratio of the perplexities, from cross entropies in nats a token. (N,), (N,) -> (N,)."""
    return (student_ce - teacher_ce).exp()


def prior(rho):
    """Eq. 1, as logarithms. (N,) -> (N,)."""
    return rho.log_softmax(-1)


def mixture(log_shares, rho, alpha):
    """Eq. 2 on logarithms: exp(rho) itself would overflow from rho = 710 on. (N,), (N,) -> (N,)."""
    log_psi = (log_shares + rho).log_softmax(-1)  # old shares are multiplied, not averaged
    part = lambda x: math.log(x) if x > 0 else -math.inf
    return torch.logaddexp(log_psi + part(alpha), torch.full_like(rho, part((1 - alpha) / len(rho))))


def distill_loss(student_logits, teacher_logits, targets, gamma, tau):
    """Eq. 3 of each row, with its two terms. (R,V), (R,V) or None, (R,) -> three (R,)."""
    logq = F.log_softmax(student_logits, -1)       # (R,V)
    ce = -logq.gather(-1, targets[:, None])[:, 0]  # (R,)
    if teacher_logits is None:  # gamma = 0 needs no teacher
        return ce, ce, torch.zeros_like(ce)
    if tau != 1:  # every line about (R,V) is a walk through memory, so none for nothing
        logq, teacher_logits = F.log_softmax(student_logits / tau, -1), teacher_logits / tau
    # KL(p||q) written out: F.kl_div takes its arguments the other way round, and sums over what you do not expect
    logp = F.log_softmax(teacher_logits, -1)       # (R,V)
    kl = (logp.exp() * (logp - logq)).sum(-1)      # (R,)
    return ce + gamma * kl, ce, kl


class Mixture:
    """The shares and what they drew: all that a resumed run needs to know about the data."""

    def __init__(self, sizes, fixed, seed):
        self.sizes, self.fixed, self.seed = sizes, fixed, seed  # sequences of each domain; shares of interval 0
        self.log_shares = None                                  # (N,) r, once the gaps have been seen
        self.drawn = torch.zeros(len(sizes), dtype=torch.long)  # the cursors: sequences drawn of each domain so far
        self.total = torch.zeros(len(sizes), dtype=torch.float64)  # sum of the shares over steps
        self.order, self.seconds = {}, 0.0  # domain: (epoch, its order); time spent on gaps

    def generator(self, *what):
        return torch.Generator().manual_seed(random.Random(repr((self.seed, *what))).getrandbits(62))

    def draw(self, step, size, shares):
        """(domain, sequence) of each of `size` draws: the domain by chance, then that domain's next sequence."""
        self.total += shares
        out = []
        for i in torch.multinomial(shares, size, replacement=True, generator=self.generator("step", step)).tolist():
            epoch, at = divmod(int(self.drawn[i]), self.sizes[i])
            if self.order.get(i, (None,))[0] != epoch:  # a new order for every pass, the same after a resumption
                self.order[i] = epoch, torch.randperm(self.sizes[i], generator=self.generator("epoch", i, epoch))
            out.append((i, int(self.order[i][1][at])))
            self.drawn[i] += 1
        return out

    def state_dict(self):
        return {k: getattr(self, k) for k in ("sizes", "log_shares", "drawn", "total", "seconds")}

    def load_state_dict(self, state):
        if state["sizes"] != self.sizes:
            raise common.BadInput("--resume: the corpus has changed since this run began: choose a new --out")
        vars(self).update(state)


def fixed_shares(text, names):
    """--shares -> (N,): name=share,name=share, or a result.json, of which the average shares are taken."""
    try:
        if text.endswith(".json"):
            with open(text) as f:
                found = json.load(f).items()
            found = {k.removeprefix("after.share_"): float(v) for k, v in found if "after.share_" in k}
        else:
            found = {k: float(v) for k, v in common.domains.parse(text, "--shares").items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as e:
        raise common.BadInput(f"--shares {text}: name=share,name=share or a result.json is wanted ({e})") from None
    if sorted(found) != sorted(names) or min(found.values()) < 0 or not 0.99 <= sum(found.values()) <= 1.01:
        raise common.BadInput(f"--shares {text}: shares of 0 or more, together 1, are wanted for {', '.join(names)}")
    shares = torch.tensor([found[n] for n in names], dtype=torch.float64)
    return shares / shares.sum()


def domain_ce(model, examples, cfg):
    """Mean cross entropy in nats a token on each domain's fixed sequences: {name: Examples} -> (N,) float64."""
    nll = lambda q, p, y: (-common.log_softmax_at(q, y),)
    of = lambda part: common.per_response(nll, model, None, part, cfg, batch_size=cfg.batch_size // cfg.accum).sum()
    return common.from_zero(torch.stack([of(x) / sum(len(e.response) for e in x) for x in examples.values()]))


def metrics(names, student_ce, teacher_ce, shares=None):
    """What is reported of a model: gaps to the teacher, where there is one, perplexities and shares by domain."""
    m = {}
    if teacher_ce is not None:
        rho = domain_gap(student_ce, teacher_ce)
        m = {"worst_gap": rho.max().item(), "mean_gap": rho.mean().item()}
        m |= {f"gap_{n}": x for n, x in zip(names, rho.tolist())}
    m |= {"mean_ce": student_ce.mean().item(), **{f"ppl_{n}": x for n, x in zip(names, student_ce.exp().tolist())}}
    return m if shares is None else m | {f"share_{n}": x for n, x in zip(names, shares.tolist())}


# ---------------------------------------------------------------------------------------------------------------
# The loop
# ---------------------------------------------------------------------------------------------------------------
def train(cfg):
    common.check_settings(cfg, mix=["ddk", "no-smoothing", "uniform", "natural", "static"], interval=(1, 10**9),
                          alpha=(0, 1), gamma=(0, 1e9), tau=(1e-3, 1e3), max_tokens=(2, 10**9), gap_rows=(1, 10**9),
                          domain_tokens=(0, 10**15))
    if (cfg.mix == "static") != bool(cfg.shares):
        raise common.BadInput(f"--mix {cfg.mix}, --shares {cfg.shares!r}: --mix static, and it alone, wants --shares")
    run = common.Run(cfg, __file__)
    if run.finished:
        return run.finished
    device, dtype = run.device, common.compute_dtype(cfg, run.device)

    # models: the teacher is frozen and in the compute dtype, the student keeps fp32 weights and is cast on the fly
    student, teacher, tokenizer = common.load_pair(cfg, device, world="world3")
    steered = cfg.mix in ("ddk", "no-smoothing")
    if teacher is None and (cfg.gamma > 0 or steered):
        raise common.BadInput(f"--teacher none: --gamma {cfg.gamma} with --mix {cfg.mix} needs a teacher")

    # data
    data = common.load_domains(cfg, student, teacher, tokenizer, world="world3")
    sizes = [len(data.train[n]) for n in data.names]
    natural, uniform = torch.tensor(sizes, dtype=torch.float64), torch.ones(len(sizes), dtype=torch.float64)
    fixed = fixed_shares(cfg.shares, data.names) if cfg.shares else uniform if cfg.mix == "uniform" else natural
    mix = Mixture(sizes, fixed / fixed.sum(), cfg.seed)

    # what is called in the loop
    student_fwd = common.response_states(student, cfg.compile)
    teacher_fwd = common.response_states(teacher, cfg.compile) if cfg.gamma > 0 else None
    row_loss = common.try_compile(distill_loss, dynamic=True) if cfg.compile else distill_loss
    teacher_ce, teacher_test = (domain_ce(teacher, part, cfg) if teacher else None for part in (data.valid, data.test))
    before = metrics(data.names, domain_ce(student, data.test, cfg), teacher_test)

    # optimizer
    optimizer = torch.optim.AdamW(student.parameters(), lr=cfg.lr, betas=(0.9, 0.98), weight_decay=cfg.weight_decay,
                                  fused=True)
    start = run.start(student=student, optimizer=optimizer, mix=mix)
    student.train()

    for step in range(start, cfg.steps + 1):
        due = steered and step % cfg.interval == 0
        if due or step % cfg.eval_every == 0 or step == cfg.steps:
            before_gaps = run.elapsed()
            student_ce = domain_ce(student, data.valid, cfg)
            if due:
                rho = domain_gap(student_ce, teacher_ce)
                first = step == 0 or cfg.mix == "no-smoothing"
                mix.log_shares = prior(rho) if first else mixture(mix.log_shares, rho, cfg.alpha)
            mix.seconds += run.elapsed() - before_gaps
        # r_0 is a prior only: interval 0 is drawn in natural proportion
        shares = mix.log_shares.exp() if steered and step >= cfg.interval else mix.fixed
        if due or step % cfg.eval_every == 0 or step == cfg.steps:
            run.evaluated(step, metrics(data.names, student_ce, teacher_ce, shares))
        if step == cfg.steps:
            break

        # learning rate: linear warm-up, then a cosine down to a tenth
        progress = max(0.0, (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup))
        lr = cfg.lr * min(1.0, (step + 1) / max(1, cfg.warmup)) * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = lr

        # one optimizer step over accum micro-batches: sums are divided once, by the tokens of the whole step
        rank, n = common.processes()  # under torchrun each takes every n-th sequence
        drawn = mix.draw(step, cfg.batch_size, shares)[rank::n]
        drawn = [common.sequence(data.train[data.names[i]][j]) for i, j in drawn]
        n_tokens, size = common.total(sum(len(e.response) for e in drawn)), len(drawn) // cfg.accum
        totals = 0.0
        for i in range(0, len(drawn), size):
            batch = common.collate(drawn[i:i + size], student).to(device)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                student_hidden = student_fwd(batch)  # (R,H)
                with torch.no_grad():
                    teacher_hidden = teacher_fwd(batch) if teacher_fwd else None  # (R,H)
            sums = common.rowwise_loss(lambda q, p, y: row_loss(q, p, y, cfg.gamma, cfg.tau), student, student_hidden,
                                       batch.targets, teacher if teacher_fwd else None, teacher_hidden)  # loss, CE, KL
            (sums[0] / n_tokens).backward()
            totals = totals + sums.detach() / n_tokens
        common.reduce_gradients(student, totals)
        grad_norm = torch.nn.utils.clip_grad_norm_(student.parameters(), cfg.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        if step % cfg.log_every == 0 or step + 1 == cfg.steps:
            loss, ce, kl = totals.tolist()
            run.log(step, loss=loss, ce=ce, kl=kl, grad_norm=grad_norm.item(), lr=lr, tokens=n_tokens)
        run.end_step(step + 1, student=student, optimizer=optimizer, mix=mix)

    if steered and domain_gap(student_ce, teacher_ce).min() < 1:  # legal; Eq. 2 looks at differences only
        run.print("a gap below 1: the student is ahead of the teacher in that domain")
    report = {"teacher": metrics(data.names, teacher_test, teacher_test)} if teacher else {}
    after = metrics(data.names, domain_ce(student, data.test, cfg), teacher_test, mix.total / max(1, cfg.steps))
    return run.finish(student, tokenizer, {**report, "before": before, "after": after}, corpus=data.sha1,
                      gap_seconds=round(mix.seconds, 2))


if __name__ == "__main__":
    sys.exit(common.main(train, Config))
