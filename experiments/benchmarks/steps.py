"""The steps that are timed: this project's, the usual padded or packed code, and TRL's, on the same tokens.

The name of a step is its work, after whose it is: "VAR" is ours, "padded VAR" the padded one. The works are:

- SFT, VAR: the chosen responses of 8 rows, weighted for VAR.
- DPO: the pairs of the first 4 rows.
- group: SFT on 2 prompts with 4 responses each. In ours they share their prompt. VAR's weights would cost nothing here.
- cross: the table log π_ref(y_j|x_i) of SFT's 8 rows, without a gradient.
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
from var.models.cross_scoring import cross_logps, pack_crossed
from var.models.logprobs import HEAD_CHUNK
from var.models.packing import Packed, pack, pack_tree
from var.models.policy import Policy
from var.models.pretrained import Pretrained
from var.training.module import AlignmentModule
from var.training.schedule import Schedule
from var.weights.estimators import Global

LOSSES = {"SFT": SFT(), "VAR": VAR(estimator=Global(), temperature_unit="reward"), "DPO": DPO(beta=0.1), "group": SFT()}
OURS = [*LOSSES, "cross"]
PEERS = {  # "packed" is like ours, but a prompt with several responses is repeated for each of them
    "SFT": ["padded SFT", "TRL SFT", "TRL padding_free SFT"],
    "VAR": ["padded VAR"],
    "DPO": ["packed DPO", "padded DPO", "TRL DPO"],
    "group": ["packed group", "padded group", "TRL group"],
    "cross": ["packed cross", "padded cross"],
}
STEPS = [*OURS, *(peer for peers in PEERS.values() for peer in peers)]
LENGTHS = {  # tokens of prompt, chosen and rejected response, in the batches that --data picks
    512: "39 124 13, 215 21 117, 185 30 66, 115 72 3, 324 20 15, 89 48 44, 96 60 63, 49 17 32",
    256: "104 32 32, 37 15 13, 180 46 57, 40 145 68, 130 7 10, 134 39 12, 139 34 28, 35 19 11",
}
Pair = tuple[list[int], list[int], list[int]]  # prompt, chosen, rejected
Step = Callable[[], Tensor]  # a loss with a gradient, or cross scoring's table [B, B] without one


def get_work(name: str) -> str:
    """Return the work of a step, by its name."""
    return name.rpartition(" ")[2]


class Rows:
    """The sequences of a step. For DPO better and worse responses alternate."""

    def __init__(self, name: str, pairs: Sequence[Pair]) -> None:
        self.work = get_work(name)
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
            self.real *= len(rows)  # each response is read under each prompt

    def annotate(self, model: Any) -> "Rows":
        """Add weights [B] of mean 1, and for DPO reference log-probabilities near the policy's, [N] and summed [B]."""
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
        """Return the batch that our step runs through the model."""
        if self.work == "cross":
            return pack_tree(self.prompts, [self.responses] * len(self.prompts))
        return pack(self.ids, self.starts)


def read_batches(options: argparse.Namespace) -> dict[int, list[Pair]]:
    """Return 8 pairs by the longest sequence that is allowed."""
    rng = random.Random(0)
    if options.data is None:
        draw = lambda n: rng.choices(range(100, 4000), k=int(n))  # noqa: E731
        return {n: [tuple(map(draw, row.split())) for row in LENGTHS[n].split(",")] for n in options.longest}
    chat, source, rows = (
        make_pretrained(options).chat,
        HHA(folder=options.data, subsets=("helpful_base",)),
        list[Pair](),
    )
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


def make_pretrained(options: argparse.Namespace) -> Pretrained:
    """Return the model of --model."""
    path = "HuggingFaceTB/SmolLM2-135M-Instruct" if options.model == "smollm2-135m" else options.model
    plain = dict.fromkeys(("revision", "chat_template")) | dict.fromkeys(
        ("trust_remote_code", "gradient_checkpointing"), False
    )
    cache = os.path.expanduser(options.cache)
    settings = {"name": "smollm2-135m", "path": path, "dtype": "float32", "attention": "packed", "cache": cache}
    return Pretrained(architecture={}, **settings, **plain)


def load_model(options: argparse.Namespace) -> Any:
    """Load the model of --model, or make a random one with --tiny."""
    if not options.tiny:
        set_threads(options)
        return make_pretrained(options).load().to(options.device)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return make_llama(options, vocab_size=49152 if options.data else 4096, num_key_value_heads=2, **sizes)


def make_llama(options: argparse.Namespace, **sizes: int) -> Any:
    """Return a random Llama with tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    set_threads(options)
    torch.manual_seed(0)
    config = LlamaConfig(tie_word_embeddings=True, **sizes)
    config._attn_implementation = "packed"
    return LlamaForCausalLM(config).eval().to(options.device)


def set_threads(options: argparse.Namespace) -> None:
    """Silence warnings and set torch's threads."""
    warnings.filterwarnings("ignore")
    if options.threads:
        torch.set_num_threads(options.threads)


