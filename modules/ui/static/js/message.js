// One message on the page: its text, its actions, its receipt, its error card.

import { decorate } from './decorate.js';
import { copyText, h } from './dom.js';
import { icon } from './icons.js';
import { fragment } from './markdown.js';
import { loaderTitle } from './models.js';
import { receiptLine, receiptWarnings, showReceipt } from './receipt.js';
import { toast } from './toast.js';

const NAMES = { user: 'You', assistant: 'Answer', system: 'System' };

const action = (name, label, run, testid) =>
  h('button', { type: 'button', class: 'sy-action', 'aria-label': label, title: label, onclick: run, 'data-testid': testid }, icon(name, 17));

/** The view of one node. `commands` are the chat's actions: regenerate, continue, stop, edit, remove, version, reload. */
export class MessageView {
  constructor(node, commands) {
    this.commands = commands;
    this.body = h('div', { class: 'sy-body', dir: 'auto' });
    this.notes = h('div', { class: 'sy-notes' });
    this.bar = h('div', { class: 'sy-bar' });
    this.element = h(
      'article',
      { class: `sy-message sy-${node.role}`, 'data-id': node.id, 'data-testid': 'message', 'data-role': node.role, 'aria-label': NAMES[node.role] },
      h('div', { class: 'sy-column' }, this.body, this.notes, this.bar),
    );
    this.streaming = false;
    this.shown = null;
    this.update(node);
  }

  /** Take over a newer state of the node; touches only what changed. */
  update(node) {
    const before = this.node;
    this.node = node;
    this.element.dataset.status = node.status;
    if (!this.streaming && this.editor === undefined && node.text !== this.shown) this.#showText(node.text);
    if (!before || !same(before, node)) {
      this.#showNotes();
      this.#showBar();
    }
  }

