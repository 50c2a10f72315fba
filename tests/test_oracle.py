"""The oracle: every script steps with the gradient of its equations.

Each test runs a script's own train(cfg) and stops it after a few optimizer steps. What it did is
compared with the equations of its paper, written out again below: plain loops, one example at a
time, in float64, over the unpadded forward pass of Hugging Face. Rows are read and tokenised by
hand; the loops use nothing of common.py and nothing of a method. A batch is the whole train split,
so the order of its rows plays no part. A script is watched at three places:

    torch.optim.AdamW.step       the gradient, and the weights before and after
    torch.nn.Embedding.forward   which tokens the student reads when it is trained
    common.sample                which texts the teacher and the student wrote

p is the teacher, q the student, x a prompt, y a response with its EOS (end-of-sequence token).
"""
import copy
import functools
import importlib
import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import auto_class, small_model, write_rows
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, PreTrainedTokenizerFast

import common

SHARED = dict(template="{prompt} :", max_prompt=24, max_response=8, holdout=0.2, steps=4,
              batch_size=8, lr=0.02, warmup=1, clip=1e9, eval_every=100, eval_rows=1,
              log_every=1, save_every=100, device="cpu", dtype="float32")
METHOD = {
    "dpkd": dict(beta=0.1),
    "gold": dict(budget=24, round_size=4, temperature=1.0, top_k=0, top_p=1.0, retrain=1, passes=1,
                 scorer_lr=0.05, batch_size=24, accum=2, ce_weight=0.3, reverse_ce_weight=0.7),
    "ddk": dict(interval=100, gap_rows=10**4, max_tokens=12, batch_size=12)}
OTHER = "bad : {prompt} good"  # a --teacher-template

# Fourteen tokens: of a random model's texts of at most 8 tokens about half end with an EOS.
WORDS = ["<pad>", "<eos>", "<unk>", "\n", ":", *"cat dog sat ran red blue good bad then".split()]
VOCAB, EOS = len(WORDS), 1


def ids(text):
    """The tokens of a text: words and line breaks."""
    return [WORDS.index(word) for word in re.findall(r"\n|[^ \n]+", text)]


# ---- models and data ----------------------------------------------------------------------------
def make_pair(folder, kind, dropout):
    """Save random models. Of kind t5<gpt2 the student is a T5 and its teacher a GPT-2."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|[^ \n]+"), "removed", invert=True)
    if "t5" in kind:  # its tokenizer puts an end behind every text
        backend.post_processor = processors.TemplateProcessing(
            single="$A <eos>", special_tokens=[("<eos>", EOS)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>",
        pad_token="<pad>" if "t5" in kind else "<eos>")
    for role, n, seed in (("student", 16, 17), ("teacher", 32, 32)):
        own = kind.split("<")[0 if role == "student" else -1]
        padded = 3 if own == "llama" and role == "teacher" else 0  # rows of a head without a token
        more = {"gpt2": dict(attn_pdrop=dropout, resid_pdrop=dropout, embd_pdrop=dropout),
                "t5": dict(scale_decoder_outputs=True, dropout_rate=dropout)}
        model = small_model(own, n, VOCAB + padded, seed, scale=3, bos_token_id=EOS,
                            eos_token_id=EOS, **more.get(own, {}))
        model.save_pretrained(folder / role)
        tokenizer.save_pretrained(folder / role)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The data of all scripts: rows/, reviews/ and task.json, domains/, corpus.txt."""
    root, rng = tmp_path_factory.mktemp("oracle"), random.Random(3)

    def text(low, high, words=WORDS[5:]):
        return " ".join(rng.choices(words, k=rng.randint(low, high)))

    for split, n in (("train", 8), ("valid", 3), ("test", 3)):
        rows = [{"prompt": text(3, 9), "response": text(2, 9)} for _ in range(n)]
        rows[0]["response"] += 7 * " good"  # longer than --max-response
        write_rows(root / f"rows/{split}.jsonl", rows)
        rows = [{"text": text(3, 6), "label": label} for label in ["bad", "good"] * 3]
        write_rows(root / f"reviews/{split}.jsonl", rows)
    write_rows(root / "task.json", [{
        "about": "", "fields": {"text": "text"}, "label": "label", "shots": 2, "max_new": 8,
        "labels": {"bad": "", "good": ""}, "student": "then {text}", "lengths": [10, 120],
        "stop": [" :"], "write": {"prompt": "{shots}", "shot": "{sample} : ",
                                  "sample": "{label} {text}", "plain": "", "ood": ""}}])
    for i, (name, n) in enumerate((("big", 160), ("mid", 100), ("small", 70))):
        rows = [{"text": text(4, 14, WORDS[5 + 2 * i:10 + 2 * i])} for _ in range(n)]
        write_rows(root / f"domains/{name}.jsonl", rows + rows[:5])  # some occur twice
    (root / "corpus.txt").write_text("\n\n".join(text(15, 15) for _ in range(4)))
    return root


