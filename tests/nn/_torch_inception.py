"""Inception v3 of PyTorch, with the names of its public weights, in the widths of a model of jkd."""

import torch
import torch.nn.functional as F
from torch.nn import Module


class Basic(Module):
    def __init__(self, inputs, outputs, size, stride=1, padding=0):
        super().__init__()
        self.conv = torch.nn.Conv2d(inputs, outputs, size, stride, padding, bias=False)
        self.bn = torch.nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


def pooled(x, pool):
    if pool == "max":
        return F.max_pool2d(x, 3, 1, 1)
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=pool == "mean")


class A(Module):
    def __init__(self, inputs, w, pool):
        super().__init__()
        self.pool = pool
        self.branch1x1 = Basic(inputs, w[0], 1)
        self.branch5x5_1, self.branch5x5_2 = Basic(inputs, w[1], 1), Basic(w[1], w[2], 5, 1, 2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Basic(inputs, w[3], 1), Basic(w[3], w[4], 3, 1, 1)
        self.branch3x3dbl_3, self.branch_pool = Basic(w[4], w[5], 3, 1, 1), Basic(inputs, w[6], 1)
        self.outputs = w[0] + w[2] + w[5] + w[6]

    def forward(self, x):
        five = self.branch5x5_2(self.branch5x5_1(x))
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, double, self.branch_pool(pooled(x, self.pool))], 1)


class B(Module):
    def __init__(self, inputs, w, _):
        super().__init__()
        self.branch3x3 = Basic(inputs, w[0], 3, 2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Basic(inputs, w[1], 1), Basic(w[1], w[2], 3, 1, 1)
        self.branch3x3dbl_3 = Basic(w[2], w[3], 3, 2)
        self.outputs = w[0] + w[3] + inputs

    def forward(self, x):
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, 2)], 1)


class C(Module):
    def __init__(self, inputs, w, pool):
        super().__init__()
        self.pool, row, column = pool, ((1, 7), 1, (0, 3)), ((7, 1), 1, (3, 0))
        self.branch1x1 = Basic(inputs, w[0], 1)
        self.branch7x7_1, self.branch7x7_2 = Basic(inputs, w[1], 1), Basic(w[1], w[2], *row)
        self.branch7x7_3 = Basic(w[2], w[3], *column)
        self.branch7x7dbl_1, self.branch7x7dbl_2 = Basic(inputs, w[4], 1), Basic(w[4], w[5], *column)
        self.branch7x7dbl_3, self.branch7x7dbl_4 = Basic(w[5], w[6], *row), Basic(w[6], w[7], *column)
        self.branch7x7dbl_5, self.branch_pool = Basic(w[7], w[8], *row), Basic(inputs, w[9], 1)
        self.outputs = w[0] + w[3] + w[8] + w[9]

    def forward(self, x):
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(pooled(x, self.pool))], 1)


class D(Module):
    def __init__(self, inputs, w, _):
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = Basic(inputs, w[0], 1), Basic(w[0], w[1], 3, 2)
        self.branch7x7x3_1, self.branch7x7x3_2 = Basic(inputs, w[2], 1), Basic(w[2], w[3], (1, 7), 1, (0, 3))
        self.branch7x7x3_3, self.branch7x7x3_4 = Basic(w[3], w[4], (7, 1), 1, (3, 0)), Basic(w[4], w[5], 3, 2)
        self.outputs = w[1] + w[5] + inputs

    def forward(self, x):
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), seven, F.max_pool2d(x, 3, 2)], 1)


class E(Module):
    def __init__(self, inputs, w, pool):
        super().__init__()
        self.pool, row, column = pool, ((1, 3), 1, (0, 1)), ((3, 1), 1, (1, 0))
        self.branch1x1, self.branch3x3_1 = Basic(inputs, w[0], 1), Basic(inputs, w[1], 1)
        self.branch3x3_2a, self.branch3x3_2b = Basic(w[1], w[2], *row), Basic(w[1], w[3], *column)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Basic(inputs, w[4], 1), Basic(w[4], w[5], 3, 1, 1)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = Basic(w[5], w[6], *row), Basic(w[5], w[7], *column)
        self.branch_pool = Basic(inputs, w[8], 1)
        self.outputs = w[0] + w[2] + w[3] + w[6] + w[7] + w[8]

    def forward(self, x):
        y, z = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        parts = [self.branch1x1(x), self.branch3x3_2a(y), self.branch3x3_2b(y)]
        parts += [self.branch3x3dbl_3a(z), self.branch3x3dbl_3b(z), self.branch_pool(pooled(x, self.pool))]
        return torch.cat(parts, 1)


class Inception(Module):
    def __init__(self, model):
        super().__init__()
        first, second, third, fourth, inputs = model.stem_widths
        self.Conv2d_1a_3x3, self.Conv2d_2a_3x3 = Basic(3, first, 3, 2), Basic(first, second, 3)
        self.Conv2d_2b_3x3, self.Conv2d_3b_1x1 = Basic(second, third, 3, 1, 1), Basic(third, fourth, 1)
        self.Conv2d_4a_3x3 = Basic(fourth, inputs, 3)
        self.order = []
        names = ("5b", "5c", "5d"), ("6a", "6b", "6c", "6d", "6e"), ("7a", "7b", "7c")
        for block, kinds, units in zip(names, ((A, A), (B, C), (D, E)), model.widths, strict=True):
            for u, (name, widths) in enumerate(zip(block, units, strict=False)):
                pool = ("max" if name == "7c" else "inner_mean") if model.fid else "mean"
                unit = kinds[u > 0](inputs, widths, pool)
                self.add_module(f"Mixed_{name}", unit)
                self.order.append(unit)
                inputs = unit.outputs
        self.fc = torch.nn.Linear(inputs, model.num_classes)

    def forward(self, x):
        x = F.max_pool2d(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))), 3, 2)
        x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, 2)
        for unit in self.order:
            x = unit(x)
        x = x.mean((2, 3))
        return self.fc(x), x
