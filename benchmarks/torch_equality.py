"""Twelve PyTorch modules, split over devices, against PyTorch itself: the losses of three steps.

    python benchmarks/torch_equality.py                  # all
    python benchmarks/torch_equality.py --only gpt,bert

Needs the extra `partita[torch]`, torchvision and transformers. Weights are random. Each module is
planned for eight H100, run on one CPU device, and run on four by data parallelism, and by data and
tensor parallelism together. The optimizer is PyTorch's. A difference is relative to
PyTorch's loss.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"
os.environ["JAX_NUM_CPU_DEVICES"] = "4"
os.environ.setdefault("NPROC", "1")
# Compiles in a third of the time and runs slower; the partitioner is the same.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
)

import numpy as np

import partita.torch
from partita.capture.program import capture_program
from partita.machine import load
from partita.planning import resolve_plan

try:
    import torch
    import torchvision
    import transformers
    from torch import nn
    from torch.nn import functional
except ModuleNotFoundError as error:
    sys.exit(
        f"{error.name} is not installed: pip install 'partita[torch]' torchvision transformers."
    )

TOLERANCE = 1e-4
STEPS = 3
BATCH = 16
CLASSES = 10
VOCABULARY = 100
LENGTH = 12
RUNS = (("1 device", None), ("4, data", "data parallel"), ("4, both", "data x tensor"))
"""Per run, its label and its plan; None for one device."""


@dataclass(frozen=True)
class Case:
    """A module with its loss, its batches and its optimizer."""

    module: Callable[[], nn.Module]
    batch: Callable[[np.random.Generator], Any]
    loss: Callable[[Any, Any], torch.Tensor] | None = functional.cross_entropy
    optimizer: Callable[[Any], torch.optim.Optimizer] = lambda p: torch.optim.AdamW(p, 1e-3)


# ---------------------------------------------------------------------------------------- modules


class Block(nn.Module):
    """A transformer block with causal attention."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1 = nn.LayerNorm(width)
        self.norm_2 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        heads = self.qkv(self.norm_1(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norm_2(x))


class GPT(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, 32)
        self.position = nn.Parameter(torch.zeros(LENGTH, 32))
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(32, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.token.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.token(tokens) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class CNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1, groups=2),
            nn.GroupNorm(4, 32),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(1),
        )
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x).flatten(1))


class LSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.lstm = nn.LSTM(16, 32, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(64, CLASSES)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        states, _ = self.lstm(self.embedding(tokens))
        return self.head(states[:, -1])


def double_convolution(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1),
        nn.ReLU(),
    )


class UNet(nn.Module):
    """Convolutions down and up with a skip connection; a class for each pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.down = double_convolution(3, 8)
        self.middle = double_convolution(8, 16)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.last = double_convolution(16, 8)
        self.head = nn.Conv2d(8, CLASSES, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skip = self.down(x)
        x = self.up(self.middle(functional.max_pool2d(skip, 2)))
        return self.head(self.last(torch.cat([x, skip], dim=1)))


class MixtureOfExperts(nn.Module):
    """Four experts of which each sample uses the best two."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(12, 4)
        self.up = nn.Parameter(torch.randn(4, 12, 32) / 4)
        self.down = nn.Parameter(torch.randn(4, 32, CLASSES) / 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores, experts = self.gate(x).topk(2, dim=-1)
        weights = torch.zeros(len(x), 4).to(x.device).scatter(1, experts, scores.softmax(-1))
        hidden = functional.gelu(torch.einsum("bd,edh->beh", x, self.up))
        return torch.einsum("beh,ehc,be->bc", hidden, self.down, weights)


class DiffusionBlock(nn.Module):
    """The noise of an image, from the noisy image and its time: returns its own loss."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 32))
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.GroupNorm(4, 16)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.last = nn.Conv2d(16, 3, 3, padding=1)
        self.register_buffer("alphas", torch.linspace(0.99, 0.01, 100))

    def forward(self, image: torch.Tensor, noise: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        alpha = self.alphas[time].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * image + (1 - alpha).sqrt() * noise
        angles = time.float()[:, None] * torch.exp(-torch.arange(8).to(time.device) / 2.0)
        shift, scale = self.time(torch.cat([angles.sin(), angles.cos()], 1)).chunk(2, dim=1)
        hidden = (
            self.norm(self.first(noisy)) * (1 + scale[..., None, None]) + shift[..., None, None]
        )
        pixels = functional.silu(hidden).flatten(2).transpose(1, 2)
        mixed, _ = self.attention(pixels, pixels, pixels, need_weights=False)
        hidden = (pixels + mixed).transpose(1, 2).reshape(hidden.shape)
        return functional.mse_loss(self.last(hidden), noise)


class Siamese(nn.Module):
    """Two views through one network; each predicts the other's detached projection."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(12, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 16)
        )
        self.predictor = nn.Linear(16, 16)

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        one = self.encoder(first)
        two = self.encoder(second)
        likeness = functional.cosine_similarity(self.predictor(one), two.detach()).mean()
        return -likeness - functional.cosine_similarity(self.predictor(two), one.detach()).mean()


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, CLASSES))


def bert() -> nn.Module:
    configuration = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        num_labels=CLASSES,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="eager",
    )
    return transformers.BertForSequenceClassification(configuration)


def vit() -> nn.Module:
    configuration = transformers.ViTConfig(
        image_size=16,
        patch_size=4,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        num_labels=CLASSES,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="eager",
    )
    return transformers.ViTForImageClassification(configuration)


