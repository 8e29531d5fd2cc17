"""The head of transformers' language models: the loss without logits."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..dispatch import choose
from ..native_ops.linear_cross_entropy import late
from ..ops.linear_cross_entropy import OP, linear_cross_entropy
from .swap import hooked


def headed(model: Any) -> str:
    """What is wrong with a model's head. Its kind is looked at in each call, as PEFT may wrap it later."""
    return "" if isinstance(model.lm_head, nn.Module) else f"expected a module in lm_head, got {model.lm_head!r}"


def rounding(x: Tensor, weight: Tensor) -> AbstractContextManager[object]:
    """Autocast for a half-precision head, so that its products are rounded as the layer itself rounds them.

    Without autocast the op makes its products exact to float32, which costs twice as many of them (bfloat16, 1024 rows,
    32000 words, 512 dims: 1.2 s, 0.55 s so, 0.86 s the stock model) except where the native library has them itself.
    """
    device, elements = x.device.type, x.numel() // x.shape[-1] * weight.shape[0]
    fused = x.is_cpu and choose(OP, x) == "native" and late(x.dtype, elements, torch.is_grad_enabled(), None)
    if x.dtype not in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled(device) or fused:
        return nullcontext()
    return torch.autocast(device, dtype=x.dtype)


class CausalLm(nn.Module):
    """With labels the loss comes from linear_cross_entropy.

    In training the logits are then never computed, and the output has logits=None; `skip_logits=False` asks for them
    all the same, and in evaluation `skip_logits=True` does without. What the op has no words for is left to the class:
    a loss function of the user's, logits_to_keep, a head that is not a plain linear layer (LoRA on it, a bias).
    """

    def forward(
        self,
        *arguments: Any,
        labels: Tensor | None = None,
        skip_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **named: Any,
    ) -> Any:
        from transformers.loss.loss_utils import ForCausalLMLoss

        if len(arguments) > 1:
            named |= dict(zip(signature(super().forward).parameters, arguments, strict=False))
            labels, logits_to_keep = named.pop("labels", labels), named.pop("logits_to_keep", logits_to_keep)
        elif arguments:
            named["input_ids"] = arguments[0]
        head = self.lm_head
        plain = type(head) is nn.Linear and head.bias is None and not hooked(head)
        everything = isinstance(logits_to_keep, int) and not logits_to_keep
        if labels is None or not plain or not everything or self.loss_function is not ForCausalLMLoss:
            return super().forward(labels=labels, logits_to_keep=logits_to_keep, **named)
        shifted, count = named.pop("shift_labels", None), named.pop("num_items_in_batch", None)
        ignored = named.pop("ignore_index", -100)
        return_dict = named.pop("return_dict", None)
        outputs = self.hidden(labels, **named)
        x, softcap = outputs[0], self.softcap()
        target = F.pad(labels, (0, 1), value=ignored)[..., 1:] if shifted is None else shifted
        if target.numel() != x.shape[:-1].numel():
            raise ValueError(f"labels: expected shape {list(x.shape[:-1])}, got {list(labels.shape)}")
        target = target.to(x.device).view(x.shape[:-1])
        with rounding(x, head.weight):
            loss = linear_cross_entropy(x.to(head.weight.dtype), head.weight, target, ignored, softcap=softcap)
        if count is not None:  # of all batches whose gradients are added up
            count = count.to(loss.device) if isinstance(count, Tensor) else count
            loss = loss * (target != ignored).sum() / count
        logits = None
        if not (self.training if skip_logits is None else skip_logits):
            logits = head(x)
            logits = logits if softcap is None else torch.tanh(logits / softcap) * softcap
        output = self.output(outputs, loss, logits)
        wanted = self.config.return_dict if return_dict is None else return_dict
        return output if wanted else output.to_tuple()

    def hidden(self, labels: Tensor, **named: Any) -> Any:
        return self.model(**named)

    def softcap(self) -> float | None:
        return None

    def output(self, outputs: Any, loss: Tensor, logits: Tensor | None) -> Any:
        from transformers.modeling_outputs import CausalLMOutputWithPast

        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class CappedCausalLm(CausalLm):
    def softcap(self) -> float | None:
        return self.config.final_logit_softcapping


class Gemma3WithPictures(CausalLm):
    def hidden(self, labels: Tensor, **named: Any) -> Any:
        return self.model(labels=labels, return_dict=True, **named)

    def output(self, outputs: Any, loss: Tensor, logits: Tensor | None) -> Any:
        from transformers.models.gemma3.modeling_gemma3 import Gemma3CausalLMOutputWithPast

        return Gemma3CausalLMOutputWithPast(
            **super().output(outputs, loss, logits), image_hidden_states=outputs.image_hidden_states
        )
