"""One HTML page a run: what trained on what, curves, weights, answers before and after. No script, no other file.

All that comes from data or configuration goes through `text`, so that an answer with markup in it stays an answer.
"""

import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from var.report.figures import JUDGED, MEMORY, PANELS
from var.report.read import Curve, Run
from var.report.tables import plain

SHOWN, OPEN = 100, 6  # prompts with their answers, and those of them that are read without a click
MICRO_BATCHES = 4
STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --faint: #5b6570; --rule: #d8dde2; --paper: #fff; --card: #f5f6f8;
  --line: #0072b2; --second: #d55e00; --warn: #9a4a00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ea; --faint: #98a2ad; --rule: #363d45; --paper: #14171a;
  --card: #1e2327; --line: #56b4e9; --second: #e69f00; --warn: #f0b060; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
small, figcaption, .faint { color: var(--faint); font-size: .85rem; }
code, pre, .answer { font-family: ui-monospace, monospace; font-size: .85rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { text-align: left; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
th { font-weight: 600; } .scroll { overflow-x: auto; } .whole { white-space: nowrap; }
.grid { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); }
.pair { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); }
figure, .card { margin: 0; padding: .6rem; background: var(--card); border-radius: .4rem; }
.answer { white-space: pre-wrap; margin: .3rem 0; padding-left: .5rem; border-left: 3px solid var(--rule); }
.warn { color: var(--warn); margin: .3rem 0; }
.card + .card { margin-top: .8rem; } details { margin: .5rem 0; } summary { cursor: pointer; }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--faint); font: 11px system-ui, sans-serif; }
.axis { stroke: var(--rule); } .mark { fill: var(--line); } .bar { fill: var(--line); }
.curve { fill: none; stroke: var(--line); stroke-width: 1.5; } .error { stroke: var(--line); }
.second { fill: none; stroke: var(--second); stroke-width: 1.5; stroke-dasharray: 4 3; }
"""
LOGGED = re.compile(r"\[[^]]*\]\[(?P<of>[^]]*)\]\[(?:WARNING|ERROR)\] - (?P<text>.+)")  # a line of Hydra's log
POLICY = "default-src 'none'; style-src 'unsafe-inline'"  # a browser that heeds it fetches and runs nothing


def text(value: Any) -> str:
    return html.escape(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))


def page(run: Run) -> str:
    """The whole page."""
    parts = [
        f"<h1>{text(run.summary['title'])}</h1><p class=faint>{text(str(run.folder))}</p>",
        _section("Warnings", "".join(f"<p class=warn>{text(line)}</p>" for line in warnings(run))),
        _section("What came out", _outcome(run)),
        _section("Curves", _curves(run)),
        _section("Weights", _weights(run)),
        _section("Answers before and after", _samples(run)),
        _section("What trained on what", _inputs(run)),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(run.summary['title'])}</title><style>{STYLE}</style></head>\n<body>"
        + "\n".join(part for part in parts if part)
        + "</body></html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>" if body else ""


def _table(rows: Iterable[Sequence[Any]], head: Sequence[str] = ()) -> str:
    """Cells are text; the first of a row names it."""
    top = f"<tr>{''.join(f'<th class=whole>{text(name)}</th>' for name in head)}</tr>" if head else ""
    body = "".join(
        f"<tr><th>{text(str(first))}</th>{''.join(f'<td{_whole(cell)}>{text(cell)}</td>' for cell in rest)}</tr>"
        for first, *rest in rows
    )
    return f"<div class=scroll><table>{top}{body}</table></div>" if body else ""


def _whole(cell: Any) -> str:
    """A number is not broken over lines, as everything else may be."""
    return " class=whole" if isinstance(cell, int | float) or re.fullmatch(r"-?[\d.]+( ± [\d.]+)?", str(cell)) else ""


def warnings(run: Run) -> list[str]:
    """What a reader should know before the numbers, from the summary, the curves and the log."""
    summary, out = run.summary, []
    data = summary.get("data") or {}
    weights = data.get("weights") or {}
    if skipped := summary.get("skipped_steps"):
        out.append(f"{skipped} steps were left out: their loss or gradient was not finite.")
    limit = run.settings.get("trainer.ess_warning") or 0
    steps, sizes = run.curves.get("train/weight/ess", ([], []))
    if low := [(step, size) for step, size in zip(steps, sizes, strict=True) if 0 < size < limit]:
        out.append(
            f"The effective sample size is under {limit:g} of the sequences at {len(low)} of {len(steps)} logged "
            f"steps, first {low[0][1]:.2f} at step {low[0][0]}."
        )
    if weights.get("largest", 0) > 50:
        out.append(f"One response weighs {weights['largest']:.0f} times the mean.")
    if abs(weights.get("length_correlation", 0)) > 0.3:
        out.append(f"Weights follow response length: correlation {weights['length_correlation']:.2f}.")
    if (cut := (summary["validation"].get("truncated") or {}).get("after") or 0) > 0.2:
        out.append(f"{cut:.0%} of the held-out answers after training were cut at the limit of new tokens.")
    out += [
        f"{name}: {n}."
        for name, n in data.items()
        if isinstance(n, int) and n and ("left out" in name or "dropped" in name)
    ]
    if summary.get("dirty"):
        out.append("The code was not the commit's: its folder had changes.")
    log = run.folder / "train.log"
    if log.is_file():
        found = [LOGGED.match(line) for line in log.read_text(errors="replace").splitlines()]
        out += [line["text"] if line["of"] == "var" else f"{line['of']}: {line['text']}" for line in found if line][:20]
    return out


def _outcome(run: Run) -> str:
    """Each measure, ± its standard error by prompt."""
    return _table((name, plain(value, name)) for name, value in run.measures.items())


def _curves(run: Run) -> str:
    curves = run.curves
    panels = {**PANELS, MEMORY: "peak memory, GiB", "validation/accuracy": "accuracy on held-out pairs"}
    figures = []
    for name, label in panels.items():
        if name in curves:
            errors = dict(zip(*curves.get(f"{name}_se", ([], [])), strict=True))
            second = curves.get(JUDGED) if name == "validation/win_rate" else None
            figures.append(svg(curves[name], label + (" (dashed: the judge's)" if second else ""), errors, second))
    return f"<div class=grid>{''.join(figures)}</div>" if figures else ""


def svg(
    curve: Curve, label: str, errors: Mapping[int, float] = MappingProxyType({}), second: Curve | None = None
) -> str:
    """A curve over optimiser steps, 320 by 170, with its standard errors and a second one, dashed."""
    steps, values = curve
    spans = [*values, *(second[1] if second else ())]
    spans += [v + sign * errors.get(s, 0.0) for s, v in zip(steps, values, strict=True) for sign in (-1, 1)]
    low, high = min(spans), max(spans)
    last = max([*steps, *(second[0] if second else ()), 1])

    def place(step: float, value: float) -> tuple[float, float]:
        share = (value - low) / (high - low) if high > low else 0.5
        return 48 + 262 * step / last, 140 - 125 * share

    def line(points: Curve, kind: str) -> str:
        path = " ".join("{:.1f},{:.1f}".format(*place(s, v)) for s, v in zip(*points, strict=True))
        return f'<polyline class="{kind}" points="{path}"/>'

    bars = "".join(
        '<line class="error" x1="{0:.1f}" y1="{1:.1f}" x2="{0:.1f}" y2="{2:.1f}"/>'.format(
            *place(s, v - errors[s]), place(s, v + errors[s])[1]
        )
        for s, v in zip(steps, values, strict=True)
        if errors.get(s)
    )
    marks = "".join(
        '<circle class="mark" r="2" cx="{:.1f}" cy="{:.1f}"/>'.format(*place(s, v))
        for s, v in zip(steps, values, strict=True)
        if len(steps) <= 100
    )
    dashed = line(second, "second") if second else ""
    return _figure(label, _axes(low, high, "0", f"{last} steps") + bars + line(curve, "curve") + marks + dashed)


def _figure(label: str, drawn: str) -> str:
    return (
        f'<figure><figcaption>{text(label)}</figcaption><svg viewBox="0 0 320 170" role="img" '
        f'aria-label="{text(label)}">{drawn}</svg></figure>'
    )


def _axes(low: float, high: float, left: str, right: str) -> str:
    levels = [(low, 140), (high, 15)] if high > low else [(low, 77.5)]
    ticks = "".join(f'<text x="44" y="{y + 4}" text-anchor="end">{value:.3g}</text>' for value, y in levels)
    return (
        '<line class="axis" x1="48" y1="140" x2="310" y2="140"/><line class="axis" x1="48" y1="15" x2="48" y2="140"/>'
        f'{ticks}<text x="48" y="156">{text(left)}</text><text x="310" y="156" text-anchor="end">{text(right)}</text>'
    )


def histogram(values: np.ndarray, label: str) -> str:
    counts, edges = np.histogram(values, 24)
    top, width = int(counts.max()), 262 / 24
    bars = "".join(
        f'<rect class="bar" x="{48 + i * width:.1f}" y="{140 - 125 * n / top:.1f}" width="{width - 1:.1f}" '
        f'height="{125 * n / top:.1f}"/>'
        for i, n in enumerate(counts.tolist())
    )
    return _figure(label, _axes(0, top, f"{edges[0]:.3g}", f"{edges[-1]:.3g}") + bars)


def _weights(run: Run) -> str:
    facts = (run.summary.get("data") or {}).get("weights") or {}
    names = {
        "ess": "effective sample size, over the responses", "largest": "largest, over the mean",
        "tiny": "share under a thousandth of the mean", "length_correlation": "correlation with response length",
    }  # fmt: skip
    table = _table((name, f"{facts[key]:.3f}") for key, name in names.items() if key in facts)
    weights = run.weights
    figure = (
        f"<div class=grid>{histogram(weights, f'weights of {len(weights)} responses')}</div>" if len(weights) else ""
    )
    return table + figure + _batches(run)


def _batches(run: Run) -> str:
    """The first micro-batches with their rows: from batches.jsonl their text, else what plan.npz has of them."""
    if run.batches:
        rows = [
            [
                record.get("micro_batch"), _rounded(record.get("weight")), _rounded(record.get("reward")),
                record.get("id"), last(record.get("prompt")), record.get("response"),
            ]
            for record in run.batches
        ]  # fmt: skip
        head = ["micro-batch", "weight", "reward", "row", "prompt", "response"]
        return f"<h3>The first micro-batches</h3>{_table(rows, head)}"
    plan = run.plan
    if "micro" not in plan or "row" not in plan:
        return ""
    rows = []
    for m, members in enumerate(plan["micro"][:MICRO_BATCHES].tolist()):
        present = [member for member in members if member >= 0]
        own = [f"{plan['weight'][member]:.3f}" for member in present] if "weight" in plan else []
        places = ", ".join(str(plan["row"][member]) for member in present)
        rows.append([m, int(plan["tokens"][m]), places, *([", ".join(own)] if own else [])])
    head = ["micro-batch", "response tokens", "training rows", *(["weights"] if "weight" in plan else [])]
    return f"<h3>The first of {len(plan['micro'])} micro-batches</h3>{_table(rows, head)}"


def _rounded(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, int | float) else "–"


def last(prompt: Any) -> str:
    """Of a prompt's messages the last one's words."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[-1], dict):
        return str(prompt[-1].get("content", ""))
    return "" if prompt is None else str(prompt)