def train_rows(s):
    """Of each training row the student's prompt, the teacher's, and the response, as tokens."""
    rows, own = [], s.template.replace("auto", "{prompt}\n")
    for row in map(json.loads, open(f"{s.data}/train.jsonl")):
        x = prompt(row["prompt"], own, s.student)
        x_teacher = prompt(row["prompt"], s.teacher_template or own, s.teacher)
        rows.append((x, x_teacher, (ids(row["response"]) + [EOS])[:s.max_response]))
    return rows


def prompt(text, template, path):
    """What the model of that directory reads: a T5 an end as well."""
    end = [EOS] if loaded(path).config.is_encoder_decoder else []
    return tuple(ids(template.format(prompt=text)) + end)


# ---- run a script, and look ---------------------------------------------------------------------
class Stop(BaseException):
    """The loop has done enough."""


number = itertools.count()


def settings(root, script, kind, **changes):
    """The Config of a script."""
    Config = importlib.import_module(script).Config
    trains_with_it = ("kd_forward", "gold", "ddk", "tests.controls.seqkd_greedy")
    dropout = 0.0 if script in trains_with_it else 0.3  # the others must leave the student's out
    pair, out = root / f"{kind}-{dropout}", root / f"run{next(number)}"
    if not pair.exists():
        make_pair(pair, kind, dropout)
    data = root / {"gold": "reviews", "ddk": "domains"}.get(script, "rows")
    paths = dict(teacher=pair / "teacher", student=pair / "student", data=data, out=out)
    paths |= {"task": root / "task.json"} if script == "gold" else {}
    shared = {name: value for name, value in SHARED.items() if name not in Config.unused}
    paths = {name: str(path) for name, path in paths.items()}
    return Config(**{**shared, **METHOD.get(script, {}), **paths, **changes})


def run(s, steps=2):
    """Run a script for so many optimizer steps ->

    steps    for each its gradient, the weights before and after it, which optimizer made it, how
             many steps that one remembered, and which lines the student read under gradient
    texts    {"student", "teacher": {(number of the step, prompt): what it wrote}}
    """
    train = importlib.import_module(type(s).__module__).train
    found = SimpleNamespace(s=s, steps=[], texts={"student": {}, "teacher": {}}, read=[])
    real_step, real_sample = torch.optim.AdamW.step, common.sample
    real_embed = torch.nn.Embedding.forward

    def step(optimizer, *args, **kwargs):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        copies = lambda: [p.detach().clone() for p in parameters]
        age = max([int(state["step"]) for state in optimizer.state.values()], default=0)
        one = SimpleNamespace(gradient=flat([p.grad for p in parameters], parameters),
                              before=copies(), optimizer=id(optimizer), age=age, read=found.read)
        real_step(optimizer, *args, **kwargs)
        one.after, found.read = copies(), []
        found.steps.append(one)
        if len(found.steps) == steps:
            raise Stop

    def sample(model, prompts, *args, **kwargs):
        responses = real_sample(model, prompts, *args, **kwargs)
        who = "student" if model.get_input_embeddings().embedding_dim == 16 else "teacher"
        for x, y in zip(prompts, responses):
            found.texts[who][len(found.steps), tuple(map(int, x))] = list(map(int, y))
        return responses

    def embed(module, tokens):
        if module.weight.shape == (VOCAB, 16) and torch.is_grad_enabled():  # not that of positions
            found.read += tokens.tolist()
        return real_embed(module, tokens)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        patch.setattr(torch.nn.Embedding, "forward", embed)
        patch.setattr(common, "sample", sample)
        try:
            train(s)
        except Stop:
            pass
    return found


