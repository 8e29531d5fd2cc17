"""Captions, prompts and questions, checked by an oracle that reads strings and knows nothing of how they were made."""

import itertools
import random
import re
from collections import Counter, defaultdict
from functools import cache

import pytest
import torch
from torch import Tensor

from blip3o.data import captions as captions_module
from blip3o.data import conversations as conversations_module
from blip3o.data import text
from blip3o.data.captions import applicable
from blip3o.data.scenes import CELLS, COLORS, HELD_OUT, KINDS, PAIR_HELD_OUT, RELATIONS, SHAPES, SIZES, Scenes, sample
from blip3o.data.words import (
    NONCE_COLORS,
    NONCE_SHAPES,
    TOKEN,
    VOCAB_SIZE,
    WORDS,
)

NUMBERS = ("zero", "one", "two", "three")
NONCE = torch.cat([NONCE_COLORS, NONCE_SHAPES])
COLOR, SHAPE, SIZE = "|".join(COLORS), "|".join(SHAPES), "|".join(SIZES)
PLURAL = {"circles": "circle", "squares": "square", "triangles": "triangle", "crosses": "cross", "objects": None}
PLURALS = "|".join(PLURAL)
CAPTION_TYPES = text.CAPTION_KINDS
HELD_OUT_TEXT = re.compile("|".join(rf"\b{color} {shape}(s|es)?\b" for color, shape in HELD_OUT))

Object = dict[str, str]  # colour, shape, size, row, column


def objects_of(scenes: Scenes, i: int) -> list[Object]:
    found = []
    for o in range(int(scenes.count[i])):
        row, column = CELLS[scenes.cell[i, o]].split()
        color, shape, size = COLORS[scenes.color[i, o]], SHAPES[scenes.shape[i, o]], SIZES[scenes.size[i, o]]
        found.append({"colour": color, "shape": shape, "size": size, "row": row, "column": column})
    return found


def is_related(a: Object, relation: str, b: Object) -> bool:
    return {
        "left of": (a["column"], b["column"]) == ("left", "right"),
        "right of": (a["column"], b["column"]) == ("right", "left"),
        "above": (a["row"], b["row"]) == ("top", "bottom"),
        "below": (a["row"], b["row"]) == ("bottom", "top"),
    }[relation]


# --- the oracle for questions -----------------------------------------------------------------------------------------

THE = rf"the ({COLOR}) ({SHAPE})"
RELATION = "((?:to the )?left of|(?:to the )?right of|above|below)"
PLACE = "(top left|top right|bottom left|bottom right|top|bottom|left|right)"
PATTERNS = {  # a colour is asked of a shape, a shape of a colour, anything else of a colour and a shape
    "colour": rf"what colour is the ({SHAPE})|what is the colour of the ({SHAPE})",
    "shape": rf"what shape is the ({COLOR}) object|what is the shape of the ({COLOR}) object",
    "size": rf"(?:what size|how large) is {THE}",
    "count": rf"how many (?:({COLOR}) )?({PLURALS}) are (?:there|in the picture)",
    "exist": rf"is there a (?:({COLOR}) )?({SHAPE}|object)(?: in the picture)?",
    "related": rf"is {THE} {RELATION} {THE}",
    "what related": rf"what is {RELATION} {THE}",
    "where related": rf"where is {THE} relative to {THE}",
    "where": rf"where is {THE}",
    "at": rf"is {THE} at the {PLACE}",
    "what at": rf"what is at the {PLACE}",
    "is size": rf"is {THE} ({SIZE})",
    "describe": "describe the picture|what is in the picture|what do you see|describe what you see",
}


def matching(objects: list[Object], color: str | None, noun: str | None) -> list[Object]:
    return [o for o in objects if color in (None, o["colour"]) and noun in (None, "object", o["shape"])]


def the(objects: list[Object], color: str | None, noun: str | None) -> Object:
    found = matching(objects, color, noun)
    assert len(found) == 1, f"'the {color} {noun}' names {len(found)} of {objects}"
    return found[0]


def yes(truth: bool) -> str:
    return "yes" if truth else "no"


def describe(objects: list[Object]) -> str:
    """In reading order, as evaluation questions expect it."""
    order = sorted(objects, key=lambda o: (o["row"] == "bottom", o["column"] == "right"))
    return " , ".join(f"a {o['size']} {o['colour']} {o['shape']} {o['row']} {o['column']}" for o in order)


