// Writes Gradio's controls through to the server, which keeps the settings. Quick changes are sent as one request.

import { del, get, put } from './api.js';
import { askText, confirmDialog } from './dialog.js';
import { fail, toast } from './toast.js';

let waiting = {};
let timer = 0;
let sending = Promise.resolve();

async function flush() {
  const body = waiting;
  waiting = {};
  if (!Object.keys(body).length) return;
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

/** Send what waits, and wait until it is there. */
function settled() {
  clearTimeout(timer);
  sending = sending.then(flush);
  return sending;
}

/** One top-level setting, such as max_tokens. */
export function saveSetting(name, value) {
  waiting[name] = value;
  soon();
}

/** One sampling parameter, as its control holds it; lists and maps come as JSON text. */
export function saveParameter(name, kind, value) {
  let parsed = value;
  if (kind === 'strings' || kind === 'bias') {
    try {
      parsed = JSON.parse(value || (kind === 'bias' ? '{}' : '[]'));
    } catch {
      toast(`${name}: write it as JSON, for example ${kind === 'bias' ? '{"15": -100}' : '["\\n", ":"]'}.`, { level: 'warning' });
      return;
    }
  }
  if (parsed === null || Number.isNaN(parsed)) return;
  waiting.sampling = { ...waiting.sampling, [name]: parsed };
  soon();
}

/** Stop sequences: one per line, "\n" written out stands for a line break. */
export function saveStop(text) {
  const lines = (text || '').split('\n').filter((line) => line !== '');
  saveSetting('stop', lines.map((line) => line.replaceAll('\\n', '\n')));
}

// What was changed in the last quarter second must survive a closed tab.
window.addEventListener('pagehide', () => {
  if (!Object.keys(waiting).length) return;
  fetch(new URL('ui-api/settings', document.baseURI), {
    method: 'PUT', keepalive: true, headers: { 'Content-Type': 'application/json' }, body: JSON.stringify(waiting),
  });
  waiting = {};
});

// --- presets ---

const path = (name) => `presets/${encodeURIComponent(name)}`;

/** The server takes over the preset's values and switches everything else off. */
export async function loadPreset(name) {
  if (!name) return;
  try {
    await settled();
    await put('settings', { preset: name });
    toast(`Preset ${name} is set.`, { level: 'success', timeout: 2500 });
  } catch (error) {
    fail(error);
  }
}

/** Switch every sampler off. */
export async function neutral() {
  try {
    await settled();
    const { parameters } = await get('parameters');
    await put('settings', { sampling: Object.fromEntries(parameters.map((row) => [row.name, row.neutral])), preset: null });
    toast('Every sampler is off: the model decides alone.', { level: 'success' });
  } catch (error) {
    fail(error);
  }
}

export async function savePreset(current) {
  const name = await askText('Save preset', current || '', 'Save');
  if (!name) return;
  try {
    await settled();
    const { sampling } = await get('settings');
    await put(path(name), { sampling });
    await put('settings', { sampling, preset: name });
    toast(`Saved as ${name}.`, { level: 'success' });
  } catch (error) {
    fail(error);
  }
}

export async function deletePreset(name) {
  if (!name) {
    toast('Choose the preset to delete first.');
    return;
  }
  if (!(await confirmDialog('Delete preset?', `“${name}” is removed from the presets folder.`, 'Delete'))) return;
  try {
    await del(path(name));
    toast(`Preset ${name} is deleted.`);
  } catch (error) {
    fail(error);
  }
}
