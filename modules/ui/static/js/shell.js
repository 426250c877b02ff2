// The frame around Gradio's pages: top bar, page switch, model state, parameter panel, install progress.

import { on, post } from './api.js';
import { Approvals } from './approvals.js';
import { Choice, Fill } from './choice.js';
import { openDialog, openMenu } from './dialog.js';
import { bytes, h, isPhone, local } from './dom.js';
import { icon, logo } from './icons.js';
import { activeResident, loaderTitle, loadingResident, loadModel, modelName, models, unloadModel, watchModels } from './models.js';
import { InstallBar } from './installs.js';
import { deletePreset, loadPreset, neutral, savePreset, saveParameter, saveSetting, saveStop } from './settings.js';
import { setTheme, theme, THEMES, watchTheme } from './theme.js';
import { fail, toast } from './toast.js';

// Page, words, icon; on a phone the tools are behind one button.
const PAGES = [['chat', 'Chat', 'chat'], ['models', 'Models', 'cube'], ['quantize', 'Quantise', 'layers', 'tool'], ['evaluate', 'Evaluate', 'gauge', 'tool'], ['batch', 'Batch', 'batch', 'tool'], ['settings', 'Settings', 'gear']];

class Shell {
  constructor(root, trigger) {
    this.choice = new Choice((data) => trigger('models_changed', data));
    this.lamp = h('span', { class: 'sy-lamp' });
    this.words = h('span', { class: 'sy-state-words', dir: 'auto' });
    this.name = h('span', { class: 'sy-state-name', dir: 'auto' });
    this.state = h('button', { type: 'button', class: 'sy-state', 'data-testid': 'model-state', onclick: () => this.#stateClicked() }, this.lamp, this.name, this.words, icon('chevron', 16));
    this.progress = h('div', { class: 'sy-load-progress', role: 'progressbar', 'aria-label': 'Loading the model', hidden: true }, h('div'));
    this.nav = h('nav', { class: 'sy-nav', 'aria-label': 'Pages' }, [...PAGES.map(([page, label, symbol, tool]) =>
      h('button', { type: 'button', 'data-page': page, 'data-tool': tool, title: label, 'data-testid': `page-${page}`, onclick: () => this.page(page) }, icon(symbol, 18), h('span', {}, label))), this.#toolsButton()]);
    this.themeButton = h('button', { type: 'button', class: 'sy-icon-button', 'data-testid': 'theme', onclick: () => this.#nextTheme() });
    this.paramsButton = h('button', { type: 'button', class: 'sy-icon-button sy-params-button', 'aria-label': 'Parameters', title: 'Parameters (Alt+P)', 'data-testid': 'parameters', 'aria-expanded': 'false', onclick: () => this.params() }, icon('sliders', 20));
    root.replaceChildren(
      h('button', { type: 'button', class: 'sy-icon-button sy-phone', 'aria-label': 'Chats', 'data-testid': 'drawer', onclick: () => this.#drawer() }, icon('menu', 22)),
      h('a', { class: 'sy-brand', href: '#', 'aria-label': 'Switchyard', onclick: (event) => { event.preventDefault(); this.page('chat'); } }, logo(28), h('span', {}, 'Switchyard')),
      this.nav,
      h('span', { class: 'sy-gap' }),
      this.state,
      this.paramsButton,
      this.themeButton,
      this.progress,
    );
    new ResizeObserver(() => root.closest('body').style.setProperty('--sy-nav-end', `${Math.round(this.nav.getBoundingClientRect().right)}px`)).observe(this.nav);
    this.installs = new InstallBar();
    document.querySelector('#sy-shell').after(this.installs.element);
    document.querySelector('#sy-shell').after(new Approvals().element);
    this.offline = h('div', { class: 'sy-offline', role: 'alert', hidden: true }, icon('warning', 18), 'The server does not answer. What you type is kept; this page reconnects by itself.');
    document.body.append(this.offline);
    on('offline', () => (this.offlineTimer ??= setTimeout(() => (this.offline.hidden = false), 2500)));
    on('online', () => this.#online());
    this.settings = new Fill(() => trigger('settings_changed'));
    on('settings', () => this.settings.again());
    on('presets', () => this.settings.again());
    document.addEventListener('keydown', (event) => {
      if (event.altKey && !event.ctrlKey && !event.metaKey && event.code === 'KeyP') {
        event.preventDefault();
        this.params();
      }
    });
    watchTheme();
    this.#drawTheme();
    this.page('chat', false);
    this.params(!isPhone() && innerWidth > 1400 && local.get('sy-params') === 'open', false);
    watchModels(() => this.#drawModels());
  }

  #online() {
    clearTimeout(this.offlineTimer);
    this.offlineTimer = null;
    this.offline.hidden = true;
  }

  // --- pages ---

  page(name, press = true) {
    if (press) document.querySelector(`#sy-page-${name}-button`)?.click();
    document.body.dataset.syPage = name;
    const isTool = PAGES.some(([page, , , tool]) => tool && page === name);
    for (const button of this.nav.children) {
      if (button.dataset.page === name || (isTool && !button.dataset.page)) button.setAttribute('aria-current', 'page');
      else button.removeAttribute('aria-current');
    }
  }

  /** On a phone: the pages that the bar has no room for. */
  #toolsButton() {
    const tools = PAGES.filter(([, , , tool]) => tool);
    const more = h('button', { type: 'button', class: 'sy-tools', 'aria-label': 'Tools', 'aria-haspopup': 'menu', 'data-testid': 'tools' }, icon('gauge', 18));
    more.addEventListener('click', () => openMenu(more, tools.map(([page, label, symbol]) => ({ label, icon: symbol, run: () => this.page(page) })), 'Tools'));
    return more;
  }

  #drawer() {
    if (document.body.dataset.syPage !== 'chat') this.page('chat');
    else window.dispatchEvent(new Event('sy-drawer'));
  }

  params(open = !document.body.classList.contains('sy-params-open'), store = true) {
    document.body.classList.toggle('sy-params-open', open);
    this.paramsButton.setAttribute('aria-expanded', String(open));
    const panel = document.querySelector('#sy-params');
    if (panel) panel.inert = !open;
    if (store) local.set('sy-params', open ? 'open' : null);
  }

  // --- theme ---

  #nextTheme() {
    this.theme(THEMES[(THEMES.indexOf(theme()) + 1) % THEMES.length]);
  }

  theme(choice) {
    setTheme(choice);
    saveSetting('theme', choice);
    this.#drawTheme();
  }

  #drawTheme() {
    const choice = theme();
    this.themeButton.replaceChildren(icon({ system: 'system', light: 'sun', dark: 'moon' }[choice], 20));
    const label = `Theme: ${choice === 'system' ? 'as the system' : choice}`;
    this.themeButton.title = label;
    this.themeButton.setAttribute('aria-label', label);
  }

  // --- model state ---

  #drawModels() {
    const resident = activeResident();
    const loading = loadingResident();
    const failed = models.state === 'failed' ? models.residents.find((item) => item.state === 'failed') : null;
    const state = loading ? 'loading' : failed ? 'failed' : resident ? 'ready' : 'empty';
    this.state.dataset.state = models.state === 'unknown' ? 'empty' : state;
    document.body.dataset.syModel = state;
    const fraction = loading?.progress?.fraction ?? null;
    const percent = fraction === null ? '' : ` ${Math.round(fraction * 100)} %`;
    const words = {
      loading: () => `${loading.progress?.stage || 'Loading'}${percent}`,
      failed: () => (failed.loaded_at ? 'Backend stopped' : 'Load failed'),
      ready: () => (resident.memory_bytes ? bytes(resident.memory_bytes) : 'Ready'),
      empty: () => 'No model loaded',
    }[state]();
    this.words.textContent = words;
    this.name.textContent = state === 'ready' ? modelName(resident) : '';
    this.state.title = resident ? this.#memoryWords(resident) : words;
    this.progress.hidden = state !== 'loading';
    this.progress.classList.toggle('sy-unknown', fraction === null);
    this.progress.firstChild.style.width = fraction === null ? '30%' : `${fraction * 100}%`;
    if (fraction !== null) this.progress.setAttribute('aria-valuenow', Math.round(fraction * 100));
    this.#refreshControls(state, resident);
    this.#announceLoad(state, resident);
    this.#showNewFailures();
  }

  #memoryWords(resident) {
    const words = [`${modelName(resident)} on ${loaderTitle(resident.loader)}`];
    if (resident.memory_bytes) words.push(`uses ${bytes(resident.memory_bytes)}`);
    if (resident.memory_before && resident.memory_after) words.push(`memory before ${bytes(resident.memory_before)}, after ${bytes(resident.memory_after)}`);
    return words.join(', ');
  }

  /** Gradio's dropdowns are read again only when something they show has changed. A load that goes on or failed changes no choice. */
  #refreshControls(state, resident) {
    if (models.state === 'unknown') return;
    const loaded = resident?.id ?? (state === 'empty' ? null : this.loaded);
    const seen = JSON.stringify([state, models.residents.map((item) => [item.id, item.state]), models.loaders.map((loader) => [loader.name, loader.ready, loader.installed])]);
    if (this.seen !== undefined && loaded !== this.loaded) this.choice.changed('loaded');
    else if (this.seen !== undefined && seen !== this.seen) this.choice.changed('lists');
    this.loaded = loaded;
    this.seen = seen;
  }

  #announceLoad(state, resident) {
    const key = `${state}:${resident?.id ?? ''}`;
    const before = this.announced;
    this.announced = key;
    if (before === undefined || before === key) return;
    if (state === 'ready' && before.startsWith('loading')) {
      const { memory_before: from, memory_after: to } = resident;
      toast(`${modelName(resident)} is ready.${from && to ? ` Memory: ${bytes(from)} before, ${bytes(to)} after.` : ''}`, { level: 'success' });
    }
  }

  /** A load that failed beside a model that serves would go unseen in the lamp. */
  #showNewFailures() {
    const failed = models.residents.filter((item) => item.state === 'failed');
    const fresh = this.failures && failed.find((item) => !this.failures.has(item.id));
    if (models.state !== 'unknown') this.failures = new Set(failed.map((item) => item.id));
    // A model that was loaded and then died has its card in the chat.
    if (fresh && !fresh.loaded_at) this.#showFailure(fresh);
  }

