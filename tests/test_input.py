"""Data and models of users: what each form is read as, and what is refused in one sentence."""
import csv
import functools
import gzip
import importlib
import json
import logging
import re
import shlex
import shutil

import conftest
import pytest
import torch
from conftest import any_run, flags, small_run, write_rows
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import common
import kd_forward

CPU = torch.device("cpu")
START, END = 320, 321  # the tokens that chat() adds
ROW = '{"prompt": "the cat", "response": "cat the"}\n'
CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
          "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


# --- Edits of a model directory ------------------------------------------------------------------
def weights(change):
    """change({name: tensor}) -> {name: tensor}"""
    def edit(path):
        file = path / "model.safetensors"
        save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return edit


def tokenizer(change):
    def edit(path):
        own = AutoTokenizer.from_pretrained(path)
        change(own)
        own.save_pretrained(path)
    return edit


def values(file, **new):
    """Change values in a JSON file of a model."""
    return lambda path: (path / file).write_text(
        json.dumps({**json.loads((path / file).read_text()), **new}))


def remove(pattern, **new):
    """Remove files, and write others."""
    def edit(path):
        for file in path.glob(pattern):
            file.unlink()
        for name, text in new.items():
            (path / name.replace("__", ".")).write_text(text)
    return edit


def chat(template):
    def change(own):
        own.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        own.chat_template = template
    return tokenizer(change)


def swap_tokens(path):
    text = (path / "tokenizer.json").read_text()
    text = re.sub('"Ġ(cat|dog)":', lambda m: '"Ġdog":' if m[1] == "cat" else '"Ġcat":', text)
    (path / "tokenizer.json").write_text(text)


@pytest.fixture
def edited(pair, tmp_path):
    """edited(role, edit, ..., kind="llama") -> a copy of that model with the edits."""
    def make(role, *edits, kind="llama", name="edited"):
        path = tmp_path / f"{name}-{role}"
        shutil.copytree(pair(kind)[role == "student"], path)
        for edit in edits:
            edit(path)
        return path
    return make


@pytest.fixture
def read(pair, tmp_path):
    """read(rows, teacher=, student=, ...) -> the examples of these rows, as a script reads them."""
    def read(rows, teacher=None, student=None, kind="llama", **settings):
        models = teacher or pair(kind)[0], student or pair(kind)[1]
        cfg = small_run(kd_forward.Config, models, write_rows(tmp_path / "d.jsonl", rows), "",
                        **{"max_prompt": 64, "eval_rows": 999, **settings})
        rows, models = common.load_rows(cfg), common.load_pair(cfg, CPU)
        data = common.load_data(cfg, rows, *models)
        return sorted(data.train + data.valid + data.test,
                      key=lambda e: int(e.row["where"].split("line ")[1]))
    return read


small_tokenizer = functools.cache(conftest.small_tokenizer)


def ids(text):
    """Token ids of a text, in which no special token is recognised."""
    return small_tokenizer()(text, split_special_tokens=True).input_ids


def rows_of(n, **columns):
    """n rows; {i} in their texts is the number of the row."""
    return [json.loads(json.dumps(columns).replace("{i}", str(i))) for i in range(n)]


# --- Bad input: exit status 2 and one sentence --------------------------------------------------
def bad(command, *sentence, script="kd_forward", files=None, **edits):
    """A command line, words of the sentence, {file: content}, {role: edit of its model}."""
    return command, sentence, files or {}, edits, script


def data(name, content, *words, **more):
    """A file that cannot be used."""
    return bad(f"--data {name}", *words, files={name: content}, **more)


def line(text, *words):
    """A bad row behind a good one."""
    return data("d.jsonl", ROW + text, "d.jsonl, line 2", *words)


without = lambda part: weights(lambda w: {k: v for k, v in w.items() if part not in k})
more_tokens = tokenizer(lambda t: t.add_tokens([f"zz{i}" for i in range(9)]))
NEW_END = [more_tokens, tokenizer(lambda t: t.add_special_tokens({"eos_token": "<end>"})),
           remove("generation*"), values("config.json", eos_token_id=None)]
jsonl = lambda rows: "".join(json.dumps(row) + "\n" for row in rows)
MANY = jsonl(rows_of(60, prompt="cat {i}", response="dog"))
CHATS = jsonl(rows_of(60, messages=[{"role": "user", "content": "cat {i}"},
                                    {"role": "assistant", "content": "dog"}]))
