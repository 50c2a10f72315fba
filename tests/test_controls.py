"""The controls: each steps with the gradient of its equation, and is a normal run.

The loops are written as in test_oracle.py, with its tools: plain Python over the unpadded forward
pass of Hugging Face.
"""
import subprocess
import sys
from pathlib import Path

import pytest
import test_oracle as oracle
import torch
import torch.nn.functional as F
from conftest import ROOT
from test_oracle import EOS, OTHER, at, check, loaded, logits, logprobs
from test_runs import outcome, stopped, train

import common
import llmr
from tests.controls import on_policy

root = oracle.root  # the fixture with the data
CONTROLS = {"on_policy": {}, "seqkd_greedy": {}, "dpkd_token": {},
            "llmr_release": dict(sync=2, discard=False)}  # copies its student at step 2


def settings(root, name, kind="gpt2", **changes):
    return oracle.settings(root, f"tests.controls.{name}", kind, **changes)


def responses(found, step):
    """(prompt, the teacher's prompt, response) of each row: the student's, else the teacher's."""
    for x, x_teacher, _ in oracle.train_rows(found.s):
        y = found.texts["student"].get((step, x))
        yield x, x_teacher, y or found.texts["teacher"][0, x_teacher]


# ---- on_policy.py: KL(q||p) on the student's responses, or the weight A_t = log p - log q --------
@pytest.mark.parametrize("kind, changes", [
    ("llama", dict(form="full", teacher_template=OTHER)), ("t5", dict(form="sampled", accum=2)),
    ("gpt2", dict(form="sampled")), ("gpt2", dict(form="full", student_share=0.5, accum=2))])
def test_on_policy_steps_with_the_gradient_of_its_equation(root, kind, changes):
    found = oracle.run(settings(root, "on_policy", kind, **changes))
    for step in range(2):
        student, teacher = at(found.steps[step].before, found.s.student), loaded(found.s.teacher)
        losses, kls = [], []
        for x, x_teacher, y in responses(found, step):
            logq = logits(student, x, y).log_softmax(-1)
            logp = logits(teacher, x_teacher, y).log_softmax(-1).detach()
            for t, token in enumerate(y):
                kls.append(sum(q.exp() * (q - p) for q, p in zip(logq[t], logp[t])))
                advantage = (logp[t, token] - logq[t, token]).item()
                losses.append(kls[-1] if found.s.form == "full" else -advantage * logq[t, token])
        n = len(losses)
        check(found, step, sum(losses) / n, student, kl=sum(kls) / n, tokens=n)
        own = [x for x, _, _ in oracle.train_rows(found.s) if (step, x) in found.texts["student"]]
        assert len(own) == 8 * found.s.student_share


# ---- seqkd_greedy.py: CE on y_t = argmax_v p(v|x,y_<t) -------------------------------------------
@pytest.mark.parametrize("kind, changes", [
    ("llama", dict(teacher_template=OTHER)), ("t5", dict(accum=2)), ("gpt2<t5", {})])
def test_seqkd_greedy_steps_with_the_gradient_of_ce_on_the_teachers_greedy_text(
        root, kind, changes):
    found = oracle.run(settings(root, "seqkd_greedy", kind, **changes))
    for step in range(2):
        student, teacher = at(found.steps[step].before, found.s.student), loaded(found.s.teacher)
        nll = []
        for x, x_teacher, _ in oracle.train_rows(found.s):
            y = []
            while len(y) < found.s.max_response and y[-1:] != [EOS]:
                y.append(int(logits(teacher, x_teacher, y)[-1].argmax()))
            nll += [-logq for logq in logprobs(student, x, y)]
        check(found, step, sum(nll) / len(nll), student, tokens=len(nll))


