"""The tiny worlds that the scripts run on when no model or data is named. A reader may skip this file.

World 1 (kd_forward, llmr, dpkd): prompts of four kinds, each with three right answers of known probability
(world1.json). So p(y|x) is known exactly: whether a text is right, which wording it uses, how much probability a
model gives to right answers. Few rows have a response (for the student's start), many are prompts only (for the
teacher to answer). The teacher is a small Llama trained on fresh draws from the generator, the student a much
smaller one trained on the few labelled rows; both are made with kd_forward.py --alpha 0 and cached.
"""
import hashlib
import json
import os
import random
import re
import shutil
import tempfile
import zlib
from pathlib import Path

FILE = Path(__file__).with_name("world1.json")
WORLD = json.loads(FILE.read_text())
LISTS, FAMILIES, MODELS = WORLD["lists"], WORLD["families"], WORLD["models"]


def draw_prompt(rng, family):
    """A random prompt of a family: parts in <> change places, those marked ? may be absent, slots are drawn."""
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
        found = {s: re.search(rf" {word} (\w+)", prompt) for word, s in re.findall(r"(\w+) \{(\w+)\}", FAMILIES[family]["prompt"])}
        slots = {s: m[1] for s, m in found.items() if m}
    out = []
    for probability, text in FAMILIES[family]["wordings"]:
        text = re.sub(r"\[([^]]*)\]", lambda m: m[1] if all(s in slots for s in re.findall(r"\{(\w+)\}", m[1])) else "", text)
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
        out.append({"prompt": prompt, "response": rng.choices(texts, probs)[0] if i < labelled else None, "references": texts, "probs": probs})
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
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
                                        additional_special_tokens=special[3:], clean_up_tokenization_spaces=False)
    tokenizer.chat_template = "{% for m in messages %}<user> {{ m.content }} {% endfor %}<assistant>"
    return tokenizer


def write_config(path, hidden, layers, tokenizer):
    """A model directory with configuration and tokenizer, no weights: kd_forward.py starts it from random ones."""
    from transformers import LlamaConfig
    LlamaConfig(vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=5 * hidden // 2, num_hidden_layers=layers, num_attention_heads=4,
                num_key_value_heads=4, max_position_embeddings=1024, tie_word_embeddings=True, initializer_range=0.05,
                pad_token_id=tokenizer.pad_token_id, bos_token_id=None, eos_token_id=tokenizer.eos_token_id).save_pretrained(path)
    tokenizer.save_pretrained(path)


def write_rows(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in data))


def build(number, cache):
    """The directory of world 1, number `number`, made on first use: data/, teacher/, student/, student-kl/.

    It lies under a hash of this file and of world1.json: a changed world never meets an old teacher.
    """
    key = hashlib.sha1(FILE.read_bytes() + Path(__file__).read_bytes()).hexdigest()[:12]
    target = Path(cache) / f"world1-{key}-{number}"
    if target.exists():
        return target
    import kd_forward
    print(f"building the tiny world {number} in {target} (once, about {MODELS['minutes']} minutes on 2 cores)", flush=True)
    root = Path(tempfile.mkdtemp(prefix="building-", dir=cache))
    tokenizer, sizes = make_tokenizer(), MODELS["rows"]
    write_rows(root / "data/train.jsonl", rows(f"train {number}", sizes["pool"], "train", sizes["labelled"]))
    write_rows(root / "data/valid.jsonl", rows("valid", sizes["valid"], "valid", sizes["valid"]))
    write_rows(root / "data/test.jsonl", rows("test", sizes["test"], "test", sizes["test"]))
    write_rows(root / "pretrain/train.jsonl", rows(f"pretrain {number}", sizes["pretrain"], "train", sizes["pretrain"]))
    for split in ("valid", "test"):
        shutil.copy(root / f"data/{split}.jsonl", root / f"pretrain/{split}.jsonl")
    common = dict(max_prompt=64, max_response=64, eval_every=10**9, eval_rows=100, save_every=10**9, device="cpu", compile=False)
    for name, data in (("teacher", "pretrain"), ("student", "data")):
        m = MODELS[name]
        write_config(root / f"{name}-config", m["hidden"], m["layers"], tokenizer)
        kd_forward.train(kd_forward.Config(
            teacher="none", student=str(root / f"{name}-config"), data=str(root / data), alpha=0.0, steps=m["steps"], lr=m["lr"],
            batch_size=64, warmup=50, seed=number, out=str(root / f"{name}-run"), **common))
        shutil.move(root / f"{name}-run/student", root / name)
    m = MODELS["student-kl"]
    kd_forward.train(kd_forward.Config(
        teacher=str(root / "teacher"), student=str(root / "student"), data=str(root / "data"), alpha=1.0, responses="teacher",
        steps=m["steps"], lr=m["lr"], batch_size=64, warmup=20, seed=number, out=str(root / "kl-run"), **common))
    shutil.move(root / "kl-run/student", root / "student-kl")
    for leftover in ("pretrain", "teacher-config", "student-config", "teacher-run", "student-run", "kl-run"):
        shutil.rmtree(root / leftover)
    try:
        os.replace(root, target)
    except OSError:  # another process was faster: use its world
        shutil.rmtree(root)
    return target


def show(data):
    """Print where the world lies, and prompts with the samples of teacher and students beside the right answers."""
    import torch
    from common import load_model, load_tokenizer, prompt_encoder, sample
    root = Path(data).parent
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
            print(f"  {name:<12}{tokenizer.decode(sample(model, [encode(row['prompt'])], 64, eos=tokenizer.eos_token_id)[0][0], skip_special_tokens=True)}")
