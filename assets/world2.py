"""Tiny world 2 (gold): short texts about topics with a long tail, and a small LLM that can write them. Skip it freely.

Two kinds of task, from one grammar (world2.json). Reviews: a text and its label, negative or positive. Sums: a story
with two numbers and its equation (assets/world2sums.py). Topics have weights rank^-1.6. Two groups of words decide
the label, and for most topics of the tail they mean the opposite of what they mean for the head: a student that has
never seen the tail is wrong there. What is a right text, its topic and its label are decided exactly (`judge`).

The LLM is a small Llama, trained for a minute on documents of nine samples. They teach it three things that large
models bring along: to write more of what is on the page, to write something else when the control word says
"different" (a topic near those on the page, at times garbage), and to favour common topics.
"""
import hashlib
import json
import random
import shutil
import sys
import tempfile
import zlib
from contextlib import redirect_stdout
from pathlib import Path

from assets.worlds import Progress, move, write_config, write_rows

FILE = Path(__file__).with_name("world2.json")
WORLD = json.loads(FILE.read_text())
TOPICS, SIGN, KINDS, DOCUMENT, MODELS = (WORLD[k] for k in ("topics", "sign", "kinds", "document", "models"))
NAMES = list(TOPICS)
WEIGHTS = [rank ** -1.6 for rank in range(1, len(NAMES) + 1)]
WEIGHTS = [w / sum(WEIGHTS) for w in WEIGHTS]
HEAD = [rank ** -DOCUMENT["head"] for rank in range(1, len(NAMES) + 1)]  # what the LLM falls back to: steeper still
TAIL = range(len(NAMES) // 2, len(NAMES))  # 6.7 % of the weight
OF_NOUN = {noun: i for i, name in enumerate(NAMES) for noun in TOPICS[name]}
GARBAGE = None  # in the place of a topic


def fill(rng, kind, template, nouns, words):
    """A template with its slots drawn -> (text, the numbers x and y)."""
    numbers = {k: str(rng.randint(*span)) for k, span in KINDS[kind]["numbers"].items()}
    draw = {"{n}": lambda: rng.choices(nouns, WORLD["noun_weights"])[0], "{a}": lambda: rng.choice(words),
            "{v}": lambda: rng.choice(words), "{x}": lambda: numbers["x"], "{y}": lambda: numbers["y"]}
    return " ".join(draw[w]() if w in draw else w for w in template.split()), numbers


def draw_sample(rng, kind, topic, flip=0.0):
    """(text, label) of a topic, the label wrong with probability flip; topic GARBAGE: junk with any label."""
    k, group = KINDS[kind], rng.randrange(2)
    if topic is GARBAGE:
        every = [*OF_NOUN, *k["groups"][0], *k["groups"][1]]
        words = [rng.choice(WORLD["junk"] if rng.random() < 0.6 else every) for _ in range(rng.randint(5, 8))]
        return " ".join(["sorry", *words]), fill(rng, kind, k["labels"][group], [], [])[0]
    text, numbers = fill(rng, kind, rng.choice(k["templates"]), TOPICS[NAMES[topic]], k["groups"][group])
    return text, k["labels"][group ^ SIGN[topic] ^ (rng.random() < flip)].format(**numbers)


def judge(kind, text, label):
    """(topic or GARBAGE, whether the label is right): does any template fit, with one topic and one group of words?"""
    words, k = text.split(), KINDS[kind]
    for template in k["templates"]:
        slots = template.split()
        if len(slots) == len(words) and all(s == w for s, w in zip(slots, words) if s[0] != "{"):
            of = lambda *names: [w for s, w in zip(slots, words) if s in names]
            numbers = {n: of("{" + n + "}")[0] for n in k["numbers"] if "{" + n + "}" in slots}
            topics = {OF_NOUN.get(w) for w in of("{n}")}
            groups = {next((g for g in (0, 1) if w in k["groups"][g]), None) for w in of("{a}", "{v}")}
            fits = all(v.isdigit() and a <= int(v) <= b for (a, b), v in
                       ((k["numbers"][n], v) for n, v in numbers.items()))
            if fits and len(topics) == len(groups) == 1 and None not in topics | groups:
                topic, group = topics.pop(), groups.pop()
                return topic, label.split() == k["labels"][group ^ SIGN[topic]].format(**numbers).split()
    return GARBAGE, False


def document(rng, kind):
    """Nine samples, as the LLM is to continue them: the first from the task, then more of a theme, or "different"."""
    d, k, topics = DOCUMENT, KINDS[kind], range(len(NAMES))
    first, weights = rng.randint(2, 4), [1] * len(NAMES) if rng.random() < d["uniform"] else WEIGHTS
    page, theme, out = [], "none yet", []  # garbage is a theme too
    shape = k["question"] if rng.random() < k["questions"] else k["document"]
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
            topic = theme if repeat else rng.choices(topics, HEAD)[0]
        page.append(topic)
        text, label = draw_sample(rng, kind, topic, d["flip"])
        out.append(shape.format(control=control, text=text, label=label))
    return " ".join(out)


def split_of(text):
    return {0: "test", 1: "valid"}.get(zlib.crc32(text.encode()) % 10, "train")


def rows(name, kind, topics, split):
    """One row for each of `topics`, all of one split: the hash of a text decides which, so splits are disjoint. Test
    rows know the share of their topic, since there are as many of each."""
    rng, out = random.Random(name), []
    for topic in topics:
        while True:
            text, label = draw_sample(rng, kind, topic)
            if split_of(text) == split:
                break
        known = {"topic": NAMES[topic], "weight": WEIGHTS[topic], "tail": topic in TAIL} if split == "test" else {}
        out.append({"text": text, "label": label, **known})
    return out


def make_tokenizer(kind):
    """One token a word. Without a chat template: this LLM continues a page, as base models do."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    k, special = KINDS[kind], ["<pad>", "<eos>", "<unk>"]
    numbers = [str(i) for a, b in k["numbers"].values() for i in range(a, b + 1)] if kind == "sums" else []
    shapes = " ".join([k["document"], k["question"], *k["labels"], *k["templates"], "plain different"]).split()
    words = [w for w in shapes if w[0] != "{"] + [*OF_NOUN, *WORLD["junk"], *sum(k["groups"], []), *numbers]
    numbered = {w: i for i, w in enumerate(dict.fromkeys(special + words))}
    backend = Tokenizer(models.WordLevel(numbered, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
                                   clean_up_tokenization_spaces=False)


def build(number, cache, part="teacher", kind="reviews"):
    """The directory of world 2, number `number`, made on first use: data, teacher (the LLM), student (no weights)."""
    settings = json.dumps({**WORLD, "kinds": KINDS[kind]}).encode()  # one kind does not depend on the other
    key = hashlib.sha1(settings + Path(__file__).read_bytes()).hexdigest()[:12]
    target = Path(cache) / f"world2-{key}-{kind}-{number}"
    if not target.exists():
        print(f"building the tiny world of {kind} {number}, once, in about a minute: {target}", flush=True)
        root = Path(tempfile.mkdtemp(prefix="building-", dir=cache))
        tokenizer, sizes, topics = make_tokenizer(kind), MODELS["rows"], range(len(NAMES))
        for split in ("train", "valid"):
            draw = random.Random(f"{split} {number}")
            drawn = draw.choices(topics[:3], WEIGHTS[:3], k=30) if split == "train" else []  # shots come from these:
            drawn += draw.choices(topics, WEIGHTS, k=sizes[split] - len(drawn))  # people show typical samples
            write_rows(root / f"data/{split}.jsonl", rows(f"{split} {number}", kind, drawn, split))
        write_rows(root / "data/test.jsonl", rows(f"test {number}", kind, [*topics] * sizes["each_topic"], "test"))
        rng = random.Random(f"documents {number}")
        n = (MODELS["teacher"] | KINDS[kind]["teacher"])["documents"]
        pages = [document(rng, kind).split(" ", 1) for _ in range(n)]
        pages = [{"prompt": start, "response": rest} for start, rest in pages]
        for split, part_of in (("train", pages[100:]), ("valid", pages[:50]), ("test", pages[50:100])):
            write_rows(root / f"pages/{split}.jsonl", part_of)
        for name in ("teacher", "student"):
            m = MODELS[name] | KINDS[kind][name]
            write_config(root / name, m["hidden"], m["layers"], m["heads"], tokenizer)
        train_llm(root, number, MODELS["teacher"] | KINDS[kind]["teacher"])
        shutil.rmtree(root / "pages")
        move(root, target)
    return target


def train_llm(root, number, m):
    import kd_forward
    with redirect_stdout(Progress(sys.stdout)):
        kd_forward.train(kd_forward.Config(
            teacher="none", student=str(root / "teacher"), data=str(root / "pages"), alpha=0.0, seed=number,
            steps=m["steps"], batch_size=m["batch_size"], lr=m["lr"], warmup=100, max_prompt=8, max_response=200,
            eval_rows=20, eval_every=10**9, log_every=100, save_every=10**9, device="cpu", dtype="float32",
            compile=False, out=str(root / "run")))
    shutil.rmtree(root / "teacher")
    shutil.move(root / "run/student", root / "teacher")
    shutil.rmtree(root / "run")
