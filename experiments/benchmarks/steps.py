"""The steps that are timed: this project's, the packed or padded usual code, and TRL's, on the same tokens.

A step's name is its work, with whose it is before: "VAR" is ours, "padded VAR" the padded one. The works:

- SFT, VAR: the chosen answers of 8 rows; VAR's are weighted
- DPO: the pairs of the first 4 rows
- group: SFT on 2 prompts with 4 answers each, which share their prompt in ours (VAR's weights on it cost nothing)
- cross: the table log π_ref(y_j|x_i) of SFT's 8 rows, without a gradient
"""

import argparse
import copy
import os
import random
import statistics
import tempfile
import warnings
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

os.environ |= {"PYTORCH_NVML_BASED_CUDA_CHECK": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}

import torch
from torch import Tensor

from var.annotate.annotator import TOKENS
from var.data.sources.hha import HHA
from var.losses.dpo import DPO
from var.losses.sft import SFT
from var.losses.var import VAR
from var.models.cross_scoring import cross_logps
from var.models.logprobs import HEAD_CHUNK
from var.models.packing import Packed, pack, pack_tree
from var.models.policy import Policy
from var.models.pretrained import Pretrained
from var.training.module import AlignmentModule
from var.training.schedule import Schedule
from var.weights.estimators import Global

LOSSES = {"SFT": SFT(), "VAR": VAR(estimator=Global()), "DPO": DPO(beta=0.1), "group": SFT()}
OURS = [*LOSSES, "cross"]
PEERS = {  # "packed": as ours, but a prompt that several answers share is there with each of them
    "SFT": ["padded SFT", "TRL SFT", "TRL padding_free SFT"],
    "VAR": ["padded VAR"],
    "DPO": ["packed DPO", "padded DPO", "TRL DPO"],
    "group": ["packed group", "padded group", "TRL group"],
    "cross": ["packed cross", "padded cross"],
}
STEPS = [*OURS, *(peer for peers in PEERS.values() for peer in peers)]
LENGTHS = {  # prompt, chosen and rejected answer, in the batches that --data picks
    512: "39 124 13, 215 21 117, 185 30 66, 115 72 3, 324 20 15, 89 48 44, 96 60 63, 49 17 32",
    256: "104 32 32, 37 15 13, 180 46 57, 40 145 68, 130 7 10, 134 39 12, 139 34 28, 35 19 11",
}
Pair = tuple[list[int], list[int], list[int]]  # prompt, chosen, rejected
Step = Callable[[], Tensor]  # a loss with a gradient, or cross scoring's table [B, B] without one


def work_of(name: str) -> str:
    return name.rpartition(" ")[2]


class Rows:
    """The sequences of a step, and what the data brings: weights [B] of mean 1, reference log-probabilities near the
    policy's, [N] and summed [B]. Better and worse answers alternate for DPO."""

    def __init__(self, name: str, pairs: Sequence[Pair]) -> None:
        self.work = work_of(name)
        if self.work == "DPO":
            rows = [(p, a) for p, c, r in pairs[:4] for a in (c, r)]
        elif self.work == "group":
            rows = [(pairs[i][0], a) for i in (0, 1) for pair in (pairs[i], pairs[i + 2]) for a in pair[1:]]
        else:
            rows = [(p, c) for p, c, _ in pairs]
        self.prompts, self.responses = [p for p, _ in rows], [a for _, a in rows]
        self.ids, self.starts = [p + a for p, a in rows], [len(p) for p, _ in rows]
        self.answers = [len(a) for _, a in rows]
        self.real, self.longest = sum(map(len, self.ids)), max(map(len, self.ids))
        self.padding, self.response = len(rows) * self.longest / self.real, sum(self.answers) / self.real
        if self.work == "cross":
            self.real *= len(rows)  # each prompt and each response as often as there are rows

    def store(self, model: Any) -> "Rows":
        generator = torch.Generator().manual_seed(0)
        weights = torch.randn(len(self.ids), generator=generator).exp()
        self.weights = (weights / weights.mean()).to(model.device)
        self.reference = self.summed = None
        if self.work == "DPO":
            with torch.no_grad():
                logps = Policy(model)(pack(self.ids, self.starts).to(model.device))
            self.reference = logps + 0.3 * torch.randn(len(logps), generator=generator).to(logps)
            self.summed = torch.stack([part.sum() for part in self.reference.split(self.answers)])
        return self

    def encoded(self) -> Packed:
        """What our step runs through the model."""
        if self.work == "cross":
            return pack_tree(self.prompts, [self.responses] * len(self.prompts))
        return pack(self.ids, self.starts)