  #showFailure(resident) {
    const error = resident.error || {};
    const tail = error.detail?.stderr || error.detail?.stderr_tail || '';
    openDialog({
      title: resident.loaded_at ? `The backend of ${modelName(resident)} stopped` : `${modelName(resident)} did not load`,
      body: h('div', { 'data-testid': 'load-failure' }, h('p', { dir: 'auto' }, error.message || 'The backend gave no reason.'), error.hint ? h('p', { class: 'sy-hint' }, error.hint) : '',
        tail ? h('details', {}, h('summary', {}, 'Last lines of the backend'), h('pre', {}, Array.isArray(tail) ? tail.join('\n') : tail)) : ''),
      actions: [{ label: 'Close', value: null, primary: true }],
    });
  }

  #stateClicked() {
    const failed = models.residents.find((item) => item.state === 'failed');
    if (this.state.dataset.state === 'failed' && failed) this.#showFailure(failed);
    else document.body.classList.toggle('sy-models-open');
  }

  // --- called by Gradio's buttons and dropdowns (see modules/ui/models.py) ---

  async load(model, loader, options) {
    if (!model) return toast('Choose a model first.', { level: 'warning' });
    const body = { model };
    if (loader) body.loader = loader;
    if (options && Object.keys(options).length) body.options = options;
    const busy = models.residents.filter((item) => item.active_requests > 0);
    if (busy.length) {
      const choice = await openDialog({
        title: 'An answer is being written',
        body: h('p', {}, `${modelName(busy[0])} is still at work. What should happen to its answer?`),
        actions: [{ label: 'Stop it', value: 'cancel', danger: true }, { label: 'Load beside', value: 'beside' }, { label: 'Finish first', value: 'finish', primary: true }],
        testid: 'switch-dialog',
      });
      if (!choice) return null;
      body.when_busy = choice;
    }
    document.body.classList.remove('sy-models-open');
    return loadModel(body);
  }

  /** What the dropdowns show at first. A value set so early may count as no change of the backend. */
  shown(model, backend) {
    this.choice.shown(model, backend);
    showOptions(backend);
  }

  /** What the Load button read from the controls; while a choice is still being filled in, it is pressed again afterwards. */
  loadWith(model, loader, table, values) {
    if (this.choice.unsettled) this.choice.afterwards = () => document.querySelector('#sy-load').click();
    else this.load(model, loader, optionsOf(loader, table, values));
  }

  async unload() {
    const resident = activeResident() || models.residents[0];
    if (!resident) return toast('No model is loaded.');
    return unloadModel({ resident: resident.id });
  }

  async install(name) {
    try {
      await post(`loaders/${encodeURIComponent(name)}/install`);
      toast(`Installing ${loaderTitle(name)} in the background.`);
    } catch (error) {
      fail(error);
    }
  }
}

