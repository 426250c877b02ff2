// The Quantise page: settings with help, jobs in the background with progress per layer, and what to do with the result.

import { del, get, on, overtaken, post, put } from './api.js';
import { confirmDialog } from './dialog.js';
import { ago, bytes, h, plural } from './dom.js';
import { bar, button, duration, field, fileButton, numberInput, progressBar, select, textInput, tick } from './form.js';
import { icon } from './icons.js';
import { lossLegend, lossPlot } from './lossplot.js';
import { compare, loadModel, refreshModels } from './models.js';
import { fail, toast } from './toast.js';

const GROUP_WORDS = { '-1': 'One per column', 32: '32', 64: '64', 128: '128', 256: '256' };
const STATES = { queued: 'Waiting', running: 'Running', done: 'Done', failed: 'Failed', cancelled: 'Stopped', interrupted: 'Interrupted' };
const TICKS = [
  ['desc_act', 'Act-order', 'Quantise the inputs with the largest activations first: less is lost. Costs nothing later with static groups, a little speed without.'],
  ['sym', 'Symmetric', 'One zero point for all groups. Off: each group has its own, a little better and read by fewer kernels.'],
  ['true_sequential', 'True sequential', 'Within a block each layer sees the quantised ones before it.'],
  ['static_groups', 'Static groups', 'Fix all groups’ scales first, so that act-order keeps the groups in order.'],
  ['mse', 'Search the range', 'Try narrower grids for the least error: slower, better at 2 and 3 bits.'],
];

