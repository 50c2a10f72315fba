"""ddk.py against its equations, the data path from documents to draws, and whole runs with teachers that are exact."""
import itertools
import json
import math
import random
import shutil

import numpy as np
import pytest
import torch
import transformers
from conftest import WORDS, make_corpus, small_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

import common
import ddk

CPU = torch.device("cpu")
double = lambda x: torch.as_tensor(x, dtype=torch.float64)
vector = lambda *x: double(x)
close = lambda got, wanted, tol=5e-9: (double(got) - double(wanted)).abs().max() < tol


# ---- the equations ------------------------------------------------------------------------------------------------
TEACHER = vector(10, 5, 2).log()


def gap(*student_ppl):
    return ddk.domain_gap(vector(*student_ppl).log(), TEACHER)


def test_gap_and_prior_of_a_worked_example():
    assert close(gap(12, 7.5, 3.6), [1.2, 1.5, 1.8])
    assert close(ddk.prior(gap(12, 7.5, 3.6)).exp(), [0.23969448, 0.32355370, 0.43675182])


def test_mixture_of_a_worked_example():
    r, seen = ddk.prior(gap(12, 7.5, 3.6)), []
    for _ in range(60):
        r = ddk.mixture(r, gap(12, 7.5, 3.6), 0.5)
        seen.append(r.exp().tolist())
    assert close(seen[0], [0.24807025, 0.31499367, 0.43693608])
    assert close(seen[1], [0.25107780, 0.31134890, 0.43757330])
    assert close(seen[-1], [0.25268843, 0.30837204, 0.43893953])


def test_mixture_follows_changing_gaps():
    r = ddk.mixture(ddk.prior(gap(12, 7.5, 3.6)), gap(11.5, 6, 3), 0.5)
    assert close(r.exp(), [0.26657121, 0.30843797, 0.42499082])
    assert close(ddk.mixture(r, gap(11, 5.5, 2.4), 0.5).exp(), [0.29424973, 0.31428749, 0.39146277])


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_mixture_equals_the_equation_written_out(alpha):
    rng = random.Random(0)
    rho, r = [rng.uniform(0.8, 6) for _ in range(5)], [0.1, 0.3, 0.05, 0.35, 0.2]
    psi = [a * math.exp(b) for a, b in zip(r, rho)]
    wanted = [alpha * x / sum(psi) + (1 - alpha) / 5 for x in psi]
    assert close(ddk.mixture(vector(*r).log(), vector(*rho), alpha).exp(), wanted, 1e-12)


def test_equal_gaps_decay_to_uniform_by_alpha_at_every_step():
    r = vector(.7, .2, .1).log()
    for t in range(1, 8):
        r = ddk.mixture(r, vector(2, 2, 2), 0.5)
        assert close(r.exp(), (0.5**t * (vector(.7, .2, .1) - 1 / 3) + 1 / 3), 1e-12)


@pytest.mark.parametrize("n, alpha, low, high", [(10, .5, .05, .55), (6, .5, .5 / 6, .5 + .5 / 6), (5, .8, .04, .84)])
def test_shares_stay_between_floor_and_cap(n, alpha, low, high):
    generator, r = torch.Generator().manual_seed(0), torch.full((n,), -math.log(n), dtype=torch.float64)
    for _ in range(200):
        r = ddk.mixture(r, 1 + 30 * torch.rand(n, dtype=torch.float64, generator=generator) ** 6, alpha)
        assert r.exp().sum() == pytest.approx(1) and low - 1e-12 <= r.exp().min() and r.exp().max() <= high + 1e-12


def test_only_differences_of_gaps_count():
    r, rho = vector(.5, .3, .2).log(), vector(1.2, 1.5, 1.8)
    assert close(ddk.mixture(r, rho, .5), ddk.mixture(r, rho + 7, .5), 1e-12)
    assert close(ddk.prior(rho), ddk.prior(rho + 7), 1e-12)
    assert not close(ddk.prior(rho), ddk.prior(2 * rho), 0.1)


def test_constant_gaps_lead_to_the_closed_form():
    """r_i = ((1-alpha)/N) / (1 - alpha e^rho_i / Z) with the Z > alpha max e^rho at which they sum to 1."""
    rho, alpha = vector(1.1, 1.3, 2.0, 2.9), 0.5
    at = lambda Z: ((1 - alpha) / 4) / (1 - alpha * rho.exp() / Z)
    low, high = alpha * rho.exp().max() * (1 + 1e-12), 1e4
    for _ in range(200):
        Z = (low + high) / 2
        low, high = (Z, high) if at(Z).sum() > 1 else (low, Z)
    for start in (vector(.25, .25, .25, .25), vector(.97, .01, .01, .01)):
        r = start.log()
        for _ in range(100):
            r = ddk.mixture(r, rho, alpha)
        assert close(r.exp(), at(Z), 1e-9)


def test_shares_are_finite_where_the_exponential_of_a_gap_is_not():
    rho = vector(1000, 1, 740)
    assert vector(1000).exp().isinf()
    assert close(ddk.prior(rho).exp(), [1, 0, 0])
    assert close(ddk.mixture(ddk.prior(rho), rho, .5).exp(), [4 / 6, 1 / 6, 1 / 6])
    starved = ddk.mixture(ddk.prior(rho), rho, 1.0)  # no floor: shares far below the smallest float are still ordered
    assert starved.isfinite().all() and starved[1] < starved[2] < -500
    for _ in range(3):
        starved = ddk.mixture(starved, vector(1, 2000, 1), 1.0)
    assert close(starved.exp(), [0, 1, 0])  # and come back


