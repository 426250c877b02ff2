// What is loaded, for every part of the page that shows it. Fed by /ui-api/models and the `models` event.

import { get, on, overtaken, post } from './api.js';
import { bytes, debounce } from './dom.js';
import { fail, toast } from './toast.js';

export const models = { state: 'unknown', residents: [], active: null, memory: {}, list: [], loaders: [], make: {}, can_open: false };
const watchers = new Set();

/** Call `fn(models)` now and after every change. */
export function watchModels(fn) {
  watchers.add(fn);
  fn(models);
}

function take(data) {
  const { models: list, ...rest } = data;
  if (!overtaken(rest, models)) Object.assign(models, rest);
  if (list) models.list = list;
  for (const fn of watchers) fn(models);
}

export async function refreshModels() {
  try {
    take(await get('models'));
  } catch (error) {
    if (error.code !== 'offline') fail(error);
  }
}

export function startModels() {
  on('models', take);
  on('resync', refreshModels);
  const readAgain = debounce(() => refreshModels().then(() => window.switchyard?.refreshControls()), 200);
  on('library', readAgain);
  on('install', ({ state }) => state === 'done' && readAgain()); // a backend that has come takes models that none took
  return refreshModels();
}

export const activeResident = () => models.residents.find((resident) => resident.id === models.active) || null;
export const loadingResident = () => models.residents.find((resident) => resident.state === 'loading') || null;
export const modelName = (resident) => resident?.model?.id ?? resident?.model ?? '';
export const loaderTitle = (name) => models.loaders.find((loader) => loader.name === name)?.title || name;

/** The Evaluate page with these models chosen. Gradio draws that page when it is first opened. */
export async function compare(ids) {
  window.switchyard.page('evaluate');
  for (let waited = 0; !window.switchyard.evaluate && waited < 10_000; waited += 50) await new Promise((resolve) => setTimeout(resolve, 50));
  window.switchyard.evaluate?.(ids);
}

/** Start a load; the progress arrives by events. Resolves to the resident, or null after an error was shown. */
export async function loadModel(body) {
  try {
    const { resident } = await post('models/load', body);
    return resident;
  } catch (error) {
    fail(error);
    return null;
  }
}

export async function unloadModel(body = {}) {
  try {
    const { memory_before: before, memory_after: after } = await post('models/unload', body);
    const words = before && after !== undefined && after !== null ? ` Memory: ${bytes(before)} before, ${bytes(after)} after.` : '';
    toast(`Model unloaded.${words}`, { level: 'success' });
    return true;
  } catch (error) {
    fail(error);
    return false;
  }
}
