// Installations in the background: a slim bar at the top of the page, and the progress and log beside a backend.

import { on, post } from './api.js';
import { h } from './dom.js';
import { button, progressBar } from './form.js';
import { icon } from './icons.js';
import { fail } from './toast.js';

const LINES = 400;

// The last picture and the log of each environment, kept here so that a card drawn later has them, too.
const jobs = new Map();

function keep(event) {
  const job = jobs.get(event.overlay) || { lines: [] };
  if (event.line && event.line !== job.lines.at(-1)) job.lines.push(event.line);
  if (job.lines.length > LINES) job.lines.splice(0, job.lines.length - LINES);
  jobs.set(event.overlay, { ...event, lines: job.lines });
}
on('install', keep);

/** An Install button that becomes the progress of that installation, with its log. */
export class InstallProgress {
  constructor(loader, overlay) {
    this.overlay = overlay;
    this.loader = loader;
    this.element = h('div', { class: 'sy-install-here', 'data-testid': 'install-here' });
    const stop = on('install', (event) => {
      if (!this.element.isConnected && this.seen) stop();
      else if (event.overlay === overlay) this.#draw();
      this.seen ||= this.element.isConnected;
    });
    this.#draw();
  }

  #draw() {
    const job = jobs.get(this.overlay);
    const running = job && (job.state === 'queued' || job.state === 'running');
    const open = this.element.querySelector('details')?.open;
    const act = (path) => post(`loaders/${encodeURIComponent(this.loader)}/install${path}`).catch(fail);
    const log = h('pre', { class: 'sy-install-log', tabindex: '0' }, job?.lines.join('\n') || '');
    this.element.replaceChildren(
      running ? progressBar(job.fraction, `Installing ${job.title}`) : '',
      running ? h('p', { class: 'sy-hint' }, job.state === 'queued' ? 'Waiting for its turn.' : `Installing: ${job.stage}`) : '',
      job?.state === 'failed' ? h('p', { class: 'sy-card-error' }, job.stage) : '',
      job?.state === 'done' ? h('p', { class: 'sy-hint' }, 'Installed.') : '',
      job?.lines.length ? h('details', { open }, h('summary', {}, 'Log'), log) : '',
      h('div', { class: 'sy-card-actions' }, running ? button('Stop', () => act('/cancel')) : '', running || job?.state === 'done' ? '' : button('Install', () => act(''), false, 'install')),
    );
    log.scrollTop = log.scrollHeight;
  }
}

export class InstallBar {
  constructor() {
    this.lines = [];
    this.words = h('strong', { role: 'status', dir: 'auto' }); // said aloud, so it does not change with each package
    this.detail = h('span', { dir: 'auto' });
    this.meter = progressBar(null, 'Installation');
    this.log = h('pre', { class: 'sy-install-log', tabindex: '0', hidden: true });
    const toggle = h('button', { type: 'button', class: 'sy-link', 'aria-expanded': 'false' }, 'Log');
    toggle.addEventListener('click', () => {
      this.log.hidden = !this.log.hidden;
      toggle.setAttribute('aria-expanded', String(!this.log.hidden));
      this.log.scrollTop = this.log.scrollHeight;
    });
    const close = h('button', { type: 'button', class: 'sy-icon-button sy-small', 'aria-label': 'Hide the installation', onclick: () => this.#hide() }, icon('close', 16));
    const row = h('div', {}, this.words, this.detail, this.meter, toggle, close);
    this.element = h('div', { class: 'sy-install', 'data-testid': 'install-bar', hidden: true }, row, this.log);
    // The page begins below it; an open log lies over the page.
    new ResizeObserver(() => document.documentElement.style.setProperty('--sy-notice', `${row.offsetHeight}px`)).observe(row);
    on('install', (event) => this.#show(event));
  }

  /** Until this installation fails, or another one is at work. */
  #hide() {
    this.element.hidden = true;
    this.dismissed = this.overlay;
  }

  #show({ overlay, title, stage, fraction, line, state }) {
    if (line) {
      this.lines.push(line);
      if (this.lines.length > LINES) this.lines.splice(0, this.lines.length - LINES);
      this.log.textContent = this.lines.join('\n');
      this.log.scrollTop = this.log.scrollHeight;
    }
    if (state === 'queued') return; // what is at work stays in view
    const over = state === 'done' || state === 'failed';
    this.overlay = overlay;
    if (state === 'failed' || (!over && this.dismissed !== overlay)) this.element.hidden = false;
    this.element.dataset.state = state || 'running';
    const words = { done: `${title} is installed.`, failed: `${title} could not be installed${stage ? `: ${stage}` : '.'}` }[state] || `Installing ${title}`;
    if (this.words.textContent !== words) this.words.textContent = words;
    this.detail.textContent = over ? '' : ` ${stage}`;
    this.meter.hidden = over;
    if (fraction === null || fraction === undefined) this.meter.removeAttribute('value');
    else this.meter.value = fraction;
    clearTimeout(this.timer);
    if (state === 'done') this.timer = setTimeout(() => (this.element.hidden = true), 6000);
  }
}
