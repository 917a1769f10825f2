"""Bits of a sequence do not depend on how its prompt is cut, who else is in the batch, or how it is replayed."""

from collections.abc import Iterable, Iterator
from itertools import pairwise

import pytest
import torch

from common.model.writer import write_random
from services.attention.batch import Span
from tests.oracle.configs import BY_NAME
from tests.oracle.local_model import LocalModel

PAGES_EACH = 4  # 256 tokens
EDGES = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 130)


@pytest.fixture(params=[1, 2], ids=lambda n: f"{n}-threads", autouse=True)
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["v3-default", "v3-odd", "v2-groups"], scope="module")
def local(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LocalModel:
    directory = tmp_path_factory.mktemp(request.param)
    config = BY_NAME[request.param]
    write_random(directory, config.config | {"num_hidden_layers": 2}, seed=3)
    return LocalModel(directory, num_pages=20 * PAGES_EACH)


def pages(sequence: int) -> range:
    return range(sequence * PAGES_EACH, (sequence + 1) * PAGES_EACH)


def sizes() -> Iterable[int]:
    """Each with the one thread that a service has; with more, those around what blocks divide by."""
    return range(1, 131) if torch.get_num_threads() == 1 else EDGES


def tokens(local: LocalModel, length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, local.config.vocab_size, (length,), generator=generator).tolist()


def run(local: LocalModel, spans: list[Span]) -> list[torch.Tensor]:
    """Residual rows of each span."""
    h, batch = local.forward(spans)
    assert batch.num_rows == sum(len(span.token_ids) for span in spans)
    return list(h[: batch.num_rows].split([len(span.token_ids) for span in spans]))


@pytest.mark.parametrize(
    "cuts", [[1], [3, 7], [16], [40, 41, 42], [64], [100, 129], [15, 33, 63, 65, 128]]
)
def test_prompt_cut_anywhere(local: LocalModel, cuts: list[int]) -> None:
    prompt = tokens(local, 131, seed=1)
    whole = run(local, [Span(prompt, 0, 131, pages(0))])[0]
    parts = [
        run(local, [Span(prompt[a:b], a, 131, pages(1))])[0]
        for a, b in pairwise([0, *cuts, len(prompt)])
    ]
    assert torch.equal(torch.cat(parts), whole)


def test_prompts_together_and_alone(local: LocalModel) -> None:
    lengths = [1, 5, 16, 17, 64, 70, 130]
    prompts = [tokens(local, length, seed=length) for length in lengths]
    spans = [Span(prompt, 0, len(prompt), pages(i)) for i, prompt in enumerate(prompts)]
    together = run(local, spans)
    for span, rows in zip(spans, together, strict=True):
        assert torch.equal(run(local, [span])[0], rows)


def test_generated_tokens_in_any_company(local: LocalModel) -> None:
    lengths = [1, 5, 63, 64, 65, 127, 128, 190]
    spans = []
    for i, length in enumerate(lengths):
        prompt = tokens(local, length, seed=length)
        run(local, [Span(prompt, 0, length, pages(i))])
        spans.append(Span([prompt[0]], length, length, pages(i)))
    alone = [run(local, [span])[0] for span in spans]
    for company in (
        [0, 1],
        [7, 0, 3],
        [2, 3, 4, 5],
        list(range(8)),
        list(range(7, -1, -1)),
        [6, 1, 5],
    ):
        for i, rows in zip(company, run(local, [spans[i] for i in company]), strict=True):
            assert torch.equal(rows, alone[i])
    prompt = Span(tokens(local, 90, seed=9), 0, 90, pages(9))  # a mixed step
    mixed = run(local, [spans[0], prompt, spans[7]])
    assert torch.equal(mixed[0], alone[0])
    assert torch.equal(mixed[1], run(local, [prompt])[0])
    assert torch.equal(mixed[2], alone[7])


@pytest.mark.parametrize("cuts", [[], [50], [60], [58, 61, 70], [90]])
def test_replay_of_prompt_and_generated_tokens(local: LocalModel, cuts: list[int]) -> None:
    """Step by step, then the whole sequence again in other pages, prompt and generated rows in one step."""
    num_prompt, total = 58, 100
    ids = tokens(local, total, seed=5)
    first = [run(local, [Span(ids[:num_prompt], 0, num_prompt, pages(0))])[0]]
    first += [
        run(local, [Span([ids[p]], p, num_prompt, pages(0))])[0] for p in range(num_prompt, total)
    ]
    again = [
        run(local, [Span(ids[a:b], a, num_prompt, pages(3))])[0]
        for a, b in pairwise([0, *cuts, total])
    ]
    assert torch.equal(torch.cat(again), torch.cat(first))


def test_attention_of_1_to_130_generated_rows(local: LocalModel) -> None:
    """One layer, one row per sequence, contexts of 1 to 190 tokens that share their first pages."""
    model, generator = local.model, torch.Generator().manual_seed(8)
    with torch.inference_mode():
        h = torch.randn(132, local.config.hidden_size, generator=generator)
        places = [(7 * i) % 190 for i in range(130)]
        local.forward([Span(tokens(local, 190, seed=7), 0, 190, pages(0))])

        def attend(first: int, count: int) -> torch.Tensor:
            spans = [Span([0], place, 0, range(3)) for place in places[first : first + count]]
            # every row writes to its own position of shared pages: the same row every time
            batch = model.batch(spans, local.cache)
            rows = torch.zeros(batch.token_ids.shape[0], h.shape[1])
            rows[:count] = h[first : first + count]
            return model.attend(0, rows, batch, local.cache)[1][:count]

        attend(0, 130)
        whole = attend(0, 130)
        for count in sizes():
            first = min(count * 7 % 29, 130 - count)
            assert torch.equal(attend(first, count), whole[first : first + count]), count


def test_prompts_of_1_to_130_tokens(local: LocalModel) -> None:
    prompt = tokens(local, 130, seed=11)
    whole = run(local, [Span(prompt, 0, 130, pages(0))])[0]
    for length in sizes():
        assert torch.equal(
            run(local, [Span(prompt[:length], 0, length, pages(1))])[0], whole[:length]
        )


def test_many_generated_rows_are_computed_in_groups(
    local: LocalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = tokens(local, 150, seed=12)
    whole = run(local, [Span(ids, 0, 3, pages(0))])[0]
    monkeypatch.setattr("services.attention.batch.MAX_ITEMS", 5)
    span = Span(ids, 0, 3, pages(1))
    assert len(local.model.batch([span], local.cache).decode) > 20
    assert torch.equal(run(local, [span])[0], whole)


def test_logits_do_not_depend_on_the_rows_asked_for(local: LocalModel) -> None:
    prompt = tokens(local, 130, seed=2)
    h, _ = local.forward([Span(prompt, 0, 130, pages(0))])
    with torch.inference_mode():
        whole = local.model.logits(h, torch.arange(130))
        for count in sizes():
            assert torch.equal(local.model.logits(h, torch.arange(count)), whole[:count])


def test_what_a_former_holder_left_in_a_page_does_not_matter(local: LocalModel) -> None:
    prompt = tokens(local, 20, seed=4)
    span = Span(prompt, 0, 20, pages(5))
    clean = run(local, [span])[0]
    run(local, [Span(tokens(local, 250, seed=6), 0, 250, pages(5))])
    assert torch.equal(run(local, [span])[0], clean)
    local.cache.clear(pages(5))
    assert torch.equal(run(local, [span])[0], clean)