def logged(s, step):
    """What the log holds of a step, {name: value}; of validation rows {valid/name: value}."""
    values = {}
    for line in map(json.loads, open(f"{s.out}/log.jsonl")):
        if line["step"] == step:
            values |= {f"valid/{k}": v for k, v in line.pop("valid", {}).items()} | line
    return values


# ---- the tools of the loops ---------------------------------------------------------------------
@functools.cache
def loaded(path):
    """A model as transformers loads it, in float64."""
    auto = auto_class(AutoConfig.from_pretrained(path))
    return auto.from_pretrained(path).double().eval()


def at(weights, path):
    """A copy of it with the weights that it had at some step."""
    model = copy.deepcopy(loaded(path))
    for p, w in zip(model.parameters(), weights):
        p.data.copy_(w)
    return model


def logits(model, x, y):
    """(n+1,V): row t predicts token t of the response, the last row what would follow it."""
    x, y = list(x), list(y)
    if not model.config.is_encoder_decoder:
        return model(input_ids=torch.tensor([x + y])).logits[0, len(x) - 1:, :VOCAB]
    begun = torch.tensor([[model.config.decoder_start_token_id] + y])
    return model(input_ids=torch.tensor([x]), decoder_input_ids=begun).logits[0, :, :VOCAB]


def logprobs(model, x, y):
    """The log-probability of each token of a response."""
    logp = logits(model, x, y).log_softmax(-1)
    return [logp[t, token] for t, token in enumerate(y)]


def ce_and_kl(student, teacher, x, x_teacher, y, tau):
    """For each token of a response -log q(y_t) and KL(p_tau || q_tau)."""
    f, g = logits(student, x, y), logits(teacher, x_teacher, y).detach()
    for t, token in enumerate(y):
        logp, logq = (g[t] / tau).log_softmax(-1), (f[t] / tau).log_softmax(-1)
        yield -f[t].log_softmax(-1)[token], (logp.exp() * (logp - logq)).sum()


def flat(gradients, parameters):
    """All gradients of a model as one vector."""
    parts = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, parameters)]
    return torch.cat([part.detach().flatten().double() for part in parts])


def check(found, step, loss, student, **said):
    """The script's gradient is that of the loops' loss; of step 0 its log says what they say."""
    parameters, gradient = list(student.parameters()), found.steps[step].gradient
    wanted = flat(torch.autograd.grad(loss, parameters, allow_unused=True), parameters)
    assert ((gradient - wanted).norm() / wanted.norm()).item() < 2e-5
    if said and found.steps[step].age == 0:
        said |= dict(loss=loss, grad_norm=gradient.norm())
        said = {name: torch.as_tensor(x).item() for name, x in said.items()}
        line = logged(found.s, 0)
        assert {name: line[name] for name in said} == pytest.approx(said, rel=1e-4, abs=1e-6)


# ---- kd_forward.py ------------------------------------------------------------------------------
#     L = mean over response tokens of (1 - alpha) CE + alpha tau^2 KL(p_tau || q_tau)
def check_kd(found, step):
    s, tokens = found.s, []
    student, teacher = at(found.steps[step].before, s.student), loaded(s.teacher)
    for x, x_teacher, y in train_rows(s):
        y = found.texts["teacher"][0, x_teacher] if s.responses == "teacher" else y
        tokens += ce_and_kl(student, teacher, x, x_teacher, y, s.tau)
    ce, kl = (sum(term) / len(tokens) for term in zip(*tokens))
    loss = (1 - s.alpha) * ce + s.alpha * s.tau**2 * kl
    said = {"kl": kl} if s.alpha else {}  # at alpha = 0 the teacher is not asked
    check(found, step, loss, student, ce=ce, tokens=len(tokens), **said)


