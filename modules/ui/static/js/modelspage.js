// The models page: what is in memory and what can be loaded.

import { post } from './api.js';
import { bytes, h } from './dom.js';
import { icon } from './icons.js';
import { loaderTitle, loadModel, modelName, models, refreshModels, unloadModel, watchModels } from './models.js';
import { fail } from './toast.js';

export const button = (label, run, primary = false, testid = null) =>
  h('button', { type: 'button', class: `sy-button${primary ? ' sy-primary' : ''}`, onclick: run, 'data-testid': testid }, label);

const STATES = { loading: 'Loading', ready: 'Ready', unloading: 'Unloading', failed: 'Failed' };

function residentCard(resident) {
  const facts = [
    loaderTitle(resident.loader),
    resident.memory_bytes ? `uses ${bytes(resident.memory_bytes)}` : null,
    resident.memory_before && resident.memory_after ? `memory before ${bytes(resident.memory_before)}, after ${bytes(resident.memory_after)}` : null,
    resident.info?.context_length ? `context ${resident.info.context_length} tokens` : null,
    resident.active_requests ? `${resident.active_requests} running` : null,
    resident.queued ? `${resident.queued} waiting` : null,
  ];
  const active = resident.id === models.active;
  const actions = [];
  if (resident.state === 'ready' && !active) actions.push(button('Use for chats', () => post('models/activate', { resident: resident.id }).catch(fail)));
  if (resident.state === 'ready') actions.push(button('Unload', () => unloadModel({ resident: resident.id })));
  if (resident.state === 'failed') actions.push(button('Load again', () => loadModel({ model: modelName(resident), loader: resident.loader })));
  return h(
    'div',
    { class: 'sy-card', 'data-testid': 'resident' },
    h('div', { class: 'sy-state', 'data-state': resident.state }, h('span', { class: 'sy-lamp' }), h('strong', { dir: 'auto' }, modelName(resident)),
      h('span', { class: 'sy-badge' }, active && resident.state === 'ready' ? 'Chats use it' : STATES[resident.state] || resident.state)),
    h('p', { class: 'sy-hint' }, facts.filter(Boolean).join(' · ')),
    resident.error ? h('p', { class: 'sy-card-error', dir: 'auto' }, [resident.error.message, resident.error.hint].filter(Boolean).join(' ')) : '',
    h('div', { class: 'sy-card-actions' }, actions),
  );
}

function modelRow(model) {
  const backends = model.loaders || [];
  const usable = backends.filter((loader) => loader.ok);
  const facts = [
    model.architecture,
    model.quantization?.method,
    model.parameters ? `${(model.parameters / 1e6).toFixed(model.parameters < 1e8 ? 1 : 0)} M parameters` : null,
    model.context_length ? `context ${model.context_length}` : null,
    model.size_bytes ? bytes(model.size_bytes) : null,
  ];
  const reasons = backends.filter((loader) => !loader.ok);
  return h(
    'li',
    { class: 'sy-card', 'data-testid': 'model-row', 'data-model': model.id },
    h('div', { class: 'sy-model-head' }, h('strong', { dir: 'auto' }, model.id), h('span', { class: 'sy-badge' }, model.format.toUpperCase()), model.bundled ? h('span', { class: 'sy-badge' }, 'bundled') : ''),
    h('p', { class: 'sy-hint' }, facts.filter(Boolean).join(' · ')),
    model.problem ? h('p', { class: 'sy-card-error', dir: 'auto' }, icon('warning', 16), ` ${model.problem}`) : '',
    h('div', { class: 'sy-card-actions' }, usable.map((loader, at) => button(at === 0 ? `Load with ${loader.title}` : loader.title, () => loadModel({ model: model.id, loader: loader.name }), at === 0))),
    reasons.length
      ? h('details', {}, h('summary', {}, `Why not the other ${reasons.length === 1 ? 'backend' : `${reasons.length} backends`}?`), h('ul', {}, reasons.map((loader) => h('li', {}, h('strong', {}, loader.title), `: ${loader.reason}`))))
      : '',
  );
}

export function mount({ element }) {
  const root = element.querySelector('.sy-models');
  if (root.dataset.mounted) return;
  root.dataset.mounted = '1';
  const memory = h('span', { class: 'sy-hint' });
  const residents = h('div', { class: 'sy-cards' });
  const list = h('ul', { class: 'sy-cards' });
  root.replaceChildren(
    h('div', { class: 'sy-page-head' }, h('h2', {}, 'In memory'), memory),
    residents,
    h('div', { class: 'sy-page-head' }, h('h2', {}, 'Models'), button('Refresh', () => refreshModels().then(() => window.switchyard?.refreshControls()), false, 'refresh-models')),
    list,
  );
  watchModels(() => {
    const { total, available } = models.memory || {};
    memory.textContent = total ? `${bytes(available)} of ${bytes(total)} free on this machine` : '';
    residents.replaceChildren(...(models.residents.length ? models.residents.map(residentCard) : [h('p', { class: 'sy-hint' }, 'No model is loaded.')]));
    keepOpen(list, models.list.map(modelRow));
  });
}

/** Replace rows without closing what the reader has folded open. */
function keepOpen(list, rows) {
  const open = new Set([...list.querySelectorAll('li:has(details[open])')].map((row) => row.dataset.model));
  for (const row of rows) if (open.has(row.dataset.model)) row.querySelector('details')?.setAttribute('open', '');
  list.replaceChildren(...rows);
}