# ---- dpkd_token.py: margin = beta (log q(a)/q(b) - log p(a)/p(b)), a = argmax p, b = argmax q ----
@pytest.mark.parametrize("kind, changes", [
    ("llama", dict(beta=0.3, preference=0.7, anchor=0.2, teacher_template=OTHER)),
    ("t5", dict(beta=0.1, preference=0.5, anchor=0.5, accum=2)),
    ("gpt2", dict(beta=2.0, preference=1.0, anchor=0.0))])
def test_dpkd_token_steps_with_the_gradient_of_the_released_loss(root, kind, changes):
    found = oracle.run(settings(root, "dpkd_token", kind, **changes))
    s = found.s
    for step in range(2):
        student, teacher, tokens = at(found.steps[step].before, s.student), loaded(s.teacher), []
        for x, x_teacher, _ in oracle.train_rows(s):
            y = found.texts["teacher"][0, x_teacher]
            logq = logits(student, x, y).log_softmax(-1)
            logp = logits(teacher, x_teacher, y).log_softmax(-1).detach()
            for t, token in enumerate(y):
                a, b = logp[t].argmax(), logq[t].argmax()
                margin = s.beta * (logq[t, a] - logq[t, b] - (logp[t, a] - logp[t, b]))
                prefer = (1 + (-margin).exp()).log()
                tokens.append((prefer, -logq[t, token], margin, float(a == b)))
        prefer, ce, margin, agree = (sum(values) / len(tokens) for values in zip(*tokens))
        assert 0 < agree < 1  # else half of the rule is not tried
        check(found, step, s.preference * prefer + s.anchor * ce, student, preference=prefer,
              ce=ce, margin=margin, agree=agree, tokens=len(tokens))


# ---- llmr_release.py: Eqs. 5' and 6' of its docstring --------------------------------------------
@pytest.mark.parametrize("kind, changes", [
    ("gpt2", dict(sync=2, top_k=3, denom=3.0, reward_clip=0.5, discard=True, entropy=0.1)),
    ("t5", dict(sync=1, top_k=5, denom=2.0, reward_clip=0.0, discard=True, accum=2)),
    ("llama", dict(sync=1, top_k=0, denom=2.0, reward_clip=1.0, discard=False, entropy=0.2))])
def test_llmr_release_steps_with_the_gradient_of_its_rules(root, kind, changes):
    s = settings(root, "llmr_release", kind, value="max", max_response=20, **changes)
    found = oracle.run(s)
    for step in range(2):
        student, teacher = at(found.steps[step].before, s.student), loaded(s.teacher)
        b = at(found.steps[step - step % s.sync].before, s.student)
        rows = list(responses(found, step))
        kept = [row for row in rows if row[2][-1] == EOS or not s.discard]
        assert len(kept) > 1 and (len(kept) < len(rows) or not s.discard)
        count = len(rows) * (sum(len(y) for _, _, y in kept) / len(kept) if s.discard else 1)
        loss, clipped = 0.0, 0
        for x, x_teacher, y in kept:
            f, z = logits(teacher, x_teacher, y).detach(), logits(student, x, y)
            q = [f[t] - f[t].mean() for t in range(len(y))]
            r = [q[t][a] - (q[t + 1].max() if t + 1 < len(y) else 0) for t, a in enumerate(y)]
            old = logits(b, x, y).detach()
            for t, a in enumerate(y):
                logq = z[t].log_softmax(-1)
                of_sampler = sorted(old[t].tolist())[-(s.top_k or len(old[t])):]
                logb = old[t, a] - torch.tensor(of_sampler).double().logsumexp(-1)
                weight = (logq[a] - logb).exp().item() * sum(r[t:]).item() / s.denom
                if s.reward_clip:
                    clipped += abs(weight) > s.reward_clip
                    weight = max(-s.reward_clip, min(s.reward_clip, weight))
                uniform = z[t].logsumexp(-1) - z[t].mean()
                loss = loss + (-weight * logq[a] + s.entropy * uniform) / count
        assert clipped or not s.reward_clip
        check(found, step, loss, student, tokens=sum(len(y) for _, _, y in rows))


