"""Lets tensors pretend to lie on a GPU: values are the CPU's, but an operation on tensors of both places is refused, as CUDA does.

Torch itself takes the tensors for meta ones, which its autograd treats as the CPU's. With the kernels of cuda_on_cpu a whole
compression runs as on a GPU.
"""

import contextlib

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from bstack.calibration import stream
from bstack.compression import device
from bstack.kernels import encode
from bstack.models import skeleton

GPU = torch.device("cuda", 0)
# Operations that take tensors of both places.
BOTH = ("copy_", "_to_copy", "index")


def is_gpu(device):
    return device is not None and not isinstance(device, torch.Tensor) and torch.device(device).type == "cuda"


class OnGpu(torch.Tensor):
    """A tensor on the pretended GPU, whose values are in `inner`."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype, device="meta"
        )

    def __init__(self, inner):
        self.inner = inner

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    data = property(lambda self: self.detach(), lambda self, new: setattr(self, "inner", new.inner))

    def data_ptr(self):
        return self.inner.data_ptr()

    def tolist(self):
        return self.inner.tolist()

    def numpy(self):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    def __reduce_ex__(self, _protocol):
        return OnGpu, (self.inner,)

    def __repr__(self):
        return f"OnGpu({self.inner})"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return route(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        known, places = {}, set()

        def unwrap(value):
            if isinstance(value, OnGpu):
                known[id(value.inner)] = value
                places.add("gpu")
                return value.inner
            if isinstance(value, torch.Tensor) and value.dim():
                places.add(value.device.type)
            return value

        to_cpu = "device" in kwargs and kwargs["device"] is not None and torch.device(kwargs["device"]).type == "cpu"
        given, named = tree_map(unwrap, (args, kwargs))
        name = func._schema.name.partition("::")[2]
        if len(places) > 1 and name not in BOTH:
            raise RuntimeError(f"{name}: Expected all tensors to be on the same device, but found {sorted(places)}")
        if "device" in named:
            named["device"] = "cpu"
        found = func(*given, **named)
        if to_cpu or (name == "copy_" and not isinstance(args[0], OnGpu)):
            return found
        return tree_map(lambda one: known.get(id(one)) if id(one) in known else place(one), found)


def place(value):
    return OnGpu(value) if isinstance(value, torch.Tensor) and not isinstance(value, OnGpu) else value


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """Compute attention step by step: torch's own makes masks that are meta tensors."""
    groups = query.shape[-3] // key.shape[-3]
    key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = place(torch.ones(scores.shape[-2:], dtype=torch.bool).tril())
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return scores.softmax(-1) @ value


def route(func, args, kwargs):
    """Call a function of torch; what it makes for the GPU is a tensor that pretends."""
    name = getattr(func, "__name__", "")
    with torch._C.DisableTorchFunctionSubclass():
        if name == "scaled_dot_product_attention" and isinstance(args[0], OnGpu):
            return attention(*args, **kwargs)
        if name == "new_tensor" and isinstance(args[0], OnGpu):
            return place(torch.tensor(args[1], dtype=kwargs.get("dtype", args[0].dtype)))
        if name == "one_hot" and isinstance(args[0], OnGpu):
            return place(func(args[0].inner, *args[1:], **kwargs))
        if name == "where" and len(args) == 3 and isinstance(args[0], OnGpu):  # torch makes meta tensors of numbers
            dtype = next(one.dtype for one in args[1:] if isinstance(one, torch.Tensor))
            args = [one if isinstance(one, torch.Tensor) else place(torch.tensor(one, dtype=dtype)) for one in args]
        if name in ("to", "cuda") and isinstance(args[0], torch.Tensor):
            targets = [*args[1:], *kwargs.values()] if name == "to" else ["cuda"]
            devices = [t for t in targets if isinstance(t, str | torch.device | OnGpu)]
            dtypes = [t.dtype if isinstance(t, OnGpu) else t for t in targets if isinstance(t, torch.dtype | OnGpu)]
            if any(isinstance(d, OnGpu) or is_gpu(d) for d in devices):
                moved = args[0].to(dtypes[0]) if dtypes else args[0]
                return moved if isinstance(moved, OnGpu) else place(moved.detach().clone())
        if is_gpu(kwargs.get("device")):
            own = isinstance(args[0], OnGpu) if args else False
            return place(func(*args, **{**kwargs, "device": None if own else "cpu"}))
        return func(*args, **kwargs)


class Factories(TorchFunctionMode):
    """Makes tensors for the GPU where no other tensor is an argument."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return route(func, args, kwargs or {})


class CpuSearch:
    """Stands in for the kernels: the CPU's encoder, which is faster than CUDA on a CPU."""

    def encode_columns(self, *given, turn):
        return tuple(map(place, encode.encode_columns(*(one.inner for one in given))))


@contextlib.contextmanager
def device_there(monkeypatch, kernels=None, free=24 * 2**30):
    """Let torch and bstack find one GPU with so much free memory."""
    kernels = kernels or CpuSearch()
    found = {
        "init": None,
        "device_count": 1,
        "current_device": 0,
        "get_device_name": "Pretended",
        "mem_get_info": (free, free),
    }
    for name, value in {**found, "get_device_capability": (9, 0)}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(device, "_kernels", lambda index: kernels)
    monkeypatch.setattr(skeleton, "PIECE_BYTES", 2**14)  # so that weights come in several
    monkeypatch.setattr(encode, "_devices", {})
    generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", type("Generator", (), {"__new__": lambda cls, device=None: generator()}))
    main = stream._Batch._main

    def main_on_device(batch):
        with Factories():
            main(batch)

    monkeypatch.setattr(stream._Batch, "_main", main_on_device)
    with Factories():
        yield
