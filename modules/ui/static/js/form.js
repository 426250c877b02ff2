// Form controls of the tool pages: each is a labelled native control, so keyboard, touch and readers work by themselves.

import { h } from './dom.js';

let serial = 0;
const nextId = () => `sy-f-${(serial += 1)}`;

export const button = (label, run, primary = false, testid = null) =>
  h('button', { type: 'button', class: `sy-button${primary ? ' sy-primary' : ''}`, onclick: run, 'data-testid': testid }, label);

/** A label over a control, with help below it. */
export function field(label, control, help = '', wide = false) {
  control.id ||= nextId();
  const hint = help ? h('p', { class: 'sy-field-help', id: `${control.id}-help` }, help) : '';
  if (help) control.setAttribute('aria-describedby', `${control.id}-help`);
  return h('div', { class: wide ? 'sy-field sy-wide' : 'sy-field' }, h('label', { for: control.id }, label), control, hint);
}

export function numberInput(value, { min, max, step = 1, testid } = {}) {
  const input = h('input', { type: 'number', class: 'sy-input', min, max, step, inputmode: step === 1 ? 'numeric' : 'decimal', 'data-testid': testid });
  input.value = value;
  return input;
}

export function textInput(value, { placeholder, testid, maxlength = 200 } = {}) {
  const input = h('input', { type: 'text', class: 'sy-input', placeholder, maxlength, dir: 'auto', spellcheck: 'false', 'data-testid': testid });
  input.value = value;
  return input;
}

/** `options` are [value, words, disabled]. */
export function select(options, value, { testid } = {}) {
  const box = h('select', { class: 'sy-input', 'data-testid': testid }, options.map(([key, words, disabled]) => h('option', { value: key, disabled }, words)));
  if (value !== null && value !== undefined) box.value = value;
  return box;
}

/** A checkbox in its label. `note` is shown below it, `reason` beside a disabled one. */
export function tick(label, checked, { testid, disabled = false, note = '', onchange } = {}) {
  const input = h('input', { type: 'checkbox', 'data-testid': testid, disabled, onchange });
  input.checked = checked && !disabled;
  const row = h('label', { class: 'sy-tick', 'data-disabled': disabled }, input, h('span', {}, h('span', { dir: 'auto' }, label), note ? h('small', {}, note) : ''));
  row.input = input;
  return row;
}

/** Radio buttons that look like one bar; `options` are [value, words]. The element's `value` is the chosen one. */
export function bar(label, options, value, { testid, onchange } = {}) {
  const name = nextId();
  const group = h('fieldset', { class: 'sy-bar', 'data-testid': testid }, h('legend', {}, label), h('div', {}, options.map(([key, words]) => {
    const input = h('input', { type: 'radio', name, value: key, onchange });
    input.checked = String(key) === String(value);
    return h('label', {}, input, h('span', {}, words));
  })));
  Object.defineProperty(group, 'value', {
    get: () => group.querySelector('input:checked')?.value ?? null,
    set: (next) => {
      for (const input of group.querySelectorAll('input')) input.checked = String(next) === input.value;
    },
  });
  return group;
}

/** A button that reads one text file: `take(name, text)`. */
export function fileButton(label, accept, take, testid) {
  const input = h('input', { type: 'file', accept, class: 'sy-offscreen', 'aria-label': label, tabindex: '-1', 'data-testid': testid });
  input.addEventListener('change', async () => {
    const [file] = input.files;
    input.value = '';
    if (file) await take(file.name, await file.text());
  });
  return h('span', { class: 'sy-file' }, h('button', { type: 'button', class: 'sy-button', onclick: () => input.click() }, label), input);
}

export function progressBar(fraction, label) {
  const meter = h('progress', { max: 1, 'aria-label': label, class: 'sy-meter' });
  if (fraction !== null && fraction !== undefined) meter.value = fraction;
  return meter;
}

/** "3 min", "1 h 20 min", "12 s". */
export function duration(seconds) {
  if (seconds === null || seconds === undefined) return '';
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return `${Math.floor(seconds / 3600)} h ${Math.round((seconds % 3600) / 60)} min`;
}

/** Put an SVG document of the server into the page; nothing in it may run. */
export function svgOf(text) {
  const parsed = new DOMParser().parseFromString(text, 'image/svg+xml').documentElement;
  for (const node of [parsed, ...parsed.querySelectorAll('*')]) {
    if (node.localName === 'script' || node.localName === 'foreignObject') node.remove();
    for (const name of node.getAttributeNames()) if (name.startsWith('on') || name.includes('href')) node.removeAttribute(name);
  }
  return document.adoptNode(parsed);
}
