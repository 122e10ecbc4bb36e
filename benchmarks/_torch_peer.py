"""The PyTorch side of `benchmarks.distill_step`: the pair's ResNets under the protocol's names, and their step."""

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F


def conv_norm(inputs: int, outputs: int, size: int, stride: int = 1) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A convolution without bias, and batch normalization."""
    conv = torch.nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
    return conv, torch.nn.BatchNorm2d(outputs)


class Unit(torch.nn.Module):
    """A basic residual unit."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = conv_norm(inputs, outputs, 3, stride)
        self.conv2, self.bn2 = conv_norm(outputs, outputs, 3)
        same = stride == 1 and inputs == outputs
        self.downsample = None if same else torch.nn.Sequential(*conv_norm(inputs, outputs, 1, stride))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See the class."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(torch.nn.Module):
    """The CIFAR family of `jkd.nn.ResNet`."""

    def __init__(self, units: tuple[int, ...], widths: tuple[int, ...], num_classes: int):
        super().__init__()
        inputs = widths[0]
        self.conv1, self.bn1 = conv_norm(3, inputs, 3)
        for b, (count, width) in enumerate(zip(units, widths[1:], strict=True), start=1):
            layers = []
            for u in range(count):
                layers.append(Unit(inputs, width, 2 if b > 1 and u == 0 else 1))
                inputs = width
            setattr(self, f"layer{b}", torch.nn.Sequential(*layers))
        self.fc = torch.nn.Linear(inputs, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See the class."""
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.fc(x.mean((2, 3)))


def load(model: Any, state_dict: dict[str, np.ndarray], device: str) -> ResNet:
    """The same network as the jkd `model`, with weights of `jkd.interop.torch.to_torch`, channels last."""
    net = ResNet(model.units, model.widths, model.num_classes)
    net.load_state_dict({name: torch.tensor(array) for name, array in state_dict.items()}, strict=False)
    return net.to(device, memory_format=torch.channels_last)


def make_step(
    teacher: ResNet,
    student: ResNet,
    optimizer: torch.optim.Optimizer,
    temperature: float,
    *,
    compiled: bool,
    narrow: bool,
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]:
    """`step(images, labels, teacher_logits or None) -> loss`: cross-entropy and KD, backward, SGD.

    Args:
      teacher: in evaluation mode.
      student: in training mode.
      optimizer: of the student.
      temperature: of KD.
      compiled: by `torch.compile`: the teacher with frozen weights, the student with its loss.
      narrow: convolutions in bfloat16, by autocast.
    """
    kind = next(student.parameters()).device.type
    cast = (lambda: torch.autocast(kind, torch.bfloat16)) if narrow else contextlib.nullcontext

    def loss_fn(images: torch.Tensor, labels: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
        with cast():
            logits = student(images)
        logits = logits.float()
        softened = F.log_softmax(logits / temperature, 1), F.log_softmax(told / temperature, 1)
        kd = F.kl_div(*softened, reduction="batchmean", log_target=True)
        return F.cross_entropy(logits, labels) + temperature**2 * kd

    def teach(images: torch.Tensor) -> torch.Tensor:
        with cast():
            return teacher(images).float()

    if compiled:
        loss_fn, teach = torch.compile(loss_fn), torch.compile(teach)

    def step(images: torch.Tensor, labels: torch.Tensor, told: torch.Tensor | None = None) -> torch.Tensor:
        if told is None:
            with torch.no_grad():
                told = teach(images)
        loss = loss_fn(images, labels, told)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step
