// Native <dialog> boxes: focus is trapped and given back by the browser, Esc closes.

import { h } from './dom.js';
import { icon } from './icons.js';

/** Open a box. `actions`: [{label, value, primary, danger}]. Resolves with the chosen value, or null when it was closed. */
export function openDialog({ title, body, actions = [], wide = false, testid = 'dialog' }) {
  return new Promise((resolve) => {
    const box = h('dialog', { class: `sy-dialog${wide ? ' sy-wide' : ''}`, 'aria-label': title, 'data-testid': testid });
    const choose = (value) => {
      box.returnValue = '';
      box.remove();
      resolve(value);
    };
    const buttons = actions.map((action) =>
      h(
        'button',
        {
          type: 'button',
          class: `sy-button${action.primary ? ' sy-primary' : ''}${action.danger ? ' sy-danger' : ''}`,
          onclick: () => choose(action.value),
          autofocus: action.primary,
        },
        action.label,
      ),
    );
    box.append(
      h(
        'div',
        { class: 'sy-dialog-head' },
        h('h2', {}, title),
        h('button', { type: 'button', class: 'sy-icon-button', 'aria-label': 'Close', onclick: () => choose(null) }, icon('close', 18)),
      ),
      h('div', { class: 'sy-dialog-body' }, body),
      buttons.length ? h('div', { class: 'sy-dialog-actions' }, buttons) : '',
    );
    box.addEventListener('cancel', (event) => {
      event.preventDefault();
      choose(null);
    });
    box.addEventListener('click', (event) => {
      if (event.target === box) choose(null);
    });
    document.body.append(box);
    box.showModal();
  });
}

/** Close the open box of this name, as its cross does. */
export const closeDialog = (testid) => document.querySelector(`dialog[data-testid="${testid}"]`)?.dispatchEvent(new Event('cancel', { cancelable: true }));

export const confirmDialog = (title, text, label, danger = true) =>
  openDialog({ title, body: h('p', {}, text), actions: [{ label: 'Cancel', value: false }, { label, value: true, primary: true, danger }] });

/** Ask for one line of text; null when cancelled. */
export async function askText(title, value, label) {
  const input = h('input', { type: 'text', class: 'sy-input', 'aria-label': title, dir: 'auto', maxlength: 200 });
  input.value = value;
  const form = h('form', { onsubmit: (event) => event.preventDefault() }, input);
  input.addEventListener('keydown', (event) => {
    if (event.key === 'Enter' && !event.isComposing) form.closest('dialog').querySelector('.sy-primary').click();
  });
  setTimeout(() => input.select());
  const chosen = await openDialog({ title, body: form, actions: [{ label: 'Cancel', value: false }, { label, value: true, primary: true }] });
  return chosen ? input.value.trim() : null;
}

/** A menu of buttons under `anchor`: items [{label, icon, run, danger}]. Arrow keys move, Esc closes. */
export function openMenu(anchor, items, label) {
  document.querySelector('.sy-menu')?.remove();
  const menu = h('div', { class: 'sy-menu', role: 'menu', 'aria-label': label });
  const close = (refocus = true) => {
    menu.remove();
    document.removeEventListener('pointerdown', outside, true);
    if (refocus) anchor.focus();
  };
  const outside = (event) => {
    if (!menu.contains(event.target)) close(false);
  };
  for (const item of items) {
    const run = () => {
      close();
      item.run();
    };
    menu.append(h('button', { type: 'button', role: 'menuitem', class: item.danger ? 'sy-danger' : '', onclick: run }, icon(item.icon, 18), item.label));
  }
  menu.addEventListener('keydown', (event) => {
    const all = [...menu.children];
    const at = all.indexOf(document.activeElement);
    if (event.key === 'Escape') close();
    else if (event.key === 'ArrowDown') all[(at + 1) % all.length].focus();
    else if (event.key === 'ArrowUp') all[(at - 1 + all.length) % all.length].focus();
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
  document.body.append(menu);
  const spot = anchor.getBoundingClientRect();
  const left = Math.max(8, Math.min(spot.right - menu.offsetWidth, innerWidth - menu.offsetWidth - 8));
  const below = spot.bottom + menu.offsetHeight + 8 < innerHeight;
  menu.style.left = `${left}px`;
  menu.style.top = `${below ? spot.bottom + 4 : Math.max(8, spot.top - menu.offsetHeight - 4)}px`;
  document.addEventListener('pointerdown', outside, true);
  menu.firstChild?.focus();
}

export const SHORTCUTS = [
  ['Enter', 'Send the message'],
  ['Shift + Enter', 'New line'],
  ['Esc', 'Stop the answer'],
  ['↑ in an empty box', 'Edit the last message'],
  ['Alt + R', 'Regenerate the last answer'],
  ['Alt + C', 'Continue the last answer'],
  ['Alt + N', 'New chat'],
  ['Alt + K', 'Search the chats'],
  ['Alt + P', 'Show or hide the parameters'],
  ['Alt + /', 'This list'],
];

export function showShortcuts() {
  const rows = SHORTCUTS.map(([keys, what]) => h('div', { class: 'sy-shortcut' }, h('span', {}, what), h('kbd', {}, keys)));
  return openDialog({ title: 'Keyboard shortcuts', body: h('div', {}, rows), testid: 'shortcuts' });
}
