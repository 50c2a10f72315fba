"""The analysis of the excess error, tests/evidence/excess.py: its sums on enumerated trees, its divergences on models."""
import math

import pytest
import torch
from evidence import excess
from test_llmr import CPU, Tree

import common


def kl_by_place(tree, p, q):
    """KL(p||q) of the states that every response of the tree passes through: (responses, N)."""
    logp, logq = p.log_softmax(-1), q.log_softmax(-1)
    return (logp.exp() * (logp - logq)).sum(-1)[tree.at[:, :-1]]


def R_and_leps(tree, p, q):
    """By enumeration: responses weighted with their probability under the student, under the teacher."""
    d = kl_by_place(tree, p, q)
    chance = [(tree.logq(x) * tree.inside).sum(-1).exp() for x in (q, p)]
    return [excess.accumulated(d, tree.lengths, w) for w in chance]


def test_accumulated_error_is_the_expectation_over_prefixes():
    """Against sums over the prefixes themselves, each with the product of its tokens' probabilities."""
    tree = Tree(V=4, N=3, seed=3)
    for found, sampler in zip(R_and_leps(tree, tree.f, tree.theta), (tree.theta, tree.f)):
        total, p, q = 0.0, tree.f.softmax(-1), tree.theta.softmax(-1)
        for t in range(tree.N):
            prefixes = [s for s in tree.states if len(s) == t]
            chance = [math.prod(float(sampler.softmax(-1)[tree.place[s[:i]], s[i]]) for i in range(t)) for s in prefixes]
            d = [sum(float(a * (a / b).log()) for a, b in zip(p[tree.place[s]], q[tree.place[s]])) for s in prefixes]
            total += sum(c * x for c, x in zip(chance, d)) / sum(chance)
            assert float(found[t]) == pytest.approx(total, rel=1e-10)
    assert torch.allclose(*(excess.accumulated(kl_by_place(tree, tree.f, tree.f), tree.lengths, w) for w in (None, tree.lengths)))


def test_the_ratio_alone_misleads():
    """An example: a student that only sharpens the teacher is five times as far from it, on its own prefixes and on the
    teacher's, as one with small random errors; and it has the better, even a negative, excess error."""
    tree = Tree(V=4, N=3, seed=54)
    (R0, leps0), (R1, leps1) = (R_and_leps(tree, tree.f, q) for q in (tree.f + 0.5 * tree.theta, 3 * tree.f))
    assert R1[-1] > 5 * R0[-1] and leps1[-1] > 5 * leps0[-1]
    assert excess.excess(R1, leps1)[-1] < 0 < excess.excess(R0, leps0)[-1]


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_divergences_by_place_are_those_of_the_models(config, kind):
    cfg = config(kind, max_response=7)
    student, teacher, tokenizer = common.load_pair(cfg, CPU)
    drawn = common.answer_examples(student, common.load_data(cfg, student, teacher, tokenizer).test, tokenizer, cfg)
    d, lengths = excess.divergences(student, teacher, drawn, batch_size=3)
    for e, row, n in zip(drawn, d, lengths):
        if kind == "t5":
            read = lambda m, e=e: m(input_ids=torch.tensor([e.prompt]), decoder_input_ids=torch.tensor([[0] + e.response])).logits[0, :-1]
        else:
            read = lambda m, e=e: m(torch.tensor([e.prompt + e.response])).logits[0, len(e.prompt) - 1:-1]
        logq, logp = (read(m)[:, :student.vocab].log_softmax(-1) for m in (student, teacher))
        want = (logp.exp() * (logp - logq)).sum(-1).detach()
        assert n == len(e.response) and row.tolist() == pytest.approx(want.tolist() + [0.0] * (len(row) - n), abs=1e-4)
