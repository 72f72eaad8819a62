"""What a record of somebody's data says: the forms in which people keep samples become one.

Known are `messages` (OpenAI, Hugging Face; Anthropic's and Ollama's images, too), `conversations` (LLaVA, ShareGPT),
`texts` (The Cauldron), questions with answers, captions, and plain text. A key that is not used is counted, and refused
where it could change what the model is to see.
"""

import contextlib
import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qe_dist.core.errors import ConfigError
from qe_dist.data import turns
from qe_dist.data.images import SUFFIXES
from qe_dist.data.text import check_text
from qe_dist.data.turns import MARK, Image, Turns, Unused, bounds_of, given, listed, text_of

DESCRIBE, DESCRIBE_ALL = "Describe the image.", "Describe the images."
"""What is asked where there is nothing but a caption."""
CONVERSATION = ("messages", "conversations", "conversation", "texts")
QUESTION = ("question", "prompt", "instruction", "query", "inputs")
ANSWER = ("answer", "response", "output", "completion", "targets")
CAPTION = ("caption", "text")
IMAGES = ("image", "images", "image_url", "image_path")
SYSTEM = ("system", "system_prompt")
COMMON = (*IMAGES, *SYSTEM, *turns.BOUNDS, "kind")
"""Keys that go with every form."""
KNOWN = (*CONVERSATION, *QUESTION, *ANSWER, *CAPTION, *COMMON, "input")
REFUSED = {
    **turns.REFUSED,
    **dict.fromkeys(("choices", "options"), "choices are not put into the question; write them there"),
    **dict.fromkeys(("documents", "context"), "it is not put into the question; write it there"),
}
PAIR = ("user", "assistant")
"""Keys of a turn that is a question with its answer."""
UNUSED = "unused"
"""What `columns` calls a key that is to be left alone."""
CLOSE = 0.8
"""Similarity of a name to a known one from which on it is taken for a slip."""


@dataclass(frozen=True)
class Said:
    """What a record says."""

    kind: str
    text: str | None = None
    messages: tuple[Mapping[str, Any], ...] = ()
    images: tuple[Image, ...] = ()
    """In the order of their parts, named as the record has them."""


def renamed(record: Any, columns: Sequence[tuple[str, str]]) -> Any:
    """The record with our names in place of its own."""
    if not isinstance(record, Mapping) or not columns:
        return record
    theirs = {name for _, name in columns}
    own = {ours for ours, name in columns if name in record}
    kept = {key: value for key, value in record.items() if key not in theirs | own}
    return kept | {ours: record[name] for ours, name in columns if name in record and ours != UNUSED}


def check_columns(columns: Sequence[tuple[str, str]]) -> None:
    """ConfigError for a name of ours that there is not."""
    for ours, _ in columns:
        if ours not in (*KNOWN, UNUSED):
            raise ConfigError(
                f"--columns {ours}=...: we read {', '.join(KNOWN)}, and {UNUSED} for what is not to be read"
            )


def understand(record: Any, origin: str, unused: Unused) -> Said:
    """Reads a record. ConfigError, with `origin` in front, for what has no plain meaning."""
    if (
        isinstance(record, list)
        and record
        and all(isinstance(m, Mapping) and {"role", "from"} & m.keys() for m in record)
    ):
        record = {"messages": record}
    if not isinstance(record, Mapping):
        raise ConfigError(f"{origin}: expected a JSON object, found {type(record).__name__}")
    own = given(record)
    form = _form(own, origin)
    images = [image for key in IMAGES if key in own for image in listed(own[key])]
    _check_others(own, form, bool(images), origin, unused)
    if form[0] in CAPTION and not images:
        return Said("text", text=_filled(own, form[0], origin, unused))
    said, name = _turns(own, form, len(images), origin, unused)
    read = Turns(origin, images, bounds_of(own, origin), unused).read(said, name)
    kind = str(own.get("kind", "image" if read.images else "chat"))
    return Said(kind, messages=tuple(read.messages), images=tuple(read.images))


def _form(own: Mapping[str, Any], origin: str) -> tuple[str, ...]:
    """The keys that say what is said."""
    for names in (CONVERSATION, QUESTION, CAPTION):
        found = [name for name in names if name in own]
        answers = [name for name in ANSWER if name in own] if names is QUESTION else []
        if not found or (names is QUESTION and not answers):
            continue
        for twice in (found, answers):
            if len(twice) > 1:
                raise ConfigError(
                    f"{origin}: has {twice[0]!r} and {twice[1]!r}, of which one is to be read: "
                    f"--columns {UNUSED}={twice[1]}"
                )
        return (*found, *answers, *(["input"] if names is QUESTION and "input" in own else []))
    raise ConfigError(
        f"{origin}: expected 'messages', 'text', or 'prompt' and 'answer'; found {sorted(map(str, own))}. --columns "
        "question=NAME,answer=NAME,image=NAME says what they are called"
    )


