"""The PyTorch side of `benchmarks.gan_step`: StyleGAN2 on the parameters of jkd, its penalties, and its step."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

Params = Mapping[str, torch.Tensor]
MODULATION = ("scaled", "grouped")  # activations are scaled by styles, or every image has weights of its own


def load(arrays: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Trainable tensors of arrays by path; kernels of convolutions become [outputs, inputs, height, width]."""
    turned = {
        name: x.transpose(3, 2, 0, 1) if name.endswith("kernel") and x.ndim == 4 else x for name, x in arrays.items()
    }
    return {name: torch.tensor(np.ascontiguousarray(x)).requires_grad_() for name, x in turned.items()}


def activate(x: torch.Tensor) -> torch.Tensor:
    """The leaky ReLU that keeps the second moment."""
    return F.leaky_relu(x, 0.2) * math.sqrt(2)


def dense(p: Params, name: str, x: torch.Tensor, rate: float = 1.0) -> torch.Tensor:
    """A layer whose weights are scaled when they are used."""
    kernel = p[f"{name}/kernel"]
    return torch.addmm(p[f"{name}/bias"] * rate, x, kernel * (rate / math.sqrt(len(kernel))))


class Filter(torch.autograd.Function):
    """The filter [1, 3, 3, 1] / 8 along both axes of each channel; its gradient is its transpose, again and again.

    PyTorch's own second derivatives of such convolutions take twenty times as long.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, stride: int, padding: int, transposed: bool) -> torch.Tensor:
        """Zero padding; a stride halves, or where transposed doubles, the size."""
        ctx.options = stride, padding, not transposed
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        kernel = torch.outer(taps, taps).expand(x.shape[1], 1, 4, 4)
        fn = F.conv_transpose2d if transposed else F.conv2d
        return fn(x, kernel, stride=stride, padding=padding, groups=x.shape[1])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        """The transpose."""
        return Filter.apply(grad, *ctx.options), None, None, None


def blur(x: torch.Tensor, padding: int, stride: int = 1) -> torch.Tensor:
    """The filter over maps padded with zeros."""
    return Filter.apply(x, stride, padding, False)


def upsample(x: torch.Tensor) -> torch.Tensor:
    """Twice the size, by the same filter."""
    return 4 * Filter.apply(x, 2, 1, True)


def convolve(x: torch.Tensor, w: torch.Tensor, resample: str = "none", groups: int = 1) -> torch.Tensor:
    """A 3x3 or 1x1 convolution to the same, twice or half the size."""
    if resample == "up":  # w: [groups * outputs, inputs, 3, 3]
        grouped = w.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1).flip((2, 3))
        return blur(F.conv_transpose2d(x, 4 * grouped, stride=2, groups=groups), 1)
    if resample == "down" and w.shape[-1] == 1:
        return F.conv2d(blur(x, 1, stride=2), w)
    if resample == "down":
        return F.conv2d(blur(x, 2), w, stride=2)
    return F.conv2d(x, w, padding=w.shape[-1] // 2, groups=groups)


def styled(
    p: Params, name: str, x: torch.Tensor, style: torch.Tensor, form: str, resample: str = "none"
) -> torch.Tensor:
    """A modulated convolution; a layer without noise makes colors, and is not demodulated."""
    w = p[f"{name}/kernel"]
    w = w / math.sqrt(w[0].numel())
    s = dense(p, f"{name}/affine", style)
    strength = p.get(f"{name}/noise_strength")
    scale = None if strength is None else torch.rsqrt(s.square() @ w.square().sum((2, 3)).t() + 1e-8)
    if form == "grouped":
        own = w[None] * s[:, None, :, None, None]
        own = own if scale is None else own * scale[:, :, None, None, None]
        y = convolve(x.reshape(1, -1, *x.shape[2:]), own.flatten(0, 1), resample, len(x))
        y = y.reshape(len(x), -1, *y.shape[2:])
    else:
        y = convolve(x * s[:, :, None, None], w, resample)
        y = y if scale is None else y * scale[:, :, None, None]
    if strength is None:
        return y + p[f"{name}/bias"][:, None, None]
    noise = torch.randn(len(y), 1, *y.shape[2:])
    return activate(y + strength * noise + p[f"{name}/bias"][:, None, None])


def mapping(p: Params, latents: torch.Tensor, layers: int) -> torch.Tensor:
    """Styles [batch, style_dim]."""
    x = latents * torch.rsqrt(latents.square().mean(1, keepdim=True) + 1e-8)
    for i in range(layers):
        x = activate(dense(p, f"mapper/dense{i}", x, 0.01))
    return x


def synthesize(p: Params, styles: torch.Tensor, resolution: int, form: str, last: bool) -> torch.Tensor:
    """Images of styles [batch, layers, style_dim]; `last`: channels last."""
    layer = {name.split("/")[1]: f"synthesis/{name.split('/')[1]}" for name in p if name.startswith("synthesis/")}
    x = p["synthesis/constant"].permute(2, 0, 1)[None].expand(len(styles), -1, -1, -1)
    x = x.contiguous(memory_format=torch.channels_last) if last else x.contiguous()
    image: Any = 0
    for level in range(2, resolution.bit_length()):
        size, first = 2**level, 2 * level - 5
        if size > 4:
            x = styled(p, layer[f"up{size}"], x, styles[:, first], form, "up")
            image = upsample(image)
        x = styled(p, layer[f"conv{size}"], x, styles[:, first + 1], form)
        image = image + styled(p, layer[f"to_rgb{size}"], x, styles[:, first + 2], form)
    return image


def conv(p: Params, name: str, x: torch.Tensor, resample: str = "none") -> torch.Tensor:
    """A convolution of the discriminator; one without a bias is a shortcut, and linear."""
    w, bias = p[f"trunk/{name}/kernel"], p.get(f"trunk/{name}/bias")
    y = convolve(x, w / math.sqrt(w[0].numel()), resample)
    return y if bias is None else activate(y + bias[:, None, None])


def judge(p: Params, images: torch.Tensor, group: int = 4) -> torch.Tensor:
    """Logits of images."""
    size = images.shape[-1]
    x = conv(p, f"from_rgb{size}", images)
    while size > 4:
        y = conv(p, f"down{size}", conv(p, f"conv{size}", x), "down")
        x = (y + conv(p, f"shortcut{size}", x, "down")) * math.sqrt(0.5)
        size //= 2
    groups = x.reshape(-1, group, *x.shape[1:])
    deviation = (groups.var(1, unbiased=False) + 1e-8).sqrt().mean((1, 2, 3)).repeat_interleave(group)
    x = torch.cat((x, deviation[:, None, None, None].expand(-1, 1, 4, 4)), 1)
    x = conv(p, "conv4", x).permute(0, 2, 3, 1).flatten(1)
    return dense(p, "logits", activate(dense(p, "trunk/dense", x)))[:, 0]


def r1(d_fn: Callable, images: torch.Tensor) -> torch.Tensor:
    """The mean squared norm of the logits' gradients, itself differentiable."""
    images = images.detach().requires_grad_()
    (slopes,) = torch.autograd.grad(d_fn(images).sum(), images, create_graph=True)
    return slopes.square().sum((1, 2, 3)).mean()


