"""tests/controls: each control's loss against its equation, what it shares with the file it is a copy of, a short run."""
import difflib
import importlib
import itertools
import json
import math
import random

import pytest
import torch
from conftest import ROOT, SMALL_GOLD, make_gold_world, small_run
from transformers import AutoTokenizer

import common
from tests.controls import dpkd_token, gold_noise, gold_padded, llmr_release, reverse_kl, seqkd_greedy, seqkd_smooth

pytestmark = pytest.mark.slow  # rivals, not the five files: they run in CI beside the quick tests
CPU = torch.device("cpu")
EOS = 0
PARENTS = {  # control: the file that it is a copy of, and how many of its lines behind the docstring are its own
    "reverse_kl": ("kd_forward", 45), "dpkd_token": ("kd_forward", 40), "seqkd_greedy": ("kd_forward", 25),
    "seqkd_smooth": ("kd_forward", 55), "llmr_release": ("llmr", 75), "gold_noise": ("gold", 20),
    "gold_padded": ("gold", 12), "gold_real": ("gold", 30),
}
CONTROLS = [f.stem for f in sorted((ROOT / "tests/controls").glob("*.py"))]


@pytest.fixture
def control_config(pair, rows_file, tmp_path):
    """control_config(module, kind="gpt2", **settings) -> its Config for a run of a second."""
    return lambda module, kind="gpt2", **settings: small_run(
        module.Config, pair(kind), rows_file, tmp_path / "run", **settings)


@pytest.fixture
def gold_config(any_root, tmp_path):
    """gold_config(module, kind="reviews", **settings), with the tiny LLM of any_run."""
    def make(module, kind="reviews", **settings):
        root = make_gold_world(any_root / "gold", kind)
        chosen = {**SMALL_GOLD, "task": kind, **settings}
        chosen = {k: v for k, v in chosen.items() if hasattr(module.Config, k)}
        return small_run(module.Config, (root / "teacher", root / "student"), root / "data", tmp_path / "run", **chosen)
    return make


def records(cfg, key):
    return [r for r in map(json.loads, open(f"{cfg.out}/log.jsonl")) if key in r]


