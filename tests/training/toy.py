"""A tiny HF model and its run: `python toy.py FOLDER [key=value ...]` begins or goes on with it."""

import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel, set_seed

from shoestring.training.batches import fixed_size_batches
from shoestring.training.folder import RunFolder
from shoestring.training.recipe import Recipe, validated
from shoestring.training.trainer import train_model

RECIPE = {
    "task": "toy", "device": "cpu", "steps": 40, "learning_rate": 0.01, "warmup_steps": 5, "save_every": 5,
    "log_every": 4, "evaluate_every": 20, "accumulate": 2, "seed": 3,
}  # fmt: skip


class ToyConfig(PretrainedConfig):
    model_type = "toy"


class Toy(PreTrainedModel):
    config_class = ToyConfig

    def __init__(self, config, pause=0.0, poison=None):
        super().__init__(config)
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(4, 16), torch.nn.GELU(), torch.nn.Dropout(0.3), torch.nn.Linear(16, 3)
        )
        self.pause, self.poison, self.calls = pause, poison, 0
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=0.3)
            torch.nn.init.zeros_(module.bias)

    def forward(self, inputs, labels, num_items_in_batch=None, **kwargs):
        time.sleep(self.pause)
        self.calls += 1
        loss = F.cross_entropy(self.layers(inputs), labels, reduction="sum") / num_items_in_batch
        return {"loss": loss * float("nan") if self.calls == self.poison else loss}


def examples():
    random = torch.Generator().manual_seed(1)
    inputs = torch.randn(50, 4, generator=random)
    return [(x, int(x[0] > 0) + int(x[1] > 0)) for x in inputs]


def collate(batch):
    return {"inputs": torch.stack([x for x, _ in batch]), "labels": torch.tensor([y for _, y in batch])}


def accuracy(model):
    batch = collate(examples())
    return {"accuracy": float((model.layers(batch["inputs"]).argmax(-1) == batch["labels"]).float().mean())}


def train(path, observer=lambda progress: None, *, resume=False, pause=0.0, poison=None, **values):
    recipe = validated(Recipe, {**RECIPE, **values})
    folder = RunFolder.open(path, recipe, resume=resume)
    set_seed(recipe.seed)
    model = Toy(ToyConfig(), pause, poison)
    train_model(
        model,
        examples(),
        collate,
        fixed_size_batches(50, 8),
        recipe,
        folder,
        evaluate=accuracy,
        observer=observer,
    )
    return model, folder


if __name__ == "__main__":
    train(Path(sys.argv[1]), resume=True, pause=float(sys.argv[2]))
