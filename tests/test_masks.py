"""Which tokens of a record are trained, exactly: templates with and without markers, BOS, EOS, borders."""

import pytest
from chats import (
    CHATML,
    HEADER,
    LLAMA2,
    MARKED,
    NEWLINE,
    PHI3,
    QWEN3,
    SYSTEM,
    TURN,
    byte_tokenizer,
    chat,
    chatml_tokenizer,
    expect,
    marked,
    run,
    said,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from fastkit.train.data import plain_prompt
from fastkit.train.masks import Encoder


@pytest.mark.parametrize("trim", [False, True])
def test_chatml(trim):
    tokenizer = chatml_tokenizer(trim=trim)
    messages = chat("Hi ", " a\n", "q", "  b é ")
    head = "<|im_start|>assistant\n"
    assert run(tokenizer, {"messages": messages}) == [
        expect(
            tokenizer,
            (SYSTEM + "<|im_start|>user\nHi <|im_end|>\n" + head, False),
            (" a\n<|im_end|>", True),
            ("\n<|im_start|>user\nq<|im_end|>\n" + head, False),
            ("  b é <|im_end|>", True),
            ("\n", False),
        )
    ]
    assert (
        run(tokenizer, {"messages": messages})[0]["input_ids"] == tokenizer.apply_chat_template(messages)["input_ids"]
    )


@pytest.mark.parametrize("trim", [False, True])
def test_llama2(trim):
    tokenizer = byte_tokenizer(LLAMA2, trim=trim, bos=True)
    assert run(tokenizer, {"messages": chat(" q", "a ", "r", "b", system="S")}) == [
        expect(
            tokenizer,
            ("<s>[INST] S\n\nq [/INST]", False),
            (" a </s>", True),
            ("<s>[INST] r [/INST]", False),
            (" b </s>", True),
        )
    ]


def test_token_boundaries_in_a_real_bpe():
    tokenizer = byte_tokenizer(LLAMA2, merges=True, trim=True)
    (row,) = run(tokenizer, {"messages": chat("What is a warp?", "A warp is 32 threads.")})
    tokens = tokenizer.convert_ids_to_tokens([label for label in row["labels"] if label != -100])
    assert tokens[:2] == ["ĠA", "Ġwarp"] and tokens[-1] == "</s>"  # the space is in the answer's first token


@pytest.mark.parametrize("template", MARKED.values(), ids=MARKED)
@pytest.mark.parametrize("trim", [False, True])
def test_generation_markers(template, trim):
    tokenizer = chatml_tokenizer(template, trim=trim)
    ask, head = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
    assert run(tokenizer, {"messages": chat("q", " a\n", "r", "b")}) == [
        expect(
            tokenizer,
            (ask + "q" + head, False),
            (" a\n<|im_end|>", True),
            ("\n" + ask + "r" + head, False),
            ("b<|im_end|>", True),
            ("\n", False),
        )
    ]


def test_template_without_generation_prompt():
    tokenizer = chatml_tokenizer("{% for m in messages %}" + HEADER + TURN + NEWLINE + "{% endfor %}")
    (row,) = run(tokenizer, {"messages": chat("q", "a", "r", "b")})
    assert tokenizer.decode([label for label in row["labels"] if label != -100]) == "a<|im_end|>b<|im_end|>"


def test_last_turn_dressed_otherwise():
    tokenizer = chatml_tokenizer(QWEN3)
    (row,) = run(tokenizer, {"messages": chat("q", "t", "r", "b")})
    trained = tokenizer.decode([label for label in row["labels"] if label != -100])
    assert trained == "t<|im_end|><think>\n\n</think>\n\nb<|im_end|>"
    tokenizer = byte_tokenizer(PHI3)
    (row,) = run(tokenizer, {"messages": chat("q", "d", "r", "b")})
    assert tokenizer.decode([label for label in row["labels"] if label != -100]) == "d<|end|>b<|end|>\n</s>"
    assert row["input_ids"].count(tokenizer.eos_token_id) == 1


def test_what_follows_the_last_answer_is_left_out():
    tokenizer = chatml_tokenizer()
    whole = run(tokenizer, {"messages": chat("q", "a")})
    assert run(tokenizer, {"messages": chat("q", "a", "and then?")}) == whole


def test_unstable_templates_are_refused():
    late_system = (  # Mistral v0.3: the system prompt moves to the last user turn
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST]' }}{{ 'S' if loop.revindex < 3 else '' }}"
        "{{ m['content'] + '[/INST]' }}{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
    )
    cases = {
        late_system: (chat("q", "a", "r", "b"), "row 0: the chat template renders the chat before assistant turn 1"),
        QWEN3: (chat("q", "<think>no</think>a", "r", "b"), "drops or rewrites part of assistant turn 1 ('<think>no"),
        CHATML: ([*chat("q", "a")][1:], "row 0: the chat opens with the assistant"),
        LLAMA2: (
            chat("q", "a")[:1] * 2 + chat("q", "a")[1:],
            "refuses the turns user, user, assistant: roles must alt",
        ),
        CHATML.replace("m['content']", "m['content'].upper()"): (chat("q", "a"), "does not render"),
        CHATML.replace("+ '\n' }}", "+ '\n' }}{{ raise_exception('no') if m['content'] == 'b' }}"): (
            chat("q", "b"),
            "refuses the turns user, assistant: no",
        ),
        marked(HEADER, TURN, NEWLINE).replace("== 'assistant'", "== 'assistant' and loop.last"): (
            chat("q", "a", "r", "b"),
            "marks 1 assistant turns of 2",
        ),
    }
    for template, (messages, expected) in cases.items():
        assert expected in said(run, byte_tokenizer(template), {"messages": messages})
    assert "tokenizer.chat_template" in said(run, byte_tokenizer(late_system), {"messages": chat(*"qarb")})


