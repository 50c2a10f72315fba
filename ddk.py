"""DDK: distil more on the domains in which the student lags behind the teacher.

Liu et al., "DDK: Distilling Domain Knowledge for Efficient Large Language Models", NeurIPS 2024,
https://arxiv.org/abs/2407.16154; implemented from the paper's text: official code was not found.

The corpus is split into N domains. Let l_q[i] and l_p[i] be the perplexities of student q and frozen
teacher p on fixed validation sequences of domain i, and t the number of an interval of K optimizer steps.
For all i at once:

    rho     = l_q / l_p = exp(CE_q - CE_p)                    the gap: domain discrepancy factor
    r_0     = softmax(rho_0)                                  prior, from the student as given          (1)
    psi     = r_t exp(rho_{t+1})                              rho_{t+1}: at the start of interval t+1
    r_{t+1} = alpha psi / sum(psi) + (1 - alpha) / N          factor smooth updating                    (2)
    L       = CE + gamma KL(p_tau||q_tau)                     mean over the tokens of the step          (3)

    p_tau = softmax(teacher_logits / tau). Interval 0 is drawn in natural proportion, the others by r_1,
    r_2, ... In the code log l_q is `student_ce`, log l_p `teacher_ce`, r `shares`, kept as `log_shares`; K
    = cfg.interval; alpha, gamma and tau are cfg's. CE is a mean over tokens, in nats.

(2) is no moving average: the old shares are multiplied by exp(rho), and a part 1 - alpha is always the
uniform mixture. So (1-alpha)/N <= r <= alpha + (1-alpha)/N: at alpha = .5 half of all data is uniform. Only
differences of rho count. The irreducible entropy of a domain cancels in rho, so a domain of noise gets
little more than the floor.

What differs from the paper, and what it leaves open:
 1. KL(p||q), the "forward" one. The paper prints KL(student, teacher); we read it as the arguments of
    F.kl_div, which takes the student first and computes KL(teacher||student).
 2. (3) is printed over validation data. Here it is over the batches that r drew, as in its Algorithm 1. No
    tau^2.
 3. The paper draws interval 0 as a "random sample": here domains in proportion to their sequences.
 4. Each sequence of a step draws its domain by r. A domain goes through all its sequences, reshuffled,
    before one repeats, across intervals. Documents are separated by EOS and packed; a sequence may look
    back over an EOS.
 5. The teacher is measured once, for it does not change. The gaps of the final table are of a test split,
    which steered nothing; those during the run are of the validation split, which did.
 6. AdamW, batch size, clipping and weight decay are ours: the paper is silent.

What to watch: `gap_<domain>` on the validation split falls towards 1 (below 1 the student is the better one
there) and `share_<domain>` follows it. `worst_gap` is what the method works on; read `mean_ce` beside it,
since a mixture only moves effort around. The training loss says little: it changes with the mixture.

    python ddk.py                                       DDK on six small domains
    python ddk.py --mix uniform                         the same steps, every domain equally often
    python ddk.py --mix natural                         in proportion to the corpus: plain KD
    python ddk.py --mix no-smoothing                    r = softmax(rho) from interval 1 on, without a floor
    python ddk.py --mix code=.4,prose=.3,log=.1,json=.1,csv=.05,noise=.05      any fixed mixture
    python ddk.py --gamma 0                             the mixture without distillation
    python ddk.py --domains notes=notes.txt,code=src    your own files and folders, with the tiny models
    python ddk.py --teacher Qwen/Qwen1.5-14B --student Qwen/Qwen1.5-1.8B --data corpus --max-tokens 2048 \
        --lr 3e-5 --steps 30000 --batch-size 256 --accum 64 --interval 1000 --warmup 1000 --gap-rows 500
"""
import math
import random
import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import common


