// A slim bar for backends that are installed in the background, with their log one click away.

import { on } from './api.js';
import { h } from './dom.js';
import { icon } from './icons.js';

const LINES = 400;

export class InstallBar {
  constructor() {
    this.lines = [];
    this.words = h('span', { dir: 'auto' });
    this.meter = h('progress', { max: 1, 'aria-label': 'Installation' });
    this.log = h('pre', { class: 'sy-install-log', tabindex: '0', hidden: true });
    const toggle = h('button', { type: 'button', class: 'sy-link', 'aria-expanded': 'false' }, 'Log');
    toggle.addEventListener('click', () => {
      this.log.hidden = !this.log.hidden;
      toggle.setAttribute('aria-expanded', String(!this.log.hidden));
      this.log.scrollTop = this.log.scrollHeight;
    });
    const close = h('button', { type: 'button', class: 'sy-icon-button sy-small', 'aria-label': 'Hide the installation', onclick: () => (this.element.hidden = true) }, icon('close', 16));
    this.element = h('div', { class: 'sy-install', role: 'status', 'data-testid': 'install-bar', hidden: true }, h('div', {}, this.words, this.meter, toggle, close), this.log);
    on('install', (event) => this.#show(event));
  }

  #show({ overlay, stage, fraction, line, state }) {
    if (line) {
      this.lines.push(line);
      if (this.lines.length > LINES) this.lines.splice(0, this.lines.length - LINES);
      if (!this.log.hidden) {
        this.log.textContent = this.lines.join('\n');
        this.log.scrollTop = this.log.scrollHeight;
      }
    }
    const over = state === 'done' || state === 'failed';
    if (!over && this.dismissed !== overlay) this.element.hidden = false;
    if (state === 'failed') this.element.hidden = false;
    this.element.dataset.state = state || 'running';
    const words = { done: `${overlay} is installed.`, failed: `${overlay} could not be installed${stage ? `: ${stage}` : '.'}` }[state];
    this.words.textContent = words || `Installing ${overlay}${stage ? `: ${stage}` : ''}`;
    this.log.textContent = this.lines.join('\n');
    this.meter.hidden = over;
    if (fraction === null || fraction === undefined) this.meter.removeAttribute('value');
    else this.meter.value = fraction;
    clearTimeout(this.timer);
    if (state === 'done') this.timer = setTimeout(() => (this.element.hidden = true), 6000);
  }
}
