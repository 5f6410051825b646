"""A model's name -> a verified local folder of safetensors, and a transformers model from it."""

from shoestring.hub.cache import cache_root, folder_bytes
from shoestring.hub.catalogue import BUNDLED, BundledModel
from shoestring.hub.inventory import ModelInfo, list_models, remove_model
from shoestring.hub.pretrained import Pretrained, device_of, load_pretrained, torch_dtype
from shoestring.hub.resolving import check_dtype, find_gguf, resolve
from shoestring.hub.source import ModelSource, open_source
from shoestring.hub.verify import is_quantized, verify_folder

__all__ = [
    "BUNDLED",
    "BundledModel",
    "ModelInfo",
    "ModelSource",
    "Pretrained",
    "cache_root",
    "check_dtype",
    "device_of",
    "find_gguf",
    "folder_bytes",
    "is_quantized",
    "list_models",
    "load_pretrained",
    "open_source",
    "remove_model",
    "resolve",
    "torch_dtype",
    "verify_folder",
]
