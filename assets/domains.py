"""Domains: texts from files, folders, saved data sets or the hub, packed into sequences of tokens on disk.

The documents of a domain are read one after the other, each is followed by an end-of-sequence token, and the stream
goes to a file of 16- or 32-bit tokens, which training then maps into memory: a corpus may be larger than memory. A
hash of its text decides whether a document is for training, for validation or for testing, so no text is in two.
"""
import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from assets.plumbing import BadInput

SPLITS = ("train", "valid", "test")
BUFFER = 2**22  # characters of text held at a time
FIELDS = ("text", "content")  # of a JSON line or a row of a data set; the second is what code corpora use


def parse(text, flag):
    """"code=src,prose=notes.txt" -> {"code": "src", "prose": "notes.txt"}."""
    found = {}
    for part in text.split(","):
        name, equals, value = (x.strip() for x in part.partition("="))
        if not (re.fullmatch(r"[\w.-]+", name) and equals and value):
            raise BadInput(f"{flag} {part!r}: name=value is wanted, with a comma between two of them")
        if name in found:
            raise BadInput(f"{flag}: the name {name} is given twice")
        found[name] = value
    return found


def folder(path):
    """{name: file or folder} of a directory with one entry for each domain."""
    if not Path(path).is_dir():
        raise BadInput(f"--data {path}: neither a tiny world (tiny, tiny:N) nor a directory with a file or folder for "
                       "each domain; to name them one by one use --domains name=source,name=source")
    found = {}
    for p in sorted(Path(path).iterdir()):
        if p.stem in found:
            raise BadInput(f"--data {path}: {Path(found[p.stem]).name} and {p.name} are both called {p.stem}: "
                           "rename one")
        if not p.name.startswith("."):
            found[p.stem] = str(p)
    return found


def files_of(source):
    """The files behind a path or a pattern such as src/**/*.py; None if it is neither."""
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir() and not any((path / f).is_file() for f in ("dataset_info.json", "dataset_dict.json")):
        return [p for p in sorted(path.rglob("*")) if p.is_file()]
    if glob.has_magic(source):
        return [Path(p) for p in sorted(glob.glob(str(path), recursive=True)) if Path(p).is_file()]
    return None


def read_file(file, whole):
    """Documents of a text file: the whole of it, or those that blank lines part; of a .jsonl: its lines' texts."""
    if not file.stat().st_size:
        raise BadInput(f"{file}: the file is empty: remove it or leave it out")
    lines = []
    with open(file, "rb") as f:
        for at, raw in enumerate(f, 1):
            try:
                line = raw.decode("utf-8-sig" if at == 1 else "utf-8")
            except UnicodeDecodeError:
                raise BadInput(f"{file}:{at}: not valid UTF-8, so no text file: convert it or leave it out") from None
            if "\0" in line:
                raise BadInput(f"{file}:{at}: a binary file, text is wanted: leave it out")
            if file.suffix == ".jsonl":
                if line.strip():
                    try:
                        row = json.loads(line)
                    except (ValueError, RecursionError) as e:
                        raise BadInput(f"{file}:{at}: {str(e)[:80]}: one JSON object a line is wanted") from None
                    yield text_of(row, f"{file}:{at}")
            elif whole or line.strip():
                lines.append(line)
            elif lines:
                yield "".join(lines)
                lines = []
    if lines:
        yield "".join(lines)


def text_of(row, where):
    """The text of a JSON line or of a row of a data set."""
    text = next((row[k] for k in FIELDS if k in row), None) if isinstance(row, dict) else None
    if not isinstance(text, str) or re.search("[\ud800-\udfff]", text):
        raise BadInput(f'{where}: no string of valid text under "text" or "content": rename the field that holds it')
    return text


def documents(name, source):
    """The documents of a domain, one after the other, from wherever `source` says."""
    files = files_of(source)
    if files is not None:
        if not files:
            raise BadInput(f"domain {name}: {source} holds no file")
        for file in files:
            try:
                yield from read_file(file, whole=not Path(source).expanduser().is_file())
            except OSError as e:
                raise BadInput(f"domain {name}: {file} cannot be read ({e.strerror})") from None
        return
    if Path(source).suffix in (".txt", ".jsonl", ".md", ".py"):
        raise BadInput(f"domain {name}: {source}: no such file")
    import datasets  # only here: everything else runs without it
    repository, _, conf = source.partition(":")
    folder = "/".join(repository.split("/")[2:])  # owner/name/folder of a data set that has a folder for each part
    try:
        if Path(source).is_dir():
            rows = datasets.load_from_disk(source)
            rows = rows["train"] if isinstance(rows, dict) else rows
        else:  # streamed: only what is packed is fetched
            rows = datasets.load_dataset("/".join(repository.split("/")[:2]), conf or None, split="train",
                                         data_dir=folder or None, streaming=True)
    except Exception as e:  # absent, offline, damaged, gated: many kinds
        raise BadInput(f"domain {name}: {source} is neither a file, a folder, a pattern nor a saved or hub data set "
                       f"({(str(e).strip().splitlines() or [type(e).__name__])[0][:160]})") from None
    for i, row in enumerate(rows):
        yield text_of(row, f"domain {name}: {source}, row {i}")


