"""debug=rows: how rows become tokens, with those that train marked, and what encoding changes in all rows."""

from collections import Counter
from collections.abc import Sequence

from rich.text import Text

from var.data.changes import TemplateChanges
from var.data.chat import Chat
from var.data.encode import fit
from var.data.read import read
from var.data.row import Row
from var.data.rows import Rows
from var.data.settings import DataSettings
from var.data.split import draw
from var.training.run import Run
from var.utils.console import console, is_first_rank, say
from var.utils.errors import Problems
from var.utils.visible import visible

PROMPT, TRAINED, CONTROL = ("dim", "dim underline"), ("green", "green underline"), "bold magenta"


def show(run: Run) -> None:
    """Print the first rows as tokens, and count what encoding changes in all of them. Load no model.

    On a terminal, neighboring tokens differ by an underline. Trained tokens are between ⟦ and ⟧.
    """
    rows, chat = draw(read(run.data.source, run.annotator.cache), run.data.settings), run.annotator.chat
    run.annotator.check_rows(rows)
    show_template(chat)
    for i in range(min(run.cfg.show_rows, len(rows))):
        show_row(chat, rows[i], run.data.settings)
    count_changes(chat, rows, run.data.settings)


def show_template(chat: Chat) -> None:
    """Print where the template is from, its arguments, and the tokens that end a response."""
    names = [chat.tokenizer.convert_ids_to_tokens(token) for token in sorted(chat.end_tokens)]
    say(f"Chat template: from {chat.origin}; arguments: {chat.template.kwargs or 'none'}")
    if chat.template.reads_clock:
        say(f"It writes the date {chat.template.today} (model.date).")
    trained = chat.tokenizer.convert_ids_to_tokens(chat.end_token)
    say(f"A finished response trains the end token {trained}; sampling stops at {', '.join(names)}.")


def show_row(chat: Chat, row: Row, settings: DataSettings) -> None:
    """Print one row: its prompt, and each response with the tokens that train."""
    try:
        if not row.responses:
            ids = chat.prompt(row.prompt)
            say(f"\nrow {row.id}: {len(ids)} prompt tokens; the response is sampled after them")
            show_tokens(chat, ids, len(ids))
        for k, response in enumerate(row.responses):
            encoded = chat.encode_response(row.prompt, response)
            ids, total = fit(encoded, settings.max_length, settings.overlong), len(encoded.ids)
            if not ids:
                say(f"\nrow {row.id}#{k}: dropped, since it has {total} tokens; data.max_length={settings.max_length}")
                continue
            length = len(ids) - encoded.start
            say(f"\nrow {row.id}#{k}: {encoded.start} prompt tokens, which are read, and {length} that train")
            show_tokens(chat, ids, encoded.start)
            say(f"trained tokens: {ids[encoded.start :]}")
            if len(ids) < total:
                say(f"It is truncated from {total} tokens; data.max_length={settings.max_length}")
            for change in encoded.changes:
                say(f"The template changes it: {change}")
    except ValueError as error:
        say(f"\nrow {row.id}: {error}")


def show_tokens(chat: Chat, ids: Sequence[int], start: int) -> None:
    """Print tokens as text, with those from `start` on between ⟦ and ⟧. Tokens within a character are one piece."""
    text, piece = Text(), list[int]()
    for i, token in enumerate(ids):
        if i == start:
            text.append("⟦", TRAINED[0])
        piece.append(token)
        decoded = chat.template.decode(piece)
        if decoded.endswith("\ufffd") and i + 1 not in (start, len(ids)):
            continue
        style = (TRAINED if i >= start else PROMPT)[i % 2]
        text.append(visible(decoded), f"{style} {CONTROL}" if token in chat.added_tokens else style)
        piece.clear()
    if start < len(ids):
        text.append("⟧", TRAINED[0])
    if is_first_rank():
        console.print(text)


def count_changes(chat: Chat, rows: Rows, settings: DataSettings) -> None:
    """Print how many responses of all rows, or prompts, change, cannot be encoded, are too long or are equal."""
    changes, problems, counts = TemplateChanges(), Problems("rows that cannot be tokenized"), Counter[str]()
    for row in rows:
        found = set[tuple[int, ...]]()
        if not row.responses:
            counts["prompts without a response"] += 1
            try:
                changes.add(f"row {row.id}", chat.check_prompt(row.prompt))
            except ValueError as error:
                problems.add(f"row {row.id}", str(error))
        for k, response in enumerate(row.responses):
            name = f"row {row.id}#{k}"
            counts["responses"] += 1
            try:
                encoded = chat.encode_response(row.prompt, response)
                overlong = len(encoded.ids) > settings.max_length
                counts[f"longer than data.max_length ({settings.overlong})"] += overlong
                ids = fit(encoded, settings.max_length, settings.overlong)
            except ValueError as error:
                problems.add(name, str(error))
                continue
            changes.add(name, encoded.changes)
            counts["trained tokens"] += max(0, len(ids) - encoded.start)
            counts["with control tokens, encoded as text"] += encoded.control
            counts["the same tokens as another response of the row"] += tuple(ids) in found
            found |= {tuple(ids)} if ids else set()
    say(f"\nAll {len(rows)} rows: " + ", ".join(f"{name}: {count:,}" for name, count in counts.items()))
    say(f"rows changed by the template: {changes.rows}, that cannot be tokenized: {len(problems.found)}")
    problems.check()
    changes.settle(settings.on_template_change)
