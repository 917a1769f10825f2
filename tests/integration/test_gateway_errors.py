"""Every bad input gets one clear sentence in OpenAI's format, and other requests go on."""

import json
import re
import socket

import pytest

from common import config as cluster_config
from common.errors import ConfigError, ModelError
from services.gateway.service import GatewayService
from tests.gateway_fakes import CONTEXT, FakeCluster, gateway, make_config, run, write_model

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hi"}]

BAD = [
    # path, body, status, param, sentence (regular expression)
    (COMPLETIONS, b"{not json", 400, None, r"the body is not valid JSON: "),
    (COMPLETIONS, b"", 400, None, r"the body is not valid JSON: "),
    (COMPLETIONS, b"\xff\xfe", 400, None, r"the body is not valid JSON: "),
    (COMPLETIONS, b'{"prompt": "\\ud800"}', 400, None, r"the body is not valid JSON: "),
    (COMPLETIONS, b'"text"', 400, None, r"the body must be a JSON object$"),
    (COMPLETIONS, {}, 400, "prompt", r"prompt: field required$"),
    (COMPLETIONS, {"prompt": 5}, 400, "prompt", r"prompt: must be a string, a list of strings, "),
    (COMPLETIONS, {"prompt": []}, 400, "prompt", r"prompt: must be .* and not empty$"),
    (COMPLETIONS, {"prompt": ["a", 1]}, 400, "prompt", r"prompt: must be a string"),
    (COMPLETIONS, {"prompt": [1, "a"]}, 400, "prompt", r"prompt: must be a string"),
    (COMPLETIONS, {"prompt": [True]}, 400, "prompt", r"prompt: must be a string"),
    (COMPLETIONS, {"prompt": [1.5]}, 400, "prompt", r"prompt: must be a string"),
    (COMPLETIONS, {"prompt": [[1], 2]}, 400, "prompt", r"prompt: must be a string"),
    (COMPLETIONS, {"prompt": [[1], ["a"]]}, 400, "prompt", r"prompt\..*: input should be"),
    (COMPLETIONS, {"prompt": [[]]}, 400, "prompt", r"the prompt must not be empty$"),
    (COMPLETIONS, {"prompt": ""}, 400, "prompt", r"the prompt must not be empty$"),
    (COMPLETIONS, {"prompt": [-1]}, 400, "prompt", r"token id -1 is out of range: .* 300 entries$"),
    (COMPLETIONS, {"prompt": [300]}, 400, "prompt", r"token id 300 is out of range"),
    (COMPLETIONS, {"prompt": [10**30]}, 400, None, r"."),
    (
        COMPLETIONS,
        {"prompt": [1] * 600},
        400,
        "prompt",
        r"the prompt has 600 tokens and the model's context is 512 tokens$",
    ),
    (
        COMPLETIONS,
        {"prompt": [1] * 500, "max_tokens": 13},
        400,
        "max_tokens",
        r"500 prompt tokens and max_tokens 13 exceed the model's context of 512 tokens$",
    ),
    (
        COMPLETIONS,
        {"prompt": [1], "max_tokens": -5},
        400,
        "max_tokens",
        r"max_tokens must be at least 1, not -5$",
    ),
    (COMPLETIONS, {"prompt": [1], "max_tokens": 0}, 400, "max_tokens", r"at least 1, not 0$"),
    (COMPLETIONS, {"prompt": [1], "max_tokens": "5"}, 400, "max_tokens", r"valid integer$"),
    (COMPLETIONS, {"prompt": [1], "max_tokens": True}, 400, "max_tokens", r"valid integer$"),
    (COMPLETIONS, {"prompt": [1], "temperature": 3}, 400, "temperature", r"between 0 and 2"),
    (COMPLETIONS, {"prompt": [1], "temperature": "hot"}, 400, "temperature", r"valid number$"),
    (COMPLETIONS, {"prompt": [1], "top_p": 0}, 400, "top_p", r"top_p must be above 0"),
    (COMPLETIONS, {"prompt": [1], "top_k": -1}, 400, "top_k", r"top_k must be at least 0"),
    (COMPLETIONS, {"prompt": [1], "n": 0}, 400, "n", r"n: input should be greater than or equal"),
    (COMPLETIONS, {"prompt": [1], "n": 1000}, 400, "n", r"n: input should be less than or equal"),
    (COMPLETIONS, {"prompt": [1], "best_of": 3}, 400, "best_of", r"best_of is not supported"),
    (COMPLETIONS, {"prompt": [1], "suffix": "x"}, 400, "suffix", r"suffix is not supported$"),
    (COMPLETIONS, {"prompt": [1], "logprobs": 21}, 400, "logprobs", r"between 0 and 20"),
    (COMPLETIONS, {"prompt": [1], "stop": list("abcde")}, 400, "stop", r"at most 4 stop strings"),
    (COMPLETIONS, {"prompt": [1], "stop": [""]}, 400, "stop", r"must not be empty$"),
    (COMPLETIONS, {"prompt": [1], "stop": 7}, 400, "stop", r"stop"),
    (
        COMPLETIONS,
        {"prompt": [1], "presence_penalty": 1},
        400,
        "presence_penalty",
        r"not supported",
    ),
    (COMPLETIONS, {"prompt": [1], "logit_bias": {"3": 1}}, 400, "logit_bias", r"not supported"),
    (COMPLETIONS, {"prompt": [1], "stream": "yes"}, 400, "stream", r"valid boolean$"),
    (
        COMPLETIONS,
        {"prompt": [1], "stream_options": {"include_usage": True}},
        400,
        "stream_options",
        r"only allowed when stream is true$",
    ),
    (
        COMPLETIONS,
        {"prompt": [1], "model": "gpt-9"},
        404,
        "model",
        r"model 'gpt-9' does not exist$",
    ),
    (CHAT, {"messages": []}, 400, "messages", r"at least 1 item"),
    (CHAT, {"messages": "hi"}, 400, "messages", r"valid list$"),
    (CHAT, {"messages": [{"content": "x"}]}, 400, "messages", r"messages.0.role: field required$"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        400,
        "messages",
        r"parts of type 'image_url' are not supported",
    ),
    (CHAT, {"messages": HELLO, "tools": [{"type": "function"}]}, 400, "tools", r"not supported"),
    (
        CHAT,
        {"messages": HELLO, "response_format": {"type": "json_object"}},
        400,
        "response_format",
        r"not supported",
    ),
    (CHAT, {"messages": HELLO, "top_logprobs": 2}, 400, "top_logprobs", r"only allowed when"),
    (CHAT, {"messages": HELLO, "max_completion_tokens": -1}, 400, "max_tokens", r"at least 1"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": "x" * 600}]},
        400,
        "messages",
        rf"the prompt has \d+ tokens and the model's context is {CONTEXT} tokens$",
    ),
    ("/v1/embeddings", {}, 404, None, r"there is no /v1/embeddings$"),
]


