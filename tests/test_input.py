"""Bad input: one sentence with what, where and what to do, exit status 2, and nothing overwritten."""
import dataclasses
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import flags
from tokenizers.processors import TemplateProcessing
from transformers import BartConfig, LlamaConfig

import common
import kd_forward

ROOT = Path(__file__).parents[1]


def refused(match, function, *args):
    with pytest.raises(common.BadInput, match=match) as caught:
        function(*args)
    assert "\n" not in str(caught.value).strip() and len(str(caught.value)) < 600
    return str(caught.value)


def test_settings_in_every_spelling():
    parse = lambda *words: common.parse_args(kd_forward.Config, words)
    assert parse("--lr", "1e-4").lr == parse("--lr=1e-4").lr == 1e-4
    assert parse("--batch-size", "8").batch_size == parse("--batch_size=8").batch_size == 8
    assert parse("--no-compile").compile is False and parse("--compile").compile is True
    assert parse("--no-resume").resume is False and parse("--data", "a-b_c").data == "a-b_c"
    refused("did you mean --batch-size", parse, "--batch-siz", "8")
    refused("did you mean --alpha", parse, "--alpah=1")
    refused("invalid int value: 'many'", parse, "--steps", "many")
    refused("expected one argument", parse, "--steps")
    refused("unknown setting 7", parse, "7")


def test_every_setting_has_a_help_text(capsys):
    with pytest.raises(SystemExit) as done:
        common.parse_args(kd_forward.Config, ["--help"])
    text = capsys.readouterr().out
    assert done.value.code == 0 and "optimizer steps; 0 only evaluates" in text
    fields, n = dataclasses.fields(kd_forward.Config), 0
    for file in ("common.py", "kd_forward.py"):
        source = re.split(r"class (?:Settings|Config\(common.Settings\)):", (ROOT / file).read_text())[1].split("\n\n\n")[0]
        lines = [line for line in source.splitlines() if re.match(r"    \w+: ", line)]
        assert lines and all("# " in line for line in lines)
        n += len(lines)
    assert n == len(fields)  # none is declared twice


@pytest.mark.parametrize("settings, match", [
    (dict(alpha=1.5), "--alpha 1.5: must lie between 0 and 1"),
    (dict(tau=0.0), "--tau 0.0"),
    (dict(eval_temperature=0.0), "--eval-temperature 0.0: must lie between 0.05 and 100"),
    (dict(steps=-1), "--steps -1"),
    (dict(responses="both"), "choose one of data, teacher"),
    (dict(batch_size=8, accum=3), "multiple of --accum 3"),
    (dict(dtype="int8"), "choose one of auto, float32, bfloat16"),
    (dict(device="cuda:7"), "--device cuda:7: not usable on this machine"),
    (dict(device="gpu"), "--device gpu"),
    (dict(student="no/such/model"), "--student no/such/model"),
    (dict(teacher="no/such/model"), "--teacher no/such/model"),
    (dict(data="absent.jsonl"), "--data absent.jsonl: no such file"),
    (dict(data="absent_set"), "absent_set: neither a file"),
    (dict(teacher="tiny"), "--teacher tiny knows the words of the tiny world only"),
    (dict(max_prompt=60, max_response=60), "context of 64 tokens"),
    (dict(template="no place for it"), "exactly once"),
    (dict(template="{prompt} and {prompt}"), "exactly once"),
    (dict(max_prompt=1, template="Sort these: {prompt}"), "the template alone takes"),
    (dict(prompt_field="question"), r"rows\.jsonl:1: no field 'question' \(there: prompt, response\): name it with --prompt-field"),
    (dict(resume=True), "there is no run in"),
])
def test_bad_settings(config, settings, match):
    cfg = config(**settings)
    refused(match, kd_forward.train, cfg)
    assert not Path(cfg.out).exists()


