"""A quantizer for transformers: its own from_pretrained loads GPTQ checkpoints as ours does."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from gptq_fx.checkpoint import read
from gptq_fx.checkpoint.files import open_tensors
from gptq_fx.checkpoint.settings import read_settings
from gptq_fx.checkpoint.tensors import modules_of
from gptq_fx.errors import CheckpointError
from gptq_fx.parameter import QuantizedParameter

METHOD = "gptq_fx"


def HFConfig() -> Any:
    """What to pass as `quantization_config` to a from_pretrained of transformers, for a GPTQ checkpoint:

    AutoModelForCausalLM.from_pretrained(path, quantization_config=gptq_fx.HFConfig())
    """
    config = _config_class()(bits=4)  # the checkpoint's own settings win; bits is only asked for
    config.quant_method = METHOD
    return config


@functools.cache
def _config_class() -> Any:
    """Made, and registered with transformers, when it is first asked for: that import takes seconds."""
    import transformers
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer

    def get_loading_attributes(self: Any) -> dict[str, Any]:
        return {"quant_method": METHOD}

    # transformers takes the settings of the checkpoint, which say "gptq", and from the argument only its
    # loading attributes, if the names of both classes are the same. One attribute chooses the quantizer.
    members = {"get_loading_attributes": get_loading_attributes, "__doc__": HFConfig.__doc__}
    config = type("GPTQConfig", (transformers.GPTQConfig,), members)

    class Quantizer(HfQuantizer):
        """Puts QuantizedParameters in, and lets transformers load the rest."""

        requires_calibration = True
        made: dict[str, QuantizedParameter]

        def validate_environment(self, *args: Any, **kwargs: Any) -> None:
            device_map = kwargs.get("device_map") or {}
            if isinstance(device_map, dict) and len({str(d) for d in device_map.values()}) > 1:
                raise CheckpointError(f"device_map={device_map}: several devices. Legal: one")

        def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
            paths = kwargs.get("checkpoint_files") or []
            if not paths or not str(paths[0]).endswith(".safetensors"):
                raise CheckpointError(f"found {paths[:1]}: no safetensors. Legal: a GPTQ checkpoint")
            device = next(iter((kwargs.get("device_map") or {"": "cpu"}).values()))
            with torch.device("cpu"):  # transformers calls this while new tensors are on the meta device
                self.made = take_places(model, Path(paths[0]).parent, torch.device(device))
            return model

        def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
            if (model._tp_size or 1) > 1:
                raise CheckpointError(
                    f"tp_size={model._tp_size}: transformers' own loading reads whole weights. "
                    "Legal: gptq_fx.from_pretrained(path, distributed_config=...)"
                )
            read.put(model, self.made)
            del self.made, model.config.quantization_config  # a model to quantize, save and compile as any
            return model.requires_grad_(False)

        def is_serializable(self) -> bool:
            """gptq_fx.save_pretrained writes checkpoints; transformers' own could not."""
            return False

        @property
        def is_trainable(self) -> bool:
            return False

        @property
        def is_compileable(self) -> bool:
            return True

    register_quantization_config(METHOD)(config)
    register_quantizer(METHOD)(Quantizer)
    return config


def take_places(model: Any, folder: Path, device: torch.device) -> dict[str, QuantizedParameter]:
    """The quantized parameters of a checkpoint, by their paths; the dense ones there are taken away.

    So transformers neither misses nor fills them: until `put` sets them, these modules have no weight.
    """
    settings, files = read_settings(folder), open_tensors(folder)
    places, _ = read.plan(model, files, settings, modules_of(files, settings))
    made = {place.target: read.make_parameter(place, files, settings, device) for place in places}
    for target in made:
        owner, _, leaf = target.rpartition(".")
        module = model.get_submodule(owner)
        module._parameters[leaf] = None
        module._is_hf_initialized = True
    tied = model.all_tied_weights_keys
    for one, other in list(tied.items()):
        if one in made or other in made:
            del tied[one]
    known = set(model._keys_to_ignore_on_load_unexpected or ())
    model._keys_to_ignore_on_load_unexpected = known | {rf"\.({'|'.join(settings.leaves)})$"}
    return made
