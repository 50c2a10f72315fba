"""The evaluation: scores agree with the packages that people quote (rouge-score 0.1.2), divergences with enumeration."""
import dataclasses
import math

import pytest
import torch

import common

GOLDEN = [  # candidate, references, ROUGE-L F1 of rouge-score (best reference, no stemming)
    ("the cat sat on the mat", ["a cat sat on a mat ."], 0.666667),
    ("ada is a baker from oslo .", ["meet ada , the baker who lives in oslo .", "ada is a baker from rome ."], 0.833333),
    ("It costs $3.50, or 1,000 units (approx.)!", ["It cost $3.50 or 1,000 units - approx.", "Costs: 3.50"], 0.888889),
    ("", ["something"], 0.0),
    ("Hello", ["hello world, it's me"], 0.333333),
    ("the trip of ada : to oslo on monday", ["the trip of ada : to oslo on monday , soup to eat"], 0.842105),
    ("don't stop-believing &quot;now&quot;", ["do not stop believing \"now\""], 0.5),
    ("Naïve café noir", ["naive café_noir of Zoë"], 0.444444),
]


@pytest.mark.parametrize("candidate, references, wanted", GOLDEN)
def test_rouge_l_agrees_with_rouge_score(candidate, references, wanted):
    assert common.rouge_l(candidate, references) == pytest.approx(wanted, abs=1e-6)


def test_distinct_counts_different_ngrams():
    assert common.distinct(["a b a b", "a b"], 1) == 2 / 6
    assert common.distinct(["a b a b", "a b"], 2) == 2 / 4
    assert common.distinct([""], 2) == 0


def test_kl_directions_on_two_tokens_by_hand():
    p, q = torch.tensor([[0.75, 0.25]]), torch.tensor([[0.5, 0.5]])
    pq, qp = common.both_kl(q.log(), p.log(), None)
    assert pq.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), abs=1e-6)
    assert qp.item() == pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(2.0), abs=1e-6)


def test_the_evaluation_is_zero_between_a_model_and_itself_and_sums_over_the_response(config):
    cfg = config("llama")
    student, teacher, tokenizer = common.load_pair(cfg, torch.device("cpu"))
    data = common.load_data(cfg, student, teacher, tokenizer)
    other = common.load_model(cfg.teacher, torch.device("cpu"))  # the teacher's twin, measured as a student
    other.vocab = teacher.vocab
    evaluate = common.make_evaluator(cfg, teacher, tokenizer, data.test)
    twin, mine = evaluate(other), evaluate(student)
    assert twin["kl_pq"] == pytest.approx(0, abs=1e-5) and twin["kl_qp"] == pytest.approx(0, abs=1e-5)
    assert mine["kl_pq"] > 0.1 and mine["kl_qp"] > 0.1
    # by hand, one response at a time with the model's own logits
    answers = common.answer_examples(teacher, data.test, tokenizer, cfg, 1.0, 1234, "teacher")
    total = 0.0
    for e in answers:
        ids, first = torch.tensor([e.prompt + e.response]), len(e.prompt) - 1
        logp = teacher(ids).logits[0, first:-1].log_softmax(-1)
        logq = student(ids).logits[0, first:-1].log_softmax(-1)
        total += (logp.exp() * (logp - logq)).sum().item()
    assert mine["kl_pq"] == pytest.approx(total / len(answers), rel=1e-4)


def test_entropy_is_that_of_the_whole_response_by_enumeration(config):
    """Two tokens at most, of V: H(q(y|x)) = - sum over all responses of q log q, in the evaluation a mean over samples."""
    cfg = config("gpt2", max_response=2, eval_rows=4, eval_temperature=0.7)
    student, _, tokenizer = common.load_pair(dataclasses.replace(cfg, teacher="none"), torch.device("cpu"))
    test = common.load_data(cfg, student, None, tokenizer).test
    eos, exact = tokenizer.eos_token_id, []
    for e in test:
        first = (student(torch.tensor([e.prompt])).logits[0, -1] / 0.7).log_softmax(-1)
        second = (student(torch.tensor([e.prompt + [v] for v in range(len(first))])).logits[:, -1] / 0.7).log_softmax(-1)
        second[eos] = 0.0  # an end has no next token: one response, of log-probability 0 more
        joint = first[:, None] + second
        joint[eos, 1:] = -math.inf
        exact.append(-(joint.exp() * joint.nan_to_num(neginf=0.0)).sum().item())
    found = common.make_evaluator(cfg, None, tokenizer, test * 100)(student)["entropy"]
    assert found == pytest.approx(sum(exact) / len(exact), rel=0.02)


