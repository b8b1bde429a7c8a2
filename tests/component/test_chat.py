"""Chats through a real gateway, scheduler and broker: forms, streaming, text and its ends."""

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.component.chat_support import ANSWER, DECODE, MESSAGES, PREFILL, chat_stack, events
from tests.component.gateway_support import CLIENT_S
from tests.support.language import ids_of
from tests.support.nats_server import NatsServer


async def test_the_sdk_chats_at_once_and_as_it_comes(nats_server: NatsServer, tmp_path: Path) -> None:
    async with (
        chat_stack(nats_server, tmp_path) as stack,
        openai.AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0, timeout=CLIENT_S) as client,
    ):
        whole = await client.chat.completions.create(model="tiny", **MESSAGES)
        assert whole.choices[0].message.content == ANSWER
        assert (whole.object, whole.choices[0].finish_reason) == ("chat.completion", "stop")
        assert whole.usage is not None
        assert whole.usage.completion_tokens == len(ids_of(ANSWER)) + 1
        assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens

        stream = await client.chat.completions.create(
            model="tiny", stream=True, stream_options={"include_usage": True}, **MESSAGES
        )
        chunks = [chunk async for chunk in stream]
        text = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
        assert "".join(text) == ANSWER
        assert not any("\ufffd" in part for part in text)
        assert "😀" in "".join(text)
        assert chunks[0].choices[0].delta.role == "assistant"
        assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:-1])
        assert chunks[-2].choices[0].finish_reason == "stop"
        assert (chunks[-1].choices, chunks[-1].usage) == ([], whole.usage)
        assert len({chunk.id for chunk in chunks}) == 1

        models = [model.id async for model in client.models.list()]
        assert models == ["tiny"]


async def test_the_sdk_completes_at_once_and_as_it_comes(nats_server: NatsServer, tmp_path: Path) -> None:
    async with (
        chat_stack(nats_server, tmp_path) as stack,
        openai.AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0, timeout=CLIENT_S) as client,
    ):
        whole = await client.completions.create(model="tiny", prompt="hello", max_tokens=3, logprobs=1)
        choice = whole.choices[0]
        assert (whole.object, choice.text, choice.finish_reason) == ("text_completion", "hello wo", "length")
        assert choice.logprobs is not None
        assert choice.logprobs.tokens == ["hello", " w", "o"]
        assert choice.logprobs.text_offset == [0, 5, 7]
        assert choice.logprobs.token_logprobs == [-0.25] * 3
        assert choice.logprobs.top_logprobs == [{"hello": -0.25}, {" w": -0.25}, {"o": -0.25}]

        stream = await client.completions.create(
            model="tiny", prompt=["a", "b"], max_tokens=200, stream=True, extra_body={"ignore_eos": False}
        )
        texts = ["", ""]
        async for chunk in stream:
            texts[chunk.choices[0].index] += chunk.choices[0].text
        assert texts == [ANSWER, ANSWER]

        with pytest.raises(openai.BadRequestError, match="echo"):
            await client.completions.create(model="tiny", prompt="a", echo=True)


async def test_log_probabilities_of_a_chat(nats_server: NatsServer, tmp_path: Path) -> None:
    async with chat_stack(nats_server, tmp_path) as stack:
        body = await stack.chat(logprobs=True, top_logprobs=2, max_tokens=2)
        content = body["choices"][0]["logprobs"]["content"]
        assert [token["token"] for token in content] == ["hello", " w"]
        assert content[0]["bytes"] == list(b"hello")
        assert content[0]["logprob"] == -0.25
        assert [top["logprob"] for top in content[0]["top_logprobs"]] == [-0.25, -9999.0]
        async with stack.http.post(
            "/v1/chat/completions", json=MESSAGES | {"stream": True, "logprobs": True, "max_tokens": 2}
        ) as response:
            streamed = [event["choices"][0]["logprobs"]["content"] async for event in events(response)]
        assert [token["token"] for part in streamed for token in part] == ["hello", " w"]