def test_the_worst_gap_is_the_largest_whatever_domain_is_the_hardest():
    student, teacher = torch.tensor([5.0, 1.0]).double(), torch.tensor([4.9, 0.2]).double()
    m = ddk.metrics(["a", "b"], student, teacher, torch.tensor([0.3, 0.7]))
    gaps = math.exp(0.1), math.exp(0.8)
    wanted = {"worst_gap": gaps[1], "mean_gap": sum(gaps) / 2, "gap_a": gaps[0], "gap_b": gaps[1], "mean_ce": 3.0,
              "ppl_a": math.exp(5), "ppl_b": math.e, "share_a": 0.3, "share_b": 0.7}
    assert m == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("mix, wanted", [("ddk", 3), ("uniform", 0)])
def test_the_seconds_of_gaps_are_those_of_gaps_that_steer(cfg, monkeypatch, mix, wanted):
    """Not of those that only the curve asks for. Here a look at the clock takes a second: the two around a measurement."""
    clock = itertools.count()
    monkeypatch.setattr(common.Run, "elapsed", lambda self: float(next(clock)))
    assert ddk.train(cfg(mix=mix, steps=6, interval=3, eval_every=1, log_every=100))["gap_seconds"] == wanted


def test_a_gap_beyond_the_largest_number_gives_finite_shares():
    """A student of a cross entropy of 710 nats and more: exp of it is infinite, and inf - inf would be no share."""
    rho = ddk.domain_gap(vector(711, 5000, 3), vector(1, 1, 1))
    assert rho.isfinite().all() and vector(710).exp().isinf()
    r = ddk.prior(rho)
    for _ in range(3):
        r = ddk.mixture(r, rho, .5)
    assert r.isfinite().all() and r.exp().sum() == pytest.approx(1) and r.argmin() == 2


def test_no_weight_on_the_gaps_is_the_uniform_mixture():
    assert close(ddk.mixture(vector(.9, .1).log(), vector(1, 50), 0.0).exp(), [.5, .5], 1e-12)


def test_loss_of_a_worked_example():
    q, p, y = vector(2, 0, -1, 0, 1, 0).view(2, 3), vector(1, 1, -2, 0, 3, 0).view(2, 3), torch.tensor([0, 1])
    loss, ce, kl = (x.mean().item() for x in ddk.distill_loss(q, p, y, 0.2, 1.0))
    assert close([loss, ce, kl], [.430968, .360645, .351615], 1e-6)
    assert close(ddk.distill_loss(q, p, y, 0.2, 2.0)[2].mean(), .116051, 1e-6)  # no tau^2
    assert close(ddk.distill_loss(p, q, y, 0.2, 1.0)[2].mean(), .355372, 1e-6)  # the other direction differs


@pytest.mark.parametrize("gamma, tau", [(0.0, 1.0), (0.2, 1.0), (0.5, 2.0)])
def test_loss_equals_the_equation_in_loops(gamma, tau):
    torch.manual_seed(0)
    q, p, y = torch.randn(6, 9).double() * 2, torch.randn(6, 9).double() * 2, torch.randint(9, (6,))
    for row, got in enumerate(ddk.distill_loss(q, p, y, gamma, tau)[0].tolist()):
        softmax = lambda z, t: [math.exp(v / t) / sum(math.exp(u / t) for u in z) for v in z]
        P, Q = softmax(p[row].tolist(), tau), softmax(q[row].tolist(), tau)
        kl = sum(a * math.log(a / b) for a, b in zip(P, Q))
        assert got == pytest.approx(-math.log(softmax(q[row].tolist(), 1)[y[row]]) + gamma * kl, rel=1e-9)


def test_gamma_zero_is_cross_entropy_and_needs_no_teacher():
    q, p, y = torch.randn(4, 7), torch.randn(4, 7), torch.randint(7, (4,))
    wanted = torch.nn.functional.cross_entropy(q, y, reduction="none")
    assert torch.equal(ddk.distill_loss(q, p, y, 0.0, 1.0)[0], wanted)
    assert torch.equal(ddk.distill_loss(q, None, y, 0.0, 1.0)[0], wanted)


def test_a_student_equal_to_the_teacher_has_no_kl_and_leaves_the_mixture_uniform():
    q, ce = torch.randn(4, 7).double(), vector(1.3, .2, 2.7)
    assert ddk.distill_loss(q, q, torch.zeros(4, dtype=torch.long), 0.2, 1.0)[2].abs().max() < 1e-12
    assert torch.equal(ddk.domain_gap(ce, ce), vector(1, 1, 1)) and close(ddk.prior(vector(1, 1, 1)).exp(), 1 / 3)


# ---- draws --------------------------------------------------------------------------------------------------------
def test_a_cursor_covers_every_sequence_before_one_repeats():
    sampler, seen = ddk.DomainSampler([5, 7], 3), {0: [], 1: []}
    for step in range(40):  # the shares change, the cursors go on
        for i, j in sampler.draw(step, 3, vector(.9, .1) if step % 2 else vector(.2, .8)):
            seen[i].append(j)
    for i, size in ((0, 5), (1, 7)):
        passes = [seen[i][a:a + size] for a in range(0, len(seen[i]) - size + 1, size)]
        assert len(passes) > 3 and all(sorted(p) == list(range(size)) for p in passes)
        assert len(set(map(tuple, passes))) > 1  # reshuffled
        assert sampler.drawn[i] == len(seen[i])


