"""Measure complete processes: the start of train.py, a second run, waiting for data, and the overhead of the loop.

- Start: wall time of `train.py --help`, and of an invalid configuration.
- Second run: a first run over the embedded problems fills the annotation cache. Then λ, loss and learning rate change.
  Nothing may be computed for the cache. The time is that from the start of the process to the end of the first
  optimizer step, less imports and loading of models. A callback that reads the clock is added to the run's own.
- Waiting: the fraction of time that StepMetrics counts as waiting for data, in the same runs.
- Overhead: of a tiny random model, the time from one step's forward to the next with the run's own trainer, callbacks
  and logging, less that of a plain LightningModule with the same computation, without logger and callbacks. Complete
  fits alternate in one process with one model.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
START, FIRST_STEP, WAITING, OVERHEAD = 1.5, 10.0, 0.01, 1.0  # the largest values, in s, s, a fraction, and ms
FILL = [
    "loss=var_prompt",
    "reward=near_number",
]  # a graded reward, which differs between the responses of a random model
SECOND = {
    "another λ": [*FILL, "loss.temperature=0.5"],
    "another loss": ["loss=var_grouped", "reward=near_number"],
    "another learning rate": [*FILL, "model.learning_rate=3e-4"],
}


def spawn(*words: str, threads: int | None) -> tuple[float, subprocess.CompletedProcess[str]]:
    """Return the seconds of `python words…` and its result."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}"}
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment)
    return time.perf_counter() - begin, done


