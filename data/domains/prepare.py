"""The domains world of ddk.py: six domains, a teacher that knows them all, a student pretrained on a lopsided mixture.

    python data/domains/prepare.py DIR                  data, teacher and student of world 0
    python data/domains/prepare.py DIR --number 1       another teacher and student, on the same data
    python data/domains/prepare.py DIR --set same       another set of domains of grammar.json
    python data/domains/prepare.py DIR --domains code=src/**/*.py,log=server.log      your own text, larger models

`code` and `prose` are real text of the Python that runs this: the functions and classes of its standard library
without docstrings, and their docstrings with the topics of its help(). `log`, `json` and `csv` are written
by the generators below; `noise` is random, so nobody can learn it: the control. Most of the corpus is json
and csv. The text varies with the version of Python, so every result carries a hash of the corpus. Tokens are bytes.

No document is in two splits, but documents repeat phrases: of the windows of 64 characters in the test split about a
quarter stand somewhere in the training split for prose and json (the docstrings and records of any Python program
do), fewer for the others. A gap is a ratio of two models on the same text, so this moves both perplexities.

DIR then holds data/<domain>.jsonl, rows {text}, and teacher/ and student/, Hugging Face model directories made by
ddk.py; the commands are printed and can be repeated by hand. With --domains, sources as ddk.py takes them, there is
no data/; the teacher learns all domains alike, the student starts from their natural proportion.
"""
import argparse
import ast
import json
import random
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

HERE = Path(__file__).resolve().parent


# ----------------------------------------------------------------------------------------------------------
# Documents
# ----------------------------------------------------------------------------------------------------------
def stdlib_pieces():
    """Pieces of the standard library, in a fixed order: (code without docstrings, docstrings)."""
    code, prose = [], []
    root = Path(sysconfig.get_paths()["stdlib"])
    folders = ("*.py", "json/*.py", "asyncio/*.py", "email/*.py", "http/*.py", "logging/*.py")
    for file in [f for pattern in folders for f in sorted(root.glob(pattern))]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = ast.get_docstring(node)
                if text is not None:
                    node.body = node.body[1:] or [ast.Pass()]
                    prose.append(text)
        code += [ast.unparse(n) for n in tree.body if isinstance(n, (ast.ClassDef, ast.FunctionDef))]
    import pydoc_data.topics
    for _, text in sorted(pydoc_data.topics.topics.items()):
        prose += [p.strip() for p in text.split("\n\n\n")]
    return [c for c in code if len(c) > 100], [p for p in prose if len(p) > 60]


def log(rng, words):
    day = f"2024-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"
    ms, out = rng.randrange(4 * 10**7), []
    for _ in range(rng.randint(4, 9)):
        ms += rng.randrange(20000)
        part, user, place = rng.choice(words["parts"]), rng.choice(words["names"]), rng.choice(words["places"])
        clock = f"{ms // 3600000:02}:{ms // 60000 % 60:02}:{ms // 1000 % 60:02}.{ms % 1000:03}"
        out.append(f"{day} {clock} [{part}] " + rng.choice([
            f"INFO  user {user} logged in from {place}", f"INFO  request served in {rng.randint(1, 99)} ms",
            f"DEBUG cache hit ratio 0.{rng.randint(10, 99)}", f"WARN  retry {rng.randint(1, 5)} of 5 for {user}",
            f"ERROR connection to {place} timed out"]))
    return "\n".join(out)


def as_json(rng, words):
    rows = [{"id": rng.randint(1, 9999), "name": rng.choice(words["names"]), "city": rng.choice(words["places"]),
             "active": rng.random() < 0.7, "score": round(rng.random() * 10, 1),
             "tags": rng.sample(words["parts"], rng.randint(0, 3))} for _ in range(rng.randint(1, 4))]
    return json.dumps({"status": "ok", "count": len(rows), "rows": rows}, indent=rng.choice([None, 1]))


