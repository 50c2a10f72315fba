"""DDK: distil more on the domains in which the student lags behind the teacher.

Liu et al., "DDK: Distilling Domain Knowledge for Efficient Large Language Models", NeurIPS 2024,
arxiv.org/abs/2407.16154; implemented from the paper's text, since no official code was found.

The corpus has D domains. CE_q[i], CE_p[i] are cross entropies of student q and frozen teacher p on
fixed validation text of domain i. Interval t has K steps; r_t[i] is domain i's share of its data:

    gap     = ppl_q / ppl_p = exp(CE_q - CE_p)                a ratio of perplexities (paper: rho)
    r_0     = softmax(gap_0)                                  from the initial student         (1)
    psi     = r_t exp(gap_{t+1})                              gaps at the start of interval t + 1
    r_{t+1} = smoothing psi / sum(psi) + (1 - smoothing) / D  smoothing = 1: psi / sum(psi)    (2)
    L       = CE + gamma KL(p_tau||q_tau)                     mean over the tokens of a step   (3)

    p_tau = softmax(teacher_logits / tau), q_tau likewise. In the code r = shares, K = cfg.interval,
    log_shares is log r; smoothing (the paper's alpha), gamma and tau are in cfg.

The part (1 - smoothing) of the data is spread evenly, so every domain gets some. On random text
p and q have about the same CE, so the gap is near 1 and the share is small.

What differs from the paper, and what it leaves open:
 1. KL(p||q), the "forward" KL. The paper prints KL(student, teacher); we read that as the arguments
    of F.kl_div, which takes the student first and computes KL(teacher||student).
 2. Batches are drawn by r, as in Algorithm 1: (3) is not weighted by r again. (3) has no tau^2.
 3. Interval 0, the paper's "random sample", draws by domain size. r_0 is used only to compute r_1.
 4. No sequence repeats before its domain is used up. Documents, each with EOS, are joined and cut.

What to watch: `gap_<domain>` falls towards 1, and `share_<domain>` follows it. DDK should lower
`worst_gap`; read `mean_ce` too: more data for one domain is less data for the others.

    python ddk.py                            DDK on six small domains
    python ddk.py --mix uniform              every domain equally often; natural: by size, plain KD
    python ddk.py --mix no-smoothing         r = softmax(gap); --smoothing 1 multiplies by the old r
    python ddk.py --mix code=.4,prose=.3,log=.1,json=.1,csv=.05,noise=.05      a fixed mixture
    python ddk.py --teacher Qwen/Qwen1.5-14B --student Qwen/Qwen1.5-1.8B --data corpus \
        --max-tokens 2048 --lr 3e-5 --steps 30000 --batch-size 256 --accum 64 --interval 1000
"""
import math
import random
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import common

PREPARE = common.HERE / "data/domains/prepare.py"


@dataclass
class Config(common.Settings):
    mix: str = "ddk"                 # ddk, no-smoothing (Eq. 1), uniform, natural, name=share,...
    interval: int = 30               # K: steps between measuring gaps; 1000 in the paper
    smoothing: float = 0.5           # share of data that follows the gaps; 1: all of it
    gamma: float = 0.2               # weight of the KL beside CE; 0: no distillation
    tau: float = 1.0                 # temperature of both softmaxes in the KL
    gap_rows: int = 64               # validation sequences that measure a gap; 500 in the paper
    data: str = str(PREPARE.parent)  # folder with a file or folder of text for each domain
    domains: str = ""                # name=source,...; source: file, folder, pattern, hub
    max_tokens: int = 64             # tokens of a packed sequence; for pretrained models 2048
    steps: int = 480                 # optimizer steps; 0 only evaluates
    batch_size: int = 24             # sequences of one optimizer step
    eval_every: int = 30             # steps between log lines with gaps; DDK: also each interval
    eval_rows: int = 200             # test sequences of a domain, at most

    unused = ("response", "template", "teacher_template", "max_prompt", "max_response",
              "eval_temperature", "kl_on")


