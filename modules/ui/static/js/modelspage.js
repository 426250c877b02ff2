// The models page: what is in memory, what can be loaded, what is being fetched or made.

import { post } from './api.js';
import { bytes, debounce, h, plural } from './dom.js';
import { Downloads } from './downloads.js';
import { button, select, textInput } from './form.js';
import { loaderTitle, loadModel, modelName, models, refreshModels, unloadModel, watchModels } from './models.js';
import { modelCard } from './modelcard.js';
import { importSettings, showTrash } from './modelactions.js';
import { MakeJobs } from './makes.js';
import { fail } from './toast.js';

const STATES = { loading: 'Loading', ready: 'Ready', unloading: 'Unloading', failed: 'Failed' };
// So many cards at a time: a thousand models must not hold the page up.
const SHOWN = 60;
const ORDERS = { name: (a, b) => a.id.localeCompare(b.id), large: (a, b) => b.size_bytes - a.size_bytes, small: (a, b) => a.size_bytes - b.size_bytes };

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

class ModelList {
  constructor() {
    this.shown = SHOWN;
    this.filter = textInput('', { placeholder: 'Find a model: name, format, architecture', testid: 'model-filter' });
    this.filter.type = 'search';
    this.filter.setAttribute('aria-label', 'Find a model');
    this.filter.addEventListener('input', debounce(() => this.#again(), 120));
    this.order = select([['name', 'By name'], ['large', 'Largest first'], ['small', 'Smallest first']], 'name', { testid: 'model-order' });
    this.order.setAttribute('aria-label', 'Order');
    this.order.addEventListener('change', () => this.#again());
    this.count = h('span', { class: 'sy-hint', role: 'status', 'data-testid': 'model-count' });
    this.cards = h('ul', { class: 'sy-cards' });
    this.more = button('Show more', () => this.#more(), false, 'more-models');
    this.element = h('div', {}, h('div', { class: 'sy-find' }, this.filter, this.order, this.count), this.cards, this.more);
    // The button is what works without a pointer; scrolling to it is the same.
    new IntersectionObserver((entries) => entries.some((entry) => entry.isIntersecting) && this.#more()).observe(this.more);
  }

  #again() {
    this.shown = SHOWN;
    this.draw(models.list);
  }

  #more() {
    if (this.more.hidden) return;
    const from = this.shown;
    this.shown += SHOWN;
    this.cards.append(...this.found.slice(from, this.shown).map(modelCard));
    this.more.hidden = this.found.length <= this.shown;
  }

  draw(list) {
    const words = this.filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    const text = (model) => [model.id, model.format, model.architecture, model.quantization?.method, model.license].join(' ').toLowerCase();
    this.found = list.filter((model) => words.every((word) => text(model).includes(word))).sort(ORDERS[this.order.value]);
    this.count.textContent = words.length ? `${this.found.length} of ${plural(list.length, 'model')}` : plural(list.length, 'model');
    const open = new Set([...this.cards.querySelectorAll('li:has(details[open])')].map((row) => row.dataset.model));
    const focused = this.cards.contains(document.activeElement) ? [document.activeElement.closest('li')?.dataset.model, document.activeElement.dataset.testid] : null;
    this.cards.replaceChildren(...this.found.slice(0, this.shown).map(modelCard));
    for (const row of this.cards.children) if (open.has(row.dataset.model)) row.querySelector('details')?.setAttribute('open', '');
    if (focused?.[0] && focused[1]) this.cards.querySelector(`[data-model="${CSS.escape(focused[0])}"] [data-testid="${focused[1]}"]`)?.focus();
    this.more.hidden = this.found.length <= this.shown;
    if (!this.found.length) this.cards.replaceChildren(h('li', { class: 'sy-hint' }, words.length ? 'No model is called so.' : 'No model is here yet: download one above, or put files into the model folder.'));
  }
}

export function mount({ element }) {
  const root = element.querySelector('.sy-models');
  if (root.dataset.mounted) return;
  root.dataset.mounted = '1';
  const memory = h('span', { class: 'sy-hint' });
  const residents = h('div', { class: 'sy-cards' });
  const list = new ModelList();
  const downloads = new Downloads();
  const again = () => refreshModels().then(() => window.switchyard?.refreshControls());
  root.replaceChildren(
    h('div', { class: 'sy-page-head' }, h('h2', {}, 'In memory'), memory),
    residents,
    h('div', { class: 'sy-page-head' }, h('h2', {}, 'Models'),
      h('div', { class: 'sy-head-actions' },
        button('Download…', () => downloads.open(), true, 'download-open'),
        button('Import settings…', () => importSettings(), false, 'import-settings'),
        button('Trash', () => showTrash(), false, 'open-trash'),
        button('Refresh', again, false, 'refresh-models'))),
    downloads.element,
    new MakeJobs().element,
    list.element,
  );
  let drawn = null;
  watchModels(() => {
    const { total, available } = models.memory || {};
    memory.textContent = total ? `${bytes(available)} of ${bytes(total)} free on this machine` : '';
    residents.replaceChildren(...(models.residents.length ? models.residents.map(residentCard) : [h('p', { class: 'sy-hint' }, 'No model is loaded.')]));
    if (drawn === models.list) return; // a load's progress changes nothing here
    drawn = models.list;
    list.draw(models.list);
  });
}
