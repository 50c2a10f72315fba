"""World 3 (ddk): six domains, a teacher that knows them all and a student that was pretrained on a lopsided mixture.

`code` and `prose` are real text of the Python that runs this: the functions and classes of its standard library
without docstrings, and their docstrings with the topics of its help(). `log`, `json` and `csv` are written by the
generators below; `noise` is random, so nobody can learn it: the control. Most of the corpus is json and csv. The
text varies with the version of Python, so every result carries a hash of the corpus. Tokens are bytes.

Teacher and student are made with ddk.py --teacher none --gamma 0 and cached. A reader may skip this file.

    python -m assets.world3 alike 10 DIR    write another set of domains (SETS), number 10: data, teacher, student
"""
import ast
import contextlib
import hashlib
import json
import random
import shutil
import sys
import sysconfig
import tempfile
import warnings
from pathlib import Path

from assets.worlds import Progress, move, write_config, write_rows

SIZES = {"code": 800, "prose": 800, "log": 100, "json": 3000, "csv": 3000, "noise": 300}  # thousand characters
TEACHER = dict(hidden=96, layers=3, heads=4, steps=1000, lr=6e-3,
               shares="code=.36,prose=.36,log=.07,json=.07,csv=.07,noise=.07")
STUDENT = dict(hidden=48, layers=2, heads=4, steps=200, lr=6e-3,
               shares="code=.08,prose=.08,log=.01,json=.40,csv=.40,noise=.03")
SETS = {  # of the results' controls: thousand characters, and on which shares its teacher and student were trained
    "mild": (dict(code=800, prose=800, log=2000, json=1600, csv=1600, noise=1200), TEACHER["shares"],
             "code=.10,prose=.10,log=.25,json=.20,csv=.20,noise=.15"),
    "alike": (dict(code=2200, prose=1200, arith=120, copy=120, log=120, noise=240),
              "code=.30,prose=.30,arith=.10,copy=.10,log=.10,noise=.10",
              "code=.55,prose=.30,arith=.03,copy=.03,log=.03,noise=.06"),
    "same": ({f"code-{i}": 300 for i in range(1, 7)}, *2 * [",".join(f"code-{i}={1 / 6:.4f}" for i in range(1, 7))]),
}
NAMES = "ada ben cleo dan eve finn gwen hugo iris jack kim leo".split()
PLACES = "oslo rome lima cairo paris tokyo berlin madrid".split()
PARTS = "auth cache disk http mail queue search store".split()


def library():
    """Pieces of the standard library, in a fixed order: (code without docstrings, docstrings)."""
    code, prose = [], []
    root = Path(sysconfig.get_paths()["stdlib"])
    for file in [f for pattern in ("*.py", "json/*.py", "asyncio/*.py", "email/*.py", "http/*.py", "logging/*.py")
                 for f in sorted(root.glob(pattern))]:
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
                    prose.append(text) if len(text) > 60 else None
        code += [ast.unparse(n) for n in tree.body if isinstance(n, (ast.ClassDef, ast.FunctionDef))]
    import pydoc_data.topics
    for _, text in sorted(pydoc_data.topics.topics.items()):
        prose += [p.strip() for p in text.split("\n\n\n")]
    return [c for c in code if len(c) > 100], [p for p in prose if len(p) > 60]


def log(rng):
    day, ms, out = f"2024-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}", rng.randrange(4 * 10**7), []
    for _ in range(rng.randint(4, 9)):
        ms += rng.randrange(20000)
        part, user, place = rng.choice(PARTS), rng.choice(NAMES), rng.choice(PLACES)
        clock = f"{ms // 3600000:02}:{ms // 60000 % 60:02}:{ms // 1000 % 60:02}.{ms % 1000:03}"
        out.append(f"{day} {clock} [{part}] " + rng.choice([
            f"INFO  user {user} logged in from {place}", f"INFO  request served in {rng.randint(1, 99)} ms",
            f"DEBUG cache hit ratio 0.{rng.randint(10, 99)}", f"WARN  retry {rng.randint(1, 5)} of 5 for {user}",
            f"ERROR connection to {place} timed out"]))
    return "\n".join(out)


def as_json(rng):
    rows = [{"id": rng.randint(1, 9999), "name": rng.choice(NAMES), "city": rng.choice(PLACES),
             "active": rng.random() < 0.7, "score": round(rng.random() * 10, 1),
             "tags": rng.sample(PARTS, rng.randint(0, 3))} for _ in range(rng.randint(1, 4))]
    return json.dumps({"status": "ok", "count": len(rows), "rows": rows}, indent=rng.choice([None, 1]))