@dataclass
class Config(common.Settings):
    # method
    mix: str = "ddk"                 # ddk, no-smoothing (Eq. 1 alone), uniform, natural, or name=share,...
    interval: int = 30               # K: steps between measuring gaps; 1000 in the paper, of 30,000
    alpha: float = 0.5               # share of data that follows the gaps; at 1 a domain may starve
    gamma: float = 0.2               # weight of the KL beside CE; 0: no distillation
    tau: float = 1.0                 # temperature of both KL softmaxes
    gap_rows: int = 64               # validation sequences of a domain behind each gap; 500 in the paper
    data: str = "tiny"               # folder with a file or folder for each domain; tiny, tiny:N: world N
    domains: str = ""                # or one by one: name=source,...; a file, folder, pattern, hub data
    domain_tokens: int = 0           # most training tokens of a domain, e.g. of large hub data; 0: all
    max_tokens: int = 64             # tokens of a packed sequence; 2048 or more for pretrained models
    # optimization
    steps: int = 600                 # optimizer steps; 0 only evaluates
    batch_size: int = 24             # sequences of one optimizer step
    accum: int = 1                   # micro-batches they are split into: raise it when memory runs out
    lr: float = 3e-3                 # peak; right for the tiny world, 1e-5 to 5e-5 for pretrained models
    warmup: int = 20                 # steps of linear warm-up; after it a cosine down to a tenth of lr
    weight_decay: float = 0.01       # AdamW's
    clip: float = 1.0                # largest gradient norm
    eval_every: int = 30             # steps between lines on the validation gaps; DDK adds its intervals
    eval_rows: int = 200             # most test sequences of a domain

    # shared settings without effect here: setting one is an error
    unused = ("prompt_field", "response_field", "template", "teacher_template", "max_prompt",
              "max_response", "eval_temperature", "kl_on", "cache_gib")


# ----------------------------------------------------------------------------------------------------------
# The method
# ----------------------------------------------------------------------------------------------------------
# R: the response tokens of a micro-batch, one row each, sequence after sequence; V vocabulary, H hidden
# size, N domains. No row is a prompt token or padding, so no loss needs a mask.
def domain_gap(student_ce, teacher_ce):
    """rho: the ratio of the perplexities, from cross entropies in nats a token. (N,), (N,) -> (N,)."""
    return (student_ce - teacher_ce).clamp(max=700).exp()  # exp(710) is infinite, and shares would be NaN


def prior(rho):
    """Eq. 1, as logarithms. (N,) -> (N,)."""
    return rho.log_softmax(-1)


def mixture(log_shares, rho, alpha):
    """Eq. 2 on logarithms: exp(rho) itself would overflow from rho = 710 on. (N,), (N,) -> (N,)."""
    log_psi = (log_shares + rho).log_softmax(-1)  # old shares are multiplied, not averaged
    log = lambda x: math.log(x) if x > 0 else -math.inf
    uniform = torch.full_like(rho, log((1 - alpha) / len(rho)))
    return torch.logaddexp(log_psi + log(alpha), uniform)


def distill_loss(student_logits, teacher_logits, targets, gamma, tau):
    """Eq. 3 of each row, with its two terms. (R,V), (R,V) or None, (R,) -> three (R,)."""
    logq = F.log_softmax(student_logits, -1)       # (R,V)
    ce = -logq.gather(-1, targets[:, None])[:, 0]  # (R,)
    if teacher_logits is None:  # gamma = 0 needs no teacher; KL is not measured then, and logged as 0
        return ce, ce, torch.zeros_like(ce)
    if tau != 1:  # at tau = 1 this would cost a pass over (R,V) and change nothing
        logq = F.log_softmax(student_logits / tau, -1)
        teacher_logits = teacher_logits / tau
    # KL(p||q) written out: F.kl_div takes its arguments the other way round
    logp = F.log_softmax(teacher_logits, -1)       # (R,V)
    kl = (logp.exp() * (logp - logq)).sum(-1)      # (R,)
    return ce + gamma * kl, ce, kl


