"""Models in plain PyTorch, as people and libraries of vision models write them; all take one tensor."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 64


def matrix(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) * shape[-1] ** -0.5)


class Bare(nn.Module):
    """Every linear is another spelling; x [B, T, 64]."""

    def __init__(self) -> None:
        super().__init__()
        self.function, self.product, self.einsum = matrix(64, 64), matrix(64, 128), matrix(64, 128)
        self.addmm, self.left, self.bias = matrix(64, 64), matrix(64, 64), nn.Parameter(torch.zeros(64))

    def forward(self, x: Tensor) -> Tensor:
        x = x + F.linear(x, self.function, self.bias)
        x = F.gelu(x @ self.product)
        x = torch.einsum("btk,nk->btn", x, self.einsum)
        x = torch.addmm(self.bias, x.flatten(0, 1), self.addmm.t()).view_as(x)
        return (self.left @ x.mT).mT


class Attention(nn.Module):
    """torch's own attention, which takes the weights of its linears as arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.norm, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        return self.out(x)


class TorchTransformer(nn.Module):
    """torch's own encoder and decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Transformer(WIDTH, 4, 2, 2, 2 * WIDTH, batch_first=True, norm_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x, x[:, :5])


class Recurrent(nn.Module):
    """torch's own LSTM between two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.lstm(self.first(x))[0])


class Block(nn.Module):
    """LayerNorm, one fused projection, attention, and a perceptron: the block of most vision transformers."""

    def __init__(self, width: int = WIDTH, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, T, C)
        x = x + self.scale * self.proj(y)
        return x + self.mlp(self.norm2(x))


class Shared(nn.Module):
    """One block, run three times."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.block(x)
        return x


class Broken(nn.Module):
    """Three blocks, with a number taken out of the graph between them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
            if x.abs().max().item() > 1e4:
                x = x / 2
        return x


class Looped(nn.Module):
    """A mixture of experts as a loop, in which each expert takes what was routed to it."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 4)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.SiLU(), nn.Linear(2 * WIDTH, WIDTH))
            for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        weights, chosen = self.router(rows).softmax(-1).topk(2)
        y = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            row, slot = torch.where(chosen == e)
            if len(row):
                y.index_add_(0, row, expert(rows[row]) * weights[row, slot, None])
        return x + y.view_as(x)


class VisionTransformer(nn.Module):
    """x [B, 3, 32, 32] -> [B, 10]"""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 8, 8)
        self.token, self.positions = matrix(1, 1, WIDTH), matrix(1, 17, WIDTH)
        self.blocks = nn.Sequential(Block(), Block())
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


class Mixer(nn.Module):
    """Perceptrons across the patches, then across the features."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, 4)
        self.norm = nn.LayerNorm(WIDTH)
        self.tokens = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
        self.channels = nn.Sequential(nn.Linear(WIDTH, 128), nn.GELU(), nn.Linear(128, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT
        x = x + self.tokens(self.norm(x).mT).mT
        return (x + self.channels(self.norm(x))).mean(1)


class ConvNet(nn.Module):
    """Convolutions, with linears on the pooled features."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, WIDTH, 3, 2, 1), nn.BatchNorm2d(WIDTH), nn.ReLU())
        self.depthwise = nn.Conv2d(WIDTH, WIDTH, 7, padding=3, groups=WIDTH)
        self.squeeze, self.excite = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 128), nn.Linear(128, WIDTH)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x * self.excite(self.squeeze(x.mean((2, 3))).relu()).sigmoid()[:, :, None, None]
        y = self.depthwise(x).permute(0, 2, 3, 1)  # channels last, as ConvNeXt has it
        x = x + self.down(F.gelu(self.up(y))).permute(0, 3, 1, 2)
        return self.head(x.mean((2, 3)))


class SwinBlock(nn.Module):
    """Attention within shifted windows, and the merging of patches."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.block = nn.Conv2d(3, WIDTH, 4, 4), Block()
        self.merge = nn.Linear(4 * WIDTH, 2 * WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).permute(0, 2, 3, 1)
        B, H, W, C = x.shape
        x = torch.roll(x, (-2, -2), (1, 2)).view(B, H // 4, 4, W // 4, 4, C)
        x = self.block(x.permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, C))
        x = x.view(B, H // 4, W // 4, 4, 4, C).permute(0, 1, 3, 2, 4, 5).reshape(B, H, W, C)
        x = torch.cat([x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)], -1)
        return self.merge(x).flatten(1, 2)
