"""The tiny worlds that the scripts run on when no model or data is named. A reader may skip this file.

World 1 (kd_forward, llmr, dpkd): prompts of four kinds, each with three right answers of known probability
(world1.json). So p(y|x) is known exactly: whether a text is right, which wording it uses, how much probability a
model gives to right answers. Few rows have a response (for the student's start), many are prompts only (for the
teacher to answer). The teacher is a small Llama trained on fresh draws from the generator, the student a much
smaller one trained on the few labelled rows; both are made with kd_forward.py --alpha 0 and cached.
"""
import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import sys
import tempfile
import zlib
from pathlib import Path

FILE = Path(__file__).with_name("world1.json")
WORLD = json.loads(FILE.read_text())
LISTS, FAMILIES, MODELS = WORLD["lists"], WORLD["families"], WORLD["models"]


def draw_prompt(rng, family):
    """A random prompt of a family: <parts> change places, those marked ? may be absent, {slots} are drawn."""
    template = FAMILIES[family]["prompt"]
    parts = [p for p, maybe in re.findall(r"<([^>]*)>(\??)", template) if not maybe or rng.random() < 0.6]
    rng.shuffle(parts)
    text = re.sub(r"<[^>]*>\??", lambda m: parts.pop() if parts else "", template)
    text = text.replace("{items}", " ".join(rng.sample(LISTS["items"], rng.randint(3, 5))))
    return " ".join(re.sub(r"\{(\w+)\}", lambda m: rng.choice(LISTS[m[1]]), text).split())


def answers(prompt):
    """All right answers to a prompt: [(probability, text)], the probabilities summing to 1."""
    family = prompt.split()[0]
    slots = {"items": sorted(prompt.split()[1:])}
    if family != "sort":  # every slot is found by the word before it, wherever its part of the prompt has moved
        anchors = re.findall(r"(\w+) \{(\w+)\}", FAMILIES[family]["prompt"])
        found = {slot: re.search(rf" {word} (\w+)", prompt) for word, slot in anchors}
        slots = {s: m[1] for s, m in found.items() if m}
    out = []
    for probability, text in FAMILIES[family]["wordings"]:
        there = lambda part: all(s in slots for s in re.findall(r"\{(\w+)\}", part))
        text = re.sub(r"\[([^]]*)\]", lambda m, there=there: m[1] if there(m[1]) else "", text)
        text = re.sub(r"\{items:([^}]*)\}", lambda m: m[1].join(slots["items"]), text)
        out.append((probability, text.format(**slots)))
    return out


def split_of(prompt):
    """The hash of a prompt decides its split, so train, valid and test are disjoint whatever the seed."""
    return {0: "test", 1: "valid"}.get(zlib.crc32(prompt.encode()) % 10, "train")


def prompts(name, n, split):
    """n different prompts of one split, the families in turn."""
    rng, seen, families = random.Random(name), {}, list(FAMILIES)
    while len(seen) < n:
        prompt = draw_prompt(rng, families[len(seen) % len(families)])
        if split_of(prompt) == split:
            seen[prompt] = True
    return list(seen)


def rows(name, n, split, labelled):
    """n rows, the first `labelled` of them with a response drawn from p(y|x); all know their right answers."""
    rng, out = random.Random(name), []
    for i, prompt in enumerate(prompts(name, n, split)):
        probs, texts = zip(*answers(prompt))
        response = rng.choices(texts, probs)[0] if i < labelled else None
        out.append({"prompt": prompt, "response": response, "references": texts, "probs": probs})
    return out


