"""diffusers' transformers, patched: outputs, gradients, masks, and what people do with them stay what they were."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers", reason="needs diffusers: pip install diffusers")

from drop_in_bounds import bound, bound_gradients, close

from blip3o_kernels import patch, unpatch
from blip3o_kernels.drop_in.agreement import run
from blip3o_kernels.drop_in.architectures import DIFFUSION, build
from blip3o_kernels.drop_in.small import small_inputs

DTYPES = [torch.float32, torch.bfloat16]
# What another configuration turns on or off.
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "SD3 without norms": ("SD3", {"qk_norm": None, "dual_attention_layers": ()}),
    "Lumina-Next without norms": ("Lumina-Next", {"qk_norm": None}),
    "Lumina-Next, as many keys": ("Lumina-Next", {"num_kv_heads": 4}),
    "Flux with guidance": ("Flux", {"guidance_embeds": True}),
    "Sana with norms": ("Sana", {"qk_norm": "rms_norm_across_heads"}),
    "Sana with guidance": ("Sana", {"guidance_embeds": True}),
    "PixArt with sizes": (
        "PixArt",
        {"use_additional_conditions": True, "num_attention_heads": 3, "cross_attention_dim": 48},
    ),
    "PixArt without captions": ("PixArt", {"caption_channels": None}),
}


def sample(outputs: Any) -> Tensor:
    return outputs.sample if hasattr(outputs, "sample") else outputs[0]


def gradients(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    model.zero_grad()
    y = sample(model(**inputs))
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)
    (y * weights.to(y.dtype)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def wide(x: Any) -> Any:
    if isinstance(x, dict):
        return {key: wide(value) for key, value in x.items()}
    if isinstance(x, Tensor) and x.is_complex():
        return x.to(torch.complex128)
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", DIFFUSION)
def test_outputs_and_gradients(name: str, dtype: torch.dtype) -> None:
    model = build(name, dtype)
    exact = copy.deepcopy(model).double()
    inputs = small_inputs(model)[1]
    stock, truth = run(model, inputs)["sample"], run(exact, wide(inputs))["sample"]
    stock_gradients, true_gradients = gradients(model, inputs), gradients(exact, wide(inputs))
    with patch(model) as patched:
        assert patched.replaced["attention"] >= 2 and patched.replaced["modulate"] >= 2
        bound(run(model, inputs)["sample"], stock, truth)
        bound_gradients(gradients(model, inputs), stock_gradients, true_gradients)
    assert torch.equal(run(model, inputs)["sample"], stock)


@pytest.mark.parametrize("case", OPTIONS)
def test_other_configurations(case: str) -> None:
    name, options = OPTIONS[case]
    model = build(name, **options)
    inputs = small_inputs(model)[1]
    expected = run(model, inputs)["sample"]
    with patch(model):
        close(run(model, inputs)["sample"], expected)


@pytest.mark.parametrize("name", ["Lumina-Next", "Lumina 2", "Sana", "PixArt"])
def test_padding_of_the_prompt_is_not_seen(name: str) -> None:
    model = build(name)
    inputs = small_inputs(model)[1]
    with patch(model, check=False):
        expected = run(model, inputs)["sample"]
        inputs["encoder_hidden_states"][1, -3:] += 1.0
        close(run(model, inputs)["sample"], expected)


@pytest.mark.parametrize("name", [name for name in DIFFUSION if name != "Lumina-Next"])
def test_gradient_checkpointing(name: str) -> None:
    model = build(name)
    inputs, calls = small_inputs(model)[1], []
    with patch(model, check=False):
        model.train()
        expected = gradients(model, inputs)
        network = model.layers[0].feed_forward if name == "Lumina 2" else model.transformer_blocks[0].ff
        network.register_forward_pre_hook(lambda *_: calls.append(1))
        model.enable_gradient_checkpointing()
        found = gradients(model, inputs)
        assert calls == [1, 1], "the block was not computed again"
    for key, gradient in expected.items():
        close(found[key], gradient)


@pytest.mark.parametrize("name", ["Flux", "SD3", "Lumina-Next", "Sana", "PixArt"])  # Lumina 2 reads lengths of prompts
def test_compiled_without_breaks(name: str) -> None:
    torch._dynamo.reset()
    model = build(name, num_layers=1, **({"dual_attention_layers": ()} if name == "SD3" else {}))
    inputs = small_inputs(model)[1]
    with patch(model, check=False):
        expected = run(model, inputs)["sample"]
        compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
        close(run(compiled, inputs)["sample"], expected)


def test_masks_of_attention() -> None:
    """A bias for all heads, with or without the queries' axis; not one that is repeated for heads already."""
    model = build("PixArt")
    attn = model.transformer_blocks[0].attn2
    x, context = torch.randn(2, 5, 32), torch.randn(2, 7, 32)
    bias = torch.zeros(2, 1, 7)
    bias[1, :, 4:] = -10000.0
    expected = attn(x, context, attention_mask=bias)
    with patch(model, check=False):
        close(attn(x, context, attention_mask=bias), expected)
        close(attn(x, context, attention_mask=bias[:, 0]), expected)
        with pytest.raises(
            ValueError, match=r"attention_mask: expected shape \[2, T, S\] or \[2, S\], got \[4, 1, 7\]"
        ):
            attn(x, context, attention_mask=bias.repeat(2, 1, 1))


