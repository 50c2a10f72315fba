"""The domains task of ddk.py: six domains of text, and two models that know them unequally well.

    python data/domains/prepare.py DIR                 makes instance 0: about two minutes
    python data/domains/prepare.py DIR --number 7      the same text, other models; for --data DIR
    python data/domains/prepare.py DIR --text          only the text: seconds

`code` and `prose` are real text of the Python that runs this: functions and classes of its standard
library without docstrings, and their docstrings with the topics of its help(). The functions below
write `log`, `json` and `csv`. `noise` is random, so nobody can learn it: it is the control. Most of
the corpus is json and csv. The text differs between versions of Python. Tokens are bytes.

Documents repeat phrases: for prose and json about a quarter of the windows of 64 characters of the
test split stand somewhere in the training split, too. This moves the perplexities of both models,
and a gap is their ratio. DIR then holds

    text/<domain>.jsonl     rows {text}
    teacher/                three layers; it learned most of code and prose
    student/                two layers; it learned most of json and csv, for fewer steps

ddk.py trains the models, and its commands are printed.
"""
import ast
import json
import random
import sys
import sysconfig
import warnings
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))
import toy


# Documents ----------------------------------------------------------------------------------------
def library_pieces():
    """Pieces of the standard library, in a fixed order: (code without docstrings, prose)."""
    code, prose = [], []
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for pattern in ("*.py", "json/*.py", "asyncio/*.py", "email/*.py", "http/*.py", "logging/*.py"):
        files += sorted(root.glob(pattern))
    for file in files:
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
        for node in tree.body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                code.append(ast.unparse(node))
    import pydoc_data.topics
    for _, text in sorted(pydoc_data.topics.topics.items()):
        prose += [part.strip() for part in text.split("\n\n\n")]
    return [c for c in code if len(c) > 100], [p for p in prose if len(p) > 60]


def log(rng, words):
    day = f"2024-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"
    ms, lines = rng.randrange(4 * 10**7), []
    for _ in range(rng.randint(4, 9)):
        ms += rng.randrange(20000)
        part, user = rng.choice(words["parts"]), rng.choice(words["names"])
        place = rng.choice(words["places"])
        clock = f"{ms // 3600000:02}:{ms // 60000 % 60:02}:{ms // 1000 % 60:02}.{ms % 1000:03}"
        lines.append(f"{day} {clock} [{part}] " + rng.choice([
            f"INFO  user {user} logged in from {place}",
            f"INFO  request served in {rng.randint(1, 99)} ms",
            f"DEBUG cache hit ratio 0.{rng.randint(10, 99)}",
            f"WARN  retry {rng.randint(1, 5)} of 5 for {user}",
            f"ERROR connection to {place} timed out"]))
    return "\n".join(lines)


def as_json(rng, words):
    rows = []
    for _ in range(rng.randint(1, 4)):
        rows.append({"id": rng.randint(1, 9999), "name": rng.choice(words["names"]),
                     "city": rng.choice(words["places"]), "active": rng.random() < 0.7,
                     "score": round(rng.random() * 10, 1),
                     "tags": rng.sample(words["parts"], rng.randint(0, 3))})
    content = {"status": "ok", "count": len(rows), "rows": rows}
    return json.dumps(content, indent=rng.choice([None, 1]))


def as_csv(rng, words):
    lines = ["id,name,city,unit,price,amount"]
    for i in range(rng.randint(5, 12)):
        name, place = rng.choice(words["names"]), rng.choice(words["places"])
        unit = rng.choice(["kg", "pcs", "box"])
        price = f"{rng.randint(1, 20)}.{rng.choice(['00', '50', '99'])}"
        lines.append(f"{i + 1},{name},{place},{unit},{price},{rng.randint(1, 9)}")
    return "\n".join(lines)


def noise(rng, words):
    return "".join(rng.choices("0123456789abcdef", k=400))


def endless(write, rng, words):
    while True:
        yield write(rng, words)


def make_corpus(size, words):
    """{domain: different documents}: as many as `size` wants, in thousands of characters. Of the
    library they are a random subset."""
    code, prose = library_pieces()
    rng = random.Random("world 3")  # the recorded results use the order that this seed gives
    rng.shuffle(code)
    rng.shuffle(prose)
    streams = {"code": code, "prose": prose}
    for name, write in {"log": log, "json": as_json, "csv": as_csv, "noise": noise}.items():
        streams[name] = endless(write, random.Random(name), words)
    corpus = {}
    for name, thousands in size.items():
        room, texts = 1000 * thousands, {}  # a dict drops documents that occur twice
        for text in streams[name]:
            if text not in texts:
                texts[text] = True
                room -= len(text)
            if room < 0:
                break
        corpus[name] = list(texts)
    return corpus


# The program --------------------------------------------------------------------------------------
def main():
    parser = toy.instance_parser(__doc__, HERE)
    parser.add_argument("--text", action="store_true", help="make only the text, no models")
    args = parser.parse_args()
    made = ["text"] if args.text else ["text", "teacher", "student"]
    top, grammar = toy.new_directory(args.dir, *made), json.loads(args.grammar.read_text())

    for name, texts in make_corpus(grammar["size"], grammar["words"]).items():
        toy.write_rows(top / f"text/{name}.jsonl", [{"text": text} for text in texts])
        print(f"{top}/text/{name}.jsonl: {len(texts)} documents", flush=True)
    if args.text:
        return
    for name, recipe in grammar["models"].items():
        toy.write_byte_model(top / name, recipe)
        toy.train(top / name, "ddk.py", teacher="none", gamma=0, data=top / "text",
                  mix=recipe["mix"], steps=recipe["steps"], lr=recipe["lr"], warmup=50,
                  batch_size=24, max_tokens=64, eval_rows=10, gap_rows=10, seed=args.number)


if __name__ == "__main__":
    main()
