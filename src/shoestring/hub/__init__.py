"""A model's name -> a verified local folder of safetensors, and a transformers model from it."""

from shoestring.hub.cache import cache_root, folder_bytes
from shoestring.hub.catalogue import BUNDLED, BundledModel
from shoestring.hub.inventory import ModelInfo, list_models, remove_model
from shoestring.hub.pretrained import Pretrained, load_pretrained
from shoestring.hub.resolving import resolve
from shoestring.hub.verify import verify_folder

__all__ = [
    "BUNDLED",
    "BundledModel",
    "ModelInfo",
    "Pretrained",
    "cache_root",
    "folder_bytes",
    "list_models",
    "load_pretrained",
    "remove_model",
    "resolve",
    "verify_folder",
]
