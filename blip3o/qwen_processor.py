"""The released models' texts and pictures: Qwen2.5-VL's tokenizer, template and patches, from transformers.

Words of the templates: a turn is <|im_start|>role, a line end, its content, <|im_end|>, a line end; a picture in it is
<|vision_start|>, one <|image_pad|> for each of its tokens, <|vision_end|>.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from blip3o.config import Blip3oConfig
from blip3o.processor import check_text, open_image
from blip3o.weights_files import CorruptModel, read_json

Template = Literal["released", "training", "raw"]
Side = Literal["left", "right"]
SYSTEM = "You are a helpful assistant."
CAPTION = "Please generate image based on the following caption: {}"
PICTURE, PAD, DRAW = "<|vision_start|><|image_pad|><|vision_end|>", "<|image_pad|>", "[IMG]"
ADDED = (DRAW, "[/IMG]", "<image>")  # what the released models' tokenizer has behind Qwen2.5-VL's words, in this order
TOKENIZER, IMAGES = "tokenizer.json", "preprocessor_config.json"
FILES = (  # of a folder, that belong to its tokenizer and image processor
    TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja", "chat_template.json", IMAGES, "generation_config.json",
)  # fmt: skip


class QwenProcessor:
    """Texts to ids, pictures to patches, for the model of `config`; transformers' tokenizer and image processor do it.

    files       what they were read from
    completed   content of tokenizer.json, where the file of that name lacks words that were added

    ValueError if the tokenizer's special words, or the sizes of patches, are not the configuration's.
    """

    def __init__(
        self,
        tokenizer: Any,
        images: Any,
        config: Blip3oConfig,
        files: Sequence[Path] = (),
        completed: str | None = None,
    ) -> None:
        self.tokenizer, self.images, self.config = tokenizer, images, config
        self.files, self.completed = tuple(files), completed
        expected = {PAD: config.image_token, DRAW: config.query_start_token, "<|im_end|>": config.end_token}
        found = {word: tokenizer.convert_tokens_to_ids(word) for word in expected}
        if found != expected:
            raise ValueError(f"the tokenizer's special tokens must be {expected}, got {found}")
        for name in ("patch_size", "temporal_patch_size", "merge_size") if config.vision else ():
            size = getattr(config.vision, name)
            if getattr(images, name) != size:
                raise ValueError(f"{IMAGES}: {name} must be the model's, {size}, got {getattr(images, name)!r}")

    @classmethod
    def from_pretrained(cls, folder: Path, config: Blip3oConfig, complete: bool = False) -> QwenProcessor:
        """Of a checkpoint's folder. Raises FileNotFoundError without tokenizer.json, ValueError without transformers.

        Without preprocessor_config.json pictures are handled as transformers does by default.

        complete   the folder is Qwen2.5-VL's own: see `complete_tokenizer` for the words that its tokenizer gets
        """
        if not (folder / TOKENIZER).exists():
            raise FileNotFoundError(
                f"{folder / TOKENIZER} is missing: the checkpoint's tokenizer, as transformers saves it"
            )
        try:
            from transformers import PreTrainedTokenizerFast

            processor = _image_processor()
        except ImportError as error:
            raise ValueError(f"texts need transformers, pip install 'blip3o[transformers]': {error}") from None
        for name in FILES:  # transformers does not say which of them it cannot read
            if name.endswith(".json") and (folder / name).exists() and name != "vocab.json":
                if not isinstance(read_json(folder / name), Mapping):
                    raise CorruptModel(f"{folder / name} must be a table")
        completed = complete_tokenizer(folder, config)[0] if complete else None
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        if complete:
            tokenizer.backend_tokenizer.add_special_tokens(list(ADDED))
        if (folder / IMAGES).exists():
            images = processor.from_pretrained(folder, local_files_only=True)
        else:
            images = processor()
        return cls(tokenizer, images, config, [folder / name for name in FILES if (folder / name).exists()], completed)

    def save(self, folder: Path) -> None:
        """Write what it was read from into a folder: the same files, tokenizer.json with the words that were added."""
        for file in self.files:
            shutil.copyfile(file, folder / file.name)
        if self.completed is not None:
            (folder / TOKENIZER).write_text(self.completed, encoding="utf-8")

    def encode(self, text: str) -> list[int]:
        """Ids of a text, whose special words count. Raises TypeError when it is no string, ValueError for no text."""
        check_text(text)
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special words left out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    # drawing

    def drawing_prompt(self, prompt: str, template: Template = "released") -> list[int]:
        """Ids of a text to be drawn, up to the word that asks for a picture; the queries follow.

        template   "released": as the released inference code writes it, up to the assistant's turn
                   "training": as in training, where the assistant's empty turn is closed
                   "raw": the text alone
        """
        if template not in get_args(Template):
            raise ValueError(f"template must be one of {get_args(Template)}, got {template!r}")
        if not isinstance(prompt, str):
            raise TypeError(f"prompts must be strings, got {type(prompt).__name__}")
        if template == "raw":
            return self.encode(prompt + DRAW)
        closed = "<|im_end|>\n" if template == "training" else ""
        turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": CAPTION.format(prompt)}]
        return self.encode(default_template(turns) + closed + DRAW)

    def pad(self, rows: Sequence[Sequence[int]], side: Side = "left") -> tuple[Tensor, Tensor]:
        """ids int64 [B, T] and mask bool [B, T], True for text.

        Raises ValueError for no rows, an empty row, or an unknown side.
        """
        if side not in get_args(Side):
            raise ValueError(f"padding_side must be one of {get_args(Side)}, got {side!r}")
        if not rows:
            raise ValueError("prompts must be at least one, got none")
        if not all(rows):
            empty = ", ".join(str(i) for i, row in enumerate(rows) if not row)
            raise ValueError(f"prompts must not be empty, got {len(rows)} of which these are, counted from 0: {empty}")
        longest = max(len(row) for row in rows)
        ids = torch.full((len(rows), longest), self.config.pad_token)
        mask = torch.zeros(len(rows), longest, dtype=torch.bool)
        for i, row in enumerate(rows):
            place = slice(longest - len(row), longest) if side == "left" else slice(0, len(row))
            ids[i, place], mask[i, place] = torch.tensor(row), True
        return ids, mask

    # conversations

    def conversation(self, messages: Sequence[Mapping[str, Any]]) -> tuple[list[int], Tensor | None, list[Any]]:
        """Ids, patches [P, values] and grids (frames, rows, columns) of a conversation that the assistant goes on with.

        messages   [{"role": ..., "content": text or a list of {"type": "text", "text": ...} and {"type": "image",
                   "image": a path, a PIL image or a tensor [3, H, W] in 0..1}}, ...]
        The checkpoint's own template is used where it has one. Raises ValueError for messages of another form, which
        it names, and for a picture that cannot be read.
        """
        turns, pictures = _turns(messages)
        if self.tokenizer.chat_template is None:
            text = default_template(turns)
        else:
            from jinja2 import TemplateError

            try:
                text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            except TemplateError as error:
                raise ValueError(f"the checkpoint's chat_template cannot write these messages: {error}") from None
        pieces = text.split(PAD)
        if len(pieces) != len(pictures) + 1:
            raise ValueError(f"messages must hold as many pictures as {PAD}, got {len(pictures)} for {len(pieces) - 1}")
        if not pictures:
            return self.encode(text), None, []
        found = self.images(images=pictures, return_tensors="pt")
        grids = [tuple(grid) for grid in found["image_grid_thw"].tolist()]
        merged = self.images.merge_size**2
        counts = [frames * rows * columns // merged for frames, rows, columns in grids]
        text = pieces[0] + "".join(PAD * count + piece for count, piece in zip(counts, pieces[1:], strict=True))
        return self.encode(text), found["pixel_values"], grids


def complete_tokenizer(folder: Path, config: Blip3oConfig) -> tuple[str, int]:
    """tokenizer.json of Qwen2.5-VL's folder with [IMG], [/IMG] and <image>, and how many ids it had before.

    The words are special, and the last of the vocabulary, as in the released models; those that the file has already
    stay where they are. Raises CorruptModel for a file that is no tokenizer.json, ValueError, which names the words,
    unless ids and their number are then the configuration's.
    """
    path = folder / TOKENIZER
    content = read_json(path)
    if not isinstance(content, Mapping) or not {"added_tokens", "model"} <= content.keys():
        raise CorruptModel(f"{path} is not a tokenizer.json: it must be a table with added_tokens and model")
    tokenizer = Tokenizer.from_file(str(path))
    new = [word for word in ADDED if tokenizer.token_to_id(word) is None]
    tokenizer.add_special_tokens(list(ADDED))
    expected = {"<|endoftext|>": config.pad_token, "<|im_end|>": config.end_token, PAD: config.image_token}
    expected |= {word: config.query_start_token + i for i, word in enumerate(ADDED)}
    found = {word: tokenizer.token_to_id(word) for word in expected}
    words = 1 + max(tokenizer.get_vocab().values())
    if found != expected or words != config.llm.vocab_size:
        raise ValueError(
            f"{path}: with {', '.join(ADDED)} behind its own words there must be {config.llm.vocab_size} of them, and "
            f"special ones must have the ids {expected}, got {words} and {found}"
        )
    return tokenizer.to_str(pretty=True), words - len(new)


def _image_processor() -> Any:
    """transformers' class that needs no torchvision; the only one of its name before there were two."""
    try:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil as found
    except ModuleNotFoundError:
        from transformers import Qwen2VLImageProcessor as found
    return found


