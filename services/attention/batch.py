"""What one forward pass computes, as tensors: built once per step, used by every layer.

A row is one token of one sequence. Rows below a sequence's `num_prompt` are prompt rows (naive prefill), the others
generated rows (absorbed decode), however many of either a step holds. Rows are padded to a multiple of `ROW_MULTIPLE`
with token 0 at position 0 of the null page, so that no layer pads again; callers use the first `num_rows` only.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kernels.reference.linear import padded_rows
from kernels.reference.mla import MIN_ITEMS, TILE_ROWS, DecodeItems, PrefillTiles

MAX_ITEMS = 4096


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive tokens of one sequence: `token_ids` at positions `start` on; `pages` cover at least these."""

    token_ids: Sequence[int]
    start: int
    num_prompt: int  # positions below are prompt
    pages: Sequence[int]


@dataclass(frozen=True, slots=True)
class DecodePart:
    """Generated rows. `rows` None: they are all rows of the batch, in order."""

    rows: torch.Tensor | None  # int64 [padded decode rows], padded by repeating the first
    num_rows: int
    items: DecodeItems  # rows index into the padded decode rows
    restore: torch.Tensor  # int64 [padded decode rows]: where each one is in the items' order


@dataclass(frozen=True, slots=True)
class PrefillPart:
    """Prompt rows and their tiles."""

    rows: torch.Tensor  # int64 [prompt rows]
    tiles: PrefillTiles


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """Tensors of a step; the first dimension is the padded number of rows."""

    num_rows: int
    token_ids: torch.Tensor  # int64 [padded]
    positions: torch.Tensor  # int64 [padded]
    slots: torch.Tensor  # int64 [padded], where each row goes in the cache
    last_rows: torch.Tensor  # int64 [spans], the last row of each span
    cos: torch.Tensor  # [padded, rope / 2]
    sin: torch.Tensor
    decode: tuple[DecodePart, ...]
    prefill: PrefillPart | None

    def __repr__(self) -> str:
        decode = sum(part.num_rows for part in self.decode)
        return f"<ForwardBatch [{self.num_rows - decode} prompt rows | {decode} generated rows]>"


def build_batch(
    spans: Sequence[Span], *, page_tokens: int, null_page: int,
    rope: tuple[torch.Tensor, torch.Tensor],
) -> ForwardBatch:  # fmt: skip
    """Lay out a step. `rope` holds the cos and sin tables [positions, rope / 2], whose device the tensors get."""
    cos, sin = rope
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    last_rows: list[int] = []
    generated: list[_Row] = []
    prompts: list[_Prompt] = []
    for span in spans:
        first = len(token_ids)
        token_ids.extend(span.token_ids)
        end = span.start + len(span.token_ids)
        for position in range(span.start, end):
            page, offset = divmod(position, page_tokens)
            positions.append(position)
            slots.append(span.pages[page] * page_tokens + offset)
            if position >= span.num_prompt:
                generated.append(_Row(first + position - span.start, position, span.pages))
        if span.start < span.num_prompt:
            prompts.append(_Prompt(first, span.start, min(end, span.num_prompt), span.pages))
        last_rows.append(len(token_ids) - 1)
    num_rows = len(token_ids)
    missing = padded_rows(num_rows) - num_rows
    device = cos.device
    index = torch.tensor(positions + [0] * missing, device=device)
    return ForwardBatch(
        num_rows=num_rows,
        token_ids=torch.tensor(token_ids + [0] * missing, device=device),
        positions=index,
        slots=torch.tensor(slots + [null_page * page_tokens] * missing, device=device),
        last_rows=torch.tensor(last_rows, device=device),
        cos=cos.index_select(0, index),
        sin=sin.index_select(0, index),
        decode=tuple(
            _decode_part(rows, num_rows, page_tokens, null_page, cos)
            for rows in _split(generated, page_tokens)
        ),
        prefill=_prefill_part(prompts, page_tokens, cos) if prompts else None,
    )


@dataclass(frozen=True, slots=True)
class _Row:
    row: int
    position: int
    pages: Sequence[int]


@dataclass(frozen=True, slots=True)
class _Prompt:
    first_row: int
    start: int
    end: int
    pages: Sequence[int]


def _split(rows: list[_Row], page_tokens: int) -> list[list[_Row]]:
    """Groups of at most MAX_ITEMS (row, page) pairs, or of one row: a decode step copies every page that it reads."""
    groups: list[list[_Row]] = []
    room = 0
    for row in rows:
        needed = row.position // page_tokens + 1
        if not groups or needed > room:
            groups.append([])
            room = MAX_ITEMS
        groups[-1].append(row)
        room -= needed
    return groups


