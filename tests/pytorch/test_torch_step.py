"""Training steps of PyTorch modules give PyTorch's own losses, weights and buffers, planned or not.

They need the extra `partita[torch]`: `make test-torch` installs it and runs them.
"""

import importlib
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest

import partita
import partita.torch
from partita.torch.module import Settings

torch: Any = pytest.importorskip(
    "torch", reason="PyTorch is not installed, so its modules are not tested: make test-torch"
)
pytest.importorskip(
    "torchax", reason="torchax is not installed, so PyTorch is not tested: make test-torch"
)
nn = torch.nn
functional = torch.nn.functional
checkpoint = importlib.import_module("torch.utils.checkpoint").checkpoint
CLASSES = 5


def batches(count: int = 3, features: tuple[int, ...] = (12,), seed: int = 0) -> list[Any]:
    random = np.random.default_rng(seed)
    x = random.normal(size=(count, 16, *features)).astype("float32")
    y = random.integers(0, CLASSES, (count, 16))
    return [(torch.from_numpy(a), torch.from_numpy(b)) for a, b in zip(x, y, strict=True)]


def perceptron() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, CLASSES))


def sgd(module: Any) -> Any:
    return torch.optim.SGD(module.parameters(), 0.1)


def trained_by_torch(
    module: Any, optimizer: Any, data: list[Any], after: Callable[[], None] = lambda: None
) -> list[float]:
    losses = []
    for x, y in data:
        optimizer.zero_grad()
        loss = functional.cross_entropy(module(x), y)
        loss.backward()
        optimizer.step()
        after()
        losses.append(float(loss.detach()))
    return losses


def assert_equal_states(ours: dict[str, Any], module: Any) -> None:
    theirs = module.state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def assert_trains_as_torch(step: Any, module: nn.Module, data: list[Any]) -> None:
    """Losses and last state are those of PyTorch, which trains the module afterwards."""
    ours = [float(step(batch)) for batch in data]
    theirs = trained_by_torch(module, sgd(module), data)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    assert_equal_states(step.state_dict(), module)


@pytest.mark.parametrize("devices", [None, 1, 4])
def test_losses_weights_and_running_statistics_are_those_of_torch(devices: int | None) -> None:
    module = perceptron()
    if devices is None:
        step = partita.torch.training_step(module, functional.cross_entropy, sgd(module))
    else:
        step = partita.torch.parallelize(
            module, functional.cross_entropy, sgd(module), devices=devices
        )
    data = batches()
    assert_trains_as_torch(step, module, data)
    module.eval()
    torch.testing.assert_close(
        step.predict(data[0][0]), module(data[0][0]).detach(), rtol=1e-4, atol=1e-5
    )


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1),
    "nesterov": lambda p: torch.optim.SGD(p, 0.1, 0.9, nesterov=True, weight_decay=0.1),
    "maximize": lambda p: torch.optim.SGD(p, 0.01, 0.9, maximize=True),
    "adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, weight_decay=0.1),
    "centered": lambda p: torch.optim.RMSprop(p, 0.01, centered=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_of_torch_keeps_its_formula(name: str) -> None:
    torch.manual_seed(0)
    module = nn.Linear(12, CLASSES)
    step = partita.torch.training_step(
        module, functional.cross_entropy, OPTIMIZERS[name](module.parameters())
    )
    data = batches(5)
    ours = [float(step(batch)) for batch in data]
    theirs = trained_by_torch(module, OPTIMIZERS[name](module.parameters()), data)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    assert_equal_states(step.state_dict(), module)


def grouped(module: Any) -> tuple[Any, Any]:
    """An optimizer with two groups, and a scheduler of both rates."""
    groups = [
        {"params": [module.weight], "weight_decay": 0.1},
        {"params": [module.bias], "lr": 1.0},
    ]
    optimizer = torch.optim.SGD(groups, 0.1, momentum=0.5)
    return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)


def test_parameter_groups_and_schedulers_work_as_in_torch() -> None:
    torch.manual_seed(0)
    module = nn.Linear(12, CLASSES)
    data = batches(4)
    optimizer, scheduler = grouped(module)
    step = partita.torch.training_step(module, functional.cross_entropy, optimizer)
    ours = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for batch in data:
            ours.append(float(step(batch)))
            scheduler.step()
    optimizer, scheduler = grouped(module)
    theirs = trained_by_torch(module, optimizer, data, scheduler.step)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    assert_equal_states(step.state_dict(), module)


