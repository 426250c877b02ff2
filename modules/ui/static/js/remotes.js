// Other servers as backends: add one, see whether it answers and what it has, remove it.

import { del, get, on, post } from './api.js';
import { openDialog } from './dialog.js';
import { ago, h, plural } from './dom.js';
import { button, field, fileButton, select, textInput, tick } from './form.js';
import { refreshModels } from './models.js';
import { fail, toast } from './toast.js';

const SHOWN = 6;
const KINDS = { auto: 'Find out', switchyard: 'Switchyard', vllm: 'vLLM', 'llama-server': 'llama-server', 'llama-cpp-python': 'llama-cpp-python', tgi: 'TGI', ollama: 'Ollama', tabbyapi: 'tabbyAPI', openai: 'Another' };
const STATES = { ready: 'Answers', failed: 'Does not answer', unknown: 'Asking' };

const path = (server, rest = '') => `remotes/${encodeURIComponent(server.name)}${rest}`;

function card(server, again) {
  const facts = [
    server.url,
    server.state === 'ready' ? `${Math.round(server.latency_ms)} ms` : null,
    server.state === 'ready' || server.models.length ? plural(server.models.length, 'model') : null,
    server.has_key ? 'key saved' : null,
    server.has_ca ? 'certificates of its own' : null,
    server.proxy ? `through ${server.proxy}` : null,
    server.checked_at ? `asked ${ago(server.checked_at)}` : null,
  ];
  const test = button('Ask now', async () => {
    test.disabled = true;
    await post(path(server, '/test')).catch(fail);
    await again();
  }, false, 'remote-test');
  const remove = button('Remove', async () => {
    const sure = await openDialog({
      title: `Remove ${server.name}?`,
      body: h('p', {}, 'Its address and its key are forgotten. Its models leave the list.'),
      actions: [{ label: 'Keep it', value: null }, { label: 'Remove', value: 'yes', danger: true }],
    });
    if (sure !== 'yes') return;
    await del(path(server)).catch(fail);
    await again();
  }, false, 'remote-remove');
  const lamp = { ready: 'ready', failed: 'failed', unknown: 'loading' }[server.state];
  return h('li', { class: 'sy-card', 'data-testid': 'remote-row', 'data-server': server.name },
    h('div', { class: 'sy-state', 'data-state': lamp }, h('span', { class: 'sy-lamp' }), h('strong', {}, server.name), h('span', { class: 'sy-badge' }, STATES[server.state])),
    h('p', { class: 'sy-hint', dir: 'auto' }, facts.filter(Boolean).join(' · ')),
    server.error ? h('p', { class: 'sy-card-error', dir: 'auto' }, server.error) : '',
    server.models.length
      ? h('ul', {}, server.models.slice(0, SHOWN).map((id) => h('li', { dir: 'auto' }, id)), server.models.length > SHOWN ? h('li', {}, `and ${server.models.length - SHOWN} more, in the list above`) : '')
      : '',
    h('div', { class: 'sy-card-actions' }, test, remove));
}

/** How to get there, where that is not the plain way: a proxy, certificates of an authority of one's own. */
function waySettings() {
  const proxy = textInput('', { placeholder: 'http://proxy.example:3128', maxlength: 500, testid: 'remote-proxy' });
  proxy.autocomplete = 'off';
  const resolves = tick('The proxy looks the name up', false, { testid: 'remote-proxy-resolves', note: 'For a name that only the proxy knows.' });
  const ca = h('textarea', { class: 'sy-input', rows: 3, spellcheck: 'false', maxlength: 256 * 1024, placeholder: '-----BEGIN CERTIFICATE-----', 'data-testid': 'remote-ca' });
  const file = fileButton('Read a file', '.pem,.crt,.cer', (_, text) => (ca.value = text), 'remote-ca-file');
  const element = h('details', { class: 'sy-remote-way' }, h('summary', {}, 'Proxy and certificates'),
    h('div', { class: 'sy-fields' },
      field('Proxy', proxy, 'An HTTP proxy, with user:password@ where it wants them. The environment’s proxies are not used.'),
      resolves,
      field('Certificates (PEM)', ca, 'Of the authorities that count for this https server, instead of the usual ones.', true)),
    h('div', { class: 'sy-card-actions' }, file));
  return {
    element,
    read: () => ({ proxy: proxy.value.trim() || null, proxy_resolves: resolves.input.checked, ca: ca.value.trim() || null }),
    clear: () => {
      for (const input of [proxy, ca]) input.value = '';
      resolves.input.checked = false;
    },
  };
}

