"""The answers world: p(y|x) is known, so what the evaluation calls right is exactly what the grammar can write."""
import json
import random
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import prepare, small_grammar
from transformers import AutoTokenizer

import common

world = prepare("answers")
GRAMMAR = json.loads((world.HERE / "grammar.json").read_text())
PROBABILITIES = [0.6, 0.25, 0.15]
ADA = dict(name="ada", job="baker", city="oslo")
PLUMS = dict(items=["plum", "apple", "fig"])


@pytest.mark.parametrize("family", list(GRAMMAR["families"]))
def test_probabilities_sum_to_one_and_wordings_differ(family):
    rng = random.Random(0)
    for _ in range(200):
        found = world.answers(GRAMMAR, family, world.draw(GRAMMAR, family, rng)[1])
        assert sum(p for p, _ in found) == pytest.approx(1) and len({t for _, t in found}) == len(found) == 3
        assert [p for p, _ in found] == PROBABILITIES  # no tie: greedy decoding is defined
        assert not any(re.search(r"[\[\]{}<>?]\S|  ", t) for _, t in found)  # every template was filled in


def test_answers_follow_the_prompt():
    answers = dict((t, p) for p, t in world.answers(GRAMMAR, "describe", ADA))
    assert answers["ada is a baker from oslo ."] == 0.6
    assert "this is ada . ada works as a baker . the home of ada is oslo ." in answers
    assert (0.25, "first apple , then fig , then plum .") in world.answers(GRAMMAR, "sort", PLUMS)


def test_a_prompt_says_its_facts_and_nothing_else():
    rng = random.Random(1)
    for family in GRAMMAR["families"]:
        for _ in range(100):
            prompt, facts = world.draw(GRAMMAR, family, rng)
            said = [w for slot, words in facts.items() for w in (words if slot == "items" else [words])]
            known = {w for words in GRAMMAR["lists"].values() for w in words}
            assert sorted(w for w in prompt.split() if w in known) == sorted(said)


def test_exactly_the_wordings_are_right():
    right = [t for _, t in world.answers(GRAMMAR, "sort", PLUMS)]
    judge = lambda text: any(text.split() == r.split() for r in right)  # as the evaluation does
    assert all(judge(t) for t in right)
    assert not any(judge(t) for t in ["apple , plum , fig .", "apple , fig , plum", right[0] + " .", "first apple , fig , plum ."])


def test_rows_follow_the_stated_probabilities():
    rows = world.make_rows(GRAMMAR, "check", 3000, "train", 3000)
    share = [sum(r["references"].index(r["response"]) == i for r in rows) / 3000 for i in range(3)]
    for got, wanted in zip(share, PROBABILITIES):
        assert abs(got - wanted) < 4 * (wanted * (1 - wanted) / 3000) ** 0.5  # four standard errors


def test_splits_have_no_facts_in_common_and_are_the_same_for_every_world():
    """The same facts in another order are the same question: its answers would be known from training."""
    rows = lambda name, split: world.make_rows(GRAMMAR, name, 500, split, 500)
    facts = lambda rows: {tuple(r["references"]) for r in rows}
    train, valid, test = (rows(s, s) for s in ("train", "valid", "test"))
    assert not facts(train) & facts(valid) and not facts(train) & facts(test) and not facts(valid) & facts(test)
    assert len(facts(train)) > 350 and facts(rows("data 3", "train")) != facts(rows("data 4", "train"))
    assert rows("test", "test") == test


def test_the_order_of_facts_and_of_items_decides_no_split():
    texts = lambda family, facts: [t for _, t in world.answers(GRAMMAR, family, facts)]
    assert texts("sort", PLUMS) == texts("sort", dict(items=sorted(PLUMS["items"])))
    assert texts("describe", ADA) == texts("describe", dict(list(ADA.items())[::-1]))
    assert {world.split_of([str(i)]) for i in range(99)} == {"train", "valid", "test"}


def test_two_words_of_one_list_differ_and_only_the_word_before_tells_them_apart():
    rng = random.Random(2)
    for _ in range(100):
        prompt, facts = world.draw(GRAMMAR, "reply", rng)
        assert facts["time1"] != facts["time2"] and f"from {facts['time1']}" in prompt and f"till {facts['time2']}" in prompt
        assert not any(facts["time2"] in text for _, text in world.answers(GRAMMAR, "reply", facts))