def test_without_its_rules_llmr_release_is_llmr(root):
    off = dict(value="max", sync=1, top_k=0, denom=1.0, reward_clip=0.0, discard=False)
    ours = oracle.run(settings(root, "llmr_release", **off)).steps
    theirs = oracle.run(oracle.settings(root, "llmr", "gpt2")).steps
    assert all(torch.allclose(a.gradient, b.gradient) for a, b in zip(ours, theirs))


# ---- runs ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", CONTROLS)
def test_a_control_that_was_killed_ends_bit_by_bit_where_it_would_have_ended(root, name):
    whole, killed = (settings(root, name, steps=6, save_every=3, **CONTROLS[name])
                     for _ in range(2))
    train(whole)
    train(stopped(killed, at=4))
    assert outcome(whole.out) == outcome(killed.out)
    files = {file.name for file in Path(whole.out).iterdir()}
    assert files >= {"settings.json", f"{name}.py", "checkpoint.pt", "generations.jsonl"}


def test_the_expected_gradient_of_the_sampled_form_is_that_of_the_full_kl():
    generator = torch.Generator().manual_seed(0)
    z, f = (torch.randn(5, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    z.requires_grad_()  # five prefixes, a vocabulary of four tokens
    kl, _ = on_policy.reverse_kl_loss(z, f, None, "full")
    wanted, = torch.autograd.grad(kl.sum(), z)
    expected = torch.zeros_like(z)
    for token in range(4):
        targets = torch.full((5,), token)
        loss, same_kl = on_policy.reverse_kl_loss(z, f, targets, "sampled")
        probability = z.softmax(-1)[:, token].detach()  # of drawing this token
        expected += torch.autograd.grad((probability * loss).sum(), z)[0]
        assert torch.equal(same_kl, kl)
    assert torch.allclose(expected, wanted, atol=1e-12)
    assert wanted.abs().max() > 0.1


def test_llmr_with_lse_values_less_log_q_and_without_return_to_go_is_the_sampled_form():
    """G_t - V(s_t) sums log p of this token and of all later ones; the later ones are taken off."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([3, 5])
    z, f = (torch.randn(8, 6, dtype=torch.float64, generator=generator) for _ in range(2))
    targets = torch.randint(6, (8,), generator=generator)
    values = llmr.teacher_values(f, targets, "lse")
    action_value, state_value, _ = (llmr.pad_responses(v, lengths) for v in values)
    reward = llmr.induced_reward(action_value, state_value, lengths)
    to_go = llmr.returns_to_go(reward) - state_value  # --baseline value
    this = to_go - F.pad(to_go[:, 1:], (0, 1))
    inside = torch.arange(5) < lengths[:, None]
    logq = common.log_softmax_at(z.requires_grad_(), targets)
    weights = llmr.policy_weights(this[inside] - logq, logq, logq)
    sampled, _ = on_policy.reverse_kl_loss(z, f, targets, "sampled")
    assert torch.allclose(-weights * logq, sampled)
    gradients = [torch.autograd.grad(loss.sum(), z, retain_graph=True)[0]
                 for loss in (-weights * logq, sampled)]
    assert torch.allclose(*gradients)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONTROLS)
def test_a_control_runs_as_a_file_and_as_a_module(root, name, tmp_path):
    s = settings(root, name)
    flags = ["--teacher", s.teacher, "--student", s.student, "--data", s.data, "--steps", "2",
             "--batch-size", "4", "--max-prompt", "24", "--max-response", "8", "--eval-rows", "1"]
    flags += ["--no-discard"] if name == "llmr_release" else []  # random models seldom end
    for i, command in enumerate(([f"tests/controls/{name}.py"], ["-m", f"tests.controls.{name}"])):
        done = subprocess.run([sys.executable, *command, *flags, "--out", str(tmp_path / str(i))],
                              cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
