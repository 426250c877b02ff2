// The chat: list of chats, messages, composer. Talks to /ui-api itself, so a busy Gradio queue never holds up a token.

import { ApiError, connect, del, get, on, patch, post } from './api.js';
import { Composer } from './composer.js';
import { ConversationList, createConversation, exportChat } from './conversations.js';
import { openDialog, openMenu, showShortcuts } from './dialog.js';
import { debounce, h, isPhone, local, plural, uuid } from './dom.js';
import { emptyState } from './empty.js';
import { icon } from './icons.js';
import { loadModel, startModels, watchModels } from './models.js';
import { RunFollower } from './run.js';
import { setTheme, theme, themeChosen } from './theme.js';
import { Thread } from './thread.js';
import { fail, toast } from './toast.js';

const running = (nodes) => nodes.findLast((node) => node.status === 'generating' && node.run);

class Chat {
  constructor(root) {
    this.root = root;
    this.chat = null; // the snapshot on screen; null is a new chat that is not stored yet
    this.follower = null;
    this.pendingSystem = null;
    this.thread = new Thread({
      regenerate: (node) => this.regenerate(node),
      stop: (node) => post(`messages/${node.id}/stop`, {}).catch(fail),
      continue: (node) => this.change(`messages/${node.id}/continue`, { client_id: uuid() }),
      edit: (node, text, generate) => this.change(`messages/${node.id}/edit`, { text, generate, client_id: uuid() }),
      remove: (node) => this.remove(node),
      version: (id) => this.version(id),
      reload: (node) => this.reloadAndContinue(node),
    });
    this.composer = new Composer({ onsend: (text) => this.send(text), onstop: () => this.stop(), oneditlast: () => this.editLast() });
    this.list = new ConversationList({ open: (id) => this.open(id), fresh: () => this.fresh(), gone: () => this.fresh() });
    this.live = h('div', { class: 'sy-offscreen', role: 'status', 'aria-live': 'polite', 'data-testid': 'announce' });
    this.empty = h('div', { class: 'sy-empty', 'data-testid': 'empty' });
    this.#build();
  }