def test_gradients_are_clipped_as_in_torch() -> None:
    module = perceptron()
    step = partita.torch.training_step(
        module, functional.cross_entropy, sgd(module), clip_norm=0.05
    )
    data = batches()
    ours = [float(step(batch)) for batch in data]
    optimizer = sgd(module)
    theirs = []
    for x, y in data:
        optimizer.zero_grad()
        loss = functional.cross_entropy(module(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 0.05)
        optimizer.step()
        theirs.append(float(loss.detach()))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(12, 512)
        self.down = nn.Linear(512, 12)

    def forward(self, x: Any) -> Any:
        return x + self.down(functional.gelu(self.up(x)))


class Tied(nn.Module):
    """Tied weights, frozen weights, a target network without gradient, and a detached branch."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, 12)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(12, CLASSES, bias=False)
        self.head.weight = self.embedding.weight
        self.frozen = nn.Linear(12, 12).requires_grad_(False)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scratch", torch.ones(12), persistent=False)

    def forward(self, x: Any) -> Any:
        self.steps = self.steps + 1
        for block in self.blocks:
            x = block(x)
        with torch.no_grad():
            gate = torch.sigmoid(self.head(x)).mean(1, keepdim=True)
        x = x * gate + self.frozen(x) * self.scratch + torch.detach(x) ** 2
        return self.head(x)


def test_tied_and_frozen_weights_and_stopped_gradients_are_those_of_torch() -> None:
    torch.manual_seed(0)
    module = Tied()
    step = partita.torch.training_step(module, functional.cross_entropy, sgd(module))
    assert "head.weight" not in step.state.params
    assert_trains_as_torch(step, module, batches())
    module.load_state_dict(step.state_dict())


class Unused(nn.Module):
    """Parameters that no gradient reaches: one is never read, one is detached."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(12, CLASSES)
        self.unread = nn.Linear(3, 3)
        self.offset = nn.Parameter(torch.ones(CLASSES))

    def forward(self, x: Any) -> Any:
        return self.head(x) + self.offset.detach()


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_parameters_without_a_gradient_are_not_decayed(kind: Any) -> None:
    torch.manual_seed(0)
    module = Unused()

    def optimizer() -> Any:
        return kind(module.parameters(), lr=0.1, weight_decay=0.5)

    step = partita.torch.training_step(module, functional.cross_entropy, optimizer())
    ours = [float(step(batch)) for batch in batches()]
    np.testing.assert_allclose(ours, trained_by_torch(module, optimizer(), batches()), rtol=1e-5)
    assert_equal_states(step.state_dict(), module)


class Gaps(nn.Module):
    """Operations that torchax computes differently from PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = torch.linspace(0.5, 1.5, 12)
        self.up = nn.ConvTranspose1d(4, 6, 2, stride=2, groups=2)
        self.lstm = nn.LSTM(6, 5, batch_first=True)
        self.bag = nn.EmbeddingBag(12, CLASSES, mode="sum", padding_idx=0)
        self.head = nn.Linear(5, CLASSES)
        self.norm = nn.BatchNorm1d(CLASSES, momentum=None)

    def forward(self, x: Any) -> Any:
        words = (3 * x[:, :4].abs()).long().clamp(max=11)
        lengths = words.type_as(x).sum(1, keepdim=True) / 9
        bags = lengths * self.bag(words, per_sample_weights=x[:, 4:8])
        x = x * self.scales + torch.arange(12) / 10
        with torch.no_grad():
            first = x[:, :1]
        channels = self.up(x.reshape(-1, 4, 3))
        likeness = functional.cosine_similarity(channels[:, :3], channels[:, 3:], dim=1)
        states, _ = self.lstm(channels.transpose(1, 2))
        logits = self.head(states[:, -1]).clone()
        logits[:, 1] += likeness.sum(1) * first[:, 0]
        square = torch.linalg.solve(torch.eye(5) + self.head.weight / 9, self.head.weight)
        logits = self.norm(logits) @ square + bags
        far = torch.cdist(logits, logits).sum() + functional.pdist(logits, float("inf")).sum()
        labels = torch.tensor([[2, 0, -1, 1, 1]] * 16)
        margin = functional.multilabel_margin_loss(logits, labels)
        return logits * torch.sigmoid(far / 1e4) + margin * self.head.bias


def test_operations_that_torchax_lacks_are_those_of_torch() -> None:
    torch.manual_seed(0)
    module = Gaps()
    step = partita.torch.training_step(module, functional.cross_entropy, sgd(module))
    assert_trains_as_torch(step, module, batches())


def _changed(parameter: Any, change: Callable[[Any], Any]) -> Any:
    """A copy of a parameter after a change in place."""
    y = parameter * 1
    change(y)
    return y


def _frozen(parameter: Any) -> Any:
    """Twice a parameter, without its gradient."""
    parameter.requires_grad_(False)
    y = parameter * 2
    parameter.requires_grad = True
    return y


LABELS = torch.tensor([0, 5, 2])
"""A column of each of three rows."""


MASK = torch.tensor([True, False, True])
"""Two of three rows."""


def _set_items(y: Any) -> None:
    y[range(3), LABELS] = y[torch.arange(3), LABELS] * 3
    y[[0, 2]] = y[[2, 0]] * 2
    y[np.array([1])] = 4.0


def _row_without_gradient(y: Any) -> None:
    with torch.no_grad():
        y[0] = 2.0
        y[1].mul_(3)


OPERATIONS: dict[str, Callable[[Any], Any]] = {
    "norm of zeros": lambda p: functional.normalize(p * torch.tensor([[1.0], [0.0], [1.0]])),
    "3-norm of zeros": lambda p: functional.normalize(p * torch.tensor([[1.0], [0.0], [1.0]]), 3),
    "norm below 1": lambda p: p.relu().norm(0.5, 1),
    "least of 2 dims": lambda p: torch.linalg.vector_norm(p.view(3, 2, 4), -np.inf, (0, 2), True),
    "distance of equals": lambda p: torch.dist(p, p.detach()) + torch.dist(p, p.detach() + 1, 3),
    "certain shares": lambda p: functional.binary_cross_entropy(
        (300 * p).sigmoid(), (p.detach() > 0.5).float(), p.detach().abs(), reduction="none"
    ),
    "Gauss": lambda p: functional.gaussian_nll_loss(p, p.roll(1), p.abs() / 9, True, 0.1),
    "attention to nothing": lambda p: functional.scaled_dot_product_attention(
        p, p, p, torch.tensor([[False, False, False], [True, False, True], [True, True, True]])
    ),
    "attention to less": lambda p: functional.scaled_dot_product_attention(
        p, p, p, torch.tensor([[-1.0], [-np.inf], [0.0]])
    ),
    "ceil": lambda p: functional.avg_pool1d(p, 3, 2, 1, True),
    "ceil of two": lambda p: functional.avg_pool2d(p.view(1, 3, 2, 4), 3, 2, 1, True),
    "ceil without padding": lambda p: functional.avg_pool1d(p, 3, 2, 1, True, False),
    "filled part": lambda p: _changed(p, lambda y: y[1:3].fill_(2.0)),
    "filled part of a part": lambda p: _changed(p, lambda y: y[1:][:1].masked_fill_(y[1] > 0, 2.0)),
    "powers in place": lambda p: _changed(p, lambda y: y.neg_().exp_()),
    "powers of a part": lambda p: _changed(p, lambda y: y[:, 1:3].exp_()),
    "eye into a tensor": lambda p: _changed(p.detach(), lambda y: torch.eye(3, 8, out=y)) * p,
    "folded": lambda p: functional.fold(p.view(1, 4, 6), (3, 5), 2, padding=1, stride=2),
    "folded apart": lambda p: functional.fold(p.view(6, 4), (5, 4), (3, 2), (1, 2), 0, (2, 1)),
    "larger": lambda p: functional.interpolate(
        p.view(1, 3, 2, 4), scale_factor=1.6, mode="bicubic", antialias=True
    ),
    "smaller": lambda p: functional.interpolate(
        p.view(1, 1, 3, 8), (2, 3), mode="bilinear", antialias=True
    ),
    "smaller to the corners": lambda p: functional.interpolate(
        p.view(1, 1, 3, 8), (2, 3), mode="bicubic", align_corners=True, antialias=True
    ),
    "searched": lambda p: (
        p * torch.searchsorted(torch.arange(8.0).expand(3, 8), (9 * p.detach()).round(), right=True)
    ),
    "sizes of zeros": lambda p: (p - p.detach()).abs() * torch.arange(8) + (p - p.detach()).norm(9),
    "bounds": lambda p: p.clamp(min=p.detach()) + functional.relu6(p - p.detach()) + p.clamp(max=p),
    "hard bounds": lambda p: functional.hardswish(p - p.detach() - 3) + functional.hardsigmoid(p),
    "leak at zero": lambda p: functional.leaky_relu(p - p.detach(), 0.2),
    "large softplus": lambda p: functional.softplus(p * 100),
    "deviation of equals": lambda p: (p * torch.tensor([[1.0], [0.0], [2.0]])).std(1),
    "powers of zero": lambda p: (p - p.detach()) ** 0 + torch.xlogy(p - p.detach(), 0 * p.detach()),
    "origin": lambda p: torch.atan2(p - p.detach(), p - p.detach()) + torch.sinc(p - p.detach()),
    "powers of minus one": lambda p: torch.special.xlog1py(p - p.detach(), 0 * p.detach() - 1) + p,
    "sign of zeros": lambda p: torch.copysign(p - p.detach(), p.detach()) + torch.copysign(p, -p),
    "shared by equals": lambda p: (
        torch.stack([p, p.detach(), p]).amax((0, 2))
        + p.relu().amin(1, True)
        + p.max()
        - p.relu().min()
    ),
    "windowed": lambda p: p * torch.hann_window(8) + torch.fft.fftfreq(8, 0.5),
    "named arguments": lambda p: (
        functional.linear(input=p, weight=p) * torch.arange(end=3)
        + torch.randint(2, 3, size=(3, 1))
        + torch.randint(low=1, high=2, size=(3, 3))
        + 0 * torch.rand(size=(3, 3))
        + 0 * torch.randn(size=(3, 3))
    ),
    "new numbers": lambda p: p[:, :3] * p.new_tensor([1, 2, 3]) + p.new_tensor(data=2.0),
    "grid": lambda p: functional.affine_grid(p[:2, :3][None], [1, 1, 3, 2], align_corners=False),
    "first of equals": lambda p: torch.stack([p, p.detach()]).max(0).values + p.min(-1, True)[0],
    "last of equals": lambda p: torch.stack([p, p.detach(), p - 9]).cummax(0)[0].sum(0),
    "odd spectrum": lambda p: torch.fft.irfft2(torch.fft.rfft2(p[:, :7]), s=(3, 7)),
    "ranked column": lambda p: p[:, 0][p[:, 1].argsort()] * p[:, 2],
    "changed siblings": lambda p: (
        p[:, :4] * sum(part.mul_(2) for part in p.detach().clone().chunk(2, 1))
    ),
    "checkpointed": lambda p: (
        checkpoint(torch.tanh, p * 2, use_reentrant=False)
        + checkpoint(torch.sin, p * 3, use_reentrant=True)
    ),
    "row without gradient": lambda p: _changed(p, _row_without_gradient),
    "density": lambda p: torch.distributions.Normal(p, p.abs() + 1).log_prob(p.detach()),
    "taken": lambda p: p.take_along_dim(p.argsort(1, descending=True)[:, :3], 1),
    "determinants": lambda p: (
        torch.linalg.det(A=p[:, :3])
        + p[:, :3].det()
        + torch.linalg.slogdet(A=p[:, :3])[1]
        + torch.slogdet(p[:, 1:4])[1]
        + p[:, 2:5].slogdet().logabsdet
        + torch.logdet(p[:1, :1] - p[:1, :1].detach() - 1).nan_to_num(5)
    ),
    "reflected": lambda p: torch.linalg.householder_product(p.mT.tril(-1), p[:, 0]),
    "angles": lambda p: torch.complex(p, p.roll(1)).angle() + torch.angle(p - p.detach()),
    "covariances": lambda p: torch.cov(p, correction=0) + p.cov(),
    "mean of a dtype": lambda p: torch.mean(p > 0, -1, dtype=p.dtype) * p.mean(1, dtype=p.dtype),
    "running logarithm": lambda p: p * torch.logcumsumexp(p.detach(), -1),
    "diagonal": lambda p: _changed(p, lambda y: y.fill_diagonal_(2.0)),
    "wrapped diagonal": lambda p: _changed(p.view(8, 3), lambda y: y.fill_diagonal_(2.0, True)),
    "repeated": lambda p: (
        torch.repeat_interleave(p, torch.tensor([2, 0, 1]), 0, output_size=3)
        + p[torch.repeat_interleave(torch.tensor([2, 0, 1]), output_size=3)]
    ),
    "short window": lambda p: torch.view_as_real(
        torch.stft(p.view(24), 8, 2, 4, torch.ones(4), return_complex=True)
    ),
    "waves": lambda p: torch.istft(
        torch.view_as_complex(p.view(3, 4, 2)), 4, 2, 3, torch.ones(3), normalized=True, length=5
    ),
    "adaptive maximum": lambda p: (
        functional.adaptive_max_pool2d(p.view(1, 3, 2, 4), (2, 3))
        * functional.adaptive_max_pool1d(p, 3, return_indices=True)[1][:, None]
    ),
    "weighted sizes": lambda p: functional.l1_loss(p, p.detach() + 1, weight=p.detach().abs()),
    "alignments": lambda p: functional.ctc_loss(
        p.view(4, 2, 3).log_softmax(-1),
        torch.tensor([[1, 1], [2, 0]]),
        (4, 3),
        (2, 1),
        reduction="none",
    ),
    "alignments of a row": lambda p: functional.ctc_loss(
        p.view(4, 2, 3), torch.tensor([1, 1, 2]), (2, 4), (2, 1), zero_infinity=True
    ),
    "rows of a range": lambda p: p[range(3), LABELS] + p[range(0, 3, 2)].sum() + p[:, range(3)],
    "copies by NumPy": lambda p: _changed(p, lambda y: y[np.arange(2)].mul_(2)),
    "constant masks": lambda p: (
        p[MASK, :3][:, LABELS > 0] + p.repeat_interleave(LABELS // 4, 0).sum() * int(LABELS.max())
    ),
    "items of constants": lambda p: _changed(p, _set_items),
    "array without gradient": lambda p: p * torch.asarray(p[:1]) + torch.asarray(2.0),
    "leaks of a range": lambda p: functional.rrelu(p, 0.2, 0.4),
    "question about dtypes": lambda p: p + torch.can_cast(torch.float32, torch.float64),
    "frozen for a while": lambda p: _frozen(p) + p,
    "rest": lambda p: functional.avg_pool2d(p.view(1, 3, 2, 4), 2, 3, 1, divisor_override=3),
}


class Operations(nn.Module):
    """Each operation over a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        parameters = (nn.Parameter(torch.randn(3, 8)) for _ in OPERATIONS)
        self.given = nn.ParameterList(parameters)

    def forward(self, x: Any) -> Any:
        return [make(p) for make, p in zip(OPERATIONS.values(), self.given, strict=True)]


def test_each_operation_has_the_value_and_the_gradient_of_torch() -> None:
    def loss(outputs: Any, targets: Any) -> Any:
        return sum((output * output.detach().cos()).sum() for output in outputs)

    torch.manual_seed(0)
    module = Operations()
    step = partita.torch.training_step(module, loss, sgd(module))
    ours = float(step((torch.zeros(1), torch.zeros(1))))
    optimizer = sgd(module)
    expected = loss(module(None), None)
    expected.backward()
    optimizer.step()
    assert ours == pytest.approx(float(expected.detach()), rel=1e-5)
    for name, index in zip(OPERATIONS, range(len(OPERATIONS)), strict=True):
        given = step.state_dict()[f"given.{index}"]
        torch.testing.assert_close(given, module.given[index].detach(), msg=name)


DRAWS: dict[str, Callable[[Any], Any]] = {
    "normal": lambda ones: torch.normal(2 * ones, 0.5 * ones),
    "normal of a number": lambda ones: torch.normal(2 * ones, 0.5),
    "normal of numbers": lambda ones: torch.normal(2.0, 0.5, ones.shape),
    "normal_": lambda ones: torch.empty_like(ones).normal_(2, std=0.5),
    "random_": lambda ones: torch.empty_like(ones).random_(3, 9),
    "random_ below": lambda ones: torch.empty_like(ones).random_(4),
    "exponential_": lambda ones: torch.empty_like(ones).exponential_(2),
    "cauchy_": lambda ones: torch.empty_like(ones).cauchy_(1, 0.5).clamp(-3, 3),
    "bernoulli_": lambda ones: torch.empty_like(ones).bernoulli_(0.8 * ones),
    "choices": lambda ones: torch.multinomial(
        ones.view(-1, 2) * torch.tensor([1.0, 3.0]), 2, True
    ).float(),
    "choices of others": lambda ones: torch.multinomial(
        ones.view(-1, 4)[:, :3] * torch.tensor([1.0, 2.0, 3.0]), 2
    ).float(),
    "trunc_normal_": lambda ones: nn.init.trunc_normal_(torch.empty_like(ones), 1, 0.5, 0.5, 2.0),
    "leaks": lambda ones: functional.rrelu(-ones, training=True),
    "gumbel": lambda ones: functional.gumbel_softmax(ones.view(-1, 2)),
}


class Draws(nn.Module):
    """Buffers with random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        for index in range(len(DRAWS)):
            self.register_buffer(f"drawn{index}", torch.zeros(1))

    def forward(self, x: Any) -> Any:
        for index, draw in enumerate(DRAWS.values()):
            setattr(self, f"drawn{index}", draw(torch.ones(20_000)).flatten())
        return self.weight.sum()


def test_random_numbers_have_the_distribution_of_torch() -> None:
    torch.manual_seed(0)
    module = Draws()
    step = partita.torch.training_step(module, None, sgd(module))
    step(torch.zeros(1))
    first = step.state_dict()
    step(torch.zeros(1))
    second = step.state_dict()
    module(None)
    parts = torch.tensor([0.07, 0.3, 0.7, 0.93])
    for index, name in enumerate(DRAWS):
        ours = first[f"drawn{index}"]
        theirs = getattr(module, f"drawn{index}")
        assert not torch.equal(ours, second[f"drawn{index}"]), name
        assert ours.frac().any() == theirs.frac().any(), name
        for statistic in (torch.mean, torch.std, lambda x: torch.quantile(x, parts)):
            torch.testing.assert_close(
                statistic(ours), statistic(theirs), rtol=0.05, atol=0.05, msg=name
            )


class Choices(nn.Module):
    """The class that each row of equal weights draws."""

    def __init__(self, replacement: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.replacement = replacement
        self.register_buffer("drawn", torch.zeros(64, 1))

    def forward(self, x: Any) -> Any:
        self.drawn = torch.multinomial(torch.ones(64, 2), 1, self.replacement).float()
        return self.weight.sum()


@pytest.mark.parametrize("replacement", [False, True])
def test_each_row_draws_classes_of_its_own(replacement: bool) -> None:
    module = Choices(replacement)
    step = partita.torch.training_step(module, None, sgd(module))
    step(torch.zeros(1))
    assert 0.2 < float(step.state_dict()["drawn"].mean()) < 0.8


def test_a_submodule_of_two_names_is_the_users_own_afterwards() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12))
    module.again = module[0]
    before = list(module.parameters())
    step = partita.torch.training_step(module, functional.cross_entropy, sgd(module))
    ours = [float(step(batch)) for batch in batches()]
    assert all(x is y for x, y in zip(before, module.parameters(), strict=True))
    np.testing.assert_allclose(ours, trained_by_torch(module, sgd(module), batches()), rtol=1e-5)
    assert_equal_states(step.state_dict(), module)


class Recurrent(nn.Module):
    """Recurrent layers of all kinds, with given and learned first states."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 8, num_layers=2, proj_size=3, bidirectional=True)
        self.gru = nn.GRU(6, 5, batch_first=True, bias=False)
        self.rnn = nn.RNN(5, CLASSES, num_layers=2, nonlinearity="relu", batch_first=True)
        self.start = nn.Parameter(torch.zeros(4, 1, 3))

    def forward(self, x: Any) -> Any:
        hidden = self.start.expand(-1, x.shape[0], -1).contiguous()
        inputs = x.reshape(-1, 3, 4).transpose(0, 1)
        states, _ = self.lstm(inputs, (hidden, torch.ones(4, x.shape[0], 8)))
        states, _ = self.gru(states.transpose(0, 1))
        _, last = self.rnn(states)
        return last[-1] + last[0]


def test_recurrent_layers_are_loops_with_the_losses_of_torch() -> None:
    torch.manual_seed(0)
    module = Recurrent()
    step = partita.torch.training_step(module, functional.cross_entropy, sgd(module))
    data = batches()
    assert_trains_as_torch(step, module, data)
    graph = partita.capture_program(step.function, args=step.arguments(data[0])).graph
    forward = [
        loop for loop in graph.loops if graph.instructions[loop.instruction].phase == "forward"
    ]
    assert [loop.trips for loop in forward] == [3] * 7


def test_operators_are_named_by_module_path() -> None:
    torch.manual_seed(0)
    module = Tied()
    step = partita.torch.training_step(module, functional.cross_entropy, sgd(module))
    plan = step.plan_for(batches(1)[0], machine="h100:8")
    names = {name.partition(":")[0] for name in plan.choices}
    assert {"blocks.0.up", "blocks.0.down", "blocks.1.up", "frozen", "head", "loss"} <= names
    assert plan.graph == "Tied"


def test_a_module_on_the_meta_device_is_planned_without_memory() -> None:
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(12, 2**20), nn.ReLU(), nn.Linear(2**20, CLASSES))
        batch = (torch.empty(16, 12), torch.empty(16, dtype=torch.int64))
    optimizer = torch.optim.AdamW(module.parameters())
    step = partita.torch.parallelize(module, functional.cross_entropy, optimizer)
    plan = step.plan_for(batch, machine="h100:8")
    assert plan.devices == 8
    with pytest.raises(partita.PartitaError, match="on the meta device"):
        step(batches(1)[0])