async def test_several_answers_have_seeds_of_their_own(nats_server: NatsServer, tmp_path: Path) -> None:
    async with chat_stack(nats_server, tmp_path) as stack:
        body = await stack.chat(n=3, seed=7)
        assert [choice["message"]["content"] for choice in body["choices"]] == [ANSWER] * 3
        assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
        requests = [await stack.workers["fused-0"].next_request() for _ in range(3)]
        seeds = {request.request_id[-2:]: request.sampling.seed for request in requests}
        assert seeds["-0"] == 7
        assert len(set(seeds.values())) == 3
        assert body["usage"]["completion_tokens"] == 3 * (len(ids_of(ANSWER)) + 1)


STOPS: list[tuple[Any, str]] = [
    ("lo wor", "hel"),
    (["nothing", "😀"], "hello world, "),
    (["hello!"], ANSWER[:-6]),
    (["hello!!"], ANSWER),
    ("o", "hell"),
]


async def test_stop_strings_are_found_across_tokens_and_not_shown(nats_server: NatsServer, tmp_path: Path) -> None:
    async with chat_stack(nats_server, tmp_path) as stack:
        for stop, shown in STOPS:
            body = await stack.chat(stop=stop)
            assert body["choices"][0]["message"]["content"] == shown, stop
            assert body["choices"][0]["finish_reason"] == "stop"
            async with stack.http.post("/v1/chat/completions", json=MESSAGES | {"stop": stop, "stream": True}) as told:
                parts = [event["choices"][0]["delta"].get("content", "") async for event in events(told)]
            assert "".join(parts) == shown, stop


async def test_a_stop_string_ends_the_generation_where_it_runs(nats_server: NatsServer, tmp_path: Path) -> None:
    async with chat_stack(nats_server, tmp_path) as stack:
        worker = stack.workers["fused-0"]
        worker.allowed = asyncio.Semaphore(3)
        body = await stack.chat(stop="wo")
        assert body["usage"]["completion_tokens"] == 3
        request = await worker.next_request()
        cancelled = await worker.next_cancelled()
        assert (cancelled.request_id, cancelled.epoch) == (request.request_id, request.epoch)


async def test_prefill_hands_over_to_decode(nats_server: NatsServer, tmp_path: Path) -> None:
    roles = {"prefill-0": PREFILL, "decode-0": DECODE}
    async with chat_stack(nats_server, tmp_path, roles=roles) as stack:
        body = await stack.chat()
        assert body["choices"][0]["message"]["content"] == ANSWER
        assert (await stack.workers["prefill-0"].next_request()).decode == "decode-0"
        assert stack.workers["prefill-0"].messages == 1
        assert stack.workers["decode-0"].messages == len(ids_of(ANSWER))


async def test_a_client_that_leaves_frees_its_sequence(nats_server: NatsServer, tmp_path: Path) -> None:
    async with chat_stack(nats_server, tmp_path) as stack:
        worker = stack.workers["fused-0"]
        worker.allowed = asyncio.Semaphore(1)
        response = await stack.http.post("/v1/chat/completions", json=MESSAGES | {"stream": True})
        assert await response.content.readline()
        request = await worker.next_request()
        response.close()
        cancelled = await worker.next_cancelled()
        assert (cancelled.request_id, cancelled.epoch) == (request.request_id, request.epoch)
        # One that waits for its whole answer is noticed as soon.
        asking = asyncio.create_task(stack.chat())
        request = await worker.next_request()
        asking.cancel()
        assert (await worker.next_cancelled()).request_id == request.request_id


async def test_a_client_that_reads_late_holds_nobody_up(nats_server: NatsServer, tmp_path: Path) -> None:
    long = "hello " * 200
    async with chat_stack(nats_server, tmp_path, script=lambda _: long) as stack:
        slow = await stack.http.post("/v1/chat/completions", json=MESSAGES | {"stream": True})
        assert (await stack.chat())["choices"][0]["message"]["content"].startswith("hello hello")
        text = "".join([event["choices"][0]["delta"].get("content", "") async for event in events(slow)])
        assert long.startswith(text)
        assert len(text) > 400