@pytest.mark.parametrize("kind, changes", [
    ("llama", {}), ("gpt2", dict(template="auto")), ("gpt2", dict(alpha=0.0, accum=8)),
    ("gpt2", dict(alpha=0.5, tau=2.0, accum=2, teacher_template=OTHER, cache=True)),
    ("llama", dict(alpha=0.3, tau=0.5, accum=2, responses="teacher")),
    ("t5", dict(tau=2.0, accum=2, teacher_template=OTHER, cache=True)),
    ("t5", dict(alpha=0.5, teacher_template=OTHER, responses="teacher")),
    ("t5<gpt2", dict(alpha=0.5, accum=2)),
    ("gpt2<t5", dict(teacher_template=OTHER, responses="teacher"))])
def test_kd_forward_steps_with_the_gradient_of_its_equation(root, kind, changes):
    found = run(settings(root, "kd_forward", kind, **changes))
    check_kd(found, step=0)
    check_kd(found, step=1)  # epoch 1: of moved weights, with --cache on states that were kept


# ---- llmr.py ------------------------------------------------------------------------------------
#     Q(s,a) = f(s,a) - mean_a' f(s,a')                                   f: logits of the teacher
#     r_t = Q(s_t,a_t) - V(s_{t+1}),  V = 0 behind the last token;    G_t = r_t + .. + r_n
#     L = - 1/B sum over responses and t of rho_t (G_t - baseline_t) log q(a_t|s_t),  rho_t = q/b
def check_llmr(found, step):
    s, rows = found.s, train_rows(found.s)
    student, teacher = at(found.steps[step].before, s.student), loaded(s.teacher)
    b = at(found.steps[step - step % s.sync].before, s.student)  # the student as it was copied
    responses = [found.texts["student"][step, x] for x, _, _ in rows]
    state_value = {"max": lambda q: q.max(), "lse": lambda q: q.exp().sum().log(),
                   "mean": lambda q: (q.softmax(-1) * q).sum()}[s.value]
    values, returns, advantage, loss, nll = [], [], 0.0, 0.0, 0.0
    for (_, x_teacher, _), y in zip(rows, responses):
        f = logits(teacher, x_teacher, y).detach()
        q = [f[t] - f[t].mean() for t in range(len(y))]
        v = [state_value(q[t]) for t in range(len(y))] + [0.0]
        r = [q[t][a] - v[t + 1] for t, a in enumerate(y)]
        values.append(v)
        returns.append([sum(r[t:]) for t in range(len(y))])
        advantage += sum(q[t][a] - q[t].max() for t, a in enumerate(y)) / len(rows)
    for i, ((x, _, _), y) in enumerate(zip(rows, responses)):
        logq, logb = logprobs(student, x, y), logprobs(b, x, y)
        others = [g for j in range(len(rows)) if j != i for g in returns[j]]
        for t in range(len(y)):
            mean = sum(others) / len(others)
            baseline = {"none": 0.0, "value": values[i][t], "mean": mean}[s.baseline]
            weight = (logq[t] - logb[t]).exp() * (returns[i][t] - baseline)
            loss, nll = loss - weight.detach() * logq[t] / len(rows), nll - logq[t]
    n, cut = sum(map(len, responses)), sum(y[-1] != EOS for y in responses) / len(rows)
    assert step or 0 < cut < 1, "some responses are to be cut, some to end: take another seed"
    check(found, step, loss, student, tokens=n, length=n / len(rows), nll=nll / n, no_end=cut,
          advantage=advantage)


@pytest.mark.parametrize("kind, changes", [
    ("llama", {}), ("llama", dict(value="lse", baseline="mean", accum=2)),
    ("gpt2", dict(value="mean", baseline="value", accum=8, teacher_template=OTHER)),
    ("gpt2", dict(baseline="mean", accum=2)), ("t5", dict(baseline="value", accum=2)),
    ("t5", dict(value="lse", teacher_template=OTHER)),
    ("t5<gpt2", dict(value="mean", baseline="mean", accum=2))])
def test_llmr_steps_with_the_gradient_of_its_equations(root, kind, changes):
    found = run(settings(root, "llmr", kind, **changes))
    check_llmr(found, step=0)
    check_llmr(found, step=1)


@pytest.mark.parametrize("kind, baseline, accum", [("gpt2", "mean", 2), ("t5", "value", 1)])
def test_llmr_weighs_texts_of_a_stale_student_by_what_it_gave_them(root, kind, baseline, accum):
    found = run(settings(root, "llmr", kind, sync=2, baseline=baseline, accum=accum), steps=3)
    check_llmr(found, step=1)  # the student has moved since it was copied
    check_llmr(found, step=2)  # it is copied anew


