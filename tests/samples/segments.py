"""What torch's allocator on a CUDA device reserves, so that arithmetic can be held to it without one.

Its rules, as torch documents them: sizes are whole 512 bytes; up to 1 MiB they come from segments of
2 MiB, up to 10 MiB from segments of 20 MiB, above from segments of their own in whole 2 MiB; the
smallest free block that is large enough is taken, and cut if more than 1 MiB (512 bytes in small
segments) is left; neighbours that are free become one, segments never do.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sparsed.core import DTYPE_BYTES, ModelShape

MIB = 1 << 20


@dataclass(eq=False)
class Block:
    size: int
    small: bool
    before: Block | None = None
    after: Block | None = None
    free: bool = False


@dataclass
class Segments:
    """``reserved`` only grows, as nothing is given back while requests run."""

    reserved: int = 0
    held: int = 0
    peak_held: int = 0
    _free: list[Block] = field(default_factory=list)

    def take(self, num_bytes: int) -> Block:
        size = max(512, -(-num_bytes // 512) * 512)
        small = size <= MIB
        fitting = [one for one in self._free if one.small == small and one.size >= size]
        if fitting:
            block = min(fitting, key=lambda one: one.size)
            self._free.remove(block)
        else:
            block = Block(_segment(size), small)
            self.reserved += block.size
        if block.size - size >= (512 if small else MIB + 1):
            self._cut(block, size)
        block.free = False
        self.held += block.size
        self.peak_held = max(self.peak_held, self.held)
        return block

    def give(self, *blocks: Block) -> None:
        for block in blocks:
            assert not block.free
            self.held -= block.size
            block.free = True
            if block.after is not None and block.after.free:
                self._free.remove(block.after)
                _join(block)
            if block.before is not None and block.before.free:
                block = block.before
                _join(block)
            else:
                self._free.append(block)

    def _cut(self, block: Block, size: int) -> None:
        rest = Block(block.size - size, block.small, before=block, after=block.after, free=True)
        if block.after is not None:
            block.after.before = rest
        block.size, block.after = size, rest
        self._free.append(rest)


def _segment(size: int) -> int:
    if size <= MIB:
        return 2 * MIB
    return 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB


def _join(block: Block) -> None:
    """``block`` and the free one after it, which nobody lists any more."""
    assert block.after is not None
    block.size += block.after.size
    block.after = block.after.after
    if block.after is not None:
        block.after.before = block


@dataclass(frozen=True, kw_only=True)
class Chunks:
    """The tensors of prompt chunks as ``Decoder.forward`` and ``PrefillAttention`` make them, in
    their order; without the layer buffer, which is planned for elsewhere."""

    shape: ModelShape
    dtype: str
    piece_tokens: int  # of earlier tokens that attention reads at once

    def run(self, memory: Segments, *, num_tokens: int, context: int, layers: int = 3) -> None:
        shape, element, n = self.shape, DTYPE_BYTES[self.dtype], num_tokens
        slots = n * (shape.num_lanes + shape.num_kv_heads) * 4
        before, kept = memory.take(slots), memory.take(slots)
        memory.give(before)
        hidden = memory.take(n * shape.hidden_size * element)
        angles = [memory.take(n * shape.head_dim * 4) for _ in range(4)]
        tables = [memory.take(n * shape.head_dim * element) for _ in range(2)]
        memory.give(*angles)
        for _ in range(layers):
            self._layer(memory, n, context)
        memory.give(hidden, kept, *tables)

    def _layer(self, memory: Segments, n: int, context: int) -> None:
        shape, element = self.shape, DTYPE_BYTES[self.dtype]
        normed = memory.take(n * shape.hidden_size * element)
        heads = shape.num_heads + 2 * shape.num_kv_heads
        qkv = memory.take(n * heads * shape.head_dim * element)
        memory.give(normed)
        outputs = [memory.take(n * self._q_size * element) for _ in range(2)]
        self._attend(memory, n, context)
        memory.give(qkv, *outputs)
        normed = memory.take(n * shape.hidden_size * element)
        gate_up = memory.take(n * 2 * shape.intermediate_size * element)
        memory.give(normed)
        product = memory.take(n * shape.intermediate_size * element)
        memory.give(gate_up, product)

    @property
    def _q_size(self) -> int:
        return self.shape.num_heads * self.shape.head_dim

    def _partial(self, memory: Segments, n: int, element: int) -> list[Block]:
        """An output and its log-sum-exp."""
        return [memory.take(n * self._q_size * element), memory.take(n * self.shape.num_heads * 4)]

    def _attend(self, memory: Segments, n: int, context: int) -> None:
        element = DTYPE_BYTES[self.dtype]
        state, other = self._partial(memory, n, element), list[Block]()
        for done in range(0, context, self.piece_tokens):
            new = self._partial(memory, n, element)
            memory.give(*other)
            other, is_last = new, done + self.piece_tokens >= context
            lse = memory.take(n * self.shape.num_heads * 4)
            merged = [] if is_last else [memory.take(n * self._q_size * 4)]
            memory.give(*state)
            state = [*merged, lse]
        memory.give(*state, *other)