def read(options: argparse.Namespace) -> dict[int, list[Pair]]:
    """longest → 8 pairs."""
    rng = random.Random(0)
    if options.data is None:
        draw = lambda n: rng.choices(range(100, 4000), k=int(n))  # noqa: E731
        return {n: [tuple(map(draw, row.split())) for row in LENGTHS[n].split(",")] for n in options.longest}
    chat, source, rows = pretrained(options).chat, HHA(folder=options.data, subsets=("helpful_base",)), list[Pair]()
    for where, record in source.records():
        if row := source.row(where, record):
            better, worse = (chat.encode(row.prompt, response.text) for response in row.responses)
            rows.append((better.ids[: better.start], better.ids[better.start :], worse.ids[worse.start :]))
    batches = {}
    for limit in options.longest:
        short = [pair for pair in rows if len(pair[0]) + max(len(pair[1]), len(pair[2])) <= limit]
        drawn = [rng.sample(short, 8) for _ in range(1001)]
        shapes = [(r.padding, r.response, r.longest) for r in (Rows("SFT", pairs) for pairs in drawn)]
        middle = [statistics.median(column) for column in zip(*shapes, strict=True)]
        far = [sum(abs(x / m - 1) for x, m in zip(shape, middle, strict=True)) for shape in shapes]
        batches[limit] = drawn[far.index(min(far))]
    return batches


def pretrained(options: argparse.Namespace) -> Pretrained:
    path = "HuggingFaceTB/SmolLM2-135M-Instruct" if options.model == "smollm2-135m" else options.model
    plain = dict.fromkeys(("revision", "chat_template")) | dict.fromkeys(
        ("trust_remote_code", "gradient_checkpointing"), False
    )
    cache = os.path.expanduser(options.cache)
    kind = {"name": "smollm2-135m", "path": path, "dtype": "float32", "attention": "packed", "cache": cache}
    return Pretrained(architecture={}, **kind, **plain)


def load(options: argparse.Namespace) -> Any:
    if not options.tiny:
        prepare(options)
        return pretrained(options).load().to(options.device)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return llama(options, vocab_size=49152 if options.data else 4096, num_key_value_heads=2, **sizes)


def llama(options: argparse.Namespace, **sizes: int) -> Any:
    """A random Llama, embeddings and head tied."""
    from transformers import LlamaConfig, LlamaForCausalLM

    prepare(options)
    torch.manual_seed(0)
    config = LlamaConfig(tie_word_embeddings=True, **sizes)
    config._attn_implementation = "packed"
    return LlamaForCausalLM(config).eval().to(options.device)


def prepare(options: argparse.Namespace) -> None:
    warnings.filterwarnings("ignore")
    if options.threads:
        torch.set_num_threads(options.threads)


def build(name: str, model: Any, pairs: Sequence[Pair]) -> Step:
    rows = Rows(name, pairs).store(model)
    if name in OURS:
        return ours(model, rows)
    if name.startswith("packed"):
        return unshared(model, rows)
    other = copy.deepcopy(model, {id(p): p for p in model.parameters()})  # its parameters and gradients are the same
    other.set_attn_implementation("sdpa")
    return trl(name, other, rows) if "TRL" in name else padded(other, rows)


def ours(model: Any, rows: Rows) -> Step:
    if rows.work == "cross":
        policy, batch = Policy(model), pack(rows.ids, rows.starts).to(model.device)
        return torch.no_grad()(lambda: cross_logps(policy, batch))
    share = rows.work in ("DPO", "group")  # as AlignmentData.shares_prompts
    return trained(model, rows, pack(rows.ids, rows.starts, share=share, **columns(rows)))