def make_step(name: str, model: Any, pairs: Sequence[Pair]) -> Step:
    """Return the step of this name on 8 pairs."""
    rows = Rows(name, pairs).annotate(model)
    if name in OURS:
        return make_ours(model, rows)
    if name.startswith("packed"):
        return make_unshared(model, rows)
    other = copy.deepcopy(model, {id(p): p for p in model.parameters()})  # it shares parameters and gradients
    other.set_attn_implementation("sdpa")
    return make_trl(name, other, rows) if "TRL" in name else make_padded(other, rows)


def make_ours(model: Any, rows: Rows) -> Step:
    """Return this project's step."""
    if rows.work == "cross":
        policy, crossed = Policy(model), pack_crossed(rows.ids, rows.starts).to(model.device)
        return torch.no_grad()(lambda: cross_logps(policy, crossed))
    share = rows.work in ("DPO", "group")  # like AlignmentData.shares_prompts
    return make_training_step(model, rows, pack(rows.ids, rows.starts, share=share, **make_columns(rows)))


def make_unshared(model: Any, rows: Rows) -> Step:
    """Return a packed step that does not share prompts."""
    if rows.work != "cross":
        return make_training_step(model, rows, pack(rows.ids, rows.starts, **make_columns(rows)))
    policy, batches = Policy(model), list[Packed]()
    packed, starts, room = list[list[int]](), list[int](), TOKENS
    for row, start in zip(*cross_rows(rows), strict=True):
        if len(row) > room:
            batches.append(pack(packed, starts).to(model.device))
            packed, starts, room = [], [], TOKENS
        packed, starts, room = [*packed, row], [*starts, start], room - len(row)
    batches.append(pack(packed, starts).to(model.device))
    table = lambda: torch.cat([batch.sum_by_sequence(policy(batch)) for batch in batches])  # noqa: E731
    return torch.no_grad()(lambda: table().view(len(rows.ids), -1))


def cross_rows(rows: Rows) -> tuple[list[list[int]], list[int]]:
    """Return the B² sequences, prompt by prompt, and where each response starts."""
    ids = [prompt + response for prompt in rows.prompts for response in rows.responses]
    return ids, [start for start in rows.starts for _ in rows.responses]


def make_columns(rows: Rows) -> dict[str, Any]:
    """Return the fields of the batch that losses read."""
    divisors = {"global_tokens": float(sum(rows.answers)), "global_sequences": float(len(rows.ids))}
    return {"weights": rows.weights, "reference_logps": rows.reference, **divisors}


def make_training_step(model: Any, rows: Rows, batch: Packed) -> Step:
    """Return `AlignmentModule.training_step` on this batch."""
    batch, schedule = batch.to(model.device), Schedule(kind="constant", warmup=0.0, floor=0.0)
    module = AlignmentModule(Policy(model), LOSSES[rows.work], [], torch.optim.AdamW, schedule)
    module._trainer = SimpleNamespace(world_size=1, accumulate_grad_batches=1)  # all that training_step reads
    return lambda: module.training_step(batch, 0)


def make_padded(model: Any, rows: Rows) -> Step:
    """Return the usual padded step. Cross scoring has one batch per prompt."""
    count = len(rows.ids)
    if rows.work == "cross":
        ids, starts = cross_rows(rows)
        parts = [make_padded_sums(model, ids[i : i + count], starts[i : i + count]) for i in range(0, len(ids), count)]
        return torch.no_grad()(lambda: torch.stack([part() for part in parts]))
    sums = make_padded_sums(model, rows.ids, rows.starts)

    def step() -> Tensor:
        summed = sums()
        if rows.work == "DPO":
            ratio = summed - rows.summed
            return -torch.nn.functional.logsigmoid(0.1 * (ratio[0::2] - ratio[1::2])).mean()
        return -(summed * rows.weights if rows.work == "VAR" else summed).sum() / sum(rows.answers)

    return step


def make_padded_sums(model: Any, ids: list[list[int]], starts: list[int]) -> Step:
    """Return [B] nats from [B, L, V] logits, log_softmax, gather and a mask."""
    tokens, attended, mask = torch.zeros(3, len(ids), max(map(len, ids)), dtype=torch.long)
    for i, (row, start) in enumerate(zip(ids, starts, strict=True)):
        tokens[i, : len(row)], attended[i, : len(row)], mask[i, start : len(row)] = torch.tensor(row), 1, 1
    tokens, attended, mask = (x.to(model.device) for x in (tokens, attended, mask))

    def step() -> Tensor:
        logits = model(input_ids=tokens, attention_mask=attended, use_cache=False).logits
        logps = logits[:, :-1].float().log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
        return (logps * mask[:, 1:]).sum(1)

    return step


