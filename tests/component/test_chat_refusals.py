"""What a client can do wrong with a chat: an error object that names the field and the remedy."""

from pathlib import Path
from typing import Any

from tests.component.chat_support import MESSAGES, chat_stack
from tests.component.gateway_support import stack as gateway_stack
from tests.component.test_gateway_refusals import FORM, checked_error
from tests.support.nats_server import NatsServer

USER = {"role": "user", "content": "x"}

# What is sent, then the code, the field and a part of the message.
CHAT: list[tuple[dict[str, Any], str, str | None, str]] = [
    ({}, "missing_field", "messages", "required"),
    ({"messages": []}, "invalid_value", "messages", "at least one"),
    ({"messages": "hello"}, "invalid_type", "messages", "must be a list"),
    ({"messages": ["hello"]}, "invalid_type", "messages[0]", "an object"),
    ({"messages": [{"content": "x"}]}, "invalid_value", "messages[0].role", "one of system"),
    ({"messages": [USER, {"role": "robot", "content": "x"}]}, "invalid_value", "messages[1].role", "'robot'"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "unsupported_field", "messages[0].role", "no tools"),
    ({"messages": [{"role": "user"}]}, "invalid_type", "messages[0].content", "must be a text"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "not_unicode", "messages[0].content", "surrogate"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "unsupported_content",
        "messages[0].content[0]",
        "text alone",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
        "invalid_type",
        "messages[0].content[0].text",
        "must be a text",
    ),
    ({"messages": [USER | {"tool_calls": [{}]}]}, "unsupported_field", "messages[0].tool_calls", "'content'"),
    ({"messages": [USER, {"role": "assistant", "content": "x"}]}, "template_refused", "messages", "assistant"),
    ({"messages": [{"role": "user", "content": "x" * 600}]}, "context_length_exceeded", "messages", "512 tokens"),
    ({"tools": [{"type": "function"}]}, "unsupported_field", "tools", "no tools"),
    ({"tool_choice": "required"}, "unsupported_field", "tool_choice", "no tools"),
    ({"functions": [{}]}, "unsupported_field", "functions", "no tools"),
    ({"response_format": {"type": "json_object"}}, "unsupported_field", "response_format", "Leave it out"),
    ({"logit_bias": {"1": 5}}, "unsupported_field", "logit_bias", "Leave it out"),
    ({"modalities": ["audio"]}, "unsupported_field", "modalities", "text alone"),
    ({"mesages": []}, "unknown_field", "mesages", "'messages'"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "invalid_value", "stop", "at most 4"),
    ({"stop": [""]}, "invalid_value", "stop", "empty"),
    ({"stop": [5]}, "invalid_type", "stop", "must be a text"),
    ({"stop": 5}, "invalid_type", "stop", "a string or a list"),
    ({"stop_token_ids": ["x"]}, "invalid_type", "stop_token_ids", "token ids"),
    ({"temperature": 2.5}, "invalid_value", "temperature", "less than or equal to 2"),
    ({"temperature": "hot"}, "invalid_type", "temperature", "must be a number"),
    ({"top_p": 0}, "invalid_value", "top_p", "greater than 0"),
    ({"min_p": 2}, "invalid_value", "min_p", "less than or equal to 1"),
    ({"top_k": -2}, "invalid_value", "top_k", "greater than or equal to -1"),
    ({"presence_penalty": 3}, "invalid_value", "presence_penalty", "less than or equal to 2"),
    ({"repetition_penalty": 0}, "invalid_value", "repetition_penalty", "greater than 0"),
    ({"seed": 2**63}, "invalid_value", "seed", "less than or equal to"),
    ({"n": 0}, "invalid_value", "n", "greater than or equal to 1"),
    ({"n": 65}, "invalid_value", "n", "less than or equal to 64"),
    ({"max_tokens": 0}, "invalid_value", "max_tokens", "greater than or equal to 1"),
    ({"max_tokens": 1000}, "context_length_exceeded", "max_tokens", "lower 'max_tokens'"),
    ({"max_completion_tokens": 1000}, "context_length_exceeded", "max_completion_tokens", "512 tokens"),
    ({"max_completion_tokens": 5, "max_tokens": 6}, "invalid_value", "max_completion_tokens", "contradict"),
    ({"top_logprobs": 3}, "invalid_value", "top_logprobs", "'logprobs'"),
    ({"logprobs": True, "top_logprobs": 21}, "invalid_value", "top_logprobs", "less than or equal to 20"),
    ({"stream_options": {"include_usage": True}}, "invalid_value", "stream_options", "'stream'"),
    ({"stream": True, "stream_options": {"usage": True}}, "unknown_field", "stream_options", "include_usage"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "invalid_type", "stream_options", "true or false"),
    ({"stream": True, "stream_options": []}, "invalid_type", "stream_options", "an object"),
    ({"stream": "yes"}, "invalid_type", "stream", "true or false"),
    ({"model": "gpt-5"}, "model_not_found", "model", "there is tiny"),
]
COMPLETION: list[tuple[dict[str, Any], str, str | None, str]] = [
    ({}, "missing_field", "prompt", "required"),
    ({"prompt": []}, "invalid_type", "prompt", "an empty list"),
    ({"prompt": ""}, "invalid_value", "prompt", "at least one token"),
    ({"prompt": [1, "a"]}, "invalid_type", "prompt", "list of other things"),
    ({"prompt": [[1], []]}, "invalid_type", "prompt", "list of other things"),
    ({"prompt": [True]}, "invalid_type", "prompt", "list of other things"),
    ({"prompt": [100_000]}, "invalid_value", "prompt", "token id"),
    ({"prompt": ["\ud800"]}, "not_unicode", "prompt[0]", "surrogate"),
    ({"prompt": ["x"] * 65}, "invalid_value", "prompt", "at most 64"),
    ({"prompt": ["x"] * 33, "n": 2}, "invalid_value", "n", "several requests"),
    ({"prompt": "x" * 512}, "context_length_exceeded", "prompt", "Shorten the prompt"),
    ({"prompt": "x", "echo": True}, "unsupported_field", "echo", "not repeated"),
    ({"prompt": "x", "best_of": 2}, "unsupported_field", "best_of", "choose yourself"),
    ({"prompt": "x", "suffix": "y"}, "unsupported_field", "suffix", "only continued"),
    ({"prompt": "x", "logprobs": True}, "invalid_type", "logprobs", "must be an integer"),
]
# What asks for nothing that is not there is not refused.
HARMLESS: dict[str, Any] = {
    "tools": [],
    "tool_choice": "auto",
    "response_format": {"type": "text"},
    "logit_bias": None,
    "user": "somebody",
    "store": False,
    "top_k": -1,
    "stop": None,
    "max_completion_tokens": 5,
    "max_tokens": 5,
}