def test_eval_temperature_is_that_of_the_measured_distribution_not_of_the_teacher(config):
    """A student whose logits are twice as large, measured at T = 2, is the student itself; p stays where it was."""
    for kind in ("llama", "t5"):
        cfg = config(kind, max_response=4)
        student, teacher, tokenizer = common.load_pair(cfg, torch.device("cpu"))
        test = common.load_data(cfg, student, teacher, tokenizer).test
        plain = common.make_evaluator(cfg, teacher, tokenizer, test)(student)
        hot = common.make_evaluator(dataclasses.replace(cfg, eval_temperature=2.0), teacher, tokenizer, test)
        layer = student.get_output_embeddings()
        student.set_output_embeddings(torch.nn.Linear(*reversed(layer.weight.shape), bias=False))
        student.get_output_embeddings().weight.data = 2 * layer.weight.data
        twice = hot(student)
        assert {k: pytest.approx(v, rel=1e-4) for k, v in plain.items()} == twice
        assert hot(teacher)["kl_pq"] > 0.01


def test_the_teachers_texts_are_drawn_apart_from_those_of_the_measured_model(config, monkeypatch):
    """Else a model that is like its teacher would say the same by the same noise, and the teacher's own line too."""
    seeds, sample = [], common.sample
    monkeypatch.setattr(common, "sample", lambda model, prompts, n, temperature=1.0, **k: (
        seeds.append((model is teacher, temperature, k["seed"])), sample(model, prompts, n, temperature, **k))[1])
    cfg = config("llama", max_response=4)
    student, teacher, tokenizer = common.load_pair(cfg, torch.device("cpu"))
    test = common.load_data(cfg, student, teacher, tokenizer).test
    evaluate = common.make_evaluator(cfg, teacher, tokenizer, test)
    (of_teacher,) = [seed for is_teacher, _, seed in seeds if is_teacher]
    evaluate(student), evaluate(teacher)
    assert of_teacher not in [seed for _, temperature, seed in seeds[1:] if temperature == 1]


def test_length_and_no_end_are_those_of_samples_not_of_greedy_answers(config, monkeypatch):
    cfg = config("llama", max_response=4)
    student, teacher, tokenizer = common.load_pair(cfg, torch.device("cpu"))
    test, eos = common.load_data(cfg, student, teacher, tokenizer).test, tokenizer.eos_token_id
    said = lambda temperature: [5, 6, 7, 8] if temperature else [5, eos]
    monkeypatch.setattr(common, "answer_examples", lambda model, examples, tokenizer, cfg, temperature=1.0, *a, **k: [
        dataclasses.replace(e, response=said(temperature)) for e in examples])
    m = common.make_evaluator(cfg, teacher, tokenizer, test)(student)
    assert m["no_end"] == 1.0 and m["length"] == 4.0


def test_ce_is_a_mean_over_tokens(config):
    cfg = config("llama", teacher="none", alpha=0.0)
    student, _, tokenizer = common.load_pair(cfg, torch.device("cpu"))
    data = common.load_data(cfg, student, None, tokenizer)
    total, n = 0.0, 0
    for e in data.test:
        logq = student(torch.tensor([e.prompt + e.response])).logits[0, len(e.prompt) - 1:-1].log_softmax(-1)
        total, n = total - logq[range(len(e.response)), e.response].sum().item(), n + len(e.response)
    assert common.make_evaluator(cfg, None, tokenizer, data.test)(student)["ce"] == pytest.approx(total / n, rel=1e-4)


