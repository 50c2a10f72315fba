"""What the programs data/*/prepare.py share: rows, models without weights, and their training.

A toy task is a folder with a program prepare.py. The program writes rows of text and model
directories, which --data, --teacher and --student of the five scripts take. All models are small
Llamas. A model directory first holds only a tokenizer and a configuration. Then kd_forward.py or
ddk.py starts from random weights and trains them.
"""
import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

ROOT = Path(__file__).resolve().parents[1]
SPECIAL = ["<pad>", "<eos>", "<unk>", "<user>", "<assistant>"]  # their places are their ids
CHAT = "{% for m in messages %}<user> {{ m.content }} {% endfor %}<assistant>"


def refuse(sentence):
    """End the program with one sentence: what is wrong, where, and what to do."""
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(2)


def make_parser(doc):
    """A parser whose help is the docstring of a program, and whose errors are one sentence."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = refuse
    return parser


def instance_parser(doc, here):
    """The parser of a task in the folder `here`, of which each number is another instance."""
    parser = make_parser(doc)
    parser.add_argument("dir", type=Path, help="the directory to make")
    parser.add_argument("--number", type=int, default=0, help="which instance of the task")
    parser.add_argument("--grammar", type=Path, default=here / "grammar.json")
    return parser


def new_directory(folder, *names):
    """Make a directory and return its full path; refuse it if it holds one of these names."""
    for name in names:
        if (folder / name).exists():
            refuse(f"{folder} holds {name} already: name a new directory, or remove the old one")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        refuse(f"{folder}: cannot be made ({e.strerror}): name a new directory")
    return folder.resolve()


def split_of(text):
    """train, valid or test, by a hash of the text: the same in every instance."""
    return {0: "test", 1: "valid"}.get(zlib.crc32(text.encode()) % 10, "train")


def write_rows(file, rows):
    """One JSON object a line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


# Models without weights ---------------------------------------------------------------------------
def write_word_model(folder, words, shape, chat=True):
    """A model whose tokens are these words, after the special tokens. Without a chat template it
    continues a text, as base models do."""
    special = SPECIAL if chat else SPECIAL[:3]
    vocabulary = {word: i for i, word in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(special)
    settings = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    if chat:
        settings |= {"additional_special_tokens": special[3:], "chat_template": CHAT}
    write_model(folder, tokenizer, settings, shape)


def write_byte_model(folder, shape):
    """A model whose tokens are bytes: byte-level BPE without merges."""
    letters = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    write_model(folder, tokenizer, {"pad_token": "<eos>", "eos_token": "<eos>"}, shape)


def write_model(folder, tokenizer, settings, shape):
    """The files of a model directory, written by hand, since to import transformers takes seconds.
    `shape` holds width, layers, heads, and perhaps scale, that of the random weights."""
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = settings | {"tokenizer_class": "PreTrainedTokenizerFast",
                           "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    width, heads = shape["width"], shape["heads"]
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        "vocab_size": tokenizer.get_vocab_size(), "hidden_size": width,
        "intermediate_size": 5 * width // 2, "num_hidden_layers": shape["layers"],
        "num_attention_heads": heads, "num_key_value_heads": heads,
        "max_position_embeddings": 1024, "tie_word_embeddings": True,
        # the usual 0.02 is made for wide models: with it such narrow ones hardly begin to learn
        "initializer_range": shape.get("scale", width ** -0.5),
        "pad_token_id": tokenizer.token_to_id(settings["pad_token"]), "bos_token_id": None,
        "eos_token_id": tokenizer.token_to_id(settings["eos_token"])}))


# Training -----------------------------------------------------------------------------------------
def command(script, settings):
    """The words of the command line that runs a script with these settings."""
    words = [sys.executable, str(ROOT / script)]
    for name, value in settings.items():
        words.append("--" + name.replace("_", "-"))
        if value is not True:  # a switch has no value
            words.append(str(value))
    return words


def train(target, script="kd_forward.py", **settings):
    """Fill the model directory `target` with the student of a run. It starts from what `target`
    holds, unless `settings` name another student. Of the run's output only the losses are shown."""
    # one thread: the fastest for models this small, and the same sums whatever the number of cores
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as work:
        words = command(script, {
            "student": target, "eval_every": 10**9, "save_every": 10**9, "log_every": 100,
            "device": "cpu", "dtype": "float32", "out": f"{work}/run", **settings})
        print(f"\n{target.name}:\n{shlex.join(words)}", flush=True)
        run = subprocess.Popen(words, env=env, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT)
        said = []
        for line in run.stdout:
            said.append(line)
            if re.match(r"step .*  loss ", line):
                print("  " + re.sub(r"  ce .*  tokens \d+", "", line), end="", flush=True)
        if run.wait():
            print("".join(said), end="")
            refuse(f"the command above failed with exit status {run.returncode}")
        shutil.copytree(f"{work}/run/student", target, dirs_exist_ok=True)
