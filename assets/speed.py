"""What saves time or memory and changes no number. A reader may skip this file.

RoomyLayer   sampling: transformers' DynamicLayer appends by torch.cat, so that every token costs a copy of all before
             it; here keys and values are written into room that is already there
gumbel       sampling: the noise of exponential_, made faster on a CPU
recompute    training: --recompute, activation checkpointing that stays on in eval mode
"""
import functools

import torch
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from assets.plumbing import BadInput

STEP = 64  # tokens of room that are added at a time


class RoomyLayer(DynamicLayer):
    room = None  # [keys, values], (B,heads,more than enough,D); self.keys and self.values are views of its beginning

    def update(self, key_states, value_states, *args, **kwargs):
        begin = self.get_seq_length()
        if not begin:  # the prompt
            return super().update(key_states, value_states, *args, **kwargs)
        new, end = (key_states, value_states), begin + key_states.shape[-2]
        # rows that left (batch_select_indices) took self.keys out of the room, so it is made anew
        if self.room is None or len(self.room[0]) != len(key_states) or self.room[0].shape[-2] < end:
            self.room = [x.new_empty(*x.shape[:-2], end + STEP, x.shape[-1]) for x in new]
            for room, old in zip(self.room, (self.keys, self.values)):
                room[..., :begin, :] = old
        for room, x in zip(self.room, new):
            room[..., begin:end, :] = x
        self.keys, self.values = (room[..., :end, :] for room in self.room)
        return self.keys, self.values


def roomy_cache(config):
    """A DynamicCache whose plain layers (not those with a sliding window) are roomy."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def gumbel(like, generator):
    """Gumbel(0,1) = -log(Exponential(1)) noise of that shape; clamped, for an exponential of 0 would be infinite."""
    if like.device.type == "cpu":  # bit by bit what exponential_ draws there, in a third of the time
        noise = torch.rand(like.shape, generator=generator, dtype=torch.float64).neg_().log1p_().neg_().to(like.dtype)
    else:
        noise = torch.empty_like(like).exponential_(generator=generator)
    return noise.clamp_(min=1e-30).log_().neg_()


def recompute(model):
    """Let the layers of a model forget their activations and compute them again in the backward pass.

    transformers' own switch works in training mode only and turns the sampler's cache off; here it is the gradient that
    decides. Dropout draws the same again. Raises BadInput if the architecture has no such layers.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise BadInput(f"--recompute: {type(model).__name__} has no layers that can be computed again: leave it out")
    for layer in layers:
        layer.forward = functools.partial(_recomputed, layer.forward)


def _recomputed(forward, *args, **kwargs):
    if torch.is_grad_enabled():
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)
    return forward(*args, **kwargs)