def as_csv(rng):
    lines = ["id,name,city,unit,price,amount"]
    for i in range(rng.randint(5, 12)):
        lines.append(f"{i + 1},{rng.choice(NAMES)},{rng.choice(PLACES)},{rng.choice(['kg', 'pcs', 'box'])},"
                     f"{rng.randint(1, 20)}.{rng.choice(['00', '50', '99'])},{rng.randint(1, 9)}")
    return "\n".join(lines)


def noise(rng):
    return "".join(rng.choices("0123456789abcdef", k=400))


def arith(rng):
    """Additions, the digits of the sum from right to left: the order in which a carry moves."""
    pairs = [(rng.randint(0, 999), rng.randint(0, 999)) for _ in range(rng.randint(8, 16))]
    return "\n".join(f"{a}+{b}={str(a + b)[::-1]}" for a, b in pairs)


def copy(rng):
    words = ("".join(rng.choices("abcdefghijklmnop", k=rng.randint(4, 12))) for _ in range(rng.randint(5, 10)))
    return "\n".join(f"{w}|{w}" for w in words)


WRITERS = {"log": log, "json": as_json, "csv": as_csv, "noise": noise, "arith": arith, "copy": copy}


def endless(write, rng):
    while True:
        yield write(rng)


def corpus(sizes=SIZES):
    """{domain: documents}: of the library a random subset, of the generators as much as is wanted."""
    code, prose = library()
    rng = random.Random("world 3")
    rng.shuffle(code), rng.shuffle(prose)
    streams = {"code": iter(code), "prose": iter(prose)}
    streams |= {name: endless(write, random.Random(name)) for name, write in WRITERS.items()}
    out = {}
    for name, size in sizes.items():
        room, out[name] = 1000 * size, []
        for text in streams[name.partition("-")[0]]:  # code-1, code-2: parts of the same
            out[name].append(text)
            room -= len(text)
            if room < 0:
                break
    return out


def make_tokenizer():
    """A real Hugging Face tokenizer in which every byte is a token: byte-level BPE without merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    letters = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>",
                                   clean_up_tokenization_spaces=False)


def build(number, cache, part="student"):
    """Where `part` of world 3, number `number`, lies: data (the same for all numbers), teacher or student.

    The name has a hash of this file and of Python's version: another corpus never meets an old teacher.
    """
    key = hashlib.sha1(Path(__file__).read_bytes() + sys.version.encode()).hexdigest()[:12]
    base, target = Path(cache) / f"world3-{key}", Path(cache) / f"world3-{key}-{number}"
    if not base.exists():
        root = Path(tempfile.mkdtemp(prefix="building-", dir=cache))
        write_corpus(root / "data", SIZES)
        move(root, base)
    if part == "data":
        return base
    if not target.exists():
        print(f"building the tiny world {number} of domains, once, in about 2 minutes: {target}", flush=True)
        root = Path(tempfile.mkdtemp(prefix="building-", dir=cache))
        make_models(root, base / "data", number, TEACHER["shares"], STUDENT["shares"])
        move(root, target)
    return target


def another(name, number, target):
    """Write the set `name` of SETS to the directory target: data, teacher and student."""
    sizes, *shares = SETS[name]
    target.parent.mkdir(parents=True, exist_ok=True)
    root = Path(tempfile.mkdtemp(prefix="building-", dir=target.parent))
    write_corpus(root / "data", sizes)
    make_models(root, root / "data", number, *shares)
    move(root, target)


def write_corpus(folder, sizes):
    for name, texts in corpus(sizes).items():
        write_rows(folder / f"{name}.jsonl", [{"text": t} for t in texts])


def make_models(root, data, number, teacher_shares, student_shares):
    for name, made, shares in (("teacher", TEACHER, teacher_shares), ("student", STUDENT, student_shares)):
        write_config(root / "config", made["hidden"], made["layers"], made["heads"], make_tokenizer())
        train(root, data, name, number, {**made, "shares": shares})
        shutil.rmtree(root / "config")


def train(root, data, name, number, made):
    """root/name: a model trained by ddk.py on cross entropy and a fixed mixture; prints its progress only."""
    import ddk
    print(f"{name}:", flush=True)
    with contextlib.redirect_stdout(Progress(sys.stdout)):
        ddk.train(ddk.Config(teacher="none", student=str(root / "config"), data=str(data), mix="static",
                             shares=made["shares"], gamma=0.0, steps=made["steps"], lr=made["lr"], seed=number,
                             warmup=50, eval_rows=10, gap_rows=10, eval_every=10**9, log_every=100, save_every=10**9,
                             device="cpu", dtype="float32", compile=False, out=str(root / f"{name}-run")))
    shutil.move(root / f"{name}-run/student", root / name)
    shutil.rmtree(root / f"{name}-run")


if __name__ == "__main__":
    another(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
