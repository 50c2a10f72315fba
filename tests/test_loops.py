"""What the scripts' own loops do: the gradient they step with, and which rows reach what.

The other tests look at functions; a function may be right and be called with the wrong rows. Here each script runs its
own train(cfg) on three small splits, torch.optim.AdamW.step is made to note every gradient, and loops over the plain,
unpadded Hugging Face forward pass say what it should have been: one example at a time, in float64, rows read and
tokenised by hand, equations written out again. Nothing of common.py or of a method takes part in what is expected.
A batch is the whole train split (6 rows), so that the order of the rows plays no part.
"""
import copy
import functools
import importlib
import json
import math
import random
import shutil
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, WORDS, any_run, make_corpus, small_run
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

import common
import ddk
import dpkd
import gold
import kd_forward
import llmr

# What is spied on, by name: the places to edit when the scripts change.
SAMPLE = (common, "sample")            # (model, prompts, max_new, temperature=1, ..., seed, eos) -> responses, log-probs
LOAD_PAIR = (common, "load_pair")      # -> student, teacher, tokenizer
PICK_SHOTS = (gold, "pick_shots")      # (task, rows, n, rng) -> the real samples shown to the LLM
WRITE = (gold, "write_samples")        # (llm, task, shots, given, opening, call, ...) -> what the LLM writes
SELECT = (gold, "select_feedback")     # (energies, ...) -> indices
MIXTURE = (ddk, "mixture")             # -> log shares of the next interval
TRAIN, VALID, TEST = 6, 3, 3           # rows of each split
LONGEST = 6                            # --max-response: some of the responses are cut by it


# ---------------------------------------------------------------------------------------------------------------
# Data and models by hand
# ---------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    """A directory of train, valid and test.jsonl: no prompt twice, prompts and responses of 2 to 8 words."""
    root, rng = tmp_path_factory.mktemp("splits"), random.Random(5)
    for split, n in (("train", TRAIN), ("valid", VALID), ("test", TEST)):
        rows = [rng.choices(WORDS, k=2 + (i * 5 + n) % 7) for i in range(n)]
        rows = [{"prompt": f"{split[:2]} {i} " + " ".join(w), "response": " ".join(sorted(w))} for i, w in enumerate(rows)]
        (root / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return root


@pytest.fixture(scope="module")
def still(pair, tmp_path_factory):
    """still(kind) -> the pair, its student without dropout: for the scripts that train in training mode."""
    def make(kind):
        teacher, student = pair(kind)
        if kind not in made:
            made[kind] = shutil.copytree(student, tmp_path_factory.mktemp("still") / kind)
            config = json.loads((student / "config.json").read_text())
            config = {k: 0.0 if "pdrop" in k or "dropout" in k else v for k, v in config.items()}
            (made[kind] / "config.json").write_text(json.dumps(config))
        return teacher, made[kind]
    made = {}
    return make


@functools.cache
def loaded(path):
    auto = AutoModelForSeq2SeqLM if AutoConfig.from_pretrained(path).is_encoder_decoder else AutoModelForCausalLM
    return auto.from_pretrained(path).double().eval(), AutoTokenizer.from_pretrained(path)


def plain(path, weights=None):
    """A model directory as transformers loads it, in float64; `weights`: those that it has at a later step."""
    model = copy.deepcopy(loaded(str(path))[0])
    for p, w in zip(model.parameters(), weights or []):
        p.data.copy_(w)
    return model


def models(cfg, weights=None):
    """(student, teacher, size of the vocabulary that both have)."""
    both = plain(cfg.student, weights), plain(cfg.teacher)
    return *both, min(m.get_output_embeddings().weight.shape[0] for m in both)


def scores(model, vocab, prompt, response):
    """(n+1,V): the logits of each response token and of what would follow them. One example, so nothing is padded."""
    if model.config.is_encoder_decoder:
        begun = torch.tensor([[model.config.decoder_start_token_id] + response])
        return model(input_ids=torch.tensor([prompt]), decoder_input_ids=begun).logits[0, :, :vocab]
    return model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1:, :vocab]


def logprobs(model, vocab, prompt, response):
    """(n,): log-probability of each token of the response."""
    logp = scores(model, vocab, prompt, response).log_softmax(-1)
    return torch.stack([logp[t, token] for t, token in enumerate(response)])


def rows_of(cfg, split):
    """[(prompt of the student, prompt of the teacher, response)] as token ids, read and tokenised by hand."""
    tokenizer = loaded(cfg.student)[1]
    of_student, of_teacher = (loaded(path)[0].config.is_encoder_decoder for path in (cfg.student, cfg.teacher))
    ids = lambda text: tokenizer(text, add_special_tokens=False).input_ids
    around = lambda text, encdec: ids(text) + ([tokenizer.eos_token_id] if encdec else [])  # T5 reads prompts with an end
    out = []
    for line in open(f"{cfg.data}/{split}.jsonl"):
        row = json.loads(line)
        plain = lambda encdec, row=row: around(row["prompt"] + ("" if encdec else "\n"), encdec)
        theirs = cfg.teacher_template.replace("\\n", "\n").format(prompt=row["prompt"])
        theirs = around(theirs, of_teacher) if cfg.teacher_template else plain(of_teacher)
        out.append((plain(of_student), theirs, (ids(row["response"]) + [tokenizer.eos_token_id])[:cfg.max_response]))
    return out


TWO_VIEWS = "Sort:\\n{prompt}\\n"  # a --teacher-template


# ---------------------------------------------------------------------------------------------------------------
# Running a script's own loop, and looking
# ---------------------------------------------------------------------------------------------------------------
class Stop(Exception):
    """The loop has done enough."""