class QuantizePage {
  constructor(root) {
    this.jobs = new Map();
    this.form = h('section', { class: 'sy-card sy-tool-form', 'aria-label': 'New quantisation' });
    this.list = h('div', { class: 'sy-jobs', 'data-testid': 'quantize-jobs' });
    root.replaceChildren(
      h('div', { class: 'sy-page-head' }, h('h2', {}, 'Quantise')),
      h('p', { class: 'sy-hint' }, 'Make a GPTQ checkpoint: the weights in 2 to 8 bits, chosen so that each layer’s answers change least. It runs in the background, one block of the model in memory at a time, and goes on after a restart.'),
      this.form,
      h('div', { class: 'sy-page-head' }, h('h2', {}, 'Jobs')),
      this.list,
    );
    on('quantization', (job) => this.#heard(job));
    on('resync', () => this.refresh());
    on('models', () => this.#modelsChanged());
    this.refresh();
  }

  async refresh() {
    try {
      const data = await get('quantizations');
      this.data = data;
      const known = this.jobs;
      this.jobs = new Map(data.jobs.map((job) => [job.id, overtaken(job, known.get(job.id)) ? known.get(job.id) : job]));
      if (!this.drawn) this.#drawForm();
      else this.#fillModels();
      this.#drawJobs();
    } catch (error) {
      if (error.code !== 'offline') fail(error);
    }
  }

  #modelsChanged() {
    clearTimeout(this.later);
    this.later = setTimeout(() => this.refresh(), 1500);
  }

  // --- the form ---

  #drawForm() {
    this.drawn = true;
    const { defaults, choices } = this.data;
    const chosen = () => this.#chosen();
    this.model = select([], null, { testid: 'quantize-model' });
    this.model.addEventListener('change', chosen);
    this.bits = bar('Bits', choices.bits.map((bits) => [bits, bits]), defaults.bits, { testid: 'quantize-bits', onchange: chosen });
    this.group = bar('Group size', choices.group_size.map((size) => [size, GROUP_WORDS[size] ?? size]), defaults.group_size, { testid: 'quantize-group', onchange: chosen });
    this.method = bar('Method', [['gptq', 'GPTQ'], ['rtn', 'Round to nearest']], defaults.method, { testid: 'quantize-method', onchange: chosen });
    this.ticks = Object.fromEntries(TICKS.map(([name, label, note]) => [name, tick(label, defaults[name], { note, testid: `quantize-${name}`, onchange: chosen })]));
    this.calibration = select([], null, { testid: 'quantize-calibration' });
    this.nsamples = numberInput(defaults.nsamples, { min: 1, max: 100000 });
    this.seqlen = numberInput(defaults.seqlen, { min: 8, max: 1000000 });
    this.damp = numberInput(defaults.damp_percent, { min: 0.000001, max: 1, step: 'any' });
    this.device = select([['auto', 'Best there is'], ['cpu', 'CPU'], ['cuda', 'NVIDIA GPU']], 'auto');
    this.engine = select(choices.engine.map((name) => [name, name === 'switchyard' ? 'Switchyard' : name]), defaults.engine, { testid: 'quantize-engine' });
    this.engine.addEventListener('change', chosen);
    this.name = textInput('', { testid: 'quantize-name' });
    this.start = button('Quantise', () => this.#start(), true, 'quantize-start');
    this.calibrated = h('div', { class: 'sy-fields' },
      field('Calibration text', this.calibration, 'Best of the kind the model will see. The bundled sample suits the bundled model.'),
      h('div', { class: 'sy-field' }, h('span', { class: 'sy-label' }, 'A text of your own'), fileButton('Add a text…', '.txt,.md,.jsonl,text/plain', (name, text) => this.#addText(name, text), 'quantize-upload')),
      field('Windows', this.nsamples, 'Pieces of the text that are read.'),
      field('Tokens per window', this.seqlen),
    );
    this.form.replaceChildren(
      h('div', { class: 'sy-fields' }, field('Model', this.model, 'Safetensors folders in 16 or 32 bits.'), this.method, this.bits, this.group),
      h('div', { class: 'sy-ticks' }, Object.values(this.ticks)),
      this.calibrated,
      h('details', {}, h('summary', {}, 'More'), h('div', { class: 'sy-fields' }, field('Damping', this.damp, 'Share of the Hessian’s mean diagonal that is added to it.'), field('Compute on', this.device), field('Quantiser', this.engine, 'This product’s own, or the auto-gptq package where it is installed.'), field('Name of the result', this.name, 'A folder in the models folder.'))),
      h('div', { class: 'sy-card-actions' }, this.start),
    );
    this.#fillModels();
  }

  #fillModels() {
    const before = this.model.value;
    this.model.replaceChildren(...this.data.models.map((model) => h('option', { value: model.id }, `${model.id}${model.size_bytes ? ` (${bytes(model.size_bytes)})` : ''}`)));
    if (before && this.data.models.some((model) => model.id === before)) this.model.value = before;
    const text = this.calibration.value;
    this.calibration.replaceChildren(h('option', { value: 'bundled' }, 'Bundled sample'), ...this.data.calibration.map((name) => h('option', { value: name }, name)));
    if (this.data.calibration.includes(text)) this.calibration.value = text;
    this.start.disabled = !this.data.models.length;
    this.start.title = this.data.models.length ? '' : 'There is no model in 16 or 32 bits: put a safetensors folder into the models folder.';
    this.#suggestName();
  }

  // Only what can be combined is shown, and only what is shown counts.
  #chosen() {
    const gptq = this.method.value === 'gptq';
    this.calibrated.hidden = !gptq;
    for (const name of ['desc_act', 'true_sequential']) this.ticks[name].hidden = !gptq;
    this.ticks.static_groups.hidden = !gptq || Number(this.group.value) < 0;
    this.ticks.mse.hidden = this.engine.value === 'auto-gptq';
    this.#suggestName();
  }

  #suggestName() {
    const settings = this.#settings();
    const group = settings.group_size > 0 ? `-${settings.group_size}g` : '';
    const base = this.model.value.split('/').pop();
    this.name.placeholder = base ? `${base}-${settings.engine === 'switchyard' ? settings.method.toUpperCase() : 'AutoGPTQ'}-${settings.bits}bit${group}${settings.desc_act && !settings.static_groups && settings.group_size > 0 ? '-actorder' : ''}` : '';
  }

