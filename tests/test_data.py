"""The toy tasks of data/: what the shipped rows say, and that each program makes an instance that
the scripts can use."""
import ast
import email
import importlib.util
import json
import random
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from transformers import AutoTokenizer

import common
import ddk
import kd_forward

DATA = ROOT / "data"
SPLITS = ("train", "valid", "test")


def program(task):
    """data/<task>/prepare.py as a module."""
    spec = importlib.util.spec_from_file_location(f"prepare_{task}", DATA / task / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def grammar_of(task):
    return json.loads((DATA / task / "grammar.json").read_text())


def rows_of(folder):
    return {split: [json.loads(x) for x in open(Path(folder, f"{split}.jsonl"))]
            for split in SPLITS}


@pytest.fixture
def call(monkeypatch, capsys):
    """call(module, *arguments): its main(). Returns (what it said, exit status or None)."""
    def call(module, *arguments):
        monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, arguments)])
        try:
            module.main()
        except SystemExit as e:
            return capsys.readouterr().err, e.code
        return capsys.readouterr().out, None
    return call


@pytest.fixture
def small(call, tmp_path, monkeypatch):
    """small(module, changes, *options): call it with its own grammar, in which some entries are
    changed. The scripts run in this process, for starting torch takes longer than training."""
    def run_here(words, **kw):
        script = importlib.import_module(Path(words[1]).stem)
        script.train(common.parse_args(script.Config, words[2:]))
        return SimpleNamespace(stdout=[], wait=lambda: 0)

    def small(module, changes, *options):
        here = SimpleNamespace(Popen=run_here, PIPE=None, STDOUT=None)
        monkeypatch.setattr(module.toy, "subprocess", here)
        file = tmp_path / "grammar.json"
        file.write_text(json.dumps(grammar_of(module.HERE.name) | changes))
        return call(module, tmp_path / "new", "--grammar", file, *options)
    return small


def shape(width, **recipe):
    return {"width": width, "layers": 1, "heads": 2, "lr": 1e-2, **recipe}


# ---- answers ------------------------------------------------------------------------------------
RIGHT = {  # prompts, and their three right answers
    "describe name dan ; job miner ;": [
        "dan is a miner .", "meet dan , the miner .", "this is dan . dan works as a miner ."],
    "sort mango fig plum": [
        "fig , mango , plum .", "first fig , then mango , then plum .",
        "in order , they are fig and mango and plum ."],
    "reply to ben : shall we have rice from two till one in rome ?": [
        "yes ben , rice from two is good .", "sure , see you in rome .", "sorry ben , i am busy "
        "from two , but rome is nice . shall we have rice at eight ?"],
    "recap : the vet named ben had bread on monday in cairo from one till six .": [
        "ben had bread till six .", "on monday the vet ben had bread .", "the trip of ben : to "
        "cairo on monday , bread to eat , and the vet was home at six ."]}


def test_the_shipped_rows_are_those_of_the_grammar_and_no_answer_is_in_two_splits():
    rows, probs, split_of = rows_of(DATA / "answers"), [0.6, 0.25, 0.15], {}
    answers, grammar = program("answers"), grammar_of("answers")
    for split, name, n, labelled in (
            ("train", "data 0", 4000, 1000), ("valid", "valid", 200, 200),
            ("test", "test", 500, 500)):
        made = answers.make_rows(grammar, name, n, split, labelled)
        assert json.loads(json.dumps(made)) == rows[split]
        for row in rows[split]:
            assert row["probs"] == probs and row["response"] in (None, *row["references"])
            assert split_of.setdefault(tuple(row["references"]), split) == split
    assert RIGHT.items() <= {r["prompt"]: r["references"] for r in rows["test"]}.items()


@pytest.mark.parametrize("task, columns", [("answers", ["prompt"]), ("reviews", ["text", "label"])])
def test_the_vocabulary_covers_every_row(task, columns):
    tokenizer = AutoTokenizer.from_pretrained(DATA / task / "student")
    rows = sum(rows_of(DATA / task).values(), [])
    texts = [text for r in rows for text in [r[c] for c in columns] + r.get("references", [])]
    for text, ids in zip(texts, tokenizer(texts, add_special_tokens=False).input_ids):
        assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == text