def check_error(body, status, param, sentence):
    assert set(body) == {"error"}
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert re.search(sentence, error["message"]), error["message"]
    if param is not None:
        assert error["param"] == param
    assert error["type"] in ("invalid_request_error", "rate_limit_error")
    assert "\n" not in error["message"]


def test_bad_bodies(tmp_path):
    async def main():
        async with gateway(make_config(write_model(tmp_path / "model"))) as (client, cluster, _):
            for path, body, status, param, sentence in BAD:
                raw = body if isinstance(body, bytes) else json.dumps(body).encode()
                async with client.post(path, data=raw) as response:
                    answer = await response.json()
                    assert response.status == status, (body, answer)
                check_error(answer, status, param, sentence)
            assert not cluster["attention-0"].seen
            async with client.post(COMPLETIONS, json={"prompt": [1], "colour": 3}) as response:
                assert response.status == 200  # unknown fields are ignored

    run(main())


def test_wrong_method_and_undecodable_body(tmp_path):
    async def main():
        async with gateway(make_config(write_model(tmp_path / "model"))) as (client, _, _):
            async with client.get(COMPLETIONS) as response:
                assert response.status == 405
                check_error(await response.json(), 405, None, "takes POST, not GET")
            headers = {"Content-Encoding": "gzip"}
            async with client.post(COMPLETIONS, data=b"plain", headers=headers) as response:
                assert response.status == 400, await response.text()

    run(main())


