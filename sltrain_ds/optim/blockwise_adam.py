"""Adam and AdamW whose moments are 8- or 4-bit blocks, over whole parameters or over flat ZeRO partitions.

What is stepped need not be a parameter: under ZeRO it is a flat tensor that holds pieces of several. Its *segments*
say which: blocks, rounding noise and states follow the parameters, not the tensors that hold them, so that no
world size and no stage changes a code. One-dimensional parameters (the group named "norms") keep 32-bit states.
"""

import math
from typing import NamedTuple

import torch

from sltrain_ds.errors import UserError
from sltrain_ds.ops import adam4bit, adam8bit, cuda, cuda_checks

FORMATS = {"8bit": adam8bit, "4bit": adam4bit}


class Segment(NamedTuple):
    """Elements start..stop of a stepped tensor, which are those from `offset` on of the parameter with this noise key.

    `offset` is a multiple of 256; so are lengths, but for a parameter's end. What no segment covers is padding: it is
    never stepped.
    """

    key: int
    start: int
    stop: int
    offset: int


class BlockwiseAdam(torch.optim.Optimizer):
    """Adam (`decoupled` false) or AdamW with block-wise quantised moments; Dettmers et al., arXiv 2110.02861.

    `params` are parameters or groups; a group named "norms" keeps 32-bit states, any group may say so by "states":
    "32bit". `names`: {parameter: its canonical name}, from which the noise keys come. Parameters are float32 or
    bfloat16, gradients either of both; `stochastic` rounds bfloat16 parameters stochastically, with noise keyed by
    (`seed`, step, name, element), else they are rounded to nearest.

    `segments[tensor]`, a list of `Segment`, may be set for any tensor before its first step: what puts flat
    partitions in the parameters' place sets it (zero/aligned.py). A tensor without is one whole parameter.

    State of a tensor: "step" (int), "exp_avg" and "exp_avg_sq" (uint8 codes), "absmax_exp_avg" and
    "absmax_exp_avg_sq" (float32, one a block), segment after segment, each beginning with a new block; for 32-bit
    states "step" and float32 "exp_avg", "exp_avg_sq" in the tensor's shape. Raises `UserError` for unknown states.
    """

    def __init__(
        self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, *,
        decoupled=True, states="8bit", seed=0, stochastic=False, names=None,
    ):  # fmt: skip
        if states not in FORMATS:
            raise UserError(f"BlockwiseAdam: states {states!r} are not known; choose from {', '.join(FORMATS)}")
        self.decoupled, self.seed, self.stochastic = decoupled, seed, stochastic
        self.states, self._kind = states, FORMATS[states]
        self.gradient_scale: torch.Tensor | None = (
            None  # float32 () beside the parameters: of every gradient of `step()`
        )
        self.segments: dict[torch.Tensor, list[Segment]] = {}
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        for group in self.param_groups:
            group.setdefault("states", "32bit" if group.get("name") == "norms" else states)
        default = {p: f"{i}.{j}" for i, group in enumerate(self.param_groups) for j, p in enumerate(group["params"])}
        self.names: dict[torch.Tensor, str] = {**default, **(names or {})}

    @torch.no_grad()
    def step(self, closure=None):
        """Step every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self.update_many([(p, p.grad) for p in group["params"] if p.grad is not None], group)
        return loss

    @torch.no_grad()
    def update_many(self, pairs, group) -> None:
        """Step the tensors of `pairs`, (tensor, gradient), times `self.gradient_scale`: one launch on a GPU."""
        together: dict[tuple, list] = {}  # of one dtype and device, where the CUDA kernels serve
        for p, grad in pairs:
            if p.device.type == "cuda" and cuda_checks.supports(p, grad) and cuda.load():
                together.setdefault((p.dtype, grad.dtype, p.device), []).extend(self._steps(p, grad, group))
            else:
                self.update(p, grad if self.gradient_scale is None else grad * self.gradient_scale, group)
        for (_, _, device), steps in together.items():
            kind = self._kind_of(group)
            cuda.adam_steps_(group["states"], steps, kind and kind.tables(device), self.gradient_scale)

    def _steps(self, p, grad, group) -> list[tuple]:
        """What `cuda.adam_steps_` takes, a segment each."""
        state, kind = self.state[p], self._kind_of(group)
        if not state:
            state.update(self.new_state(p, group))
        state["step"] += 1
        flat, grad, found = p.view(-1), grad.reshape(-1), []
        for segment, states in self._pieces(p, state, kind):
            whole = segment.stop - segment.start == flat.numel()
            span = slice(None) if whole else slice(segment.start, segment.stop)
            scalars = (
                float(group["lr"]), *group["betas"], group["eps"], group["weight_decay"], self.decoupled,
                state["step"], self.stochastic, adam8bit.as_int64(self.seed), adam8bit.as_int64(segment.key),
                segment.offset, 1.0,
            )  # fmt: skip
            absmax = states[2:] or (None, None)
            own = (flat, grad) if whole else (flat[span], grad[span])
            found.append((*own, *states[:2], *absmax, scalars))
        return found

    @torch.no_grad()
    def update(self, p, grad, group, grad_scale: float = 1.0) -> None:
        """Step one tensor by a gradient of its size, float32 or bfloat16, times `grad_scale`, with `group`'s rates."""
        state = self.state[p]
        if not state:
            state.update(self.new_state(p, group))
        state["step"] += 1
        flat, grad = p.view(-1), grad.reshape(-1)
        options = {
            "step": state["step"], "lr": group["lr"], "betas": group["betas"], "eps": group["eps"],
            "weight_decay": group["weight_decay"], "decoupled": self.decoupled, "stochastic": self.stochastic,
            "seed": self.seed, "grad_scale": grad_scale,
        }  # fmt: skip
        kind = self._kind_of(group)
        step_ = kind.step_ if kind else adam32_step_
        for segment, states in self._pieces(p, state, kind):
            span = slice(segment.start, segment.stop)
            step_(flat[span], grad[span], *states, key=segment.key, offset=segment.offset, **options)

    def segments_of(self, p) -> list[Segment]:
        """The segments of a tensor: as set, else one that covers it."""
        if p not in self.segments:
            self.segments[p] = [Segment(adam8bit.parameter_key(self.names[p]), 0, p.numel(), 0)]
        return self.segments[p]

    def segment_states(self, p) -> list[tuple[Segment, tuple[torch.Tensor, ...]]]:
        """Each segment of a stepped tensor with views of its own (exp_avg, exp_avg_sq[, absmax, absmax])."""
        state = self.state[p]
        return list(self._pieces(p, state, self._kind if ABSMAX[0] in state else None))

    def _pieces(self, p, state, kind):
        code = block = 0
        for segment in self.segments_of(p):
            n = segment.stop - segment.start
            if kind is None:
                yield segment, tuple(state[key].view(-1)[segment.start : segment.stop] for key in MOMENTS)
                continue
            blocks = -(-n // kind.BLOCK)
            codes, absmax = slice(code, code + -(-n // kind.PER_BYTE)), slice(block, block + blocks)
            yield segment, (*(state[key][codes] for key in MOMENTS), *(state[key][absmax] for key in ABSMAX))
            code, block = code + blocks * kind.BLOCK // kind.PER_BYTE, block + blocks

    def _kind_of(self, group):
        return None if group["states"] == "32bit" else self._kind

    def new_state(self, p, group) -> dict:
        """The state of a tensor of this group before its first step."""
        kind = self._kind_of(group)
        if kind is None:
            return {"step": 0} | {key: torch.zeros_like(p, dtype=torch.float32) for key in MOMENTS}
        blocks = sum(-(-(s.stop - s.start) // kind.BLOCK) for s in self.segments_of(p))
        codes = blocks * kind.BLOCK // kind.PER_BYTE
        shape = {key: (codes, torch.uint8) for key in MOMENTS} | {key: (blocks, torch.float32) for key in ABSMAX}
        return {"step": 0} | {key: torch.zeros(n, dtype=t, device=p.device) for key, (n, t) in shape.items()}

    def load_state_dict(self, state_dict) -> None:
        """As torch's, but codes stay bytes: torch would cast them to the parameters' dtype."""
        for own, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):
            if own["states"] != saved.get("states"):
                raise UserError(
                    f"sltrain.precision.states: {own['states']}, but the checkpoint holds {saved.get('states')} states "
                    f"in group {own.get('name', '')!r}; set it back"
                )
        super().load_state_dict({**state_dict, "state": {}})
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        own = [p for group in self.param_groups for p in group["params"]]
        for index, p in zip(saved, own, strict=True):
            if index in state_dict["state"]:
                state = state_dict["state"][index]
                self.state[p] = {k: v.to(p.device) if torch.is_tensor(v) else v for k, v in state.items()}


MOMENTS = ("exp_avg", "exp_avg_sq")
ABSMAX = ("absmax_exp_avg", "absmax_exp_avg_sq")


def adam32_step_(
    p, g, m, v, *, step, lr, betas, eps, weight_decay, decoupled, stochastic, seed, key, offset, grad_scale
) -> None:
    """torch.optim.Adam(W)'s own step (its single-tensor form) on float32 moments; p (n,) is rounded as 8-bit's is."""
    wide, grad = p.float(), g.float()
    if grad_scale != 1.0:
        grad = grad * grad_scale
    if decoupled:
        wide = wide * (1.0 - lr * weight_decay)
    elif weight_decay:
        grad = grad.add(wide, alpha=weight_decay)
    m.lerp_(grad, 1.0 - betas[0])
    v.mul_(betas[1]).addcmul_(grad, grad, value=1.0 - betas[1])
    denominator = (v.sqrt() / math.sqrt(1.0 - betas[1] ** step)).add_(eps)
    wide = torch.addcdiv(wide, m, denominator, value=-lr / (1.0 - betas[0] ** step))
    adam8bit.store(p, wide, stochastic, seed, step, key, offset)