class DomainSampler:
    """The shares and what they drew: all that a resumed run needs to know about the data."""

    def __init__(self, sizes, seed):
        self.sizes, self.seed = sizes, seed                        # sequences of each domain
        self.log_shares = None                                     # (N,) r, once the gaps have been seen
        self.drawn = torch.zeros(len(sizes), dtype=torch.long)     # sequences drawn of each domain so far
        self.total = torch.zeros(len(sizes), dtype=torch.float64)  # sum of the shares over steps
        self.order = {}                                            # domain: (epoch, its permutation)
        self.seconds = 0.0                                         # spent on measuring gaps that steer

    def generator(self, *what):
        """Noise of its own for each purpose, e.g. ("step", 7): the same after resuming, in every
        process."""
        return torch.Generator().manual_seed(random.Random(repr((self.seed, *what))).getrandbits(62))

    def draw(self, step, size, shares):
        """(domain, sequence) of each of `size` draws: the domain by chance, then that domain's next
        sequence."""
        self.total += shares
        out = []
        noise = self.generator("step", step)
        for i in torch.multinomial(shares, size, replacement=True, generator=noise).tolist():
            epoch, at = divmod(int(self.drawn[i]), self.sizes[i])
            if self.order.get(i, (None,))[0] != epoch:  # a new order for every pass through it
                noise = self.generator("epoch", i, epoch)
                self.order[i] = epoch, torch.randperm(self.sizes[i], generator=noise)
            out.append((i, int(self.order[i][1][at])))
            self.drawn[i] += 1
        return out

    def state_dict(self):
        return {k: getattr(self, k) for k in ("sizes", "log_shares", "drawn", "total", "seconds")}

    def load_state_dict(self, state):
        if state["sizes"] != self.sizes:
            raise common.BadInput("--resume: the corpus has changed since this run began: choose a new "
                                  "--out")
        vars(self).update(state)


def fixed_shares(mix, names, sizes):
    """The shares of a mixture that does not follow the gaps; natural ones also for interval 0. -> (N,)
    float64."""
    if "=" not in mix:
        shares = [1.0] * len(sizes) if mix == "uniform" else sizes
    else:
        found = common.parse_pairs(mix, "--mix")
        try:
            shares = [float(found.pop(name)) for name in names]
        except (KeyError, ValueError):
            shares = [-1.0]
        if found or min(shares) < 0 or not 0.99 <= sum(shares) <= 1.01:
            raise common.BadInput(f"--mix {mix}: shares of 0 or more, together 1, are wanted "
                                  f"for {', '.join(names)}")
    shares = torch.tensor(shares, dtype=torch.float64)
    return shares / shares.sum()


def domain_ce(model, examples, cfg):
    """Mean cross entropy in nats a token on each domain's fixed sequences: {name: Examples} -> (N,)
    float64."""
    nll = lambda logits, _, targets: (-common.log_softmax_at(logits, targets),)
    size = cfg.batch_size // cfg.accum  # what fits in training fits here
    total = lambda part: common.per_response(nll, model, None, part, cfg, batch_size=size).sum()
    means = [total(part) / sum(len(e.response) for e in part) for part in examples.values()]
    return common.broadcast(torch.stack(means))


def metrics(names, student_ce, teacher_ce, shares=None):
    """What is reported of a model: gaps to the teacher, where there is one, perplexities and shares by
    domain."""
    m = {}
    if teacher_ce is not None:
        rho = domain_gap(student_ce, teacher_ce)
        m = {"worst_gap": rho.max().item(), "mean_gap": rho.mean().item()}
        m |= {f"gap_{n}": x for n, x in zip(names, rho.tolist())}
    m["mean_ce"] = student_ce.mean().item()
    m |= {f"ppl_{n}": x for n, x in zip(names, student_ce.exp().tolist())}
    if shares is not None:
        m |= {f"share_{n}": x for n, x in zip(names, shares.tolist())}
    return m


