"""Of a chat the assistant's turns are learned, wherever else their texts occur in what the template writes."""

import itertools

import pytest

from methods.tasks import FORMATS
from methods.tasks.language import tokenize_spans
from tests.methods.texts import tokenizer

LOOP = "{% for m in messages %}"
MARKS = ("<|im_start|>", "<|im_end|>", "<|user|>", "<|system|>", "<|assistant|>", "<|end|>", "[INST]", "[/INST]")
TEMPLATES = {
    "marks and roles": (
        LOOP + "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        lambda role: (f"<|im_start|>{role}\n", "<|im_end|>", "\n"),
        "",
    ),
    "roles in marks, texts without spaces around": (
        LOOP + "{{ '<<' + m['role'] + '>>\n\n' + m['content'] | trim + '<eot>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<<assistant>>\n\n' }}{% endif %}",
        lambda role: (f"<<{role}>>\n\n", "<eot>", ""),
        "",
    ),
    "no words in front of an answer": (
        LOOP + "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}",
        {"user": ("[INST] ", " [/INST]", ""), "assistant": (" ", "</s>", "")}.get,
        "",
    ),
    "the system's words with the last turn, if that is a question": (
        "{% if messages[0]['role'] == 'system' %}{% set said = messages[0]['content'] %}{% endif %}" + LOOP + "{% if "
        "m['role'] == 'user' %}{{ '[INST]' + (said + '\n' if said and loop.last else '') + m['content'] + '[/INST]' }}"
        "{% elif m['role'] == 'assistant' %}{{ m['content'] | trim + eos_token }}{% endif %}{% endfor %}",
        {"user": ("[INST]", "[/INST]", ""), "assistant": ("", "</s>", "")}.get,
        "",
    ),
    "an end of the text where no answer is asked for": (
        LOOP + "{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        lambda role: (f"<|{role}|>\n", "<|end|>", "\n"),
        "</s>",
    ),
}
"""A template after the pattern of a kind of models; of a role what is in front of its text, what ends it, and what is
behind it, or None where the template says nothing of it; and what ends the whole."""
ANSWERS = ("a", "assistant", "t", "im", "start", "end", "<", "|", "no", "INST", "e or", "s", "fine words", "/")
"""Pieces of the templates' own words, of the question, and of neither."""


def reader_of(template):
    reader = tokenizer()
    reader.add_special_tokens({"additional_special_tokens": list(MARKS)})
    reader.chat_template = template
    return reader


def read(messages, reader):
    """What is written, which of its tokens are learned, and the messages."""
    format = FORMATS["chat"]
    row = format.row({"messages": [dict(zip(("role", "content"), each, strict=True)) for each in messages]}, "here")
    (sequence,) = tokenize_spans(format.task([row]), [row], reader)
    return sequence, row["messages"]


def spans_of(messages, reader):
    """What is written, the runs of it that are learned, and the messages."""
    sequence, rows = read(messages, reader)
    pairs = zip(sequence.learned, sequence.ids, strict=True)
    runs = [(learned, [i for _, i in run]) for learned, run in itertools.groupby(pairs, key=lambda pair: pair[0])]
    return reader.decode(sequence.ids), [reader.decode(run) for learned, run in runs if learned], rows


@pytest.mark.filterwarnings("ignore:The model's chat template leaves out:UserWarning")
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("turns", ["one", "with the system", "two"])
def test_an_answer_is_learned_where_it_stands(name, turns):
    template, words, at_last = TEMPLATES[name]
    reader = reader_of(template)
    for answer in ANSWERS:
        asked = [("user", "Is it a yes or no? fine words, s t / start end")]
        messages = [("system", f"Say {answer}.")] * (turns == "with the system") + [*asked, ("assistant", answer)]
        if turns == "two":
            messages += [("user", f"Sure, {answer}?"), ("assistant", answer)]
        sequence, rows = read(messages, reader)
        parts = []
        for role, text in messages:
            if written := words(role):
                before, end, behind = written
                parts += [(before, False), (text + end, role == "assistant"), (behind, False)]
        parts.append((at_last, False))
        assert "".join(text for text, _ in parts) == reader.apply_chat_template(rows, tokenize=False)
        ids = [reader(text, add_special_tokens=False)["input_ids"] for text, _ in parts]
        learned = [is_learned for each, (_, is_learned) in zip(ids, parts, strict=True) for _ in each]
        assert sequence.ids == list(itertools.chain(*ids)), answer
        assert sequence.learned == learned, answer


def test_spaces_around_an_answer_are_the_templates_matter():
    reader = reader_of(TEMPLATES["marks and roles"][0])
    assert spans_of([("user", "Q"), ("assistant", "  no \n")], reader)[1] == ["  no \n<|im_end|>"]
    reader = reader_of(TEMPLATES["roles in marks, texts without spaces around"][0])
    assert spans_of([("user", "Q"), ("assistant", "  no \n")], reader)[1] == ["no<eot>"]


def test_a_chat_may_hold_any_character():
    reader = reader_of(TEMPLATES["marks and roles"][0])
    for answer in ("\ue000", "\ue000\ue000", "{{ x }}", "<|im_end|>", "\U0001f600 a"):
        whole, learned, rows = spans_of([("user", f"{answer}?"), ("assistant", answer)], reader)
        assert learned == [answer + "<|im_end|>"]
        assert whole == reader.apply_chat_template(rows, tokenize=False)


