"""Hostile input: each ends in success or in one sentence (BadInput), never in another exception, never half-written.

    python tests/evidence/fuzz.py [--inputs 2400] [--seed 0]

Seeded. In process: settings through the command line's parser and check_settings, data and corpus files through the
loaders and on to batches of token ids, run directories and checkpoints through Run. Every kind is drawn in turn.
"""
import argparse
import collections
import contextlib
import dataclasses
import importlib
import io
import json
import math
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(p) for p in Path(__file__).resolve().parents[1:3]]
from conftest import ROOT, any_run

import common

METHODS = ["kd_forward", "llmr", "dpkd", "gold", "ddk"]

TEXTS = ["", " ", "\n", "a\0b", "\ufeff", "\u2028", "\ud800", "\udfff x", "<|endoftext|>", "</s><pad>", "{prompt}", "%s %n {0}", "\x1b[2J",
         "🤷🏽‍♂️" * 9, "Z̸̡͑a̷l̶g̴o", "‮evil", "a" * 3000, "NaN", "null", "'; DROP TABLE", "../../etc/passwd", "$(touch x)", "\\", '"', "\r"]
NUMBERS = ["nan", "inf", "-inf", "0", "-1", "1e999", "1e-400", "9" * 30, "-" + "9" * 30, "0x10", "1_000", "１２", "1e3", "1.5", "", " ", "true",
           "None", "[]", "9" * 5000, "2147483648", "1e308", "-0.0", "5e-324"]
VALUES = [None, True, 0, -1, 1e308, float("nan"), float("inf"), 10**40, [], {}, [[]], {"a": {}}, ["x"], "x", "", "\ud800"]


def deep(rng):
    n, pair = rng.choice([10, 1000, 100_000]), rng.choice(["[]", "{}"])
    return ('{"a":' * n + "1" + "}" * n) if pair == "{}" else "[" * n + "]" * rng.choice([0, n])


def text(rng):
    return "".join(rng.choice(TEXTS) if rng.random() < 0.3 else rng.choice("abc dog\n\t\0é漢") for _ in range(rng.randrange(12)))


def line(rng):
    """One line of JSONL: a good row, mended in one place, or no row at all."""
    row = {"prompt": "the cat", "response": "cat the"}
    kind = rng.randrange(9)
    if kind == 0:
        row[rng.choice(list(row))] = rng.choice(VALUES)
    if kind == 1:
        row[rng.choice(list(row))] = text(rng)
    if kind == 2:
        row.pop(rng.choice(list(row)))
    if kind == 3:
        row[text(rng)] = rng.choice(VALUES)
    if kind == 4:
        return rng.choice([deep(rng), json.dumps(rng.choice(VALUES)), text(rng), "9" * 10_000, "{" * 50])
    whole = json.dumps(row, ensure_ascii=rng.random() < 0.5)
    if kind == 5:
        at = rng.randrange(len(whole))
        return whole[:at] + rng.choice(["", "\0", "}", '"', ",", "\\u12", "\\x"]) + whole[at + rng.randrange(3):]
    if kind == 6:
        return whole + rng.choice([whole, ",", "\r", " " * 1000, "#"])
    return whole


def spoil(data, rng):
    """Bytes that are no text, or a text in another encoding."""
    kind = rng.randrange(6)
    at = rng.randrange(len(data) + 1)
    return {0: data[:at] + bytes([rng.randrange(128, 256)]) + data[at:], 1: data[:at], 2: b"\xef\xbb\xbf" + data,
            3: data.decode(errors="replace").encode("utf-16", "surrogatepass"), 4: data[:at] + b"\0" * 9 + data[at:],
            5: bytes(rng.randrange(256) for _ in range(200))}[kind]


