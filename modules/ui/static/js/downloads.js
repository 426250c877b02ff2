// Downloads: look into a repository, choose a form of the model, follow what is on its way; the hub, its proxy and token.

import { del, get, on, overtaken, post, put } from './api.js';
import { confirmDialog, openDialog } from './dialog.js';
import { bytes, h, plural } from './dom.js';
import { button, duration, field, progressBar, textInput, tick } from './form.js';
import { icon } from './icons.js';
import { loadModel, refreshModels } from './models.js';
import { fail, toast } from './toast.js';

const STATES = { queued: 'Waiting', running: 'Downloading', paused: 'Paused', done: 'Done', failed: 'Failed', cancelled: 'Cancelled' };
const LEVELS = { fits: 'Fits', tight: 'Tight', no: 'Too large' };
const MANY = 200;

/** "owner/name" and the revision out of what was typed or pasted, an address of a hub's page included. */
export function parseRepository(text) {
  const path = text.trim().replace(/^[a-z]+:\/\/[^/]+\//i, '').replace(/[?#].*$/, '');
  const [owner, name, word, ...rest] = path.split('/').filter(Boolean);
  const branch = ['tree', 'blob', 'resolve'].includes(word) ? rest[0] : null;
  return { repository: name ? `${owner}/${name}` : owner || '', branch };
}

export class Downloads {
  constructor() {
    this.jobs = new Map();
    this.list = h('div', { class: 'sy-jobs', 'data-testid': 'downloads' });
    this.form = new DownloadForm((job) => this.#heard(job), () => this.refresh());
    this.element = h('div', { class: 'sy-downloads' }, this.form.element, this.list);
    on('download', (event) => this.#heard(event));
    on('resync', () => this.refresh());
    this.refresh();
  }

  open() {
    this.form.open();
  }

  async refresh() {
    try {
      const { jobs, hub } = await get('downloads');
      const known = this.jobs;
      this.jobs = new Map(jobs.map((job) => [job.id, overtaken(job, known.get(job.id)) ? known.get(job.id) : job]));
      this.form.hub(hub);
      this.#draw();
    } catch (error) {
      if (error.code !== 'offline') fail(error);
    }
  }

  #heard(job) {
    const known = this.jobs.get(job.id);
    if (job.state === 'forgotten') this.jobs.delete(job.id);
    else if (overtaken(job, known)) return;
    else this.jobs.set(job.id, job);
    if (job.state === 'done' && known?.state !== 'done') refreshModels().then(() => window.switchyard?.refreshControls());
    const card = this.list.querySelector(`[data-job="${job.id}"]`);
    if (card && known?.state === job.state) card.querySelector('.sy-job-live').replaceWith(live(job));
    else this.#draw();
  }

  #draw() {
    const focused = document.activeElement?.closest?.('[data-job]')?.dataset.job;
    const jobs = [...this.jobs.values()].sort((a, b) => b.created - a.created);
    this.list.replaceChildren(...jobs.map((job) => card(job, this.form)));
    if (focused) this.list.querySelector(`[data-job="${focused}"] button`)?.focus();
  }
}

function live(job) {
  const active = job.state === 'running' || job.state === 'queued';
  const words = [
    job.total_bytes ? `${bytes(job.done_bytes)} of ${bytes(job.total_bytes)}` : null,
    job.state === 'running' && job.speed ? `${bytes(job.speed)}/s` : null,
    job.state === 'running' && job.eta_s ? `about ${duration(job.eta_s)} left` : null,
    active && job.files_total ? `file ${Math.min(job.files_done + 1, job.files_total)} of ${job.files_total}` : null,
  ];
  return h('div', { class: 'sy-job-live' },
    active || job.state === 'paused' ? progressBar(job.total_bytes ? job.done_bytes / job.total_bytes : null, `Downloading ${job.repository}`) : '',
    h('p', { class: 'sy-hint', 'data-testid': 'download-progress' }, words.filter(Boolean).join(' · ')));
}

function card(job, form) {
  const lamp = { running: 'loading', queued: 'loading', done: job.problem ? 'failed' : 'ready', failed: 'failed' }[job.state] || 'empty';
  const act = (path) => post(`downloads/${job.id}/${path}`).catch(fail);
  const cancel = async () => {
    const words = job.done_bytes ? `${bytes(job.done_bytes)} that have arrived are deleted.` : 'Nothing has arrived yet.';
    if (await confirmDialog('Cancel the download?', words, 'Cancel the download')) await act('cancel');
  };
  const skipped = Object.entries(job.skipped);
  const left = ['queued', 'running', 'paused', 'failed'].includes(job.state);
  const nothing = job.state === 'failed' && !job.done_bytes && !job.fetched.length;
  return h('article', { class: 'sy-card', 'data-testid': 'download', 'data-job': job.id, 'data-state': job.state },
    h('div', { class: 'sy-state', 'data-state': lamp }, h('span', { class: 'sy-lamp' }), h('strong', { dir: 'auto' }, job.repository), h('span', { class: 'sy-badge' }, STATES[job.state]), job.branch ? h('span', { class: 'sy-badge', dir: 'auto' }, job.branch) : ''),
    job.files.length ? h('p', { class: 'sy-hint', dir: 'auto' }, job.files.slice(0, 3).join(', ') + (job.files.length > 3 ? ` and ${job.files.length - 3} more` : '')) : '',
    live(job),
    job.error ? h('p', { class: 'sy-card-error', dir: 'auto' }, icon('warning', 16), ` ${[job.error.message, job.error.hint].filter(Boolean).join(' ')}`) : '',
    job.problem ? h('p', { class: 'sy-card-error', dir: 'auto' }, icon('warning', 16), ` It is here, but can’t be loaded: ${job.problem}`) : '',
    skipped.length ? h('details', { 'data-testid': 'download-skipped' }, h('summary', {}, `${plural(skipped.length, 'file')} left out`), h('ul', {}, skipped.slice(0, MANY).map(([path, reason]) => h('li', { dir: 'auto' }, h('strong', {}, path), `: ${reason}`)))) : '',
    h('div', { class: 'sy-card-actions' },
      job.state === 'running' || job.state === 'queued' ? button('Pause', () => act('pause'), false, 'download-pause') : '',
      job.state === 'paused' ? button('Resume', () => act('resume'), true, 'download-resume') : '',
      job.state === 'failed' || job.state === 'cancelled' ? button('Try again', () => act('resume'), true, 'download-resume') : '',
      job.error?.detail?.gated ? button('Give a token…', () => form.editHub()) : '',
      left && !nothing ? button('Cancel', cancel, false, 'download-cancel') : '',
      job.state === 'done' && !job.problem ? button('Load and chat', async () => (await loadModel({ model: job.model })) && window.switchyard.page('chat'), true, 'download-load') : '',
      left && !nothing ? '' : button('Remove from the list', () => del(`downloads/${job.id}`).catch(fail), false, 'download-forget')));
}

class DownloadForm {
  constructor(started, again) {
    this.started = started;
    this.again = again;
    this.repository = textInput('', { placeholder: 'owner/name, or the address of its page', testid: 'download-repository', maxlength: 500 });
    this.branch = textInput('', { placeholder: 'main', testid: 'download-branch' });
    this.branches = h('datalist', { id: 'sy-revisions' });
    this.branch.setAttribute('list', 'sy-revisions');
    this.look = h('button', { type: 'submit', class: 'sy-button sy-primary', 'data-testid': 'download-look' }, 'Look');
    this.hubWords = h('p', { class: 'sy-hint', 'data-testid': 'download-hub' });
    this.result = h('div', { 'data-testid': 'download-found', 'aria-live': 'polite' });
    this.problem = h('p', { class: 'sy-card-error', role: 'alert', hidden: true, dir: 'auto' });
    const form = h('form', { class: 'sy-fields', onsubmit: (event) => { event.preventDefault(); this.#look(); } },
      field('Repository', this.repository), field('Branch, tag or commit', this.branch), h('div', { class: 'sy-look' }, this.look));
    this.repository.addEventListener('change', () => this.#parse());
    this.branch.addEventListener('focus', () => this.#revisions());
    this.element = h('section', { class: 'sy-card sy-tool', hidden: true, 'aria-label': 'Download a model', 'data-testid': 'download-form' },
      h('div', { class: 'sy-model-head' }, h('h3', {}, 'Download a model'), h('button', { type: 'button', class: 'sy-icon-button', 'aria-label': 'Close the download form', onclick: () => (this.element.hidden = true) }, icon('close', 18))),
      form, this.branches, h('div', { class: 'sy-hub' }, this.hubWords, button('Hub, token, proxy…', () => this.editHub(), false, 'download-hub-edit')), this.problem, this.result);
  }

  open() {
    this.element.hidden = false;
    this.repository.focus();
  }

  hub(hub) {
    this.at = hub;
    const token = { saved: 'with your token', environment: 'with the token of the environment' }[hub.token] || 'without a token';
    this.hubWords.textContent = hub.problem || `From ${hub.endpoint}, ${token}${hub.proxy ? `, through ${hub.proxy}` : ''}.`;
  }

  #parse() {
    const { repository, branch } = parseRepository(this.repository.value);
    this.repository.value = repository;
    if (branch) this.branch.value = branch;
    return repository;
  }

  async #revisions() {
    const repository = this.#parse();
    if (!repository || repository === this.known) return;
    this.known = repository;
    try {
      const { revisions } = await post('downloads/revisions', { repository });
      this.branches.replaceChildren(...revisions.map((name) => h('option', { value: name })));
    } catch (error) {
      // The list only helps to type; Look says what is wrong.
      if (error.code === 'offline') fail(error);
    }
  }

  async #look() {
    const repository = this.#parse();
    if (!repository) return;
    this.look.disabled = true;
    this.problem.hidden = true;
    this.result.replaceChildren(progressBar(null, 'Looking'));
    try {
      const found = await post('downloads/look', { repository, branch: this.branch.value.trim() || null });
      this.result.replaceChildren(...this.#found(found));
    } catch (error) {
      this.result.replaceChildren();
      this.problem.textContent = error.message;
      this.problem.hidden = false;
    } finally {
      this.look.disabled = false;
    }
  }

  #found(found) {
    if (found.problem) return [h('p', { class: 'sy-card-error', dir: 'auto' }, icon('warning', 16), ` ${found.problem}`), skippedList(found)];
    const sizes = new Map(found.files.map((file) => [file.path, file.size]));
    const usual = new Set(found.chosen);
    const ticks = [];
    const go = button('Download', () => this.#start(found, ticks), true, 'download-start');
    const total = h('span', { class: 'sy-hint', 'data-testid': 'download-total' });
    const count = () => {
      const paths = new Set(ticks.filter((row) => row.input.checked).flatMap((row) => row.files));
      const size = [...paths].reduce((sum, path) => sum + (sizes.get(path) || 0), 0);
      go.disabled = !paths.size;
      const free = found.free_bytes;
      total.textContent = paths.size ? `${bytes(size)}${free ? `; the disk has ${bytes(free)} free` : ''}` : 'Choose at least one.';
      total.classList.toggle('sy-card-error', Boolean(free && size > free));
    };
    // With a GGUF its projector comes along, until the user decides about projectors.
    let decided = false;
    const isProjector = (row) => row.files.every((path) => /mmproj[^/]*\.gguf$/i.test(path));
    const changed = (row) => {
      if (isProjector(row)) decided = true;
      else if (!decided && found.projector) {
        const wanted = ticks.some((other) => other.input.checked && !isProjector(other) && other.files.some((path) => path.endsWith('.gguf')));
        for (const other of ticks) if (other.files.includes(found.projector)) other.input.checked = wanted;
      }
      count();
    };
    const rows = found.variants.map((variant) => {
      const row = tick(variant.label, variant.files.some((path) => usual.has(path)), { onchange: () => changed(row), testid: 'download-variant' });
      row.files = variant.files;
      ticks.push(row);
      return h('tr', { 'data-variant': variant.label }, h('th', { scope: 'row' }, row), h('td', { class: 'sy-number' }, bytes(variant.size_bytes)),
        h('td', {}, variant.verdict ? [h('span', { class: 'sy-verdict', 'data-level': variant.verdict.level }, LEVELS[variant.verdict.level]), ` ${variant.verdict.reason}`] : ''));
    });
    const inVariants = new Set(found.variants.flatMap((variant) => variant.files));
    const others = found.files.filter((file) => !inVariants.has(file.path) && !found.skipped[file.path] && /\.(safetensors|gguf)$/.test(file.path));
    const single = others.map((file) => {
      const row = tick(`${file.path} (${bytes(file.size)})`, false, { onchange: count });
      row.files = [file.path];
      ticks.push(row);
      return row;
    });
    count();
    return [
      h('p', { class: 'sy-hint' }, `${found.repository} at ${found.commit.slice(0, 12)}, ${plural(found.files.length + found.left_out, 'file')}. Configuration, tokenizer and licence come along${found.projector ? '; so does, with a GGUF, the projector that reads images' : ''}.`),
      h('div', { class: 'sy-table-scroll', tabindex: '0', role: 'region', 'aria-label': 'Forms of the model' }, h('table', { class: 'sy-table' }, h('thead', {}, h('tr', {}, h('th', { scope: 'col' }, 'Form'), h('th', { scope: 'col', class: 'sy-number' }, 'Size'), h('th', { scope: 'col' }, 'On this machine'))), h('tbody', {}, rows))),
      single.length ? h('details', {}, h('summary', {}, `Other weights (${single.length})`), single.slice(0, MANY)) : '',
      skippedList(found),
      h('div', { class: 'sy-card-actions' }, go, total),
    ];
  }

  async #start(found, ticks) {
    const chosen = [...new Set(ticks.filter((row) => row.input.checked).flatMap((row) => row.files))];
    const usual = found.chosen.filter((path) => /\.(safetensors|gguf)$/.test(path));
    const files = chosen.length === usual.length && chosen.every((path) => usual.includes(path)) ? [] : chosen;
    try {
      const { job } = await post('downloads', { repository: found.repository, branch: this.branch.value.trim() || null, commit: found.commit, files });
      this.started(job);
      this.result.replaceChildren();
      this.element.hidden = true;
    } catch (error) {
      fail(error);
    }
  }

  async editHub() {
    const hub = this.at || {};
    const endpoint = textInput(hub.own_endpoint ? hub.endpoint : '', { placeholder: hub.endpoint || 'https://…', maxlength: 500, testid: 'hub-endpoint' });
    const proxy = textInput('', { placeholder: hub.proxy || 'none, or the environment’s', maxlength: 500, testid: 'hub-proxy' });
    const token = h('input', { type: 'password', class: 'sy-input', autocomplete: 'off', maxlength: 500, placeholder: hub.token === 'saved' ? 'one is saved' : '', 'data-testid': 'hub-token' });
    const forget = tick('Forget the saved token', false, { disabled: hub.token !== 'saved' });
    const direct = tick('Forget the saved proxy', false, { disabled: !hub.own_proxy });
    const chosen = await openDialog({
      title: 'Hub',
      body: h('div', { class: 'sy-models sy-tool' },
        field('Address of a mirror', endpoint, 'Empty: the address the server was started with.'),
        field('Token', token, 'For gated and private models. It is kept on the server, readable by you alone, is sent to this hub and no other, and is not shown again.'), forget,
        field('Proxy', proxy, 'Such as http://proxy.example.org:3128.'), direct),
      actions: [{ label: 'Cancel', value: null }, { label: 'Save', value: 'save', primary: true }],
      testid: 'hub-dialog',
    });
    if (!chosen) return;
    const changes = {};
    if (endpoint.value.trim() !== (hub.own_endpoint ? hub.endpoint : '')) changes.endpoint = endpoint.value.trim() || null;
    if (token.value) changes.token = token.value;
    else if (forget.input.checked) changes.token = null;
    if (proxy.value.trim()) changes.proxy = proxy.value.trim();
    else if (direct.input.checked) changes.proxy = null;
    try {
      const answer = await put('downloads/hub', changes);
      this.hub(answer.hub);
      toast('Saved.', { level: 'success' });
    } catch (error) {
      fail(error);
    }
  }
}

function skippedList(found) {
  const skipped = Object.entries(found.skipped);
  return skipped.length ? h('details', { 'data-testid': 'look-skipped' }, h('summary', {}, `${plural(skipped.length, 'file')} left out`), h('ul', {}, skipped.slice(0, MANY).map(([path, reason]) => h('li', { dir: 'auto' }, h('strong', {}, path), `: ${reason}`)))) : '';
}
