"""What fills the store: each number equals what the model gives alone, and nothing is computed twice."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from safetensors.torch import load_file, save_file
from var.annotate.value_head import ValueHead

from tests.conftest import pretrained
from var.annotate.annotator import Annotator, Unfilled, add_responses
from var.annotate.cache import AnnotationCache
from var.data.plan import make_plan
from var.data.rows import Response, Row, Rows, read
from var.data.sequences import Sequences, choose, encode
from var.models.frozen import FrozenModel
from var.models.packing import Packed, pack, whole
from var.models.policy import Policy
from var.rewards.base import check_answers
from var.rewards.dataset_score import Score
from var.rewards.ensemble import Ensemble
from var.rewards.programmatic import ExactNumber, NearNumber
from var.rewards.scale import Scale
from var.sampling.base import Sampling
from var.utils.distributed import Ranks
from var.utils.errors import UserError

SAMPLING = Sampling(responses=2, temperature=1.0, top_p=1.0, max_new_tokens=4, batch=4, batch_tokens=4096, seed=0)


@dataclass(frozen=True)
class Given:
    """Rows made in the test, as a source."""

    rows: tuple[Row, ...]

    def records(self) -> Any:
        return ((row.id, row) for row in self.rows)

    def row(self, where: str, record: Row) -> Row:
        return record

    def identity(self) -> dict[str, Any]:
        return {"given": repr(self.rows)}


@dataclass
class Lengths:
    """A reward that notes what it is asked: the response's length, and 100 where the answer is in it."""

    asked: list[tuple[str, str, str | None]] = field(default_factory=list)
    nan_for: str | None = None

    scores_text = True

    @property
    def identity(self) -> dict[str, Any]:
        return {"program": "lengths"}

    def __call__(self, prompts: Any, responses: Sequence[str], answers: Sequence[str | None]) -> list[float]:
        self.asked.extend((p[-1]["content"], r, a) for p, r, a in zip(prompts, responses, answers, strict=True))
        return [
            float("nan") if r == self.nan_for else len(r) + 100.0 * (a is not None and a in r)
            for r, a in zip(responses, answers, strict=True)
        ]


ROWS = tuple(
    Row(
        id=f"row-{i}",
        prompt=({"role": "user", "content": "what is " + "?" * (i + 1)},),
        responses=tuple(
            Response(text=f"it is {i}" + "!" * (3 * i % 5 + 2 * k), score=i + 0.5 * k, finished=(i + k) % 3 > 0)
            for k in range(2 if i % 4 == 0 else 1)
        ),
        answer=str(i),
    )
    for i in range(6)
)  # eight sequences, of prompts 0 and 4 two each; some without an end token


def annotator(folder: Path, root: Path, reward: Any = None, **options: Any) -> Annotator:
    """A fresh process's annotator: nothing loaded, the store on disk as it is."""
    reference = FrozenModel(pretrained(folder, root / "cache"), "cpu")
    return Annotator(AnnotationCache(root / "store"), reference, reward or Lengths(), root / "cache", **options)


def data(one: Annotator, rows: tuple[Row, ...] = ROWS) -> tuple[Rows, Sequences]:
    loaded = read(Given(rows), one.cache)
    return loaded, encode(loaded, choose(loaded, "all"), one.chat, 128, "error", False, one.cache)


def plan(sequences: Sequences, size: int) -> np.ndarray:
    return make_plan(sequences.length, 1, size, size, 3, "keep", "keep").micro