# --- The method -----------------------------------------------------------------------------------
# Sizes: D domains, R predicted tokens in a batch, r of them in a chunk, V vocabulary, H hidden.
def domain_gap(student_ce, teacher_ce):
    """The ratio of the perplexities, from cross entropies in nats per token. (D,), (D,) -> (D,)."""
    return (student_ce - teacher_ce).clamp(max=700).exp()  # exp(710) is infinite


def mixture(log_shares, gap, smoothing):
    """Eq. 2 on logarithms, because exp(gap) itself would overflow. (D,), (D,) -> (D,)."""
    log_psi = (log_shares + gap).log_softmax(-1)  # old shares times exp(gap), then normalised
    log = lambda x: math.log(x) if x > 0 else -math.inf
    uniform = torch.full_like(gap, log((1 - smoothing) / len(gap)))
    return torch.logaddexp(log_psi + log(smoothing), uniform)


def distill_loss(student_logits, teacher_logits, targets, gamma, tau):
    """Eq. 3 of each row, and its two terms. (r,V), (r,V) or None, (r,) -> three (r,)."""
    logq = F.log_softmax(student_logits, -1)       # (r,V)
    ce = -logq.gather(-1, targets[:, None])[:, 0]  # (r,)
    if teacher_logits is None:  # gamma = 0 needs no teacher; the KL is then logged as 0
        return ce, ce, torch.zeros_like(ce)
    if tau != 1:  # at tau = 1 these passes over (r,V) would change nothing
        logq = F.log_softmax(student_logits / tau, -1)
        teacher_logits = teacher_logits / tau
    # KL(p||q) written out, because F.kl_div takes its arguments the other way round
    logp = F.log_softmax(teacher_logits, -1)       # (r,V)
    kl = (logp.exp() * (logp - logq)).sum(-1)      # (r,)
    return ce + gamma * kl, ce, kl


class DomainSampler:
    """The shares and what was drawn: all that a resumed run must know about the mixture."""

    def __init__(self, sizes, seed):
        self.sizes, self.seed = sizes, seed                        # sequences of each domain
        self.log_shares = None                                     # (D,) once gaps were measured
        self.drawn = torch.zeros(len(sizes), dtype=torch.long)     # sequences drawn so far
        self.total = torch.zeros(len(sizes), dtype=torch.float64)  # sum of the shares over steps
        self.order = {}                                            # domain: (epoch, permutation)

    def generator(self, *what):
        """Random numbers for a purpose such as ("step", 7), the same in every process."""
        seed = random.Random(repr((self.seed, *what))).getrandbits(62)
        return torch.Generator().manual_seed(seed)

    def draw(self, step, size, shares):
        """(domain, sequence) of each of `size` draws: a random domain, then its next sequence."""
        self.total += shares
        drawn, generator = [], self.generator("step", step)
        for i in torch.multinomial(shares, size, replacement=True, generator=generator).tolist():
            epoch, at = divmod(int(self.drawn[i]), self.sizes[i])
            if self.order.get(i, (None,))[0] != epoch:  # a new order for every pass
                generator = self.generator("epoch", i, epoch)
                self.order[i] = epoch, torch.randperm(self.sizes[i], generator=generator)
            drawn.append((i, int(self.order[i][1][at])))
            self.drawn[i] += 1
        return drawn

    def state_dict(self):
        return {k: getattr(self, k) for k in ("log_shares", "drawn", "total")}

    def load_state_dict(self, state):
        vars(self).update(state)


# --- Domains --------------------------------------------------------------------------------------
def parse_pairs(text, flag):
    """"code=src,prose=notes.txt" -> {"code": "src", "prose": "notes.txt"}."""
    pairs = [[x.strip() for x in part.partition("=")[::2]] for part in text.split(",")]
    wrong = [p for p in pairs if not re.fullmatch(r"[\w.-]+", p[0]) or not p[1]]
    if wrong or len(dict(pairs)) < len(pairs):
        raise common.BadInput(f"{flag} {text}: name=value,name=value is wanted, each name once")
    return dict(pairs)


