"""Which tokens of a record are trained: the answer and the token that ends it, found in the text, exactly.

A record becomes one text and the character spans to train; the text is tokenized once, as a whole, and the offsets
say which tokens lie in a span. Tokenizing prompt and answer apart would cut where the model's tokenizer would not.

A chat template gives the spans in one of two ways.
- With `{% generation %}` markers, the template itself says where each assistant turn is. Some authors put the header
  or the final newline inside, some leave the end-of-turn token outside: both are put right.
- Without, the chat up to a turn is rendered with the generation prompt: that text must open the text of the whole
  chat, and the turn starts where it ends. A template that rewrites earlier turns (drops their thinking, moves the
  system prompt) breaks this, and gets an error: a guess would train the wrong tokens silently.
"""

import json
import re

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from fastkit.errors import FastkitError
from fastkit.models.chat import PLAIN_TEMPLATE

IGNORE = -100  # the label that cross-entropy skips
_MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE = "fastkitprobe"  # an answer whose place in the rendered text cannot be mistaken


class Encoder:
    """Record (as `normalize_record` gives it) -> (input_ids, labels), two lists of int of one length, uncut.

    labels is input_ids where trained and -100 elsewhere. Every assistant turn is trained: its text and what ends it,
    not the whitespace that the template puts after that. The last one ends in EOS: the template's, or, if it writes
    none, one that is added. What follows the last assistant turn teaches nothing and is left out.
    Attribute `plain`: the tokenizer has no chat template, and PLAIN_TEMPLATE is used.
    Raises FastkitError, naming the record, if the template refuses a chat or its turns cannot be told apart.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        name = type(tokenizer).__name__
        if not tokenizer.is_fast:
            raise FastkitError(f"{name} gives no character offsets, which masks need; load the model's fast tokenizer")
        if tokenizer.eos_token_id is None:
            raise FastkitError(f"{name} has no EOS token, so the model cannot learn to stop; set tokenizer.eos_token")
        self.tokenizer = tokenizer
        self.plain = tokenizer.chat_template is None
        try:
            self.template = PLAIN_TEMPLATE if self.plain else tokenizer.get_chat_template()
        except ValueError as error:  # several named templates and no default
            raise FastkitError(f"{name}: {str(error).splitlines()[0]}; set tokenizer.chat_template to one") from None
        self.marked = bool(_MARKERS.search(self.template))
        # Llama 3's and GPT-2's byte-level tokenizers leave a token's leading space out of its offsets.
        processor = json.loads(tokenizer.backend_tokenizer.to_str())["post_processor"]
        self.trimmed = '"trim_offsets": true' in json.dumps(processor)
        self._frame: tuple[str, str, int] | None = None

    def __call__(self, record: dict, where: str) -> tuple[list[int], list[int]]:
        if "text" in record:
            ids = self._tokenize(record["text"], special=True)[0]
            if ids[-1:] != [self.tokenizer.eos_token_id]:
                ids.append(self.tokenizer.eos_token_id)
            return ids, list(ids)
        if "messages" in record:
            messages = record["messages"]
        elif self.plain:
            text = record["prompt"] + record["completion"]
            return self._label(text, [(len(record["prompt"]), len(text))], special=True)
        else:
            messages = [{"role": "user", "content": record["prompt"]}]
            messages.append({"role": "assistant", "content": record["completion"]})
        last = max(n for n, turn in enumerate(messages) if turn["role"] == "assistant")
        text, spans = self._spans(messages[: last + 1], where)
        return self._label(text, spans, special=self.plain)

    def _tokenize(self, text: str, special: bool) -> tuple[list[int], list[tuple[int, int]]]:
        cut = {"padding": False, "truncation": False, "verbose": False}
        out = self.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, **cut)
        ids, offsets = list(out["input_ids"]), [tuple(pair) for pair in out["offset_mapping"]]
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if special and bos is not None and ids[:2] == [bos, bos]:  # the text brings what the tokenizer adds
            ids, offsets = ids[1:], offsets[1:]
        if special and ids[-2:] == [eos, eos]:
            ids, offsets = ids[:-1], offsets[:-1]
        return ids, offsets

    def _label(self, text: str, spans: list[tuple[int, int]], special: bool) -> tuple[list[int], list[int]]:
        ids, offsets = self._tokenize(text, special)
        labels, covered, turn = [IGNORE] * len(ids), 0, 0
        for n, (start, end) in enumerate(offsets):
            if self.trimmed:
                start = min(start, covered)  # byte-level tokens leave no gaps: the space is this token's
            covered = max(covered, end)
            while turn < len(spans) and spans[turn][1] <= start:
                turn += 1
            # A token across the border holds the answer's first characters: trained. An empty one (BOS) holds none.
            if turn < len(spans) and start < spans[turn][1] and spans[turn][0] < end:
                labels[n] = ids[n]
        trained = [n for n, label in enumerate(labels) if label != IGNORE]
        if trained and ids[trained[-1]] != self.tokenizer.eos_token_id:
            # Straight after the answer, where the model will have to stop: not after the template's newline.
            stop = trained[-1] + 1
            ids = [*ids[:stop], self.tokenizer.eos_token_id]
            labels = [*labels[:stop], self.tokenizer.eos_token_id]
        return ids, labels

    def _render(self, messages: list[dict], where: str, prompt: bool = False) -> tuple[str, list[tuple[int, int]]]:
        """Text of a chat and, in a template with markers, the marked character spans.

        The renderer behind `apply_chat_template`, because that one gives the marks as tokens, and those wrongly
        where a marked turn starts or ends in a character that no token covers.
        """
        try:
            texts, marks = render_jinja_template(
                conversations=[messages],
                chat_template=self.template,
                return_assistant_tokens_mask=self.marked,
                add_generation_prompt=prompt,
                **self.tokenizer.special_tokens_map,
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            roles = ", ".join(turn["role"] for turn in messages)
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise FastkitError(f"{where}: the chat template refuses the turns {roles}: {why}; change them") from None
        return texts[0], marks[0] if marks else []

    def _spans(self, messages: list[dict], where: str) -> tuple[str, list[tuple[int, int]]]:
        text, marks = self._render(messages, where)
        turns = [n for n, turn in enumerate(messages) if turn["role"] == "assistant"]
        if self.marked:
            if len(marks) != len(turns):
                raise FastkitError(
                    f"{where}: the chat template marks {len(marks)} assistant turns of {len(turns)}; "
                    f"put one {{% generation %}} block around each in tokenizer.chat_template"
                )
            spans = [self._mend(text, start, end) for start, end in marks]
        else:
            spans = [self._find(messages, n, text, where) for n in turns]
        for n, (start, end) in zip(turns, spans, strict=True):
            # Whitespace aside: templates strip it.
            if "".join(messages[n]["content"].split()) not in "".join(text[start:end].split()):
                raise self._rewritten(where, n, messages[n]["content"])
        return text, spans

    def _find(self, messages: list[dict], n: int, text: str, where: str) -> tuple[int, int]:
        """Character span of assistant turn n by rendering the chat up to it and through it."""
        if n == 0:
            raise FastkitError(f"{where}: the chat opens with the assistant; put a user turn before it or remove it")
        prompt, _ = self._render(messages[:n], where, prompt=True)
        if not text.startswith(prompt):
            raise self._unstable(where, n)
        through, _ = self._render(messages[: n + 1], where)
        start, (header, closing, _) = len(prompt), self._framed(where)
        if text.startswith(header, start):
            start += len(header)
        if text.startswith(through):
            end = len(through)
        else:
            # Some templates dress only the last turn: Qwen3 with an empty thinking block, Phi-3 with an EOS after it.
            answer = messages[n]["content"].strip()
            begin = text.find(answer, start)
            if begin < 0:
                raise self._rewritten(where, n, answer)
            if not answer or text[start:begin].strip():
                raise self._unstable(where, n)
            end = begin + len(answer)
            closings = (closing, closing.removesuffix(self.tokenizer.eos_token))
            closing = next((tail for tail in closings if text.startswith(tail, end)), None)
            if closing is None:
                raise self._unstable(where, n)
            end += len(closing)
        space = closing[len(closing.rstrip()) :]
        return start, end - len(space) if space and text.endswith(space, start, end) else end

    def _mend(self, text: str, start: int, end: int) -> tuple[int, int]:
        """A marked span without the turn's header, with the end-of-turn token, without the whitespace after that."""
        header, closing, inside = self._framed("the chat template")
        if text.startswith(header, start):
            start += len(header)
        if text.startswith(closing.rstrip(), end - inside):
            end += len(closing.rstrip()) - inside
        return start, end

    def _framed(self, where: str) -> tuple[str, str, int]:
        """What the template puts around an answer: (header to skip, closing, how much of closing the marks include)."""
        if self._frame is None:
            user = [{"role": "user", "content": "x"}]
            text, marks = self._render([*user, {"role": "assistant", "content": _PROBE}], where)
            prompt, _ = self._render(user, where, prompt=True)
            at = text.find(_PROBE)
            stop = at + len(_PROBE)
            start, end = marks[0] if marks else (min(len(prompt), at), stop)
            if at < 0 or not start <= at < stop <= end:
                raise FastkitError(f"{where}: the chat template does not render, or mark, an assistant's text; mend it")
            begin = len(prompt) if text.startswith(prompt) else start
            if prompt == self._render(user, where)[0] and text[begin:at].strip():
                begin = at  # no generation prompt in this template: the whole header is still ahead
            self._frame = text[start:begin] if begin <= at else "", text[stop:], end - stop
        return self._frame

    def _rewritten(self, where: str, n: int, content: str) -> FastkitError:
        return FastkitError(
            f"{where}: the chat template drops or rewrites part of assistant turn {n} ({content[:40]!r}), "
            f"its thinking perhaps; end the chat at that turn"
        )

    def _unstable(self, where: str, n: int) -> FastkitError:
        return FastkitError(
            f"{where}: the chat template renders the chat before assistant turn {n} otherwise than in the whole chat, "
            f"so the turn cannot be told apart; set tokenizer.chat_template to one with {{% generation %}} markers, "
            f"or end the chat at its first answer"
        )
