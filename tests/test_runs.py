"""A run: its directory, its end, what a stop leaves behind, and several processes."""
import dataclasses
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import conftest
import pytest
import torch
from conftest import ROOT, flags
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import common
import kd_forward

QUICK = dict(max_response=4, max_prompt=16)
SCRIPTS = ["kd_forward", "llmr", "dpkd", "gold", "ddk"]


def any_run(script, root, out, **settings):
    return conftest.any_run(script, root, out, **{**QUICK, **settings})


def train(cfg):
    return importlib.import_module(type(cfg).__module__).train(cfg)


def lines_of(out, file="log.jsonl"):
    return [json.loads(line) for line in open(Path(out, file), encoding="utf-8")]


def outcome(out):
    """What must not depend on stops: the student's files, and log and result without times."""
    files = {f.name: f.read_bytes() for f in sorted(Path(out, "student").iterdir())}
    timeless = lambda d: {k: v for k, v in d.items() if k not in ("seconds", "peak_gib")}
    result = json.loads(Path(out, "result.json").read_text())
    return files, [timeless(line) for line in lines_of(out)], timeless(result)


@pytest.fixture
def config(pair, rows_file, tmp_path):
    """config(name of its directory, settings) -> a kd_forward.Config for a run of a second."""
    return lambda out="run", **settings: conftest.small_run(
        kd_forward.Config, pair("llama"), rows_file, tmp_path / out, **{**QUICK, **settings})


def stopped(cfg, method="end_step", at=None):
    """A run that is killed behind this step (or in this method) -> the settings that go on."""
    real = getattr(common.Run, method)

    def call(self, step, *args, **parts):
        if at is not None:
            real(self, step, *args, **parts)
        if at in (None, step):
            raise SystemExit(9)
    with pytest.MonkeyPatch.context() as m, pytest.raises(SystemExit):
        m.setattr(common.Run, method, call)
        train(cfg)
    torch.manual_seed(999)  # nothing may hang on the random state of this process
    return dataclasses.replace(cfg, out="", resume=cfg.out)


@pytest.fixture
def halted(config):
    """The settings that go on with a run of four steps that was killed behind step 3."""
    return stopped(config("halted"), at=3)


# --- Stops and going on ------------------------------------------------------------------------
@pytest.mark.parametrize("script, settings", [
    ("kd_forward", dict(responses="teacher", alpha=0.5, cache=True)), ("llmr", dict(sync=4)),
    ("dpkd", dict(refresh=4)), ("gold", {}), ("ddk", {})])
def test_a_stopped_run_goes_on_bit_by_bit(script, settings, any_root, tmp_path, monkeypatch,
                                          capsys):
    """GPT-2 has dropout. The stop lies behind a checkpoint, at which llmr's sampler and dpkd's
    student responses are old."""
    whole, cut = (any_run(script, any_root, tmp_path / out, steps=6, save_every=3, eval_every=5,
                          **settings) for out in ("whole", "cut"))
    train(whole)
    resumed = stopped(cut, at=5)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))  # the teacher is asked again
    train(resumed)
    assert f"resumed from {cut.out}/checkpoint.pt at step 3" in capsys.readouterr().out
    assert outcome(whole.out) == outcome(cut.out)