async def test_what_a_client_can_do_wrong(nats_server: NatsServer, tmp_path: Path) -> None:
    async with chat_stack(nats_server, tmp_path) as stack:
        for path, table, rest in (("/v1/chat/completions", CHAT, MESSAGES), ("/v1/completions", COMPLETION, {})):
            for fields, code, param, text in table:
                sent = fields if code == "missing_field" else rest | fields
                status, body = await stack.call(path, **sent)
                assert status == (404 if code == "model_not_found" else 400), (fields, body)
                error = checked_error(status, body)
                assert (error["code"], error["param"]) == (code, param), (fields, error)
                assert text in error["message"], (fields, error)
        assert stack.workers["fused-0"].requests.empty()
        assert (await stack.chat(**HARMLESS))["choices"][0]["finish_reason"] == "length"
        harmless = {"echo": False, "best_of": 1, "suffix": None, "n": 1}
        status, body = await stack.call("/v1/completions", prompt="x", **harmless)
        assert status == 200, body


async def test_what_a_server_cannot_do(nats_server: NatsServer, tmp_path: Path) -> None:
    async with chat_stack(nats_server, tmp_path, max_sequences=1) as stack:
        edge = stack.gateway.edge
        assert edge.language is not None
        edge.language.active = 1
        status, body = await stack.call("/v1/chat/completions", **MESSAGES)
        assert (status, checked_error(status, body)["code"]) == (503, "overloaded")
        edge.language.active = 0
        async with stack.http.post("/v1/chat/completions", data=b"messages=x", headers=FORM) as response:
            assert (response.status, (await response.json())["error"]["code"]) == (400, "invalid_type")
        edge.draining.set()
        status, body = await stack.call("/v1/completions", prompt="x")
        assert (status, checked_error(status, body)["code"]) == (503, "draining")
    async with gateway_stack(nats_server) as video_only:
        status, body = await video_only.call("POST", "/v1/chat/completions", json=MESSAGES)
        assert (status, checked_error(status, body)["code"]) == (404, "model_not_found")
        assert "TRIPTYCH_LANGUAGE_MODEL" in body["error"]["message"]