def test_dropout_differs_by_step_and_seed_and_not_by_devices() -> None:
    def losses(seed: int, devices: int) -> list[float]:
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(12, 64), nn.Dropout(0.5), nn.Linear(64, CLASSES))
        optimizer = torch.optim.SGD(module.parameters(), 0.0)
        step = partita.torch.parallelize(
            module, functional.cross_entropy, optimizer, seed=seed, devices=devices
        )
        batch = batches(1)[0]
        result = [float(step(batch)) for _ in range(2)]
        module.eval()
        result += [float(step(batch)) for _ in range(2)]
        return result

    one = losses(0, 1)
    assert one[0] != one[1]
    assert one[2] == one[3]
    assert one[0] != losses(1, 1)[0]
    np.testing.assert_allclose(losses(0, 4), one, rtol=1e-5)


def test_a_module_may_return_its_loss_and_take_a_dict() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense = nn.Linear(12, CLASSES)

        def forward(self, features: Any, labels: Any) -> Any:
            return functional.cross_entropy(self.dense(features), labels)

    torch.manual_seed(0)
    module = Model()
    step = partita.torch.training_step(module, None, sgd(module))
    x, y = batches(1)[0]
    expected = float(module(x, y).detach())
    assert float(step({"features": x, "labels": y.numpy()})) == pytest.approx(expected, rel=1e-5)


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, CLASSES, dtype=torch.cfloat))

    def forward(self, x: Any) -> Any:
        return (x.to(torch.cfloat) @ self.weight).abs()


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(12, CLASSES)

    def forward(self, x: Any) -> Any:
        return self.dense(x if x.sum() > 0 else -x)


