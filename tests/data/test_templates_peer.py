"""1,000 rows of public data as TRL's trainers tokenize them: which tokens and masks are the same, and why not."""

import copy
import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from transformers import AutoTokenizer, LlamaForCausalLM

from tests.helpers.models import tiny_config
from tests.helpers.runs import ROOT
from tests.helpers.small_tokenizers import build
from var.data.chat import Chat
from var.data.read import read
from var.data.sources.hh_rlhf import HHRLHF
from var.data.sources.hha import HHA

pytestmark = pytest.mark.peer

LLAMA3 = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
MARKED = """\
{% for m in messages %}
{% if m.role == 'assistant' %}
<|im_start|>assistant
{% generation %}{{ m.content ~ '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}
{%- else %}{{ '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>\\n' }}
{%- endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


@pytest.fixture(scope="module")
def examples(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[list[dict[str, Any]], list[str]]]:
    """Return 766 prompts with two responses, the better one first, and 234 with one."""
    cache = tmp_path_factory.mktemp("cache")
    harmless = read(HHRLHF(path=str(real_data / "hh_rlhf_harmless_base_test.jsonl.gz")), cache).head(400)
    helpful = read(HHA(folder=str(real_data), subsets=("helpful_base",)), cache).head(286)
    found = [(list(row.prompt), [r.text for r in row.responses]) for rows in (harmless, helpful) for row in rows]
    biased = json.loads((real_data / "evalbiasbench.json").read_text())
    with gzip.open(real_data / "humaneval.jsonl.gz", "rt") as file:
        code = [json.loads(line) for line in file]
    math = [json.loads(line) for line in (real_data / "gsm8k_test.jsonl").read_text().splitlines()[:70]]
    texts = [(r["instruction"], [r["response1"], r["response2"]]) for part in biased.values() for r in part]
    texts += [(r["prompt"], [r["canonical_solution"]]) for r in code] + [(r["question"], [r["answer"]]) for r in math]
    return found + [([{"role": "user", "content": prompt}], responses) for prompt, responses in texts]


@pytest.fixture(scope="module", params=["smollm2", "llama3", "smollm2-llama3"])
def setting(request: pytest.FixtureRequest, smollm2: Path) -> tuple[str, Chat]:
    """Return a template and its tokenizer.

    llama3: conf's template, with a byte-level BPE that splits words as Llama 3's. smollm2-llama3: the same template
    with SmolLM2's tokenizer, which splits the two line ends before a response, but not at the end of a text.
    """
    template = OmegaConf.load(ROOT / "conf" / "model" / "_llama3.yaml").chat_template
    if request.param == "smollm2":
        return request.param, Chat(AutoTokenizer.from_pretrained(smollm2))
    kind = "split" if request.param == "llama3" else "smollm2"
    return request.param, Chat(build(kind, LLAMA3, (), LLAMA3[0], LLAMA3[3], smollm2), template)


def train_with_trl(kind: str, tokenizer: Any, records: list[dict[str, Any]], folder: Path, **options: Any) -> Any:
    """Return the data set that TRL's trainer prepares."""
    import trl
    from datasets import Dataset

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    models = [LlamaForCausalLM(tiny_config(vocab_size=len(tokenizer))) for _ in range(2 if kind == "DPO" else 1)]
    settings = dict(output_dir=str(folder), report_to="none", use_cpu=True, bf16=False, max_length=None, **options)
    trainer = getattr(trl, f"{kind}Trainer")(
        *models, args=getattr(trl, f"{kind}Config")(**settings), train_dataset=Dataset.from_list(records),
        processing_class=tokenizer,
    )  # fmt: skip
    return trainer.train_dataset


TAIL, SPANS, EARLIER = "text after the end token", "token across prompt and response", "earlier answers"


def compare(chat: Chat, prompt: list[dict[str, Any]], response: str, ids: list[int], mask: list[bool]) -> list[str]:
    """Return what TRL trains and we do not: nothing, TAIL, SPANS or EARLIER. Other differences fail the test.

    mask: the tokens that TRL trains. The last answer is the last run of them, up to a tail.
    """
    ours, found = chat.encode(prompt, response), []
    assert ours.changes == ()
    begin = len(mask) - mask[::-1].index(True)
    begin = next((i + 1 for i in reversed(range(begin)) if not mask[i]), 0)
    if any(mask[:begin]):
        assert any(message["role"] == "assistant" for message in prompt)
        found.append(EARLIER)
    if mask[-1] and chat.tail:
        found.append(TAIL)
    if (begin, ids) != (ours.start, [*ours.ids, *chat.tail]):
        assert begin <= ours.start
        assert ids[:begin] == ours.ids[:begin]
        assert chat.template.decode(ids) == chat.template.decode([*ours.ids, *chat.tail])
        assert ids[begin] != ours.ids[begin]
        found.append(SPANS)
    return found or ["same"]


def test_sft_on_completions_has_the_tokens_of_trl(examples: Any, setting: Any, tmp_path: Path) -> None:
    name, chat = setting
    records = [{"prompt": p, "completion": [{"role": "assistant", "content": r[0]}]} for p, r in examples]
    theirs = train_with_trl("SFT", chat.tokenizer, records, tmp_path, completion_only_loss=True)
    found = Counter[str]()
    for (prompt, responses), row in zip(examples, theirs, strict=True):
        found.update(compare(chat, prompt, responses[0], row["input_ids"], [i != -100 for i in row["labels"]]))
    print("SFT", name, dict(found))
    smollm2 = {TAIL: 1000, SPANS: 164}
    assert found == {"smollm2": smollm2, "llama3": {"same": 999, SPANS: 1}, "smollm2-llama3": {SPANS: 1000}}[name]


def test_dpo_has_the_tokens_of_trl(examples: Any, setting: Any, tmp_path: Path) -> None:
    name, chat = setting
    pairs = [(prompt, responses) for prompt, responses in examples if len(responses) == 2]
    answers = [[[{"role": "assistant", "content": text}] for text in responses] for _, responses in pairs]
    records = [{"prompt": p, "chosen": a, "rejected": b} for (p, _), (a, b) in zip(pairs, answers, strict=True)]
    theirs = train_with_trl("DPO", chat.tokenizer, records, tmp_path)
    found = Counter[str]()
    for (prompt, responses), row in zip(pairs, theirs, strict=True):
        for key, response in zip(("chosen_ids", "rejected_ids"), responses, strict=True):
            ids, start = [*row["prompt_ids"], *row[key]], len(row["prompt_ids"])
            found.update(compare(chat, prompt, response, ids, [i >= start for i in range(len(ids))]))
    print("DPO", name, dict(found))
    assert found == {"smollm2": {TAIL: 1532}, "llama3": {"same": 1532}, "smollm2-llama3": {SPANS: 1532}}[name]


def test_sft_on_assistant_turns_has_the_tokens_of_trl(examples: Any, smollm2: Path, tmp_path: Path) -> None:
    chat = Chat(AutoTokenizer.from_pretrained(smollm2), MARKED)
    records = [{"messages": [*p, {"role": "assistant", "content": r[0]}]} for p, r in examples]
    theirs = train_with_trl("SFT", chat.tokenizer, records, tmp_path, assistant_only_loss=True)
    found = Counter[str]()
    for (prompt, responses), row in zip(examples, theirs, strict=True):
        found.update(compare(chat, prompt, responses[0], row["input_ids"], [i != -100 for i in row["labels"]]))
    print("SFT on assistant turns", dict(found))
    assert found == {"same": 355, EARLIER: 481, SPANS: 164}