def path_length(
    g_fn: Callable, styles: torch.Tensor, mean: torch.Tensor, decay: float, y: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The penalty and the new mean of lengths; y: by default drawn."""
    images = g_fn(styles)
    y = torch.randn_like(images) / math.sqrt(images.shape[2] * images.shape[3]) if y is None else y
    (pulled,) = torch.autograd.grad((images * y).sum(), styles, create_graph=True)
    lengths = pulled.square().sum(2).mean(1).sqrt()
    moved = mean + decay * (lengths.mean() - mean)
    return (lengths - moved).square().mean(), moved.detach()


class Step:
    """Both updates, with their penalties where they are due."""

    def __init__(
        self, generator: Any, discriminator: Any, layers: int, rules: Any, *, form: str, last: bool, compiled: bool
    ):
        self.g, self.d, self.rules, self.layers = load(generator), load(discriminator), rules, layers
        self.average = [x.detach().clone() for x in self.g.values()]
        self.form, self.last = form, last
        self.mean, self.latent_dim = torch.zeros(()), len(self.g["mapper/dense0/kernel"])
        wrap = torch.compile if compiled else lambda fn: fn
        self.d_loss, self.g_loss = wrap(self._d_loss), wrap(self._g_loss)
        self.plain_images = wrap(lambda z: self.images(self.styles(z)))
        self.d_optimizer, self.g_optimizer = (
            self._adam(params, every) for params, every in ((self.d, rules.penalty_every), (self.g, rules.path_every))
        )

    def _adam(self, params: Params, every: int) -> torch.optim.Optimizer:
        c, rules = every / (every + 1), self.rules
        betas = rules.beta1**c, rules.beta2**c
        return torch.optim.Adam(params.values(), rules.lr * c, betas, rules.eps, fused=True)

    def styles(self, latents: torch.Tensor) -> torch.Tensor:
        """One a layer."""
        found = mapping(self.g, latents, self.layers)
        return found[:, None].expand(-1, 2 * (self.rules.resolution.bit_length() - 1) - 2, -1)

    def images(self, styles: torch.Tensor) -> torch.Tensor:
        """Of styles."""
        return synthesize(self.g, styles, self.rules.resolution, self.form, self.last)

    def _d_loss(self, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
        return F.softplus(-judge(self.d, real)).mean() + F.softplus(judge(self.d, fake)).mean()

    def _g_loss(self, latents: torch.Tensor) -> torch.Tensor:
        return F.softplus(-judge(self.d, self.images(self.styles(latents)))).mean()

    def _update(self, loss: torch.Tensor, params: Params, optimizer: torch.optim.Optimizer) -> None:
        for x, grad in zip(
            params.values(), torch.autograd.grad(loss, tuple(params.values()), allow_unused=True), strict=True
        ):
            x.grad = torch.zeros_like(x) if grad is None else grad
        optimizer.step()

    def __call__(self, real: torch.Tensor, with_r1: bool, with_path: bool) -> torch.Tensor:
        """One step on real images; the sum of both losses."""
        rules, draw = self.rules, lambda count: torch.randn(count, self.latent_dim)
        with torch.no_grad():
            fake = self.plain_images(draw(len(real)))
        d_loss = self.d_loss(real, fake)
        self._update(d_loss, self.d, self.d_optimizer)
        if with_r1:
            penalty = r1(lambda x: judge(self.d, x), real)
            self._update(rules.penalty_every * rules.penalty_weight * penalty, self.d, self.d_optimizer)
        g_loss = self.g_loss(draw(len(real)))
        self._update(g_loss, self.g, self.g_optimizer)
        if with_path:
            styles = self.styles(draw(len(real) // rules.path_shrink))
            penalty, self.mean = path_length(self.images, styles, self.mean, rules.path_decay)
            self._update(rules.path_every * rules.path_weight * penalty, self.g, self.g_optimizer)
        torch._foreach_lerp_(self.average, [x.detach() for x in self.g.values()], 1 - rules.decay)
        return d_loss.detach() + g_loss.detach()