def find_domains(cfg):
    """{name: source} of --domains, or of the folder --data, in the order of the names."""
    if cfg.domains:
        return parse_pairs(cfg.domains, "--domains")
    folder = Path(cfg.data).expanduser()
    if cfg.data == Config.data and not (folder / "text").is_dir():
        command = [sys.executable, str(PREPARE), str(folder), "--text"]
        if common.from_process_0(lambda: subprocess.run(command).returncode):
            raise common.BadInput(f"{' '.join(command)} failed: see above")
    folder = folder / "text" if (folder / "text").is_dir() else folder
    if not folder.is_dir():
        raise common.BadInput(f"--data {cfg.data}: a folder with the text of each domain is wanted")
    files = [p for p in sorted(folder.iterdir()) if not p.name.startswith(".")]
    names = [p.name.split(".")[0] for p in files]
    if len(set(names)) < max(2, len(names)):
        raise common.BadInput(f"--data {cfg.data}: two or more domains with different names are "
                              f"wanted, and it has {', '.join(p.name for p in files) or 'none'}")
    return dict(zip(names, map(str, files)))


def load_domains(cfg, sources, student, teacher):
    """SimpleNamespace(names, train, valid, test, before, hash). train: {name: token sequences, on
    disk}; valid, test: {name: Examples}, at most --gap-rows, --eval-rows; before: [BOS] or []."""
    before = common.around(student.tokenizer)[0]  # [BOS], for a tokenizer that has one
    for model in filter(None, (student, teacher)):
        role, context = model.role, common.context_of(model)
        if common.is_encdec(model):
            raise common.BadInput(f"--{role}: DDK trains on plain text: name a decoder-only model")
        if len(model.tokenizer) > len(model.get_input_embeddings().weight):
            raise common.BadInput(f"--{role}: its tokenizer has more tokens than its embedding: "
                                  "call resize_token_embeddings on that model")
        if context and len(before) + cfg.max_tokens > context:
            raise common.BadInput(f"--max-tokens {cfg.max_tokens} does not fit the {role}'s "
                                  f"context of {context} tokens")
    data = SimpleNamespace(names=list(sources), train={}, valid={}, test={}, before=before)
    for name, source in sources.items():
        with common.blaming(f"domain {name}"):
            texts = common.documents(source)
            packed = {s: common.pack(texts, student.tokenizer, cfg.max_tokens, s, cfg.holdout)
                      for s in ("train", "valid", "test")}
        if not len(packed["valid"]) or not len(packed["test"]):  # one long text: hold out its end
            whole = common.pack(texts, student.tokenizer, cfg.max_tokens)
            held = int(cfg.holdout * len(whole))
            cuts = [0, len(whole) - 2 * held, len(whole) - held, len(whole)]
            packed = {s: whole[a:b] for s, a, b in zip(("train", "valid", "test"), cuts, cuts[1:])}
        for split, rows in packed.items():
            if not len(rows):
                raise common.BadInput(f"domain {name}: too little text for {split}: give more of "
                                      "it, a larger --holdout or a smaller --max-tokens")
        data.train[name] = packed["train"]
        for split, most in ((data.valid, cfg.gap_rows), (data.test, cfg.eval_rows)):
            rows = common.spread(packed["valid" if split is data.valid else "test"], most)
            split[name] = [sequence(tokens, before, name) for tokens in rows]
    measured = [e for name in data.names for e in data.valid[name] + data.test[name]]
    common.check_tokens(measured, student, teacher)
    sizes = {name: len(rows) for name, rows in data.train.items()}
    data.hash = common.hash_of([sizes, [e.response for e in measured]])
    counts = [f"{n} {sizes[n]} {len(data.valid[n])} {len(data.test[n])}" for n in sizes]
    print(f"data: sequences of {cfg.max_tokens} tokens (training, validation, test): "
          f"{', '.join(counts)}", flush=True)
    return data


