"""llmr.py: the reward's identities, the exact policy gradient on trees small enough to enumerate, and whole runs."""
import itertools
import json
import math

import pytest
import torch
from conftest import small_run

import common
import llmr

CPU = torch.device("cpu")
EOS = 0


@pytest.fixture
def llmr_config(pair, rows_file, tmp_path):
    """llmr_config(kind, **settings) -> a llmr.Config for a run of a second."""
    return lambda kind="gpt2", **settings: small_run(llmr.Config, pair(kind), rows_file, tmp_path / "run", **settings)


def rollouts(B=5, N=6, V=7, seed=0):
    """Random logits at every state of B padded responses of different lengths: (B,N,V), tokens (B,N), lengths (B,).
    What lies beyond a response is random too. Those of N tokens may be cut or ended: that makes no difference."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(B, N, V, generator=g, dtype=torch.double) * 3
    tokens = torch.randint(1, V, (B, N), generator=g)
    lengths = torch.randint(1, N + 1, (B,), generator=g)
    ended = torch.rand(B, generator=g) < 0.6
    lengths[~ended] = N
    tokens[ended, lengths[ended] - 1] = EOS
    return logits, tokens, lengths


def values(logits, tokens, value):
    """(B,N,V), (B,N) -> action value, state value, advantage (B,N), by the script's function."""
    V = logits.shape[-1]
    return [x.view(tokens.shape) for x in llmr.teacher_values(logits.reshape(-1, V), tokens.flatten(), value)]


def loss_by_loops(logits, tokens, lengths, logq, logb, value, baseline):
    """Equations 1 to 6 of the docstring, one number at a time."""
    B, all_returns, all_v = len(lengths), [], []
    for i in range(B):
        n, r, v = int(lengths[i]), [], []
        f = [[x - sum(z) / len(z) for x in z] for z in logits[i].tolist()]
        for z in f:
            Z = sum(math.exp(x) for x in z)
            v.append({"max": max(z), "lse": math.log(Z), "mean": sum(math.exp(x) / Z * x for x in z)}[value])
        for t in range(n):
            after = v[t + 1] if t < n - 1 else 0.0  # after EOS, and where a cut response is granted what -V takes
            r.append(f[t][int(tokens[i, t])] - after)
        all_returns.append([sum(r[t:]) for t in range(n)])
        all_v.append(v)
    total = 0.0
    for i in range(B):
        for t in range(int(lengths[i])):
            b = 0.0
            if baseline == "value":
                b = all_v[i][t]
            if baseline == "mean":
                others = [g for j in range(B) if j != i for g in all_returns[j]]
                b = sum(others) / max(1, len(others))
            rho = 1.0 if logb is None else math.exp(logq[i, t].item() - logb[i, t].item())
            total -= rho * (all_returns[i][t] - b) * logq[i, t].item()
    return total / B


def loss_of(logits, tokens, lengths, logq, logb, value, baseline):
    """The same by the script's functions, composed as in its loop."""
    q, v, _ = values(logits, tokens, value)
    mask = torch.arange(tokens.shape[1]) < lengths[:, None]
    returns = llmr.returns_to_go(llmr.induced_reward(q, v, lengths))
    centred = returns - llmr.return_baseline(returns, v, mask, baseline)
    weights = llmr.policy_weights(centred[mask], logq[mask], None if logb is None else logb[mask])
    return llmr.policy_gradient_loss(logq[mask], weights) / len(lengths)


@pytest.mark.parametrize("value", ["max", "mean", "lse"])
@pytest.mark.parametrize("baseline", ["none", "value", "mean"])
@pytest.mark.parametrize("stale", [False, True])
def test_loss_equals_the_equations(value, baseline, stale):
    roll = rollouts(seed=3)
    assert len(set(roll[2].tolist())) > 2
    logq, logb = (-torch.rand(5, 6, dtype=torch.double) * 3 for _ in range(2))
    args = (*roll, logq, logb if stale else None, value, baseline)
    assert float(loss_of(*args)) == pytest.approx(loss_by_loops(*args), rel=1e-10)


# ---------------------------------------------------------------------------------------------------------------
# Identities, in double precision
# ---------------------------------------------------------------------------------------------------------------
def scored(value, seed=0):
    logits, tokens, lengths = rollouts(B=40, seed=seed)
    q, v, a = values(logits, tokens, value)
    inside = torch.arange(tokens.shape[1]) < lengths[:, None]
    returns = llmr.returns_to_go(llmr.induced_reward(q, v, lengths))
    logp = logits.log_softmax(-1)
    token_logp = logp.gather(-1, tokens[..., None])[..., 0] * inside
    entropy = -(logp.exp() * logp).sum(-1) * inside
    return returns, q, v, a * inside, token_logp, entropy, inside


