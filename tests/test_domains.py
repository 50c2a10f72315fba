"""The domains world: six kinds of text in their sizes, and the program that makes it."""
import ast
import csv
import json
import shutil
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import prepare, small_grammar
from transformers import AutoTokenizer

import common
import ddk

world = prepare("domains")
GRAMMAR = json.loads((world.HERE / "grammar.json").read_text())


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The pieces of a part of the standard library, read once: all of it takes seconds."""
    root = tmp_path_factory.mktemp("stdlib")
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-d]*.py")):
        shutil.copy(file, root)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(root)})
        pieces = world.stdlib_pieces()
    with pytest.MonkeyPatch.context() as m:
        m.setattr(world, "stdlib_pieces", lambda: tuple(map(list, pieces)))
        yield


SIZES = {name: thousands // 8 + 1 for name, thousands in GRAMMAR["sets"]["tiny"]["size"].items()}


@pytest.fixture(scope="module")
def corpus(library):
    return world.make_corpus(SIZES, GRAMMAR["words"])


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_world_has_its_domains_in_their_sizes(whole, request):
    sizes = GRAMMAR["sets"]["tiny"]["size"] if whole else SIZES
    corpus = world.make_corpus(sizes, GRAMMAR["words"]) if whole else request.getfixturevalue("corpus")
    assert list(corpus) == list(sizes)
    for name, texts in corpus.items():
        assert 0 <= sum(map(len, texts)) - 1000 * sizes[name] < 60_000, name
        assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("name", list(GRAMMAR["sets"]))
def test_the_mixtures_of_a_set_are_shares_of_its_domains(name):
    for part in ("teacher", "student"):
        shares = common.parse_pairs(GRAMMAR["sets"][name][part], "--mix")
        assert sorted(shares) == sorted(GRAMMAR["sets"][name]["size"]) and sum(map(float, shares.values())) == pytest.approx(1)


def test_parts_of_a_domain_share_no_document(library):
    parts = world.make_corpus({"code-1": 50, "code-2": 50, "log": 5}, GRAMMAR["words"])
    assert parts["code-1"] and parts["code-2"] and not set(parts["code-1"]) & set(parts["code-2"])


def test_code_has_no_docstrings_and_data_parse(corpus):
    for text in corpus["code"][:200]:
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                assert ast.get_docstring(node) is None
    assert all(len(json.loads(t)["rows"]) == json.loads(t)["count"] for t in corpus["json"][:50])
    assert all(len(row) == 6 for t in corpus["csv"][:50] for row in csv.reader(t.splitlines()))
    assert set("".join(corpus["noise"][:50])) == set("0123456789abcdef")


def test_every_byte_is_a_token(corpus, tmp_path):
    world.write_model(tmp_path / "model", 16, 1, 2)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    for text in ["naïve café \u6f22\n\t<eos>", *(t[0][:300] for t in corpus.values())]:
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert len(ids) == len(text.encode()) and tokenizer.decode(ids) == text and tokenizer.eos_token_id not in ids


def test_the_program_writes_its_domains_and_asks_ddk_for_its_models(library, tmp_path, monkeypatch):
    """Whole, but for the training: its commands are accepted by the script, and what they make is put in place."""
    asked = []

    def popen(command, **kw):
        cfg = common.parse_args(ddk.Config, command[2:])
        common.check_settings(cfg)
        ddk.fixed_shares(cfg.mix, ["code", "log", "noise"], [1, 1, 1])
        asked.append(cfg)
        (common.Path(cfg.out) / "student").mkdir(parents=True)
        return SimpleNamespace(stdout=[], wait=lambda: 0)
    monkeypatch.setattr(world, "subprocess", SimpleNamespace(Popen=popen, PIPE=None, STDOUT=None))
    small = {"size": {"code": 20, "log": 5, "noise": 5}, "teacher": "code=.6,log=.2,noise=.2", "student": "code=.2,log=.6,noise=.2"}
    grammar = small_grammar("domains", tmp_path / "g.json", sets={"small": small})
    monkeypatch.setattr("sys.argv", ["prepare.py", str(tmp_path / "w"), "--set", "small", "--number", "2", "--grammar", str(grammar)])
    world.main()
    assert {f.name for f in (tmp_path / "w").iterdir()} == {"data", "teacher", "student"}
    assert {f.name for f in (tmp_path / "w/data").iterdir()} == {"code.jsonl", "log.jsonl", "noise.jsonl"}
    assert [c.mix for c in asked] == [small["teacher"], small["student"]]
    assert all(c.teacher == "none" and c.gamma == 0 and c.seed == 2 and c.data == str(tmp_path / "w/data") for c in asked)


def test_own_text_takes_the_place_of_a_set(tmp_path, monkeypatch):
    asked = []

    def popen(command, **kw):
        asked.append(common.parse_args(ddk.Config, command[2:]))
        (common.Path(asked[-1].out) / "student").mkdir(parents=True)
        return SimpleNamespace(stdout=[], wait=lambda: 0)
    monkeypatch.setattr(world, "subprocess", SimpleNamespace(Popen=popen, PIPE=None, STDOUT=None))
    monkeypatch.setattr("sys.argv", ["prepare.py", str(tmp_path / "w"), "--domains", "code=src,log=server.log"])
    world.main()
    assert [(c.domains, c.mix, c.max_tokens) for c in asked] == [("code=src,log=server.log", mix, 128) for mix in ("uniform", "natural")]
    assert {f.name for f in (tmp_path / "w").iterdir()} == {"teacher", "student"}