def test_a_small_instance_of_answers_has_models_that_score_and_is_not_made_twice(small, tmp_path):
    sizes = {"pretrain": 1000, "pool": 40, "labelled": 20, "valid": 5, "test": 8}
    models = {"teacher": shape(32, steps=40), "student": shape(16, steps=20),
              "student-kl": {"steps": 20, "lr": 1e-2}}
    grammar, new = {"rows": sizes, "models": models}, tmp_path / "new"
    assert small(program("answers"), grammar, "--number", "3")[1] is None
    made = {f.name: f.stat().st_mtime_ns for f in new.iterdir()}
    assert set(made) == {"train.jsonl", "valid.jsonl", "test.jsonl", *models}
    m = {name: kd_forward.train(kd_forward.Config(
            data=str(new), student=name, steps=0, max_response=40, out=str(tmp_path / name)))
         for name in ("student", "student-kl")}
    assert m["student"]["teacher.ce"] < m["student"]["after.ce"]
    assert m["student-kl"]["after.kl_pq"] < m["student"]["after.kl_pq"]
    said, status = small(program("answers"), grammar)
    assert status == 2 and re.fullmatch("error: .*new holds train.jsonl already: .*\n", said)
    assert made == {f.name: f.stat().st_mtime_ns for f in new.iterdir()}


@pytest.mark.slow
def test_instance_0_of_answers_can_be_made_again(tmp_path):
    """Rows are equal. Weights are equal on one machine. On others rounding lets them drift apart,
    and metrics move: by .01 of right and a tenth of kl_pq between two versions of the code."""
    again = tmp_path / "answers"
    subprocess.run([sys.executable, DATA / "answers/prepare.py", again], check=True)
    assert rows_of(again) == rows_of(DATA / "answers")
    for name in ("student", "student-kl"):
        shipped, new = (kd_forward.train(kd_forward.Config(
            data=str(folder), student=name, steps=0, device="cpu", out=str(tmp_path / out)))
            for folder, out in ((DATA / "answers", f"{name}-0"), (again, f"{name}-1")))
        assert new["teacher.right"] == pytest.approx(shipped["teacher.right"], abs=0.02)
        assert new["after.right"] == pytest.approx(shipped["after.right"], abs=0.1)
        assert new["after.kl_pq"] == pytest.approx(shipped["after.kl_pq"], rel=0.3)


# ---- reviews ------------------------------------------------------------------------------------
def test_patterns_fit_the_right_texts_of_their_topic_and_no_others():
    entries = json.loads((DATA / "reviews/topics.json").read_text())
    reviews, rows, split_of = program("reviews"), rows_of(DATA / "reviews"), {}
    g = reviews.Grammar(grammar_of("reviews"))
    assert reviews.patterns(g) == entries
    assert reviews.make_rows(g, "test 0", [*range(20)] * 40, "test") == rows["test"]
    patterns = [("|".join(e["patterns"]), e) for e in entries]
    fitting = lambda text: [e for pattern, e in patterns if re.fullmatch(pattern, text)]
    for split in SPLITS:
        for row in rows[split]:
            [entry] = fitting(row["text"])  # no text has two topics
            assert split_of.setdefault(row["text"], split) == split
            same = ("label", "topic", "tail") if split == "test" else ("label",)
            assert all(entry[key] == row[key] for key in same)
    weights = {r["topic"]: r["weight"] for r in rows["test"]}
    assert len(weights) == 20 and sum(weights.values()) == pytest.approx(1)
    for text in ("this film seems fancy and rather quiet",  # words of both groups
                 "the film and the jack were both fancy",   # nouns of two topics
                 "sorry null film quiet loud", "we thought the film was quite fancy the"):
        assert not fitting(text)


def test_a_small_instance_of_reviews_has_an_llm_and_a_student_without_weights(small, tmp_path):
    reviews, new = program("reviews"), tmp_path / "new"
    llm = shape(32, pages=300, steps=3, batch_size=8)
    small(reviews, {"rows": {"train": 60, "valid": 10, "each_topic": 1},
                    "models": {"teacher": llm, "student": shape(16)}})
    assert {f.name for f in new.iterdir()} == {"train.jsonl", "valid.jsonl", "test.jsonl",
                                               "topics.json", "teacher", "student"}
    assert not list((new / "student").glob("*.safetensors"))
    student, teacher = (common.load_model(str(new / role), role, torch.device("cpu"))
                        for role in ("student", "teacher"))
    page = reviews.make_page(reviews.Grammar(grammar_of("reviews")), random.Random(0))
    ids = teacher.tokenizer(page).input_ids
    assert teacher.tokenizer.unk_token_id not in ids and student.tokenizer(page).input_ids == ids


