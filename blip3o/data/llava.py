"""Conversations with a picture as LLaVA writes them in JSON:

    {"conversations": [{"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A cat."}, ...]}

A "system" turn may come first; then human and gpt take turns, and gpt has the last word. One of the human's turns holds
<image> where the sample has a picture. The picture comes first in its turn, wherever the mark stands, as LLaVA trains.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from blip3o.data.shards import Wrong

ROLES: Mapping[str, Literal["system", "user", "assistant"]] = {"system": "system", "human": "user", "gpt": "assistant"}
IMAGE = "<image>"


@dataclass(frozen=True)
class Turn:
    """text has no mark; pictured: the picture is shown before it."""

    role: Literal["system", "user", "assistant"]
    text: str
    pictured: bool = False


def read_turns(table: Mapping[str, Any] | None, pictured: bool) -> list[Turn]:
    """The turns of a sample's JSON, whose sample has a picture or none. Raises Wrong of the kind "conversation"."""
    said = None if table is None else table.get("conversations")
    if not isinstance(said, list) or not said:
        raise Wrong("conversation", 'a list "conversations" of turns is expected')
    turns = [_turn(number, turn) for number, turn in enumerate(said)]
    spoken = turns[1:] if turns[0].role == "system" else turns
    expected = ["user", "assistant"] * (max(2, len(spoken) + 1) // 2)
    if [turn.role for turn in spoken] != expected:
        raise Wrong("conversation", f"human and gpt must take turns and gpt end, got {[turn['from'] for turn in said]}")
    marks = sum(turn["value"].count(IMAGE) for turn in said)
    if marks != pictured or any(turn.pictured and turn.role != "user" for turn in turns):
        raise Wrong("conversation", f"{IMAGE} must be in the human's turns {int(pictured)} times, got {marks} in all")
    return turns


def _turn(number: int, turn: object) -> Turn:
    if not isinstance(turn, dict) or turn.get("from") not in ROLES or not isinstance(turn.get("value"), str):
        raise Wrong("conversation", f'turn {number} must have "from" (human, gpt or system) and a text "value"')
    text = turn["value"]
    role, pictured = ROLES[turn["from"]], IMAGE in text
    if pictured:
        text = text.replace(IMAGE, "").strip()
    if not text.strip():
        raise Wrong("conversation", f"turn {number} says nothing")
    return Turn(role, text, pictured)
