"""patch and unpatch: the same functions afterwards, a self-check that refuses, errors that name the module."""

from __future__ import annotations

import copy
import inspect
import subprocess
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", reason="needs transformers: pip install transformers")
pytest.importorskip("diffusers", reason="needs diffusers: pip install diffusers")

from blip3o_kernels import PatchError, patch, register_attention, unpatch
from blip3o_kernels.drop_in import __main__ as table
from blip3o_kernels.drop_in import agreement, diffusion, heads, interface, language
from blip3o_kernels.drop_in.architectures import DIFFUSION, LANGUAGE, build

MODELS = [*LANGUAGE, *DIFFUSION]


def functions(model: nn.Module) -> dict[str, Any]:
    """Every module's class and forward, and every attention's processor."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        found[path] = (type(module), module.forward.__func__, vars(module).get("processor"))
    return found


def same(model: nn.Module, before: dict[str, Any]) -> bool:
    after = functions(model)
    return after.keys() == before.keys() and all(
        x is y for path in before for x, y in zip(after[path], before[path], strict=True)
    )


@pytest.mark.parametrize("name", MODELS)
def test_the_very_same_functions_come_back(name: str) -> None:
    model = build(name)
    before, attention = functions(model), implementation(model)
    names = [name for name, _ in model.named_parameters()]
    patched = patch(model)
    assert not same(model, before)
    assert {path for path, (kind, *_) in functions(model).items() if kind is not before[path][0]} <= {
        path if path != "model" else "" for path in vars(model)["_blip3o_patch"].served
    }
    assert names == [name for name, _ in model.named_parameters()]
    assert type(model).__name__ in repr(patched) and "attention" in repr(patched)
    unpatch(model)
    assert same(model, before) and implementation(model) == attention
    assert "_blip3o_patch" not in vars(model)


def implementation(model: nn.Module) -> str | None:
    return model.config._attn_implementation if hasattr(model.config, "_attn_implementation") else None


def test_a_block_ends_in_any_way() -> None:
    model = build("Llama")
    before = functions(model)
    with pytest.raises(KeyError), patch(model):
        raise KeyError
    assert same(model, before)


def test_another_model_of_the_class_is_left_alone() -> None:
    model, other = build("Llama"), build("Llama")
    before = functions(other)
    with patch(model):
        assert same(other, before)


def test_a_copy_of_a_patched_model_is_patched_and_its_own() -> None:
    model = build("Flux")
    before = functions(model)
    patch(model)
    twin = copy.deepcopy(model)
    unpatch(model)
    assert same(model, before) and not same(twin, before)
    unpatch(twin)
    assert [kind for kind, *_ in functions(twin).values()] == [kind for kind, *_ in before.values()]


def test_copies_of_modules_come_back_too() -> None:
    """PEFT makes them, for modules that it saves."""
    model = build("Llama")
    patch(model)
    twin = model.model.norm_copy = copy.deepcopy(model.model.norm)
    unpatch(model)
    assert type(twin) is type(model.model.norm) and type(twin).forward is twin.forward.__func__


def test_a_class_made_of_a_patched_one_is_named() -> None:
    model = build("Llama")
    patch(model)
    layer = model.model.layers[1]
    kind = type(layer)
    layer.__class__ = type("FSDPLlamaDecoderLayer", (kind,), {})
    with pytest.raises(PatchError, match=r"model\.layers\.1 \(FSDPLlama.*\): expected the class that it was"):
        unpatch(model)
    layer.__class__ = kind
    unpatch(model)


@pytest.mark.parametrize("name", ["Llama", "Flux"])
def test_a_part_of_a_patched_model_is_refused(name: str) -> None:
    model = build(name)
    before = functions(model)
    patch(model)
    patched = functions(model)
    with pytest.raises(PatchError, match="expected a module that is not patched already, with another model"):
        patch(model.model if name == "Llama" else model.transformer_blocks)
    assert same(model, patched)
    unpatch(model)
    assert same(model, before)


@pytest.mark.parametrize("name", ["Llama", "Flux"])
def test_signatures_stay(name: str) -> None:
    """Trainer looks at them for the columns of a data set."""
    model = build(name)
    before = {path: inspect.signature(module.forward) for path, module in model.named_modules()}
    with patch(model):
        assert {path: inspect.signature(module.forward) for path, module in model.named_modules()} == before


def test_a_saved_model_is_a_stock_one(tmp_path: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = build("Qwen2")
    with patch(model):
        model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config._attn_implementation == "sdpa" and type(again) is type(model)
    assert all(torch.equal(x, y) for x, y in zip(again.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("name", "module", "op"),
    [
        ("Llama", language, "rms_norm"),
        ("Llama", language, "rope"),
        ("Llama", language, "swiglu"),
        ("Llama", heads, "linear_cross_entropy"),
        ("Qwen3", language, "qk_norm_rope"),
        ("Mistral", interface, "attention"),
        ("PixArt", diffusion, "modulate"),
        ("Lumina 2", diffusion, "gated_residual"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_self_check_refuses_an_op_that_is_wrong(
    monkeypatch: pytest.MonkeyPatch, name: str, module: Any, op: str, dtype: torch.dtype
) -> None:
    model = build(name, dtype)
    before, attention = functions(model), implementation(model)
    right = vars(module)[op]

    def wrong(*arguments: Any, **named: Any) -> Any:
        y = right(*arguments, **named)
        return tuple(1.25 * x for x in y) if isinstance(y, tuple) else 1.25 * y

    monkeypatch.setattr(module, op, wrong)
    with pytest.raises(PatchError, match=rf"{type(model).__name__}: patched, .* differs by \d.*rounding explains \d"):
        patch(model)
    assert same(model, before) and implementation(model) == attention
    patch(model, check=False)
    unpatch(model)


def test_the_self_check_notices_padding_that_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """What happens without a mask function: transformers hands over no mask."""
    register_attention()
    model = build("Llama", torch.bfloat16)
    monkeypatch.setattr(language, "register_attention", lambda: None)
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    monkeypatch.delitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "blip3o")
    with pytest.raises(PatchError, match="logits differs by"):
        patch(model)


@pytest.mark.parametrize(("change", "dtype"), [(1.5, torch.float32), (8.0, torch.bfloat16)])
def test_the_self_check_notices_another_eps(monkeypatch: pytest.MonkeyPatch, change: float, dtype: torch.dtype) -> None:
    model = build("Llama", dtype, rms_norm_eps=0.02)
    right = language.rms_norm
    monkeypatch.setattr(language, "rms_norm", lambda x, weight, eps: right(x, weight, eps * change))
    with pytest.raises(PatchError, match="logits differs by"):
        patch(model)


def test_the_self_check_notices_an_output_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.modeling_outputs import CausalLMOutputWithPast

    model = build("Llama")
    before = functions(model)
    monkeypatch.setattr(heads.CausalLm, "output", lambda self, outputs, loss, _: CausalLMOutputWithPast(loss=loss))
    with pytest.raises(PatchError, match=r"patched, expected the outputs \['logits', 'loss'\], got \['loss'\]"):
        patch(model)
    assert same(model, before)


def test_training_mode_is_left_as_it_was() -> None:
    model = build("Llama").train()
    model.model.norm.eval()
    patch(model)
    assert model.training and not model.model.norm.training


@pytest.mark.parametrize("what", ["model", "layers"])
def test_a_model_that_is_compiled_in_place(what: str) -> None:
    """Compiled code does not see hooks that come later: the check runs without it, and leaves it where it was."""
    model = build("Llama")
    ids = torch.arange(12).view(2, 6)
    for module in [model] if what == "model" else model.model.layers:
        module.compile(backend="eager")
    expected = model(input_ids=ids).logits
    with patch(model):
        torch.testing.assert_close(model(input_ids=ids).logits, expected)
    assert torch.equal(model(input_ids=ids).logits, expected)


def test_one_thread_patches_at_a_time() -> None:
    model, refused = build("Llama"), []

    def run() -> None:
        try:
            patch(model)
        except PatchError as error:
            refused.append(str(error))

    before = functions(model)
    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 3 and all("expected one that is not patched already" in error for error in refused)
    unpatch(model)
    assert same(model, before)


def test_labels_of_another_length_are_named() -> None:
    model, ids = build("Llama").train(), torch.arange(12).view(2, 6)
    with patch(model), pytest.raises(ValueError, match=r"labels: expected shape \[2, 6\], got \[2, 5\]"):
        model(input_ids=ids, labels=ids[:, 1:])


class Other(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attention = nn.MultiheadAttention(8, 2)


def broken(what: str) -> nn.Module:
    model = build({"processor": "Flux", "two eps": "Qwen3", "two eps of Flux": "Flux"}.get(what, "Llama"))
    layer = None if hasattr(model, "transformer_blocks") else model.model.layers[1]
    if what == "eps":
        layer.input_layernorm.variance_epsilon = "small"
    elif what == "weight":
        layer.input_layernorm.weight = nn.Parameter(torch.ones(1, 48))
    elif what == "dropout":
        layer.self_attn.attention_dropout = 0.1
    elif what == "head":
        model.lm_head = None
    elif what == "hook":
        layer.mlp.forward = layer.mlp.forward
    elif what == "meta":
        model = model.to("meta")
    elif what == "patched":
        patch(model)
    elif what == "processor":
        model.transformer_blocks[0].attn.processor = len
    elif what == "two eps":
        layer.self_attn.k_norm.variance_epsilon = 0.25
    elif what == "two eps of Flux":
        model.transformer_blocks[0].attn.norm_added_k.eps = 0.25
    elif what == "not finite":
        model.lm_head.weight.data[0, 0] = float("nan")
    return model


ERRORS = {
    "eps": r"model\.layers\.1\.input_layernorm \(LlamaRMSNorm\): expected a number in variance_epsilon, got 'small'",
    "weight": r"model\.layers\.1\.input_layernorm .*expected a floating-point parameter of one dim.*\[1, 48\]",
    "dropout": r"model\.layers\.1\.self_attn \(LlamaAttention\): expected attention_dropout 0, got 0\.1",
    "head": r"model \(LlamaForCausalLM\): expected a module in lm_head, got None",
    "hook": r"model\.layers\.1\.mlp \(LlamaMLP\): expected its class's forward",
    "meta": r"model \(LlamaForCausalLM\): expected weights to check with, got the device meta",
    "patched": r"model \(LlamaForCausalLM\): expected one that is not patched already",
    "processor": r"transformer_blocks\.0\.attn \(FluxAttention\): expected a processor of FluxAttnProcessor, ",
    "two eps": r"model\.layers\.1\.self_attn .*: expected one eps in q_norm and k_norm, got \S+ and 0\.25",
    "two eps of Flux": r"\.0\.attn .*: expected one eps in norm_added_q and norm_added_k, got \S+ and 0\.25",
    "not finite": r"(loss|logits) of LlamaForCausalLM: expected finite numbers before it is patched",
}


@pytest.mark.parametrize("what", ERRORS)
def test_a_module_that_cannot_be_patched_is_named(what: str) -> None:
    model = broken(what)
    before = functions(model)
    with pytest.raises(PatchError, match=ERRORS[what]):
        patch(model)
    assert same(model, before)


def test_models_that_are_not_known_are_named() -> None:
    with pytest.raises(PatchError, match=r"self_attention \(torch.*MultiheadAttention\): expected an attention of"):
        patch(Other())
    with pytest.raises(PatchError, match=r"model \(torch.*Linear\): expected an attention of .*LlamaAttention"):
        patch(nn.Linear(2, 2))
    with pytest.raises(PatchError, match=r"expected a torch\.nn\.Module, got list"):
        patch([])  # type: ignore[arg-type]
    with pytest.raises(PatchError, match=r"model \(Linear\): expected a patched model"):
        unpatch(nn.Linear(2, 2))


class Wrapped(nn.Module):
    """A model of the user's with a layer of transformers in it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = build("Llama").model.layers[0]

    def forward(self, x: Tensor, positions: Any) -> Tensor:
        return self.layer(x, position_embeddings=positions)


