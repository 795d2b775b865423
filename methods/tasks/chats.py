"""Chats: turns of a system, a user, an assistant and tools, as the model's own chat template writes them.

The assistant's turns are learned. Where they are is not looked for by their texts, which may occur anywhere else too:
the template writes the chat once more with a mark in the place of an answer, and what is before and behind the mark is
what the template writes around the answer.
"""

from __future__ import annotations

import datetime
import warnings
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from methods.tasks.records import Record
from methods.tasks.task import LanguageModelling, Row, Span, Task, UnfitModelError, check_encodable

ROLES = ("system", "user", "assistant", "tool")
TODAY = datetime.datetime(2024, 7, 26, 12)
"""What a template that asks for the time is told, so that a run goes on, and is repeated, on another day."""
_PARTS = {f"%{letter}": TODAY.strftime(f"%{letter}") for letter in "aAwdbBmyYHIpMSfjUWGuVcxX"}
_CALENDAR = (
    "{%- macro strftime_now(form) -%}{{ form"
    + "".join(f" | replace('{directive}', '{part}')" for directive, part in _PARTS.items())
    + " }}{%- endmacro -%}"
)
"""In front of a template it is heard in place of what asks the clock."""


def chat_row(record: Record, where: str) -> Row:
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where} has no 'messages', a list of turns with 'role' and 'content'.")
    for number, message in enumerate(messages, 1):
        turn = f"{where}: message {number}"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"{turn} has no 'role', which is one of {', '.join(ROLES)}.")
        if message["role"] not in ROLES:
            raise ValueError(f"{turn} has the role {message['role'][:40]!r}, which is none of {', '.join(ROLES)}.")
        if not isinstance(message.get("content"), str):
            raise ValueError(f"{turn} has no text as its 'content'.")
        check_encodable(message["content"], "content", turn)
        if unknown := [key for key, value in message.items() if key not in ("role", "content") and value is not None]:
            raise ValueError(f"{turn} has {unknown[0]!r}, which is not read: a turn has 'role' and 'content'.")
        if message["role"] == "assistant" and not message["content"].strip():
            raise ValueError(f"{turn} is an empty answer, which nothing can be learned from.")
    if all(message["role"] != "assistant" for message in messages):
        raise ValueError(f"{where} has no turn of the assistant, which is what is learned.")
    return {"messages": [{"role": message["role"], "content": message["content"]} for message in messages]}


def chat_task(rows: Sequence[Row]) -> Task:
    """The task of training rows that are chats."""
    del rows
    return LanguageModelling(name="chat", fields=(), group=_asked, spans=_spans, ended=False)


def _asked(row: Row) -> str:
    """What a chat is about: its first question."""
    return next((m["content"] for m in row["messages"] if m["role"] == "user"), row["messages"][0]["content"])


def _spans(row: Row, tokenizer: Any) -> list[Span]:
    """The chat as the tokenizer's own template writes it; the assistant's turns are learned, and nothing else.

    A turn begins where the template has asked for it, and reaches to where the template is done with it, spaces and
    line breaks at its end aside.
    """
    messages = row["messages"]
    if tokenizer.chat_template is None:
        raise UnfitModelError(
            "The model's tokenizer has no chat template, by which 'messages' would be written: take a model that was "
            "made for chats, or rows with 'prompt' and 'completion'."
        )
    whole, spans, done = _render(messages, tokenizer), [], 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start, end = _place(messages, i, whole, tokenizer)
        # Where the template asks for an answer otherwise than it begins one that is there (with a mark of reasoning,
        # say), or where nothing comes before, the turn begins with the answer's text.
        asked = _render(messages[:i], tokenizer, True) if i else ""
        asks = asked != _render(messages[:i], tokenizer) and whole.startswith(asked) and done <= len(asked) <= start
        start = len(asked) if asks else start
        end += len(_closing(messages, i, whole, end, tokenizer).rstrip())
        spans += [Span(whole[done:start], False), Span(whole[start:end].rstrip(), True)]
        done = start + len(spans[-1].text)
    _tell_unwritten(messages, tokenizer)
    if "strftime_now" in tokenizer.get_chat_template():
        warnings.warn(
            f"The model's chat template writes the date: it is told that of {TODAY:%d %B %Y}, always, so that a run "
            "can be repeated.",
            stacklevel=2,
        )
    return [*spans, Span(whole[done:], False)]