  #build() {
    this.title = h('button', { type: 'button', class: 'sy-title', dir: 'auto', title: 'Rename', 'data-testid': 'title', onclick: () => this.chat && this.list.rename(this.chat) });
    this.systemButton = h(
      'button',
      { type: 'button', class: 'sy-chip', 'data-testid': 'system-prompt', onclick: () => this.editSystemPrompt() },
      icon('text', 16), h('span', {}, 'System prompt'),
    );
    this.menuButton = h('button', { type: 'button', class: 'sy-icon-button', 'aria-label': 'Chat actions', 'aria-haspopup': 'menu', 'data-testid': 'chat-menu' }, icon('more', 20));
    this.menuButton.addEventListener('click', () => openMenu(this.menuButton, this.#menu(), 'Chat actions'));
    this.head = h('header', { class: 'sy-chat-head' }, this.title, this.systemButton, this.menuButton);
    this.main = h('main', { class: 'sy-main' }, this.head, this.empty, this.thread.element, this.composer.element, this.live);
    this.scrim = h('div', { class: 'sy-scrim', onclick: () => this.drawer(false) });
    this.root.replaceChildren(this.list.element, this.scrim, this.main);
    this.#keys();
  }

  async start() {
    connect();
    const changed = debounce((event) => this.#changedElsewhere(event), 40);
    on('conversation', (event) => event.id === this.chat?.id && changed(event));
    on('resync', () => this.chat && this.open(this.chat.id, { quiet: true }));
    on('settings', () => this.#readSettings());
    on('notice', (notice) => this.#notice(notice));
    const wanted = new URLSearchParams(location.search).get('c') || local.get('sy-chat');
    this.#show(null);
    await Promise.all([this.#readSettings(), this.list.refresh(), startModels(), wanted ? this.open(wanted, { missing: true }) : null]);
    watchModels(() => this.#drawEmpty());
    this.root.dataset.ready = '1';
    if (!isPhone()) this.composer.focus();
  }

  /** The server repeats recent notices to every page that connects; this page shows each one once. */
  #notice({ level, text }) {
    this.noticed ??= new Set();
    if (this.noticed.has(text)) return;
    this.noticed.add(text);
    setTimeout(() => this.noticed.delete(text), 600_000);
    toast(text, { level: level || 'info' });
  }

  async #readSettings() {
    try {
      const settings = await get('settings');
      this.composer.ctrlEnter = settings.send_with === 'ctrl_enter';
      this.root.classList.toggle('sy-no-receipts', settings.show_receipts === false);
      if (!themeChosen() && settings.theme !== theme()) setTheme(settings.theme);
    } catch (error) {
      if (error.code !== 'offline') fail(error);
    }
  }

  // --- what is on screen ---

  async open(id, { quiet = false, missing = false } = {}) {
    const asked = (this.asked = {});
    try {
      const snapshot = await get(`conversations/${encodeURIComponent(id)}`);
      if (asked === this.asked) this.#show(snapshot);
    } catch (error) {
      if (asked !== this.asked) return;
      if (error.status === 404 && (missing || quiet)) this.fresh();
      else if (!(quiet && error.code === 'offline')) fail(error);
    }
    if (!quiet) this.drawer(false);
  }

  fresh() {
    this.asked = null;
    this.pendingSystem = null;
    this.#show(null);
    this.drawer(false);
    if (!isPhone()) this.composer.focus();
  }

  #show(snapshot) {
    // An answer to an older question must not undo a newer state of the same chat.
    if (snapshot && this.chat?.id === snapshot.id && snapshot.revision < this.chat.revision) return;
    const another = !snapshot || this.chat?.id !== snapshot.id;
    this.chat = snapshot;
    const nodes = snapshot ? snapshot.messages.filter((node) => node.role !== 'system') : [];
    if (another) {
      this.#unfollow();
      this.thread.reset(nodes);
      this.composer.open(snapshot?.id || 'new');
      this.list.setCurrent(snapshot?.id || null);
      this.#remember(snapshot?.id);
    } else {
      // The stored end of an answer may arrive before its stream's: the view is then given back and drawn from the snapshot.
      const left = this.follower && this.follower.runId !== running(nodes)?.run ? this.follower.nodeId : null;
      if (left) this.#unfollow();
      this.thread.update(nodes);
      this.#announce(nodes.find((node) => node.id === left));
    }
    this.#follow(nodes);
    this.#drawHead();
    this.#drawEmpty();
  }

  #remember(id) {
    local.set('sy-chat', id || null);
    const address = new URL(location.href);
    if (id) address.searchParams.set('c', id);
    else address.searchParams.delete('c');
    history.replaceState(history.state, '', address);
  }

  #drawHead() {
    const title = this.chat?.title || 'New chat';
    this.title.textContent = title;
    this.title.disabled = !this.chat;
    document.title = this.chat?.title ? `${title} · Switchyard` : 'Switchyard';
    const prompt = this.chat ? this.chat.system_prompt : this.pendingSystem;
    this.systemButton.classList.toggle('sy-on', Boolean(prompt));
    this.systemButton.title = prompt ? `System prompt: ${prompt.slice(0, 200)}` : 'Set a system prompt for this chat';
  }

  #drawEmpty() {
    const blank = !this.chat?.messages.some((node) => node.role !== 'system');
    this.empty.hidden = !blank;
    this.thread.element.hidden = blank;
    if (blank) this.empty.replaceChildren(emptyState((text) => this.composer.fill(text)));
  }

  #changedElsewhere({ id, revision }) {
    if (id === this.chat?.id && revision !== this.chat.revision) this.open(id, { quiet: true });
  }

  // --- following a generation ---

