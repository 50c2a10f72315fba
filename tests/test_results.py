"""tests/evidence/results.py: its statistics, that every row's command parses, and that no row starts from a stale student."""
import importlib
import json
import re
import shlex

import pytest
from conftest import ROOT
from evidence import results

import common


def test_p_values_are_those_of_students_t():
    """At the tabulated 97.5 % quantiles p is 5 %, for even and odd degrees of freedom; and one value from R's t.test."""
    for df, t in results.T95.items():
        n = df + 1
        values = [1.0] * (n // 2) + [-1.0] * (n // 2) + [0.0] * (n % 2)
        sd = results.mean_sd(values)[1]
        shifted = [v + t * sd / n**0.5 for v in values]
        assert results.p_value(shifted) == pytest.approx(0.05, abs=5e-4), df
    assert results.p_value([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(0.01324, abs=1e-5)
    assert results.p_value([0.0, 0.0, 0.0]) == 1.0 and results.p_value([2.0, 2.0, 2.0]) == 0.0


def test_false_discovery_rate_of_a_worked_example():
    """Benjamini and Hochberg 1995, section 3.2: of fifteen p values the first four are rejected at 5 %."""
    ps = [.0001, .0004, .0019, .0095, .0201, .0278, .0298, .0344, .0459, .3240, .4262, .5719, .6528, .7590, 1.0]
    assert results.threshold(ps) == .0095 and results.threshold([0.9, 0.5]) < 0 and results.threshold([]) < 0
    assert results.threshold([.04, .05]) == .05  # neither alone would be below .025


def test_a_star_stands_where_a_difference_survives():
    assert results.interval([1.0, 1.1, 0.9], 0.05).endswith("]*") and results.interval([1.0, 1.1, 0.9], 0.001)[-1] == "]"
    assert results.interval([1.0, float("nan")], 1.0) == "" and results.interval([1.0], 1.0) == ""


@pytest.mark.parametrize("row", results.ROWS)
def test_the_command_of_every_row_parses(row):
    words = shlex.split(results.command(row, 10, "code=.5,prose=.5"))
    module = importlib.import_module(results.script_of(row).removesuffix(".py").replace("/", "."))
    cfg = common.parse_args(module.Config, words[2 if words[0] == "-m" else 1:])
    common.check_settings(cfg)
    assert cfg.seed == 10 and cfg.out == f"out/results/{row}-10" and "tiny" != cfg.data != "auto"


def test_controls_and_parents_are_rows_and_come_from_no_circle():
    for row, (_, controls, seeds) in results.ROWS.items():
        assert set(controls) <= set(results.ROWS) and set(results.parents(row)) <= set(results.ROWS)
        assert all(results.ROWS[p][2] >= seeds for p in results.parents(row)) and len(results.code(row)) == 12
    assert results.parents("kl-more-t3") == ["kl-more"] and results.parents("kl-more") == []
    assert results.parents("static") == results.parents("first-look") == ["ddk"]
    assert results.worlds("few-dpkd") == ["answers", "few"]
    assert {t for tables, _ in results.FAMILIES.values() for t in tables} == set(results.TABLES)


def test_the_code_of_a_row_is_that_of_its_script_world_and_parents(monkeypatch):
    def code(row, changed):
        real = results.meaning
        with monkeypatch.context() as m:
            m.setattr(results, "meaning", lambda f: "x" if f == ROOT / changed else real(f))
            results.code.cache_clear()
            found = results.code(row)
        results.code.cache_clear()
        return found
    for row, files, others in (
            ("kl-more-t3", ["common.py", "kd_forward.py", "data/answers/prepare.py"], ["ddk.py", "gold.py"]),
            ("gold-noise", ["tests/controls/gold_noise.py", "data/reviews/grammar.json", "data/tasks.json"], ["gold.py"]),
            ("static", ["ddk.py", "data/domains/grammar.json"], ["kd_forward.py", "data/answers/prepare.py"])):
        now = code(row, "nothing")
        assert all(code(row, f) != now for f in files) and all(code(row, f) == now for f in others), row


def test_comments_and_docstrings_are_not_code(tmp_path):
    def meaning(text):
        (tmp_path / "x.py").write_text(text)
        results.meaning.cache_clear()
        return results.meaning(tmp_path / "x.py")
    one = meaning('"""Doc."""\nclass A:\n    """Doc."""\n    x: int = 1  # a remark\n')
    assert one == meaning("'Another.'\nclass A:\n    'Another.'\n\n    x: int = 1\n") != meaning("class A:\n    x: int = 2\n")
    (tmp_path / "x.json").write_text("{}")
    assert results.meaning(tmp_path / "x.json") == "{}"


@pytest.fixture
def pretended(tmp_path, monkeypatch):
    """Runs that write nothing but what results.py reads; -> the rows that were run, in order."""
    ran = []

    def pretend(words, **kw):
        out = tmp_path / re.search(r"--out (\S+)", " ".join(words))[1]
        (out / "student").mkdir(parents=True, exist_ok=True)
        shares = {"after.share_a": 0.25, "after.share_b": 0.75, "seconds": 1.0}
        (out / "result.json").write_text(json.dumps(shares))
        ran.append((out.name, " ".join(words)))
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(results, "FILE", tmp_path / "results.jsonl")
    monkeypatch.setattr(results, "sources", lambda row: [])
    monkeypatch.setattr(results.subprocess, "run", pretend)
    monkeypatch.setattr(results, "record", lambda row, seed, words, out: {
        "row": row, "seed": seed, "command": words, "result": json.loads((out / "result.json").read_text()),
        "curve": [{"step": 0, "share_a": 0.5, "share_b": 0.5}, {"step": 30, "share_a": 0.1, "share_b": 0.9}]})
    results.code.cache_clear()
    yield ran
    results.code.cache_clear()


def test_a_row_is_never_run_on_a_student_that_other_code_has_made(pretended, monkeypatch, capsys, tmp_path):
    """kl-more-t3 <- kl-more: made once, and again when the code has changed."""
    records = {}
    names = lambda: [name for name, _ in pretended]
    results.run("kl-more-t3", 10, records)
    assert names() == ["kl-more-10", "kl-more-t3-10"] and len(records) == 2
    assert "kl-more-t3 starts from kl-more-10, which is not there or was made by other code" in capsys.readouterr().out
    results.run("kl-more-t5", 10, records)
    assert names()[2:] == ["kl-more-t5-10"] and results.load() == records
    (tmp_path / "script.py").write_text("other = 'code'")
    monkeypatch.setattr(results, "sources", lambda row: [tmp_path / "script.py"] if row == "kl-more" else [])
    results.code.cache_clear()
    assert records["kl-more-t3", 10]["code"] != results.code("kl-more-t3")  # its parent's code is part of its own
    results.run("kl-more-t3", 10, records)
    assert names()[3:] == ["kl-more-10", "kl-more-t3-10"]
    assert records["kl-more-t3", 10]["code"] == results.code("kl-more-t3")
    assert records["kl-more-t3", 10]["parents"] == {"kl-more": results.code("kl-more")}


def test_a_static_mixture_is_read_from_the_run_that_it_repeats(pretended):
    results.run("static", 10, {})
    assert [name for name, _ in pretended] == ["ddk-10", "static-10"] and "--mix a=0.2500,b=0.7500 " in pretended[1][1]
    results.run("first-look", 11, {})
    assert [name for name, _ in pretended[2:]] == ["ddk-11", "first-look-11"] and "a=0.1000,b=0.9000 " in pretended[3][1]


def test_printed_commands_of_rows_that_hang_together_are_whole():
    records = {("ddk", 21): {"result": {"after.share_code": 0.3, "after.share_csv": 0.7}}}
    whole = " --data tiny:N --seed N --out out/results/"
    assert results.shown_command({}, "sft") == "python kd_forward.py --alpha 0"
    assert results.shown_command({}, "uniform") == "python ddk.py --mix uniform" + whole + "uniform-N"
    assert results.shown_command({}, "ddk-late").endswith("--student out/results/uniform-N/student" + whole + "ddk-late-N")
    assert "--mix code=0.3000,csv=0.7000 --data tiny:21 --seed 21 --out" in results.shown_command(records, "static")


def test_a_page_is_made_anew_between_its_marks():
    records = results.load()
    page = results.with_tables("prose\n<!-- table kd -->\nold\n<!-- end -->\nmore prose\n", records)
    assert page.startswith("prose\n<!-- table kd -->\n| row | command |") and page.endswith("<!-- end -->\nmore prose\n")
    assert "old" not in page.splitlines() and results.with_tables(page, records) == page