class Differentiated(Branches):
    def forward(self, x: Any) -> Any:
        y = self.dense(x)
        y.sum().backward()
        return y


class Detached(Branches):
    def forward(self, x: Any) -> Any:
        return self.dense(x).detach()


class Dilated(Branches):
    def forward(self, x: Any) -> Any:
        return functional.max_pool1d(self.dense(x), 2, stride=1, dilation=2)


class OwnBackward(Branches):
    def forward(self, x: Any) -> Any:
        class Clip(torch.autograd.Function):
            pass

        return Clip.apply(self.dense(x))


class Bags(Branches):
    def forward(self, x: Any) -> Any:
        words = torch.zeros(16, dtype=torch.long)
        return functional.embedding_bag(words, self.dense.weight.T, torch.arange(16))


class RowOfTensor(nn.Linear):
    """Changes a row of a tensor, which PyTorch selects as by a number."""

    def __init__(self) -> None:
        super().__init__(12, CLASSES)

    def forward(self, x: Any) -> Any:
        y = super().forward(x)
        y[torch.tensor(1), 2:].mul_(2)
        return y


class View(Branches):
    def forward(self, x: Any) -> Any:
        y = self.dense(x)
        y.view(-1)[0] = 1.0
        return y


class Reshaped(Branches):
    """Reads a view after a change of its tensor."""

    def forward(self, x: Any) -> Any:
        y = self.dense(x)
        view = y.view(-1)
        y *= 2
        return view


