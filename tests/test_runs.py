"""Settings, runs and what is made of them: the command line, the learning rate, tiny worlds, runs side by side."""
import builtins
import dataclasses
import importlib
import json
import math
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, any_run
from safetensors.torch import load_file

import common
import ddk
import gold
import kd_forward

METHODS = ["kd_forward", "llmr", "dpkd", "gold", "ddk"]


# ---------------------------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", METHODS)
def test_a_setting_without_effect_is_refused_on_the_command_line_and_in_a_config(name):
    script = importlib.import_module(name)
    for unused in script.Config.unused:
        default = getattr(script.Config(), unused)
        other = "x" if isinstance(default, str) else default + 1
        with pytest.raises(common.BadInput, match=f"unknown setting --{unused.replace('_', '-')}"):
            common.parse_args(script.Config, [f"--{unused}={other}"])
        with pytest.raises(common.BadInput, match=f"--{unused.replace('_', '-')} has no effect in this script"):
            common.check_settings(script.Config(**{unused: other}))
    common.check_settings(script.Config())


@pytest.mark.parametrize("name", METHODS)
def test_a_setting_without_effect_stands_nowhere_in_its_script(name):
    text = (ROOT / f"{name}.py").read_text()
    for unused in importlib.import_module(name).Config.unused:
        assert not re.search(rf"\bcfg\.{unused}\b", text), unused


@pytest.mark.parametrize("name", METHODS)
def test_help_shows_the_settings_of_the_method_first(name, capsys):
    script = importlib.import_module(name)
    with pytest.raises(SystemExit):
        common.parse_args(script.Config, ["--help"])
    shown = [x.replace("-", "_") for x in re.findall(r"^  --(?:no-)?([a-z-]+)", capsys.readouterr().out, re.M)]
    own = list(script.Config.__annotations__)
    assert shown[:len(own)] == own and "teacher" in shown and not set(shown) & set(script.Config.unused)
    assert set(shown) == {f for f in script.Config.__dataclass_fields__ if f not in script.Config.unused}


def test_a_run_says_and_keeps_only_settings_that_have_an_effect(config, capsys):
    cfg = config(steps=0)
    kd_forward.train(cfg)
    kept = json.loads(common.Path(cfg.out, "settings.json").read_text())
    assert "text_field" not in kept and "text_field" not in capsys.readouterr().out and kept["alpha"] == 1.0


# ---------------------------------------------------------------------------------------------------------------
# The learning rate
# ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("steps, warmup", [(500, 20), (300, 0), (4, 2), (10, 100), (1, 1)])
def test_the_learning_rate_warms_up_linearly_and_falls_by_a_cosine_to_a_tenth(steps, warmup):
    cfg = SimpleNamespace(lr=3e-3, steps=steps, warmup=warmup)
    for step in range(steps):
        rising = (step + 1) / warmup if step < warmup else 1.0
        through = (step - warmup) / (steps - warmup) if step > warmup else 0.0
        wanted = 3e-3 * rising * (0.1 + 0.9 * (1 + math.cos(math.pi * through)) / 2)
        assert common.lr_at(step, cfg) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("name", METHODS)
def test_the_optimizer_steps_with_that_learning_rate(name, any_root, tmp_path, monkeypatch):
    cfg, seen, step = any_run(name, any_root, tmp_path / "run", steps=3, warmup=2, eval_every=9, budget=8), [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a, **k: seen.append(self.param_groups[0]["lr"]) or step(self, *a, **k))
    importlib.import_module(name).train(cfg)
    assert seen[-3:] == [common.lr_at(i, cfg) for i in range(3)]
    assert [r["lr"] for r in map(json.loads, open(f"{cfg.out}/log.jsonl")) if "lr" in r] == seen[-3:]


@pytest.mark.parametrize("name", METHODS)
def test_every_optimizer_decays_weights_by_the_share_that_is_set_and_averages_as_its_comment_says(name, any_root, tmp_path, monkeypatch):
    """AdamW has a default of its own for the one, the same as ours, and another for the other. GOLD: the scorer's too."""
    cfg, seen, step = any_run(name, any_root, tmp_path / "run", steps=1, weight_decay=0.3, eval_every=9, budget=24), [], torch.optim.AdamW.step
    look = lambda group: (group["weight_decay"], group["betas"])
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a, **k: seen.append(look(self.param_groups[0])) or step(self, *a, **k))
    importlib.import_module(name).train(cfg)
    assert seen and set(seen) == {(0.3, (0.9, 0.98))}


