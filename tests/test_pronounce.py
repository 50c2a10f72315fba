"""From a pronouncing dictionary to rows and models: what is read, what is left out, and that kd_forward.py runs on it."""
import json
import random
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import prepare
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import common
import kd_forward

world = prepare("pronounce")
BOTH_AGES = """;;; a comment, as in cmudict-0.7b
## another
TOMATO  T AH0 M EY1 T OW2
TOMATO(1)  T AH0 M AA1 T OW2
aalto AA1 L T OW2 # name, finnish
aalto(2) AA2 L T OW0
aalto(3) AA1 L T OW2

#HASH-MARK  HH AE1 SH M AA2 R K
d'artagnan D AH0 R T AE1 NG Y AH0 N # foreign french
ab AE1 B\r
DÉJÀ  D EY2 ZH AA1
pneumonoultrami N UW1 M
"""


def made_up(n=120):
    """A dictionary of n made-up words, in which every letter has a phone; some have a second pronunciation."""
    rng, lines = random.Random(0), {}
    sounds = dict(zip("bdefghiklmnoprstu", "B D EH1 F G HH IH0 K L M N OW1 P R S T UW2".split()))
    while len(lines) < n:
        word = "".join(rng.choices(list(sounds), k=rng.randint(3, 7)))
        lines[word] = [f"{word}  {' '.join(sounds[x] for x in word)}"]
        if len(lines) % 5 == 0:
            lines[word].append(f"{word}(2)  {' '.join(sounds[x] for x in word[1:])}")
    return "".join(line + "\n" for both in lines.values() for line in both)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(text, *options): the program on a dictionary with this text; DIR is tmp_path / w."""
    def run(text, *options):
        (tmp_path / "some.dict").write_bytes(text if isinstance(text, bytes) else text.encode())
        monkeypatch.setattr(sys, "argv", ["prepare.py", str(tmp_path / "some.dict"), str(tmp_path / "w"), *options])
        world.main()
        return tmp_path / "w"
    return run


def rows_of(folder, data="data"):
    return {split: [json.loads(x) for x in open(folder / f"{data}/{split}.jsonl")] for split in ("train", "valid", "test")}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "latin-1"])
def test_dictionaries_of_all_ages_are_read(encoding, tmp_path):
    (tmp_path / "d").write_text(BOTH_AGES, encoding=encoding, newline="")
    words = world.read_dictionary(tmp_path / "d")
    assert words["tomato"] == ["T AH0 M EY1 T OW2", "T AH0 M AA1 T OW2"] and words["ab"] == ["AE1 B"]
    assert words["aalto"] == ["AA1 L T OW2", "AA2 L T OW0"]  # the third is the first again
    assert {"déjà", "#hash-mark", "d'artagnan"} < set(words) and len(words) == 7
    assert world.read_dictionary(tmp_path / "d", stress=False)["aalto"] == ["AA L T OW"]


def test_rows_are_letters_phones_and_all_pronunciations(run, capsys):
    rows = rows_of(run(BOTH_AGES + made_up()))
    assert [len(rows[s]) for s in ("train", "valid", "test")] == [98, 12, 12]
    found = {r["prompt"]: r for s in rows for r in rows[s]}
    assert found["t o m a t o"] == {"prompt": "t o m a t o", "response": "T AH0 M EY1 T OW2",
                                    "references": ["T AH0 M EY1 T OW2", "T AH0 M AA1 T OW2"]}
    assert all(re.fullmatch("[a-z]( [a-z]){2,13}", x) for x in found)
    assert "127 words, 122 are kept; left out: 3 with other characters than a-z, 2 not of 3 to 14 letters" in capsys.readouterr().out


@pytest.mark.parametrize("asked, labels", [((), 24), (("--labels", "7"), 7)])
def test_the_student_has_few_labels_and_three_times_as_many_words_without(asked, labels, run, capsys):
    top = run(made_up(), *asked)
    every, few = rows_of(top), rows_of(top, "few")
    assert few["valid"] == every["valid"] and few["test"] == every["test"] and len(few["train"]) == 4 * labels
    assert few["train"][:labels] == every["train"][:labels]
    assert few["train"][labels:] == [{"prompt": r["prompt"], "response": None} for r in every["train"][labels:4 * labels]]
    assert f"the student has {4 * labels} for train, {labels} of them with a label" in capsys.readouterr().out


def test_no_label_at_all_gets_one_sentence(run, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(made_up(), "--labels", "0")
    assert "error: --labels 0: one word at least needs a label\n" == capsys.readouterr().err and not (tmp_path / "w").exists()


def test_a_word_is_in_one_split_whatever_the_order_of_the_file():
    words = [line.split()[0] for line in made_up(400).splitlines() if "(" not in line]
    splits = world.split(words)
    assert sorted(sum(splits.values(), [])) == sorted(words) and [len(w) for w in splits.values()] == [40, 40, 320]
    assert world.split(words[::-1]) == splits
    first = splits["test"][:20]  # what --eval-rows 20 takes: not the beginning of the alphabet
    assert first != sorted(first) and len({word[0] for word in first}) > 5
    assert len(world.split(map(str, range(20_000)))["test"]) == 1000


def test_letters_and_phones_are_tokens_of_their_own(run):
    top = run(made_up())
    tokenizer = AutoTokenizer.from_pretrained(top / "random-teacher")
    for row in rows_of(top)["test"]:
        both = [tokenizer(row[x], add_special_tokens=False, split_special_tokens=True).input_ids for x in ("prompt", "response")]
        assert tokenizer.unk_token_id not in sum(both, []) and not set(both[0]) & set(both[1])
        assert [tokenizer.decode(ids) for ids in both] == [row["prompt"], row["response"]]
    decoder = SimpleNamespace(config=SimpleNamespace(is_encoder_decoder=False))
    ids = common.prompt_encoder(tokenizer, "auto", decoder, 32)("t o p")
    assert tokenizer.decode(ids) == "<user> t o p <assistant>"


def test_models_have_the_sizes_that_are_printed(tmp_path):
    """With the 69 phones of CMU's dictionary: 1.8 million and 26 thousand parameters, about."""
    vocab = {token: i for i, token in enumerate([*world.SPECIAL, *world.LETTERS, *map(str, range(69))])}
    for (name, shape), about in zip(world.MODELS.items(), (1.8e6, 26e3)):
        said = world.write_model(tmp_path / name, vocab, *shape)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / name))
        assert said == model.num_parameters() and abs(said / about - 1) < 0.05