class DetachedBuffer(Branches):
    """Changes a buffer through a view of it, which the step would lose."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(CLASSES))

    def forward(self, x: Any) -> Any:
        y = self.dense(x)
        self.mean.detach().view(-1)[:2].copy_(y.detach().mean(0)[:2])
        return y


class Generated(Branches):
    def forward(self, x: Any) -> Any:
        return self.dense(x) * torch.rand(1, generator=torch.Generator())


class Mapped(Branches):
    def forward(self, x: Any) -> Any:
        return torch.vmap(lambda row: self.dense(row[None])[0])(x)


class Chosen(Branches):
    def forward(self, x: Any) -> Any:
        y = self.dense(x)
        return y[y[:, 0] > 0]


class ToNumpy(Branches):
    def forward(self, x: Any) -> Any:
        return torch.from_numpy(self.dense(x).detach().numpy())


REFUSED = {
    r"return y\[y.* Write torch.where": (Chosen, sgd),
    r"return torch.from_numpy.* Write torch.where": (ToNumpy, sgd),
    "changes a view in place": (View, sgd),
    "changes a view in place and then reads its tensor": (DetachedBuffer, sgd),
    "reads its tensor, or the reverse": (Reshaped, sgd),
    "Change the tensor itself by an index": (RowOfTensor, sgd),
    "bags of several lengths": (Bags, sgd),
    "draws from a generator": (Generated, sgd),
    "JAX's tensors have no torch.func": (Mapped, sgd),
    "running statistics of an instance": (
        lambda: nn.InstanceNorm1d(12, affine=True, track_running_stats=True),
        sgd,
    ),
    r"test_torch_step.py:\d+: return self.dense.* Write torch.where": (Branches, sgd),
    "custom backward of Clip": (OwnBackward, sgd),
    "computes gradients itself": (Differentiated, sgd),
    "depends on no parameter": (Detached, sgd),
    "fails in the loss or its gradient: NotImplementedError: VJP": (Dilated, sgd),
    r"fails in 0 \(Linear\) of float32 \[16, 12\]": (
        lambda: nn.Sequential(nn.Linear(13, CLASSES)),
        sgd,
    ),
    "has no counterpart in JAX. Remove": (
        lambda: nn.Sequential(nn.Embedding(9, CLASSES, scale_grad_by_freq=True)),
        sgd,
    ),
    "is quantized": (
        lambda: nn.Sequential(torch.ao.nn.quantized.dynamic.Linear(12, CLASSES)),
        lambda m: None,
    ),
    "half the bits": (lambda: perceptron().double(), sgd),
    "compiled by torch.compile": (lambda: torch.compile(perceptron()), sgd),
    "'Adadelta' has no": (perceptron, lambda m: torch.optim.Adadelta(m.parameters())),
    "'amsgrad'": (perceptron, lambda m: torch.optim.Adam(m.parameters(), amsgrad=True)),
    "lacks the parameter '3.weight'": (
        perceptron,
        lambda m: torch.optim.SGD(list(m.parameters())[:4], 0.1),
    ),
    "is not of the module": (
        perceptron,
        lambda m: torch.optim.SGD([*m.parameters(), nn.Parameter(torch.ones(3))], 0.1),
    ),
    "one value per channel": (
        lambda: nn.Sequential(nn.Flatten(0), nn.Unflatten(0, (1, -1)), nn.BatchNorm1d(16 * 12)),
        sgd,
    ),
    "'Adam' takes the parts of complex": (Complex, lambda m: torch.optim.Adam(m.parameters())),
    "A str is no optimizer": (perceptron, lambda m: "adam"),
    "no parameter that requires a gradient": (
        lambda: perceptron().requires_grad_(False),
        lambda m: torch.optim.SGD([torch.zeros(1)], 0.1),
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_module_or_optimizer_that_differs_in_jax_is_refused_in_a_sentence(message: str) -> None:
    make_module, make_optimizer = REFUSED[message]
    module = make_module()
    with pytest.raises(partita.PartitaError, match=message):
        step = partita.torch.parallelize(module, functional.cross_entropy, make_optimizer(module))
        step(batches(1)[0])


def test_a_loss_and_a_norm_that_are_none_are_refused_in_a_sentence() -> None:
    module = perceptron()
    with pytest.raises(partita.PartitaError, match="The loss is 'mse': give a function"):
        partita.torch.training_step(module, "mse", sgd(module))
    with pytest.raises(partita.PartitaError, match="clip_norm is '1': give a positive number"):
        partita.torch.training_step(module, None, sgd(module), clip_norm="1")
    with pytest.raises(partita.PartitaError, match="seed is 'a': give a whole number"):
        partita.torch.training_step(module, None, sgd(module), seed="a")


@pytest.mark.parametrize(
    ("loss", "kind"),
    [
        (lambda outputs, targets: outputs.argmax(), "int32"),
        (lambda outputs, targets: torch.complex(outputs, outputs).sum(), "complex64"),
    ],
)
def test_a_loss_that_is_no_real_number_is_refused(loss: Any, kind: str) -> None:
    module = perceptron()
    step = partita.torch.training_step(module, loss, sgd(module))
    with pytest.raises(partita.PartitaError, match=f"a number of {kind}, which has no gradient"):
        step(batches(1)[0])


@pytest.mark.parametrize(
    ("batch", "sentence"),
    [
        ("abc", "The batch contains a str: give tensors"),
        ((["a"], torch.zeros(1)), "The batch contains a str: give tensors"),
        ((np.array(["a"]), torch.zeros(1)), "The batch contains an array of <U1: give tensors"),
        ((torch.zeros(2, 2).to_sparse(), torch.zeros(1)), "A tensor is sparse"),
        ((torch.ones(3, 12), torch.full((3,), 2**40)), "whole number 1,099,511,627,776"),
        ((torch.zeros(0, 12), torch.zeros(0, dtype=torch.long)), "The batch is empty"),
        ((torch.ones(3, 12), torch.ones(3, 1, dtype=torch.long)), r"need classes of \[3\]"),
    ],
)
def test_a_batch_of_other_things_than_numbers_is_refused(batch: Any, sentence: str) -> None:
    module = perceptron()
    step = partita.torch.training_step(module, functional.cross_entropy, sgd(module))
    with pytest.raises(partita.PartitaError, match=sentence):
        step(batch)


def test_inputs_and_targets_may_be_two_arguments() -> None:
    inputs, targets = torch.ones(3, 12), torch.zeros(3, dtype=torch.long)
    losses = []
    for batch in ([(inputs, targets)], [inputs, targets]):
        torch.manual_seed(0)
        module = perceptron()
        step = partita.torch.training_step(module, functional.cross_entropy, sgd(module))
        losses.append(float(step(*batch)))
    assert losses[0] == losses[1]
    with pytest.raises(partita.PartitaError, match="this one has 3 parts"):
        step(inputs, inputs, targets)


def test_a_class_or_word_out_of_range_has_no_loss() -> None:
    module = nn.Sequential(nn.Embedding(4, CLASSES), nn.Flatten(0, 1))
    step = partita.torch.training_step(module, functional.cross_entropy, sgd(module))
    known = torch.tensor([[1]])
    assert np.isfinite(float(step((known, torch.tensor([2])))))
    for word, label in ((1, CLASSES), (1, -1), (4, 2), (-1, 2)):
        module = nn.Sequential(nn.Embedding(4, CLASSES), nn.Flatten(0, 1))
        step = partita.torch.training_step(module, functional.cross_entropy, sgd(module))
        assert np.isnan(float(step((torch.tensor([[word]]), torch.tensor([label])))))


def test_moves_between_devices_have_no_effect() -> None:
    class Moving(Branches):
        def forward(self, x: Any) -> Any:
            return self.dense(x.cpu().to("cpu", torch.float32)).to(x.device)

    module = Moving()
    step = partita.torch.training_step(module, functional.cross_entropy, sgd(module))
    assert_trains_as_torch(step, module, batches())


class Scaled(Branches):
    scale: Any

    def __init__(self) -> None:
        super().__init__()
        self.scale = 1.0

    def forward(self, x: Any) -> Any:
        return self.dense(x) * self.scale


def test_attributes_that_change_between_steps_count() -> None:
    module = Scaled()
    step = partita.torch.training_step(module, functional.cross_entropy, sgd(module))
    losses = []
    batch = batches(1)[0]
    for scale in (1.0, 3.0):
        module.scale = scale
        module.load_state_dict(step.state_dict())
        expected = float(functional.cross_entropy(module(batch[0]), batch[1]).detach())
        losses.append((float(step(batch)), expected))
    np.testing.assert_allclose(*zip(*losses, strict=True), rtol=1e-5)


class Configured(Branches):
    """Reads attributes of many kinds, one of which it makes anew in each pass."""

    def __init__(self) -> None:
        super().__init__()
        self.factors = {"scales": [1.0]}
        self.shift = torch.zeros(1)
        self.act = torch.relu

    def forward(self, x: Any) -> Any:
        self.hidden = self.act(self.dense(x)) * self.factors["scales"][0] + self.shift
        return self.hidden + getattr(self, "more", 0.0)


class ScaledLoss(nn.Module):
    scale = 1.0

    def forward(self, outputs: Any, targets: Any) -> Any:
        return self.scale * functional.cross_entropy(outputs, targets)


CHANGES: dict[str, Callable[[Any, Any], None]] = {
    "nothing": lambda module, loss: None,
    "dict": lambda module, loss: module.factors["scales"].__setitem__(0, 2.0),
    "tensor": lambda module, loss: module.shift.add_(torch.arange(CLASSES)[:1] + 1.0),
    "new": lambda module, loss: setattr(module, "more", torch.arange(CLASSES) / 4),
    "function": lambda module, loss: setattr(module, "act", torch.tanh),
    "hook": lambda module, loss: module.dense.register_forward_hook(lambda m, i, y: 2 * y),
    "forward": lambda module, loss: setattr(module.dense, "forward", lambda x: x[:, :CLASSES]),
    "loss": lambda module, loss: setattr(loss, "scale", 3.0),
}


def test_attributes_of_all_kinds_count() -> None:
    torch.manual_seed(0)
    module = Configured()
    loss = ScaledLoss()
    step = partita.torch.training_step(module, loss, torch.optim.SGD(module.parameters(), 0.0))
    x, y = batches(1)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for name, change in CHANGES.items():
            change(module, loss)
            outputs = module(x).detach()
            if name != "forward":  # which leaves no parameter to the loss
                expected = float(loss(outputs, y))
                assert float(step((x, y))) == pytest.approx(expected, rel=1e-5), name
            torch.testing.assert_close(step.predict(x), outputs, rtol=1e-5, atol=1e-5, msg=name)
            module.dense.__dict__.pop("forward", None)
    programs = step._run._cache_size()
    step((x, y))
    assert step._run._cache_size() == programs


def test_buffers_that_change_after_the_step_is_made_are_named() -> None:
    module = perceptron()
    step = partita.torch.training_step(module, functional.cross_entropy, sgd(module))
    module[1].running_mean.fill_(1.0)
    with pytest.warns(UserWarning, match=r"Call step\.load_state_dict"):
        step(batches(1)[0])


class Counting(Scaled):
    def forward(self, x: Any) -> Any:
        self.scale += 1
        return super().forward(x)


def test_attributes_that_the_forward_pass_changes_are_named() -> None:
    module = Counting()
    step = partita.torch.training_step(module, functional.cross_entropy, sgd(module))
    batch = batches(1)[0]
    with pytest.warns(UserWarning, match="The forward pass changes scale"):
        step(batch)
    step(batch)
    assert step._run._cache_size() == 1


class Remembering(Branches):
    def __init__(self) -> None:
        super().__init__()
        self.last = None

    def forward(self, x: Any) -> Any:
        y = self.dense(x)
        y = y if self.last is None else y + self.last
        self.last = y.detach()
        return y


class Showing(Branches):
    """Only writes its attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.last = None

    def forward(self, x: Any) -> Any:
        self.last = self.dense(x)
        return self.last