def test_draws_follow_the_shares():
    sampler, shares, n = ddk.DomainSampler([50, 50, 50], 0), vector(.6, .3, .1), 6000
    count = [0, 0, 0]
    for step in range(n // 20):
        for i, _ in sampler.draw(step, 20, shares):
            count[i] += 1
    for got, p in zip(count, shares.tolist()):
        assert abs(got - n * p) < 4 * math.sqrt(n * p * (1 - p))  # four standard deviations
    assert close(sampler.total / (n // 20), shares, 1e-9)


def test_seeds_differ_in_the_domains_and_in_the_sequences_that_are_drawn():
    one, other, again = ([s.draw(step, 6, vector(.5, .5)) for step in range(4)]
                         for s in (ddk.DomainSampler([50, 50], seed) for seed in (1, 2, 1)))
    domains = lambda draws: [i for draw in draws for i, _ in draw]
    sequences = lambda draws: [j for draw in draws for i, j in draw if i == 0][:5]
    assert one == again and domains(one) != domains(other) and sequences(one) != sequences(other)


def test_domains_of_one_size_have_orders_of_their_own():
    """And every pass through one its own: texts that lie side by side in all domains must not meet in every step."""
    sampler = ddk.DomainSampler([40, 40], 0)
    drawn = sampler.draw(0, 400, vector(.5, .5))
    orders = [[j for i, j in drawn if i == domain] for domain in (0, 1)]
    assert len({tuple(order[first:first + 40]) for order in orders for first in (0, 40)}) == 4


def test_a_restored_sampler_draws_what_the_first_would_have_drawn():
    one, shares = ddk.DomainSampler([5, 7], 3), vector(.3, .7)
    one.log_shares = shares.log()
    [one.draw(step, 4, shares) for step in range(9)]
    other = ddk.DomainSampler([5, 7], 3)
    other.load_state_dict({k: v.clone() if torch.is_tensor(v) else v for k, v in one.state_dict().items()})
    assert torch.equal(other.log_shares, one.log_shares)
    assert [other.draw(s, 4, shares) for s in range(9, 20)] == [one.draw(s, 4, shares) for s in range(9, 20)]
    with pytest.raises(common.BadInput, match="corpus has changed"):
        ddk.DomainSampler([5, 8], 3).load_state_dict(one.state_dict())


# ---- from documents to sequences ----------------------------------------------------------------------------------
def write_docs(path, n, seed, words=WORDS):
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(words, k=rng.randint(5, 30))) for _ in range(n)]
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return texts


@pytest.fixture
def corpus(tmp_path):
    """A directory with three domains, of which the first is the largest."""
    return make_corpus(tmp_path / "data")


@pytest.fixture
def cfg(pair, corpus, tmp_path):
    """cfg(**settings) -> a ddk.Config for a run of a second."""
    teacher, student = pair("llama")

    def make(**settings):
        small = dict(teacher=str(teacher), student=str(student), data=str(corpus), max_tokens=16, holdout=0.1,
                     steps=6, interval=2, batch_size=6, lr=1e-3, warmup=2, gap_rows=5, eval_rows=5, eval_every=3,
                     log_every=1, save_every=100, device="cpu", compile=False, out=str(tmp_path / "run"))
        return ddk.Config(**{**small, **settings})
    return make


def test_packed_tokens_are_the_documents_of_their_split_with_eos_between(tmp_path, monkeypatch, cfg):
    monkeypatch.setattr(common, "PIECE", 500)  # many small writes
    texts, tokenizer = write_docs(tmp_path / "a.jsonl", 200, 0), small_tokenizer()
    (tmp_path / "b.txt").write_text("\n\n \n".join(texts[:150]) + "\n\nline one\nline two\n")
    for file, docs in (("a.jsonl", texts), ("b.txt", [t + "\n" for t in texts[:150]] + ["line one\nline two\n"])):
        parts, _ = common.pack("d", str(tmp_path / file), tokenizer, cfg())
        for split, got in parts.items():
            mine = [d for d in docs if common.split_of(d, 0.1) == split]
            wanted = [t for d in mine for t in tokenizer(d).input_ids + [tokenizer.eos_token_id]]
            assert isinstance(got, np.memmap) and got.shape[1] == 16 and got.shape[0] == len(wanted) // 16
            assert got.flatten().tolist() == wanted[:got.size]


def test_no_document_is_in_two_splits_and_splits_have_their_share(tmp_path, cfg):
    texts = write_docs(tmp_path / "a.jsonl", 3000, 0)
    parts = {s: {t for t in texts if common.split_of(t, 0.1) == s} for s in common.SPLITS}
    assert not parts["train"] & parts["valid"] and not parts["train"] & parts["test"] and not parts["valid"] & parts["test"]
    for split in ("valid", "test"):
        assert 250 < len(parts[split]) < 350
    assert common.split_of(texts[0] * 2, 0.1) == common.split_of(texts[0] * 2, 0.1)


def test_the_steering_split_and_the_reported_split_share_no_sequence(cfg):
    c = cfg(gap_rows=10**6, eval_rows=10**6)
    student, teacher, tokenizer = common.load_pair(c, CPU)
    data = common.load_domains(c, student, teacher, tokenizer)
    for name in data.names:
        of = {s: {tuple(e.prompt + e.response) for e in getattr(data, s)[name]} for s in ("valid", "test")}
        train = {tuple(x.tolist()) for x in data.train[name]}
        assert of["valid"] and of["test"] and not of["valid"] & of["test"] and not train & (of["valid"] | of["test"])


def test_sequences_that_are_looked_at_are_spread_over_their_split(tmp_path, cfg):
    """Gaps and tests see every k-th sequence: the first ones of a split may all be of a few long documents."""
    sources, tokenizer, c = [], small_tokenizer(), cfg(gap_rows=4, eval_rows=7)
    for i, name in enumerate("ab"):
        write_docs(tmp_path / f"{name}.jsonl", 300, i)
        sources.append(f"{name}={tmp_path}/{name}.jsonl")
    c.domains = ",".join(sources)
    data = common.load_domains(c, None, None, tokenizer)
    for split, most in (("valid", 4), ("test", 7)):
        every = [tuple(x.tolist()) for x in common.pack("a", f"{tmp_path}/a.jsonl", tokenizer, c)[0][split]]
        at = [every.index(tuple(e.prompt + e.response)) for e in getattr(data, split)["a"]]
        steps = [b - a for a, b in zip(at, at[1:])]
        assert len(at) == most and at[0] == 0 and at[-1] == len(every) - 1 > 2 * most
        assert max(steps) - min(steps) <= 1  # as evenly as can be


def test_a_limit_on_training_tokens_leaves_valid_and_test_whole(tmp_path, cfg):
    write_docs(tmp_path / "a.jsonl", 300, 0)
    whole, cut = (common.pack("a", f"{tmp_path}/a.jsonl", small_tokenizer(), cfg(domain_tokens=n))[0] for n in (0, 32))
    assert len(cut["train"]) == 2 < len(cut["valid"]) and np.array_equal(cut["train"], whole["train"][:2])
    assert all(np.array_equal(cut[s], whole[s]) for s in ("valid", "test"))


def test_a_document_that_comes_again_is_packed_once(tmp_path, cfg):
    once, again, tokenizer = tmp_path / "once.jsonl", tmp_path / "again.jsonl", small_tokenizer()
    texts = write_docs(once, 200, 0)
    again.write_text("".join(json.dumps({"text": t}) + "\n" for t in [*texts, *texts[::-1], *texts[:50]]))
    one, two = (common.pack("d", str(file), tokenizer, cfg()) for file in (once, again))
    assert one[1] == two[1] and all(np.array_equal(one[0][s], two[0][s]) for s in common.SPLITS)


def test_documents_that_begin_alike_are_different_documents(tmp_path, cfg):
    """As source files do, with a licence at their head."""
    file, tokenizer, head = tmp_path / "a.jsonl", small_tokenizer(), "the cat sat on the mat " * 100
    file.write_text("".join(json.dumps({"text": f"{head}{i} {i}"}) + "\n" for i in range(40)))
    parts, _ = common.pack("d", str(file), tokenizer, cfg())
    whole = tokenizer.decode([t for split in parts.values() for t in split.flatten().tolist()])
    assert sum(f" {i} {i}<" in whole for i in range(40)) > 36  # of each split the last few tokens are cut off


def test_a_text_without_a_blank_line_is_split_by_position(tmp_path, cfg, capsys):
    """One long log is one document: its end is held out, and no token of it is in two splits."""
    tokenizer, n = small_tokenizer(), 16
    (tmp_path / "server.log").write_text("".join(f"{i} the cat {i * i % 97} ran\n" for i in range(400)))
    whole = tokenizer((tmp_path / "server.log").read_text()).input_ids + [tokenizer.eos_token_id]
    parts, _ = common.pack("log", str(tmp_path / "server.log"), tokenizer, cfg())
    assert "domain log: too few documents to hold some out" in capsys.readouterr().out
    held = int(0.1 * len(whole))
    cut = {"train": whole[:-2 * held], "valid": whole[-2 * held:-held], "test": whole[-held:]}
    for split, wanted in cut.items():
        got = parts[split].flatten().tolist()
        assert len(wanted) - n < len(got) <= len(wanted) and got == wanted[:len(got)]


def test_what_was_packed_is_found_again_and_a_changed_file_is_not(tmp_path, cfg, capsys):
    write_docs(tmp_path / "a.jsonl", 100, 0), write_docs(tmp_path / "b.jsonl", 100, 1)
    c = cfg(domains=",".join(f"{n}={tmp_path}/{n}.jsonl" for n in "ab"))
    load = lambda: common.load_domains(c, None, None, small_tokenizer())
    first = load().sha1
    assert "packing domain a" in capsys.readouterr().out
    assert load().sha1 == first and "packing" not in capsys.readouterr().out
    write_docs(tmp_path / "a.jsonl", 120, 2)
    assert load().sha1 != first and "packing domain a" in capsys.readouterr().out


def test_another_tokenizer_with_the_same_words_packs_anew(tmp_path, cfg):
    """The vocabulary alone does not say which token ends a document."""
    write_docs(tmp_path / "a.jsonl", 100, 0)
    ends = []
    for eos in (small_tokenizer().eos_token, "cat"):
        tokenizer = small_tokenizer()
        tokenizer.eos_token = eos
        parts, _ = common.pack("d", f"{tmp_path}/a.jsonl", tokenizer, cfg())
        ends.append((parts["train"] == tokenizer.eos_token_id).sum())
        assert ends[-1]
    tokenizer.eos_token = small_tokenizer().eos_token
    assert common.pack("d", f"{tmp_path}/a.jsonl", tokenizer, cfg())[0]["train"].tolist() != parts["train"].tolist()


def test_a_data_set_that_is_saved_again_is_packed_again(tmp_path, cfg):
    import datasets
    tokenizer, first = small_tokenizer(), []
    for word in ("cat", "dog"):
        shutil.rmtree(tmp_path / "saved", ignore_errors=True)
        rows = [{"text": f"{word} {i} " * 20} for i in range(60)]
        datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
        parts, _ = common.pack("d", str(tmp_path / "saved"), tokenizer, cfg())
        first.append(tokenizer.decode(parts["train"][0].tolist()))
    assert "cat" in first[0] and "dog" in first[1]


def test_a_sequence_begins_as_the_tokenizer_begins_a_text(cfg, pair, tmp_path, monkeypatch):
    """Gemma without its BOS is lost: the perplexities that steer would be noise."""
    student, teacher, tokenizer = common.load_pair(cfg(), CPU)
    plain = common.load_domains(cfg(), student, teacher, tokenizer)
    tokenizer.bos_token = "!"
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="! $A", special_tokens=[("!", bos)])
    data = common.load_domains(cfg(), student, teacher, tokenizer)
    for split in ("valid", "test"):
        for a, b in zip(*(sum(getattr(d, split).values(), []) for d in (plain, data))):
            assert b.prompt == b.teacher_prompt == [bos, *a.prompt] and b.response == a.response and len(a.prompt) == 1
    assert plain.bos == [] and data.bos == [bos]
    student.config.max_position_embeddings = 16  # which is --max-tokens
    common.load_domains(cfg(), student, teacher, small_tokenizer())
    refused("does not fit the student's context of 16", common.load_domains, cfg(), student, teacher, tokenizer)
    for role, path in zip(("teacher", "student"), pair("llama")):
        tokenizer.save_pretrained(shutil.copytree(path, tmp_path / role))
    seen, collate = [], common.collate
    monkeypatch.setattr(common, "collate", lambda examples, *args: seen.extend(examples) or collate(examples, *args))
    ddk.train(cfg(teacher=str(tmp_path / "teacher"), student=str(tmp_path / "student"), steps=1, mix="uniform"))
    seen = [e for e in seen if len(e.response) == 15]  # not what looks at a model's head
    assert len(seen) > 6 and all(e.prompt[0] == bos and len(e.prompt) == 2 for e in seen)
    short = json.loads((tmp_path / "teacher/config.json").read_text()) | {"max_position_embeddings": 16}
    (tmp_path / "teacher/config.json").write_text(json.dumps(short))
    refused("does not fit the teacher's context of 16", ddk.train,
            cfg(teacher=str(tmp_path / "teacher"), student=str(tmp_path / "student"), out=str(tmp_path / "short")))