def test_a_kill_while_the_llm_writes_loses_only_the_call_under_way(any_root, tmp_path, monkeypatch):
    whole, cut = (any_run("gold", any_root, tmp_path / out) for out in ("whole", "cut"))
    sample, calls, last = common.sample, 0, None

    def counted(model, prompts, *args, **more):
        nonlocal calls
        calls += len(args) > 2  # an LLM's call names warpers
        if calls == last:
            raise SystemExit(9)
        return sample(model, prompts, *args, **more)
    monkeypatch.setattr(common, "sample", counted)
    train(whole)
    in_all, calls, last = calls, 0, 5
    with pytest.raises(SystemExit):
        train(cut)
    assert len(lines_of(cut.out, "written.jsonl")) == 4
    with open(tmp_path / "cut/written.jsonl", "a") as file:
        file.write('{"call": "torn')  # the last line of a killed process
    calls, last = 0, None
    train(dataclasses.replace(cut, out="", resume=cut.out))
    assert calls == in_all - 4 and outcome(whole.out) == outcome(cut.out)
    for name in ("samples.jsonl", "written.jsonl"):
        assert lines_of(whole.out, name) == lines_of(cut.out, name)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_kill_in_the_last_evaluation_loses_no_training(script, any_root, tmp_path):
    train(stopped(any_run(script, any_root, tmp_path, steps=1, save_every=100), "finish"))
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    student = load_file(tmp_path / "student/model.safetensors")
    assert saved["step"] == 1 and (tmp_path / "result.json").exists()
    assert all(torch.equal(v, saved["parts"]["student"][k]) for k, v in student.items())
    assert [x["step"] for x in lines_of(tmp_path) if "grad_norm" in x] == [0]


def test_what_does_not_change_the_result_may_change_on_resuming(config, halted, tmp_path, capsys):
    train(config("whole"))
    words = ["--resume", halted.resume, "--accum=4", "--recompute", "--save-every=1",
             "--eval-every=1", "--log-every=3"]
    train(common.parse_args(kd_forward.Config, words))
    assert "at step 2" in capsys.readouterr().out
    a, b = (load_file(tmp_path / x / "student/model.safetensors") for x in ("whole", "halted"))
    assert all(torch.allclose(a[k], b[k], atol=1e-6) for k in a)


@pytest.mark.parametrize("change", [dict(alpha=0.5), dict(steps=9), dict(seed=1), dict(lr=0.5),
                                    dict(batch_size=16), dict(dtype="bfloat16")])
def test_what_changes_the_result_is_refused_by_name_on_resuming(change, halted):
    name, value = next(iter(change.items()))
    with pytest.raises(common.BadInput, match=f"{name} was .* and is {value} now"):
        train(dataclasses.replace(halted, **change))


@pytest.mark.parametrize("script", ["kd_forward", "gold", "ddk"])
def test_changed_data_is_refused_on_resuming(script, any_root, tmp_path):
    """Gold shows its training rows to the LLM."""
    source = any_run(script, any_root, tmp_path / "run").data
    copy = tmp_path / Path(source).name
    shutil.copytree(source, copy) if Path(source).is_dir() else shutil.copy(source, copy)
    resumed = stopped(any_run(script, any_root, tmp_path / "run", data=str(copy)), at=3)
    file = {"gold": copy / "train.jsonl", "ddk": copy / "big.jsonl"}.get(script, copy)
    rows = lines_of(file.parent, file.name)
    file.write_text("".join(json.dumps(r) + "\n" for r in rows[5:]))
    with pytest.raises(common.BadInput, match="the data has changed"):
        train(resumed)


@pytest.mark.parametrize("file, content, words", [
    ("checkpoint.pt", "half", "checkpoint.pt cannot be loaded"),
    ("settings.json", '{"script"', "no run can be read there"),
    ("settings.json", '{"script": "llmr"}', "script was llmr and is kd_forward now"),
    ("log.jsonl", '{"step": 0, "loss": 1.0}\n{"step": 1, "lo', None)])
