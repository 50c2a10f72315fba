"""The reviews world of gold.py: short texts about topics with a long tail, and a small LLM that can write them.

    python data/reviews/prepare.py DIR                              data, teacher (the LLM) and student of world 0
    python data/reviews/prepare.py DIR --number 1 --kind sums       another world, of the second kind

Two kinds of task come from one grammar.json. Reviews: a text and its label, negative or positive. Sums: a story with
two numbers, and its equation. Topics have the weights rank^-1.6. Two groups of words decide the label, and for most
topics of the tail they mean the opposite of what they mean for the head: a student that has never seen the tail is
wrong there, and sure of itself. DIR then holds

    data/train.jsonl, valid.jsonl, test.jsonl    rows {text, label}; test rows also know their topic, its weight, and
                                                 whether it is in the tail, and there are as many of every topic
    data/topics.json                             for each topic and label the patterns of a right text
    teacher/, student/                           Hugging Face model directories; the student has random weights

The LLM is a small Llama, trained for about a minute on pages of nine samples. They teach it three things that large
models bring along: to write more of what is on the page, to write something else when the control word says
"different" (a topic near those on the page, at times garbage), and to favour common topics.
"""
import argparse
import json
import random
import re
import shlex
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers

HERE = Path(__file__).resolve().parent
GARBAGE = None  # in the place of a topic


class Grammar:
    """grammar.json, as one kind of task sees it. Topics are numbers, 0 the most common."""

    def __init__(self, file, kind):
        g = json.loads(file.read_text())
        self.topics, self.names, self.sign = list(g["topics"].values()), list(g["topics"]), g["sign"]
        self.kind, self.page, self.junk, self.noun_weights = g["kinds"][kind], g["page"], g["junk"], g["noun_weights"]
        self.rows, self.models, self.is_sums = g["rows"], g["models"], kind == "sums"
        ranks = range(1, len(self.topics) + 1)
        weights = [rank ** -1.6 for rank in ranks]
        self.weights = [w / sum(weights) for w in weights]
        self.fallback = [rank ** -self.page["head"] for rank in ranks]  # what the LLM falls back to: steeper still
        self.tail = range(len(self.topics) // 2, len(self.topics))      # 6.7 % of the weight
        self.nouns = [noun for topic in self.topics for noun in topic]


# ----------------------------------------------------------------------------------------------------------
# Samples
# ----------------------------------------------------------------------------------------------------------
def fill(g, rng, template, nouns, words):
    """A template with its slots drawn -> (text, the numbers x and y)."""
    numbers = {name: str(rng.randint(*span)) for name, span in g.kind["numbers"].items()}
    draw = {"{n}": lambda: rng.choices(nouns, g.noun_weights)[0], "{a}": lambda: rng.choice(words),
            "{v}": lambda: rng.choice(words), "{x}": lambda: numbers["x"], "{y}": lambda: numbers["y"]}
    return " ".join(draw[w]() if w in draw else w for w in template.split()), numbers


def draw_sample(g, rng, topic, flip=0.0):
    """(text, label) of a topic, the label wrong with probability flip; topic GARBAGE: junk with any label."""
    group = rng.randrange(2)
    if topic is GARBAGE:
        every = [*g.nouns, *g.kind["groups"][0], *g.kind["groups"][1]]
        words = [rng.choice(g.junk if rng.random() < 0.6 else every) for _ in range(rng.randint(5, 8))]
        numbers = fill(g, rng, g.kind["labels"][group], [], [])[0]
        return " ".join(["sorry", *words]), numbers
    text, numbers = fill(g, rng, rng.choice(g.kind["templates"]), g.topics[topic], g.kind["groups"][group])
    wrong = rng.random() < flip
    return text, g.kind["labels"][group ^ g.sign[topic] ^ wrong].format(**numbers)


def patterns(g):
    """For each topic and group of words: the label, and a pattern of each template, that a right text fits whole."""
    any_of = lambda words, name="?:": f"({name}{'|'.join(words)})"
    out = []
    for topic, nouns in enumerate(g.topics):
        for group, words in enumerate(g.kind["groups"]):
            slots = {"{n}": any_of(nouns), "{a}": any_of(words), "{v}": any_of(words)}
            for name, (low, high) in g.kind["numbers"].items():
                slots["{" + name + "}"] = any_of([str(i) for i in range(low, high + 1)], f"?P<{name}>")
            found = [r"\s+".join(slots.get(w, re.escape(w)) for w in t.split()) for t in g.kind["templates"]]
            out.append({"topic": g.names[topic], "tail": topic in g.tail, "patterns": found,
                        "label": g.kind["labels"][group ^ g.sign[topic]]})
    return out


def split_of(text):
    """The hash of a text decides its split, so that splits are disjoint, and the same in every world."""
    return {0: "test", 1: "valid"}.get(zlib.crc32(text.encode()) % 10, "train")


def make_rows(g, name, topics, split):
    """One row for each of `topics`, all of one split."""
    rng, out = random.Random(name), []
    for topic in topics:
        while True:
            text, label = draw_sample(g, rng, topic)
            if split_of(text) == split:
                break
        known = {"topic": g.names[topic], "weight": g.weights[topic], "tail": topic in g.tail}
        out.append({"text": text, "label": label, **(known if split == "test" else {})})
    return out


def make_page(g, rng):
    """Nine samples, as the LLM is to go on with them: the first from the task, then more of a theme, or "different"."""
    d, topics = g.page, range(len(g.topics))
    first = rng.randint(2, 4)
    weights = [1] * len(topics) if rng.random() < d["uniform"] else g.weights
    page, theme, out = [], "none yet", []  # garbage is a theme too
    shape = g.kind["question"] if rng.random() < g.kind["questions"] else g.kind["line"]
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
        out.append(shape.format(control=control, text=text, label=label))
    return " ".join(out)


def write_rows(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


# ----------------------------------------------------------------------------------------------------------
# Models: a tokenizer and a configuration, which kd_forward.py fills with trained weights
# ----------------------------------------------------------------------------------------------------------
def vocabulary(g):
    """{word: id}: the special tokens, then every word of the grammar."""
    numbers = [str(i) for low, high in g.kind["numbers"].values() for i in range(low, high + 1)] if g.is_sums else []
    shapes = " ".join([g.kind["line"], g.kind["question"], *g.kind["labels"], *g.kind["templates"], "plain different"])
    words = [w for w in shapes.split() if w[0] != "{"] + [*g.nouns, *g.junk, *sum(g.kind["groups"], []), *numbers]
    return {word: i for i, word in enumerate(dict.fromkeys(["<pad>", "<eos>", "<unk>", *words]))}


def write_model(folder, words, width, layers, heads):
    """A model directory without weights. It has no chat template: this LLM goes on with a page, as base models do."""
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<pad>", "<eos>", "<unk>"])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "eos_token": "<eos>",
        "unk_token": "<unk>", "clean_up_tokenization_spaces": False}))
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": len(words),
        "hidden_size": width, "intermediate_size": 5 * width // 2, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": heads, "max_position_embeddings": 1024,
        "initializer_range": 0.05, "tie_word_embeddings": True,
        "pad_token_id": words["<pad>"], "bos_token_id": None, "eos_token_id": words["<eos>"]}))