  #follow(nodes) {
    const node = running(nodes);
    this.composer.setBusy(Boolean(node));
    if (!node || this.follower) return;
    const view = this.thread.view(node.id);
    if (!view) return;
    this.follower = new RunFollower(view, node.run, {
      onflush: () => this.thread.follow(),
      onend: (final) => this.#ended(final),
      ongone: () => {
        this.follower = null;
        this.composer.setBusy(false);
        this.open(this.chat.id, { quiet: true });
      },
    });
    this.live.textContent = 'The answer has started.';
  }

  #unfollow() {
    this.follower?.release();
    this.follower = null;
  }

  #ended(final) {
    this.follower = null;
    this.composer.setBusy(false);
    const at = this.chat.messages.findIndex((node) => node.id === final.id);
    if (at >= 0) this.chat.messages[at] = final;
    this.#announce(final);
    this.thread.follow();
    this.open(this.chat.id, { quiet: true });
  }

  /** Say that an answer has come to its end: to a screen reader, and in the title of a tab in the background. */
  #announce(node) {
    if (!node || node.status === 'generating') return;
    const tokens = node.receipt?.usage?.completion_tokens;
    this.live.textContent = node.error ? 'The answer failed.' : `The answer is complete${tokens ? `, ${plural(tokens, 'token')}` : ''}.`;
    if (document.hidden && !document.title.startsWith('●')) document.title = `● ${document.title}`;
  }

  async stop() {
    if (!this.follower) return;
    try {
      await this.follower.stop();
    } catch (error) {
      fail(error);
    }
  }

  // --- actions ---

  /** Post a change and show the snapshot it answers with. Returns whether it worked. */
  async change(path, body) {
    if (this.changing) return false;
    this.changing = true;
    try {
      this.#show(await post(path, body));
      return true;
    } catch (error) {
      fail(error);
      return false;
    } finally {
      this.changing = false;
    }
  }

  async send(text) {
    // The same client_id on a second try: the server then knows that it is no second message.
    if (this.unsent?.text !== text) this.unsent = { text, id: uuid() };
    const client = this.unsent.id;
    try {
      if (!this.chat) {
        const body = this.pendingSystem === null ? {} : { system_prompt: this.pendingSystem };
        const created = await createConversation(body);
        local.set('sy-draft-new', null);
        this.chat = created;
        this.composer.key = created.id;
        this.#remember(created.id);
      }
      const body = { text, client_id: client, revision: this.chat.revision };
      if (this.chat.leaf) body.parent = this.chat.leaf;
      const snapshot = await this.#sendOrAsk(this.chat.id, body);
      if (!snapshot) return false;
      this.unsent = null;
      this.#show(snapshot);
      this.thread.toBottom();
      this.list.refresh();
      return true;
    } catch (error) {
      fail(error);
      return false;
    }
  }

  async #sendOrAsk(id, body) {
    try {
      return await post(`conversations/${id}/messages`, body);
    } catch (error) {
      if (!(error instanceof ApiError) || error.status !== 409) throw error;
      const choice = await openDialog({
        title: 'This chat went on elsewhere',
        body: h('p', {}, 'Another tab or program has changed this chat since you opened it. Nothing is lost: keep both, and your message becomes a branch beside the other one.'),
        actions: [{ label: 'Show the newest', value: 'show' }, { label: 'Keep both', value: 'branch', primary: true }],
        testid: 'conflict',
      });
      if (choice === 'branch') return post(`conversations/${id}/messages`, { ...body, branch: true });
      if (choice === 'show') await this.open(id, { quiet: true });
      return null;
    }
  }

  regenerate(node) {
    return this.change(`messages/${node.id}/regenerate`, { client_id: uuid() });
  }

  async version(id) {
    try {
      this.#show(await patch(`conversations/${this.chat.id}`, { leaf: id }));
    } catch (error) {
      fail(error);
    }
  }

  async remove(node) {
    if (this.changing) return;
    this.changing = true;
    try {
      const { snapshot, undo } = await del(`messages/${node.id}`);
      this.#show(snapshot);
      toast('Message deleted.', { timeout: 12_000, action: { label: 'Undo', run: () => this.change(`undo/${undo}`) } });
    } catch (error) {
      fail(error);
    } finally {
      this.changing = false;
    }
  }

  async reloadAndContinue(node) {
    const resident = await loadModel({ model: node.model, loader: node.loader || undefined });
    if (!resident) return;
    if (node.text) await this.change(`messages/${node.id}/continue`, { client_id: uuid() });
    else await this.regenerate(node);
  }

  editLast() {
    const node = this.chat?.messages.findLast((item) => item.role === 'user');
    if (node) this.thread.view(node.id)?.edit();
  }

  #last(role) {
    const node = this.chat?.messages.at(-1);
    return node && node.role === role && node.status !== 'generating' ? node : null;
  }

  async editSystemPrompt() {
    const area = h('textarea', { class: 'sy-editor', rows: 8, dir: 'auto', 'aria-label': 'System prompt', placeholder: 'You are a helpful assistant.', 'data-testid': 'system-prompt-text' });
    area.value = (this.chat ? this.chat.system_prompt : this.pendingSystem) || '';
    const choice = await openDialog({
      title: 'System prompt',
      body: h('div', {}, h('p', { class: 'sy-hint' }, 'Tells the model how to behave in this chat. It is part of every request.'), area),
      actions: [{ label: 'Cancel', value: false }, { label: 'Save', value: true, primary: true }],
      wide: true,
    });
    if (!choice) return;
    if (!this.chat) {
      this.pendingSystem = area.value;
      this.#drawHead();
      return;
    }
    try {
      this.#show(await patch(`conversations/${this.chat.id}`, { system_prompt: area.value }));
    } catch (error) {
      fail(error);
    }
  }

  #menu() {
    const items = [{ label: 'Keyboard shortcuts', icon: 'keyboard', run: showShortcuts }];
    if (!this.chat) return items;
    return [
      { label: 'Rename', icon: 'edit', run: () => this.list.rename(this.chat) },
      { label: 'Export as JSON', icon: 'download', run: () => exportChat(this.chat.id) },
      { label: 'Export as Markdown', icon: 'download', run: () => exportChat(this.chat.id, 'markdown') },
      ...items,
      { label: 'Move to trash', icon: 'trash', danger: true, run: () => this.list.trash(this.chat.id) },
    ];
  }

  drawer(open = !this.root.classList.contains('sy-drawer-open')) {
    this.root.classList.toggle('sy-drawer-open', open);
    if (open && isPhone()) this.list.element.querySelector('button').focus();
  }

  #keys() {
    const run = {
      KeyR: () => this.#last('assistant') && this.regenerate(this.#last('assistant')),
      KeyC: () => this.#last('assistant') && this.change(`messages/${this.#last('assistant').id}/continue`, { client_id: uuid() }),
      KeyN: () => this.fresh(),
      KeyK: () => {
        this.drawer(true);
        this.list.search.focus();
      },
      Slash: showShortcuts,
    };
    document.addEventListener('keydown', (event) => {
      if (document.querySelector('dialog[open]') || document.body.dataset.syPage !== 'chat') return;
      if (event.key === 'Escape' && this.root.classList.contains('sy-drawer-open')) this.drawer(false);
      else if (event.key === 'Escape' && this.follower) this.stop();
      else if (event.altKey && !event.ctrlKey && !event.metaKey && run[event.code]) run[event.code]();
      else return;
      event.preventDefault();
    });
  }
}

/** Called by Gradio when the component is on the page. */
export function mount({ element }) {
  const root = element.querySelector('.sy-chat');
  if (root.dataset.mounted) return;
  root.dataset.mounted = '1';
  const chat = new Chat(root);
  window.addEventListener('sy-drawer', () => chat.drawer());
  window.addEventListener('sy-fresh', () => chat.fresh());
  // A phone's keyboard covers the lower part of the page without resizing it.
  window.visualViewport?.addEventListener('resize', () => {
    root.style.bottom = `${Math.max(0, innerHeight - visualViewport.height - visualViewport.offsetTop)}px`;
  });
  window.addEventListener('focus', () => (document.title = document.title.replace(/^● /, '')));
  chat.start().catch(fail);
}