def _turns(messages: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[Image.Image]]:
    """The messages with {"type": "image"} for each picture, and the pictures."""
    turns: list[dict[str, Any]] = []
    pictures: list[Image.Image] = []
    if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
        raise ValueError(f"messages must be a list of turns, at least one, got {messages!r}")
    for message in messages:
        if not isinstance(message, Mapping):
            raise ValueError(f"a message must be a table with a role and a content, got {message!r}")
        role, content = message.get("role"), message.get("content")
        if role not in ("system", "user", "assistant") or not isinstance(content, str | Sequence):
            raise ValueError(f"a message must have a role (system, user, assistant) and a content, got {message!r}")
        parts: list[dict[str, str]] = []
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind == "image" and "image" in part:
                pictures.append(open_image(part["image"]))
                parts.append({"type": "image"})
            elif kind == "text" and isinstance(part.get("text"), str):
                parts.append({"type": "text", "text": part["text"]})
            else:
                kinds = '{"type": "text", "text": ...} or {"type": "image", "image": ...}'
                raise ValueError(f"a part of a message must be {kinds}, got {part!r}")
        turns.append({"role": role, "content": content if isinstance(content, str) else parts})
    return turns, pictures


def default_template(turns: Sequence[Mapping[str, Any]]) -> str:
    """Qwen2.5-VL's template, up to where the assistant goes on."""
    opening = [] if turns[0]["role"] == "system" else [{"role": "system", "content": SYSTEM}]
    text = ""
    for turn in [*opening, *turns]:
        content = turn["content"]
        if not isinstance(content, str):
            content = "".join(part["text"] if part["type"] == "text" else PICTURE for part in content)
        text += f"<|im_start|>{turn['role']}\n{content}<|im_end|>\n"
    return f"{text}<|im_start|>assistant\n"