@pytest.mark.parametrize("tables", ["none", "the queries' alone", "the keys' alone"])
def test_norms_without_rotation(tables: str) -> None:
    """Lumina-Next's attention as a module: it normalises whether it rotates or not."""
    model = build("Lumina-Next")
    attn = model.layers[0].attn1
    x, mask = torch.randn(2, 5, attn.to_q.in_features), torch.ones(2, 5)
    turns = torch.polar(torch.ones(1), torch.rand(1, 5, attn.to_q.out_features // attn.heads // 2))
    name = {"the queries' alone": "query_rotary_emb", "the keys' alone": "key_rotary_emb"}.get(tables)
    options = {} if name is None else {name: turns}
    expected = attn(x, x, attention_mask=mask, **options)
    with patch(model, check=False):
        close(attn(x, x, attention_mask=mask, **options), expected)


@pytest.mark.parametrize("name", ["Flux", "Lumina 2"])
def test_norms_that_have_been_replaced(name: str) -> None:
    """By layer norms, when the model was patched already: they are called."""
    model = build(name)
    inputs = small_inputs(model)[1]
    attn = (model.transformer_blocks if name == "Flux" else model.layers)[0].attn
    before = run(model, inputs)["sample"]
    with patch(model, check=False):
        attn.norm_q, attn.norm_k = (torch.nn.LayerNorm(attn.norm_q.weight.shape) for _ in range(2))
        found = run(model, inputs)["sample"]
    close(found, run(model, inputs)["sample"])
    assert (found - before).abs().max() > 1e-3


def test_an_adapter() -> None:
    peft = pytest.importorskip("peft", reason="needs peft: pip install peft")
    model = build("Flux")
    inputs = small_inputs(model)[1]
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v", "proj_out"], init_lora_weights=False))
    expected, before = gradients(model, inputs), run(model, inputs)["sample"]
    with patch(model):
        close(run(model, inputs)["sample"], before)
        for key, gradient in gradients(model, inputs).items():
            close(gradient, expected[key])


def test_fused_projections_and_chunked_networks() -> None:
    flux, sd3 = build("Flux"), build("SD3")
    expected = [run(model, small_inputs(model)[1])["sample"] for model in (flux, sd3)]
    with patch(flux), patch(sd3):
        for block in sd3.transformer_blocks:
            block.set_chunk_feed_forward(4, 1)
        close(run(sd3, small_inputs(sd3)[1])["sample"], expected[1])
        flux.fuse_qkv_projections()
        close(run(flux, small_inputs(flux)[1])["sample"], expected[0])
    close(run(flux, small_inputs(flux)[1])["sample"], expected[0])


def test_proportional_attention_and_a_hook() -> None:
    """Lumina's scale for more tokens than in training; and a norm that somebody listens to is called."""
    model = build("Lumina-Next")
    inputs = {**small_inputs(model)[1], "cross_attention_kwargs": {"base_sequence_length": 9}}
    expected = run(model, inputs)["sample"]
    calls: list[int] = []
    with patch(model):
        block = model.layers[0]
        for norm in (block.norm2, block.ffn_norm1, block.attn1.norm_q, block.attn2.norm_k):
            norm.register_forward_hook(lambda *_: calls.append(1))
        close(run(model, inputs)["sample"], expected)
    assert calls == [1] * 4


@pytest.mark.parametrize("name", ["Flux", "Lumina 2", "SD3"])
def test_norms_of_queries_that_somebody_waits_for(name: str) -> None:
    model = build(name)
    inputs, calls = small_inputs(model)[1], []
    expected = run(model, inputs)["sample"]
    norms = [x for path, x in model.named_modules() if path.endswith((".norm_q", ".norm_k"))]
    with patch(model):
        for norm in norms:
            norm.register_forward_hook(lambda module, *_: calls.append(module))
        close(run(model, inputs)["sample"], expected)
    assert len(calls) == len(norms) and set(calls) == set(norms)


def test_processors_come_back() -> None:
    model = build("SD3")
    before = model.attn_processors
    patch(model)
    assert all(after is not before[name] for name, after in model.attn_processors.items())
    unpatch(model)
    assert all(after is before[name] for name, after in model.attn_processors.items())