@pytest.fixture(scope="module")
def alone(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """log-probabilities of a response's tokens after a prompt, by the model's own forward, one sequence at a time."""
    model = pretrained(tiny_folder, tmp_path_factory.mktemp("cache")).load()
    model.config._attn_implementation = "sdpa"

    @torch.inference_mode()
    def logps(prompt: list[int], response: list[int]) -> torch.Tensor:
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        return logits[len(prompt) - 1 : -1].gather(1, torch.tensor(response)[:, None])[:, 0]

    logps.model = model  # type: ignore[attr-defined]
    return logps


def parts(sequences: Sequences, index: int) -> tuple[list[int], list[int]]:
    ids, start, _ = sequences.tokens(index)
    return ids[:start], ids[start:]


def test_reference_logps_are_those_of_each_sequence_alone(tiny_folder, tmp_path, alone):
    """By the model's logits, and to the last bits by the policy's own forward: DPO's step 0 depends on it."""
    one = annotator(tiny_folder, tmp_path)
    _, sequences = data(one)
    assert len(sequences) == 8
    found = one.reference_logps(sequences).to_pylist()
    policy = Policy(one.reference.pretrained.load())
    for i in range(8):
        prompt, response = parts(sequences, i)
        assert len(found[i]) == len(response) == sequences.length[i]
        assert_allclose(found[i], alone(prompt, response), atol=2e-5)
        with torch.no_grad():
            assert_allclose(found[i], policy(pack([prompt + response], [len(prompt)])), atol=2e-6)


def test_cross_logps_are_those_of_every_pair_alone(tiny_folder, tmp_path, alone):
    """[m, i, j] is log π_ref(y_j|x_i) summed; a short micro-batch holds 0 where it is short."""
    one = annotator(tiny_folder, tmp_path)
    _, sequences = data(one)
    for size in (8, 3):
        micro = plan(sequences, size)
        found = one.cross_logps(sequences, micro)
        assert found.shape == (len(micro), size, size)
        for m, i, j in np.ndindex(found.shape):
            row, column = int(micro[m, i]), int(micro[m, j])
            if row < 0 or column < 0:
                assert found[m, i, j] == 0
                continue
            expected = alone(parts(sequences, row)[0], parts(sequences, column)[1]).double().sum()
            assert_allclose(found[m, i, j], expected, atol=1e-4)
    assert (micro < 0).sum() == 1


def test_the_diagonal_is_the_own_pair(tiny_folder, tmp_path):
    one = annotator(tiny_folder, tmp_path)
    _, sequences = data(one)
    own = [sum(values) for values in one.reference_logps(sequences).to_pylist()]
    micro = plan(sequences, 4)
    assert_allclose(one.cross_logps(sequences, micro).diagonal(axis1=1, axis2=2), np.array(own)[micro], atol=1e-4)


def test_8_by_8_serves_4_by_4_and_2_by_2(tiny_folder, tmp_path):
    """Of one plan: nothing is computed, and the blocks on the diagonal are the same numbers."""
    one = annotator(tiny_folder, tmp_path)
    rows, sequences = data(one)
    whole, rewards = (
        one.cross_logps(sequences, plan(sequences, 8))[0],
        one.cross_rewards(rows, sequences, plan(sequences, 8))[0],
    )
    for size in (4, 2):
        two = annotator(tiny_folder, tmp_path)
        micro = plan(sequences, size)
        for m in range(8 // size):
            block = slice(m * size, (m + 1) * size)
            assert np.array_equal(two.cross_logps(sequences, micro)[m], whole[block, block])
            assert np.array_equal(two.cross_rewards(rows, sequences, micro)[m], rewards[block, block])
        assert two.computed == {}
        assert "policy" not in vars(two.reference)  # the model was not even loaded


def test_mismatched_logps_are_those_of_the_next_response(tiny_folder, tmp_path, alone):
    """[m, b] is log π_ref(y_{b+1}|x_b), the last with the first, within each micro-batch; a short one goes round among
    those that are there, and holds 0 where it is short. Pairs that cross_logps brought are read."""
    one = annotator(tiny_folder, tmp_path)
    _, sequences = data(one)
    micro = plan(sequences, 3)
    found = one.mismatched_logps(sequences, micro)
    assert (found.shape, found.dtype) == ((3, 3), torch.float64)
    assert (micro[:2] >= 0).all()
    assert micro[2, 2] == -1
    for members, row in zip(micro, found, strict=True):
        members = members[members >= 0]
        for b, member in enumerate(members):
            following = members[(b + 1) % len(members)]
            assert_allclose(row[b], alone(parts(sequences, member)[0], parts(sequences, following)[1]).sum(), atol=1e-4)
    assert found[2, 2] == 0
    assert one.computed == {"Cross log-probabilities": 8}
    one.cross_logps(sequences, micro)
    again = annotator(tiny_folder, tmp_path, annotate="error").mismatched_logps(sequences, micro)
    assert torch.equal(again, found)


HEAD = ValueHead(
    development_prompts=2, epochs=3, learning_rate=1e-2, heads=4, batch=2, lowest=0.0, largest=200.0, seed=0
)


def test_values_are_the_heads_of_each_groups_prompt_and_are_stored(tiny_folder, tmp_path):
    """The head is fitted on the mean reward, on the run's scale, of the reference's answers to the development prompts.
    A second call computes nothing; another head, other development prompts or another scale are other values."""
    one = annotator(tiny_folder, tmp_path)
    _, sequences = data(one, ROWS[2:])
    development = read(Given(ROWS[:2]), one.cache)
    found = one.values(HEAD, development, sequences, SAMPLING, Scale())
    assert found.shape == (4,)
    assert one.computed == {"Sampling candidates": 2, "Scoring candidates": 4, "Values": 4}

    texts = one.sampled(development, SAMPLING)
    raw = np.array([
        one.reward([row.prompt] * 2, [text for text, _ in several], [row.answer] * 2)
        for row, several in zip(ROWS, texts, strict=False)
    ])  # fmt: skip
    policy = Policy(one.reference.pretrained.load())

    def states(prompts: list[list[int]]) -> list[torch.Tensor]:
        return [policy.prompt_states(whole([prompt]))[0] for prompt in prompts]

    for scale in (Scale(), Scale(kind="sigmoid")):
        means = torch.from_numpy(np.array(scale(raw)).mean(1)).float()
        head = HEAD.fit(states([one.chat.prompt(row.prompt) for row in ROWS[:2]]), means)
        values = one.values(HEAD, development, sequences, SAMPLING, scale)
        for i in range(len(sequences)):
            expected = HEAD.predict(head, states([parts(sequences, i)[0]]))
            assert_allclose(values[sequences.group[i]], expected[0], rtol=1e-4)
    assert len(set(found.tolist())) == 4

    two = annotator(tiny_folder, tmp_path, annotate="error")
    assert two.values(HEAD, development, sequences, SAMPLING, Scale()).tolist() == found.tolist()
    assert two.computed == {}
    assert "policy" not in vars(two.reference)
    three = annotator(tiny_folder, tmp_path)
    three.values(replace(HEAD, seed=1), development, sequences, SAMPLING, Scale())
    three.values(HEAD, read(Given(ROWS[1:2]), three.cache), sequences, SAMPLING, Scale())
    three.values(HEAD, development, sequences, replace(SAMPLING, seed=5), Scale())
    assert three.computed["Values"] == 12


def test_values_need_a_reward_of_text(tiny_folder, tmp_path):
    one = annotator(tiny_folder, tmp_path, Score())
    rows, sequences = data(one)
    with pytest.raises(UserError, match=r"reward=score reads only the data's own"):
        one.values(HEAD, rows, sequences, SAMPLING, Scale())


def everything(one: Annotator) -> list[Any]:
    rows, sequences = data(one)
    micro = plan(sequences, 4)
    return [
        one.reference_logps(sequences).to_pylist(),
        one.cross_logps(sequences, micro).tolist(),
        one.cross_rewards(rows, sequences, micro).tolist(),
        [values.tolist() for values in one.row_rewards(rows)],
        one.features(sequences).tolist(),
        one.sampled(rows, SAMPLING),
    ]


def test_a_second_run_computes_nothing_and_reads_the_same(tiny_folder, tmp_path):
    """The first computes each distinct item once: 8 responses, 6 prompts, 32 pairs less those that come twice."""
    first, second = annotator(tiny_folder, tmp_path), annotator(tiny_folder, tmp_path, annotate="error")
    before, after = everything(first), everything(second)
    assert before == after
    assert second.computed == {}
    assert "policy" not in vars(second.reference)
    assert second.reward.asked == []
    counts = dict(first.computed)
    assert counts.pop("Cross log-probabilities") <= 32
    cross, own = counts.pop("Cross scoring"), counts.pop("Scoring", 0)
    assert len(first.reward.asked) == len(set(first.reward.asked)) == cross + own
    assert counts == {"Reference log-probabilities": 8, "Prompt features": 6, "Sampling": 6}


def test_a_subset_and_another_order_of_the_rows_find_what_is_there(tiny_folder, tmp_path):
    one = annotator(tiny_folder, tmp_path)
    found = one.reference_logps(data(one)[1]).to_pylist()
    two = annotator(tiny_folder, tmp_path)
    _, sequences = data(two, ROWS[::-1][:3])  # rows 5, 4, 3: of 4 two responses
    assert two.reference_logps(sequences).to_pylist() == [found[i] for i in (7, 5, 6, 4)]
    assert two.computed == {}


def test_another_weight_is_another_shelf(tiny_folder, tmp_path):
    """One number of the model overwritten in its very folder: nothing stale is read, and the reward stays as it is."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    before = everything(annotator(folder, tmp_path))
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    weights[name] = weights[name].clone()
    weights[name][0, 0] += 3.0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    two = annotator(folder, tmp_path)
    after = everything(two)
    assert two.computed == {
        "Reference log-probabilities": 8, "Cross log-probabilities": two.computed["Cross log-probabilities"],
        "Prompt features": 6, "Sampling": 6,
    }  # fmt: skip
    assert before[0] != after[0]
    assert before[1] != after[1]
    assert before[2:4] == after[2:4]
    assert before[4] != after[4]
    assert len(list((tmp_path / "store" / "reference_logps").iterdir())) == 2


@pytest.mark.parametrize("kernel", [{"attention": "varlen"}, {"compile": True}])
def test_what_computes_a_number_is_part_of_it_where_it_rounds(
    kernel: dict[str, Any], tiny_folder: Path, tmp_path: Path
) -> None:
    """In bf16 a policy's log-ratio to a reference of another kernel would not start at zero."""
    plain = pretrained(tiny_folder, tmp_path / "cache")
    for files, autocast, same in (
        (plain, None, True), (plain, torch.bfloat16, False), (replace(plain, dtype="bfloat16"), None, False),
    ):  # fmt: skip
        one, other = (FrozenModel(some, "cpu", autocast) for some in (files, replace(files, **kernel)))
        assert (one.identity == other.identity) is same


@pytest.mark.parametrize("change", [{"dtype": "bfloat16"}, {"chat_template": "{{ messages[0]['content'] }}<end>"}])
def test_the_references_identity_is_its_weights_dtype_template_and_arithmetic(tiny_folder, tmp_path, change):
    plain = pretrained(tiny_folder, tmp_path)
    identity = FrozenModel(plain, "cpu").identity
    assert FrozenModel(replace(plain, **change), "cpu").identity != identity
    assert FrozenModel(plain, "cpu", torch.bfloat16).identity != identity
    assert FrozenModel(replace(plain, name="other", attention="packed"), "cpu").identity == identity


def test_another_tokenizer_is_another_reference_and_how_it_pads_is_not(tiny_folder, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(tiny_folder, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Lowercase"}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    one, other = (FrozenModel(pretrained(where, tmp_path), "cpu") for where in (tiny_folder, folder))
    assert other.identity == {**one.identity, "tokenizer": other.identity["tokenizer"]}
    assert other.identity["tokenizer"] != one.identity["tokenizer"]
    again = pretrained(tiny_folder, tmp_path)
    again.chat.tokenizer.pad_token = "<end>"
    again.chat.tokenizer(["a", "bcd"], padding=True, truncation=True, max_length=2)
    assert again.identity == one.pretrained.identity


def test_features_are_the_last_and_the_mean_hidden_state_of_the_prompt(tiny_folder, tmp_path, alone):
    """[G, 2H], H = 32; of each group, whichever of its sequences stands first."""
    one = annotator(tiny_folder, tmp_path)
    _, sequences = data(one)
    found = one.features(sequences)
    assert found.shape == (6, 64)
    assert found.dtype == np.float32
    for i in range(len(sequences)):
        with torch.inference_mode():
            states = alone.model.model(input_ids=torch.tensor([parts(sequences, i)[0]])).last_hidden_state[0]
        expected = torch.cat([states[-1], states.mean(0)])
        assert_allclose(found[sequences.group[i]], expected, atol=1e-4)


def test_sampled_twice_is_the_same_text(tiny_folder, tmp_path):
    """From the store, and from an empty store too: the seed is of the content. K a prompt, in the rows' order."""
    one, two, other = (annotator(tiny_folder, tmp_path / name) for name in ("a", "a", "b"))
    rows, _ = data(one)
    texts = one.sampled(rows, SAMPLING)
    assert [len(several) for several in texts] == [2] * 6
    assert two.sampled(rows, SAMPLING) == texts
    assert two.computed == {}
    assert other.sampled(rows, SAMPLING) == texts
    assert other.computed == {"Sampling": 6}
    assert two.sampled(rows, replace(SAMPLING, seed=1)) != texts
    assert two.computed == {"Sampling": 6}
    picked = rows.select(np.array([4, 1]))
    assert two.sampled(picked, SAMPLING) == [texts[4], texts[1]]


class Elsewhere:
    """A sampler that writes down what is done with it."""

    def __init__(self) -> None:
        self.done: list[str] = []

    def identity(self, reference: FrozenModel) -> dict[str, Any]:
        return {"sampler": "elsewhere"}

    def check(self) -> None:
        self.done.append("check")

    def __call__(self, reference: Any, prompts: Any, sampling: Any, advance: Any) -> Any:
        self.done.append(f"sample {len(prompts)}")
        return [[(prompt[-1]["content"][-2:], True)] * sampling.responses for prompt in prompts]

    def release(self) -> None:
        self.done.append("release")


def test_another_sampler_has_a_shelf_of_its_own_and_is_let_go(tiny_folder, tmp_path):
    """It is looked at when something is missing: what is stored can be read where it cannot run."""
    elsewhere = Elsewhere()
    one = annotator(tiny_folder, tmp_path, sampler=elsewhere)
    rows, _ = data(one)
    texts = one.sampled(rows, SAMPLING)
    assert texts[0] == [(" ?", True)] * 2
    assert elsewhere.done == ["check", "sample 6", "release"]
    assert one.here.sampled(rows, SAMPLING) == annotator(tiny_folder, tmp_path).sampled(rows, SAMPLING) != texts
    again = Elsewhere()
    assert annotator(tiny_folder, tmp_path, sampler=again).sampled(rows, SAMPLING) == texts
    assert again.done == ["release"]
    assert one.source(SAMPLING) == {"sampler": "elsewhere", "sampling": SAMPLING.identity}


def test_sampled_responses_as_rows_are_counted(tiny_folder, tmp_path):
    one = annotator(tiny_folder, tmp_path)
    rows, _ = data(one)
    texts = [[("yes", True), (" \n", True)], [("no", False), ("no", True)], *[[("a", True), ("b", True)]] * 4]
    sampled, counts = add_responses(rows, texts, tmp_path)
    assert counts == {
        "sampled responses": 12, "sampled responses left out as empty": 1, "sampled responses cut": 1,
    }  # fmt: skip
    assert sampled[0].responses == (Response(text="yes", source="sampled"),)
    assert [r.finished for r in sampled[1].responses] == [False, True]
    assert sampled[1].prompt == ROWS[1].prompt
    assert sampled[1].answer == "1"


# --- rewards


def test_rewards_of_all_rows_and_of_any_triple(tiny_folder, tmp_path):
    """len(text), and 100 as the answer is in each."""
    one = annotator(tiny_folder, tmp_path)
    rows, _ = data(one)
    found = one.row_rewards(rows)
    assert [values.tolist() for values in found] == [[len(r.text) + 100.0 for r in row.responses] for row in ROWS]
    prompt = ROWS[0].prompt
    assert one.score([(prompt, "it is 0", "0"), (prompt, "it", "0"), (prompt, "it is 0", None)]).tolist() == [107, 2, 7]


def test_cross_rewards_score_response_j_under_prompt_i_with_its_answer(tiny_folder, tmp_path):
    """r(x_i, y_j): with exact numbers a response is right under prompts that have its answer alone."""
    one = annotator(tiny_folder, tmp_path, Lengths())
    rows, sequences = data(one)
    micro = np.array([[1, 3], [0, -1]])
    found = one.cross_rewards(rows, sequences, micro)
    texts = [rows[row].responses[k].text for row, k in zip(sequences.row, sequences.table["response"], strict=True)]
    a, b = texts[1], texts[3]
    assert (sequences.row[1], sequences.row[3]) == (0, 2)
    assert found.tolist() == [[[len(a) + 100, len(b)], [len(a), len(b) + 100]], [[len(texts[0]) + 100, 0], [0, 0]]]
    assert set(one.reward.asked) == {
        ("what is ?", a, "0"), ("what is ?", b, "0"), ("what is ???", a, "2"), ("what is ???", b, "2"),
        ("what is ?", texts[0], "0"),
    }  # fmt: skip
    exact = annotator(tiny_folder, tmp_path, ExactNumber()).cross_rewards(rows, sequences, micro[:1])
    assert exact[0].tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_a_reward_that_is_not_finite_is_named(tiny_folder, tmp_path):
    one = annotator(tiny_folder, tmp_path, Lengths(nan_for="it is 2!"))
    rows, _ = data(one)
    with pytest.raises(UserError) as error:
        one.row_rewards(rows)
    assert str(error.value) == (
        "rewards that are not finite (1):\n  response 'it is 2!': the reward is NaN or infinite"
    )
    assert not list((tmp_path / "store").rglob("*.parquet"))


class Returns:
    """A reward of a user's own, which returns what it likes."""

    scores_text = True
    identity = {"program": "returns"}  # noqa: RUF012

    def __init__(self, returned: Any) -> None:
        self.returned = returned

    def __call__(self, prompts: Any, responses: Any, answers: Any) -> Any:
        return self.returned


@pytest.mark.parametrize(
    "returned",
    [
        [0, 1, 1], [False, True, True], [np.bool_(0), np.bool_(1), np.bool_(1)], [np.float32(0), 1, "1"],
        np.array([[0], [1], [1]]), torch.tensor([0.0, 1.0, 1.0]), torch.tensor([[0], [1], [1]]),
        [torch.tensor(0.0), torch.tensor(1.0), torch.tensor([1.0])[0]],
    ],
)  # fmt: skip
def test_a_reward_may_return_a_list_an_array_or_a_tensor(returned, tiny_folder, tmp_path):
    """Three numbers are stored as they are, whatever holds them."""
    one = annotator(tiny_folder, tmp_path, Returns(returned))
    found = one.score([(ROWS[0].prompt, text, None) for text in "abc"])
    assert (found.tolist(), found.dtype) == ([0.0, 1.0, 1.0], np.float64)


@pytest.mark.parametrize(
    ("returned", "told"),
    [
        ([1.0, 2.0], "the reward (Returns) returned 2 numbers for 3 responses; expected one each"),
        (np.ones((3, 2)), "the reward (Returns) returned 6 numbers for 3 responses; expected one each"),
        (None, "the reward (Returns) returned 1 numbers for 3 responses; expected one each"),
        (["a", "b", "c"], "the reward (Returns) must return a list of numbers: could not convert string to float: 'a'"),
        ([{}, {}, {}], "the reward (Returns) must return a list of numbers: float() argument must be a string or a "
                       "real number, not 'dict'"),
        (torch.ones(3, requires_grad=True), "the reward (Returns) must return a list of numbers: Can't call numpy() on "
                                            "Tensor that requires grad. Use tensor.detach().numpy() instead."),
        ([1.0, None, 2.0], "rewards that are not finite (1):\n  response 'b': the reward is NaN or infinite"),
    ],
)  # fmt: skip
def test_a_reward_that_returns_something_else_is_told(returned, told, tiny_folder, tmp_path):
    one = annotator(tiny_folder, tmp_path, Returns(returned))
    with pytest.raises(UserError) as error:
        one.score([(ROWS[0].prompt, text, None) for text in "abc"])
    assert str(error.value) == told


def test_answers_that_a_reward_cannot_use_are_named_all_at_once(tiny_folder, tmp_path):
    answers = ["1,000", None, "12 apples", "nan", "1e400", "-2.5"]
    rows, _ = data(
        annotator(tiny_folder, tmp_path), tuple(replace(row, answer=a) for row, a in zip(ROWS, answers, strict=True))
    )
    for reward in (ExactNumber(), NearNumber(), Ensemble(members={"a": Lengths(), "b": ExactNumber()})):
        with pytest.raises(UserError) as error:
            check_answers(reward, rows)
        assert str(error.value).splitlines()[:-1] == [
            "the reward compares with a row's `answer`, which is missing or unusable (4):",
            "  row row-1: no answer",
            "  row row-2: its answer '12 apples' is not a finite number",
            "  row row-3: its answer 'nan' is not a finite number",
            "  row row-4: its answer '1e400' is not a finite number",
        ]
    check_answers(Lengths(), rows)


def test_scores_of_the_data_are_read_and_missing_ones_named_all_at_once(tiny_folder, tmp_path):
    one = annotator(tiny_folder, tmp_path, Score())
    rows, _ = data(one)
    assert [values.tolist() for values in one.row_rewards(rows)] == [[r.score for r in row.responses] for row in ROWS]
    unscored = tuple(
        replace(row, responses=tuple(replace(r, score=None) for r in row.responses)) if i in (1, 4) else row
        for i, row in enumerate(ROWS)
    )
    with pytest.raises(UserError) as error:
        one.row_rewards(data(one, unscored)[0])
    assert str(error.value) == (
        "reward=score, but rows have no score (2):\n"
        "  row row-1: a response has no score\n"
        "  row row-4: a response has no score\n"
        "Choose a reward that scores text, such as reward=offsetbias-rm-8b."
    )


def test_a_mismatch_gap_lowers_a_score_under_another_prompt(tiny_folder, tmp_path):
    """Sequences 0 and 1 answer one prompt: scores 0, 0.5, no gap between them. 2 has score 1; a gap of 2 off."""
    one = annotator(tiny_folder, tmp_path, Score(mismatch_gap=2.0))
    rows, sequences = data(one)
    found = one.cross_rewards(rows, sequences, np.array([[0, 1, 2, -1]]))
    assert found[0].tolist() == [[0, 0.5, -1, 0], [0, 0.5, -1, 0], [-2, -1.5, 1, 0], [0, 0, 0, 0]]


def test_scores_without_a_gap_refuse_an_in_batch_estimator(tiny_folder, tmp_path):
    one = annotator(tiny_folder, tmp_path, Score())
    rows, sequences = data(one)
    with pytest.raises(UserError) as error:
        one.cross_rewards(rows, sequences, np.array([[0, 1]]))
    assert str(error.value) == (
        "an in-batch estimator needs the reward of every response under every prompt of its micro-batch, and "
        "reward=score has only the own pairs. Choose a reward that scores text, an estimator that needs own rewards "
        "(loss=var_prompt), or state what a mismatched response loses: reward.mismatch_gap=<reward units>"
    )


# --- refusing, and several ranks


def test_refuse_says_what_is_missing_and_the_command_that_writes_it(tiny_folder, tmp_path):
    some = annotator(tiny_folder, tmp_path)
    some.reference_logps(data(some, ROWS[:2])[1])
    one = annotator(tiny_folder, tmp_path, annotate="error", command="python annotate.py loss=dpo data=files")
    with pytest.raises(UserError) as error:
        one.reference_logps(data(one)[1])
    assert str(error.value) == (
        "the store lacks 5 of 8 reference logps and annotate=error. Write them once, every later run reads them: "
        "python annotate.py loss=dpo data=files"
    )
    assert one.computed == {}


def test_a_dry_run_counts_and_computes_nothing(tiny_folder, tmp_path):
    one = annotator(tiny_folder, tmp_path, dry=True)
    with pytest.raises(Unfilled, match=r"^Reference log-probabilities: 8 of 8 responses are missing in "):
        one.reference_logps(data(one)[1])
    assert one.missing == {"Reference log-probabilities": (8, 8)}
    assert one.computed == {}


def test_every_rank_comes_to_the_barriers_whatever_it_saw(tiny_folder, tmp_path):
    """Another job may write between one rank's look and the next one's: a rank that misses nothing waits all the same,
    once before the work and once after it."""
    calls: list[int] = []
    for _ in range(2):
        one = annotator(tiny_folder, tmp_path, ranks=Ranks(barrier=lambda: calls.append(0)))
        one.row_rewards(data(one)[0])
    assert len(calls) == 4


def test_long_prompts_count_in_a_pass(tiny_folder, tmp_path, monkeypatch):
    """A pass packs at most so many tokens, prompts among them: eight prompts of 20 tokens do not come at once because
    their responses are short."""
    from var.annotate import annotator as fill

    one = annotator(tiny_folder, tmp_path)
    _, sequences = data(one)
    micro = plan(sequences, 4)
    monkeypatch.setattr(fill, "TOKENS", 80)
    widths: list[int] = []
    forward = Policy.forward

    def noted(self: Policy, batch: Packed) -> torch.Tensor:
        widths.append(len(batch.input_ids))
        return forward(self, batch)

    monkeypatch.setattr(Policy, "forward", noted)
    found = one.cross_logps(sequences, micro)
    assert max(widths) <= 80 + max(sequences.start)  # a prompt that a pass goes on with comes once more
    monkeypatch.undo()
    assert_allclose(found, annotator(tiny_folder, tmp_path / "other").cross_logps(sequences, micro), atol=1e-4)