def unshared(model: Any, rows: Rows) -> Step:
    """Packed, without shared prompts."""
    if rows.work != "cross":
        return trained(model, rows, pack(rows.ids, rows.starts, **columns(rows)))
    policy, batches = Policy(model), list[Packed]()
    several, starts, room = list[list[int]](), list[int](), TOKENS
    for row, start in zip(*crossed(rows), strict=True):
        if len(row) > room:
            batches.append(pack(several, starts).to(model.device))
            several, starts, room = [], [], TOKENS
        several, starts, room = [*several, row], [*starts, start], room - len(row)
    batches.append(pack(several, starts).to(model.device))
    table = lambda: torch.cat([batch.sum_by_sequence(policy(batch)) for batch in batches])  # noqa: E731
    return torch.no_grad()(lambda: table().view(len(rows.ids), -1))


def crossed(rows: Rows) -> tuple[list[list[int]], list[int]]:
    """The B² sequences, prompt by prompt, and where each response starts."""
    ids = [prompt + response for prompt in rows.prompts for response in rows.responses]
    return ids, [start for start in rows.starts for _ in rows.responses]


def columns(rows: Rows) -> dict[str, Any]:
    divisors = {"global_tokens": float(sum(rows.answers)), "global_sequences": float(len(rows.ids))}
    return {"weights": rows.weights, "reference_logps": rows.reference, **divisors}


def trained(model: Any, rows: Rows, batch: Packed) -> Step:
    batch, schedule = batch.to(model.device), Schedule(kind="constant", warmup=0.0, floor=0.0)
    module = AlignmentModule(Policy(model), LOSSES[rows.work], torch.optim.AdamW, schedule)
    module._trainer = SimpleNamespace(world_size=1, accumulate_grad_batches=1)  # all that training_step asks of it
    return lambda: module.training_step(batch, 0)


def padded(model: Any, rows: Rows) -> Step:
    """The step most code takes; cross scoring in one batch a prompt."""
    count = len(rows.ids)
    if rows.work == "cross":
        ids, starts = crossed(rows)
        parts = [padded_sums(model, ids[i : i + count], starts[i : i + count]) for i in range(0, len(ids), count)]
        return torch.no_grad()(lambda: torch.stack([part() for part in parts]))
    sums = padded_sums(model, rows.ids, rows.starts)

    def step() -> Tensor:
        summed = sums()
        if rows.work == "DPO":
            ratio = summed - rows.summed
            return -torch.nn.functional.logsigmoid(0.1 * (ratio[0::2] - ratio[1::2])).mean()
        return -(summed * rows.weights if rows.work == "VAR" else summed).sum() / sum(rows.answers)

    return step


def padded_sums(model: Any, ids: list[list[int]], starts: list[int]) -> Step:
    """[B] nats, by [B, L, V] logits, log_softmax, gather, mask."""
    tokens, attended, mask = torch.zeros(3, len(ids), max(map(len, ids)), dtype=torch.long)
    for i, (row, start) in enumerate(zip(ids, starts, strict=True)):
        tokens[i, : len(row)], attended[i, : len(row)], mask[i, start : len(row)] = torch.tensor(row), 1, 1
    tokens, attended, mask = (x.to(model.device) for x in (tokens, attended, mask))

    def step() -> Tensor:
        logits = model(input_ids=tokens, attention_mask=attended, use_cache=False).logits
        logps = logits[:, :-1].float().log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
        return (logps * mask[:, 1:]).sum(1)

    return step


def full_logits(model: Any, rows: Rows) -> Step:
    """Our SFT step but for its head: one [N, V] tensor of logits, and its log_softmax."""
    batch, policy = pack(rows.ids, rows.starts).to(model.device), Policy(model)

    def step() -> Tensor:
        logits = torch.nn.functional.linear(policy.predictor_states(batch), model.get_output_embeddings().weight)
        return -logits.float().log_softmax(-1).gather(1, batch.target[:, None]).sum() / sum(rows.answers)

    return step


