"""The playground in Chromium: asking, stopping, setting, failing, coming back."""

import json
import re
import shlex
import subprocess
from typing import Any

import pytest
from playwright.sync_api import Route, expect

from tests.support.cases import cases
from tests.support.services import PATIENCE, Server, wait_for
from tests.ui.conftest import Playground

QUESTION, OTHER = "What does json.dumps do?", "What does len do?"
AWKWARD = """it's "$HOME" `id` \\ 'x' <b>ü</b> 🙂"""
ENDLESS = {"max_new_tokens": "4000", "num_return_sequences": "8", "eos_token_id": "-1"}


def chat(server: Server, body: dict[str, Any]) -> dict[str, Any]:
    answer = server.post("/chat", **body | {"stream": False})
    assert answer.status_code == 200, answer.text
    return answer.json()


def body_of(command: str) -> str:
    """Return what a curl command sends."""
    words = shlex.split(command.replace("\\\n", ""))
    return words[words.index("-d") + 1]


def facts_of(playground: Playground) -> dict[str, str]:
    items = playground.page.locator(".exchange:last-child .facts li")
    return {item.get_attribute("data-fact") or "": item.inner_text() for item in items.all()}


def test_questions_are_answered_with_what_the_service_says(playground: Playground, server: Server) -> None:
    expect(playground.page.get_by_role("heading", name="Ask the model")).to_be_visible()
    expect(playground.page.locator("#model")).to_contain_text(server.get("/version").json()["model"]["name"])
    playground.put(do_sample="false")
    playground.ask(QUESTION)
    (sent,) = map(json.loads, playground.chat_bodies())
    assert (sent["messages"], sent["stream"]) == ([{"role": "user", "content": QUESTION}], True)
    plain = chat(server, sent)
    assert playground.answers.all_text_contents() == [plain["Result"].strip()]
    facts = facts_of(playground)
    assert (facts["tokens"], facts["reason"]) == (f"{plain['usage']['completion_tokens']} tokens", "complete")
    assert re.fullmatch(r"\d+(\.\d)? tokens/s", facts["rate"])
    assert re.fullmatch(r"first after \d+ ms|first after \d+\.\d s", facts["first"])
    expect(playground.page.locator("#announcement")).to_have_text("The answer is complete.")
    expect(playground.message).to_be_focused()

    playground.page.get_by_label("System prompt").fill("Answer briefly.")
    playground.ask(OTHER, count=2)
    system, *turns = json.loads(playground.chat_bodies()[1])["messages"]
    assert system == {"role": "system", "content": "Answer briefly."}
    assert [turn["role"] for turn in turns] == ["user", "assistant", "user"]
    assert turns[1]["content"].strip() == playground.answers.first.text_content()


@pytest.mark.usefixtures("slow_answers")
@pytest.mark.parametrize("how", ["key", "button", "reload"])
def test_stopping_keeps_what_has_come_and_frees_the_sequence(playground: Playground, server: Server, how: str) -> None:
    def disconnected() -> float:
        text = server.get("/metrics/prometheus").text
        _, _, rest = text.partition('requests_total{endpoint="/chat",outcome="disconnected"} ')
        return float((rest or "0").split()[0])

    before = disconnected()
    playground.put(**ENDLESS)
    playground.ask(QUESTION, ended="")
    expect(playground.answers.first).not_to_be_empty()
    expect(playground.page.locator(".answer")).to_have_attribute("aria-busy", "true")
    if how == "key":
        playground.message.press("Escape")
    elif how == "button":
        playground.click("Stop")
    else:
        playground.open()
    playground.ended("stopped")
    expect(playground.answers.first).not_to_be_empty()
    assert facts_of(playground)["reason"] == "stopped"
    expect(playground.page.get_by_role("button", name="Stop")).to_be_hidden()
    assert wait_for(lambda: disconnected() == before + 1 and server.is_idle())
    expect(playground.message).to_be_focused()