class Doubling(Branches):
    def forward(self, x: Any) -> Any:
        return self.dense(x.mul_(2))


class Throwing(Branches):
    def forward(self, x: Any) -> Any:
        return self.dense(x) * random.random()


class Sampling(Branches):
    def forward(self, x: Any) -> Any:
        return self.dense(x) * np.random.rand()


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (Remembering, "The forward pass changes last"),
        (Doubling, "changes its inputs in place"),
        (Throwing, r"draws random numbers .* Use torch\.rand"),
        (Sampling, r"draws random numbers .* Use torch\.rand"),
    ],
)
def test_effects_that_are_not_repeated_are_named(make: Any, sentence: str) -> None:
    module = make()
    step = partita.torch.training_step(module, functional.cross_entropy, sgd(module))
    with pytest.warns(UserWarning, match=sentence):
        step(batches(1)[0])


def test_an_attribute_that_is_only_written_is_not_named() -> None:
    module = Showing()
    step = partita.torch.training_step(module, functional.cross_entropy, sgd(module))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(batches(1)[0])


def test_weights_that_change_after_the_step_is_made_are_named() -> None:
    module = perceptron()
    step = partita.torch.training_step(module, functional.cross_entropy, sgd(module))
    batch = batches(1)[0]
    step(batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module.load_state_dict(step.state_dict())
        step(batch)
        step.load_state_dict(module.state_dict())
        step(batch)
    nn.init.zeros_(module[0].weight)
    with pytest.warns(UserWarning, match=r"Call step\.load_state_dict"):
        step(batch)
    module[0].weight.requires_grad_(False)
    with pytest.raises(partita.PartitaError, match="Make a new step"):
        step(batch)


def test_a_submodule_that_is_replaced_after_the_step_is_made_is_named() -> None:
    module = perceptron()
    step = partita.torch.training_step(module, functional.cross_entropy, sgd(module))
    module[3] = nn.Linear(24, CLASSES)
    with pytest.warns(UserWarning, match=r"Call step\.load_state_dict"):
        step(batches(1)[0])


@pytest.mark.parametrize("rate", ["a", float("nan"), None])
def test_a_learning_rate_that_is_none_is_refused(rate: Any) -> None:
    module = perceptron()
    optimizer = sgd(module)
    step = partita.torch.training_step(module, functional.cross_entropy, optimizer)
    optimizer.param_groups[0]["lr"] = rate
    with pytest.raises(partita.PartitaError, match="give a finite number"):
        step(batches(1)[0])


class Flagged(Branches):
    """Reads which values require a gradient, and computes by it."""

    def forward(self, x: Any) -> Any:
        y = self.dense(x)
        with torch.no_grad():
            z = y * 1.0
        flags = [t.requires_grad for t in (x, y, self.dense.weight, y.view(-1), y + x[:, :1])]
        flags += [t.requires_grad for t in (y.detach(), z, y.argmax(), torch.ones_like(y))]
        return y * (1.0 + sum(flag * 2**place for place, flag in enumerate(flags)) / 64)


def test_values_that_require_a_gradient_are_those_of_torch() -> None:
    module = Flagged()
    step = partita.torch.training_step(module, functional.cross_entropy, sgd(module))
    assert_trains_as_torch(step, module, batches())


def test_a_state_of_another_module_is_refused_in_a_sentence() -> None:
    module = perceptron()
    step = partita.torch.training_step(module, functional.cross_entropy, sgd(module))
    with pytest.raises(partita.PartitaError, match=r"does not fit 'Sequential': .*0\.weight"):
        step.load_state_dict({})


class Auxiliary(Branches):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(12, CLASSES)

    def forward(self, x: Any) -> Any:
        return self.dense(x) + (self.other(x) if self.training else 0)


def test_parameters_without_a_gradient_keep_their_momentum() -> None:
    torch.manual_seed(0)
    module = Auxiliary()
    data = batches()
    results = []
    for run in ("ours", "theirs"):
        optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9)
        step = partita.torch.training_step(module, functional.cross_entropy, optimizer)
        losses = []
        for index, batch in enumerate([*data, *data]):
            module.train(index % 3 != 1)
            one = [batch]
            losses += (
                [float(step(batch))] if run == "ours" else trained_by_torch(module, optimizer, one)
            )
        results.append(losses)
    np.testing.assert_allclose(*results, rtol=1e-5)


