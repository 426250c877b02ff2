// What an empty chat says: what to do next, for the state the model is in.

import { bytes, h } from './dom.js';
import { logo } from './icons.js';
import { activeResident, loadingResident, loadModel, modelName, models } from './models.js';

const PROMPTS = [
  ['Hello! What can you do?', 'See what this model is good at'],
  ['Tell me a short story about a lighthouse.', 'A few sentences, with an ending'],
  ['How do I load another model?', 'Models, folders and backends'],
  ['What is GPTQ?', 'Quantization in plain words'],
];

function block(title, text, ...rest) {
  return h('div', { class: 'sy-empty-inner' }, logo(52), h('h1', {}, title), h('p', {}, text), ...rest);
}

/** `pick(text)` puts a suggested prompt into the composer. */
export function emptyState(pick) {
  const loading = loadingResident();
  if (activeResident()?.state === 'ready') {
    const cards = PROMPTS.map(([text, why]) =>
      h('button', { type: 'button', class: 'sy-prompt', 'data-testid': 'suggestion', onclick: () => pick(text) }, h('strong', {}, text), h('span', {}, why)),
    );
    return block('What shall we write?', `${modelName(activeResident())} is loaded on this machine. Nothing you type leaves it.`, h('div', { class: 'sy-prompts' }, cards));
  }
  if (loading) {
    return block('Getting the model ready', `${modelName(loading)} is loading. You can write already: the answer starts as soon as it is there.`);
  }
  if (models.state === 'unknown') return h('div');
  const usable = models.list.filter((model) => !model.problem && (model.loaders || []).some((loader) => loader.ok));
  if (!usable.length) {
    return block('No model yet', 'Put a model file or folder into the models folder, then open the Models page and press Refresh.',
      h('button', { type: 'button', class: 'sy-button sy-primary', onclick: () => window.switchyard?.page('models') }, 'Open the Models page'));
  }
  const real = usable.filter((model) => model.format !== 'echo');
  const best = real.find((model) => model.bundled) || real[0] || usable[0];
  return block('Load a model to start', `Choose one at the top of the page, or start with ${best.id}${best.size_bytes ? ` (${bytes(best.size_bytes)})` : ''}.`,
    h('button', { type: 'button', class: 'sy-button sy-primary', 'data-testid': 'load-first', onclick: () => loadModel({ model: best.id }) }, `Load ${best.id}`));
}
