"""The SLTrain layer (Han et al., NeurIPS 2024): W = s B A + S, s = alpha / rank, S on a random fixed support."""

import math

import torch
from torch import nn

from sltrain_ds.errors import UserError
from sltrain_ds.methods.check import check_rank
from sltrain_ds.methods.layer import MethodLinear, uniform
from sltrain_ds.methods.sltrain import SLTrainConfig
from sltrain_ds.ops import keep_step, modes, sltrain_linear, sparse, support


class SLTrainLinear(MethodLinear):
    """Drop-in for ``nn.Linear`` with W = scaling * B A + S.

    Parameters A (rank, in), B (out, rank), S_values (nnz,), bias (out,) or None; buffers S_rows int32 (out + 1) and
    S_columns (nnz,) uint16 (int32 where in > 65,536). A generated support is a function of (support_seed, layer_name,
    out, in): not saved, drawn again and checksummed before first use. A stored one (``set_stored_support``) is part
    of the state dict.
    """

    roles = {"A": "factors", "B": "factors", "S_values": "sparse"}  # noqa: RUF012
    index = ("S_rows", "S_columns")

    def __init__(
        self,
        in_features,
        out_features,
        *,
        rank,
        density,
        alpha,
        bias=False,
        support_seed=0,
        layer_name=None,
        op_mode="auto",
        device=None,
        dtype=None,
    ):
        super().__init__()
        SLTrainConfig(rank=rank, density=density, alpha=alpha, support_seed=support_seed)
        self.layer_name = layer_name or ""
        check_rank(rank, in_features, out_features, self.layer_name)
        self.in_features, self.out_features = in_features, out_features
        self.rank, self.density, self.alpha = rank, density, alpha
        self.scaling = alpha / rank
        self.support_seed = support_seed
        self.nnz = support.nnz_of(density, out_features, in_features)
        factory = {"device": device, "dtype": dtype}
        self.A = nn.Parameter(torch.empty(rank, in_features, **factory))
        self.B = nn.Parameter(torch.empty(out_features, rank, **factory))
        self.S_values = nn.Parameter(torch.empty(self.nnz, **factory))
        self.bias = nn.Parameter(torch.empty(out_features, **factory)) if bias else None
        rows = torch.empty(out_features + 1, dtype=torch.int32, device=device)
        columns = torch.empty(self.nnz, dtype=support.column_dtype(in_features), device=device)
        self.register_buffer("S_rows", rows, persistent=False)
        self.register_buffer("S_columns", columns, persistent=False)
        self.op_mode = op_mode
        self._stored = False
        self._checksum = None  # of the support that belongs here, once known
        self._checked = None  # the buffers that were last found to hold it
        if not self.A.is_meta:
            self.reset_parameters()

    def extra_repr(self):
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"density={self.density}, alpha={self.alpha}, bias={self.bias is not None}, op_mode={self.op_mode!r}"
        )

    @torch.no_grad()
    def reset_parameters(self, generator=None):
        """B = 0, A kaiming uniform (a = sqrt 5), S ~ U(-1/sqrt(in), 1/sqrt(in)), bias 0: the paper's section 3.3."""
        bound = 1 / math.sqrt(self.in_features)  # which is also kaiming's for a = sqrt 5
        self.A.copy_(uniform((self.rank, self.in_features), bound, generator))
        self.S_values.copy_(uniform((self.nnz,), bound, generator))
        self.B.zero_()
        if self.bias is not None:
            self.bias.zero_()

    @property
    def op_mode(self):
        """How the layer computes: "auto" (chosen at the first forward for its token count) or one of modes.CHOICES."""
        return self._op_mode

    @op_mode.setter
    def op_mode(self, mode):
        self._op_mode = modes.check(mode)
        self.current_mode = None if mode == "auto" else mode
        self.held = keep_step.Held() if mode == "keep_step" else None

    def _choose_mode(self, x):
        """The mode of this layer from now on, by the rule, not by the clock: the same on every rank."""
        if x.is_meta:
            return "compose"
        tokens = x.numel() // max(1, self.in_features)
        self.current_mode = modes.rule(self.out_features, self.in_features, tokens, x.device)
        return self.current_mode

    def forward(self, x):
        self.ensure_support()
        mode = self.current_mode or self._choose_mode(x)
        arguments = (x, self.A, self.B, self.S_values, self.S_rows, self.S_columns, self.scaling, self.bias)
        if mode != "keep_step":
            return sltrain_linear.linear(*arguments, mode)
        if keep_step.serves(self.held, x):
            return keep_step.linear(self.held, *arguments)
        return sltrain_linear.linear(*arguments, "keep")

    @torch.no_grad()
    def dense_weight(self):
        self.ensure_support()
        W = torch.mm(self.B, self.A).mul_(self.scaling)
        sparse.scatter_add_(W, self.S_rows, self.S_columns, self.S_values)
        return W

    @torch.no_grad()
    def dense_sparse(self):
        self.ensure_support()
        S = self.S_values.new_zeros(self.out_features, self.in_features)
        sparse.scatter_add_(S, self.S_rows, self.S_columns, self.S_values)
        return S

    # -- the support's life: a buffer may come back from to_empty, from_pretrained or the meta device as garbage

    @torch._dynamo.assume_constant_result  # under torch.compile it runs once, while tracing
    def ensure_support(self):
        """Make sure that the buffers hold this layer's support; costs an identity check unless they were replaced."""
        checked = self._checked
        if checked is not None and checked[0] is self.S_rows and checked[1] is self.S_columns:
            return True
        return self._restore_support()

    @torch.no_grad()
    def _restore_support(self):
        rows, columns = self.S_rows, self.S_columns
        if rows.is_meta or isinstance(rows, torch._subclasses.FakeTensor):
            return False
        intact = self._checksum is not None and support.checksum(rows, columns) == self._checksum
        if not intact and self._stored:
            problem = support.check(rows, columns, self.out_features, self.in_features)
            if not problem and self._checksum is not None:
                problem = "it is not the one that was given"
            if problem:
                raise UserError(f"the stored support of {self.layer_name or 'a layer'} is not usable: {problem}")
            self._checksum = support.checksum(rows, columns)
        elif not intact:
            drawn = support.sample(self.out_features, self.in_features, self.nnz, self.support_seed, self.layer_name)
            found = support.checksum(*drawn)
            if self._checksum not in (None, found):
                raise AssertionError(f"the support of {self.layer_name!r} was drawn twice and differs")
            self._checksum = found
            rows.copy_(drawn[0])
            columns.copy_(drawn[1])
        self._checked = (rows, columns)
        return True

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if self._checksum is not None and not self._stored:
            self.ensure_support()  # at once, since a compiled forward does not look again
        return self

    def set_stored_support(self, rows, columns):
        """Take an imported support, kept in the state dict from now on.

        rows (out + 1) row pointers, columns (nnz,) sorted in each row, integers; UserError if they do not fit.
        """
        rows, columns = rows.to(torch.int32), columns.to(torch.int64)
        if (
            not columns.numel() or 0 <= int(columns.min()) <= int(columns.max()) < self.in_features
        ):  # else check reports it
            columns = columns.to(support.column_dtype(self.in_features))
        problem = support.check(rows, columns, self.out_features, self.in_features)
        if not problem and columns.numel() != self.nnz:
            problem = f"{columns.numel()} positions for {self.nnz} values"
        if problem:
            raise UserError(f"the support given for {self.layer_name or 'a layer'} is not usable: {problem}")
        self.register_buffer("S_rows", rows.to(self.S_rows.device), persistent=True)
        self.register_buffer("S_columns", columns.to(self.S_columns.device), persistent=True)
        self._stored, self._checksum = True, support.checksum(rows, columns)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        if f"{prefix}S_rows" in state_dict and f"{prefix}S_columns" in state_dict and not self._stored:
            # a checkpoint of an imported support: this layer becomes a stored one
            self._stored = True
            self._non_persistent_buffers_set -= {"S_rows", "S_columns"}
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if self._stored:
            self._checksum = self._checked = None  # copied in place: look again
            self.ensure_support()

    def support_info(self) -> dict:
        """What a checkpoint keeps to tell the support: kind, seed, layer_name, generator_version, nnz, checksum."""
        self.ensure_support()
        return {
            "kind": "stored" if self._stored else "generated",
            "seed": self.support_seed,
            "layer_name": self.layer_name,
            "generator_version": support.GENERATOR_VERSION,
            "nnz": self.nnz,
            "checksum": self._checksum,
        }