words = st.text(st.sampled_from("ab é\n\t.:#日"), max_size=8)
filled = words.filter(str.strip)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(words, words), max_size=3), filled, st.none() | words, st.data())
def test_trained_tokens_are_the_answers_and_their_ends(pairs, last, system, draw):
    messages = chat(*[text for pair in pairs for text in pair], "q", last, system=system)
    answers = [turn["content"] for turn in messages if turn["role"] == "assistant"]
    kind = draw.draw(st.sampled_from(["chatml", "llama2", "plain", *MARKED]))
    tokenizer, end, pad = TOKENIZERS[kind, draw.draw(st.booleans())]
    encode = Encoder(tokenizer)
    ids, labels = encode({"messages": messages}, "row 0")
    text = pad + pad.join((answer.strip() if pad else answer) + end for answer in answers)
    assert tokenizer.decode([label for label in labels if label != -100]) == text
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    # The rest, in order, is the rendered chat without them.
    if not encode.plain:
        assert ids == tokenizer.apply_chat_template(messages)["input_ids"]
    rest = tokenizer.decode([token for token, label in zip(ids, labels, strict=True) if label == -100])
    assert len(rest) + len(text) == len(tokenizer.decode(ids))


TOKENIZERS = {}
for _trim in (False, True):
    TOKENIZERS["chatml", _trim] = chatml_tokenizer(trim=_trim), "<|im_end|>", ""
    TOKENIZERS["llama2", _trim] = byte_tokenizer(LLAMA2, trim=_trim), " </s>", " "
    TOKENIZERS["plain", _trim] = byte_tokenizer(trim=_trim, bos=True), "</s>", ""
    for _name, _template in MARKED.items():
        TOKENIZERS[_name, _trim] = chatml_tokenizer(_template, trim=_trim), "<|im_end|>", ""


# Other forms, BOS and EOS


@pytest.mark.parametrize("post", [{}, {"bos": True}, {"bos": True, "eos": True}])
def test_text_is_trained_whole(post):
    tokenizer = byte_tokenizer(CHATML, **post)
    bos = "<s>" if post else ""
    for text in ("a b", "<s>a b" if post else "a b", "a b</s>"):
        (row,) = run(tokenizer, {"text": text})
        assert row == expect(tokenizer, (bos + "a b</s>", True))