def spy(patch, where, told):
    """Every call of where = (owner, name) is told as (positional arguments, keyword arguments, what it returned)."""
    real = getattr(*where)

    def call(*args, **kwargs):
        out = real(*args, **kwargs)
        told.append((args, kwargs, out))
        return out
    patch.setattr(*where, call)


def is_teacher(model):
    return model.get_input_embeddings().weight.shape[1] == 32  # conftest's students have 16


def run(patch, script, cfg, steps=1):
    """Run script.train(cfg) until optimizers have made `steps` steps together ->

    steps: for each gradient, weights (before it), after (after it), age (steps that the optimizer remembers)
    samples: for each call of the sampler teacher, prompts, responses, logprobs, temperature, seed
    seen: for each forward pass of the student under gradient the token ids it read, (B,T); by step in steps[i].seen
    """
    found, step, real = SimpleNamespace(steps=[], samples=[], seen=[]), torch.optim.AdamW.step, getattr(*SAMPLE)
    params = lambda opt: [p for group in opt.param_groups for p in group["params"]]
    copies = lambda opt: [p.detach().clone() for p in params(opt)]

    def stepping(self, *args, **kwargs):
        one = SimpleNamespace(gradient=torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten().clone() for p in params(self)]),
                              weights=copies(self), age=max([int(s["step"]) for s in self.state.values()] or [0]), seen=found.seen[:])
        found.seen.clear()
        out = step(self, *args, **kwargs)
        one.after = copies(self)
        found.steps.append(one)
        if len(found.steps) == steps:
            raise Stop
        return out

    def sample(model, prompts, max_new, temperature=1.0, **kwargs):
        """Random models hardly ever end a response: two of three get an EOS, at places that differ between models."""
        responses, logps = real(model, prompts, max_new, temperature, **kwargs)
        for i, (x, y) in enumerate(zip(prompts, responses) if temperature == 1 else ()):
            at, eos = 1 + (5 * i + 3 * is_teacher(model)) % (max_new - 1), kwargs["eos"]
            if i % 3 and at < len(y):
                responses[i] = y[:at] + [eos]
                if len(prompts) in (TRAIN, TRAIN // 2):  # a step's batch; nobody looks at log-probs of other calls
                    with torch.no_grad():
                        logps[i] = torch.cat([logps[i][:at], logprobs(model, getattr(model, "vocab", None), x, responses[i])[at:]])
        found.samples.append(SimpleNamespace(teacher=is_teacher(model), prompts=[list(p) for p in prompts], responses=responses,
                                             logprobs=logps, temperature=temperature, seed=kwargs.get("seed", 0)))
        return responses, logps

    def load_pair(*args, **kwargs):
        student, *others = pair_of(*args, **kwargs)
        mine = student.get_input_embeddings()
        look = lambda module, a: found.seen.append(a[0].clone()) if torch.is_grad_enabled() and module is mine else None
        mine.register_forward_pre_hook(look)
        return student, *others
    pair_of = getattr(*LOAD_PAIR)
    with patch.context() as p:
        p.setattr(torch.optim.AdamW, "step", stepping)
        p.setattr(*SAMPLE, sample)
        p.setattr(*LOAD_PAIR, load_pair)
        try:
            script.train(cfg)
        except Stop:
            pass
    return found


def answers(found, teacher, prompts, least=1):
    """[{prompt: (response, log-probs)}]: the sampler's calls with just these prompts, one after the other."""
    wanted = sorted(map(tuple, prompts))
    calls = [{tuple(x): (y, lp) for x, y, lp in zip(s.prompts, s.responses, s.logprobs)} for s in found.samples
             if s.teacher == teacher and s.temperature == 1 and sorted(map(tuple, s.prompts)) == wanted]
    assert len(calls) >= least, f"{'teacher' if teacher else 'student'} asked {len(calls)} times"
    return calls


def first_of_log(cfg, *keys):
    """What was logged of step 0: it is there once step 1 has begun."""
    line = next(line for line in map(json.loads, open(f"{cfg.out}/log.jsonl")) if "loss" in line)
    return [line[key] for key in keys]


def error(got, loss, model):
    """Relative error of a gradient: |got - wanted| / |wanted|, all parameters together."""
    parameters = list(model.parameters())
    wanted = torch.autograd.grad(loss, parameters, allow_unused=True)
    wanted = torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(wanted, parameters)])
    return ((got.double() - wanted).norm() / wanted.norm()).item()


@pytest.fixture
def config(splits, tmp_path):
    """config(script, (teacher, student), **settings): one step over the whole train split, gradient not clipped."""
    def make(script, pair, **settings):
        return small_run(script.Config, pair, splits, tmp_path / "run",
                         **{**dict(steps=4, batch_size=TRAIN, max_response=LONGEST, clip=1e9, eval_rows=3, eval_every=100, save_every=100), **settings})
    return make


# ---------------------------------------------------------------------------------------------------------------
# kd_forward.py
# ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind, settings", [
    ("gpt2", dict()),
    ("gpt2", dict(alpha=0.0, accum=TRAIN)),
    ("llama", dict(alpha=0.5, tau=2.0, accum=2, teacher_template=TWO_VIEWS)),
    ("qwen2", dict(alpha=0.5, responses="teacher", accum=2)),
    ("t5", dict(tau=2.0, accum=2, teacher_template=TWO_VIEWS)),
    ("t5", dict(alpha=0.5, responses="teacher", teacher_template=TWO_VIEWS)),
    ("t5<gpt2", dict(alpha=0.5, accum=2)), ("gpt2<t5", dict(responses="teacher", teacher_template=TWO_VIEWS))])