def random_rows(n=40, V=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    draw = lambda: 2 * torch.randn(n, V, generator=g, dtype=torch.double)
    return draw(), draw(), torch.randint(V, (n,), generator=g)


def log_softmax(z):
    total = math.log(sum(math.exp(w) for w in z))
    return [v - total for v in z]


# ---------------------------------------------------------------------------------------------------------------
# Copies, and no more than that
# ---------------------------------------------------------------------------------------------------------------
def test_every_control_has_a_parent():
    assert sorted(PARENTS) == CONTROLS


def code(file):
    return file.read_text().split('"""\n', 1)[1].splitlines()  # behind the docstring


@pytest.mark.parametrize("name", CONTROLS)
def test_a_control_is_its_parent_with_few_lines_of_its_own(name):
    """A change of the method file must reach its copies: what is not the control's own stands in both."""
    parent, most = PARENTS[name]
    theirs, ours = code(ROOT / f"{parent}.py"), code(ROOT / f"tests/controls/{name}.py")
    own = [x for x in difflib.ndiff(theirs, ours) if x.startswith("+ ") and x[2:].strip()]
    assert len(own) <= most, f"{len(own)} lines of {name}.py are not in {parent}.py:\n" + "\n".join(own)


@pytest.mark.parametrize("name", CONTROLS)
def test_the_docstring_has_an_equation_commands_and_what_it_is_held_against(name):
    doc = importlib.import_module(f"tests.controls.{name}").__doc__
    assert doc.startswith("Control: ") and f"python -m tests.controls.{name}" in doc
    assert f"tests/controls/{name}.py`" in doc and "Held against: " in doc and "What to watch: " in doc and " = " in doc


# ---------------------------------------------------------------------------------------------------------------
# Equations
# ---------------------------------------------------------------------------------------------------------------
def test_reverse_kl_equals_the_equation_in_loops():
    q, p, y = random_rows()
    loss, other = reverse_kl.reverse_kl_loss(q, p, y)
    for i in range(40):
        logq, logp = log_softmax(q[i].tolist()), log_softmax(p[i].tolist())
        assert loss[i].item() == pytest.approx(sum(math.exp(a) * (a - b) for a, b in zip(logq, logp)))
        assert other[i].item() == pytest.approx(sum(math.exp(b) * (b - a) for a, b in zip(logq, logp)))


def test_reverse_kl_has_no_gradient_where_the_student_is_the_teacher():
    _, p, y = random_rows()
    q = p.clone().requires_grad_()
    loss = reverse_kl.reverse_kl_loss(q, p, y)[0]
    assert loss.abs().max() < 1e-12 and torch.autograd.grad(loss.sum(), q)[0].abs().max() < 1e-12


def test_the_token_loss_moves_exactly_two_logits():
    q, p, y = random_rows()
    q.requires_grad_()
    loss, preference, ce, margin, agree = dpkd_token.token_preference_loss(q, p, y, 0.4, 1.0, 0.0)
    a, b = p.argmax(-1), q.argmax(-1)
    grad = torch.autograd.grad(loss.sum(), q)[0]
    assert margin.max() == 0 and torch.equal(agree == 1, a == b) and 0 < agree.sum() < 40
    assert (loss >= math.log(2) - 1e-15).all() and torch.equal(loss, preference)
    assert torch.equal((grad != 0).sum(-1), torch.where(a == b, 0, 2))
    for i in range(40):  # the gradient of the spec, and the loss with all its log-softmaxes written out
        lq, lp = log_softmax(q[i].tolist()), log_softmax(p[i].tolist())
        delta = 0.4 * ((lq[a[i]] - lq[b[i]]) - (lp[a[i]] - lp[b[i]]))
        assert margin[i].item() == pytest.approx(delta, abs=1e-12) and ce[i].item() == pytest.approx(-lq[y[i]])
        assert loss[i].item() == pytest.approx(math.log(1 + math.exp(-delta)))
        wanted = torch.zeros(6).double()
        wanted[a[i]] -= 0.4 / (1 + math.exp(delta))
        wanted[b[i]] += 0.4 / (1 + math.exp(delta))
        assert torch.allclose(grad[i], wanted, atol=1e-14)
    mixed = dpkd_token.token_preference_loss(q, p, y, 0.4, 0.5, 0.25)[0]
    assert torch.allclose(mixed, 0.5 * preference + 0.25 * ce)


def test_smoothing_equals_the_equation_in_loops_and_that_of_torch():
    q, _, y = random_rows()
    for s in (0.0, 0.1, 1.0):
        loss, ce = seqkd_smooth.smoothed_loss(q, y, s)
        for i in range(40):
            logq = log_softmax(q[i].tolist())
            spread = sum(-x / 6 for x in logq)
            assert loss[i].item() == pytest.approx((1 - s) * -logq[y[i]] + s * spread)
            assert ce[i].item() == pytest.approx(-logq[y[i]])
        theirs = torch.nn.functional.cross_entropy(q, y, reduction="none", label_smoothing=s)
        assert torch.allclose(loss, theirs)


def test_greedy_seqkd_is_cross_entropy():
    q, _, y = random_rows()
    assert torch.allclose(seqkd_greedy.seqkd_loss(q, y)[0], torch.nn.functional.cross_entropy(q, y, reduction="none"))


def test_the_best_student_is_the_one_with_the_least_kl():
    """A planted sequence of scores: the worst, the last and the first of two equal ones must not be kept for the best."""
    best, model = seqkd_smooth.Best(), torch.nn.Linear(1, 1, bias=False)
    for step, kl in enumerate([3.0, 1.0, 2.0, 1.0, 5.0]):
        model.weight.data.fill_(step)
        best.look(kl, step, model)
    assert (best.kl, best.step, best.weights["weight"].item()) == (1.0, 1, 1.0)
    again = seqkd_smooth.Best()
    again.load_state_dict(best.state_dict())
    assert vars(again) == vars(best)


def test_planted_noise_makes_the_share_of_labels_wrong_and_nothing_else():
    words, samples = ["a", "b", "c"], [{"text": f"{i}", "label": "abc"[i % 3]} for i in range(3000)]
    noisy = gold_noise.with_noise(samples, words, 0.2, random.Random(0))
    wrong = [(s, n) for s, n in zip(samples, noisy) if s != n]
    assert len(wrong) == pytest.approx(600, abs=70) and [s["text"] for s in noisy] == [s["text"] for s in samples]
    assert all(n["label"] in words for n in noisy)
    moved = [(s["label"], n["label"]) for s, n in wrong]
    assert all(moved.count(pair) > 50 for pair in itertools.permutations(words, 2))
    assert gold_noise.with_noise(samples, words, 0.0, random.Random(0)) == samples


# ---------------------------------------------------------------------------------------------------------------
# The release of LLMR
# ---------------------------------------------------------------------------------------------------------------
def rollouts(B=5, N=6, V=7, seed=0):
    """Random logits at every state of B padded responses of different lengths, some without an end: (B,N+1,V), tokens
    (B,N), lengths, ended. What lies beyond a response is random too."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(B, N + 1, V, generator=g, dtype=torch.double) * 3
    tokens = torch.randint(1, V, (B, N), generator=g)
    lengths = torch.randint(1, N + 1, (B,), generator=g)
    ended = torch.rand(B, generator=g) < 0.6
    lengths[~ended] = N
    tokens[ended, lengths[ended] - 1] = EOS
    return logits, tokens, lengths, ended


def values(logits, tokens, value):
    """(B,N+1,V), (B,N) -> action value (B,N), state value (B,N+1), advantage (B,N), by the script's function."""
    B, N1, V = logits.shape
    padded = torch.cat([tokens, torch.zeros(B, 1, dtype=torch.long)], -1)
    q, v, a = (x.view(B, N1) for x in llmr_release.teacher_values(logits.view(-1, V), padded.view(-1), value))
    return q[:, :-1], v, a[:, :-1]


def loss_by_loops(logits, tokens, lengths, ended, logq, logb, value, baseline, denom, clip, cut, discard):
    """The equations of the docstrings of llmr.py and llmr_release.py, one number at a time."""
    B, all_returns, all_v = len(lengths), [], []
    for i in range(B):
        n, r, v = int(lengths[i]), [], []
        f = [[x - sum(z) / len(z) for x in z] for z in logits[i].tolist()]
        for z in f:
            Z = sum(math.exp(x) for x in z)
            v.append({"max": max(z), "lse": math.log(Z), "mean": sum(math.exp(x) / Z * x for x in z)}[value])
        for t in range(n):
            if t < n - 1:
                after = v[t + 1]
            else:
                after = 0.0 if ended[i] or cut == "optimal" else v[n]
            r.append(f[t][int(tokens[i, t])] - after)
        all_returns.append([sum(r[t:]) for t in range(n)])
        all_v.append(v)
    kept = [i for i in range(B) if ended[i] or not discard]
    total = 0.0
    for i in kept:
        for t in range(int(lengths[i])):
            b = 0.0
            if baseline == "value":
                b = all_v[i][t]
            if baseline == "mean":
                others = [g for j in kept if j != i for g in all_returns[j]]
                b = sum(others) / max(1, len(others))
            rho = 1.0 if logb is None else math.exp(logq[i, t].item() - logb[i, t].item())
            w = rho * (all_returns[i][t] - b) / denom
            total -= (max(-clip, min(clip, w)) if clip else w) * logq[i, t].item()
    return total / (sum(int(lengths[i]) for i in kept) * B / len(kept) if discard else B)


def loss_of(logits, tokens, lengths, ended, logq, logb, value, baseline, denom, clip, cut, discard):
    """The same by the script's functions, composed as in its loop."""
    q, v, _ = values(logits, tokens, value)
    inside = torch.arange(tokens.shape[1]) < lengths[:, None]
    mask, count = llmr_release.counted_tokens(inside, ended, discard)
    reward = llmr_release.induced_reward(q, v, lengths, ended | (cut == "optimal"))
    returns = llmr_release.returns_to_go(reward)
    centred = (returns - llmr_release.return_baseline(returns, v, mask, baseline)) / denom * mask
    stale = None if logb is None else logb[inside]
    weights = llmr_release.policy_weights(centred[inside], logq[inside], stale, clip)
    return llmr_release.policy_gradient_loss(logq[inside], weights) / count


@pytest.mark.parametrize("value", ["max", "mean", "lse"])
@pytest.mark.parametrize("baseline", ["none", "value", "mean"])
@pytest.mark.parametrize("stale, denom, clip, cut, discard", [
    (False, 1.0, 0.0, "optimal", False), (True, 1.0, 0.0, "value", False), (True, 5.0, 0.7, "optimal", True)])
def test_the_releases_loss_equals_the_equations(value, baseline, stale, denom, clip, cut, discard):
    roll = rollouts(seed=3)
    assert roll[3].any() and not roll[3].all()
    logq, logb = (-torch.rand(5, 6, dtype=torch.double) * 3 for _ in range(2))
    args = (*roll, logq, logb if stale else None, value, baseline, denom, clip, cut, discard)
    assert float(loss_of(*args)) == pytest.approx(loss_by_loops(*args), rel=1e-6 if discard else 1e-10)


def test_what_lies_beyond_a_response_changes_nothing():
    """Padding after EOS may be anything, NaN too; a cut response needs the state after it, and no other, for -V."""
    logits, tokens, lengths, ended = rollouts(B=40, N=6)
    inside = torch.arange(6) < lengths[:, None]
    q, v, _ = values(logits, tokens, "max")
    garbage_q, garbage_v = q.masked_fill(~inside, math.nan), v.clone()
    garbage_v[:, :6][~inside], garbage_v[ended & (lengths == 6), 6] = math.nan, math.nan
    for flag in (ended, ended | True):
        reward = llmr_release.induced_reward(q, v, lengths, flag)
        assert torch.equal(reward, llmr_release.induced_reward(garbage_q, garbage_v, lengths, flag))
        assert (reward[~inside] == 0).all()


def test_the_last_position_does_not_wrap_around():
    """A cut response subtracts the value after it, an ended one nothing; torch.roll would subtract V(s_1)."""
    q, v = torch.tensor([[1.0, 2.0]] * 2), torch.tensor([[100.0, 10.0, 5.0]] * 2)
    reward = llmr_release.induced_reward(q, v, torch.tensor([2, 2]), torch.tensor([False, True]))
    assert reward.tolist() == [[1 - 10, 2 - 5], [1 - 10, 2]]


class Tree:
    """Every response of at most N tokens over V tokens, 0 ends it: small enough to enumerate."""

    def __init__(self, V=3, N=3, seed=0, scale=2.0):
        g = torch.Generator().manual_seed(seed)
        self.V, self.N = V, N
        self.states = [s for n in range(N + 1) for s in itertools.product(range(1, V), repeat=n)]
        self.place = {s: i for i, s in enumerate(self.states)}
        self.responses = [s + (EOS,) if len(s) < N else s for s in self.states]
        rand = lambda: torch.randn(len(self.states), V, generator=g, dtype=torch.double)
        self.f, self.theta = rand() * scale, rand()  # the teacher's logits, the student's
        self.shift = rand()[:, :1] * 3               # c(s)
        self.lengths = torch.tensor([len(y) for y in self.responses])
        self.ended = torch.tensor([y[-1] == EOS for y in self.responses])
        self.tokens = torch.tensor([list(y) + [EOS] * (N - len(y)) for y in self.responses])
        ids = [[self.place.get(y[:t], 0) for t in range(N + 1)] for y in self.responses]  # 0 beyond EOS: never used
        self.at = torch.tensor(ids)  # (B,N+1)
        self.inside = torch.arange(N) < self.lengths[:, None]

    def logq(self, theta):
        logq = theta.log_softmax(-1)[self.at[:, :-1]]
        return logq.gather(-1, self.tokens[..., None])[..., 0]  # (B,N)

    def rewards(self, f, cut="optimal", centre=True):
        """Of all responses; without centring, straight from the logits or log-probs f."""
        if centre:
            q, v, _ = values(f[self.at], self.tokens, "max")
        else:
            q, v = f[self.at[:, :-1]].gather(-1, self.tokens[..., None])[..., 0], f.amax(-1)[self.at]
        return llmr_release.induced_reward(q, v, self.lengths, self.ended | (cut == "optimal")), v

    def expected_gradient(self, f, baseline="none", cut="optimal", discard=False, centre=True, B=1):
        """E over batches of B samples of the gradient of the script's loss: exact, by enumeration."""
        theta = self.theta.clone().requires_grad_()
        logq = self.logq(theta)
        chance = (logq * self.inside).sum(-1).exp().detach()
        reward, v = self.rewards(f, cut=cut, centre=centre)
        returns = llmr_release.returns_to_go(reward)
        total = 0.0
        for ids in itertools.product(range(len(self.responses)), repeat=B):
            ids = list(ids)
            ended, inside = self.ended[ids], self.inside[ids]
            if discard and not ended.any():
                continue
            mask, count = llmr_release.counted_tokens(inside, ended, discard)
            centred = (returns[ids] - llmr_release.return_baseline(returns[ids], v[ids], mask, baseline)) * mask
            weights = llmr_release.policy_weights(centred[inside], logq[ids][inside], None, 0.0)
            loss = llmr_release.policy_gradient_loss(logq[ids][inside], weights) / count
            total = total + chance[ids].prod() * loss
        return torch.autograd.grad(total, theta)[0]

    def exact_gradient(self, f, cut="optimal"):
        """Autograd through the expected return, sum over responses of q(y|x) sum_t r_t, itself."""
        theta = self.theta.clone().requires_grad_()
        chance = (self.logq(theta) * self.inside).sum(-1).exp()
        return torch.autograd.grad(-(chance * self.rewards(f, cut)[0].sum(-1)).sum(), theta)[0]


def off(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("cut", ["optimal", "value"])
@pytest.mark.parametrize("baseline, B", [("none", 1), ("value", 1), ("none", 2), ("mean", 2)])
def test_policy_gradient_is_the_gradient_of_the_expected_return(baseline, B, cut):
    """With all of the release's rules off but --cut. No baseline changes the expectation."""
    tree = Tree(N=2 if B > 1 else 3, seed=1)
    assert (~tree.ended).any()
    assert off(tree.expected_gradient(tree.f, baseline, cut, B=B), tree.exact_gradient(tree.f, cut=cut)) < 1e-12


def test_discarding_and_the_cut_value_break_the_shift_invariance():
    """A constant added to the logits of a state changes no expected gradient with the release's rules off. Under
    --discard, and with -V of the state after a cut response, it does: c(s) is no baseline then."""
    tree = Tree()
    shifted = tree.f + tree.shift
    want = tree.expected_gradient(tree.f, centre=False)
    for f, centre in ((shifted, False), (tree.f.log_softmax(-1), False), (tree.f, True)):
        assert off(tree.expected_gradient(f, centre=centre), want) < 1e-12
    for wrong in (dict(discard=True), dict(cut="value")):
        want = tree.expected_gradient(tree.f, centre=False, **wrong)
        assert off(tree.expected_gradient(shifted, centre=False, **wrong), want) > 0.05
        assert off(tree.expected_gradient(tree.f, centre=True, **wrong), want) > 0.01


def test_dividing_by_sampled_tokens_alone_breaks_the_shift_invariance_too():
    """Nothing is cut here: the student always ends at the last place. Only the number of tokens differs."""
    tree = Tree(seed=2)
    last = torch.tensor([len(s) >= tree.N - 1 for s in tree.states])
    tree.theta[last, 1:] = -1e9
    gradient = lambda f, discard: tree.expected_gradient(f, discard=discard, centre=False)
    same, broken = (off(gradient(tree.f + tree.shift, d), gradient(tree.f, d)) for d in (False, True))
    assert same < 1e-12 and broken > 0.05


def test_weights_are_clipped_behind_the_ratio_and_have_no_gradient():
    g, logb = torch.tensor([2.0, -3.0]), torch.tensor([-1.5, -1.0])
    logq = torch.tensor([-1.0, -2.0], requires_grad=True)
    assert torch.equal(llmr_release.policy_weights(g, logq, None, 0.0), g)
    stale = llmr_release.policy_weights(g, logq, logb, 0.0)
    assert not stale.requires_grad
    assert stale.tolist() == pytest.approx([2 * math.exp(0.5), -3 * math.exp(-1.0)])
    assert llmr_release.policy_weights(g, logq, logb, 1.5).tolist() == pytest.approx([1.5, -3 * math.exp(-1.0)])
    llmr_release.policy_gradient_loss(logq, stale).backward()
    assert logq.grad.tolist() == pytest.approx((-stale).tolist())  # stop-gradient: rho has none


def test_entropy_term_is_the_cross_entropy_to_the_uniform_distribution():
    z = torch.randn(4, 7, dtype=torch.double)
    logq = z.log_softmax(-1)
    kl = ((1 / 7) * (math.log(1 / 7) - logq)).sum(-1)
    assert torch.allclose(llmr_release.cross_entropy_to_uniform(z), kl + math.log(7))


# ---------------------------------------------------------------------------------------------------------------
# Whole runs
# ---------------------------------------------------------------------------------------------------------------
@pytest.fixture
def some_end(monkeypatch):
    """Random models hardly ever end a response: every other sample gets an EOS at its third place."""
    real = common.sample

    def sample(model, prompts, *a, **k):
        responses, logb = real(model, prompts, *a, **k)
        return ([r[:2] + [k["eos"]] if i % 2 else r for i, r in enumerate(responses)],
                [b[:3] if i % 2 else b for i, b in enumerate(logb)])
    monkeypatch.setattr(common, "sample", sample)


@pytest.mark.parametrize("kind", ["gpt2", pytest.param("t5", marks=pytest.mark.slow)])
def test_reverse_kl_runs_and_falls(control_config, kind):
    cfg = control_config(reverse_kl, kind, steps=8, lr=3e-3, eval_rows=100, teacher_template="Sort: {prompt} =\\n")
    result = reverse_kl.train(cfg)
    assert result["after.kl_qp"] < result["before.kl_qp"] and result["method"] == "reverse_kl"
    assert all(0 <= r["no_end"] <= 1 and r["loss"] > 0 for r in records(cfg, "loss"))


def test_reverse_kl_learns_on_text_that_the_student_has_just_written(control_config, monkeypatch):
    drawn, real = [], common.answer_examples
    monkeypatch.setattr(common, "answer_examples", lambda *a, **k: drawn.append((k.get("seed"), len(a[1]), a[0])) or real(*a, **k))
    cfg = control_config(reverse_kl, seed=3, steps=3)
    reverse_kl.train(cfg)
    steps = [d for d in drawn if d[1] == cfg.batch_size]
    assert [seed for seed, _, _ in steps] == [3 * 10**9 + step for step in range(3)]
    assert all(not model.training and model.lm_head.weight.requires_grad for _, _, model in steps)


@pytest.mark.parametrize("name", ["reverse_kl", "dpkd_token", "seqkd_greedy", "seqkd_smooth"])
def test_accumulation_gives_one_result(control_config, tmp_path, name):
    module, runs = importlib.import_module(f"tests.controls.{name}"), []
    for accum in (1, 4):
        cfg = control_config(module, "llama", steps=2, accum=accum, out=str(tmp_path / str(accum)))  # it has no dropout
        module.train(cfg)
        runs.append(records(cfg, "loss"))
    for a, b in zip(*runs):
        assert all(a[k] == pytest.approx(b[k], rel=2e-3) for k in ("loss", "grad_norm"))


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_dpkd_token_runs(control_config, kind):
    cfg = control_config(dpkd_token, kind, steps=8, lr=3e-3)
    result = dpkd_token.train(cfg)
    jeffreys = lambda when: result[f"{when}.kl_pq"] + result[f"{when}.kl_qp"]
    assert jeffreys("after") < jeffreys("before")
    steps = records(cfg, "loss")
    assert all(r["margin"] <= 0 and 0 <= r["agree"] <= 1 and r["preference"] >= math.log(2) - 1e-6 for r in steps)
    assert all(r["loss"] == pytest.approx(0.5 * r["preference"] + 0.5 * r["ce"], rel=1e-5) for r in steps)


def test_greedy_seqkd_trains_on_what_the_teacher_says_greedily(control_config, monkeypatch):
    seen, real = [], common.Batches
    monkeypatch.setattr(common, "Batches", lambda examples, *a: seen.append(examples) or real(examples, *a))
    cfg = control_config(seqkd_greedy, teacher_template="Sort: {prompt} =\\n")
    result = seqkd_greedy.train(cfg)
    assert result["after.ce"] > 0
    student, teacher, tokenizer = common.load_pair(cfg, CPU)
    data = common.load_data(cfg, student, teacher, tokenizer)
    assert len(seen[0]) == len(data.train)
    for e, had in zip(data.train[:5], seen[0]):
        tokens = list(e.teacher_prompt)
        for t in had.response:
            logits = teacher(input_ids=torch.tensor([tokens])).logits[0, -1, :teacher.vocab]
            assert logits.argmax().item() == t
            tokens.append(t)


def test_smooth_seqkd_keeps_the_student_of_the_best_evaluation(control_config, monkeypatch):
    """By planted scores: the best is the one at step 4 of 8; what is saved has its weights, and says so."""
    kept, real, kls = [], common.make_evaluator, iter([5.0, 3.0, 1.0, 2.0, 4.0])
    cfg = control_config(seqkd_smooth, steps=8, lr=3e-3, eval_every=2)

    def make(*a):
        evaluate, made = real(*a), len(kept)
        kept.append(None)

        def planted(model):
            m = evaluate(model)
            if made == 0:  # on validation rows
                m["kl_pq"] = next(kls)
                kept.append(model.lm_head.weight.detach().clone())
            return m
        return planted
    monkeypatch.setattr(common, "make_evaluator", make)
    result = seqkd_smooth.train(cfg)
    student = common.load_model(f"{cfg.out}/student", CPU)
    weights = [w for w in kept if w is not None]
    assert result["best_step"] == 4 and len(weights) == 5
    assert torch.equal(student.lm_head.weight, weights[2]) and not torch.equal(weights[2], weights[4])


@pytest.mark.slow
def test_smooth_seqkd_resumes_bitwise(control_config, resumes_bitwise):
    resumes_bitwise(seqkd_smooth.train, control_config(seqkd_smooth, steps=5, lr=3e-2, eval_every=1))


def test_few_texts_are_a_folder_with_a_short_train_file(control_config, rows_file, tmp_path, capsys):
    """As in the docstring of seqkd_smooth: valid and test as they are."""
    rows = rows_file.read_text().splitlines(keepends=True)
    for split, part in (("train", rows[:4]), ("valid", rows[40:50]), ("test", rows[50:60])):
        (tmp_path / f"{split}.jsonl").write_text("".join(part))
    seqkd_smooth.train(control_config(seqkd_smooth, data=str(tmp_path), steps=2))
    said = capsys.readouterr().out
    assert "data: 4 training prompts" in said and "teacher responses: 4," in said


@pytest.mark.parametrize("kind, settings", [
    ("gpt2", dict(baseline="value", sync=2, top_k=5, entropy=0.01, accum=2, discard=False)),
    ("t5", dict(value="mean", baseline="mean", reward_clip=5.0, denom=2.0)),
    ("qwen2", dict(value="lse", dtype="bfloat16", discard=False, cut="value", sync=1, top_k=0))])
def test_llmr_release_runs(control_config, some_end, kind, settings):
    cfg = control_config(llmr_release, kind, **settings)
    result = llmr_release.train(cfg)
    assert math.isfinite(result["after.kl_qp"]) and result["after.kl_pq"] != result["before.kl_pq"]
    steps = records(cfg, "loss")
    assert len(steps) == 4 and all(r["advantage"] <= 0 <= r["nll"] and 0 <= r["no_end"] <= 1 for r in steps)


def test_llmr_release_with_its_rules_off_is_llmr(control_config, some_end, pair, rows_file, tmp_path):
    import llmr
    off = dict(value="max", discard=False, cut="optimal", sync=1, top_k=0, denom=1.0, reward_clip=0.0)
    ours = control_config(llmr_release, **off)
    theirs = small_run(llmr.Config, pair("gpt2"), rows_file, tmp_path / "llmr")
    llmr_release.train(ours)
    llmr.train(theirs)
    for a, b in zip(records(ours, "loss"), records(theirs, "loss"), strict=True):
        assert all(a[k] == pytest.approx(b[k], rel=1e-4) for k in ("loss", "advantage", "length", "nll", "grad_norm"))


def test_llmr_release_accumulates(control_config, some_end, tmp_path):
    """With the mean baseline, which must not be a mean of a micro-batch, and different numbers of tokens."""
    runs = []
    for accum in (1, 4):
        cfg = control_config(llmr_release, "llama", accum=accum, steps=1, baseline="mean", entropy=0.01, top_k=0,
                             denom=1.0, reward_clip=0.0, out=str(tmp_path / f"{accum}"))
        llmr_release.train(cfg)
        runs.append(records(cfg, "loss")[0])
    for key in ("loss", "grad_norm", "advantage", "nll", "return"):
        assert runs[0][key] == pytest.approx(runs[1][key], rel=1e-4), key


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_llmr_release_scores_like_one_response_at_a_time(control_config, kind, monkeypatch):
    """What the loop hands to the loss, against the teacher's own forward, unpadded, the state after a cut response too."""
    seen, drawn, real, real_sample = [], [], llmr_release.induced_reward, common.sample
    monkeypatch.setattr(llmr_release, "induced_reward", lambda *a: seen.append((a, real(*a))) or seen[-1][1])
    monkeypatch.setattr(common, "sample", lambda *a, **k: drawn.append((a[1], real_sample(*a, **k))) or drawn[-1][1])
    cfg = control_config(llmr_release, kind, steps=1, cut="value", discard=False, value="max", sync=1, top_k=0,
                         max_response=6, teacher_template="Sort: {prompt} =")
    llmr_release.train(cfg)
    student, teacher, tokenizer = common.load_pair(cfg, CPU)
    data, eos = common.load_data(cfg, student, teacher, tokenizer), tokenizer.eos_token_id
    view = {tuple(e.prompt): e.teacher_prompt for e in data.train}
    prompts, (responses, _) = next(d for d in drawn if len(d[0]) == cfg.batch_size and tuple(d[0][0]) in view)
    assert any(r[-1] != eos for r in responses)  # 6 tokens are few for a random model
    (_, _, lengths, ended), reward = seen[0]
    order = sorted(range(8), key=lambda i: len(prompts[i]) + len(responses[i]))
    for line, i in enumerate(order):
        x, y = view[tuple(prompts[i])], responses[i]
        assert (lengths[line], bool(ended[line])) == (len(y), y[-1] == eos)
        if kind == "t5":
            z = teacher(input_ids=torch.tensor([x]), decoder_input_ids=torch.tensor([[0] + y])).logits[0, :, :teacher.vocab]
        else:
            z = teacher(input_ids=torch.tensor([x + y])).logits[0, len(x) - 1:, :teacher.vocab]
        z = z.detach() - z.detach().mean(-1, keepdim=True)  # (n+1,V)
        v = z.amax(-1)
        want = [float(z[t, a]) - (0.0 if a == eos else float(v[t + 1])) for t, a in enumerate(y)]
        assert reward[line].tolist() == pytest.approx(want + [0.0] * (reward.shape[1] - len(y)), abs=1e-3)


@pytest.mark.parametrize("settings", [dict(sync=2, top_k=0), dict(sync=1, top_k=5)])
def test_llmr_release_weights_by_the_samplers_own_logprobs(control_config, monkeypatch, settings):
    """b is what `sample` returned, token for token: of an older student, or of the distribution cut to its top k."""
    weighted, drawn, real, real_sample = [], [], llmr_release.policy_weights, common.sample
    monkeypatch.setattr(llmr_release, "policy_weights", lambda g, q, b, c: weighted.append((q.detach(), b)) or real(g, q, b, c))

    def sample(model, prompts, *a, **k):
        out = real_sample(model, prompts, *a, **k)
        drawn.append((prompts, out)) if len(prompts) == 8 else None
        return out
    monkeypatch.setattr(common, "sample", sample)
    llmr_release.train(control_config(llmr_release, discard=False, **settings))
    for step, (logq, b) in enumerate(weighted):
        prompts, (responses, logb) = drawn[step]
        logb = torch.cat([logb[i] for i in sorted(range(8), key=lambda i: len(prompts[i]) + len(responses[i]))])
        assert b is not None and torch.equal(b, logb)
        assert torch.allclose(logq, logb, atol=1e-4) == ("sync" in settings and settings["sync"] == 2 and step % 2 == 0), step


def test_llmr_release_resumes_bitwise(control_config, some_end, resumes_bitwise):
    """The checkpoint of step 2 lies between two refreshes: the stale sampler must come back as it was."""
    cfg = control_config(llmr_release, steps=5, sync=4, top_k=0, eval_every=9, max_response=8)
    whole, _ = resumes_bitwise(llmr_release.train, cfg)
    assert "sampler" in whole


@pytest.mark.parametrize("name, kind", [("gold_noise", "reviews"), ("gold_padded", "sums"), ("gold_real", "reviews"),
                                        ("gold_real", "sums")])
@pytest.mark.slow
def test_gold_controls_run(gold_config, name, kind):
    module = importlib.import_module(f"tests.controls.{name}")
    cfg = gold_config(module, kind)
    result = module.train(cfg)
    assert {f"{w}.accuracy{d}" for w in ("before", "after") for d in ("", "_uniform", "_tail")} <= set(result)
    assert {"after.modes", "after.tail_mass", "after.garbage"} <= set(result)
    samples = [json.loads(x) for x in open(f"{cfg.out}/samples.jsonl")]
    assert len(samples) == cfg.budget and all({"text", "label", "fed", "topic"} <= set(s) for s in samples)


def test_gold_noise_trains_on_the_noisy_labels_and_keeps_the_written_ones(gold_config, monkeypatch):
    seen, real = [], common.Batches
    monkeypatch.setattr(common, "Batches", lambda examples, *a: seen.append(examples) or real(examples, *a))
    cfg = gold_config(gold_noise, noise=1.0)
    gold_noise.train(cfg)
    written = [json.loads(x)["label"] for x in open(f"{cfg.out}/samples.jsonl")]
    trained = [e.row["response"] for e in seen[-1]]
    assert len(written) == len(trained) == 48 and all(a != b for a, b in zip(written, trained))


def test_gold_real_trains_on_the_rows_of_the_training_split(gold_config, monkeypatch):
    from tests.controls import gold_real
    seen, real = [], common.Batches
    monkeypatch.setattr(common, "Batches", lambda examples, *a: seen.append(examples) or real(examples, *a))
    cfg = gold_config(gold_real, budget=70)
    result = gold_real.train(cfg)
    rows = [json.loads(x) for x in open(f"{cfg.data}/train.jsonl")]
    assert len(rows) == 60 and [e.row["sample"]["text"] for e in seen[-1]] == [r["text"] for r in rows + rows[:10]]
    assert result["after.garbage"] == 0 and result["after.label_errors"] == 0 and "teacher.accuracy" not in result


@pytest.mark.parametrize("pad_to", [0, 5])
def test_padded_energies_average_over_the_padding(gold_config, monkeypatch, pad_to):
    """In a batch of answers of different lengths each gets what it gets alone, padded by hand; at 0 it is gold.py's."""
    found, select = {}, gold_padded.select_feedback
    monkeypatch.setattr(gold_padded, "select_feedback", lambda e, *a: found.setdefault("e", e) and select(e, *a))
    made = [{"text": "after owning 17 actor we sold 8", "label": y} for y in ("17 - 8", "17", "17 - 8 + 1 - 1", "1 + 1")]
    monkeypatch.setattr(gold_padded, "write_samples", lambda *a: made)
    cfg = gold_config(gold_padded, "sums", pad_to=pad_to, budget=8, steps=0, seed=4, max_response=12)
    gold_padded.train(cfg)
    student = common.load_model(cfg.student, CPU, seed=4)
    tokenizer = AutoTokenizer.from_pretrained(cfg.student)
    for e, s in zip(found["e"], made):
        x, y = tokenizer(s["text"]).input_ids, tokenizer(s["label"]).input_ids + [tokenizer.eos_token_id]
        y += [tokenizer.pad_token_id] * (pad_to - len(y))
        logits = student(torch.tensor([x + y])).logits[0, len(x) - 1:-1]
        assert e == pytest.approx(-logits.logsumexp(-1).mean().item(), abs=1e-4)


# ---------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name, settings, sentence", [
    ("reverse_kl", dict(teacher="none"), "name one"), ("dpkd_token", dict(teacher="none"), "name one"),
    ("dpkd_token", dict(preference=0.0, anchor=0.0), "nothing to train"), ("dpkd_token", dict(beta=0.0), "--beta 0.0"),
    ("seqkd_greedy", dict(teacher="none"), "name a --teacher"), ("seqkd_smooth", dict(teacher="none"), "name a --teacher"),
    ("seqkd_smooth", dict(smoothing=1.5), "--smoothing 1.5"), ("llmr_release", dict(teacher="none"), "name a --teacher"),
    ("llmr_release", dict(value="min"), "choose one of max, mean, lse"), ("llmr_release", dict(cut="away"), "--cut away"),
    ("llmr_release", dict(max_prompt=52), "context of 64 tokens less 1"),
    ("llmr_release", dict(max_response=2), "100 % of the 8 samples reach --max-response 2")])
def test_bad_input_is_told_in_a_sentence(control_config, monkeypatch, name, settings, sentence):
    if sentence.startswith("100 %"):  # a student that never ends
        never = lambda *a, **k: tuple(zip(*[([5, 5], torch.zeros(2)) for _ in a[1]]))
        monkeypatch.setattr(common, "sample", never)
    module = importlib.import_module(f"tests.controls.{name}")
    with pytest.raises(common.BadInput, match=sentence):
        module.train(control_config(module, **settings))


@pytest.mark.parametrize("name, kind, settings, sentence", [
    ("gold_noise", "sums", {}, "has no label words"), ("gold_noise", "reviews", dict(noise=1.5), "--noise 1.5"),
    ("gold_padded", "reviews", dict(pad_to=-1), "--pad-to -1"), ("gold_real", "reviews", dict(data=""), "names no data")])
def test_bad_input_of_gold_controls_is_told_in_a_sentence(gold_config, name, kind, settings, sentence):
    module = importlib.import_module(f"tests.controls.{name}")
    with pytest.raises(common.BadInput, match=sentence):
        module.train(gold_config(module, kind, **settings))
