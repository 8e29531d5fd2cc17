"""Conversations in JSON as LLaVA writes them: what is read, what is refused; and what scenes become in shards."""

import json
from typing import Any

import pytest
import torch

from blip3o.data import scenes, text
from blip3o.data.conversations import conversations
from blip3o.data.llava import Turn, read_turns
from blip3o.data.scene_shards import scene_samples, turns_of
from blip3o.data.shards import Wrong
from blip3o.processor import Processor


def said(*turns: tuple[str, Any]) -> dict[str, Any]:
    return {"conversations": [{"from": speaker, "value": value} for speaker, value in turns]}


def test_turns() -> None:
    table = said(
        ("system", "Be kind."), ("human", "<image>\nWhat is it?"), ("gpt", "A cat."), ("human", "Why?"), ("gpt", "So.")
    )
    turns = read_turns(table, pictured=True)
    assert [turn.role for turn in turns] == ["system", "user", "assistant", "user", "assistant"]
    assert turns[1] == Turn("user", "What is it?", pictured=True) and turns[3] == Turn("user", "Why?")
    assert read_turns(said(("human", "It?\n<image>"), ("gpt", " yes\n")), pictured=True) == [
        Turn("user", "It?", pictured=True),
        Turn("assistant", " yes\n"),
    ]
    assert read_turns(said(("human", "Hi"), ("gpt", "Ho")), pictured=False)[0] == Turn("user", "Hi")


@pytest.mark.parametrize(
    ("table", "pictured", "reason"),
    [
        (None, False, "a list"),
        ({}, False, "a list"),
        ({"conversations": []}, False, "a list"),
        ({"conversations": "hello"}, False, "a list"),
        ({"conversations": ["hello"]}, False, "turn 0 must have"),
        (said(("human", "Hi"), ("user", "Ho")), False, "turn 1 must have"),
        (said(("human", "Hi"), ("gpt", 7)), False, "turn 1 must have"),
        (said(("human", "Hi"), ("gpt", " \n")), False, "turn 1 says nothing"),
        (said(("human", "<image>"), ("gpt", "Ho")), True, "turn 0 says nothing"),
        (said(("human", "Hi")), False, "take turns"),
        (said(("system", "Hi")), False, "take turns"),
        (said(("gpt", "Ho"), ("human", "Hi")), False, "take turns"),
        (said(("human", "Hi"), ("human", "Hi"), ("gpt", "Ho")), False, "take turns"),
        (said(("human", "Hi"), ("gpt", "Ho"), ("system", "No")), False, "take turns"),
        (said(("human", "Hi"), ("gpt", "Ho")), True, "1 times, got 0"),
        (said(("human", "<image>Hi"), ("gpt", "Ho")), False, "0 times, got 1"),
        (said(("human", "<image>Hi<image>"), ("gpt", "Ho")), True, "1 times, got 2"),
        (said(("human", "Hi"), ("gpt", "<image>Ho")), True, "human's turns 1 times"),
    ],
)
def test_other_conversations_are_faults(table: dict[str, Any] | None, pictured: bool, reason: str) -> None:
    with pytest.raises(Wrong, match=reason) as caught:
        read_turns(table, pictured)
    assert caught.value.kind == "conversation"


def test_scenes_talk_as_the_world_does() -> None:
    """Read back through the tokenizer, the turns are the very words of the conversation they were made from."""
    index, processor = torch.arange(20), Processor()
    asked = conversations(scenes.sample(3, index), 3, index, 2)
    samples = list(scene_samples(3, 20, turns=2))
    for row, (key, parts) in enumerate(samples):
        table = json.loads(parts["json"])
        assert table["conversations"] == turns_of(asked.ids[row]) and key == f"{row:08}"
        turns = read_turns(table, pictured=True)
        assert [turn.pictured for turn in turns] == [True, False, False, False]
        words = [word for turn in turns for word in processor.encode(turn.text)]
        assert words == [word for word in asked.ids[row].tolist() if word >= len(text.SPECIAL)]
        short, long = table["captions"]["short"], table["captions"]["long"]
        assert parts["txt"].decode() == short
        for thing in table["objects"]:
            assert f"a {thing['size']} {thing['color']} {thing['shape']} {thing['cell']}" in long
        processor.encode(long)


def test_scenes_refuse() -> None:
    for options, reason in (({"picture": "gif"}, "picture must be"), ({"turns": 0}, "turns"), ({"side": 0}, "side")):
        with pytest.raises(ValueError, match=reason):
            next(scene_samples(3, 1, **options))  # type: ignore[arg-type]
