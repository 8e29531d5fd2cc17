"""The vision tower of Qwen2.5-VL: pictures of any size to tokens for the language model.

The patches of all pictures come as one packed sequence, in blocks of merge x merge neighbours. Most blocks of the
network attend inside square windows, a few over the whole picture; windows are made adjacent once, at the start, and
put back at the end. RMSNorm before each part, 2-D rotary positions, SwiGLU with biases; a merger turns every merge x
merge patches into one token.

Shapes: P patches of all pictures, D width, H heads, K head_dim, W segments, L the length of the longest.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blip3o.config import VisionConfig
from blip3o.layers import RMSNorm, attention, rope, rope_table, swiglu


@dataclass(frozen=True)
class Segments:
    """Runs of the packed sequence that attend to themselves, as a padded batch.

    Segments of one length are a mere view of the sequence; `index` and `mask` are None then.
    """

    count: int
    longest: int
    index: Tensor | None  # [W, L] the patch in each place; 0 where there is none
    mask: Tensor | None  # [W, L] bool: is there a patch

    @staticmethod
    def of_lengths(lengths: Tensor) -> "Segments":
        """Segments that follow each other; lengths [W] int64."""
        count, longest = len(lengths), int(lengths.max())
        if bool((lengths == longest).all()):
            return Segments(count, longest, None, None)
        place = torch.arange(longest, device=lengths.device)
        mask = place < lengths[:, None]
        index = (lengths.cumsum(0) - lengths)[:, None] + place
        return Segments(count, longest, index.masked_fill(~mask, 0), mask)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query, key, value [P, H, K] -> [P, H, K]: attention inside each segment."""
        query_w, key_w, value_w = (self._split(x).transpose(1, 2) for x in (query, key, value))  # each [W, H, L, K]
        mask = None if self.mask is None else self.mask[:, None, None]
        mixed = attention(query_w, key_w, value_w, attn_mask=mask).transpose(1, 2)  # [W, L, H, K]
        return mixed.reshape(query.shape) if self.mask is None else mixed[self.mask]

    def _split(self, x: Tensor) -> Tensor:
        return x.view(self.count, self.longest, *x.shape[1:]) if self.index is None else x[self.index]


class VisionAttention(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, segments: Segments) -> Tensor:
        patches, width = x.shape
        qkv = self.qkv(x).view(patches, 3 * self.num_heads, -1).transpose(0, 1)  # [3H, P, K]
        turning, value = qkv.split([2 * self.num_heads, self.num_heads])
        query, key = rope(turning.unsqueeze(0), cos, sin).squeeze(0).transpose(0, 1).chunk(2, dim=1)
        mixed = segments.attend(query, key, value.transpose(0, 1))
        return self.out(mixed.reshape(patches, width))


class VisionMlp(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.width, 2 * config.mlp_width)  # gate, then up
        self.down = nn.Linear(config.mlp_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(swiglu(self.gate_up(x)))


class VisionBlock(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width, config.eps)
        self.attention = VisionAttention(config)
        self.mlp_norm = RMSNorm(config.width, config.eps)
        self.mlp = VisionMlp(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, segments: Segments) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, segments)
        return x + self.mlp(self.mlp_norm(x))


class VisionMerger(nn.Module):
    """merge x merge patches, side by side -> one token of the language model's width."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.merged = config.merge_size**2 * config.width
        self.norm = RMSNorm(config.width, config.eps)
        self.up = nn.Linear(self.merged, self.merged)
        self.down = nn.Linear(self.merged, config.out_width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(self.norm(x).view(-1, self.merged))))


class QwenVision(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_in = nn.Linear(config.patch_values, config.width, bias=False)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.merger = VisionMerger(config)
        self.init_weights()

    def init_weights(self) -> None:
        """weight                     distribution
        every nn.Linear              N(0, 0.02^2), bias 0
        attention.out, mlp.down      N(0, 0.02^2 / (2 depth)), bias 0
        norms                        1
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
        for module in self.modules():
            if isinstance(module, VisionAttention | VisionMlp):
                added = module.out if isinstance(module, VisionAttention) else module.down
                nn.init.normal_(added.weight, std=0.02 * (2 * self.config.depth) ** -0.5)

    def forward(self, patches: Tensor, grids: Sequence[tuple[int, int, int]]) -> Tensor:
        """patches [P, 3 frames patch^2] and grids -> tokens [P / merge^2, out_width], all pictures in order.

        A patch is (channel, frame, row, column); patches run over the rows and columns of blocks of merge x merge
        neighbours, and inside a block over its rows and columns: what Qwen2.5-VL's image processor yields.
        grids   (frames, rows, columns) of each picture in patches; a still picture has 1 frame
        """
        config = self.config
        merge = config.merge_size
        expected = sum(frames * rows * columns for frames, rows, columns in grids)
        if patches.shape != (expected, config.patch_values):
            raise ValueError(f"patches must be [{expected}, {config.patch_values}], got {list(patches.shape)}")
        for grid in grids:
            if min(grid) < 1 or grid[1] % merge or grid[2] % merge:
                raise ValueError(
                    f"grids must have rows and columns that are multiples of merge_size {merge}, got {grid}"
                )

        device = patches.device
        order, window_lengths = window_order(grids, merge, config.window_size // (merge * config.patch_size))
        order = order.to(device)  # [P / merge^2]
        windows = Segments.of_lengths(window_lengths.to(device) * merge**2)
        frames = [rows * columns for count, rows, columns in grids for _ in range(count)]
        pictures = Segments.of_lengths(torch.tensor(frames, device=device))

        x = self._reorder(self.patch_in(patches), order)
        head_dim = config.width // config.num_heads
        positions = self._reorder(patch_positions(grids, merge).to(device), order)  # [P, 2]
        cos, sin = (t.flatten(1) for t in rope_table(positions, head_dim // 2, config.rope_theta))  # [P, K/2]
        for index, block in enumerate(self.blocks):
            x = block(x, cos, sin, pictures if index in config.full_attention_blocks else windows)
        tokens = self.merger(x)
        return torch.empty_like(tokens).index_copy(0, order, tokens)

    def _reorder(self, x: Tensor, order: Tensor) -> Tensor:
        """Rows of x [P, ...] with its blocks of merge^2 rows in that order."""
        return x.view(-1, self.config.merge_size**2, x.shape[-1])[order].view(x.shape)


def patch_positions(grids: Sequence[tuple[int, int, int]], merge: int) -> Tensor:
    """(row, column) of every patch [P, 2], int64, in the order of the packed sequence."""
    positions = []
    for frames, rows, columns in grids:
        both = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
        blocks = both.view(rows // merge, merge, columns // merge, merge, 2).transpose(1, 2)
        positions.append(blocks.reshape(-1, 2).repeat(frames, 1))
    return torch.cat(positions)


def window_order(grids: Sequence[tuple[int, int, int]], merge: int, window: int) -> tuple[Tensor, Tensor]:
    """The order that makes windows of window x window merged tokens adjacent, and their lengths.

    Returns (order [P / merge^2], lengths [W]), int64. Windows at the right and lower edges may be smaller.
    """
    order, lengths, start = [], [], 0
    for frames, rows, columns in grids:
        height, width = rows // merge, columns // merge
        tokens = torch.arange(start, start + frames * height * width).view(frames, height, width)
        start += tokens.numel()
        for frame in tokens:
            for strip in frame.split(window):
                for part in strip.split(window, dim=1):
                    order.append(part.flatten())
                    lengths.append(part.numel())
    return torch.cat(order), torch.tensor(lengths)
