"""What the ops return: a fixed-width top-k and a compressed-sparse-row matrix."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Optional, Sequence, Union

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor, maybe_current_level
from torch.autograd.forward_ad import unpack_dual


class TopK(NamedTuple):
    """The k largest entries of each row, descending by value; equal values: lower index first."""

    values: Tensor  # float32 [..., k]
    indices: Tensor  # int32 [..., k]

    @classmethod
    def empty(cls, shape: Sequence[int], device: Union[str, torch.device, None] = None) -> TopK:
        """Unwritten tensors of ``shape`` [..., k]."""
        values = torch.empty(tuple(shape), dtype=torch.float32, device=device)
        return cls(values, torch.empty(tuple(shape), dtype=torch.int32, device=device))

    def to(self, device: Union[str, torch.device]) -> TopK:
        return TopK(self.values.to(device), self.indices.to(device))

    def to_dense(self, n_cols: int) -> Tensor:
        """float32 [..., n_cols], zero where nothing was kept."""
        dense = self.values.new_zeros((*self.values.shape[:-1], n_cols))
        # Added, not written: BatchTopK pads rows with 0.0 at a feature that may be active as well.
        return dense.scatter_add_(-1, self.indices.long(), self.values)

    def to_csr(self, n_cols: int) -> CSR:
        """The positive entries [n, n_cols], leading dimensions flattened; waits for a GPU.

        Raises ValueError for an index that is not below n_cols.
        """
        values, indices = (part.reshape(-1, part.shape[-1]) for part in self)
        indices, order = indices.sort(dim=-1)
        values = values.gather(-1, order)
        if not without_memory(indices) and indices.numel() and int(indices[:, -1].max()) >= n_cols:
            raise ValueError(
                f"n_cols={n_cols} is too small: an index is {int(indices[:, -1].max())}; give d_sae"
            )
        kept = values > 0
        return CSR(_indptr(kept.sum(-1)), indices[kept], values[kept], n_cols)


class CSR(NamedTuple):
    """Sparse rows. Column indices ascend within a row; explicit zeros are never stored by the ops."""

    indptr: Tensor  # int64 [n_rows + 1]
    indices: Tensor  # int32 [nnz]
    values: Tensor  # float32 [nnz]
    n_cols: int

    def __repr__(self) -> str:
        dtype = str(self.values.dtype).split(".")[-1]
        return f"CSR({self.n_rows} x {self.n_cols}, nnz={self.nnz}, {dtype}, {self.device})"

    @property
    def n_rows(self) -> int:
        return self.indptr.shape[0] - 1

    @property
    def nnz(self) -> int:
        return self.indices.shape[0]

    @property
    def device(self) -> torch.device:
        return self.indptr.device

    def to(self, device: Union[str, torch.device]) -> CSR:
        return CSR(self.indptr.to(device), self.indices.to(device), self.values.to(device), self.n_cols)

    def row_ids(self) -> Tensor:
        """int64 [nnz]: the row of every stored entry."""
        return _row_ids(self.indptr, self.nnz)

    def to_dense(self) -> Tensor:
        """float32 [n_rows, n_cols]."""
        dense = self.values.new_zeros((self.n_rows, self.n_cols))
        dense[self.row_ids(), self.indices.long()] = self.values
        return dense

    @classmethod
    def from_dense(cls, dense: Tensor) -> CSR:
        """Keep the non-zero entries of ``dense`` [n_rows, n_cols]."""
        if dense.dim() != 2:
            raise ValueError(f"dense must have two dimensions, got shape {tuple(dense.shape)}")
        rows, cols = dense.nonzero(as_tuple=True)
        indptr = _indptr(torch.bincount(rows, minlength=dense.shape[0]))
        return cls(indptr, cols.int(), dense[rows, cols].float(), dense.shape[1])

    def to_coo(self, shape: Optional[Sequence[int]] = None) -> Tensor:
        """A coalesced torch sparse tensor of ``shape`` [..., n_cols], whose rows are flattened here.

        Raises ValueError for a shape that does not hold n_rows rows of n_cols.
        """
        size = (self.n_rows, self.n_cols) if shape is None else tuple(int(width) for width in shape)
        if not size or min(size) < 0 or (math.prod(size[:-1]), size[-1]) != (self.n_rows, self.n_cols):
            raise ValueError(f"shape {size} does not hold {self.n_rows} rows of n_cols={self.n_cols}")
        rest, where = self.row_ids(), [self.indices.long()]
        for width in reversed(size[1:-1]):
            where.append(rest % width)
            rest = torch.div(rest, width, rounding_mode="floor")
        if len(size) > 1:
            where.append(rest)
        at = torch.stack(where[::-1])
        return torch.sparse_coo_tensor(at, self.values, size, is_coalesced=True, check_invariants=False)

    def to_scipy(self) -> Any:
        """A ``scipy.sparse.csr_matrix`` of the same rows (on the CPU)."""
        from scipy.sparse import csr_matrix

        parts = (self.values.cpu().numpy(), self.indices.cpu().numpy(), self.indptr.cpu().numpy())
        return csr_matrix(parts, shape=(self.n_rows, self.n_cols))

    @classmethod
    def from_scipy(cls, matrix: Any) -> CSR:
        """From any ``scipy.sparse`` matrix; duplicates are summed, zeros dropped."""
        matrix = matrix.tocsr().copy()
        matrix.sum_duplicates()
        matrix.eliminate_zeros()
        return cls(
            torch.as_tensor(matrix.indptr).long(),
            torch.as_tensor(matrix.indices).int(),
            torch.as_tensor(matrix.data).float(),
            int(matrix.shape[1]),
        )

    def select_rows(self, index: Union[Tensor, Sequence[int]]) -> CSR:
        """The rows at ``index`` (integers, repeats allowed, or a boolean mask [n_rows]), in that order."""
        picked = torch.as_tensor(index, device=self.device)
        if picked.dtype == torch.bool:
            if picked.shape != (self.n_rows,):
                raise ValueError(f"the mask has shape {tuple(picked.shape)}, expected ({self.n_rows},)")
            picked = picked.nonzero().squeeze(-1)
        if picked.numel() and picked.is_floating_point():
            raise ValueError(f"row index must be integers or a boolean mask, got {picked.dtype}")
        picked = picked.long().reshape(-1)
        if picked.numel() and not (-self.n_rows <= int(picked.min()) and int(picked.max()) < self.n_rows):
            raise ValueError(f"row index outside 0..{self.n_rows - 1}")
        picked = torch.where(picked < 0, picked + self.n_rows, picked)
        indptr = _indptr(self.indptr.diff()[picked])
        nnz = int(indptr[-1])
        shift = torch.repeat_interleave(self.indptr[picked] - indptr[:-1], indptr.diff(), output_size=nnz)
        source = torch.arange(nnz, device=self.device) + shift
        return CSR(indptr, self.indices[source], self.values[source], self.n_cols)

    @classmethod
    def concat(cls, parts: Sequence[CSR]) -> CSR:
        """Stack the rows of one or more matrices of equal width."""
        if not parts:
            raise ValueError("concat needs at least one CSR")
        widths = {part.n_cols for part in parts}
        if len(widths) > 1:
            raise ValueError(f"cannot stack CSR matrices of widths {sorted(widths)}")
        counts = torch.cat([part.indptr.diff() for part in parts])
        indices = torch.cat([part.indices for part in parts])
        values = torch.cat([part.values for part in parts])
        return cls(_indptr(counts), indices, values, parts[0].n_cols)

    @classmethod
    def empty(cls, n_rows: int, n_cols: int, device: Union[str, torch.device, None] = None) -> CSR:
        """A matrix of ``n_rows`` empty rows."""
        return cls(
            torch.zeros(n_rows + 1, dtype=torch.int64, device=device),
            torch.empty(0, dtype=torch.int32, device=device),
            torch.empty(0, dtype=torch.float32, device=device),
            n_cols,
        )


TRANSFORMED = (
    "is inside torch.vmap, another torch.func transform or forward-mode differentiation, which is not "
    "supported: an op takes any leading dimensions, and gradients come from backward() or "
    "torch.autograd.functional"
)


def need_tensors(**given: Any) -> None:
    """ValueError for an argument that is neither a plain tensor nor None.

    NotImplementedError for one inside a transform of torch.func or with a forward-mode tangent: custom ops
    have no rule for them, and torch would take a derivative for 0 without a word.
    """
    compiling = torch.compiler.is_compiling()
    for name, value in given.items():
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} is a {type(value).__name__}; give a torch.Tensor (torch.as_tensor)")
        if value.is_nested or value.layout != torch.strided:
            kind = "nested" if value.is_nested else str(value.layout).split(".")[-1]
            raise ValueError(f"{name} is a {kind} tensor; give a dense one, such as {name}.to_dense()")
        if value.is_complex():  # a cast would drop the imaginary part
            raise ValueError(f"{name} is complex; give {name}.real or another floating-point tensor")
        if compiling:
            if maybe_current_level() is not None:  # which tensors are inside can not be asked here
                raise NotImplementedError(f"{name} {TRANSFORMED}")
        elif is_functorch_wrapped_tensor(value) or unpack_dual(value).tangent is not None:
            raise NotImplementedError(f"{name} {TRANSFORMED}")


def without_memory(*tensors: Optional[Tensor]) -> bool:
    """Must torch see the call as one op? While it compiles, and for fake, meta and other unusual tensors."""
    plain = (Tensor, torch.nn.Parameter, type(None))
    return torch.compiler.is_compiling() or any(
        type(t) not in plain or (t is not None and t.device.type == "meta") for t in tensors
    )


def _indptr(counts: Tensor) -> Tensor:
    """Row starts, int64 [n + 1], of rows that hold ``counts`` [n] entries."""
    indptr = torch.zeros(counts.shape[0] + 1, dtype=torch.int64, device=counts.device)
    torch.cumsum(counts, 0, out=indptr[1:])
    return indptr


def _row_ids(indptr: Tensor, nnz: int) -> Tensor:
    """int64 [nnz]: the row of every entry; without a synchronisation, since ``nnz`` is given."""
    rows = torch.arange(indptr.shape[0] - 1, device=indptr.device)
    return torch.repeat_interleave(rows, indptr.diff(), output_size=nnz)
