// What fits on this machine: the planner's answer for one model, applied with one click.

import { get, post } from './api.js';
import { closeDialog, openDialog } from './dialog.js';
import { bytes, h } from './dom.js';
import { startConversion } from './makes.js';
import { loadModel } from './models.js';
import { fail, toast } from './toast.js';

const HOW = { load: 'Load', convert: 'Convert', quantize: 'Quantise', download: 'Download', install: 'Install' };

async function apply(model, fit) {
  if (fit.how === 'install') return window.switchyard.install(fit.loader);
  if (fit.how === 'convert') return startConversion(model.id, fit.quantization);
  if (fit.how === 'quantize') {
    await post('quantizations', { model: model.id, settings: {}, device: 'auto', name: null, overwrite: false });
    toast('Quantising in the background: see Quantise.');
    return window.switchyard.page('quantize');
  }
  return loadModel({ model: model.id, loader: fit.loader, options: fit.options });
}

function row(model, fit, gpu) {
  const use = h('button', { type: 'button', class: 'sy-button', 'data-testid': 'fit-apply', disabled: !fit.fits && fit.how === 'load' }, HOW[fit.how] || fit.how);
  use.addEventListener('click', async () => {
    closeDialog('fit-dialog');
    await Promise.resolve(apply(model, fit)).catch(fail);
  });
  return h('tr', { 'data-fits': fit.fits, 'data-testid': 'fit-row' },
    h('th', { scope: 'row' }, fit.title, h('small', {}, ` ${fit.quantization || 'as it is'}`)),
    h('td', { class: 'sy-number' }, fit.context_length ? `${fit.context_length.toLocaleString('en')} tokens` : '–', fit.cache_type ? h('small', {}, ` ${fit.cache_type}`) : ''),
    h('td', { class: 'sy-number' }, fit.ram_bytes === null ? '?' : bytes(fit.ram_bytes)),
    gpu ? h('td', { class: 'sy-number' }, fit.vram_bytes ? bytes(fit.vram_bytes) : '–') : '',
    h('td', { class: 'sy-number' }, fit.tokens_per_second === null ? '?' : `${fit.tokens_per_second < 10 ? fit.tokens_per_second.toFixed(1) : Math.round(fit.tokens_per_second)} tok/s`),
    h('td', {}, fit.reason),
    h('td', {}, use));
}

export async function showFit(model) {
  let plan;
  try {
    plan = await get(`models/plan?model=${encodeURIComponent(model.id)}`);
  } catch (error) {
    fail(error);
    return;
  }
  const { machine, fits } = plan;
  const gpu = machine.gpus.length > 0;
  const facts = [`${bytes(machine.ram_available_bytes)} of ${bytes(machine.ram_bytes)} memory free`, ...machine.gpus.map((gpu) => `${gpu.name}, ${bytes(gpu.free_bytes)} free`), `${bytes(machine.disk_free_bytes)} disk free`, `${machine.cores} cores`];
  const columns = ['Backend', 'Context', 'Memory', gpu ? 'GPU' : null, 'Speed', 'Why', ''].filter((name) => name !== null);
  const numbers = new Set(['Context', 'Memory', 'GPU', 'Speed']);
  await openDialog({
    title: `${model.id} on this machine`,
    body: h('div', { class: 'sy-models sy-tool' },
      h('p', { class: 'sy-hint' }, facts.join(' · ')),
      fits.length
        ? h('div', { class: 'sy-table-scroll', tabindex: '0', role: 'region', 'aria-label': 'What fits' }, h('table', { class: 'sy-table' }, h('thead', {}, h('tr', {}, columns.map((name) => h('th', { scope: 'col', class: numbers.has(name) ? 'sy-number' : '' }, name)))), h('tbody', {}, fits.map((fit) => row(model, fit, gpu)))))
        : h('p', {}, 'No backend can take this model.'),
      h('p', { class: 'sy-hint' }, 'Estimated from the headers, without loading. A question mark: not known.')),
    wide: true,
    testid: 'fit-dialog',
  });
}