def test_i_ii_vii_the_return_is_a_value_plus_advantages():
    """(i) G_t = q(s_t,a_t) + later A; (ii) sum r = V(s_1) + sum A; (vii) G_t - V(s_t) = A to go; A = log p - max log p."""
    returns, q, v, a, token_logp, _, inside = scored("max")
    to_go = llmr.returns_to_go(a)
    later = torch.cat([to_go[:, 1:], torch.zeros_like(to_go[:, :1])], -1)
    assert torch.allclose(returns[inside], (q + later)[inside], atol=1e-12)
    assert torch.allclose(returns[:, 0], v[:, 0] + a.sum(-1), atol=1e-12)
    baseline = llmr.return_baseline(returns, v, inside, "value")
    assert torch.allclose((returns - baseline)[inside], to_go[inside], atol=1e-12)
    logits, tokens, _ = rollouts(B=40)
    assert torch.allclose(a, token_logp - logits.log_softmax(-1).amax(-1) * inside, atol=1e-12) and (a <= 0).all()


def test_iii_iv_logsumexp_gives_the_log_likelihood_and_the_mean_pays_for_entropy():
    returns, _, v, _, token_logp, _, _ = scored("lse")
    assert torch.allclose(returns[:, 0], v[:, 0] + token_logp.sum(-1), atol=1e-12)
    returns, _, v, _, token_logp, entropy, _ = scored("mean")
    assert torch.allclose(returns[:, 0], v[:, 0] + (token_logp + entropy).sum(-1), atol=1e-12)


def test_the_teachers_greedy_response_has_summed_reward_v_of_the_first_state():
    logits, _, lengths = rollouts(B=40)
    q, v, a = values(logits, logits.argmax(-1), "max")
    assert torch.allclose(llmr.induced_reward(q, v, lengths).sum(-1), v[:, 0], atol=1e-12) and (a == 0).all()


@pytest.mark.parametrize("value", ["max", "mean", "lse"])
def test_the_advantage_is_below_the_likeliest_token_whatever_v_is(value):
    """A_t = log p(a_t|s_t) - max_a log p(a|s_t), so that `advantage` in the log compares between --value."""
    logits, tokens = torch.randn(40, 9, dtype=torch.double), torch.arange(40) % 9
    logp = logits.log_softmax(-1)
    wanted = [(logp[i, t] - logp[i].max()).item() for i, t in enumerate(tokens.tolist())]
    assert llmr.teacher_values(logits, tokens, value)[2].tolist() == pytest.approx(wanted, abs=1e-12)


def test_what_lies_beyond_a_response_changes_nothing():
    """Padding behind the last token may be anything, NaN too: there V is 0 by definition."""
    logits, tokens, lengths = rollouts(B=40, N=6)
    inside = torch.arange(6) < lengths[:, None]
    q, v, _ = values(logits, tokens, "max")
    reward = llmr.induced_reward(q, v, lengths)
    assert torch.equal(reward, llmr.induced_reward(*(x.masked_fill(~inside, math.nan) for x in (q, v)), lengths))
    assert (reward[~inside] == 0).all()


def test_the_last_position_does_not_wrap_around():
    """Behind the last token V is 0, of a short and of the longest response; torch.roll would subtract V(s_1)."""
    q, v = torch.tensor([[1.0, 2.0, 3.0]] * 2), torch.tensor([[100.0, 10.0, 5.0]] * 2)
    reward = llmr.induced_reward(q, v, torch.tensor([3, 2]))
    assert reward.tolist() == [[1 - 10, 2 - 5, 3], [1 - 10, 2, 0]]


