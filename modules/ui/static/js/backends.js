// The list of backends: which are ready, and what the others lack.

import { h } from './dom.js';
import { InstallProgress } from './installs.js';
import { watchModels } from './models.js';

function loaderRow(loader) {
  const state = loader.ready ? 'ready' : loader.installed ? 'loading' : 'empty';
  return h(
    'li',
    { class: 'sy-card', 'data-testid': 'loader-row', 'data-loader': loader.name },
    h('div', { class: 'sy-state', 'data-state': state }, h('span', { class: 'sy-lamp' }), h('strong', {}, loader.title), h('span', { class: 'sy-badge' }, loader.ready ? 'Ready' : loader.installed ? 'Installed' : 'Not installed')),
    h('p', { class: 'sy-hint' }, loader.summary),
    loader.reason ? h('p', { class: 'sy-card-reason' }, loader.reason) : '',
    loader.fix ? h('p', { class: 'sy-card-fix' }, 'Fix: ', h('code', {}, loader.fix)) : '',
    loader.installable ? new InstallProgress(loader.name, loader.overlay).element : '',
  );
}

/** Called by Gradio when the component is on the page. */
export function mount({ element }) {
  const root = element.querySelector('.sy-backends');
  if (root.dataset.mounted) return;
  root.dataset.mounted = '1';
  root.classList.add('sy-models');
  const list = h('ul', { class: 'sy-cards' });
  root.replaceChildren(h('div', { class: 'sy-page-head' }, h('h2', {}, 'Backends')), list);
  let drawn = null;
  watchModels(({ loaders }) => {
    if (drawn !== loaders) list.replaceChildren(...loaders.map(loaderRow)); // a load's progress changes nothing here
    drawn = loaders;
  });
}