def test_another_holdout_never_meets_the_old_splits(tmp_path, cfg):
    """The cache is shared by all runs: a document that was trained on would be tested on, or the other way round."""
    texts, tokenizer = write_docs(tmp_path / "a.jsonl", 300, 0), small_tokenizer()
    for holdout in (0.1, 0.3, 0.1):
        parts, _ = common.pack("d", f"{tmp_path}/a.jsonl", tokenizer, cfg(holdout=holdout))
        for split, got in parts.items():
            wanted = [t for d in texts if common.split_of(d, holdout) == split for t in tokenizer(d).input_ids + [tokenizer.eos_token_id]]
            assert got.flatten().tolist() == wanted[:got.size] and len(wanted) - got.size < 16


def test_sources_of_every_kind(tmp_path, cfg):
    import datasets
    (tmp_path / "src/deep").mkdir(parents=True)
    (tmp_path / "src/a.py").write_text("x = 1\n\ny = 2\n")
    (tmp_path / "src/deep/b.py").write_text("z = 3\n")
    read = lambda source, **settings: list(common.documents(str(source), cfg(**settings)))
    assert read(tmp_path / "src") == read(f"{tmp_path}/src/**/*.py") == ["x = 1\n\ny = 2\n", "z = 3\n"]  # files are whole
    assert read(tmp_path / "src/a.py") == ["x = 1\n", "y = 2\n"]  # but one file is parted by its blank lines
    (tmp_path / "c.jsonl").write_text('{"text": "def f(): ..."}\n\n{"text": "\\u2028 a"}\n')
    assert read(tmp_path / "c.jsonl") == ["def f(): ...", "\u2028 a"]
    datasets.Dataset.from_list([{"text": "one"}, {"text": "two"}]).save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved") == ["one", "two"]