@cache
def parse(question: str) -> tuple[str, tuple[str | None, ...]]:
    """What is asked, of PATTERNS, and the words in its groups."""
    question = question.removesuffix(" ?")
    [(kind, match)] = [(k, m) for k, pattern in PATTERNS.items() if (m := re.fullmatch(pattern, question))]
    return kind, match.groups()


def oracle(question: str, objects: list[Object]) -> tuple[str, str]:
    """(what is asked, the one right answer). A question that names no object, or two, is an error."""
    kind, parts = parse(question)
    if kind == "colour":
        return kind, the(objects, None, parts[0] or parts[1])["colour"]
    if kind == "shape":
        return kind, the(objects, parts[0] or parts[1], None)["shape"]
    if kind == "size":
        return kind, the(objects, *parts)["size"]
    if kind == "where":
        found = the(objects, *parts)
        return kind, f"{found['row']} {found['column']}"
    if kind == "count":
        return kind, NUMBERS[len(matching(objects, parts[0], PLURAL[parts[1]]))]
    if kind == "exist":
        return kind, yes(bool(matching(objects, *parts)))
    if kind == "related":
        a, b = the(objects, *parts[:2]), the(objects, *parts[3:])
        return kind, yes(is_related(a, parts[2].removeprefix("to the "), b))
    if kind == "what related":
        b = the(objects, *parts[1:])
        [a] = [o for o in objects if is_related(o, parts[0].removeprefix("to the "), b)]
        return kind, f"{a['colour']} {a['shape']}"
    if kind == "where related":
        a, b = the(objects, *parts[:2]), the(objects, *parts[2:])
        return kind, " ".join(r for r in RELATIONS if is_related(a, r, b))  # two of them: not to be asked of a picture
    if kind == "at":
        found = the(objects, *parts[:2])
        return kind, yes(set(parts[2].split()) <= {found["row"], found["column"]})
    if kind == "what at":
        [found] = [o for o in objects if set(parts[0].split()) <= {o["row"], o["column"]}]
        return kind, f"{found['colour']} {found['shape']}"
    if kind == "is size":
        return kind, yes(the(objects, *parts[:2])["size"] == parts[2])
    return kind, describe(objects)


# --- the oracle for captions ------------------------------------------------------------------------------------------

NOUN = (
    rf"(?:a|one) (?:({SIZE}) )?(?:({COLOR}) )?({SHAPE})"
    rf"(?: (?:at the )?(top left|top right|bottom left|bottom right|top|bottom|left|right)(?! of))?"
)
SIDES = {"to its left": "left of", "to its right": "right of", "above it": "above", "below it": "below"}
Stated = tuple[str | None, str | None, str, str | None]  # size, colour, shape, position


def read_caption(words: str) -> tuple[list[Stated], str | None]:
    """The objects a caption states, in the order of Captions, and the relation of the first to the second."""
    body = re.search(
        rf"(?:exactly )?(?:two|three) .*|(?:a|one) (?:(?:{SIZE}) )?(?:(?:{COLOR}) )?(?:{SHAPE})\b.*", words
    )
    assert body, words
    prefix, phrase = words[: body.start()].strip(), body.group()
    singular = re.sub(r"\b(are|these)\b", lambda m: {"are": "is", "these": "this"}[m.group()], prefix)
    assert singular in captions_module.PREFIXES, words
    if many := re.fullmatch(rf"(?:exactly )?(two|three) (?:({SIZE}) )?(?:({COLOR}) )?({PLURALS})", phrase):
        number, size, color, plural = many.groups()
        assert ("is" in prefix.split()) is False
        return [(size, color, PLURAL[plural], None)] * NUMBERS.index(number), None
    assert "are" not in prefix.split()
    if inverted := re.fullmatch(f"{NOUN} with {NOUN} ({'|'.join(SIDES)})", phrase):
        groups = inverted.groups()
        return [groups[4:8], groups[:4]], SIDES[groups[8]]
    if related := re.fullmatch(f"{NOUN} {RELATION} {NOUN}", phrase):
        groups = related.groups()
        return [groups[:4], groups[5:]], groups[4].removeprefix("to the ")
    listed = re.split(r" , | and | with ", phrase)
    matches = [re.fullmatch(NOUN, part) for part in listed]
    assert all(matches), words
    return [match.groups() for match in matches if match], None