def test_a_damaged_run_is_told_and_half_a_line_of_the_log_is_dropped(file, content, words, halted):
    Path(halted.resume, file).write_text(content)
    if words:
        with pytest.raises(common.BadInput, match=words):
            train(halted)
    else:
        train(halted)
        assert [x["step"] for x in lines_of(halted.resume) if "loss" in x] == [0, 2, 3]


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_after_the_step_and_ends_with_its_status(number, status, config, tmp_path,
                                                                monkeypatch, capsys):
    log = common.Run.log

    def kill(self, step, **values):
        log(self, step, **values)
        if "loss" in values and step == 1:
            os.kill(os.getpid(), number)
    monkeypatch.setattr(common.Run, "log", kill)
    with pytest.raises(SystemExit) as end:
        train(config(save_every=100))
    assert end.value.code == status
    said = capsys.readouterr().out
    assert f"stopped after step 2, saved: --resume {tmp_path}/run goes on" in said
    assert torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["step"] == 2
    # a notebook goes on after a run, and its interrupt button works again
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def start(cfg, *more):
    """A real process of a script."""
    file = ROOT / f"{type(cfg).__module__}.py"
    return subprocess.Popen([sys.executable, str(file), *flags(cfg), *more], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def wait_for(file, lines, process):
    until = time.time() + 90
    while not (file.exists() and file.read_text().count("\n") >= lines):
        assert process.poll() is None and time.time() < until, process.communicate()[0]
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["kd_forward", "gold"])
def test_a_real_process_is_killed_and_goes_on(script, any_root, tmp_path):
    """GOLD's is killed while the LLM writes."""
    whole, cut = (any_run(script, any_root, tmp_path / out, steps=40, save_every=5, budget=120,
                          eval_every=30) for out in ("whole", "cut"))
    process = start(cut)
    file, lines = ("written.jsonl", 9) if script == "gold" else ("log.jsonl", 20)
    wait_for(tmp_path / "cut" / file, lines, process)
    process.kill()
    process.communicate(timeout=60)
    assert not (tmp_path / "cut/result.json").exists()
    process = start(cut, f"--resume={cut.out}")
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 0, said
    train(whole)
    assert outcome(whole.out) == outcome(cut.out)


# --- The directory of a run ----------------------------------------------------------------------
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_fills_its_directory(script, any_root, tmp_path):
    cfg = any_run(script, any_root, tmp_path / "run", eval_rows=3)
    result, out = train(cfg), tmp_path / "run"
    saved = json.loads((out / "settings.json").read_text())
    wanted = {name: getattr(cfg, name) for name in common.settings_of(type(cfg))}
    assert saved["script"] == script and wanted.items() <= {**saved, "dtype": cfg.dtype}.items()
    assert (out / f"{script}.py").read_bytes() == (ROOT / f"{script}.py").read_bytes()

    log = lines_of(out)
    assert [x["step"] for x in log if "grad_norm" in x] == [0, 1, 2, 3]
    assert [x["step"] for x in log if any(k.startswith("valid/") for k in x)] == [0, 2]
    assert all(isinstance(v, (int, float)) for x in log for v in x.values())
    kept = json.loads((out / "result.json").read_text())
    assert kept == result and {"steps", "seconds", "peak_gib", "torch", "transformers"} <= set(kept)
    metric = {"gold": "accuracy", "ddk": "worst_gap"}.get(script, "kl_pq")
    assert {f"{c}.{metric}" for c in ("teacher", "before", "after")} <= set(kept)

    student = AutoModelForCausalLM.from_pretrained(out / "student")
    checkpoint = torch.load(out / "checkpoint.pt", weights_only=True)
    state = checkpoint["parts"]["student"]
    assert checkpoint["step"] == cfg.steps
    assert all(torch.equal(v, state[k]) for k, v in student.state_dict().items())
    assert AutoTokenizer.from_pretrained(out / "student")("the cat").input_ids
    rows = lines_of(out, "generations.jsonl")
    assert len(rows) == (0 if script == "ddk" else 3)
    assert all(set(r) == {"prompt", "greedy", "sample", "references"} for r in rows)


def test_only_evaluating_writes_the_responses_of_the_student_not_of_the_teacher(config, tmp_path):
    said = []
    for teacher in ("none", config().teacher):
        out = tmp_path / Path(teacher).name
        train(dataclasses.replace(config(), steps=0, alpha=0, teacher=teacher, out=str(out)))
        said.append([row["greedy"] for row in lines_of(out, "generations.jsonl")])
    assert said[0] == said[1]