def test_the_text_of_a_row_may_have_another_name(tmp_path, cfg):
    (tmp_path / "c.jsonl").write_text('{"content": "one", "text": "no"}\n{"content": "two"}\n')
    read = lambda name: list(common.documents(str(tmp_path / "c.jsonl"), cfg(text_field=name)))
    assert read("content") == ["one", "two"]
    refused(r"c\.jsonl:2: no field 'text' \(there: content\): name it with --text-field", read, "text")


def test_another_field_is_packed_anew(tmp_path, cfg):
    rows = [{"text": f"cat {i} " * 20, "body": f"dog {i} " * 20} for i in range(60)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    tokenizer = small_tokenizer()
    text = lambda name: tokenizer.decode(common.pack("c", str(tmp_path / "c.jsonl"), tokenizer, cfg(text_field=name))[0]["train"][0].tolist())
    assert "cat" in text("text") and "dog" in text("body")


def test_a_limit_on_tokens_is_kept(cfg):
    student, teacher, tokenizer = common.load_pair(c := cfg(domain_tokens=200), CPU)
    data = common.load_domains(c, student, teacher, tokenizer)
    assert [len(data.train[n]) for n in data.names] == [12, 12, 12]


# ---- whole runs ---------------------------------------------------------------------------------------------------
def records(c, key):
    return [x for x in map(json.loads, open(f"{c.out}/log.jsonl")) if key in x]


def test_cross_entropy_of_a_domain_is_that_of_the_model_itself(cfg):
    student, teacher, tokenizer = common.load_pair(c := cfg(), CPU)
    data = common.load_domains(c, student, teacher, tokenizer)
    got = ddk.domain_ce(student, data.valid, c)
    for name, ce in zip(data.names, got.tolist()):
        nll = []
        for e in data.valid[name]:
            ids = torch.tensor([e.prompt + e.response])
            logp = student(ids).logits[0, :-1, :student.vocab].log_softmax(-1)
            nll += [-logp[t, ids[0, t + 1]].item() for t in range(15)]
        assert len(nll) == 5 * 15 and ce == pytest.approx(sum(nll) / len(nll), rel=1e-5)


def test_a_run_reports_gaps_and_follows_them(cfg):
    c = cfg(steps=8)
    result = ddk.train(c)
    names = ["big", "mid", "small"]
    assert result["teacher.worst_gap"] == 1.0 and result["corpus"] and result["gap_seconds"] > 0
    assert result["after.worst_gap"] == max(result[f"after.gap_{n}"] for n in names)
    assert result["after.mean_gap"] == pytest.approx(sum(result[f"after.gap_{n}"] for n in names) / 3, abs=1e-5)
    assert result["after.ppl_big"] == pytest.approx(result["teacher.ppl_big"] * result["after.gap_big"], rel=1e-4)
    assert result["after.mean_ce"] == pytest.approx(sum(math.log(result[f"after.ppl_{n}"]) for n in names) / 3, abs=1e-5)
    log = {x["step"]: x["valid"] for x in records(c, "valid")}
    gaps = lambda step: vector(*(log[step][f"gap_{n}"] for n in names))
    r, spent = ddk.prior(gaps(0)), []
    for step in (2, 4, 6, 8):  # the logged shares are Eq. 2 on the logged gaps, from Eq. 1 on
        r = ddk.mixture(r, gaps(step), 0.5)
        assert close(r.exp(), [log[step][f"share_{n}"] for n in names], 1e-9)
        spent += [log[step][f"share_{n}"] for n in names] if step < 8 else []
    natural = vector(*(log[0][f"share_{n}"] for n in names))
    assert natural[0] > natural[1] > natural[2]  # interval 0 is natural, r_0 is never drawn from
    average = (2 * natural + 2 * vector(*spent).view(3, 3).sum(0)) / 8
    assert close(average, [result[f"after.share_{n}"] for n in names], 1e-5)


def test_the_curve_has_a_point_at_every_look_and_every_evaluation(cfg):
    c = cfg(steps=8, interval=3, eval_every=2)
    ddk.train(c)
    assert [x["step"] for x in records(c, "valid")] == [0, 2, 3, 4, 6, 8]


def drawn(monkeypatch, c):
    """What a run draws, step by step."""
    out, draw = [], ddk.DomainSampler.draw
    monkeypatch.setattr(ddk.DomainSampler, "draw", lambda self, *args: out.append(draw(self, *args)) or out[-1])
    ddk.train(c)
    monkeypatch.setattr(ddk.DomainSampler, "draw", draw)
    return out


def test_interval_zero_is_drawn_in_natural_proportion_whatever_the_gaps(cfg, monkeypatch, tmp_path):
    runs = {m: drawn(monkeypatch, cfg(mix=m, out=str(tmp_path / m))) for m in ("ddk", "no-smoothing", "natural", "uniform")}
    assert runs["ddk"][:2] == runs["no-smoothing"][:2] == runs["natural"][:2] != runs["uniform"][:2]
    assert runs["ddk"] != runs["natural"]


def test_without_smoothing_the_shares_are_the_softmax_of_the_gaps(cfg):
    ddk.train(c := cfg(mix="no-smoothing"))
    for x in records(c, "valid"):
        if x["step"] in (2, 4, 6):
            wanted = vector(*(x["valid"][f"gap_{n}"] for n in ("big", "mid", "small"))).softmax(-1)
            assert close(wanted, [x["valid"][f"share_{n}"] for n in ("big", "mid", "small")], 1e-9)


def test_a_fixed_mixture_is_what_it_says(cfg, tmp_path):
    names, sizes = ["big", "mid", "small"], [40, 15, 5]
    for mix, wanted in (("small=.2,big=.5,mid=.3", [.5, .3, .2]), ("natural", [40 / 60, 15 / 60, 5 / 60]), ("uniform", [1 / 3] * 3)):
        assert close(ddk.fixed_shares(mix, names, sizes), wanted, 1e-12)
    result = ddk.train(cfg(mix="small=.2,big=.5,mid=.3", out=str(tmp_path / "fixed")))
    assert close([result[f"after.share_{n}"] for n in names], [.5, .3, .2], 1e-6)


@pytest.mark.parametrize("mix", ["ddk", *(pytest.param(mix, marks=pytest.mark.slow) for mix in ("no-smoothing", "uniform"))])
def test_a_resumed_run_ends_bit_by_bit_where_it_would_have_ended(cfg, mix, resumes_bitwise):
    """The checkpoint lies inside an interval, and inside a domain's epoch."""
    resumes_bitwise(ddk.train, cfg(mix=mix, steps=9, save_every=5), died=7)


def test_a_run_resumes_after_its_last_look_at_the_gaps(cfg, resumes_bitwise):
    resumes_bitwise(ddk.train, cfg(interval=6, steps=9, save_every=7), died=8)


def test_a_run_that_resumes_at_the_first_step_of_an_interval_keeps_its_old_shares(cfg, resumes_bitwise):
    resumes_bitwise(ddk.train, cfg(steps=7, interval=2, save_every=4), died=5)


def test_the_gaps_of_the_result_are_those_of_the_test_split_for_both_models(cfg):
    """And those of the log of the validation split, so that nothing that is reported has steered."""
    result, c = ddk.train(cfg(steps=0)), cfg()
    student, teacher, tokenizer = common.load_pair(c, CPU)
    data = common.load_domains(c, student, teacher, tokenizer)
    logged = records(c, "valid")[0]["valid"]
    ce = lambda model, split: ddk.domain_ce(model, getattr(data, split), c)
    gaps = {split: (ce(student, split) - ce(teacher, split)).exp().tolist() for split in ("valid", "test")}
    assert [result[f"before.gap_{n}"] for n in data.names] == pytest.approx(gaps["test"], rel=1e-4)
    assert [logged[f"gap_{n}"] for n in data.names] == pytest.approx(gaps["valid"], rel=1e-4)
    perplexities = ce(teacher, "test").exp().tolist()
    assert [result[f"teacher.ppl_{n}"] for n in data.names] == pytest.approx(perplexities, rel=1e-4)


def test_accumulation_in_the_script_itself(cfg, tmp_path):
    norms = []
    for accum in (1, 2, 6):
        ddk.train(c := cfg(steps=1, accum=accum, out=str(tmp_path / f"a{accum}")))
        norms += [x["grad_norm"] for x in records(c, "loss")]
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-4)