def holds(stated: list[Stated], relation: str | None, objects: list[Object]) -> bool:
    """Whether the statements account for exactly these objects, in some order."""

    def fits(order: tuple[Object, ...]) -> bool:
        return all(
            size in (None, o["size"]) and color in (None, o["colour"]) and shape == o["shape"]
            and set((place or "").split()) <= {o["row"], o["column"]}
            for (size, color, shape, place), o in zip(stated, order, strict=True)
        ) and (relation is None or is_related(order[0], relation, order[1]))  # fmt: skip

    return len(stated) == len(objects) and any(fits(order) for order in itertools.permutations(objects))


def worlds_of(stated: list[Stated], relation: str | None, rng: random.Random, least: int = 12) -> list[list[Object]]:
    """Pictures in which the statements hold: every way to place the objects, the rest at random."""
    placements, worlds = list(itertools.permutations(CELLS, len(stated))), []
    while len(worlds) < least:
        for places in placements:
            objects = [
                {
                    "colour": color or rng.choice(COLORS), "shape": shape, "size": size or rng.choice(SIZES),
                    "row": cell.split()[0], "column": cell.split()[1],
                }
                for (size, color, shape, _), cell in zip(stated, places, strict=True)
            ]  # fmt: skip
            asserted = [
                set((place or "").split()) <= set(cell.split())
                for (*_, place), cell in zip(stated, places, strict=True)
            ]
            if all(asserted) and (relation is None or is_related(objects[0], relation, objects[1])):
                assert holds(stated, relation, objects)
                worlds.append(objects)
    return worlds


def held_out_named(ids: Tensor) -> bool:
    """Whether a colour is followed by a shape (or its plural) that is held out for it."""
    table = torch.zeros(VOCAB_SIZE, VOCAB_SIZE, dtype=torch.bool)
    for color, shape in HELD_OUT:
        for word in (shape, *(plural for plural, single in PLURAL.items() if single == shape)):
            table[TOKEN[color], TOKEN[word]] = True
    return bool(table[ids[:, :-1], ids[:, 1:]].any())


# --- captions ---------------------------------------------------------------------------------------------------------


def test_captions_are_pure():
    index = torch.arange(200)
    scenes, order = sample(1, index), torch.randperm(200, generator=torch.Generator().manual_seed(0))
    whole, shuffled = text.captions(scenes, 1, index), text.captions(scenes[order], 1, index[order])
    assert [whole.text()[i] for i in order] == shuffled.text()
    for name in ("length", "kind", "count", "color", "shape", "size", "position", "relation"):
        assert torch.equal(getattr(whole[order], name), getattr(shuffled, name)), name
    assert [text.captions(scenes[i : i + 1], 1, index[i : i + 1]).text()[0] for i in range(40)] == whole.text()[:40]
    assert text.captions(scenes, 2, index).text() != whole.text()
    assert len(text.captions(scenes[:0], 1, index[:0])) == 0


def test_captions_say_what_is_there_and_what_their_tensors_say():
    index = torch.arange(2_000)
    scenes = sample(2, index)
    said = text.captions(scenes, 2, index)
    halves = (*CELLS, "top", "bottom", "left", "right")
    kinds = Counter()
    for i, words in enumerate(said.text()):
        stated, relation = read_caption(words)
        assert holds(stated, relation, objects_of(scenes, i)), words
        tokens = re.sub(r"\b(top|bottom) (left|right)\b", r"\1\2", words).split()  # a cell is one token
        assert [WORDS[token] for token in said.ids[i, : said.length[i]]] == tokens and not said.ids[
            i, len(tokens) :
        ].any()
        assert int(said.count[i]) == len(stated)
        assert relation == (None if said.relation[i] < 0 else RELATIONS[said.relation[i]])
        for o in range(3):
            tensors = (said.size[i, o], said.color[i, o], said.shape[i, o], said.position[i, o])
            names = (SIZES, COLORS, SHAPES, halves)
            read = tuple(None if value < 0 else table[value] for value, table in zip(tensors, names, strict=True))
            assert read == (stated[o] if o < len(stated) else (None,) * 4), words
        kinds[CAPTION_TYPES[said.kind[i]]] += 1
    assert min(kinds[kind] for kind in CAPTION_TYPES) > 80, kinds


