// Under --model-switch ask: a banner for each model that API requests wait for.

import { post } from './api.js';
import { h, plural } from './dom.js';
import { icon } from './icons.js';
import { models, watchModels } from './models.js';
import { fail } from './toast.js';

export class Approvals {
  constructor() {
    this.element = h('div', { class: 'sy-approvals', role: 'status', 'aria-live': 'polite', 'data-testid': 'approvals' });
    watchModels(() => this.#draw());
  }

  #draw() {
    const asked = models.asked || [];
    const seen = JSON.stringify(asked);
    if (seen === this.seen) return;
    this.seen = seen;
    this.element.replaceChildren(...asked.map((question) => this.#banner(question)));
  }

  #banner({ model, waiting }) {
    const answer = (approved) => async (event) => {
      const buttons = event.currentTarget.parentElement.querySelectorAll('button');
      for (const button of buttons) button.disabled = true;
      try {
        await post('models/approve', { model, approved });
      } catch (error) {
        for (const button of buttons) button.disabled = false;
        fail(error);
      }
    };
    return h('div', { class: 'sy-approval' },
      icon('cube', 18),
      h('span', { dir: 'auto' }, `${plural(waiting, 'API request')} ${waiting === 1 ? 'asks' : 'ask'} for ${model}, which is not loaded.`),
      h('button', { type: 'button', class: 'sy-button sy-primary', onclick: answer(true) }, 'Load it'),
      h('button', { type: 'button', class: 'sy-button', onclick: answer(false) }, 'Refuse'),
    );
  }
}