def test_the_curve_is_measured_on_200_rows_at_most_and_the_table_on_all_that_were_asked_for(config, tmp_path):
    """Spread over their file, which may be sorted by its sources."""
    for split, n in (("train", 10), ("valid", 210), ("test", 210)):
        rows = [json.dumps({"prompt": f"the cat {split} {i}", "response": "cat the"}) for i in range(n)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows))
    cfg = config("llama", data=str(tmp_path), eval_rows=205)
    data = common.load_data(cfg, *common.load_pair(cfg, torch.device("cpu")))
    assert (len(data.train), len(data.valid), len(data.test)) == (10, 200, 205)
    data = common.load_data(config("llama", data=str(tmp_path), eval_rows=20), *common.load_pair(cfg, torch.device("cpu")))
    for part in (data.valid, data.test):
        assert [int(e.row["prompt"].split()[-1]) for e in part] == [11 * i for i in range(20)]


def test_a_teacher_that_reads_less_than_the_student_is_told_by_name(pair):
    """Its answers would be scored beyond the positions that it was trained on."""
    reads = lambda tokens: SimpleNamespace(config=LlamaConfig(max_position_embeddings=tokens))
    tokenizer = common.load_tokenizer(pair("llama")[1], "student")
    encoder = lambda student, teacher: common.row_encoder(kd_forward.Config(max_prompt=30, max_response=30), reads(student), reads(teacher), tokenizer)
    encoder(64, 60)
    refused("the teacher's context of 59 tokens: lower them", encoder, 64, 59)
    refused("the student's context of 59 tokens: lower them", encoder, 59, 64)
    bart = lambda tokens: SimpleNamespace(config=BartConfig(max_position_embeddings=tokens))  # prompt and response apart
    encoder = lambda tokens: common.row_encoder(kd_forward.Config(max_prompt=30, max_response=20), bart(tokens), None, tokenizer)
    encoder(30)
    refused("the student's context of 29 tokens: lower them", encoder, 29)


GOOD = b'{"prompt": "the cat", "response": "cat the"}\n'


@pytest.mark.parametrize("content, match", [
    (b"", "there are no rows in it"),
    (b"\n \n", "there are no rows in it"),
    (GOOD + b"[1, 2]\n", r":2: a list, not an object"),
    (GOOD + b"{bad json}\n", r":2: Expecting property name"),
    (GOOD + b'{"prompt": "x"}\n', r":2: no field 'response'"),
    (GOOD + b'{"prompt": 3, "response": "x"}\n', r":2: field 'prompt' is a int"),
    (GOOD + b'{"prompt": null, "response": "x"}\n', r":2: field 'prompt' is a NoneType"),
    (GOOD + b'{"prompt": "x", "response": ["y"]}\n', r":2: field 'response' is a list"),
    (GOOD + b'{"prompt": "x", "response": "\\ud800"}\n', r":2: field 'response' holds half a surrogate"),
    (GOOD + b'{"prompt": "x", "response": "y", "references": [3]}\n', r":2: field 'references' is a int"),
    (GOOD + b'{"prompt": "x", "response": "y", "references": {"a": "b"}}\n', r":2: field 'references' is a dict"),
    (GOOD + b'{"prompt": "x", "response": "y", "probs": [1]}\n', r":2: field 'probs' is not a list with a number for each"),
    (GOOD + b'{"prompt": "x", "response": "y", "references": ["a"], "probs": [0.5, 0.5]}\n', r":2: field 'probs' is not"),
    (GOOD + b'{"prompt": "x", "response": "y", "references": ["a"], "probs": 1}\n', r":2: field 'probs' is not"),
    (GOOD + b'{"prompt": "x", "response": "y", "references": [], "probs": []}\n', r":2: field 'probs' is not"),
    (GOOD + b'{"prompt": "\xff", "response": "x"}\n', r":2: not valid UTF-8"),
    (GOOD + b"[" * 100_000 + b"\n", r":2: "),
    (GOOD * 3, "none is left for"),
])
def test_bad_data_names_file_and_line(config, tmp_path, content, match):
    (tmp_path / "bad.jsonl").write_bytes(content)
    cfg = config(data=str(tmp_path / "bad.jsonl"))
    said = refused(match, kd_forward.train, cfg)
    assert "bad.jsonl" in said and not Path(cfg.out).exists()


