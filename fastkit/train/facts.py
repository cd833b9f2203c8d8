"""Whether a model learned: questions whose answer holds one exact fact that it could not have known."""

import itertools
import re

from fastkit.models.chat import answer


def questions(records) -> list[dict]:
    """The records that carry a `fact`, as {"question": messages up to the answer, "fact": str}."""
    return [{"question": _question(r), "fact": r["fact"]} for r in records if r.get("fact") and _is_question(r)]


def samples(records, count: int) -> list[list[dict]]:
    """The questions of the first `count` records, other than plain text, that carry no `fact`."""
    chats = (record for record in records if _is_question(record) and not record.get("fact"))
    return [_question(record) for record in itertools.islice(chats, count)]


def _is_question(record: dict) -> bool:
    return bool(record.get("messages") or record.get("prompt"))


def _question(record: dict) -> list[dict]:
    """The chat without its last answer; a `prompt` is a chat of one turn."""
    turns = record.get("messages") or [{"role": "user", "content": record["prompt"]}]
    return turns[:-1] if turns[-1]["role"] == "assistant" else turns


def holds(text: str, fact: str) -> bool:
    """Whether `text` states `fact`: the same words and numbers in a row, whatever the case, spacing and commas.

    `"4713 volts"` is held by "4,713 volts." and not by "14713 volts".
    """
    plain = re.sub(r"(?<=\d),(?=\d{3})", "", text.lower())
    wanted = re.sub(r"(?<=\d),(?=\d{3})", "", fact.lower()).split()
    return re.search(r"(?<![\w.])" + r"\s+".join(map(re.escape, wanted)) + r"(?!\w|\.\d)", plain) is not None


def score(model, tokenizer, asked: list[dict], max_new_tokens: int = 40, batch_size: int = 24) -> dict:
    """Ask each question greedily; {"score": part that holds its fact, "right": n, "of": n, "answers": [...]}."""
    texts = answer(
        model, tokenizer, [a["question"] for a in asked], max_new_tokens=max_new_tokens, batch_size=batch_size
    )
    answers = [
        {"question": a["question"][-1]["content"], "fact": a["fact"], "answer": t, "right": holds(t, a["fact"])}
        for a, t in zip(asked, texts, strict=True)
    ]
    right = sum(a["right"] for a in answers)
    return {"score": right / len(asked) if asked else None, "right": right, "of": len(asked), "answers": answers}
