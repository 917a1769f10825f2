"""Chat, and both endpoints through the `openai` client."""

import openai
import pytest

from services.gateway.chat import ChatTemplate
from tests.gateway_fakes import (
    CHAT_TEMPLATE,
    byte_tokenizer,
    gateway,
    make_config,
    run,
    write_model,
)

MESSAGES = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": [{"type": "text", "text": "1+"}, {"type": "text", "text": "1?"}]},
]
PROMPT = "system: be brief\nuser: 1+1?\nassistant:"


@pytest.fixture
def config(tmp_path):
    return make_config(write_model(tmp_path / "model"))


def client_of(service):
    base = f"http://127.0.0.1:{service.port}/v1"
    return openai.AsyncOpenAI(api_key="none", base_url=base, max_retries=0)


def expected(num_tokens):
    tokenizer = byte_tokenizer()
    last = tokenizer.encode(PROMPT).ids[-1]
    return tokenizer.decode([last + 1 + i for i in range(num_tokens)])


def test_chat_with_the_openai_client(config):
    async def main():
        async with gateway(config) as (_, cluster, service), client_of(service) as client:
            answer = await client.chat.completions.create(
                model="tiny", messages=MESSAGES, max_completion_tokens=8
            )
            assert answer.choices[0].message.content == expected(8)
            assert answer.choices[0].message.role == "assistant"
            assert answer.choices[0].finish_reason == "length"
            (request,) = cluster["attention-0"].seen
            assert request.prompt_token_ids == tuple(byte_tokenizer().encode(PROMPT).ids)
            assert answer.usage.prompt_tokens == len(request.prompt_token_ids)
            assert answer.usage.completion_tokens == 8

    run(main())


def test_chat_defaults_to_the_rest_of_the_context(config):
    async def main():
        async with gateway(config) as (_, _, service), client_of(service) as client:
            answer = await client.chat.completions.create(model="tiny", messages=MESSAGES)
            assert answer.usage.total_tokens == 512

    run(main())


def test_streamed_chat_with_usage_and_logprobs(config):
    async def main():
        async with gateway(config) as (_, _, service), client_of(service) as client:
            stream = await client.chat.completions.create(
                model="tiny",
                messages=MESSAGES,
                max_tokens=8,
                n=2,
                stream=True,
                logprobs=True,
                top_logprobs=2,
                stream_options={"include_usage": True},
                extra_body={"return_token_ids": True},
            )
            chunks = [chunk async for chunk in stream]
            assert chunks[-1].usage.completion_tokens == 16
            roles = [c.choices[0].delta.role for c in chunks[:-1]]
            assert roles.count("assistant") == 2
            for index in (0, 1):
                mine = [c.choices[0] for c in chunks[:-1] if c.choices[0].index == index]
                assert "".join(c.delta.content or "" for c in mine) == expected(8)
                assert mine[-1].finish_reason == "length"
                assert sum(len(c.model_extra.get("token_ids", ())) for c in mine) == 8
                entries = [e for c in mine if c.logprobs for e in c.logprobs.content]
                assert [e.logprob for e in entries] == [-0.5] * 8
                assert "".join(e.token for e in entries) == expected(8)
                assert bytes(b for e in entries for b in e.bytes).decode() == expected(8)
                assert [t.logprob for t in entries[1].top_logprobs] == [-0.5, -2.0]

    run(main())


def test_completions_and_errors_with_the_openai_client(config):
    async def main():
        async with gateway(config) as (_, cluster, service), client_of(service) as client:
            answer = await client.completions.create(
                model="tiny", prompt=["ab", "cd"], max_tokens=2
            )
            assert [c.text for c in answer.choices] == ["cd", "ef"]
            assert [model.id async for model in client.models.list()] == ["tiny"]
            with pytest.raises(openai.NotFoundError, match="the model 'no' does not exist"):
                await client.completions.create(model="no", prompt="a")
            with pytest.raises(openai.BadRequestError, match="max_tokens must be at least 1"):
                await client.completions.create(model="tiny", prompt="a", max_tokens=-1)
            cluster["attention-0"].step_s = 0.005
            stream = await client.completions.create(
                model="tiny", prompt="a", max_tokens=400, stream=True
            )
            await anext(stream)
            cluster["attention-0"].kill()
            with pytest.raises(openai.APIError, match="attention-0 was lost"):
                async for _ in stream:
                    pass

    run(main())


@pytest.mark.parametrize(
    ("source", "prompt"),
    [
        ("{{ bos_token }}{{ messages[0]['content'] }}", "<bos>hi"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}!", "hi!"),
        ("{% for m in messages %}{% if m.role == 'x' %}{% break %}{% endif %}{% endfor %}ok", "ok"),
        ("{{ messages | tojson }}", '[{"role": "user", "content": "hi"}]'),
        ("{{ strftime_now('%%') }}", "%"),
        ("  {% if true %}\n  a\n  {% endif %}\nb", "  a\nb"),
    ],
)
def test_templates_render_as_their_authors_expect(tmp_path, source, prompt):
    template = ChatTemplate(source, {"bos_token": "<bos>"}, where="test")
    assert template.render([{"role": "user", "content": "hi"}]) == prompt


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refused the messages: roles must"),
        ("{{ messages[0]['content'] + 3 }}", "failed on these messages"),
        ("{{ messages.append(1) }}", "refused the messages"),
        ("{{ ''.__class__.__mro__ }}", "refused the messages"),
    ],
)
def test_a_template_that_refuses_is_a_bad_request(tmp_path, source, sentence):
    async def main():
        model = write_model(tmp_path / "model", template=False)
        (model / "chat_template.jinja").write_text(source)
        async with gateway(make_config(model)) as (client, _, _):
            body = {"messages": [{"role": "user", "content": "hi"}]}
            async with client.post("/v1/chat/completions", json=body) as response:
                assert response.status == 400
                assert sentence in (await response.json())["error"]["message"]

    run(main())


def test_transformers_renders_the_same(tmp_path):
    from transformers.utils.chat_template_utils import render_jinja_template

    ours = ChatTemplate(CHAT_TEMPLATE, {}, where="test").render(
        [{"role": "user", "content": "1+1?"}]
    )
    theirs, _ = render_jinja_template(
        [[{"role": "user", "content": "1+1?"}]],
        chat_template=CHAT_TEMPLATE,
        add_generation_prompt=True,
    )
    assert [ours] == theirs