def test_references_are_a_text_or_several_and_nothing_is_none():
    row = lambda **more: common.prompt_and_response({"prompt": "x", "response": "y", **more}, "here", kd_forward.Config())
    assert row(references=["a", "b"])["references"] == ["a", "b"] and row(references="a b")["references"] == ["a b"]
    assert "references" not in row() | row(references=None) | row(references=[]) | row(references="")


def test_known_answers_are_as_many_in_every_row(config, tmp_path):
    """The share of each wording is asked for, so a row with two cannot stand beside one with three."""
    rows = [{"prompt": f"the cat {i}", "response": "cat", "references": ["cat"] * n, "probs": [1 / n] * n}
            for i in range(40) for n in [1 + i % 2]]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    refused("some have 1 and others 2: leave 'probs' out", kd_forward.train, config("llama", data=str(tmp_path / "rows.jsonl"), holdout=0.3))


def test_csv_saved_datasets_and_split_directories(config, tmp_path, rows_file):
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    import csv
    with open(tmp_path / "rows.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, ["prompt", "response"])
        writer.writeheader()
        writer.writerows(rows)
    import datasets
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows[:60]), "validation": datasets.Dataset.from_list(rows[60:70]),
                          "test": datasets.Dataset.from_list(rows[70:])}).save_to_disk(tmp_path / "saved")
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir/train.jsonl").write_text(rows_file.read_text())
    (tmp_path / "dir/test.jsonl").write_text(rows_file.read_text())
    wanted = common.load_rows(config())
    assert common.load_rows(config(data=str(tmp_path / "rows.csv"))) == wanted
    saved = common.load_rows(config(data=str(tmp_path / "saved")))
    assert [len(saved[s]) for s in ("train", "valid", "test")] == [60, 10, 10]
    assert len(common.load_rows(config(data=str(tmp_path / "dir")))["test"]) == 80
    (tmp_path / "bad.csv").write_text("prompt,answer\na,b\n")
    refused(r"bad.csv:2: no field 'response' \(there: prompt, answer\)", common.load_rows, config(data=str(tmp_path / "bad.csv")))
    prompts = [{r["prompt"] for r in wanted[s]} for s in ("train", "valid", "test")]
    assert not prompts[0] & prompts[1] and not prompts[0] & prompts[2] and not prompts[1] & prompts[2]


def test_a_prompt_that_comes_twice_is_in_one_split(config, tmp_path):
    rows = [{"prompt": f"cat {i % 60}", "response": f"dog {i}"} for i in range(180)]
    (tmp_path / "twice.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    parts = common.load_rows(config(data=str(tmp_path / "twice.jsonl"))).values()
    assert sum(len({r["prompt"] for r in part}) for part in parts) == 60 and sum(map(len, parts)) == 180


def test_responses_end_with_eos_unless_they_were_cut(config, tmp_path):
    """The token EOS is put behind a response, never read out of its text; a cut response has none."""
    texts = ["the cat", "the dog sat on the mat and then it ran under the tree", "a <|endoftext|> b"]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps({"prompt": f"{i}", "response": texts[i % 3]}) + "\n" for i in range(90)))
    cfg = config(data=str(tmp_path / "r.jsonl"), max_response=12)
    student, _, tokenizer = common.load_pair(cfg, torch.device("cpu"))
    for e in common.load_data(cfg, student, None, tokenizer).train:
        whole = tokenizer(e.row["response"], split_special_tokens=True).input_ids
        assert e.response == whole[:12] + [tokenizer.eos_token_id] * (len(whole) < 12) and tokenizer.eos_token_id not in whole


def test_a_prompt_or_response_that_just_fits_is_not_counted_as_cut(config):
    student, _, tokenizer = common.load_pair(config(teacher="none"), torch.device("cpu"))
    row = {"prompt": "the cat", "response": "the dog sat"}
    n = len(tokenizer(row["response"]).input_ids) + 1  # with EOS
    for longest, cut in ((n, 0), (n - 1, 1)):
        encode = common.row_encoder(config(max_response=longest), student, None, tokenizer)
        assert len(encode(row).response) == longest and encode.cut == cut
    n = len(encode(row).prompt)
    for longest, cut in ((n, 0), (n - 1, 1)):
        encode = common.row_encoder(config(max_prompt=longest), student, None, tokenizer)
        assert len(encode(row).prompt) == longest and encode.cut_prompts == cut