def test_training_text_never_names_a_held_out_pair_and_is_of_the_training_part():
    for start in range(0, 50_000, 10_000):
        index = torch.arange(start, start + 10_000)
        scenes = sample(3, index)
        said = text.captions(scenes, 3, index)
        assert (text.split(said.ids) == 0).all()
        assert not held_out_named(said.ids)
        assert not held_out_named(text.conversations(scenes, 3, index, 2).ids)
        assert not held_out_named(text.conversations(scenes, 3, index, 2, image=False).ids)
    held = sample(3, torch.arange(100), held_out="only")
    assert held_out_named(text.captions(held, 3, torch.arange(100)).ids)  # the test can see them


def test_a_kind_can_be_forced_where_it_applies():
    index = torch.arange(300)
    scenes = sample(4, index, kind=KINDS.index("relation"))
    for kind in (captions_module.POSITION, captions_module.ATTRIBUTE, captions_module.FULL):
        assert applicable(scenes)[:, kind].all()
        assert (text.captions(scenes, 4, index, kind=kind).kind == kind).all()
    with pytest.raises(ValueError, match="kind must apply"):
        text.captions(scenes, 4, index, kind=captions_module.SINGLE)
    with pytest.raises(ValueError, match="index must have shape"):
        text.captions(scenes, 4, index[:-1])


def test_counting_captions_agree_in_number():
    scenes = sample(5, torch.arange(2_000), kind=KINDS.index("count"))
    said = text.captions(scenes, 5, torch.arange(2_000), kind=captions_module.COUNTING, train_only=False)
    for words in said.text():
        assert not re.search(r"\b(is|this|a (two|three))\b", words), words


# --- evaluation prompts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("category", text.CATEGORIES)
def test_prompts_are_many_and_never_trained_on(category: str):
    parts = [text.prompts(category, part, n) for part, n in ((0, 600), (1, 200), (2, 200))]
    strings = [prompt for part in parts for prompt in part.text()]
    assert len(set(strings)) == len(strings) == 1_000
    for number, part in enumerate(parts):
        assert (text.split(part.ids) == number).all()
        assert part.text() == text.prompts(category, number, len(part)).text()
    if category == "held_out":
        for words in strings:
            stated, _ = read_caption(words)
            assert all((color, shape) in HELD_OUT for _, color, shape, _ in stated), words
        kinds = torch.cat([part.kind for part in parts]).bincount(minlength=6)
        assert (kinds[[2, 3, 4, 5]] > 150).all() and kinds.sum() == 1_000
    else:
        assert all(CAPTION_TYPES[kind] == category for part in parts for kind in part.kind.tolist())
        assert not any(HELD_OUT_TEXT.search(words) for words in strings)
    if category == "color_attribution":
        for words in strings:
            (_, color, shape, _), (_, other_color, other_shape, _) = read_caption(words)[0]
            assert color != other_color and shape != other_shape
    if category in ("single_object", "two_object"):
        assert not any(set(words.split()) & set(COLORS) for words in strings)


def test_no_evaluation_prompt_is_ever_a_training_text():
    evaluated = {
        words for category in text.CATEGORIES for part in (1, 2) for words in text.prompts(category, part, 300).text()
    }
    index = torch.arange(10_000)
    scenes = sample(0, index)
    trained = set(text.captions(scenes, 0, index).text())
    described = text.questions("describe", 2_000, 0).answer_text()
    assert not evaluated & (trained | set(described))


def test_prompts_name_what_is_wrong():
    with pytest.raises(ValueError, match="category must be one of"):
        text.prompts("colour", 1, 10)
    with pytest.raises(ValueError, match="part must be"):
        text.prompts("colors", 3, 10)
    with pytest.raises(ValueError, match=r"n must be at most \d+ for category 'single_object' of part 'tune'"):
        text.prompts("single_object", 1, 2_000)


# --- conversations ----------------------------------------------------------------------------------------------------


def turns_of(talk: text.Conversations, i: int) -> tuple[str, list[tuple[str, str]]]:
    """What comes before the turns, and the turns as (question, answer), read off the special tokens."""
    words = " ".join(WORDS[token] for token in talk.ids[i].tolist() if token != text.PAD)
    start, *turns = re.sub(r"\b(top|bottom)(left|right)\b", r"\1 \2", words).split(" <user> ")  # a cell is one token
    pairs = []
    for turn in turns:
        question, answer = turn.split(" <assistant> ")
        assert answer.endswith(" <eos>") and answer.count("<eos>") == 1
        pairs.append((question, answer.removesuffix(" <eos>")))
    return start, pairs


