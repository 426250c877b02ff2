// One model on the models page: what it is, what takes it and why others don't, and what can be done with it.

import { openMenu } from './dialog.js';
import { bytes, h } from './dom.js';
import { button } from './form.js';
import { showFit } from './fit.js';
import { icon } from './icons.js';
import { InstallProgress } from './installs.js';
import { compare, loadModel, models } from './models.js';
import { openFolder, renameModel, trashModel } from './modelactions.js';
import { editSettings } from './modelsettings.js';
import { FOUR_BITS, loadInBits, makeOther, otherForms } from './makes.js';

const FORMATS = { hf: 'Safetensors', gguf: 'GGUF', gptq: 'GPTQ', awq: 'AWQ', exl2: 'EXL2', exl3: 'EXL3', rwkv: 'RWKV', flexgen: 'FlexGen', lora: 'LoRA', remote: 'Remote', echo: 'Echo', unknown: 'Unknown' };

function parameters(count) {
  if (!count) return null;
  if (count >= 1e9) return `${(count / 1e9).toFixed(1)} B parameters`;
  return `${(count / 1e6).toFixed(count < 1e8 ? 1 : 0)} M parameters`;
}

function quantization(found) {
  if (!found) return null;
  const method = /^[a-z]+$/.test(found.method) ? found.method.toUpperCase() : found.method;
  const bits = found.bits && !/\d/.test(method) ? ` ${found.bits} bits` : '';
  return `${method}${bits}${found.group_size > 0 ? `, groups of ${found.group_size}` : ''}`;
}

/** "Why not" the `others`: each backend in a line, with a button where only its installation is missing. Drawn when it is opened. */
function reasons(others, some) {
  const other = others.length === 1 ? 'the other backend' : `the other ${others.length} backends`;
  const list = h('ul');
  const box = h('details', { 'data-testid': 'why-not' }, h('summary', {}, some ? `Why not ${other}?` : 'Why can no backend load it?'), list);
  box.addEventListener('toggle', () => {
    if (!box.open || list.childElementCount) return;
    list.append(...others.map((loader) => h('li', {}, h('strong', {}, loader.title), `: ${loader.reason}`, loader.installed ? '' : installRow(loader.name))));
  });
  return box;
}

function installRow(name) {
  const loader = models.loaders.find((item) => item.name === name);
  return loader?.installable ? new InstallProgress(name, loader.overlay).element : '';
}

function menu(model, anchor) {
  const own = !model.bundled && !['echo', 'remote'].includes(model.format);
  const loadable = model.loaders.some((loader) => loader.ok);
  const items = [];
  if (model.format !== 'echo' && model.format !== 'remote' && !model.problem) items.push({ label: 'What fits on this machine', icon: 'gauge', run: () => showFit(model) });
  if (!model.problem) items.push({ label: 'Settings', icon: 'gear', run: () => editSettings(model) });
  if (otherForms(model).length) items.push({ label: 'Make another form', icon: 'layers', run: () => makeOther(model) });
  if (loadable) items.push({ label: 'Compare', icon: 'batch', run: () => compare(family(model)) });
  if (models.can_open && model.format !== 'echo' && model.format !== 'remote') items.push({ label: 'Open the folder', icon: 'right', run: () => openFolder(model) });
  if (own) items.push({ label: 'Rename', icon: 'edit', run: () => renameModel(model) });
  if (own) items.push({ label: 'Delete', icon: 'trash', danger: true, run: () => trashModel(model) });
  openMenu(anchor, items, `More for ${model.id}`);
}

/** This model and what was made of it, by name: Wren, Wren-Q8_0.gguf, Wren-GPTQ-4bit-128g. */
function family(model) {
  const stem = (id) => id.split('/').pop().replace(/\.gguf$/, '');
  const names = [stem(model.id), stem(model.id).replace(/-(GPTQ|RTN|AutoGPTQ)-.*$|[-.](F32|F16|BF16|I?Q\d\w*)$/i, '')];
  const same = models.list.filter((other) => other.id !== model.id && other.loaders.some((loader) => loader.ok) && (stem(other.id) === names[1] || stem(other.id).startsWith(`${names[1]}-`)));
  return [model.id, ...same.map((other) => other.id)];
}

function inFourBits(model) {
  const go = button('In 4 bits', () => loadInBits(model, 4), false, 'load-4bit');
  go.title = `In 4 bits: ${FOUR_BITS}.`;
  return go;
}

export function modelCard(model) {
  const backends = model.loaders || [];
  const usable = backends.filter((loader) => loader.ok);
  const others = backends.filter((loader) => !loader.ok);
  const facts = [
    model.architecture,
    quantization(model.quantization),
    parameters(model.parameters),
    model.context_length ? `context ${model.context_length.toLocaleString('en')}` : null,
    model.size_bytes ? bytes(model.size_bytes) : null,
    model.vision ? (model.projector ? `reads images (${model.projector})` : 'reads images') : null,
    model.license ? `licence ${model.license}` : null,
    model.has_chat_template ? 'chat template' : model.format === 'lora' || model.problem ? null : 'no chat template',
  ];
  const more = h('button', { type: 'button', class: 'sy-icon-button', 'aria-label': `More for ${model.id}`, 'aria-haspopup': 'menu', 'data-testid': 'model-more' }, icon('more', 20));
  more.addEventListener('click', () => menu(model, more));
  const offered = model.plain && usable.some((loader) => loader.name === 'transformers');
  return h(
    'li',
    { class: 'sy-card sy-model', 'data-testid': 'model-row', 'data-model': model.id },
    h('div', { class: 'sy-model-head' }, h('strong', { dir: 'auto' }, model.id), h('span', { class: 'sy-badge' }, FORMATS[model.format] || model.format), model.bundled ? h('span', { class: 'sy-badge' }, 'bundled') : '', more),
    h('p', { class: 'sy-hint' }, facts.filter(Boolean).join(' · ')),
    model.problem ? h('p', { class: 'sy-card-error', dir: 'auto' }, icon('warning', 16), ` ${model.problem}`) : '',
    h('div', { class: 'sy-card-actions' },
      usable.map((loader, at) => button(at === 0 ? `Load with ${loader.title}` : loader.title, () => loadModel({ model: model.id, loader: loader.name }), at === 0)),
      offered && !models.make?.bitsandbytes ? inFourBits(model) : ''),
    others.length ? reasons(others, usable.length > 0) : '',
  );
}
