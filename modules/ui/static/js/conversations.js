// The list of chats: search, rename, pin, trash, export, import.

import { api, del, get, on, patch, post, url } from './api.js';
import { askText, confirmDialog, openMenu } from './dialog.js';
import { ago, debounce, h } from './dom.js';
import { icon } from './icons.js';
import { fail, toast } from './toast.js';

export class ConversationList {
  /** `open(id)` shows a chat, `fresh()` starts a new one, `gone(id)` says that a chat left the list. */
  constructor({ open, fresh, gone }) {
    this.open = open;
    this.gone = gone;
    this.current = null;
    this.trashed = false;
    this.items = [];
    this.search = h('input', { type: 'search', class: 'sy-search', placeholder: 'Search chats', 'aria-label': 'Search chats', dir: 'auto', 'data-testid': 'search' });
    this.search.addEventListener('input', debounce(() => this.refresh(), 180));
    this.list = h('ul', { class: 'sy-conversations', 'data-testid': 'conversations' });
    this.trashButton = h('button', { type: 'button', class: 'sy-side-button', 'data-testid': 'trash', 'aria-pressed': 'false', onclick: () => this.#toggleTrash() }, icon('trash', 17), h('span', {}, 'Trash'));
    const importer = h('input', { type: 'file', accept: '.json,application/json', hidden: true, 'data-testid': 'import-file' });
    importer.addEventListener('change', () => this.#import(importer));
    this.element = h(
      'aside',
      { class: 'sy-sidebar', 'aria-label': 'Chats' },
      h(
        'div',
        { class: 'sy-side-top' },
        h('button', { type: 'button', class: 'sy-button sy-new', 'data-testid': 'new-chat', title: 'New chat (Alt+N)', onclick: fresh }, icon('plus', 18), 'New chat'),
        h('label', { class: 'sy-search-box' }, icon('search', 16), this.search),
      ),
      h('nav', { class: 'sy-side-list', 'aria-label': 'Chats' }, this.list),
      h(
        'div',
        { class: 'sy-side-foot' },
        this.trashButton,
        h('button', { type: 'button', class: 'sy-side-button', 'data-testid': 'import', onclick: () => importer.click() }, icon('upload', 17), h('span', {}, 'Import')),
        importer,
      ),
    );
    on('conversations', debounce(() => this.refresh(), 60));
    on('resync', () => this.refresh());
  }

  async refresh() {
    const asked = (this.asked = {});
    const query = new URLSearchParams({ query: this.search.value.trim(), trashed: this.trashed });
    try {
      const { conversations } = await get(`conversations?${query}`);
      if (asked !== this.asked) return;
      this.items = conversations;
      this.#draw();
    } catch (error) {
      if (asked === this.asked && error.code !== 'offline') fail(error);
    }
  }

  setCurrent(id) {
    this.current = id;
    for (const row of this.list.children) {
      const link = row.querySelector('.sy-conversation');
      if (row.dataset.id === id) link?.setAttribute('aria-current', 'page');
      else link?.removeAttribute('aria-current');
    }
  }

  #draw() {
    const focused = this.list.contains(document.activeElement) ? document.activeElement.closest('li')?.dataset.id : null;
    if (!this.items.length) {
      const words = this.search.value.trim() ? 'Nothing found.' : this.trashed ? 'The trash is empty.' : 'No chats yet.';
      this.list.replaceChildren(h('li', { class: 'sy-none' }, words));
      return;
    }
    this.list.replaceChildren(...this.items.map((item) => this.#row(item)));
    this.setCurrent(this.current);
    if (focused) this.list.querySelector(`li[data-id="${CSS.escape(focused)}"] .sy-conversation`)?.focus();
  }

  #row(item) {
    const title = item.title || 'New chat';
    const open = h(
      'button',
      { type: 'button', class: 'sy-conversation', onclick: () => this.open(item.id), title },
      h('span', { class: 'sy-conversation-title', dir: 'auto' }, title),
      this.search.value.trim() && item.snippet ? h('span', { class: 'sy-snippet', dir: 'auto' }, item.snippet) : '',
    );
    const mark = item.generating
      ? h('span', { class: 'sy-pulse', role: 'img', 'aria-label': 'Answer is being written' })
      : item.pinned ? h('span', { class: 'sy-pinned', role: 'img', 'aria-label': 'Pinned' }, icon('pin', 14)) : h('span', { class: 'sy-when' }, ago(item.updated_at));
    const more = h('button', { type: 'button', class: 'sy-icon-button sy-small sy-more', 'aria-label': `Actions for ${title}`, 'aria-haspopup': 'menu', 'data-testid': 'conversation-menu' }, icon('more', 18));
    more.addEventListener('click', () => openMenu(more, this.#actions(item), title));
    return h('li', { 'data-id': item.id }, open, mark, more);
  }

  #actions(item) {
    const change = (body) => () => this.#patch(item.id, body);
    if (this.trashed) {
      return [
        { label: 'Restore', icon: 'undo', run: change({ trashed: false }) },
        { label: 'Delete for ever', icon: 'trash', danger: true, run: () => this.#purge(item) },
      ];
    }
    return [
      { label: 'Rename', icon: 'edit', run: () => this.rename(item) },
      { label: item.pinned ? 'Unpin' : 'Pin', icon: 'pin', run: change({ pinned: !item.pinned }) },
      { label: 'Export as JSON', icon: 'download', run: () => exportChat(item.id) },
      { label: 'Export as Markdown', icon: 'download', run: () => exportChat(item.id, 'markdown') },
      { label: 'Move to trash', icon: 'trash', danger: true, run: () => this.trash(item.id) },
    ];
  }

  async rename(item) {
    const title = await askText('Rename chat', item.title || '', 'Rename');
    if (title) await this.#patch(item.id, { title });
  }

  async #patch(id, body) {
    try {
      await patch(`conversations/${id}`, body);
    } catch (error) {
      fail(error);
    }
    await this.refresh();
  }

  async trash(id) {
    await this.#patch(id, { trashed: true });
    if (id === this.current) this.gone(id);
    toast('Moved to the trash.', { action: { label: 'Undo', run: async () => {
      await this.#patch(id, { trashed: false });
      this.open(id);
    } } });
  }

  async #purge(item) {
    if (!(await confirmDialog('Delete for ever?', `“${item.title || 'New chat'}” cannot be brought back.`, 'Delete for ever'))) return;
    try {
      await del(`conversations/${item.id}`);
      if (item.id === this.current) this.gone(item.id);
    } catch (error) {
      fail(error);
    }
    await this.refresh();
  }

  #toggleTrash() {
    this.trashed = !this.trashed;
    this.trashButton.setAttribute('aria-pressed', String(this.trashed));
    this.trashButton.lastChild.textContent = this.trashed ? 'Back to chats' : 'Trash';
    this.element.classList.toggle('sy-in-trash', this.trashed);
    this.refresh();
  }

  async #import(input) {
    const [file] = input.files;
    input.value = '';
    if (!file) return;
    try {
      const text = await file.text();
      const snapshot = await api('POST', 'conversations/import', JSON.parse(text));
      await this.refresh();
      this.open(snapshot.id);
      const report = snapshot.report.join(' ');
      toast(report ? `Chat imported. ${report}` : 'Chat imported.', { level: report ? 'warning' : 'success' });
    } catch (error) {
      fail(error instanceof SyntaxError ? new Error('That file is not a chat export: it is not JSON.') : error);
    }
  }
}

export function exportChat(id, format = 'json') {
  const link = h('a', { href: url(`ui-api/conversations/${id}/export?format=${format}`), download: '' });
  document.body.append(link);
  link.click();
  link.remove();
}

export const createConversation = (body) => post('conversations', body);