def test_the_commands_make_a_teacher_and_students(run, monkeypatch, capsys):
    """--train, with two steps in place of thousands, in this process: rows, tokenizer and models fit kd_forward.py."""
    asked = []

    def run_here(command):
        cfg = common.parse_args(kd_forward.Config, [*command[2:], "--steps", "2", "--batch-size", "4", "--eval-rows", "2", "--max-response", "9", "--device", "cpu"])
        asked.append(cfg)
        kd_forward.train(cfg)
        return SimpleNamespace(returncode=0)
    monkeypatch.setattr(world, "subprocess", SimpleNamespace(run=run_here))
    monkeypatch.setitem(world.MODELS, "teacher", (32, 1, 2))
    top = run(made_up(60), "--train", "--no-stress")
    assert "cut to fit: 0 prompts, 0 responses" in capsys.readouterr().out
    assert [(c.teacher, c.alpha) for c in asked] == [("none", 0), ("none", 0), (str(top / "runs/teacher/student"), 1)]
    assert [c.data for c in asked] == [str(top / "data"), str(top / "few"), str(top / "few")]
    assert asked[1].student == asked[2].student and asked[1].steps == asked[2].steps and asked[1].lr == asked[2].lr
    for name in world.RUNS:
        assert (top / f"runs/{name}/student/model.safetensors").exists()
        assert "exact_match_greedy" in (top / f"runs/{name}/result.json").read_text()


def test_training_stops_where_a_command_fails(run, monkeypatch):
    asked = []
    monkeypatch.setattr(world, "subprocess", SimpleNamespace(run=lambda c: asked.append(c) or SimpleNamespace(returncode=3)))
    with pytest.raises(SystemExit) as e:
        run(made_up(), "--train")
    assert e.value.code == 3 and len(asked) == 1


@pytest.mark.parametrize("text, sentence", [
    ("", "some.dict: 0 words, 0 are kept; .* at least 50 must be left, so name a larger dictionary"),
    (";;; only a comment\n# and another\n", "some.dict: 0 words, 0 are kept"),
    ("it's IH1 T S\n" * 60, "some.dict: 1 words, 0 are kept; left out: 1 with other characters"),
    (made_up(49), "some.dict: 49 words, 49 are kept"),
    (made_up() + "tomato\n", "some.dict:145: 'tomato' has no phones: lines such as .* mend the line"),
    (made_up() + "tomato # no phones yet\n", "some.dict:145: 'tomato' has no phones"),
    ("tomato t ah m ey t ow\n", "some.dict:1: 't' is no phone: .* the phones in capitals"),
    ("\nThis is a text, not a dictionary.\n", "some.dict:2: 'is' is no phone"),
    (bytes(range(256)) * 9, "some.dict:1: .* no phone"),
], ids=lambda x: x[:30] if isinstance(x, str) else "bytes")
def test_what_is_no_dictionary_gets_one_sentence_and_leaves_nothing(text, sentence, run, tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        run(text)
    said = capsys.readouterr().err
    assert e.value.code == 2 and re.match(f"error: .*{sentence}", said) and said.count("\n") == 1
    assert not (tmp_path / "w").exists()


def test_missing_files_and_directories_that_are_there_get_one_sentence(run, tmp_path, monkeypatch, capsys):
    for file, sentence in (("none.dict", "none.dict: cannot be read .No such file or directory.: name a pronouncing"),
                           ("", "cannot be read .Is a directory.")):
        monkeypatch.setattr(sys, "argv", ["prepare.py", str(tmp_path / file), str(tmp_path / "w")])
        with pytest.raises(SystemExit):
            world.main()
        assert re.search(sentence, capsys.readouterr().err)
    run(made_up())
    for folder in (tmp_path / "w", tmp_path / "some.dict/w"):
        monkeypatch.setattr(sys, "argv", ["prepare.py", str(tmp_path / "some.dict"), str(folder)])
        with pytest.raises(SystemExit):
            world.main()
        assert re.search("w: cannot be made .*: name a new directory", capsys.readouterr().err)
