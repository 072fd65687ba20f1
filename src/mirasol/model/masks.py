"""Block-causal attention masks: descriptions that become a dense mask, or a sparse one for flex attention.

A block is a chunk: its tokens attend to each other and to those of earlier chunks. The supplement (section 3) has the
Combiner take "all the previous features"; with this mask one pass does so for all chunks.
"""

import functools
from dataclasses import dataclass, replace
from typing import no_type_check

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

# Flex attention's kernels work in tiles of 128 queries by 128 keys.
TILE = 128


@dataclass(frozen=True)
class BlockCausal:
    """Queries attend to the keys of their own chunk and of earlier chunks.

    chunks: number of chunks in the sequence
    query_tokens, key_tokens: tokens per chunk among the queries and among the keys
    window: number of chunks that a query attends to, its own included; None is all
    """

    chunks: int
    query_tokens: int
    key_tokens: int
    window: int | None = None

    @property
    def lengths(self) -> tuple[int, int]:
        """Number of queries and of keys."""
        return self.chunks * self.query_tokens, self.chunks * self.key_tokens

    def for_last(self, count: int) -> "BlockCausal":
        """The same mask for the last `count` queries of each chunk."""
        return replace(self, query_tokens=count)

    @no_type_check  # flex attention's compiler traces it, and cannot trace a check
    def visible(self, query: Int[Tensor, "..."], key: Int[Tensor, "..."]) -> Bool[Tensor, "..."]:
        """Whether a query attends to a key, by their positions; works element by element."""
        # Compared, not subtracted: a difference of 100,000 queries and as many keys would take 80 GB.
        own, other = query // self.query_tokens, key // self.key_tokens
        return own >= other if self.window is None else (own >= other) & (own < other + self.window)

    def tiles(self, device: torch.device) -> tuple[Bool[Tensor, "row column"], Bool[Tensor, "row column"]]:
        """For every tile of queries by keys, whether any and whether all of its pairs are visible."""
        queries, keys = self.lengths
        first_query, last_query = tile_chunks(queries, self.query_tokens, device)
        first_key, last_key = tile_chunks(keys, self.key_tokens, device)
        # A tile contains every distance in chunks between the least and the greatest.
        least, greatest = first_query[:, None] - last_key, last_query[:, None] - first_key
        some, every = greatest >= 0, least >= 0
        if self.window is not None:
            some, every = some & (least < self.window), every & (greatest < self.window)
        return some, every & find_complete_tiles(queries, device)[:, None] & find_complete_tiles(keys, device)

    def dense(self, device: torch.device) -> Bool[Tensor, "query key"]:
        """True where a query attends to a key."""
        queries, keys = (torch.arange(length, device=device) for length in self.lengths)
        return self.visible(queries[:, None], keys)

    def sparse(self, device: torch.device) -> BlockMask:
        """For flex attention: memory and time grow with the tiles, no mask of queries x keys is made."""
        return _sparse(self, device)


@dataclass(frozen=True)
class ResamplerMask(BlockCausal):
    """Keys are the tokens of all chunks as in `BlockCausal`, then the queries themselves, which only those of the same
    chunk attend to."""

    @property
    def lengths(self) -> tuple[int, int]:
        queries, features = super().lengths
        return queries, features + queries

    @no_type_check
    def visible(self, query: Int[Tensor, "..."], key: Int[Tensor, "..."]) -> Bool[Tensor, "..."]:
        features = self.chunks * self.key_tokens
        same = query // self.query_tokens == (key - features) // self.query_tokens
        return torch.where(key < features, super().visible(query, key), same)

    def tiles(self, device: torch.device) -> tuple[Bool[Tensor, "row column"], Bool[Tensor, "row column"]]:
        queries, keys = self.lengths
        # The queries' own tiles are few compared with the features': finer marks would gain nothing.
        some = torch.ones(-(-queries // TILE), -(-keys // TILE), dtype=torch.bool, device=device)
        every = torch.zeros_like(some)
        features = BlockCausal(self.chunks, self.query_tokens, self.key_tokens, self.window)
        until = features.lengths[1] // TILE
        for tiles, of_features in zip((some, every), features.tiles(device), strict=True):
            tiles[:, :until] = of_features[:, :until]
        return some, every


def tile_chunks(length: int, tokens: int, device: torch.device) -> tuple[Int[Tensor, " tile"], Int[Tensor, " tile"]]:
    """The first and the last chunk that each tile of a sequence touches."""
    start = torch.arange(0, length, TILE, device=device)
    return start // tokens, ((start + TILE).clamp(max=length) - 1) // tokens


def find_complete_tiles(length: int, device: torch.device) -> Bool[Tensor, " tile"]:
    """False for a last tile that exceeds the sequence."""
    return torch.arange(0, length, TILE, device=device) + TILE <= length


@functools.lru_cache(maxsize=32)
def _sparse(mask: BlockCausal, device: torch.device) -> BlockMask:
    """Cached between forward passes: layers, steps and backward passes share it."""

    @no_type_check
    def visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return mask.visible(query, key)

    some, every = mask.tiles(device)
    return BlockMask.from_kv_blocks(
        *_list_tiles(some & ~every), *_list_tiles(every), BLOCK_SIZE=TILE, mask_mod=visible, seq_lengths=mask.lengths
    )


def _list_tiles(tiles: Bool[Tensor, "row column"]) -> tuple[Int[Tensor, "1 1 row"], Int[Tensor, "1 1 row column"]]:
    """Number of marked tiles in each row, and all columns with the marked ones first."""
    columns = tiles.int().argsort(dim=-1, descending=True, stable=True)
    return tiles.sum(-1, dtype=torch.int32)[None, None], columns.int()[None, None]


def mark_latents(
    chunk_mask: Bool[Tensor, "clip chunk"], m: int, window: int | None = None
) -> Bool[Tensor, "clip latent"]:
    """Which latents texts attend to: the m of every real chunk, or of the last `window` real chunks of each clip."""
    if window is not None:
        # Real chunks from each one on: padding comes after them.
        chunk_mask = chunk_mask & (chunk_mask.flip(1).cumsum(1).flip(1) <= window)
    return chunk_mask[:, :, None].expand(-1, -1, m).flatten(1)
