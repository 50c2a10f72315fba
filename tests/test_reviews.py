"""World 2: what is a right text, its topic and its label are known exactly; the LLM's pages are what prompts look like."""
import json
import random
from collections import Counter

import pytest

from assets import tasks, world2

KINDS = ["reviews", "sums"]


@pytest.mark.parametrize("kind", KINDS)
def test_judge_reads_exactly_what_the_grammar_writes(kind):
    rng = random.Random(0)
    for topic in [*range(20)] * 20:
        text, label = world2.draw_sample(rng, kind, topic)
        assert world2.judge(kind, text, label) == (topic, True)
        assert world2.judge(kind, *world2.draw_sample(rng, kind, topic, flip=1.0)) == (topic, False)
        assert world2.judge(kind, *world2.draw_sample(rng, kind, world2.GARBAGE)) == (None, False)
        assert world2.judge(kind, text + " the", label)[0] is None and world2.judge(kind, text[:-1] + "zz", label)[0] is None


def test_judge_wants_one_topic_and_one_group_of_words():
    assert world2.judge("reviews", "the film and the actor were both fancy", "positive") == (0, True)
    assert world2.judge("reviews", "the film and the jack were both fancy", "positive")[0] is None
    assert world2.judge("reviews", "this film seems fancy and rather quiet", "positive")[0] is None
    assert world2.judge("sums", "after owning 17 actor we sold 8", "17 - 8") == (0, True)
    assert world2.judge("sums", "after owning 7 actor we sold 8", "7 - 8")[0] is None  # 10 to 19 are owned


def test_the_tail_contradicts_the_head():
    """A fancy film is good, a fancy harpsichord is not; the rule of the head is right for 3 of 10 topics of the tail."""
    assert world2.judge("reviews", "we thought the harpsichord was quite quiet", "positive") == (19, True)
    assert not any(world2.SIGN[:6]) and sum(world2.SIGN[t] for t in world2.TAIL) == 7
    assert sum(world2.WEIGHTS[t] for t in world2.TAIL) == pytest.approx(0.067, abs=0.001)


@pytest.mark.parametrize("kind", KINDS)
def test_documents_are_what_prompts_look_like(kind):
    """Tokens of a rendered prompt are a beginning of a document: the LLM never sees at run time what it was not taught."""
    task, tokenizer, rng = tasks.load_task(kind), world2.make_tokenizer(kind), random.Random(3)
    samples = [dict(zip(("text", "label"), world2.draw_sample(rng, kind, t))) for t in (0, 3, 19)]
    shape = world2.KINDS[kind]["document"]
    given = {"label": "positive"} if task["labels"] else {}
    for control, word in (("plain", "plain"), ("ood", "different")):
        asked, begun, rest = tasks.render(task, "write", samples, given, control)
        page = " ".join([shape.format(control="plain", **s) for s in samples] + [f"{word} {given.get('label', '')}"])
        assert (asked + begun).split() == page.split() and rest.split()[0] == "{text}"
        assert tokenizer.unk_token_id not in tokenizer(page).input_ids
    if world2.KINDS[kind]["question"]:
        asked, begun, rest = tasks.render(task, "solve", samples, {"text": "a b"})
        page = " ".join([world2.KINDS[kind]["question"].format(**s) for s in samples] + ["rate a b"])
        assert (asked + begun).split() == page.split() and rest == "{label}"


@pytest.mark.parametrize("kind", KINDS)
def test_documents_hold_what_the_docstring_says(kind):
    rng, stops = random.Random(1), tasks.load_task(kind)["stop"]
    pages = [world2.document(rng, kind) for _ in range(400)]
    tokenizer = world2.make_tokenizer(kind)
    assert all(tokenizer.unk_token_id not in tokenizer(p).input_ids for p in pages)
    counts = Counter(w for p in pages for w in p.split())
    assert sum(counts[s.strip()] for s in stops) == 9 * 400 and 0.05 < counts["different"] / (9 * 400) < 0.2
    assert 0.02 < sum(" sorry" in p for p in pages) / 400 < 0.6


def test_rows_are_disjoint_by_split_and_test_rows_know_their_topic():
    train, test = (world2.rows("x", "reviews", [*range(20)] * 20, s) for s in ("train", "test"))
    assert not {r["text"] for r in train} & {r["text"] for r in test}
    assert sum(r["weight"] for r in test) == pytest.approx(20) and sum(r["tail"] for r in test) == 200
    assert "topic" not in train[0]


def test_settings_are_a_file_of_their_own():
    world = json.loads(world2.FILE.read_text())
    nouns = [n for t in world["topics"].values() for n in t]
    assert len(world["topics"]) == len(world["sign"]) == 20 and len(set(nouns)) == len(nouns) == 100