def _decode_part(
    rows: list[_Row], num_rows: int, page_tokens: int, null_page: int, like: torch.Tensor
) -> DecodePart:
    order = sorted(range(len(rows)), key=lambda i: -(rows[i].position // page_tokens))
    block_rows: list[int] = []
    item_rows: list[int] = []
    item_places: list[int] = []
    item_pages: list[int] = []
    limits: list[int] = []  # last offset in the page that the row may look at
    count = len(order)
    for block in range(rows[order[0]].position // page_tokens + 1):
        while rows[order[count - 1]].position // page_tokens < block:
            count -= 1
        block_rows.append(count)
        item_rows.extend(order[:count])
        item_places.extend(range(count))
        item_pages.extend(rows[i].pages[block] for i in order[:count])
        limits.extend(rows[i].position - block * page_tokens for i in order[:count])
    while len(item_rows) < MIN_ITEMS:
        item_rows.append(0)
        item_places.append(0)
        item_pages.append(null_page)
        limits.append(0)
    padded = padded_rows(len(rows))
    restore = [0] * padded
    for place, i in enumerate(order):
        restore[i] = place
    device = like.device
    offsets = torch.arange(page_tokens, device=device)
    hidden = offsets > torch.tensor(limits, device=device)[:, None]
    mask = torch.zeros(hidden.shape, dtype=like.dtype, device=device)
    mask.masked_fill_(hidden, float("-inf"))
    numbers = [row.row for row in rows]
    numbers += numbers[:1] * (padded - len(rows))
    return DecodePart(
        rows=None if len(rows) == num_rows else torch.tensor(numbers, device=device),
        num_rows=len(rows),
        items=DecodeItems(
            rows=torch.tensor(item_rows, device=device),
            places=torch.tensor(item_places, device=device),
            pages=torch.tensor(item_pages, device=device),
            mask=mask[:, None],
            block_rows=tuple(block_rows),
        ),
        restore=torch.tensor(restore, device=device),
    )


def _prefill_part(prompts: list[_Prompt], page_tokens: int, like: torch.Tensor) -> PrefillPart:
    pages: list[int] = []
    tiles: list[tuple[int, int, int]] = []  # number of blocks, prompt, tile of the sequence
    first_page: list[int] = []
    for number, prompt in enumerate(prompts):
        first_page.append(len(pages))
        pages.extend(prompt.pages[: (prompt.end - 1) // page_tokens + 1])
        numbers = range(prompt.start // TILE_ROWS, (prompt.end - 1) // TILE_ROWS + 1)
        tiles.extend((tile * TILE_ROWS // page_tokens + 1, number, tile) for tile in numbers)
    tiles.sort(key=lambda tile: -tile[0])
    place = {(number, tile): i for i, (_, number, tile) in enumerate(tiles)}
    rows: list[int] = []
    slots: list[int] = []
    for number, prompt in enumerate(prompts):
        for position in range(prompt.start, prompt.end):
            rows.append(prompt.first_row + position - prompt.start)
            tile, offset = divmod(position, TILE_ROWS)
            slots.append(place[number, tile] * TILE_ROWS + offset)
    device = like.device
    block_pages: list[torch.Tensor] = []
    last_masks: list[torch.Tensor] = []
    for block in range(tiles[0][0]):
        here = [tile for tile in tiles if tile[0] > block]
        block_pages.append(
            torch.tensor([first_page[number] + block for _, number, _ in here], device=device)
        )
        ends = [tile for blocks, _, tile in here if blocks == block + 1]
        last_masks.append(_causal_mask(ends, page_tokens, like))
    return PrefillPart(
        rows=torch.tensor(rows, device=device),
        tiles=PrefillTiles(
            slots=torch.tensor(slots, device=device),
            num_tiles=len(tiles),
            pages=torch.tensor(pages, device=device),
            block_pages=tuple(block_pages),
            last_masks=tuple(last_masks),
        ),
    )


def _causal_mask(tiles: list[int], page_tokens: int, like: torch.Tensor) -> torch.Tensor:
    """0 or -inf [tiles, 1, TILE_ROWS, page tokens] for tiles in the page that holds them."""
    starts = torch.tensor(tiles, device=like.device, dtype=torch.int64) * TILE_ROWS % page_tokens
    queries = starts[:, None] + torch.arange(TILE_ROWS, device=like.device)
    hidden = torch.arange(page_tokens, device=like.device) > queries[:, :, None]
    mask = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device)
    return mask.masked_fill_(hidden, float("-inf"))[:, None]
