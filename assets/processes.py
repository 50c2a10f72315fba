"""Several processes, torchrun --nproc_per_node=N script.py: what a reader may skip. Alone, nothing here does anything.

Every process holds both models, takes its share of each optimizer step, and evaluates; process 0 writes and prints.
torch.distributed is the engine; a wrapper around the model (DDP) is not needed, since the loops divide sums by counts.
"""
import atexit
import contextlib
import os
import sys

import torch
import torch.distributed as dist

_alone = []  # not empty while process 0 works without the others


def processes():
    """(number of this process, how many there are): (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() and not _alone else (0, 1)


def join_processes(wanted):
    """--device -> the device of this process. Under torchrun it joins the others, and falls silent unless it is 0."""
    n, auto = int(os.environ.get("WORLD_SIZE", 1)), "cuda" if torch.cuda.is_available() else "cpu"
    device = auto if wanted == "auto" else wanted
    if n > 1 and device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    if n > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        atexit.register(dist.destroy_process_group)
        if dist.get_rank():
            sys.stdout = open(os.devnull, "w")
    return device


@contextlib.contextmanager
def zero_first():
    """Process 0 runs the block alone (it builds what is cached), then the others do (they find it)."""
    rank, n = processes()
    if rank > 0:
        dist.barrier()
    _alone.append(True)
    try:
        yield
    finally:
        _alone.pop()
    if rank == 0 and n > 1:
        dist.barrier()


def total(x):
    """The sum of a number or tensor over all processes, in the form it came in."""
    if processes()[1] == 1:
        return x
    t = torch.as_tensor(x, dtype=None if torch.is_tensor(x) else torch.float64).detach().clone()
    t = t.cuda() if dist.get_backend() == "nccl" else t
    dist.all_reduce(t)
    return t if torch.is_tensor(x) else type(x)(t.item())


def from_zero(x):
    """What process 0 has, for decisions that must be one: numbers, lists, CPU tensors."""
    if processes()[1] == 1:
        return x
    box = [x]
    dist.broadcast_object_list(box)
    return box[0]


def reduce_gradients(model, *sums):
    """Add up the gradients of all processes, and in place the tensors `sums` that are to be logged. A loss is a sum
    over its tokens, divided by the tokens of all processes (`total`): so adding is right, averaging would not be."""
    if processes()[1] > 1:
        tensors = [p.grad for p in model.parameters() if p.grad is not None] + list(sums)
        for work in [dist.all_reduce(t, async_op=True) for t in tensors]:
            work.wait()


def noise_seed(seed, step):
    """A seed for sampling in one step: with several processes each has a stream of its own."""
    return 10**9 * seed + step + 10**15 * processes()[0]