@pytest.mark.parametrize(
    "written", ["m['content'] | upper", "m['content'].split(' ')[-1]", "m['content'] ~ m['content']", "''"]
)
def test_an_answer_that_is_written_otherwise_is_refused(written):
    reader = reader_of(LOOP + "{{ '[INST]' + m['role'] + (" + written + ") + '<|end|>' }}{% endfor %}")
    with pytest.raises(ValueError, match="does not write the answer 'Well, no' as it is"):
        spans_of([("user", "a?"), ("assistant", "Well, no")], reader)


def test_a_turn_that_is_left_out_is_told():
    reader = reader_of(TEMPLATES["no words in front of an answer"][0])
    for said in ("Be brief.", "a", "b"):  # also where the same words are in another turn
        with pytest.warns(UserWarning, match="leaves out what the system says in a chat or more"):
            spans_of([("system", said), ("user", "a?"), ("assistant", "b")], reader)


@pytest.mark.parametrize("earlier", ["<|end|>", ""])
def test_a_mark_that_ends_the_last_answer_alone_is_learned(earlier):
    end = "('</s>' if loop.last else '" + earlier + "')"
    reader = reader_of(LOOP + "{{ '<|' + m['role'] + '|>' + m['content'] + " + end + " }}{% endfor %}")
    whole, learned, _ = spans_of([("user", "a?"), ("assistant", "fine")], reader)
    assert whole == "<|user|>a?" + earlier + "<|assistant|>fine</s>" and learned == ["fine</s>"]
    with pytest.raises(ValueError, match=r"does not end 'fine' as it does where nothing.*or give chats of one answer"):
        spans_of([("user", "a?"), ("assistant", "fine"), ("user", "b?"), ("assistant", "good")], reader)


def test_an_end_that_cannot_be_told_is_refused():
    # What a template writes behind the last answer may be what somebody else says.
    backwards = "{% for m in messages[::-1] %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    reminded = (
        TEMPLATES["marks and roles"][0] + "{% if not add_generation_prompt %}{{ messages[0]['content'] }}{% endif %}"
    )
    for template in (backwards, LOOP + "{{ loop.length ~ m['content'] + '<|end|>' }}{% endfor %}Be brief."):
        with pytest.raises(ValueError, match="differently once more follows"):
            spans_of([("system", "Be brief."), ("user", "a?"), ("assistant", "fine")], reader_of(template))
    with pytest.raises(ValueError, match="does not end 'fine' as it does where more follows"):
        spans_of([("user", "a?"), ("assistant", "fine")], reader_of(reminded))
    # Words of no mark follow the answer: they may belong to it, or begin another turn.
    template = LOOP + "{{ '### ' + m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}### assistant: "
    with pytest.raises(ValueError, match="does not end 'b' as it does where more follows"):
        spans_of([("user", "a?"), ("assistant", "b")], reader_of(template))


REASONED = (
    LOOP + "{% set said = m['content'] %}{% if m['role'] == 'assistant' %}{% set parts = said.split('</think>') %}"
    "{% set thought = parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 else '' %}"
    "{% set said = '<think>\n' + thought + '\n</think>\n\n' + parts[-1].strip('\n') %}"
    "{% endif %}{{ '<|im_start|>' + m['role'] + '\n' + said + '<|im_end|>\n' }}{% endfor %}"
)
COUNTED = (
    LOOP
    + "{{ '<|im_start|>' + m['role'] ~ (m['content'] | length) ~ '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
)


@pytest.mark.parametrize(("template", "answer"), [(REASONED, "<think>\nhm\n</think>\n\nans"), (COUNTED, "yes, ok")])
def test_an_answer_that_changes_what_is_around_it_is_found_by_its_text_where_that_is_there_once(template, answer):
    reader = reader_of(template)
    whole, learned, _ = spans_of([("user", "Is it so?"), ("assistant", answer)], reader)
    assert learned == [answer + "<|im_end|>"] and whole.endswith(answer + "<|im_end|>\n")
    with pytest.raises(ValueError, match="as it is, or where cannot be told"):
        spans_of([("user", f"Is it {answer}?"), ("assistant", answer)], reader)
    # Not where the text is another turn's, and the answer is not written at all.
    hidden = (
        LOOP + "{{ '<|im_start|>' + (m['content'] if m['role'] != 'assistant' else '-') + '<|im_end|>' }}{% endfor %}"
    )
    with pytest.raises(ValueError, match="does not write the answer"):
        spans_of([("user", f"Is it {answer}?"), ("assistant", answer)], reader_of(hidden))


def test_a_template_that_writes_the_date_writes_the_same_on_every_day():
    reader = reader_of("{{ strftime_now('%d %B %Y') }}" + TEMPLATES["marks and roles"][0])
    with pytest.warns(UserWarning, match="writes the date: it is told that of 26 July 2024, always"):
        whole, learned, _ = spans_of([("user", "a?"), ("assistant", "b")], reader)
    assert whole.startswith("26 July 2024<|im_start|>user") and learned == ["b<|im_end|>"]