# ----------------------------------------------------------------------------------------------------------
# The loop
# ----------------------------------------------------------------------------------------------------------
def train(cfg) -> dict:
    """One run: it fills out/<name>/ and returns its final metrics."""
    common.check_settings(cfg, interval=(1, 10**9), alpha=(0, 1), gamma=(0, 1e9), tau=(1e-3, 1e3),
                          max_tokens=(2, 10**9), gap_rows=(1, 10**9), domain_tokens=(0, 10**15))
    if "=" not in cfg.mix and cfg.mix not in ("ddk", "no-smoothing", "uniform", "natural"):
        raise common.BadInput(f"--mix {cfg.mix}: ddk, no-smoothing, uniform, natural, or "
                              "name=share,name=share")
    run = common.Run(cfg, __file__)
    if run.finished:
        return run.finished
    device, dtype = run.device, common.compute_dtype(cfg, run.device)

    # models: the teacher is frozen, in the compute dtype; the student keeps fp32 weights, cast on the fly
    student, teacher, tokenizer = common.load_pair(cfg, device, world="domains")
    steered = cfg.mix in ("ddk", "no-smoothing")  # else the gaps are measured for the log only
    if teacher is None and (cfg.gamma > 0 or steered):
        raise common.BadInput(f"--teacher none: --gamma {cfg.gamma} with --mix {cfg.mix} needs a teacher")

    # data
    data = common.load_domains(cfg, student, teacher, tokenizer)
    sampler = DomainSampler([len(data.train[n]) for n in data.names], cfg.seed)
    fixed = fixed_shares(cfg.mix, data.names, sampler.sizes)

    # what is called in the loop: see kd_forward.py
    student_fwd = common.response_states(student, cfg.compile)
    teacher_fwd = common.response_states(teacher, cfg.compile) if cfg.gamma > 0 else None
    compiled_loss = common.try_compile(distill_loss) if cfg.compile else distill_loss

    def row_loss(student_logits, teacher_logits, targets):
        return compiled_loss(student_logits, teacher_logits, targets, cfg.gamma, cfg.tau)

    teacher_ce = domain_ce(teacher, data.valid, cfg) if teacher else None   # (N,)
    teacher_test = domain_ce(teacher, data.test, cfg) if teacher else None  # (N,)
    # ahead of run.start, which may load a later student from a checkpoint
    before = metrics(data.names, domain_ce(student, data.test, cfg), teacher_test)

    # optimizer; beta_2 = 0.98 averages squared gradients over 50 steps, not 1000: runs have a few hundred
    optimizer = torch.optim.AdamW(student.parameters(), lr=cfg.lr, betas=(0.9, 0.98),
                                  weight_decay=cfg.weight_decay, fused=True)
    start = run.start(student=student, optimizer=optimizer, sampler=sampler)
    student.train()

    for step in range(start, cfg.steps + 1):
        new_interval = steered and step % cfg.interval == 0
        measure = new_interval or step % cfg.eval_every == 0 or step == cfg.steps
        if measure:
            began = run.elapsed()
            student_ce = domain_ce(student, data.valid, cfg)
            sampler.seconds += run.elapsed() - began if new_interval else 0.0
            if not student_ce.isfinite().all():
                run.fail(step, "the cross entropy of a domain is no longer a finite number")
        if new_interval:
            rho = domain_gap(student_ce, teacher_ce)
            first = step == 0 or cfg.mix == "no-smoothing"
            sampler.log_shares = prior(rho) if first else mixture(sampler.log_shares, rho, cfg.alpha)
        # r_0 is a prior only: interval 0 is drawn in natural proportion
        shares = sampler.log_shares.exp() if steered and step >= cfg.interval else fixed
        if measure:
            run.evaluated(step, metrics(data.names, student_ce, teacher_ce, shares))
        if step == cfg.steps:
            break

        lr = common.lr_at(step, cfg)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # one step over accum micro-batches: sums are divided once, by the tokens of the whole step
        rank, n = common.processes()  # under torchrun each takes every n-th sequence
        drawn = sampler.draw(step, cfg.batch_size, shares)[rank::n]
        drawn = [common.sequence(data.train[data.names[i]][j], data.bos) for i, j in drawn]
        n_tokens = common.all_reduce_sum(sum(len(e.response) for e in drawn))
        size, totals = len(drawn) // cfg.accum, 0.0
        for i in range(0, len(drawn), size):
            batch = common.collate(drawn[i:i + size], student).to(device)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                student_hidden = student_fwd(batch)                           # (R,H)
                teacher_hidden = teacher_fwd(batch) if teacher_fwd else None  # (R,H)
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
        run.end_step(step + 1, student=student, optimizer=optimizer, sampler=sampler)

    if steered and domain_gap(student_ce, teacher_ce).min() < 1:  # legal; Eq. 2 looks at differences only
        run.print("a gap below 1: the student is ahead of the teacher in that domain")
    report = {"teacher": metrics(data.names, teacher_test, teacher_test)} if teacher else {}
    mean_shares = sampler.total / max(1, cfg.steps)
    after = metrics(data.names, domain_ce(student, data.test, cfg), teacher_test, mean_shares)
    return run.finish(student, tokenizer, {**report, "before": before, "after": after}, corpus=data.sha1,
                      gap_seconds=round(sampler.seconds, 2))


if __name__ == "__main__":
    sys.exit(common.main(train, Config))