def run_child(call: str, *words: str, threads: int | None) -> Any:
    """Call a function of this file in a new process with overrides of train.py. Return what it prints last, as JSON."""
    _, done = spawn("-c", f"import processes; processes.{call}", *words, threads=threads)
    if done.returncode:
        sys.exit(f"{call} {' '.join(words)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def report(found: dict[str, Any]) -> None:
    """Print and exit at once, without evaluation and export."""
    print(f"\n{json.dumps(found)}", flush=True)
    os._exit(0)


def train(started: float, steps: int) -> None:
    """Run train.py up to an optimizer step and report its times.

    These are the seconds of imports, of loading models, and from `started` (a time.time) to the end of the first step.
    The fraction of waiting and the annotations that were computed are reported too.
    """
    import lightning

    from var.commands import train as command
    from var.config.entry import run_command
    from var.models.pretrained import Pretrained
    from var.training import run as build
    from var.training.metrics import step_metrics

    found: dict[str, Any] = {"imports": time.time() - started, "loading": 0.0}
    load, trainer = Pretrained.load, build.Run.trainer

    def timed(self: Pretrained) -> Any:
        begin = time.time()
        model = load(self)
        found["loading"] += time.time() - begin
        return model

    class Clock(lightning.Callback):
        def __init__(self, run: build.Run) -> None:
            self.run = run

        def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
            if trainer.global_step == 1:
                found["first"] = time.time() - started
            if trainer.global_step == steps:
                metrics = step_metrics(trainer)
                share = metrics.waited / (metrics.waited + metrics.seconds)
                report({**found, "computed": self.run.annotator.computed, "waiting": share})

    def watched(self: build.Run) -> lightning.Trainer:
        made = trainer(self)
        made.callbacks.append(Clock(self))  # type: ignore[attr-defined]
        return made

    Pretrained.load, build.Run.trainer = timed, watched  # type: ignore[method-assign]
    run_command(command.main)


def overhead(rounds: int) -> None:
    """Report the seconds per step and round, of the run's own trainer and of Lightning's plain loop."""
    import hydra
    import lightning
    from omegaconf import DictConfig

    from var.config.check import FOLDER
    from var.config.entry import run_command
    from var.models.packing import Packed
    from var.training.module import AlignmentModule
    from var.training.run import Run

    class Bare(lightning.LightningModule):
        def __init__(self, module: AlignmentModule) -> None:
            super().__init__()
            self.policy, self.loss, self.optimizer = module.policy, module.loss, module.optimizer

        def training_step(self, batch: Packed, _: int) -> Any:
            return self.loss(self.policy(batch), batch)[0]

        def configure_optimizers(self) -> Any:
            return self.optimizer(self.policy.parameters())

    @hydra.main(version_base="1.3", config_path=FOLDER, config_name="train")
    def main(cfg: DictConfig) -> None:
        run = Run.compose(cfg, Path(cfg.runs))
        module, stamps = run.module(), list[float]()
        module.policy.register_forward_pre_hook(lambda *_: stamps.append(time.perf_counter()))
        found: dict[str, list[float]] = {"ours": [], "bare": []}
        bare = {
            "logger": False, "callbacks": [], "enable_checkpointing": False, "enable_progress_bar": False,
            "enable_model_summary": False, "accelerator": "cpu", "devices": 1, "max_epochs": run.settings.epochs,
            "gradient_clip_val": run.settings.gradient_clip, "num_sanity_val_steps": 0,
        }  # fmt: skip
        for turn in range(rounds + 1):  # the first is the warm-up
            for name in found if turn % 2 else reversed(found):
                stamps.clear()
                if name == "ours":
                    run.trainer().fit(module, run.data)
                else:
                    lightning.Trainer(**bare).fit(Bare(module), run.data)
                if turn:
                    found[name].append((stamps[-1] - stamps[0]) / (len(stamps) - 1))
        report(found)

    run_command(main)


def make_tiny_model(folder: Path) -> str:
    """Save a random Llama of two layers with a byte tokenizer, in Hugging Face format. Return its folder."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<bos>", eos_token="<end>")
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<end>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    LlamaForCausalLM(LlamaConfig(vocab_size=264, num_key_value_heads=2, **sizes, **ends)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def measure(options: argparse.Namespace) -> list[str]:
    """Measure all of it and print the table. Return the targets missed."""
    from measure import bootstrap_median

    rows, missed = list[tuple[str, str, str]](), list[str]()

    def row(quantity: str, measured: str, target: str, met: bool) -> None:
        rows.append((quantity, measured, target))
        if not met:
            missed.append(f"{quantity}: {measured}, target {target}")

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny = make_tiny_model(folder / "model")
        places = [f"annotation_cache={folder}/annotations", f"runs={folder}/runs", "resume=false"]
        model = [f"model.path={tiny}", f"cache={folder}/cache"]
        if not options.tiny:
            model = [f"cache={os.path.expanduser(options.cache)}"]
            model += [] if options.model == "smollm2-135m" else [f"model.path={options.model}"]
        small = ["data.source.problems=88", "trainer.epochs=1"] if options.tiny else []
        device = [f"trainer.accelerator={'gpu' if options.device == 'cuda' else 'cpu'}", "trainer.devices=1"]

        starts: dict[str, list[float]] = {"--help": [], "trainer.max_steps=a": []}
        for _ in range(options.rounds):
            for word, seconds in starts.items():
                took, done = spawn(str(ROOT / "train.py"), word, *places, threads=options.threads)
                if (done.returncode, "Error: " in done.stderr) != ((0, False) if word == "--help" else (1, True)):
                    sys.exit(f"train.py {word}\n{done.stdout}{done.stderr}")
                seconds.append(took)
        for word, seconds in starts.items():
            middle, low, high = bootstrap_median(seconds)
            row(f"`train.py {word}`", f"{middle:.2f} [{low:.2f}, {high:.2f}] s", f"< {START} s", low < START)

        def run(words: list[str], steps: int) -> dict[str, Any]:
            call = f"train({time.time()}, {steps})"
            return run_child(call, *places, *model, *small, *device, *words, threads=options.threads)

        run(FILL, 1)
        for change, words in SECOND.items():
            found = run(words, 1)
            beyond = found["first"] - found["imports"] - found["loading"]
            parts = f"imports {found['imports']:.1f}, models {found['loading']:.1f}"
            computed = f"computed {found['computed'] or 'nothing'}"
            good = not found["computed"] and beyond <= FIRST_STEP
            row(
                f"second run, {change}",
                f"{beyond:.1f} s in addition to {parts}; {computed}",
                f"≤ {FIRST_STEP} s, nothing",
                good,
            )

        share = run(FILL, 10 if options.tiny else 40)["waiting"]
        target = f"< {WAITING:.0%}" if not options.tiny else "– (the step is tiny)"
        row("fraction of time waiting for data", f"{share:.2%}", target, options.tiny or share < WAITING)

        fit = [
            f"annotation_cache={folder}/bare",
            f"runs={folder}/overhead",
            f"model.path={tiny}",
            f"cache={folder}/cache",
        ]
        fit += [*FILL, *small, "data.validation_prompts=0", "trainer.accelerator=cpu", "trainer.devices=1"]
        seconds = run_child(f"overhead({options.rounds})", *fit, threads=options.threads)
        difference = [1000 * (a - b) for a, b in zip(seconds["ours"], seconds["bare"], strict=True)]
        (middle, low, high), bare = bootstrap_median(difference), 1000 * bootstrap_median(seconds["bare"])[0]
        measured = f"{middle:.2f} [{low:.2f}, {high:.2f}] ms more than {bare:.2f} ms"
        row("a step's overhead, tiny model", measured, f"< {OVERHEAD} ms", low < OVERHEAD)

    print("\n### Processes\n\n| quantity | measured | target |\n| --- | --- | --- |")
    print("\n".join(f"| {' | '.join(each)} |" for each in rows), flush=True)
    return missed
