"""torchrun: two processes end with the parameters of one, a signal stops both, and a run goes on with another number."""
import importlib
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import WORDS, settings_of
from safetensors.torch import load_file
from torchrun_worker import greedy

import common

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
# script: settings of its run. Sampling is greedy, since each process has noise of its own; but --negatives epoch
# samples, for all y_s are process 0's, whose noise is that of a single process
RUNS = {
    "kd": ("kd_forward", {"accum": 2}),
    "kd-no-reduction": ("kd_forward", {"accum": 2}),
    "llmr": ("llmr", {"baseline": "value"}),
    "llmr-mean": ("llmr", {"baseline": "mean"}),
    "dpkd": ("dpkd", {"negatives": "online", "anchor": 0.5}),
    "dpkd-epoch": ("dpkd", {"negatives": "epoch", "anchor": 0.5}),
    "gold": ("gold", {"task": "task.json", "data": "texts.jsonl", "budget": 24, "round_size": 4, "retrain": 1, "passes": 1, "feedback": 1}),
    "ddk": ("ddk", {"data": "domains", "max_tokens": 16, "interval": 5, "gap_rows": 6, "accum": 2}),
}


@pytest.fixture(scope="module")
def settings(pair, rows_file):
    teacher, student = pair("llama")
    return dict(teacher=str(teacher), student=str(student), data=str(rows_file), max_prompt=24, max_response=16, steps=20,
                batch_size=8, lr=1e-3, warmup=2, eval_every=20, eval_rows=4, log_every=5, save_every=10, holdout=0.1,
                device="cpu", compile=False)


def gap(a, b):
    """The largest difference of two runs' students."""
    one, two = (load_file(x / "student/model.safetensors") for x in (a, b))
    return max((one[k] - two[k]).abs().max().item() for k in one)


def test_two_processes_train_what_one_does(settings, tmp_path_factory, monkeypatch):
    root = tmp_path_factory.mktemp("torchrun")
    monkeypatch.chdir(root)
    (root / "domains").mkdir()
    for i, name in enumerate("abc"):  # of ddk
        rows = [{"text": " ".join(random.Random(j).choices(WORDS[5 * i:5 * i + 9], k=20))} for j in range(150)]
        (root / f"domains/{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    texts = [{"text": " ".join(random.Random(j).choices(WORDS, k=4)), "label": j % 2} for j in range(80)]  # of gold
    (root / "texts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in texts))
    entry = json.loads((ROOT / "data/tasks.json").read_text())["tasks"]["reviews"]
    entry |= {"labels": {"cat": "", "dog": ""}, "lengths": [1, 999], "shots": 1, "max_new": 3, "stop": [],
              "write": {"prompt": "{shots}", "shot": "{sample} ", "sample": "{label} {text}", "plain": "", "ood": "! "}}
    (root / "task.json").write_text(json.dumps(entry))
    real = common.sample
    fields = {module: settings_of(importlib.import_module(module).Config) for module, _ in RUNS.values()}
    of = lambda module, extra, out: {**{k: v for k, v in settings.items() if k in fields[module]}, **extra, "out": str(root / out)}
    jobs = [[module, of(module, extra, f"two-{name}"), "no-reduction" in name] for name, (module, extra) in RUNS.items()]
    (root / "jobs.json").write_text(json.dumps(jobs))
    two = subprocess.Popen([*TORCHRUN, str(ROOT / "tests/torchrun_worker.py"), str(root / "jobs.json")],
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for name, (module, extra) in RUNS.items():
        script = importlib.import_module(module)
        monkeypatch.setattr(common, "sample", real if extra.get("negatives") == "epoch" else greedy)
        script.train(script.Config(**of(module, extra, f"one-{name}")))
    said = two.communicate()[0]
    assert two.returncode == 0, said[-3000:]
    assert said.count("run directory:") == len(RUNS), "one process speaks"
    for name in RUNS:
        one, two = root / f"one-{name}", root / f"two-{name}"
        difference = gap(one, two)
        assert difference > 1e-4 if "no-reduction" in name else difference < 1e-5, (name, difference)
        if "no-reduction" not in name:  # the logged sums count every process
            last = [json.loads((x / "log.jsonl").read_text().splitlines()[-2]) for x in (one, two)]
            last = [{k: v for k, v in line.items() if k != "seconds"} for line in last]
            assert "loss" in last[0] and last[0] == pytest.approx(last[1], rel=1e-3, abs=1e-5), name


def test_a_signal_stops_all_and_one_process_goes_on(settings, tmp_path):
    command = [f"--{k.replace('_', '-')}={v}" for k, v in settings.items() if k != "compile"]
    command = [str(ROOT / "kd_forward.py"), *command, "--no-compile", f"--out={tmp_path / 'run'}", "--steps=1000"]
    two = subprocess.Popen([*TORCHRUN, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    log, until = tmp_path / "run/log.jsonl", time.time() + 90
    while not (log.exists() and log.read_text().count("\n") > 4) and time.time() < until and two.poll() is None:
        time.sleep(0.1)
    two.send_signal(signal.SIGTERM)
    said = two.communicate(timeout=60)[0]
    assert said.count("saved: --resume goes on") == 1, said[-3000:]
    step = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["step"]
    assert step >= 20
    again = subprocess.run([sys.executable, *command, "--resume"], capture_output=True, text=True, timeout=90)
    assert again.returncode == 0, again.stderr
    assert f"at step {step}" in again.stdout and '"steps": 1000' in (tmp_path / "run/result.json").read_text(), again.stderr