def _check_others(own: Mapping[str, Any], form: Sequence[str], images: bool, origin: str, unused: Unused) -> None:
    """Tells of keys that are not used. ConfigError for those that are much like a known one, or like an image."""
    if len(pictures := [name for name in IMAGES if name in own]) > 1:
        raise ConfigError(f"{origin}: has {pictures[0]!r} and {pictures[1]!r}, of which one is to be read")
    for key, value in own.items():
        if key in form or key in COMMON:
            continue
        if key in REFUSED and value not in ([], "", {}):
            raise ConfigError(f"{origin}: has {key!r}: {REFUSED[key]}, or say --columns {UNUSED}={key}")
        if key not in KNOWN and not key.endswith(("_id", "_ids")):
            if near := difflib.get_close_matches(key, KNOWN, n=1, cutoff=CLOSE):
                raise ConfigError(
                    f"{origin}: has {key!r}; is {near[0]!r} meant? --columns {near[0]}={key}, or {UNUSED}={key}"
                )
            if _like_an_image(value, named=not images):
                raise ConfigError(f"{origin}: {key!r} looks like an image: --columns image={key}, or {UNUSED}={key}")
        unused(key)
    if form[0] in CAPTION and not images:
        for key in {*SYSTEM, "kind", *turns.BOUNDS} & own.keys():
            unused(key)


def _like_an_image(value: Any, named: bool) -> bool:
    """named: a path counts, too."""
    if isinstance(value, list | tuple):
        return any(_like_an_image(one, named) for one in value)
    if isinstance(value, Mapping):
        return isinstance(value.get("bytes"), bytes)
    return isinstance(value, str) and named and (value.lower().endswith(SUFFIXES) or value.startswith("data:image/"))


def _turns(own: Mapping[str, Any], form: Sequence[str], images: int, origin: str, unused: Unused) -> tuple[Any, str]:
    """The messages that a record has or amounts to, and what their list is called."""
    name = form[0]
    if name in CONVERSATION:
        turns = _unfolded(own[name], unused)
    elif name in CAPTION:
        if MARK in (answer := _filled(own, name, origin, unused)):
            raise ConfigError(f"{origin}: {name!r} has {MARK} in it; give 'messages', with question and answer")
        turns = _asked(DESCRIBE if images == 1 else DESCRIBE_ALL, answer)
    else:
        answer = own[form[1]]
        if isinstance(answer, list) and len(answer) == 1:
            answer = answer[0]
        question = text_of(own[name], origin, f"{name!r}")
        if form[2:] and (more := text_of(own["input"], origin, "'input'")).strip():  # Alpaca's
            question = f"{question}\n{more}"
        turns = _asked(question, text_of(answer, origin, f"{form[1]!r}"))
    system = next((own[key] for key in SYSTEM if key in own), None)
    if system and isinstance(turns, list):
        turns = [{"role": "system", "content": system}, *turns]
    return turns, name


def _asked(question: str, answer: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _filled(own: Mapping[str, Any], name: str, origin: str, unused: Unused) -> str:
    """A text or caption; of several captions the first."""
    said = own[name]
    if isinstance(said, list) and said and all(isinstance(one, str) for one in said):
        for _ in said[1:]:
            unused(f"another {name}")
        said = said[0]
    if not isinstance(said, str) or not said.strip():
        raise ConfigError(f"{origin}: {name!r} is empty")
    return check_text(said, origin)


def _unfolded(turns: Any, unused: Unused) -> Any:
    """A list of turns, where tables have it as JSON in a text, as an object of lists, or as pairs of turns."""
    if isinstance(turns, str):
        with contextlib.suppress(ValueError, RecursionError):
            turns = json.loads(turns)
    if isinstance(turns, Mapping) and turns and all(isinstance(column, list) for column in turns.values()):
        lengths = {len(column) for column in turns.values()}
        if len(lengths) == 1:
            turns = [{key: column[i] for key, column in turns.items()} for i in range(lengths.pop())]
    if isinstance(turns, list) and turns and all(isinstance(t, Mapping) and {*PAIR} <= t.keys() for t in turns):
        for key in (key for turn in turns for key in turn.keys() - {*PAIR}):
            unused(f"a turn's {key}")
        turns = [{"role": role, "content": turn[role]} for turn in turns for role in PAIR]
    return turns