def as_csv(rng, words):
    lines = ["id,name,city,unit,price,amount"]
    for i in range(rng.randint(5, 12)):
        lines.append(f"{i + 1},{rng.choice(words['names'])},{rng.choice(words['places'])},"
                     f"{rng.choice(['kg', 'pcs', 'box'])},"
                     f"{rng.randint(1, 20)}.{rng.choice(['00', '50', '99'])},{rng.randint(1, 9)}")
    return "\n".join(lines)


def noise(rng, words):
    return "".join(rng.choices("0123456789abcdef", k=400))


WRITERS = {"log": log, "json": as_json, "csv": as_csv, "noise": noise}


def endless(write, rng, words):
    while True:
        yield write(rng, words)


def make_corpus(size, words):
    """{domain: documents}, different ones: of the library a random subset, of the generators as much as is wanted."""
    code, prose = stdlib_pieces()
    rng = random.Random("world 3")
    rng.shuffle(code)
    rng.shuffle(prose)
    streams = {"code": iter(code), "prose": iter(prose)}
    streams |= {name: endless(write, random.Random(name), words) for name, write in WRITERS.items()}
    out = {}
    for name, thousands in size.items():
        room, out[name] = 1000 * thousands, {}
        for text in streams[name.partition("-")[0]]:  # code-1, code-2: parts of the same
            if text in out[name]:
                continue
            out[name][text] = True
            room -= len(text)
            if room < 0:
                break
    return {name: list(texts) for name, texts in out.items()}


# ----------------------------------------------------------------------------------------------------------
# Models: a tokenizer and a configuration, which ddk.py fills with trained weights
# ----------------------------------------------------------------------------------------------------------
def write_model(folder, width, layers, heads):
    """A model directory without weights; in its tokenizer, byte-level BPE without merges, every byte is a token."""
    letters = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<eos>", "eos_token": "<eos>",
        "clean_up_tokenization_spaces": False}))
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": len(letters),
        "hidden_size": width, "intermediate_size": 5 * width // 2, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": heads, "max_position_embeddings": 1024,
        "initializer_range": 0.05, "tie_word_embeddings": True,
        "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 0}))


def train(target, work, **settings):
    """Make the model directory `target` by a run of ddk.py in the folder `work`; show only its losses."""
    settings = {"teacher": "none", "gamma": 0, "warmup": 50, "eval_rows": 10, "gap_rows": 10, "eval_every": 10**9,
                "save_every": 10**9, "log_every": 100, "device": "cpu", "dtype": "float32",
                "out": work / target.name, **settings}
    command = [sys.executable, str(HERE.parents[1] / "ddk.py"), "--no-compile"]
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
    parser.add_argument("--number", type=int, default=0, help="which world: seeds teacher and student")
    parser.add_argument("--set", default="tiny", help="which set of domains of the grammar")
    parser.add_argument("--domains", default="", help="your own text in place of a set: name=source,name=source")
    parser.add_argument("--grammar", type=Path, default=HERE / "grammar.json")
    args = parser.parse_args()
    top, grammar = args.dir.resolve(), json.loads(args.grammar.read_text())
    work, chosen = top / "work", grammar["sets"][args.set]
    shutil.rmtree(work, ignore_errors=True)  # what an interrupted run may have left

    recipes, text = grammar["models"], {"data": top / "data"}
    if args.domains:
        recipes, text, chosen = grammar["own"], {"domains": args.domains}, {"teacher": "uniform", "student": "natural"}
    else:
        (top / "data").mkdir(parents=True, exist_ok=True)
        for name, texts in make_corpus(chosen["size"], grammar["words"]).items():
            (top / f"data/{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    for name in ("teacher", "student"):
        recipe = recipes[name]
        write_model(work / f"random-{name}", *(recipe[key] for key in ("width", "layers", "heads")))
        train(top / name, work, student=work / f"random-{name}", **text, mix=chosen[name], seed=args.number,
              steps=recipe["steps"], lr=recipe["lr"], max_tokens=recipe.get("tokens", 64))
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