# ---- dpkd.py ------------------------------------------------------------------------------------
#     rho(y) = log q(y|x) - log p(y|x),  with --length-norm divided by |y|
#     margin = beta (rho(y_t) - rho(y_s))                  y_t wrote the teacher, y_s the student
#     L = preference mean -log sigmoid(margin) + anchor CE(y_t) + lm_coef CE(corpus)
def check_dpkd(found, step):
    s, rows, pairs, nll, n = found.s, train_rows(found.s), [], 0.0, 0
    student, teacher = at(found.steps[step].before, s.student), loaded(s.teacher)
    for x, x_teacher, _ in rows:
        y_t = found.texts["teacher"][0, x_teacher]
        y_s = found.texts["student"].get((step * s.refresh, x))
        assert (y_s is not None) == (s.preference > 0)  # drawn where it is learnt from
        logq_t = sum(logprobs(student, x, y_t))
        nll, n = nll - logq_t, n + len(y_t)
        if y_s:
            logq_s = sum(logprobs(student, x, y_s))
            rho_t = logq_t - sum(logprobs(teacher, x_teacher, y_t)).detach()
            rho_s = logq_s - sum(logprobs(teacher, x_teacher, y_s)).detach()
            if s.length_norm:
                rho_t, rho_s = rho_t / len(y_t), rho_s / len(y_s)
            margin = s.beta * (rho_t - rho_s)
            pairs.append(dict(preference=-(1 / (1 + (-margin).exp())).log(), margin=margin,
                              nll_student=-logq_s, same=y_t == y_s, no_end=y_s[-1] != EOS))
    said = {name: sum(pair[name] for pair in pairs) / len(pairs) for name in (pairs or [{}])[0]}
    loss = s.preference * said.get("preference", 0.0) + s.anchor * nll / n
    loss = loss + (s.lm_coef * corpus_ce(student, s) if s.lm_coef else 0.0)
    check(found, step, loss, student, ce=nll / n, nll_teacher=nll / len(rows), tokens=n, **said)


def corpus_ce(student, s):
    """Mean over tokens of the paragraphs, EOS behind each, in blocks of --max-response tokens."""
    paragraphs = Path(s.corpus).read_text().split("\n\n")
    stream = [token for text in paragraphs for token in ids(text) + [EOS]]
    assert len(stream) == s.batch_size * s.max_response  # a batch is all of it
    blocks = [stream[i:i + s.max_response] for i in range(0, len(stream), s.max_response)]
    return -sum(sum(logprobs(student, [EOS], block)) for block in blocks) / len(stream)


@pytest.mark.parametrize("kind, changes", [
    ("llama", dict(teacher_template=OTHER)),
    ("llama", dict(beta=0.3, length_norm=True, anchor=0.5, accum=2)),
    ("gpt2", dict(preference=0.0, anchor=0.5, accum=2)),
    ("gpt2", dict(beta=0.3, length_norm=True, preference=0.7, accum=8)),
    ("t5", dict(anchor=0.5, accum=2, teacher_template=OTHER)),
    ("t5<gpt2", dict(accum=2)), ("gpt2<t5", dict(anchor=0.5)),
    ("gpt2", dict(refresh=0, accum=2)), ("t5", dict(refresh=0, length_norm=True, anchor=0.3)),
    ("gpt2", dict(lm_coef=0.5, accum=2))])
def test_dpkd_steps_with_the_gradient_of_its_equations(root, kind, changes):
    found = run(settings(root, "dpkd", kind, corpus=str(root / "corpus.txt"), **changes))
    check_dpkd(found, step=0)
    check_dpkd(found, step=1)  # with --refresh 0 still against what the starting student wrote


# ---- gold.py: one run, three rounds of 4 + 4 samples, the scorer f trained before the last two --
#     E(x,y) = - mean_j log sum_v exp f_v(x, y_<j)
#     L = mean over response tokens of  ce_weight CE + reverse_ce_weight (-log 1e-4) (1 - q_y)
@pytest.fixture(scope="module", params=["gpt2", "t5<gpt2"])
def gold(root, request):
    """Two steps of the scorer, then two of the student, on what a random GPT-2 wrote."""
    found = run(settings(root, "gold", request.param), steps=4)
    found.samples = [json.loads(line) for line in open(f"{found.s.out}/samples.jsonl")]
    found.strange = [sample for sample in found.samples if sample.get("energy") is not None]
    return found