def _place(messages: Sequence[Record], number: int, whole: str, tokenizer: Any) -> tuple[int, int]:
    """Where the content of a message begins and ends in the chat, as the template writes it.

    Raises:
      ValueError: if the template writes another text than the message's, spaces around it aside.
    """
    content, mark = messages[number]["content"], _mark(messages)
    marked = _render(_with(messages, number, mark), tokenizer)
    before, found, behind = marked.partition(mark)
    end = len(whole) - len(behind)
    around = found and mark not in behind and whole.startswith(before) and whole.endswith(behind)
    if not around or len(before) > end or whole[len(before) : end].strip() != content.strip():
        text = content.strip()
        # A template may write its length too, or take its reasoning apart: it is where its text is, if that is there
        # once, and goes with the answer.
        if whole.count(text) == 1 and text not in marked:
            return whole.index(text), whole.index(text) + len(text)
        if number < len(messages) - 1:
            alone = messages[: number + 1]
            _place(alone, number, _render(alone, tokenizer), tokenizer)
            raise _differently(content)  # once more follows
        raise ValueError(
            f"the model's chat template does not write the answer {text[:40]!r} as it is, or where cannot be told."
        )
    return len(before), end


def _differently(content: str) -> ValueError:
    return ValueError(
        f"the model's chat template writes what comes before and with {content.strip()[:40]!r} differently once more "
        "follows, so that the assistant's part cannot be told: give chats of one answer each."
    )


def _mark(messages: Sequence[Record]) -> str:
    """A text that no message has."""
    mark = "\ue000"
    while any(mark in message["content"] for message in messages):
        mark += "\ue000"
    return mark


def _with(messages: Sequence[Record], number: int, content: str) -> list[Record]:
    return [{**each, "content": content} if i == number else each for i, each in enumerate(messages)]


def _closing(messages: Sequence[Record], number: int, whole: str, end: int, tokenizer: Any) -> str:
    """What the template writes behind an answer that ends at `end`, and that belongs to it.

    That is what it writes there whether more follows or not, or the one mark that ends the whole chat.

    Raises:
      ValueError: if the template writes the chat up to here differently once more follows, or where it does not tell
        what belongs to the answer.
    """
    content, last = messages[number]["content"].strip(), number == len(messages) - 1
    other = _render([*messages, {"role": "user", "content": "?"}] if last else messages[: number + 1], tokenizer)
    marks = sorted(tokenizer.get_added_vocab(), key=len)
    if not other.startswith(whole[:end]):
        if last and not _without_marks(whole[end:], marks):  # nothing can be compared, but nobody else says anything
            return whole[end:]
        raise _differently(content)
    tails = whole[end:], other[end:]
    pairs = zip(*tails, strict=False)
    alike = "".join(ours for ours, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    shared = _whole_marks(alike, tails, marks)
    rests = [tail[len(shared) :].lstrip() for tail in tails]
    if last and not shared.strip() and rests[0].rstrip() in marks:
        return tails[0]  # a mark of the end that an earlier answer does not have
    told = bool(shared.strip()) and all(any(rest.startswith(mark) for mark in marks) for rest in rests)
    if all(rests) and not told:
        raise ValueError(
            f"the model's chat template does not end {content[:40]!r} as it does where {'more' if last else 'nothing'} "
            "follows, so that the assistant's part cannot be told: take a model with another template"
            f"{'' if last else ', or give chats of one answer each'}."
        )
    return shared


def _without_marks(text: str, marks: Sequence[str]) -> str:
    """What is left of a text without the tokenizer's marks and spaces."""
    for mark in reversed(marks):
        text = text.replace(mark, "")
    return text.strip()


def _whole_marks(shared: str, tails: Sequence[str], marks: Sequence[str]) -> str:
    """What two texts begin with alike, without the beginning of one of the tokenizer's marks that is not in both."""
    for tail in tails:
        for mark in marks:
            at = tail.rfind(mark, 0, len(shared) + len(mark) - 1)
            if at >= 0 and at < len(shared) < at + len(mark):
                return _whole_marks(shared[:at], tails, marks)
    return shared


def _tell_unwritten(messages: Sequence[Record], tokenizer: Any) -> None:
    """Warns where the template leaves out a turn, such as one of the system."""
    for number, message in enumerate(messages):
        if message["role"] == "assistant" or not message["content"].strip():
            continue
        mark = _mark(messages)
        if mark not in _render(_with(messages, number, mark), tokenizer):
            warnings.warn(
                f"The model's chat template leaves out what the {message['role']} says in a chat or more: the model "
                "does not read it.",
                stacklevel=2,
            )


def _render(messages: Sequence[Record], tokenizer: Any, asked: bool = False) -> str:
    if not messages and not asked:
        return ""
    template = tokenizer.get_chat_template()
    if "strftime_now" in template:
        template = _CALENDAR + template
    try:
        return tokenizer.apply_chat_template(
            list(messages), chat_template=template, tokenize=False, add_generation_prompt=asked
        )
    except ModuleNotFoundError:
        raise
    except Exception as error:  # a template raises what it likes on turns that it was not made for
        shown = messages[0]["content"][:40] if messages else ""
        raise ValueError(f"the model's chat template does not write the chat {shown!r} ({error}).") from error