def test_a_parameter_reaches_the_request_and_the_command(playground: Playground, server: Server) -> None:
    page = playground.page
    playground.put(do_sample="false", seed="18446744073709551615", temperature=".5")
    playground.put(stop_strings="never said", early_stopping='"never"', max_new_tokens="16")
    page.locator("#tab-request").click()
    playground.message.fill(AWKWARD)
    command = playground.curl
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.clock.install()  # what is shown for a moment stays until the test has seen it
    playground.click("Copy the command")
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == command
    page.clock.fast_forward(2000)
    expect(page.get_by_role("button", name="Copy the command")).to_be_visible()
    playground.message.press("Enter")
    playground.ended()
    (sent,) = playground.chat_bodies()
    assert body_of(command) == sent
    assert '"seed": 18446744073709551615' in sent
    body = json.loads(sent)
    assert body["messages"] == [{"role": "user", "content": AWKWARD}]
    kwargs: dict[str, Any] = {"max_new_tokens": 16, "return_dict_in_generate": True, "do_sample": False}
    kwargs |= {"seed": 2**64 - 1, "temperature": 0.5, "stop_strings": "never said", "early_stopping": "never"}
    assert body["generate_kwargs"] == kwargs
    run = subprocess.run(["sh", "-c", command], capture_output=True, check=True, timeout=PATIENCE, text=True)
    last = run.stdout.strip().split("\n\n")[-1]
    assert last.startswith("event: result\ndata: ")
    assert json.loads(last.split("data: ", 1)[1]) == chat(server, body)
    assert playground.curl == command, "the command shows the last message when nothing is being written"


def test_every_parameter_is_explained_and_can_be_reset(playground: Playground, server: Server) -> None:
    document = server.get("/openapi.json").json()["components"]["schemas"]["GenerateKwargs"]["properties"]
    rows = playground.page.locator(".parameter")
    assert sorted(rows.locator("label").all_text_contents()) == sorted(document)
    for name, described in document.items():
        control = playground.page.locator(f"#parameter-{name}")
        meaning = playground.page.locator(f"#{control.get_attribute('aria-describedby')}").text_content() or ""
        assert meaning.startswith(described["description"].replace("`", ""))
        default = f"default {json.dumps(described['default'])}" if "default" in described else "not set by default"
        # 1.0 and 1 are the same number, and JavaScript knows the shorter name only.
        assert meaning.endswith(default.removesuffix(".0"))
    top_p = playground.page.locator(".parameter", has=playground.page.locator("#parameter-top_p"))
    expect(top_p).to_contain_text("0 to 1")
    playground.put(top_p="0.3")
    assert '"top_p": 0.3' in playground.curl
    assert float(top_p.get_by_role("slider").input_value()) == 0.3
    top_p.get_by_role("slider").press("End")
    assert '"top_p": 1' in playground.curl
    expect(playground.page.locator("#count")).to_have_text("1")
    top_p.get_by_role("button", name="Reset top_p").click()
    assert "top_p" not in playground.curl
    playground.put(min_p="0.1")
    playground.click("Reset all")
    expect(playground.page.locator("#count")).to_be_hidden()
    assert set(json.loads(body_of(playground.curl))["generate_kwargs"]) == {"max_new_tokens", "return_dict_in_generate"}


def test_a_parameter_is_found_by_name_or_meaning(playground: Playground) -> None:
    finder = playground.page.get_by_label("Find a parameter")
    finder.fill("nucleus")
    expect(playground.page.locator(".parameter:visible label")).to_have_text(["top_p"])
    finder.fill("num_beam")
    expect(playground.page.locator("#parameter-num_beam_groups")).to_be_visible()
    expect(playground.page.locator("#parameter-top_p")).to_be_hidden()
    finder.fill("no such thing")
    expect(playground.page.get_by_text("No parameter of that name or meaning.")).to_be_visible()
    finder.fill("")
    expect(playground.page.locator("#parameter-top_p")).to_be_visible()


@pytest.mark.parametrize(("name", "value", "sent"), [("top_p", "7", 7), ("top_k", "many", "many")])
def test_a_refusal_is_the_service_s(playground: Playground, server: Server, name: str, value: str, sent: Any) -> None:
    playground.refusals_expected = True
    playground.put(**{name: value})
    playground.ask(QUESTION, ended="failed")
    refused = server.post("/chat", prompt="a", generate_kwargs={name: sent})
    assert refused.status_code == 400
    expect(playground.page.get_by_role("alert")).to_have_text(refused.json()["detail"])
    playground.put(**{name: ""})
    playground.click("Try again")
    playground.ended()
    expect(playground.page.get_by_role("alert")).to_be_hidden()
    playground.ask(OTHER, count=2)


@cases
def test_a_stream_that_breaks_keeps_what_has_come(playground: Playground, body: str, text: str, sentence: str) -> None:
    def answer(route: Route) -> None:
        if body:
            route.fulfill(content_type="text/event-stream", body=body)
        else:
            route.abort("connectionrefused")

    playground.page.route("**/chat", answer)
    playground.ask(QUESTION, ended="failed")
    expect(playground.page.get_by_role("alert")).to_contain_text(sentence)
    if body:
        expect(playground.answers).to_have_text([text])
    playground.complaints[:] = [line for line in playground.complaints if "ERR_CONNECTION_REFUSED" not in line]


