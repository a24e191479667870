"""Hosts for token embeddings: a factored table that is looked up, and the output head tied to it.

A table E (V, d) of rank k is B F with B (V, k) looked up row by row. `LowRank(up=B, down=F)` and the column-pivoted
`Pivoted`, in which k of the d coordinates of every token are stored and the others are combinations of them, both have
this form. So has a product whose first factor is `Quantized`, or rows of several such: its codes are looked up. A tied
head computes the logits h E^T with the same tensors.
"""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eckart.errors import EckartError
from eckart.hosts.decoding import EXTRA_CALLS, NUMBERS_PER_CALL, DecodingHost, TemporaryDense
from eckart.hosts.host import InterleavedHost, host, leaf, map_of
from eckart.maps import Interleaved, LinearMap, LowRank, Pivoted, Product, Quantized, inverse_order


class EmbeddingHost(TemporaryDense):
    """An embedding table given by a map (V, d): `table` holds one row of k numbers per token.

    Attributes:
        table: `nn.Embedding` (V, k).
        rest: for a pivoted table, `nn.Linear` k -> d - k; for a low-rank one, `nn.Linear` k -> d.
        order: for a pivoted table, (d,) int32, where each coordinate is found in [pivots; rest]; otherwise absent.
    """

    def __init__(self, map_: LinearMap, padding_idx: int | None = None) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = map_.shape
        self.padding_idx = padding_idx
        if isinstance(map_, LowRank):
            rows, rest, order = map_.up, map_.down.mT, None
        elif isinstance(map_, Pivoted) and map_.axis == "columns":
            rows, rest, order = map_.basis, map_.coefficients.mT, inverse_order(map_.order)
        else:
            raise EckartError(f"an embedding needs a low-rank or column-pivoted map, got {map_!r}")
        self.table = nn.Embedding(rows.shape[0], rows.shape[1], device="meta")
        self.table.weight = rows if isinstance(rows, nn.Parameter) else nn.Parameter(rows)
        self.rest = leaf(rest.contiguous())
        self.register_buffer("order", order)
        self._inverse: tuple[tuple[int, int], Tensor] | None = None
        saved = self.num_embeddings * self.embedding_dim - map_.numbers
        self._is_small = saved < 2 * EXTRA_CALLS[type(map_)] * NUMBERS_PER_CALL  # looked up, and multiplied by

    def held_map(self) -> LinearMap:
        """Return the table as a map (V, d) made of this module's parameters."""
        if self.order is None:
            return LowRank(self.table.weight, self.rest.weight.mT)
        return Pivoted(self.table.weight, self.rest.weight.mT, inverse_order(cast(Tensor, self.order)), "columns")

    def dense(self) -> Tensor:
        """Return the table, (V, d)."""
        return self.held_map().dense()

    def forward(self, ids: Tensor) -> Tensor:
        """Look up tokens: ids (...) int -> (..., d)."""
        dense = self._dense_if_faster(ids)
        if dense is not None:
            return F.embedding(ids, dense)
        rows = self.table(ids)
        if self.order is None:
            return cast(Tensor, self.rest(rows))
        return torch.cat((rows, self.rest(rows)), dim=-1).index_select(-1, cast(Tensor, self.order))

    def logits(self, hidden: Tensor) -> Tensor:
        """Return hidden @ E^T: (..., d) -> (..., V), on the table's device.

        Raises:
            EckartError: if the table is offloaded.
        """
        dense = self._dense_if_faster(hidden)
        if dense is not None and dense.is_cpu:
            return F.linear(hidden, dense)
        device = next(self.table.parameters()).device
        if device.type == "meta" and hidden.device.type != "meta":
            raise EckartError(
                "a tied head needs its embedding in memory, but that is offloaded; exclude it from offloading"
            )
        return self._logits(hidden.to(device))  # a device map may put the last block elsewhere

    def _logits(self, hidden: Tensor) -> Tensor:
        if self.order is None:
            return F.linear(F.linear(hidden, self.rest.weight.mT), self.table.weight)
        k = self.table.embedding_dim
        ordered = hidden.index_select(-1, self._input_order())
        return F.linear(ordered[..., :k] + F.linear(ordered[..., k:], self.rest.weight.mT), self.table.weight)

    def _dense_if_faster(self, x: Tensor) -> Tensor | None:
        """Return the temporary dense table where that is faster: small, without gradients, on CPU."""
        if torch.is_grad_enabled():
            self.forget()
            return None
        if not self._is_small or not x.is_cpu or torch.compiler.is_compiling():
            return None
        return self.temporary_dense()

    def _input_order(self) -> Tensor:
        """Return the inverse of `order`, remembered until `order` is replaced or written to."""
        order = cast(Tensor, self.order)
        if torch.compiler.is_compiling():
            return inverse_order(order)
        state = order.data_ptr(), order._version
        if self._inverse is None or self._inverse[0] != state:
            self._inverse = state, inverse_order(order)
        return self._inverse[1]


