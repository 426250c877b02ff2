// Other forms of a model: GGUF by conversion, GPTQ by quantising, bitsandbytes while loading; and the conversions at work.

import { del, get, on, overtaken, post } from './api.js';
import { closeDialog, openDialog } from './dialog.js';
import { bytes, h } from './dom.js';
import { duration, progressBar } from './form.js';
import { icon } from './icons.js';
import { compare, loadModel, models, refreshModels } from './models.js';
import { fail, toast } from './toast.js';

const GGUF = [['Q4_K_M', 'small, hardly worse'], ['Q8_0', 'half of 16 bits, as good'], ['F16', '16 bits, as it is']];
const LOADED_SO = 'loaded so by Transformers; nothing is written';
export const FOUR_BITS = `${LOADED_SO}. For a GPU: on a CPU, GGUF and GPTQ answer many times faster`;
const FLOAT = ['F16', 'F32', 'BF16'];
const STATES = { queued: 'Waiting', running: 'Converting', done: 'Done', failed: 'Failed', cancelled: 'Stopped' };

/** By bitsandbytes, in 4 or 8 bits. */
export const loadInBits = (model, bits) => loadModel({ model: model.id, loader: 'transformers', options: { [`load_in_${bits}bit`]: true } });

/** [label, note, what it needs or null, run] for each form that can be had. */
export function otherForms(model) {
  const need = models.make || {};
  if (model.problem) return [];
  const gguf = (types) => types.map(([type, note]) => [`GGUF ${type}`, note, need.gguf, () => startConversion(model.id, type)]);
  if (model.plain) {
    return [
      ...gguf(GGUF),
      ['GPTQ 4 bits', 'groups of 128, calibrated with the bundled text', need.gptq, () => startQuantization(model.id)],
      ['bitsandbytes 4 bits', FOUR_BITS, need.bitsandbytes, () => loadInBits(model, 4)],
      ['bitsandbytes 8 bits', LOADED_SO, need.bitsandbytes, () => loadInBits(model, 8)],
    ];
  }
  if (model.format === 'gptq') return [['GGUF', 'with the same numbers', need.gguf, () => startConversion(model.id, 'auto')]];
  if (model.format === 'gguf' && (!model.quantization || FLOAT.includes(model.quantization.method))) return gguf(GGUF.filter(([type]) => type !== 'F16'));
  return [];
}

export async function makeOther(model) {
  const rows = otherForms(model).map(([label, note, needs, run]) => {
    const go = h('button', { type: 'button', class: 'sy-button', disabled: Boolean(needs), 'data-testid': `make-${label.replace(/\W+/g, '-').toLowerCase()}` }, label.startsWith('bitsandbytes') ? 'Load' : 'Make');
    go.addEventListener('click', () => {
      closeDialog('make-dialog');
      run();
    });
    return h('li', {}, h('span', {}, h('strong', {}, label), h('small', {}, ` ${needs || note}`)), go);
  });
  await openDialog({
    title: `Another form of ${model.id}`,
    body: h('div', {}, h('ul', { class: 'sy-trash' }, rows), h('p', { class: 'sy-hint' }, 'Made in the background beside the model, which stays. More choices are under Quantise and in server.py convert --help.')),
    wide: true,
    testid: 'make-dialog',
  });
}

export async function startConversion(model, type) {
  try {
    await post('conversions', { model, type });
  } catch (error) {
    fail(error);
  }
}

async function startQuantization(model) {
  try {
    await post('quantizations', { model, settings: {}, device: 'auto', name: null, overwrite: false });
    toast('Quantising in the background.', { action: { label: 'Follow it', run: () => window.switchyard.page('quantize') } });
  } catch (error) {
    fail(error);
  }
}

/** The conversions of this run of the server, above the list of models. */
export class MakeJobs {
  constructor() {
    this.jobs = new Map();
    this.element = h('div', { class: 'sy-jobs', 'data-testid': 'conversions' });
    on('conversion', (event) => this.#heard(event));
    on('quantization', (job) => job.state === 'done' && refreshModels());
    on('resync', () => this.refresh());
    this.refresh();
  }

  async refresh() {
    try {
      const { jobs } = await get('conversions');
      const known = this.jobs;
      this.jobs = new Map(jobs.map((job) => [job.id, overtaken(job, known.get(job.id)) ? known.get(job.id) : job]));
      this.#draw();
    } catch (error) {
      if (error.code !== 'offline') fail(error);
    }
  }

  #heard(event) {
    const known = this.jobs.get(event.id);
    if (event.state === 'forgotten') this.jobs.delete(event.id);
    else if (overtaken(event, known)) return;
    else this.jobs.set(event.id, event);
    if (event.state === 'done' && known?.state !== 'done') refreshModels().then(() => window.switchyard?.refreshControls());
    this.#draw();
  }

  #draw() {
    this.element.replaceChildren(...[...this.jobs.values()].sort((a, b) => b.created - a.created).map((job) => this.#card(job)));
  }

  #card(job) {
    const active = job.state === 'running' || job.state === 'queued';
    const lamp = { running: 'loading', queued: 'loading', done: 'ready', failed: 'failed' }[job.state] || 'empty';
    const act = (label, run, primary = false) => h('button', { type: 'button', class: `sy-button${primary ? ' sy-primary' : ''}`, onclick: run }, label);
    return h('article', { class: 'sy-card', 'data-testid': 'conversion', 'data-state': job.state },
      h('div', { class: 'sy-state', 'data-state': lamp }, h('span', { class: 'sy-lamp' }), h('strong', { dir: 'auto' }, job.name), h('span', { class: 'sy-badge' }, STATES[job.state])),
      h('p', { class: 'sy-hint' }, [`from ${job.model}`, job.stage, job.result ? `${bytes(job.result.size_bytes)}, ${duration(job.result.seconds)}` : null].filter(Boolean).join(' · ')),
      active ? progressBar(job.state === 'running' ? job.fraction : null, 'Converting') : '',
      job.error ? h('p', { class: 'sy-card-error', dir: 'auto' }, icon('warning', 16), ` ${[job.error.message, job.error.hint].filter(Boolean).join(' ')}`) : '',
      h('div', { class: 'sy-card-actions' },
        active ? act('Stop', () => post(`conversions/${job.id}/cancel`).catch(fail)) : '',
        job.state === 'done' ? act('Load and chat', async () => (await loadModel({ model: job.result.model })) && window.switchyard.page('chat'), true) : '',
        job.state === 'done' ? act('Compare with the original', () => compare([job.model, job.result.model])) : '',
        active ? '' : act('Remove from the list', () => del(`conversions/${job.id}`).catch(fail))));
  }
}
