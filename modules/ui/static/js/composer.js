// The box one types into: grows with its text, keeps a draft per chat, takes images, turns into Stop while an answer is written.

import { Attachments } from './attachments.js';
import { debounce, h, isPhone, local } from './dom.js';
import { icon } from './icons.js';

export class Composer {
  /** `onsend(text)`, the text with the references of its images, resolves to true when the text was accepted; only then the box is emptied. */
  constructor({ onsend, onstop, oneditlast }) {
    this.onsend = onsend;
    this.busy = false;
    this.sending = false;
    this.ctrlEnter = false;
    this.key = 'new';
    this.area = h('textarea', {
      rows: 1, placeholder: 'Message…', 'aria-label': 'Message', dir: 'auto', 'data-testid': 'composer', autocomplete: 'off', enterkeyhint: 'send',
    });
    this.sendButton = h('button', { type: 'submit', class: 'sy-send', 'aria-label': 'Send', title: 'Send (Enter)', 'data-testid': 'send' }, icon('send', 20));
    this.stopButton = h(
      'button',
      { type: 'button', class: 'sy-send sy-stop', 'aria-label': 'Stop', title: 'Stop (Esc)', 'data-testid': 'stop', hidden: true, onclick: onstop },
      icon('stop', 20),
    );
    this.hint = h('div', { class: 'sy-composer-hint' });
    this.images = new Attachments();
    this.element = h(
      'form',
      { class: 'sy-composer' },
      this.images.element,
      h('div', { class: 'sy-composer-box' }, this.images.picker, this.images.button, this.area, this.sendButton, this.stopButton),
      this.hint,
    );
    this.element.addEventListener('submit', (event) => {
      event.preventDefault();
      this.submit();
    });
    this.area.addEventListener('keydown', (event) => {
      if (event.key === 'Enter' && !event.isComposing && this.#sends(event)) {
        event.preventDefault();
        this.submit();
      } else if (event.key === 'ArrowUp' && !this.area.value && !event.altKey) {
        event.preventDefault();
        oneditlast();
      }
    });
    this.images.takeFrom(this.element, this.area);
    const keep = debounce(() => this.#keepDraft(), 150);
    this.area.addEventListener('input', () => {
      this.frame ??= requestAnimationFrame(() => this.#fit());
      keep();
    });
    window.addEventListener('pagehide', () => this.#keepDraft());
  }

  #keepDraft() {
    local.set(`sy-draft-${this.key}`, this.area.value);
  }

  #sends(event) {
    if (event.ctrlKey || event.metaKey) return true;
    // On a phone's keyboard Enter is the only way to a new line.
    return !event.shiftKey && !this.ctrlEnter && !(isPhone() && matchMedia('(pointer: coarse)').matches);
  }

  async submit() {
    const text = this.area.value;
    if (!(text.trim() || this.images.count) || this.busy || this.sending) return;
    this.sending = true;
    this.#buttons();
    const key = this.key;
    let accepted = false;
    try {
      const references = await this.images.keep();
      accepted = references !== null && (await this.onsend([text.trim() ? text : '', ...references].filter(Boolean).join('\n\n')));
    } finally {
      this.sending = false;
      this.#buttons();
    }
    if (!accepted) return;
    this.images.clear();
    local.set(`sy-draft-${key}`, null);
    if (this.area.value === text) {
      this.area.value = '';
      local.set(`sy-draft-${this.key}`, null);
      this.#fit();
    }
  }

  /** Switch to another chat's draft. */
  open(key) {
    if (key === this.key && this.area.value) return;
    if (this.area.value) this.#keepDraft();
    if (key !== this.key && !this.sending) this.images.clear();
    this.key = key;
    this.area.value = local.get(`sy-draft-${key}`, '');
    this.#fit();
  }

  fill(text) {
    this.area.value = text;
    this.area.dispatchEvent(new Event('input'));
    this.focus();
  }

  setBusy(busy) {
    if (this.busy === busy) return;
    const hadFocus = document.activeElement === this.stopButton || document.activeElement === this.sendButton;
    this.busy = busy;
    this.#buttons();
    if (hadFocus) this.area.focus();
  }

  #buttons() {
    this.sendButton.hidden = this.busy;
    this.sendButton.disabled = this.sending;
    this.stopButton.hidden = !this.busy;
  }

  focus() {
    this.area.focus();
  }

  #fit() {
    this.frame = null;
    this.area.style.height = 'auto';
    this.area.style.height = `${Math.min(this.area.scrollHeight, Math.max(120, innerHeight * 0.35))}px`;
  }
}