async def test_the_models_template_and_the_forms_of_a_prompt(nats_server: NatsServer, tmp_path: Path) -> None:
    def echo(prompt: str) -> str:
        return f"[{prompt}]".replace("<|", "(").replace("|>", ")")

    async with chat_stack(nats_server, tmp_path, script=echo) as stack:
        body = await stack.chat(
            messages=[
                {"role": "developer", "content": "be brief"},
                {"role": "user", "content": [{"type": "text", "text": "say "}, {"type": "text", "text": "hi"}]},
            ]
        )
        assert body["choices"][0]["message"]["content"] == "[(system)be brief(end)(user)say hi(end)(assistant)]"
        for prompt, answer in (
            ("hé", ["[hé]"]),
            (ids_of("ab"), ["[ab]"]),
            (["a", "b"], ["[a]", "[b]"]),
            ([ids_of("a"), ids_of("b")], ["[a]", "[b]"]),
        ):
            status, body = await stack.call("/v1/completions", prompt=prompt)
            assert status == 200, body
            assert [choice["text"] for choice in body["choices"]] == answer


async def test_metrics_and_the_document_know_chats(nats_server: NatsServer, tmp_path: Path) -> None:
    async with chat_stack(nats_server, tmp_path) as stack:
        await stack.chat()
        async with stack.http.get("/metrics") as response:
            text = await response.text()
        assert 'triptych_sequences_total{outcome="stop"} 1.0' in text
        assert f"triptych_generated_tokens_total {float(len(ids_of(ANSWER)) + 1)}" in text
        assert "triptych_time_to_first_token_seconds_count 1.0" in text
        assert "triptych_sequences_active 0.0" in text
        async with stack.http.get("/openapi.json") as response:
            paths = (await response.json())["paths"]
        assert {"/v1/chat/completions", "/v1/completions"} <= set(paths)
        async with stack.http.get("/v1/models/tiny") as response:
            assert (await response.json())["language"] == {"context_tokens": 512}


async def test_the_bodies_of_a_public_benchmark_client(nats_server: NatsServer, tmp_path: Path) -> None:
    """What ``vllm bench serve`` sends, and what it reads of the answer."""
    async with chat_stack(nats_server, tmp_path, script=lambda _: "ab<|end|>cd" * 20) as stack:
        for path, own in (
            ("/v1/completions", {"prompt": "x", "repetition_penalty": 1.0, "max_tokens": 9, "logprobs": None}),
            (
                "/v1/chat/completions",
                {
                    "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
                    "max_completion_tokens": 9,
                },
            ),
        ):
            common = {"model": "tiny", "temperature": 0.0, "ignore_eos": True, "stream": True}
            body = own | common | {"stream_options": {"include_usage": True}}
            async with stack.http.post(path, json=body, headers={"x-request-id": "bench-0"}) as response:
                assert response.status == 200, await response.text()
                told = [event async for event in events(response)]
            choices = [choice for event in told for choice in event["choices"]]
            text = "".join(choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices)
            assert text == "abcdabc", "two end tokens of nine"
            assert told[-1]["usage"]["completion_tokens"] == 9
            assert choices[-1]["finish_reason"] == "length"


async def test_the_command_line_writes_an_answer_as_it_comes(nats_server: NatsServer, tmp_path: Path) -> None:
    async with chat_stack(nats_server, tmp_path) as stack:
        assert await command("chat", "say hello", "--seed", "3", "--base-url", stack.url) == (0, f"{ANSWER}\n", "")
        request = await stack.workers["fused-0"].next_request()
        assert request.sampling.seed == 3
        code, out, err = await command("chat", "x", "--max-tokens", "100000", "--base-url", stack.url)
        assert (code, out) == (1, "")
        assert "context of 512 tokens" in err
        code, out, err = await command("models", "--base-url", stack.url)
        assert (code, "512 tokens" in out) == (0, True), err
    code, out, err = await command("chat", "x", "--base-url", "http://127.0.0.1:1")
    assert (code, out) == (1, "")
    assert err.startswith("triptych: no server answers")


async def command(*arguments: str) -> tuple[int | None, str, str]:
    """``triptych`` with these arguments: exit code and what it wrote."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "compose.cli",
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},
    )
    out, err = await asyncio.wait_for(process.communicate(), 120)
    return process.returncode, out.decode(), err.decode()
