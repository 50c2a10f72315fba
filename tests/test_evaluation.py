"""The evaluation: against loops over single responses, and against the list of all responses."""
import dataclasses
import functools
import itertools
from types import SimpleNamespace

import pytest
import torch
from conftest import plain_logits, small_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import common
from common import Example

WORDS = ["<eos>", "a", "b", "c", "d"]
EOS, V = 0, len(WORDS)
CFG = SimpleNamespace(max_response=3, dtype="float32", eval_temperature=1.0, kl_on="samples",
                      data="rows.jsonl", template="auto", teacher_template="", response="response")
ROWS = [("x one", [1, 2], "a b", ["a b", "c"]), ("x two", [3], "c", ["c", "d d"]),
        ("y one", [2, 2, 4], "", ["d", "b"])]


@functools.cache
def model(kind, seed):
    made = small_model(kind, 16, V, seed)
    backend = Tokenizer(models.WordLevel(dict(zip(WORDS, range(V))), "<eos>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    made.vocab, made.role = V, "teacher" if seed == 2 else "student"
    return made


def examples(known=True, copies=1):
    """Of each row the student's prompt, the teacher's, and the given response."""
    found = []
    for text, prompt, response, references in ROWS:
        row = {"prompt": text, "response": response, "references": references,
               "probs": [0.5, 0.5] if known else []}
        ids = [WORDS.index(word) for word in response.split()]
        found.append(Example(prompt, [4, *prompt], ids + [EOS] if ids else [], row))
    return found * copies


@torch.no_grad()
def logprobs(kind, seed, x, y, tau=1.0):
    """(len(y), V), by the plain forward pass of one response."""
    return (plain_logits(model(kind, seed), x, y) / tau).double().log_softmax(-1)


def chance(logp, y):
    return sum(logp[t, token] for t, token in enumerate(y)).exp().item()


def mean(values):
    values = list(values)
    return float(sum(values) / len(values))


@pytest.mark.parametrize("kind", ["gpt2", "t5-scaled"])
@pytest.mark.parametrize("tau, kl_on", [(1.0, "samples"), (2.0, "samples"), (0.5, "references")])
def test_every_metric_equals_its_loop_over_single_responses(kind, tau, kl_on, monkeypatch):
    """The teacher reads its own prompts; --eval-temperature is that of the student alone."""
    written, respond = [], common.respond
    monkeypatch.setattr(common, "respond",
                        lambda *args: written.append(respond(*args)) or written[-1])
    cfg = SimpleNamespace(**{**vars(CFG), "eval_temperature": tau, "kl_on": kl_on})
    rows, (student, teacher) = examples(), (model(kind, 1), model(kind, 2))
    evaluate = common.Evaluator(cfg, teacher, rows)
    given = [e for e in rows if e.response]
    of_teacher = written[0] if kl_on == "samples" else given

    def wanted(seed, role, tau, drawn, greedy):
        prompt = lambda e: e.teacher_prompt if role else e.prompt
        logq = lambda e, y: logprobs(kind, seed, prompt(e), y, tau)
        logp = lambda e, y: logprobs(kind, 2, e.teacher_prompt, y)
        kl = lambda p, q: (p.exp() * (p - q)).sum()
        m = {"kl_pq": mean(kl(logp(e, e.response), logq(e, e.response)) for e in of_teacher),
             "kl_qp": mean(kl(logq(e, e.response), logp(e, e.response))
                           for e in (drawn if kl_on == "samples" else given)),
             "entropy": mean(-(q.exp() * q).sum() for q in [logq(e, e.response) for e in drawn]),
             "length": mean(len(e.response) for e in drawn),
             "no_end": mean(e.response[-1] != EOS for e in drawn)}
        nll = -sum(logq(e, e.response)[t, y] for e in given for t, y in enumerate(e.response))
        m["ce"] = float(nll) / sum(len(e.response) for e in given)
        mass = {}
        for who, f in (("own", logq), ("teacher", logp)):
            mass[who] = [[chance(f(e, y), y) for r in e.row["references"]
                          for y in [[WORDS.index(w) for w in r.split()] + [EOS]]] for e in rows]
        m["right"] = mean(map(sum, mass["own"]))
        shares = {}
        for who, (x1, x2, y1) in mass.items():  # the kind of a prompt is its first word: x or y
            kinds = [[a + b for a, b in zip(x1, x2)], y1]
            shares[who] = [[part / sum(k) for part in k] for k in kinds]
        m["wording_distance"] = mean(sum(abs(a - b) for a, b in zip(own, theirs)) / 2
                                     for own, theirs in zip(shares["own"], shares["teacher"]))
        said = [" ".join(WORDS[t] for t in e.response if t != EOS) for e in greedy]
        m["right_greedy"] = mean(text in e.row["references"] for text, e in zip(said, rows))
        return m

    for who, seed, role, of_tau in ((student, 1, "", tau), (teacher, 2, "teacher", 1.0)):
        written.clear()
        got = evaluate(who)
        assert got == pytest.approx(wanted(seed, role, of_tau, *written), rel=1e-4, abs=1e-5)
        assert [g["greedy"] for g in evaluate.generations] == [
            " ".join(WORDS[t] for t in e.response if t != EOS) for e in written[1]]
    assert got["kl_pq"] == got["kl_qp"] == got["wording_distance"] == 0.0


def test_kl_and_entropy_estimate_those_of_whole_responses():
    """All responses of at most two tokens are listed; 1000 samples a row come close."""
    student, teacher = model("gpt2", 1), model("gpt2", 2)
    cfg = SimpleNamespace(**{**vars(CFG), "max_response": 2})
    m = common.Evaluator(cfg, teacher, examples(copies=1000))(student)
    ended = [[*y, EOS] for k in range(2) for y in itertools.product(range(1, V), repeat=k)]
    every = ended + [list(y) for y in itertools.product(range(1, V), repeat=2)]
    pq, qp, entropy = [], [], []
    for e in examples():
        p = torch.tensor([chance(logprobs("gpt2", 2, e.teacher_prompt, y), y) for y in every])
        q = torch.tensor([chance(logprobs("gpt2", 1, e.prompt, y), y) for y in every])
        assert p.sum().item() == pytest.approx(1, abs=1e-5)
        pq.append((p * (p / q).log()).sum())
        qp.append((q * (q / p).log()).sum())
        entropy.append(-(q * q.log()).sum())
    assert min(mean(pq), mean(qp)) > 0.1
    assert (m["kl_pq"], m["kl_qp"], m["entropy"]) == (
        pytest.approx(mean(pq), rel=0.06), pytest.approx(mean(qp), rel=0.06),
        pytest.approx(mean(entropy), rel=0.03))


def test_what_was_generated_is_scored_greedy_for_rouge_and_matches_and_sampled_for_length(
        monkeypatch):
    said = {0.0: [4, 4, EOS], 1.0: [1, 1, 1]}  # greedily the second reference, at random no end
    monkeypatch.setattr(common, "respond", lambda m, rows, cfg, temperature=1.0, *_: [
        dataclasses.replace(e, response=said[temperature]) for e in rows])
    rows = examples(known=False)[1:2]
    evaluate = common.Evaluator(CFG, None, rows)
    m = evaluate(model("gpt2", 1))
    assert (m["rouge_l"], m["exact_match"], m["length"], m["no_end"]) == (1, 1, 3, 1)
    assert evaluate.generations == [{"prompt": "x two", "greedy": "d d", "sample": "a a a",
                                     "references": ["c", "d d"]}]
    assert not {"kl_pq", "right", "wording_distance"} & set(m)


@pytest.mark.parametrize("row", [{"response": "d  d"}, {"references": "d d"}])
def test_the_response_of_a_row_or_a_plain_string_is_one_reference(row, monkeypatch):
    row = common.read_row({"prompt": "a", **row}, "here", CFG)
    evaluate = common.Evaluator(CFG, None, [Example([1], [1], [4, 4, EOS], row)])
    monkeypatch.setattr(common, "respond", lambda m, rows, *_: rows)  # it says what is given
    assert evaluate(model("gpt2", 1))["exact_match"] == 1


def test_an_evaluation_repeats_and_leaves_dropout_out_and_training_mode_on():
    student = small_model("gpt2", 16, V, 1)
    student.tokenizer, student.vocab = model("gpt2", 1).tokenizer, V
    evaluate = common.Evaluator(CFG, model("gpt2", 2), examples())
    first = evaluate(student)
    assert evaluate(student.train()) == first and student.training


def test_the_teachers_samples_are_drawn_apart_from_those_of_the_measured_model(monkeypatch):
    """Else a student that is like its teacher would say the same by the same random numbers."""
    seeds, respond = [], common.respond
    monkeypatch.setattr(common, "respond", lambda m, rows, cfg, tau, seed: seeds.append(
        (m.role, tau, seed)) or respond(m, rows, cfg, tau, seed))
    common.Evaluator(CFG, model("gpt2", 2), examples())(model("gpt2", 1))
    assert len({seed for _, tau, seed in seeds if tau}) == 2


def test_per_response_gives_sums_that_depend_neither_on_batches_nor_on_chunks(monkeypatch):
    student, teacher, rows = model("gpt2", 1), model("gpt2", 2), examples()[:2] * 5
    measure = lambda size: common.per_response(common.both_kl, student, rows, CFG, teacher, size)
    whole = measure(64)
    assert whole.shape == (10, 2) and whole.dtype == torch.float64
    monkeypatch.setattr(common, "chunk_slices", lambda hidden, m: [
        slice(i, i + 2) for i in range(0, len(hidden), 2)])
    assert torch.allclose(measure(3), whole, rtol=1e-5)


@pytest.mark.parametrize("candidate, references, wanted", [
    ("the cat sat on the mat", ["a cat sat on a mat ."], 2 * 4 / (6 + 6)),
    ("", ["something"], 0), ("...", ["..."], 0), ("Hello", ["hello world it"], 2 / 4),
    ("b a", ["a b"], 2 / 4), ("a a a", ["a"], 2 / 4), ("x y", ["y z", "x q y"], 4 / 5),
    ("Кошка сидит на ковре", ["кошка спит на ковре!"], 6 / 8), ("naïve", ["Naïve"], 1)])
def test_rouge_l_is_the_f1_of_the_longest_common_subsequence_of_words_in_any_script(
        candidate, references, wanted):
    assert common.rouge_l(candidate, references) == pytest.approx(wanted)