def test_curves_are_written_where_tensorboard_is_installed(config, tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(config())
    curves = reader.EventAccumulator(str(tmp_path / "run"))
    curves.Reload()
    logged = [x["loss"] for x in lines_of(tmp_path / "run") if "loss" in x]
    assert [x.value for x in curves.Scalars("loss")] == pytest.approx(logged)
    assert [x.step for x in curves.Scalars("valid/kl_pq")] == [0, 2]


def test_a_directory_that_holds_a_run_or_a_model_is_not_written_to(config, pair, tmp_path,
                                                                   monkeypatch):
    train(config())
    shutil.copytree(pair("llama")[1], tmp_path / "models/student")
    for out in ("run", "models"):
        before = {f: f.read_bytes() for f in (tmp_path / out).rglob("*") if f.is_file()}
        with pytest.raises(common.BadInput, match=f"--out .*{out} holds a run"):
            train(config(out, alpha=0.5))
        assert before == {f: f.read_bytes() for f in (tmp_path / out).rglob("*") if f.is_file()}
    begin, other = common.Run.start, tmp_path / "new/settings.json"

    def two_at_once(self, *args, **parts):
        other.parent.mkdir()
        other.write_text("the other run's")
        return begin(self, *args, **parts)
    monkeypatch.setattr(common.Run, "start", two_at_once)
    with pytest.raises(common.BadInput, match="new"):
        train(config("new"))
    assert other.read_text() == "the other run's"


def test_a_full_disk_leaves_the_last_checkpoint_and_one_sentence(config, tmp_path, monkeypatch):
    save, calls = torch.save, []

    def full(state, path):
        calls.append(path)
        if len(calls) == 2:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(state, path)
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(common.BadInput, match="checkpoint.pt cannot be written.*No space left"):
        train(config())
    assert torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["step"] == 2
    assert not list((tmp_path / "run").glob("*.tmp"))


# --- How a run ends ------------------------------------------------------------------------------
def test_a_loss_or_weight_that_is_not_finite_stops_the_run(config, tmp_path, monkeypatch):
    with pytest.raises(common.BadInput, match="a weight is no longer a finite number at step 2"):
        train(config(lr=1e3, clip=1e9, weight_decay=1e3, warmup=0, log_every=50))
    assert not (tmp_path / "run/checkpoint.pt").exists()
    real = kd_forward.kd_loss
    monkeypatch.setattr(kd_forward, "kd_loss", lambda *a: [x * float("nan") for x in real(*a)])
    with pytest.raises(common.BadInput, match="the loss is nan at step 0: .*--lr"):
        train(config("two"))


@pytest.mark.parametrize("error, status, words", [
    (None, 0, ""), (common.BadInput("bad"), 2, "bad"),
    (torch.OutOfMemoryError("x" * 999), 1, "--accum"), (OSError(28, "disk full"), 1, "disk full"),
    (KeyboardInterrupt(), 130, "stopped")])
def test_the_exit_status_says_how_it_ended(error, status, words, monkeypatch, capsys):
    def end(cfg):
        if error:
            raise error
    monkeypatch.setattr("sys.argv", ["kd_forward.py"])
    assert common.main(end, kd_forward.Config) == status
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == bool(status) and len(said) < 200
    monkeypatch.setenv("RANK", "1")  # what all processes see is said once
    assert common.main(end, kd_forward.Config) == status
    assert bool(capsys.readouterr().err) == (status == 1)


def test_a_run_can_be_called_in_a_thread_of_a_notebook(config):
    results = []
    thread = threading.Thread(target=lambda: results.append(kd_forward.train(config())))
    thread.start()
    thread.join()
    assert results[0]["steps"] == 4
    with pytest.raises(common.BadInput, match="lr '1e-3': a value of type float"):
        train(config("two", lr="1e-3"))


# --- torchrun ------------------------------------------------------------------------------------
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
SHARED = dict(steps=12, eval_every=6, log_every=3, save_every=6)
JOBS = {  # name: script, its settings
    "kd": ("kd_forward", dict(accum=2)), "broken": ("kd_forward", {}),
    "llmr": ("llmr", dict(baseline="mean", sync=2)), "dpkd": ("dpkd", dict(anchor=0.5)),
    "dpkd-refresh": ("dpkd", dict(refresh=3)), "gold": ("gold", {}), "ddk": ("ddk", dict(accum=2))}


def work(jobs, two):
    """Run the jobs in this process. Sampling is greedy, for each process has random numbers of its
    own; what an LLM writes (with warpers) is process 0's alone."""
    sample, reduce = common.sample, common.reduce_gradients
    common.sample = lambda model, prompts, most, temperature=1.0, *args, **more: sample(
        model, prompts, most, temperature if args else 0.0, *args, **more)
    try:
        for name, script, settings in jobs:
            broken = two and name == "broken"
            common.reduce_gradients = (lambda *args: None) if broken else reduce
            module = importlib.import_module(script)
            module.train(module.Config(**settings))
    finally:
        common.sample, common.reduce_gradients = sample, reduce


@pytest.mark.slow
def test_two_processes_train_what_one_does(any_root, pair, tmp_path):
    models = dict(zip(("teacher", "student"), map(str, pair("llama"))))  # without dropout
    jobs = {n: [[name, script, vars(any_run(script, any_root, tmp_path / f"{n}-{name}", **{
        **SHARED, **models, **settings}))] for name, (script, settings) in JOBS.items()]
        for n in "12"}
    (tmp_path / "jobs.json").write_text(json.dumps(jobs["2"]))
    two = subprocess.run([*TORCHRUN, __file__, str(tmp_path / "jobs.json")], text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=500)
    assert two.returncode == 0, two.stdout[-3000:]
    assert two.stdout.count("run directory:") == len(JOBS), "one process speaks"
    work(jobs["1"], two=False)
    for name in JOBS:
        a, b = (load_file(tmp_path / f"{n}-{name}/student/model.safetensors") for n in "12")
        gap = max((a[k] - b[k]).abs().max().item() for k in a)
        assert gap > 1e-4 if name == "broken" else gap < 1e-5, (name, gap)
        if name != "broken":
            for x, y in zip(*(outcome(tmp_path / f"{n}-{name}")[1] for n in "12"), strict=True):
                assert x == pytest.approx(y, rel=2e-3, abs=1e-4), name


@pytest.mark.slow
def test_a_signal_stops_both_processes_and_one_goes_on(config, tmp_path):
    cfg = config(steps=2000, save_every=5000, eval_every=5000, log_every=5)
    two = subprocess.Popen([*TORCHRUN, str(ROOT / "kd_forward.py"), *flags(cfg)], text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait_for(tmp_path / "run/log.jsonl", 4, two)
    two.send_signal(signal.SIGTERM)
    said = two.communicate(timeout=60)[0]
    assert said.count(f"saved: --resume {cfg.out} goes on") == 1, said[-3000:]
    step = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["step"]
    assert 10 <= step < 2000
    one = start(config(), f"--resume={cfg.out}", "--steps=2000", "--save-every=9000",
                "--eval-every=9000")
    said = one.communicate(timeout=120)[0]
    assert one.returncode == 0 and f"at step {step}" in said, said
    assert json.loads((tmp_path / "run/result.json").read_text())["steps"] == 2000


if __name__ == "__main__":
    torch.set_num_threads(1)
    work(json.loads(Path(sys.argv[1]).read_text()), two=True)


def test_a_place_where_nothing_can_be_written_is_told(config, rows_file):
    with pytest.raises(common.BadInput, match="cannot be written there"):
        train(dataclasses.replace(config(), out=f"{rows_file}/run"))