def test_a_reload_changes_nothing_and_a_new_chat_keeps_the_settings_alone(playground: Playground) -> None:
    page = playground.page
    playground.put(do_sample="false", stop_strings='["\\n\\n", "x y"]')
    page.get_by_label("System prompt").fill("Be kind.")
    playground.click(QUESTION)
    playground.ended()
    expect(page.locator("#welcome")).to_be_hidden()
    playground.message.fill("half a tho")

    def seen() -> list[Any]:
        values = [page.locator(f"#parameter-{name}").input_value() for name in ("do_sample", "stop_strings", "top_k")]
        return [page.locator("#conversation").inner_text(), playground.message.input_value(), playground.curl, *values]

    before = seen()
    assert "Be kind." in before[2]
    assert before[3:] == ["false", '["\\n\\n", "x y"]', ""]
    playground.open()
    assert seen() == before

    playground.click("New chat")
    expect(page.locator(".exchange")).to_have_count(0)
    expect(page.locator("#welcome")).to_be_visible()
    expect(page.locator("#parameter-do_sample")).to_have_value("false")
    expect(playground.message).to_be_focused()
    playground.open()
    expect(page.locator(".exchange")).to_have_count(0)
    playground.ask(OTHER)
    roles = [message["role"] for message in json.loads(playground.chat_bodies()[-1])["messages"]]
    assert roles == ["system", "user"]


@cases
def test_sequences_stand_apart(playground: Playground, server: Server, parameters: dict[str, str], count: int) -> None:
    playground.put(**parameters)
    playground.ask(QUESTION)
    expect(playground.answers).to_have_count(count)
    result = chat(server, json.loads(playground.chat_bodies()[0]))
    texts = playground.answers.all_text_contents()
    assert "".join("".join(texts).split()) == "".join(result["Result"].split())
    facts = facts_of(playground)
    assert facts["tokens"] == f"{result['usage']['completion_tokens']} tokens"
    assert ("first" in facts) is (count > 1)
    playground.ask(OTHER, count=2)
    messages = json.loads(playground.chat_bodies()[1])["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert messages[1]["content"].strip() == texts[0].strip()


@cases
def test_an_answer_tells_why_it_ended(playground: Playground, parameters: dict[str, str], reason: str) -> None:
    playground.put(do_sample="false", **parameters)
    playground.ask(QUESTION)
    assert facts_of(playground)["reason"] == reason


def test_a_schema_holds_answers_and_calls_of_tools_are_shown(playground: Playground, server: Server) -> None:
    page = playground.page
    page.get_by_label("JSON schema").fill('{"type": "integer", "minimum": 3, "maximum": 5}')
    playground.ask(QUESTION)
    expect(playground.answers).to_have_text(re.compile("^[345]$"))
    assert facts_of(playground)["reason"] == "complete"
    assert "/v1/chat/completions" in playground.curl
    page.get_by_label("JSON schema").fill("")
    described = {"name": "add", "parameters": {"properties": {"a": {"enum": [7]}}, "required": ["a"]}}
    page.get_by_label("Tools").fill(json.dumps([{"type": "function", "function": described}]))
    tokens = server.post("/tokenize", text="functools[").json()["tokens"]
    biases = [[tokens[:length], 1e3 * 2**length] for length in range(1, len(tokens) + 1)]
    playground.put(sequence_bias=json.dumps(biases))
    playground.ask(QUESTION, count=2)
    block = page.locator(".exchange:last-child .answer pre").first
    expect(block).to_have_attribute("data-language", "add")
    expect(block).to_have_text(re.compile(r'^\{\s*"a"\s*:\s*7\s*\}$'))
    assert facts_of(playground)["reason"] == "calls a tool"


def test_text_is_never_taken_for_html(playground: Playground) -> None:
    evil = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    texts = [f"{evil} ```\n", f"```html\n{evil}\n```\nafter"]
    stream = "".join(f"data: {json.dumps({'index': 0, 'text': text})}\n\n" for text in texts)
    stream += 'event: result\ndata: {"Result": ""}\n\n'
    playground.page.route("**/chat", lambda route: route.fulfill(content_type="text/event-stream", body=stream))
    playground.ask(evil)
    assert playground.page.locator("#conversation img, #conversation script").count() == 0
    expect(playground.page.locator(".question")).to_have_text(evil)
    expect(playground.page.locator(".answer pre")).to_have_attribute("data-language", "html")
    expect(playground.page.locator(".answer pre")).to_have_text(evil)
    expect(playground.answers).to_contain_text("after")
    refused = "() => { try { document.body.innerHTML = '<i>'; return false } catch { return true } }"
    assert playground.page.evaluate(refused), "the browser lets the page parse HTML"
    assert playground.complaints, "the browser says so too"
    playground.complaints.clear()
