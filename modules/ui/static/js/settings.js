// Writes Gradio's controls through to the server, which keeps the settings. Quick changes are sent as one request.

import { put } from './api.js';
import { fail } from './toast.js';

let waiting = {};
let timer = 0;
let sending = Promise.resolve();

async function flush() {
  const body = waiting;
  waiting = {};
  try {
    await put('settings', body);
  } catch (error) {
    fail(error);
  }
}

function soon() {
  clearTimeout(timer);
  timer = setTimeout(() => (sending = sending.then(flush)), 250);
}

/** One top-level setting, such as max_tokens. */
export function saveSetting(name, value) {
  waiting[name] = value;
  soon();
}

/** One sampling parameter. */
export function saveSampling(name, value) {
  waiting.sampling = { ...waiting.sampling, [name]: value };
  soon();
}

// What was changed in the last quarter second must survive a closed tab.
window.addEventListener('pagehide', () => {
  if (!Object.keys(waiting).length) return;
  fetch(new URL('ui-api/settings', document.baseURI), {
    method: 'PUT', keepalive: true, headers: { 'Content-Type': 'application/json' }, body: JSON.stringify(waiting),
  });
});
