"""Small models of every shape that the engine has to take apart, and the calls that tests make of them."""

import warnings
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache

import torch
from intelligent_vram.vram import LimitTooSmall, SwapConfig, attach
from torch import nn
from torch.nn.utils import parametrizations

WIDTH = 32
TOKENS = 6


class Block(nn.Module):
    """Attention without heads and a feed-forward part, with a small parameter of the block's own."""

    def __init__(self, width=WIDTH):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width, bias=False)
        self.ffn = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.modulation = nn.Parameter(torch.randn(2, width) * 0.1)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x) * (1 + self.modulation[0])).chunk(3, dim=-1)
        x = x + self.out(torch.softmax(q @ k.transpose(-1, -2) / 8, dim=-1) @ v)
        return x + self.ffn(x + self.modulation[1])


class Transformer(nn.Module):
    """Blocks in a list, something before them and something behind."""

    def __init__(self, block=Block, count=5):
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(block() for _ in range(count))
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class TwoLists(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.double_blocks = nn.ModuleList(Block() for _ in range(2))
        self.single_blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x):
        x = self.embed(x)
        for block in self.double_blocks:
            x = block(x)
        for block in self.single_blocks:
            x = x + torch.tanh(block(x))
        return x


class Vace(Transformer):
    """The second list is computed between the blocks of the first."""

    def __init__(self):
        super().__init__(count=4)
        self.vace_blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x):
        x = self.embed(x)
        hints = [block(x) for block in self.vace_blocks]
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index % 2 == 0:
                x = x + hints[index // 2]
        return self.head(x)


class Nested(nn.Module):
    """The block list lies two modules down."""

    def __init__(self):
        super().__init__()
        self.model = nn.Module()
        self.model.decoder = nn.Module()
        self.model.decoder.layers = nn.ModuleList(Block() for _ in range(3))
        self.model.scale = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x):
        for layer in self.model.decoder.layers:
            x = layer(x)
        return x * self.model.scale


class Tied(Transformer):
    """One weight is shared by the embedding and the head, one by two blocks, one by a block and the embedding."""

    def __init__(self):
        super().__init__()
        self.head.weight = self.embed.weight
        self.blocks[0].ffn[0].weight = self.blocks[3].ffn[0].weight
        self.blocks[1].out.weight = self.embed.weight


class Twice(Transformer):
    """Every block is used twice in a forward, one block object is in the list twice."""

    def __init__(self):
        super().__init__(count=3)
        self.blocks.append(self.blocks[0])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        for block in self.blocks:
            x = block(x)
        return x


class AnyOrder(Transformer):
    def forward(self, x, order=(4, 3, 2, 1, 0)):
        for index in order:
            x = self.blocks[index](x)
        return self.head(x)


class Skipping(Transformer):
    """Forwards in which blocks are left out, as skip-layer guidance and step caches do."""

    def forward(self, x, skip=()):
        for index, block in enumerate(self.blocks):
            if index not in skip:
                x = block(x)
        return x


class BufferBlock(nn.Module):
    """Persistent and other buffers of several dtypes beside the weights."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("mask", torch.rand(TOKENS, WIDTH) > 0.3)
        self.register_buffer("shift", torch.randn(WIDTH), persistent=False)
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("nothing", None)
        self.register_buffer("turn", torch.polar(torch.ones(WIDTH), torch.randn(WIDTH)), persistent=False)

    def forward(self, x):
        turned = x * self.turn.real.to(x.dtype) + self.turn.imag.to(x.dtype)
        return torch.where(self.mask, self.linear(turned) + self.shift, x / self.count)


class AttentionBlock(nn.Module):
    """`nn.MultiheadAttention` uses the weight of its child `out_proj` without calling the child."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + self.linear(self.attention(x, x, x, need_weights=False)[0])


class InnerGate(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(3 * WIDTH, WIDTH) * 0.1)
        self.up = nn.Linear(WIDTH, 3 * WIDTH)
        self.down = nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)) + x @ self.table.t()) + x @ self.table.t() @ self.table


class OwnTableBlock(nn.Module):
    """A large parameter of the block's own is in use while its children compute, and theirs while theirs do."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(5 * WIDTH, WIDTH) * 0.1)
        self.first = InnerGate()
        self.second = InnerGate()

    def forward(self, x):
        before = x @ self.table.t()
        x = self.second(self.first(x))
        return x + before @ self.table + x @ self.table.t() @ self.table


class ParametrizedBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.normed = parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))
        self.turned = parametrizations.orthogonal(nn.Linear(WIDTH, WIDTH, bias=False))
        self.plain = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + self.plain(self.normed(x)) + self.turned(x)


class ConvBlock(nn.Module):
    """Weights whose strides are not row-major: channels last, and transposed."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1).to(memory_format=torch.channels_last)
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.linear.weight = nn.Parameter(torch.randn(WIDTH, WIDTH).t())

    def forward(self, x):
        image = self.linear(x).reshape(x.shape[0], 4, TOKENS, WIDTH // 4)
        return x + self.conv(image).reshape(x.shape)


class MixedBlock(nn.Module):
    """Weights of several dtypes in one block."""

    def __init__(self):
        super().__init__()
        self.low = nn.Linear(WIDTH, WIDTH, dtype=torch.bfloat16)
        self.high = nn.Linear(WIDTH, WIDTH)
        self.odd = nn.Parameter(torch.randint(-9, 9, (WIDTH + 1,), dtype=torch.int8), requires_grad=False)

    def forward(self, x):
        scaled = x * (1 + self.odd[:WIDTH].to(x.dtype) / 64)
        return x + self.low(scaled.bfloat16()).to(x.dtype) + self.high(scaled.float()).to(x.dtype)


class Dictionaries(Transformer):
    """Blocks that take and return nested containers and keyword arguments."""

    def forward(self, x, *, context=None):
        state = {"x": self.embed(x), "history": []}
        for block in self.blocks:
            state["x"] = block(x=state["x"])
            state["history"].append(state["x"].mean())
        return self.head(state["x"]) + torch.stack(state["history"]).sum() + (0 if context is None else context["add"])


class ListBlock(nn.Module):
    """Weights in containers that nobody calls."""

    def __init__(self):
        super().__init__()
        self.tables = nn.ParameterList(nn.Parameter(torch.randn(WIDTH, WIDTH) * 0.1) for _ in range(2))
        self.named = nn.ParameterDict({"shift": nn.Parameter(torch.randn(WIDTH, WIDTH) * 0.1)})
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.linear(x @ self.tables[0] @ self.tables[1]) + x @ self.named["shift"]


class HookedBlock(nn.Module):
    """A weight that a hook computes before the layer's forward, as torch's first weight norm does."""

    def __init__(self):
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            self.normed = nn.utils.weight_norm(nn.Linear(WIDTH, WIDTH))
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + self.linear(self.normed(x))


class RecurrentBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, WIDTH)
        self.recurrent = nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def forward(self, x):
        return x + self.recurrent(x)[0] + self.embedding(torch.arange(TOKENS))


