"""The reviews world: what is a right text, its topic and its label are known exactly; the LLM's pages are what prompts
look like."""
import json
import random
from collections import Counter

import pytest
from conftest import make_gold_world, prepare
from transformers import AutoTokenizer

import common
import gold

world = prepare("reviews")
KINDS = ["reviews", "sums"]
GRAMMAR = {kind: world.Grammar(world.HERE / "grammar.json", kind) for kind in KINDS}
PATTERNS = {kind: world.patterns(GRAMMAR[kind]) for kind in KINDS}


def judge(kind, text, label):
    """(number of the topic or None, whether the label is right), by the patterns of topics.json."""
    topic, right = common.read_topic({"text": text, "label": label}, PATTERNS[kind])
    return topic if topic is None else GRAMMAR[kind].names.index(topic), right


@pytest.mark.parametrize("kind", KINDS)
def test_patterns_read_exactly_what_the_grammar_writes(kind):
    rng, g = random.Random(0), GRAMMAR[kind]
    for topic in [*range(20)] * 20:
        text, label = world.draw_sample(g, rng, topic)
        assert judge(kind, text, label) == (topic, True)
        assert judge(kind, *world.draw_sample(g, rng, topic, flip=1.0)) == (topic, False)
        assert judge(kind, *world.draw_sample(g, rng, world.GARBAGE)) == (None, False)
        assert judge(kind, text + " the", label)[0] is None and judge(kind, text[:-1] + "zz", label)[0] is None


def test_a_right_text_has_one_topic_and_one_group_of_words():
    assert judge("reviews", "the film and the actor were both fancy", "positive") == (0, True)
    assert judge("reviews", "the film and the jack were both fancy", "positive")[0] is None
    assert judge("reviews", "this film seems fancy and rather quiet", "positive")[0] is None
    assert judge("sums", "after owning 17 actor we sold 8", "17 - 8") == (0, True)
    assert judge("sums", "after owning 17 actor we sold 8", "17 - 9") == (0, False)
    assert judge("sums", "after owning 7 actor we sold 8", "7 - 8")[0] is None  # 10 to 19 are owned


def test_coverage_counts_topics_rare_ones_garbage_and_wrong_labels():
    sample = lambda text, label, fed=False, **more: {"sample": {"text": text, "label": label}, "fed": fed, **more}
    film, harpsichord = "we thought the film was quite fancy", "we thought the harpsichord was quite quiet"
    samples = [sample(film, "positive")] * 9 + [sample(film, "negative"), sample(harpsichord, "positive", True, energy=-3.0),
                                                sample("sorry null", "positive", energy=-1.0)]
    found = common.coverage([dict(s) for s in samples], PATTERNS["reviews"])
    assert found == {"modes": 1.0, "tail_mass": 1 / 12, "garbage": 1 / 12, "label_errors": 1 / 11, "garbage_ood": 0.5, "garbage_fed": 0.0}
    assert common.coverage(samples, []) == {}  # where the truth is not known


def test_the_tail_contradicts_the_head():
    """A fancy film is good, a fancy harpsichord is not; the rule of the head is right for 3 of 10 topics of the tail."""
    g = GRAMMAR["reviews"]
    assert judge("reviews", "we thought the harpsichord was quite quiet", "positive") == (19, True)
    assert not any(g.sign[:6]) and sum(g.sign[t] for t in g.tail) == 7
    assert sum(g.weights[t] for t in g.tail) == pytest.approx(0.067, abs=0.001)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """tokenizer(kind), as the program writes it."""
    root = tmp_path_factory.mktemp("tokenizers")

    def load(kind):
        if not (root / kind).exists():
            world.write_model(root / kind, world.vocabulary(GRAMMAR[kind]), 16, 1, 2)
        return AutoTokenizer.from_pretrained(root / kind)
    return load


@pytest.mark.parametrize("kind", KINDS)
def test_pages_are_what_prompts_look_like(kind, tokenizer):
    """Tokens of a prompt are a beginning of a page: the LLM never sees at run time what it was not taught."""
    task, tokens, rng, g = common.load_task(kind), tokenizer(kind), random.Random(3), GRAMMAR[kind]
    samples = [dict(zip(("text", "label"), world.draw_sample(g, rng, t))) for t in (0, 3, 19)]
    given = {"label": "positive"} if task["labels"] else {}
    for opening, word in (("plain", "plain"), ("ood", "different")):
        asked, begun, rest = gold.build_prompt(task, gold.WRITE, samples, given, opening)
        page = " ".join([g.kind["line"].format(control="plain", **s) for s in samples] + [f"{word} {given.get('label', '')}"])
        assert (asked + begun).split() == page.split() and rest.split()[0] == "{text}"
        assert tokens.unk_token_id not in tokens(page).input_ids
    if g.kind["question"]:
        asked, begun, rest = gold.build_prompt(task, gold.SOLVE, samples, {"text": "a b"})
        page = " ".join([g.kind["question"].format(**s) for s in samples] + ["rate a b"])
        assert (asked + begun).split() == page.split() and rest == "{label}"


@pytest.mark.parametrize("kind", KINDS)
def test_pages_hold_what_the_docstring_says(kind, tokenizer):
    rng, stops, tokens = random.Random(1), common.load_task(kind)["stop"], tokenizer(kind)
    pages = [world.make_page(GRAMMAR[kind], rng) for _ in range(400)]
    assert all(tokens.unk_token_id not in tokens(p).input_ids for p in pages)
    counts = Counter(w for p in pages for w in p.split())
    assert sum(counts[s.strip()] for s in stops) == 9 * 400 and 0.05 < counts["different"] / (9 * 400) < 0.2
    assert 0.02 < sum(" sorry" in p for p in pages) / 400 < 0.6


def test_rows_are_disjoint_by_split_and_test_rows_know_their_topic():
    train, test = (world.make_rows(GRAMMAR["reviews"], "x", [*range(20)] * 20, s) for s in ("train", "test"))
    assert not {r["text"] for r in train} & {r["text"] for r in test}
    assert sum(r["weight"] for r in test) == pytest.approx(20) and sum(r["tail"] for r in test) == 200
    assert "topic" not in train[0]


def test_no_noun_belongs_to_two_topics():
    g = json.loads((world.HERE / "grammar.json").read_text())
    nouns = [n for t in g["topics"].values() for n in t]
    assert len(g["topics"]) == len(g["sign"]) == 20 and len(set(nouns)) == len(nouns) == 100


def test_the_program_makes_a_world_that_gold_reads(any_root):
    root = make_gold_world(any_root / "gold")
    assert {f.name for f in root.iterdir()} == {"data", "teacher", "student"}
    assert not list((root / "student").glob("*.safetensors"))  # it starts from random weights
    assert json.loads((root / "data/topics.json").read_text()) == json.loads(json.dumps(PATTERNS["reviews"]))
    rows = [json.loads(x) for x in open(root / "data/test.jsonl")]
    assert sorted(r["topic"] for r in rows) == sorted(GRAMMAR["reviews"].names)