# ---- domains ------------------------------------------------------------------------------------
def test_a_small_instance_of_domains_has_text_without_repeats_and_models_that_score(
        small, tmp_path, monkeypatch):
    domains, new = program("domains"), tmp_path / "new"
    sizes = {"code": 40, "prose": 20, "json": 20, "noise": 20}
    part = {"stdlib": str(Path(email.__file__).parent)}  # all of the library takes seconds
    monkeypatch.setattr(domains, "sysconfig", SimpleNamespace(get_paths=lambda: part))
    monkeypatch.setattr(domains, "noise", lambda rng, words: f"{rng.random():.2f}" * 100)  # repeats
    recipe = shape(16, steps=3, mix="code=.4,prose=.3,json=.2,noise=.1")
    models = {"teacher": recipe | {"steps": 20}, "student": recipe}
    small(domains, {"size": sizes, "models": models})
    texts = {name: [json.loads(x)["text"] for x in open(new / f"text/{name}.jsonl")]
             for name in sizes}
    for name, documents in texts.items():
        assert len(set(documents)) == len(documents)
        assert 0 <= sum(map(len, documents)) - 1000 * sizes[name] < 20_000
    trees = [node for text in texts["code"] for node in ast.walk(ast.parse(text))]
    functions = [x for x in trees if isinstance(x, (ast.ClassDef, ast.FunctionDef))]
    assert functions and not any(map(ast.get_docstring, functions))
    tokenizer = AutoTokenizer.from_pretrained(new / "student")
    for text in ("naïve café 漢\n\t<eos>", texts["code"][0]):
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert len(ids) == len(text.encode()) and tokenizer.decode(ids) == text
        assert tokenizer.eos_token_id not in ids
    m = ddk.train(ddk.Config(data=str(new), steps=0, gap_rows=4, eval_rows=4,
                             out=str(tmp_path / "run")))
    assert m["after.worst_gap"] > 1 == m["teacher.worst_gap"]
    assert small(domains, {}, "--text")[1] == 2  # its text is there


# ---- pronunciations -----------------------------------------------------------------------------
TEN_LINES = """;;; a comment, as in cmudict-0.7b
TOMATO  T AH0 M EY1 T OW2
TOMATO(1)  T AH0 M AA1 T OW2
aalto AA1 L T OW2 # name, finnish
aalto(2) AA2 L T OW0
aalto(3) AA1 L T OW2

#HASH-MARK  HH AE1 SH M AA2 R K
d'artagnan D AH0 R T AE1 NG Y AH0 N # foreign french
DÉJÀ  D EY2 ZH AA1
"""


@pytest.mark.parametrize("encoding", ["utf-8-sig", "latin-1"])
def test_a_dictionary_becomes_rows_of_letters_and_phones(encoding, call, tmp_path):
    words = [a + b + c for a in "bdfgkl" for b in "aeiou" for c in "mnprt"]
    lines = "".join(f"{word} {' '.join(word.upper())}\n" for word in words)
    (tmp_path / "dict").write_text(TEN_LINES + lines, encoding=encoding)
    said, _ = call(program("pronounce"), tmp_path / "dict", tmp_path / "new", "--labels", "7")
    rows, few = rows_of(tmp_path / "new/data"), rows_of(tmp_path / "new/few")
    found = {r["prompt"]: r["references"] for part in rows.values() for r in part}
    assert len(found) == sum(map(len, rows.values())) == 152  # no word is in two splits
    assert found["t o m a t o"] == ["T AH0 M EY1 T OW2", "T AH0 M AA1 T OW2"]
    assert found["a a l t o"] == ["AA1 L T OW2", "AA2 L T OW0"]  # the third is the first again
    assert few["test"] == rows["test"] and few["train"][:7] == rows["train"][:7]
    assert few["train"][7:] == [{"prompt": r["prompt"], "response": None}
                                for r in rows["train"][7:28]]
    for command in [line.split()[2:] for line in said.splitlines() if "kd_forward.py" in line]:
        common.parse_args(kd_forward.Config, command)


@pytest.mark.parametrize("text, sentence", [
    ("it's IH1 T S\n" * 60, "1 words, 0 are kept; .* at least 50 must be left"),
    ("tomato # no phones yet\n", "dict:1: 'tomato' has no phones"),
    ("\nThis is a text, not a dictionary.\n", "dict:2: 'is' is no phone")])
def test_what_is_no_dictionary_gets_one_sentence_and_leaves_nothing(text, sentence, call, tmp_path):
    (tmp_path / "dict").write_text(text)
    said, status = call(program("pronounce"), tmp_path / "dict", tmp_path / "new")
    assert status == 2 and re.match(f"error: .*{sentence}", said) and said.count("\n") == 1
    assert not (tmp_path / "new").exists()