def test_kd_steps_with_the_gradient_of_its_equation(config, still, monkeypatch, kind, settings):
    cfg = config(kd_forward, still(kind), **settings)
    found = run(monkeypatch, kd_forward, cfg, steps=2)
    student, teacher, V = models(cfg)
    rows = rows_of(cfg, "train")
    if cfg.responses == "teacher":
        drawn = answers(found, True, [theirs for _, theirs, _ in rows])[0]
        rows = [(own, theirs, drawn[tuple(theirs)][0]) for own, theirs, _ in rows]
    loss, n, all_ce, all_kl = 0.0, 0, 0.0, 0.0
    for own, theirs, response in rows:
        f, g = scores(student, V, own, response), scores(teacher, V, theirs, response).detach()
        for t, token in enumerate(response):
            ce = -f[t].log_softmax(-1)[token]
            logp, logq = (g[t] / cfg.tau).log_softmax(-1), (f[t] / cfg.tau).log_softmax(-1)
            kl = (logp.exp() * (logp - logq)).sum()
            loss, n = loss + (1 - cfg.alpha) * ce + cfg.alpha * cfg.tau**2 * kl, n + 1
            all_ce, all_kl = all_ce + ce.item(), all_kl + kl.item()
    assert error(found.steps[0].gradient, loss / n, student) < 2e-5
    wanted = [loss.item() / n, all_ce / n, all_kl / n if cfg.alpha else 0.0, n, found.steps[0].gradient.norm().item()]
    assert first_of_log(cfg, "loss", "ce", "kl", "tokens", "grad_norm") == pytest.approx(wanted, rel=1e-4)


def test_teacher_answers_differ_between_seeds_and_come_again_with_the_seed(config, still, monkeypatch, tmp_path):
    """The cache of answers is shared by all runs: what the student is trained on must not be."""
    read = []
    for i, seed in enumerate((0, 1, 0)):
        cfg = config(kd_forward, still("gpt2"), responses="teacher", seed=seed, out=str(tmp_path / str(i)))
        read.append(sorted(map(tuple, run(monkeypatch, kd_forward, cfg).steps[0].seen[0].tolist())))
    assert read[0] != read[1] and read[0] == read[2]


def test_kl_qp_is_measured_on_the_students_samples_and_kl_pq_on_the_teachers(config, pair, monkeypatch):
    cfg = config(kd_forward, pair("llama"), steps=0, teacher_template=TWO_VIEWS)
    found = run(monkeypatch, kd_forward, cfg)
    result = json.loads(Path(cfg.out, "result.json").read_text())
    student, teacher, V = models(cfg)

    def divergence(drawn, by_teacher, of):
        total = 0.0
        for own, theirs, _ in rows_of(cfg, "test"):
            response = drawn[tuple(theirs if by_teacher else own)][0]
            logq, logp = (scores(m, V, x, response)[:-1].log_softmax(-1) for m, x in ((student, own), (teacher, theirs)))
            total += sum((a.exp() * (a - b)).sum().item() for a, b in (zip(logp, logq) if of == "pq" else zip(logq, logp)))
        return total / TEST
    for of, by_teacher in (("qp", False), ("pq", True)):
        drawn = answers(found, by_teacher, [x[by_teacher] for x in rows_of(cfg, "test")])
        wanted = [divergence(d, by_teacher, of) for d in drawn]
        assert any(result[f"before.kl_{of}"] == pytest.approx(w, rel=1e-4) for w in wanted), of


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_is_applied_before_top_p(pair, temperature):
    """The fewest tokens that hold half of the *tempered* distribution; top-k, then, among the same tokens."""
    model = common.load_model(pair("llama")[1], torch.device("cpu"))
    logits = plain(pair("llama")[1])(torch.tensor([[5, 6]])).logits[0, -1].detach()
    order = logits.argsort(descending=True).tolist()

    def nucleus(p):
        held, kept = 0.0, []
        while held < 0.5:
            kept.append(order[len(kept)])
            held += p[kept[-1]].item()
        return kept
    p = (logits / temperature).softmax(-1)
    kept = nucleus(p)
    assert kept != nucleus(logits.softmax(-1))  # else nothing is tested
    out, logp = getattr(*SAMPLE)(model, [[5, 6]] * 400, 1, temperature, top_p=0.5, eos=0)
    assert {y[0] for y in out} <= set(kept)
    assert all(lp.exp().item() == pytest.approx(p[y[0]].item() / p[kept].sum().item(), rel=1e-3) for y, lp in zip(out, logp))
    out, logp = getattr(*SAMPLE)(model, [[5, 6]] * 100, 1, temperature, top_k=3, eos=0)
    assert all(lp.exp().item() == pytest.approx(p[y[0]].item() / p[order[:3]].sum().item(), rel=1e-3) for y, lp in zip(out, logp))


