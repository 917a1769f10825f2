"""Multi-head latent attention over a paged cache, in fixed blocks: DeepSeek-V2 (arXiv 2405.04434), section 2.1.

A query's bits depend on its position and its context alone. Work is cut into items of one fixed shape - a query tile
or a row, times one page of keys - so that more requests are more items and never another shape; a query's pages are
added in ascending order. Measured (torch 2.13.0, MKL): `torch.bmm` gives an item the same bits for every number of
items from 2 up at 1, 2 and 4 threads; a single item may be cut across threads and differ, so items are never alone.

Two regimes, chosen by what a token is. Prompt tokens: keys and values are expanded from the latent (`mla_prefill`).
Generated tokens: queries are projected into the latent space instead (`mla_decode`), which reads each page once.
"""

from dataclasses import dataclass

import torch

TILE_ROWS = 16  # rows of a query tile; tile t of a sequence holds positions 16 t to 16 t + 15
MIN_ITEMS = 2
_NEGATIVE_INFINITY = float("-inf")


@dataclass(frozen=True, slots=True)
class DecodeItems:
    """(row, page) pairs of a decode step, all first pages, then all second pages, ...

    Rows come in descending order of their number of pages, so block j of the first `block_rows[j]` rows is one slice.
    """

    rows: torch.Tensor  # int64 [items], index into the queries
    places: torch.Tensor  # int64 [items], the row's place in that order
    pages: torch.Tensor  # int64 [items], page of the cache
    mask: torch.Tensor  # [items, 1, page tokens], 0 or -inf, added to the scores
    block_rows: tuple[int, ...]


def mla_decode(
    queries: torch.Tensor, cache: torch.Tensor, items: DecodeItems, *, scale: float, latent: int
) -> torch.Tensor:
    """softmax(scale * queries @ keys) @ latents: [rows, heads, latent] in the dtype of the queries.

    queries [rows, heads, latent + rope] already projected into the latent space; cache [pages, page tokens,
    latent + rope]; the result is in the items' order of rows. The softmax has the exact maximum over the whole
    context, in fp32; sums over pages are in ascending order, in fp32.
    """
    keys = cache.index_select(0, items.pages)  # [items, page tokens, latent + rope]
    item_queries = queries.index_select(0, items.rows)
    scores = torch.baddbmm(items.mask, item_queries, keys.transpose(1, 2), alpha=scale).float()
    block_max = scores.amax(dim=-1, keepdim=True)  # [items, heads, 1]
    num_rows = items.block_rows[0]
    if len(items.block_rows) > 1:
        maximum = block_max[:num_rows].clone()
        start = num_rows
        for count in items.block_rows[1:]:
            torch.maximum(maximum[:count], block_max[start : start + count], out=maximum[:count])
            start += count
        block_max = maximum.index_select(0, items.places)
    probabilities = scores.sub_(block_max).exp_()
    total = probabilities.sum(dim=-1, keepdim=True)  # [items, heads, 1]
    weighted = torch.bmm(probabilities.to(keys.dtype), keys[..., :latent]).float()
    start = num_rows
    for count in items.block_rows[1:]:
        total[:count] += total[start : start + count]
        weighted[:count] += weighted[start : start + count]
        start += count
    return (weighted[:num_rows] / total[:num_rows]).to(queries.dtype)


@dataclass(frozen=True, slots=True)
class PrefillTiles:
    """Query tiles of a prefill step, in descending order of their number of pages."""

    slots: torch.Tensor  # int64 [rows]: tile * TILE_ROWS + position % TILE_ROWS of each prompt row
    num_tiles: int
    pages: torch.Tensor  # int64 [distinct pages]: pages of the cache that are expanded
    block_pages: tuple[
        torch.Tensor, ...
    ]  # block j: index into `pages` for each of the tiles that have it
    last_masks: tuple[
        torch.Tensor, ...
    ]  # block j: [tiles that end here, 1, TILE_ROWS, page tokens]


def mla_prefill(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, tiles: PrefillTiles, *,
    scale: float,
) -> torch.Tensor:  # fmt: skip
    """Causal attention of prompt rows: [rows, heads, v] in the dtype of the queries.

    queries [rows, heads, qk]; keys [distinct pages, heads, page tokens, qk]; values [distinct pages, heads,
    page tokens, v]. Running maximum and sum over pages in ascending order (arXiv 2205.14135), in fp32.
    """
    heads, width = queries.shape[1:]
    num_tiles = tiles.num_tiles
    tiled = queries.new_zeros(num_tiles * TILE_ROWS, heads, width)
    tiled.index_copy_(0, tiles.slots, queries)
    tiled = tiled.view(num_tiles, TILE_ROWS, heads, width).transpose(1, 2).contiguous()
    maximum = torch.full(
        (num_tiles, heads, TILE_ROWS, 1), _NEGATIVE_INFINITY, device=queries.device
    )
    total = torch.zeros_like(maximum)
    weighted = torch.zeros(num_tiles, heads, TILE_ROWS, values.shape[-1], device=queries.device)
    for pages, mask in zip(tiles.block_pages, tiles.last_masks, strict=True):
        count = pages.shape[0]
        scores = _items(tiled[:count], keys.index_select(0, pages).transpose(2, 3))
        scores = scores.float().mul_(scale)
        if mask.shape[0]:
            scores[count - mask.shape[0] :] += mask
        before = maximum[:count]
        after = torch.maximum(before, scores.amax(dim=-1, keepdim=True))
        probabilities = scores.sub_(after).exp_()
        shrink = torch.exp(before - after)
        total[:count] = total[:count] * shrink + probabilities.sum(dim=-1, keepdim=True)
        added = _items(probabilities.to(values.dtype), values.index_select(0, pages))
        weighted[:count] = weighted[:count] * shrink + added
        maximum[:count] = after
    rows = (weighted / total).to(queries.dtype)
    rows = rows.transpose(1, 2).reshape(num_tiles * TILE_ROWS, heads, -1)
    return rows.index_select(0, tiles.slots)


def _items(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Batched product of [tiles, heads, m, k] and [tiles, heads, k, n], never as a single item."""
    tiles, heads, m, k = left.shape
    a, b = left.reshape(-1, m, k), right.reshape(-1, k, right.shape[-1])
    if a.shape[0] < MIN_ITEMS:
        return torch.bmm(a.expand(MIN_ITEMS, -1, -1), b.expand(MIN_ITEMS, -1, -1))[:1].view(
            tiles, heads, m, -1
        )
    return torch.bmm(a, b).view(tiles, heads, m, -1)