# ---------------------------------------------------------------------------------------------------------------
# Trees small enough to enumerate: every response of at most N tokens over V tokens, 0 ends it
# ---------------------------------------------------------------------------------------------------------------
class Tree:
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
        self.at = torch.tensor(ids)  # (B,N+1): the states passed, the one after a cut response too
        self.inside = torch.arange(N) < self.lengths[:, None]

    def logq(self, theta):
        logq = theta.log_softmax(-1)[self.at[:, :-1]]
        return logq.gather(-1, self.tokens[..., None])[..., 0]  # (B,N)

    def rewards(self, f, value="max", centre=True, rest=True):
        """Of all responses; without centring, straight from the logits or log-probs f. Without `rest` a cut response
        is not granted V of the state after it, what the best continuation would collect."""
        if centre:
            q, v, _ = values(f[self.at[:, :-1]], self.tokens, value)
        else:
            q, v = f[self.at[:, :-1]].gather(-1, self.tokens[..., None])[..., 0], f.amax(-1)[self.at[:, :-1]]
        reward = llmr.induced_reward(q, v, self.lengths)
        if not rest:
            reward[~self.ended, -1] -= (f - centre * f.mean(-1, keepdim=True)).amax(-1)[self.at[~self.ended, -1]]
        return reward, v

    def expected_gradient(self, f, baseline="none", centre=True, rest=True, B=1, discard=False, by_tokens=False):
        """E over batches of B samples of the gradient of the script's loss: exact, by enumeration. discard, by_tokens:
        the rules of the released code, cut responses do not count, and L is divided by the tokens sampled."""
        theta = self.theta.clone().requires_grad_()
        logq = self.logq(theta)
        chance = (logq * self.inside).sum(-1).exp().detach()
        reward, v = self.rewards(f, centre=centre, rest=rest)
        returns = llmr.returns_to_go(reward)
        total = 0.0
        for ids in itertools.product(range(len(self.responses)), repeat=B):
            ids = list(ids)
            inside = self.inside[ids] & (self.ended[ids, None] | (not discard))
            if not inside.any():
                continue
            centred = returns[ids] - llmr.return_baseline(returns[ids], v[ids], inside, baseline)
            weights = llmr.policy_weights(centred[inside], logq[ids][inside], None)
            count = inside.sum() if by_tokens else B
            total = total + chance[ids].prod() * llmr.policy_gradient_loss(logq[ids][inside], weights) / count
        return torch.autograd.grad(total, theta)[0]

    def exact_gradient(self, f, value="max"):
        """Autograd through the expected return, sum over responses of q(y|x) sum_t r_t, itself."""
        theta = self.theta.clone().requires_grad_()
        chance = (self.logq(theta) * self.inside).sum(-1).exp()
        return torch.autograd.grad(-(chance * self.rewards(f, value)[0].sum(-1)).sum(), theta)[0]