def test_a_model_of_ones_own() -> None:
    model = Wrapped()
    inputs = {"x": torch.randn(2, 5, 48), "positions": (torch.ones(1, 5, 12), torch.zeros(1, 5, 12))}
    with pytest.raises(PatchError, match=r"model \(Wrapped\): expected one of .*inputs="):
        patch(model)
    with torch.no_grad():
        expected = model(**inputs)
        with patch(model, inputs=inputs) as patched:
            torch.testing.assert_close(model(**inputs), expected)
    assert patched.differences.keys() == {"0"} and patched.replaced["swiglu"] == 1


def test_another_attention_for_a_patched_model_is_refused() -> None:
    model = build("Llama")
    with patch(model), pytest.raises(RuntimeError, match="attn_implementation: expected 'blip3o' as long as"):
        model.set_attn_implementation("sdpa")
        model(input_ids=torch.ones(1, 3, dtype=torch.int64))


@pytest.mark.parametrize("name", interface._REFUSED)
def test_attention_refuses_what_it_does_not_know(name: str) -> None:
    x = torch.randn(1, 2, 3, 8)
    with pytest.raises(ValueError, match=f"{name}: expected None"):
        interface.attend(nn.Identity(), x, x, x, None, **{name: x})


def test_the_probe_is_noise_of_one_unit() -> None:
    model = nn.Sequential(nn.Identity())
    x = torch.rand(1000) + 1
    with agreement.noise(model, ["0"], 0):
        y = model(x)
    assert 0 < (y / x - 1).abs().max() <= 1.5 * torch.finfo(torch.float32).eps
    assert torch.equal(model(x), x)


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    table.main(["--models", "Gemma 3", "Sana"])
    out = capsys.readouterr().out
    assert "| Gemma 3 " in out and "qk_norm_rope x 2" in out and "Gemma3MLP" in out and "linear attention" in out
    with pytest.raises(SystemExit):
        table.main(["--models", "GPT-2"])


@pytest.mark.program(
    "benchmarks/drop_in.py", "--hidden", "64", "--layers", "1", "--vocabulary", "100", "--rows", "2", "--tokens", "32",
    "--steps", "3", "--seconds", "0.01",
)  # fmt: skip
def test_the_example_of_training(program: subprocess.CompletedProcess[str]) -> None:
    assert program.returncode == 0, program.stderr
    losses = [line.partition(": ")[2] for line in program.stdout.splitlines() if line.startswith("loss of")]
    assert len(losses) == 2 and losses[0] == losses[1] and len(losses[0].split()) == 3
    assert all(f"| {task} | " in program.stdout for task in ("a step of training", "reading a prompt", "16 new tokens"))