OWN = {  # script: settings of its method and optimization with another value, and what else has to be set for it to matter
    "kd_forward": [dict(alpha=0.5), dict(tau=2.0), dict(responses="teacher"), dict(alpha=0.0)],
    "llmr": [dict(value="mean"), dict(value="lse"), dict(baseline="value"), dict(baseline="mean"), dict(sync=2)],
    "dpkd": [dict(negatives="frozen"), dict(negatives="epoch"), dict(beta=0.1), dict(length_norm=True), dict(preference=0.3, anchor=0.5),
             dict(anchor=0.5), dict(lm_coef=0.5, corpus="CORPUS")],
    "gold": [dict(round_size=8), dict(ood=False), dict(select="top"), dict(select="random"), dict(select="none"), dict(temperature=1.5),
             dict(top_k=0), dict(top_p=0.5), dict(retrain=3), dict(passes=2), dict(scorer_lr=0.1), dict(alpha=0.5), dict(beta=0.1),
             dict(budget=40), dict(feedback=1, round_size=16, budget=96)],
    "ddk": [dict(mix="uniform"), dict(mix="natural"), dict(mix="no-smoothing"), dict(mix="big=.2,mid=.2,small=.6"), dict(interval=3),
            dict(alpha=0.9), dict(gamma=0.0), dict(gamma=2.0), dict(tau=2.0, gamma=2.0), dict(gap_rows=2), dict(domain_tokens=400), dict(max_tokens=8)],
}
ALL = [dict(batch_size=4), dict(lr=2e-3), dict(warmup=4), dict(weight_decay=0.9), dict(clip=1e-3), dict(seed=1)]
BASES = {  # what a setting is compared with, where that is not the default
    ("gold", "feedback"): dict(round_size=16, budget=96), ("ddk", "tau"): dict(gamma=2.0), ("dpkd", "preference"): dict(anchor=0.5)}


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_setting_of_a_method_and_of_its_optimization_changes_what_is_learned(name, any_root, tmp_path):
    """One that a loop does not pass on would be silently ignored. --accum must change nothing, and steps are counted."""
    def weights(i, settings):
        settings = {k: str(any_root / "text.txt") if v == "CORPUS" else v for k, v in settings.items()}
        cfg = any_run(name, any_root, tmp_path / str(i), **{"eval_every": 99, "steps": 6, **large, **settings})
        importlib.import_module(name).train(cfg)
        return load_file(f"{cfg.out}/student/model.safetensors")
    (any_root / "text.txt").write_text("the cat sat on the mat\n" * 40)
    large = {"batch_size": 96} if name == "ddk" else {}  # shares that differ a little draw differently
    known, tried = {}, set()
    for i, settings in enumerate([*OWN[name], *ALL]):
        base = BASES.get((name, next(iter(settings))), {})
        if str(base) not in known:
            known[str(base)] = weights(f"base{i}", base)
        new, old = weights(i, settings), known[str(base)]
        assert any(not torch.equal(new[k], old[k]) for k in old), settings
        tried |= set(settings)
    config = importlib.import_module(name).Config
    own = set(common.config_fields(config)[1]) - {"teacher", "student", "data", "task", "domains", "llm_prompt", "max_response",
                                                  "steps", "accum", "eval_every", "eval_rows"}
    assert own <= tried, own - tried


# ---------------------------------------------------------------------------------------------------------------
# Dropout
# ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", METHODS)
def test_every_step_has_dropout_but_those_of_llmr_and_dpkd(name, any_root, tmp_path, monkeypatch):
    """Also after an evaluation and after sampling, which turn it off. GOLD: the scorer's steps too."""
    real, seen = common.response_states, []

    def response_states(model, *args):
        states = real(model, *args)

        def call(batch):
            hidden = states(batch)
            seen.extend([model.training] if hidden.requires_grad else [])
            return hidden
        return call
    monkeypatch.setattr(common, "response_states", response_states)
    cfg = any_run(name, any_root, tmp_path / "run", steps=3, eval_every=1, budget=24)
    importlib.import_module(name).train(cfg)
    assert len(seen) >= 3 and set(seen) == {name not in ("llmr", "dpkd")}