def test_complex_weights_move_as_in_torch() -> None:
    torch.manual_seed(0)
    module = Complex()
    step = partita.torch.training_step(module, functional.cross_entropy, sgd(module))
    assert_trains_as_torch(step, module, batches())


def test_predictions_in_bfloat16_are_tensors() -> None:
    module = nn.Linear(12, CLASSES).bfloat16()
    step = partita.torch.training_step(module, functional.cross_entropy, sgd(module))
    x = batches(1)[0][0].bfloat16()
    torch.testing.assert_close(step.predict(x), module(x).detach())


class Ordered(Branches):
    """Goes through its arguments, each of which has a weight of its own."""

    def forward(self, **parts: Any) -> Any:
        return self.dense(torch.cat([*parts.values()], 1))


def test_dicts_keep_their_order() -> None:
    def loss(outputs: Any, targets: Any) -> Any:
        first, second = targets.values()
        return functional.mse_loss(outputs, first) + outputs.mul(second).sum()

    module = Ordered()
    step = partita.torch.training_step(module, loss, sgd(module))
    inputs = {"b": torch.rand(4, 5), "a": torch.rand(4, 7)}
    targets = {2: torch.rand(4, CLASSES), 1: torch.rand(4, CLASSES)}
    expected = float(loss(module(**inputs), targets).detach())
    assert float(step((inputs, targets))) == pytest.approx(expected, rel=1e-5)


