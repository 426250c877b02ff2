"""What / shows until the page is there: it asks every half second and then loads it."""

from __future__ import annotations

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Switchyard</title>
<noscript><meta http-equiv="refresh" content="1"></noscript>
<style>
:root { color-scheme: light dark; --bg: #f7f7f8; --fg: #1c1d21; --dim: #6b6f76; --line: #d8dadf; --mark: #3b6ef5 }
@media (prefers-color-scheme: dark) { :root { --bg: #17181b; --fg: #ececee; --dim: #9a9da4; --line: #33353a; --mark: #7ea2ff } }
body { margin: 0; min-height: 100vh; display: grid; place-items: center; background: var(--bg); color: var(--fg);
  font: 16px/1.5 system-ui, sans-serif }
main { text-align: center; padding: 2rem }
h1 { font-size: 1.4rem; font-weight: 600; margin: 1.2rem 0 .3rem }
p { color: var(--dim); margin: 0; min-height: 1.5em }
.ring { width: 34px; height: 34px; margin: auto; border: 3px solid var(--line); border-top-color: var(--mark);
  border-radius: 50%; animation: turn 1s linear infinite }
@keyframes turn { to { transform: rotate(1turn) } }
@media (prefers-reduced-motion: reduce) { .ring { animation-duration: 4s } }
</style></head>
<body><main data-testid="splash"><div class="ring" aria-hidden="true"></div><h1>Switchyard is starting</h1>
<p role="status" id="say">The page will be here in a moment. The API answers already.</p></main>
<script>
const say = document.getElementById("say");
async function look() {
  try {
    const health = await (await fetch("health", { cache: "no-store" })).json();
    if (health.ui === "ready") return location.reload();
    if (health.ui === "failed") { say.textContent = "The page could not be loaded; the log says why. The API works."; return; }
    if (health.model && health.status === "loading") say.textContent = "Loading " + health.model + " …";
  } catch { say.textContent = "Waiting for the server …"; }
  setTimeout(look, 500);
}
setTimeout(look, 500);
</script></body></html>
"""