def sequence(tokens, before, name):
    """A packed sequence -> Example: BOS, if there is one, and the first token are the prompt."""
    tokens = [int(t) for t in tokens]
    prompt = before + tokens[:1]
    return common.Example(prompt, prompt, tokens[1:], {"where": f"domain {name}"})


def fixed_shares(mix, names, sizes):
    """The shares (D,) of a mixture that ignores the gaps. DDK uses them in interval 0: by size."""
    if "=" not in mix:
        shares = [1.0] * len(sizes) if mix == "uniform" else sizes
    else:
        found = parse_pairs(mix, "--mix")
        with common.blaming(f"--mix {mix}"):
            shares = [float(found.get(name, -1)) for name in names]
        if set(found) != set(names) or min(shares) < 0 or not 0.99 <= sum(shares) <= 1.01:
            raise common.BadInput(f"--mix {mix}: shares of 0 or more, together 1, are wanted for "
                                  f"{', '.join(names)}")
    shares = torch.tensor(shares, dtype=torch.float64)
    return shares / shares.sum()


def domain_ce(model, examples, cfg):
    """{name: Examples} -> (D,) float64: cross entropies in nats per token."""
    means = []
    for part in examples.values():
        total = common.per_response(common.log_likelihood, model, part, cfg,
                                    batch_size=cfg.batch_size).sum()
        means.append(-total / sum(len(e.response) for e in part))
    return common.from_process_0(lambda: torch.stack(means))  # all processes must draw alike


MEANINGS = {
    "worst_gap": "largest gap of a domain; 1 is the teacher's level, lower is better",
    "mean_gap": "mean of the gaps; lower is better",
    "mean_ce": "mean cross entropy of the domains, nats per token; lower is better",
}


def metrics(names, student_ce, teacher_ce, shares=None):
    """What is reported of a model: gaps to the teacher, perplexities, and shares."""
    m = {}
    if teacher_ce is not None:
        gap = domain_gap(student_ce, teacher_ce)
        m = {"worst_gap": gap.max().item(), "mean_gap": gap.mean().item()}
        m |= {f"gap_{n}": x for n, x in zip(names, gap.tolist())}
    m["mean_ce"] = student_ce.mean().item()
    m |= {f"ppl_{n}": x for n, x in zip(names, student_ce.exp().tolist())}
    if shares is not None:
        m |= {f"share_{n}": x for n, x in zip(names, shares.tolist())}
    return m