def test_lengths_vary_threefold_and_labels_are_few():
    rows = world.make_rows(GRAMMAR, "lengths", 400, "train", 100)
    lengths = [len(t.split()) for r in rows for t in r["references"]]
    assert max(lengths) >= 3 * min(lengths)
    assert sum(r["response"] is not None for r in rows) == 100


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model directory as the program writes it, without weights."""
    folder = tmp_path_factory.mktemp("answers") / "model"
    world.write_model(folder, GRAMMAR, 16, 1, 2)
    return folder


def test_the_tokenizer_knows_every_word_and_takes_the_usual_path(model):
    tokenizer = AutoTokenizer.from_pretrained(model)
    for row in world.make_rows(GRAMMAR, "other words", 300, "test", 0):
        for text in (row["prompt"], *row["references"]):
            ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
            assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == text
    decoder = SimpleNamespace(config=SimpleNamespace(is_encoder_decoder=False))
    ids = common.prompt_encoder(tokenizer, "auto", decoder, 64)("sort fig plum apple")
    assert tokenizer.decode(ids) == "<user> sort fig plum apple <assistant>"


def test_the_program_writes_rows_and_asks_kd_forward_for_its_models(tmp_path, monkeypatch):
    """Whole, but for the training: its commands are accepted by the script, and what they make is put in place."""
    import kd_forward
    asked = []

    def popen(command, **kw):
        cfg = common.parse_args(kd_forward.Config, command[2:])
        common.check_settings(cfg)
        asked.append(cfg)
        (common.Path(cfg.out) / "student").mkdir(parents=True)
        return SimpleNamespace(stdout=[], wait=lambda: 0)
    monkeypatch.setattr(world, "subprocess", SimpleNamespace(Popen=popen, PIPE=None, STDOUT=None))
    grammar = small_grammar("answers", tmp_path / "g.json", rows=dict(pretrain=80, pool=40, labelled=10, valid=5, test=6))
    for options in ([], ["--part", "student-kl"]):
        monkeypatch.setattr("sys.argv", ["prepare.py", str(tmp_path / "w"), "--number", "3", "--grammar", str(grammar), *options])
        world.main()
    assert {f.name for f in (tmp_path / "w").iterdir()} == {"data", "teacher", "student", "student-kl"}
    rows = [json.loads(x) for x in open(tmp_path / "w/data/train.jsonl")]
    assert len(rows) == 40 and sum(r["response"] is not None for r in rows) == 10
    teacher, student, kl = asked
    assert [c.teacher for c in (teacher, student)] == ["none"] * 2 and kl.teacher == str(tmp_path / "w/teacher")
    assert teacher.data != student.data == kl.data and kl.responses == "teacher" and [c.seed for c in asked] == [3, 0, 0]


def test_exact_mass_is_the_probability_of_sampling_a_right_answer(config, model, tmp_path):
    """valid_mass is `valid` without sampling noise: here for a model of which both can be computed."""
    for split, n in (("train", 30), ("valid", 8), ("test", 8)):
        world.write_rows(tmp_path / f"data/{split}.jsonl", world.make_rows(GRAMMAR, split, n, split, n))
    cfg = config(student=str(model), teacher="none", data=str(tmp_path / "data"), max_prompt=64)
    student, teacher, tok = common.load_pair(cfg, torch.device("cpu"))
    data = common.load_data(cfg, student, teacher, tok)
    m = common.make_evaluator(cfg, None, tok, data.test)(student)
    total = 0.0
    for e in data.test:
        for text in e.row["references"]:
            y = tok(text).input_ids + [tok.eos_token_id]
            logits = student(torch.tensor([e.prompt + y])).logits[0, len(e.prompt) - 1:-1].log_softmax(-1)
            total += logits[range(len(y)), y].sum().exp().item() / len(data.test)
    assert m["valid_mass"] == pytest.approx(total, rel=1e-4, abs=0)  # 1e-12, the default, is more than it is
    assert sum(m[f"mode_{i}"] for i in range(1, 4)) == pytest.approx(1, abs=1e-5)