@pytest.mark.parametrize("post", [{}, {"bos": True}, {"bos": True, "eos": True}])
@pytest.mark.parametrize("trim", [False, True])
def test_prompt_and_completion_without_template(post, trim):
    tokenizer = byte_tokenizer(trim=trim, **post)
    bos = "<s>" if post else ""
    for prompt, completion in (("Q: ", " a "), ("Q:", "\na"), ("q", " b")):
        row = {"prompt": prompt, "completion": completion}
        assert run(tokenizer, row) == [expect(tokenizer, (bos + prompt, False), (completion + "</s>", True))]
        assert run(tokenizer, {**row, "completion": completion + "</s>"}) == run(tokenizer, row)


def test_a_token_across_the_border_is_trained():
    tokenizer = byte_tokenizer(merges=True)
    whole = tokenizer("It says:\n\n\nyes")["input_ids"]
    (row,) = run(tokenizer, {"prompt": "It says:\n", "completion": "\n\nyes"})
    assert row["input_ids"] == [*whole, tokenizer.eos_token_id]  # as the model would see it, not cut at the border
    trained = tokenizer.decode([label for label in row["labels"] if label != -100])
    assert trained.endswith("\n\nyes</s>") and "says" not in trained


def test_templates_turn_prompts_into_chats():
    tokenizer = chatml_tokenizer()
    as_chat = run(tokenizer, {"messages": chat("q", "a")})
    assert run(tokenizer, {"prompt": "q", "completion": "a"}) == as_chat
    assert run(tokenizer, {"instruction": "q", "output": "a", "input": None}) == as_chat
    assert (
        run(tokenizer, {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}) == as_chat
    )


def test_eos_is_added_where_the_template_writes_none():
    ended = byte_tokenizer(CHATML)  # ends turns in <|im_end|>, but its EOS is </s>
    (row,) = run(ended, {"messages": chat("q", "a")})
    assert ended.decode([label for label in row["labels"] if label != -100]) == "a<|im_end|></s>"
    assert row["input_ids"][-1] == row["labels"][-1] == ended.eos_token_id
    bare = byte_tokenizer("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}")
    assert run(bare, {"messages": chat("q", "a\n")}) == [
        expect(bare, ("user: q\nassistant: ", False), ("a\n</s>", True))  # no newline before EOS that none would write
    ]


def test_no_second_bos():
    tokenizer = byte_tokenizer(LLAMA2, bos=True)
    (row,) = run(tokenizer, {"messages": chat("q", "a")})
    assert row["input_ids"].count(tokenizer.bos_token_id) == 1
    tokenizer = chatml_tokenizer(bos=True, eos=True)  # what the template does not write is not added
    (row,) = run(tokenizer, {"messages": chat("q", "a")})
    assert row["input_ids"] == tokenizer.apply_chat_template(chat("q", "a"))["input_ids"]


def test_plain_fallback():
    tokenizer = byte_tokenizer(bos=True)
    with pytest.warns(UserWarning, match="no chat template") as caught:
        rows = run(tokenizer, *[{"messages": chat("q", "a", "r", "b", system="S")}] * 3)
    assert len(caught) == 1
    assert rows[0] == expect(
        tokenizer,
        ("<s>### System:\nS\n\n### User:\nq\n\n### Assistant:\n", False),
        ("a</s>", True),
        ("\n\n### User:\nr\n\n### Assistant:\n", False),
        ("b</s>", True),
    )
    assert (
        plain_prompt(chat("q", "a", "r"), "</s>")
        == "### User:\nq\n\n### Assistant:\na</s>\n\n### User:\nr\n\n### Assistant:\n"
    )


def test_tokenizers_that_cannot_be_used():
    record = {"text": "a"}
    assert "has no EOS token" in said(run, byte_tokenizer(eos_token=None), record)
    named = byte_tokenizer({"a": CHATML, "b": LLAMA2})
    assert "set tokenizer.chat_template to one" in said(run, named, record)
    slow = type("Slow", (), {"is_fast": False})()
    assert "Slow gives no character offsets" in said(run, slow, record)
