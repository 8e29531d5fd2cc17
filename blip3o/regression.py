"""The objective `mse`: the target in one pass, by mean squared error; what `flow.py` is to the objective `flow`.

The network is the same, and sees nothing: ones in the place of the noisy target, at the time of pure noise. What it says
is then a function of the condition alone, its best answer is the mean of all targets that the condition allows, and
every seed draws the same. Zeros would not do: with gates and last layer at 0 as well, no weight would ever move.
This file knows no network: it comes in as a function.

In the paper (arXiv 2505.09568) the loss is |X - W Q|^2, X the CLIP features and Q the hidden states at the queries;
see docs/decisions.md for why W is the diffusion transformer here.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from blip3o_kernels import flow_loss

Predict = Callable[[Tensor, Tensor], Tensor]


def regress(predict: Predict, like: Tensor) -> Tensor:
    """`predict(ones, sigma)`, sigma [B] all 1: the prediction [B, ...], in the shape, dtype and place of `like`."""
    sigma = torch.ones(len(like), device=like.device)
    return predict(torch.ones_like(like), sigma).to(like.dtype)  # autocast leaves it in bfloat16


def training_loss(predict: Predict, x: Tensor) -> Tensor:
    """Mean squared error of what is predicted for the targets x [B, ...]; a float32 scalar."""
    return flow_loss(regress(predict, x), x)
