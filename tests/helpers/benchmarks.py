"""Files in the forms in which AlpacaEval, Arena-Hard and MT-Bench publish prompts and answers, with our own texts."""

import json
from pathlib import Path
from typing import Any

from tests.helpers.runs import write_lines

MT_CATEGORIES = ("writing", "math")


def write_alpaca_eval(path: Path, prompts: int = 3, **fields: Any) -> Path:
    """Write AlpacaEval's JSON array. fields: values of all records, such as generator."""
    records = [
        {"dataset": "ours", "instruction": f"Name {i} birds.", "output": f"baseline {i}",
         "generator": "gpt4_1106_preview", **fields}
        for i in range(prompts)
    ]  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records, indent=1))
    return path


def write_arena_hard(folder: Path, prompts: int = 3, new: bool = False) -> Path:
    """Write Arena-Hard's folder, in its new form or that of FastChat. The answers are in another order."""
    (folder / "model_answer").mkdir(parents=True)
    questions, answers = [], []
    for i in range(prompts):
        common, text, reply = {"category": "arena-hard-v0.1", "cluster": "birds"}, f"Count {i} birds.", f"baseline {i}"
        if new:
            questions.append({"uid": f"q{i}", **common, "prompt": text})
            messages = [{"role": "user", "content": text}, {"role": "assistant", "content": {"answer": reply}}]
            answers.append({"uid": f"q{i}", "model": "gpt-4-0314", "messages": messages})
        else:
            questions.append({"question_id": f"q{i}", **common, "turns": [{"content": text}]})
            choice = {"index": 0, "turns": [{"content": reply, "token_len": 2}]}
            answers.append({"question_id": f"q{i}", "model_id": "gpt-4-0314", "choices": [choice]})
    write_lines(folder / "question.jsonl", questions)
    write_lines(folder / "model_answer" / "gpt-4-0314.jsonl", reversed(answers))
    return folder


def write_mt_bench(folder: Path, prompts: int = 3) -> Path:
    """Write MT-Bench's folder, in which question ids are numbers and every question has two turns."""
    (folder / "model_answer").mkdir(parents=True)
    questions = [
        {"question_id": 81 + i, "category": MT_CATEGORIES[i % 2], "turns": [f"Draw {i} birds.", "Now without wings."],
         "reference": ["a bird", "a ball"]}
        for i in range(prompts)
    ]  # fmt: skip
    answers = [
        {"question_id": 81 + i, "model_id": "gpt-3.5-turbo",
         "choices": [{"index": 0, "turns": [f"baseline {i}", "second"]}]}
        for i in range(prompts)
    ]  # fmt: skip
    write_lines(folder / "question.jsonl", questions)
    write_lines(folder / "model_answer" / "gpt-3.5-turbo.jsonl", reversed(answers))
    return folder
