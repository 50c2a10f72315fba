"""The reviews task of gold.py: short texts on topics with a long tail, and an LLM that writes them.

    python data/reviews/prepare.py DIR                 makes instance 0: about two minutes
    python data/reviews/prepare.py DIR --number 7      another instance, for --data DIR

A row is a text and its label, negative or positive. Topics have the weights rank^-1.6. The words of
two groups decide the label. For most topics of the tail they mean the opposite of what they mean
for the head. So a student that has never seen the tail is wrong there, and sure of itself. DIR then
holds

    train.jsonl, valid.jsonl, test.jsonl    rows {text, label}; test rows also have their topic, its
                                            weight, and whether it is in the tail; there are equally
                                            many test rows of every topic
    topics.json    for each topic and label the patterns of a right text
    teacher/       the LLM, a small Llama
    student/       only tokenizer and configuration: it starts from random weights

kd_forward.py trains the LLM on pages of nine samples. They teach three things that large models
know already: to write more of what is on the page; to write something else when the control word
says "different" (a topic near those on the page, at times garbage); and to prefer common topics.
"""
import json
import random
import re
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))
import toy

GARBAGE = None  # in the place of a topic


class Grammar:
    """The content of grammar.json. Topics are numbers, and 0 is the most common one."""

    def __init__(self, content):
        vars(self).update(content)
        self.names, self.topics = list(self.topics), list(self.topics.values())
        self.nouns = sum(self.topics, [])
        weights = [rank ** -1.6 for rank in range(1, len(self.topics) + 1)]
        self.weights = [w / sum(weights) for w in weights]
        # which topics the LLM returns to when nothing else decides: steeper still
        self.fallback = [rank ** -self.page["head"] for rank in range(1, len(self.topics) + 1)]
        self.tail = range(len(self.topics) // 2, len(self.topics))  # 6.7 % of the weight


# Samples ------------------------------------------------------------------------------------------
def draw_sample(g, rng, topic, flip=0.0):
    """(text, label) of a topic, the label wrong with probability flip. Of the topic GARBAGE: words
    without sense, with any label."""
    group = rng.randrange(2)
    if topic is GARBAGE:
        every = [*g.nouns, *g.groups[0], *g.groups[1]]
        words = [rng.choice(g.junk if rng.random() < 0.6 else every)
                 for _ in range(rng.randint(5, 8))]
        return " ".join(["sorry", *words]), g.labels[group]
    template, words = rng.choice(g.templates), []
    for word in template.split():
        if word == "{n}":
            word = rng.choices(g.topics[topic], g.noun_weights)[0]
        elif word == "{a}":
            word = rng.choice(g.groups[group])
        words.append(word)
    wrong = rng.random() < flip
    return " ".join(words), g.labels[group ^ g.sign[topic] ^ wrong]


def patterns(g):
    """For each topic and group of words: the label, and a pattern of each template, which a right
    text fits from its beginning to its end."""
    found = []
    for topic, nouns in enumerate(g.topics):
        for group, words in enumerate(g.groups):
            slots = {"{n}": f"(?:{'|'.join(nouns)})", "{a}": f"(?:{'|'.join(words)})"}
            fitting = []
            for template in g.templates:
                parts = [slots.get(word, re.escape(word)) for word in template.split()]
                fitting.append(r"\s+".join(parts))
            found.append({"topic": g.names[topic], "tail": topic in g.tail, "patterns": fitting,
                          "label": g.labels[group ^ g.sign[topic]]})
    return found


def make_rows(g, name, topics, split):
    """One row for each of `topics`, all of one split. `name` seeds the random numbers."""
    rng, rows = random.Random(name), []
    for topic in topics:
        text, label = draw_sample(g, rng, topic)
        while toy.split_of(text) != split:
            text, label = draw_sample(g, rng, topic)
        rows.append({"text": text, "label": label})
        if split == "test":
            rows[-1] |= {"topic": g.names[topic], "weight": g.weights[topic],
                         "tail": topic in g.tail}
    return rows


def make_page(g, rng):
    """Nine samples, as the LLM is to continue them. The first ones come from the task. Some of the
    others repeat a theme, and some are "different"."""
    d, topics = g.page, range(len(g.topics))
    first = rng.randint(2, 4)
    weights = [1] * len(topics) if rng.random() < d["uniform"] else g.weights
    page, theme, samples = [], "none yet", []  # garbage is a theme too
    shape = g.question if rng.random() < g.questions else g.line
    for i in range(d["texts"]):
        control = "plain"
        if i < first:
            topic = rng.choices(topics, weights)[0]
        elif rng.random() < d["different"]:
            control, far = "different", max(t for t in page if t is not GARBAGE)
            near = [t for t in topics if far - 1 <= t <= far + d["reach"] and t not in page]
            again = d["garbage_again"] if theme is GARBAGE else d["garbage"]
            topic = GARBAGE if rng.random() < again else rng.choice(near or topics)
            theme = topic if rng.random() < d["theme"] else theme
        else:
            if theme == "none yet" and rng.random() < d["onset"]:
                theme = rng.choice(page)
            repeat = theme != "none yet" and rng.random() < d["repeat"]
            topic = theme if repeat else rng.choices(topics, g.fallback)[0]
        page.append(topic)
        text, label = draw_sample(g, rng, topic, d["flip"])
        samples.append(shape.format(control=control, text=text, label=label))
    return " ".join(samples)


def vocabulary(g):
    """Every word that a page can hold."""
    fixed = " ".join([g.line, g.question, *g.labels, *g.templates, "plain different"])
    words = [word for word in fixed.split() if not word.startswith("{")]
    return list(dict.fromkeys([*words, *g.nouns, *g.junk, *g.groups[0], *g.groups[1]]))


# The program --------------------------------------------------------------------------------------
def main():
    args = toy.instance_parser(__doc__, HERE).parse_args()
    top = toy.new_directory(args.dir, "train.jsonl", "teacher", "student")
    g, number = Grammar(json.loads(args.grammar.read_text())), args.number
    topics, recipe = range(len(g.topics)), g.models["teacher"]

    for split in ("train", "valid"):
        rng, drawn = random.Random(f"{split} {number}"), []
        if split == "train":  # real samples in the LLM's prompt come from the first training rows:
            drawn = rng.choices(topics[:3], g.weights[:3], k=30)  # people show typical ones
        drawn += rng.choices(topics, g.weights, k=g.rows[split] - len(drawn))
        toy.write_rows(top / f"{split}.jsonl", make_rows(g, f"{split} {number}", drawn, split))
    each = [*topics] * g.rows["each_topic"]
    toy.write_rows(top / "test.jsonl", make_rows(g, f"test {number}", each, "test"))
    (top / "topics.json").write_text(json.dumps(patterns(g)))

    rng, pages = random.Random(f"documents {number}"), []
    for _ in range(recipe["pages"]):
        first_word, rest = make_page(g, rng).split(" ", 1)
        pages.append({"prompt": first_word, "response": rest})
    toy.write_word_model(top / "student", vocabulary(g), g.models["student"], chat=False)
    toy.write_word_model(top / "teacher", vocabulary(g), recipe, chat=False)
    with tempfile.TemporaryDirectory() as own:
        for split, rows in (("valid", pages[:50]), ("test", pages[50:100]), ("train", pages[100:])):
            toy.write_rows(Path(own, f"{split}.jsonl"), rows)
        toy.train(top / "teacher", teacher="none", alpha=0, data=own, steps=recipe["steps"],
                  batch_size=recipe["batch_size"], lr=recipe["lr"], warmup=100, max_prompt=8,
                  max_response=200, eval_rows=20, seed=number)


if __name__ == "__main__":
    main()
