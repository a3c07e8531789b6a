"""A model with code of its own that leaves a mark when it runs, and what its tests do with it."""

import json
import sys

import samples
import torch

import bstack
import bstk

SETTINGS = bstack.Settings(codec="sign", planes=2, rank=2, samples=2, sequence_length=16)
QUICK = ["--codec", "sign", "--planes", "2", "--rank", "2", "--samples", "2", "--sequence-length", "16"]
CONFIGURATION = """
from transformers import LlamaConfig
from .helper import mark
mark("configuration")
class OwnConfig(LlamaConfig):
    model_type = "own"
"""
MODELING = """
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig
from .helper import mark
mark("model")
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
    def forward(self, *args, **kwargs):
        result = super().forward(*args, **kwargs)
        result.logits = result.logits + 1
        return result
"""
TOKENIZATION = """
from transformers import PreTrainedTokenizerFast
from .helper import mark
mark("tokenizer")
class OwnTokenizerFast(PreTrainedTokenizerFast):
    pass
"""
HELPER = """
def mark(what):
    with open({!r}, "a") as stream:
        stream.write(what + " ")
"""
MAP = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}


class Marker:
    """What the code writes when it runs."""

    def __init__(self, path):
        self.path = path

    def taken(self):
        """What has run since the last call."""
        found = self.path.read_text().split() if self.path.exists() else []
        self.path.unlink(missing_ok=True)
        return set(found)


def forget():
    """Have modules run again when they are imported again."""
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


def edit(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def put_modules(folder, marker):
    folder.mkdir(exist_ok=True)
    (folder / "helper.py").write_text(HELPER.format(str(marker.path)))
    for name, text in (("configuration", CONFIGURATION), ("modeling", MODELING), ("tokenization", TOKENIZATION)):
        (folder / f"{name}_own.py").write_text(text)
    return folder


def logits(model):
    with torch.no_grad():
        return model(torch.arange(10)[None]).logits


def rewritten(path, target, changed):
    """A container with other files inside."""
    with bstk.open(path) as file:
        data = {name: file.file(name) for name in file.files} | changed
        chunks = [c for c in file.chunks if c.kind != bstk.FILE]
        entries = [samples.entry(name, bstk.FILE, content) for name, content in data.items()]
        entries += [
            samples.entry(
                c.name,
                c.kind,
                file.read(c),
                level=c.level,
                shape=c.shape,
                dtype=c.dtype,
                rank=c.rank,
                transposed=c.transposed,
            )
            for c in chunks
        ]
        bstk.write(target, file.metadata, entries, file.base_count + len(entries) - len(file.chunks))
    return target
