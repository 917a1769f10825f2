"""A checked body to a `Job`: the requests for attention workers, and what the answer is to contain.

Continuation i belongs to prompt i // n and choice i; its index in the answer is i.
"""

import secrets
from dataclasses import dataclass, replace

from common.errors import Rejected
from common.request import Request, SamplingParams
from services.gateway.errors import invalid
from services.gateway.model import ServedModel
from services.gateway.schema import ChatRequest, CompletionRequest

_COMPLETION_MAX_TOKENS = (
    16  # OpenAI's default for completions; chat defaults to the rest of the context
)
_MAX_CONTINUATIONS = 4096


@dataclass(frozen=True, slots=True)
class Job:
    """What one HTTP call asks for."""

    id: str
    requests: tuple[Request, ...]
    num_choices: int  # per prompt
    stops: tuple[str, ...]
    stream: bool
    include_usage: bool
    return_token_ids: bool
    logprobs: bool
    echo: tuple[str, ...] = ()  # text of each prompt, if it is to be in the answer
    discard_tokens: bool = False  # echo with max_tokens 0: only the prompt is wanted

    @property
    def prompt_tokens(self) -> int:
        """For `usage`: every prompt once, however many choices it has."""
        return sum(len(r.prompt_token_ids) for r in self.requests[:: self.num_choices])


async def completion_job(body: CompletionRequest, model: ServedModel) -> Job:
    """Tokenize and check a completion. Raises ApiError 400."""
    prompts = [
        await model.encode(prompt, add_special_tokens=True, param="prompt")
        if isinstance(prompt, str)
        else tuple(prompt)
        for prompt in body.prompts
    ]
    discard = body.echo and body.max_tokens == 0
    requests = _requests(
        body,
        model,
        prompts,
        1 if discard else body.max_tokens,
        default=_COMPLETION_MAX_TOKENS,
        logprobs=body.logprobs,
        echo_logprobs=body.echo and body.logprobs is not None,
        param="prompt",
    )
    job = _job("cmpl", body, requests)
    if not body.echo:
        return job
    asked = zip(body.prompts, prompts, strict=True)
    echo = (text if isinstance(text, str) else model.decode(ids) for text, ids in asked)
    return replace(job, echo=tuple(echo), discard_tokens=discard)


async def chat_job(body: ChatRequest, model: ServedModel) -> Job:
    """Render, tokenize and check a chat. Raises ApiError 400."""
    if model.template is None:
        raise invalid(
            f"the model {model.name!r} has no chat template: use /v1/completions", param="messages"
        )
    text = model.template.render([message.for_template() for message in body.messages])
    # The template writes the special tokens itself.
    prompt = await model.encode(text, add_special_tokens=False, param="messages")
    max_tokens = body.max_completion_tokens
    requests = _requests(
        body,
        model,
        [prompt],
        body.max_tokens if max_tokens is None else max_tokens,
        default=model.context,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        echo_logprobs=False,
        param="messages",
    )
    return _job("chatcmpl", body, requests)


def _job(kind: str, body: CompletionRequest | ChatRequest, requests: tuple[Request, ...]) -> Job:
    return Job(
        id=f"{kind}-{secrets.token_hex(12)}",
        requests=requests,
        num_choices=body.n or 1,
        stops=body.stops,
        stream=body.stream,
        include_usage=body.include_usage,
        return_token_ids=body.return_token_ids,
        logprobs=requests[0].sampling.logprobs is not None,
    )


def _requests(
    body: CompletionRequest | ChatRequest, model: ServedModel, prompts: list[tuple[int, ...]],
    max_tokens: int | None, *, default: int, logprobs: int | None, echo_logprobs: bool,
    param: str,
) -> tuple[Request, ...]:  # fmt: skip
    num_choices = body.n or 1
    if len(prompts) * num_choices > _MAX_CONTINUATIONS:
        raise invalid(f"at most {_MAX_CONTINUATIONS} continuations are allowed in one request")
    seed = secrets.randbits(63) if body.seed is None else body.seed
    requests = []
    for prompt in prompts:
        room = _room(prompt, max_tokens, model, param)
        for choice in range(num_choices):
            sampling = _sampling(
                body,
                max_tokens=min(default, room) if max_tokens is None else max_tokens,
                # Choices must differ; the mask keeps any integer a client sends within 63 bits.
                seed=(seed + choice) & (2**63 - 1),
                logprobs=logprobs,
            )
            requests.append(
                Request(f"r{secrets.token_hex(8)}", prompt, sampling, echo_logprobs=echo_logprobs)
            )
    return tuple(requests)


def _room(prompt: tuple[int, ...], max_tokens: int | None, model: ServedModel, param: str) -> int:
    """New tokens that fit behind a prompt, at least one. Raises ApiError 400."""
    if not prompt:
        raise invalid("the prompt must not be empty", param=param)
    wrong = next((t for t in prompt if not 0 <= t < model.vocab_size), None)
    if wrong is not None:
        raise invalid(
            f"token id {wrong} is out of range: the vocabulary has {model.vocab_size} entries",
            param=param,
        )
    if len(prompt) >= model.context:
        raise invalid(
            f"the prompt has {len(prompt)} tokens and the model's context is {model.context} tokens",
            param=param,
            code="context_length_exceeded",
        )
    room = model.context - len(prompt)
    if max_tokens is not None and max_tokens > room:
        raise invalid(
            f"{len(prompt)} prompt tokens and max_tokens {max_tokens} exceed the model's context"
            f" of {model.context} tokens",
            param="max_tokens",
            code="context_length_exceeded",
        )
    return room


def _sampling(
    body: CompletionRequest | ChatRequest, *, max_tokens: int, seed: int, logprobs: int | None
) -> SamplingParams:
    try:
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            top_k=body.top_k or 0,
            seed=seed,
            ignore_eos=body.ignore_eos,
            logprobs=logprobs,
        )
    except Rejected as exc:  # its sentence begins with the field
        raise invalid(str(exc), param=str(exc).split()[0]) from exc
