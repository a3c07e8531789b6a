"""A prompt, sizes and damage for the tiny compressed models that these tests load."""

import shutil

import torch

import bstack
import bstk

IDS = torch.tensor([[5, 9, 44, 7, 101]])


def budgets(path):
    """A small, a middle and the full budget in MB."""
    with bstk.open(path) as file:
        small, full = file.base.budget, file.complete.budget
    return [(small + fraction * (full - small) + 1) / bstk.MB for fraction in (0, 0.5, 1)]


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


def damaged(path, tmp_path, change):
    """A model loaded small from a copy that is changed afterwards."""
    target = shutil.copy(path, tmp_path / "copy.bstk")
    model, _ = bstack.load(target, mode="packed", mb=budgets(path)[0])
    change(target)
    return model


def flip_a_late_byte(copy):
    with bstk.open(copy) as file:
        chunk = file.chunks[-2]
    with open(copy, "r+b") as stream:
        stream.seek(chunk.offset + chunk.stored_length // 2)
        byte = stream.read(1)
        stream.seek(-1, 1)
        stream.write(bytes([byte[0] ^ 1]))
