"""The paged latent cache of one attention worker: what MLA keeps of each token, for every layer.

A token's row in a layer is its normed latent and its rotated shared key. One page more than asked for, the null page,
takes the rows of padding and is never part of a context.
"""

from collections.abc import Sequence

import torch

from common.model.hf_config import ModelConfig


class LatentCache:
    """Storage [layers, pages + 1, page tokens, latent width], zero at first; `PageAllocator` says whose a page is."""

    def __init__(
        self, config: ModelConfig, num_pages: int, *, page_tokens: int = 64,
        dtype: torch.dtype = torch.float32, device: str = "cpu",
    ) -> None:  # fmt: skip
        self.page_tokens = page_tokens
        self.num_pages = num_pages
        shape = (config.num_layers, num_pages + 1, page_tokens, config.latent_width)
        self._data = torch.zeros(shape, dtype=dtype, device=device)
        self._layers = tuple(self._data.unbind(0))
        self._rows = tuple(layer.view(-1, config.latent_width) for layer in self._layers)

    def __repr__(self) -> str:
        return f"<LatentCache [{self.num_pages} pages of {self.page_tokens} | {self.nbytes >> 20} MiB]>"

    @property
    def null_page(self) -> int:
        """The page that padding writes to."""
        return self.num_pages

    @property
    def nbytes(self) -> int:
        """Memory held."""
        return self._data.nbytes

    def layer(self, index: int) -> torch.Tensor:
        """Pages of one layer: [pages + 1, page tokens, latent width]."""
        return self._layers[index]

    def write(self, index: int, slots: torch.Tensor, rows: torch.Tensor) -> None:
        """Store rows [n, latent width] at slots int64 [n] (page * page_tokens + offset) of one layer."""
        self._rows[index].index_copy_(0, slots, rows)

    def clear(self, pages: Sequence[int]) -> None:
        """Zero pages in every layer, so that no value of a former holder, NaN included, can be met again."""
        index = torch.tensor(list(pages), dtype=torch.int64)
        if self._data.is_cuda:  # from pageable memory the copy would wait for the stream
            index = index.pin_memory().to(self._data.device, non_blocking=True)
        self._data.index_fill_(1, index, 0)