def test_the_teacher_is_measured_on_its_own_template(config, monkeypatch):
    """Its row is what a student is compared with: on another prompt it would look worse than it is."""
    cfg = config("llama", teacher_template="Sort: {prompt} =")
    student, teacher, tokenizer = common.load_pair(cfg, torch.device("cpu"))
    test, total, n = common.load_data(cfg, student, teacher, tokenizer).test, 0.0, 0
    for e in test:
        logp = teacher(torch.tensor([e.teacher_prompt + e.response])).logits[0, len(e.teacher_prompt) - 1:-1].log_softmax(-1)
        total, n = total - logp[range(len(e.response)), e.response].sum().item(), n + len(e.response)
    evaluate, answer, roles = common.make_evaluator(cfg, teacher, tokenizer, test), common.answer_examples, []
    monkeypatch.setattr(common, "answer_examples", lambda *a: roles.append((a[0] is teacher, *a[6:])) or answer(*a))
    assert evaluate(teacher)["ce"] == pytest.approx(total / n, rel=1e-4)
    evaluate(student)
    assert set(roles) == {(True, "teacher"), (False, "student")}  # samples and greedy answers


def test_which_numbers_are_of_samples_and_which_of_greedy_answers(config, monkeypatch):
    """Greedily the student says the second reference, whose white space does not count; at random one word three times,
    with its EOS in the last place."""
    student, _, tokenizer = common.load_pair(config(teacher="none"), torch.device("cpu"))
    ids = lambda text: tokenizer(text).input_ids + [tokenizer.eos_token_id]
    cfg = config(teacher="none", max_response=len(ids("sad sad sad")))
    examples = [common.Example(ids("x"), ids("x"), [], {"prompt": "x", "response": "a cat", "references": ["a cat", " a  dog\n"]})] * 2
    said = {0.0: "a dog", 1.0: "sad sad sad"}
    monkeypatch.setattr(common, "answer_examples", lambda model, examples, tokenizer, cfg, temperature=1.0, *_:
                        [dataclasses.replace(e, response=ids(said[temperature])) for e in examples])
    m = common.make_evaluator(cfg, None, tokenizer, examples)(student)
    assert m["exact_match_greedy"] == 1 and m["exact_match"] == 0
    assert m["rouge_l_greedy"] == pytest.approx(1) and m["rouge_l"] == 0
    x, y = ids("x"), ids(said[1.0])
    logq = student(torch.tensor([x + y])).logits[0, len(x) - 1:-1].log_softmax(-1)
    assert m["entropy"] == pytest.approx(-(logq.exp() * logq).sum().item(), rel=1e-4)
    assert m["distinct_1"] == 1 / 6 and m["distinct_2"] == 1 / 4 and m["length"] == len(ids("sad sad sad")) and m["no_end"] == 0


def test_mode_distance_is_the_total_variation_of_the_shares_of_wordings(config, monkeypatch):
    """0 where the student chooses among the wordings as the teacher does, however sure it is of them, 1 where it never does."""
    rows = [{"prompt": f"{kind} {i}", "response": None, "references": ["a cat", "a dog"], "probs": [.5, .5]} for kind in "xy" for i in range(2)]
    student, _, tokenizer = common.load_pair(config(teacher="none"), torch.device("cpu"))
    truth = common.KnownAnswers([common.Example([5], [5], [], row) for row in rows], tokenizer, config())
    teacher = truth.shares(torch.tensor([[.2, .2], [.4, .4], [.9, 0], [.3, 0]]))
    for mass, wanted in (([[.1, .1], [.2, .2], [.1, 0], [.1, 0]], 0), ([[.2, .2], [.4, .4], [0, .9], [0, .3]], 0.5),
                         ([[.3, .1], [.3, .1], [.9, 0], [.3, 0]], 0.125)):
        monkeypatch.setattr(truth, "mass", lambda *_: torch.tensor(mass))
        assert truth.metrics(student, "student", 1.0, teacher)["mode_distance"] == pytest.approx(wanted, abs=1e-6)


