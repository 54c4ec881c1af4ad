"""Measure how a VAR step's cost grows with batch, response length, vocabulary and model size, compared with its count.

    python experiments/benchmarks/growth.py --threads 2

The models are random Llamas, the tokens are random. A step is forward and backward by
`AlignmentModule.training_step`, in fp32 on a CPU. One quantity varies at a time, the others have Point's defaults.

- FLOPs are counted for a forward (2 per weight and token, attention to preceding tokens, the head at response
  positions), twice that for the backward, and once more for the head's logits, which the backward recomputes.
- Bytes are counted for gradients, one chunk of logits, and the tensors that layers keep. Embeddings and head are one
  tensor, whose two gradients exist at the same time until they are added up. This is not counted, and shows along the
  vocabulary.

`measured/count` is the time or memory of a row divided by its count, relative to the first row of the axis. It is 1 if
the cost grows like the count, and above 1 if it grows faster. Fixed costs of a step show most in a small first row.
Time is the median of interleaved rounds. Peak memory is measured in a separate forked process.
"""

import argparse
import random
import statistics
from typing import Any, NamedTuple

import torch
from measure import Runner, run_forked
from steps import Rows, Step, count_bytes, count_flops, make_llama, make_ours

LLAMAS = {  # by millions of parameters of the backbone: hidden, intermediate, layers, heads, key-value heads
    2: (192, 512, 4, 6, 2),
    8: (320, 896, 6, 10, 2),
    30: (576, 1536, 8, 9, 3),
}


class Point(NamedTuple):
    """The size of one step."""

    batch: int = 8
    """Sequences."""
    response: int = 128
    """Tokens per response."""
    vocabulary: int = 8_192
    """Tokens of the vocabulary."""
    size: int = 2
    """Millions of parameters of the backbone."""


PROMPT = 64  # tokens per prompt
AXES: dict[str, list[Any]] = {
    "batch": [2, 4, 8, 16, 32],
    "response": [64, 128, 256, 512, 1024],
    "vocabulary": [1_024, 8_192, 32_768, 65_536, 151_936],
    "size": list(LLAMAS),
}
SMALL: dict[str, list[Any]] = {"batch": [2, 4], "response": [16, 32], "vocabulary": [512, 1_024], "size": [2]}


def prepare_step(point: Point, options: argparse.Namespace) -> tuple[Any, Rows, Step]:
    """Return the model, the rows and the step of a point."""
    hidden, intermediate, layers, heads, key_value_heads = LLAMAS[point.size]
    model = make_llama(
        options, vocab_size=point.vocabulary, hidden_size=hidden, intermediate_size=intermediate,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=key_value_heads,
    )  # fmt: skip
    rng = random.Random(0)
    draw = lambda count: rng.choices(range(point.vocabulary), k=count)  # noqa: E731
    rows = Rows("VAR", [(draw(PROMPT), draw(point.response), []) for _ in range(point.batch)]).annotate(model)
    return model, rows, make_ours(model, rows)


def measure_peak(point: Point, options: argparse.Namespace) -> float:
    """Return MiB, after a warm-up on short sequences. Call it in a fresh process."""
    model, _, step = prepare_step(point, options)
    run = Runner(model, options)
    run(prepare_step(point._replace(batch=2, response=8, vocabulary=512), options)[2])
    return run.memory(step)


def main() -> None:
    """Measure all points and print one table per axis."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a few small points, to check this script")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of torch. Default: torch's own choice")
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"], help="cpu sums the seconds of all threads")
    parser.set_defaults(device="cpu", optimizer=False)
    options = parser.parse_args()
    base = Point(batch=2, response=16, vocabulary=512) if options.tiny else Point()
    axes = {
        axis: [base._replace(**{axis: value}) for value in values]
        for axis, values in (SMALL if options.tiny else AXES).items()
    }
    points = list(dict.fromkeys(point for points_of_axis in axes.values() for point in points_of_axis))
    memory = {
        point: run_forked(measure_peak, point, options) for point in points
    }  # before this process computes, because threads do not fork
    steps, counts = {}, {}
    for point in points:
        model, rows, step = prepare_step(point, options)
        batch = rows.encoded()
        parts = count_flops(model, batch)
        steps[point] = Runner(model, options), step
        kept = sum(count_bytes(model, batch).values()) / 2**20
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
    print(f"{options.rounds} rounds; unless varied: {PROMPT} prompt tokens, ", end="")
    print(", ".join(f"{name} {value:,}" for name, value in base._asdict().items()))
    for axis, points_of_axis in axes.items():
        print(f"\n| {axis} | tokens | GFLOP | s | GFLOP/s | measured/count | bytes, MiB | peak, MiB | measured/count |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
        first: tuple[float, float] | None = None
        for point in points_of_axis:
            tokens, work, kept = counts[point]
            median = statistics.median(seconds[point])
            first = first or (median / work, memory[point] / kept)
            print(f"| {getattr(point, axis):,} | {tokens:,} | {work:.1f} | {median:.3f} | {work / median:.1f} ", end="")
            print(f"| {median / work / first[0]:.2f} | {kept:.0f} | {memory[point]:.0f} ", end="")
            print(f"| {memory[point] / kept / first[1]:.2f} |")


if __name__ == "__main__":
    main()