def _samples(run: Run) -> str:
    records = run.samples
    if not records:
        return ""
    cards = []
    for record in records[:SHOWN]:
        answer = record.get("answer")
        told = "" if answer is None else f" <span class=faint>answer: {text(str(answer))}</span>"
        sides = "".join(
            f"<div><small>{when}</small>{_answers(record.get(when) or {})}</div>" for when in ("before", "after")
        )
        cards.append(
            f"<article class=card><p><small>{text(str(record.get('id')))}</small> {text(last(record.get('prompt')))}"
            f"{told}</p><div class=pair>{sides}</div></article>"
        )
    of = f"<p class=faint>{len(cards)} of {len(records)} prompts.</p>" if len(cards) < len(records) else ""
    rest = "".join(cards[OPEN:])
    more = f"<details><summary>{len(cards) - OPEN} more prompts</summary>{rest}</details>" if rest else ""
    return of + "".join(cards[:OPEN]) + more


def _answers(side: dict[str, Any]) -> str:
    texts = side.get("texts") or []
    rewards = side.get("rewards") or [None] * len(texts)
    return "".join(
        f"<div class=answer>{text(str(words))} <small>{_rounded(reward)}</small></div>"
        for words, reward in zip(texts, rewards, strict=False)
    )


def _inputs(run: Run) -> str:
    summary = run.summary
    facts = {k: v for k, v in (summary.get("data") or {}).items() if k != "weights"}
    run_facts = {
        **{f"hash of {k}": v for k, v in (summary.get("hashes") or {}).items()},
        **{f"seed of {k}": v for k, v in (summary.get("seeds") or {}).items()},
        **{k: summary.get(k) for k in ("devices", "precision", "commit", "machine") if k in summary},
        **(summary.get("versions") or {}),
    }
    overrides = " ".join(run.overrides) or "none"
    return (
        f"<p>Overrides: <code>{text(overrides)}</code></p><div class=pair>"
        f"<div><h3>Data</h3>{_table(facts.items())}</div><div><h3>Run</h3>{_table(run_facts.items())}</div></div>"
        f"<details><summary>Configuration</summary>{_table(run.settings.items())}</details>"
    )
