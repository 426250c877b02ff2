// Light and dark: follows the system until one is chosen. Gradio reads the `dark` class of <body>.

import { local } from './dom.js';

const KEY = 'sy-theme';
export const THEMES = ['system', 'light', 'dark'];
const media = matchMedia('(prefers-color-scheme: dark)');

export const theme = () => (THEMES.includes(local.get(KEY)) ? local.get(KEY) : 'system');

/** Whether this browser has a choice of its own; else the server's setting counts. */
export const themeChosen = () => local.get(KEY) !== null;

export function applyTheme() {
  const choice = theme();
  const dark = choice === 'dark' || (choice === 'system' && media.matches);
  document.body.classList.toggle('dark', dark);
  document.documentElement.style.colorScheme = dark ? 'dark' : 'light';
}

export function setTheme(choice) {
  local.set(KEY, choice);
  applyTheme();
}

export function watchTheme() {
  media.addEventListener('change', applyTheme);
  window.addEventListener('storage', (event) => event.key === KEY && applyTheme());
  applyTheme();
}