def off(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("baseline, B", [("none", 1), ("value", 1), ("none", 2), ("mean", 2)])
def test_policy_gradient_is_the_gradient_of_the_expected_return(baseline, B):
    """No baseline changes the expectation, the mean over the other responses included."""
    tree = Tree(N=2 if B > 1 else 3, seed=1)
    assert (~tree.ended).any()
    assert off(tree.expected_gradient(tree.f, baseline, B=B), tree.exact_gradient(tree.f)) < 1e-12


def test_v_a_constant_added_to_the_logits_of_a_state_changes_no_expected_gradient():
    """Nor do log-probs in place of logits, nor centring. Under the release's rules (discard, divide by tokens), and
    with -V of the state after a cut response, all of it fails: c(s) is no baseline then."""
    tree = Tree()
    shifted, logp = tree.f + tree.shift, tree.f.log_softmax(-1)
    r, s = (llmr.returns_to_go(tree.rewards(f, centre=False)[0]) for f in (tree.f, shifted))
    assert torch.allclose((s - r)[tree.inside], tree.shift[tree.at[:, :-1], 0][tree.inside], atol=1e-12)  # G_t moves by c(s_t)
    want = tree.expected_gradient(tree.f, centre=False)
    for f, centre in ((shifted, False), (logp, False), (tree.f, True)):
        assert off(tree.expected_gradient(f, centre=centre), want) < 1e-12
    for wrong in (dict(discard=True, by_tokens=True), dict(rest=False)):
        want = tree.expected_gradient(tree.f, centre=False, **wrong)
        assert off(tree.expected_gradient(shifted, centre=False, **wrong), want) > 0.05
        assert off(tree.expected_gradient(tree.f, centre=True, **wrong), want) > 0.01


def test_dividing_by_sampled_tokens_alone_breaks_the_shift_invariance_too():
    """Nothing is cut here: the student always ends at the last place. Only the number of tokens differs."""
    tree = Tree(seed=2)
    last = torch.tensor([len(s) >= tree.N - 1 for s in tree.states])
    tree.theta[last, 1:] = -1e9
    shifted = tree.f + tree.shift
    same, broken = (off(*(tree.expected_gradient(f, centre=False, by_tokens=by) for f in (shifted, tree.f)))
                    for by in (False, True))
    assert same < 1e-12 and broken > 0.05


def test_the_best_response_is_the_teachers_stepwise_greedy_one():
    """On 100 random trees for V = max; not so for the other values, which count lengths differently."""
    best = {"max": 0, "lse": 0, "mean": 0}
    for seed in range(100):
        tree, y = Tree(seed=seed), ()
        while len(y) < tree.N and (not y or y[-1] != EOS):
            y += (int(tree.f[tree.place[y]].argmax()),)
        for value in best:
            returns = tree.rewards(tree.f, value)[0].sum(-1)
            best[value] += tree.responses[int(returns.argmax())] == y
    assert best["max"] == 100 and best["lse"] < 95 and best["mean"] < 95


def test_descending_the_loss_finds_it():
    tree = Tree(seed=5)
    for _ in range(200):
        tree.theta = tree.theta - 0.5 * tree.expected_gradient(tree.f, "value")
    likeliest = (tree.logq(tree.theta) * tree.inside).sum(-1)
    assert likeliest.argmax() == tree.rewards(tree.f)[0].sum(-1).argmax() and likeliest.max().exp() > 0.95


# ---------------------------------------------------------------------------------------------------------------
# Weights
# ---------------------------------------------------------------------------------------------------------------
def test_rho_is_one_on_policy_and_the_ratio_where_the_sampler_is_stale():
    g, logq, logb = torch.tensor([2.0, -3.0]), torch.tensor([-1.0, -2.0], requires_grad=True), torch.tensor([-1.5, -1.0])
    assert torch.equal(llmr.policy_weights(g, logq, None), g)
    stale = llmr.policy_weights(g, logq, logb)
    assert not stale.requires_grad
    assert stale.tolist() == pytest.approx([2 * math.exp(0.5), -3 * math.exp(-1.0)])
    llmr.policy_gradient_loss(logq, stale).backward()
    assert logq.grad.tolist() == pytest.approx((-stale).tolist())  # stop-gradient: rho has none


# ---------------------------------------------------------------------------------------------------------------
# Whole runs
# ---------------------------------------------------------------------------------------------------------------
@pytest.fixture
def some_end(monkeypatch):
    """Random models hardly ever end a response: every other sample gets an EOS at its third place."""
    real = common.sample

    def sample(model, prompts, *a, **k):
        responses, logb = real(model, prompts, *a, **k)
        return [r[:2] + [k["eos"]] if i % 2 else r for i, r in enumerate(responses)], [b[:3] if i % 2 else b for i, b in enumerate(logb)]
    monkeypatch.setattr(common, "sample", sample)


@pytest.mark.parametrize("kind, settings", [
    ("gpt2", dict(baseline="value", sync=2, accum=2)),
    ("t5", dict(value="mean", baseline="mean")),
    ("qwen2", dict(value="lse", dtype="bfloat16"))])
def test_whole_run(llmr_config, some_end, kind, settings):
    cfg = llmr_config(kind, **settings)
    result = llmr.train(cfg)
    assert math.isfinite(result["after.kl_qp"]) and result["after.kl_pq"] != result["before.kl_pq"]
    records = [json.loads(x) for x in open(f"{cfg.out}/log.jsonl")]
    steps = [r for r in records if "loss" in r]
    assert len(steps) == 4 and all(r["advantage"] <= 0 <= r["nll"] and 0 <= r["no_end"] <= 1 for r in steps)
    common.load_model(f"{cfg.out}/student", CPU)


def test_accumulation_gives_one_result(llmr_config, some_end, tmp_path):
    """With the mean baseline, which must not be a mean of a micro-batch, and different numbers of tokens."""
    runs = []
    for accum in (1, 4):
        cfg = llmr_config("llama", accum=accum, steps=1, baseline="mean", out=str(tmp_path / f"{accum}"))
        llmr.train(cfg)
        runs.append(json.loads(next(x for x in open(f"{cfg.out}/log.jsonl") if "loss" in x)))
    for key in ("loss", "grad_norm", "advantage", "nll"):
        assert runs[0][key] == pytest.approx(runs[1][key], rel=1e-4), key


@pytest.mark.parametrize("settings", [dict(), dict(sync=2)])
def test_the_loop_weights_by_the_samplers_own_logprobs_and_draws_by_seed_and_step(llmr_config, monkeypatch, settings):
    """No ratio on policy; else b is what `sample` returned, token for token (with sync 2: from an older student)."""
    weighted, drawn, real, real_sample = [], [], llmr.policy_weights, common.sample
    monkeypatch.setattr(llmr, "policy_weights", lambda g, q, b: weighted.append((q.detach(), b)) or real(g, q, b))

    def sample(model, prompts, *a, **k):
        out = real_sample(model, prompts, *a, **k)
        drawn.append((prompts, k["seed"], out)) if len(prompts) == 8 else None
        return out
    monkeypatch.setattr(common, "sample", sample)
    llmr.train(llmr_config("gpt2", seed=3, **settings))
    assert [seed for _, seed, _ in drawn] == [3 * 10**9 + step for step in range(4)]
    for step, (logq, b) in enumerate(weighted):
        prompts, _, (responses, logb) = drawn[step]
        logb = torch.cat([logb[i] for i in sorted(range(8), key=lambda i: len(prompts[i]) + len(responses[i]))])
        assert b is None if not settings else b is not None and torch.equal(b, logb)
        assert torch.allclose(logq, logb, atol=1e-4) == (settings == {} or step % 2 == 0), step


def test_prompts_without_a_response_are_trained_on(llmr_config, tmp_path):
    rows = [json.loads(x) for x in open(llmr_config().data)]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({**r, "response": None}) + "\n" for r in rows))
    result = llmr.train(llmr_config(data=str(file), steps=2))
    assert result["steps"] == 2 and "after.ce" not in result