# ---------------------------------------------------------------------------------------------------------------
# llmr.py
# ---------------------------------------------------------------------------------------------------------------
def llmr_loss(cfg, found, step=0):
    """Eqs. 1 to 6 for what was sampled at a step, response by response -> (loss, the student that it is of)."""
    student, teacher, V = models(cfg, found.steps[step].weights)
    rows, eos = rows_of(cfg, "train"), loaded(cfg.student)[1].eos_token_id
    drawn = answers(found, False, [own for own, _, _ in rows], step + 1)[step]
    responses = [drawn[tuple(own)] for own, _, _ in rows]
    assert {y[-1] == eos for y, _ in responses} == {True, False}  # some end, some are cut
    of = {"max": lambda q, p: q.max(), "mean": lambda q, p: (p * q).sum(), "lse": lambda q, p: q.exp().sum().log()}[cfg.value]
    returns, values = [], []
    for (_, theirs, _), (y, _) in zip(rows, responses):
        f = scores(teacher, V, theirs, y).detach()
        q = f - f.mean(-1, keepdim=True)
        v = [of(q[t], f[t].softmax(-1)) for t in range(len(y) + 1)]
        reward = [q[t, token] - v[t + 1] for t, token in enumerate(y)]
        reward[-1] = reward[-1] + v[len(y)]  # after EOS V is 0; a cut response is granted V, what the best rest collects
        returns.append([sum(reward[t:]) for t in range(len(y))])
        values.append(v)
    # Eq. 4: q as it is now over q as it was when the sampler was refreshed
    sampler = plain(cfg.student, found.steps[step - step % cfg.sync].weights)
    loss = 0.0
    for i, ((own, _, _), (y, _)) in enumerate(zip(rows, responses)):
        logq, logb = logprobs(student, V, own, y), logprobs(sampler, V, own, y).detach()
        others = [g for j, other in enumerate(returns) if j != i for g in other]
        for t in range(len(y)):
            baseline = {"none": 0.0, "value": values[i][t], "mean": sum(others) / len(others)}[cfg.baseline]
            rho = (logq[t] - logb[t]).exp().detach()
            loss = loss - rho * (returns[i][t] - baseline) * logq[t]
    return loss / len(rows), student


@pytest.mark.parametrize("kind, value, baseline, settings", [
    ("gpt2", "max", "none", dict()), ("gpt2", "lse", "mean", dict(accum=2)), ("llama", "mean", "none", dict(accum=3)),
    ("llama", "max", "value", dict(teacher_template=TWO_VIEWS)), ("qwen2", "max", "mean", dict(accum=TRAIN)), ("qwen2", "lse", "value", dict(accum=2)),
    ("t5", "lse", "none", dict()), ("t5", "mean", "value", dict(accum=2)), ("t5", "mean", "mean", dict(accum=3, teacher_template=TWO_VIEWS)),
    ("t5<gpt2", "max", "value", dict(accum=2)), ("gpt2<t5", "lse", "none", dict())])
def test_llmr_steps_with_the_gradient_of_its_equations(config, pair, monkeypatch, kind, value, baseline, settings):
    cfg = config(llmr, pair(kind), value=value, baseline=baseline, **settings)
    found = run(monkeypatch, llmr, cfg, steps=2)
    loss, student = llmr_loss(cfg, found)
    assert error(found.steps[0].gradient, loss, student) < 2e-5
    drawn, V = answers(found, False, [own for own, _, _ in rows_of(cfg, "train")])[0], models(cfg)[2]
    n = sum(len(y) for y, _ in drawn.values())
    nll = -sum(logprobs(student, V, list(x), y).sum().item() for x, (y, _) in drawn.items()) / n
    wanted = {"loss": loss.item(), "nll": nll, "tokens": n, "length": n / TRAIN, "grad_norm": found.steps[0].gradient.norm().item()}
    teacher, eos = models(cfg)[1], loaded(cfg.student)[1].eos_token_id
    wanted["no_end"] = sum(y[-1] != eos for y, _ in drawn.values()) / TRAIN
    below = lambda f, y: sum((f[t, token] - f[t].max()).item() for t, token in enumerate(y))
    wanted["advantage"] = sum(below(scores(teacher, V, theirs, drawn[tuple(own)][0]), drawn[tuple(own)][0])
                              for own, theirs, _ in rows_of(cfg, "train")) / TRAIN
    assert first_of_log(cfg, *wanted) == pytest.approx(list(wanted.values()), rel=1e-4)


@pytest.mark.parametrize("kind, settings", [("gpt2", dict(baseline="mean", accum=2)), ("t5", dict(baseline="value", teacher_template=TWO_VIEWS))])
def test_llmr_weights_samples_of_a_stale_student_by_what_that_student_gave_them(config, pair, monkeypatch, kind, settings):
    """With --sync 2 step 1 improves a student that has moved on since the sampler was copied."""
    cfg = config(llmr, pair(kind), sync=2, lr=0.02, **settings)
    found = run(monkeypatch, llmr, cfg, steps=3)
    for step in (1, 2):  # at step 2 the sampler is refreshed
        loss, student = llmr_loss(cfg, found, step)
        assert error(found.steps[step].gradient, loss, student) < 2e-5, step


def test_llmr_trains_on_prompts_of_the_train_split_only_and_on_all_of_them(config, pair, monkeypatch):
    cfg = config(llmr, pair("gpt2"))
    found = run(monkeypatch, llmr, cfg, steps=3)  # 18 rows: more than all splits together hold
    prompts = [tuple(own) for own, _, _ in rows_of(cfg, "train")]
    for step in found.steps:
        read = [tuple(line) for tokens in step.seen for line in tokens.tolist()]
        assert len(read) == TRAIN and all(any(line[:len(x)] == x for x in prompts) for line in read)
        assert all(any(line[:len(x)] == x for line in read) for x in prompts)