def test_the_mass_of_right_answers_and_its_shares_by_enumeration_each_model_on_its_own_template(config):
    """Through the evaluator: the probability of each right answer, one after the other, on unpadded tokens."""
    cfg = config("llama", teacher_template="Sort: {prompt} =")
    student, teacher, tokenizer = common.load_pair(cfg, torch.device("cpu"))
    encode = common.row_encoder(cfg, student, teacher, tokenizer)
    rows = [{"prompt": prompt, "response": None, "references": ["a cat", "dog"], "probs": [.5, .5]} for prompt in ("x the cat", "y", "x a dog")]
    shares, masses = [], []
    for model in (student, teacher):
        mass = []
        for e in map(encode, rows):
            prompt = e.prompt if model is student else e.teacher_prompt
            answers = [tokenizer(text).input_ids + [tokenizer.eos_token_id] for text in e.row["references"]]
            logp = [model(torch.tensor([prompt + y])).logits[0, len(prompt) - 1:-1].log_softmax(-1) for y in answers]
            mass.append([lp[range(len(y)), y].sum().exp().item() for lp, y in zip(logp, answers)])
        masses.append([sum(m) for m in mass])
        kinds = [[a + b for a, b in zip(mass[0], mass[2])], mass[1]]  # x and y
        shares.append([m[0] / sum(m) for m in kinds])
    wanted = sum(abs(a - b) for a, b in zip(*shares)) / 2  # of two wordings: half of twice the difference; mean of two kinds
    evaluate = common.make_evaluator(cfg, teacher, tokenizer, [encode(row) for row in rows])
    assert evaluate(student)["mode_distance"] == pytest.approx(wanted, rel=1e-4) and wanted > 1e-3
    assert evaluate(teacher)["mode_distance"] < 1e-6
    for model, (x, y, also_x) in zip((student, teacher), masses):
        m = evaluate(model)
        by_hand = [(x + also_x) / 2, y, (x + y + also_x) / 3]
        assert [m["valid_x"], m["valid_y"], m["valid_mass"]] == pytest.approx(by_hand, rel=1e-4)


def test_dropout_plays_no_part_in_what_is_measured(config):
    cfg = config("gpt2")
    student, teacher, tokenizer = common.load_pair(cfg, torch.device("cpu"))
    evaluate = common.make_evaluator(cfg, teacher, tokenizer, common.load_data(cfg, student, teacher, tokenizer).test)
    assert evaluate(student) == evaluate(student.train()) and student.training


def test_a_measurement_does_not_depend_on_the_size_of_chunks(config, monkeypatch):
    """Of a large vocabulary a chunk is a part of a batch, and begins in the middle of a response."""
    cfg = config("llama")
    student, teacher, tokenizer = common.load_pair(cfg, torch.device("cpu"))
    test = common.load_data(cfg, student, teacher, tokenizer).test
    measure = lambda: common.per_response(common.both_kl, student, teacher, test, cfg)
    whole = measure()
    monkeypatch.setattr(common, "chunks", lambda rows, *_: [slice(i, i + 5) for i in range(0, rows, 5)])
    assert len(test) > 2 and torch.allclose(measure(), whole, rtol=1e-5)
    alone = [common.per_response(common.both_kl, student, teacher, [e], cfg) for e in test]
    assert torch.allclose(torch.cat(alone), whole, rtol=1e-4)


def test_kl_on_references_needs_no_sampling(config):
    cfg = config("gpt2", kl_on="references")
    student, teacher, tokenizer = common.load_pair(cfg, torch.device("cpu"))
    data = common.load_data(cfg, student, teacher, tokenizer)
    m = common.make_evaluator(cfg, teacher, tokenizer, data.test)(student)
    values = common.per_response(common.both_kl, student, teacher, data.test, cfg)
    assert m["kl_pq"] == pytest.approx(values[:, 0].mean().item()) and m["kl_qp"] == pytest.approx(values[:, 1].mean().item())