class QuantizedEmbeddingHost(EmbeddingHost):
    """An embedding table that is `Quantized`, or `Interleaved` of such, or a product of which the first factor is.

    Attributes:
        table: host of the codes, one row per token.
        rest: host of the product of the other factors, or None.
    """

    def __init__(self, map_: LinearMap, padding_idx: int | None = None) -> None:
        TemporaryDense.__init__(self)
        self._is_small = False  # of codes, the table alone is kept dense, by its own host
        table, *rest = map_.maps if isinstance(map_, Product) else (map_,)
        if not has_rows_of_codes(table):
            raise EckartError(f"a quantized embedding needs one row of codes per token, got {map_!r}")
        self.num_embeddings, self.embedding_dim = map_.shape
        self.padding_idx = padding_idx
        self.table: nn.Module = host(table)  # type: ignore[assignment]
        self.rest: nn.Module | None = host(Product(tuple(rest))) if rest else None  # type: ignore[assignment]

    def held_map(self) -> LinearMap:
        table = map_of(self.table)
        return table if self.rest is None else Product((table, *cast(Product, map_of(self.rest)).maps))

    def forward(self, ids: Tensor) -> Tensor:
        """Look up tokens: ids (...) int -> (..., d); of a large table only their own codes are dequantized."""
        table = self.table
        dense = cast(DecodingHost, table).kept_table(ids)
        if dense is not None:
            rows = F.embedding(ids, dense)
        elif isinstance(table, InterleavedHost):
            rows = table.select(ids)
        else:
            rows = cast(Quantized, map_of(table)).select(ids)
        return rows if self.rest is None else map_of(self.rest).T(rows)

    def _logits(self, hidden: Tensor) -> Tensor:
        return cast(Tensor, self.table(hidden if self.rest is None else self.rest(hidden)))


def has_rows_of_codes(map_: LinearMap) -> bool:
    """Tell whether rows of a map can be looked up as codes."""
    if isinstance(map_, Interleaved):
        return all(isinstance(m, Quantized) and m.axis == "rows" for m in map_.maps)
    return isinstance(map_, Quantized) and map_.axis == "rows"


def embedding_host(map_: LinearMap, padding_idx: int | None = None) -> EmbeddingHost:
    """Return a module that looks up rows of a map (V, d), sharing its tensors.

    Raises:
        EckartError: for a map without rows of numbers or codes to look up.
    """
    first = map_.maps[0] if isinstance(map_, Product) else map_
    made = QuantizedEmbeddingHost if isinstance(first, Quantized | Interleaved) else EmbeddingHost
    return made(map_, padding_idx)


class TiedHead(nn.Module):
    """An output head that multiplies by the embedding's own table; it holds no parameters but a bias.

    The embedding is referred to, not registered: it stays the one owner of its parameters in the state dict.
    """

    def __init__(self, embedding: EmbeddingHost, bias: Tensor | None = None) -> None:
        super().__init__()
        self._embedding = (embedding,)  # in a tuple, so that torch does not register it a second time
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return logits: (..., d) -> (..., V)."""
        logits = self._embedding[0].logits(hidden)
        return logits if self.bias is None else logits + self.bias