BAD = {
    # the command line
    "unknown setting": bad("--alpah 1", "--alpah"),
    "not a number": bad("--steps 1e3", "--steps", "1e3"),
    "alpha": bad("--alpha 1.5", "--alpha 1.5", "between 0 and 1"),
    "lr is no number": bad("--lr nan", "--lr nan"),
    "micro-batches": bad("--accum 3", "--batch-size 8", "--accum 3"),
    "out": bad("--out d.jsonl/run", "cannot be written there", files={"d.jsonl": ROW}),
    "device": bad("--device cuda:77", "--device cuda:77", "cannot be used"),
    "no teacher": bad("--teacher none", "--teacher none"),
    "no teacher for llmr": bad("--teacher none", "--teacher none", script="llmr"),
    "corpus is missing": bad("--lm-coef 0.5", "--corpus", script="dpkd"),
    "nothing to train on": bad("--preference 0", "--preference", "--anchor", script="dpkd"),
    "setting without effect": bad("--template x", "--template", script="ddk"),
    "mixture": bad("--mix big=1", "--mix big=1", "big, mid, small", script="ddk"),
    "one domain": bad("--data d", "--data d", "two or more domains", script="ddk",
                      files={"d/a.txt": "the cat"}),
    "domain without text": bad("--domains a=a.jsonl,b=a.jsonl", "text", script="ddk",
                               files={"a.jsonl": ROW}),
    "unknown task": bad("--task nope", "--task nope", "reviews", script="gold"),
    "label of no class": data("d.jsonl", '{"text": "a", "label": "odd"}', "d.jsonl, line 1",
                              "'odd'", "bad, good", script="gold"),
    "column of a task": data("d.jsonl", '{"text": "a"}', "d.jsonl, line 1", "no column label",
                             script="gold"),
    # files of rows
    "no file": bad("--data no.jsonl", "--data no.jsonl", "no such file"),
    "no folder": bad("--data no/such", "--data no/such", "no file", "no data set"),
    "another form": data("d.txt", "a", "d.txt", ".jsonl, .json, .csv, .tsv, .parquet"),
    "empty": data("d.jsonl", "\n", "d.jsonl", "none is left"),
    "two files of a split": bad("--data d", "--data d", "valid", files={
        f"d/{name}.jsonl": ROW for name in ("train", "valid", "dev")}),
    "no JSON": line("{bad}"),
    "no object": line("[1]"),
    "no UTF-8": data("d.jsonl", b'{"prompt": "\xff", "response": "x"}', "d.jsonl, line 1"),
    "half a surrogate": line('{"prompt": "\\ud800", "response": "x"}', "prompt"),
    "no prompt": line('{"response": "x"}', "no column prompt", "--template"),
    "prompt is a number": line('{"prompt": 0.5, "response": "x"}', "prompt", "float"),
    "response is a list": line('{"prompt": "x", "response": ["y"]}', "response"),
    "references are a number": line('{"prompt": "x", "references": 3}', "references"),
    "probs do not fit": line('{"prompt": "x", "references": ["a"], "probs": [0.5, 0.5]}'),
    "messages are a text": line('{"messages": "hello"}', "role and content"),
    "message without text": line('{"messages": [{"role": "user", "content": null}]}',
                                 "role and content"),
    "too few cells": data("d.csv", "prompt,response\na,b\na\n", "d.csv, line 3", "1 cells", "2"),
    "open quote": data("d.csv", 'prompt,response\na,"b\n', "d.csv, line 2"),
    "column twice": data("d.csv", "prompt,prompt,response\na,b,c\n", "d.csv, line 1", "one name"),
    "array with a gap": data("d.json", f'[{ROW.strip()}, {{"response": "a"}}]', "d.json, row 2"),
    "no parquet": data("d.parquet", "text", "d.parquet"),
    "no response": data("d.jsonl", MANY.replace("response", "completion"),
                        "no training row has a response", "--response"),
    # templates
    "unknown slot": bad("--template={question}", "no column question", "prompt, response"),
    "no slot": bad("--template=Sort", "template 'Sort'", "no column"),
    "no slot for the teacher": bad("--teacher-template=Sort", "template 'Sort'", "no column"),
    "context of the teacher": bad("--max-prompt 250", "--max-prompt 250", "teacher", "256",
                                  student=values("config.json", max_position_embeddings=999)),
    "messages without a chat template": data("d.jsonl", CHATS, "messages", "chat template"),
    "template with an error": bad("", "template", "edited-student", student=chat("{% for %}")),
    "template wants a system turn": bad("", "template", "edited-student", "system first",
                                         student=chat(
        "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}")),
    "several templates": bad("", "template", "edited-student", "no default",
                             student=chat({"a": CHATML, "b": CHATML})),
    # models
    "no model": bad("--student no/such/model", "--student no/such/model", "no such directory"),
    "no model in the data": bad("--student student-kl", "student-kl", "name a model"),
    "prefixed keys": bad("", "--student", "missing", "lm_head.weight", student=weights(
        lambda w: {f"module.{k}": v for k, v in w.items()})),
    "head is missing": bad("", "--student", "lm_head.weight", student=without("lm_head")),
    "another shape": bad("", "--student", "model.norm.weight", "(7,)", "(16,)", student=weights(
        lambda w: {**w, "model.norm.weight": torch.ones(7)})),
    "no weights": bad("", "--teacher", teacher=remove("*.safetensors")),
    "broken weights": bad("", "--student", student=remove("x", model__safetensors="x")),
    "adapter": bad("", "--student", "adapter", student=remove(
        "[cm]o*", adapter_config__json="{}")),
    "no tokenizer": bad("", "--student", "no tokenizer", student=remove("token*")),
    "code of its author": bad("", "--student", "remote code is never run here", student=values(
        "config.json", model_type="own", auto_map={"AutoConfig": "own.C"})),
    "no end of a response": bad("", "--student", "no end-of-sequence token", student=[
        tokenizer(lambda t: setattr(t, "eos_token", None)), remove("generation*"),
        values("config.json", eos_token_id=None)]),
    "other tokens": bad("", "different tokenizers", "Ġcat", "Ġdog", student=swap_tokens),
    "token beyond the embedding": data("d.jsonl", MANY.replace("cat", "zz8"), "d.jsonl, line 1",
                                       "'zz8'", student=more_tokens, teacher=more_tokens),
    "EOS beyond the embedding": bad(
        "--data d.jsonl --responses teacher", "'<end>'", "beyond the embedding", student=NEW_END,
        teacher=NEW_END, files={"d.jsonl": MANY.replace("response", "answer")}),
    "token beyond the embedding, running text": bad(
        "", "--student", "resize_token_embeddings", script="ddk", student=more_tokens),
    "chat teacher, base student": bad(
        "", "<|endoftext|>", "<|im_end|>", "save the teacher's tokenizer into a copy",
        teacher=[chat(CHATML), values("generation_config.json", eos_token_id=[0, 321])]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_ends_with_one_sentence_and_status_2(name, edited, pair, any_root, tmp_path,
                                                       monkeypatch, capsys):
    command, sentence, files, edits, script = BAD[name]
    for file, text in files.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    cfg = any_run(script, any_root, tmp_path / "out")
    if script == "kd_forward":
        cfg.teacher, cfg.student = map(str, pair("llama"))
    for role, edit in edits.items():
        path = edited(role, *(edit if isinstance(edit, list) else [edit]))
        setattr(cfg, role, str(path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.root.manager, "disable", logging.CRITICAL)  # what a library says
    monkeypatch.setattr("sys.argv", ["x.py", *flags(cfg), *shlex.split(command)])
    module = importlib.import_module(script)
    assert common.main(module.train, module.Config) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(r"error: [^\n]{1,500}\n", said), said
    assert all(word in said for word in sentence), said
    assert not (tmp_path / "out").exists()


# --- Forms of data ------------------------------------------------------------------------------
# texts that readers like to guess a type for, to trim or to shift
TEXTS = ["2024-01-05", "007", "null", "1e5", "true", " spaces ", 'a "quoted", text', "two\nlines",
         "tab\there", "naïve 東京 🙂", "NaN", "\\n", "{prompt}", "a;b", "'", "-"]
TEXT_ROWS = [{"prompt": f"{text} {i}", "response": text} for i in range(5) for text in TEXTS]


def write_csv(path, delimiter=","):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["prompt", "response"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(TEXT_ROWS)


def zipped(path):
    path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()


def dataset():
    import datasets
    return datasets.Dataset.from_list(TEXT_ROWS)


FORMS = {
    "d.jsonl": lambda p: write_rows(p, TEXT_ROWS),
    "d.jsonl.gz": lambda p: zipped(write_rows(p.with_suffix(""), TEXT_ROWS)),
    "d.json": lambda p: p.write_text(json.dumps(TEXT_ROWS, indent=1), encoding="utf-8"),
    "d.csv": write_csv,
    "d.tsv": lambda p: write_csv(p, "\t"),
    "d.parquet": lambda p: dataset().to_parquet(p),
    "saved": lambda p: dataset().save_to_disk(p),
    "folder": lambda p: write_rows(p / "train.jsonl", TEXT_ROWS),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_data_gives_the_same_texts_in_the_same_splits(form, tmp_path):
    FORMS[form](tmp_path / form)
    splits = common.load_rows(kd_forward.Config(data=str(tmp_path / form), holdout=0.2))
    assert all(splits.values())
    found = {s: [(r["prompt"], r["response"]) for r in rows] for s, rows in splits.items()}
    write_rows(tmp_path / "plain.jsonl", TEXT_ROWS)
    plain = common.load_rows(kd_forward.Config(data=str(tmp_path / "plain.jsonl"), holdout=0.2))
    assert found == {s: [(r["prompt"], r["response"]) for r in rows] for s, rows in plain.items()}
    assert sorted(sum(found.values(), [])) == sorted((r["prompt"], r["response"])
                                                     for r in TEXT_ROWS)


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("names", [
    ("train", "valid", "test"), ("train", "validation", "test"), ("train", "dev", "test"),
    ("train_sft", "val", "test_sft"), ("train_sft", "test_sft")])
def test_splits_are_found_under_their_usual_names(names, saved, tmp_path):
    parts = {name: rows_of(40, prompt=name + " {i}", response="a") for name in names}
    if saved:
        import datasets
        datasets.disable_progress_bars()
        sets = {k: datasets.Dataset.from_list(v) for k, v in parts.items()}
        datasets.DatasetDict(sets).save_to_disk(tmp_path)
    else:
        for name, rows in parts.items():
            write_rows(tmp_path / f"{name}.jsonl", rows)
    splits = common.load_rows(kd_forward.Config(data=str(tmp_path), holdout=0.1))
    found = {k: {r["prompt"].split()[0] for r in rows} for k, rows in splits.items()}
    valid = names[1] if len(names) == 3 else names[0]  # held out of the training rows
    assert found == {"train": {names[0]}, "valid": {valid}, "test": {names[-1]}}
    assert len(splits["train"]) == 40 - (len(names) == 2) * len(splits["valid"])


@pytest.mark.parametrize("n, prompts", [(180, 60), (4, 3)])
def test_no_prompt_is_in_two_splits_and_the_seed_does_not_change_them(n, prompts, tmp_path):
    write_rows(tmp_path / "d.jsonl", [{"prompt": f"cat {i % prompts}", "response": f"{i}"}
                                      for i in range(n)])
    of = lambda seed: common.load_rows(kd_forward.Config(data=str(tmp_path / "d.jsonl"), seed=seed))
    parts = [[r["prompt"] for r in part] for part in of(0).values()]
    assert sum(map(len, parts)) == n and sum(len(set(part)) for part in parts) == prompts
    assert of(0) == of(7)


def test_validation_takes_200_rows_and_test_as_many_as_asked_for_evenly_spread(tmp_path):
    for split, n in (("train", 10), ("valid", 401), ("test", 401)):
        write_rows(tmp_path / f"{split}.jsonl", rows_of(n, prompt="{i}", response="a"))
    splits = common.load_rows(kd_forward.Config(data=str(tmp_path), eval_rows=201))
    assert [len(splits[s]) for s in ("train", "valid", "test")] == [10, 200, 201]
    assert [int(r["prompt"]) for r in splits["test"]] == list(range(0, 401, 2))


@pytest.mark.parametrize("name", ["d.jsonl", "d/test.jsonl"])
def test_steps_0_scores_all_rows_of_a_single_split_once(name, pair, tmp_path, monkeypatch, capsys):
    write_rows(tmp_path / name, rows_of(21, prompt="the {i}", response="cat"))
    seen, call = [], common.Evaluator.__call__
    monkeypatch.setattr(common.Evaluator, "__call__", lambda self, model: seen.append(
        [e.row["prompt"] for e in self.examples]) or call(self, model))
    cfg = small_run(kd_forward.Config, pair("llama"), tmp_path / name.split("/")[0],
                    tmp_path / "out", steps=0, eval_rows=3)
    result = kd_forward.train(cfg)
    assert seen == [[f"the {i}" for i in range(21)]] * 2  # the student's and the teacher's
    written = [json.loads(x) for x in open(tmp_path / "out/generations.jsonl")]
    assert [g["prompt"] for g in written] == seen[0] and written[0]["references"] == ["cat"]
    assert result["before.ce"] == result["after.ce"] and "21 test rows" in capsys.readouterr().out


def test_steps_0_scores_the_test_rows_of_a_normal_run(tmp_path):
    for split, n in (("train", 40), ("valid", 5)):
        write_rows(tmp_path / f"{split}.jsonl", rows_of(n, prompt=split + " {i}", response="a"))
    of = lambda steps: common.load_rows(kd_forward.Config(data=str(tmp_path), steps=steps))["test"]
    assert of(0) == of(9) and len(of(0)) == 2


@pytest.mark.parametrize("script", ["llmr", "dpkd", "kd_forward"])
def test_prompts_alone_are_enough_where_the_models_respond(script, any_root, tmp_path, capsys):
    write_rows(tmp_path / "d.jsonl", rows_of(60, prompt="the {i}"))
    module = importlib.import_module(script)
    result = module.train(any_run(script, any_root, tmp_path / "out", responses="teacher", steps=1,
                                  data=str(tmp_path / "d.jsonl")))
    assert result["after.kl_pq"] > 0 and "after.ce" not in result
    assert "0 with a response" in capsys.readouterr().out


@pytest.mark.parametrize("form", ["d.txt", "d.jsonl", "d.parquet", "saved", "folder", "*.txt"])
def test_running_text_of_every_form_gives_the_same_blocks(form, tmp_path):
    """EOS stands after each document. One that comes again is dropped, and so is what is left."""
    texts, path = ["the cat\nsat", "a dog ran", "the cat\nsat", "sat sat sat"], tmp_path / form
    path.write_text("\n\n".join(texts)) if form == "d.txt" else None
    write_rows(path, [{"text": t, "n": 1} for t in texts]) if form == "d.jsonl" else None
    if form in ("d.parquet", "saved"):
        import datasets
        made = datasets.Dataset.from_list([{"text": t} for t in texts])
        made.to_parquet(path) if form == "d.parquet" else made.save_to_disk(path)
    for i, text in enumerate(texts if form in ("folder", "*.txt") else ()):
        folder = path if form == "folder" else tmp_path
        folder.mkdir(exist_ok=True)
        (folder / f"{i}.txt").write_text(text)
        (folder / ".hidden").write_bytes(b"\xff")
    whole = sum((ids(texts[i]) + [0] for i in (0, 1, 3)), [])
    blocks = common.pack(common.documents(path), small_tokenizer(), 5)
    assert [list(b) for b in blocks] == [whole[i:i + 5] for i in range(0, len(whole) - 4, 5)]


# --- From rows to token ids ---------------------------------------------------------------------
def test_a_plain_row_is_the_prompt_a_line_break_and_the_response_with_eos(read):
    """The text of EOS in a row is no EOS. A null response is none."""
    texts = ["cat the", "a <|endoftext|> b", None, ""]
    rows = [{"prompt": f"the {i} <|endoftext|>", "response": texts[i % 4]} for i in range(60)]
    for i, e in enumerate(read(rows, max_response=64)[:4]):
        assert e.prompt == e.teacher_prompt == ids(f"the {i} < |endoftext|>\n")
        assert e.response == (ids(texts[i]) + [0] if texts[i] else []) and 0 not in e.prompt


def test_a_t5_ends_its_prompts_with_eos_and_reads_no_line_break(read):
    e = read(rows_of(60, prompt="a {i}", response="b"), kind="t5")[4]
    plain = lambda text: conftest.small_tokenizer(t5=True)(text).input_ids
    assert (e.prompt, e.response) == (plain("a 4"), plain("b")) and e.prompt[-1] == 1


def test_a_bos_of_the_tokenizer_stands_before_the_prompt_and_nowhere_else(read, edited):
    def bos(tokenizer):
        tokenizer.bos_token = "!"
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="! $A", special_tokens=[("!", ids("!")[0])])
    student = edited("student", tokenizer(bos))
    rows = rows_of(60, prompt="a {i}", response="b")
    first = lambda **more: read(rows, student=student, **more)[0]
    assert (first().prompt, first().response) == (ids("!") + ids("a 0\n"), ids("b") + [0])
    assert first(max_prompt=3).prompt == ids("!") + ids("a 0\n")[-2:]
    assert first(template="!{prompt}").prompt == ids("!a 0")


def test_a_template_names_columns_and_the_teacher_may_read_others(read, capsys):
    """A whole number is text, null is nothing, and \\n is a line break."""
    rows = rows_of(60, question="cat {i}", age=7, note=None, hint="dog", answer="ran", rest="")
    e = read(rows, response="answer", template="Q {age}: {question}{note}\\nA:",
             teacher_template="{hint} {question}")[2]
    assert e.prompt == ids("Q 7: cat 2\nA:") and e.teacher_prompt == ids("dog cat 2")
    assert e.row["prompt"] == "Q 7: cat 2\nA:" and e.response == ids("ran") + [0]
    assert "columns that nothing reads: rest (" in capsys.readouterr().out


def test_special_tokens_are_read_in_a_template_and_are_text_in_a_row(read, edited, capsys):
    models = edited("teacher", chat(None)), edited("student", chat(None))
    for path in models:  # as in Llama 3, where these tokens are special and have no name
        values("tokenizer_config.json", extra_special_tokens=[])(path)
        assert AutoTokenizer.from_pretrained(path).all_special_tokens == ["<|endoftext|>"]
    rows = [{"prompt": "a <|im_end|>" if i == 0 else f"a {i}", "response": "b"} for i in range(60)]
    e = read(rows, *models, template="<|im_start|>{prompt}<|im_end|>")[0]
    assert e.prompt == [START, *ids("a < |im_end|>"), END]
    assert "1 rows hold the text of a special token" in capsys.readouterr().out


def test_too_long_a_prompt_loses_its_beginning_and_a_response_its_end(read, capsys):
    rows = [{"prompt": "the cat " * 9, "response": "dog sat " * 9}]
    rows += rows_of(60, prompt="the {i}", response="dog")
    e = read(rows, max_prompt=10, max_response=6, template="now: {prompt}\\n")[0]
    assert e.prompt == ids("the cat " * 9 + "\n")[-10:]
    assert e.response == ids("dog sat " * 9)[:6]
    assert "cut to fit: 1 prompts, 1 responses" in capsys.readouterr().out


CHAT = [{"role": "system", "content": "sad"}, {"role": "user", "content": "cat {i}"},
        {"role": "assistant", "content": "ran"}, {"role": "user", "content": "<|im_end|> dog"},
        {"role": "assistant", "content": "sat"}]
NAMES = {"user": "human", "assistant": "gpt", "system": "system"}


@pytest.mark.parametrize("columns", [
    {"messages": CHAT}, {"prompt": CHAT[:-1], "completion": CHAT[-1:]},  # the latter as in TRL
    {"conversations": [{"from": NAMES[m["role"]], "value": m["content"]} for m in CHAT]},
    {"prompt": CHAT[:-1], "response": "sat"}], ids=lambda columns: "+".join(columns))
def test_messages_go_through_the_chat_template_and_the_last_answer_is_the_response(
        columns, read, edited, capsys):
    models = edited("teacher", chat(CHATML)), edited("student", chat(CHATML))
    e = read(rows_of(60, **columns), *models)[1]
    turn = lambda role, text: [START, *ids(f"{role}\n{text}"), END, *ids("\n")]
    assert e.prompt == [*turn("system", "sad"), *turn("user", "cat 1"), *turn("assistant", "ran"),
                        *turn("user", "< |im_end|> dog"), START, *ids("assistant\n")]
    assert e.response == ids("sat") + [0]
    assert "nothing reads" not in capsys.readouterr().out


def test_different_chat_templates_are_said_and_auto_means_the_teachers_own(read, edited, capsys):
    own = "{% for m in messages %}<|im_start|>{{ m['content'] }}!{% endfor %}"
    models = edited("teacher", chat(own)), edited("student", chat(CHATML))
    rows = rows_of(60, prompt="a {i}", response="b")
    e = read(rows, *models)[0]
    assert e.teacher_prompt == e.prompt and "different chat templates" in capsys.readouterr().out
    e = read(rows, *models, teacher_template="auto")[0]
    assert e.teacher_prompt == [START, *ids("a 0"), *ids("!")] != e.prompt
    assert "different chat templates" not in capsys.readouterr().out


def test_a_template_that_writes_the_date_gives_the_same_prompt_every_day(read, edited):
    """Of several templates the one named default is read."""
    dated = "{{ date_string }}; {{ strftime_now('%d %b %Y') }}{{ messages[0]['content'] }}"
    several = chat({"default": dated, "tools": CHATML})
    models = edited("teacher", chat(dated)), edited("student", several)
    e = read(rows_of(60, prompt="a {i}", response="b"), *models)[0]
    assert e.prompt == ids("26 Jul 2024; 26 Jul 2024") + ids("a 0")


# --- The end of a response, tokens, weights -----------------------------------------------------
@pytest.mark.parametrize("template, listed, end", [
    (None, 0, "<|endoftext|>"), (None, 321, "<|im_end|>"),  # one id that is not the tokenizer's
    (None, 5, "<|endoftext|>"), (None, 50256, "<|endoftext|>"),  # no special token, or none at all
    (None, [0, 321], "<|endoftext|>"),
    (CHATML, [0, 321], "<|im_end|>"), (CHATML, 321, "<|im_end|>"),
    (CHATML, [0, 320, 321], "<|im_end|>"),  # as in Phi-3, where a turn begins with one of them
    (CHATML, [0, 5], "<|endoftext|>"), (CHATML, None, "<|endoftext|>")])
def test_a_response_ends_with_what_the_generation_config_and_the_chat_template_say(
        template, listed, end, edited):
    path = edited("student", chat(template), values("generation_config.json", eos_token_id=listed))
    model = common.load_model(str(path), "student", CPU)
    assert model.tokenizer.eos_token == end


@pytest.mark.parametrize("kind", ["gpt2", "qwen2", "t5"])
def test_a_tied_head_may_stand_in_the_file_or_not(kind, edited):
    name = "shared.weight" if kind == "t5" else None
    def both(found):
        embedding = next(v for k, v in found.items() if k == name or "wte" in k or "embed_tok" in k)
        return {**found, "lm_head.weight": embedding.clone()}
    without_head = edited("student", without("lm_head"), kind=kind, name="without")
    with_head = edited("student", weights(both), kind=kind, name="with")
    a, b = (common.load_model(str(x), "student", CPU) for x in (without_head, with_head))
    assert torch.equal(a.get_output_embeddings().weight, b.get_output_embeddings().weight)


def test_a_student_without_weights_starts_at_random_by_its_seed(edited, capsys):
    path = str(edited("student", remove("*.safetensors")))
    a, b, c = (common.load_model(path, "student", CPU, seed=s).lm_head.weight for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert "holds no weights" in capsys.readouterr().out


def test_a_model_that_begins_responses_with_a_token_of_its_own_is_refused(read, edited):
    def bos(tokenizer):
        tokenizer.bos_token = "<pad>"
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<pad> $A </s>", special_tokens=[("<pad>", 0), ("</s>", 1)])
    bart = edited("student", tokenizer(bos), kind="t5")
    with pytest.raises(common.BadInput, match="as BART does"):
        read(rows_of(60, prompt="a {i}", response="b"), student=bart, kind="t5")


def test_options_have_dashes_or_underscores_and_a_tilde_is_the_home_directory(monkeypatch):
    """A shell leaves it in --out=~/run."""
    monkeypatch.setenv("HOME", "/home/me")
    parse = lambda *words: common.parse_args(kd_forward.Config, words)
    assert parse("--batch-size", "8").batch_size == parse("--batch_size=8").batch_size == 8
    assert parse("--compile").compile and parse("--out=~/a_b-c").out == "/home/me/a_b-c"


def test_texts_are_tokenized_in_batches(read, monkeypatch):
    calls, call = [], PreTrainedTokenizerFast.__call__
    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__",
                        lambda self, *a, **k: calls.append(a) or call(self, *a, **k))
    read(rows_of(80, prompt="a {i}", response="b"))
    assert len(calls) < 40  # of 80 rows, with a prompt and a response each


def test_an_added_pad_token_that_no_row_uses_passes(read, edited):
    added = edited("student", tokenizer(lambda t: t.add_special_tokens({"pad_token": "[PAD]"})))
    assert read(rows_of(80, prompt="a {i}", response="b"), student=added)


def test_weights_that_are_not_used_are_said_in_a_line(edited, capsys):
    path = edited("student", weights(lambda w: {**w, "value_head.weight": torch.ones(3)}))
    common.load_model(str(path), "student", CPU)
    assert "1 weights are not used, such as value_head.weight" in capsys.readouterr().out