def test_gamma_zero_trains_as_cross_entropy_without_a_teacher_does(cfg, tmp_path):
    ddk.train(a := cfg(mix="uniform", gamma=0.0, out=str(tmp_path / "a")))
    ddk.train(b := cfg(mix="uniform", gamma=0.0, teacher="none", out=str(tmp_path / "b")))
    assert [x["loss"] for x in records(a, "loss")] == [x["loss"] for x in records(b, "loss")]


# ---- teachers that are exact: Markov tables -----------------------------------------------------------------------
def markov(root, sharp):
    """Domains of four words each with a known table: (teacher directory, student directory, sources, tables).

    The teacher is a Llama without layers: its logits are the logarithms of the table, so its cross entropy is the
    entropy and no student can do better in the mean. `sharp` says how far each domain is from uniform.
    """
    V, rng = 1 + 4 * len(sharp), np.random.default_rng(0)
    words = ["<eos>"] + [f"w{i}" for i in range(1, V)]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<eos>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>")
    table, sources = np.full((V, V), 1e-6), {}
    table[0] = 1 / V
    for d, s in enumerate(sharp):
        block = slice(1 + 4 * d, 5 + 4 * d)
        p = rng.dirichlet([1] * 4, 4) ** s
        table[block, block] = p / p.sum(-1, keepdims=True)
        texts = []
        for _ in range(120):
            x = [int(rng.integers(block.start, block.stop))]
            for _ in range(159):
                q = table[x[-1], block]
                x.append(block.start + int(rng.choice(4, p=q / q.sum())))
            texts.append(" ".join(words[i] for i in x))
        (root / f"d{d}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
        sources[f"d{d}"] = str(root / f"d{d}.jsonl")
    table /= table.sum(-1, keepdims=True)
    small = dict(vocab_size=V, num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=64, bos_token_id=0,
                 eos_token_id=0, pad_token_id=0, rms_norm_eps=1e-12, tie_word_embeddings=False)
    teacher = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        hidden_size=V, intermediate_size=V, num_hidden_layers=0, head_dim=2, **small))
    with torch.no_grad():
        teacher.model.embed_tokens.weight.copy_(torch.eye(V))
        teacher.lm_head.weight.copy_(torch.from_numpy(np.log(table).T / math.sqrt(V)))
    torch.manual_seed(0)
    student = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, **small))
    for name, model in (("teacher", teacher), ("student", student)):
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root / "teacher", root / "student", sources, table


