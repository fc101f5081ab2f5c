"""Writes the goldens: what PyTorch makes of small problems, in float64 from float32 inputs.

    python3 -m venv venv && venv/bin/pip install -r requirements.txt && venv/bin/python make_goldens.py

One file an op; the options of its cases are in the file's metadata, as JSON.
"""

import itertools
import json
import math
import pathlib

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

HERE = pathlib.Path(__file__).parent


def total_of(loss, head_weights):
    """The weighted sum over heads; under `none`, of all rows."""
    per_head = loss.reshape(len(head_weights), -1).sum(-1)
    return (torch.tensor(head_weights, dtype=loss.dtype) * per_head).sum()


def with_margins(logits, labels, ignore_index, scale, angular, cosine):
    """ArcFace's margin and CosFace's, on each row's own class, in the words of the former's code."""
    if (angular, cosine) == (0.0, 0.0):
        return logits
    cosines = logits / scale
    angles = torch.acos(cosines)
    far = angles > math.pi - angular
    other = torch.where(far, cosines - angular * math.sin(angular), torch.cos(angles + angular))
    own = F.one_hot(labels.clamp(0, logits.shape[-1] - 1), logits.shape[-1]).bool()
    counts = labels != ignore_index
    return scale * torch.where(own & counts[:, None], other - cosine, cosines)


def cosine_cross_entropy():
    tensors, cases = {}, []
    grid = itertools.product(
        [1, 3],  # heads
        [(5, 3, 4, 4), (7, 9, 6, 3), (1, 8, 1, 1), (33, 17, 40, 37)],  # rows, dim, classes, active
        ["mean", "sum", "none"],
        [(0.0, -100, 0.0), (0.1, 1, 0.3)],  # smoothing, ignore_index, share of rows ignored
    )
    for number, (heads, (rows, dim, classes, active), reduction, rest) in enumerate(grid):
        smoothing, ignore_index, ignored = rest
        margins = [(0.0, 0.0), (0.5, 0.0), (0.3, 0.2)][number // 3 % 3]  # angular, cosine
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(heads, rows, dim, generator=generator)
        w = torch.randn(heads, classes, dim, generator=generator)
        if number % 3 == 0:
            x[0, 0] = 0  # a zero row has a gradient of 1e12 times its upstream
        y = torch.randint(0, active, (rows,), generator=generator)
        y[torch.rand(rows, generator=generator) < ignored] = ignore_index
        if (y == ignore_index).all():
            y[0] = 0 if ignore_index != 0 else 1
        scale = [16.0, 1.0, 30.0][number % 3]
        head_weights = [[1.0, 1.0, 1.0], [0.5, -1.0, 2.0]][number % 2][:heads]
        xd, wd = x.double().requires_grad_(), w.double().requires_grad_()
        scales = torch.full((heads, 1, 1), scale, dtype=torch.float64).requires_grad_()
        logits = scales * F.normalize(xd, dim=-1) @ F.normalize(wd, dim=-1).transpose(1, 2)
        logits = logits[:, :, :active]
        seen = with_margins(logits, y, ignore_index, scales, *margins)
        loss = torch.stack(
            [
                F.cross_entropy(
                    z, y, reduction=reduction, label_smoothing=smoothing, ignore_index=ignore_index
                )
                for z in seen
            ]
        )
        if (y == ignore_index).all():
            continue  # torch's mean is NaN there, ours is 0
        total = total_of(loss, head_weights)
        total.backward()
        prefix = f"{len(cases):02}."
        tensors |= {
            prefix + "embeddings": x,
            prefix + "weights": w,
            prefix + "labels": y,
            prefix + "loss": loss.detach(),
            prefix + "total": total.detach().reshape(1),
            prefix + "lse": seen.detach().logsumexp(-1),
            prefix + "grad_embeddings": xd.grad,
            prefix + "grad_weights": wd.grad,
            prefix + "grad_scale": scales.grad.flatten(),
        }
        cases.append(
            dict(
                scale=scale,
                active=active,
                reduction=reduction,
                label_smoothing=smoothing,
                ignore_index=ignore_index,
                head_weights=head_weights,
                angular=margins[0],
                cosine=margins[1],
            )
        )
    write("cosine_cross_entropy", tensors, cases)


def class_means():
    tensors, cases = {}, []
    for number, (heads, rows, dim, active) in enumerate([(1, 4, 3, 2), (3, 50, 7, 6), (2, 9, 1, 9)]):
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(heads, rows, dim, generator=generator)
        w = torch.randn(heads, active + 1, dim, generator=generator)
        y = torch.randint(0, active, (rows,), generator=generator)
        means = w.double().clone()
        for k in range(active):  # the loop of the prototype replacement
            if (y == k).any():
                means[:, k] = x.double()[:, y == k].mean(1)
        prefix = f"{number:02}."
        tensors |= {
            prefix + "embeddings": x,
            prefix + "weights": w,
            prefix + "labels": y,
            prefix + "means": means,
        }
        cases.append(dict(active=active))
    write("class_means", tensors, cases)


def reconstruction():
    tensors, cases = {}, []
    for number, (rows, dim) in enumerate([(1, 1), (6, 5), (40, 33)]):
        generator = torch.Generator().manual_seed(number)
        parts = [torch.randn(rows, dim, generator=generator) for _ in range(3)]
        whole, first, second = (p.double().requires_grad_() for p in parts)
        unit = [F.normalize(v, dim=-1) for v in (whole, first + second)]
        loss = 1 - (unit[0] * unit[1]).sum(-1).mean()
        loss.backward()
        prefix = f"{number:02}."
        tensors |= {prefix + n: p for n, p in zip(["whole", "first", "second"], parts)}
        tensors |= {
            prefix + "loss": loss.detach().reshape(1),
            prefix + "grad_whole": whole.grad,
            prefix + "grad_part": first.grad,
        }
        cases.append({})
    write("reconstruction", tensors, cases)


def write(op, tensors, cases):
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, HERE / f"{op}.safetensors", {"cases": json.dumps(cases), "torch": torch.__version__})
    print(op, len(cases), "cases")


if __name__ == "__main__":
    cosine_cross_entropy()
    class_means()
    reconstruction()