@dataclass(frozen=True)
class Case:
    """A model and the keyword arguments of the forwards that a test makes of it, one after another."""

    build: Callable[[], nn.Module]
    calls: tuple[dict, ...] = field(default=({},) * 4)


CASES = {
    "blocks in a list": Case(Transformer),
    "two lists": Case(TwoLists),
    "a list between the blocks": Case(Vace),
    "a list two modules down": Case(Nested),
    "tied weights": Case(Tied),
    "blocks used twice": Case(Twice),
    "blocks in reverse": Case(AnyOrder),
    "blocks in changing order": Case(
        AnyOrder,
        ({"order": (0, 1, 2, 3, 4)}, {"order": (2, 0, 4)}, {"order": (1, 1, 3, 0, 2)}, {"order": (4, 2, 2, 0)}),
    ),
    "blocks that are skipped": Case(Skipping, ({}, {"skip": (1, 2)}, {"skip": (4,)}, {})),
    "buffers": Case(lambda: Transformer(BufferBlock)),
    "multi-head attention": Case(lambda: Transformer(AttentionBlock)),
    "tables around children": Case(lambda: Transformer(OwnTableBlock, 3)),
    "parametrized weights": Case(lambda: Transformer(ParametrizedBlock, 3)),
    "strides on purpose": Case(lambda: Transformer(ConvBlock)),
    "several dtypes": Case(lambda: Transformer(MixedBlock)),
    "nested arguments": Case(Dictionaries, ({}, {"context": {"add": 1.5}}, {}, {})),
}

STANDARD = {
    "parameter lists": Case(lambda: Transformer(ListBlock)),
    "weight norm by a hook": Case(lambda: Transformer(HookedBlock)),
    "recurrent layers": Case(lambda: Transformer(RecurrentBlock)),
    "encoder layers of torch": Case(
        lambda: Transformer(lambda: nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, batch_first=True))
    ),
}  # what torch.nn brings along


def build(name: str, dtype: torch.dtype | None = None) -> nn.Module:
    """The model of CASES called ``name``, the same numbers every time."""
    torch.manual_seed(zlib.crc32(name.encode()))
    model = {**CASES, **STANDARD}[name].build().eval()
    return model if dtype is None else model.to(dtype)


def inputs(dtype: torch.dtype = torch.float32, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, TOKENS, WIDTH, generator=torch.Generator().manual_seed(5)).to(dtype)


def outputs(model: nn.Module, calls: Iterable[dict], x: torch.Tensor) -> list[torch.Tensor]:
    """What ``model`` makes of ``x`` in one forward after another."""
    return [model(x, **call) for call in calls]


@cache
def wanted_outputs(name: str) -> list[torch.Tensor]:
    """What the forwards of a case give without the engine, in float32."""
    with torch.no_grad():
        return outputs(build(name), CASES[name].calls, inputs())


def weight_bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])


def fingerprint(model: nn.Module) -> dict:
    """What of a model must not change by attaching and detaching: the objects it is made of and where they are hung."""
    return {
        path: (
            type(module),
            tuple(module.__dict__),
            {name: id(tensor) for name, tensor in module._parameters.items()},
            {name: id(tensor) for name, tensor in module._buffers.items()},
            set(module._non_persistent_buffers_set),
            module.training,
        )
        for path, module in model.named_modules()
    }


def contents(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of all weights and buffers."""
    return {name: tensor.detach().clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def smallest_limit(model: nn.Module, **settings) -> int:
    """The least ``max_vram`` that the engine says it would take."""
    try:
        attach(model, SwapConfig(max_vram=1, **settings), "cpu")
    except LimitTooSmall as error:
        return error.needed
    raise AssertionError("a limit of one byte was accepted")


def limit_called(name: str, model: nn.Module, **settings) -> int | None:
    """A limit in bytes: "smallest", "half of the weights" beyond that, or "automatic"."""
    if name == "automatic":
        return None
    return smallest_limit(model, **settings) + (weight_bytes(model) // 2 if name == "half of the weights" else 0)


LIMITS = ("smallest", "half of the weights", "automatic")