def entropy_rate(p):
    """Of a Markov chain, nats a step: the entropies of its rows under its stationary distribution."""
    p = p / p.sum(-1, keepdims=True)
    pi = np.linalg.matrix_power(p, 500)[0]
    return -(pi[:, None] * p * np.log(p)).sum()


def test_exact_teachers_put_the_floor_of_every_gap_at_one(tmp_path, cfg):
    teacher, student, sources, table = markov(tmp_path, sharp=[3.0, 1.5, 0.0])
    c = cfg(teacher=str(teacher), student=str(student), data="tiny", gap_rows=50, eval_rows=50, steps=120, interval=20,
            eval_every=20, lr=2e-2, batch_size=12, domains=",".join(f"{n}={s}" for n, s in sources.items()))
    result = ddk.train(c)
    for d in range(3):
        block = slice(1 + 4 * d, 5 + 4 * d)
        ppl = math.exp(entropy_rate(table[block, block]))
        assert result[f"teacher.ppl_d{d}"] == pytest.approx(ppl, rel=0.15)  # 750 tokens, and an EOS now and then
        assert 0.93 < result[f"after.gap_d{d}"] < 1.15 < result[f"before.gap_d{d}"]
    log = [x["valid"] for x in records(c, "valid")]
    assert log[0]["gap_d0"] == max(log[0][f"gap_d{d}"] for d in range(3))  # the sharpest is hardest for a fresh student
    assert log[1]["share_d0"] > log[1]["share_d2"]
    # without differences nothing is left but the uniform mixture; the floor held all along
    assert all(abs(log[-1][f"share_d{d}"] - 1 / 3) < 0.1 for d in range(3))
    assert all(x[f"share_d{d}"] >= 1 / 6 - 1e-9 for x in log[1:] for d in range(3))


