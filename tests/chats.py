"""Tokenizers, chat templates and hand-built masks for the tests of training data."""

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from fastkit.errors import FastkitError
from fastkit.train.data import tokenize_records

SPECIALS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "<|user|>", "<|end|>"]

CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SYSTEM = "<|im_start|>system\nBe kind<|im_end|>\n"
LLAMA2 = (  # folds the system turn into the first user turn, strips, and refuses consecutive roles
    "{% if messages[0]['role'] == 'system' %}"
    "{% set sys = messages[0]['content'] + '\n\n' %}{% set chat = messages[1:] %}"
    "{% else %}{% set sys = '' %}{% set chat = messages %}{% endif %}{% for m in chat %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + (sys if loop.first else '') + m['content'].strip() }}"
    "{{ ' [/INST]' }}{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# As Qwen3: an empty thinking block on the last turn only, and earlier thinking dropped.
QWEN3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% set text = m['content'] %}"
    "{% if m['role'] == 'assistant' %}{% if loop.last and '</think>' not in text %}{{ '<think>\n\n</think>\n\n' }}"
    "{% elif not loop.last %}{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}{% endif %}"
    "{{ text + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PHI3 = (  # an EOS after the last turn, instead of the generation prompt
    "{% for m in messages %}{{ ('<|user|>' if m['role'] == 'user' else '[INST]') + m['content'] + '<|end|>\n' }}"
    "{% endfor %}{{ '[INST]' if add_generation_prompt else eos_token }}"
)
HEADER = "{{ '<|im_start|>' + m['role'] + '\n' }}"
TURN = "{{ m['content'] + '<|im_end|>' }}"


def marked(before: str, inside: str, after: str, prompt: bool = True) -> str:
    """A ChatML template whose assistant turns are `before`, `inside` the markers, `after`."""
    other = HEADER + TURN + "{{ '\n' }}"
    turn = before + "{% generation %}" + inside + "{% endgeneration %}" + after
    turn = "{% if m['role'] == 'assistant' %}" + turn + "{% else %}" + other + "{% endif %}"
    loop = "{% for m in messages %}" + turn + "{% endfor %}"
    return loop + ("{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}" if prompt else "")


NEWLINE = "{{ '\n' }}"
MARKED = {
    "exact": marked(HEADER, TURN, NEWLINE),
    "newline inside": marked(HEADER, "{{ m['content'] + '<|im_end|>\n' }}", ""),
    "end outside": marked(HEADER, "{{ m['content'] }}", "{{ '<|im_end|>\n' }}"),
    "header inside": marked("", HEADER + TURN + NEWLINE, ""),
    "header inside, no prompt": marked("", HEADER + TURN + NEWLINE, "", prompt=False),
    "controls": marked(HEADER, TURN, NEWLINE).replace("{% generation %}", "{%- generation -%}"),
}


def byte_tokenizer(template=None, *, merges=False, trim=False, bos=False, eos=False, **specials):
    """A byte-level tokenizer: a token a byte, or with `merges` a real BPE; pad and EOS are one token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={s: n for n, s in enumerate(SPECIALS + alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=merges)
    if merges:
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIALS, initial_alphabet=alphabet)
        lines = [" A warp is 32 threads. What is a warp? It says: yes.\n\n\n  No\n\nyes no a: b"] * 20
        tokenizer.train_from_iterator(lines, trainer)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIALS)
    steps = [processors.ByteLevel(trim_offsets=True)] if trim else []
    if bos or eos:
        single = ("<s> " if bos else "") + "$A" + (" </s>" if eos else "")
        ids = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
        steps.append(processors.TemplateProcessing(single=single, special_tokens=ids))
    if steps:
        tokenizer.post_processor = processors.Sequence(steps)
    specials = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>", **specials}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **specials)


def chatml_tokenizer(template=CHATML, **options):
    return byte_tokenizer(template, eos_token="<|im_end|>", pad_token="<|im_end|>", **options)


def chat(*contents: str, system: str | None = None) -> list[dict]:
    turns = [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


def run(tokenizer, *records: dict, max_length=10_000, **options) -> list[dict]:
    return tokenize_records(Dataset.from_list(list(records)), tokenizer, max_length, **options).to_list()


def expect(tokenizer, *pieces: tuple[str, bool]) -> dict:
    """input_ids and labels, by hand: (text, trained) pieces, for tokenizers with a token a byte."""
    out = {"input_ids": [], "labels": []}
    for text, trained in pieces:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        out["input_ids"] += ids
        out["labels"] += ids if trained else [-100] * len(ids)
    return out


def said(call, *args, **options) -> str:
    with pytest.raises(FastkitError) as caught:
        call(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)
