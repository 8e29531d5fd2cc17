"""Drawing and answering: what a seed decides, that a batch changes nothing, and what is refused."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from blip3o import generate as module
from blip3o.data import scenes, text
from blip3o.generate import answer_ids, ask, decode, draw, generate, noise_for
from blip3o.model import Blip3o
from blip3o.processor import Processor

PROMPTS = ("a red circle", "draw a large green square above a small cyan cross", "two purple squares")
# Sums in another order differ in the last bits, which a sampler carries along; a wrong row differs in the first digit.
CLOSE = {"atol": 2e-3, "rtol": 0.0}


def encoded(prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    processor = Processor()
    return text.left_pad([text.drawing_prompt(processor.encode(prompt)) for prompt in prompts])


def test_drawings(lively: Blip3o) -> None:
    drawn = generate(lively, Processor(), PROMPTS, n=2, steps=3)
    assert drawn.shape == (6, 3, 32, 32) and drawn.dtype == torch.float32
    assert bool(drawn.isfinite().all()) and 0 <= drawn.min() and drawn.max() <= 1
    flat = drawn.flatten(1)
    assert all((flat[i] - flat[j]).abs().max() > 0.01 for i in range(6) for j in range(i))
    assert torch.equal(drawn, generate(lively, Processor(), PROMPTS, n=2, steps=3))


def test_a_drawing_is_the_same_alone_and_in_any_batch(lively: Blip3o) -> None:
    together = generate(lively, Processor(), PROMPTS, n=3, seed=5, steps=3)
    for row, prompt in enumerate(PROMPTS):
        for k in range(3):
            alone = generate(lively, Processor(), [prompt], seed=5 + k, steps=3)
            torch.testing.assert_close(together[3 * row + k], alone[0], **CLOSE)


def test_a_prompt_is_read_once_for_all_its_seeds(lively: Blip3o, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, mask = encoded(PROMPTS)
    rows = [rows.repeat_interleave(2, 0) for rows in (ids, mask)]
    expected = draw(lively, *rows, [4, 9] * 3, steps=3)
    read: list[int] = []
    condition = Blip3o.condition

    def counting(model: Blip3o, ids: Tensor, mask: Tensor) -> Tensor:
        read.append(len(ids))
        return condition(model, ids, mask)

    monkeypatch.setattr(Blip3o, "condition", counting)
    torch.testing.assert_close(draw(lively, ids, mask, [4, 9] * 3, steps=3), expected, **CLOSE)
    assert read == [3]


def test_noise_belongs_to_its_seed(lively: Blip3o) -> None:
    features, pixels = noise_for(lively, [3, 4, 3, 2**63 - 1])
    assert features.shape == (4, lively.config.feature_grid**2, lively.config.clip.width)
    assert pixels.shape == (4, 3, 32, 32)
    for noise in (features, pixels):
        assert torch.equal(noise[0], noise[2]) and not torch.equal(noise[0], noise[1])
    alone = noise_for(lively, [4])
    assert torch.equal(alone[0][0], features[1]) and torch.equal(alone[1][0], pixels[1])
    many = torch.cat([t.flatten() for t in noise_for(lively, range(50))])
    assert abs(many.mean().item()) < 0.02 and abs(many.std().item() - 1) < 0.02


def test_the_state_of_torchs_own_generator_is_neither_used_nor_moved(lively: Blip3o) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = generate(lively, Processor(), PROMPTS[:1], steps=2)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(first, generate(lively, Processor(), PROMPTS[:1], steps=2))


def test_guidance_and_prompt_matter(lively: Blip3o) -> None:
    ids, mask = encoded(PROMPTS[:1])
    plain = draw(lively, ids, mask, [0], steps=3, guidance=1.0)
    assert (draw(lively, ids, mask, [0], steps=3, guidance=5.0) - plain).abs().max() > 1e-3
    other = draw(lively, *encoded(PROMPTS[1:2]), [0], steps=3, guidance=1.0)
    assert (other - plain).abs().max() > 1e-3
    nothing, other = (
        draw(lively, *encoded(PROMPTS[i : i + 1]), [0], steps=3, guidance=0.0) for i in (0, 1)
    )  # guidance 0 draws without the prompt
    torch.testing.assert_close(nothing, other, **CLOSE)


def test_drawing_needs_no_gradients_and_leaves_none(lively: Blip3o) -> None:
    drawn = generate(lively, Processor(), PROMPTS[:1], steps=2)
    assert not drawn.requires_grad and all(parameter.grad is None for parameter in lively.parameters())


def test_bfloat16_model(lively: Blip3o) -> None:
    model = Blip3o(lively.config).eval()
    model.load_state_dict(lively.state_dict())
    model.to(torch.bfloat16)
    drawn = generate(model, Processor(), PROMPTS, steps=2)
    assert drawn.dtype == torch.bfloat16 and bool(drawn.isfinite().all())
    assert isinstance(ask(model, Processor(), torch.rand(3, 32, 32), "how many circles ?"), str)


# answers


QUESTIONS = ("what colour is the circle ?", "how many objects are there ?", "is there a red square ?")


def test_answers_are_the_same_alone_and_in_a_batch(lively: Blip3o) -> None:
    processor, cells = Processor(), lively.config.feature_grid**2
    rows = [text.question_prompt(processor.encode(question), cells) for question in QUESTIONS]
    with torch.no_grad():
        features = lively.features(scenes.render(scenes.sample(3, torch.arange(3))))
    ids, mask = text.left_pad(rows)
    together = answer_ids(lively, ids, mask, features, limit=12)
    assert together.shape[0] == 3 and 1 <= together.shape[1] <= 12
    for row in range(3):
        alone = answer_ids(lively, *text.left_pad([rows[row]]), features[row : row + 1], limit=12)[0]
        assert torch.equal(together[row, : len(alone)], alone)
        assert not together[row, len(alone) :].any()  # padding


def test_decoding_with_the_cache_is_greedy_decoding(lively: Blip3o) -> None:
    """Token by token, the whole row read anew each time."""
    cells = lively.config.feature_grid**2
    row = text.question_prompt(Processor().encode(QUESTIONS[0]), cells)
    with torch.no_grad():
        features = lively.features(scenes.render(scenes.sample(3, torch.arange(1))))
        ids, expected = torch.tensor([row]), []
        for _ in range(8):
            token = lively.llm.logits(lively.read(ids, features))[0, -1, : len(text.WORDS)].argmax()
            expected.append(token.item())
            if token == lively.config.end_token:
                break
            ids = torch.cat([ids, token.view(1, 1)], dim=1)
    assert answer_ids(lively, *text.left_pad([row]), features, limit=8)[0].tolist() == expected


def scripted(model: Blip3o, monkeypatch: pytest.MonkeyPatch, rows: list[list[int]]) -> None:
    """Let the model say these tokens, whatever it reads."""
    said = iter(zip(*rows, strict=True))

    def logits(hidden: Tensor) -> Tensor:
        tokens = torch.tensor(next(said))
        return torch.nn.functional.one_hot(tokens, model.config.llm.vocab_size)[:, None].float()

    monkeypatch.setattr(model.llm, "logits", logits)


def test_answers_end_at_the_end_token(lively: Blip3o, monkeypatch: pytest.MonkeyPatch) -> None:
    end, pad = lively.config.end_token, lively.config.pad_token
    ids, mask = text.left_pad([[1, 30, 31], [1, 30]])
    scripted(lively, monkeypatch, [[20, end, 21, 22], [23, 24, 25, end]])
    answers = answer_ids(lively, ids, mask, None, limit=6)
    assert answers.tolist() == [[20, end, pad, pad], [23, 24, 25, end]]
    scripted(lively, monkeypatch, [[20, 21, 22], [23, 24, 25]])
    assert answer_ids(lively, ids, mask, None, limit=3).shape == (2, 3)


def test_spare_ids_are_never_said(lively: Blip3o, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lively.config.llm.vocab_size > len(text.WORDS)
    ids, mask = text.left_pad([[1, 30, 31]])
    scripted(lively, monkeypatch, [[len(text.WORDS), len(text.WORDS) - 1]])
    assert answer_ids(lively, ids, mask, None, limit=2)[0].tolist() == [0, len(text.WORDS) - 1]


def test_ask(lively: Blip3o, monkeypatch: pytest.MonkeyPatch) -> None:
    processor = Processor()
    picture = scenes.render(scenes.sample(3, torch.arange(1)))[0]
    answer = ask(lively, processor, picture, "What colour is the circle?")
    assert isinstance(answer, str) and answer == ask(lively, processor, picture, "what color is the circle ?")
    assert all(parameter.grad is None for parameter in lively.parameters())
    red, end = processor.encode("red")[0], lively.config.end_token
    scripted(lively, monkeypatch, [[red, end]])
    assert ask(lively, processor, picture, "what colour is the circle ?") == "red"


# what is refused


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        (PROMPTS[:1], {"n": 0}, "n must be at least 1, got 0"),
        (PROMPTS[:1], {"n": -3}, "n must be at least 1, got -3"),
        (PROMPTS[:1], {"steps": 0}, "steps must be at least 1, got 0"),
        (PROMPTS[:1], {"guidance": math.nan}, "guidance must be finite, got nan"),
        (PROMPTS[:1], {"guidance": math.inf}, "guidance must be finite, got inf"),
        (PROMPTS[:1], {"seed": -1}, r"seeds must be .* in 0\.\.2\^63 - 1, got \[-1\]"),
        (PROMPTS[:1], {"seed": 2**63}, r"seeds must be .* got \[9223372036854775808\]"),
        (["a red dragon eats a house"], {}, "unknown: 'dragon', 'eats', 'house' in 'a red dragon eats a house'"),
        (["a red circle", "a blue zebra"], {}, "unknown: 'zebra'"),
        ([""], {}, "text must hold at least one word, got ''"),
        (["  \n "], {}, "text must hold at least one word"),
        ([], {}, "rows must hold at least one row"),
    ],
)
def test_wrong_drawings_are_named(
    lively: Blip3o, prompts: Sequence[str], options: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        generate(lively, Processor(), prompts, **options)  # type: ignore[arg-type]


def test_wrong_questions_are_named(lively: Blip3o) -> None:
    picture = torch.zeros(3, 32, 32)
    with pytest.raises(ValueError, match="text must hold at least one word"):
        ask(lively, Processor(), picture, "")
    with pytest.raises(ValueError, match="unknown: 'elephant'"):
        ask(lively, Processor(), picture, "where is the elephant?")
    with pytest.raises(ValueError, match=r"images must be \[B, 3, 32, 32\], got \[1, 3, 16, 32\]"):
        ask(lively, Processor(), picture[:, :16], "how many circles ?")
    with pytest.raises(ValueError, match="limit must be at least 1 token, got 0"):
        answer_ids(lively, *text.left_pad([[1, 2]]), None, limit=0)


def test_seeds_must_fit_the_prompts(lively: Blip3o) -> None:
    ids, mask = encoded(PROMPTS)
    for seeds in ([], [1], [1, 2, 3, 4]):
        with pytest.raises(ValueError, match=f"seeds must be a multiple of the 3 prompts, got {len(seeds)}"):
            draw(lively, ids, mask, seeds)


def test_a_model_without_a_decoder_says_so(lively: Blip3o) -> None:
    model = Blip3o(replace(lively.config, decoder=None))
    with pytest.raises(ValueError, match="model 'tiny' has no visual decoder of its own"):
        generate(model, Processor(), PROMPTS[:1])
    with pytest.raises(ValueError, match="model 'tiny' has no visual decoder of its own"):
        decode(model, torch.zeros(1, 4, 32), torch.zeros(1, 3, 32, 32))


def test_defaults_live_in_one_place(lively: Blip3o, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(*_: object, **options: object) -> Tensor:
        seen.append((options["guidance"], options["steps"]))
        return torch.zeros(1, 4, 32)

    monkeypatch.setattr(module, "sample_targets", spy)
    generate(lively, Processor(), PROMPTS[:1])
    assert seen == [(module.GUIDANCE, module.STEPS)]