def prompt_and_label(s, sample):
    return prompt(f"then {sample['text']}", s.template, s.student), ids(sample["label"]) + [EOS]


def mean_over_tokens(s, f, samples, loss_of_token):
    pairs = [prompt_and_label(s, sample) for sample in samples]
    losses = [loss_of_token(logq) for x, y in pairs for logq in logprobs(f, x, y)]
    return sum(losses) / len(losses)


def test_gold_trains_its_scorer_by_plain_ce_on_all_samples_so_far(gold):
    assert [sample["round"] for sample in gold.samples] == 8 * [0] + 8 * [1] + 8 * [2]
    for step, known in ((0, gold.samples[:8]), (1, gold.samples[:16])):
        f = at(gold.steps[step].before, gold.s.student)
        check(gold, step, mean_over_tokens(gold.s, f, known, lambda logq: -logq), f)


def test_gold_measures_energies_with_the_scorer_of_that_round(gold):
    first, second = gold.steps[:2]
    assert len(gold.strange) == 12
    for i, weights in enumerate((first.before, first.after, second.after)):
        f = at(weights, gold.s.student)
        for sample in gold.strange[4 * i:4 * i + 4]:
            rows = logits(f, *prompt_and_label(gold.s, sample))[:-1]
            energy = -sum(row.exp().sum().log() for row in rows) / len(rows)
            assert sample["energy"] == pytest.approx(energy.item(), rel=1e-4)


def test_gold_shows_the_llm_the_band_of_energies_in_even_rounds_only(gold):
    """Ranks floor(.5 b) to floor(.8 b) - 1, of 4 the third; only round 2 shows any, of round 1."""
    spelled = lambda tokens: " ".join(map(str, tokens))
    prompts = [spelled(prompt) for _, prompt in gold.texts["teacher"]]
    shots = [spelled(ids(f": {sample['label']} {sample['text']} :")) for sample in gold.strange]
    shown = [any(shot in prompt for prompt in prompts) for shot in shots]
    third = sorted(range(4, 8), key=lambda i: gold.strange[i]["energy"])[2]
    assert shown == [i == third for i in range(12)]


def test_golds_scorer_goes_on_with_weights_and_optimizer_and_its_student_is_fresh(gold):
    same = lambda a, b: all(torch.equal(x, y) for x, y in zip(a, b))
    first, second, final, _ = gold.steps
    start = [p.detach().float() for p in loaded(gold.s.student).parameters()]
    assert same(first.before, start) and same(final.before, start)
    assert same(second.before, first.after)
    assert first.optimizer == second.optimizer != final.optimizer
    assert (first.age, second.age, final.age) == (0, 1, 0)


def test_gold_trains_its_student_by_symmetric_ce_on_all_samples(gold):
    s = gold.s
    reverse_ce = lambda logq: -math.log(1e-4) * (1 - logq.exp())
    sce = lambda logq: s.ce_weight * -logq + s.reverse_ce_weight * reverse_ce(logq)
    tokens = sum(len(prompt_and_label(s, sample)[1]) for sample in gold.samples)
    for step in (2, 3):
        q = at(gold.steps[step].before, s.student)
        ce = mean_over_tokens(s, q, gold.samples, lambda logq: -logq)
        check(gold, step, mean_over_tokens(s, q, gold.samples, sce), q, ce=ce, tokens=tokens)


# ---- ddk.py -------------------------------------------------------------------------------------
#     rho = exp(CE_q - CE_p) of each domain,    r_0 = softmax(rho)
#     r_{t+1} = smoothing r_t exp(rho_{t+1}) / sum(..) + (1 - smoothing) / N
#     L = mean over tokens of CE + gamma KL(p_tau || q_tau)
DOMAINS = ("big", "mid", "small")


