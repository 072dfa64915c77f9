"""Cross-entropy of a causal language model, whole or in chunks of tokens."""

import types

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import CausalLMOutputWithPast

from sltrain_ds.data.dataset import IGNORED
from sltrain_ds.errors import UserError
from sltrain_ds.formats import chunk_tokens

# what models do to the head's logits, or add to their loss, outside of the head: config key -> values that do nothing
_BESIDE_THE_HEAD = {
    "final_logit_softcapping": (None,),  # Gemma 2 and 3
    "logits_scaling": (None, 1),  # Granite
    "logit_scale": (None, 1),  # Cohere
    "lm_head_multiplier": (None, 1),  # Falcon-H1
    "output_router_logits": (None, False),  # mixtures of experts add a loss of their routers
}


def use_chunked_loss(model) -> None:
    """Make `model(..., labels=)` compute its loss without the logits of all tokens at once, forward or backward.

    `model` is a `transformers` causal LM. A chunk has at most `formats.CHUNK_BYTES` of fp32 logits. It is computed
    again in the backward pass, where the head's gradient grows in one buffer. Arguments other than `input_ids` are
    given by name; the call and the value are otherwise those of transformers' own loss. Logits are returned only where
    no labels are given. Raises `UserError` for a model whose logits or loss are not its head's alone.
    """
    for key, harmless in _BESIDE_THE_HEAD.items():
        value = getattr(model.config.get_text_config(), key, None)
        if value not in harmless:
            raise UserError(
                f'sltrain.loss: "chunked" takes the logits as the head gives them, but {type(model).__name__} has '
                f'{key} {value}; set "full"'
            )
    whole, head = model.forward, model.get_output_embeddings()
    plain = type(head) is nn.Linear and head.bias is None
    if plain:
        linear = head.forward

        # inside the head's own forward: there ZeRO-3 has its weight gathered, and again before its backward
        def head_forward(self, hidden, targets=None, inverse=1.0):
            if targets is None:
                return linear(hidden)
            weight = self.weight
            if not torch.is_grad_enabled():  # a Function cannot see this, and would form gradients for nothing
                hidden, weight = hidden.detach(), weight.detach()
            chunked = _FormedInForward if _at_once(hidden) else _ChunkedCrossEntropy
            return chunked.apply(hidden, weight, targets, inverse)

        head.forward = types.MethodType(head_forward, head)

    def forward(self, input_ids=None, *, labels=None, num_items_in_batch=None, **inputs):
        if labels is None:
            return whole(input_ids=input_ids, **inputs)
        hidden = self.get_decoder()(input_ids=input_ids, **inputs).last_hidden_state.flatten(0, 1)
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()
        count = (targets != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        if plain and _at_once(hidden):
            return CausalLMOutputWithPast(loss=self.get_output_embeddings()(hidden, targets, 1.0 / count))
        total = self.get_output_embeddings()(hidden, targets) if plain else _by_checkpoints(self, hidden, targets)
        return CausalLMOutputWithPast(loss=total / count)

    model.forward = types.MethodType(forward, model)


def _at_once(hidden: torch.Tensor) -> bool:
    """Whether gradients are formed in the forward pass: on a GPU, where the products count."""
    return hidden.device.type == "cuda"


class _ChunkedCrossEntropy(torch.autograd.Function):
    """hidden (n, h), weight (vocabulary, h), targets (n,) int64 -> the sum over the targets that are not IGNORED of
    -log softmax(hidden weight^T)[target], fp32 (). Saved: hidden and weight.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, _):
        ctx.save_for_backward(hidden, weight, targets)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        tokens = chunk_tokens(len(weight))
        for part, target in zip(hidden.split(tokens), targets.split(tokens), strict=True):
            total += F.cross_entropy((part @ weight.t()).float(), target, ignore_index=IGNORED, reduction="sum")
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        hidden, weight, targets = ctx.saved_tensors
        need_hidden, need_weight, *_ = ctx.needs_input_grad
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        d_weight = None
        tokens = chunk_tokens(len(weight))
        for start in range(0, len(hidden), tokens):
            part, target = hidden[start : start + tokens], targets[start : start + tokens]
            wide = (part @ weight.t()).float()
            torch.softmax(wide, -1, out=wide)
            kept = target != IGNORED
            wide[torch.arange(len(target), device=target.device), target.where(kept, 0)] -= 1.0
            d_logits = wide.mul_((grad * kept).unsqueeze(1)).to(weight.dtype)
            del wide
            if need_hidden:
                torch.mm(d_logits, weight, out=d_hidden[start : start + tokens])
            if need_weight:
                d_weight = _with_product(d_weight, d_logits, part)
        return d_hidden, d_weight, None, None


def _with_product(total, d_logits, hidden):
    """total + d_logits^T hidden, in place; None is an empty total."""
    return d_logits.t() @ hidden if total is None else total.addmm_(d_logits.t(), hidden)


class _FormedInForward(torch.autograd.Function):
    """The same sum times `inverse`, a number or (), with its gradients formed in the forward pass: three products
    instead of four, and no logits twice. Saved: the gradients, times `inverse`; the backward pass scales them by what
    it is given, a power of two where a step's micro-batches are one.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, inverse):
        need_hidden, need_weight, *_ = ctx.needs_input_grad
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        d_weight = None
        tokens = chunk_tokens(len(weight), "cuda")
        for start in range(0, len(hidden), tokens):
            part, target = hidden[start : start + tokens], targets[start : start + tokens]
            kept = target != IGNORED
            wide = (part @ weight.t()).float()
            at = target.where(kept, 0).unsqueeze(1)
            chosen = wide.gather(1, at)
            most = wide.amax(1, keepdim=True)
            wide.sub_(most).exp_()  # in place: torch.logsumexp would take a second chunk
            sums = wide.sum(1, keepdim=True)
            total += ((sums.log() + most - chosen) * kept.unsqueeze(1)).sum()
            if not (need_hidden or need_weight):
                continue
            wide.div_(sums)
            wide[torch.arange(len(target), device=target.device), at.squeeze(1)] -= 1.0  # also where only deterministic
            d_logits = wide.mul_((kept * inverse).unsqueeze(1)).to(weight.dtype)
            del wide
            if need_hidden:
                torch.mm(d_logits, weight, out=d_hidden[start : start + tokens])
            if need_weight:
                d_weight = _with_product(d_weight, d_logits, part)
        ctx.gradients = d_hidden, d_weight
        return total * inverse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the chunked loss keeps its gradients for one backward pass; call the model again")
        return *(None if gradient is None else gradient.mul_(grad) for gradient in gradients), None, None


def _by_checkpoints(model, hidden, targets):
    """The same for any head, in chunks that are recomputed; its gradient takes two buffers."""
    tokens, head = chunk_tokens(model.config.vocab_size), model.get_output_embeddings()
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for part, target in zip(hidden.split(tokens), targets.split(tokens), strict=True):
        total = total + checkpoint(_chunk_loss, head, part, target, use_reentrant=False)
    return total


def _chunk_loss(head, hidden, targets):
    return F.cross_entropy(head(hidden).float(), targets, ignore_index=IGNORED, reduction="sum")