def test_learning_raises_the_advantage(llmr_config):
    cfg = llmr_config("llama", steps=100, batch_size=32, lr=3e-2, eval_every=1000, save_every=1000, max_response=4, baseline="value")
    llmr.train(cfg)
    advantage = [json.loads(x)["advantage"] for x in open(f"{cfg.out}/log.jsonl") if "loss" in x]
    assert sum(advantage[-10:]) > 0.5 * sum(advantage[:10])  # both negative: nearer to 0; .22 to .23 on seeds 0 to 3


@pytest.mark.parametrize("sync", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_resume_ends_bitwise_like_an_uninterrupted_run(llmr_config, resumes_bitwise, sync):
    """With sync 4 the checkpoint of step 6 lies between two refreshes: the stale sampler must come back as it was, which
    is neither the student of now nor the one of the beginning."""
    cfg = llmr_config(steps=8, sync=sync, eval_every=9, save_every=3, max_response=8)
    whole, _ = resumes_bitwise(llmr.train, cfg, died=7)
    assert ("sampler" in whole) == (sync > 1)


@pytest.mark.parametrize("settings, match", [
    (dict(teacher="none"), "name a --teacher"), (dict(value="min"), "choose one of max, mean, lse"), (dict(sync=0), "--sync 0"),
    (dict(teacher_template="no place"), "exactly once"), (dict(max_prompt=53), "context of 64 tokens")])
def test_bad_input_is_told_in_a_sentence(llmr_config, settings, match):
    with pytest.raises(common.BadInput, match=match):
        llmr.train(llmr_config(**settings))


def test_an_end_in_the_last_place_that_is_allowed_is_an_end(llmr_config, monkeypatch, capsys):
    """It is as long as a response that was cut: `no_end` asks for the EOS, not for the length."""
    def sample(model, prompts, *args, eos, **kwargs):
        responses = [[5, 5 if i % 4 == 0 else eos] for i in range(len(prompts))]
        return responses, [torch.zeros(2)] * len(prompts)
    monkeypatch.setattr(common, "sample", sample)
    cfg = llmr_config(max_response=2)
    llmr.train(cfg)
    assert {json.loads(x)["no_end"] for x in open(f"{cfg.out}/log.jsonl") if "loss" in x} == {0.25}
    assert "none of the samples ends" not in capsys.readouterr().out


def test_truncated_samples_are_kept_by_default_and_an_exploding_loss_stops_the_run(llmr_config, monkeypatch, tmp_path, capsys):
    real = common.sample
    never = lambda *a, **k: tuple(zip(*[([5, 5], torch.zeros(2)) for _ in a[1]]))  # a student that never ends
    monkeypatch.setattr(common, "sample", never)
    cfg = llmr_config(max_response=2, log_every=2)
    llmr.train(cfg)
    assert {json.loads(x)["no_end"] for x in open(f"{cfg.out}/log.jsonl") if "loss" in x} == {1.0}
    said = capsys.readouterr().out.count("none of the samples ends within --max-response 2: raise it")
    assert said == len(range(0, cfg.steps, 2)) < cfg.steps  # where it is logged, not at every step
    monkeypatch.setattr(common, "sample", real)
    loss, calls = llmr.policy_gradient_loss, []
    monkeypatch.setattr(llmr, "policy_gradient_loss", lambda *a: loss(*a) * (math.inf if len(calls) > 2 else 1) + 0 * len(calls.append(1) or []))
    with pytest.raises(common.RunFailed, match=r"at step 3.*checkpoint\.pt"):
        llmr.train(llmr_config(out=str(tmp_path / "x")))
    kept = torch.load(tmp_path / "x/checkpoint.pt", weights_only=True)
    assert kept["step"] == 2 and all(bool(p.isfinite().all()) for p in kept["parts"]["student"].values())
