"""Started by torchrun in test_torchrun.py: runs what a JSON file lists, [[module, settings, without reduction], ...]."""
import importlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch

import common


def greedy(model, prompts, max_new, temperature=1.0, sample=common.sample, **kw):
    """In the place of common.sample: then what is sampled does not depend on how many processes share the noise.
    What an LLM writes (with top_p) does not anyway: process 0 alone asks it."""
    return sample(model, prompts, max_new, temperature if "top_p" in kw else 0.0, **kw)


if __name__ == "__main__":
    torch.set_num_threads(1)
    real, reduce = common.sample, common.reduce_gradients
    for name, settings, broken in json.loads(Path(sys.argv[1]).read_text()):
        common.sample = real if settings.get("negatives") == "epoch" else greedy
        common.reduce_gradients = (lambda *args: None) if broken else reduce
        module = importlib.import_module(name)
        module.train(module.Config(**settings))