# ---------------------------------------------------------------------------------------------------------------
# Kinds of input: each is called with (rng, place) and returns normally, or raises
# ---------------------------------------------------------------------------------------------------------------
def settings(rng, place):
    """A random value for one to three settings of a random script, as text on the command line."""
    config = importlib.import_module(rng.choice(METHODS)).Config
    paths = "data", "teacher", "student", "out", "corpus"
    fields = [f for f in dataclasses.fields(config) if f.name not in (*paths, *config.unused)]
    words = []
    for f in rng.sample(fields, rng.randint(1, 3)):
        value = rng.choice(NUMBERS + TEXTS) if rng.random() < 0.8 else text(rng)
        words += [f"--{f.name}={value}"] if rng.random() < 0.7 else [f"--{f.name.replace('_', '-')}", value]
    words += [text(rng)] if rng.random() < 0.1 else []
    cfg = common.parse_args(config, words)
    common.check_settings(cfg)
    with place.quiet():
        common.Run(cfg, config.__module__ + ".py")


def typed_settings(rng, place):
    """A wrong type or an absurd number set from Python, as in a notebook."""
    name = rng.choice(METHODS)
    module = importlib.import_module(name)
    cfg = place.config(name, steps=0, eval_rows=1)
    f = rng.choice([f for f in dataclasses.fields(cfg) if f.name not in ("overwrite",)])
    setattr(cfg, f.name, rng.choice(VALUES + [float(x) for x in ("nan", "inf", "1e308", "-1", "0.5")] + [10**20, -5, text(rng), "no/such"]))
    with place.quiet():
        module.train(cfg)


def data_file(rng, place):
    name = rng.choice(["x.jsonl", "x.jsonl", "x.csv", "x.json", "x"])
    lines = [line(rng) for _ in range(rng.randrange(4))]
    lines += [json.dumps({"prompt": f"p{i}", "response": "a dog"}) for i in range(rng.choice([0, 40]))]
    data = rng.choice(["\n", "\n", "\r\n", "\n\n"]).join(lines).encode("utf-8", "surrogatepass")
    if name == "x.csv":
        data = b"prompt,response\n" + b"\n".join(rng.choice([b"a,b", b'"a,b', b"a", b"a,b,c", b'"x\ny",z', b"\0,1", b'a"b,"', text(rng).encode(errors="replace"),
                                                            b"y" * 200_000 + b",z"]) for _ in range(rng.randrange(30)))
    place.load(place.file(name, spoil(data, rng) if rng.random() < 0.4 else data))