function form(again) {
  const name = textInput('', { placeholder: 'gpu-box', maxlength: 40, testid: 'remote-name' });
  const url = textInput('', { placeholder: 'http://192.168.1.20:8000/v1', maxlength: 500, testid: 'remote-url' });
  const key = h('input', { type: 'password', class: 'sy-input', autocomplete: 'off', maxlength: 4096, 'data-testid': 'remote-key' });
  const kind = select(Object.entries(KINDS), 'auto', { testid: 'remote-kind' });
  const way = waySettings();
  const add = h('button', { type: 'submit', class: 'sy-button sy-primary', 'data-testid': 'remote-add' }, 'Add');
  const problem = h('p', { class: 'sy-card-error', role: 'alert', hidden: true, dir: 'auto' });
  const box = h('form', { class: 'sy-card sy-tool sy-remote-form', 'data-testid': 'remote-form', novalidate: true },
    h('h3', {}, 'Add a server'),
    h('p', { class: 'sy-hint' }, 'Any server with an OpenAI-compatible API. What you write in its chats is sent to it.'),
    h('div', { class: 'sy-fields' },
      field('Name', name, 'Its models are called remote/NAME/MODEL.'),
      field('Address', url, 'It usually ends with /v1.'),
      field('Key', key, 'Where it needs one. Kept on this machine, never shown again.'),
      field('Kind', kind, 'Only if it is not found out by itself.')),
    way.element,
    problem,
    h('div', { class: 'sy-card-actions' }, add));
  box.addEventListener('submit', async (event) => {
    event.preventDefault();
    add.disabled = true;
    problem.hidden = true;
    try {
      const { server } = await post('remotes', { name: name.value.trim(), url: url.value.trim(), key: key.value || null, kind: kind.value, ...way.read() });
      for (const input of [name, url, key]) input.value = '';
      way.clear();
      toast(server.state === 'ready' ? `${server.name} has ${plural(server.models.length, 'model')}.` : `${server.name} is saved, but it does not answer.`);
    } catch (error) {
      problem.textContent = error.message;
      problem.hidden = false;
    } finally {
      add.disabled = false;
    }
    await again();
  });
  return box;
}

/** Called by Gradio when the component is on the page. */
export function mount({ element }) {
  const root = element.querySelector('.sy-remotes');
  if (root.dataset.mounted) return;
  root.dataset.mounted = '1';
  root.classList.add('sy-models');
  const list = h('ul', { class: 'sy-cards' });
  let known = '';
  let asking = null;
  const read = async () => {
    const { servers } = await get('remotes');
    list.replaceChildren(...servers.map((server) => card(server, again)));
    const models = servers.flatMap((server) => server.models).join('\n');
    if (models !== known) {
      known = models;
      await refreshModels();
      window.switchyard?.refreshControls();
    }
  };
  // One reading at a time: a later answer must not be overtaken by an earlier one.
  const again = () => {
    asking = (asking || Promise.resolve()).then(read).catch(fail);
    return asking;
  };
  root.replaceChildren(h('div', { class: 'sy-page-head' }, h('h2', {}, 'Other servers')), list, form(again));
  on('remotes', again);
  on('resync', again);
  again();
}