def make_full_logits(model: Any, rows: Rows) -> Step:
    """Return our SFT step with another head: one [N, V] tensor of logits, and its log_softmax."""
    batch, policy = pack(rows.ids, rows.starts).to(model.device), Policy(model)

    def step() -> Tensor:
        logits = torch.nn.functional.linear(policy.predictor_states(batch), model.get_output_embeddings().weight)
        return -logits.float().log_softmax(-1).gather(1, batch.target[:, None]).sum() / sum(rows.answers)

    return step


def make_trl(name: str, model: Any, rows: Rows) -> Step:
    """Return the step of TRL's trainer, with its collator and `compute_loss`."""
    import datasets
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    words = Tokenizer(models.WordLevel({"[PAD]": 0, "[EOS]": 1}, unk_token="[PAD]"))  # rows are tokenized already
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", eos_token="[EOS]")
    common = {"output_dir": tempfile.mkdtemp(), "report_to": "none", "per_device_train_batch_size": 8, "bf16": False}
    common |= {"use_cpu": model.device.type == "cpu", "gradient_checkpointing": False, "max_length": None}
    split = list(zip(rows.prompts, rows.responses, strict=True))
    if rows.work == "DPO":
        text = datasets.Dataset.from_dict(
            {"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]}
        )  # required, but not used
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
    model.train()  # like its training_step; the model has no dropout
    batch = trainer.data_collator(examples)
    batch = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    return lambda: trainer.compute_loss(model, dict(batch))


def count_flops(model: Any, batch: Packed) -> dict[str, float]:
    """Return the FLOPs of a forward by part. A backward takes twice as many.

    Counted are 2 per weight and token, attention's two products over the tokens that each token attends to, and the
    head at response positions. Softmax, norms and element-wise operations are not counted.
    """
    seen = sum(
        (s.stop - s.start) * (s.prefix_stop - s.prefix_start + (s.stop - s.start + 1) / 2) for s in batch.segments
    )
    return count_flops_of_sizes(model, len(batch.input_ids), seen, len(batch.target))


def count_flops_of_sizes(model: Any, tokens: int, seen: float, predicted: int) -> dict[str, float]:
    """Return the FLOPs of a forward by part, by sizes.

    Args:
        model: its parameters are counted.
        tokens: of the batch.
        seen: the tokens that a token attends to, summed over tokens.
        predicted: positions at which the head runs.
    """
    config = model.config
    embeddings = {id(m.weight): m.weight.numel() for m in (model.get_input_embeddings(), model.get_output_embeddings())}
    weights = sum(p.numel() for p in model.parameters()) - sum(embeddings.values())
    width = config.num_attention_heads * get_head_width(config)
    return {
        "backbone": 2.0 * weights * tokens,
        "attention": 4.0 * config.num_hidden_layers * width * seen,
        "head": 2.0 * predicted * config.hidden_size * config.vocab_size,
    }


def count_step_flops(model: Any, name: str, pairs: Sequence[Pair]) -> float:
    """Return the FLOPs of a complete step, with its backward.

    Our backward recomputes the head's logits. The other steps run the head at every position, and padded steps attend
    to the complete square.
    """
    rows = Rows(name, pairs)
    times = 1 if rows.work == "cross" else 3
    if name in OURS:
        packed = pack(rows.ids, rows.starts, share=rows.work in ("DPO", "group"))
        parts = count_flops(model, rows.encoded() if rows.work == "cross" else packed)
        return times * sum(parts.values()) + (parts["head"] if times == 3 else 0.0)
    ids, starts = cross_rows(rows) if rows.work == "cross" else (rows.ids, rows.starts)
    parts = count_flops(model, pack(ids, starts))
    if name.startswith("packed"):
        return times * sum(parts.values()) + (parts["head"] if times == 3 else 0.0)
    if "padding_free" in name:
        parts["head"] = count_flops_of_sizes(model, 0, 0, sum(map(len, ids)))["head"]
        return times * sum(parts.values())
    size = len(rows.ids)  # padded steps run this many rows at once
    widths = [max(map(len, ids[i : i + size])) for i in range(0, len(ids), size)]
    tokens = size * sum(widths)
    return times * sum(count_flops_of_sizes(model, tokens, size * sum(width**2 for width in widths), tokens).values())


def count_bytes(model: Any, batch: Packed) -> dict[str, float]:
    """Return the bytes that a Llama's training step adds, in fp32, by part.

    These are gradients, one chunk of logits, and the tensors that the layers keep. Per token a layer keeps the two
    norms' inputs, normalized and scaled (6 H), query, attention and their concatenation (3 H), key and value, and gate,
    activated gate, up and their product (4 I).
    """
    config = model.config
    token = (
        9 * config.hidden_size + 2 * config.num_key_value_heads * get_head_width(config) + 4 * config.intermediate_size
    )
    return {
        "gradients": 4.0 * sum(p.numel() for p in model.parameters()),
        "logits": 4.0 * min(HEAD_CHUNK, len(batch.target)) * config.vocab_size,
        "activations": 4.0 * config.num_hidden_layers * token * len(batch.input_ids),
    }


def get_head_width(config: Any) -> int:
    """Return the width of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