def long_lines(rng, place):
    n = rng.choice([10**6, 10**7])
    what = rng.choice(['{"prompt": "%s", "response": "x"}' % ("a " * (n // 2)), '{"prompt": "p", "response": "%s"}' % ("cat " * (n // 4)), "[" * n, "x" * n,
                       '{"prompt": "p", "response": "x", "more": [%s0]}' % ("0," * (n // 2)), '{"a": ' * (n // 6), '"' + "\\u0041" * (n // 6) + '"'])
    place.load(place.file("long.jsonl", what.encode() + b"\n" + b'{"prompt": "p", "response": "a dog"}\n'))


def places(rng, place):
    """What is no file: directories, links in a circle, devices, names that no file system takes."""
    kind = rng.randrange(9)
    if kind == 0:
        path = place.file("d/x.txt", b"").parent
    if kind == 1:
        (path := place.dir / "loop.jsonl").symlink_to(path)
    if kind == 2:
        (path := place.dir / "dangling.jsonl").symlink_to("nowhere")
    if kind == 3:
        path = rng.choice(["/dev/null", "/dev/full", "/proc/self/mem", "/"])
    if kind == 4:
        path = place.dir / rng.choice(["x" * 300 + ".jsonl", "a\0b.jsonl", "\ud800.jsonl", "\n.jsonl", "nul", "~", "a:b", "//x", "x" * 5000])
    if kind == 5:
        (path := place.dir / "t" / "train.jsonl").mkdir(parents=True)
        path = path.parent
    if kind == 6:
        for s in rng.sample(["train", "valid", "test"], rng.randint(1, 3)):
            place.file(f"s/{s}.jsonl", b"\n".join(line(rng).encode("utf-8", "surrogatepass") for _ in range(rng.randrange(1, 3))))
        path = place.dir / "s"
    if kind == 7:
        path = place.file("ds/" + rng.choice(["dataset_info.json", "state.json", "dataset_dict.json"]), rng.choice([b"", b"{}", b"[", b"\xff", b'{"splits": 3}'])).parent
    if kind == 8:
        path = rng.choice(["tiny:x", "tiny:-1", "tiny:" + "9" * 5000, "", " ", ".", "..", "tiny :1", "http://localhost/x", "s3://a/b", "a/b/c/d"])
    place.load(path)


def corpus(rng, place):
    lines = [rng.choice([json.dumps({"text": text(rng)}), line(rng), text(rng), json.dumps({"text": rng.choice(VALUES)})]) for _ in range(rng.randrange(5))]
    data = "\n".join(lines).encode("utf-8", "surrogatepass")
    path = place.file(rng.choice(["c.txt", "c.jsonl"]), spoil(data, rng) if rng.random() < 0.3 else data)
    if rng.random() < 0.2:
        path = rng.choice(["/dev/null", "/", "/dev/full/x", "\0", "x" * 5000, place.dir])
    examples = common.load_corpus(str(path), place.tokenizer, place.config("kd_forward"))
    assert examples and all(e.response for e in examples)


def domains(rng, place):
    """A corpus of domains, one of them spoiled, or hostile --domains."""
    for name in rng.sample(["a.txt", "b.jsonl", "c/x.txt", "d.py", "..e", "f f.txt", "g=h.txt"], rng.randint(2, 3)):
        lines = [" ".join(rng.choices("the cat sat on a mat".split(), k=20)) for _ in range(60)]
        lines = [json.dumps({"text": x}) for x in lines] if name == "b.jsonl" else lines
        for _ in range(rng.choice([0, 0, 1, 5])):
            lines.insert(rng.randrange(60), rng.choice([json.dumps({"text": text(rng)}), line(rng), text(rng)]))
        data = "\n\n".join(lines).encode("utf-8", "surrogatepass")
        place.file("corpus/" + name, spoil(data, rng) if rng.random() < 0.2 else data)
    if rng.random() < 0.1:
        (place.dir / "corpus").mkdir(exist_ok=True)
        (place.dir / "corpus" / "loop").symlink_to(place.dir / "corpus" / rng.choice(["loop", "nowhere", "."]))
    given = "" if rng.random() < 0.7 else rng.choice([text(rng), "a", "a=", "=b", "a=b,a=c", f"a={place.dir}", "a=/dev/null", f"a={place.dir}/**/*", "a=" + "x" * 5000, "../x=y", "x=[", "a=\0"])
    cfg = place.config("ddk", data=str(place.dir / "corpus"), domains=given, holdout=rng.choice([0.0, 0.1, 0.4]), domain_tokens=rng.choice([0, 0, 5]))
    common.check_settings(cfg)
    with place.quiet():
        common.load_domains(cfg, place.student, None, place.tokenizer)


def task_files(rng, place):
    """A file for gold.py's --task: a good one, mended in one or two places."""
    entry = json.loads((ROOT / "data/tasks.json").read_text())["tasks"][rng.choice(["reviews", "sums", "rte"])]
    for _ in range(rng.choice([0, 1, 1, 2])):
        key = rng.choice([*entry, "write", "solve", "labels", text(rng), "shots", "lengths", "max_new", "stop", "metric", "check", "data", "world"])
        entry[key] = rng.choice([*VALUES, text(rng), {text(rng): text(rng)}, {"sample": text(rng)}, {"text": 3}, [1, "x"], ["\ud800"], {"text": {}}, "{a}{b}", "{0.__class__}"])
        if rng.random() < 0.3:
            entry.pop(rng.choice(list(entry)))
    data = json.dumps(entry).encode()
    name = str(place.file("task.json", spoil(data, rng) if rng.random() < 0.3 else data))
    name = rng.choice([name] * 9 + [text(rng), "/dev/null", "\0.json", "x" * 5000 + ".json", str(place.file("deep.json", deep(rng).encode())), "/x.json"])
    cfg = place.config("gold", task=name, steps=0, budget=8)
    with place.quiet():
        importlib.import_module("gold").train(cfg)


def shares(rng, place):
    ddk = importlib.import_module("ddk")
    given = rng.choice([text(rng), "a=.5,b=.5", "a=nan,b=1", "a=inf,b=0", "a=2,b=-1", "a=1", "a=.5,b=.5,b=.5", "uniform", "natural", "a=",
                        "a=.5,b=.5,c=0", "a=1e308,b=1e308", "a=.5,b=" + "9" * 5000, spoil(b"a=.5,b=.5", rng).decode("latin-1")])
    assert abs(ddk.fixed_shares(given, ["a", "b"], [3, 5]).sum() - 1) < 1e-9


def templates(rng, place):
    parts = [text(rng), "{prompt}", text(rng)] if rng.random() < 0.7 else [text(rng)]
    cfg = place.config("kd_forward", template="".join(parts), max_prompt=rng.choice([1, 2, 40]), max_response=20)
    common.check_settings(cfg)
    encode = common.prompt_encoder(place.tokenizer, cfg.template, place.student, cfg.max_prompt)
    for _ in range(3):
        ids = encode(text(rng).encode("utf-8", "replace").decode())
        assert 0 < len(ids) <= max(1, cfg.max_prompt)


def models(rng, place):
    """A model directory with one damaged file."""
    path = place.dir / "model"
    shutil.copytree(place.pair[1], path)
    victim = path / rng.choice(sorted(f.name for f in path.iterdir()))
    data = victim.read_bytes()
    kind = rng.randrange(5)
    if kind == 0:
        victim.unlink()
    else:
        victim.write_bytes([b"", data[:rng.randrange(len(data))], rng.choice([b"{}", b"[]", b"null", b"3", b'{"model_type": "gpt3"}', b"\xff\xfe"]),
                            spoil(data, rng)][kind - 1])
    with place.quiet():
        common.load_pair(place.config("kd_forward", student=str(path)), common.torch.device("cpu"))


def run_directories(rng, place):
    """An --out with damaged or foreign files, with and without --resume."""
    out = place.dir / "run"
    shutil.copytree(place.unfinished, out)
    victim = out / rng.choice(["settings.json", "settings.json", "log.jsonl", "checkpoint.pt", "result.json"])
    data = victim.read_bytes() if victim.exists() else b'{"method": "x"}'
    victim.write_bytes(rng.choice([b"", b"{}", b"[1]", b"null", b"\xff\xfe", data[:len(data) // 2], data + b"\n{\"st", b"PK\x03\x04", deep(rng).encode()]))
    if rng.random() < 0.2:
        victim.unlink()
    cfg = dataclasses.replace(place.unfinished_cfg, out=str(out), resume=rng.random() < 0.8)
    place.train(cfg)


def full_disks(rng, place):
    """No file may grow beyond some bytes (RLIMIT_FSIZE gives the errors of a full disk). What is there is whole or nothing."""
    cfg = place.config("kd_forward", steps=3, save_every=1, eval_every=9, eval_rows=2, out=str(place.dir / "full"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (rng.choice([0, 10, 300, 700, 2000, 20_000, 100_000, 190_000, 193_000, 10**6]), hard))
    try:
        place.train(cfg)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def bad_outputs(rng, place):
    """An --out that cannot be made or written."""
    file = place.file("file", b"mine")
    (loop := place.dir / "loop").symlink_to(loop)
    out = rng.choice([str(file), f"{file}/x", str(loop), f"{loop}/x", "/proc/x/y", "/dev/full", "/dev/null/x", "/sys/x", "x" * 300, "a\0b", "\ud800", str(place.dir / ("x" * 300))])
    with contextlib.chdir(place.dir):
        place.train(place.config("kd_forward", steps=1, save_every=1, eval_rows=2, out=out, overwrite=rng.random() < 0.5))
    assert file.read_bytes() == b"mine"


KINDS = {settings: 8, data_file: 8, typed_settings: 3, domains: 3, shares: 1, task_files: 3, long_lines: 1, places: 3, corpus: 3, templates: 3,
         models: 2, run_directories: 2, full_disks: 1, bad_outputs: 1}


# ---------------------------------------------------------------------------------------------------------------
class Place:
    """A directory for one input, and what every input needs."""
    def __init__(self, root):
        self.root, self.count = root, 0
        self.pair = [Path(p) for p in (self.config("kd_forward").teacher, self.config("kd_forward").student)]
        self.student = common.load_model(self.pair[1], common.torch.device("cpu"))
        self.tokenizer = common.load_tokenizer(self.pair[1], "student")
        self.unfinished_cfg = self.config("kd_forward", steps=2, save_every=1, eval_every=9, eval_rows=2, out=str(root / "unfinished"))
        self.unfinished = Path(self.unfinished_cfg.out)
        self.train(self.unfinished_cfg)
        (self.unfinished / "result.json").unlink()
        shutil.rmtree(self.unfinished / "student")
        self.fresh()

    def fresh(self):
        self.count += 1
        self.dir = self.root / f"input{self.count}"
        self.dir.mkdir()

    def config(self, script, **settings):
        return any_run(script, self.root, getattr(self, "dir", self.root) / "out", **settings)

    def file(self, name, data):
        (self.dir / name).parent.mkdir(parents=True, exist_ok=True)
        (self.dir / name).write_bytes(data)
        return self.dir / name

    def quiet(self):
        return contextlib.redirect_stdout(io.StringIO())

    def load(self, path):
        """A data set, as far as the first batch of token ids."""
        cfg = self.config("kd_forward", data=str(path), eval_rows=5)
        common.check_settings(cfg)
        with self.quiet():
            data = common.load_data(cfg, self.student, None, self.tokenizer)
            batch = common.Batches(data.train, self.student, None, cfg, common.torch.device("cpu")).at(0)[0]
        assert batch.tokens.max() < self.student.vocab and batch.tokens.shape[1] <= 48
        assert not any(self.tokenizer.eos_token_id in e.prompt or self.tokenizer.eos_token_id in e.response[:-1] for e in data.train)

    def train(self, cfg):
        with self.quiet():
            result = importlib.import_module("kd_forward").train(cfg)
        assert json.loads(Path(cfg.out, "result.json").read_text()) == json.loads(json.dumps(result))

    def whole(self):
        """Every file that a run left under its final name can be read back."""
        for f in self.dir.glob("*/*"):
            if f.parent.name in ("full", "out"):
                if f.suffix == ".json":
                    json.loads(f.read_text())
                if f.suffix == ".jsonl":
                    [json.loads(x) for x in f.read_text().splitlines()]
                if f.name == "checkpoint.pt":
                    common.torch.load(f, weights_only=True)


def one(kind, rng, place):
    """-> "fine" or the sentence of a refusal; any other end is an exception."""
    place.fresh()
    try:
        kind(rng, place)
        said = "fine"
    except common.BadInput as e:
        said = str(e)
        assert said.strip() and "\n" not in said.strip() and len(said) < 2000, f"not one sentence: {said[:300]!r}"
    except common.RunFailed as e:  # a loss that is not finite
        said = str(e)
    place.whole()
    shutil.rmtree(place.dir, ignore_errors=True)
    return said


def attack(inputs, seed, root):
    """`inputs` of all kinds. -> ({kind: [fine, refused]}, failures)."""
    place, counts, failures = Place(root), collections.defaultdict(lambda: [0, 0]), []
    kinds = [k for k, share in KINDS.items() for _ in range(share)]
    for i in range(inputs):
        kind = kinds[i % len(kinds)]
        try:
            said = one(kind, random.Random(f"{seed} {i}"), place)
            counts[kind.__name__][said != "fine"] += 1
        except BaseException as e:
            if isinstance(e, KeyboardInterrupt):
                raise
            failures.append(f"input {i} ({kind.__name__}): {type(e).__name__}: {str(e)[:300]}")
    return counts, failures


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--inputs", type=int, default=2400)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    begin = time.time()
    with tempfile.TemporaryDirectory() as root:
        os.environ["XDG_CACHE_HOME"] = f"{root}/cache"
        counts, failures = attack(args.inputs, args.seed, Path(root))
    print("\n".join(failures))
    for name, (fine, refused) in counts.items():
        print(f"{name:<16} {fine:5d} fine {refused:5d} refused")
    fine, refused = (sum(c[i] for c in counts.values()) for i in (0, 1))
    print(f"{time.time() - begin:.0f} s\n{args.inputs} inputs: {fine} fine, {refused} refused with a sentence, {len(failures)} failures")
    return bool(failures) or not math.isclose(fine + refused, args.inputs)


if __name__ == "__main__":
    sys.exit(main())