def test_responses_empty_cut_or_absent(config, tmp_path, capsys):
    words = "the cat sat on the mat " * 9
    rows = [{"prompt": f"{i} cats", "response": ["ok then", "", words, None][i % 4]} for i in range(120)]
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    kd_forward.train(config(data=str(tmp_path / "some.jsonl"), steps=1))
    said = capsys.readouterr().out
    found = [int(x) for x in re.search(r"cut to fit: (\d+) prompts, (\d+) responses; (\d+) empty", said).groups()]
    assert found[0] == 0 and 15 < found[1] <= 30 and 15 < found[2] <= 30
    for value in ("", None):
        for r in rows:
            r["response"] = value
        (tmp_path / "none.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        refused("nothing to train on", kd_forward.train, config(data=str(tmp_path / "none.jsonl"), out=str(tmp_path / "o")))


def test_models_without_tokenizer_weights_or_common_vocabulary(config, pair, tmp_path):
    shutil.copytree(pair("gpt2")[1], tmp_path / "bare")
    for f in (tmp_path / "bare").glob("token*"):
        f.unlink()
    refused("no tokenizer there", kd_forward.train, config(student=str(tmp_path / "bare")))
    shutil.copytree(pair("gpt2")[0], tmp_path / "empty")
    (tmp_path / "empty/model.safetensors").unlink()
    refused("no weights", kd_forward.train, config(teacher=str(tmp_path / "empty")))
    (tmp_path / "empty/model.safetensors").write_bytes(b"not safetensors")
    refused("weights cannot be loaded", kd_forward.train, config(teacher=str(tmp_path / "empty")))
    refused("different tokenizers", kd_forward.train, config(teacher=str(pair("t5")[0])))
    shutil.copytree(pair("gpt2")[1], tmp_path / "base")
    tokenizer = common.load_tokenizer(tmp_path / "base", "student")
    tokenizer.eos_token = "!"
    tokenizer.save_pretrained(tmp_path / "base")
    refused(r"end a response with different tokens, <\|endoftext\|> and !", kd_forward.train, config(student=str(tmp_path / "base")))


def test_an_encoder_decoder_that_begins_responses_with_a_token_of_its_own_is_refused(config, pair, tmp_path):
    """BART's targets begin with BOS, T5's do not."""
    teacher, student = pair("t5")
    shutil.copytree(student, tmp_path / "bart")
    tokenizer = common.load_tokenizer(student, "student")
    tokenizer.bos_token = "<pad>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<pad> $A </s>", special_tokens=[("<pad>", 0), ("</s>", 1)])
    tokenizer.save_pretrained(tmp_path / "bart")
    refused("begins every response with <pad>", kd_forward.train, config(student=str(tmp_path / "bart"), teacher=str(teacher)))


@pytest.mark.parametrize("zipped", [False, True])
def test_a_pickle_in_a_models_place_is_not_run(config, pair, tmp_path, zipped):
    """transformers loads an honest pytorch_model.bin as plain tensors (weights_only); one with code in it is refused."""
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)
    model = shutil.copytree(pair("gpt2")[1], tmp_path / "model")
    state = common.load_model(model, torch.device("cpu")).state_dict()
    (model / "model.safetensors").unlink()
    torch.save(state, model / "pytorch_model.bin")
    assert torch.equal(common.load_model(model, torch.device("cpu")).state_dict()["lm_head.weight"], state["lm_head.weight"])
    if zipped:
        torch.save({"lm_head.weight": Evil()}, model / "pytorch_model.bin")
    else:
        (model / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(), protocol=2))
    refused("weights cannot be loaded", kd_forward.train, config(student=str(model)))
    cfg = config(steps=2, out=str(tmp_path / "run"))
    kd_forward.train(cfg)
    Path(cfg.out, "result.json").unlink()
    shutil.copy(model / "pytorch_model.bin", Path(cfg.out, "checkpoint.pt"))
    refused("checkpoint.pt cannot be loaded", kd_forward.train, config(steps=2, out=cfg.out, resume=True))
    assert not (tmp_path / "owned").exists() and [f.name for f in Path(cfg.out, "student").glob("*.bin")] == []