/** The form's options of `loader`; `table` rows are [loader, option, kind, default], as modules/ui/models.py makes them. */
function optionsOf(loader, table, values) {
  const options = {};
  table.forEach(([owner, name, kind, standard], at) => {
    let value = values[at];
    if (owner !== loader || value === undefined) return;
    if (kind === 'paths') value = String(value || '').split('\n').map((line) => line.trim()).filter(Boolean);
    options[name] = value === '' && standard === null ? null : value;
  });
  return options;
}

// Gradio draws a page only when it is opened, so the choice is a style rule and no class on elements that may not be there yet.
const chosenOptions = new CSSStyleSheet();
document.adoptedStyleSheets.push(chosenOptions);

function showOptions(loader) {
  chosenOptions.replaceSync(loader ? `:is(body, #sy) .sy-options.sy-options-${CSS.escape(loader)} { display: block !important; }` : '');
}

/** Called by Gradio when the component is on the page. */
export function mount({ element, trigger }) {
  const root = element.querySelector('.sy-topbar');
  if (root.dataset.mounted) return;
  root.dataset.mounted = '1';
  const shell = new Shell(root, trigger);
  window.switchyard = {
    page: (name) => shell.page(name),
    params: (open) => shell.params(open),
    load: (model, loader, options) => shell.load(model, loader, options),
    unload: () => shell.unload(),
    install: (name) => shell.install(name),
    refreshControls: (what = 'lists') => shell.choice.changed(what),
    loadWith: (model, loader, table, values) => shell.loadWith(model, loader, table, values),
    picking: (...values) => shell.choice.picking(...values),
    picked: (...values) => shell.choice.picked(...values),
    shown: (...values) => shell.shown(...values),
    filled: (...values) => shell.choice.filled(...values),
    settingsFilled: () => shell.settings.done(),
    showOptions,
    theme: (choice) => shell.theme(choice),
    saveSetting,
    saveParameter,
    saveStop,
    loadPreset,
    savePreset,
    deletePreset,
    neutral,
  };
  if (window.switchyardShown) shell.shown(...window.switchyardShown);
}
