"""Requests between steps: who gets which event, what happens to one that ends while a lane holds it."""

import pytest
import torch

from common.errors import Rejected
from common.request import FinishReason, Request, SamplingParams
from services.attention.pages import PageAllocator
from services.attention.requests import Requests
from services.attention.scheduler import Scheduler

VOCAB, EOS = 11, 10


class Gateway:
    """Stands for a link: only its identity matters here."""


def requests():
    policy = Scheduler(
        PageAllocator(8, 16), num_lanes=1, max_batch_tokens=16, max_requests=4, max_waiting=4, max_context=32
    )  # fmt: skip
    return Requests(policy, (EOS,), VOCAB)


def submit(book, link, name="a", prompt=(1, 2, 3), deadline_s=5.0, echo=False, **sampling):
    params = SamplingParams(**{"max_tokens": 3, "temperature": 0.0} | sampling)
    book.submit(link, Request(name, prompt, params, deadline_s, echo), now_ns=0)
    book.scheduler.admit()


def logits(*tokens):
    rows = torch.zeros(len(tokens), VOCAB)
    rows[range(len(tokens)), list(tokens)] = 5.0
    return rows


def step(book, *tokens, all_rows=False):
    slices = book.scheduler.schedule(0)
    book.begin(slices)
    return book.advance(slices, logits(*tokens), list(tokens), all_rows=all_rows)


def test_tokens_come_one_per_step_until_the_length():
    book, link = requests(), Gateway()
    submit(book, link)
    events = [event for token in (4, 5, 6) for event in step(book, token)]
    assert [event.token_ids for _, event in events] == [(4,), (5,), (6,)]
    assert [event.finish_reason for _, event in events] == [None, None, FinishReason.LENGTH]
    assert book.num_open == 0
    assert book.scheduler.pages.num_free == 8


@pytest.mark.parametrize(
    ("sampling", "reason"),
    [
        ({}, "stop"),
        ({"ignore_eos": True}, None),
        ({"ignore_eos": True, "stop_token_ids": (EOS,)}, "stop"),
    ],
)
def test_the_end_of_sequence_token_stops_unless_ignored(sampling, reason):
    book, link = requests(), Gateway()
    submit(book, link, **sampling)
    ((_, event),) = step(book, EOS)
    assert event.finish_reason == reason


def test_a_request_cancelled_inside_a_step_goes_when_the_step_is_over():
    book, link = requests(), Gateway()
    submit(book, link)
    slices = book.scheduler.schedule(0)
    book.begin(slices)
    book.cancel(link, "a")
    assert book.num_open == 0
    assert book.scheduler.num_running == 1  # its pages are being written
    assert book.advance(slices, logits(4), [4], all_rows=False) == []
    assert book.scheduler.num_running == 0
    assert book.scheduler.pages.num_free == 8


def test_a_failed_step_ends_its_requests_with_the_sentence():
    book, link = requests(), Gateway()
    submit(book, link)
    submit(book, link, name="b")
    slices = book.scheduler.schedule(0)
    book.begin(slices)
    book.cancel(link, "b")
    ((owner, event),) = book.failed(slices, "no answer from router-0")
    assert (owner, event.id, event.error) == (link, "a", "no answer from router-0")
    assert event.finish_reason is FinishReason.ERROR
    assert book.scheduler.num_running == 0


def test_a_lost_gateway_takes_its_own_requests_only():
    book, one, other = requests(), Gateway(), Gateway()
    submit(book, one)
    submit(book, other)
    book.gateway_lost(one)
    assert [owner for owner, _ in step(book, 4)] == [other]


def test_a_deadline_ends_a_request_with_a_sentence():
    book, link = requests(), Gateway()
    submit(book, link, deadline_s=2.0)
    assert book.expire(1_999_999_999) == []
    ((_, event),) = book.expire(2_000_000_000)
    assert event.error == "not finished within 2 s"
    assert book.num_open == 0


def test_prompt_logprobs_come_with_the_first_token():
    book, link = requests(), Gateway()
    submit(book, link, prompt=(1, 2, 3), echo=True, logprobs=1)
    ((_, event),) = step(book, 2, 3, 7, all_rows=True)
    assert event.token_ids == (7,)
    first, second, third = event.prompt_logprobs
    assert first is None
    best = float(torch.log_softmax(logits(0)[0], 0)[0])
    assert second == {"logprob": pytest.approx(best), "top": [[2, pytest.approx(best)]]}
    assert third["top"][0][0] == 3


@pytest.mark.parametrize(
    ("prompt", "sentence"), [((), "the prompt is empty"), ((1, 11), "outside the vocabulary of 11")]
)
def test_bad_prompts_are_refused(prompt, sentence):
    with pytest.raises(Rejected, match=sentence):
        submit(requests(), Gateway(), prompt=prompt)


def test_an_id_can_be_open_once_per_gateway():
    book, link = requests(), Gateway()
    submit(book, link)
    with pytest.raises(Rejected, match="request a is open already"):
        submit(book, link)