def test_a_models_own_code_is_neither_run_nor_asked_about(config, pair, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("asked on the terminal"))
    model = shutil.copytree(pair("gpt2")[1], tmp_path / "model")
    (model / "evil.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w')\nfrom transformers import GPT2Config as C, GPT2LMHeadModel as M")
    text = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**text, "model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}))
    refused("no model can be loaded", kd_forward.train, config(student=str(model)))
    assert not (tmp_path / "owned").exists()


def test_a_config_without_weights_starts_the_student_at_random(config, pair, tmp_path, capsys):
    shutil.copytree(pair("gpt2")[1], tmp_path / "scratch")
    (tmp_path / "scratch/model.safetensors").unlink()
    results = [kd_forward.train(config(student=str(tmp_path / "scratch"), steps=2, out=str(tmp_path / f"o{i}"))) for i in range(2)]
    assert "holds no weights" in capsys.readouterr().out and results[0]["after.kl_pq"] == results[1]["after.kl_pq"]


def test_a_step_is_split_among_processes_and_micro_batches(config, monkeypatch):
    common.check_settings(config(batch_size=8, accum=8))
    monkeypatch.setenv("WORLD_SIZE", "2")
    common.check_settings(config(batch_size=16, accum=8))
    refused("a multiple of --accum 8 times 2 processes", common.check_settings, config(batch_size=8, accum=8))


def test_directories_are_never_overwritten_by_accident(config, tmp_path, capsys):
    cfg = config(steps=2)
    first = kd_forward.train(cfg)
    capsys.readouterr()
    assert kd_forward.train(cfg) == first  # finished and the same settings: prints its result
    assert "---\nmethod: kd_forward" in capsys.readouterr().out
    refused("other settings .alpha was 1.0, is 0.5.", kd_forward.train, config(steps=2, alpha=0.5))
    Path(cfg.out, "result.json").unlink()
    refused("unfinished run: --resume", kd_forward.train, cfg)
    for other in (dict(lr=0.5), dict(seed=1), dict(dtype="bfloat16")):  # auto was fp32 here: settings.json says so
        refused("other settings", kd_forward.train, config(**{"steps": 2, "resume": True, **other}))
    assert json.loads(Path(cfg.out, "settings.json").read_text())["dtype"] == "torch.float32"
    assert kd_forward.train(config(steps=2, alpha=0.5, overwrite=True))["steps"] == 2
    foreign = tmp_path / "mine"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("precious")
    for overwrite in (False, True):
        refused("holds no settings.json", kd_forward.train, config(out=str(foreign), overwrite=overwrite))
    assert (foreign / "thesis.tex").read_text() == "precious"
    refused("is a file", kd_forward.train, config(out=str(foreign / "thesis.tex")))


def test_a_full_disk_leaves_the_previous_checkpoint(config, monkeypatch):
    cfg, save, calls = config(steps=6), torch.save, []

    def full(state, path):
        calls.append(1)
        if len(calls) == 2:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(state, path)
    monkeypatch.setattr(torch, "save", full)
    said = refused("cannot save .* at step 4 .*No space left", kd_forward.train, cfg)
    assert "the previous one is untouched" in said
    assert torch.load(f"{cfg.out}/checkpoint.pt", weights_only=True)["step"] == 2


def test_a_checkpoint_is_replaced_in_one_piece(config, monkeypatch):
    """By a rename, never by writing into the file that is there. tests/kill.py kills at every state of the directory."""
    cfg, save, files = config(steps=4), common.Run.save, []

    def watched(self, step, **parts):
        save(self, step, **parts)
        files.append((Path(cfg.out, "checkpoint.pt").stat().st_ino, Path(cfg.out, "checkpoint.tmp").exists()))
    monkeypatch.setattr(common.Run, "save", watched)
    kd_forward.train(cfg)
    assert len(files) == 2 and files[0][0] != files[1][0] and not any(half for _, half in files)


