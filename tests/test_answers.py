"""World 1: p(y|x) is known, so what the ruler calls right is exactly what the generator can write."""
import random
import re

import pytest
import torch

import common
from assets import worlds


@pytest.mark.parametrize("family", list(worlds.FAMILIES))
def test_probabilities_sum_to_one_and_wordings_differ(family):
    rng = random.Random(0)
    for _ in range(200):
        found = worlds.answers(worlds.draw_prompt(rng, family))
        assert sum(p for p, _ in found) == pytest.approx(1) and len({t for _, t in found}) == len(found) == 3
        assert sorted((p for p, _ in found), reverse=True) == [0.6, 0.25, 0.15]  # no tie: greedy decoding is defined
        assert not any(re.search(r"[\[\]{}<>?]\S|  ", t) for _, t in found)  # every template was filled in


def test_answers_follow_the_prompt():
    answers = dict((t, p) for p, t in worlds.answers("describe city oslo ; name ada ; job baker ;"))
    assert answers["ada is a baker from oslo ."] == 0.6
    assert "this is ada . ada works as a baker . the home of ada is oslo ." in answers
    assert (0.25, "first apple , then fig , then plum .") in worlds.answers("sort plum apple fig")


def test_the_validator_accepts_exactly_the_wordings():
    right = [t for _, t in worlds.answers("sort plum apple fig")]
    judge = lambda text: any(text.split() == r.split() for r in right)  # as the ruler does
    assert all(judge(t) for t in right)
    assert not any(judge(t) for t in ["apple , plum , fig .", "apple , fig , plum", right[0] + " .", "first apple , fig , plum ."])


def test_rows_follow_the_stated_probabilities():
    rows = worlds.rows("check", 3000, "train", 3000)
    share = [sum(r["references"].index(r["response"]) == i for r in rows) / 3000 for i in range(3)]
    for got, wanted in zip(share, (0.6, 0.25, 0.15)):
        assert abs(got - wanted) < 4 * (wanted * (1 - wanted) / 3000) ** 0.5  # four standard errors


def test_splits_are_disjoint_and_the_same_for_every_world():
    train, valid, test = (set(worlds.prompts(s, 500, s)) for s in ("train", "valid", "test"))
    assert not train & valid and not train & test and not valid & test
    assert set(worlds.prompts("data 3", 500, "train")) != set(worlds.prompts("data 4", 500, "train"))
    assert worlds.rows("test", 50, "test", 50) == worlds.rows("test", 50, "test", 50)


def test_lengths_vary_threefold_and_labels_are_few():
    rows = worlds.rows("lengths", 400, "train", 100)
    lengths = [len(t.split()) for r in rows for t in r["references"]]
    assert max(lengths) >= 3 * min(lengths)
    assert sum(r["response"] is not None for r in rows) == 100


def test_the_tokenizer_knows_every_word_and_takes_the_usual_path():
    tokenizer = worlds.make_tokenizer()
    for row in worlds.rows("other words", 300, "test", 0):
        for text in (row["prompt"], *row["references"]):
            ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
            assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == text
    model = type("", (), {"config": type("", (), {"is_encoder_decoder": False})})
    ids = common.prompt_encoder(tokenizer, "auto", model, 64)("sort fig plum apple")
    assert tokenizer.decode(ids) == "<user> sort fig plum apple <assistant>"


def test_exact_mass_is_the_probability_of_sampling_a_right_answer(config, tmp_path):
    """valid_mass is `valid` without sampling noise: here for a model of which both can be computed."""
    tokenizer = worlds.make_tokenizer()
    worlds.write_config(tmp_path / "model", 16, 1, 2, tokenizer)
    worlds.write_rows(tmp_path / "data/train.jsonl", worlds.rows("t", 30, "train", 30))
    for s in ("valid", "test"):
        worlds.write_rows(tmp_path / f"data/{s}.jsonl", worlds.rows(s, 8, s, 8))
    cfg = config(student=str(tmp_path / "model"), teacher="none", data=str(tmp_path / "data"), max_prompt=64)
    student, teacher, tok = common.load_pair(cfg, torch.device("cpu"))
    data = common.load_data(cfg, student, teacher, tok)
    m = common.make_ruler(cfg, None, tok, data.test)(student)
    total = 0.0
    for e in data.test:
        for text in e.row["references"]:
            y = tok(text).input_ids + [tok.eos_token_id]
            logits = student(torch.tensor([e.prompt + y])).logits[0, len(e.prompt) - 1:-1].log_softmax(-1)
            total += logits[range(len(y)), y].sum().exp().item() / len(data.test)
    assert m["valid_mass"] == pytest.approx(total, rel=1e-4) and m["mode_1"] + m["mode_2"] + m["mode_3"] == pytest.approx(1, abs=1e-5)
