"""transformers' models, patched: outputs, gradients, and all that people do with them stay what they were."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", reason="needs transformers: pip install transformers")

from drop_in_bounds import bound, bound_gradients, close

from blip3o_kernels import patch, register_attention, unpatch
from blip3o_kernels.drop_in.agreement import run
from blip3o_kernels.drop_in.architectures import LANGUAGE, build
from blip3o_kernels.drop_in.small import small_inputs

DTYPES = [torch.float32, torch.bfloat16]
SHALLOW = {"num_hidden_layers": 1}
TEXT = [name for name in LANGUAGE if name != "Qwen2.5-VL"]


def ids(rows: int, tokens: int) -> Tensor:
    return torch.randint(3, 150, (rows, tokens), generator=torch.Generator().manual_seed(5))


def gradients(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", LANGUAGE)
def test_outputs_and_gradients(name: str, dtype: torch.dtype) -> None:
    model = build(name, dtype)
    exact = copy.deepcopy(model).double()
    inputs = small_inputs(model)[1]
    inputs["attention_mask"].fill_(1)  # eager attention in float64 turns padding into NaN
    wide = {key: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for key, x in inputs.items()}
    stock, truth = run(model, inputs), run(exact, wide)
    stock_gradients, true_gradients = gradients(model, inputs), gradients(exact, wide)
    with patch(model) as patched:
        assert patched.replaced["attention"] >= 2 and patched.replaced["linear_cross_entropy"] == 1
        found = run(model, inputs)
        bound(found["logits"], stock["logits"], truth["logits"])
        # A loss, one number, may be close to the truth by luck; it moves by twice as much as its logits at most.
        error = (stock["logits"] - truth["logits"]).abs().max()
        assert (found["loss"] - truth["loss"]).abs() <= 2 * error
        bound_gradients(gradients(model, inputs), stock_gradients, true_gradients)


@pytest.mark.parametrize("name", TEXT)
def test_padding_on_either_side(name: str) -> None:
    model = build(name)
    tokens = ids(2, 12)
    with patch(model, check=False), torch.no_grad():
        alone = model(input_ids=tokens[1:, :7]).logits[0]
        for side in ("left", "right"):
            mask, padded = torch.ones(2, 12, dtype=torch.int64), tokens.clone()
            place = slice(5, 12) if side == "left" else slice(0, 7)
            mask[1], mask[1, place] = 0, 1
            padded[1, place] = tokens[1, :7]
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            y = model(input_ids=padded, attention_mask=mask, position_ids=positions).logits[1, place]
            close(y, alone)


@pytest.mark.parametrize("name", TEXT)
def test_packed_sequences(name: str) -> None:
    """Two sequences in one row: by positions that start again, or by cumulative lengths."""
    model = build(name)
    tokens, lengths = ids(1, 21), (12, 9)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    ends = torch.tensor([0, 12, 21], dtype=torch.int32)
    with patch(model, check=False), torch.no_grad():
        alone = torch.cat([model(input_ids=x, use_cache=False).logits for x in tokens.split(lengths, 1)], 1)
        options = {"input_ids": tokens, "position_ids": positions, "use_cache": False}
        close(model(**options).logits, alone)
        packed = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 12, "max_length_k": 12}
        close(model(**options, **packed).logits, alone)


def test_packed_sequences_that_look_ahead() -> None:
    """Gemma 3 in both directions: its window too, on either side. The longer sequence is longer than that."""
    model = build("Gemma 3", use_bidirectional_attention=True, layer_types=["sliding_attention"] * 2)
    assert model.config.sliding_window < 9
    tokens, lengths = ids(1, 21), (12, 9)
    ends = torch.tensor([0, 12, 21], dtype=torch.int32)
    packed = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 12, "max_length_k": 12}
    with torch.no_grad():
        alone = torch.cat([model(input_ids=x, use_cache=False).logits for x in tokens.split(lengths, 1)], 1)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    with patch(model, check=False), torch.no_grad():
        close(model(input_ids=tokens, position_ids=positions, use_cache=False, **packed).logits, alone)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", LANGUAGE)
def test_generate(name: str, cache: str) -> None:
    """The same tokens, beyond the window, with a padded prompt; in two steps of a prompt as well."""
    model = build(name)
    tokens, mask = ids(2, 11), torch.ones(2, 11, dtype=torch.int64)
    mask[1, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    options |= {"cache_implementation": "static", "disable_compile": True} if cache == "static" else {}
    expected = model.generate(tokens, **options)
    with patch(model, check=False):
        assert torch.equal(model.generate(tokens, **options), expected)


@pytest.mark.parametrize("name", TEXT)
def test_a_cache_filled_in_pieces(name: str) -> None:
    from transformers import DynamicCache

    model = build(name)
    tokens = ids(1, 20)
    with patch(model, check=False), torch.no_grad():
        whole = model(input_ids=tokens).logits
        cache = DynamicCache(config=model.config)
        pieces = [model(input_ids=x, past_key_values=cache).logits for x in tokens.split([11, 6, 1, 2], 1)]
    close(torch.cat(pieces, 1), whole)


@pytest.mark.parametrize("name", ["Llama", "Gemma 3", "Qwen2.5-VL"])
def test_gradient_checkpointing(name: str) -> None:
    model = build(name)
    inputs = small_inputs(model)[1]
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    with patch(model, check=False):
        model.train()
        expected = gradients(model, inputs)
        layers = model.model.language_model.layers if name == "Qwen2.5-VL" else model.model.layers
        layers[0].mlp.register_forward_pre_hook(count)
        model.gradient_checkpointing_enable()
        found = gradients(model, inputs)
        assert calls == 2, "the layer was not computed again"
    for key, gradient in expected.items():
        close(found[key], gradient)


@pytest.mark.parametrize("name", LANGUAGE)
def test_compiled_without_breaks(name: str) -> None:
    torch._dynamo.reset()
    model = build(name, **SHALLOW, **({"layer_types": ["sliding_attention"]} if name == "Gemma 3" else {}))
    inputs = {key: x for key, x in small_inputs(model)[1].items() if key in ("input_ids", "attention_mask")}
    with patch(model, check=False), torch.no_grad():
        expected = run(model, inputs)["logits"]
        compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
        close(run(compiled, inputs)["logits"], expected)


def test_compiled_training() -> None:
    """With gradients, in one graph; attention and the loss are ops that the compiler does not look into."""
    torch._dynamo.reset()
    model = build("Llama", **SHALLOW).train()
    inputs = small_inputs(model)[1]
    with patch(model, check=False):
        expected = gradients(model, inputs)
        model.zero_grad()
        loss = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)(**inputs).loss
        loss.backward()
        for name, p in model.named_parameters():
            close(p.grad, expected[name])


@pytest.mark.parametrize("order", ["patched first", "wrapped first"])
def test_peft(order: str) -> None:
    peft = pytest.importorskip("peft", reason="needs peft: pip install peft")
    model = build("Qwen3")
    inputs = small_inputs(model)[1]
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "up_proj"], modules_to_save=["norm"])

    def wrapped() -> nn.Module:
        wrapper = peft.get_peft_model(model, lora)
        with torch.no_grad():
            for key, p in wrapper.named_parameters():
                if "lora_B" in key:
                    p.copy_(torch.linspace(-0.2, 0.2, p.numel()).view_as(p))
        return wrapper

    if order == "patched first":
        patch(model)
        wrapper = wrapped()
        found, outputs = gradients(wrapper, inputs), run(wrapper, inputs)
        unpatch(wrapper)
    else:
        wrapper = wrapped()
        with patch(wrapper):
            found, outputs = gradients(wrapper, inputs), run(wrapper, inputs)
    expected = gradients(wrapper, inputs)
    assert found and found.keys() == expected.keys() and all("lora" in key or "norm" in key for key in found)
    for key, gradient in found.items():
        close(gradient, expected[key])
    for key, y in run(wrapper, inputs).items():
        close(outputs[key], y)


def test_autocast() -> None:
    model = build("Qwen3")
    inputs = small_inputs(model)[1]
    truth = run(copy.deepcopy(model).double(), inputs)
    with torch.autocast("cpu", torch.bfloat16):
        stock = run(model, inputs)
        with patch(model):
            for key, y in run(model, inputs).items():
                bound(y, stock[key], truth[key], key, 3.0)
            gradients(model, inputs)


def test_mixed_dtypes_keep_the_wider() -> None:
    """Norms in float32 inside a bfloat16 model, as PEFT leaves them: results are promoted as the class promotes."""
    model = build("Llama", torch.bfloat16)
    model.model.norm.float()
    x = torch.randn(2, 48, dtype=torch.bfloat16)
    expected = model.model.norm(x)
    with patch(model, check=False):
        y = model.model.norm(x)
        assert y.dtype is expected.dtype is torch.float32
        bound(y, expected, expected.double())


def losses(model: nn.Module, **options: Any) -> Any:
    inputs = small_inputs(model)[1]
    return model(**inputs | options)


@pytest.mark.parametrize("name", ["Llama", "Gemma 2"])
def test_the_loss_and_its_logits(name: str) -> None:
    model = build(name)
    labels = small_inputs(model)[1]["labels"]
    shifted = labels.roll(-1, 1)
    cases: dict[str, dict[str, Any]] = {
        "labels": {},
        "num_items_in_batch": {"num_items_in_batch": torch.tensor(77)},
        "an int": {"num_items_in_batch": 77},
        "shift_labels": {"shift_labels": shifted},
        "ignore_index": {"labels": labels.clamp(min=3), "ignore_index": 3},
    }
    expected = {key: losses(model, **options).loss for key, options in cases.items()}
    kept = small_inputs(model)[1]["attention_mask"].bool()
    logits = losses(model).logits[kept]
    with patch(model):
        for key, options in cases.items():
            close(losses(model, **options).loss, expected[key])
        close(losses(model).logits[kept], logits)
        assert losses(model, skip_logits=True).logits is None
        model.train()
        assert losses(model).logits is None and losses(model, return_dict=False)[0].dim() == 0
        close(losses(model, skip_logits=False).logits[kept], logits)
        inputs = small_inputs(model)[1]
        close(model(inputs["input_ids"], inputs["attention_mask"], labels=labels).loss, expected["labels"])
        by_place = model(inputs["input_ids"], inputs["attention_mask"], None, None, None, labels)
        close(by_place.loss, expected["labels"])
        close(losses(model, labels=None).logits[kept], logits)


def test_what_linear_cross_entropy_has_no_words_for_is_left_to_the_class() -> None:
    model = build("Llama").train()
    with patch(model, check=False):
        model.loss_function = lambda logits, labels, vocab_size, **_: logits.sum()
        output = losses(model)
        close(output.loss, output.logits.sum())
        del model._loss_function
        labels = small_inputs(model)[1]["labels"][:, -3:]
        assert losses(model, logits_to_keep=3, labels=labels).logits.shape[1] == 3
        model.lm_head.register_forward_hook(lambda _, __, y: y * 0)
        assert losses(model).logits.abs().max() == 0


def test_outputs_on_request() -> None:
    model = build("Llama")
    inputs = small_inputs(model)[1]
    expected = model(**inputs, output_hidden_states=True).hidden_states
    with patch(model):
        found = model(**inputs, output_hidden_states=True).hidden_states
    mask = inputs["attention_mask"].bool()
    assert len(found) == len(expected) == 3
    for y, x in zip(found, expected, strict=True):
        close(y[mask], x[mask])


@pytest.mark.parametrize("name", ["Qwen3", "Gemma 3"])
def test_a_norm_that_somebody_waits_for_is_called(name: str) -> None:
    model = build(name)
    inputs, calls = small_inputs(model)[1], []
    expected = run(model, inputs)["logits"]
    with patch(model):
        layer = model.model.layers[0]
        norms = [layer.self_attn.q_norm, layer.post_attention_layernorm, model.model.norm]
        norms += [layer.pre_feedforward_layernorm] if name == "Gemma 3" else []
        for norm in norms:
            norm.register_forward_hook(lambda module, *_: calls.append(module))
        close(run(model, inputs)["logits"], expected)
    assert set(calls) == set(norms)


def test_a_norm_whose_gradient_somebody_waits_for_is_called() -> None:
    model = build("Qwen3")
    inputs, calls = small_inputs(model)[1], []
    with patch(model, check=False):
        layer = model.model.layers[0]
        norms = [layer.self_attn.q_norm, layer.post_attention_layernorm]
        for norm in norms:
            norm.register_full_backward_pre_hook(lambda module, _: calls.append(module))
        gradients(model, inputs)
    assert len(calls) == 2 and set(calls) == set(norms)


def attention_alone(name: str, **options: Any) -> tuple[Tensor, Tensor]:
    register_attention()
    model = build(name)
    inputs = small_inputs(model)[1]
    expected = run(model, inputs)["logits"]
    model.set_attn_implementation("blip3o")
    return run(model, inputs)["logits"], expected


@pytest.mark.parametrize("name", LANGUAGE)
def test_attention_alone(name: str) -> None:
    """attn_implementation="blip3o", padding mask included, in a model that is not patched."""
    close(*attention_alone(name))


def test_gemma_3_with_pictures() -> None:
    """Its vision tower is SigLIP, which has the attention only; its loss has no softcap."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = build("Gemma 3").config.to_dict() | {"final_logit_softcapping": None}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 2}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=150)
    model = Gemma3ForConditionalGeneration(config).eval()
    tokens = ids(2, 12)
    tokens[0, 2:6] = 150
    kinds = (tokens == 150).long()
    inputs = {"input_ids": tokens, "pixel_values": torch.randn(1, 3, 8, 8), "token_type_ids": kinds, "labels": tokens}
    expected, expected_gradients = run(model, inputs), gradients(model, inputs)
    with patch(model) as patched:
        for key, y in run(model, inputs).items():
            close(y, expected[key])
        model.train()
        assert model(**inputs).logits is None
        for key, gradient in gradients(model, inputs).items():
            close(gradient, expected_gradients[key])
    assert patched.replaced["linear_cross_entropy"] == 1


def test_attention_from_the_start() -> None:
    register_attention()
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=32, **sizes)
    model = LlamaForCausalLM._from_config(config, attn_implementation="blip3o")
    assert model.config._attn_implementation == "blip3o"
    model.train()
    model.model.layers[0].self_attn.attention_dropout = 0.1
    with pytest.raises(ValueError, match=r"dropout_p: expected 0\.0"):
        model(input_ids=ids(1, 4) % 32)


def test_chunked_attention_keeps_its_mask() -> None:
    """Llama 4's chunks come with a size too, which is not that of a window."""
    from transformers.masking_utils import chunked_causal_mask_function

    from blip3o_kernels.drop_in.interface import mask

    class Config:
        attention_chunk_size = 4

    function: Callable[..., Any] = chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.int64))
    sizes = {"batch_size": 1, "q_length": 8, "kv_length": 8}
    found = mask(**sizes, mask_function=function, local_size=4, config=Config())
    assert found is not None and not found[0, 0, 5, 2]