@pytest.mark.parametrize("name, content, match", [
    ("checkpoint.pt", b"half", "checkpoint.pt cannot be loaded"), ("settings.json", b'{"script"', "settings.json is damaged"),
    ("result.json", b"[1", "result.json is damaged"), ("log.jsonl", b'{"step": 0, "loss": 1.0}\n{"step": 1, "lo', None)])
def test_a_damaged_run_is_told_and_half_a_line_of_the_log_is_dropped(config, monkeypatch, name, content, match):
    cfg = config(steps=4)
    kd_forward.train(cfg)
    Path(cfg.out, "result.json").unlink()
    Path(cfg.out, name).write_bytes(content)
    cfg.resume = True
    if match:
        refused(match, kd_forward.train, cfg)
        return
    kd_forward.train(cfg)
    assert [json.loads(x)["step"] for x in open(f"{cfg.out}/log.jsonl")] == [0, 4]


@pytest.mark.skipif(os.name == "nt" or not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_really_full_device(config, monkeypatch):
    cfg = config(steps=2)
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda state, path: save(state, "/dev/full"))
    refused("cannot save", kd_forward.train, cfg)


def test_read_only_output(config, monkeypatch):
    def no(*args, **kw):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(Path, "mkdir", lambda self, *a, **k: no() if self.name == "run" else os.makedirs(self, exist_ok=True))
    refused("cannot write to .*Permission denied.*choose another --out", kd_forward.train, config())


def test_a_machine_without_a_compiler_goes_on_eagerly(monkeypatch, capsys):
    class NoCompiler(Exception):
        __module__ = "torch._inductor.exc"

    def compiled(function, **kw):
        def call(*args):
            raise NoCompiler
        return call
    monkeypatch.setattr(torch, "compile", compiled)
    double = common.try_compile(lambda x: 2 * x)
    assert double(3) == 6 and double(4) == 8
    assert capsys.readouterr().out.count("going on without it") == 1
    with pytest.raises(ZeroDivisionError):  # the user's own errors stay errors
        monkeypatch.setattr(torch, "compile", lambda f, **kw: f)
        common.try_compile(lambda x: x / 0)(1)


def script(cfg, *more):
    return [sys.executable, str(ROOT / "kd_forward.py"), *flags(cfg), *more]


@pytest.mark.slow
def test_exit_status_and_one_line_on_stderr(config, tmp_path):
    done = subprocess.run(script(config(data="absent.jsonl")), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr == "error: --data absent.jsonl: no such file\n"
    assert subprocess.run(script(config(steps=0)), capture_output=True, cwd=tmp_path).returncode == 0


def lines_of(command, cwd, last):
    """Start a script and read its output until a line holds `last`; a watchdog ends it after a minute."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    watchdog = threading.Timer(60, process.kill)
    watchdog.start()
    seen = []
    for line in process.stdout:
        seen.append(line)
        if last in line:
            break
    return process, seen, watchdog


@pytest.mark.slow
def test_sigterm_saves_and_resume_goes_on(config, tmp_path):
    cfg = config("llama", steps=3000, eval_every=100000, save_every=100000, log_every=10)
    process, _, watchdog = lines_of(script(cfg), tmp_path, "step    20/")
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate()
    watchdog.cancel()
    assert process.returncode == 143
    assert re.fullmatch(r"stopped by SIGTERM after step \d+, saved: --resume goes on\n", err)
    step = torch.load(f"{cfg.out}/checkpoint.pt", weights_only=True)["step"]
    assert 20 <= step < 3000
    process, seen, watchdog = lines_of(script(cfg, "--resume"), tmp_path, "resumed")
    process.kill()
    process.communicate()
    watchdog.cancel()
    assert f"at step {step}" in seen[-1]