def packed(s, split):
    """{domain: sequences}: its documents one after the other, none twice, EOS behind each, cut."""
    sequences, n = {}, s.max_tokens
    for name in DOMAINS:
        stream = []
        texts = [json.loads(line)["text"] for line in open(f"{s.data}/{name}.jsonl")]
        for text in dict.fromkeys(texts):
            draw = zlib.crc32(text.encode()) % 1000 / 1000
            own = "test" if draw < s.holdout else "valid" if draw < 2 * s.holdout else "train"
            stream += ids(text) + [EOS] if own == split else []
        sequences[name] = [stream[i:i + n] for i in range(0, len(stream) - n + 1, n)]
    return sequences


def check_ddk(found, step):
    s, tokens, sequences = found.s, [], packed(found.s, "train")
    known = sequences["mid"] if "mid=1" in s.mix else sum(sequences.values(), [])
    drawn = [y for line in found.steps[step].read for y in known if y[:len(line)] == line]
    assert len(drawn) == len(found.steps[step].read) == s.batch_size  # training sequences only
    student, teacher = at(found.steps[step].before, s.student), loaded(s.teacher)
    for y in drawn:  # every token but the first is predicted
        tokens += ce_and_kl(student, teacher, y[:1], y[:1], y[1:], s.tau)
    ce, kl = (sum(term) / len(tokens) for term in zip(*tokens))
    said = {"kl": kl} if s.gamma else {}  # at gamma = 0 the teacher is not asked
    check(found, step, ce + s.gamma * kl, student, ce=ce, tokens=len(tokens), **said)


@pytest.mark.parametrize("kind, changes", [
    ("gpt2", dict(gamma=0.0)), ("llama", dict(gamma=0.3, tau=2.0, accum=2)),
    ("gpt2", dict(interval=1, accum=12)), ("llama", dict(mix="big=0,mid=1,small=0"))])
def test_ddk_steps_with_the_gradient_of_its_equation_on_what_was_drawn(root, kind, changes):
    found = run(settings(root, "ddk", kind, **changes))
    check_ddk(found, step=0)
    check_ddk(found, step=1)


def test_ddk_shares_follow_the_gaps_on_validation_sequences_and_never_on_test_ones(root):
    found = run(settings(root, "ddk", "llama", interval=1, eval_every=1), steps=3)
    s = found.s

    def ce(f, sequences):
        nll = [-logq.item() for y in sequences for logq in logprobs(f, y[:1], y[1:])]
        return sum(nll) / len(nll)

    def gaps(split, step):
        q, p = at(found.steps[step].before, s.student), loaded(s.teacher)
        return [math.exp(ce(q, part) - ce(p, part)) for part in packed(s, split).values()]

    def shares(split):
        """r_1: Eq. 1 on the gaps before step 0, Eq. 2 on those before step 1."""
        first, second = gaps(split, 0), gaps(split, 1)
        r = [math.exp(rho) / sum(map(math.exp, first)) for rho in first]
        psi = [r[i] * math.exp(second[i]) for i in range(3)]
        return [s.smoothing * x / sum(psi) + (1 - s.smoothing) / 3 for x in psi]

    got = [logged(s, 1)[f"valid/share_{name}"] for name in DOMAINS]
    assert got == pytest.approx(shares("valid"), rel=1e-4)
    assert got != pytest.approx(shares("test"), rel=1e-2)  # else the two could not be told apart


# ---- two processes: this file is also the program that torchrun starts --------------------------
@pytest.mark.slow
@pytest.mark.parametrize("script, check_step, changes", [
    ("kd_forward", check_kd, dict(alpha=0.5, teacher_template=OTHER)),
    ("llmr", check_llmr, dict(baseline="mean"))])
def test_two_processes_step_with_the_gradient_of_the_whole_batch(
        root, tmp_path, script, check_step, changes):
    torch.save(settings(root, script, "gpt2", accum=2, **changes), tmp_path / "settings.pt")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*torchrun, __file__, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found, other = (torch.load(tmp_path / f"{i}.pt", weights_only=False) for i in range(2))
    found.texts["student"] |= other.texts["student"]  # each process has drawn its half
    for step in range(2):
        assert torch.equal(found.steps[step].gradient, other.steps[step].gradient)
        check_step(found, step)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    found = run(torch.load(folder / "settings.pt", weights_only=False))
    torch.save(found, folder / f"{os.environ['RANK']}.pt")