@pytest.mark.parametrize("name", METHODS)
def test_every_step_computes_in_the_dtype_that_is_set_and_so_does_the_sampler(name, any_root, tmp_path, monkeypatch):
    """On a CPU too. The weights stay fp32, so what decides is autocast; GOLD: in the scorer's steps as well."""
    real, sample, seen, drawn = common.response_states, common.sample, [], []

    def response_states(model, *args):
        states = real(model, *args)

        def call(batch):
            hidden = states(batch)
            seen.extend([hidden.dtype] if hidden.requires_grad else [])
            return hidden
        return call

    def sampled(model, *args, **kwargs):
        drawn.append(model.dtype if kwargs.get("dtype") is None else kwargs["dtype"])
        return sample(model, *args, **kwargs)
    monkeypatch.setattr(common, "response_states", response_states)
    monkeypatch.setattr(common, "sample", sampled)
    importlib.import_module(name).train(any_run(name, any_root, tmp_path / "run", steps=1, dtype="bfloat16", eval_every=9, budget=24))
    assert seen and set(seen) == {torch.bfloat16} and set(drawn) <= {torch.bfloat16} and bool(drawn) == (name != "ddk")


# ---------------------------------------------------------------------------------------------------------------
# What a run says at its end, and runs side by side
# ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", METHODS[:-1])
def test_the_samples_that_a_run_shows_are_the_students_to_validation_prompts(name, any_root, tmp_path, monkeypatch):
    script, told, rows, load = importlib.import_module(name), [], {}, common.load_rows
    cfg = any_run(name, any_root, tmp_path / "run", steps=0)
    monkeypatch.setattr(common, "load_rows", lambda *a: rows.update(load(*a)) or rows)
    monkeypatch.setattr(common, "show_samples", lambda run, model, examples, *_: told.append((model, examples)))
    script.train(cfg)
    (model, examples), = told
    assert model.get_input_embeddings().weight.shape[1] == 16  # conftest's teachers have 32
    assert [e.row["prompt"] for e in examples[:2]] == [r["prompt"] for r in rows["valid"][:2]]


def test_what_is_logged_is_shown_on_the_screen_and_how_long_it_will_take(config, capsys):
    kd_forward.train(config(steps=4, eval_every=2))
    out = capsys.readouterr().out
    lines = [json.loads(x) for x in open(f"{config().out}/log.jsonl")]
    assert len(lines) == 4 + 3
    for r in lines:
        head = f"step {r['step']:5d}/4  "
        assert (head + f"validation: kl_pq {r['valid']['kl_pq']:.3f}" if "valid" in r else head + f"loss {r['loss']:.4f}  ce {r['ce']:.4f}") in out
    run = common.Run(config(steps=6, out=f"{config().out}-2"), kd_forward.__file__)
    run.start()
    run.t0 -= 10  # two of six steps took ten seconds
    run.log(2, loss=1.0)
    assert "  20 s left" in capsys.readouterr().out


def test_the_seconds_go_on_over_a_second_resumption(config):
    """A checkpoint keeps all seconds so far, those before its own resumption too."""
    cfg = config()
    for resumed in (False, True, True):
        run = common.Run(dataclasses.replace(cfg, resume=resumed), kd_forward.__file__)
        run.start()
        run.t0 -= 100  # as if 100 seconds had gone
        run.save(1)
    assert 300 <= run.elapsed() < 310