  #settings() {
    const gptq = this.method.value === 'gptq';
    const ticked = Object.fromEntries(Object.entries(this.ticks).map(([name, row]) => [name, !row.hidden && row.input.checked]));
    if (!gptq) ticked.true_sequential = true;
    return {
      method: this.method.value, bits: Number(this.bits.value), group_size: Number(this.group.value), ...ticked,
      nsamples: Number(this.nsamples.value), seqlen: Number(this.seqlen.value), damp_percent: Number(this.damp.value), engine: this.engine.value, calibration: this.calibration.value,
    };
  }

  async #addText(name, text) {
    try {
      const stem = name.replace(/\.(txt|md|jsonl)$/i, '');
      const kept = `${stem}.${/\.jsonl$/i.test(name) ? 'jsonl' : 'txt'}`;
      await put(`datasets/${encodeURIComponent(kept)}`, { text });
      await this.refresh();
      this.calibration.value = kept;
      toast(`${kept} is added.`, { level: 'success' });
    } catch (error) {
      fail(error);
    }
  }

  async #start(overwrite = false) {
    this.start.disabled = true;
    try {
      const { job } = await post('quantizations', { model: this.model.value, settings: this.#settings(), device: this.device.value, name: this.name.value.trim() || null, overwrite });
      this.#heard({ ...job, losses: [] });
      this.list.scrollIntoView({ block: 'nearest' });
    } catch (error) {
      if (error.code === 'conflict' && /exists/.test(error.message) && (await confirmDialog('Replace it?', `${error.message}`, 'Replace'))) {
        await this.#start(true);
        return;
      }
      fail(error);
    } finally {
      this.start.disabled = false;
    }
  }

  // --- jobs ---

  #heard(event) {
    if (event.state === 'forgotten') {
      this.jobs.delete(event.id);
      this.#drawJobs();
      return;
    }
    const known = this.jobs.get(event.id);
    if (overtaken(event, known)) return;
    const losses = known && event.count !== undefined ? known.losses : event.losses || [];
    const { count, ...job } = event;
    // The event brings the newest loss; where one was missed, the whole list is read again.
    if (known && count === losses.length + 1) losses.push(...event.losses);
    this.jobs.set(event.id, { ...job, losses });
    if (count !== undefined && count !== losses.length) this.#reread(event.id);
    if (known && known.state !== event.state && event.state === 'done') refreshModels();
    this.#draw(event.id, !known || known.state !== event.state);
  }

  #reread(id) {
    clearTimeout(this.rereading);
    this.rereading = setTimeout(async () => {
      try {
        const { job } = await get(`quantizations/${id}`);
        if (overtaken(job, this.jobs.get(id))) return;
        this.jobs.set(id, job);
        this.#draw(id, true);
      } catch (error) {
        if (error.code !== 'offline' && error.code !== 'not_found') fail(error);
      }
    }, 300);
  }

  #drawJobs() {
    const jobs = [...this.jobs.values()].sort((a, b) => b.created - a.created);
    this.list.replaceChildren(...(jobs.length ? jobs.map((job) => this.#card(job)) : [h('p', { class: 'sy-hint' }, 'Nothing has been quantised here yet.')]));
  }

  #draw(id, whole) {
    const card = this.list.querySelector(`[data-job="${id}"]`);
    if (!card || whole) {
      const focused = card?.contains(document.activeElement);
      this.#drawJobs();
      if (focused) this.list.querySelector(`[data-job="${id}"] button`)?.focus();
      return;
    }
    const job = this.jobs.get(id);
    card.querySelector('.sy-job-live').replaceWith(this.#live(job));
    cancelAnimationFrame(this.plotting);
    this.plotting = requestAnimationFrame(() => card.querySelector('.sy-job-plot')?.replaceChildren(...this.#plot(job)));
  }

  #live(job) {
    const left = job.eta_s === null || job.eta_s === undefined ? '' : `about ${duration(job.eta_s)} left`;
    const place = job.blocks ? `block ${job.block} of ${job.blocks}` : '';
    return h('div', { class: 'sy-job-live', role: 'status' },
      job.state === 'running' || job.state === 'queued' ? progressBar(job.state === 'running' ? job.fraction : null, 'Quantising') : '',
      h('p', { class: 'sy-hint', 'data-testid': 'quantize-stage' }, [place, job.stage, left].filter(Boolean).join(' · ')),
    );
  }

  #plot(job) {
    return job.losses.length ? [h('p', { class: 'sy-plot-title' }, 'Loss per layer: squared error over squared output'), lossPlot(job.losses, job.blocks), lossLegend(job.losses)] : [];
  }

  #card(job) {
    const { settings } = job;
    const name = job.out.split(/[\\/]/).pop();
    const facts = [job.model, `${settings.bits} bits`, settings.group_size > 0 ? `groups of ${settings.group_size}` : 'one scale per column', settings.method === 'rtn' ? 'rounded to nearest' : null, settings.desc_act ? 'act-order' : null, ago(job.created)];
    const lamp = { running: 'loading', queued: 'loading', done: 'ready', failed: 'failed' }[job.state] || 'empty';
    const stopped = ['cancelled', 'interrupted', 'failed'].includes(job.state);
    const act = (path) => post(`quantizations/${job.id}/${path}`).catch(fail);
    return h('article', { class: 'sy-card', 'data-testid': 'quantize-job', 'data-job': job.id, 'data-state': job.state },
      h('div', { class: 'sy-state', 'data-state': lamp }, h('span', { class: 'sy-lamp' }), h('strong', { dir: 'auto' }, name), h('span', { class: 'sy-badge' }, STATES[job.state] || job.state)),
      h('p', { class: 'sy-hint' }, facts.filter(Boolean).join(' · ')),
      this.#live(job),
      job.error ? h('p', { class: 'sy-card-error', dir: 'auto' }, icon('warning', 16), ` ${[job.error.message, job.error.hint].filter(Boolean).join(' ')}`) : '',
      job.result ? h('p', {}, `${bytes(job.result.size_bytes)}, ${plural(job.result.layers, 'layer')}, mean loss ${job.result.mean_loss.toExponential(2)}, ${duration(job.result.seconds)}.`) : '',
      job.notes.length ? h('details', {}, h('summary', {}, plural(job.notes.length, 'note')), h('ul', {}, job.notes.map((note) => h('li', {}, note)))) : '',
      h('div', { class: 'sy-job-plot' }, this.#plot(job)),
      h('div', { class: 'sy-card-actions' },
        job.state === 'running' || job.state === 'queued' ? button('Stop', () => act('cancel'), false, 'quantize-cancel') : '',
        stopped ? button('Resume', () => act('resume'), true, 'quantize-resume') : '',
        job.state === 'done' ? button('Load and chat', () => this.#chat(job), true, 'quantize-chat') : '',
        job.state === 'done' ? button('Compare with the original', () => compare([job.model, job.result.model]), false, 'quantize-evaluate') : '',
        stopped || job.state === 'done' ? button('Remove from the list', () => this.#forget(job)) : '',
      ),
    );
  }

  async #chat(job) {
    if (await loadModel({ model: job.result.model })) window.switchyard.page('chat');
  }

  async #forget(job) {
    const words = 'The blocks that are done are deleted with it.';
    if (job.state !== 'done' && !(await confirmDialog('Give this one up?', words, 'Remove'))) return;
    await del(`quantizations/${job.id}`).catch(fail);
  }
}

/** Called by Gradio when the component is on the page. */
export function mount({ element }) {
  const root = element.querySelector('.sy-quantize');
  if (root.dataset.mounted) return;
  root.dataset.mounted = '1';
  root.classList.add('sy-models', 'sy-tool');
  new QuantizePage(root);
}
