// The saved settings of one model: which backend, and its load options; kept on the server, for this model alone.

import { del, get, put } from './api.js';
import { openDialog } from './dialog.js';
import { h } from './dom.js';
import { field, numberInput, select, textInput, tick } from './form.js';
import { loadModel, models } from './models.js';
import { fail, toast } from './toast.js';

const WORDS = { ctx: 'context', gpu: 'GPU', cpu: 'CPU', lora: 'LoRA', kv: 'KV', swa: 'SWA', numa: 'NUMA', attn: 'attention' };
const label = (name) => {
  const text = name.split('_').map((word) => WORDS[word] || word).join(' ');
  return text[0].toUpperCase() + text.slice(1);
};

/** [element, read]: one option as a native control; `read` gives its value, null for the default. */
function control(option, value) {
  const testid = `setting-${option.name}`;
  if (option.kind === 'bool') {
    const row = tick(label(option.name), Boolean(value), { note: option.help, testid });
    return [row, () => row.input.checked];
  }
  if (option.kind === 'choice') {
    const box = select(option.choices.map((choice) => [choice, choice]), value, { testid });
    return [field(label(option.name), box, option.help), () => box.value];
  }
  if (option.kind === 'int' || option.kind === 'float') {
    const box = numberInput(value ?? '', { min: option.minimum, max: option.maximum, step: option.kind === 'int' ? 1 : 'any', testid });
    return [field(label(option.name), box, option.help), () => (box.value === '' ? null : Number(box.value))];
  }
  if (option.kind === 'paths') {
    const box = h('textarea', { class: 'sy-input', rows: 2, 'data-testid': testid });
    box.value = (value || []).join('\n');
    return [field(label(option.name), box, option.help), () => box.value.split('\n').map((line) => line.trim()).filter(Boolean)];
  }
  const box = textInput(value ?? '', { maxlength: 4000, testid });
  return [field(label(option.name), box, option.help), () => (box.value === '' && option.default === null ? null : box.value)];
}

export async function editSettings(model) {
  let saved;
  try {
    saved = await get(`models/settings?model=${encodeURIComponent(model.id)}`);
  } catch (error) {
    fail(error);
    return;
  }
  const able = model.loaders.filter((loader) => loader.ok || !loader.installed);
  const start = able.some((loader) => loader.name === saved.loader) ? saved.loader : able[0]?.name;
  const box = h('div', { class: 'sy-setting-fields' });
  const readers = new Map();
  const loader = select(able.map((item) => [item.name, item.title]), start, { testid: 'setting-loader' });
  const draw = () => {
    readers.clear();
    const options = models.loaders.find((item) => item.name === loader.value)?.options || [];
    const rows = (list) => list.map((option) => {
      const [element, read] = control(option, saved.options[loader.value]?.[option.name] ?? option.default);
      readers.set(option.name, [read, option]);
      return element;
    });
    const advanced = options.filter((option) => option.advanced);
    box.replaceChildren(h('div', { class: 'sy-fields' }, rows(options.filter((option) => !option.advanced))),
      advanced.length ? h('details', {}, h('summary', {}, 'Advanced'), h('div', { class: 'sy-fields' }, rows(advanced))) : '');
  };
  loader.addEventListener('change', draw);
  if (!start) {
    toast('No backend can take this model.', { level: 'warning' });
    return;
  }
  draw();
  const problem = h('p', { class: 'sy-card-error', role: 'alert', hidden: true });
  const body = h('div', { class: 'sy-models sy-tool' }, h('p', { class: 'sy-hint' }, 'They count whenever this model is loaded, whoever asks, and for no other model.'), field('Backend', loader), box, problem);
  const chosen = await openDialog({
    title: `Settings of ${model.id}`,
    body,
    actions: [{ label: 'Forget', value: 'forget', danger: true }, { label: 'Save and load', value: 'load' }, { label: 'Save', value: 'save', primary: true }],
    wide: true,
    testid: 'settings-dialog',
  });
  if (!chosen) return;
  try {
    if (chosen === 'forget') {
      await del(`models/settings?model=${encodeURIComponent(model.id)}`);
      toast(`${model.id} has no saved settings any more.`);
      return;
    }
    const options = Object.fromEntries([...readers].map(([name, [read]]) => [name, read()]));
    await put('models/settings', { model: model.id, loader: loader.value, options });
    if (chosen === 'load') await loadModel({ model: model.id, loader: loader.value, options });
    else toast('Saved.', { level: 'success' });
  } catch (error) {
    fail(error);
  } finally {
    window.switchyard?.refreshControls('options');
  }
}
