"""Packed weights in transformers' own `from_pretrained`, through its registry of quantizers.

``AutoModelForCausalLM.from_pretrained(place, quantization_config={"quant_method": "bstack", "mb": 3000})``, where `place` is a
folder from ``bstack export --to transformers`` or a repository from ``bstack push``. `bstack.engine.registry` imports this
module when transformers imports its registry.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

import bstk
from bstack.engine.folder import PLACEHOLDER, WEIGHTS_KEY
from bstk.errors import UsageError

METHOD = "bstack"


@register_quantization_config(METHOD)
class BstackConfig(QuantizationConfigMixin):
    """How to load a .bstk file.

    Parameters
    ----------
    mb : number or str, optional
        Use the blocks of the largest prefix that fits this many MB (2**20 bytes); by default all in the file.
    fused : bool
        As for `bstack.load`.
    """

    def __init__(self, mb: Any = None, fused: bool = True, quant_method: str = METHOD):
        super().__init__(quant_method=quant_method)
        self.mb, self.fused = mb, fused


@register_quantizer(METHOD)
class BstackQuantizer(HfQuantizer):
    """Puts packed weights in place of parameters before transformers would read them, and their blocks in memory after."""

    quantization_config: BstackConfig

    def update_attn_implementation(self, config: Any) -> Any:
        """Name the placeholder as the file of weights, since transformers opens no other; called before it looks for one."""
        name = getattr(config, WEIGHTS_KEY, None)
        if not isinstance(name, str) or not name.endswith(".bstk") or Path(name).name != name:
            raise UsageError(
                f"config.json names no .bstk file as {WEIGHTS_KEY}; found {name!r}.",
                hint="Give a folder that bstack exported for transformers, or a repository that it pushed to.",
            )
        self._name = name
        setattr(config, WEIGHTS_KEY, PLACEHOLDER)
        config._experts_implementation = "eager"  # it uses one expert's weights at a time, which packed weights allow
        return config

    def update_device_map(self, device_map: Any) -> Any:
        """Refuse several devices; packed weights are on one."""
        from bstack.packed.backends import device_of

        if device_map == "auto":
            device_map = {"": "cuda" if torch.cuda.is_available() else "cpu"}
        devices = set((device_map or {"": "cpu"}).values()) if not isinstance(device_map, str) else {device_map}
        try:
            (device,) = map(torch.device, devices)
        except (ValueError, TypeError, RuntimeError):  # "balanced" and "disk" are none of torch
            raise UsageError(f"packed weights are on one device; found the device map {device_map!r}.") from None
        self._device = device_of(device, True)
        return device_map

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from bstack.engine.packed_model import pack
        from bstack.engine.url_cache import cached
        from bstack.packed.backends import backend_of, check_room
        from bstk.budget import budget_of

        mb = self.quantization_config.mb
        self._budget = None if mb is None else budget_of(mb, None)
        place = self._place(kwargs["checkpoint_files"])
        with ExitStack() as stack:
            self._fetched = None
            if bstk.is_url(place):
                self._fetched = self._budget
                file, _ = stack.enter_context(cached(place, self._budget, False, model_only=True))
            else:
                file = stack.enter_context(bstk.open(place))
                file.fit(budget=self._budget)
            self._file = file
            check_room(self._device, file, self._budget)
            self._backend = backend_of(self._device, sum(chunk.is_block and chunk.level == 0 for chunk in file.chunks))
            with torch.device("cpu"):  # transformers builds models with the meta device as the default
                self._matrices, self._lock = pack(model, file, model.dtype, self._backend)
            self._stack = stack.pop_all()
        # transformers takes the other tensors for missing and fills them anew, so they are kept, and put back afterwards.
        self._plain = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        model._keys_to_ignore_on_load_missing = [".*"]
        self._tied, model.all_tied_weights_keys = model.all_tied_weights_keys, {}
        for module in model.modules():
            for value in vars(module).values():
                if isinstance(value, torch.Tensor):  # packed: not to be initialised
                    value._is_hf_initialized = True  # type: ignore[attr-defined]
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from bstack.engine.load import attach
        from bstack.engine.packed_model import put

        for name, tensor in self._plain.items():
            put(model, name, tensor, self._file.source.name)
        model.all_tied_weights_keys = self._tied
        del model._keys_to_ignore_on_load_missing, self._plain
        model.requires_grad_(False)
        with self._stack as stack:
            settings: dict[str, Any] = {
                "budget": self._budget,
                "fetched": self._fetched,
                "fused": self.quantization_config.fused,
            }
            attach(model, self._file, self._matrices, self._lock, self._backend, stack, **settings)
        return model

    def _place(self, files: list[str]) -> str:
        """Return where the container is: beside the placeholder, or in the repository that it comes from, at that commit."""
        folder = Path(files[0]).parent
        if (folder / self._name).is_file():
            return str(folder / self._name)
        # The hub's cache has models--owner--name/snapshots/commit/.
        for commit in (folder, *folder.parents):
            kind, *repository = commit.parent.parent.name.split("--")
            if commit.parent.name == "snapshots" and kind == "models" and len(repository) == 2:
                inside = "".join(f"{part}/" for part in folder.relative_to(commit).parts)
                place = f"hf://{'/'.join(repository)}@{commit.name}/{inside}{self._name}"
                if constants.HF_HUB_OFFLINE:
                    raise UsageError(
                        f"{place} is not read, since HF_HUB_OFFLINE is set.",
                        hint="Unset it, or put the file there into the folder that is loaded.",
                    )
                return place
        raise UsageError(f"{folder / self._name}: no such file, but config.json names it as {WEIGHTS_KEY}.")

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False