# --- The loop -------------------------------------------------------------------------------------
def train(cfg) -> dict:
    """One run: it fills its directory and returns its final metrics."""
    common.check_settings(cfg, interval=(1, 10**9), smoothing=(0, 1), gamma=(0, 1e9),
                          tau=(1e-3, 1e3), max_tokens=(2, 10**9), gap_rows=(1, 10**9))
    steered = cfg.mix in ("ddk", "no-smoothing")  # else gaps are measured for the log only
    if "=" not in cfg.mix and not steered and cfg.mix not in ("uniform", "natural"):
        raise common.BadInput(f"--mix {cfg.mix}: ddk, no-smoothing, uniform, natural or "
                              "name=share,name=share is wanted")
    if cfg.teacher == "none" and (cfg.gamma > 0 or steered):
        raise common.BadInput("--teacher none: it works only with --gamma 0 and a fixed --mix")
    run = common.Run(cfg, __file__)

    # data and models: the frozen teacher has the dtype of --dtype; the student's weights are fp32
    sources = find_domains(cfg)
    student, teacher = common.load_pair(cfg, run.device)
    data = load_domains(cfg, sources, student, teacher)
    names = data.names
    sampler = DomainSampler([len(data.train[n]) for n in names], cfg.seed)
    fixed = fixed_shares(cfg.mix, names, sampler.sizes)

    teacher_ce = domain_ce(teacher, data.valid, cfg) if teacher else None   # (D,)
    teacher_test = domain_ce(teacher, data.test, cfg) if teacher else None  # (D,)
    before = metrics(names, domain_ce(student, data.test, cfg), teacher_test)

    # runs are short: beta_2 = 0.98 averages squared gradients over 50 steps, the default over 1000
    optimizer = torch.optim.AdamW(student.parameters(), lr=cfg.lr, betas=(0.9, 0.98),
                                  weight_decay=cfg.weight_decay, fused=True)
    start = run.start(data.hash, student=student, optimizer=optimizer, sampler=sampler)
    loss_of = torch.compile(distill_loss, dynamic=True) if cfg.compile else distill_loss
    student.train()

    for step in range(start, cfg.steps):
        new_interval = steered and step % cfg.interval == 0
        measured = new_interval or step % cfg.eval_every == 0
        if measured:
            student_ce = domain_ce(student, data.valid, cfg)
            if not student_ce.isfinite().all():
                run.fail(step, "the cross entropy of a domain is no longer a finite number")
        if new_interval:
            gap = domain_gap(student_ce, teacher_ce)
            if step == 0 or cfg.mix == "no-smoothing":
                sampler.log_shares = gap.log_softmax(-1)                                # Eq. 1
            else:
                sampler.log_shares = mixture(sampler.log_shares, gap, cfg.smoothing)    # Eq. 2
        # interval 0 does not use r_0: it draws by domain size
        shares = sampler.log_shares.exp() if steered and step >= cfg.interval else fixed
        if measured:
            run.evaluated(step, metrics(names, student_ce, teacher_ce, shares))
        lr = common.set_lr(optimizer, step, cfg)

        rank, n = common.processes()  # under torchrun each process takes every n-th sequence
        drawn = sampler.draw(step, cfg.batch_size, shares)[rank::n]
        chosen = [sequence(data.train[names[i]][j], data.before, names[i]) for i, j in drawn]
        micro = common.micro_batches(chosen, student, teacher, cfg)
        n_tokens = common.all_reduce_sum(sum(len(b.targets) for b in micro))
        totals = torch.zeros(3, device=run.device)
        for batch in micro:
            with common.precision(cfg, run.device):
                student_hidden = common.response_states(student, batch)                 # (R,H)
                if cfg.gamma > 0:  # the frozen teacher builds no graph
                    teacher_hidden = common.response_states(teacher, batch)             # (R,H)
            # the logits of all R rows need too much memory; in_chunks collects the gradients
            for rows, part in common.in_chunks(student_hidden, student):
                student_logits = common.logits_of(student, part)                        # (r,V)
                teacher_logits = None
                if cfg.gamma > 0:
                    teacher_logits = common.logits_of(teacher, teacher_hidden[rows])    # (r,V)
                loss, ce, kl = loss_of(student_logits, teacher_logits, batch.targets[rows],
                                       cfg.gamma, cfg.tau)
                (loss.sum() / n_tokens).backward()  # n_tokens counts the whole step
                totals += torch.stack([loss.detach().sum(), ce.detach().sum(), kl.detach().sum()])
        totals /= n_tokens
        common.reduce_gradients(student, totals)
        grad_norm = torch.nn.utils.clip_grad_norm_(student.parameters(), cfg.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        if step % cfg.log_every == 0 or step + 1 == cfg.steps:
            loss, ce, kl = totals.tolist()
            run.log(step, loss=loss, ce=ce, kl=kl, grad_norm=grad_norm.item(), lr=lr,
                    tokens=n_tokens)
        run.end_step(step + 1)

    rows = {"teacher": metrics(names, teacher_test, teacher_test)} if teacher else {}
    shares = sampler.total / max(1, cfg.steps)  # their mean over the run
    after = metrics(names, domain_ce(student, data.test, cfg), teacher_test, shares)
    meanings = MEANINGS | {f"gap_{n}": f"gap of a domain with {share:.2f} of the data"
                           for n, share in zip(names, shares.tolist())}
    return run.finish(student, rows | {"before": before, "after": after}, meanings)


if __name__ == "__main__":
    sys.exit(common.main(train, Config))
