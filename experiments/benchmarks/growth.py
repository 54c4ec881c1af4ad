"""How the cost of a VAR step grows with batch, response length, vocabulary and model size, beside the arithmetic count.

    python experiments/benchmarks/growth.py --threads 2

Random Llamas and random tokens, forward and backward by `AlignmentModule.training_step`, fp32 on a CPU. One quantity
varies at a time, the others stay at Point's defaults. Counted are

- FLOPs: a forward (2 a weight and token, attention over what each token sees, the head at response positions), twice
  that for the backward, and the head's logits once more, which the backward computes anew
- bytes: gradients, one chunk of logits, and what the layers keep. Not counted: embeddings and head are one tensor,
  whose two gradients exist side by side until they are added up, which shows along the vocabulary

`measured/count` is the time, or the memory, of a row over its count, relative to the axis' first row: 1 where cost
grows as the count does, above 1 where it grows faster. A step has fixed costs too, which a small first row shows most.
Time is the median of interleaved rounds; peak memory is taken in a forked process of its own.
"""

import argparse
import random
import statistics
from typing import Any, NamedTuple

import torch
from measure import Runner, forked
from steps import Rows, Step, counted, counted_bytes, llama, ours

LLAMAS = {  # millions of parameters of the backbone: hidden, intermediate, layers, heads, key and value heads
    2: (192, 512, 4, 6, 2),
    8: (320, 896, 6, 10, 2),
    30: (576, 1536, 8, 9, 3),
}


class Point(NamedTuple):
    """batch: B sequences; response: tokens of each; vocabulary: V; size: millions of parameters of the backbone."""

    batch: int = 8
    response: int = 128
    vocabulary: int = 8_192
    size: int = 2


PROMPT = 64  # tokens
AXES: dict[str, list[Any]] = {
    "batch": [2, 4, 8, 16, 32],
    "response": [64, 128, 256, 512, 1024],
    "vocabulary": [1_024, 8_192, 32_768, 65_536, 151_936],
    "size": list(LLAMAS),
}
SMALL: dict[str, list[Any]] = {"batch": [2, 4], "response": [16, 32], "vocabulary": [512, 1_024], "size": [2]}


def prepared(point: Point, options: argparse.Namespace) -> tuple[Any, Rows, Step]:
    hidden, intermediate, layers, heads, shared = LLAMAS[point.size]
    model = llama(
        options, vocab_size=point.vocabulary, hidden_size=hidden, intermediate_size=intermediate,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=shared,
    )  # fmt: skip
    rng = random.Random(0)
    draw = lambda count: rng.choices(range(point.vocabulary), k=count)  # noqa: E731
    rows = Rows("VAR", [(draw(PROMPT), draw(point.response), []) for _ in range(point.batch)]).store(model)
    return model, rows, ours(model, rows)


def peak_memory(point: Point, options: argparse.Namespace) -> float:
    """MiB, after a warm-up on short sequences. To be called in a fresh process."""
    model, _, step = prepared(point, options)
    run = Runner(model, options)
    run(prepared(point._replace(batch=2, response=8, vocabulary=512), options)[2])
    return run.memory(step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a few small points: checks this script")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of torch; its own choice where not given")
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"], help="cpu: seconds of all threads together")
    parser.set_defaults(device="cpu", optimizer=False)
    options = parser.parse_args()
    base = Point(batch=2, response=16, vocabulary=512) if options.tiny else Point()
    axes = {
        axis: [base._replace(**{axis: value}) for value in values]
        for axis, values in (SMALL if options.tiny else AXES).items()
    }
    points = list(dict.fromkeys(point for several in axes.values() for point in several))
    memory = {point: forked(peak_memory, point, options) for point in points}  # before this process computes anything
    steps, counts = {}, {}
    for point in points:
        model, rows, step = prepared(point, options)
        batch = rows.encoded()
        parts = counted(model, batch)
        steps[point] = Runner(model, options), step
        kept = sum(counted_bytes(model, batch).values()) / 2**20
        counts[point] = len(batch.input_ids), (3 * sum(parts.values()) + parts["head"]) / 1e9, kept
    seconds: dict[Point, list[float]] = {point: [] for point in points}
    for turn in range(options.rounds + 1):  # the first is the warm-up
        for point in points if turn % 2 else reversed(points):
            run, step = steps[point]
            took = run(step)[0]
            run.clear()
            if turn:
                seconds[point].append(took)

    print(f"torch {torch.__version__}, CPU, fp32, {torch.get_num_threads()} threads, {options.clock} clock, ", end="")
    print(f"{options.rounds} rounds; where nothing else is said: {PROMPT} prompt tokens, ", end="")
    print(", ".join(f"{name} {value:,}" for name, value in base._asdict().items()))
    for axis, several in axes.items():
        print(f"\n| {axis} | tokens | GFLOP | s | GFLOP/s | measured/count | bytes, MiB | peak, MiB | measured/count |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
        first: tuple[float, float] | None = None
        for point in several:
            tokens, work, kept = counts[point]
            median = statistics.median(seconds[point])
            first = first or (median / work, memory[point] / kept)
            print(f"| {getattr(point, axis):,} | {tokens:,} | {work:.1f} | {median:.3f} | {work / median:.1f} ", end="")
            print(f"| {median / work / first[0]:.2f} | {kept:.0f} | {memory[point]:.0f} ", end="")
            print(f"| {memory[point] / kept / first[1]:.2f} |")


if __name__ == "__main__":
    main()