  #showText(text) {
    this.shown = text;
    this.body.replaceChildren(fragment(text));
    decorate(this.body);
  }

  /** Hand the body to a stream; `finish` takes it back. */
  startStream() {
    this.streaming = true;
    this.shown = null;
    this.body.replaceChildren();
    this.element.classList.add('sy-streaming');
    this.#showBar();
    return this.body;
  }

  finishStream(node, text) {
    this.streaming = false;
    this.element.classList.remove('sy-streaming');
    // The stream has drawn this very text already.
    this.shown = text;
    this.node = { ...this.node, status: '' };
    this.update(node);
  }

  abandonStream() {
    this.streaming = false;
    this.element.classList.remove('sy-streaming');
    this.shown = null;
    this.node = { ...this.node, status: '' };
  }

  /** "Waiting, 2nd in the queue", "Reading the prompt, 40 %": shown until the first token. */
  setStatus(text, share = null) {
    if (!text) {
      this.status?.remove();
      this.status = null;
      return;
    }
    if (!this.status) {
      this.status = h('div', { class: 'sy-status', 'data-testid': 'run-status' }, h('span', { class: 'sy-pulse' }), h('span'), h('progress', { max: 1 }));
      this.body.after(this.status);
    }
    const [, words, meter] = this.status.children;
    words.textContent = text;
    meter.hidden = share === null;
    if (share !== null) meter.value = share;
  }

  // --- notes: interrupted, failed ---

  #showNotes() {
    const { node } = this;
    this.notes.replaceChildren();
    if (node.unsaved) {
      this.notes.append(h('div', { class: 'sy-note', role: 'alert' }, icon('warning', 17), 'Not on disk yet: export this chat to be safe.'));
    }
    if (node.status === 'generating' && !node.run) {
      this.notes.append(h('div', { class: 'sy-note', 'data-testid': 'elsewhere' }, icon('info', 17), h('span', {}, 'Another server is writing this answer.'),
        h('button', { type: 'button', class: 'sy-link', onclick: () => this.commands.stop(this.node) }, 'Stop it')));
    }
    if (node.error) this.notes.append(this.#errorCard(node.error));
    else if (node.status === 'interrupted' && node.receipt?.finish_reason !== 'cancelled') {
      this.notes.append(
        h('div', { class: 'sy-note', 'data-testid': 'interrupted' }, icon('info', 17), h('span', {}, 'This answer was interrupted.'),
          h('button', { type: 'button', class: 'sy-link', onclick: () => this.commands.continue(this.node) }, 'Continue it')),
      );
    }
  }

  #errorCard(error) {
    const detail = error.detail || {};
    const tail = detail.stderr || detail.stderr_tail || detail.tail || '';
    const crashed = ['engine_dead', 'worker_crashed', 'out_of_memory_generate', 'engine_timeout', 'protocol_error'].includes(error.code);
    const cause = [
      detail.signal ? `signal ${detail.signal}` : null,
      detail.exit_code !== undefined && detail.exit_code !== null ? `exit code ${detail.exit_code}` : null,
    ].filter(Boolean);
    const lines = Array.isArray(tail) ? tail.join('\n') : String(tail);
    return h(
      'div',
      { class: 'sy-error-card', role: 'alert', 'data-testid': 'error-card' },
      h('div', { class: 'sy-error-title' }, icon('warning', 19), h('strong', {}, crashed ? 'The backend stopped' : 'No answer')),
      h('p', { dir: 'auto' }, error.message || 'Something failed.'),
      error.hint ? h('p', { class: 'sy-hint', dir: 'auto' }, error.hint) : '',
      cause.length || this.node.loader
        ? h('p', { class: 'sy-meta' }, [loaderTitle(this.node.loader), this.node.model, ...cause].filter(Boolean).join(' · '))
        : '',
      lines.trim() ? h('details', {}, h('summary', {}, 'Last lines of the backend'), h('pre', { tabindex: '0' }, lines)) : '',
      h(
        'div',
        { class: 'sy-error-actions' },
        crashed
          ? h('button', { type: 'button', class: 'sy-button sy-primary', 'data-testid': 'reload-continue', onclick: () => this.commands.reload(this.node) }, 'Reload model and continue')
          : h('button', { type: 'button', class: 'sy-button sy-primary', onclick: () => this.commands.regenerate(this.node) }, 'Try again'),
      ),
    );
  }

  // --- the bar below a message ---

  #showBar() {
    const { node, commands } = this;
    this.bar.replaceChildren();
    if (this.streaming || node.status === 'generating') return;
    const at = node.siblings ? node.siblings.indexOf(node.id) : 0;
    // What always shows comes first; the actions of older messages are hidden until the pointer is near.
    if (node.receipt) this.bar.append(this.#receiptChip(node));
    if (node.siblings?.length > 1) this.bar.append(this.#versions(at));
    this.bar.append(action('copy', 'Copy message', () => this.#copy(), 'copy'));
    if (node.role === 'assistant') {
      this.bar.append(action('refresh', 'Regenerate', () => commands.regenerate(this.node), 'regenerate'));
      this.bar.append(action('forward', 'Continue', () => commands.continue(this.node), 'continue'));
    }
    if (node.role === 'user') {
      const ask = action('refresh', 'Answer this message', () => commands.regenerate(this.node), 'ask');
      ask.classList.add('sy-ask');
      this.bar.append(ask);
    }
    this.bar.append(action('edit', 'Edit', () => this.edit(), 'edit'), action('trash', 'Delete', () => commands.remove(this.node), 'delete'));
  }

  #versions(at) {
    const { siblings } = this.node;
    const go = (index) => this.commands.version(siblings[index]);
    const previous = action('left', 'Previous version', () => go(at - 1), 'previous-version');
    const next = action('right', 'Next version', () => go(at + 1), 'next-version');
    previous.disabled = at <= 0;
    next.disabled = at >= siblings.length - 1;
    return h('span', { class: 'sy-versions', role: 'group', 'aria-label': `Version ${at + 1} of ${siblings.length}` }, previous, h('span', { 'data-testid': 'version' }, `${at + 1}/${siblings.length}`), next);
  }

  #receiptChip(node) {
    const warnings = receiptWarnings(node.receipt);
    return h(
      'button',
      { type: 'button', class: `sy-receipt-chip${warnings ? ' sy-has-warnings' : ''}`, 'data-testid': 'receipt-chip', title: 'Show the receipt', onclick: () => showReceipt(this.node) },
      warnings ? icon('warning', 15) : '',
      receiptLine(node.receipt) || 'Receipt',
    );
  }

  async #copy() {
    try {
      await copyText(this.node.text);
      toast('Copied.', { level: 'success', timeout: 1500 });
    } catch (error) {
      toast(error.message, { level: 'warning' });
    }
  }

  // --- editing in place ---

  edit() {
    if (this.editor) return;
    const { node } = this;
    const area = h('textarea', { class: 'sy-editor', 'aria-label': 'Edit message', dir: 'auto', 'data-testid': 'editor' });
    area.value = node.text;
    const save = (generate) => {
      const text = area.value;
      if (!text.trim() && node.role === 'user') return;
      this.#closeEditor();
      if (text !== node.text || generate) this.commands.edit(node, text, generate);
    };
    const user = node.role === 'user';
    const buttons = h(
      'div',
      { class: 'sy-editor-actions' },
      h('span', { class: 'sy-hint' }, user ? 'The old version stays beside the new one.' : 'Saved as a new version.'),
      h('button', { type: 'button', class: 'sy-button', onclick: () => this.#closeEditor() }, 'Cancel'),
      user ? h('button', { type: 'button', class: 'sy-button', onclick: () => save(false) }, 'Save only') : '',
      h('button', { type: 'button', class: 'sy-button sy-primary', 'data-testid': 'editor-save', onclick: () => save(user) }, user ? 'Save and answer' : 'Save'),
    );
    area.addEventListener('keydown', (event) => {
      if (event.key === 'Escape') this.#closeEditor();
      else if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) save(user);
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
    const fit = () => {
      area.style.height = 'auto';
      area.style.height = `${Math.min(area.scrollHeight + 4, innerHeight * 0.6)}px`;
    };
    area.addEventListener('input', fit);
    this.editor = h('div', { class: 'sy-edit-box' }, area, buttons);
    this.body.replaceChildren(this.editor);
    this.element.classList.add('sy-editing');
    fit();
    area.focus();
    area.setSelectionRange(area.value.length, area.value.length);
  }

  #closeEditor() {
    this.editor = undefined;
    this.element.classList.remove('sy-editing');
    this.#showText(this.node.text);
    this.bar.querySelector('[data-testid=edit]')?.focus();
  }
}

/** Whether two states of a node show the same bar and notes. A snapshot brings new objects for unchanged nodes. */
function same(a, b) {
  return (
    a.status === b.status && a.unsaved === b.unsaved && String(a.siblings) === String(b.siblings) && a.error?.message === b.error?.message &&
    Boolean(a.receipt) === Boolean(b.receipt) && a.receipt?.total_ms === b.receipt?.total_ms
  );
}
