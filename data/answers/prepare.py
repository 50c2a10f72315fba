"""The answers world: short prompts, each with three right answers of known probability; a teacher and two students.

    python data/answers/prepare.py DIR                       data, teacher and student of world 0
    python data/answers/prepare.py DIR --part student-kl     adds the student after long KD on the teacher's answers
    python data/answers/prepare.py DIR2 --number 1           another world: other training rows and models

grammar.json says what prompts look like and how an answer may be worded, e.g. "sort plum fig kiwi" -> "fig , kiwi ,
plum ." (0.60) or "first fig , then kiwi , then plum ." (0.25). So the true distribution of answers is known: whether a
text is right, which wording it uses, how much probability a model gives to right answers. DIR then holds

    data/train.jsonl, valid.jsonl, test.jsonl    rows {prompt, response or null, references, probs}: few training rows
                                                 have a response; references and their probs are all right answers
    teacher/, student/, student-kl/              Hugging Face model directories

The teacher sees many labelled rows, the student the few of train.jsonl; student-kl goes on from it with the teacher's
answers to all prompts. The student has one layer, the teacher two: which hour is meant in "from noon till six" the
student learns on some worlds only; on the others some of its teacher's wordings are out of reach. tuning.md is the log
of the search.
The models are made by kd_forward.py; the commands are printed and can be repeated by hand.
"""
import argparse
import json
import os
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
SPECIAL = ["<pad>", "<eos>", "<unk>", "<user>", "<assistant>"]  # their places are their ids
CHAT = "{% for m in messages %}<user> {{ m.content }} {% endfor %}<assistant>"


# ----------------------------------------------------------------------------------------------------------
# Prompts and their answers
# ----------------------------------------------------------------------------------------------------------
def draw(grammar, family, rng):
    """A random prompt of a family and its facts {slot: word, or the list of items}."""
    text = grammar["families"][family]["prompt"]
    # <parts> change places, a <part>? is left out in 4 of 10 prompts, {slot} is a word of that list
    parts = [part for part, maybe in re.findall(r"<([^>]*)>(\??)", text) if not maybe or rng.random() < 0.6]
    rng.shuffle(parts)
    text = re.sub(r"<[^>]*>\??", lambda _: parts.pop() if parts else "", text)
    facts = {}
    for slot in re.findall(r"\{(\w+)\}", text):
        words = grammar["lists"][slot.rstrip("12")]
        free = [word for word in words if word not in facts.values()]  # {time1} is another time than {time2}
        facts[slot] = rng.sample(words, rng.randint(3, 5)) if slot == "items" else rng.choice(free)
    shown = {slot: " ".join(word) if slot == "items" else word for slot, word in facts.items()}
    return " ".join(text.format(**shown).split()), facts


def answers(grammar, family, facts):
    """All right answers to a prompt with these facts: [(probability, text)], the probabilities summing to 1."""
    out = []
    for probability, text in grammar["families"][family]["wordings"]:
        # [words] stand only if the prompt has all their facts; {items:X} is the sorted list joined by X
        known = lambda m: m[1] if set(re.findall(r"\{(\w+)\}", m[1])) <= set(facts) else ""
        text = re.sub(r"\[([^]]*)\]", known, text)
        text = re.sub(r"\{items:([^}]*)\}", lambda m: m[1].join(sorted(facts["items"])), text)
        out.append((probability, text.format(**facts)))
    return out


def split_of(texts):
    """train, valid or test, by a hash of all right answers, not of the prompt: the same facts in another order would be
    the same question with the same answers, and must not be in two splits. The same in every world."""
    return {0: "test", 1: "valid"}.get(zlib.crc32("|".join(texts).encode()) % 10, "train")


def make_rows(grammar, name, n, split, labelled):
    """n rows of different prompts, the families in turn; the first `labelled` have a response drawn from p(y|x)."""
    rng, families, out = random.Random(name), list(grammar["families"]), {}
    while len(out) < n:
        family = families[len(out) % len(families)]
        prompt, facts = draw(grammar, family, rng)
        probs, texts = zip(*answers(grammar, family, facts))
        if split_of(texts) == split and prompt not in out:
            response = rng.choices(texts, probs)[0] if len(out) < labelled else None
            out[prompt] = {"prompt": prompt, "response": response, "references": texts, "probs": probs}
    return list(out.values())