def train(target, work, **settings):
    """Make the model directory `target` by a run of kd_forward.py in the folder `work`; show only its losses."""
    settings = {"teacher": "none", "alpha": 0, "warmup": 100, "max_prompt": 8, "max_response": 200, "eval_rows": 20,
                "eval_every": 10**9, "save_every": 10**9, "log_every": 100, "device": "cpu", "dtype": "float32",
                "out": work / target.name, **settings}
    command = [sys.executable, str(HERE.parents[1] / "kd_forward.py"), "--no-compile"]
    for name, value in settings.items():
        command += ["--" + name.replace("_", "-"), str(value)]
    print(f"\n{target.name}:\n{shlex.join(command)}", flush=True)
    run = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    said = []
    for line in run.stdout:
        said.append(line)
        if re.match(r"step .*  loss ", line):
            print("  " + re.sub(r"  ce .*  tokens \d+", "", line), end="", flush=True)
    if run.wait():
        sys.exit(f"{''.join(said)}\nthe command above failed with exit status {run.returncode}")
    shutil.move(work / target.name / "student", target)


# ----------------------------------------------------------------------------------------------------------
# The world
# ----------------------------------------------------------------------------------------------------------
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", type=Path, help="the directory to make")
    parser.add_argument("--number", type=int, default=0, help="which world: seeds rows, pages and the LLM")
    parser.add_argument("--kind", choices=["reviews", "sums"], default="reviews")
    parser.add_argument("--grammar", type=Path, default=HERE / "grammar.json")
    args = parser.parse_args()
    top, g, number = args.dir.resolve(), Grammar(args.grammar, args.kind), args.number
    work, topics = top / "work", range(len(g.topics))
    shutil.rmtree(work, ignore_errors=True)  # what an interrupted run may have left

    for split in ("train", "valid"):
        draw = random.Random(f"{split} {number}")
        # the real samples in the LLM's prompt come from the first training rows: people show typical ones
        drawn = draw.choices(topics[:3], g.weights[:3], k=30) if split == "train" else []
        drawn += draw.choices(topics, g.weights, k=g.rows[split] - len(drawn))
        write_rows(top / f"data/{split}.jsonl", make_rows(g, f"{split} {number}", drawn, split))
    test = make_rows(g, f"test {number}", [*topics] * g.rows["each_topic"], "test")
    write_rows(top / "data/test.jsonl", test)
    (top / "data/topics.json").write_text(json.dumps(patterns(g)))

    recipe, rng = g.models["teacher"], random.Random(f"documents {number}")
    pages = [make_page(g, rng).split(" ", 1) for _ in range(recipe["pages"])]
    pages = [{"prompt": start, "response": rest} for start, rest in pages]
    for split, rows in (("train", pages[100:]), ("valid", pages[:50]), ("test", pages[50:100])):
        write_rows(work / f"pages/{split}.jsonl", rows)
    words = vocabulary(g)
    for name, folder in (("teacher", work / "random"), ("student", top / "student")):
        write_model(folder, words, *(g.models[name][key] for key in ("width", "layers", "heads")))
    train(top / "teacher", work, student=work / "random", data=work / "pages", seed=number,
          **{key: recipe[key] for key in ("steps", "batch_size", "lr")})
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