def test_no_tokenizer_and_no_template(tmp_path):
    async def main():
        config = make_config(write_model(tmp_path / "model", tokenizer=False))
        async with gateway(config) as (client, _, _):
            for path, body, sentence in (
                (COMPLETIONS, {"prompt": "text"}, "'tiny' has no tokenizer: send the prompt as"),
                (CHAT, {"messages": HELLO}, "the model 'tiny' has no chat template"),
            ):
                async with client.post(path, json=body) as response:
                    assert response.status == 400
                    assert sentence in (await response.json())["error"]["message"]

    run(main())


def test_api_keys(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("# ours\nsecret-1\n\nsecret-2\n")

    async def main():
        config = make_config(write_model(tmp_path / "model"), gateway={"api_key_file": str(keys)})
        async with gateway(config) as (client, _, _):
            for header, status, code in (
                ({}, 401, "missing_api_key"),
                ({"Authorization": "Bearer secret-3"}, 401, "invalid_api_key"),
                ({"Authorization": "secret-1"}, 401, "invalid_api_key"),
                ({"Authorization": "Bearer # ours"}, 401, "invalid_api_key"),
                ({"Authorization": "Bearer secret-1"}, 200, None),
                ({"Authorization": "Bearer secret-2"}, 200, None),
            ):
                async with client.get("/v1/models", headers=header) as response:
                    assert response.status == status
                    if code:
                        assert (await response.json())["error"]["code"] == code
            for path, status in (("/health", 200), ("/ready", 200), ("/metrics", 401)):
                async with client.get(path) as response:
                    assert response.status == status

    run(main())


@pytest.mark.parametrize(
    ("spoil", "error", "sentence"),
    [
        (lambda m: (m / "config.json").unlink(), ModelError, "config.json: No such file"),
        (lambda m: (m / "config.json").write_text("{"), ModelError, "not valid JSON"),
        (lambda m: (m / "config.json").write_text("[]"), ModelError, "must hold a JSON object"),
        (
            lambda m: (m / "config.json").write_text("{}"),
            ModelError,
            "max_position_embeddings must",
        ),
        (lambda m: (m / "tokenizer.json").write_text("{}"), ModelError, "is no tokenizer"),
        (
            lambda m: (m / "chat_template.jinja").write_text("{% if %}"),
            ModelError,
            "template does not compile",
        ),
    ],
)
def test_a_checkpoint_that_cannot_be_served(tmp_path, spoil, error, sentence):
    model = write_model(tmp_path / "model")
    spoil(model)
    config = make_config(model)
    with pytest.raises(error, match=sentence):
        GatewayService(config, 0, FakeCluster(config))


@pytest.mark.parametrize(("text", "sentence"), [("", "no API key in it"), (None, "No such file")])
def test_a_key_file_without_keys(tmp_path, text, sentence):
    keys = tmp_path / "keys"
    if text is not None:
        keys.write_text(text)
    config = make_config(write_model(tmp_path / "model"), gateway={"api_key_file": str(keys)})
    with pytest.raises(ConfigError, match=sentence):
        GatewayService(config, 0, FakeCluster(config))


def test_a_port_in_use(tmp_path):
    async def main():
        with socket.create_server(("127.0.0.1", 0)) as other:
            port = other.getsockname()[1]
            config = make_config(write_model(tmp_path / "model"), gateway={"port": port})
            with pytest.raises(ExceptionGroup) as caught:
                async with gateway(config):
                    pass
        (error,) = caught.value.exceptions
        assert isinstance(error, ConfigError)
        assert str(error) == f"cannot listen on 127.0.0.1 port {port}: Address already in use"

    run(main())


def test_limits_of_the_toml_lower_the_context(tmp_path):
    model = write_model(tmp_path / "model")
    for section, context in (({"max_context": 100}, 100), ({"cache_tokens": 200}, 192)):
        document = {
            "model": {"path": str(model)},
            "nodes": [{"experts": 1}],
            "attention": section,
        }
        config = cluster_config.parse(document, source="test")
        service = GatewayService(config, 0, FakeCluster(config))
        assert service._model.context == context