@pytest.fixture
def all_forms_alike(monkeypatch: pytest.MonkeyPatch):
    """Each form of question as frequent as any other, however rare it is in training."""
    frequency = conversations_module.FORM_WEIGHT
    monkeypatch.setattr(conversations_module, "FORM_WEIGHT", torch.full_like(frequency, 1 / len(frequency)))


def test_answers_about_pictures_are_right(all_forms_alike: None):
    index = torch.arange(2_000)
    scenes = sample(6, index)
    talk = text.conversations(scenes, 6, index, 4)
    kinds = Counter()
    for i in range(len(index)):
        start, turns = turns_of(talk, i)
        assert start == "<bos>" + " <image>" * 4 and len(turns) == 4
        for question, answer in turns:
            kind, right = oracle(question, objects_of(scenes, i))
            if kind == "describe":  # the objects in any order
                answer, right = sorted(answer.split(" , ")), sorted(right.split(" , "))
            assert answer == right, (objects_of(scenes, i), question, answer)
            kinds[kind] += 1
    assert set(kinds) == set(PATTERNS) and min(kinds.values()) > 100, kinds


def test_captions_determine_their_answers(all_forms_alike: None):
    """In every world in which the caption holds, the answer is right: in every placement, the rest at random.

    Where something is, and where relative to another: as much as is the same in every such world.
    """
    index = torch.arange(700)
    scenes = sample(7, index)
    talk = text.conversations(scenes, 7, index, 6, image=False)
    rng, kinds = random.Random(0), Counter()
    for i in range(len(index)):
        start, turns = turns_of(talk, i)
        stated, relation = read_caption(start.removeprefix("<bos> "))
        worlds = [objects_of(scenes, i), *worlds_of(stated, relation, rng)]
        assert holds(stated, relation, worlds[0])
        for question, answer in turns:
            asked = [oracle(question, objects) for objects in worlds]
            kind = asked[0][0]
            kinds[kind] += 1
            if kind == "describe":
                told, nothing = read_caption(answer)
                assert nothing is None and all(holds(told, None, objects) for objects in worlds), (start, answer)
            elif kind in ("where", "where related"):
                settled = set.intersection(*(set(right.split()) for _, right in asked))
                assert answer and set(answer.split()) == settled, (start, question, answer)
            else:
                assert all(answer == right for _, right in asked), (start, question, answer, asked)
    assert set(kinds) == set(PATTERNS) and min(kinds.values()) > 20, kinds


def test_descriptions_of_captions_say_all_that_is_settled():
    """Of each object what is stated of it, and its row and column wherever they are the same in every placement."""
    index = torch.arange(1_500)
    scenes = sample(14, index)
    talk = text.conversations(scenes, 14, index, 1, image=False, describe=1.0)
    assert (talk.types == text.QUESTION_TYPES.index("describe")).all()
    rng, inferred = random.Random(0), 0
    for i in range(len(index)):
        start, [(_, answer)] = turns_of(talk, i)
        stated, relation = read_caption(start.removeprefix("<bos> "))
        worlds = worlds_of(stated, relation, rng, 1)
        expected = []
        for o, (size, color, shape, place) in enumerate(stated):
            rows, columns = {world[o]["row"] for world in worlds}, {world[o]["column"] for world in worlds}
            settled = " ".join(found.pop() for found in (rows, columns) if len(found) == 1) or None
            inferred += settled != place
            expected.append((size, color, shape, settled))
        told, nothing = read_caption(answer)
        assert nothing is None and Counter(told) == Counter(expected), (start, answer)
        assert answer.split(" , ")[0].startswith("a ") and not re.search(r"\b(at|the|one|with|and)\b", answer)
    assert inferred > 300


@pytest.mark.parametrize("image", [True, False])
def test_descriptions_to_train_on_have_no_order(image: bool):
    """Neither reading order nor the caption's order of mention: each of the 6 orders as often as any other."""
    index = torch.arange(2_400)
    scenes = sample(15, index, kind=KINDS.index("three"))
    talk, orders = text.conversations(scenes, 15, index, 1, image=image, describe=1.0), Counter()
    for i in range(len(index)):
        start, [(_, answer)] = turns_of(talk, i)
        first = describe(objects_of(scenes, i)) if image else start.removeprefix("<bos> ")
        shown, told = ([named[1:3] for named in read_caption(words)[0]] for words in (first, answer))
        if len(set(shown)) == 3:  # else the order cannot be told
            assert set(shown) == set(told)
            orders[tuple(shown.index(pair) for pair in told)] += 1
    total = orders.total()
    assert total > 1_500 and len(orders) == 6 and all(0.13 < n / total < 0.205 for n in orders.values()), orders


