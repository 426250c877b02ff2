"""/docs: the API read from /openapi.json and shown without a library from elsewhere (the usual viewers load from a CDN)."""

from __future__ import annotations

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Switchyard API</title><style>
:root { color-scheme: light dark; --line: #8884; --dim: #888 }
body { font: 15px/1.55 system-ui, sans-serif; max-width: 62rem; margin: 0 auto; padding: 1.5rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.05rem; margin: 2rem 0 .5rem; color: var(--dim) }
details { border: 1px solid var(--line); border-radius: 8px; margin: .4rem 0; padding: .5rem .8rem }
summary { cursor: pointer; overflow-wrap: anywhere } summary b { display: inline-block; min-width: 4.2em; font-family: monospace }
summary span { color: var(--dim) } table { border-collapse: collapse; width: 100%; margin: .6rem 0 }
td { border-top: 1px solid var(--line); padding: .25rem .6rem .25rem 0; vertical-align: top }
td:first-child { font-family: monospace; white-space: nowrap } td:nth-child(2) { color: var(--dim); white-space: nowrap }
pre { overflow: auto; padding: .8rem; border: 1px solid var(--line); border-radius: 8px }
.scroll { overflow-x: auto }
textarea { width: 100%; box-sizing: border-box; font: 13px/1.5 ui-monospace, monospace; padding: .6rem }
textarea, button { border: 1px solid var(--line); border-radius: 8px }
button { font: inherit; padding: .4rem 1rem; min-height: 40px; margin: .4rem 0 }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1rem; margin: 1rem 0 }
</style></head><body>
<h1>Switchyard API</h1>
<p>Point any OpenAI client at <code id="base"></code>, clients of Anthropic, Ollama, KoboldAI and llama-server at
<code id="root"></code>, with this server's key where it has one, else with any. Each example runs here as it stands; the model
<code>echo</code> repeats what it is told. <a href="conformance">What works on which backend</a></p>
<pre id="example"></pre><nav id="groups"></nav><main id="list">Reading openapi.json …</main>
<script>
const make = (tag, text, parent) => { const e = document.createElement(tag); e.textContent = text; parent?.append(e); return e; };
const base = new URL("v1", document.baseURI).href;
document.getElementById("base").textContent = base;
document.getElementById("root").textContent = new URL(".", document.baseURI).href.replace(/\\/$/, "");
document.getElementById("example").textContent =
  `curl ${base}/chat/completions -H "Content-Type: application/json" \\\\\\n` +
  `  -d '{"messages": [{"role": "user", "content": "Hello"}], "stream": true}'`;
function type(s) { return s.type ?? (s.anyOf ?? []).map(type).filter(t => t !== "null").join(" or ") ?? ""; }
function range(s) {
  const lo = s.minimum, hi = s.maximum;
  return lo === undefined && hi === undefined ? "" : ` ${lo ?? ""}…${hi ?? ""}`;
}
function tryIt(box, method, path, example) {
  if (method !== "get" && !example) return;
  if (path.includes("{")) return;
  const area = example && make("textarea", JSON.stringify(example, null, 1), box);
  if (area) {
    area.rows = Math.min(14, area.value.split("\\n").length + 1);
    area.setAttribute("aria-label", "Body of the request");
    area.spellcheck = false;
  }
  const run = make("button", "Run", make("div", "", box)), out = make("pre", "", box);
  out.hidden = true;
  run.addEventListener("click", async () => {
    run.disabled = true; out.hidden = false; out.textContent = "…";
    try {
      const headers = { "Content-Type": "application/json" };
      const answer = await fetch(path.slice(1), area ? { method: method.toUpperCase(), headers, body: area.value } : {});
      out.textContent = answer.status + "\\n";
      const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
      for (let part; !(part = await reader.read()).done && out.textContent.length < 50000;) out.textContent += part.value;
    } catch (error) { out.textContent = String(error); }
    run.disabled = false;
  });
}
fetch("openapi.json").then(r => r.json()).then(api => {
  const list = document.getElementById("list"); list.textContent = "";
  const groups = {};
  for (const [path, methods] of Object.entries(api.paths))
    for (const [method, op] of Object.entries(methods))
      (groups[op.tags?.[0] ?? "The page's own API"] ??= []).push([method, path, op]);
  const nav = document.getElementById("groups");
  for (const [tag, ops] of Object.entries(groups)) {
    make("h2", tag, list).id = tag;
    make("a", tag, nav).href = "#" + encodeURIComponent(tag);
    for (const [method, path, op] of ops) {
      const box = make("details", "", list), head = make("summary", "", box);
      make("b", method.toUpperCase(), head); head.append(path + " "); make("span", op.description ?? op.summary ?? "", head);
      const content = op.requestBody?.content?.["application/json"], schema = content?.schema;
      box.addEventListener("toggle", () => tryIt(box, method, path, content?.example), { once: true });
      if (schema?.properties) {
        const table = make("table", "", make("div", "", box)); table.parentElement.className = "scroll";
        for (const [name, s] of Object.entries(schema.properties)) {
          const row = make("tr", "", table);
          make("td", name, row); make("td", type(s) + range(s), row); make("td", s.description ?? "", row);
        }
      }
    }
  }
}).catch(error => { document.getElementById("list").textContent = "openapi.json could not be read: " + error; });
</script></body></html>
"""