def write_rows(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


# ----------------------------------------------------------------------------------------------------------
# Models: a tokenizer and a configuration, which kd_forward.py fills with trained weights
# ----------------------------------------------------------------------------------------------------------
def vocabulary(grammar):
    """Every word that a prompt or an answer can hold, after the special tokens."""
    families = grammar["families"].values()
    texts = [f["prompt"] for f in families] + [text for f in families for _, text in f["wordings"]]
    texts = [re.sub(r"\{items:([^}]*)\}", r"\1", text) for text in texts]          # the joining words of a list
    texts = [re.sub(r"\{\w+\}|[][<>]|(?<=>)\?", " ", text) for text in texts]      # slots and marks are no words
    words = {word for text in texts for word in text.split()} | {w for ws in grammar["lists"].values() for w in ws}
    return {word: i for i, word in enumerate(SPECIAL + sorted(words))}


def write_model(folder, grammar, width, layers, heads):
    """A model directory without weights: kd_forward.py starts such a student from random ones."""
    words = vocabulary(grammar)
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(SPECIAL)
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    pad, eos, unk = SPECIAL[:3]
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": pad, "eos_token": eos, "unk_token": unk,
        "additional_special_tokens": SPECIAL[3:], "clean_up_tokenization_spaces": False, "chat_template": CHAT}))
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": len(words),
        "hidden_size": width, "intermediate_size": 5 * width // 2, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": heads, "max_position_embeddings": 1024,
        "initializer_range": width ** -0.5,  # at 0.02, made for wide models, such narrow ones hardly begin to learn
        "tie_word_embeddings": True, "pad_token_id": words[pad], "bos_token_id": None,
        "eos_token_id": words[eos]}))


def train(target, work, **settings):
    """Make the model directory `target` by a run of kd_forward.py in the folder `work`; show only its losses."""
    settings = {"batch_size": 64, "warmup": 50, "max_prompt": 64, "max_response": 64, "eval_rows": 50,
                "eval_every": 10**9, "save_every": 10**9, "log_every": 100, "device": "cpu", "dtype": "float32",
                "out": work / target.name, **settings}
    command = [sys.executable, str(HERE.parents[1] / "kd_forward.py"), "--no-compile"]
    for name, value in settings.items():
        command += ["--" + name.replace("_", "-"), str(value)]
    print(f"\n{target.name}:\n{shlex.join(command)}", flush=True)
    # one thread: the fastest for models this small, and the same sums whatever the number of cores
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    said = []
    for line in run.stdout:
        said.append(line)
        if re.match(r"step .*  loss ", line):
            print("  " + re.sub(r"  ce .*  tokens \d+", "", line), end="", flush=True)
    if run.wait():
        print(f"{''.join(said)}\nthe command above failed with exit status {run.returncode}", file=sys.stderr)
        sys.exit(run.returncode)
    shutil.move(work / target.name / "student", target)


# ----------------------------------------------------------------------------------------------------------
# The world
# ----------------------------------------------------------------------------------------------------------
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", type=Path, help="the directory to make")
    parser.add_argument("--number", type=int, default=0, help="which world: seeds labels, teacher and prompts")
    parser.add_argument("--part", choices=["student-kl"], help="add this to a DIR that holds the rest")
    parser.add_argument("--grammar", type=Path, default=HERE / "grammar.json")
    args = parser.parse_args()
    top, grammar = args.dir.resolve(), json.loads(args.grammar.read_text())
    sizes, recipe, work = grammar["rows"], grammar["models"], top / "work"
    shutil.rmtree(work, ignore_errors=True)  # what an interrupted run may have left

    if args.part:
        train(top / args.part, work, teacher=top / "teacher", student=top / "student", data=top / "data",
              responses="teacher", cache_gib=1, seed=0, **recipe[args.part])
    else:
        number = f"data {args.number}"
        write_rows(top / "data/train.jsonl", make_rows(grammar, number, sizes["pool"], "train", sizes["labelled"]))
        for split in ("valid", "test"):  # the same in every world
            write_rows(top / f"data/{split}.jsonl", make_rows(grammar, split, sizes[split], split, sizes[split]))
        # the teacher's rows are its own; kd_forward.py holds a few of them out, for lack of other splits
        number, n = f"pretrain {args.number}", sizes["pretrain"]
        write_rows(work / "pretrain/train.jsonl", make_rows(grammar, number, n, "train", n))
        for name, data in (("teacher", work / "pretrain"), ("student", top / "data")):
            shape = {key: recipe[name].pop(key) for key in ("width", "layers", "heads")}
            write_model(work / f"random-{name}", grammar, **shape)
            # all students start from the same random weights: worlds differ in data and teacher only
            seed = args.number if name == "teacher" else 0
            train(top / name, work, teacher="none", alpha=0, student=work / f"random-{name}", data=data,
                  holdout=0.01, seed=seed, **recipe[name])
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