def test_targets_are_the_next_tokens_of_answers():
    index = torch.arange(300)
    scenes = sample(8, index)
    for talk in (text.conversations(scenes, 8, index, 5), text.conversations(scenes, 8, index, 5, image=False)):
        for ids, targets, segment in zip(talk.ids.tolist(), talk.targets.tolist(), talk.segment.tolist(), strict=True):
            answering, turn = False, 0
            for t, token in enumerate(ids):
                turn += token == text.USER
                assert segment[t] == (-1 if token == text.PAD else turn)
                answering = (answering or token == text.ASSISTANT) and token not in (text.EOS, text.PAD)
                assert targets[t] == (ids[t + 1] if answering else text.IGNORE)
            assert turn == 5
        assert talk.types.shape == (300, 5)


def test_conversations_are_pure_and_do_not_depend_on_the_batch():
    index = torch.arange(120)
    scenes = sample(9, index)
    for image in (True, False):
        whole = text.conversations(scenes, 9, index, 6, image=image)
        parts = [text.conversations(scenes[k : k + 7], 9, index[k : k + 7], 6, image=image) for k in range(0, 120, 7)]
        assert [turns_of(whole, i) for i in range(120)] == [turns_of(p, i) for p in parts for i in range(len(p))]
        assert torch.equal(whole.types, torch.cat([part.types for part in parts]))
        assert not torch.equal(whole.types, text.conversations(scenes, 10, index, 6, image=image).types)


def test_nonce_words_stand_for_one_thing_each_and_change_nothing_else():
    """Within a conversation every mention of a colour or shape is renamed alike, no two of them to the same word."""
    index = torch.arange(400)
    scenes = sample(15, index)
    plain = text.conversations(scenes, 15, index, 4, image=False)
    talk = text.conversations(scenes, 15, index, 4, image=False, nonce=1.0)
    singular = {TOKEN[plural]: TOKEN[shape] for plural, shape in PLURAL.items() if shape}
    renamed = Counter()
    for before, after, targets in zip(plain.ids.tolist(), talk.ids.tolist(), talk.targets.tolist(), strict=True):
        names = {(singular.get(a, a), singular.get(b, b)) for a, b in zip(before, after, strict=True)}
        assert len({a for a, _ in names}) == len({b for _, b in names}) == len(names)
        for a, b in names:
            assert a == b or b in (NONCE_COLORS if WORDS[a] in COLORS else NONCE_SHAPES)
            renamed[WORDS[a], a != b] += 1
        assert all(target in (text.IGNORE, token) for target, token in zip(targets, after[1:], strict=False))
    for word in (*COLORS, *SHAPES):
        assert 0.3 < renamed[word, True] / (renamed[word, True] + renamed[word, False]) < 0.7, word
    assert not held_out_named(talk.ids)
    for few in (0.0, 0.3):
        some = text.conversations(scenes, 15, index, 4, image=False, nonce=few).ids
        assert ((some == plain.ids).all(1) | (some == talk.ids).all(1)).all()
        assert abs(torch.isin(some, NONCE).any(1).float().mean().item() - few) < 0.1
    seen = text.conversations(scenes, 15, index, 4, nonce=1.0).ids
    assert not torch.isin(seen, NONCE).any(), "a picture shows colours and shapes that have names"


def test_the_share_of_question_types_can_be_set():
    index = torch.arange(1_000)
    scenes = sample(10, index, kind=torch.arange(1_000) % 2 * 3)
    weights = torch.zeros(8)
    weights[text.QUESTION_TYPES.index("relation")] = 1.0
    weights[text.QUESTION_TYPES.index("existence")] = 1e-6  # for pictures without relations
    types = text.conversations(scenes, 10, index, 4, describe=0.0, weights=weights).types
    relation = types == text.QUESTION_TYPES.index("relation")
    assert relation[scenes.count > 1].float().mean() > 0.99 and not relation[scenes.count == 1].any()
    with pytest.raises(ValueError, match="turns must be at least 1"):
        text.conversations(scenes, 0, index, 0)
    with pytest.raises(ValueError, match="index must have shape"):
        text.conversations(scenes, 0, index[1:], 1)