def split_of(text, holdout):
    """Which split a document belongs to: a function of its text alone, the same for every seed."""
    draw, cut = zlib.crc32(text.encode()) % 1000, 1000 * holdout
    return "test" if draw < cut else "valid" if draw < 2 * cut else "train"


def pack(target, name, source, tokenizer, limit, holdout):
    """Write target/{train,valid,test}.bin and meta.json. Holds a few MB of text at a time, whatever the corpus has."""
    dtype, eos = np.uint16 if len(tokenizer) <= 2**16 else np.uint32, tokenizer.eos_token_id
    digest, count, pending, size = hashlib.sha1(), dict.fromkeys(SPLITS, 0), [], 0
    files = {s: open(target / f"{s}.bin", "wb") for s in SPLITS}

    def flush():
        ids = tokenizer([t for _, t in pending], add_special_tokens=False, split_special_tokens=True).input_ids
        for (split, _), tokens in zip(pending, ids):
            np.array(tokens + [eos], dtype=dtype).tofile(files[split])
            count[split] += len(tokens) + 1
        pending.clear()
    for text in documents(name, source):
        if text.strip():
            digest.update(text.encode() + b"\0")
            pending.append((split_of(text, holdout), text))
            size += len(text)
        if size > BUFFER:
            flush()
            size = 0
            if limit and count["train"] >= limit:
                break
    flush() if pending else None
    for f in files.values():
        f.close()
    (target / "meta.json").write_text(json.dumps({"tokens": count, "sha1": digest.hexdigest(), "source": source}))


def load(sources, tokenizer, cfg, cache):
    """SimpleNamespace: names, train/valid/test {name: (sequences, max_tokens) tokens, memory-mapped}, sha1 of all text.

    What was packed is kept in `cache`, under the tokenizer and the path, size and time of every file.
    """
    if len(sources) < 2:
        raise BadInput(f"a mixture needs two domains or more, there is {len(sources)} ({', '.join(sources) or 'none'})")
    vocabulary = hashlib.sha1(repr(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
    data, digest = SimpleNamespace(names=list(sources), train={}, valid={}, test={}), hashlib.sha1()
    for name, source in sources.items():
        stamp = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files_of(source) or []]
        what = json.dumps([source if not stamp else stamp, vocabulary, cfg.domain_tokens, cfg.holdout])
        target = Path(cache) / f"packed-{name}-{hashlib.sha1(what.encode()).hexdigest()[:16]}"
        if not target.is_dir():
            print(f"packing domain {name}: {source} ...", flush=True)
            part = Path(tempfile.mkdtemp(prefix="packing-", dir=cache))
            try:
                pack(part, name, source, tokenizer, cfg.domain_tokens, cfg.holdout)
                os.replace(part, target)
            except OSError as e:
                if not target.is_dir():  # else another process was faster
                    raise BadInput(f"domain {name}: cannot write its tokens to {cache} ({e.strerror}): make room or "
                                   "set XDG_CACHE_HOME") from None
            finally:
                shutil.rmtree(part, ignore_errors=True)
        meta = json.loads((target / "meta.json").read_text())
        digest.update(name.encode() + meta["sha1"].encode())
        for split in SPLITS:
            have, n = meta["tokens"][split], cfg.max_tokens
            have = min(have, cfg.domain_tokens or have) if split == "train" else have
            if have < n:
                raise BadInput(f"domain {name}: {have} tokens for {split}, fewer than one sequence of {n}: more or "
                               "shorter documents, a larger --holdout or a smaller --max-tokens")
            dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
            tokens = np.memmap(target / f"{split}.bin", dtype, "r", shape=(have // n, n))  # the rest is cut off
            getattr(data, split)[name] = tokens
    data.sha1 = digest.hexdigest()[:12]
    return data