def test_runs_of_other_settings_have_other_directories_however_long_their_names(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    of = lambda **settings: common.Run(kd_forward.Config(teacher="t" * 90, **settings), kd_forward.__file__).dir
    assert len({of(), of(seed=1), of(seed=2), of(seed=1, alpha=0.5)}) == 4 and of(seed=1) == of(seed=1, compile=True)
    assert len(of(seed=1).name) < 100


def test_every_process_has_dropout_of_its_own(config, monkeypatch):
    seeds = []
    monkeypatch.setattr(common.dist, "barrier", lambda: None)
    for rank in (0, 1):
        monkeypatch.setattr(common, "processes", lambda rank=rank: (rank, 2))
        common.Run(config(seed=3, out=f"{config().out}-{rank}"), kd_forward.__file__).start()
        seeds.append(torch.initial_seed())
    assert seeds == [3, 4]


def test_who_asks_twice_to_stop_is_not_kept_waiting(config):
    """The first signal is for after the step: which may take minutes."""
    run = common.Run(config(), kd_forward.__file__)
    run._on_signal(2, None)
    with pytest.raises(SystemExit) as left:
        run._on_signal(2, None)
    assert left.value.code == 130


def test_the_headline_that_moved_most_is_named():
    before, after = {"kl_pq": 4.0, "rouge_l": 0.2, "length": 1.0}, {"kl_pq": 1.0, "rouge_l": 0.1, "length": 900.0}
    assert common.moved_most(before, after) == "moved most: kl_pq, 4.000 -> 1.000"  # by 3/4 of it; length is no headline
    assert common.moved_most({"ce": 0.0, "accuracy": 0.5}, {"ce": 0.0, "accuracy": 0.55}) == "moved most: accuracy, 0.500 -> 0.550"
    assert common.moved_most({"length": 1.0}, {"length": 2.0}) == "no headline metric was measured"


@pytest.fixture
def two_runs(config, any_root, tmp_path):
    """Finished runs of two methods."""
    kd_forward.train(config(steps=2, eval_every=1, lr=0.002, out=str(tmp_path / "kd")))
    ddk.train(any_run("ddk", any_root, tmp_path / "ddk", steps=2, eval_every=1))
    return tmp_path / "kd", tmp_path / "ddk"


def test_runs_of_two_methods_are_compared_in_a_table_and_a_picture(two_runs, capsys):
    pytest.importorskip("matplotlib")
    capsys.readouterr()
    common.compare(two_runs)
    said = capsys.readouterr().out
    settings, metrics = said.split("---\n")
    rows = {line.split()[0]: line.split()[1:] for line in settings.splitlines()[1:]}
    assert settings.split("\n")[0].split() == ["kd", "ddk"]
    assert rows["script"] == ["kd_forward", "ddk"] and rows["lr"] == ["0.002", "0.001"]
    assert rows["alpha"] == ["1.0", "0.5"] and rows["gamma"] == ["0.2"]  # only one has it
    assert not {"tau", "warmup", "steps"} & set(rows)  # in which they do not differ
    result = json.loads((two_runs[0] / "result.json").read_text())
    found = {line.split()[0]: line.split()[1:] for line in metrics.splitlines()}
    assert found["kl_pq"] == [f"{result['after.kl_pq']:.4f}"] and {"worst_gap", "mean_ce", "seconds"} <= set(found)
    picture = two_runs[0].parent / "compare.png"
    assert f"curves: {picture}" in said and picture.read_bytes().startswith(b"\x89PNG")


def test_an_unfinished_run_is_compared_as_far_as_it_got(two_runs, capsys):
    pytest.importorskip("matplotlib")
    (two_runs[0] / "result.json").unlink()
    capsys.readouterr()
    common.compare(two_runs[:1])
    assert capsys.readouterr().out.split("---\n")[1].split()[:2] == ["seconds", "peak_gib"]  # no metrics yet
    assert (two_runs[0] / "compare.png").exists()  # of one run the picture lies in its own folder


def test_without_matplotlib_a_sentence_says_how_to_get_pictures(two_runs, capsys, monkeypatch):
    real = builtins.__import__

    def no_matplotlib(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)
    monkeypatch.setattr(builtins, "__import__", no_matplotlib)
    common.compare(two_runs)
    said = capsys.readouterr().out
    assert "kl_pq" in said and said.endswith("pip install matplotlib, and the same command draws the curves\n")
    assert not (two_runs[0].parent / "compare.png").exists()


@pytest.mark.parametrize("content", [None, "no folder", "torn"])
def test_a_folder_that_is_no_run_is_told_in_one_sentence(tmp_path, content):
    folder = tmp_path / "x"
    if content:
        folder.mkdir()
    if content == "torn":
        (folder / "settings.json").write_text('{"script": "kd_fo')
    with pytest.raises(common.BadInput, match=r"x: no run can be read there") as said:
        common.compare([folder])
    assert "\n" not in str(said.value)


@pytest.mark.slow
def test_compare_as_a_command(tmp_path):
    call = lambda *words: subprocess.run([sys.executable, str(ROOT / "common.py"), *words], capture_output=True, text=True, cwd=tmp_path)
    for words in ([], ["compare"], ["other", "x"]):
        assert call(*words).stderr == "error: say python common.py compare out/a out/b ...\n"
    done = call("compare", "x")
    assert done.returncode and done.stderr.startswith("error: x: no run can be read there") and done.stderr.count("\n") == 1


# ---------------------------------------------------------------------------------------------------------------
# Tiny worlds: a program in data/ is run once
# ---------------------------------------------------------------------------------------------------------------
PROGRAM = '''
import argparse, pathlib
parser = argparse.ArgumentParser()
parser.add_argument("dir", type=pathlib.Path)
parser.add_argument("--number")
parser.add_argument("--kind")
parser.add_argument("--part")
args = parser.parse_args()
print("at work on", args.number, args.kind, args.part)
for name in [args.part] if args.part else ["data", "teacher", "student"]:
    (args.dir / name).mkdir(parents=True)
'''


@pytest.fixture
def program(tmp_path, monkeypatch):
    """The file of a small program in the place of data/w/prepare.py."""
    (tmp_path / "data/w").mkdir(parents=True)
    (tmp_path / "data/w/prepare.py").write_text(PROGRAM)
    monkeypatch.setattr(common, "HERE", tmp_path)
    return tmp_path / "data/w/prepare.py"


def test_a_tiny_world_is_made_once_and_its_parts_when_they_are_asked_for(program, capfd):
    made = common.tiny_world("w", 3)
    assert "at work on 3 None None" in capfd.readouterr().out and (made / "teacher").is_dir()
    assert common.tiny_world("w", 3, "data") == made and "at work" not in capfd.readouterr().out
    assert common.tiny_world("w", 3, "student-kl") == made and "at work on 3 None student-kl" in capfd.readouterr().out
    assert not list(made.parent.glob("building-*"))


def test_other_numbers_kinds_programs_and_grammars_are_other_worlds(program):
    made = [common.tiny_world(*which) for which in (("w", 0), ("w", 1), ("w:sums", 0))]
    program.write_text(PROGRAM + "# changed\n")  # a changed world never meets an old teacher
    made.append(common.tiny_world("w", 0))
    (program.parent / "grammar.json").write_text("{}")
    made.append(common.tiny_world("w", 0))
    assert len(set(made)) == 5


def test_a_program_that_fails_leaves_no_half_of_a_world(program):
    program.write_text("import sys\nprint('the reason')\nsys.exit(3)\n")
    with pytest.raises(common.RunFailed, match="prepare.py .* ended with status 3"):
        common.tiny_world("w", 0)
    assert not list(common.cache_dir().iterdir())


def test_tiny_means_the_world_of_the_method(program, monkeypatch):
    asked = []
    monkeypatch.setattr(common, "tiny_world", lambda world, number, part: asked.append((world, number, part)) or program.parent)
    for args in (("tiny", "data", "tiny"), ("tiny:4", "data", "tiny:4"), ("tiny", "teacher", "tiny:4", "domains"),
                 ("tiny-kl", "student", "tiny"), ("tiny", "student", "tiny:2", "reviews:sums")):
        common.resolve(*args)
    assert asked == [("answers", 0, "data"), ("answers", 4, "data"), ("domains", 4, "teacher"), ("answers", 0, "student-kl"),
                     ("reviews:sums", 2, "student")]
    assert common.resolve("gpt2", "teacher", "tiny") == "gpt2" and gold.Config().data == "auto"