@pytest.mark.parametrize("sync", [1, 2])
def test_llmr_asks_other_prompts_and_draws_other_noise_at_every_step(config, pair, monkeypatch, sync):
    cfg = config(llmr, pair("gpt2"), sync=sync, batch_size=TRAIN // 2)
    found = run(monkeypatch, llmr, cfg, steps=2)
    calls = [s for s in found.samples if not s.teacher and s.temperature == 1][-2:]
    assert sorted(calls[0].prompts + calls[1].prompts) == sorted(own for own, _, _ in rows_of(cfg, "train"))
    assert calls[0].seed != calls[1].seed


# ---------------------------------------------------------------------------------------------------------------
# dpkd.py
# ---------------------------------------------------------------------------------------------------------------
def dpkd_loss(cfg, found, step, y_s_of):
    """Eq. 8 or 9 and the anchor on the pairs of a step, y_s those drawn for the `y_s_of`-th time -> (loss, student, what
    the log is to say)."""
    student, teacher, V = models(cfg, found.steps[step].weights)
    rows = rows_of(cfg, "train")
    best = answers(found, True, [z for _, z, _ in rows])[0]
    own = {tuple(x): best[tuple(z)] for x, z, _ in rows}  # --preference 0 draws no y_s: any will do
    if cfg.preference:
        own = answers(found, False, [x for x, _, _ in rows], y_s_of + 1)[y_s_of]
    preference, ce, tokens, lengths, pairs, eos = 0.0, 0.0, 0, [], [], loaded(cfg.student)[1].eos_token_id
    for x, z, _ in rows:
        y_t, y_s = best[tuple(z)][0], own[tuple(x)][0]
        logq_t, logq_s = sum(logprobs(student, V, x, y_t)), sum(logprobs(student, V, x, y_s))
        rho_t = logq_t - sum(logprobs(teacher, V, z, y_t)).detach()
        rho_s = logq_s - sum(logprobs(teacher, V, z, y_s)).detach()
        if cfg.length_norm:
            rho_t, rho_s = rho_t / len(y_t), rho_s / len(y_s)
        margin = cfg.beta * (rho_t - rho_s)
        assert abs(margin.item()) < 20  # else the sigmoid is 0 or 1 and hides the margin
        preference, ce, tokens = preference + (1 + (-margin).exp()).log(), ce - logq_t, tokens + len(y_t)
        lengths.append((len(y_t), len(y_s)))
        pairs.append([margin.item(), -logq_t.item(), -logq_s.item(), y_t == y_s, y_s[-1] != eos])
    assert not cfg.preference or sum(t != s for t, s in lengths) >= 3  # else |y_t| and |y_s| could be mixed up
    loss = cfg.preference * preference / len(rows) + cfg.anchor * ce / tokens
    said = dict(zip(("margin", "nll_t", "nll_s", "same", "no_end"), (sum(x) / len(rows) for x in zip(*pairs))))
    said = {"preference": preference.item() / len(rows), **said} if cfg.preference else {"nll_t": said["nll_t"]}
    return loss, student, {"loss": loss.item(), "ce": ce.item() / tokens, "tokens": tokens, **said}


@pytest.mark.parametrize("kind, settings", [
    ("gpt2", dict(beta=1.0, length_norm=True, accum=TRAIN)),
    ("llama", dict(beta=0.05, accum=2, teacher_template=TWO_VIEWS)), ("llama", dict(preference=0.0, anchor=0.5)),
    ("qwen2", dict(beta=0.5, length_norm=True, anchor=0.5, accum=2)),
    ("t5", dict(beta=0.1, anchor=0.5, accum=3, teacher_template=TWO_VIEWS)),
    ("t5", dict(beta=0.5, length_norm=True, preference=0.7, anchor=0.5)),
    ("t5<gpt2", dict(beta=0.1, anchor=0.5, accum=2)), ("gpt2<t5", dict(beta=0.1, teacher_template=TWO_VIEWS))])
def test_dpkd_steps_with_the_gradient_of_its_equations(config, pair, monkeypatch, kind, settings):
    cfg = config(dpkd, pair(kind), **settings)
    found = run(monkeypatch, dpkd, cfg, steps=2)
    loss, student, said = dpkd_loss(cfg, found, 0, 0)
    assert error(found.steps[0].gradient, loss, student) < 2e-5
    said["grad_norm"] = found.steps[0].gradient.norm().item()
    assert first_of_log(cfg, *said) == pytest.approx(list(said.values()), rel=1e-4)
    prompts = sorted(x for x, _, _ in rows_of(cfg, "train"))
    drawn = [s for s in found.samples if not s.teacher and sorted(s.prompts) == prompts]
    assert bool(drawn) == (cfg.preference > 0), "y_s is drawn where it is used and nowhere else"


@pytest.mark.parametrize("negatives", ["online", "epoch", "frozen"])
def test_dpkd_compares_with_own_texts_of_the_step_the_epoch_or_the_start(config, pair, monkeypatch, negatives):
    """An epoch is a step here; log q is that of the student as it is now, whenever y_s was drawn."""
    cfg = config(dpkd, pair("gpt2"), negatives=negatives, beta=0.1, anchor=0.5, lr=0.02, accum=2)
    found = run(monkeypatch, dpkd, cfg, steps=3)
    for step in (1, 2):
        loss, student, _ = dpkd_loss(cfg, found, step, 0 if negatives == "frozen" else step)
        assert error(found.steps[step].gradient, loss, student) < 2e-5, step


def test_the_noise_of_y_s_is_never_that_of_y_t_nor_of_another_step(config, pair, monkeypatch, tmp_path):
    """With one noise for both a student that equals its teacher writes the teacher's very texts."""
    for seed in (0, 1):
        cfg = config(dpkd, pair("llama"), seed=seed, out=str(tmp_path / str(seed)))
        found = run(monkeypatch, dpkd, cfg, steps=2)
        prompts = sorted(x for x, _, _ in rows_of(cfg, "train"))
        seeds = {by: [s.seed for s in found.samples if s.teacher == by and sorted(s.prompts) == prompts] for by in (True, False)}
        assert len(seeds[True]) == 1 and len(seeds[False]) == 2
        assert len({*seeds[True], *seeds[False]}) == 3, seeds


def test_dpkd_reads_all_of_its_corpus_one_step_after_the_other(config, pair, monkeypatch, tmp_path):
    rng = random.Random(4)
    (tmp_path / "text.txt").write_text(" ".join(rng.choices(WORDS, k=40)))
    cfg = config(dpkd, pair("gpt2"), preference=0.0, anchor=0.5, lm_coef=0.5, corpus=str(tmp_path / "text.txt"), batch_size=2)
    tokenizer = loaded(cfg.student)[1]
    tokens = tokenizer((tmp_path / "text.txt").read_text(), add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
    blocks = [tuple(tokens[i:i + LONGEST]) for i in range(0, len(tokens), LONGEST)]
    assert len(blocks) > 6
    found = run(monkeypatch, dpkd, cfg, steps=math.ceil(len(blocks) / 2))
    read = [tuple(line[1:]) for step in found.steps for line in read_by(step) if line[0] == tokenizer.eos_token_id]
    assert all(any(line[:len(b)] == b for line in read) for b in blocks)


def test_fresh_pairs_come_from_validation_prompts(config, pair, monkeypatch):
    """fresh_* in the log are those of texts that teacher and student wrote to validation prompts, to no others."""
    cfg = config(dpkd, pair("gpt2"), beta=0.1, teacher_template=TWO_VIEWS)
    found = run(monkeypatch, dpkd, cfg)
    logged = next(r["valid"] for r in map(json.loads, open(f"{cfg.out}/log.jsonl")) if "valid" in r)
    student, teacher, V = models(cfg, found.steps[0].weights)
    rows = rows_of(cfg, "valid")
    total = lambda model, x, y: sum(logprobs(model, V, x, y)).item()
    pairs = []  # the evaluator samples to these prompts as well: any two calls may be the pair
    for best in answers(found, True, [z for _, z, _ in rows]):
        for own in answers(found, False, [x for x, _, _ in rows]):
            texts = [(x, z, best[tuple(z)][0], own[tuple(x)][0]) for x, z, _ in rows]
            nll_t, nll_s = (-sum(total(student, x, y) for x, _, *ys in texts for y in [ys[k]]) / VALID for k in (0, 1))
            rho = lambda x, z, y: total(student, x, y) - total(teacher, z, y)
            margin = cfg.beta * sum(rho(x, z, y_t) - rho(x, z, y_s) for x, z, y_t, y_s in texts) / VALID
            pairs.append(dict(fresh_margin=margin, fresh_nll_t=nll_t, fresh_nll_s=nll_s))
    got = {k: v for k, v in logged.items() if k.startswith("fresh_")}
    assert set(got) == {"fresh_margin", "fresh_nll_t", "fresh_nll_s"}
    assert any(got == pytest.approx(p, rel=1e-4) for p in pairs)


# ---------------------------------------------------------------------------------------------------------------
# gold.py: one run for nearly all tests, three rounds of 4 + 4 samples
# ---------------------------------------------------------------------------------------------------------------
def write_and_train(pair, root, steps, **settings):
    """A run of gold up to the `steps`-th step of its optimizers. The LLM is one that writes what it is told to, at once."""
    rng, patch = random.Random(9), pytest.MonkeyPatch()
    entry = json.loads((ROOT / "data/tasks.json").read_text())["tasks"]["reviews"]
    entry |= {"labels": {"sad": "", "very happy": ""}, "shots": 2, "student": "judge: {text}"}
    (root / "task.json").write_text(json.dumps(entry))
    text = lambda: " ".join(rng.choices(WORDS, k=rng.randint(4, 9)))
    rows = {s: [{"text": f"{s[:2]} {i} {text()}", "label": i % 2} for i in range(8)] for s in ("train", "valid", "test")}
    for s, part in rows.items():
        (root / f"{s}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in part))
    cfg = small_run(gold.Config, pair("llama"), root, root / "run", **{**dict(
        task=str(root / "task.json"), template="{prompt}\\n", max_prompt=54, max_response=8, budget=24, round_size=4, retrain=1, passes=1,
        scorer_lr=0.05, batch_size=24, accum=2, steps=4, clip=1e9, alpha=0.3, beta=0.7), **settings})
    calls, picked, chosen = [], [], []

    def write(llm, task, shots, given, opening, call, held_out, cfg):
        made = [{**g, "text": f"{opening} {call} {i} {text()}"} for i, g in enumerate(given)]
        calls.append(SimpleNamespace(round=call, opening=opening, shots=list(shots), made=made))
        return made
    with patch.context() as p:
        p.setattr(*WRITE, write)
        spy(p, PICK_SHOTS, picked)
        spy(p, SELECT, chosen)
        found = run(p, gold, cfg, steps)
    return SimpleNamespace(cfg=cfg, calls=calls, picked=picked, energies=[list(a[0]) for a, _, _ in chosen], found=found, rows=rows)


@pytest.fixture(scope="module")
def written(pair, tmp_path_factory):
    """The steps of the scorer before rounds 1 and 2, then the first ones of the final student."""
    return write_and_train(pair, tmp_path_factory.mktemp("gold"), 4)


def answers_of(cfg, samples):
    """Samples -> [(prompt, response)] as the student of this task reads them."""
    tokenizer = loaded(cfg.student)[1]
    ids = lambda text: tokenizer(text, add_special_tokens=False).input_ids
    return [(ids(f"judge: {s['text']}\n"), ids(s["label"]) + [tokenizer.eos_token_id]) for s in samples]


def ce_loss(cfg, model, samples, row=lambda ce: ce):
    V, losses = model.get_output_embeddings().weight.shape[0], []
    for x, y in answers_of(cfg, samples):
        losses += [row(-lp) for lp in logprobs(model, V, x, y)]
    return sum(losses) / len(losses)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b))


def test_the_llm_is_shown_training_rows_only(written):
    """pick_shots is given them, and what the LLM sees first in every prompt is of them: a test row would be a leak."""
    texts = {s: {r["text"] for r in part} for s, part in written.rows.items()}
    given = {r["sample"]["text"] for args, _, _ in written.picked for r in args[1]}
    assert written.picked and given and given <= texts["train"]
    real = written.picked[0][2]
    assert len(real) == 2 and all(c.shots[:2] == real for c in written.calls)
    seen = {s["text"] for c in written.calls for s in c.shots} - {s["text"] for c in written.calls for s in c.made}
    assert seen <= texts["train"]


def test_energies_are_those_of_the_scorer_as_it_is_after_its_training(written):
    """- mean_j log sum_v exp f_v, f the untrained student in round 0 only."""
    found, strange = written.found.steps, [c.made for c in written.calls if c.opening == "ood"]
    assert len(written.energies) == len(strange) == 3
    for t, weights in enumerate((found[0].weights, found[0].after, found[1].after)):
        f = plain(written.cfg.student, weights)
        V = f.get_output_embeddings().weight.shape[0]
        wanted = [-scores(f, V, x, y)[:-1].logsumexp(-1).mean().item() for x, y in answers_of(written.cfg, strange[t])]
        assert written.energies[t] == pytest.approx(wanted, rel=1e-4), t


@pytest.mark.parametrize("training", [0, 1])
def test_the_scorer_trains_by_plain_ce_on_all_samples_so_far(written, training):
    step = written.found.steps[training]
    known = [s for c in written.calls if c.round <= training for s in c.made]
    assert len(known) == 8 * (training + 1)
    f = plain(written.cfg.student, step.weights)
    assert error(step.gradient, ce_loss(written.cfg, f, known), f) < 2e-5


def test_the_scorer_goes_on_between_trainings_with_its_weights_and_its_optimizer(written):
    first, second, final, _ = written.found.steps
    start = [p.detach().float() for p in plain(written.cfg.student).parameters()]
    assert same(first.weights, start) and not same(first.after, start)
    assert same(second.weights, first.after)
    assert (first.age, second.age, final.age) == (0, 1, 0)


def test_gold_trains_a_fresh_student_by_sce_on_all_samples_with_the_gradient_of_its_equation(written):
    cfg, step = written.cfg, written.found.steps[2]
    assert same(step.weights, [p.detach().float() for p in plain(cfg.student).parameters()])  # not the scorer's
    q = plain(cfg.student)
    sce = lambda ce: cfg.alpha * ce + cfg.beta * -math.log(1e-4) * (1 - (-ce).exp())
    made = [s for c in written.calls for s in c.made]
    loss = ce_loss(cfg, q, made, sce)
    assert error(step.gradient, loss, q) < 2e-5
    n = sum(len(y) for _, y in answers_of(cfg, made))
    assert first_of_log(cfg, "loss", "ce", "tokens") == pytest.approx([loss.item(), ce_loss(cfg, q, made).item(), n], rel=1e-4)


def test_samples_of_the_ood_prompt_are_trained_on_as_well(written):
    read = [tuple(line) for tokens in written.found.steps[2].seen for line in tokens.tolist()]
    for opening in ("plain", "ood"):
        made = answers_of(written.cfg, [s for c in written.calls if c.opening == opening for s in c.made])
        assert len(made) == 12 and all(any(line[:len(x)] == tuple(x) for line in read) for x, _ in made), opening
    assert len(read) == 24


# ---------------------------------------------------------------------------------------------------------------
# ddk.py
# ---------------------------------------------------------------------------------------------------------------
DOMAINS = ("big", "mid", "small")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus") / "domains")


@pytest.fixture
def ddk_config(corpus, pair, tmp_path):
    def make(kind="llama", **settings):
        return small_run(ddk.Config, pair(kind), corpus, tmp_path / "run", **{
            **dict(steps=4, batch_size=12, interval=1, clip=1e9, gap_rows=10**6, eval_rows=10**6, eval_every=100, save_every=100), **settings})
    return make


def packed(cfg, split):
    """{domain: [sequence]}: its documents one after the other, an end after each, cut into max_tokens; by hand."""
    tokenizer, out = loaded(cfg.student)[1], {}
    for name in DOMAINS:
        stream = []
        for text in (json.loads(x)["text"] for x in open(f"{cfg.data}/{name}.jsonl")):
            draw = zlib.crc32(text.encode()) % 1000 / 1000
            if split == ("test" if draw < cfg.holdout else "valid" if draw < 2 * cfg.holdout else "train"):
                stream += tokenizer(text, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
        n = cfg.max_tokens
        out[name] = [stream[i:i + n] for i in range(0, len(stream) - n + 1, n)]
    return out


def read_by(step):
    return [line for tokens in step.seen for line in tokens.tolist()]


@pytest.mark.parametrize("kind, settings", [("llama", dict(gamma=0.0)), ("llama", dict(gamma=0.2, accum=12)),
                                            ("qwen2", dict(gamma=0.2, tau=2.0, accum=2))])
def test_ddk_steps_with_the_gradient_of_its_equation_on_what_the_mixture_drew(ddk_config, monkeypatch, kind, settings):
    cfg = ddk_config(kind, **settings)
    found = run(monkeypatch, ddk, cfg, steps=2)
    student, teacher, V = models(cfg)
    batch, train = read_by(found.steps[0]), [s for part in packed(cfg, "train").values() for s in part]
    assert len(batch) == 12 and all(s in train for s in batch)
    assert len(set(map(tuple, batch))) == 12  # a domain goes through all of its sequences before one comes again
    loss, all_ce, all_kl = 0.0, 0.0, 0.0
    for s in batch:  # every token but the first is predicted
        f, g = scores(student, V, s[:1], s[1:]), scores(teacher, V, s[:1], s[1:]).detach()
        for t, token in enumerate(s[1:]):
            logp, logq = (g[t] / cfg.tau).log_softmax(-1), (f[t] / cfg.tau).log_softmax(-1)
            ce, kl = -f[t].log_softmax(-1)[token], (logp.exp() * (logp - logq)).sum()
            loss, all_ce, all_kl = loss + ce + cfg.gamma * kl, all_ce + ce.item(), all_kl + kl.item()
    n = 12 * 15
    assert error(found.steps[0].gradient, loss / n, student) < 2e-5
    wanted = [loss.item() / n, all_ce / n, all_kl / n if cfg.gamma else 0.0, n]
    assert first_of_log(cfg, "loss", "ce", "kl", "tokens") == pytest.approx(wanted, rel=1e-4)


def test_the_mixture_is_steered_by_validation_sequences_and_never_by_test_ones(ddk_config, monkeypatch):
    """The shares of interval 1 by hand: Eq. 1 on the gaps before step 0, Eq. 2 on those before step 1."""
    cfg = ddk_config(lr=0.05)
    found = run(monkeypatch, ddk, cfg, steps=2)
    logged = [r["valid"] for r in map(json.loads, open(f"{cfg.out}/log.jsonl")) if "valid" in r][1]

    def shares(split):
        def ce(model):
            each = []
            for part in packed(cfg, split).values():
                logp = model(input_ids=torch.tensor(part)).logits[:, :-1].log_softmax(-1)
                each.append(-logp.gather(-1, torch.tensor(part)[:, 1:, None]).mean())
            return torch.stack(each).detach()
        teacher = ce(plain(cfg.teacher))
        rho = [(ce(plain(cfg.student, step.weights)) - teacher).exp() for step in found.steps]
        r = rho[0].exp() / rho[0].exp().sum()
        psi = r * rho[1].exp()
        return (cfg.alpha * psi / psi.sum() + (1 - cfg.alpha) / len(DOMAINS)).tolist()
    got, by_test = [logged[f"share_{n}"] for n in DOMAINS], shares("test")
    assert got == pytest.approx(shares("valid"), rel=1e-4)
    assert max(abs(a - b) for a, b in zip(got, by_test)) > 1e-2  # else the two could not be told apart


def test_the_shares_decide_what_the_next_step_reads(ddk_config, monkeypatch):
    cfg = ddk_config()
    monkeypatch.setattr(*MIXTURE, lambda r, rho, alpha: torch.tensor([0.0, 0.0, 1.0], dtype=r.dtype).log())
    found, train = run(monkeypatch, ddk, cfg, steps=2), packed(cfg, "train")
    assert any(s in train["big"] for s in read_by(found.steps[0]))  # interval 0: in natural proportion
    assert len(read_by(found.steps[1])) == 12 and all(s in train["small"] for s in read_by(found.steps[1]))
    assert len({tuple(s) for step in found.steps for s in read_by(step)}) == 24  # the cursors go on between intervals


# ---------------------------------------------------------------------------------------------------------------
# What is reported
# ---------------------------------------------------------------------------------------------------------------
def logged(out, key):
    return [line[key] for line in map(json.loads, open(f"{out}/log.jsonl")) if key in line]


@pytest.mark.parametrize("script", [kd_forward, llmr, dpkd])
def test_the_curve_is_the_students_on_validation_rows_and_the_table_is_of_test_rows(config, still, monkeypatch, script):
    """On whichever rows choices are made, the final numbers must be of others."""
    split = lambda examples: {"va": 1.0, "te": 2.0}[examples[0].row["prompt"][:2]]
    monkeypatch.setattr(common, "make_evaluator", lambda cfg, teacher, tokenizer, examples: lambda model: {
        "kl_pq": split(examples), "ce": float(is_teacher(model)), "kl_qp": float(is_teacher(teacher))})
    cfg = config(script, still("gpt2"), steps=2, eval_every=1)
    result = script.train(cfg)
    assert [m["kl_pq"] for m in logged(cfg.out, "valid")] == [1.0, 1.0, 1.0]
    assert {result[f"{who}.kl_pq"] for who in ("teacher", "before", "after")} == {2.0}
    assert [m["ce"] for m in logged(cfg.out, "valid")] == [0.0, 0.0, 0.0]
    assert [result[f"{who}.ce"] for who in ("teacher", "before", "after")] == [1.0, 0.0, 0.0]
    assert [m["kl_qp"] for m in logged(cfg.out, "valid")] == [1.0] * 3 and result["after.kl_qp"] == 1.0  # held against the teacher


@pytest.mark.parametrize("script", ["kd_forward", "llmr", "dpkd", "gold", "ddk"])
def test_the_curve_ends_at_the_last_step(any_root, tmp_path, script):
    cfg = any_run(script, any_root, tmp_path / "run", steps=4, eval_every=3, interval=3, log_every=2)
    importlib.import_module(script).train(cfg)
    lines = list(map(json.loads, open(f"{cfg.out}/log.jsonl")))
    assert [line["step"] for line in lines if "valid" in line] == [0, 3, 4]
    assert [line["step"] for line in lines if "loss" in line] == [0, 2, 3]
    if script == "gold":  # of the rounds every second one and the last
        n = 1 + max(json.loads(line)["round"] for line in open(f"{cfg.out}/samples.jsonl"))
        assert n > 3 and [line["round"] for line in lines if "round" in line] == sorted({*range(0, n, 2), n - 1})


