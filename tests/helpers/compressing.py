"""What the tests of ``bstack compress`` share: quick settings, and ways to damage a model."""

import json

import safetensors.torch

QUICK = ["--codec", "sign", "--planes", "2", "--rank", "2", "--samples", "2", "--sequence-length", "16"]


def everything(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def rewrite(model, change):
    """Change a checkpoint's tensors in place."""
    tensors = safetensors.torch.load_file(model / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def reconfigure(model, **changes):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **changes}))