def test_no_distribution_beats_the_one_that_wrote_the_text():
    """The floor itself, without sampling: exp(expected CE of q - entropy of p) >= 1, and 1 at q = p only."""
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(200, 6, dtype=torch.float64, generator=generator).softmax(-1)
    q = (torch.randn(200, 6, dtype=torch.float64, generator=generator)).softmax(-1)
    cross = lambda a, b: -(a * b.log()).sum(-1)
    assert (ddk.domain_gap(cross(p, q), cross(p, p)) > 1).all() and (ddk.domain_gap(cross(p, p), cross(p, p)) == 1).all()


# ---- bad input ----------------------------------------------------------------------------------------------------
def refused(match, function, *args):
    with pytest.raises(common.BadInput, match=match) as caught:
        function(*args)
    assert "\n" not in str(caught.value).strip() and len(str(caught.value)) < 600


@pytest.mark.parametrize("settings, match", [
    (dict(mix="dkk"), "--mix dkk: ddk, no-smoothing, uniform, natural, or name=share"),
    (dict(alpha=1.2), "--alpha 1.2"), (dict(interval=0), "--interval 0"), (dict(gamma=-1.0), "--gamma -1.0"),
    (dict(tau=0.0), "--tau 0.0"), (dict(max_tokens=1), "--max-tokens 1"),
    (dict(max_tokens=128), "--max-tokens 128 does not fit the student's context of 64"),
    (dict(teacher="none"), "--gamma 0.2 with --mix ddk needs a teacher"),
    (dict(teacher="none", gamma=0.0), "--mix ddk needs a teacher"),
    (dict(teacher="none", mix="uniform"), "--gamma 0.2 with --mix uniform needs a teacher"),
    (dict(mix="big=.5,mid=.5"), "0 or more, together 1, are wanted for big, mid, small"),
    (dict(mix="big=.5,mid=.4,small=.4"), "together 1"), (dict(mix="big=.5,mid=nan,small=.5"), "together 1"),
    (dict(mix="big=1.5,mid=-.5,small=0"), "0 or more"), (dict(mix="big=.5,mid=.5,small=0,huge=0"), "are wanted for big, mid, small"),
    (dict(mix="big=half,mid=.5,small=.5"), "together 1"), (dict(mix="big=.5,big=.5"), "the name big is given twice"),
    (dict(data="nowhere"), "neither a tiny world .* nor a folder"),
    (dict(domains="a=x,a=y"), "the name a is given twice"), (dict(domains="a"), "name=value is wanted"),
    (dict(domains="a b=x,c=y"), "name=value is wanted"), (dict(domains="a=no.txt,b=no.txt"), "domain a: no.txt: there is no such file"),
    (dict(domains="a=no/such/data,b=no.txt"), "neither a file, a folder, a pattern nor a saved or hub data set"),
])
def test_bad_settings_are_refused_and_nothing_is_written(cfg, settings, match, tmp_path):
    refused(match, ddk.train, cfg(**settings))
    assert not (tmp_path / "run").exists()


def test_bad_domains_are_refused_by_name(cfg, corpus, tmp_path):
    train = lambda: ddk.train(cfg())
    (corpus / "tiny.jsonl").write_text('{"text": "the cat"}\n')
    refused("domain tiny: .* fewer than one sequence of 16", train)
    (corpus / "tiny.jsonl").write_text("")
    refused("tiny.jsonl: the file is empty", train)
    (corpus / "tiny.jsonl").write_bytes(b'{"text": "a"}\n\xff\xfe\n')
    refused("tiny.jsonl:2: not valid UTF-8", train)
    (corpus / "tiny.jsonl").write_text('{"text": "a"}\n{"text": \n')
    refused("tiny.jsonl:2: .* one JSON object a line", train)
    (corpus / "tiny.jsonl").write_text('{"txt": "a"}\n')
    refused("tiny.jsonl:1: no field 'text' .there: txt.: name it with --text-field", train)
    (corpus / "tiny.jsonl").unlink()
    (corpus / "image.png").write_bytes(b"PNG\0\1\2")
    refused("image.png:1: a binary file", train)
    (corpus / "image.png").unlink()
    (corpus / "mid.txt").write_text("the cat")
    refused("mid.jsonl and mid.txt are both called mid", train)
    (corpus / "mid.txt").unlink()
    (corpus / "mid.jsonl").unlink(), (corpus / "small.jsonl").unlink()
    refused("two domains or more, there is 1", train)
    assert not (tmp_path / "run").exists()
    assert not list(common.cache_dir().glob("packing-*"))  # nothing half-made stays behind


def test_running_text_wants_a_decoder_only_model(cfg, pair):
    refused("the student is an encoder-decoder", ddk.train, cfg(student=str(pair("t5")[1]), teacher=str(pair("t5")[0])))


def test_a_student_that_diverges_ends_in_a_sentence(cfg):
    """Nobody looks at the loss between two lines of the log, so it is the next look at the gaps that finds out."""
    with pytest.raises(common.RunFailed, match="no longer a finite number at step .*lower --lr"):
        ddk.train(cfg(lr=1000.0, log_every=100, interval=3, steps=30, warmup=0))


def test_gaps_below_one_are_legal_and_said_once(cfg, pair, capsys):
    teacher, student = pair("llama")
    ddk.train(cfg(teacher=str(student), student=str(teacher), lr=3e-2, steps=20))
    assert capsys.readouterr().out.count("a gap below 1") == 1
    ddk.train(cfg(teacher=str(student), student=str(student), lr=0.0, steps=1, out=cfg().out + "-same"))
    assert "a gap below 1" not in capsys.readouterr().out