def trl(name: str, model: Any, rows: Rows) -> Step:
    import datasets
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    words = Tokenizer(models.WordLevel({"[PAD]": 0, "[EOS]": 1}, unk_token="[PAD]"))  # the tokens come ready
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", eos_token="[EOS]")
    common = {"output_dir": tempfile.mkdtemp(), "report_to": "none", "per_device_train_batch_size": 8, "bf16": False}
    common |= {"use_cpu": model.device.type == "cpu", "gradient_checkpointing": False, "max_length": None}
    split = list(zip(rows.prompts, rows.responses, strict=True))
    if rows.work == "DPO":
        text = datasets.Dataset.from_dict({"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]})  # asked for, not used
        config = DPOConfig(beta=0.1, precompute_ref_log_probs=True, **common)
        trainer = DPOTrainer(model, args=config, train_dataset=text, processing_class=tokenizer)
        keys = ("prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps")
        better, worse, logps = split[0::2], split[1::2], rows.summed.view(4, 2).tolist()
        examples = [(*b, w[1], *r) for b, w, r in zip(better, worse, logps, strict=True)]
        examples = [dict(zip(keys, example, strict=True)) for example in examples]
    else:
        examples = [{"input_ids": p + a, "labels": [-100] * len(p) + a} for p, a in split]
        config = SFTConfig(padding_free="padding_free" in name, **common)
        data = datasets.Dataset.from_list(examples)
        trainer = SFTTrainer(model, args=config, train_dataset=data, processing_class=tokenizer)
    model.train()  # as its training_step does; there is no dropout
    batch = trainer.data_collator(examples)
    batch = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    return lambda: trainer.compute_loss(model, dict(batch))


def counted(model: Any, batch: Packed) -> dict[str, float]:
    """FLOPs of a forward by part: 2 a weight and token, attention's two products over what each token sees (no
    softmax, norms or element-wise work), and the head at response positions. A backward takes twice as many."""
    seen = sum(
        (s.stop - s.start) * (s.prefix_stop - s.prefix_start + (s.stop - s.start + 1) / 2) for s in batch.segments
    )
    return flops(model, len(batch.input_ids), seen, len(batch.target))


def flops(model: Any, tokens: int, seen: float, predicted: int) -> dict[str, float]:
    """seen: tokens attended to, summed over the tokens. predicted: positions at which the head runs."""
    config = model.config
    embeddings = {id(m.weight): m.weight.numel() for m in (model.get_input_embeddings(), model.get_output_embeddings())}
    weights = sum(p.numel() for p in model.parameters()) - sum(embeddings.values())
    width = config.num_attention_heads * head_width(config)
    return {
        "backbone": 2.0 * weights * tokens,
        "attention": 4.0 * config.num_hidden_layers * width * seen,
        "head": 2.0 * predicted * config.hidden_size * config.vocab_size,
    }


def arithmetic(model: Any, name: str, pairs: Sequence[Pair]) -> float:
    """FLOPs of a whole step, a backward included where there is one: ours computes the head's logits once more there.
    Theirs run the head at every position, and padded ones attend to the whole square."""
    rows = Rows(name, pairs)
    times = 1 if rows.work == "cross" else 3
    if name in OURS:
        packed = pack(rows.ids, rows.starts, share=rows.work in ("DPO", "group"))
        parts = counted(model, rows.encoded() if rows.work == "cross" else packed)
        return times * sum(parts.values()) + (parts["head"] if times == 3 else 0.0)
    ids, starts = crossed(rows) if rows.work == "cross" else (rows.ids, rows.starts)
    parts = counted(model, pack(ids, starts))
    if name.startswith("packed"):
        return times * sum(parts.values()) + (parts["head"] if times == 3 else 0.0)
    if "padding_free" in name:
        parts["head"] = flops(model, 0, 0, sum(map(len, ids)))["head"]
        return times * sum(parts.values())
    size = len(rows.ids)  # padded ones run so many rows at once
    widths = [max(map(len, ids[i : i + size])) for i in range(0, len(ids), size)]
    tokens = size * sum(widths)
    return times * sum(flops(model, tokens, size * sum(width**2 for width in widths), tokens).values())


def counted_bytes(model: Any, batch: Packed) -> dict[str, float]:
    """Bytes that a Llama's training step adds, in fp32: gradients, one chunk of logits, and what the layers keep.

    A layer keeps of each token the two norms' inputs, normalised and scaled (6 H), query, attention and their
    concatenation (3 H), key and value, and gate, activated gate, up and their product (4 I).
    """
    config = model.config
    token = 9 * config.hidden_size + 2 * config.num_key_value_heads * head_width(config) + 4 * config.intermediate_size
    return {
        "gradients": 4.0 * sum(p.numel() for p in model.parameters()),
        "logits": 4.0 * min(HEAD_CHUNK, len(batch.target)) * config.vocab_size,
        "activations": 4.0 * config.num_hidden_layers * token * len(batch.input_ids),
    }


def head_width(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