# ---------------------------------------------------------------------------------------- batches


def floats(random: np.random.Generator, *shape: int) -> torch.Tensor:
    return torch.from_numpy(random.normal(size=(BATCH, *shape)).astype("float32"))


def integers(random: np.random.Generator, limit: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(random.integers(0, limit, (BATCH, *shape)))


def images(random: np.random.Generator) -> Any:
    return floats(random, 3, 16, 16), integers(random, CLASSES)


def vectors(random: np.random.Generator) -> Any:
    return floats(random, 12), integers(random, CLASSES)


def texts(random: np.random.Generator) -> Any:
    return integers(random, VOCABULARY, LENGTH), integers(random, VOCABULARY, LENGTH)


def of_every_token(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 0.01, momentum=0.9, weight_decay=1e-4)


CASES = {
    "cnn": Case(CNN, images, optimizer=momentum),
    "resnet18": Case(
        lambda: torchvision.models.resnet18(num_classes=CLASSES),
        lambda random: (floats(random, 3, 32, 32), integers(random, CLASSES)),
        optimizer=momentum,
    ),
    "gpt": Case(GPT, texts, of_every_token),
    "bert": Case(
        bert,
        lambda random: {
            "input_ids": integers(random, VOCABULARY, LENGTH),
            "attention_mask": torch.ones(BATCH, LENGTH, dtype=torch.int64),
            "labels": integers(random, CLASSES),
        },
        None,
    ),
    "vit": Case(
        vit,
        lambda random: {"pixel_values": images(random)[0], "labels": images(random)[1]},
        None,
    ),
    "lstm": Case(
        LSTM, lambda random: (integers(random, VOCABULARY, LENGTH), integers(random, CLASSES))
    ),
    "unet": Case(
        UNet,
        lambda random: (floats(random, 3, 16, 16), integers(random, CLASSES, 16, 16)),
        optimizer=momentum,
    ),
    "mlp": Case(perceptron, vectors),
    "tied": Case(lambda: GPT(tied=True), texts, of_every_token),
    "experts": Case(MixtureOfExperts, vectors),
    "diffusion": Case(
        DiffusionBlock,
        lambda random: {
            "image": floats(random, 3, 8, 8),
            "noise": floats(random, 3, 8, 8),
            "time": integers(random, 100),
        },
        None,
    ),
    "siamese": Case(
        Siamese,
        lambda random: (floats(random, 12), floats(random, 12)),
        None,
        momentum,
    ),
}


# ------------------------------------------------------------------------------------- comparison


def losses_of_torch(case: Case, module: nn.Module, batches: list[Any]) -> list[float]:
    """The losses of PyTorch's own loop."""
    optimizer = case.optimizer(module.parameters())
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        if case.loss is not None:
            loss = case.loss(module(batch[0]), batch[1])
        else:
            outputs = module(**batch) if isinstance(batch, dict) else module(*batch)
            loss = outputs if isinstance(outputs, torch.Tensor) else outputs.loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def losses_of_partita(
    case: Case, module: nn.Module, batches: list[Any], plan: str | None
) -> tuple[list[float], float, str]:
    """(losses, largest difference between weights, splits) under a plan; None: on one device."""
    optimizer = case.optimizer(module.parameters())
    if plan is None:
        step = partita.torch.training_step(module, case.loss, optimizer)
    else:
        planned = partita.torch.training_step(module, case.loss, optimizer)
        captured = capture_program(planned.function, args=planned.arguments(batches[0]))
        chosen = resolve_plan(plan, captured.graph, load("h100:4"))
        step = partita.torch.parallelize(module, case.loss, optimizer, plan=chosen)
    losses = [float(step(batch)) for batch in batches]
    kinds = set()
    if step.plan is not None:
        for choice in step.plan.choices.values():
            kinds |= {use[0] for use in choice.values()}
    weights = step.state_dict()
    expected = copy.deepcopy(module)
    losses_of_torch(case, expected, batches)
    difference = 0.0
    for name, tensor in expected.state_dict().items():
        scale = max(1.0, float(tensor.abs().max()))
        difference = max(difference, float((weights[name] - tensor).abs().max()) / scale)
    return losses, difference, "".join(sorted(kinds)) or "-"


def compare(name: str, case: Case) -> bool:
    """Prints the differences of a module under all plans; whether all are within the tolerance."""
    torch.manual_seed(0)
    module = case.module()
    random = np.random.default_rng(0)
    batches = [case.batch(random) for _ in range(STEPS)]
    expected = losses_of_torch(case, copy.deepcopy(module), batches)
    step = partita.torch.training_step(module, case.loss, case.optimizer(module.parameters()))
    plan = step.plan_for(batches[0], machine="h100:8")
    right = True
    for label, given in RUNS:
        losses, weights, splits = losses_of_partita(case, module, batches, given)
        differences = [abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True)]
        right = right and max(differences) <= TOLERANCE
        print(
            f"{name:10} {label:10} splits {splits:4} loss {max(differences):.1e} "
            f"weights {weights:.1e} ({len(plan.choices)} operators on {plan.devices})",
            flush=True,
        )
    return right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(CASES), help="modules, separated by commas")
    names = parser.parse_args().only.split(",")
    wrong = [name for name in names if not compare(name, CASES[name])]
    print(f"{len(names) - len(wrong)} of {len(names)} modules within {TOLERANCE:g}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