def test_a_loss_may_read_the_module() -> None:
    """Its weights, from the module and a list; and tensors from elsewhere, which may change."""
    torch.manual_seed(0)
    module = perceptron()
    parameters = list(module.parameters())
    scales = {"one": torch.ones(CLASSES)}

    def loss(outputs: Any, targets: Any) -> Any:
        sizes = sum(p.square().sum() for p in module.parameters()) + parameters[0].norm()
        again = module(torch.arange(24.0).reshape(2, 12).cos())
        weighed = functional.cross_entropy(outputs, targets, scales["one"])
        return weighed + sizes / 9 + again.square().mean()

    def change(number: int) -> None:
        if number == 1:
            scales["one"][2] = 3.0
        if number == 2:
            scales["one"] = torch.arange(CLASSES) + 1.0

    data = batches()
    step = partita.torch.training_step(module, loss, sgd(module))
    ours = []
    for number, batch in enumerate(data):
        change(number)
        ours.append(float(step(batch)))
    state = step.state_dict()
    scales["one"] = torch.ones(CLASSES)
    optimizer = sgd(module)
    for number, (x, y) in enumerate(data):
        change(number)
        optimizer.zero_grad()
        expected = loss(module(x), y)
        expected.backward()
        optimizer.step()
        assert ours[number] == pytest.approx(float(expected.detach()), rel=1e-4)
    assert_equal_states(state, module)


class Caching(Branches):
    """Makes a buffer, an attribute and an item of a dict when they are first read."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", None, persistent=False)
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))
        self.rows: dict[int, Any] = {}

    def forward(self, x: Any) -> Any:
        self.passes = self.passes / 2 + 1
        if self.mask is None:
            self.mask = torch.arange(CLASSES) / 9
        if not hasattr(self, "places"):
            self.places = torch.arange(CLASSES).cos()
        if len(x) not in self.rows:
            self.rows[len(x)] = torch.ones(len(x), 1)
        return self.dense(x) * self.mask + self.places * self.rows[len(x)]


def test_caches_of_the_forward_pass_are_made_in_each_program() -> None:
    module = Caching()
    step = partita.torch.training_step(module, functional.cross_entropy, sgd(module))
    (x, y), *_ = batches()
    with pytest.warns(UserWarning, match="makes the buffers mask, which the step makes anew"):
        step((x, y))
    step((x[:4], y[:4]))
    predicted = step.predict(x[:2])
    state = step.state_dict()
    assert state["passes"] == 1.5
    assert (module.mask, module.rows, hasattr(module, "places")) == (None, {}, False)
    module.load_state_dict(state)
    torch.testing.assert_close(predicted, module(x[:2]).detach(), rtol=1e-5, atol=1e-5)


LEFT: list[Any] = []


class Leaving(Branches):
    def forward(self, x: Any) -> Any:
        LEFT.append(self.dense(x))
        return LEFT[0].mean(0) + LEFT[-1]


def test_a_tensor_of_an_earlier_pass_is_named() -> None:
    module = Leaving()
    step = partita.torch.training_step(module, functional.cross_entropy, sgd(module))
    (x, y), *_ = batches()
    step((x, y))
    with pytest.raises(partita.PartitaError, match="reads a tensor that an earlier pass left"):
        step((x[:4], y[:4]))


class Several(NamedTuple):
    logits: Any
    parts: dict[str, Any]


@dataclass(frozen=True)
class Held:
    several: Several
    normal: Any
    constant: Any
    name: str = "held"


class Structured(Branches):
    def forward(self, x: Any) -> Held:
        y = self.dense(x)
        several = Several(y, {"b": y + 1, "a": None})
        return Held(several, torch.distributions.Normal(y, 1.0), torch.ones(2))


def test_predictions_have_the_structure_of_the_outputs() -> None:
    module = Structured()
    step = partita.torch.training_step(module, lambda y, t: y.several.logits.sum(), sgd(module))
    x = batches(1)[0][0]
    for _ in range(2):
        held = step.predict(x)
        expected = module(x)
        assert list(held.several.parts) == ["b", "a"]
        assert (held.several.parts["a"], held.name) == (None, "held")
        torch.testing.assert_close(held.several.logits, expected.several.logits.detach())
        torch.testing.assert_close(held.normal.mean, held.several.parts["b"] - 1)
        assert held.constant.tolist() == [1, 1]


def test_a_step_leaves_the_memory_of_batches_to_torch() -> None:
    module = perceptron()
    partita.torch.training_step(module, functional.cross_entropy, sgd(module))
    assert not torch.accelerator.is_available()
    wrapped = nn.DataParallel(module)
    with pytest.raises(partita.PartitaError, match="Give the module inside it"):
        partita.torch.training_step(wrapped, functional.cross_entropy, sgd(module))


class Bounded(Branches):
    def forward(self, x: Any) -> Any:
        with torch.no_grad():
            self.dense.weight.clamp_(-0.1, 0.1)
        return self.dense(x)


def test_parameters_that_the_forward_pass_changes_stay_changed() -> None:
    torch.manual_seed(0)
    module = Bounded()
    step = partita.torch.training_step(module, functional.cross_entropy, sgd(module))
    assert_trains_as_torch(step, module, batches())


def test_a_module_given_to_parallelize_names_the_way() -> None:
    with pytest.raises(partita.PartitaError, match=r"partita\.torch\.parallelize"):
        partita.parallelize(perceptron())


def test_autocast_and_hooks_that_have_no_effect_are_named() -> None:
    class Hooked(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 4)
            self.layer.register_full_backward_hook(lambda *arguments: None)
            self.layer.weight.register_hook(lambda gradient: gradient * 0)

        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.layer(x)

    module = Hooked()
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    optimizer.register_step_post_hook(lambda *arguments: None)
    with pytest.warns(UserWarning) as warned:
        step = partita.torch.training_step(module, torch.nn.MSELoss(), optimizer)
        step((torch.ones(8, 4), torch.ones(8, 4)))
    told = {str(warning.message)[:40] for warning in warned}
    assert {
        "torch.autocast has no effect on the step",
        "The backward hook of 'layer' is not call",
        "The hook of 'layer.weight' is not called",
        "A hook of the optimizer is not called: J",
    } <= told


def test_settings_are_read_again_only_after_a_change() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.1))
    settings = Settings(module, None)
    first = settings.key()
    assert settings.key() is first
    module.eval()
    other = settings.key()
    assert other != first
    module.train()
    assert settings.key() is first
    for change in (
        lambda: setattr(module[1], "p", 0.2),
        lambda: module.append(torch.nn.ReLU()),
        lambda: module[0].register_forward_hook(lambda *args: None),
        lambda: setattr(module, "rows", [1, {"a": torch.zeros(1)}]),
        lambda: module.rows[1]["a"].add_(1),
        lambda: module.rows[1].update(b=2),
    ):
        before = settings.key()
        change()
        assert settings.key() != before


def test_a_recurrent_network_changes_nothing_of_its_module() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cells = nn.GRU(2, CLASSES, batch_first=True)

        def forward(self, x: Any) -> Any:
            return self.cells(x)[0][:, -1]

    module = Last()
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    step = partita.torch.training_step(module, functional.mse_loss, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        step((torch.ones(4, 3, 2), torch.ones(4, CLASSES)))