def blind(turns: list[tuple[str, str]]) -> dict[str, float]:
    """By what is asked: how often one is right who saw the answers to the first half, but never a picture."""
    asked = defaultdict(list)
    for question, answer in turns:
        asked[parse(question)[0]].append((question.removesuffix(" ?"), answer))
    scores = {}
    for kind, pairs in asked.items():
        half, table = len(pairs) // 2, defaultdict(Counter)
        for question, answer in pairs[:half]:
            table[question][answer] += 1
        usual = Counter(answer for _, answer in pairs).most_common(1)[0][0]
        guesses = [table[q].most_common(1)[0][0] if q in table else usual for q, _ in pairs[half:]]
        scores[kind] = sum(g == a for g, (_, a) in zip(guesses, pairs[half:], strict=True)) / (len(pairs) - half)
    return scores


def test_who_does_not_look_guesses(all_forms_alike: None):
    index = torch.arange(5_000)
    talk = text.conversations(sample(11, index), 11, index, 8, describe=0.0)
    scores = blind([turn for i in range(len(index)) for turn in turns_of(talk, i)[1]])
    limits = {
        "exist": 0.55, "related": 0.55, "at": 0.55, "is size": 0.55, "size": 0.55, "colour": 0.23, "shape": 0.33,
        "count": 0.4, "where": 0.3, "where related": 0.3, "what related": 0.1, "what at": 0.1,
    }  # fmt: skip
    assert set(scores) == set(limits)
    assert all(scores[kind] < limit for kind, limit in limits.items()), scores


def test_absent_things_are_near_misses():
    index = torch.arange(2_000)
    scenes = sample(12, index, kind=KINDS.index("three"))
    talk = text.conversations(scenes, 12, index, 4)
    hard = total = 0
    for i in range(len(index)):
        objects = objects_of(scenes, i)
        for question, answer in turns_of(talk, i)[1]:
            match = re.search(rf"a ({COLOR}) ({SHAPE})\b", question)
            if match and answer == "no" and not question.startswith("is the "):
                total += 1
                hard += bool(matching(objects, match[1], None)) and bool(matching(objects, None, match[2]))
    assert total > 150 and hard / total > 0.7


# --- evaluation questions and frames ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", text.QUESTION_TYPES)
@pytest.mark.parametrize("held_out", [False, True])
def test_evaluation_questions_are_right(kind: str, held_out: bool):
    asked = text.questions(kind, 300, 1, held_out=held_out)
    assert len(asked) == 300 == len(asked.scenes)
    present = asked.scenes.shape >= 0
    assert (PAIR_HELD_OUT[asked.scenes.color[present], asked.scenes.shape[present]] == held_out).all()
    for i, (question, answer) in enumerate(zip(asked.question_text(), asked.answer_text(), strict=True)):
        assert oracle(question, objects_of(asked.scenes, i))[1] == answer
        assert held_out or not HELD_OUT_TEXT.search(question)
    assert asked.question_text() == text.questions(kind, 300, 1, held_out=held_out).question_text()
    if kind == "count":
        assert max(Counter(asked.answer_text()).values()) < 0.3 * len(asked)


def test_evaluation_questions_name_what_is_wrong():
    with pytest.raises(ValueError, match="kind must be one of"):
        text.questions("colour", 10, 0)
    with pytest.raises(ValueError, match="n must be at least 1"):
        text.questions("color", 0, 0)


def test_frames():
    index = torch.arange(50)
    said = text.captions(sample(13, index), 13, index)
    ids, mask = text.drawing_prompts(said)
    rows = [text.drawing_prompt(row[:n].tolist()) for row, n in zip(said.ids, said.length, strict=True)]
    for one, other in zip(text.left_pad(rows), (ids, mask), strict=True):
        assert torch.equal(one, other)
    assert (ids[:, -1] == text.IMAGE_START).all() and torch.equal(mask, ids != text.PAD)

    asked = text.questions("relation", 20, 0)
    ids, mask = text.question_prompts(asked, 3)
    rows = [text.question_prompt([i for i in row if i != text.PAD], 3) for row in asked.question.tolist()]
    for one, other in zip(text.left_pad(rows), (ids, mask), strict=True):
        assert torch.equal(one, other)
    assert ((ids == text.IMAGE).sum(1) == 3).all() and (ids[:, -1] == text.ASSISTANT).all()
    with pytest.raises(ValueError, match="rows must hold"):
        text.left_pad([])