def make_tokenizer():
    """A real Hugging Face tokenizer, one token a word, with a chat template: the path that real models take."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    texts = [t for p in prompts("vocabulary", 4000, "train") for t in [p] + [t for _, t in answers(p)]]
    special = ["<pad>", "<eos>", "<unk>", "<user>", "<assistant>"]
    words = {w: i for i, w in enumerate(special + sorted({w for t in texts for w in t.split()}))}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        additional_special_tokens=special[3:], clean_up_tokenization_spaces=False)
    tokenizer.chat_template = "{% for m in messages %}<user> {{ m.content }} {% endfor %}<assistant>"
    return tokenizer


def write_config(path, hidden, layers, heads, tokenizer):
    """A model directory with configuration and tokenizer, no weights: kd_forward.py starts it from random ones."""
    from transformers import LlamaConfig
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=5 * hidden // 2, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=1024, tie_word_embeddings=True,
        initializer_range=0.05, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id)
    config.save_pretrained(path)
    tokenizer.save_pretrained(path)


def write_rows(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in data))


def build(number, cache, part="student"):
    """The directory of world 1, number `number`, made on first use: data, teacher, student; student-kl when asked for.

    It lies under a hash of this file and of world1.json: a changed world never meets an old teacher.
    """
    key = hashlib.sha1(FILE.read_bytes() + Path(__file__).read_bytes()).hexdigest()[:12]
    target = Path(cache) / f"world1-{key}-{number}"
    if not target.exists():
        print(f"building the tiny world {number}, once, in about {MODELS['minutes']} minutes: {target}", flush=True)
        root = Path(tempfile.mkdtemp(prefix="building-", dir=cache))
        tokenizer, sizes = make_tokenizer(), MODELS["rows"]
        for name, n, labelled in (("data", sizes["pool"], sizes["labelled"]), ("pretrain", *2 * [sizes["pretrain"]])):
            write_rows(root / name / "train.jsonl", rows(f"{name} {number}", n, "train", labelled))
            for split in ("valid", "test"):
                write_rows(root / name / f"{split}.jsonl", rows(split, sizes[split], split, sizes[split]))
        for name, data in (("teacher", "pretrain"), ("student", "data")):
            m = MODELS[name]
            write_config(root / "config", m["hidden"], m["layers"], m["heads"], tokenizer)
            train(root, name, number, teacher="none", student=str(root / "config"), data=str(root / data), alpha=0.0)
            shutil.rmtree(root / "config")
        shutil.rmtree(root / "pretrain")
        move(root, target)
    if not (target / part).exists():
        print(f"distilling the tiny world's {part}, once: {target / part}", flush=True)
        root = Path(tempfile.mkdtemp(prefix="building-", dir=cache))
        train(root, part, number, teacher=str(target / "teacher"), student=str(target / "student"),
              data=str(target / "data"), responses="teacher")
        move(root / part, target / part)
        shutil.rmtree(root)
    return target


def move(made, target):
    try:
        os.replace(made, target)
    except OSError:  # another process was faster: use what it made
        shutil.rmtree(made)


def train(root, name, number, **settings):
    """root/name: a student made by kd_forward.py, which prints its progress only."""
    import kd_forward
    print(f"{name}:", flush=True)
    with contextlib.redirect_stdout(Progress(sys.stdout)):
        kd_forward.train(kd_forward.Config(
            seed=number, batch_size=64, warmup=50, max_prompt=64, max_response=64, eval_rows=50, eval_every=10**9,
            log_every=100, save_every=10**9, device="cpu", dtype="float32", compile=False,
            out=str(root / f"{name}-run"),
            steps=MODELS[name]["steps"], lr=MODELS[name]["lr"], **settings))
    shutil.move(root / f"{name}-run/student", root / name)
    shutil.rmtree(root / f"{name}-run")


class Progress:
    """A standard output that lets only the lines about the loss through: a world is built by three quiet runs."""

    def __init__(self, out):
        self.out = out

    def write(self, text):
        if text.startswith("step") and "loss" in text:
            self.out.write("  " + re.sub(r"  ce.*  tokens \d+", "", text).rstrip() + "\n")

    def flush(self):
        self.out.flush()

    def isatty(self):
        return self.out.isatty()


def show(root):
    """Print where the world lies, and for some prompts the right answers and a sample of each model."""
    import torch

    from common import load_model, load_tokenizer, prompt_encoder, sample
    print(root)
    tokenizer = load_tokenizer(root / "teacher", "teacher")
    some = [json.loads(line) for line in (root / "data/test.jsonl").read_text().splitlines()[:4]]
    models = {n: load_model(root / n, torch.device("cpu"), what=n) for n in ("teacher", "student", "student-kl")}
    encode = prompt_encoder(tokenizer, "auto", models["teacher"], 64)
    for row in some:
        print(f"\n{row['prompt']}")
        for p, text in zip(row["probs"], row["references"]):
            print(f"  {p:<12.2f}{text}")
        for name, model in models.items():
            said = sample(model, [encode(row["prompt"])], 64, eos=tokenizer.eos_token_id)[0][0]
            print(f"  {name:<12}{tokenizer.decode(said, skip_special_tokens=True)}")
